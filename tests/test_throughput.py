"""The throughput tool: what it times, how it combines times, and what it prints."""

import json
import statistics
import subprocess
import sys
import time

import conftest
import flax.linen as nn
import pytest

throughput = conftest.load("benchmark/throughput")

TINY = ["--img-size", "16", "--local-num-envs", "4", "--num-steps", "8"]
TINY += ["--num-minibatches", "2", "--gradient-accumulation-steps", "1", "--env-threads", "1"]

# seconds of an update: playing takes 0.5 + the longest of 3, 2 and 4; learning 6 + 0.25 + 0.125 + 0.0625
PARTS = dict(environments=3.0, forward=2.0, one_actor=4.0, rollout=0.5)
PARTS |= dict(gradient=6.0, optimizer=0.25, other=0.125, params=0.0625)


def main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, arguments)])
    throughput.main()


@pytest.mark.parametrize(
    ("where", "changed", "seconds", "what"),
    [
        (dict(cpu=True, same_device=True, concurrency=False), {}, 11.9375, "cores"),
        (dict(cpu=True, same_device=False, concurrency=True), {}, 11.9375, "cores"),
        (dict(cpu=False, same_device=True, concurrency=False), {}, 4.5 + 6.4375, "turns"),
        (dict(cpu=False, same_device=False, concurrency=True), {}, 6.4375, "the learner is"),
        (dict(cpu=False, same_device=True, concurrency=True), {}, 6.4375 + 2, "the device"),
        (dict(cpu=False, same_device=False, concurrency=True), {"environments": 7.0}, 7.5, "actors are"),
        (dict(cpu=False, same_device=False, concurrency=True), {"forward": 8.0}, 8.5, "actors are"),
        (dict(cpu=False, same_device=True, concurrency=True), {"forward": 8.0}, 6.4375 + 8, "the device"),
        (dict(cpu=False, same_device=False, concurrency=True), {"one_actor": 9.0}, 9.5, "actors are"),
    ],
)
def test_limit(where, changed, seconds, what):
    found, reason = throughput.limit(PARTS | changed, **where)
    assert found == seconds
    assert what in reason


@pytest.mark.parametrize(
    ("seconds", "update", "expected"),
    [
        (240, 4, (1, 1)),
        (240, 0.25, (20, 5)),  # 5 s of updates, and a quarter of that in parts
        (10, 0.25, (8, 2)),  # 2 s of updates
        (240, 500, (1, 1)),  # longer than allowed, but it must be measured somehow
    ],
)
def test_plan(seconds, update, expected):
    assert throughput.plan(seconds, update) == expected


class Network(nn.Module):
    """Cheap to compile."""

    num_actions: int
    channels: tuple[int, ...]
    hiddens: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        x = obs.reshape(len(obs), -1) / 255.0
        return nn.Dense(self.num_actions)(x), nn.Dense(1)(x)[:, 0]


def slow_down(script, monkeypatch, before_step=lambda: None):
    """The script with a small network and environments whose every step takes 20 ms more."""
    step = script.Envs.step

    def slow_step(envs, action):
        time.sleep(0.02)
        before_step()
        return step(envs, action)

    monkeypatch.setattr(script.Envs, "step", slow_step)
    monkeypatch.setattr(script, "ActorCritic", Network)
    monkeypatch.setattr(throughput, "load", lambda path: script)
    return script


@pytest.fixture
def slow_script(script, monkeypatch):
    return slow_down(script, monkeypatch)


def test_parts_and_run(slow_script, monkeypatch, capsys, tmp_path):
    """Slow environments are seen as such, by the run too, and two actors wait for theirs at the same time."""
    path, names, handoff = tmp_path / "figures.json", dict(vars(slow_script)), dict(vars(slow_script.HandOff))
    main(monkeypatch, "a.py", "--json", path, "--minutes", "0.02", "--", *TINY)
    figures, out = json.loads(path.read_text()), capsys.readouterr().out
    parts, run, epochs = figures["parts"], figures["run"], getattr(slow_script.Args, "update_epochs", 1)
    assert figures["script"] == "a.py"
    assert figures["flags"] == TINY
    assert figures["actors"] == slow_script.Args.num_actor_threads
    assert figures["steps"] == figures["actors"] * 4 * 8
    assert figures["calls"]["gradient"] == epochs * 2 * 4  # minibatches x shards
    assert figures["calls"]["optimizer"] == epochs * 2
    assert set(parts) == set(PARTS)
    for seconds in (parts["environments"], parts["one_actor"], run["env_time"]):
        assert 0.16 < seconds < 0.32  # 8 steps, not 16
    others = [seconds for name, seconds in parts.items() if name not in ("environments", "one_actor")]
    assert 0 < min(others) < max(others) < 0.16
    assert 0.16 < run["seconds"] < 0.32
    assert figures["limit"]["seconds"] == pytest.approx(sum(parts.values()) - parts["one_actor"])
    assert figures["ratio"] == statistics.median(r["ratio"] for r in figures["rounds"])
    assert figures["waits"]["learner"] > 0.3
    assert figures["waits"]["actors"] < 0.3

    *rows, blank, gist = out.splitlines()
    assert blank == ""
    table = {name: cells for _, name, *cells, _ in ([x.strip() for x in row.split("|")] for row in rows[2:])}
    assert table["environments"][0] == f"{1e3 * parts['environments']:.1f}"
    pace, allowed = (figures["steps"] / seconds for seconds in (run["seconds"], figures["limit"]["seconds"]))
    assert table["**whole run**"][1:] == [f"{pace:,.0f}", f"{1e3 * run['seconds']:.1f}"]
    assert gist.startswith(f"{pace:,.1f} steps/s, the parts allow {allowed:,.1f} (all parts share the cores), ratio ")
    assert f"{figures['ratio']:.3f} ({len(figures['rounds'])} rounds, " in gist
    assert f"the learner waits {figures['waits']['learner']:.0%} of the time for rollouts" in gist

    assert list(tmp_path.iterdir()) == [path]  # runs leave nothing behind, in the script neither
    assert vars(slow_script) == names
    assert vars(slow_script.HandOff) == handoff


def test_a_wrong_flag_is_named(slow_script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        main(monkeypatch, "a.py", "--", *TINY, "--num-shards", "3")
    assert left.value.code == 2
    assert "--num-shards 3: must divide" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(monkeypatch, "a.py", "--", *TINY, "--num-processes", "2")
    assert "--num-processes: one process is measured here" in capsys.readouterr().err


def test_a_failing_actor_ends_the_tool(monkeypatch):
    """Also while the run is held, and nobody but the tool waits for the actors."""
    calls = []

    def fail():
        calls.append(None)
        if len(calls) > 2 * 20:  # in the third rollout, which starts when the first update is done
            raise OSError("no more games")

    slow_down(conftest.load("cleanba_impala_envpool"), monkeypatch, fail)
    with pytest.raises(RuntimeError, match="no more games"):
        main(monkeypatch, "a.py", "--", *TINY)


def test_scaling(monkeypatch, capsys, tmp_path):
    """One process for each point; one that fails is shown and reported."""
    path, commands = tmp_path / "figures.json", []

    def run(command, env, **options):
        commands.append((command, env))
        if "--num-steps" in command:
            return subprocess.CompletedProcess(command, 2, "", "...\nerror: --num-steps 0: must be 1 or more\n")
        own = throughput.tyro.cli(throughput.Options, args=command[2:])
        assert (own.parts, own.minutes, own.flags[:2]) == (False, 1.0, ("--gamma", "0.9"))
        figures = {"steps": 640, "run": {"seconds": 0.25}, "memory": 3_000_000_000, "device_memory": None}
        own.json.write_text(json.dumps(figures))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(throughput.subprocess, "run", run)
    points = ["--scale-envs", "8", "--scale-steps", "0", "--scale-learners", "2"]
    with pytest.raises(SystemExit) as left:
        main(monkeypatch, "a.py", "--json", path, "--minutes", "3", *points, "--", "--gamma", "0.9")
    assert left.value.code == 1
    assert [command[-2:] for command, _ in commands[:2]] == [["--local-num-envs", "8"], ["--num-steps", "0"]]
    assert commands[2][0][-3:] == ["--learner-device-ids", "0", "1"]
    assert commands[2][1]["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")
    envs, steps, learners = json.loads(path.read_text())["points"]
    assert envs["setting"] == ["--local-num-envs", "8"]
    assert steps == {"setting": ["--num-steps", "0"], "error": "error: --num-steps 0: must be 1 or more"}
    assert learners["run"] == {"seconds": 0.25}
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| --local-num-envs 8 | 2,560.0 | 3,000 |  |",
        "| --num-steps 0 | error: --num-steps 0: must be 1 or more |  |  |",
        "| --learner-device-ids 0 1 | 2,560.0 | 3,000 |  |",
    ]


@pytest.mark.slow
def test_a_point_of_scaling(monkeypatch, tmp_path):
    """A process that really has two learner devices."""
    path, script = tmp_path / "figures.json", conftest.ROOT / "cleanba_impala_envpool.py"
    monkeypatch.delenv("XLA_FLAGS")
    main(monkeypatch, script, "--json", path, "--minutes", "0.02", "--scale-learners", "2", "--", *TINY)
    (point,) = json.loads(path.read_text())["points"]
    assert point["steps"] == 2 * 4 * 8
    assert point["run"]["seconds"] > 0
    assert 1e8 < point["memory"] < 1e10
    assert point["device_memory"] is None
