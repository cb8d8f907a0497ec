"""Whole runs on real Atari games, as a user starts them and as a user sees them."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import wait_for_line
from flax import serialization
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SHORT = [*conftest.SMALL, "--total-timesteps", "512", "--num-actor-threads", "2"]
SYNC, CONCURRENT = [*SHORT, "--no-concurrency"], [*SHORT, "--concurrency"]
SPLIT = ["--actor-device-ids", "0", "1", "--num-actor-threads", "1", "--learner-device-ids", "2", "3"]


def hashes(summaries):
    return [summary["params_sha256"] for summary in summaries]


@conftest.one_fast
def test_same_flags_same_bits_anywhere(script, launcher):
    """In another process, on other devices; in the script's own mode, both modes being in the slow suite."""
    summary, split = launcher.run_all(script, SHORT, [*SHORT, *SPLIT])
    assert summary["params_sha256"] == split["params_sha256"]
    assert summary["global_step"] == summary["updates"] * 256 == 512
    assert summary["args"]["total_timesteps"] == 512
    assert summary["sps_steady"] > summary["sps"] > 0
    assert set(summary["versions"]) == {"python", "jax", "jaxlib", "flax", "optax", "envpool", "numpy"}
    assert len(split["devices"]["actors"]) == len(split["devices"]["learners"]) == 2


@conftest.one_fast
def test_the_seed_is_all_that_chance_depends_on(script):
    """A rerun and another seed, in this process on a real game."""
    flags = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=2, num_steps=8, num_minibatches=1)
    runs = [dict(seed=1), dict(seed=1), dict(seed=2), dict(seed=1, concurrency=not script.Args.concurrency)]
    runs = [script.train(script.Args(**flags, **run, total_timesteps=192)) for run in runs]
    first, rerun, other, other_mode = hashes(runs)
    assert first == rerun
    assert len({first, other, other_mode}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", [SYNC, CONCURRENT], ids=["sync", "concurrent"])
def test_more_topologies(script, launcher, mode):
    topologies = [[], ["--learner-device-ids", "0", "1"], ["--learner-device-ids", "0", "1", "2", "3"], SPLIT]
    flags = [[*mode, "--total-timesteps", "2048", *topology] for topology in topologies]
    assert len(set(hashes(launcher.run_all(script, *flags)))) == 1


@pytest.mark.slow
def test_a_program_compiled_again_has_the_same_bits(script, launcher):
    fresh = launcher.run(script, *SYNC, JAX_ENABLE_COMPILATION_CACHE="false")
    assert fresh["params_sha256"] == launcher.run(script, *SYNC)["params_sha256"]


@conftest.ppo_fast
def test_what_a_run_writes(script, capsys):
    """In this process: every metric of the README's table and plain lines of progress."""
    args = script.Args(
        img_size=16, channels=(4,), local_num_envs=8, num_actor_threads=1, num_steps=128, num_minibatches=2,
        total_timesteps=5 * 1024, log_frequency=2, env_id="SpaceInvaders-v5",
    )  # fmt: skip
    summary = script.train(args)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "steps/s," in line and "learner waits" in line]
    assert [line.split("/")[0].split()[-1] for line in lines] == ["1024", "2048", "4096", "5120"]
    assert "steps/s, compilation included, " in lines[0]
    rest = [re.search(r"/5120 steps, (\d+) steps/s, (\d+) s left", line).groups() for line in lines[1:]]
    for step, (pace, left) in zip((2048, 4096, 5120), rest, strict=True):  # what is left at the pace after compiling
        assert int(left) == pytest.approx((5120 - step) / int(pace), abs=1)
    assert int(rest[-1][0]) == pytest.approx(summary["sps_steady"], rel=0.2)
    assert "no game over yet" in lines[0]
    assert f"score {summary['mean_score']:.1f}" in lines[-1]
    assert out.splitlines()[-1] == f"params sha256: {summary['params_sha256']}"

    directory = Path("runs") / summary["run_name"]
    assert json.loads((directory / "summary.json").read_text()) == json.loads(json.dumps(summary))
    events = EventAccumulator(str(directory)).Reload()
    names = set(events.Tags()["scalars"])
    readme = (conftest.ROOT / "README.md").read_text()
    documented = {
        word for word in readme.replace("`", " ").split() if word.startswith(("charts/", "losses/", "stats/"))
    }
    assert names <= documented
    loss_table = [name for name in names if name.startswith("losses/")]
    assert {"losses/loss", "losses/explained_variance", "losses/grad_norm"} <= set(loss_table)
    value = lambda name: [event.value for event in events.Scalars(name)]
    assert [event.step for event in events.Scalars("charts/SPS")] == [1024, 2048, 4096, 5120]
    assert sum(value("stats/episodes")) == summary["episodes"] > 0
    np.testing.assert_allclose(value("charts/learning_rate")[-1], args.learning_rate / 5, rtol=1e-5)
    assert value("stats/policy_lag")[-1] == args.concurrency
    assert all(np.isfinite(value(name)).all() for name in names)
    total = value("stats/rollout_time")[-1]
    assert value("stats/inference_time")[-1] + value("stats/env_time")[-1] <= total * 1.01


@conftest.wrapper_fast
def test_scores_are_the_games_own(script, monkeypatch):
    """mean_score of the summary is the sum of unclipped rewards over whole games, seen at the pool itself."""
    scores, make_env = [], script.make_env

    class Recorder:
        def __init__(self, pool):
            self.pool, self.sum, self.reset = pool, 0.0, pool.reset

        def step(self, action):
            obs, reward, terminated, truncated, info = self.pool.step(action)
            self.sum = self.sum + info["reward"]
            over = (info["lives"] == 0) | truncated
            scores.extend(self.sum[over & (terminated | truncated)])
            self.sum = np.where(over & (terminated | truncated), 0, self.sum)
            return obs, reward, terminated, truncated, info

    monkeypatch.setattr(script, "make_env", lambda *args: Recorder(make_env(*args)))
    args = script.Args(
        img_size=16, channels=(4,), local_num_envs=8, num_actor_threads=1, num_steps=128, num_minibatches=2,
        total_timesteps=6 * 1024, env_id="SpaceInvaders-v5",
    )  # fmt: skip
    summary = script.train(args)
    assert summary["episodes"] == len(scores) > 5
    assert summary["mean_score"] == pytest.approx(np.mean(scores))
    assert summary["mean_score"] > 10  # rewards of SpaceInvaders are 5 to 200; clipped they would be 1


@conftest.one_fast
def test_a_signal_ends_a_run(script, launcher, tmp_path):
    """Ctrl-C and SIGTERM, each on a run of its own."""
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


CRASH = """
import sys
sys.path.insert(0, {tests!r})
import conftest
script = conftest.load({name!r})
make_env = script.make_env

class Faulty:
    def __init__(self, pool):
        self.pool, self.steps, self.reset = pool, 0, pool.reset

    def step(self, action):
        self.steps += 1
        if self.steps == 7:
            raise OSError("the cartridge fell out")
        return self.pool.step(action)

pools = []
def make(args, seeds, num_threads):
    pool = make_env(args, seeds, num_threads)
    return Faulty(pool) if seeds == script.env_seeds(args.seed, 0, 8, 8) else pool

script.make_env = make
sys.argv = ["script", *{flags!r}]
script.main()
"""


@conftest.one_fast
def test_an_actor_that_dies_ends_the_run(script, launcher, tmp_path):
    code = CRASH.format(tests=str(conftest.ROOT / "tests"), name=script.__name__, flags=SHORT)
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 1
    assert "actor 1 failed" in result.stderr
    assert "OSError: the cartridge fell out" in result.stderr
    assert "in step" in result.stderr  # the original traceback
    (summary,) = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert summary["status"] == "failed"
    assert summary["seconds"] < 15
    assert time.monotonic() - start < 60


@conftest.one_fast
def test_nothing_is_left_when_an_actor_dies(script, monkeypatch, counting_pool):
    """In this process: the error comes within seconds, and no actor survives it."""
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


TINY = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8, num_minibatches=1)


@conftest.one_fast
@pytest.mark.parametrize("how", ["timeout", "SIGTERM", "Ctrl-C"])
def test_environments_that_hang(script, monkeypatch, counting_pool, how):
    """The run ends within seconds, names actor and step, and leaves a summary; compiling takes no part of the time."""
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
    args = script.Args(**TINY | dict(img_size=8), **timeout, total_timesteps=10**6, resume="it", start_fresh=True)
    said = r"actor 0: step 4 of its environments takes more than \d s"
    ends = {"timeout": (TimeoutError, said), "SIGTERM": (SystemExit, "143"), "Ctrl-C": (KeyboardInterrupt, "^$")}
    error, message = ends[how]
    try:
        with pytest.raises(error, match=message):
            script.train(args, heard)
        assert 0.4 < time.monotonic() - hung_at[0] < 10
    finally:
        released.set()
    summary = json.loads(Path("runs/it/summary.json").read_text())
    assert summary["status"] == {"timeout": "failed", "SIGTERM": "preempted", "Ctrl-C": "interrupted"}[how]
    assert summary["updates"] == 0


@conftest.one_fast
def test_phases_and_whole_updates_are_told(script, capsys):
    """Making environments and compiling take seconds each; 100 steps are three updates of 32. Resumed: from where."""
    script.train(script.Args(**TINY, total_timesteps=100))
    devices, making, compiling, first, *_ = capsys.readouterr().out.splitlines()
    assert devices.startswith("devices: actors on ")
    assert making == "0 of 3 updates of 32 steps are done; making environments"
    assert "compiling" in compiling
    assert "32/96 steps" in first
    (run,) = Path("runs").iterdir()
    script.train(script.Args(**TINY, total_timesteps=100, resume=run.name))
    assert "\n3 of 3 updates of 32 steps are done" in capsys.readouterr().out


@conftest.one_fast
def test_hashes_of_a_run(script):
    """Every log has one; the last is the run's."""
    summary = script.train(script.Args(**TINY, total_timesteps=5 * 32, log_frequency=2))
    lines = [line.split("\t") for line in Path("runs", summary["run_name"], "hashes.tsv").read_text().splitlines()]
    assert [int(update) for update, _ in lines] == [1, 2, 4, 5]
    assert len({sha256 for _, sha256 in lines}) == 4
    assert lines[-1][1] == summary["params_sha256"]


@conftest.one_fast
def test_load_model(script):
    """A run that starts with another's parameters, and moves them by nothing, ends with the same hash."""
    tiny = TINY | dict(total_timesteps=64, env_id="Pong-v5", start_fresh=True)
    one = script.train(script.Args(**tiny, resume="one", save_model=True, eval_episodes=1))
    model = "runs/one/model.msgpack"
    tiny |= dict(load_model=model, seed=2)
    two = script.train(script.Args(**tiny, resume="two", learning_rate=0.0))
    assert two["params_sha256"] == one["params_sha256"]
    assert two["args"]["load_model"] == model
    assert script.train(script.Args(**tiny, resume="three"))["params_sha256"] != one["params_sha256"]

    with pytest.raises(script.FlagError, match=f"--load-model {model}: it has another network or optimizer"):
        script.train(script.Args(**tiny | dict(channels=(5,)), resume="four"))
    Path("bad.msgpack").write_bytes(Path(model).read_bytes()[:-1])
    Path("checkpoint.msgpack").write_bytes(sealed({"update": 1}))
    for path, why in ("bad", "not those that were written"), ("none", "No such file"), ("checkpoint", "'params'"):
        with pytest.raises(script.FlagError, match=rf"--load-model {path}.msgpack: cannot be read: .*{why}"):
            script.train(script.Args(**tiny | dict(load_model=f"{path}.msgpack"), resume=path))


def sealed(content):
    data = serialization.msgpack_serialize(content)
    return hashlib.sha256(data).digest() + data


@conftest.one_fast
def test_nan_ends_the_run(script):
    """At the next log, with its name; no checkpoint is made of it, and the last one before is kept."""
    flags = TINY | dict(checkpoint_frequency=1, total_timesteps=10**6, resume="it", start_fresh=True, anneal_lr=False)
    with pytest.raises(FloatingPointError, match=r"update \d+: losses/\w+ is not finite, no checkpoint made"):
        script.train(script.Args(**flags, learning_rate=1e30))
    summary = json.loads(Path("runs/it/summary.json").read_text())
    assert summary["status"] == "failed"
    whole = [int(path.stem) for path in script.find_checkpoints(Path("runs/it"))]
    assert whole == list(range(1, summary["updates"]))[-2:]


@conftest.one_fast
def test_what_fails_before_the_run_begins_leaves_nothing(script, monkeypatch):
    """Here while the network is built; from the moment that its directory exists, a run ends with a summary."""

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
def test_a_lost_ctrl_c_ends_the_run_after_the_update(script, monkeypatch):
    """An exception that a signal raises inside a callback of the garbage collector is lost; the signal is not."""
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
    """In the middle of a rollout of minutes, with a summary."""
    flags = [*conftest.SMALL, "--num-steps", "65536", "--total-timesteps", "10000000"]
    process = launcher.start(script, *flags, PYTHONUNBUFFERED="1")
    while not list((tmp_path / "runs").glob("*/run.json")):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(3)  # into the first rollout
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: the run ends after this update")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143
    (path,) = (tmp_path / "runs").glob("*/summary.json")
    assert json.loads(path.read_text())["status"] == "preempted"


@conftest.one_fast
def test_track_syncs_to_wandb(script, monkeypatch):
    """wandb is told name and flags before the log is opened, and how the run ended; a resumed run is the same one."""
    calls = []
    run = type("Run", (), {"id": "abc", "finish": lambda self, exit_code: calls.append(exit_code)})()
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(script, "find_spec", lambda name: wandb)
    args = script.Args(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8,
                       num_minibatches=1, total_timesteps=64, track=True, wandb_project_name="p", wandb_entity="e",
    )  # fmt: skip
    summary = script.train(args)
    options, exit_code = calls
    assert exit_code == 0
    assert options["name"] == summary["run_name"]
    assert options["config"]["total_timesteps"] == 64
    assert (options["project"], options["entity"], options["sync_tensorboard"]) == ("p", "e", True)
    script.train(replace(args, resume=summary["run_name"]))
    assert (calls[2]["id"], calls[2]["resume"]) == ("abc", "allow")


@conftest.one_fast
def test_track_without_a_login(script, monkeypatch):
    """One line that offers a way without, and no empty folder among the runs."""

    class Error(Exception):
        """Stands in for wandb's."""

    def init(**options):
        raise Error("No API key configured. Use `wandb login` to log in.")

    wandb = types.ModuleType("wandb")
    wandb.init, wandb.Error = init, Error
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(script, "find_spec", lambda name: wandb)
    message = r"^--track True: .*\(No API key configured.*\); WANDB_MODE=offline works without a login"
    with pytest.raises(script.FlagError, match=message):
        script.train(script.Args(**TINY, track=True))
    assert not Path("runs").exists()
