"""Whole runs on real Atari games, as a user starts and sees them."""

import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import conftest
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SHORT = [*conftest.SMALL, "--total-timesteps", "512", "--num-actor-threads", "2"]
SYNC, CONCURRENT = [*SHORT, "--no-concurrency"], [*SHORT, "--concurrency"]
SPLIT = ["--actor-device-ids", "0", "1", "--num-actor-threads", "1", "--learner-device-ids", "2", "3"]


def hashes(summaries):
    return [summary["params_sha256"] for summary in summaries]


@conftest.one_fast
def test_same_flags_same_bits_anywhere(script, launcher):
    """The bits are the same in a new process on different devices, in the script's own mode (slow suite: both)."""
    summary, split = launcher.run_all(script, SHORT, [*SHORT, *SPLIT])
    assert summary["params_sha256"] == split["params_sha256"]
    assert summary["global_step"] == summary["updates"] * 256 == 512
    assert summary["args"]["total_timesteps"] == 512
    assert summary["sps_steady"] > summary["sps"] > 0
    assert summary["platform"].keys() >= {"python", "jax", "jaxlib", "flax", "optax", "envpool", "numpy"}
    assert len(split["devices"]["actors"]) == len(split["devices"]["learners"]) == 2


@conftest.one_fast
def test_the_seed_is_all_that_chance_depends_on(script):
    """A rerun has the same bits, and a different seed or mode does not. In this process, on a real game."""
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
    """A run in this process writes metrics and plain lines of progress."""
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
    for step, (pace, left) in zip((2048, 4096, 5120), rest, strict=True):  # time left at the pace after compilation
        assert int(left) == pytest.approx((5120 - step) / int(pace), abs=1)
    assert int(rest[-1][0]) == pytest.approx(summary["sps_steady"], rel=0.2)
    assert "no game over yet" in lines[0]
    assert f"score {summary['mean_score']:.1f}" in lines[-1]
    assert out.splitlines()[-1] == f"params sha256: {summary['params_sha256']}"

    directory = Path("runs") / summary["run_name"]
    assert json.loads((directory / "summary.json").read_text()) == json.loads(json.dumps(summary))
    events = EventAccumulator(str(directory)).Reload()
    names = set(events.Tags()["scalars"])
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
    """mean_score averages the sum of unclipped rewards over whole games, as recorded at the pool itself."""
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


TINY = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8, num_minibatches=1)


@conftest.one_fast
def test_phases_and_whole_updates_are_told(script, capsys):
    """A run names the phases that take seconds and counts whole updates (100 steps: three of 32), also on resume."""
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
    """Every log has a hash, and the last one is the run's."""
    summary = script.train(script.Args(**TINY, total_timesteps=5 * 32, log_frequency=2))
    lines = [line.split("\t") for line in Path("runs", summary["run_name"], "hashes.tsv").read_text().splitlines()]
    assert [int(update) for update, _ in lines] == [1, 2, 4, 5]
    assert len({sha256 for _, sha256 in lines}) == 4
    assert lines[-1][1] == summary["params_sha256"]


@conftest.one_fast
def test_track_syncs_to_wandb(script, monkeypatch):
    """wandb gets name and flags before the log is opened, and the exit code. A resumed run keeps its wandb run."""
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
    """The error is one line that offers a way without a login, and no empty run directory is left."""

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
