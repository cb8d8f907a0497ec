"""A sweep: one command on many games and seeds, as many runs at a time as there are workers.

    uv run benchmark/run.py --command "uv run cleanba_ppo_envpool.py --concurrency" --env-ids atari3 --seeds 1 2 3
    uv run benchmark/run.py --command "..." --grid learning-rate=1e-4,3e-4 ent-coef=0.01,0.001       four experiments
    uv run benchmark/run.py --command "..." --workers 8 --gpus-per-worker 1                  eight GPUs, eight runs
    uv run benchmark/run.py --command "..." --processes 8 --gpus-per-worker 8                eight GPUs, one run
    uv run benchmark/run.py --command "..." --gpus-per-worker 1 --workers 20 --slurm | sbatch

A run is written to runs/GAME__EXPERIMENT__SEED__HASH, its output to log.txt there. The hash stands for the script, its
flags and the number of processes: other flags make other runs, and a second start of the same sweep skips what is
finished and resumes what is not, from the last checkpoint if the command has --checkpoint-frequency. A run holds a
lock, so that two launchers may share a sweep. Ctrl-C or SIGTERM ends all runs at their next update, a second one at
once; a launcher that is killed takes its runs with it. Each worker has its own share of the cores, the same number for
all, and its own GPUs. On a CPU the bits depend on that number, unless the environment variable NPROC is set.

With --grid every combination of the values is an experiment, EXPERIMENT__learning-rate=1e-4__ent-coef=0.01. Booleans
are True and False, and a flag of several values has spaces between them: --grid norm-adv=True,False "channels=4 8,8".
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
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import dropwhile, product
from pathlib import Path
from string import Template

import tyro
from common import load_script, read_json, require
from rich.live import Live
from rich.text import Text

HERE = Path(__file__).parent
# The launcher adds these to the command: they say which run of the sweep it is, and which process of the run.
OWN_FLAGS = (
    "--env-id --seed --exp-name --resume --start-fresh --distributed --coordinator-address --num-processes --process-id"
).split()
GRID = "--grid learning-rate=1e-4,3e-4 ent-coef=0.01,0.001"  # an example


def find_flag(word: str) -> str:
    """Of --learning_rate=1e-4 it is --learning-rate, and of --no-norm-adv it is --norm-adv."""
    return word.split("=")[0].replace("_", "-").replace("--no-", "--")


@dataclass(frozen=True)
class Options:
    command: str  # a script with its flags, as typed in a shell; game, seed and name are added
    env_ids: tuple[str, ...] = ("atari3",)  # games, or the lists of benchmark/games: atari3, atari10, atari57
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds that each game is run with
    exp_name: str | None = None  # name of the experiment, a part of each run's name; the script's name if not given
    grid: tuple[str, ...] = ()  # FLAG=VALUE,VALUE: each combination of these values is an experiment of its own
    workers: int = 1  # runs at a time
    processes: int = 1  # processes of each run
    gpus_per_worker: int = 0  # GPUs of each run, in equal parts for its processes; 0 leaves the choice to JAX
    slurm: bool = False  # print a SLURM job array of the runs that are not finished, made of slurm_array.sbatch
    dry_run: bool = False  # print what would be run, one shell command for each run that is not finished

    @property
    def script(self) -> list[str]:
        """The words of the command from its script on: how Python is started makes no other run."""
        words = shlex.split(self.command)
        return list(dropwhile(lambda word: not word.endswith(".py"), words))

    @property
    def experiment(self) -> str:
        return self.exp_name or Path(self.script[0]).stem

    @property
    def points(self) -> list[tuple[str, ...]]:
        """The combinations of the grid, a FLAG=VALUE of each flag; one without any if there is no grid."""
        choices = []
        for axis in self.grid:
            flag = find_flag(axis)
            values = axis.split("=")[1].split(",")
            choices.append([f"{flag}={value}" for value in dict.fromkeys(values)])
        return list(product(*choices))

    @property
    def visible_gpus(self) -> list[str]:
        """The GPUs that the sweep may use: those of CUDA_VISIBLE_DEVICES, or as many as it needs."""
        needed = map(str, range(self.workers * self.gpus_per_worker))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(needed))
        return re.findall("[^,]+", visible)


@dataclass
class Run:
    """One run of the sweep: game, seed, point of the grid, and what has become of it."""

    options: Options
    seed: int
    env_id: str
    point: tuple[str, ...]
    state: str = "waiting"  # running, finished, failed, preempted, or elsewhere: another launcher has it
    processes: list[subprocess.Popen] = field(default_factory=list)
    started: float = 0.0
    trouble: str = ""  # why it could not even be started

    @property
    def log(self) -> Path:
        return Path("runs", self.name, "log.txt")

    @property
    def experiment(self) -> str:
        settings = [setting.replace(" ", ",") for setting in self.point]
        return "__".join([self.options.experiment, *settings])

    @property
    def point_flags(self) -> list[str]:
        flags = []
        for setting in self.point:
            words = f"--{setting}".replace("=", " ")
            flags += words.split()
        return flags

    @property
    def name(self) -> str:
        identity = json.dumps([self.options.script + self.point_flags, self.options.processes])
        mark = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return f"{self.env_id}__{self.experiment}__{self.seed}__{mark}"

    @property
    def flags(self) -> list[str]:
        """The flags that turn the command into this run."""
        own_flags = (
            f"--env-id {self.env_id} --seed {self.seed} --exp-name {self.experiment} --resume {self.name} --start-fresh"
        )
        return self.point_flags + own_flags.split()

    def finished(self) -> bool:
        """Whether the run's own summary says so."""
        return read_json(self.log.with_name("summary.json")).get("status") == "finished"

    def last_line(self) -> str:
        """The last line of the log that says something."""
        end = self.log.read_bytes()[-2000:].decode(errors="replace")
        lines = re.findall(r".*\w.*", end)
        return lines[-1].strip() if lines else ""

    def progress(self) -> str:
        """The run's line in the table on a terminal."""
        minutes = (time.monotonic() - self.started) / 60
        return f"{minutes:6.0f} min  {self.name}: {self.last_line()}"

    def commands(self, worker: int, port: int) -> Iterator[list[str]]:
        """The words of a command for each process of the run, which gets its part of the worker's cores and GPUs."""
        options = self.options
        processes = options.processes
        gpus = options.gpus_per_worker // processes
        for rank in range(processes):
            words = shlex.split(options.command) + self.flags
            if processes > 1:
                rank_flags = f"--coordinator-address 127.0.0.1:{port} --num-processes {processes} --process-id {rank}"
                words += rank_flags.split()
            settings = []
            place = worker * processes + rank
            if shutil.which("taskset"):  # which macOS does not have
                places = options.workers * processes
                cores = sorted(os.sched_getaffinity(0))
                share = max(1, len(cores) // places)
                first = place * len(cores) // places
                own_cores = map(str, cores[first : first + share])
                words = ["taskset", "--cpu-list", ",".join(own_cores), *words]
                settings.append(f"NPROC={os.environ.get('NPROC', share)}")
            if gpus:
                own_gpus = options.visible_gpus[place * gpus : (place + 1) * gpus]
                # Otherwise JAX skips a GPU that it cannot use, and the run takes months on the CPU instead of failing.
                platforms = os.environ.get("JAX_PLATFORMS") or "cuda,cpu"
                settings += [f"CUDA_VISIBLE_DEVICES={','.join(own_gpus)}", f"JAX_PLATFORMS={platforms}"]
            yield ["env", *settings, *words]

    def start(self, worker: int) -> bool:
        """Try to start the run's processes. Returns whether they run; if not, `state` says why."""
        try:
            self.launch(worker)
        except OSError as error:  # A full disk, for example, must not end the sweep.
            self.state = "failed"
            self.trouble = f"it cannot be started: {error}"
            for process in self.processes:
                process.kill()
        return self.state == "running"

    def launch(self, worker: int) -> None:
        """Start the run's processes, unless it is finished or elsewhere. Raises OSError if that fails."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.with_name("lock").open("w") as lock, self.log.open("a") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # The processes inherit it and hold it until they end.
            except BlockingIOError:
                self.state = "elsewhere"
                return
            if self.finished():  # Another launcher may have run it in the meantime.
                self.state = "finished"
                return
            self.state = "running"
            self.started = time.monotonic()
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            for words in self.commands(worker, port):
                print("$", shlex.join(words), file=log, flush=True)
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[lock.fileno()],
                    preexec_fn=die_with_launcher,
                    process_group=0,
                )
                self.processes.append(process)

    def ended(self) -> bool:
        """Whether all processes have ended. If so, `state` says how."""
        codes = {process.poll() for process in self.processes}
        if None in codes:
            return False
        if codes == {0}:
            self.state = "finished" if self.finished() else "failed"
        elif codes <= {0, 128 + signal.SIGTERM, -signal.SIGTERM}:
            self.state = "preempted"
        else:
            self.state = "failed"
        return True


def die_with_launcher() -> None:
    """Run in each child before its command: ask Linux for a SIGTERM when the parent dies, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def plan(options: Options) -> list[Run]:
    """All runs of the sweep, every game with the first seed first. Ends with an error if the options cannot work."""
    check(options)
    games = dict.fromkeys(find_games(options))
    seeds = dict.fromkeys(options.seeds)
    runs = [Run(options, *choice) for choice in product(seeds, games, options.points)]
    if options.grid:
        check_points(options, runs[: len(options.points)])
    for run in runs:
        if run.finished():
            run.state = "finished"
    return runs


def check(options: Options) -> None:
    """End with an error if the options cannot work."""
    command = repr(options.command)
    example = "--command 'uv run cleanba_ppo_envpool.py'"
    require(options.script, "--command", command, "must name a script, NAME.py", example)
    for word in options.script:
        flag = find_flag(word)
        require(flag not in OWN_FLAGS, "--command", command, f"must leave {flag} to the launcher", example)
    require(
        re.fullmatch(r"[\w.,-]+", options.experiment),
        "--exp-name",
        options.experiment,
        "must be letters, digits and . , - _ only, as it names directories",
        "--exp-name ppo_sync",
    )
    check_grid(options)
    require(options.seeds, "--seeds", "(empty)", "needs one seed or more", "--seeds 1 2 3")
    require(options.env_ids, "--env-ids", "(empty)", "needs one game or more", "--env-ids atari3")
    workers = options.workers
    processes = options.processes
    require(workers >= 1, "--workers", workers, "must be 1 or more", "--workers 1")
    require(processes >= 1, "--processes", processes, "must be 1 or more", "--processes 1")
    gpus = options.gpus_per_worker
    flag = "--gpus-per-worker"
    require(
        gpus >= 0 and gpus % processes == 0,
        flag,
        gpus,
        f"must be a multiple of --processes {processes}, or 0",
        f"{flag} {processes}",
    )
    available = len(options.visible_gpus)
    most = available // workers // processes * processes
    require(
        options.slurm or gpus * workers <= available,
        flag,
        gpus,
        f"CUDA_VISIBLE_DEVICES names {available}, too few for --workers {workers}",
        f"{flag} {most}",
    )


def check_grid(options: Options) -> None:
    """End with an error if the grid cannot be read, or sets a flag that something else sets, too."""
    rule = "must be FLAG=VALUE,VALUE; a value is letters, digits, spaces and . + - _ only, as it names directories"
    value = r"[\w.+-]+( [\w.+-]+)*"
    taken = [find_flag(word) for word in options.script]
    for axis in options.grid:
        require(re.fullmatch(rf"\w[\w-]*={value}(,{value})*", axis), "--grid", axis, rule, GRID)
        flag = find_flag(f"--{axis}")
        require(flag not in OWN_FLAGS, "--grid", axis, f"must leave {flag} to the launcher", GRID)
        require(flag not in taken, "--grid", axis, f"{flag} is given twice, here or in --command", GRID)
        taken.append(flag)


def check_points(options: Options, runs: list[Run]) -> None:
    """End with the script's own error if it refuses the flags of one of these runs."""
    script, *flags = options.script
    points = [flags + run.flags for run in runs]
    # In a process of its own, because the launcher forks, and a process that has imported JAX should not.
    code = f"import run; run.ask_script({os.path.abspath(script)!r}, {options.processes}, {points})"
    result = subprocess.run([sys.executable, "-"], input=code, text=True, cwd=HERE)
    rule = "the script refuses it or the rest of --command, for the reason above"
    require(result.returncode == 0, "--grid", " ".join(options.grid), rule, GRID)


def ask_script(path: str, processes: int, points: list[list[str]]) -> None:
    """Let a script check the flags of each point."""
    sys.argv = [path]  # its errors name it
    try:
        script = load_script(Path(path))
    except ModuleNotFoundError:  # A fork whose packages are missing here checks them when its runs start.
        return
    for flags in points:
        try:
            script.check_args(script.parse_args(flags), processes)
        except script.FlagError as error:
            sys.exit(f"error: {error}")


def find_games(options: Options) -> list[str]:
    """The games of --env-ids, lists included. Ends with an error if a name is neither a game nor a list."""
    lists = {path.stem: path for path in sorted(HERE.glob("games/*.txt"))}
    rule = f"must be a game with its version, or a list: {', '.join(lists)}"
    games = []
    for env_id in options.env_ids:
        if env_id in lists:
            games += re.findall(r"^\w.*", lists[env_id].read_text(), re.MULTILINE)
        else:
            require(re.fullmatch(r"\w+-v\d+", env_id), "--env-ids", env_id, rule, "--env-ids Breakout-v5")
            games.append(env_id)
    return games


class JobTemplate(Template):
    delimiter = "@"  # The dollar is the shell's.


def slurm_text(options: Options, runs: list[Run]) -> str:
    """The text of a SLURM job array, one index for each run."""
    command = shlex.join(shlex.split(options.command))
    flags = "$flags"  # the run's, which the shell of each job fills in
    if options.processes > 1:
        flags += " --distributed"
    resources = f"--ntasks={options.processes}"
    gpus = options.gpus_per_worker // options.processes
    if gpus:
        resources += f"\n#SBATCH --gpus-per-task={gpus}"
    template = JobTemplate((HERE / "slurm_array.sbatch").read_text())
    return template.safe_substitute(
        job_name=options.experiment,
        last=len(runs) - 1,
        workers=options.workers,
        resources=resources,
        runs="\n".join(f'    "{run.name} {shlex.join(run.flags)}"' for run in runs),
        gpus=gpus,
        command=f"{command} \\\n    {flags}",
    )


def count_states(states: list[str]) -> str:
    return "runs: " + ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def sweep(options: Options, runs: list[Run]) -> int:
    """Run everything. Returns the exit code."""
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    states = [run.state for run in runs]  # as last printed
    print(count_states(states), flush=True)
    forwarded = 0
    running = {}  # by worker
    with Live(auto_refresh=False, transient=True) if sys.stdout.isatty() else nullcontext() as live:
        while True:
            for worker in range(options.workers):
                if worker in running and running[worker].ended():
                    del running[worker]
                if worker not in running and not signals:
                    for run in runs:
                        if run.state in ("waiting", "elsewhere") and run.start(worker):
                            running[worker] = run
                            break
            if forwarded < len(signals):
                # Not in the handler, which might be called between the starts of two processes of a run.
                forwarded += 1
                print("all runs end at their next update; the next signal ends them at once", flush=True)
                for run in running.values():
                    for process in run.processes:
                        process.terminate()
            for run, last_state in zip(runs, states):
                if run.state != last_state:
                    # The reason is printed at once, and not only at the end of a sweep that may take days.
                    reason = f": {run.trouble or run.last_line()}" if run.state == "failed" else ""
                    print(f"{time.strftime('%H:%M:%S')} {run.state}: {run.name}{reason}", flush=True)
            states = [run.state for run in runs]
            if live:
                table = [count_states(states), *(run.progress() for run in running.values())]
                live.update(Text("\n".join(table), no_wrap=True, overflow="crop"), refresh=True)
            if not running and (signals or "elsewhere" not in states):
                break
            time.sleep(0.2)
    print(count_states(states))
    for run in runs:
        if run.trouble:
            print(f"{run.state}: {run.name}: {run.trouble}")
        elif run.state in ("failed", "preempted"):
            codes = ", ".join(str(process.returncode) for process in run.processes)
            print(f"{run.state} (exit code {codes}): read {run.log}, which ends with: {run.last_line()}")
    if signals:
        return 128 + signals[0]
    return int(set(states) != {"finished"})


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    runs = plan(options)
    todo = [run for run in runs if run.state != "finished"]
    if options.slurm:
        require(todo, "--slurm", True, "all runs are finished", "with other --seeds")
        print(slurm_text(options, todo), end="")
    elif options.dry_run:
        for i, run in enumerate(todo):
            lines = [shlex.join(words) for words in run.commands(i % options.workers, 9876 + i)]
            if options.processes > 1:
                lines.append("wait")
            print(" & ".join(lines))
    else:
        raise SystemExit(sweep(options, runs))


if __name__ == "__main__":
    main()
