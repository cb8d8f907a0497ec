"""The throughput tool: its parts are those of an update, their times combine correctly, and its output is right."""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import conftest
import flax.linen as nn
import jax
import numpy as np
import pytest

throughput = conftest.load("benchmark/throughput")

TINY = ["--img-size", "16", "--local-num-envs", "4", "--num-steps", "8", "--num-minibatches", "2", "--env-threads", "1"]


class Network(nn.Module):
    """A network that compiles fast."""

    num_actions: int
    channels: tuple[int, ...]
    hiddens: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, obs):
        x = obs.reshape(len(obs), -1) / 255.0
        return nn.Dense(self.num_actions)(x), nn.Dense(1)(x)[:, 0]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Undo what the tool changes in its process, which is normally its own."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setattr(sys, "path", [*sys.path])


def slow_down(script, monkeypatch, before_step=lambda: None):
    """Give the script a small network, and environments whose steps take 20 ms longer."""
    step = script.Envs.step

    def slow_step(envs, action):
        time.sleep(0.02)
        before_step()
        return step(envs, action)

    monkeypatch.setattr(script.Envs, "step", slow_step)
    monkeypatch.setattr(script, "ActorCritic", Network)


def main(monkeypatch, script, *arguments: str) -> int | str:
    """Run the tool and return its exit code or message."""
    monkeypatch.setattr(sys, "argv", ["throughput.py", f"{conftest.ROOT / script.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        throughput.main()
    return end.value.code


@pytest.mark.parametrize(
    ("where", "changed", "seconds", "what"),
    [
        (dict(cpu=True, same_device=True, concurrency=False), {}, 10.8125, "cores"),
        (dict(cpu=True, same_device=False, concurrency=True), {}, 10.8125, "cores"),
        (dict(cpu=False, same_device=True, concurrency=False), {}, 10.8125, "turns"),
        (dict(cpu=False, same_device=False, concurrency=True), {}, 6.3125, "the learner is"),
        (dict(cpu=False, same_device=True, concurrency=True), {}, 6.3125 + 2, "the device"),
        (dict(cpu=False, same_device=True, concurrency=True), {"playing": 8.0}, 8.5, "actors are"),
        (dict(cpu=False, same_device=False, concurrency=True), {"sending rollouts": 4.0}, 8.0, "actors are"),
    ],
)
def test_limit(where, changed, seconds, what):
    parts = {"playing": 4.0, "- environments": 3.0, "- forward passes": 2.0, "sending rollouts": 0.5, "learning": 6.25}
    parts |= {"- gradients": 5.0, "- sums over shards": 0.5, "- optimizer": 0.75, "sending parameters": 0.0625}
    found, reason = throughput.limit(parts | changed, **where)
    assert found == seconds
    assert what in reason


@conftest.ppo_fast
def test_parts_are_those_of_an_update(script, monkeypatch):
    """With one minibatch, learning is the sum of the gradients and one optimizer step."""
    monkeypatch.setattr(script, "ActorCritic", Network)
    few = script.Args(img_size=16, local_num_envs=8, num_actor_threads=2, num_steps=8, learner_device_ids=(1, 2))
    make_parts = lambda args: throughput.make_parts(script, args, *script.set_up(args)[:2])
    epochs = {"update_epochs": 1} if hasattr(few, "update_epochs") else {}
    parts = make_parts(replace(few, num_minibatches=1, gradient_accumulation_steps=1, **epochs))
    (learned, _), (steps,) = parts["learning"](), parts["- optimizer"]()
    stepped = [state for state, _ in steps]  # without the norm of the gradient
    assert [jax.tree.leaves(state.params)[0].devices() for state in stepped] == [{d} for d in jax.local_devices()[1:3]]
    for one, other in zip(learned, stepped, strict=True):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * few.learning_rate)
        jax.tree.map(close, jax.device_get(one.params), jax.device_get(other.params))

    parts = make_parts(replace(few, num_minibatches=2, gradient_accumulation_steps=2))
    minibatches = 2 * getattr(few, "update_epochs", 1)
    gradients = parts["- gradients"]()  # one for every piece of every shard, all distinct
    distinct = [{script.params_sha256(part) for part in minibatch} for minibatch in gradients]
    assert [*map(len, gradients)] == [*map(len, distinct)] == [few.num_shards * 2] * minibatches
    sums, steps = parts["- sums over shards"](), parts["- optimizer"]()
    assert len(sums) == len(steps) == minibatches
    assert sum(map(len, sums)) == minibatches + 2 * getattr(few, "update_epochs", 0)  # plus PPO's statistics per epoch
    assert [*map(len, steps)] == [2] * minibatches  # one on every learner device
    assert [len(actor) for actor in parts["- environments"]()] == [8, 8]  # steps
    assert [len(actor) for actor in parts["- forward passes"]()] == [9, 9]  # one more for the last observation
    assert [rollout.reward.shape for rollout in parts["playing"]()] == [(8, 8)] * 2


@conftest.one_fast
def test_parts_and_run(script, monkeypatch, capsys, tmp_path):
    """The parts and the run both show slow environments, and two actors wait for theirs at the same time."""
    slow_down(script, monkeypatch)
    path, handoff = tmp_path / "figures.json", script.HandOff
    two = [*TINY, "--num-actor-threads", "2"]
    assert not main(monkeypatch, script, "--json", path, "--minutes", "0.02", "--", *two)
    figures, out = json.loads(path.read_text()), capsys.readouterr().out
    parts, run, ratios = figures["parts"], figures["run"], figures["ratios"]
    assert (figures["script"], figures["flags"], figures["steps"]) == (f"{script.__name__}.py", two, 2 * 4 * 8)
    for seconds in (parts["playing"], parts["- environments"], run["rollout_time"], run["env_time"]):
        assert 0.16 < seconds < 0.32  # 8 steps, not 16
    assert 0 < parts["- forward passes"] < 0.16
    assert run["seconds"] > 0.16
    both = parts["playing"] + parts["sending rollouts"] + parts["learning"] + parts["sending parameters"]
    assert figures["limit"] == pytest.approx(both)  # on a CPU they share the cores
    assert len(ratios) == len(figures["rounds"]) > 0
    first = figures["rounds"][0]
    assert ratios[0] == throughput.limit(first["parts"], False, True, True)[0] / first["run"]["seconds"]
    assert run["wait"] / run["seconds"] > 0.3

    *rows, _, gist = out.splitlines()
    table = {name: cells for _, name, *cells, _ in ([x.strip() for x in row.split("|")] for row in rows[2:])}
    assert table["- environments"][::2] == [f"{1e3 * x:.1f}" for x in (parts["- environments"], run["env_time"])]
    pace, allowed = (figures["steps"] / seconds for seconds in (run["seconds"], figures["limit"]))
    assert table["**whole run**"] == ["", f"{pace:,.0f}", f"{1e3 * run['seconds']:.1f}"]
    assert gist.startswith(
        f"{pace:,.1f} steps/s, the parts allow {allowed:,.1f} (actors and learner share the cores), "
    )
    assert f"ratio {statistics.median(ratios):.3f} ({len(ratios)} rounds, " in gist
    assert f"the learner waits {run['wait'] / run['seconds']:.0%} of the time for rollouts" in gist

    assert [*tmp_path.iterdir()] == [path]  # runs leave nothing behind, not even in the script
    assert script.HandOff is handoff


@pytest.mark.slow
def test_trace_and_memory(script, monkeypatch, capsys, tmp_path):
    """--no-parts prints nothing but records the memory. The profile comes from a run that is not measured."""
    slow_down(script, monkeypatch)
    path = tmp_path / "figures.json"
    options = ["--no-parts", "--minutes", "0.001", "--json", path, "--trace", tmp_path / "profile"]
    assert not main(monkeypatch, script, *options, "--", *TINY)
    figures, (out, err) = json.loads(path.read_text()), capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines() if line.endswith(" s an update")] == ["round", "profile"]
    assert len(figures["rounds"]) == 1
    assert figures["parts"] == {}
    assert 1e8 < figures["memory"] < 1e11
    assert figures["device_memory"] is None  # a CPU does not report it
    (profile,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"get_rollouts" in profile.read_bytes()


def test_a_wrong_flag_is_named(script, monkeypatch):
    assert "error: --num-shards 3: must divide" in main(monkeypatch, script, "--", *TINY, "--num-shards", "3")
    said = main(monkeypatch, script, "--", *TINY, "--num-processes", "2")
    assert said.startswith("error: --num-processes 2: one process is measured here, and benchmark/collectives.py")


@pytest.mark.slow
def test_a_failing_actor_ends_the_tool(monkeypatch):
    """An actor fails in the seventh rollout, while the run is held and only the tool waits for the actors."""
    script, steps, rounds = conftest.load("cleanba_impala_envpool"), Counter(), []

    def fail():
        name = threading.current_thread().name
        steps[name] += 1
        if name.startswith("actor") and steps[name] > 6 * 8 + 4:
            raise OSError("no more games")

    class Endless(set):
        def add(self, number):  # ignores the signal, so the run goes on
            rounds.append(number)
            assert len(rounds) < 3, "the run goes on without actors"

    slow_down(script, monkeypatch, fail)
    monkeypatch.setattr(throughput, "set", Endless, raising=False)
    with pytest.raises(RuntimeError, match="no more games"):
        main(monkeypatch, script, "--minutes", "0.001", "--", *TINY)
    assert len(rounds) == 1


class Inline:
    """Stands in for a process that runs one function."""

    def __init__(self, workers, context):
        assert (workers, context.get_start_method()) == (1, "spawn")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *inputs):
        future = Future()
        try:
            future.set_result(function(*inputs))
        except BaseException as error:
            future.set_exception(error)
        return future


@conftest.one_fast
def test_scaling(script, monkeypatch, capsys, tmp_path):
    """Each point has a process of its own. A point that fails is shown and reported."""
    path, points = tmp_path / "figures.json", []

    def measure(options):
        points.append(options)
        if "--num-steps" in options.flags:
            sys.exit("error: --num-steps 0: must be 1 or more")
        return {"steps": 640, "run": {"seconds": 0.25}, "memory": 3_000_000_000, "device_memory": None}

    monkeypatch.setattr(throughput, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(throughput, "measure", measure)
    flags = ["--scale-envs", "8", "--scale-steps", "0", "--scale-learners", "2", "--minutes", "3", "--json", path]
    assert main(monkeypatch, script, *flags, "--", "--gamma", "0.9") == 1
    assert {(point.parts, point.minutes, point.flags[:2]) for point in points} == {(False, 1.0, ("--gamma", "0.9"))}
    settings = [("--local-num-envs", "8"), ("--num-steps", "0"), ("--learner-device-ids", "0", "1")]
    assert [point.flags[2:] for point in points] == settings
    envs, steps, learners = json.loads(path.read_text())["points"]
    assert envs["setting"] == ["--local-num-envs", "8"]
    assert steps == {"setting": ["--num-steps", "0"], "error": "error: --num-steps 0: must be 1 or more"}
    assert learners["run"] == {"seconds": 0.25}
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| --local-num-envs 8 | 2,560.0 | 3,000.0 |  |",
        "| --num-steps 0 | error: --num-steps 0: must be 1 or more |  |  |",
        "| --learner-device-ids 0 1 | 2,560.0 | 3,000.0 |  |",
    ]


@pytest.mark.slow
def test_points_of_scaling(tmp_path):
    """The processes really have the number of learner devices of their point."""
    command = [sys.executable, str(conftest.ROOT / "benchmark" / "throughput.py")]
    command += [str(conftest.ROOT / "cleanba_impala_envpool.py"), "--json", "figures.json", "--minutes", "0.02"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    subprocess.run([*command, "--scale-learners", "1", "2", "--", *TINY], check=True, env=environment)
    one, two = json.loads((tmp_path / "figures.json").read_text())["points"]
    assert (one["setting"][1:], two["setting"][1:]) == (["0"], ["0", "1"])
    assert two["run"]["seconds"] > 0
    assert 1e8 < two["memory"] < 1e10
