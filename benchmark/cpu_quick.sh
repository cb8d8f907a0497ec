#!/bin/bash
# Two games, two seeds and a small network, in a quarter of an hour on two cores. Ends with a picture and two tables.
set -euo pipefail
cd "$(dirname "$0")/.."

export NPROC=2 # the same bits on a machine with more cores
# No checkpoints: they would cut games that have only begun to be long.
uv run benchmark/run.py --exp-name cpu_quick --env-ids KungFuMaster-v5 UpNDown-v5 --seeds 1 2 --workers 2 \
    --command "uv run cleanba_ppo_envpool.py --img-size 42 --channels 8 16 16 --local-num-envs 8 --num-steps 64 \
        --update-epochs 3 --learning-rate 5e-4 --total-timesteps 98304 --log-frequency 4"
uv run benchmark/plot.py "runs/*__cpu_quick__*" --out plots/cpu_quick
uv run benchmark/learns.py cleanba_ppo_envpool.py "runs/KungFuMaster-v5__cpu_quick__*"
