#!/bin/bash
# IMPALA, one update stale, eight GPUs (a0-l1,2,3-d2): two processes, each acts on one GPU and learns on three.
set -euo pipefail
cd "$(dirname "$0")/.."

# 2 x 60 = 120 environments: 128 are no six shards, one for each learner, of four minibatches each.
uv run benchmark/run.py --exp-name impala_async_8gpu_a0-l1,2,3-d2 --env-ids atari57 --seeds 1 2 3 \
    --processes 2 --gpus-per-worker 8 \
    --command "uv run --with 'jax[cuda13]' cleanba_impala_envpool.py --checkpoint-frequency 3200 --concurrency \
        --actor-device-ids 0 --learner-device-ids 1 2 3 --num-shards 6 --local-num-envs 60 --num-actor-threads 1" "$@"
