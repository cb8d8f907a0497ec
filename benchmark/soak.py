"""By hand: kill -9 a run again and again, resume it here and elsewhere, and watch the resources of one not killed.

    uv run benchmark/soak.py --minutes 40 --kills 20 FOLDER

Two runs of the same flags beside each other. One is killed at `--kills` random moments, a quarter of them while it
starts, and every other time it goes on elsewhere: other devices, other threads, two processes. Both must end with the
same hash. Of the other one memory, threads and open files are sampled. FOLDER/soak.md tells how it stands, at any time.
"""

import json
import os
import random
import re
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from subprocess import Popen
from typing import NamedTuple

import tyro

STEPS_PER_UPDATE = 2 * 8 * 20
FLAGS = "--img-size 42 --channels 4 8 8 --local-num-envs 8 --num-steps 20 --checkpoint-frequency 20 --start-fresh"
FLAGS += " --log-frequency 1 --peer-timeout 60"
ENVIRONMENT = {"NPROC": "4", "JAX_PLATFORMS": "cpu"}


class Place(NamedTuple):
    """Where a run goes on: everywhere with two actors in all."""

    processes: int
    flags: str  # of each process


HERE = Place(1, "--num-actor-threads 2")
ELSEWHERE = [
    Place(1, "--num-actor-threads 2 --learner-device-ids 0 1"),
    Place(2, "--num-actor-threads 1"),
    Place(1, "--num-actor-threads 1 --actor-device-ids 0 1 --learner-device-ids 2 3"),
    Place(2, "--num-actor-threads 1 --learner-device-ids 0 1"),
    Place(1, "--num-actor-threads 2 --learner-device-ids 0 1 2 3 --env-threads 1"),
]
# where the twentieths of the time begin whose medians are shown
WINDOWS = {"begin": 0.05, "a quarter": 0.25, "a half": 0.5, "three quarters": 0.75, "end": 0.95}


@dataclass(frozen=True)
class Options:
    folder: tyro.conf.Positional[Path]  # a new one, for all that the runs write
    minutes: float = 40.0  # about how long it takes
    kills: int = 20
    seed: int = 1  # of the moments


# === Runs =============================================================================================================
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(name: str, updates: int, place: Place = HERE) -> list[Popen]:
    """The processes of a run. What they say is appended to NAME-PROCESS.out and .err, /tmp is NAME-tmp for them."""
    temporary = os.path.abspath(f"{name}-tmp")
    os.makedirs(temporary, exist_ok=True)
    environment = os.environ | ENVIRONMENT
    environment["TMPDIR"] = temporary
    environment["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath("xla")
    flags = f"{FLAGS} {place.flags} --total-timesteps {updates * STEPS_PER_UPDATE} --resume {name}"
    if place.processes > 1:
        flags += f" --coordinator-address 127.0.0.1:{free_port()} --num-processes {place.processes}"
    processes = []
    for i in range(place.processes):
        own_flags = f"{flags} --process-id {i}" if place.processes > 1 else flags
        command = [sys.executable, "script.py", *own_flags.split()]
        with open(f"{name}-{i}.out", "a") as out, open(f"{name}-{i}.err", "a") as err:
            processes.append(Popen(command, env=environment, stdout=out, stderr=err))
    return processes


def final_hash(name: str, process: Popen) -> str:
    """Of the parameters of a run that must finish."""
    if process.wait() != 0:
        raise RuntimeError(f"{name}: exit code {process.returncode}, see {Path.cwd()}/{name}-0.err")
    return json.loads(Path(f"runs/{name}/summary.json").read_text())["params_sha256"]


class Follower:
    """The updates that a run tells of from now on, as far as they are there."""

    def __init__(self, name: str):
        self.file = open(Path.cwd() / f"{name}-0.out", "a+")  # noqa: SIM115
        self.updates = []

    def wait_for(self, update: float, process: Popen, seconds: float = inf) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and max(self.updates, default=0) < update:
            if process.poll() is not None:
                raise RuntimeError(f"{self.file.name}: ended with {process.returncode}")
            time.sleep(0.02)
            steps = re.findall(r"(\d+)/\d+ steps, .*steps/s,", self.file.read())
            self.updates += [int(step) // STEPS_PER_UPDATE for step in steps]


def processor_seconds(process: Popen) -> float:
    """What the process has used of the cores, for itself and in the system."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().split(")")[-1].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def calibrate() -> tuple[float, float]:
    """Seconds of a core that an update takes, whatever else the machine does; seconds until the first update."""
    follower = Follower("calibration")
    since = time.monotonic()
    (process,) = start("calibration", 10**5)
    follower.wait_for(1, process)
    starting = time.monotonic() - since
    follower.wait_for(21, process)
    first = follower.updates[-1]
    spent_before = processor_seconds(process)
    follower.wait_for(81, process)
    spent = processor_seconds(process) - spent_before
    process.kill()
    return spent / (follower.updates[-1] - first), starting


def kill(updates: int, moment: int | None, place: Place, starting: float) -> dict:
    """Start the run, kill one of its processes after update `moment`, or while it starts, and wait for the others."""
    follower = Follower("killed")
    processes = start("killed", updates, place)
    since = time.monotonic()
    if moment is None:
        follower.wait_for(inf, processes[0], random.uniform(0, starting))
    else:
        follower.wait_for(moment, processes[0])
        time.sleep(random.uniform(0, 0.5))
    victim = random.randrange(len(processes))
    seconds = round(time.monotonic() - since, 2)
    processes[victim].kill()
    codes = [process.wait(200) for process in processes]  # the others end by themselves
    first = last = None
    if follower.updates:
        first = follower.updates[0] - 1
        last = follower.updates[-1]
    return {"place": place, "from": first, "after": last, "seconds": seconds, "victim": victim, "exit_codes": codes}


def sample(process: Popen, samples: list) -> None:
    """Every few seconds: seconds since the start, MiB of memory, threads, open files."""
    since = time.monotonic()
    folder = Path("/proc", str(process.pid))
    while process.poll() is None:
        try:
            status = (folder / "status").read_text()
            files = len(os.listdir(folder / "fd"))
            memory, threads = re.findall(r"^(?:VmRSS|Threads):\s*(\d+)", status, re.MULTILINE)
        except (OSError, ValueError):  # it has just ended
            return
        seconds = round(time.monotonic() - since)
        samples.append([seconds, round(int(memory) / 1024, 1), int(threads), files])
        time.sleep(3)


# === The report =======================================================================================================
def medians(samples: list) -> dict[str, list]:
    """Of each window that has samples."""
    if not samples:
        return {}
    end = max(1, samples[-1][0])
    found = {}
    for window, begin in WINDOWS.items():
        chosen = [row for row in samples if begin <= row[0] / end <= begin + 0.05]
        if chosen:
            found[window] = [median(column) for column in zip(*chosen)]
    return found


def table_line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def write(report: dict) -> None:
    """soak.json and, to be read, soak.md."""
    Path("soak.json").write_text(json.dumps(report))
    lines = ["| | processes, flags | went on from update | killed after update | s | process | exit codes |"]
    lines.append("|--:|---|--:|---|--:|--:|---|")
    for i, entry in enumerate(report["kills"], 1):
        (processes, flags), *others = entry.values()  # in the order of the columns
        cells = ["starting" if cell is None else cell for cell in others]
        lines.append(table_line(i, f"{processes}, `{flags}`", *cells))
    lines += ["", "| of the run not killed | seconds | MiB | threads | open files |", "|---|--:|--:|--:|--:|"]
    for window, figures in medians(report["samples"]).items():
        cells = [f"{figure:g}" for figure in figures]
        lines.append(table_line(window, *cells))
    lines.append("")
    for name, value in report.items():
        if name not in ("kills", "samples"):
            lines.append(f"- {name}: {value}")
    Path("soak.md").write_text("\n".join(lines) + "\n")


def compare() -> dict:
    """What is left of the two runs."""
    whole, killed = [set(Path(f"runs/{name}/hashes.tsv").read_text().splitlines()) for name in ("whole", "killed")]
    found = {"updates whose hash only one of them has": len(whole ^ killed)}
    for name in ("whole", "killed"):
        files = [path.name for path in Path(f"runs/{name}").rglob("*") if path.is_file()]
        kinds = Counter(file.split(".tfevents")[0] for file in files)
        found[f"files of {name}"] = dict(sorted(kinds.items()))
        found[f"temporary files of {name}"] = os.listdir(f"{name}-tmp")
    return found


def soak(report: dict, starting: float) -> None:
    """Both runs. The report is written after every kill."""
    updates = report["updates"]
    tmp_before = set(os.listdir("/tmp"))
    (whole,) = start("whole", updates)
    threading.Thread(target=sample, args=(whole, report["samples"])).start()
    for i, moment in enumerate(report["moments"]):
        place = ELSEWHERE[i // 2 % len(ELSEWHERE)] if i % 2 else HERE
        report["kills"].append(kill(updates, moment, place, starting))
        write(report)
    (killed,) = start("killed", updates)
    report["killed"] = final_hash("killed", killed)
    report["whole"] = final_hash("whole", whole)
    windows = medians(report["samples"])
    report["memory at the end / after a quarter"] = windows["end"][1] / windows["a quarter"][1]
    report["new in /tmp, of whomever"] = sorted(set(os.listdir("/tmp")) - tmp_before)
    report |= compare()
    report["state"] = "same hash" if report["killed"] == report["whole"] else "OTHER HASH"


def main() -> None:
    args = tyro.cli(Options, description=__doc__)
    args.folder.mkdir(parents=True)
    script = Path(__file__).parent.parent / "cleanba_impala_envpool.py"
    shutil.copy(script, args.folder / "script.py")  # edits meanwhile must not disturb
    os.chdir(args.folder)
    random.seed(args.seed)
    spent, starting = calibrate()
    cores = len(os.sched_getaffinity(0))
    updates = int(60 * args.minutes * cores / 2 / spent)  # two runs share the cores
    moments = sorted(random.sample(range(1, updates), args.kills))
    for i in random.sample(range(args.kills), args.kills // 4):
        moments[i] = None  # while it starts
    report = {
        "seed": args.seed,
        "updates": updates,
        "moments": moments,
        "flags": FLAGS,
        "kills": [],
        "samples": [],
        "state": "running",
    }
    try:
        soak(report, starting)
    except BaseException as error:
        report["state"] = f"failed: {error!r}"
        raise
    finally:
        write(report)


if __name__ == "__main__":
    main()
