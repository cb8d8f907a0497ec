"""A run that is killed at any moment and resumed has the same bits as an uninterrupted run."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path

import conftest
import jax
import pytest
from conftest import LONGER, TINY, resume, train_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FLAGS = [*conftest.SMALL, "--num-actor-threads", "2", "--log-frequency", "1", "--total-timesteps", "8192"]
FLAGS += ["--checkpoint-frequency", "4"]
SLOW = partial(pytest.param, marks=pytest.mark.slow)
IT = ["--resume", "it", "--start-fresh"]  # starts the run, later resumes it
MODES = ["--no-concurrency", "--concurrency"]


@conftest.one_fast
@pytest.mark.parametrize("default", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(script, monkeypatch, default):
    """A run is cut between checkpoints and resumed on different devices.

    The default suite tests the script's own mode, synchronous or concurrent, and the slow suite the opposite one.
    """
    flags = dict(concurrency=script.Args.concurrency == default)
    whole = script.train(script.Args(**TINY | flags))
    train_until(script, monkeypatch, 3, **flags)
    resumed = resume(script, **flags, learner_device_ids=(2, 3), actor_device_ids=(1,))
    assert resumed["params_sha256"] == whole["params_sha256"]
    assert (whole["resumed_at"], resumed["resumed_at"]) == ([], [2])


@conftest.one_fast
def test_a_resumed_run_has_the_same_scores_log_and_seeds(script, monkeypatch, counting_pool):
    """It resumes between two logs, and the next log was already written before the cut."""
    seeds, flags = [], dict(log_frequency=5, checkpoint_frequency=3, total_timesteps=6 * 32)
    monkeypatch.setattr(script, "make_env", lambda args, own, threads: (seeds.append(own), counting_pool(4))[1])
    monkeypatch.setattr(script, "env_spec", lambda args: ((4, 8, 8), 4))
    whole = script.train(script.Args(**TINY | flags))
    train_until(script, monkeypatch, 5, **flags)
    resumed = resume(script, **flags)
    assert resumed["mean_score"]
    for name in ("params_sha256", "global_step", "episodes", "mean_score", "scores"):
        assert resumed[name] == whole[name]
    first, second = (script.env_seeds(1, generation, 0, 4) for generation in range(2))
    assert seeds == [first, second, first, second, second]  # every checkpoint starts new games
    logs = [EventAccumulator(f"runs/{run['run_name']}").Reload() for run in (whole, resumed)]
    names = [name for name in logs[0].Tags()["scalars"] if name.startswith(("losses/", "charts/avg", "charts/learn"))]
    assert len(names) >= 10
    for name in names:
        whole_curve, curve = ([(event.step, event.value) for event in log.Scalars(name)] for log in logs)
        assert curve == whole_curve, name
    assert [event.step for event in logs[1].Scalars("charts/SPS")] == [32, 96, 160, 192]  # no step twice


@conftest.one_fast
def test_a_finished_run_can_be_resumed(script):
    """It trains no more but can still write its model. SIGTERM ends the games that --save-model plays."""
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
def test_a_run_can_become_longer(script, monkeypatch):
    """A finished run, resumed with more steps, has the bits and the log of a run that was that long from the start."""
    flags = dict(anneal_lr=False)
    whole = script.train(script.Args(**TINY | LONGER | flags))
    finished = script.train(script.Args(**TINY | flags, resume="it", start_fresh=True))
    longer = resume(script, **LONGER, **flags)
    assert (finished["updates"], longer["updates"], longer["resumed_at"]) == (4, 6, [4])
    assert longer["params_sha256"] == whole["params_sha256"] != finished["params_sha256"]
    curves = [EventAccumulator(f"runs/{run['run_name']}").Reload().Scalars("losses/loss") for run in (whole, longer)]
    assert [(event.step, event.value) for event in curves[0]] == [(event.step, event.value) for event in curves[1]]
    with pytest.raises(script.FlagError, match="--total-timesteps 128: the run to resume has 192"):
        resume(script, **flags)


@conftest.one_fast
def test_a_longer_run_that_is_another_run(script):
    """The error says why, and what to do instead, which works: a run that starts from the checkpoint's parameters."""
    finished = script.train(script.Args(**TINY, resume="it", start_fresh=True))
    with pytest.raises(script.FlagError) as caught:
        resume(script, **LONGER)
    assert str(caught.value) == (
        "--total-timesteps 192: a longer run has other learning rates (--anneal-lr); "
        "start another with --load-model CHECKPOINT. For example: --total-timesteps 128"
    )
    flags = TINY | LONGER | dict(load_model="runs/it/checkpoints/4.msgpack", learning_rate=0.0)
    other = script.train(script.Args(**flags))
    assert (other["updates"], other["params_sha256"]) == (6, finished["params_sha256"])


def test_where_a_run_can_become_longer(script):
    """It must have ended where a longer run restarts its games, and have a constant learning rate."""
    why = lambda **flags: script.why_not_longer(vars(script.Args(**flags)), updates=4)
    for frequency in (1, 2, 4):
        assert why(anneal_lr=False, checkpoint_frequency=frequency) == ""
        assert "other learning rates" in why(anneal_lr=True, checkpoint_frequency=frequency)
    for frequency in (0, 3, 8):
        assert "has no checkpoint at update 4" in why(anneal_lr=False, checkpoint_frequency=frequency)


@conftest.one_fast
def test_what_may_change_on_resume(script, monkeypatch, capsys):
    """What changes the bits is an error, what might change them is reported, and what cannot is accepted silently."""
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
    assert json.loads(Path("runs/it/run.json").read_text())["args"]["gamma"] == 0.99  # failed attempts left no trace
    assert Path("runs/it/summary.json").read_text() == summary
    monkeypatch.setitem(script.VERSIONS, "jax", "0.0.1")
    args = script.Args(**TINY, resume="it", learner_device_ids=(1,), save_model=True)
    jax_told = f"jax: 0.0.1 now and {jax.__version__} before, the bits may differ"
    nproc_told = "threads of XLA (NPROC): 5 now and 4 before, the bits may differ"
    for threads, told in ("3", [jax_told]), ("5", [jax_told, nproc_told]):  # four devices have at least four threads
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
    record["hyper_parameters"]["momentum"] = 0.9  # a flag that the script no longer has
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


def test_a_run_without_a_checkpoint(script):
    """--resume is then an error, and only --start-fresh starts a new run."""
    message = r"--resume it: no checkpoint in runs/it can be read\. For example: --resume it --start-fresh"
    with pytest.raises(script.FlagError, match=message):
        resume(script)
    assert not Path("runs").exists()
    for name, directory in (("it", "runs/it"), ("here/it", "here/it")):
        args = script.Args(**TINY, resume=name, start_fresh=True)
        sizes, _, record = script.set_up(args)
        report = script.Report(args, sizes, record)
        assert (report.run, report.checkpoint) == (Path(directory), b"")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(script, mode) -> the hash of the uninterrupted run with `FLAGS`, trained once."""
    launcher, hashes = conftest.Launcher(tmp_path_factory.mktemp("uninterrupted")), {}

    def get(script, mode, **environment):
        key = (script.__name__, mode)
        if key not in hashes:
            run = launcher.run(script, *FLAGS, mode, **environment)
            hashes[key] = run["params_sha256"]
        return hashes[key]

    return get


def kill_after(process, update, delay=0.0):
    """Kill the process with kill -9 once it has logged `update`. False if the run ended before."""
    for line in process.stdout:
        if "steps/s," in line and int(line.split("/")[0].split()[-1]) >= update * 256:
            time.sleep(delay)
            process.kill()
            return process.wait() == -signal.SIGKILL
    return False


@conftest.one_fast
def test_kill_9(script, launcher):
    """A real process is killed at a random moment and resumed."""
    flags = [*FLAGS, "--total-timesteps", "1536", "--checkpoint-frequency", "2"]
    assert kill_after(launcher.start(script, *flags, *IT, PYTHONUNBUFFERED="1"), 3, random.uniform(0, 0.3))
    resumed, whole = launcher.run_all(script, [*flags, *IT], flags)
    assert resumed["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_kill_9_ten_times(script, launcher, uninterrupted, mode):
    """Kills come at random moments, even during checkpoints. The run alternates between one device and two."""
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
