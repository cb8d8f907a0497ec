"""The real Weights & Biases, offline: its files hold the flags and the log by steps, and a resumed run keeps its id.

Its agent runs what benchmark/wandb_sweep.yaml says. test_launcher.py checks the commands of that file without it.

uv run --extra track pytest -m slow tests/test_wandb.py
"""

import json
import os
import signal
import struct
import sys
from pathlib import Path

import conftest
import pytest
import yaml

pytest.importorskip("wandb")
from wandb.proto import wandb_internal_pb2
from wandb.wandb_agent import Agent

pytestmark = pytest.mark.slow


def records(data: bytes):
    """Yield the records of a .wandb file: 7 bytes, then LevelDB's log, pieces of records in blocks of 32 KiB."""
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left  # no room for a header
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])  # checksum, length, whole/first/middle/last
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def told(path: Path) -> dict:
    """What a run has sent to Weights & Biases: id, name, project, flags, rows of its log, exit code."""
    found = {"rows": []}
    for record in records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found |= {"id": run.run_id, "name": run.display_name, "project": run.project}
            found["config"] = {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "history":
            name = lambda item: item.key or "/".join(item.nested_key)
            found["rows"].append({name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
    return found


@conftest.one_fast
def test_offline(script, launcher, tmp_path):
    """SIGTERM ends a run after a few updates, and it resumes from the checkpoint of an earlier one."""
    flags = [*conftest.SMALL, "--num-actor-threads", "2", "--log-frequency", "1", "--checkpoint-frequency", "2"]
    flags += ["--track", "--wandb-project-name", "project", "--resume", "it", "--start-fresh"]
    flags += ["--total-timesteps", str(12 * 256)]
    offline = {"WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
    process = launcher.start(script, *flags, **offline)
    assert any(" 768/" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    first = json.loads((tmp_path / "runs/it/summary.json").read_text())
    second = launcher.run(script, *flags, **offline)

    paths = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))  # sorted by time, which is in the name
    assert [path.stem.removeprefix("run-") for path in paths] == [first["wandb_id"], second["wandb_id"]]
    assert first["wandb_id"] == second["wandb_id"]
    runs = [told(path) for path in paths]
    begin, end = second["resumed_at"][-1], first["updates"]
    for run, summary, updates in zip(runs, (first, second), (range(1, end + 1), range(begin + 1, 13)), strict=True):
        assert (run["id"], run["name"], run["project"]) == (summary["wandb_id"], "it", "project")
        assert {name: run["config"][name] for name in summary["args"]} == summary["args"]
        assert [row["global_step"] for row in run["rows"]] == [256 * update for update in updates]
        assert run["exit_code"] == (summary is first)
        assert all({"charts/SPS", "losses/loss", "stats/policy_lag"} <= row.keys() for row in run["rows"])
    losses = [{row["global_step"]: row["losses/loss"] for row in run["rows"]} for run in runs]
    assert all(losses[0][step] == losses[1][step] for step in losses[0].keys() & losses[1].keys())


def test_a_sweep(tmp_path, monkeypatch):
    """The agent's own code starts a run, shorter than in the file. It logs the metric by which the sweep chooses."""
    sweep = yaml.safe_load((conftest.ROOT / "benchmark" / "wandb_sweep.yaml").read_text())
    values = {"learning_rate": 0.00031, "ent_coef": 0.001, "norm_adv": False, "channels": "4 8"}
    values |= {flag: rule["value"] for flag, rule in sweep["parameters"].items() if "value" in rule}
    assert values.keys() == sweep["parameters"].keys()
    values |= {"env_id": "Breakout-v5", "img_size": 24, "log_frequency": 1, "total_timesteps": 8 * 1024}
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "search",
        "WANDB_RUN_ID": "",
        "WANDB_SWEEP_PARAM_PATH": "",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)  # the agent changes two of them

    agent = Agent(api=None, queue=None)
    agent._sweep_command = sweep["command"]
    args = {flag: {"value": value} for flag, value in values.items()}
    program = str(conftest.ROOT / sweep["program"])
    agent._command_run({"run_id": "first", "program": program, "args": args})
    assert agent._run_processes["first"].wait(timeout=400) == 0

    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-first.wandb")
    run = told(path)
    assert run["exit_code"] == 0
    assert {flag: run["config"][flag] for flag in values} == values  # a column of the sweep's table each
    (path,) = tmp_path.glob("runs/*/summary.json")
    flags = json.loads(path.read_text())["args"]
    assert (flags["learning_rate"], flags["norm_adv"], flags["channels"]) == (0.00031, False, [4, 8])
    scores = [row[sweep["metric"]["name"]] for row in run["rows"] if sweep["metric"]["name"] in row]
    assert scores
