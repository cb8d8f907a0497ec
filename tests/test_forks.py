"""Every fork in tests/forks applies to its script, leaves no dead code, runs, and keeps the script's promises."""

import ast
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import conftest
import jax
import numpy as np
import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

tiny_game = conftest.load("benchmark/tiny_game")
PATCHES = {path.stem: path for path in sorted((ROOT / "tests" / "forks").glob("*.patch"))}
TINY = dict(local_num_envs=4, num_actor_threads=2, num_steps=8, num_minibatches=1, num_shards=4, log_frequency=1,
            checkpoint_frequency=2, total_timesteps=3 * 64)  # fmt: skip
SHAPES = {  # of the forks that play EnvPool's simulators
    "nature_cnn": dict(img_size=36, channels=(4, 4, 4)),
    "minigrid": dict(channels=(4,)),
    "classic_control": {},
}
SPLIT = dict(learner_device_ids=(0, 1), actor_device_ids=(0, 1), num_actor_threads=1)

pytestmark = pytest.mark.skipif(
    not shutil.which("patch"), reason="needs the program patch, as the README's command does"
)


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """name -> the path of the fork, patched as README says."""

    @cache
    def patched(name: str) -> Path:
        folder, (script,) = tmp_path_factory.mktemp(name), re.findall(r"^--- (\S+)", PATCHES[name].read_text(), re.M)
        shutil.copy(ROOT / script, folder)
        # without fuzz: a hunk whose surroundings have changed could go anywhere
        command = ["patch", "--fuzz=0", "--reject-file=-", "-o", f"{name}.py", script, PATCHES[name]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{PATCHES[name].name} does not fit {script}:\n{done.stdout}{done.stderr}"
        return folder / f"{name}.py"

    return patched


@pytest.fixture(scope="module")
def load(patched):
    """name -> the fork as a module."""
    return lambda name: conftest.load(name, patched(name))


@pytest.fixture
def train(load, monkeypatch):
    """(name of a fork, additional flags) -> the summary of a tiny run."""

    def train(name: str, **flags):
        script = load(name)
        if name not in SHAPES:  # the tiny game, whose episodes of three rows end within a rollout
            monkeypatch.setattr(script, "env_spec", tiny_game.env_spec)
            monkeypatch.setattr(script, "make_env", lambda args, seeds, threads: tiny_game.Catch(seeds, height=3))
        shape = SHAPES.get(name, dict(img_size=tiny_game.SIZE, channels=(4,)))
        return script.train(script.Args(**TINY | dict(hiddens=(16,)) | shape | flags))

    return train


each = pytest.mark.parametrize("name", PATCHES)
each_other = pytest.mark.parametrize("name", [name for name in PATCHES if name != "impala_lstm"])


def dead(text: str) -> set[str]:
    """What is defined and never used: names of the module, fields of its networks, flags."""
    tree = ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
             for alias in node.names}  # fmt: skip
    names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for top in tree.body if isinstance(top, ast.Assign)
              for node in ast.walk(top) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}  # fmt: skip
    unused = {name for name in names if name.split(".")[0] not in used}
    for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        owner = "args" if node.name == "Args" else "self" if "Module" in ast.unparse(node) else None
        for field in (field.target.id for field in node.body if owner and isinstance(field, ast.AnnAssign)):
            unused |= set() if re.search(rf"\b{owner}\.{field}\b", text) else {f"{owner}.{field}"}
    return unused


@each
def test_it_applies_and_leaves_nothing_dead(patched, name):
    text = patched(name).read_text()
    assert dead(text) == set()
    if shutil.which("ruff"):
        command = ["ruff", "check", "--no-cache", "--config", ROOT / "pyproject.toml", patched(name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_what_is_dead_is_found():
    code = "import os\nx = 1\nclass Args:\n    a: int\n    b: int\n"
    code += "class Net(nn.Module):\n    c: int\ndef f(args):\n    return args.a\n"
    assert dead(code) == {"os", "x", "Args", "Net", "f", "args.b", "self.c"}
    for name in conftest.SCRIPTS:
        assert dead((ROOT / f"{name}.py").read_text()) == set()


@each
def test_it_runs(train, load, name):
    """A fork trains for three updates with a checkpoint, plays games with its model, and loads it again."""
    summary = train(name, save_model=True, eval_episodes=4)
    assert (summary["updates"], len(summary["evaluation"]["scores"])) == (3, 4)
    run = Path("runs", summary["run_name"])
    _, _, params = load(name).load_model(run / "model.msgpack")
    assert load(name).params_sha256(params) == summary["params_sha256"]
    logged = EventAccumulator(str(run)).Reload().Tags()["scalars"]
    assert ("losses/old_approx_kl" in logged) == (name == "metric")


def same_bits(train, load, monkeypatch, name):
    """The bits are the same on one device, on two, and resumed on two after a cut between checkpoints."""
    whole, update = train(name), load(name).Report.update

    def cut(report, *arguments):
        update(report, *arguments)
        if report.updates == 3:
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(load(name).Report, "update", cut)
        with pytest.raises(ZeroDivisionError):
            train(name, resume="it", start_fresh=True)
    resumed = train(name, resume="it", **SPLIT)
    assert (resumed["params_sha256"], resumed["resumed_at"]) == (whole["params_sha256"], [2])
    assert train(name, **SPLIT)["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
def test_the_lstm_has_the_same_bits_anywhere(train, load, monkeypatch):
    same_bits(train, load, monkeypatch, "impala_lstm")


@pytest.mark.slow
@each_other
def test_it_has_the_same_bits_anywhere(train, load, monkeypatch, name):
    same_bits(train, load, monkeypatch, name)


def test_flags_of_another_network(load):
    script = load("nature_cnn")
    for flags, told in (
        (dict(channels=(8, 16)), "--channels 8 16: must be 3 widths, each 1 or more. For example: --channels 32 64 64"),
        (dict(img_size=35), "--img-size 35: must be between 36 and 1024"),
    ):
        with pytest.raises(script.FlagError, match=told):
            script.check_args(script.Args(**flags))


@pytest.mark.parametrize("name", ["minigrid", "classic_control"])
def test_another_simulator_names_its_tasks(load, name):
    script = load(name)
    with pytest.raises(script.FlagError, match="--env-id Pong-v5: must be one of"):
        script.check_args(script.Args(env_id="Pong-v5"))


def test_the_cosine(load):
    script = load("adamw_cosine")
    args = script.Args(**TINY | dict(total_timesteps=640))
    _, rate = script.make_optimizer(args, script.check_args(args))
    expected = args.learning_rate * (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
    np.testing.assert_allclose([rate(u) for u in range(1, 11)], expected, rtol=1e-5)


def test_value_clipping(load):
    """One row with value 3, target 5, old value 1 and clip range 0.1: the value counts as 1.1."""
    script = load("value_clipping")
    column = lambda x: np.float32([x])
    behaviour = script.Behaviour(np.zeros(1, int), column(0), column(1))
    minibatch = script.Minibatch(np.zeros((1, 1)), behaviour, column(0), column(5), column(1))
    apply = lambda value, obs: (jax.numpy.zeros((1, 2)), value * jax.numpy.ones(1))
    loss = lambda value: script.ppo_loss(value, apply, minibatch, script.Args())[1]["value_loss"]
    assert float(loss(3.0)) == pytest.approx(0.5 * 3.9**2)
    assert (float(jax.grad(loss)(3.0)), float(jax.grad(loss)(1.05))) == (0, pytest.approx(1.05 - 5))
    assert float(loss(-1.0)) == pytest.approx(0.5 * 6**2)  # a step away from the target is not clipped


# --- the LSTM ---


@pytest.fixture
def lstm(load, monkeypatch):
    script = load("impala_lstm")
    monkeypatch.setattr(script, "LSTM_UNITS", 8)
    return script


def counting(lstm, pool, count=2, num_steps=11):
    """Network, parameters, and rollouts of a pool whose observations depend on environment and time alone."""
    network = lstm.ActorCritic(4, (4,), (16,))
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 4, 8, 8), np.uint8))
    noise = lambda p: p + 0.5 * np.random.default_rng(p.size).normal(size=p.shape).astype(np.float32)
    params = jax.tree.map(noise, params)  # so that all inputs matter
    observe = lambda self: type(pool).observe(self) * np.uint8(20)  # so that the network can tell time steps apart
    pool.observe = observe.__get__(pool)
    envs, policy = lstm.Envs(pool), lstm.make_policy(network)
    play = lambda i: lstm.collect(envs, policy, params, jax.random.key(i), num_steps, defaultdict(float))
    return network, params, [play(i) for i in range(count)]


def unrolled(lstm, network, params, rollout):
    """The learner's logits of all T + 1 rows."""

    def logits(params, rollout):
        seen = []
        apply = lambda *inputs: seen.append(network.apply(*inputs)) or seen[-1]
        lstm.impala_loss(params, apply, rollout, lstm.Args())
        return seen[0][0]

    return np.asarray(jax.jit(logits)(params, rollout)).reshape(*rollout.is_reset_row.shape, -1)


def test_the_learner_s_unroll_is_the_actor_s(lstm, counting_pool):
    """The logits agree at every step, across ends of episodes and rollouts. State, action and reward all matter."""
    network, params, played = counting(lstm, counting_pool(num_envs=5))
    for rollout in played:
        logits = unrolled(lstm, network, params, rollout)
        np.testing.assert_allclose(logits[:-1], rollout.behaviour.logits, atol=1e-5, rtol=1e-5)
    following = played[1].behaviour.logits[0]  # the actor's at obs[T], where the learner's unroll ends
    np.testing.assert_allclose(unrolled(lstm, network, params, played[0])[-1], following, atol=1e-5, rtol=1e-5)
    past = played[1].past
    assert not past.is_first_row.all()
    for changed in (past._replace(state=past.state + 1), past._replace(action=(past.action + 1) % 4),
                    past._replace(reward=past.reward + 1)):  # fmt: skip
        logits = unrolled(lstm, network, params, played[1]._replace(past=changed))
        other = np.abs(logits[0] - played[1].behaviour.logits[0]).max(-1) > 1e-3
        assert (other == ~past.is_first_row[0]).all()


def test_a_reset_row_ends_the_memory(lstm, counting_pool):
    """A reset row still has the memory of its episode. The row after it has none."""
    network, params, played = counting(lstm, counting_pool(num_envs=5), num_steps=40)
    for rollout in played:
        logits, reset = rollout.behaviour.logits, rollout.is_reset_row[:-1]
        obs = rollout.obs[:-1].reshape(-1, 4, 8, 8)
        forgetful = np.asarray(jax.jit(network.apply)(params, obs)[0]).reshape(logits.shape)
        forgot = np.abs(logits - forgetful).max(-1) < 1e-5
        assert forgot[1:][reset[:-1]].all()
        assert not forgot[reset].any()
        assert forgot[1:].sum() == reset[:-1].sum() > 20


def test_an_update_leaves_no_part_of_the_lstm_as_it_was(lstm, counting_pool):
    """The gradient reaches the recurrent weights, and only through rows that count."""
    network, params, (rollout, _) = counting(lstm, counting_pool(num_envs=5))
    loss = lambda params, rollout: lstm.impala_loss(params, network.apply, rollout, lstm.Args())[0]
    gradient = lambda rollout: jax.jit(jax.grad(loss))(params, rollout)
    first = gradient(rollout)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(first))
    after_termination = np.concatenate([np.zeros_like(rollout.terminated[:1]), rollout.terminated])
    obs = np.where(after_termination[..., None, None, None], np.uint8(255) - rollout.obs, rollout.obs)
    for a, b in zip(*map(jax.tree.leaves, (first, gradient(rollout._replace(obs=obs)))), strict=True):
        np.testing.assert_array_equal(a, b)


class Recall(tiny_game.Catch):
    """The block is visible only where it starts, and the paddle moves only in the last step, by at most one column.

    A player without memory catches four in ten by staying: at an edge two of three draws place the paddle below it.
    """

    def begin(self, which):
        super().begin(which)
        for i in np.flatnonzero(which):
            self.paddle[i] = np.clip(self.column[i] + self.generators[i].integers(-1, 2), 0, tiny_game.SIZE - 1)

    def observe(self):
        obs = super().observe()
        for i in np.flatnonzero(self.row > tiny_game.SIZE - self.height):
            obs[i] = 0
            obs[i, 3, tiny_game.SIZE - 1, self.paddle[i]] = 255
        return obs

    def step(self, action):
        return super().step(np.where(self.row == tiny_game.SIZE - 2, action, 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_what_needs_memory(load, monkeypatch, seed):
    """The LSTM learns this game, and IMPALA without it does not."""
    scores = []
    for script in (load("impala_lstm"), conftest.load("cleanba_impala_envpool")):
        monkeypatch.setattr(script, "LSTM_UNITS", 64, raising=False)
        monkeypatch.setattr(script, "env_spec", tiny_game.env_spec)
        monkeypatch.setattr(script, "make_env", lambda args, seeds, num_threads: Recall(seeds, height=4))
        flags = tiny_game.FLAGS | dict(learning_rate=8e-3, local_num_envs=8, num_steps=16)
        flags |= dict(num_shards=1, total_timesteps=120_000, log_frequency=10**6)
        scores.append(script.train(script.Args(**flags, seed=seed))["mean_score"])
    assert scores[0] >= 0.9
    assert scores[1] <= 0.55


@pytest.mark.slow
@pytest.mark.parametrize(("name", "score"), [("classic_control", 100), ("minigrid", 0.8)])
def test_it_learns(load, name, score):
    """A random policy scores 22 in CartPole and below 0.2 in MiniGrid's empty room."""
    script = load(name)
    flags = dict(local_num_envs=16, num_steps=32, learning_rate=2e-3, total_timesteps=60_000, log_frequency=10**6)
    flags |= dict(channels=(16,), hiddens=(64,)) if name == "minigrid" else {}
    assert script.train(script.Args(**flags))["mean_score"] >= score
