"""A sweep: one command on many games and seeds, as many runs at a time as there are workers.

    uv run benchmark/run.py --command "uv run cleanba_ppo_envpool.py --concurrency" --env-ids atari3 --seeds 1 2 3
    uv run benchmark/run.py --command "..." --workers 8 --gpus-per-worker 1                  eight GPUs, eight runs
    uv run benchmark/run.py --command "..." --processes 8 --gpus-per-worker 8                eight GPUs, one run
    uv run benchmark/run.py --command "..." --gpus-per-worker 1 --workers 20 --slurm | sbatch

A run is written to runs/GAME__EXPERIMENT__SEED__HASH, its output to log.txt there. The hash stands for the script, its
flags and the number of processes: other flags make other runs, and a second start of the same sweep skips what is
finished and resumes what is not, from the last checkpoint if the command has --checkpoint-frequency. A run holds a
lock, so that two launchers may share a sweep. Ctrl-C or SIGTERM ends all runs at their next update, a second one at
once; a launcher that is killed takes its runs with it in the same way.

Each worker has its own share of the cores, the same number for all, and its own GPUs. On a CPU the bits of a run depend
on that number: set the environment variable NPROC to have the same bits with any number of workers.
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
import string
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

HERE = Path(__file__).parent
OWN_FLAGS = ["--env-id", "--seed", "--exp-name", "--resume", "--start-fresh"]  # what makes a command a run of the sweep
OWN_FLAGS += ["--distributed", "--coordinator-address", "--num-processes", "--process-id"]
PREEMPTED = (128 + signal.SIGTERM, -signal.SIGTERM)  # exit codes of a run that SIGTERM ended


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


def require(ok: bool, flag: str, value: object, rule: str, instead: object) -> None:
    """End with exit code 2 and a message about `flag` unless `ok`."""
    if not ok:
        print(f"error: {flag} {value}: {rule}. For example: {flag} {instead}", file=sys.stderr)
        raise SystemExit(2)


@dataclass
class Run:
    """One run of the sweep: game, seed, and what has become of it."""

    env_id: str
    seed: int
    name: str
    state: str = "waiting"  # running, finished, failed, preempted, or elsewhere: another launcher has it
    processes: list[subprocess.Popen] = field(default_factory=list)
    started: float = 0.0

    @property
    def directory(self) -> Path:
        return Path("runs") / self.name

    @property
    def log(self) -> Path:
        return self.directory / "log.txt"

    def finished(self) -> bool:
        """Whether the run's own summary says so."""
        try:
            return json.loads((self.directory / "summary.json").read_text())["status"] == "finished"
        except FileNotFoundError:
            return False

    def last_line(self) -> str:
        """The last line of the log that says something."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if re.search(r"\w", line)), "")

    def start(self, options: Options, worker: int) -> bool:
        """Start the run's processes, unless it is finished or another launcher has it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as lock, self.log.open("a") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the processes inherit it, and hold it till they end
            except BlockingIOError:
                self.state = "elsewhere"
                return False
            if self.finished():  # by another launcher, since we looked first
                self.state = "finished"
                return False
            self.state, self.started = "running", time.monotonic()
            for environment, words in commands(options, self, worker, free_port()):
                print(f"$ {shell_line(environment, words)}", file=log, flush=True)
                own = dict(env=os.environ | environment, preexec_fn=die_with_launcher(), process_group=0)
                files = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()])
                self.processes.append(subprocess.Popen(words, **own, **files))
        return True

    def ended(self) -> bool:
        """Whether all processes have ended; then `state` says how."""
        codes = [process.poll() for process in self.processes]
        if None in codes:
            return False
        if not any(codes):
            self.state = "finished" if self.finished() else "failed"
        else:
            self.state = "preempted" if all(code in (0, *PREEMPTED) for code in codes) else "failed"
        return True


def die_with_launcher():
    """What a child does first: ask Linux for a SIGTERM at the death of its parent, even by kill -9."""
    launcher, libc = os.getpid(), ctypes.CDLL(None)

    def prepare():
        if sys.platform == "linux":
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != launcher:  # it died before
                os._exit(1)

    return prepare


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_flags(options: Options, env_id: str, seed: int | str, name: str) -> list[str]:
    """The flags that make the command a run of the sweep."""
    flags = ["--env-id", env_id, "--seed", str(seed), "--exp-name", options.experiment]
    return [*flags, "--resume", name, "--start-fresh"]


def commands(options: Options, run: Run, worker: int, port: int) -> list[tuple[dict[str, str], list[str]]]:
    """(environment, words) of each process of a run, with the cores and GPUs of its worker."""
    words = [*shlex.split(options.command), *run_flags(options, run.env_id, run.seed, run.name)]
    gpus, result = options.gpus_per_worker // options.processes, []
    for rank in range(options.processes):
        place, environment, prefix, flags = worker * options.processes + rank, {}, [], []
        if hasattr(os, "sched_getaffinity") and shutil.which("taskset"):
            cores, places = sorted(os.sched_getaffinity(0)), options.workers * options.processes
            first, count = place * len(cores) // places, max(1, len(cores) // places)
            prefix = ["taskset", "--cpu-list", ",".join(map(str, cores[first : first + count]))]
            environment["NPROC"] = os.environ.get("NPROC", str(count))
        if gpus:
            own = visible_gpus(options)[place * gpus : (place + 1) * gpus]
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(own)}
            environment["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cuda,cpu")  # no GPU: fail, not take years
        if options.processes > 1:
            flags = ["--coordinator-address", f"127.0.0.1:{port}", "--num-processes", str(options.processes)]
            flags += ["--process-id", str(rank)]
        result.append((environment, [*prefix, *words, *flags]))
    return result


def visible_gpus(options: Options) -> list[str]:
    """The GPUs that the sweep may use: those of CUDA_VISIBLE_DEVICES, or as many as it needs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    needed = options.workers * options.gpus_per_worker
    return [str(i) for i in range(needed)] if visible is None else [gpu for gpu in visible.split(",") if gpu]


def shell_line(environment: dict[str, str], words: list[str]) -> str:
    return " ".join([f"{name}={shlex.quote(value)}" for name, value in environment.items()] + [shlex.join(words)])


def check(options: Options) -> None:
    """End with an error if the options cannot work."""
    rule = "must name a script, NAME.py"
    require(bool(options.script), "--command", repr(options.command), rule, "'uv run cleanba_ppo_envpool.py'")
    for word in options.script:
        flag = word.split("=")[0].replace("_", "-")
        rule = f"must leave {flag} to the launcher"
        require(flag not in OWN_FLAGS, "--command", repr(options.command), rule, repr(options.script[0]))
    rule = "must be letters, digits and . , - _ only, as it names directories"
    require(bool(re.fullmatch(r"[\w.,-]+", options.experiment)), "--exp-name", options.experiment, rule, "ppo_sync")
    require(bool(options.seeds), "--seeds", "(empty)", "needs one seed or more", "1 2 3")
    require(bool(options.env_ids), "--env-ids", "(empty)", "needs one game or more", "atari3")
    for flag, value in [("--workers", options.workers), ("--processes", options.processes)]:
        require(value >= 1, flag, value, "must be 1 or more", 1)
    gpus, available = options.gpus_per_worker, len(visible_gpus(options))
    rule = f"must be a multiple of --processes {options.processes}, or 0"
    require(gpus >= 0 and gpus % options.processes == 0, "--gpus-per-worker", gpus, rule, options.processes)
    rule = f"CUDA_VISIBLE_DEVICES names {available}, too few for --workers {options.workers}"
    fits = available // options.workers // options.processes * options.processes
    require(options.slurm or gpus * options.workers <= available, "--gpus-per-worker", gpus, rule, fits)


def games(env_ids: tuple[str, ...]) -> list[str]:
    """Names of games, those of lists put in their place; ends with an error where a name is neither."""
    lists, names = {path.stem: path for path in sorted((HERE / "games").glob("*.txt"))}, []
    for env_id in env_ids:
        rule = f"must be a game with its version, or a list: {', '.join(lists)}"
        known = env_id in lists or bool(re.fullmatch(r"\w+-v\d+", env_id))
        require(known, "--env-ids", env_id, rule, "Breakout-v5")
        lines = lists[env_id].read_text().splitlines() if env_id in lists else [env_id]
        names += [line for line in lines if not line.startswith("#")]
    return list(dict.fromkeys(names))  # each once


def plan(options: Options) -> list[Run]:
    """All runs of the sweep, every game with the first seed first. Ends with an error if the options cannot work."""
    check(options)
    mark = hashlib.sha256(json.dumps([options.script, options.processes]).encode()).hexdigest()[:8]
    runs = [
        Run(env_id, seed, f"{env_id}__{options.experiment}__{seed}__{mark}")
        for seed in dict.fromkeys(options.seeds)
        for env_id in games(options.env_ids)
    ]
    for run in runs:
        run.state = "finished" if run.finished() else "waiting"
    return runs


class SlurmText(string.Template):
    """Text with places like @{name}, as $ is the shell's; @@ is one @."""

    delimiter = "@"


def slurm_text(options: Options, runs: list[Run]) -> str:
    """The text of a SLURM job array, one index for each run."""
    flags = run_flags(options, "$env_id", "$seed", "$name") + ["--distributed"] * (options.processes > 1)
    gpus = options.gpus_per_worker // options.processes
    return SlurmText((HERE / "slurm_array.sbatch").read_text()).substitute(
        job_name=options.experiment,
        last=len(runs) - 1,
        workers=options.workers,
        resources=f"--ntasks={options.processes}" + (f"\n#SBATCH --gpus-per-task={gpus}" if gpus else ""),
        runs="\n".join(f'    "{run.env_id} {run.seed} {run.name}"' for run in runs),
        command=f"{shlex.join(shlex.split(options.command))} \\\n    {' '.join(flags)}",
    )


class Table:
    """What the runs do: a table that is drawn anew on a terminal, else one line for each change."""

    def __init__(self, runs: list[Run]):
        self.runs, self.states, self.lines = runs, {run.name: run.state for run in runs}, []
        self.live = sys.stdout.isatty()
        if not self.live:
            self.say(self.counts())

    def counts(self) -> str:
        states = [run.state for run in self.runs]
        return "runs: " + ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))

    def say(self, text: str) -> None:
        """Print a line; the table goes on below it."""
        print(text, flush=True)
        self.lines = []

    def draw(self) -> None:
        if self.live:
            lines, (width, height) = [self.counts()], shutil.get_terminal_size()
            for run in self.runs:
                if run.state == "running":
                    minutes = (time.monotonic() - run.started) / 60
                    lines.append(f"  {run.state:9} {minutes:5.0f} min  {run.env_id} seed {run.seed}: {run.last_line()}")
                elif run.state in ("failed", "preempted"):
                    lines.append(f"  {run.state:9}            {run.log}")
            lines = [line[: width - 1] for line in lines[: height - 1]]
            if lines != self.lines:
                back = f"\x1b[{len(self.lines)}A\x1b[J" if self.lines else ""
                print(back + "\n".join(lines), flush=True)
            self.lines = lines
            return
        for run in self.runs:
            if run.state != self.states[run.name]:
                self.say(f"{time.strftime('%H:%M:%S')} {run.state}: {run.name}")
            self.states[run.name] = run.state


def sweep(options: Options, runs: list[Run]) -> int:
    """Run everything; returns the exit code."""
    signals, forwarded, running = [], 0, {}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    table = Table(runs)
    while True:
        running = {worker: run for worker, run in running.items() if not run.ended()}
        for worker in range(options.workers):
            if worker not in running and not signals:
                todo = (run for run in runs if run.state in ("waiting", "elsewhere"))
                run = next((run for run in todo if run.start(options, worker)), None)
                running |= {worker: run} if run else {}
        if forwarded < len(signals):  # here, not in the handler: it might come between the start of two processes
            forwarded += 1
            table.say("all runs end at their next update; the next signal ends them at once")
            for process in (process for run in running.values() for process in run.processes):
                process.terminate()
        table.draw()
        if not running and (signals or all(run.state not in ("waiting", "elsewhere") for run in runs)):
            break
        time.sleep(0.1)
    if not table.live:
        table.say(table.counts())
    for run in runs:
        if run.state in ("failed", "preempted"):
            codes = ", ".join(str(process.returncode) for process in run.processes)
            table.say(f"{run.state} (exit code {codes}): read {run.log}, which ends with: {run.last_line()}")
    if signals:
        return 128 + signals[0]
    return int(any(run.state != "finished" for run in runs))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    runs = plan(options)
    todo = [run for run in runs if run.state != "finished"]
    if options.slurm:
        require(bool(todo), "--slurm", "True", "all runs are finished", "with other --seeds")
        print(slurm_text(options, todo), end="")
    elif options.dry_run:
        for i, run in enumerate(todo):
            lines = [shell_line(*c) for c in commands(options, run, i % options.workers, 9876 + i % options.workers)]
            print(" & ".join(lines) + " & wait" * (len(lines) > 1))
    else:
        raise SystemExit(sweep(options, runs))


if __name__ == "__main__":
    main()
