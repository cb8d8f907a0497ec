#!/bin/bash
# PPO, synchronous, one GPU (a0-l0): 128 environments. Further flags go to run.py: --workers 8, --env-ids atari10, ...
set -euo pipefail
cd "$(dirname "$0")/.."

# A checkpoint cuts all games, so they are far apart: each environment plays 64,000 steps between two, and the longest
# game has 27,000. Every script here keeps to that.
uv run benchmark/run.py --exp-name ppo_sync_1gpu --env-ids atari57 --seeds 1 2 3 --gpus-per-worker 1 \
    --command "uv run --with 'jax[cuda13]' cleanba_ppo_envpool.py --checkpoint-frequency 500" "$@"
