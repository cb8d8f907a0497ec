"""PPO's estimates and loss, against hand-worked numbers and independent formulas, for both PPO scripts."""

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_learner


@pytest.fixture(params=[name for name in conftest.SCRIPTS if "ppo" in name])
def script(request):
    return conftest.load(request.param)


def make_rollout(script, reward, value, last_value, terminated, done):
    """A rollout from per-step lists of one environment, or [T, B] arrays."""
    column = lambda x, dtype: np.asarray(x, dtype).reshape(len(x), -1)
    done = column(done, bool)
    reset = np.concatenate([np.zeros((1, done.shape[1]), bool), done])
    zeros = np.zeros_like(column(reward, np.float32))
    behaviour = script.Behaviour(zeros.astype(np.int32), zeros, column(value, np.float32))
    obs = np.zeros((*reset.shape, 4, 8, 8), np.uint8)
    reward, terminated = column(reward, np.float32), column(terminated, bool)
    return script.Rollout(obs, reset, reward, terminated, behaviour, np.asarray(last_value, np.float32).reshape(1, -1))


def test_gae_by_hand(script):
    """gamma 0.5, lambda 0.5: a termination (row 1), its reset row (2), a time limit (row 4), its reset row (5).

    row 6: 1 + 0.5 * 16 - 4 = 5                       bootstrapped from last_value
    row 5: a reset row, 0
    row 4: 2 + 0.5 * V(5)=8 - 2 = 4                   a time limit: bootstrapped, trace cut
    row 3: 1 + 0.5 * 2 - 4 = -2;  -2 + 0.25 * 4 = -1
    row 2: a reset row, 0
    row 1: 3 + 0 - 2 = 1                              terminated: neither bootstrapped nor traced
    row 0: 1 + 0.5 * 2 - 1 = 1;  1 + 0.25 * 1 = 1.25
    """
    rollout = make_rollout(
        script,
        reward=[1, 3, 0, 1, 2, 0, 1],
        value=[1, 2, 7, 4, 2, 8, 4],
        last_value=[16],
        terminated=[0, 1, 0, 0, 0, 0, 0],
        done=[0, 1, 0, 0, 1, 0, 0],
    )
    estimate = script.compute_gae(rollout, 0.5, 0.5)
    np.testing.assert_array_equal(estimate.advantage[:, 0], [1.25, 1, 0, -1, 4, 0, 5])
    np.testing.assert_array_equal(estimate.target[:, 0], [2.25, 3, 0, 3, 6, 0, 9])
    np.testing.assert_array_equal(estimate.weight[:, 0], [1, 1, 0, 1, 1, 0, 1])


def random_rollout(script, seed, steps=40, envs=6):
    rng = np.random.default_rng(seed)
    done = np.zeros((steps, envs), bool)
    for t in range(steps):
        done[t] = (rng.random(envs) < 0.2) & ~done[t - 1]
    terminated = done & (rng.random((steps, envs)) < 0.5)
    reward, value, last = rng.normal(size=(steps, envs)), rng.normal(size=(steps, envs)), rng.normal(size=envs)
    reset = np.concatenate([np.zeros((1, envs), bool), done])
    return make_rollout(script, np.where(reset[:-1], 0, reward), value, last, terminated, done)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_against_a_loop(script, gamma, gae_lambda):
    """The definition, forward: A_t = sum over k of (gamma lambda)^k delta_(t+k), up to the end of the episode."""
    rollout = random_rollout(script, 0)
    estimate = script.compute_gae(rollout, gamma, gae_lambda)
    value = np.concatenate([rollout.behaviour.value, rollout.last_value]).astype(np.float64)
    steps, envs = rollout.reward.shape
    for env in range(envs):
        for t in range(steps):
            total, factor = 0.0, 1.0
            if not rollout.is_reset_row[t, env]:
                for k in range(t, steps):
                    next_value = 0 if rollout.terminated[k, env] else value[k + 1, env]
                    total += factor * (rollout.reward[k, env] + gamma * next_value - value[k, env])
                    factor *= gamma * gae_lambda
                    if rollout.is_reset_row[k + 1, env]:
                        break
            assert estimate.advantage[t, env] == pytest.approx(total, abs=2e-5)


def linear(params, obs):
    """A tiny network: logits and value are linear in the first pixels."""
    x = obs[:, 0, 0, :3] / 255.0
    return x @ params["policy"] + params["bias"], x @ params["value"]


def linear_params(seed=0):
    rng = np.random.default_rng(seed)
    return {"policy": rng.normal(size=(3, 5)), "bias": rng.normal(size=5), "value": rng.normal(size=3)}


def make_minibatch(script, params, rows=64, shift=0.0, seed=1):
    """Rows whose behaviour policy is `params` plus noise of size `shift`. Every fourth row has no weight."""
    rng = np.random.default_rng(seed)
    obs = rng.integers(0, 256, (rows, 4, 8, 8), dtype=np.uint8)
    action = rng.integers(0, 5, rows).astype(np.int32)
    logits, value = linear(params, obs)
    log_policy = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    logprob = log_policy[np.arange(rows), action] + shift * rng.normal(size=rows)
    weight = (np.arange(rows) % 4 > 0) * rng.random(rows)
    behaviour = script.Behaviour(action, logprob, value)
    return script.Minibatch(obs, behaviour, rng.normal(size=rows), rng.normal(size=rows), weight / weight.sum())


def test_first_policy_loss_is_minus_the_mean_advantage(script):
    params = linear_params()
    minibatch = make_minibatch(script, params)
    minibatch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if x.dtype == np.float64 else x, minibatch)
    _, metrics = script.ppo_loss(params, linear, minibatch, script.Args())
    assert metrics["policy_loss"] == pytest.approx(-float(np.sum(minibatch.weight * minibatch.advantage)), abs=1e-6)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clipfrac"] == 0


def reference_loss(params, minibatch, args):
    """PPO's loss in float64 NumPy, written from the paper with a sum over rows."""
    logits, value = linear(params, minibatch.obs)
    policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    total = 0.0
    for i, weight in enumerate(minibatch.weight):
        ratio = policy[i, minibatch.behaviour.action[i]] / np.exp(minibatch.behaviour.logprob[i])
        advantage = minibatch.advantage[i]
        bounded = min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef)
        objective = min(ratio * advantage, bounded * advantage)
        entropy = -(policy[i] * np.log(policy[i])).sum()
        total += weight * (
            -objective + args.vf_coef * 0.5 * (value[i] - minibatch.target[i]) ** 2 - args.ent_coef * entropy
        )
    return total


def test_gradient_against_float64_differences(script):
    params, args = linear_params(2), script.Args()
    minibatch = make_minibatch(script, linear_params(2), shift=0.1)
    with jax.enable_x64(True):
        (loss, _), gradient = jax.value_and_grad(script.ppo_loss, has_aux=True)(params, linear, minibatch, args)
        loss, gradient = float(loss), jax.device_get(gradient)
    assert loss == pytest.approx(reference_loss(params, minibatch, args), rel=1e-9)
    for name, leaf in params.items():
        for index in np.ndindex(leaf.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = {key: value.copy() for key, value in params.items()}
                moved[name][index] += step
                ends.append(reference_loss(moved, minibatch, args))
            assert gradient[name][index] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_rows_without_weight_have_no_gradient(script):
    params = linear_params()
    minibatch = make_minibatch(script, params, shift=0.1)
    other = make_minibatch(script, params, shift=0.1, seed=5)
    keep = lambda a, b: np.where((np.arange(64) % 4 > 0).reshape(-1, *[1] * (a.ndim - 1)), a, b)
    mixed = jax.tree.map(keep, minibatch, other)._replace(weight=minibatch.weight)
    assert not np.array_equal(mixed.obs, minibatch.obs)
    gradient = jax.grad(lambda p, m: script.ppo_loss(p, linear, m, script.Args())[0])
    assert jax.tree.all(jax.tree.map(np.array_equal, gradient(params, minibatch), gradient(params, mixed)))


def test_advantages_are_normalised_over_the_global_minibatch(script):
    """The learner's four shards have the gradient norm of one minibatch of the same rows, normalised by NumPy."""
    rollout = test_learner.noise(script, seed=3)
    _, _, metrics = test_learner.update(script, rollout, num_minibatches=1, update_epochs=1)
    estimate = jax.device_get(script.compute_gae(rollout, 0.99, 0.95))
    live = estimate.weight > 0
    advantage = (estimate.advantage - estimate.advantage[live].mean()) / estimate.advantage[live].std()
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    rows = (rollout.obs[:-1], rollout.behaviour, advantage, estimate.target, estimate.weight / live.sum())
    minibatch = script.Minibatch(*jax.tree.map(flat, rows))
    network = test_learner.Network()
    params = network.init(jax.random.key(0), rollout.obs[0])
    gradient, expected = jax.grad(script.ppo_loss, has_aux=True)(params, network.apply, minibatch, script.Args())
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    assert metrics["policy_loss"] == pytest.approx(float(expected["policy_loss"]), abs=1e-5)
    assert metrics["value_loss"] == pytest.approx(float(expected["value_loss"]), rel=1e-4)


def test_explained_variance(script):
    rng = np.random.default_rng(0)
    target, value = rng.normal(size=(4, 50)), rng.normal(size=(4, 50))
    moments = lambda t, v: {"target": t, "target_square": t * t, "error": t - v, "error_square": (t - v) ** 2}
    metrics = [{k: x.mean() for k, x in moments(t, v).items()} for t, v in zip(target, value, strict=True)]
    expected = 1 - (target - value).var() / target.var()
    assert script.summarise(metrics) == {"explained_variance": pytest.approx(expected)}
