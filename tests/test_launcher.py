"""The sweep launcher, with a small script in place of a training run, grids, and the jobs for SLURM."""

import fcntl
import itertools
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import conftest
import envpool
import pytest
import yaml

run = conftest.load("benchmark/run")

# What the launcher sees of a training script: its run directory, summary and exit code. The game sets its behaviour.
STUB = """
import argparse, json, os, pathlib, signal, sys, time

parser = argparse.ArgumentParser()
for flag in ("--env-id", "--seed", "--resume", "--process-id"):
    parser.add_argument(flag)
args = parser.parse_known_args()[0]
summary, game = pathlib.Path("runs", args.resume, "summary.json"), args.env_id

def end(status, code):
    summary.write_text(json.dumps({"status": status}))
    sys.exit(code)

signal.signal(signal.SIGTERM, signal.SIG_IGN if game == "Deaf-v5" else lambda *_: end("preempted", 143))
with open("starts.txt", "a") as starts:
    starts.write(f"{game} {args.seed}\\n")
place = [sorted(os.sched_getaffinity(0)), *(os.environ.get(name) for name in ("NPROC", "CUDA_VISIBLE_DEVICES"))]
print(json.dumps(place), flush=True)
while game in ("Slow-v5", "Deaf-v5") and not os.path.exists("go"):
    time.sleep(0.02)
if game == "Broken-v5" and not os.path.exists("repaired"):
    sys.exit("the screen is black")
if game == "Quiet-v5":
    sys.exit(0)
if game == "Gpu-v5" and os.environ.get("JAX_PLATFORMS", "").startswith("cuda"):
    print("error: a GPU was asked for, but the devices here are [0]", file=sys.stderr)
    sys.exit(2)
end("finished", 0)
"""


@pytest.fixture
def stub(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    return f"{shlex.quote(sys.executable)} stub.py"


LAUNCHERS: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    yield
    (tmp_path / "go").touch()
    while LAUNCHERS:
        LAUNCHERS.pop().kill()


def start(command: str, *flags: str, stdout=subprocess.PIPE) -> subprocess.Popen:
    words = [sys.executable, str(conftest.ROOT / "benchmark" / "run.py"), "--command", command, *flags]
    LAUNCHERS.append(subprocess.Popen(words, stdout=stdout, stderr=subprocess.STDOUT, text=True))
    return LAUNCHERS[-1]


def sweep(command: str, *flags: str) -> tuple[int, str]:
    """Exit code and output of a sweep that ends by itself."""
    launcher = start(command, *flags)
    return (launcher.communicate(timeout=300)[0], launcher.returncode)[::-1]


def starts(tmp_path) -> Counter:
    """How often each (game, seed) was started."""
    path = tmp_path / "starts.txt"
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log_of(tmp_path, game: str, seed: int = 1):
    (path,) = tmp_path.glob(f"runs/{game}__stub__{seed}__*/log.txt")
    return path


def test_every_run_once_with_its_own_share(stub, tmp_path, monkeypatch):
    monkeypatch.delenv("NPROC")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    flags = ["--env-ids", "One-v5", "Two-v5", "--seeds", "1", "2", "--workers", "2", "--gpus-per-worker", "1"]
    code, out = sweep(stub, *flags)
    assert code == 0, out
    assert starts(tmp_path) == {"One-v5 1": 1, "Two-v5 1": 1, "One-v5 2": 1, "Two-v5 2": 1}
    assert out.splitlines()[-1] == "runs: 4 finished"
    places = [json.loads(log_of(tmp_path, game).read_text().splitlines()[1]) for game in ("One-v5", "Two-v5")]
    (cores, nproc, gpu), (other_cores, other_nproc, other_gpu) = places
    assert {gpu, other_gpu} == {"6", "7"}
    available = len(os.sched_getaffinity(0))
    assert nproc == other_nproc == str(len(cores)) == str(len(other_cores)) == str(max(1, available // 2))
    assert available == 1 or not set(cores) & set(other_cores)


def test_a_failure_is_named_and_the_others_run(stub, tmp_path):
    code, out = sweep(stub, "--env-ids", "Broken-v5", "One-v5", "Quiet-v5", "--seeds", "1")
    assert code == 1
    assert "runs: 2 failed, 1 finished" in out
    for game, exit_code, last in [("Broken-v5", 1, "the screen is black"), ("Quiet-v5", 0, "[[")]:
        log = log_of(tmp_path, game).relative_to(tmp_path)
        assert f"failed (exit code {exit_code}): read {log}, which ends with: {last}" in out
    # a second start skips finished runs
    (tmp_path / "repaired").touch()
    code, out = sweep(stub, "--env-ids", "Broken-v5", "One-v5", "--seeds", "1")
    assert (code, out.splitlines()[-1]) == (0, "runs: 2 finished")
    assert starts(tmp_path) == {"Broken-v5 1": 2, "One-v5 1": 1, "Quiet-v5 1": 1}
    # the log holds both attempts, as commands that can be pasted, and both name the same run
    first, second = (line for line in log_of(tmp_path, "Broken-v5").read_text().splitlines() if line[0] == "$")
    assert first == second
    assert first.endswith(f"--resume {log_of(tmp_path, 'Broken-v5').parent.name} --start-fresh")


# what a full disk, a crash or another program leaves of a JSON file
NOT_WHOLE = [b"", b'{"status": "finished"', b"\xff\xfe", b"[]", b"null"]


@pytest.mark.parametrize("content", NOT_WHOLE)
def test_a_summary_that_is_not_whole_is_named_and_its_run_starts_again(stub, tmp_path, content):
    flags = ["--env-ids", "One-v5", "Two-v5", "--seeds", "1"]
    assert sweep(stub, *flags)[0] == 0
    summary = log_of(tmp_path, "One-v5").with_name("summary.json")
    summary.write_bytes(content)
    code, out = sweep(stub, *flags)
    assert code == 0, out
    assert f"{summary.relative_to(tmp_path)} counts as missing, as it cannot be read: " in out
    assert out.splitlines()[-1] == "runs: 2 finished"
    assert starts(tmp_path) == {"One-v5 1": 2, "Two-v5 1": 1}


def test_a_run_without_room_on_the_disk_fails_and_the_others_run(stub, tmp_path):
    flags = ["--env-ids", "One-v5", "Two-v5", "--seeds", "1"]
    assert sweep(stub, *flags)[0] == 0
    log = log_of(tmp_path, "One-v5")
    for path in tmp_path.glob("runs/*/summary.json"):
        path.unlink()
    log.unlink()
    log.symlink_to("/dev/full")
    code, out = sweep(stub, *flags)
    assert code == 1, out
    assert "runs: 1 failed, 1 finished" in out
    assert f"failed: {log.parent.name}: it cannot be started: [Errno 28] No space left on device" in out
    assert starts(tmp_path) == {"One-v5 1": 1, "Two-v5 1": 2}


def test_a_sweep_without_the_gpus_that_it_asked_for_says_so_at_once(stub, tmp_path, monkeypatch):
    """The message comes while the sweep goes on. A JAX_PLATFORMS that the user sets is kept."""
    flags = ["--env-ids", "Gpu-v5", "Slow-v5", "--seeds", "1", "--gpus-per-worker", "1"]
    error = "error: a GPU was asked for, but the devices here are [0]"
    monkeypatch.delenv("JAX_PLATFORMS")
    launcher = start(stub, *flags)
    wait_for(lambda: starts(tmp_path)["Slow-v5 1"])
    lines = [launcher.stdout.readline() for _ in range(4)]
    assert not (tmp_path / "go").exists()
    assert re.search(rf"failed: Gpu-v5__stub__1__\w+: {re.escape(error)}\n", lines[2]), lines
    (tmp_path / "go").touch()
    out = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 1
    assert re.search(rf"failed \(exit code 2\): read \S+, which ends with: {re.escape(error)}\n", out)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert sweep(stub, *flags) == (0, ANY)


def test_a_killed_launcher_takes_its_runs_along_and_the_next_one_goes_on(stub, tmp_path):
    flags = ["--env-ids", "One-v5", "Slow-v5", "Two-v5", "--seeds", "1"]
    launcher = start(stub, *flags)
    wait_for(lambda: starts(tmp_path)["Slow-v5 1"])
    launcher.kill()
    summary = log_of(tmp_path, "Slow-v5").with_name("summary.json")
    wait_for(summary.exists)
    assert json.loads(summary.read_text())["status"] == "preempted"
    (tmp_path / "go").touch()
    code, out = sweep(stub, *flags)
    assert code == 0, out
    assert starts(tmp_path) == {"One-v5 1": 1, "Slow-v5 1": 2, "Two-v5 1": 1}


def test_a_run_is_never_started_twice_at_once(stub, tmp_path):
    flags = ["--env-ids", "Deaf-v5", "One-v5", "--seeds", "1"]
    launcher = start(stub, *flags)
    wait_for(lambda: starts(tmp_path)["Deaf-v5 1"])
    launcher.kill()
    second = start(stub, *flags)
    wait_for(lambda: starts(tmp_path)["One-v5 1"])
    (tmp_path / "go").touch()
    out = second.communicate(timeout=60)[0]
    assert second.returncode == 0, out
    assert re.search(r"elsewhere: Deaf-v5.*\n.*running: One-v5", out)
    assert starts(tmp_path) == {"Deaf-v5 1": 1, "One-v5 1": 1}


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_runs_so_that_they_can_be_resumed(stub, tmp_path, number, expected):
    launcher = start(stub, "--env-ids", "Slow-v5", "One-v5", "--seeds", "1")
    wait_for(lambda: starts(tmp_path)["Slow-v5 1"])
    launcher.send_signal(number)
    out = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == expected
    assert "runs: 1 preempted, 1 waiting" in out
    assert json.loads(log_of(tmp_path, "Slow-v5").with_name("summary.json").read_text())["status"] == "preempted"
    assert starts(tmp_path) == {"Slow-v5 1": 1}


def test_a_terminal_shows_a_table(stub, tmp_path):
    outside, inside = pty.openpty()
    launcher, out = start(stub, "--env-ids", "Slow-v5", "Broken-v5", "--seeds", "1", stdout=inside), ""
    os.close(inside)
    try:
        while chunk := os.read(outside, 1000).decode():
            out += chunk
            if "[[0" in out:  # the last line of the log
                (tmp_path / "go").touch()
    except OSError:  # the other end is closed
        os.close(outside)
    assert launcher.wait(60) == 1
    assert re.search(r"runs: 1 running, 1 waiting\r\n +0 min  Slow-v5__stub__1__\w+: \S", out)
    assert "\x1b[1A\x1b[2K" in out  # redrawn in the same place
    assert re.search(r"failed: Broken-v5__stub__1__\w+: the screen is black\r\n", out)


def test_dry_run(monkeypatch, type_sweep):
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda pid: set(range(10)), raising=False)
    monkeypatch.delenv("NPROC")
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    sizes = ["--workers", "2", "--processes", "2", "--gpus-per-worker", "2"]
    out = type_sweep("--command", "uv run --with 'jax[cuda13]' stub.py --concurrency", *sizes,
               "--exp-name", "x", "--env-ids", "Pong-v5", "Pong-v5", "--seeds", "3", "4", "--dry-run")  # fmt: skip
    line = (
        "env NPROC=2 CUDA_VISIBLE_DEVICES={gpu} JAX_PLATFORMS=cuda,cpu taskset --cpu-list {cores} "
        "uv run --with 'jax[cuda13]' stub.py --concurrency --env-id Pong-v5 --seed {seed} --exp-name x "
        "--resume Pong-v5__x__{seed}__095bf121 --start-fresh "
        "--coordinator-address 127.0.0.1:{port} --num-processes 2 --process-id {rank} & "
    )
    seed_3 = dict(seed=3, port=9876)
    seed_4 = dict(seed=4, port=9877)
    assert out.splitlines() == [
        line.format(gpu=2, cores="0,1", rank=0, **seed_3) + line.format(gpu=3, cores="2,3", rank=1, **seed_3) + "wait",
        line.format(gpu=5, cores="5,6", rank=0, **seed_4) + line.format(gpu=7, cores="7,8", rank=1, **seed_4) + "wait",
    ]


def test_every_run_of_a_dry_run_has_a_port_of_its_own(type_sweep):
    flags = ["--command", "a.py", "--processes", "2", "--env-ids", "Pong-v5", "--seeds", "1", "2", "3"]
    lines = type_sweep(*flags, "--dry-run").splitlines()
    ports = [set(re.findall(r"127\.0\.0\.1:(\d+)", line)) for line in lines]
    assert [len(own) for own in ports] == [1, 1, 1]
    assert len(set.union(*ports)) == 3


@pytest.mark.parametrize(
    ("gpus", "given", "used"),
    [("1", None, "cuda,cpu"), ("1", "", "cuda,cpu"), ("1", "rocm,cpu", "rocm,cpu"), ("0", None, None)],
)
def test_who_asks_for_gpus_says_so_to_jax(monkeypatch, gpus, given, used, type_sweep):
    monkeypatch.delenv("JAX_PLATFORMS")
    if given is not None:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    flags = ["--command", "a.py", "--env-ids", "Pong-v5", "--seeds", "1", "--gpus-per-worker", gpus]
    out = type_sweep(*flags, "--dry-run")
    assert re.findall(r"JAX_PLATFORMS=(\S+)", out) == ([used] if used else [])


def test_other_flags_make_another_run_and_another_python_does_not(type_sweep):
    name = lambda *flags: re.search(r"--resume (\S+)", type_sweep(*flags, "--dry-run"))[1]
    base = name("--command", "uv run a.py --gamma 0.9")
    assert name("--command", "python -O a.py --gamma 0.9") == base
    assert name("--command", "python a.py --gamma 0.99") != base
    assert name("--command", "python a.py --gamma 0.9", "--processes", "2") != base


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--command", "make"], "error: --command 'make': must name a script, NAME.py. For example: --command 'uv run"),
        (["--command", "a.py --env_id=Pong-v5"], "must leave --env-id to the launcher"),
        (["--exp-name", "a/b"], "error: --exp-name a/b: must be"),
        (["--workers", "0"], "error: --workers 0: must be 1 or more. For example: --workers 1"),
        (["--processes", "0"], "error: --processes 0: must be 1 or more. For example: --processes 1"),
        (["--processes", "4", "--gpus-per-worker", "6"], "--gpus-per-worker 6: must be a multiple of --processes 4"),
        (
            ["--gpus-per-worker", "3"],
            "CUDA_VISIBLE_DEVICES names 2, too few for --workers 1. For example: --gpus-per-worker 2",
        ),
        (["--env-ids", "atari5"], "--env-ids atari5: must be a game with its version, or a list: atari10, atari3"),
        (["--env-ids"], "--env-ids (empty): needs one game or more"),
        (["--seeds"], "--seeds (empty): needs one seed or more"),
    ],
)
def test_errors(flags, message, monkeypatch, capsys, type_sweep):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(SystemExit) as error:
        type_sweep("--command", "a.py", *flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_lists_of_games():
    known = set(envpool.list_all_envs())
    for name, size in [("atari57", 57), ("atari10", 10), ("atari3", 3)]:
        games = [made.env_id for made in run.plan(run.Options("a.py", env_ids=(name,), seeds=(1,)))]
        assert len(set(games)) == len(games) == size
        assert set(games) <= known


def test_slurm_array(type_in, tmp_path, monkeypatch, type_sweep):
    flags = ["--command", "uv run --with 'a[b]' stub.py", "--env-ids", "One-v5", "Two-v5", "Six-v5", "--seeds", "5"]
    flags += ["--exp-name", "x", "--workers", "2", "--processes", "2", "--gpus-per-worker", "8"]
    _, dry, _ = type_sweep(*flags, "--dry-run").splitlines()
    name = re.search(r"--resume (\S+)", dry)[1]
    text = type_sweep(*flags, "--slurm")
    for line in ["--job-name=x", "--array=0-2%2", "--ntasks=2", "--gpus-per-task=4", "--signal=TERM@120"]:
        assert f"#SBATCH {line}\n" in text
    words = ["uv", "run", "--with", "a[b]", "stub.py", "--env-id", "Two-v5", "--seed", "5", "--exp-name", "x"]
    words += ["--resume", name, "--start-fresh", "--distributed"]
    monkeypatch.setenv("INDEX", "1")
    job = f"sbatch <<'END'\n{text}END\n"
    _, (srun, *_) = type_in(job)
    assert srun == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=10", *words]
    # a preempted job goes back into the queue
    monkeypatch.setenv("EXIT_srun", "143")
    *_, (requeue, *_) = type_in(job, code=143)
    assert requeue == ["scontrol", "requeue", "7"]
    # a failed job does not
    monkeypatch.setenv("EXIT_srun", "1")
    assert [record[0][0] for record in type_in(job, code=1)] == ["sbatch", "srun"]
    # a run that a launcher or another job holds is not started
    with (tmp_path / "runs" / name / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [record[0][0] for record in type_in(job, code=1)] == ["sbatch"]
    # finished runs are left out
    (tmp_path / "runs" / name / "summary.json").write_text('{"status": "finished"}')
    text = type_sweep(*flags, "--slurm")
    assert "Two-v5" not in text
    assert "#SBATCH --array=0-1%2\n" in text


@pytest.mark.parametrize(("given", "used"), [(None, "cuda,cpu"), ("cpu", "cpu")])
def test_jobs_for_gpus_say_so_to_jax(type_in, monkeypatch, given, used, type_sweep):
    """Otherwise JAX passes over GPUs that it cannot use. A job without GPUs is left alone."""
    monkeypatch.delenv("JAX_PLATFORMS")
    if given is not None:
        monkeypatch.setenv("JAX_PLATFORMS", given)

    def platforms(text: str, program: str) -> set[str | None]:
        return {record[-1] for record in type_in(text) if record[0][0] == program}

    sweep = ["--command", "a.py", "--env-ids", "One-v5", "--seeds", "5", "--slurm", "--gpus-per-worker"]
    job = lambda gpus: f"sbatch <<'END'\n{type_sweep(*sweep, gpus)}END\n"
    assert platforms(job("1"), "srun") == {used}
    assert platforms(job("0"), "srun") == {given}
    assert platforms("sbatch benchmark/slurm.sbatch cleanba_ppo_envpool.py", "srun") == {used}
    assert platforms("PYTHON=python bash benchmark/gpu.sh out hashes", "python") == {used}


def test_processes_of_a_run_name_each_other(type_in, type_sweep):
    flags = ["--command", "python a.py", "--processes", "3", "--env-ids", "Pong-v5", "--seeds", "1"]
    place = lambda words: {flag: words[words.index(flag) + 1] for flag in words if flag in run.OWN_FLAGS[6:]}
    places = [place(words) for words, *_ in type_in(type_sweep(*flags, "--dry-run"))]
    assert sorted(p["--process-id"] for p in places) == ["0", "1", "2"]
    assert len({p["--coordinator-address"] for p in places}) == 1


# What a grid asks of a script: it checks its flags, also where it is only loaded. Each run notes what it was given.
GRID_STUB = """
import argparse, json, pathlib, sys

load_model = play_games = None

class FlagError(ValueError):
    pass

def parse_args(words):
    parser = argparse.ArgumentParser()
    for flag in ("--env-id", "--seed", "--exp-name", "--resume", "--norm-adv"):
        parser.add_argument(flag)
    parser.add_argument("--start-fresh", action="store_true")
    parser.add_argument("--gamma", type=float)
    parser.add_argument("--channels", type=int, nargs="+")
    return parser.parse_args(words)

def check_args(args, processes):
    if args.gamma > processes:
        raise FlagError(f"--gamma {args.gamma}: must be at most {processes}")

if __name__ == "__main__":
    args = parse_args(sys.argv[1:])
    with open("starts.txt", "a") as starts:
        starts.write(f"{args.exp_name} {args.env_id} {args.seed} gamma {args.gamma} channels {args.channels}\\n")
    pathlib.Path("runs", args.resume, "summary.json").write_text(json.dumps({"status": "finished"}))
"""


@pytest.fixture
def grid_stub(tmp_path):
    (tmp_path / "stub.py").write_text(GRID_STUB)
    return f"{shlex.quote(sys.executable)} stub.py"


def test_every_point_of_a_grid_is_an_experiment(grid_stub, tmp_path):
    flags = ["--env-ids", "One-v5", "Two-v5", "--seeds", "2", "--exp-name", "x", "--workers", "4"]
    expected = {
        f"x__gamma={gamma}__channels={name} {game} 2 gamma {gamma} channels {channels}": 1
        for gamma in ("0.9", "0.99")
        for name, channels in {"4,8": [4, 8], "16": [16]}.items()
        for game in ("One-v5", "Two-v5")
    }
    code, out = sweep(grid_stub, *flags, "--grid", "gamma=0.9,0.99", "channels=4 8,16")
    assert (code, out.splitlines()[-1]) == (0, "runs: 8 finished"), out
    assert starts(tmp_path) == expected
    assert len(list(tmp_path.glob("runs/One-v5__x__gamma=0.9__channels=4,8__2__*/summary.json"))) == 1
    # a second start with one more value, and the others in a different order, runs only what is new
    code, out = sweep(grid_stub, *flags, "--grid", "gamma=0.99,0.5,0.9,0.9", "channels=16,4 8")
    assert (code, out.splitlines()[0]) == (0, "runs: 8 finished, 4 waiting"), out
    assert Counter(" gamma 0.5 " in line for line in starts(tmp_path).elements()) == {False: 8, True: 4}


def test_a_grid_begins_with_every_point_and_game_of_the_first_seed(grid_stub, tmp_path, type_sweep):
    flags = ["--command", grid_stub, "--env-ids", "One-v5", "Two-v5", "--seeds", "7", "8"]
    out = type_sweep(*flags, "--grid", "gamma=0.9,0.5", "norm_adv=True,False", "--dry-run")
    names = re.findall(r"--exp-name (\S+)", out)
    points = [f"stub__gamma={gamma}__norm-adv={norm}" for gamma in (0.9, 0.5) for norm in (True, False)]
    assert names == 4 * points
    assert re.findall(r"--env-id (\S+) --seed (\d)", out)[::4] == [
        ("One-v5", "7"), ("Two-v5", "7"), ("One-v5", "8"), ("Two-v5", "8"),
    ]  # fmt: skip
    assert len(set(re.findall(r"--resume (\S+)", out))) == 16


def test_a_job_array_has_an_index_for_every_point(grid_stub, type_in, tmp_path, monkeypatch, type_sweep):
    flags = ["--command", "python stub.py", "--env-ids", "One-v5", "--seeds", "5", "6", "--exp-name", "x"]
    flags += ["--grid", "gamma=0.9,0.5", "channels=4 8,16"]
    dry = [shlex.split(line) for line in type_sweep(*flags, "--dry-run").splitlines()]
    text = type_sweep(*flags, "--slurm")
    assert "#SBATCH --array=0-7%1\n" in text
    for index in (0, 3, 6):
        monkeypatch.setenv("INDEX", str(index))
        _, (srun, *_) = type_in(f"sbatch <<'END'\n{text}END\n")
        assert srun[3:] == dry[index][dry[index].index("python") :]
    name = dry[3][dry[3].index("--resume") + 1]
    (tmp_path / "runs" / name / "summary.json").write_text('{"status": "finished"}')
    assert "#SBATCH --array=0-6%1\n" in type_sweep(*flags, "--slurm")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("learning-rate", "must be FLAG=VALUE,VALUE; a value is letters, digits, spaces and . + - _ only"),
        ("learning-rate=", "must be FLAG=VALUE,VALUE"),
        ("learning-rate=1e-4,,3e-4", "must be FLAG=VALUE,VALUE"),
        ("learning-rate=1e-4,", "must be FLAG=VALUE,VALUE"),
        ("learning-rate=1e-4=3e-4", "must be FLAG=VALUE,VALUE"),
        ("load-model=a/b,c", "must be FLAG=VALUE,VALUE"),
        ("seed=1,2", "must leave --seed to the launcher"),
        ("env_id=Pong-v5", "must leave --env-id to the launcher"),
        ("gamma=0.9", "--gamma is given twice, here or in --command"),
        ("norm-adv=True,False", "--norm-adv is given twice, here or in --command"),
        ("num-steps=1,2 num_steps=3", "--num-steps is given twice, here or in --command"),
    ],
)
def test_a_grid_that_cannot_be(grid, message, capsys, type_sweep):
    with pytest.raises(SystemExit) as error:
        type_sweep("--command", "a.py --gamma=0.99 --no_norm_adv", "--grid", *grid.split(" "))
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: --grid {grid.split(' ')[-1]}: {message}")
    assert line.endswith(f"For example: {run.GRID}\n")


@pytest.mark.parametrize(
    ("flags", "grid", "message"),
    [
        ("--gamma 0.5", "wrong=1", "unrecognized arguments: --wrong 1"),
        ("--gamma 0.5", "channels=4,wide", "argument --channels: invalid int value: 'wide'"),
        ("", "gamma=0.9,1.5", "error: --gamma 1.5: must be at most 1"),
        ("--gamma 1.5", "channels=4", "error: --gamma 1.5: must be at most 1"),
    ],
)
def test_what_the_script_refuses_is_not_started(grid_stub, tmp_path, flags, grid, message):
    code, out = sweep(f"{grid_stub} {flags}", "--grid", grid)
    assert code == 2
    assert message in out
    assert out.splitlines()[-1].startswith(f"error: --grid {grid}: the script refuses it or the rest of --command")
    assert not (tmp_path / "runs").exists()


def test_a_fork_whose_packages_are_missing_checks_its_flags_when_it_starts(grid_stub, tmp_path, type_sweep):
    (tmp_path / "stub.py").write_text(f"import a_simulator_that_is_not_here\n{GRID_STUB}")
    flags = ["--command", grid_stub, "--env-ids", "One-v5", "--seeds", "1", "--dry-run"]
    assert len(type_sweep(*flags, "--grid", "wrong=1,2").splitlines()) == 2


def test_a_real_script_reads_the_flags_of_a_grid(type_sweep, monkeypatch):
    script = conftest.load("cleanba_ppo_envpool")
    path = str(conftest.ROOT / "cleanba_ppo_envpool.py")
    flags = ["--command", f"python {path} --img-size 42", "--env-ids", "Pong-v5", "--seeds", "1", "--dry-run"]
    out = type_sweep(*flags, "--grid", "norm-adv=True,False", "channels=4 8 8,16", "learning-rate=1e-4")
    found = []
    for line in out.splitlines():
        words = shlex.split(line)
        args = script.parse_args(words[words.index(path) + 1 :])
        script.check_args(args)
        found.append((args.exp_name, args.norm_adv, args.channels, args.learning_rate, args.img_size))
    name = "cleanba_ppo_envpool__norm-adv={}__channels={}__learning-rate=1e-4"
    assert found == [
        (name.format(norm_adv, channels), norm_adv, tuple(map(int, channels.split(","))), 1e-4, 42)
        for norm_adv in (True, False)
        for channels in ("4,8,8", "16")
    ]
    # in this process, to save an import
    monkeypatch.setattr(run, "load_script", lambda path: script)
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit, match=r"^error: --learning-rate -1\.0: must be 0 or more"):
        run.ask_script(path, 1, [["--gamma", "0.9"], ["--learning-rate", "-1"]])


def test_every_command_of_the_weights_and_biases_sweep_is_valid(type_in, monkeypatch):
    """The agent writes ${args_no_equals} as words --FLAG VALUE. test_wandb.py lets the agent itself do it."""
    sweep = yaml.safe_load((conftest.ROOT / "benchmark" / "wandb_sweep.yaml").read_text())
    choices = []
    for flag, rule in sweep["parameters"].items():
        values = rule.get("values") or [rule[key] for key in ("value", "min", "max") if key in rule]
        choices.append([(flag, value) for value in values])
    points = list(itertools.product(*choices))
    assert len(points) >= 16
    lines = []
    for point in points:
        words = {"${env}": ["/usr/bin/env"], "${interpreter}": ["python"], "${program}": [sweep["program"]]}
        words["${args_no_equals}"] = [word for flag, value in point for word in (f"--{flag}", str(value))]
        lines.append(shlex.join(word for part in sweep["command"] for word in words.get(part, [part])))
    script = conftest.load("cleanba_ppo_envpool")
    monkeypatch.setattr(script, "find_spec", lambda name: name == "wandb")
    records = type_in("\n".join(lines))
    for point, (words, *_) in zip(points, records, strict=True):
        assert words[:2] == ["python", "cleanba_ppo_envpool.py"]
        args = script.parse_args(words[2:])
        script.check_args(args)
        assert args.track
        for flag, value in point:
            given = getattr(args, flag)
            assert value == (" ".join(map(str, given)) if isinstance(given, tuple) else given), flag
    assert {dict(point)["norm_adv"] for point in points} == {True, False}
    assert all(" " in dict(point)["channels"] for point in points)
    assert sweep["project"] == script.Args.wandb_project_name
    # The name of the metric is one that a run logs once a game has ended.
    logged = []
    log = lambda group, values: logged.extend(f"{group}/{name}" for name in values)
    report = SimpleNamespace(games=[(300.0, 500)], write=log, run=Path.cwd(), updates=1, params={})
    script.Report.write_log(report, {}, {}, {})
    assert sweep["metric"]["name"] in logged


@pytest.mark.slow
@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_a_real_run_that_asked_for_a_gpu_fails(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    words = [sys.executable, str(conftest.ROOT / "cleanba_ppo_envpool.py"), *conftest.SMALL]
    command = shlex.join([*words, "--total-timesteps", "8192"])
    code, out = sweep(command, "--env-ids", "Breakout-v5", "--seeds", "1", "--gpus-per-worker", "1")
    assert code == 1
    assert re.search(r"failed: Breakout-v5__\w+: error: .*a GPU was asked for, but the devices here are", out), out


@pytest.mark.slow
def test_a_real_run_ends_with_the_same_bits_when_the_launcher_is_killed(tmp_path):
    words = [sys.executable, str(conftest.ROOT / "cleanba_ppo_envpool.py"), *conftest.SMALL]
    command = shlex.join([*words, "--total-timesteps", "8192", "--checkpoint-frequency", "8"])
    flags = ["--env-ids", "Breakout-v5", "--seeds", "1", "--exp-name"]
    launcher = start(command, *flags, "killed")
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/8.msgpack")), 300)
    launcher.kill()
    launcher.wait()
    assert sweep(command, *flags, "killed") == (0, ANY)
    assert sweep(command, *flags, "whole") == (0, ANY)
    killed, whole = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/summary.json")))
    assert [s["args"]["exp_name"] for s in (killed, whole)] == ["killed", "whole"]
    assert killed["params_sha256"] == whole["params_sha256"]
    assert killed["resumed_at"]
    assert not whole["resumed_at"]
    assert sweep(command, *flags, "whole") == (0, "runs: 1 finished\n" * 2)
