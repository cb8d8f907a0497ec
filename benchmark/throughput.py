"""Where the time goes: the parts of an update, each timed alone, against the whole run.

    uv run benchmark/throughput.py cleanba_impala_envpool.py -- --local-num-envs 8

Starts one run of the script and notes what its first update calls: pools, forward passes, shipments and the programs
of the learner, with their inputs. Then parts and run take turns. Between two updates, while the run is held, each part
is timed alone: its calls once more, by all actors at the same time or on all the learner's devices, waiting where the
learner waits. Then the run makes a few updates. Every round gives a ratio; figures are medians over the rounds. A
round counts as many rollouts as updates: under --concurrency it begins one update after the pause, when the actors
play beside the learner again.

The limit is the time of an update if all goes as fast as alone and whatever can overlap does:

    on a CPU                the sum of all parts: they share the cores, with or without --concurrency
    without --concurrency   playing + learning
    with                    the longer of the two, or of learning + forward passes where these share a device

    playing                 sending the rollout + the longest of: environments, forward passes, both of one actor
                            (actors fill each other's gaps, but one actor does one thing at a time)
    learning                gradients, optimizer, the learner's other programs, sending parameters

Python, queues and logs are no part of it. A part that leaves cores idle when alone lets a CPU's run exceed its limit.

Scaling: every value of --scale-envs, --scale-steps and --scale-learners is a run in a process of its own, since memory
peaks are per process. On a CPU, XLA_FLAGS makes as many devices as a point has learners.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from types import ModuleType
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import jax
import tyro


@dataclass(frozen=True)
class Options:
    script: tyro.conf.Positional[Path]  # the script to measure
    flags: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # flags of the script, after --
    minutes: float = 4.0  # about how long to measure, beside the first update; one round at least
    parts: bool = True  # --no-parts: time the whole run alone, and its memory
    scale_envs: tuple[int, ...] = ()  # scaling: values of --local-num-envs
    scale_steps: tuple[int, ...] = ()  # scaling: values of --num-steps
    scale_learners: tuple[int, ...] = ()  # scaling: numbers of learner devices
    json: Path | None = None  # write all figures to this file


# === A run that can be held ===========================================================================================


class Call(NamedTuple):
    function: Callable
    inputs: tuple
    named: dict[str, Any]
    result: Any = None

    def repeat(self) -> Any:
        return self.function(*self.inputs, **self.named)


class Jax:
    """Stands in for the module `jax` in a script: functions jitted through it tell `note` of every call."""

    def __init__(self, note: Callable[[tuple[str, Call]], None]):
        self.note = note

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    def jit(self, function: Callable, **options) -> Callable:
        program, name = jax.jit(function, **options), getattr(function, "func", function).__name__

        def call(*inputs, **named):
            part = "optimizer" if hasattr(inputs[0], "apply_gradients") else "other"
            self.note(("gradient" if name == "shard_gradient" else part, Call(program, inputs, named)))
            return program(*inputs, **named)

        return call


class Done(KeyboardInterrupt):
    """Ends the run as Ctrl-C would."""


Protocol = Generator[None, None, Any]  # each `yield` lets the run make one update, and comes back before the next


class Run:
    """A run of a script that is held before every update, and, if `noting`, what its first update called.

    Attributes:
        steps: environment steps of an update.
        pools, plays, ships: calls of `make_env`, `collect` and `ship`. Those of every actor's first rollout can be
            repeated; later ones are None.
        programs: (part, call) of the learner's programs in their order, None where the learner waited.
        waits: the learner's wait for each round of rollouts, and what every actor says of its time, in seconds.
    """

    def __init__(self, script: ModuleType, args: Any, noting: bool):
        if args.distributed or args.coordinator_address or args.num_processes:
            flags = "--distributed, --coordinator-address, --num-processes"
            raise script.FlagError(f"{flags}: one process is measured here, and benchmark/collectives.py measures many")
        sizes = script.check_args(replace(args, total_timesteps=sys.maxsize))
        endless = dict(total_timesteps=sizes.steps * 10**6, track=False, save_model=False, resume=None)
        self.script, self.args, self.actors, self.steps = script, replace(args, **endless), sizes.actors, sizes.steps
        self.pools, self.plays, self.ships, self.programs, self.waits = [], [], [], [], []
        self.noting, self.updates = noting, 0

    def start(self, protocol: Protocol) -> None:
        """Run until the protocol ends. Raises the script's FlagError."""
        script, handoff = self.script, self.script.HandOff
        with ExitStack() as stack:
            for name, calls in (("make_env", self.pools), ("collect", self.plays), ("ship", self.ships)):
                stack.enter_context(patch.object(script, name, self._noted(getattr(script, name), calls)))
            stack.enter_context(patch.object(handoff, "get_rollouts", self._timed(handoff.get_rollouts)))
            stack.enter_context(patch.object(script, "make_update", self._held(script.make_update, protocol)))
            # runs leave nothing behind, and say nothing unless they fail
            stack.enter_context(chdir(stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))))
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
            with suppress(Done):
                script.train(self.args)

    def rest(self) -> None:
        """Wait until no actor plays: all have played what they may before the update that is held."""
        while len(self.ships) < self.actors * (self.updates + 1 + self.args.concurrency):
            self.wait(())  # raises if an actor failed
            time.sleep(1e-3)

    def _noted(self, function: Callable, calls: list[Call | None]) -> Callable:
        def call(*inputs, **named):
            result = function(*inputs, **named)
            keep = self.noting and len(calls) < self.actors
            calls.append(Call(function, inputs, named, result) if keep else None)
            return result

        return call

    def _timed(self, get_rollouts: Callable) -> Callable:
        def call(handoff, update):
            begin = time.perf_counter()
            deliveries = get_rollouts(handoff, update)
            self.waits.append((time.perf_counter() - begin, [delivery.seconds for delivery in deliveries]))
            return deliveries

        return call

    def _held(self, make_update: Callable, protocol: Protocol) -> Callable:
        def note(program):
            if self.noting and self.updates == 1:
                self.programs.append(program)

        def make(args, network, devices, sizes, wait):
            self.devices, self.wait = devices, wait
            with patch.object(self.script, "jax", Jax(note)):
                update = make_update(args, network, devices, sizes, lambda tree: (note(None), wait(tree)))

            def held_update(states, *inputs):
                self.params = states[0].params
                if next(protocol, Done) is Done:
                    raise Done
                self.updates += 1
                return update(states, *inputs)

            return held_update

        return make


# === Times ============================================================================================================


class Actor(NamedTuple):
    envs: Any
    play: Call  # collect(envs, policy, params, key, ...) -> rollout
    ship: Call


def step_environments(actor: Actor) -> None:
    for action in actor.play.result.behaviour.action:
        actor.envs.step(action)
    actor.envs.pop_games()


def pass_forward(actor: Actor) -> None:
    _, policy, params, key, *_ = actor.play.inputs
    *rows, last = actor.play.result.obs
    for t, obs in enumerate(rows):
        jax.device_get(policy.act(params, obs, key, t))
    jax.device_get(policy.last(params, last))


def send_rollout(actor: Actor) -> None:
    jax.block_until_ready(actor.ship.repeat())


def send_params(run: Run) -> None:
    jax.block_until_ready([jax.device_put(run.params, device) for device in run.devices.actors])


def learn(part: str, run: Run) -> None:
    outputs = []
    for call in run.programs:
        if call is None:
            jax.block_until_ready(outputs)
            outputs = []
        elif call[0] == part:
            outputs.append(call[1].repeat())
    jax.block_until_ready(outputs)


def spent() -> tuple[float, float, float]:
    """Seconds of cores that the machine has spent on all processes, on this one, and in all, on nothing too."""
    user, nice, system, idle, iowait, *others = map(int, Path("/proc/stat").read_text().split()[1:9])
    busy, tick = user + nice + system + sum(others), os.sysconf("SC_CLK_TCK")
    return busy / tick, time.process_time(), (busy + idle + iowait) / tick


def clock(work: Callable, *jobs) -> float:
    """Seconds in which threads do `work` on all jobs at the same time."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        begin = time.perf_counter()
        list(threads.map(work, jobs))
        return time.perf_counter() - begin


def time_parts(run: Run, actors: list[Actor], repeats: int) -> dict[str, float]:
    """Seconds of an update that each part takes alone, medians; "one_actor" is part of the first two."""
    works = {
        "environments": lambda: clock(step_environments, *actors),
        "forward": lambda: clock(pass_forward, *actors),
        "one_actor": lambda: clock(step_environments, actors[0]) + clock(pass_forward, actors[0]),
        "rollout": lambda: clock(send_rollout, *actors),
        "gradient": lambda: clock(partial(learn, "gradient"), run),
        "optimizer": lambda: clock(partial(learn, "optimizer"), run),
        "other": lambda: clock(partial(learn, "other"), run),
        "params": lambda: clock(send_params, run),
    }
    return medians([{name: work() for name, work in works.items()} for _ in range(repeats)])


def limit(parts: dict[str, float], concurrency: bool, cpu: bool, same_device: bool) -> tuple[float, str]:
    """Seconds that an update needs at least, as the top of this file says, and what sets them.

    same_device: an actor and the learner share a device.
    """
    if cpu:
        return sum(parts.values()) - parts["one_actor"], "all parts share the cores"
    play = parts["rollout"] + max(parts["environments"], parts["forward"], parts["one_actor"])
    learning = sum(parts[name] for name in ("gradient", "optimizer", "other", "params"))
    if not concurrency:
        return play + learning, "actors and learner take turns"
    learner = (learning, "the learner is the slower side")
    if same_device:
        learner = (learning + parts["forward"], "the device that learner and actors share is the slower side")
    return max((play, "the actors are the slower side"), learner)


def time_run(run: Run, updates: int) -> Protocol:
    """Let the run make so many steady updates; returns their seconds, per update."""
    if run.args.concurrency:
        yield  # its rollout was played before the pause
    begin, first = time.perf_counter(), len(run.waits)
    for _ in range(updates):
        yield
    seconds, waits = (time.perf_counter() - begin) / updates, run.waits[first:]
    actors = [actor for _, actors in waits for actor in actors]
    names = ("rollout_time", "env_time", "inference_time", "storage_time")
    means = {name: statistics.fmean(actor[name] for actor in actors) for name in names}
    return means | {"seconds": seconds, "rollout_queue_get_time": statistics.fmean(wait for wait, _ in waits)}


def plan(seconds: float, update: float) -> tuple[int, int]:
    """(updates, repetitions of the parts) of a round, given the seconds of all rounds and of an update.

    Short rounds, of 5 s of updates or less: so a machine that is at times busy with something else is so for both.
    """
    updates = max(1, round(min(5, seconds / 5) / update))
    return updates, max(1, updates // 4)


# === Reports ==========================================================================================================


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def compare(run: Run, minutes: float, figures: dict[str, Any], console) -> Protocol:
    """Parts and run in turn. Times are seconds of an update."""
    yield
    run.rest()
    deadline = time.monotonic() + 60 * minutes
    calls = zip(run.pools, run.plays, run.ships, strict=False)  # with --concurrency some play again already
    actors = [Actor(run.script.Envs(pool.repeat()), play, ship) for pool, play, ship in calls]
    on, learners, *_ = run.devices
    same, concurrency = not {*on}.isdisjoint(learners), run.args.concurrency
    limit_of = partial(limit, concurrency=concurrency, cpu=on[0].platform == "cpu", same_device=same)
    updates, repeats = plan(60 * minutes, limit_of(time_parts(run, actors, 1))[0])
    parts, rounds = [time_parts(run, actors, repeats)], []
    while not rounds or time.monotonic() < deadline:
        before = spent()
        whole = yield from time_run(run, updates)
        run.rest()
        parts.append(time_parts(run, actors, repeats))
        total, own, cores = (x - y for x, y in zip(spent(), before, strict=True))
        around = medians(parts[-2:])  # of two: their mean
        ratio, others = limit_of(around)[0] / whole["seconds"], max(0.0, (total - own) / cores)
        rounds.append({"parts": around, "run": whole, "ratio": ratio, "others": others})
        pace = f"{run.steps / whole['seconds']:,.1f} steps/s, ratio {ratio:.3f}"
        print(f"round {len(rounds)}: {pace}, others used {others:.0%} of the cores", file=console, flush=True)
    parts, whole = (medians([r[name] for r in rounds]) for name in ("parts", "run"))
    seconds, reason = limit_of(parts)
    names = [program[0] for program in run.programs if program]
    playing = whole["rollout_time"] + whole["storage_time"]
    figures |= {"actors": run.actors, "updates": updates, "rounds": rounds, "parts": parts, "run": whole}
    figures |= {"calls": {name: names.count(name) for name in sorted({*names})}}
    figures |= {"limit": {"seconds": seconds, "reason": reason}}
    figures |= {name: statistics.median(r[name] for r in rounds) for name in ("ratio", "others")}
    learner_wait, actor_wait = whole["rollout_queue_get_time"], max(0.0, whole["seconds"] - playing)
    figures |= {"waits": {"learner": learner_wait / whole["seconds"], "actors": actor_wait / whole["seconds"]}}


def run_alone(run: Run, minutes: float, figures: dict[str, Any], console) -> Protocol:
    """The run without pauses, and the peak of its memory in bytes."""
    yield
    update = (yield from time_run(run, 1))["seconds"]
    figures["updates"] = max(1, int(60 * minutes / update))
    figures["run"] = yield from time_run(run, figures["updates"])
    figures["memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    figures["device_memory"] = max(peaks, default=None)


def table(figures: dict[str, Any]) -> str:
    """Parts, limit and run as Markdown, and the line that says how they compare."""
    parts, run, steps, calls, waits = (figures[name] for name in ("parts", "run", "steps", "calls", "waits"))
    learner = sum(parts[name] for name in ("gradient", "optimizer", "other"))
    rows = [
        ("environments", parts["environments"], run["env_time"]),
        ("forward passes", parts["forward"], run["inference_time"]),
        ("rollouts to the learner", parts["rollout"], run["storage_time"]),
        (f"{calls['gradient']} shard gradients", parts["gradient"], None),
        (f"{calls['optimizer']} optimizer steps", parts["optimizer"], None),
        (f"{calls['other']} other programs of the learner", parts["other"], None),
        ("these three", learner, run["seconds"] - run["rollout_queue_get_time"]),
        ("parameters to the actors", parts["params"], None),
        ("**limit**", figures["limit"]["seconds"], None),
        ("**whole run**", None, run["seconds"]),
    ]
    lines = [f"| an update of {steps} steps | alone, ms | steps/s | in the run, ms |", "|-|-:|-:|-:|"]
    for name, alone, inside in rows:
        ms = ["" if x is None else f"{1e3 * x:,.1f}" for x in (alone, inside)]
        lines.append(f"| {name} | {ms[0]} | {steps / (alone or inside):,.0f} | {ms[1]} |")
    ratios = [r["ratio"] for r in figures["rounds"]]
    pace = f"{steps / run['seconds']:,.1f} steps/s, the parts allow {steps / figures['limit']['seconds']:,.1f}"
    ratio = f"ratio {figures['ratio']:.3f} ({len(ratios)} rounds, {min(ratios):.3f} to {max(ratios):.3f})"
    waiting = f"the learner waits {waits['learner']:.0%} of the time for rollouts"
    waiting += f", the actors {waits['actors']:.0%} for parameters"
    others = figures["others"]
    waiting += f"; other processes used {others:.0%} of the cores, which makes this unreliable" if others > 0.05 else ""
    return "\n".join([*lines, "", f"{pace} ({figures['limit']['reason']}), {ratio}; {waiting}"])


def load(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path.resolve())
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def measure(options: Options) -> dict[str, Any]:
    """The figures of one run. Exits with 2 where the script's flags cannot work."""
    script, figures = load(options.script), {}
    args = tyro.cli(script.Args, args=options.flags, prog=f"{options.script.name} --")
    if "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):  # as the script's own main does
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    try:
        run = Run(script, args, noting=options.parts)
        run.start((compare if options.parts else run_alone)(run, options.minutes, figures, sys.stderr))
    except script.FlagError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    device = f"{jax.local_devices()[0].device_kind}, {script.num_cores()} cores"
    return {"device": device, "steps": run.steps} | figures


def scale(options: Options, points: list[tuple[str, list[int]]]) -> list[dict[str, Any]]:
    """Run every point, (flag, values), in a process of its own, print a row for each, and return their figures."""
    print("| | steps/s | memory, MB | device memory, MB |\n|-|-:|-:|-:|", flush=True)
    results = []
    for flag, values in points:
        setting = [flag, *map(str, values)]
        devices = f"--xla_force_host_platform_device_count={len(values)}" if flag == "--learner-device-ids" else ""
        environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()}
        with NamedTemporaryFile("r") as file:
            own = ["--no-parts", "--minutes", str(options.minutes / len(points)), "--json", file.name]
            command = [sys.executable, __file__, str(options.script), *own, "--", *options.flags, *setting]
            process = subprocess.run(command, env=environment, capture_output=True, text=True)
            if process.returncode:
                said = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
                results.append({"setting": setting, "error": said[-1]})
                row = [said[-1], "", ""]
            else:
                results.append({"setting": setting} | json.load(file))
                steps, run, *memory = (results[-1][name] for name in ("steps", "run", "memory", "device_memory"))
                row = [f"{steps / run['seconds']:,.1f}", *("" if m is None else f"{m / 1e6:,.0f}" for m in memory)]
        print(f"| {' '.join(setting)} | {' | '.join(row)} |", flush=True)
    return results


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    points = [("--local-num-envs", [n]) for n in options.scale_envs]
    points += [("--num-steps", [n]) for n in options.scale_steps]
    points += [("--learner-device-ids", list(range(n))) for n in options.scale_learners]
    figures = {"points": scale(options, points)} if points else measure(options)
    if "ratio" in figures:
        print(table(figures))
    if options.json:
        about = {"script": options.script.name, "flags": options.flags}
        options.json.write_text(json.dumps(about | figures, indent=2) + "\n")
    if any("error" in point for point in figures.get("points", [])):
        sys.exit(1)


if __name__ == "__main__":
    main()
