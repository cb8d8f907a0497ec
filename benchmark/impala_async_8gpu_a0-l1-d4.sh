#!/bin/bash
# IMPALA, one update stale, eight GPUs (a0-l1-d4): four processes, each acts on one GPU and learns on another;
# 4 x 32 = 128 environments.
set -euo pipefail
cd "$(dirname "$0")/.."

uv run benchmark/run.py --exp-name impala_async_8gpu_a0-l1-d4 --env-ids atari57 --seeds 1 2 3 \
    --processes 4 --gpus-per-worker 8 \
    --command "uv run --with 'jax[cuda13]' cleanba_impala_envpool.py --checkpoint-frequency 3200 --concurrency \
        --actor-device-ids 0 --learner-device-ids 1 --local-num-envs 32 --num-actor-threads 1" "$@"
