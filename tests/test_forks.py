"""Every fork in tests/forks applies to its script, leaves no dead code, runs, and keeps the script's promises."""

import ast
import re
import shutil
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import NormalDist

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
    "procgen": dict(env_id="BossfightEasy-v0", channels=(4,)),
    "mujoco": dict(env_id="Hopper-v4"),
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


def recall_scores(monkeypatch, *scripts, **flags) -> list[float]:
    """The mean score of each script in the game that needs memory."""
    flags = tiny_game.FLAGS | dict(local_num_envs=8, num_steps=16, num_shards=1, log_frequency=10**6) | flags
    scores = []
    for script in scripts:
        monkeypatch.setattr(script, "LSTM_UNITS", 64, raising=False)
        monkeypatch.setattr(script, "env_spec", tiny_game.env_spec)
        monkeypatch.setattr(script, "make_env", lambda args, seeds, num_threads: Recall(seeds, height=4))
        scores.append(script.train(script.Args(**flags))["mean_score"])
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_what_needs_memory(load, monkeypatch, seed):
    """The LSTM learns this game, and IMPALA without it does not."""
    scripts = load("impala_lstm"), conftest.load("cleanba_impala_envpool")
    scores = recall_scores(monkeypatch, *scripts, learning_rate=8e-3, total_timesteps=120_000, seed=seed)
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


# --- PQN ---


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("q_lambda", [0.0, 0.65, 1.0])
def test_targets_of_q(load, gamma, q_lambda):
    """The definition, forward: a mean of the returns after 1, 2, ... rows, which end where the episode does."""
    script, rng, steps, envs = load("pqn"), np.random.default_rng(0), 40, 6
    is_reset_row = rng.random((steps + 1, envs)) < 0.3
    for t in range(steps):
        is_reset_row[t + 1] &= ~is_reset_row[t]
    terminated = is_reset_row[1:] & (rng.random((steps, envs)) < 0.5)
    reward, value = rng.normal(size=(steps, envs)), rng.normal(size=(steps + 1, envs))
    behaviour = script.Behaviour(np.zeros((steps, envs), int), value[:-1])
    rollout = script.Rollout(np.zeros(0), is_reset_row, reward, terminated, behaviour, value[-1:])
    estimate = script.compute_targets(rollout, gamma, q_lambda)
    np.testing.assert_array_equal(estimate.weight, ~is_reset_row[:-1])
    for t, env in np.ndindex(steps, envs):
        target, points, share = 0.0, 0.0, 1.0
        for n in range(0 if is_reset_row[t, env] else steps - t):
            row = t + n
            points += gamma**n * reward[row, env]
            after = points + (0 if terminated[row, env] else gamma ** (n + 1) * value[row + 1, env])
            is_last = is_reset_row[row + 1, env] or row == steps - 1
            target += share * (1 if is_last else 1 - q_lambda) * after
            share *= q_lambda
            if is_last:
                break
        assert estimate.target[t, env] == pytest.approx(target, abs=2e-5)


def test_loss_of_q(load):
    """Only the chosen action's value is fitted, and rows without weight change nothing."""
    script, rows = load("pqn"), np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    minibatch = script.Minibatch(rows, np.int32([1, 0, 2]), np.float32([5, 3, 0]), np.float32([0.25, 0.75, 0]))
    apply = lambda shift, obs: obs + shift
    gradient, metrics = jax.grad(script.q_loss, has_aux=True)(np.zeros((3, 3), np.float32), apply, minibatch)
    np.testing.assert_allclose(gradient, [[0, -0.75, 0], [0.75, 0, 0], [0, 0, 0]])
    told = {name: float(metrics[name]) for name in ("loss", "q_value", "td_error")}
    assert told == pytest.approx({"loss": (0.25 * 9 + 0.75) / 2, "q_value": 3.5, "td_error": 1.5})


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.5, [1, 0.82, 0.64, 0.46, 0.28, 0.1, 0.1, 0.1, 0.1, 0.1]), (0.0, [0.1] * 10), (1.0, np.linspace(1, 0.19, 10))],
)
def test_epsilon_falls_and_stays(load, fraction, expected):
    script = load("pqn")
    args = script.Args(**TINY | dict(total_timesteps=640, exploration_fraction=fraction, final_epsilon=0.1))
    sizes = script.check_args(args)
    np.testing.assert_allclose([script.exploration(args, sizes, u) for u in range(1, 11)], expected)


def test_actors_explore_as_often_as_epsilon_says(load):
    """The best of four actions is 2. A random one is the best in a quarter of the cases."""
    script, obs = load("pqn"), np.zeros((4000, 1))
    network = type("Network", (), {"apply": lambda self, params, obs: jax.numpy.float32([[0, 1, 5, 2]] * len(obs))})()
    act, last = script.make_policy(network)
    for epsilon in (0.0, 0.4, 1.0):
        behaviours = [act({}, obs, jax.random.key(0), t, epsilon) for t in range(2)]
        shares = [np.bincount(behaviour.action, minlength=4) / len(obs) for behaviour in behaviours]
        np.testing.assert_allclose(shares, [epsilon / 4 + (1 - epsilon) * np.eye(4)[2]] * 2, atol=0.03 * (epsilon > 0))
        assert (epsilon == 0) == np.array_equal(behaviours[0].action, behaviours[1].action)
        assert (behaviours[0].value == 5).all()
    assert (last({}, obs, jax.random.key(0))["last_value"] == np.full((1, 4000), 5)).all()
    assert act._cache_size() == 1


def test_epsilon_belongs_to_the_update(train, load, monkeypatch):
    """Both actors get it, whatever version they play. A longer run would have others, so it is no continuation."""
    script, seen, collect = load("pqn"), [], load("pqn").collect

    def watched(envs, policy, params, key, epsilon, *rest):
        seen.append(epsilon)
        return collect(envs, policy, params, key, epsilon, *rest)

    monkeypatch.setattr(script, "collect", watched)
    flags = dict(resume="it", exploration_fraction=0.7, final_epsilon=0.1, anneal_lr=False, concurrency=True)
    train("pqn", start_fresh=True, **flags)
    epsilons = np.float32([1, 1 - 0.9 / 2.1, 1 - 1.8 / 2.1])
    np.testing.assert_allclose(sorted(seen, reverse=True), np.repeat(epsilons, 2), rtol=1e-6)
    logged = EventAccumulator("runs/it").Reload().Scalars("stats/epsilon")
    np.testing.assert_allclose([event.value for event in logged], epsilons, rtol=1e-6)
    with pytest.raises(script.FlagError, match="epsilons"):
        train("pqn", total_timesteps=10 * 64, **flags)


def test_games_are_played_with_the_final_epsilon(load, monkeypatch):
    script, seen = load("pqn"), []

    def act(params, obs, key, t, epsilon):
        seen.append(epsilon)
        return script.Behaviour(np.ones(len(obs), int), np.zeros(len(obs)))

    monkeypatch.setattr(script, "make_env", lambda args, seeds, threads: tiny_game.Catch(seeds, height=3))
    monkeypatch.setattr(script, "make_policy", lambda network: (act, None))
    script.play_games(script.Args(final_epsilon=0.25), None, None, 2)
    assert set(seen) == {0.25}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_q_learning_learns(load, monkeypatch, seed):
    script = load("pqn")
    monkeypatch.setattr(script, "env_spec", tiny_game.env_spec)
    monkeypatch.setattr(script, "make_env", lambda args, seeds, num_threads: tiny_game.Catch(seeds))
    flags = tiny_game.FLAGS | dict(learning_rate=2e-3, num_minibatches=4, total_timesteps=45_000, log_frequency=10**6)
    assert script.train(script.Args(**flags, seed=seed))["mean_score"] >= 0.9


# --- MuJoCo ---


@pytest.fixture(scope="module")
def hopping(load, tmp_path_factory):
    """A run of five updates: the script, the rollouts and metrics of each update, and the last statistics."""
    script, run = load("mujoco"), tmp_path_factory.mktemp("hopping")
    rollouts, metrics = [], []
    assemble, summarise = script.assemble, script.summarise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "assemble", lambda deliveries: rollouts.append(assemble(deliveries)) or rollouts[-1])
        patch.setattr(script, "summarise", lambda pieces: metrics.append(pieces) or summarise(pieces))
        flags = TINY | SHAPES["mujoco"] | dict(hiddens=(16,), learning_rate=0.01, update_epochs=2)
        flags |= dict(checkpoint_frequency=0, total_timesteps=5 * 64)  # five rollouts of the same episodes
        script.train(script.Args(**flags, resume=str(run), start_fresh=True))
    content = script.unpack(script.read_newest_checkpoint(run))
    whole = [jax.tree.map(lambda *shards: np.concatenate(shards, 1), *shards) for shards in rollouts]
    return script, whole, metrics, content["state"]["0"]["params"]["statistics"]


def rows_that_count(rollouts, gamma=0.99):
    """Observation and discounted return of every row, by a plain loop over the steps of all rollouts."""
    discounted, rows = np.zeros(rollouts[0].reward.shape[1]), []
    for rollout in rollouts:
        resets = rollout.is_reset_row
        for obs, reset, ended, reward in zip(rollout.obs, resets, resets[1:], rollout.reward):
            discounted = gamma * discounted + reward
            rows.append(np.concatenate([obs, discounted[:, None]], 1)[~reset])
            discounted[ended] = 0
    return np.concatenate(rows)


def test_statistics_are_of_all_rows_that_count(hopping):
    _, rollouts, _, statistics = hopping
    rows = rows_that_count(rollouts)
    resets = np.sum([rollout.is_reset_row[:-1].sum() for rollout in rollouts])
    assert resets > 5
    assert statistics["count"] == len(rows) == 5 * 64 - resets
    np.testing.assert_allclose(statistics["mean"], rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["variance"], rows.var(0), rtol=1e-4, atol=1e-5)


def test_rewards_are_scaled_by_the_newest_statistics(hopping):
    """The mean target is that of rewards in standard deviations of all discounted returns, those of the update too."""
    script, rollouts, metrics, _ = hopping
    for update, rollout in enumerate(rollouts, start=1):
        deviation = rows_that_count(rollouts[:update])[:, -1].std()
        estimate = script.compute_gae(rollout._replace(reward=rollout.reward / deviation), 0.99, 0.95)
        target = np.average(estimate.target, weights=estimate.weight)
        assert metrics[update - 1][0]["target"] == pytest.approx(target, rel=1e-4)


def test_the_learner_starts_from_the_policy_that_played(hopping):
    """Statistics change between updates and not within: the ratio is 1 at first, and not after a step of Adam."""
    _, _, metrics, _ = hopping
    for first, second in metrics:
        assert abs(first["approx_kl"]) < 1e-6
        assert second["approx_kl"] > 1e-5


def test_no_gradient_reaches_the_statistics(load):
    script, rng = load("mujoco"), np.random.default_rng(0)
    network = script.ActorCritic(3, (16,))
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 11)))
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    behaviour = script.Behaviour(normal(8, 3), normal(8), normal(8))
    rows = script.Minibatch(normal(8, 11), behaviour, normal(8), normal(8), np.full(8, 1 / 8, np.float32))
    loss = lambda params: script.ppo_loss(params, network.apply, rows, script.Args(ent_coef=0.1))[0]
    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["params"]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["statistics"]))


def test_the_gaussian(load):
    """Log-probability and entropy against the standard library's density, the entropy by summation."""
    script = load("mujoco")
    mean, deviation, action = [0.5, -1.0], [0.5, 3.0], [0.25, 1.5]
    gaussians = [NormalDist(*parameters) for parameters in zip(mean, deviation)]
    log_prob = script.log_prob(np.float32([mean]), np.log(np.float32(deviation)), np.float32([action]))
    expected = sum(np.log(gaussian.pdf(x)) for gaussian, x in zip(gaussians, action))
    np.testing.assert_allclose(log_prob, [expected], rtol=1e-5)

    column = np.float32([0])
    rows = script.Minibatch(None, script.Behaviour(np.float32([action]), column, column), column, column, column + 1)
    apply = lambda log_std, obs: (np.float32([mean]), log_std, column)
    _, metrics = script.ppo_loss(np.log(np.float32(deviation)), apply, rows, script.Args())
    density = np.array([[gaussian.pdf(x) for x in np.arange(-30, 30, 0.01)] for gaussian in gaussians])
    entropy = -np.sum(density * np.log(np.maximum(density, 1e-300))) * 0.01
    assert float(metrics["entropy"]) == pytest.approx(entropy, rel=1e-4)


def test_actions_are_clipped_for_the_task_alone(load, monkeypatch):
    """The task gets actions within its box, and the learner those that were drawn."""
    script, given = load("mujoco"), []
    envs = script.Envs(script.make_env(script.Args(env_id="Humanoid-v4"), [1, 2], 1))
    step, drawn = envs.pool.step, np.linspace(-1, 1, 34, dtype=np.float32).reshape(2, 17)
    monkeypatch.setattr(envs.pool, "step", lambda action: given.append(action) or step(action))
    policy = lambda *_: script.Behaviour(drawn, np.zeros(2), np.zeros(2)), lambda *_: {"last_value": np.zeros((1, 2))}
    rollout = script.collect(envs, policy, None, None, 3, defaultdict(float))
    np.testing.assert_allclose(given, [np.clip(drawn, -0.4, 0.4)] * 3, rtol=1e-6)
    np.testing.assert_array_equal(rollout.behaviour.action, [drawn] * 3)


def test_mujoco_names_its_tasks(load):
    script = load("mujoco")
    told = "--env-id Pong-v5: must be one of Gymnasium's 33 MuJoCo tasks. For example: --env-id HalfCheetah-v4"
    with pytest.raises(script.FlagError, match=told):
        script.check_args(script.Args(env_id="Pong-v5"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_to_hop(load, seed):
    """The policy scores 15 before training."""
    script = load("mujoco")
    flags = dict(env_id="Hopper-v4", learning_rate=1e-3, num_minibatches=16, num_shards=1, log_frequency=10**6)
    assert script.train(script.Args(**flags, seed=seed, total_timesteps=65_536))["mean_score"] >= 250


# --- recurrent PPO ---


@pytest.fixture
def recurrent(load, monkeypatch):
    script = load("ppo_lstm")
    monkeypatch.setattr(script, "LSTM_UNITS", 8)
    return script


def make_learner(recurrent, network, params):
    """(rollout, target and weight of its rows) -> gradient and metrics of a minibatch of all five environments."""
    args, one, order = recurrent.Args(norm_adv=False), np.ones(1, np.float32), np.array([[[3, 0, 4, 1, 2]]])
    gradient = jax.jit(lambda data: recurrent.piece_gradient(network, args, params, data, 0, 0))

    def learn(rollout, target, weight):
        estimate = recurrent.Estimate(np.ones_like(target), target, np.float32(weight))
        return gradient(recurrent.ShardData(rollout, estimate, order, {"weight": one, "advantage": one}, one))

    return learn


def test_ppo_s_unroll_is_the_actor_s(recurrent, counting_pool):
    """Values and log-probabilities agree at every step. State, action and reward of an environment all matter to it."""
    network, params, played = counting(recurrent, counting_pool(num_envs=5), num_steps=12)
    learn = make_learner(recurrent, network, params)
    for rollout in played:
        _, metrics = learn(rollout, rollout.behaviour.value, np.ones_like(rollout.reward))
        assert metrics["value_loss"] < 1e-9
        assert metrics["approx_kl"] < 1e-5
    past = played[1].past
    assert {*past.is_first_row[0].tolist()} == {True, False}
    for changed in (past._replace(state=past.state + 1), past._replace(action=(past.action + 1) % 4),
                    past._replace(reward=past.reward + 1)):  # fmt: skip
        rollout = played[1]._replace(past=changed)
        for env, is_first_row in enumerate(past.is_first_row[0]):
            weight = np.zeros_like(rollout.reward)
            weight[:, env] = 1
            _, metrics = learn(rollout, rollout.behaviour.value, weight)
            assert (metrics["value_loss"] < 1e-9) == is_first_row


def test_the_value_of_the_last_observation_takes_nothing_from_the_memory(recurrent, counting_pool):
    """The next rollout begins with the same observation, and the same memory."""
    _, _, (first, second) = counting(recurrent, counting_pool(num_envs=5))
    np.testing.assert_array_equal(first.obs[-1], second.obs[0])
    np.testing.assert_allclose(first.last_value[0], second.behaviour.value[0], rtol=1e-5)


def test_a_reset_row_ends_the_memory_in_ppo(recurrent, counting_pool):
    """A reset row still has the memory of its episode. The row after it has none."""
    network, params, played = counting(recurrent, counting_pool(num_envs=5), num_steps=40)
    for rollout in played:
        value, reset = rollout.behaviour.value, rollout.is_reset_row[:-1]
        _, forgetful, _ = jax.jit(network.apply)(params, rollout.obs[:-1].reshape(-1, 4, 8, 8))
        forgot = np.abs(value - forgetful.reshape(value.shape)) < 1e-5
        assert forgot[1:][reset[:-1]].all()
        assert not forgot[reset].any()
        assert forgot[1:].sum() == reset[:-1].sum() > 20


def test_a_reset_row_teaches_recurrent_ppo_nothing(recurrent, counting_pool):
    """Neither what it shows nor what was done there. All else teaches every part of the network."""
    network, params, (rollout, _) = counting(recurrent, counting_pool(num_envs=5), num_steps=12)
    learn, reset = make_learner(recurrent, network, params), rollout.is_reset_row
    obs = np.where(reset[..., None, None, None], np.uint8(255) - rollout.obs, rollout.obs)
    action = np.where(reset[:-1], (rollout.behaviour.action + 1) % 4, rollout.behaviour.action)
    reward = np.where(reset[:-1], rollout.reward + 1, rollout.reward)
    behaviour = rollout.behaviour._replace(action=action)
    changed = rollout._replace(obs=obs, reward=reward, behaviour=behaviour)
    gradients = [learn(played, np.zeros_like(reward), ~reset[:-1])[0] for played in (rollout, changed)]
    for first, second in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.abs(first).max() > 1e-6
        np.testing.assert_array_equal(first, second)


def test_a_minibatch_has_whole_environments(recurrent):
    """An epoch visits each environment once. The statistics are over all rows of a minibatch's environments."""
    args = recurrent.Args(num_minibatches=2, gradient_accumulation_steps=3)
    orders = [recurrent.shuffle(args, 12, jax.random.key(0), epoch, shard) for epoch, shard in ((0, 0), (1, 0), (0, 1))]
    assert len({order.tobytes() for order in map(np.asarray, orders)}) == 3
    for order in orders:
        assert order.shape == (2, 3, 2)
        assert sorted(order.ravel().tolist()) == list(range(12))
    advantage, weight = np.random.default_rng(0).normal(size=(2, 7, 12)).astype(np.float32)
    weight = np.float32(weight > 0)
    estimate = recurrent.Estimate(advantage, advantage, weight)
    sums = recurrent.minibatch_sums(estimate, order)
    squares = recurrent.minibatch_squares(estimate, order, sums)
    for minibatch in range(2):
        envs = np.ravel(order[minibatch])
        rows = advantage[:, envs][weight[:, envs] > 0]
        assert sums["weight"][minibatch] == len(rows)
        assert float(squares[minibatch]) == pytest.approx(len(rows) * rows.var(), rel=1e-4)
    with pytest.raises(recurrent.FlagError, match="--num-minibatches 64: must divide the 32 environments of a shard"):
        recurrent.check_args(recurrent.Args(num_minibatches=64))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ppo_learns_what_needs_memory(load, monkeypatch, seed):
    """Recurrent PPO learns this game, and PPO does not."""
    scripts = load("ppo_lstm"), conftest.load("cleanba_ppo_envpool")
    scores = recall_scores(monkeypatch, *scripts, learning_rate=2e-3, total_timesteps=40_000, seed=seed)
    assert scores[0] >= 0.9
    assert scores[1] <= 0.6  # 100 games of a policy that catches 42 in 100


# --- Procgen ---


@pytest.fixture
def procgen(load):
    """EnvPool's Procgen needs Qt 5, a library of the system that many machines do not have."""
    script = load("procgen")
    try:
        script.env_spec(script.Args())
    except ImportError as error:
        pytest.skip(str(error))
    return script


@pytest.fixture(autouse=True)
def skip_procgen_without_qt(request):
    if request.node.name.endswith("[procgen]") and "train" in request.fixturenames:
        request.getfixturevalue("procgen")


def test_procgen_names_its_games(load):
    script = load("procgen")
    with pytest.raises(script.FlagError, match="--env-id Pong-v5: must be one of EnvPool's 50 Procgen games"):
        script.check_args(script.Args(env_id="Pong-v5"))


def test_games_of_procgen(procgen):
    """Episodes of the levels asked for are counted as EnvPool reports them, and time limits are no terminations."""
    args = procgen.Args(env_id="MazeEasy-v0", num_levels=3)
    seeds = procgen.env_seeds(1, 0, 0, 8)
    pool = procgen.make_env(args, seeds, 2)
    envs = procgen.Envs(procgen.make_env(args, seeds, 1))
    pool.reset()
    actions = np.random.default_rng(0).integers(0, 15, (510, 8), np.int32)
    games, score, length, levels, time_limits = [], np.zeros(8), np.zeros(8, int), set(), 0
    for action in actions:
        was_over = envs.is_reset_row
        obs, reward, terminated, truncated, info = pool.step(action)
        seen = envs.step(action)
        np.testing.assert_array_equal(obs, envs.obs)
        np.testing.assert_array_equal(seen, (reward, terminated))
        np.testing.assert_array_equal(info["elapsed_step"] == 0, was_over)
        assert not reward[was_over].any()
        assert not (terminated & truncated).any()
        score += reward
        length += ~was_over
        levels |= {*info["level_seed"].tolist()}
        time_limits += truncated.sum()
        for env in np.flatnonzero(terminated | truncated):
            games.append((score[env], length[env]))
            score[env] = length[env] = 0
    assert envs.games == games
    assert {score for score, _ in games} == {0, 10}
    assert max(games)[1] < 500 == max(length for _, length in games)
    assert (levels, time_limits > 0) == ({0, 1, 2}, True)


def test_games_of_a_model_are_on_all_levels(load, monkeypatch):
    script, levels = load("procgen"), []

    def make_env(args, seeds, num_threads):
        levels.append(args.num_levels)
        return tiny_game.Catch(seeds, height=3)

    def act(params, obs, key, t):
        return script.Behaviour(np.ones(len(obs), int), None, None)

    monkeypatch.setattr(script, "make_env", make_env)
    monkeypatch.setattr(script, "make_policy", lambda network: (act, None))
    script.play_games(script.Args(), None, None, 2)
    assert levels == [0]
