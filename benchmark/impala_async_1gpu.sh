#!/bin/bash
# IMPALA, one update stale, one GPU (a0-l0): 128 environments.
set -euo pipefail
cd "$(dirname "$0")/.."

uv run benchmark/run.py --exp-name impala_async_1gpu --env-ids atari57 --seeds 1 2 3 --gpus-per-worker 1 \
    --command "uv run --with 'jax[cuda13]' cleanba_impala_envpool.py --checkpoint-frequency 3200 --concurrency" "$@"
