"""By hand: kill -9 a run again and again, resume it here and elsewhere, and watch the resources of one not killed.

    uv run tests/soak.py --minutes 40 --kills 20 FOLDER

Two runs of the same flags beside each other. One is killed at `--kills` random moments, a quarter of them while it
starts, and every other time it goes on elsewhere: other devices, other threads, two processes. Both must end with the
same hash. Of the other one memory, threads and open files are sampled. FOLDER/soak.md tells how it stands, at any time.
"""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

PER_UPDATE = 2 * 8 * 20  # steps
FLAGS = "--img-size 42 --channels 4 8 8 --local-num-envs 8 --num-steps 20 --checkpoint-frequency 20 --start-fresh"
FLAGS = [*FLAGS.split(), "--log-frequency", "1", "--peer-timeout", "60"]
ENVIRONMENT = {"NPROC": "4", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
ENVIRONMENT |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
HERE = (1, "--num-actor-threads 2")  # processes, flags of each; everywhere two actors in all
ELSEWHERE = [
    (1, "--num-actor-threads 2 --learner-device-ids 0 1"),
    (2, "--num-actor-threads 1"),
    (1, "--num-actor-threads 1 --actor-device-ids 0 1 --learner-device-ids 2 3"),
    (2, "--num-actor-threads 1 --learner-device-ids 0 1"),
    (1, "--num-actor-threads 2 --learner-device-ids 0 1 2 3 --env-threads 1"),
]


def start(folder: Path, name: str, steps: int, place=HERE) -> list[subprocess.Popen]:
    """The processes of a run. What they say is appended to NAME-PROCESS.out and .err, /tmp is NAME-tmp for them."""
    (count, flags), temporary = place, folder / f"{name}-tmp"
    temporary.mkdir(exist_ok=True)
    command = [sys.executable, "script.py", *FLAGS, *flags.split(), "--total-timesteps", str(steps), "--resume", name]
    environment = (
        os.environ | ENVIRONMENT | {"TMPDIR": str(temporary), "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        together = ["--coordinator-address", f"127.0.0.1:{probe.getsockname()[1]}", "--num-processes", str(count)]
    processes = []
    for i in range(count):
        own = [*together, "--process-id", str(i)] if count > 1 else []
        with open(folder / f"{name}-{i}.out", "a") as out, open(folder / f"{name}-{i}.err", "a") as err:
            processes.append(subprocess.Popen([*command, *own], cwd=folder, env=environment, stdout=out, stderr=err))
    return processes


def end(folder: Path, name: str, process: subprocess.Popen) -> dict:
    """The summary of a run that must finish."""
    if process.wait() != 0:
        raise RuntimeError(f"{name}: exit code {process.returncode}, see {folder}/{name}-0.err")
    return json.loads((folder / "runs" / name / "summary.json").read_text())


def sample(process: subprocess.Popen, samples: list) -> None:
    """Every few seconds: seconds since the start, MiB of memory, threads, open files."""
    since, of = time.monotonic(), Path("/proc", str(process.pid))
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in (of / "status").read_text().splitlines())
            files, memory = len(os.listdir(of / "fd")), int(status["VmRSS"].split()[0]) / 1024
            samples.append([round(time.monotonic() - since), round(memory, 1), int(status["Threads"]), files])
        except (OSError, KeyError):  # it has just ended
            return
        time.sleep(3)


class Follower:
    """The updates that a run tells of from now on, as far as they are there."""

    def __init__(self, path: Path):
        self.file, self.updates = open(path, "a+"), []  # noqa: SIM115

    def wait_for(self, update: int | float, process: subprocess.Popen, seconds: float = float("inf")) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and (not self.updates or self.updates[-1] < update):
            if process.poll() is not None:
                raise RuntimeError(f"{self.file.name}: ended with {process.returncode}")
            time.sleep(0.02)
            told = [line.split("/")[0].split()[-1] for line in self.file if "steps/s," in line]
            self.updates += [int(step) // PER_UPDATE for step in told]


def kill(folder: Path, steps: int, at: int | None, place: tuple, starting: float, chance: random.Random) -> dict:
    """Start the run, kill one of its processes after update `at`, or while it starts, and wait for the others."""
    told = Follower(folder / "killed-0.out")
    processes, since = start(folder, "killed", steps, place), time.monotonic()
    if at is None:
        told.wait_for(float("inf"), processes[0], chance.uniform(0, starting))
    else:
        told.wait_for(at, processes[0])
        time.sleep(chance.uniform(0, 0.5))
    victim, seconds = chance.randrange(len(processes)), round(time.monotonic() - since, 2)
    processes[victim].kill()
    codes = [process.wait(200) for process in processes]  # the others end by themselves
    first, last = (told.updates[0] - 1, told.updates[-1]) if told.updates else (None, None)
    return {"place": place, "from": first, "after": last, "seconds": seconds, "victim": victim, "exit_codes": codes}


def calibrate(folder: Path) -> tuple[float, float]:
    """Seconds of a core that an update takes, whatever else the machine does; seconds until the first update."""
    told, since = Follower(folder / "calibration-0.out"), time.monotonic()
    (process,) = start(folder, "calibration", 10**7)
    cores = lambda: sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().split(")")[-1].split()[11:13]))
    told.wait_for(1, process)
    starting = time.monotonic() - since
    told.wait_for(21, process)
    before, first = cores(), told.updates[-1]
    told.wait_for(81, process)
    spent = (cores() - before) / os.sysconf("SC_CLK_TCK") / (told.updates[-1] - first)
    process.kill()
    return spent, starting


def write(folder: Path, report: dict) -> None:
    """soak.json and, to be read, soak.md."""
    (folder / "soak.json").write_text(json.dumps(report))
    rows = ["| | processes, flags | went on from update | killed after update | s | process | exit codes |"]
    rows += ["|--:|---|--:|---|--:|--:|---|"]
    for i, k in enumerate(report["kills"], 1):
        count, flags = k["place"]
        what = ("from", "after", "seconds", "victim", "exit_codes")
        cells = [f"{count}, `{flags}`", *("starting" if k[name] is None else k[name] for name in what)]
        rows.append(f"| {i} | " + " | ".join(map(str, cells)) + " |")
    rows += ["", "| of the run not killed | seconds | MiB | threads | open files |", "|---|--:|--:|--:|--:|"]
    for part, window in windows(report["samples"]).items():
        rows.append(f"| {part} | " + " | ".join(f"{x:g}" for x in window) + " |")
    rest = {name: value for name, value in report.items() if name not in ("kills", "samples")}
    rows += ["", *(f"- {name}: {value}" for name, value in rest.items())]
    (folder / "soak.md").write_text("\n".join(rows) + "\n")


def windows(samples: list) -> dict[str, list]:
    """Medians over a twentieth of the time each."""
    last, found = samples[-1][0] if samples else 0, {}
    for part, low in {"begin": 0.05, "a quarter": 0.25, "a half": 0.5, "three quarters": 0.75, "end": 0.95}.items():
        if chosen := [row for row in samples if low <= row[0] / max(1, last) <= low + 0.05]:
            found[part] = [median(column) for column in zip(*chosen, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args, root = parser.parse_args(), Path(__file__).parent.parent
    folder, chance = args.folder.resolve(), random.Random(args.seed)
    folder.mkdir(parents=True)  # a new one
    shutil.copy(root / "cleanba_impala_envpool.py", folder / "script.py")  # edits meanwhile must not disturb
    spent, starting = calibrate(folder)
    updates = int(60 * args.minutes * len(os.sched_getaffinity(0)) / 2 / spent)  # two runs share the cores
    moments = sorted(chance.sample(range(1, updates), args.kills))
    for i in chance.sample(range(args.kills), args.kills // 4):
        moments[i] = None  # while it starts
    report = {"seed": args.seed, "updates": updates, "moments": moments, "flags": " ".join(FLAGS), "kills": []}
    report |= {"samples": [], "state": "running"}
    before, (whole,) = set(os.listdir("/tmp")), start(folder, "whole", updates * PER_UPDATE)
    threading.Thread(target=sample, args=(whole, report["samples"])).start()
    try:
        for i, at in enumerate(moments):
            place = ELSEWHERE[i // 2 % len(ELSEWHERE)] if i % 2 else HERE
            report["kills"].append(kill(folder, updates * PER_UPDATE, at, place, starting, chance))
            write(folder, report)
        (killed,) = start(folder, "killed", updates * PER_UPDATE)
        report["killed"] = end(folder, "killed", killed)["params_sha256"]
        report["whole"] = end(folder, "whole", whole)["params_sha256"]
        parts = windows(report["samples"])
        report["memory at the end / after a quarter"] = parts["end"][1] / parts["a quarter"][1]
        report["new in /tmp, of whomever"] = sorted({*os.listdir("/tmp")} - before)
        told = [set((folder / "runs" / name / "hashes.tsv").read_text().split("\n")) for name in ("whole", "killed")]
        report["updates whose hash only one of them has"] = len(told[0] ^ told[1])
        for name in ("whole", "killed"):
            kinds = [path.name.split(".tfevents")[0] for path in (folder / "runs" / name).rglob("*") if path.is_file()]
            report[f"files of {name}"] = {kind: kinds.count(kind) for kind in sorted(kinds)}
            report[f"temporary files of {name}"] = [path.name for path in (folder / f"{name}-tmp").iterdir()]
        report["state"] = "same hash" if report["killed"] == report["whole"] else "OTHER HASH"
    except BaseException as error:
        report["state"] = f"failed: {error!r}"
        raise
    finally:
        write(folder, report)


if __name__ == "__main__":
    main()
