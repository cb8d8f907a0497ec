#!/bin/bash
# PPO under IMPALA's Atari protocol, one update stale, one GPU (a0-l0): 60 environments.
set -euo pipefail
cd "$(dirname "$0")/.."

uv run benchmark/run.py --exp-name ppo_impala_wrapper_1gpu --env-ids atari57 --seeds 1 2 3 --gpus-per-worker 1 \
    --command "uv run --with 'jax[cuda13]' cleanba_ppo_envpool_impala_atari_wrapper.py --checkpoint-frequency 500" "$@"
