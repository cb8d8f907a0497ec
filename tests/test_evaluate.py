"""benchmark/evaluate.py, on Berzerk, where games of an unskilled player are short."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import conftest
import imageio.v3 as imageio
import jax
import numpy as np
import optax
import pytest
import tyro
import yaml
from flax import serialization
from flax.training.train_state import TrainState
from huggingface_hub import constants

evaluate = conftest.load("benchmark/evaluate")

TINY = dict(env_id="Berzerk-v5", seed=3, img_size=16, channels=(4,), hiddens=(16,))
IMPALA, PPO, WRAPPER = conftest.SCRIPTS


@cache
def fresh_model(script, **flags):
    """(args, network, params)"""
    args = script.Args(**TINY | flags)
    network, obs = script.make_network(args), np.zeros((1, *script.env_spec(args)[0]), np.uint8)
    params = jax.jit(network.init)(jax.random.key(1), obs)
    return args, network, params


def refused(capsys, script, *words, **flags) -> str:
    """Return the line that says why nothing can be played."""
    with pytest.raises(SystemExit) as end:
        evaluated(script, *words, **flags)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert (error[:7], error.count("\n")) == ("error: ", 1)
    return error


def make_model(script, **flags):
    """Write model.msgpack with fresh parameters; returns (args, network, params)."""
    args, network, params = fresh_model(script, **flags)
    script.save_model(Path("model.msgpack"), args, params)
    return args, network, params


def evaluated(script, model="model.msgpack", episodes=2, **flags) -> list[float]:
    return evaluate.evaluate(evaluate.Options(Path(script.__file__), Path(model), episodes=episodes, **flags))


@pytest.fixture
def ppo():
    return conftest.load(PPO)


@conftest.one_fast
def test_scores_and_film(script, capsys, monkeypatch):
    """The scores are those of play_games. The film shows exactly the first game, in its colours."""
    model = make_model(script)
    frames, over, env_options = [], [], script.env_options

    class Watched(script.Envs):
        def step(self, action):
            result = super().step(action)
            if not any(over):
                frames.append(self.pool.render(env_ids=[0])[0])
            over.append(self.game_over[0])
            return result

    with monkeypatch.context() as patch:
        patch.setattr(script, "Envs", Watched)
        patch.setattr(script, "env_options", lambda args: env_options(args) | {"render_mode": "rgb_array"})
        expected = script.play_games(*model, 2)
    assert len(frames) < len(over)  # the second game lasts longer

    assert evaluated(script, video=Path("films/game.mp4")) == expected
    mean, std = np.mean(expected), np.std(expected)
    line = f"mean {mean:.2f}, standard deviation {std:.2f}, 2 games with sampled actions: "
    assert line + " ".join(f"{score:g}" for score in expected) in capsys.readouterr().out
    assert evaluated(script, greedy=True) != expected
    assert "2 games with most probable actions: " in capsys.readouterr().out

    film, meta = imageio.imread("films/game.mp4"), imageio.immeta("films/game.mp4")
    assert (meta["codec"], meta["fps"]) == ("h264", 15)
    assert film.shape == (1 + len(frames), 420, 320, 3)  # the first observation, and one per step
    assert np.abs(film[1:, ::2, ::2].astype(int) - frames).mean() < 2
    np.testing.assert_allclose(np.median(film[:, 20, 12], axis=0), [84, 92, 214], atol=12)  # a wall: blue


def test_greedy_is_the_first_of_the_most_probable_actions(script):
    logits = np.array([[0, 0.5, 0.5001], [2, -1, 2], [-3, -2, -2]], np.float32)
    network = SimpleNamespace(apply=lambda params, obs: (logits, np.zeros(3, np.float32)))
    act, _ = script.make_policy(evaluate.Greedy(network))
    for step in range(20):
        action = act(None, None, jax.random.key(1), step).action
        assert (action.tolist(), action.dtype) == ([2, 0, 1], np.int32)


def check_run(script, name, scores, sha256, update, capsys):
    """The run plays with its model, or without one with its newest checkpoint. No checkpoint is removed."""
    directory = Path("runs") / name
    before = sorted(path for path in directory.rglob("*") if path.name != "model.msgpack")
    capsys.readouterr()
    assert evaluated(script, name) == scores
    assert f"model: {directory}/model.msgpack, Berzerk-v5, params sha256: {sha256}\n" in capsys.readouterr().out
    (directory / "model.msgpack").unlink()
    assert evaluated(script, directory) == scores
    source = f"model: {directory}, checkpoint of update {update}, Berzerk-v5, params sha256: {sha256}\n"
    assert source in capsys.readouterr().out
    assert sorted(directory.rglob("*")) == before


@pytest.fixture
def run(ppo):
    """A run with a model, three checkpoints and no run.json. The newest checkpoint is truncated."""
    args, network, params = make_model(ppo)
    Path("runs/one/checkpoints").mkdir(parents=True)
    Path("model.msgpack").rename("runs/one/model.msgpack")
    record = {"args": asdict(args), "hyper_parameters": {"actors": 2}, "platform": {"script": PPO}}
    older = jax.tree.map(np.zeros_like, params)
    for update, current, previous in [(9, older, older), (10, params, older), (11, older, params)]:
        state = TrainState.create(apply_fn=network.apply, params=current, tx=optax.adam(1e-3))
        tree = serialization.to_state_dict(jax.device_get((state, previous)))
        file = Path(f"runs/one/checkpoints/{update}.msgpack")
        content = {"update": update, "record": json.dumps(record), "counters": "{}", "state": tree}
        ppo.write_file(file, ppo.pack(content))
    file.write_bytes(file.read_bytes()[:-1])
    return args, network, params, older


def test_a_run_by_its_name(ppo, run, capsys):
    args, network, params, _ = run
    check_run(ppo, "one", ppo.play_games(args, network, params, 2), ppo.params_sha256(params), 10, capsys)


def test_every_checkpoint(ppo, run, capsys):
    """The CSV has a line for each readable checkpoint, oldest first. An update is 2 x 64 environments, 128 steps."""
    args, network, params, older = run
    expected = [ppo.play_games(args, network, p, 2) for p in (older, params)]
    assert evaluated(ppo, "one", every_checkpoint=True) == expected[1]
    out = capsys.readouterr().out
    assert "checkpoints/11.msgpack is passed over: " in out
    assert "scores: runs/one/evaluation.csv; uv run benchmark/plot.py runs/one draws them\n" in out
    rows = [line.split(",") for line in Path("runs/one/evaluation.csv").read_text().splitlines()]
    assert rows[0] == ["update", "steps", "games", "cut", "mean", "std", "scores"]
    for row, update, scores in zip(rows[1:], (9, 10), expected, strict=True):
        assert [int(x) for x in row[:4]] == [update, update * 16384, 2, 0]
        assert [float(x) for x in row[4:6]] == [np.mean(scores), np.std(scores)]
        assert [float(x) for x in row[6].split()] == scores


class Endless(conftest.CountingPool):
    """Every step scores 1. Games of environment 0 have 12 steps, and games of environment 1 do not end."""

    def __init__(self):
        super().__init__(2, 16)
        self.lengths = np.array([12, 10**9])

    def info(self, reward, terminated):
        return {"reward": np.ones(2), "terminated": terminated.astype(np.int32)}


@pytest.mark.parametrize(("steps", "scores", "cut"), [(30, [12, 30], 1), (12, [12, 12], 1), (7, [7, 7], 2)])
def test_a_game_that_does_not_end_is_cut(ppo, monkeypatch, capsys, steps, scores, cut):
    """It counts with its score so far, unless it ends with the last step. A terminal shows the progress."""
    make_model(ppo)
    monkeypatch.setattr(evaluate, "load_script", lambda path: ppo)
    monkeypatch.setattr(ppo, "make_env", lambda *_: Endless())
    for live in (False, True):
        monkeypatch.setattr(evaluate.sys.stdout, "isatty", lambda live=live: live)
        assert evaluated(ppo, max_minutes=steps / 900) == scores
        out = capsys.readouterr().out
        assert f"({cut} cut after {steps / 900:g} minutes, with the score so far)\n" in out
        assert ("\x1b[K0 of 2 games over, 0.0 of at most" in out) == live
        assert out.count("\n") == 3


def test_an_end_is_no_cut(ppo, monkeypatch, capsys):
    make_model(ppo)
    monkeypatch.setattr(evaluate, "load_script", lambda path: ppo)
    monkeypatch.setattr(ppo, "make_env", lambda *_: conftest.CountingPool(2, 16))
    evaluated(ppo, max_minutes=4 / 900)  # the games have 3 and 4 steps
    assert " cut " not in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_run(script, capsys):
    flags = dict(local_num_envs=4, num_actor_threads=1, num_steps=4, num_minibatches=1, total_timesteps=64)
    args = script.Args(**TINY, **flags, checkpoint_frequency=2, save_model=True, eval_episodes=2)
    summary = script.train(args)
    check_run(script, summary["run_name"], summary["evaluation"]["scores"], summary["params_sha256"], 4, capsys)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub. It records what is created and committed, and stores models and films as large files."""
    hub = SimpleNamespace(repos=[], commits=[], files={}, open=True)
    large = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            welcome = hub.open and (self.command != "POST" or self.headers["Authorization"] == "Bearer hf_key")
            content = self.content(body) if welcome else {"error": "go away"}
            self.send_response(200 if welcome else 401)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        do_GET = do_POST = do_PUT = answer

        def content(self, body):
            route = self.path.rsplit("/", 2)[-2 if self.path.endswith("/main") else -1]
            if route == "create":
                hub.repos.append(json.loads(body))
                return {"url": f"{hub.url}/someone/agent"}
            if route == "preupload":
                mode = lambda path: "lfs" if path.endswith((".msgpack", ".mp4")) else "regular"
                files = json.loads(body)["files"]
                return {"files": [dict(path=f["path"], uploadMode=mode(f["path"]), shouldIgnore=False) for f in files]}
            if route == "batch":
                to = lambda oid: {"upload": {"href": f"{hub.url}/large/{oid}"}}
                return {"objects": [file | {"actions": to(file["oid"])} for file in json.loads(body)["objects"]]}
            if self.command == "PUT":
                large[route] = body
            if route == "commit":
                hub.commits.append(self.path)
                for entry in map(json.loads, body.splitlines()):
                    value = entry["value"]
                    if entry["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    if entry["key"] == "lfsFile":
                        hub.files[value["path"]] = large[value["oid"]]
                return {"success": True, "commitUrl": f"{hub.url}/someone/agent/commit/1", "commitOid": "1"}
            return {}

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet storage has no stand-in
        monkeypatch.setenv("HF_TOKEN", "hf_key")
        yield hub
        server.shutdown()


def test_upload(ppo, hub, capsys):
    """One commit holds all that another person needs to get the same scores. The film does not change them."""
    args, network, params = make_model(ppo)
    sha256, name = ppo.params_sha256(params), f"{PPO}.py"
    Path("summary.json").write_text(json.dumps({"params_sha256": sha256}))
    scores = evaluated(ppo, video=Path("game.mp4"), upload="someone/agent", seed=4)
    assert scores == ppo.play_games(replace(args, seed=4), network, params, 2)
    assert f"uploaded: {hub.url}/someone/agent" in capsys.readouterr().out
    assert (hub.repos[0]["organization"], hub.repos[0]["name"]) == ("someone", "agent")
    assert hub.commits == ["/api/models/someone/agent/commit/main"]
    assert hub.files == {path.name: path.read_bytes() for path in Path("upload").iterdir()}
    sources = {name: ppo.__file__, "replay.mp4": "game.mp4"}
    sources |= {file: file for file in ("model.msgpack", "summary.json")}
    assert set(hub.files) == {"README.md", *sources}
    assert all(hub.files[file] == Path(source).read_bytes() for file, source in sources.items())

    _, metadata, text = hub.files["README.md"].decode().split("---\n")
    metadata = yaml.safe_load(metadata)
    assert {"reinforcement-learning", "Berzerk-v5"} <= set(metadata["tags"])
    assert (metadata["script"], metadata["params_sha256"]) == (name, sha256)
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["name"] == "Berzerk-v5"
    assert result["metrics"][0]["value"] == f"{np.mean(scores):.2f} +/- {np.std(scores):.2f}"
    assert "hf download someone/agent --local-dir agent" in text
    (command,) = (line for line in text.splitlines() if line.startswith("uv run benchmark/evaluate.py "))
    Path("upload").rename("agent")
    assert evaluate.evaluate(tyro.cli(evaluate.Options, args=shlex.split(command)[3:])) == scores


def test_half_a_summary_is_not_uploaded(ppo, hub, capsys):
    make_model(ppo)
    Path("summary.json").write_text('{"params_sha256": "')
    evaluated(ppo, episodes=1, upload="someone/agent")
    assert set(hub.files) == {"README.md", "model.msgpack", f"{PPO}.py"}
    assert "summary.json counts as missing, as it cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize("reachable", [True, False])
def test_nothing_is_lost_without_the_hub(ppo, hub, monkeypatch, reachable):
    """After a refusal or no answer at all, the files are kept, and the command in the message uploads them."""
    make_model(ppo)
    Path("summary.json").write_text(json.dumps({"params_sha256": "of later parameters"}))
    Path("upload").mkdir()
    Path("upload/replay.mp4").write_text("of an earlier upload")
    if reachable:
        hub.open = False
    else:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{conftest.free_port()}")
    with pytest.raises(SystemExit, match=r"^not uploaded: ") as failure:
        evaluated(ppo, episodes=1, upload="someone/agent")
    assert hub.files == {}
    assert {path.name for path in Path("upload").iterdir()} == {"README.md", "model.msgpack", f"{PPO}.py"}

    command = shlex.split(str(failure.value).splitlines()[-1])
    assert command == ["hf", "upload", "someone/agent", "upload", "."]
    if not reachable:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], env=environment, check=True)
        assert hub.files == {path.name: path.read_bytes() for path in Path("upload").iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(script=Path("nowhere.py")), "SCRIPT nowhere.py: must be a Python file"),
        (dict(script=Path(conftest.__file__)), "conftest.py: has no load_model"),
        (dict(model=Path("nothing")), "MODEL_OR_RUN runs/nothing: no such run, or no model"),
        (dict(model=Path("empty")), "MODEL_OR_RUN runs/empty: no such run, or no model and no checkpoint in it"),
        (dict(every_checkpoint=True), "MODEL_OR_RUN model.msgpack: no such run, or no checkpoint in it"),
        (dict(every_checkpoint=True, video=Path("a.mp4")), "--every-checkpoint True: .*For example: without --video"),
        (dict(model=Path("broken.msgpack")), f"MODEL_OR_RUN broken.msgpack: is no model of {PPO}.py"),
        (dict(max_minutes=0.0), "--max-minutes 0.0: must be above 0. For example: --max-minutes 10"),
        (dict(episodes=0), "--episodes 0: must be 1 or more. For example: --episodes 10"),
        (dict(seed=-1), "--seed -1: must be 0 to 4294967295. For example: --seed 1"),
        (dict(video=Path("game.gif")), "--video game.gif: must end in .mp4. For example: --video game.mp4"),
        (dict(upload="a/b/c"), "--upload a/b/c: must be USER/NAME. For example: --upload me/pong"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_come_before_any_game(ppo, flags, message, monkeypatch, capsys):
    make_model(ppo)
    Path("runs/empty/checkpoints").mkdir(parents=True)
    Path("broken.msgpack").write_bytes(Path("model.msgpack").read_bytes()[:1000])
    options = evaluate.Options(Path(ppo.__file__), Path("model.msgpack"))
    monkeypatch.setattr(evaluate, "watched", None)  # no game may begin
    with pytest.raises(SystemExit, match="2"):
        evaluate.evaluate(replace(options, **flags))
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("trained", "played", "flags", "message"),
    [
        (PPO, IMPALA, {}, "unexpected keyword argument"),
        (IMPALA, PPO, {}, f"was trained by {IMPALA}.py, not by {PPO}.py. For example: .*{IMPALA}.py"),
        (PPO, WRAPPER, {}, f"was trained by {PPO}.py"),  # both have the 18 actions of Berzerk
        (PPO, WRAPPER, {"env_id": "Breakout-v5", "exp_name": "mine"}, f"has not the network of {WRAPPER}.py"),
    ],
)
def test_script_and_model_must_fit(trained, played, flags, message, capsys):
    make_model(conftest.load(trained), **flags)
    assert re.search(message, refused(capsys, conftest.load(played)))


def test_without_the_extras(ppo, monkeypatch, capsys):
    """Scores need neither extra. A flag that needs one says what to install."""
    make_model(ppo)
    for package in ("imageio", "imageio.v2", "imageio_ffmpeg", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    assert len(evaluated(ppo, episodes=1)) == 1
    assert "--video a.mp4: needs two packages. For example: pip install imageio imageio-ffmpeg\n" in refused(
        capsys, ppo, video=Path("a.mp4")
    )
    assert "--upload a/b: needs a package. For example: pip install huggingface_hub\n" in refused(
        capsys, ppo, upload="a/b"
    )


def test_the_command_line(ppo, monkeypatch, capsys):
    make_model(ppo)
    monkeypatch.setenv("XLA_FLAGS", "")  # main adds to it
    monkeypatch.setattr(sys, "argv", ["evaluate.py", ppo.__file__, "model.msgpack", "--episodes", "0"])
    with pytest.raises(SystemExit) as failure:
        evaluate.main()
    assert failure.value.code == 2
    assert capsys.readouterr().err == "error: --episodes 0: must be 1 or more. For example: --episodes 10\n"
