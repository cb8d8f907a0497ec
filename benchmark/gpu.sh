#!/bin/bash
# What the scripts do on one NVIDIA GPU, in about twelve minutes, the most important first:
#
#     bash benchmark/gpu.sh OUT [SECONDS [PART...]]        e.g.  bash benchmark/gpu.sh gpu 470 hashes throughput
#
#   hashes      three updates of every script at its defaults, in two processes; IMPALA resumed; gradients
#   throughput  benchmark/throughput.py of PPO and IMPALA
#   published   steps/s of ports of the published scripts, cleanba_ppo.py and cleanba_impala.py of the folder PUBLISHED
#   gradients   benchmark/gpu.py: sizes, float32 against bfloat16, deterministic operations or not, scripts of OLD
#   learn       IMPALA on Breakout for LEARN seconds, float32 beside bfloat16; runs.tgz is for benchmark/plot.py
#   whole       steps/s of whole runs with bfloat16, and with operations that need not be deterministic; the third script
#
# It ends within SECONDS. OUT gets log.txt, throughput.jsonl and runs.tgz. PYTHON is an interpreter with jax[cuda13] and
# what else the scripts need; FLAGS go to every script.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu.sh OUT [SECONDS [PART...]]}" && cd "$1" && pwd) end=${2:-720} work=$(mktemp -d)
parts=("${@:3}") python=${PYTHON:-python3} flags=${FLAGS:-} old=${OLD:+$(realpath "$OLD")} published=${PUBLISHED:+$(realpath "$PUBLISHED")}
[ ${#parts[@]} -gt 0 ] || parts=(hashes throughput published gradients learn whole)
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/cleanba-gpu-cache}
ppo=cleanba_ppo_envpool.py impala=cleanba_impala_envpool.py wrapper=cleanba_ppo_envpool_impala_atari_wrapper.py
low="--compute-dtype bfloat16" none=--xla_gpu_deterministic_ops=false
some="$none --xla_gpu_exclude_nondeterministic_ops=true"

step() { # LIMIT COMMAND...: for LIMIT seconds at most, and not past the end
  local limit=$(($1 < end - SECONDS ? $1 : end - SECONDS))
  if [ "$limit" -lt 10 ]; then echo "== no time for ${*:2}"; return; fi
  echo "== $SECONDS s: ${*:2}"
  timeout -k 8 "$limit" "${@:2}" || echo "== exit code $?"
}
beside() {
  number=$((${number:-0} + 1))
  step "$@" >"$work/$number.log" 2>&1 &
}
gather() { wait; cat "$work"/*.log; rm "$work"/*.log; }
gradient() { step "$1" env XLA_FLAGS="$2" "$python" benchmark/gpu.py "${@:3}"; }
throughput() { # XLA_FLAGS SCRIPT OPTIONS...
  step 90 env XLA_FLAGS="$1" "$python" benchmark/throughput.py "$2" --minutes "${MINUTES:-.5}" --json "$work/json" "${@:3}" $flags
  if [ -e "$work/json" ]; then echo "{\"xla\": \"$1\", \"figures\": $(tr -d '\n' <"$work/json")}" >>"$out/throughput.jsonl"; fi
  rm -f "$work/json"
}
run() { echo "$python $1 --resume $work/$2 --start-fresh $flags"; }

hashes() ( # all share the GPU: bits must not depend on that, nor on what autotuning finds under it
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  for cached in 1 0; do
    export JAX_ENABLE_COMPILATION_CACHE=$cached
    for updates in "$ppo 49152" "$impala 7680" "$wrapper 23040"; do
      beside 150 $(run "${updates/ / --total-timesteps }" "${updates% *}-$cached")
    done
    beside 150 env XLA_FLAGS= "$python" benchmark/gpu.py "$ppo $flags" "$impala $flags" "$ppo $low $flags" "$impala $low $flags"
  done
  for xla in "$some" "$none"; do beside 150 env XLA_FLAGS="$xla" "$python" benchmark/gpu.py "$ppo $flags" "$impala $flags"; done
  again=$(run "$impala --total-timesteps 10240 --checkpoint-frequency 2" again)
  { step 100 $again; rm -f "$work/again/checkpoints/4.msgpack"; step 60 $again; } >"$work/0.log" 2>&1 &
  gather
)
gradients() {
  gradient 90 "" "$ppo $flags" "$impala $flags" "$ppo $low $flags" "$impala $low $flags" "$ppo --num-minibatches 1 $flags" "$ppo $low --num-minibatches 1 $flags"
  for xla in "$some" "$none"; do gradient 60 "$xla" "$ppo $flags" "$impala $flags"; done
  [ -z "$old" ] || gradient 60 "" "$old/$ppo $flags" "$old/$impala $flags"
  gradient 60 "$some" "$ppo $flags" "$impala $flags" # from the cache, what autotuning found too
}
published() (
  [ -n "$published" ] && cd "$work" || return 0 # they write to the folder runs
  for script in ppo impala; do STEADY_SECONDS=12 step 75 "$python" "$published/cleanba_$script.py" ${PUBLISHED_FLAGS:-}; done
)
whole() {
  throughput "" $ppo --no-parts -- --concurrency # as the published script has it
  for script in $impala $ppo; do throughput "" "$script" --no-parts -- $low; done
  for xla in "$some" "$none"; do for script in $impala $ppo; do throughput "$xla" "$script" --no-parts --; done; done
  throughput "" $wrapper --
}
learn() (
  export XLA_PYTHON_CLIENT_MEM_FRACTION=.4
  for dtype in float32 bfloat16; do
    beside "${LEARN:-200}" $(run "$impala --compute-dtype $dtype --exp-name impala_$dtype" "runs/$dtype")
  done
  gather
  tar czf "$out/runs.tgz" -C "$work" --exclude checkpoints runs
)

{
  date; nvidia-smi; nproc; "$python" -c 'import jax, flax, optax, sys; print(sys.version, jax.__version__, flax.__version__, optax.__version__, jax.devices())'
  for part in "${parts[@]}"; do
    echo "=== $part"
    if [ "$part" = throughput ]; then for script in $ppo $impala; do throughput "" "$script" --; done; else "$part"; fi
  done
  rm -rf "$work"; echo "=== $SECONDS s"
} 2>&1 | tee -a "$out/log.txt"
