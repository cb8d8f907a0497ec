#!/bin/bash
# PPO, one update stale, eight GPUs (a0,1-l2,3-d2): two processes, each acts on two GPUs and learns on two;
# 2 x 2 x 32 = 128 environments.
set -euo pipefail
cd "$(dirname "$0")/.."

uv run benchmark/run.py --exp-name ppo_async_8gpu_a0,1-l2,3-d2 --env-ids atari57 --seeds 1 2 3 \
    --processes 2 --gpus-per-worker 8 \
    --command "uv run --with 'jax[cuda13]' cleanba_ppo_envpool.py --checkpoint-frequency 500 --concurrency \
        --actor-device-ids 0 1 --learner-device-ids 2 3 --local-num-envs 32 --num-actor-threads 1" "$@"
