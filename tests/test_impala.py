"""V-trace and IMPALA's loss, against rlax, hand-worked numbers and independent formulas."""

import conftest
import jax
import numpy as np
import optax
import pytest
import rlax
import test_learner


@pytest.fixture
def script():
    return conftest.load("cleanba_impala_envpool")


def make_rollout(script, reward, terminated, done):
    """A rollout with one environment per column and only the fields that V-trace needs."""
    column = lambda x, dtype: np.asarray(x, dtype).reshape(len(x), -1)
    done = column(done, bool)
    reset = np.concatenate([np.zeros((1, done.shape[1]), bool), done])
    obs = np.zeros((*reset.shape, 4, 8, 8), np.uint8)
    return script.Rollout(obs, reset, column(reward, np.float32), column(terminated, bool), None)


def test_vtrace_by_hand(script):
    """gamma 0.5; a termination (row 1), its reset row (2), a time limit (row 4), its reset row (5); rho 0.5 in row 3.

    row 6: 1 + 0.5 * 16 - 4 = 5                          bootstrapped from V(obs[T])
    row 5: a reset row, 0
    row 4: rho 2, clipped to 1: 2 + 0.5 * 8 - 2 = 4      a time limit: bootstrapped, trace cut
    row 3: 0.5 * (1 + 0.5 * 2 - 4) = -1;  -1 + 0.5 * 0.5 * 4 = 0
    row 2: a reset row, 0
    row 1: 3 + 0 - 2 = 1                                 terminated: neither bootstrapped nor traced
    row 0: 1 + 0.5 * 2 - 1 = 1;  1 + 0.5 * 1 = 1.5
    """
    rollout = make_rollout(
        script, reward=[1, 3, 0, 1, 2, 0, 1], terminated=[0, 1, 0, 0, 0, 0, 0], done=[0, 1, 0, 0, 1, 0, 0]
    )
    value = np.array([1, 2, 7, 4, 2, 8, 4, 16], np.float32)[:, None]
    rho = np.array([1, 1, 1, 0.5, 2, 1, 1], np.float32)[:, None]
    error = script.vtrace(rollout, value, rho, 0.5)
    np.testing.assert_array_equal(error[:, 0], [1.5, 1, 0, 0, 4, 0, 5])


@pytest.mark.parametrize("seed", range(5))
def test_vtrace_against_rlax(script, seed):
    """V-trace equals rlax's without time limits and reset rows. Under these clips rlax's advantage is the same."""
    rng = np.random.default_rng(seed)
    steps, gamma = 30, 0.97
    terminated = rng.random(steps) < 0.1
    reward, value, rho = rng.normal(size=steps), rng.normal(size=steps + 1), np.exp(rng.normal(size=steps))
    rollout = make_rollout(script, reward, terminated, terminated)
    rollout = rollout._replace(is_reset_row=np.zeros_like(rollout.is_reset_row))._replace(
        is_reset_row=np.concatenate([[False], terminated])[:, None]
    )
    as32 = lambda x: np.asarray(x, np.float32)
    expected = rlax.vtrace_td_error_and_advantage(
        as32(value[:-1]), as32(value[1:]), as32(reward), as32(gamma * ~terminated), as32(rho)
    )
    error = script.vtrace(rollout, as32(value)[:, None], as32(rho)[:, None], gamma)[:, 0]
    live = ~rollout.is_reset_row[:-1, 0]
    np.testing.assert_allclose(error[live], expected.errors[live], atol=1e-5)
    np.testing.assert_allclose(error[live], expected.pg_advantage[live], atol=1e-5)


def true_values(reward, terminated, reset, gamma, bootstrap):
    """The true value of every row: the rewards up to the end, then nothing or `bootstrap`."""
    value = np.zeros(len(reward) + 1)
    value[-1] = bootstrap
    for t in reversed(range(len(reward))):
        if reset[t]:
            value[t] = 3.0  # the value of a last observation may be anything
        else:
            value[t] = reward[t] + (0.0 if terminated[t] else gamma * value[t + 1])
    return value


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_no_error_where_values_are_right(script, gamma, steps):
    """On-policy, true values make every error zero, but not with rewards one row early or late."""
    rng = np.random.default_rng(steps)
    done = np.zeros(steps, bool)
    done[2::4] = True
    terminated = done & (np.arange(steps) % 8 == 2)
    reset = np.concatenate([[False], done])
    reward = np.where(reset[:-1], 0, rng.integers(1, 9, steps))
    value = true_values(reward, terminated, reset, gamma, 2.0).astype(np.float32)[:, None]
    rho = np.ones((steps, 1), np.float32)
    error = lambda reward: script.vtrace(make_rollout(script, reward, terminated, done), value, rho, gamma)
    np.testing.assert_allclose(error(reward), 0, atol=2e-5)
    for shift in (1, -1):
        assert np.abs(error(np.roll(reward, shift))).max() > 0.5


def reference_loss(script, network, params, rollout, args):
    """IMPALA's loss in NumPy, row by row, with V-trace as a sum forward in time (eq. 1 of the paper)."""
    steps, envs = rollout.reward.shape
    logits, value = (np.asarray(x, np.float64) for x in network.apply(params, rollout.obs.reshape(-1, 4, 16, 16)))
    logits, value = logits.reshape(steps + 1, envs, -1), value.reshape(steps + 1, envs)
    log_softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    policy, behaviour = log_softmax(logits), log_softmax(rollout.behaviour.logits.astype(np.float64))
    total = 0.0
    for env in range(envs):
        for t in range(steps):
            if rollout.is_reset_row[t, env]:
                continue
            action = rollout.behaviour.action[t, env]
            error, product = 0.0, 1.0
            for k in range(t, steps):
                a = rollout.behaviour.action[k, env]
                rho = min(1.0, np.exp(policy[k, env, a] - behaviour[k, env, a]))
                following = 0 if rollout.terminated[k, env] else value[k + 1, env]
                error += product * rho * (rollout.reward[k, env] + args.gamma * following - value[k, env])
                product *= args.gamma * rho
                if rollout.is_reset_row[k + 1, env]:
                    break
            entropy = -(np.exp(policy[t, env]) * policy[t, env]).sum()
            total += -error * policy[t, env, action] + args.vf_coef * 0.5 * error**2 - args.ent_coef * entropy
    return total


def test_loss_against_the_paper(script):
    rollout, network, args = test_learner.noise(script), test_learner.Network(), script.Args()
    params = network.init(jax.random.key(0), rollout.obs[0])
    loss, metrics = script.impala_loss(params, network.apply, rollout, args)
    assert float(loss) == pytest.approx(reference_loss(script, network, params, rollout, args), rel=1e-4)
    assert metrics["weight"] == (~rollout.is_reset_row[:-1]).sum()


def test_the_learner_sums_over_the_whole_minibatch(script):
    """With four shards in one minibatch, the gradient is that of the sum over all environments, not a mean of four."""
    rollout, network = test_learner.noise(script), test_learner.Network()
    _, _, metrics = test_learner.update(script, rollout, num_minibatches=1)
    params = network.init(jax.random.key(0), rollout.obs[0])
    gradient, sums = jax.grad(script.impala_loss, has_aux=True)(params, network.apply, rollout, script.Args())
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    for name in ("policy_loss", "value_loss", "entropy", "rho_mean", "rho_clipped"):
        assert metrics[name] == pytest.approx(float(sums[name] / sums["weight"]), rel=1e-4), name
    assert metrics["rho_max"] == pytest.approx(float(sums["rho_max"]), rel=1e-6)


def test_optimizer_is_rmsprop_whose_squares_start_at_one(script):
    """square <- 0.99 square + 0.01 g^2, from 1; step = rate * g / (sqrt(square) + 0.01)."""
    args = script.Args(anneal_lr=False, max_grad_norm=1e9)
    optimizer, _ = script.make_optimizer(args, script.check_args(args))
    params = {"w": np.array([1.0, -2.0], np.float32)}
    state, square = optimizer.init(params), np.ones(2)
    for g in ([0.1, 3.0], [-0.2, 0.0], [5.0, 0.5]):
        g = np.array(g, np.float32)
        updates, state = optimizer.update({"w": g}, state, params)
        square = 0.99 * square + 0.01 * g**2
        np.testing.assert_allclose(updates["w"], -args.learning_rate * g / (np.sqrt(square) + 0.01), rtol=1e-5)
