"""A run that is killed at any moment and resumed ends with the bits of one that never was; models that leave it."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import conftest
import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8,
            num_minibatches=1, log_frequency=1, checkpoint_frequency=2, total_timesteps=4 * 32)  # fmt: skip
LONGER = dict(total_timesteps=6 * 32)
FLAGS = [*conftest.SMALL, "--num-actor-threads", "2", "--log-frequency", "1", "--total-timesteps", "8192"]
FLAGS += ["--checkpoint-frequency", "4"]
SLOW = partial(pytest.param, marks=pytest.mark.slow)
IT = ["--resume", "it", "--start-fresh"]  # starts, then goes on
MODES = ["--no-concurrency", "--concurrency"]


class PowerCut(Exception):
    pass


def train_until(script, monkeypatch, update, **flags):
    """Start a run of the name "it" and end it without warning after `update`."""
    log = script.Report.update

    def cut(report, *args):
        log(report, *args)
        if report.updates == update:
            raise PowerCut

    args = script.Args(**TINY | flags, resume="it", start_fresh=True)
    with monkeypatch.context() as patch:
        patch.setattr(script.Report, "update", cut)
        with pytest.raises(PowerCut):
            script.train(args)


def resume(script, **flags):
    return script.train(script.Args(**TINY | flags, resume="it"))


@pytest.fixture(scope="module")
def whole():
    """(script, flags) -> the hash of the uninterrupted run, played once."""
    return cache(lambda script, **flags: script.train(script.Args(**TINY | flags))["params_sha256"])


@conftest.one_fast
@pytest.mark.parametrize("default", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(script, monkeypatch, default):
    """Cut between checkpoints, then moved to two other devices.

    In the script's own mode, synchronous or concurrent; in the other one in the slow suite.
    """
    flags = dict(concurrency=script.Args.concurrency == default)
    whole = script.train(script.Args(**TINY | flags))
    train_until(script, monkeypatch, 3, **flags)
    resumed = resume(script, **flags, learner_device_ids=(2, 3), actor_device_ids=(1,))
    assert resumed["params_sha256"] == whole["params_sha256"]
    assert (whole["resumed_at"], resumed["resumed_at"]) == ([], [2])


@conftest.one_fast
def test_a_resumed_run_has_the_same_scores_log_and_seeds(script, monkeypatch, counting_pool):
    """Though it goes on between two logs, and the log that follows was written before the cut too."""
    seeds, flags = [], dict(log_frequency=5, checkpoint_frequency=3, total_timesteps=6 * 32)
    monkeypatch.setattr(script, "make_env", lambda args, own, threads: (seeds.append(own), counting_pool(4))[1])
    monkeypatch.setattr(script, "env_spec", lambda args: ((4, 8, 8), 4))
    whole = script.train(script.Args(**TINY | flags))
    train_until(script, monkeypatch, 5, **flags)
    resumed = resume(script, **flags)
    assert resumed["mean_score"]
    for name in ("params_sha256", "global_step", "episodes", "mean_score", "std_score"):
        assert resumed[name] == whole[name]
    first, second = (script.env_seeds(1, generation, 0, 4) for generation in range(2))
    assert seeds == [first, second, first, second, second]  # every checkpoint brings new games
    logs = [EventAccumulator(f"runs/{run['run_name']}").Reload() for run in (whole, resumed)]
    names = [name for name in logs[0].Tags()["scalars"] if name.startswith(("losses/", "charts/avg", "charts/learn"))]
    assert len(names) >= 10
    for name in names:
        whole_curve, curve = ([(event.step, event.value) for event in log.Scalars(name)] for log in logs)
        assert curve == whole_curve, name
    assert [event.step for event in logs[1].Scalars("charts/SPS")] == [32, 96, 160, 192]  # none twice


@conftest.one_fast
def test_a_finished_run_can_be_resumed(script):
    """It plays nothing, and can still write its model; SIGTERM ends the games that --save-model plays."""
    finished = script.train(script.Args(**TINY | dict(checkpoint_frequency=0, total_timesteps=64)))
    flags = TINY | dict(checkpoint_frequency=0, total_timesteps=64, resume=finished["run_name"])
    args = script.Args(**flags, save_model=True, eval_episodes=1)
    with pytest.raises(SystemExit, match="143"):
        script.train(args, {signal.SIGTERM})
    assert json.loads(Path("runs", finished["run_name"], "summary.json").read_text())["status"] == "preempted"
    again = script.train(args)
    assert again["params_sha256"] == finished["params_sha256"]
    _, _, params = script.load_model(Path("runs", finished["run_name"], "model.msgpack"))
    assert script.params_sha256(params) == finished["params_sha256"]


@conftest.one_fast
def test_what_may_change_on_resume(script, monkeypatch, capsys):
    """What changes the bits is an error, what might is told, and what cannot is not."""
    train_until(script, monkeypatch, 3)
    summary = Path("runs/it/summary.json").read_text()
    for flag, value, named in (
        ("gamma", 0.9, "--gamma 0.9: the run to resume has 0.99. For example: --gamma 0.99"),
        ("channels", (8,), "--channels 8: the run to resume has [4]. For example: --channels 4"),
        ("num_actor_threads", 2, "actors 2: the run to resume has 1"),
    ):
        with pytest.raises(script.FlagError) as caught:
            resume(script, **{flag: value})
        assert named in str(caught.value)
    with pytest.raises(script.FlagError, match="--resume it: it has another network or optimizer"):
        resume_with_another_network(script, monkeypatch)
    assert json.loads(Path("runs/it/run.json").read_text())["args"]["gamma"] == 0.99  # no failed try left a trace
    assert Path("runs/it/summary.json").read_text() == summary
    monkeypatch.setitem(script.VERSIONS, "jax", "0.0.1")
    args = script.Args(**TINY, resume="it", learner_device_ids=(1,), save_model=True)
    jax_told = f"jax: 0.0.1 now and {jax.__version__} before, the bits may differ"
    nproc_told = "threads of XLA (NPROC): 5 now and 4 before, the bits may differ"
    for threads, told in ("3", [jax_told]), ("5", [jax_told, nproc_told]):  # four devices have four threads at least
        monkeypatch.setenv("NPROC", threads)
        capsys.readouterr()
        sizes, _, record = script.set_up(args)
        report = script.Report(args, sizes, record)
        assert capsys.readouterr().out.splitlines()[1:] == told
        report.begin()
        with pytest.raises(script.FlagError, match="--resume it: another process has this run: end it first"):
            resume(script)
        report.writer.close()
        report.lock.close()
    newest = script.find_checkpoints(Path("runs/it"))[-1]
    content = script.unpack(newest.read_bytes())
    record = json.loads(content["record"])
    record["hyper_parameters"]["momentum"] = 0.9  # a flag of the script that is gone since
    script.write_file(newest, script.pack(content | {"record": json.dumps(record)}))
    with pytest.raises(script.FlagError, match=r"^momentum None: the run to resume has 0\.9\."):
        resume(script)
    script.write_file(newest, script.pack(content))
    resume(script)


def resume_with_another_network(script, monkeypatch):
    class Wider(script.ActorCritic):
        def __post_init__(self):
            self.hiddens = (17,)
            super().__post_init__()

    with monkeypatch.context() as patch:
        patch.setattr(script, "ActorCritic", Wider)
        resume(script, start_fresh=True)


@conftest.one_fast
def test_a_run_json_that_a_full_disk_left_empty(script, monkeypatch, whole):
    """All that a resumed run needs is in the checkpoint."""
    train_until(script, monkeypatch, 3)
    Path("runs/it/run.json").write_text("")
    with pytest.raises(script.FlagError, match=r"--gamma 0\.9: the run to resume has 0\.99"):
        resume(script, gamma=0.9)
    assert resume(script)["params_sha256"] == whole(script)
    assert json.loads(Path("runs/it/run.json").read_text())["args"]["resume"] == "it"


def test_a_run_without_a_checkpoint(script):
    """--resume says so and starts afresh only if told."""
    message = r"--resume it: no checkpoint in runs/it can be read\. For example: --resume it --start-fresh"
    with pytest.raises(script.FlagError, match=message):
        resume(script)
    assert not Path("runs").exists()
    for name, directory in (("it", "runs/it"), ("here/it", "here/it")):
        args = script.Args(**TINY, resume=name, start_fresh=True)
        sizes, _, record = script.set_up(args)
        report = script.Report(args, sizes, record)
        assert (report.run, report.checkpoint) == (Path(directory), b"")


def test_a_directory_that_cannot_be_written(script):
    Path("runs").write_text("a file where the directory should be")
    with pytest.raises(script.FlagError, match=r"the directory runs/.*: cannot be written: "):
        script.train(script.Args(**TINY))


@pytest.mark.parametrize("damage", ["truncated", SLOW("flipped"), SLOW("emptied")])
@conftest.one_fast
def test_a_damaged_checkpoint(script, whole, monkeypatch, capfd, damage):
    """The one before is taken, and the damaged one written again."""
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(script, mode) -> hash of the run that `FLAGS` describe, played once."""
    launcher, hashes = conftest.Launcher(tmp_path_factory.mktemp("uninterrupted")), {}

    def get(script, mode, **environment):
        key = (script.__name__, mode)
        if key not in hashes:
            run = launcher.run(script, *FLAGS, mode, **environment)
            hashes[key] = run["params_sha256"]
        return hashes[key]

    return get


def kill_after(process, update, delay=0.0):
    """kill -9 once the line of `update` is there. False if the run ended before."""
    for line in process.stdout:
        if "steps/s," in line and int(line.split("/")[0].split()[-1]) >= update * 256:
            time.sleep(delay)
            process.kill()
            return process.wait() == -signal.SIGKILL
    return False


@conftest.one_fast
def test_kill_9(script, launcher):
    """A real process, killed at a random moment."""
    flags = [*FLAGS, "--total-timesteps", "1536", "--checkpoint-frequency", "2"]
    assert kill_after(launcher.start(script, *flags, *IT, PYTHONUNBUFFERED="1"), 3, random.uniform(0, 0.3))
    resumed, whole = launcher.run_all(script, [*flags, *IT], flags)
    assert resumed["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_kill_9_ten_times(script, launcher, uninterrupted, mode):
    """At random moments, so also while a checkpoint is written; every other time on one device and on two."""
    killed = 0
    for attempt in range(10):
        devices = ["--learner-device-ids", *(["0"], ["1", "2"])[attempt % 2]]
        process = launcher.start(script, *FLAGS, *IT, mode, *devices, PYTHONUNBUFFERED="1")
        killed += kill_after(process, 2 + 3 * attempt, random.uniform(0, 0.5))
    assert killed >= 8
    assert launcher.run(script, *FLAGS, *IT, mode)["params_sha256"] == uninterrupted(script, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_process_resumed_as_two(script, launcher, uninterrupted, mode):
    assert kill_after(launcher.start(script, *FLAGS, *IT, mode, PYTHONUNBUFFERED="1"), 10)
    writer, other = launcher.start_processes(script, *FLAGS, *IT, mode, "--num-actor-threads", "1")
    assert launcher.summary(writer)["params_sha256"] == uninterrupted(script, mode)
    assert other.wait(60) == 0


@pytest.mark.slow
def test_two_processes_resumed_as_one(script, launcher, uninterrupted):
    writer, other = launcher.start_processes(script, *FLAGS, *IT, "--num-actor-threads", "1", "--no-concurrency")
    assert kill_after(writer, 10)
    assert other.wait(60) != 0
    summary = launcher.run(script, *FLAGS, *IT, "--no-concurrency")
    assert summary["params_sha256"] == uninterrupted(script, "--no-concurrency")


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
    flags = TINY | LONGER | dict(resume="it", start_fresh=True)
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
    """A file system of its own; skips the test where none can be made."""
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
    """The run ends with an error that says so; with room again, its last whole checkpoint is resumed."""
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


@pytest.mark.slow
def test_sigterm_ends_after_the_update(script, launcher, uninterrupted):
    process = launcher.start(script, *FLAGS, *IT, "--no-concurrency", PYTHONUNBUFFERED="1")
    for line in process.stdout:
        if "1280/8192" in line:
            process.send_signal(signal.SIGTERM)
            break
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "go on from update 4 with --resume runs/it" in out
    assert json.loads((launcher.directory / "runs/it/summary.json").read_text())["status"] == "preempted"
    summary = launcher.run(script, *FLAGS, *IT, "--no-concurrency")
    assert summary["params_sha256"] == uninterrupted(script, "--no-concurrency")


@conftest.one_fast
def test_a_model_leaves_the_run(script, capsys):
    """Its file alone gives back the flags, the bits and the very games that the summary and the log tell of."""
    flags = TINY | dict(env_id="Asterix-v5", total_timesteps=64, save_model=True, eval_episodes=3)
    summary = script.train(script.Args(**flags))
    directory = Path("runs", summary["run_name"])
    assert "model.msgpack, mean score of 3 games" in capsys.readouterr().out
    args, network, params = script.load_model(directory / "model.msgpack")
    assert args == script.Args(**flags)
    assert script.params_sha256(params) == summary["params_sha256"]
    scores = script.play_games(args, network, params, 3)
    assert scores == summary["evaluation"]["scores"]
    (event,) = EventAccumulator(str(directory)).Reload().Scalars("eval/episodic_return")
    assert event.value == pytest.approx(np.mean(scores), rel=1e-6) == pytest.approx(summary["evaluation"]["mean"])


@conftest.one_fast
def test_evaluation_counts_the_first_game_of_every_environment(script, monkeypatch, counting_pool):
    """Environment i plays games of 3 + i steps: the quick ones play several, and count once."""
    pool = counting_pool(4)
    monkeypatch.setattr(script, "make_env", lambda *args: pool)
    network = type("Network", (), {"apply": lambda self, params, obs: (np.zeros((len(obs), 6)), np.zeros(len(obs)))})()
    # rewards of an episode of n steps are 0 to n - 1; the game's own points are ten times that
    assert script.play_games(script.Args(), network, {}, 4) == [30, 60, 100, 150]
    assert len(pool.log) == 6
