#!/usr/bin/env bash
# What the scripts do on one NVIDIA GPU, in about a quarter of an hour:
#
#     bash benchmark/gpu.sh OUT [PART...]        e.g.  bash benchmark/gpu.sh gpu hashes throughput
#
#   hashes      three updates of every script at its defaults, in two processes each, all on the card at once
#   throughput  benchmark/throughput.py at the defaults, in bfloat16, and with operations of other kinds of determinism
#   learn       IMPALA on Breakout for LEARN seconds, float32 beside bfloat16
#
# OUT gets log.txt, figures.jsonl of throughput.py and, for benchmark/plot.py, runs.tgz. PYTHON is an interpreter with
# jax[cuda13] and what else the scripts need; FLAGS go to every script.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu.sh OUT [PART...]}" && cd "$1" && pwd) work=$(mktemp -d) python=${PYTHON:-python3}
parts=("${@:2}") flags=${FLAGS:-}
[ ${#parts[@]} -gt 0 ] || parts=(hashes throughput learn)
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" # without a GPU JAX would use the CPU for hours
ppo=cleanba_ppo_envpool.py impala=cleanba_impala_envpool.py wrapper=cleanba_ppo_envpool_impala_atari_wrapper.py
none=--xla_gpu_deterministic_ops=false

hashes() ( # bits must not depend on what else the card does, nor on what autotuning finds under it
  export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_ENABLE_COMPILATION_CACHE=0
  for process in 1 2; do
    for run in "$ppo 49152" "$impala 7680" "$wrapper 23040"; do
      $python ${run/ / --total-timesteps } --resume "$work/${run% *}-$process" --start-fresh $flags >"$work/$process-${run##* }.log" 2>&1 &
    done
  done
  wait
  tail -n 2 "$work"/*.log
)
throughput() {
  measure() { # XLA_FLAGS, then what throughput.py takes
    echo "== $*"
    XLA_FLAGS=$1 $python benchmark/throughput.py "$2" --minutes "${MINUTES:-.5}" --json "$work/json" -- "${@:3}" $flags
    tr -d '\n' <"$work/json" >>"$out/figures.jsonl" && echo >>"$out/figures.jsonl"
  }
  for script in $ppo $impala; do
    measure "" $script
    measure "" $script --compute-dtype bfloat16
    measure "$none --xla_gpu_exclude_nondeterministic_ops=true" $script
    measure "$none" $script
  done
  measure "" $ppo --concurrency
}
learn() (
  export XLA_PYTHON_CLIENT_MEM_FRACTION=.4
  for dtype in float32 bfloat16; do
    timeout "${LEARN:-200}" $python $impala --compute-dtype $dtype --exp-name impala_$dtype --resume "$work/runs/$dtype" --start-fresh $flags &
  done
  wait
  tar czf "$out/runs.tgz" -C "$work" --exclude checkpoints runs
)

{
  date; nvidia-smi; nproc
  $python -c 'import flax, jax, optax, sys; print(sys.version, jax.__version__, flax.__version__, optax.__version__)'
  for part in "${parts[@]}"; do echo "=== $part, $SECONDS s"; $part; done
  rm -rf "$work"
} 2>&1 | tee -a "$out/log.txt"
