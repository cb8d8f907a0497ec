"""A sweep: one command on many games and seeds, as many runs at a time as there are workers.

    uv run benchmark/run.py --command "uv run cleanba_ppo_envpool.py --concurrency" --env-ids atari3 --seeds 1 2 3
    uv run benchmark/run.py --command "..." --workers 8 --gpus-per-worker 1                  eight GPUs, eight runs
    uv run benchmark/run.py --command "..." --processes 8 --gpus-per-worker 8                eight GPUs, one run
    uv run benchmark/run.py --command "..." --gpus-per-worker 1 --workers 20 --slurm | sbatch

A run is written to runs/GAME__EXPERIMENT__SEED__HASH, its output to log.txt there. The hash stands for the script, its
flags and the number of processes: other flags make other runs, and a second start of the same sweep skips what is
finished and resumes what is not, from the last checkpoint if the command has --checkpoint-frequency. A run holds a
lock, so that two launchers may share a sweep. Ctrl-C or SIGTERM ends all runs at their next update, a second one at
once; a launcher that is killed takes its runs with it. Each worker has its own share of the cores, the same number for
all, and its own GPUs. On a CPU the bits depend on that number, unless the environment variable NPROC is set.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from common import read_json, require
from rich.live import Live
from rich.text import Text

HERE = Path(__file__).parent
OWN_FLAGS = ["--env-id", "--seed", "--exp-name", "--resume", "--start-fresh"]  # what makes a command a run of the sweep
OWN_FLAGS += ["--distributed", "--coordinator-address", "--num-processes", "--process-id"]
TODO = ("waiting", "elsewhere")


@dataclass(frozen=True)
class Options:
    command: str  # a script with its flags, as typed in a shell; game, seed and name are added
    env_ids: tuple[str, ...] = ("atari3",)  # games, or the lists of benchmark/games: atari3, atari10, atari57
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds that each game is run with
    exp_name: str | None = None  # name of the experiment, a part of each run's name; the script's name if not given
    workers: int = 1  # runs at a time
    processes: int = 1  # processes of each run
    gpus_per_worker: int = 0  # GPUs of each run, in equal parts for its processes; 0 leaves the choice to JAX
    slurm: bool = False  # print a SLURM job array of the runs that are not finished, made of slurm_array.sbatch
    dry_run: bool = False  # print what would be run, one shell command for each run that is not finished

    @property
    def script(self) -> list[str]:
        """The words of the command from its script on: how Python is started makes no other run."""
        words = shlex.split(self.command)
        return next((words[i:] for i, word in enumerate(words) if word.endswith(".py")), [])

    @property
    def experiment(self) -> str:
        return self.exp_name or Path(self.script[0]).stem


@dataclass
class Run:
    """One run of the sweep: game, seed, and what has become of it."""

    env_id: str
    seed: int
    name: str
    state: str = "waiting"  # running, finished, failed, preempted, or elsewhere: another launcher has it
    processes: list[subprocess.Popen] = field(default_factory=list)
    started: float = 0.0
    trouble: str = ""  # why it could not even be started

    @property
    def log(self) -> Path:
        return Path("runs", self.name, "log.txt")

    def finished(self) -> bool:
        """Whether the run's own summary says so."""
        return read_json(self.log.with_name("summary.json")).get("status") == "finished"

    def last_line(self) -> str:
        """The last line of the log that says something."""
        lines = self.log.read_bytes()[-2000:].decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if re.search(r"\w", line)), "")

    def start(self, options: Options, worker: int) -> bool:
        """Start the run's processes, unless it is finished, another launcher has it, or nothing can be written."""
        try:
            return self.launch(options, worker)
        except OSError as error:  # of a full disk, which must not end the sweep
            self.state = "failed"
            self.trouble = f"it cannot be started: {error}"
            for process in self.processes:
                process.kill()
            return False

    def launch(self, options: Options, worker: int) -> bool:
        """Start the run's processes, unless it is finished or another launcher has it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.with_name("lock").open("w") as lock, self.log.open("a") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the processes inherit it, and hold it till they end
                self.state = "finished" if self.finished() else "running"  # by another launcher, since we looked first
            except BlockingIOError:
                self.state = "elsewhere"
            if self.state != "running":
                return False
            self.started = time.monotonic()
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            for words in commands(options, self, worker, port):
                print("$", shlex.join(words), file=log, flush=True)
                files = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()])
                self.processes += [subprocess.Popen(words, **files, preexec_fn=die_with_launcher, process_group=0)]
        return True

    def ended(self) -> bool:
        """Whether all processes have ended; then `state` says how."""
        codes = [process.poll() for process in self.processes]
        if None in codes:
            return False
        preempted = any(codes) and {*codes} <= {0, 128 + signal.SIGTERM, -signal.SIGTERM}
        self.state = "preempted" if preempted else "failed" if any(codes) or not self.finished() else "finished"
        return True


# what a child does first: ask Linux for a SIGTERM at the death of its parent, even by kill -9 (PR_SET_PDEATHSIG)
die_with_launcher = lambda: sys.platform == "linux" and ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def run_flags(options: Options, env_id: str, seed: object, name: str) -> list[str]:
    """The flags that make the command a run of the sweep."""
    return f"--env-id {env_id} --seed {seed} --exp-name {options.experiment} --resume {name} --start-fresh".split()


def commands(options: Options, run: Run, worker: int, port: int) -> list[list[str]]:
    """The words of each process of a run, with the cores and GPUs of its worker."""
    words = [*shlex.split(options.command), *run_flags(options, run.env_id, run.seed, run.name)]
    gpus, result = options.gpus_per_worker // options.processes, []
    for rank in range(options.processes):
        place, settings, prefix, flags = worker * options.processes + rank, [], [], []
        if hasattr(os, "sched_getaffinity") and shutil.which("taskset"):
            cores, places = sorted(os.sched_getaffinity(0)), options.workers * options.processes
            first, count = place * len(cores) // places, max(1, len(cores) // places)
            prefix = ["taskset", "--cpu-list", ",".join(map(str, cores[first : first + count]))]
            settings += [f"NPROC={os.environ.get('NPROC', count)}"]
        if gpus:
            own = visible_gpus(options)[place * gpus : (place + 1) * gpus]
            # else JAX passes over a GPU that it cannot use, and the run takes months on the CPU instead of failing
            platforms = os.environ.get("JAX_PLATFORMS") or "cuda,cpu"
            settings += [f"CUDA_VISIBLE_DEVICES={','.join(own)}", f"JAX_PLATFORMS={platforms}"]
        if options.processes > 1:
            flags = ["--coordinator-address", f"127.0.0.1:{port}", "--num-processes", str(options.processes)]
            flags += ["--process-id", str(rank)]
        result.append(["env", *settings, *prefix, *words, *flags])
    return result


def visible_gpus(options: Options) -> list[str]:
    """The GPUs that the sweep may use: those of CUDA_VISIBLE_DEVICES, or as many as it needs."""
    needed = map(str, range(options.workers * options.gpus_per_worker))
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(needed)).split(",") if gpu]


def plan(options: Options) -> list[Run]:
    """All runs of the sweep, every game with the first seed first. Ends with an error if the options cannot work."""
    command, good = repr(options.command), "--command 'uv run cleanba_ppo_envpool.py'"
    require(options.script, "--command", command, "must name a script, NAME.py", good)
    for flag in (word.split("=")[0].replace("_", "-") for word in options.script):
        require(flag not in OWN_FLAGS, "--command", command, f"must leave {flag} to the launcher", good)
    name, rule = options.experiment, "must be letters, digits and . , - _ only, as it names directories"
    require(re.fullmatch(r"[\w.,-]+", name), "--exp-name", name, rule, "--exp-name ppo_sync")
    require(options.seeds, "--seeds", "(empty)", "needs one seed or more", "--seeds 1 2 3")
    require(options.env_ids, "--env-ids", "(empty)", "needs one game or more", "--env-ids atari3")
    for flag in ("workers", "processes"):
        require((value := getattr(options, flag)) >= 1, f"--{flag}", value, "must be 1 or more", f"--{flag} 1")
    gpus, processes, available = options.gpus_per_worker, options.processes, len(visible_gpus(options))
    rule, flag = f"must be a multiple of --processes {processes}, or 0", "--gpus-per-worker"
    require(gpus >= 0 and gpus % processes == 0, flag, gpus, rule, f"{flag} {processes}")
    rule = f"CUDA_VISIBLE_DEVICES names {available}, too few for --workers {options.workers}"
    fits = f"{flag} {available // options.workers // processes * processes}"
    require(options.slurm or gpus * options.workers <= available, flag, gpus, rule, fits)
    lists, games = {path.stem: path for path in sorted((HERE / "games").glob("*.txt"))}, []
    for env_id in options.env_ids:
        known = env_id in lists or re.fullmatch(r"\w+-v\d+", env_id)
        rule = f"must be a game with its version, or a list: {', '.join(lists)}"
        require(known, "--env-ids", env_id, rule, "--env-ids Breakout-v5")
        games += re.findall(r"^\w.*", lists[env_id].read_text(), re.MULTILINE) if env_id in lists else [env_id]
    mark = hashlib.sha256(json.dumps([options.script, processes]).encode()).hexdigest()[:8]
    pairs = [(game, seed) for seed in dict.fromkeys(options.seeds) for game in dict.fromkeys(games)]
    runs = [Run(game, seed, f"{game}__{name}__{seed}__{mark}") for game, seed in pairs]
    for run in runs:
        run.state = "finished" if run.finished() else "waiting"
    return runs


def slurm_text(options: Options, runs: list[Run]) -> str:
    """The text of a SLURM job array, one index for each run."""
    flags = run_flags(options, "$env_id", "$seed", "$name") + ["--distributed"] * (options.processes > 1)
    gpus, text = options.gpus_per_worker // options.processes, (HERE / "slurm_array.sbatch").read_text()
    places = dict(job_name=options.experiment, last=len(runs) - 1, workers=options.workers, gpus=gpus)
    places["resources"] = f"--ntasks={options.processes}" + f"\n#SBATCH --gpus-per-task={gpus}" * bool(gpus)
    places["runs"] = "\n".join(f'    "{run.env_id} {run.seed} {run.name}"' for run in runs)
    places["command"] = f"{shlex.join(shlex.split(options.command))} \\\n    {' '.join(flags)}"
    for name, value in places.items():
        text = text.replace(f"@{{{name}}}", str(value))
    return text


def sweep(options: Options, runs: list[Run]) -> int:
    """Run everything; returns the exit code."""
    signals, forwarded, running, told = [], 0, {}, {run.name: run.state for run in runs}
    states = lambda: [run.state for run in runs]
    counts = lambda: "runs: " + ", ".join(f"{states().count(state)} {state}" for state in sorted(set(states())))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    print(counts(), flush=True)
    with Live(auto_refresh=False, transient=True) if sys.stdout.isatty() else nullcontext() as live:
        while True:
            running = {worker: run for worker, run in running.items() if not run.ended()}
            for worker in range(options.workers):
                if worker not in running and not signals:
                    todo = (run for run in runs if run.state in TODO)
                    run = next((run for run in todo if run.start(options, worker)), None)
                    running |= {worker: run} if run else {}
            if forwarded < len(signals):  # here, not in the handler: it might come between the start of two processes
                forwarded += 1
                print("all runs end at their next update; the next signal ends them at once", flush=True)
                for process in (process for run in running.values() for process in run.processes):
                    process.terminate()
            for run in (run for run in runs if run.state != told[run.name]):
                told[run.name] = run.state
                # said at once, and not only at the end of a sweep that may take days
                reason = f": {run.trouble or run.last_line()}" if run.state == "failed" else ""
                print(f"{time.strftime('%H:%M:%S')} {run.state}: {run.name}{reason}", flush=True)
            if live:
                minutes = lambda run: (time.monotonic() - run.started) / 60
                lines = [f"{minutes(run):6.0f} min  {run.name}: {run.last_line()}" for run in running.values()]
                live.update(Text("\n".join([counts(), *lines]), no_wrap=True, overflow="crop"), refresh=True)
            if not running and (signals or not {*states()} & {*TODO}):
                break
            time.sleep(0.2)
    print(counts())
    for run in runs:
        if run.trouble:
            print(f"{run.state}: {run.name}: {run.trouble}")
        elif run.state in ("failed", "preempted"):
            codes = ", ".join(str(process.returncode) for process in run.processes)
            print(f"{run.state} (exit code {codes}): read {run.log}, which ends with: {run.last_line()}")
    return 128 + signals[0] if signals else int({*states()} != {"finished"})


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    runs = plan(options)
    todo = [run for run in runs if run.state != "finished"]
    if options.slurm:
        require(todo, "--slurm", True, "all runs are finished", "with other --seeds")
        print(slurm_text(options, todo), end="")
    elif options.dry_run:
        for i, run in enumerate(todo):
            worker = i % options.workers
            lines = [*map(shlex.join, commands(options, run, worker, 9876 + i)), "wait"]
            print(" & ".join(lines[: None if options.processes > 1 else 1]))
    else:
        raise SystemExit(sweep(options, runs))


if __name__ == "__main__":
    main()
