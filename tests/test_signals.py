"""Ctrl-C and SIGTERM always end a run, each with a fixed exit code, and nothing on its way to the disk is lost."""

import json
import os
import random
import signal
import time
from pathlib import Path

import conftest
import pytest
from conftest import wait_for_line
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = ["--img-size", "16", "--channels", "4", "--local-num-envs", "4", "--num-actor-threads", "1", "--num-steps", "8"]
TINY += ["--num-minibatches", "1", "--log-frequency", "1"]
ENDLESS = ["--total-timesteps", "100000000"]
IT = ["--resume", "it", "--start-fresh"]

SLOW_DISK = """
import threading
fsync = os.fsync
def slow(file):
    if threading.current_thread() is not threading.main_thread():  # which writes the summary
        print("writing", flush=True)
        time.sleep(3)
    fsync(file)
os.fsync = slow
"""


@conftest.one_fast
def test_ctrl_c_while_the_run_waits_for_its_checkpoint(script, launcher, tmp_path):
    """The checkpoint is on disk when the process ends. With the default frequency it is the only one."""
    process = launcher.start_patched(script, SLOW_DISK, *TINY, *IT, "--total-timesteps", "64")
    wait_for_line(process, "writing")
    time.sleep(0.5)  # until the run waits
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "go on from update 2 with --resume runs/it" in out
    assert (tmp_path / "runs/it/checkpoints/2.msgpack").exists()


@conftest.one_fast
def test_a_second_sigterm_does_not_lose_the_checkpoint_that_is_written(script, launcher, tmp_path):
    process = launcher.start_patched(script, SLOW_DISK, *TINY, *IT, *ENDLESS, "--checkpoint-frequency", "2")
    wait_for_line(process, "writing")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "go on from update 2 with --resume runs/it" in out
    assert json.loads((tmp_path / "runs/it/summary.json").read_text())["status"] == "preempted"


BUSY_ACTOR = """
import jax
spin = jax.jit(lambda x: jax.lax.fori_loop(0, 10**6, lambda i, x: x * 1.0001, x))
collect, rounds = script.collect, []
def busy(*arguments):
    rounds.append(1)
    while len(rounds) > 2:  # comes back from XLA every few milliseconds
        spin(1.0).block_until_ready()
    return collect(*arguments)
script.collect = busy
update = script.Report.update
def tell(report, *arguments):
    "The learner is told while its actor is inside XLA."
    update(report, *arguments)
    while len(rounds) == 2:
        time.sleep(0.01)
    if len(rounds) > 2:
        time.sleep(1)
        os.kill(os.getpid(), script.signal.SIGTERM)
        time.sleep(0.1)
script.Report.update = tell
"""


@conftest.one_fast
def test_sigterm_while_an_actor_is_inside_xla(script, launcher):
    """Python's own exit would abort because of the actor's thread, with exit code 134."""
    flags = [*TINY, *ENDLESS, "--concurrency", "--actor-device-ids", "1"]
    process = launcher.start_patched(script, BUSY_ACTOR, *flags)
    out, err = process.communicate(timeout=60)
    assert "preempted: " in out
    assert process.returncode == 143, err


@pytest.mark.slow
@conftest.one_fast
@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_at_ten_random_moments(script, launcher, count):
    """The run makes new environments every two updates. The signal goes to one process or to one of two."""
    flags = [*conftest.SMALL, *ENDLESS, "--checkpoint-frequency", "2", "--log-frequency", "1"]
    for attempt in range(10):
        if count == 1:
            processes = [launcher.start(script, *flags, PYTHONUNBUFFERED="1")]
        else:
            processes = launcher.start_processes(script, *flags, "--num-actor-threads", "1")
        wait_for_line(processes[0], "devices: ")
        time.sleep(random.uniform(0, 20))
        processes[attempt % count].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [143] * count, errors


@conftest.one_fast
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_process_waits_for_the_others(script, launcher, rank, number):
    process = launcher.start_processes(script, *TINY, *ENDLESS, "--peer-timeout", "60", ranks=[rank])[0]
    wait_for_line(process, "waiting")
    time.sleep(1)
    process.send_signal(number)
    start = time.monotonic()
    assert process.wait(30) == 128 + number
    assert time.monotonic() - start < 2


@conftest.one_fast
def test_sigterm_when_nobody_reads_stderr(script, launcher, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    flags = [*TINY, *ENDLESS, *IT, "--log-frequency", "20"]
    process = launcher.start_patched(script, f"os.dup2({writer}, 2)", *flags, pass_fds=[writer])
    wait_for_line(process, "steps/s,")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert json.loads((tmp_path / "runs/it/summary.json").read_text())["status"] == "preempted"


@conftest.one_fast
def test_a_closed_stderr(script, launcher, tmp_path):
    """A file opened in its place, here a TensorBoard log, gets no message of the script or of XLA."""
    command = [f"{conftest.ROOT}/{script.__name__}.py", *TINY, *ENDLESS, *IT]
    process = launcher.start_shell(f'exec "$PYTHON" {" ".join(command)} 2>&-')
    wait_for_line(process, "steps/s,")
    assert os.readlink(f"/proc/{process.pid}/fd/2") == os.devnull
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file() and b"SIGTERM" in path.read_bytes()]


SLOW_STEPS = """
make_env = script.make_env
class Slow:
    def __init__(self, pool):
        self.pool, self.steps, self.reset = pool, 0, pool.reset
    def step(self, action):
        self.steps += 1
        if self.steps % 20 == 0:
            print("a slow step", flush=True)
            time.sleep(0.5)
        return self.pool.step(action)
script.make_env = lambda *arguments: Slow(make_env(*arguments))
"""


@conftest.one_fast
def test_a_run_that_was_frozen_goes_on(script, launcher):
    """SLURM suspends jobs, and containers are paused. A pause is not a hung step, even if it exceeds the timeout."""
    process = launcher.start_patched(script, SLOW_STEPS, *TINY, *ENDLESS, "--actor-timeout", "1")
    for _ in range(3):
        wait_for_line(process, "a slow step")
        time.sleep(0.1)  # until the step sleeps
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        wait_for_line(process, "steps/s,")
    process.kill()
    process.communicate()


@conftest.one_fast
def test_a_signal_ends_a_run(script, launcher, tmp_path):
    """Ctrl-C ends one run and SIGTERM another."""
    processes = {}
    for number, game in ((signal.SIGINT, "Breakout-v5"), (signal.SIGTERM, "Pong-v5")):
        flags = [*conftest.SMALL, "--log-frequency", "1", "--env-id", game]
        processes[number] = game, launcher.start(script, *flags, PYTHONUNBUFFERED="1")
    for number, (game, process) in processes.items():
        wait_for_line(process, "steps/s,")
        start = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - start < 5
        assert process.returncode == 128 + number, err
        assert "Traceback" not in err
        assert ("SIGTERM: the run ends after this update" in err) == (number == signal.SIGTERM)
        (summary,) = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob(f"{game}*/summary.json")]
        assert summary["status"] == {signal.SIGINT: "interrupted", signal.SIGTERM: "preempted"}[number]
        assert summary["updates"] >= 1
        assert out.splitlines()[-1] == f"params sha256: {summary['params_sha256']}"
        events = EventAccumulator(str(tmp_path / "runs" / summary["run_name"])).Reload()
        assert events.Scalars("charts/SPS")[-1].step == summary["global_step"]


@conftest.one_fast
def test_a_lost_ctrl_c_ends_the_run_after_the_update(script, monkeypatch):
    """An exception that a signal raises in a garbage collector callback is lost, but the signal is not."""
    update, heard = script.Report.update, set()
    deaf = lambda report, *news: (update(report, *news), heard.add(signal.SIGINT))
    monkeypatch.setattr(script.Report, "update", deaf)
    flags = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8, num_minibatches=1)
    with pytest.raises(KeyboardInterrupt):
        script.train(script.Args(**flags), heard)
    (path,) = Path("runs").glob("*/summary.json")
    summary = json.loads(path.read_text())
    assert (summary["status"], summary["updates"]) == ("interrupted", 1)


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(script, launcher, tmp_path):
    """The run ends in the middle of a rollout that takes minutes, with a summary."""
    flags = [*conftest.SMALL, "--num-steps", "65536", "--total-timesteps", "10000000"]
    process = launcher.start(script, *flags, PYTHONUNBUFFERED="1")
    while not list((tmp_path / "runs").glob("*/run.json")):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(3)  # until the first rollout
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: the run ends after this update")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143
    (path,) = (tmp_path / "runs").glob("*/summary.json")
    assert json.loads(path.read_text())["status"] == "preempted"
