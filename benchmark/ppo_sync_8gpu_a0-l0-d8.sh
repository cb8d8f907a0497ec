#!/bin/bash
# PPO, synchronous, eight GPUs (a0-l0-d8): eight processes, each acts and learns on one GPU; 8 x 16 = 128 environments.
set -euo pipefail
cd "$(dirname "$0")/.."

# Eight shards where one GPU has four: every learner needs one. So the bits are not those of ppo_sync_1gpu.sh.
uv run benchmark/run.py --exp-name ppo_sync_8gpu_a0-l0-d8 --env-ids atari57 --seeds 1 2 3 \
    --processes 8 --gpus-per-worker 8 \
    --command "uv run --with 'jax[cuda13]' cleanba_ppo_envpool.py --checkpoint-frequency 500 \
        --local-num-envs 16 --num-actor-threads 1 --num-shards 8" "$@"
