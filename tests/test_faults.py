"""Full disks, damaged or missing files, environments that hang or die, and a missing home directory."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import conftest
import pytest
from conftest import LONGER, resume, train_until

TINY = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8,
            num_minibatches=1, log_frequency=1, total_timesteps=64)  # fmt: skip
SLOW = partial(pytest.param, marks=pytest.mark.slow)
SHORT = [*conftest.SMALL, "--total-timesteps", "512", "--num-actor-threads", "2"]
IT = dict(resume="it", start_fresh=True)


def train(script, **flags):
    return script.train(script.Args(**TINY | flags))


def test_a_file_is_whole_or_the_old_one(script, tmp_path, monkeypatch):
    """A full disk may fail only at fsync, and the old file is kept."""
    path = tmp_path / "summary.json"
    script.write_file(path, b"old")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            script.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    script.write_file(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("summary.json", b"new")]


@conftest.one_fast
def test_json_files_of_a_run_are_written_whole(script, monkeypatch):
    """run.json and summary.json keep their old content when the disk is full."""
    train(script, **IT)
    before = {name: Path("runs/it", name).read_text() for name in ("run.json", "summary.json")}
    write_file = script.write_file
    make_writer = script.event_file_writer.EventFileWriter
    writers = []

    def write(path, data):
        if path.suffix == ".json":
            monkeypatch.setattr(os, "fsync", full)
        write_file(path, data)

    def make(directory):
        writers.append(make_writer(directory))
        return writers[-1]

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "write_file", write)
    monkeypatch.setattr(script.event_file_writer, "EventFileWriter", make)
    with pytest.raises(OSError, match="No space"):
        train(script, **IT)
    assert {name: Path("runs/it", name).read_text() for name in before} == before
    assert writers  # made by the name that Weights & Biases replaces, too
    for writer in writers:
        writer.close()  # its thread would otherwise live until the process ends


@conftest.one_fast
def test_unreadable_checkpoints_of_later_updates(script):
    """A run that starts afresh among them keeps its own checkpoints and resumes from those."""
    flags = dict(checkpoint_frequency=1, total_timesteps=6 * 32)
    whole = train(script, **flags, **IT)
    folder = Path("runs/it/checkpoints")
    for update in (5, 6):
        (folder / f"{update}.msgpack").write_bytes(b"")
    train(script, **flags | dict(total_timesteps=3 * 32), anneal_lr=False, **IT)
    sizes = {path.stem: path.stat().st_size for path in folder.glob("*.msgpack")}
    assert sorted(sizes) == ["2", "3", "5", "6"]
    assert sizes["2"] > 0 < sizes["3"]
    shutil.rmtree("runs/it")
    assert train(script, **flags, **IT)["params_sha256"] == whole["params_sha256"]


@conftest.one_fast
def test_a_checkpoint_that_a_user_has_copied(script):
    """Only files named with digits are checkpoints. A copy neither ends the run nor is removed."""
    flags = dict(checkpoint_frequency=1, total_timesteps=4 * 32)
    train(script, **flags | dict(total_timesteps=64), anneal_lr=False, **IT)
    folder = Path("runs/it/checkpoints")
    shutil.copy(folder / "2.msgpack", folder / "best.msgpack")
    summary = train(script, **flags | dict(total_timesteps=64), anneal_lr=False, resume="it")
    assert summary["status"] == "finished"
    names = [path.name for path in script.find_checkpoints(Path("runs/it"))]
    assert names == ["1.msgpack", "2.msgpack"]
    assert (folder / "best.msgpack").exists()


@conftest.one_fast
def test_a_loaded_model_that_is_gone(script, monkeypatch):
    """A checkpoint is complete: a run started with --load-model resumes without the file or without the flag."""
    parent = train(script, save_model=True, eval_episodes=1, env_id="Pong-v5")
    model = Path("runs", parent["run_name"], "model.msgpack")
    flags = dict(env_id="Pong-v5", load_model=str(model), total_timesteps=96)
    first = train(script, **flags, **IT)
    model.unlink()
    again = train(script, **flags, resume="it")
    without = train(script, **flags | dict(load_model=None), resume="it")
    assert first["params_sha256"] == again["params_sha256"] == without["params_sha256"]
    with pytest.raises(script.FlagError, match=r"--load-model .*: cannot be read: .*No such file"):
        train(script, **flags, resume="another", start_fresh=True)
    assert not Path("runs/another").exists()  # an error about a flag leaves nothing behind


def test_two_runs_of_one_second_have_two_names(script, monkeypatch):
    """Runs in two containers can have the same process id and the same clock time."""
    monkeypatch.setattr(time, "strftime", lambda *_: "20261127-000000")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    names = {script.run_directory(script.Args()).name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(f"Breakout-v5__{script.__name__}__1__20261127-000000") for name in names)


def test_where_a_run_is(script, tmp_path, monkeypatch):
    """--resume means an existing directory first, then a name below runs. With a separator it is a path."""
    (tmp_path / "here").mkdir()
    directory = lambda resume: script.run_directory(script.Args(resume=resume))
    assert directory("here") == Path("here")
    assert directory("it") == Path("runs/it")
    assert directory("./it") == Path("it")
    assert directory("a/it") == Path("a/it")
    assert directory(str(tmp_path / "it")) == tmp_path / "it"
    (tmp_path / "runs" / "it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    assert directory("it") == Path("it")


@conftest.one_fast
def test_parameters_that_part_never_reach_a_checkpoint(script, monkeypatch):
    """One of two processes has different parameters from the third check on."""
    share, hashes = script.share, []

    def share_with_another(value):
        if isinstance(value, str) and len(value) == 64:
            hashes.append(value)
            return [value, value if len(hashes) < 3 else "other"]
        return share(value)

    monkeypatch.setattr(script, "share", share_with_another)
    with pytest.raises(RuntimeError, match="different parameters after update 2"):
        train(script, checkpoint_frequency=1, total_timesteps=4 * 32, **IT)
    assert [path.stem for path in script.find_checkpoints(Path("runs/it"))] == ["1"]


@conftest.one_fast
def test_environments_whose_construction_hangs(script, launcher, tmp_path):
    """Making the second pool hangs, as it would with games on a file server that is down."""
    hang = """
make_env, pools = script.make_env, []
def make(*arguments):
    pools.append(1)
    if len(pools) > 1:
        time.sleep(10**6)
    return make_env(*arguments)
script.make_env = make
"""
    flags = "--img-size 16 --channels 4 --local-num-envs 4 --num-actor-threads 1 --num-steps 8 --num-minibatches 1"
    flags += " --total-timesteps 3200 --checkpoint-frequency 2 --actor-timeout 2 --resume it --start-fresh"
    process = launcher.start_patched(script, hang, *flags.split())
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "TimeoutError: actor 0: making its environments takes more than 2 s" in err
    assert "go on from update 2 with --resume runs/it" in out


@conftest.one_fast
def test_a_device_that_failed_does_not_hide_the_summary(script, monkeypatch):
    """The summary is written even if the parameters can no longer be fetched."""

    def fail(params):
        raise RuntimeError("the device is gone")

    update = script.Report.update

    def lose_device(report, *arguments):
        update(report, *arguments)
        monkeypatch.setattr(script, "params_sha256", fail)

    monkeypatch.setattr(script.Report, "update", lose_device)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(script, **IT)
    summary = json.loads(Path("runs/it/summary.json").read_text())
    assert (summary["status"], summary["updates"], summary["params_sha256"]) == ("failed", 2, None)


@conftest.one_fast
def test_an_error_about_a_flag_leaves_the_run_as_it_was(script):
    """This also holds for an error found late, in an opened checkpoint: here it has a different network."""
    train(script, **IT)
    files = lambda: {path: path.stat().st_mtime_ns for path in Path("runs/it").rglob("*")}
    before = files()
    content = script.unpack(Path("runs/it/checkpoints/2.msgpack").read_bytes())
    content["state"]["1"]["params"].popitem()
    Path("runs/it/checkpoints/2.msgpack").write_bytes(script.pack(content))
    before[Path("runs/it/checkpoints/2.msgpack")] = Path("runs/it/checkpoints/2.msgpack").stat().st_mtime_ns
    with pytest.raises(script.FlagError, match="--resume it: it has another network or optimizer"):
        train(script, resume="it")
    assert files() == before


@conftest.one_fast
def test_no_home_directory(script, launcher, tmp_path):
    """Without a home directory, as in a container, no folder named ~ appears."""
    environment = dict(JAX_COMPILATION_CACHE_DIR="")
    forget = "import posixpath; posixpath.expanduser = lambda path: path"  # HOME is not set, and no user has this id
    flags = "--img-size 16 --channels 4 --local-num-envs 4 --num-actor-threads 1 --num-steps 8 --num-minibatches 1"
    process = launcher.start_patched(script, forget, *flags.split(), "--total-timesteps", "32", **environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "no home directory: compiled programs are not kept" in err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@conftest.one_fast
def test_a_moved_cache_keeps_every_program(script, tmp_path):
    """Like the default cache, it also keeps what compiles fast."""
    code = (
        f"import jax, {script.__name__} as script; script.configure_jax(script.Args()); jax.jit(lambda x: x + 1)(1.0)"
    )
    moved = {"JAX_COMPILATION_CACHE_DIR": "moved", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
    moved["PYTHONPATH"] = str(conftest.ROOT)
    subprocess.run([sys.executable, "-c", code], env=os.environ | moved, check=True, timeout=60)
    assert list(tmp_path.glob("moved/*-cache"))


@conftest.one_fast
def test_final_games_cost_no_training_time(script, monkeypatch):
    """seconds, sps and sps_steady exclude the final games."""
    play_games = script.play_games

    def play_slowly(*arguments):
        time.sleep(30)
        return play_games(*arguments)

    slept = []
    monkeypatch.setattr(script, "play_games", play_slowly)
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds))
    clock, started = time.perf_counter, time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(slept))
    flags = dict(save_model=True, eval_episodes=1, env_id="Pong-v5")
    summary = train(script, **flags, **IT)
    assert slept == [30]
    assert summary["seconds"] <= clock() - started
    assert summary["sps"] == pytest.approx(summary["global_step"] / summary["seconds"])


CRASH = """
make_env = script.make_env

class Faulty:
    def __init__(self, pool):
        self.pool, self.steps, self.reset = pool, 0, pool.reset

    def step(self, action):
        self.steps += 1
        if self.steps == 7:
            raise OSError("the cartridge fell out")
        return self.pool.step(action)

def make(args, seeds, num_threads):
    pool = make_env(args, seeds, num_threads)
    return Faulty(pool) if seeds == script.env_seeds(args.seed, 0, 8, 8) else pool

script.make_env = make
"""


@conftest.one_fast
def test_an_actor_that_dies_ends_the_run(script, launcher, tmp_path):
    start = time.monotonic()
    process = launcher.start_patched(script, CRASH, *SHORT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "actor 1 failed" in err
    assert "OSError: the cartridge fell out" in err
    assert "in step" in err  # the original traceback
    (summary,) = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert summary["status"] == "failed"
    assert summary["seconds"] < 15
    assert time.monotonic() - start < 60


@conftest.one_fast
def test_nothing_is_left_when_an_actor_dies(script, monkeypatch, counting_pool):
    """In this process, the error comes within seconds and no actor thread survives."""
    failed_at = []

    class Faulty(counting_pool):
        def step(self, action):
            if len(self.log) == 7:
                failed_at.append(time.monotonic())
                raise OSError("the cartridge fell out")
            return super().step(action)

    monkeypatch.setattr(script, "env_spec", lambda args: ((4, 8, 8), 4))
    args = script.Args(img_size=8, channels=(4,), local_num_envs=4, num_actor_threads=2, num_steps=16,
                       num_minibatches=2, total_timesteps=10**6)  # fmt: skip
    second = script.env_seeds(args.seed, 0, 4, 4)
    monkeypatch.setattr(script, "make_env", lambda args, seeds, n: (Faulty if seeds == second else counting_pool)(4))
    with pytest.raises(RuntimeError, match="actor 1 failed") as caught:
        script.train(args)
    assert time.monotonic() - failed_at[0] < 5
    assert isinstance(caught.value.__cause__, OSError)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("actor")]


@conftest.one_fast
@pytest.mark.parametrize("how", ["timeout", "SIGTERM", "Ctrl-C"])
def test_environments_that_hang(script, monkeypatch, counting_pool, how):
    """The run ends within seconds, names actor and step, and leaves a summary. The timeout excludes compilation."""
    released, heard = threading.Event(), set()

    class Hanging(counting_pool):
        def step(self, action):
            if len(self.log) == 3:
                if how == "SIGTERM":
                    heard.add(signal.SIGTERM)
                elif how == "Ctrl-C":
                    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
                hung_at.append(time.monotonic())
                released.wait()
            return super().step(action)

    hung_at, timeout = [], {"actor_timeout": 1} if how == "timeout" else {}
    monkeypatch.setattr(script, "env_spec", lambda args: ((4, 8, 8), 4))
    monkeypatch.setattr(script, "make_env", lambda args, seeds, n: Hanging(4))
    args = script.Args(**TINY | dict(img_size=8, total_timesteps=10**6), **timeout, **IT)
    said = r"actor 0: step 4 of its environments takes more than \d s"
    ends = {"timeout": (TimeoutError, said), "SIGTERM": (SystemExit, "143"), "Ctrl-C": (KeyboardInterrupt, "^$")}
    error, message = ends[how]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        with pytest.raises(error, match=message):
            script.train(args, heard)
        assert 0.4 < time.monotonic() - hung_at[0] < 10
    finally:
        released.set()
        signal.signal(signal.SIGINT, handler)
    summary = json.loads(Path("runs/it/summary.json").read_text())
    assert summary["status"] == {"timeout": "failed", "SIGTERM": "preempted", "Ctrl-C": "interrupted"}[how]
    assert summary["updates"] == 0


@conftest.one_fast
def test_nan_ends_the_run(script):
    """The run ends at the next log and names the metric. It saves no checkpoint and keeps the ones before."""
    flags = TINY | dict(checkpoint_frequency=1, total_timesteps=10**6, resume="it", start_fresh=True, anneal_lr=False)
    with pytest.raises(FloatingPointError, match=r"update \d+: losses/\w+ is not finite, no checkpoint made"):
        script.train(script.Args(**flags, learning_rate=1e30))
    summary = json.loads(Path("runs/it/summary.json").read_text())
    assert summary["status"] == "failed"
    whole = [int(path.stem) for path in script.find_checkpoints(Path("runs/it"))]
    assert whole == list(range(1, summary["updates"]))[-2:]


@conftest.one_fast
def test_what_fails_before_the_run_begins_leaves_nothing(script, monkeypatch):
    """A run that fails while the network is built leaves nothing. Once its directory exists, it leaves a summary."""

    class Broken(script.ActorCritic):
        def __call__(self, obs):
            raise ZeroDivisionError("no such layer")

    with monkeypatch.context() as patch:
        patch.setattr(script, "ActorCritic", Broken)
        with pytest.raises(ZeroDivisionError):
            script.train(script.Args(img_size=16))
    assert not Path("runs").exists()
    monkeypatch.setattr(script, "make_update", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.train(script.Args(img_size=16, channels=(4,)))
    (summary,) = [json.loads(path.read_text()) for path in Path("runs").glob("*/summary.json")]
    assert (summary["status"], summary["updates"], summary["params_sha256"]) == ("failed", 0, None)


@conftest.one_fast
def test_a_run_json_that_a_full_disk_left_empty(script, monkeypatch, whole):
    """The checkpoint holds all that a resumed run needs."""
    train_until(script, monkeypatch, 3)
    Path("runs/it/run.json").write_text("")
    with pytest.raises(script.FlagError, match=r"--gamma 0\.9: the run to resume has 0\.99"):
        resume(script, gamma=0.9)
    assert resume(script)["params_sha256"] == whole(script)
    assert json.loads(Path("runs/it/run.json").read_text())["args"]["resume"] == "it"


def test_a_directory_that_cannot_be_written(script):
    Path("runs").write_text("a file where the directory should be")
    with pytest.raises(script.FlagError, match=r"the directory runs/.*: cannot be written: "):
        script.train(script.Args(**TINY))


@pytest.mark.parametrize("damage", ["truncated", SLOW("flipped"), SLOW("emptied")])
@conftest.one_fast
def test_a_damaged_checkpoint(script, whole, monkeypatch, capfd, damage):
    """A damaged checkpoint is skipped in favour of the one before, and is written again."""
    train_until(script, monkeypatch, 5, **LONGER)
    newest = Path("runs/it/checkpoints/4.msgpack")
    if damage == "truncated":
        os.truncate(newest, newest.stat().st_size // 2)
    elif damage == "flipped":
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    else:
        newest.write_bytes(b"")
    capfd.readouterr()
    resumed = resume(script, **LONGER)
    assert "the checkpoint runs/it/checkpoints/4.msgpack cannot be read, trying an older one" in capfd.readouterr().out
    assert resumed["resumed_at"] == [2]
    assert resumed["params_sha256"] == whole(script, **LONGER)
    assert sorted(path.name for path in newest.parent.iterdir()) == ["4.msgpack", "6.msgpack", "lock"]


KILLED_WRITING = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import conftest
script = conftest.load({name!r})
replace = os.replace

def die(source, target):
    "All is written and the checkpoint has not its name yet."
    if target.name == "4.msgpack":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = die
script.train(script.Args(**{flags!r}))
"""


@pytest.mark.slow
def test_kill_9_while_a_checkpoint_is_written(script, whole, tmp_path):
    flags = conftest.TINY | LONGER | dict(resume="it", start_fresh=True)
    code = KILLED_WRITING.format(tests=str(conftest.ROOT / "tests"), name=script.__name__, flags=flags)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = sorted(path.name for path in Path("runs/it/checkpoints").iterdir())
    assert names == ["2.msgpack", "lock", "unfinished"]
    resumed = resume(script, **LONGER)
    assert resumed["resumed_at"] == [2]
    assert resumed["params_sha256"] == whole(script, **LONGER)


@contextlib.contextmanager
def small_disk(path, size):
    """Mount a file system of `size` at `path`. Skip the test where that is not allowed."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@conftest.one_fast
def test_a_full_disk(script, whole, tmp_path, monkeypatch):
    """A full disk ends the run with an error that says so. With room again, the last whole checkpoint is resumed."""
    save = script.Report.save

    def fill(report, update, tree):
        if update == 4:
            report.wait_for_checkpoint()
            space = os.statvfs("runs")
            os.posix_fallocate(ballast.fileno(), 0, space.f_bavail * space.f_bsize)
        save(report, update, tree)

    with small_disk(tmp_path / "runs", "64m"):
        with monkeypatch.context() as patch:
            patch.setattr(script.Report, "save", fill)
            with open("runs/ballast", "wb") as ballast, pytest.raises(OSError, match="No space left on device"):
                resume(script, **LONGER, start_fresh=True)
        os.remove("runs/ballast")
        resumed = resume(script, **LONGER)
    assert resumed["resumed_at"] == [2]
    assert resumed["params_sha256"] == whole(script, **LONGER)
