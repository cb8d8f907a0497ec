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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
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
from common import recording

# what the run itself says of the time of a part
INSIDE = {
    "playing": "rollout_time",
    "- environments": "env_time",
    "- forward passes": "inference_time",
    "sending rollouts": "storage_time",
    "learning": "training_time",
}


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


def make_parts(script, args, sizes, devices) -> dict[str, Callable]:
    """Functions that each do all that an update has of a part, and wait for it, on rollouts that are played here."""
    network = script.make_network(args)
    optimizer, _ = script.make_optimizer(args, sizes)
    _, state, params = script.start_or_restore(args, network, optimizer, jax.random.key(args.seed), b"")
    parts = make_actor_parts(script, args, sizes, devices, network, params)
    pieces = parts["sending rollouts"]()
    return parts | make_learner_parts(script, args, sizes, devices, network, state, pieces)


def make_actor_parts(script, args, sizes, devices, network, params) -> dict[str, Callable]:
    """What the actors do, each part by all of them at once."""
    policy = script.make_policy(network)
    act, last = policy
    key = jax.random.key(args.seed)
    env_threads = args.env_threads or max(1, script.num_cores() // sizes.actors)
    pool = ThreadPoolExecutor(sizes.actors)
    envs = {}
    inputs = {}
    rollouts = {}

    def play(actor):
        return script.collect(envs[actor], policy, *inputs[actor], args.num_steps, Counter())

    def step(actor):
        return [envs[actor].step(action) for action in rollouts[actor].behaviour.action]

    def forward(actor):
        params, key = inputs[actor]
        *before, end = rollouts[actor].obs
        outputs = [jax.device_get(act(params, obs, key, t)) for t, obs in enumerate(before)]
        outputs.append(jax.device_get(last(params, end, key)))
        return outputs

    def send(actor):
        pieces = script.ship(rollouts[actor], actor * args.local_num_envs, sizes.shard_envs, devices)
        return jax.block_until_ready(pieces)

    def at_once(work):
        return [*pool.map(work, devices.actors)]

    for actor, device in devices.actors.items():
        seeds = script.env_seeds(args.seed, 0, actor * args.local_num_envs, args.local_num_envs)
        envs[actor] = script.Envs(script.make_env(args, seeds, env_threads))
        inputs[actor] = jax.device_put((params, key), device)
        rollouts[actor] = play(actor)
    return {
        "playing": partial(at_once, play),
        "- environments": partial(at_once, step),
        "- forward passes": partial(at_once, forward),
        "sending rollouts": partial(at_once, send),
    }


def make_learner_parts(script, args, sizes, devices, network, state, pieces) -> dict[str, Callable]:
    """What the learner does with the pieces that each actor sent. Parts of learning repeat what an update called."""
    states = [jax.device_put(state, device) for device in devices.learners]
    deliveries = [script.Delivery(0, sent, [], {}) for sent in pieces]
    key = jax.random.key(args.seed)
    handoff = script.HandOff(devices.actors, args.concurrency)
    calls = []

    def learn(update):
        return jax.block_until_ready(update(states, script.assemble(deliveries), key))

    learn(make_recording_update(script, args, sizes, devices, network, calls))
    minibatches = split_by_minibatch(calls)

    def repeat(name):
        outputs = []
        for programs in minibatches:
            outputs.append(jax.block_until_ready([program() for program in programs[name]]))
        return outputs

    def send():
        handoff.give_params(0, states[0].params)
        for actor in devices.actors:
            handoff.take_params(actor)

    return {
        "learning": partial(learn, script.make_update(args, network, devices, sizes)),
        "- gradients": partial(repeat, "piece_gradient"),
        "- sums over shards": partial(repeat, "sum_over_shards"),
        "- optimizer": partial(repeat, "apply_gradient"),
        "sending parameters": send,
    }


def make_recording_update(script, args, sizes, devices, network, calls):
    """The script's update, which adds to `calls` what it calls: the name of a program, and a function to repeat it."""
    jit = jax.jit

    def recording_jit(function):
        name = getattr(function, "func", function).__name__  # a partial has none, but what it calls has
        return recording(calls, name, jit(function))

    sum_over_shards = recording(calls, "sum_over_shards", script.make_sum_over_shards(devices))
    recording_sum = patch.object(script, "make_sum_over_shards", lambda devices: sum_over_shards)
    with recording_sum, patch.object(jax, "jit", recording_jit):
        return script.make_update(args, network, devices, sizes)


def split_by_minibatch(calls) -> list[dict[str, list[Callable]]]:
    """The calls of each minibatch, by name: up to the optimizer's, and with what comes before an epoch's first one."""
    minibatches = []
    previous = "apply_gradient"
    for name, program in calls:
        if previous == "apply_gradient" and name != previous:
            minibatches.append({})
        minibatches[-1].setdefault(name, []).append(program)
        previous = name
    return minibatches


def limit(parts: dict[str, float], concurrency: bool, cpu: bool, same_device: bool) -> tuple[float, str]:
    """Seconds that an update needs at least, and what sets them. same_device: that of an actor and the learner."""
    playing = parts["playing"] + parts["sending rollouts"]
    learning = parts["learning"] + parts["sending parameters"]
    if cpu:
        return playing + learning, "actors and learner share the cores"
    if not concurrency:
        return playing + learning, "actors and learner take turns"
    slower = "learner"
    if same_device:
        learning += parts["- forward passes"]
        slower = "device that learner and actors share"
    if playing > learning:
        return playing, "the actors are slower"
    return learning, f"the {slower} is slower"


def combine(rows: list[dict[str, float]], mean: Callable) -> dict[str, float]:
    """The mean of every column."""
    return {name: mean([row[name] for row in rows]) for name in rows[0]}


def take_turns(script, args, parts: dict[str, Callable], minutes: float, trace: Path | None = None) -> list[dict]:
    """Rounds of the run and the parts, or one of the run alone, all in seconds of an update."""
    deadline = default_timer() + 60 * minutes
    length = min(5, 12 * minutes) if parts else 60 * minutes  # of a round of the run
    rounds = []
    rows = []  # of the updates since the last round
    signals_received = set()

    class HandOff(script.HandOff):
        def get_rollouts(self, update):
            begin = default_timer()
            deliveries = super().get_rollouts(update)
            end = default_timer()
            row = combine([delivery.seconds for delivery in deliveries], fmean)
            rows.append(row | {"wait": end - begin})
            updates = len(rows) - 3  # three compile, or were played in a pause
            if updates == 0:
                self.start = end
                if trace:
                    jax.profiler.start_trace(trace)
            if trace and updates == 3:
                jax.profiler.stop_trace()
            if updates >= 3 and end - self.start >= length:
                self.end_round((end - self.start) / updates)
            return deliveries

        def end_round(self, seconds):
            run = combine(rows[3:], fmean)
            run["seconds"] = seconds
            run["training_time"] = seconds - run["wait"]
            rows.clear()
            while any(rollouts.qsize() < self.concurrency for rollouts in self.rollouts.values()):
                time.sleep(1e-3)  # an actor plays
            alone = {name: timeit(part, number=1) for name, part in parts.items()}
            rounds.append({"run": run, "parts": alone})
            what = "profile" if trace else "round"
            print(f"{what}: {seconds:.3f} s an update", file=sys.stderr)
            if default_timer() > deadline:
                signals_received.add(signal.SIGTERM)  # the run ends after this update

    with TemporaryDirectory() as place, redirect_stdout(StringIO()), patch.object(script, "HandOff", HandOff):
        script.train(replace(args, resume=f"{place}/run", start_fresh=True), signals_received)
    return rounds


def load(options: Options):
    """The script, and its flags."""
    sys.path.insert(0, str(options.script.resolve().parent))
    script = import_module(options.script.stem)
    args = tyro.cli(script.Args, args=options.flags, prog=f"{options.script.name} --")
    return script, replace(args, total_timesteps=2**31 - 1, track=False, save_model=False, resume=None)


def set_up(script, args):
    """Sizes and devices. Exits where the flags cannot work."""
    count = 1 + max(args.actor_device_ids + args.learner_device_ids, default=0)
    flags = f"--xla_gpu_deterministic_ops=true --xla_force_host_platform_device_count={count}"  # the first as in `main`
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    rule = "one process is measured here, and benchmark/collectives.py measures many"
    try:
        for flag in ("coordinator_address", "distributed", "num_processes", "process_id"):
            script.require(not getattr(args, flag), args, flag, rule, getattr(script.Args, flag))
        with redirect_stdout(sys.stderr):  # it names the devices, and the standard output is for the table
            sizes, devices, _ = script.set_up(args)
    except script.FlagError as error:
        sys.exit(f"error: {error}")
    return sizes, devices


def measure(options: Options) -> dict[str, Any]:
    """All figures of one setting."""
    script, args = load(options)
    sizes, devices = set_up(script, args)
    learners = devices.learners
    parts = make_parts(script, args, sizes, devices) if options.parts else {}
    for part in parts.values():
        part()  # compiles
    rounds = take_turns(script, args, parts, options.minutes)
    figures = {"device": learners[0].device_kind, "cores": script.num_cores(), "steps": sizes.steps, "rounds": rounds}
    for name in ("run", "parts"):
        figures[name] = combine([measured[name] for measured in rounds], median)
    figures["memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in learners]
    figures["device_memory"] = max(peaks) or None
    if parts:
        cpu = learners[0].platform == "cpu"
        same_device = any(device in learners for device in devices.actors.values())
        setting = (args.concurrency, cpu, same_device)
        figures["limit"], figures["reason"] = limit(figures["parts"], *setting)
        figures["ratios"] = []
        for measured in rounds:
            seconds, _ = limit(measured["parts"], *setting)
            figures["ratios"].append(seconds / measured["run"]["seconds"])
    if options.trace:
        take_turns(script, args, {}, 0, options.trace)
    return figures


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.1f}"


def table(figures: dict[str, Any]) -> str:
    """Parts, limit and run as Markdown, and a line that says how they compare."""
    steps = figures["steps"]
    run = figures["run"]
    seconds = run["seconds"]
    lines = [f"| an update of {steps} steps | alone, ms | steps/s | in the run, ms |", "|-|-:|-:|-:|"]
    rows = figures["parts"] | {"**limit**": figures["limit"]}
    for name, alone in rows.items():
        inside = run.get(INSIDE.get(name))
        lines.append(f"| {name} | {milliseconds(alone)} | {steps / alone:,.0f} | {milliseconds(inside)} |")
    lines.append(f"| **whole run** |  | {steps / seconds:,.0f} | {milliseconds(seconds)} |")

    allowed = f"the parts allow {steps / figures['limit']:,.1f} ({figures['reason']})"
    ratios = figures["ratios"]
    spread = f"{len(ratios)} rounds, {min(ratios):.3f} to {max(ratios):.3f}"
    learner = run["wait"] / seconds
    actors = run["params_queue_get_time"] / seconds
    waits = f"the learner waits {learner:.0%} of the time for rollouts, the actors {actors:.0%} for parameters"
    gist = f"{steps / seconds:,.1f} steps/s, {allowed}, ratio {median(ratios):.3f} ({spread}); {waits}"
    return "\n".join([*lines, "", gist])


def scale(options: Options, points: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Measure every point, flags of the script, in a process of its own, since memory peaks are per process."""
    results = []
    each = replace(options, parts=False, minutes=options.minutes / len(points))
    print("| | steps/s | memory, MB | device memory, MB |\n|-|-:|-:|-:|", flush=True)
    for point in points:
        own = replace(each, flags=(*options.flags, *point))
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            future = process.submit(measure, own)
        error = future.exception()
        if error:
            result = {"error": str(error)}
            cells = f"{error} |  | "
        else:
            result = future.result()
            cells = scale_cells(result)
        results.append({"setting": point} | result)
        print(f"| {' '.join(point)} | {cells} |", flush=True)
    return results


def scale_cells(figures: dict[str, Any]) -> str:
    pace = figures["steps"] / figures["run"]["seconds"]
    memory = figures["memory"] / 1e6
    device_memory = ""
    if figures["device_memory"]:
        device_memory = f"{figures['device_memory'] / 1e6:,.1f}"
    return f"{pace:,.1f} | {memory:,.1f} | {device_memory}"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    points = [("--local-num-envs", str(n)) for n in options.scale_envs]
    points += [("--num-steps", str(n)) for n in options.scale_steps]
    points += [("--learner-device-ids", *map(str, range(n))) for n in options.scale_learners]
    figures = {"script": options.script.name, "flags": options.flags}
    if points:
        figures["points"] = scale(options, points)
    else:
        figures |= measure(options)
    if figures.get("parts"):
        print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(any("error" in point for point in figures.get("points", [])))


if __name__ == "__main__":
    main()
