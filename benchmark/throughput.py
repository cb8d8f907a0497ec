"""Where the time goes: the parts of an update, each timed alone, against the whole run.

    uv run benchmark/throughput.py cleanba_impala_envpool.py -- --local-num-envs 8

Run and parts take turns, a few seconds each, so that other work on the machine disturbs both alike: while the run is
held between two updates, each part is timed alone, by all actors at once or on all learner devices. Figures are medians
over these rounds. The limit is the time of an update if all goes as fast as alone and whatever can overlap does:

    on a CPU, or without --concurrency      playing + learning; on a CPU they share the cores
    else                                    the longer of the two, or of learning + forward passes on a shared device

Playing includes sending the rollouts, and learning sending the parameters. Queues and logs are in no part. A part that
leaves cores idle when alone lets a CPU's run exceed its limit.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from timeit import default_timer, timeit
from typing import Annotated, Any
from unittest.mock import patch

import jax
import tyro

# what the run itself says of the time of a part
INSIDE = {"playing": "rollout_time", "- environments": "env_time", "- forward passes": "inference_time"}
INSIDE |= {"sending rollouts": "storage_time", "learning": "training_time", "**whole run**": "seconds"}
over = lambda rows, mean: {name: mean([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class Options:
    script: tyro.conf.Positional[Path]  # the script to measure
    flags: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # flags of the script, after --
    minutes: float = 4.0  # about how long the run lasts, its compilation included; one round at least
    parts: bool = True  # --no-parts: time the whole run alone, and its memory
    trace: Path | None = None  # write a profile of three updates of a further run to this directory, for TensorBoard
    scale_envs: tuple[int, ...] = ()  # scaling: values of --local-num-envs, each in a process of its own
    scale_steps: tuple[int, ...] = ()  # scaling: values of --num-steps
    scale_learners: tuple[int, ...] = ()  # scaling: numbers of learner devices; a CPU is made to have as many
    json: Path | None = None  # write all figures to this file


def make_shard_data(script, args, sizes, devices, rollouts, keys, total) -> list:
    """What `piece_gradient` takes of each shard, as the scripts' `make_update` makes it."""
    on = [shard.learner for shard in devices.shards]
    numbers = [shard.number for shard in devices.shards]
    if not hasattr(script, "compute_gae"):  # IMPALA
        order = [script.shuffle(args, sizes.shard_envs, keys[d], i) for d, i in zip(on, numbers, strict=True)]
        return [script.ShardData(*columns) for columns in zip(rollouts, order, numbers, strict=True)]
    order = [script.shuffle(args, sizes.shard_envs, keys[d], 0, i) for d, i in zip(on, numbers, strict=True)]
    estimates = [script.compute_gae(rollout, args.gamma, args.gae_lambda) for rollout in rollouts]
    sums = total([script.minibatch_sums(*pair) for pair in zip(estimates, order, strict=True)])
    sums = [sums[d] for d in on]
    squares = total([script.minibatch_squares(*triple) for triple in zip(estimates, order, sums, strict=True)])
    squares = [squares[d] for d in on]
    return [script.ShardData(*columns) for columns in zip(rollouts, estimates, order, sums, squares, strict=True)]


def make_parts(script, args, sizes, devices) -> dict[str, Callable]:
    """Functions that each do all that an update has of a part, and wait for it, on rollouts that are played here."""
    network, key, n = script.make_network(args), jax.random.key(args.seed), args.local_num_envs
    params = jax.jit(network.init)(key, script.np.zeros((1, *script.env_spec(args)[0])))
    state = script.TrainState.create(apply_fn=network.apply, params=params, tx=script.make_optimizer(args, sizes)[0])
    states, keys = ([jax.device_put(x, device) for device in devices.learners] for x in (state, key))
    act, last = policy = script.make_policy(network)
    threads = args.env_threads or max(1, script.num_cores() // sizes.actors)
    seeds = lambda i: script.env_seeds(args.seed, 0, i * n, n)
    envs = [script.Envs(script.make_env(args, seeds(i), threads)) for i in devices.actors]
    inputs = [jax.device_put((params, key), device) for device in devices.actors.values()]
    play = lambda i: script.collect(envs[i], policy, *inputs[i], args.num_steps, script.Counter())
    step = lambda i: [envs[i].step(action) for action in played[i].behaviour.action]
    rows = lambda i: (act(inputs[i][0], obs, inputs[i][1], t) for t, obs in enumerate(played[i].obs[:-1]))
    forward = lambda i: [*map(jax.device_get, rows(i)), jax.device_get(last(inputs[i][0], played[i].obs[-1], key))]
    send = lambda i: jax.block_until_ready(script.ship(played[i], i * n, sizes.shard_envs, devices))
    played = [play(i) for i in devices.actors]
    rollouts = script.assemble(deliveries := [script.Delivery(0, send(i), [], {}) for i in devices.actors])
    update, total = script.make_update(args, network, devices, sizes), script.make_sum_over_shards(devices)
    on = [shard.learner for shard in devices.shards]
    shard_data = make_shard_data(script, args, sizes, devices, rollouts, keys, total)
    gradient = jax.jit(script.partial(script.piece_gradient, network, args))
    piece = lambda *at: [gradient(states[d].params, data, *at) for d, data in zip(on, shard_data, strict=True)]
    gradients = lambda m: [piece(m, i) for i in range(args.gradient_accumulation_steps)]
    optimizer, terms = jax.jit(lambda state, grads: state.apply_gradients(grads=grads)), piece(0, 0)
    grads = [grads for grads, _ in total(terms)]
    minibatches = [*range(args.num_minibatches)] * getattr(args, "update_epochs", 1)
    pool, handoff = ThreadPoolExecutor(sizes.actors), script.HandOff(devices.actors, args.concurrency)
    at_once = lambda work: list(pool.map(work, devices.actors))
    each = lambda work: [jax.block_until_ready(work(m)) for m in minibatches]
    return {
        "playing": lambda: at_once(play),
        "- environments": lambda: at_once(step),
        "- forward passes": lambda: at_once(forward),
        "sending rollouts": lambda: at_once(send),
        "learning": lambda: jax.block_until_ready(update(states, script.assemble(deliveries), keys[0])),
        "- gradients": lambda: each(gradients),
        "- sums over shards": lambda: each(lambda _: total(terms)),
        "- optimizer": lambda: each(lambda _: [*map(optimizer, states, grads)]),
        "sending parameters": lambda: (handoff.give_params(0, params), [*map(handoff.take_params, devices.actors)]),
    }


def limit(parts: dict[str, float], concurrency: bool, cpu: bool, same_device: bool) -> tuple[float, str]:
    """Seconds that an update needs at least, and what sets them. same_device: that of an actor and the learner."""
    playing, learning = parts["playing"] + parts["sending rollouts"], parts["learning"] + parts["sending parameters"]
    if cpu or not concurrency:
        return playing + learning, "actors and learner share the cores" if cpu else "actors and learner take turns"
    learner = f"the {'device that learner and actors share' if same_device else 'learner'} is slower"
    return max((playing, "the actors are slower"), (learning + same_device * parts["- forward passes"], learner))


def take_turns(script, args, parts: dict[str, Callable], minutes: float, trace: Path | None = None) -> list[dict]:
    """Rounds of the run and the parts, or one of the run alone, all in seconds of an update."""
    rounds, rows, signals_received, deadline = [], [], set(), default_timer() + 60 * minutes
    length = min(5, 12 * minutes) if parts else 60 * minutes

    class HandOff(script.HandOff):
        def get_rollouts(self, update):
            begin = default_timer()
            deliveries, end = super().get_rollouts(update), default_timer()
            rows.append(over([x.seconds for x in deliveries], fmean) | {"wait": end - begin, "seconds": end})
            if trace and len(rows) in (3, 6):
                jax.profiler.start_trace(trace) if len(rows) == 3 else jax.profiler.stop_trace()
            if len(rows) >= 6 and end - rows[2]["seconds"] >= length:  # three compile, or were played in a pause
                run = over(rows[3:], fmean) | {"seconds": (end - rows[2]["seconds"]) / (len(rows) - 3)}
                run["training_time"] = run["seconds"] - run["wait"]
                rows.clear()
                while any(rollouts.qsize() < self.concurrency for rollouts in self.rollouts.values()):
                    time.sleep(1e-3)  # an actor plays
                rounds.append({"run": run, "parts": {name: timeit(part, number=1) for name, part in parts.items()}})
                print(f"{'profile' if trace else 'round'}: {run['seconds']:.3f} s an update", file=sys.stderr)
                if default_timer() > deadline:
                    signals_received.add(signal.SIGTERM)  # the run ends after this update
            return deliveries

    with TemporaryDirectory() as place, redirect_stdout(StringIO()), patch.object(script, "HandOff", HandOff):
        script.train(replace(args, resume=f"{place}/run", start_fresh=True), signals_received)
    return rounds


def measure(options: Options) -> dict[str, Any]:
    """All figures of one setting. Exits where the script's flags cannot work."""
    sys.path.insert(0, str(options.script.resolve().parent))
    script = import_module(options.script.stem)
    args = tyro.cli(script.Args, args=options.flags, prog=f"{options.script.name} --")
    args = replace(args, total_timesteps=2**31 - 1, track=False, save_model=False, resume=None)
    count = 1 + max((*args.actor_device_ids, *args.learner_device_ids), default=0)
    mine = f"--xla_gpu_deterministic_ops=true --xla_force_host_platform_device_count={count}"  # the first as in `main`
    os.environ["XLA_FLAGS"] = f"{mine} {os.environ.get('XLA_FLAGS', '')}"
    rule = "one process is measured here, and benchmark/collectives.py measures many"
    try:
        for flag in ("coordinator_address", "distributed", "num_processes", "process_id"):
            script.require(not getattr(args, flag), args, flag, rule, getattr(script.Args, flag))
        with redirect_stdout(sys.stderr):  # it names the devices, and the standard output is for the table
            sizes, devices, _ = script.set_up(args)
    except script.FlagError as error:
        sys.exit(f"error: {error}")
    parts, learners = make_parts(script, args, sizes, devices) if options.parts else {}, devices.learners
    [part() for part in parts.values()]  # compiles
    rounds = take_turns(script, args, parts, options.minutes)
    run, parts = (over([r[name] for r in rounds], median) for name in ("run", "parts"))
    figures = {"device": learners[0].device_kind, "cores": script.num_cores(), "steps": sizes.steps, "rounds": rounds}
    figures |= {"run": run, "parts": parts, "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    figures["device_memory"] = max((x.memory_stats() or {}).get("peak_bytes_in_use", 0) for x in learners) or None
    if parts:
        where = learners[0].platform == "cpu", any(device in learners for device in devices.actors.values())
        figures["limit"], figures["reason"] = limit(parts, args.concurrency, *where)
        figures["ratios"] = [limit(r["parts"], args.concurrency, *where)[0] / r["run"]["seconds"] for r in rounds]
    if options.trace:
        take_turns(script, args, {}, 0, options.trace)
    return figures


def table(f: dict[str, Any]) -> str:
    """Parts, limit and run as Markdown, and a line that says how they compare."""
    steps, run, ratios, seconds = f["steps"], f["run"], f["ratios"], f["run"]["seconds"]
    lines = [f"| an update of {steps} steps | alone, ms | steps/s | in the run, ms |", "|-|-:|-:|-:|"]
    for name, alone in (f["parts"] | {"**limit**": f["limit"], "**whole run**": None}).items():
        ms = ["" if x is None else f"{1e3 * x:,.1f}" for x in (alone, run.get(INSIDE.get(name)))]
        lines.append(f"| {name} | {ms[0]} | {steps / (alone or seconds):,.0f} | {ms[1]} |")
    pace = f"{steps / seconds:,.1f} steps/s, the parts allow {steps / f['limit']:,.1f} ({f['reason']})"
    ratio = f"ratio {median(ratios):.3f} ({len(ratios)} rounds, {min(ratios):.3f} to {max(ratios):.3f})"
    learner, actors = run["wait"] / seconds, run["params_queue_get_time"] / seconds
    waits = f"the learner waits {learner:.0%} of the time for rollouts, the actors {actors:.0%} for parameters"
    return "\n".join([*lines, "", f"{pace}, {ratio}; {waits}"])


def scale(options: Options, points: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Measure every point, flags of the script, in a process of its own, since memory peaks are per process."""
    results, minutes = [], options.minutes / len(points)
    print("| | steps/s | memory, MB | device memory, MB |\n|-|-:|-:|-:|", flush=True)
    for point in points:
        own = replace(options, parts=False, minutes=minutes, flags=(*options.flags, *point))
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            error = (future := process.submit(measure, own)).exception()
        results.append({"setting": point} | ({"error": str(error)} if error else future.result()))
        shown = lambda f: (f["steps"] / f["run"]["seconds"], f["memory"] / 1e6, (f["device_memory"] or 0) / 1e6)
        row = [str(error), "", ""] if error else [f"{x:,.1f}" if x else "" for x in shown(results[-1])]
        print(f"| {' '.join(point)} | {' | '.join(row)} |", flush=True)
    return results


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    points = [("--local-num-envs", str(n)) for n in options.scale_envs]
    points += [("--num-steps", str(n)) for n in options.scale_steps]
    points += [("--learner-device-ids", *map(str, range(n))) for n in options.scale_learners]
    figures = {"script": options.script.name, "flags": options.flags}
    figures |= {"points": scale(options, points)} if points else measure(options)
    if figures.get("parts"):
        print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(any("error" in point for point in figures.get("points", [])))


if __name__ == "__main__":
    main()
