"""The sharded learner on rollouts of noise: what may change its bits and what may not."""

import re

import conftest
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.training.train_state import TrainState

SMALL = dict(img_size=16, local_num_envs=8, num_actor_threads=2, num_steps=8, num_minibatches=2)


def noise(script, seed=0, steps=8, envs=16, actions=5):
    """A rollout of noise [time, env] with terminations, time limits and reset rows."""
    rng = np.random.default_rng(seed)
    reset = np.zeros((steps + 1, envs), bool)
    for t in range(1, steps + 1):
        reset[t] = (rng.random(envs) < 0.3) & ~reset[t - 1]
    terminated = reset[1:] & (rng.random((steps, envs)) < 0.5)
    obs = rng.integers(0, 256, (steps + 1, envs, 4, 16, 16), dtype=np.uint8)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    reward = np.where(reset[:-1], 0, normal(steps, envs)).astype(np.float32)
    shapes = {"action": (), "logprob": (), "value": (), "logits": (actions,)}
    fields = {name: normal(steps, envs, *shapes[name]) for name in script.Behaviour._fields}
    fields["action"] = rng.integers(0, actions, (steps, envs)).astype(np.int32)
    if "logprob" in fields:
        fields["logprob"] -= 2
    extra = {"last_value": normal(1, envs)} if "last_value" in script.Rollout._fields else {}
    return script.Rollout(obs, reset, reward, terminated, script.Behaviour(**fields), **extra)


class Network(nn.Module):
    """A network that compiles fast. Whole runs test the real one."""

    @nn.compact
    def __call__(self, obs):
        x = nn.relu(nn.Dense(16)(obs.reshape(len(obs), -1) / 255.0))
        return nn.Dense(5)(x), nn.Dense(1)(x)[:, 0]


def update(script, rollout, devices=(0,), count=1, **flags):
    """Parameters and metrics after `count` updates on the same rollout, on the given learner devices."""
    args = script.Args(**{**SMALL, "learner_device_ids": devices, "total_timesteps": 10**6, **flags})
    sizes, places, _ = script.set_up(args)
    network = Network()
    params = network.init(jax.random.key(0), rollout.obs[0])
    optimizer, _ = script.make_optimizer(args, sizes)
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optimizer)
    states = [jax.device_put(state, device) for device in places.learners]
    learn = script.make_update(args, network, places, sizes)
    pieces = script.ship(rollout, 0, sizes.shard_envs, places)
    shards = script.assemble([script.Delivery(0, pieces, [], {})])
    for i in range(count):
        states, metrics = learn(states, shards, jax.random.fold_in(jax.random.key(1), i))
    params = jax.device_get(states[0].params)
    for state in states:
        assert script.params_sha256(state.params) == script.params_sha256(params)
    return script.params_sha256(params), params, script.summarise(jax.device_get(metrics))


@conftest.ppo_fast
def test_devices_change_no_bit(script):
    results = [update(script, noise(script), devices, 2) for devices in [(0,), (1, 3), (0, 1, 2, 3)]]
    assert len({digest for digest, _, _ in results}) == 1
    assert results[0][2] == results[1][2] == results[2][2]
    assert all(np.isfinite(value) for value in results[0][2].values())


@pytest.mark.slow
def test_an_odd_number_of_shards_changes_no_bit(script):
    """12 shards on 1 and 3 devices: the tree has a level with an odd number of parts."""
    flags = {"num_shards": 12, "local_num_envs": 6, "num_minibatches": 1}
    results = [update(script, noise(script, envs=12), tuple(range(n)), **flags) for n in (1, 3)]
    assert len({digest for digest, _, _ in results}) == 1


@conftest.algorithms_fast
def test_other_data_other_bits(script):
    first, second = (update(script, noise(script, seed))[0] for seed in (0, 1))
    assert first != second


@conftest.algorithms_fast
def test_what_a_reset_row_says_changes_no_bit(script):
    """The reward of a reset row may be anything, and so may its value unless a time limit bootstraps from it."""
    rollout = noise(script)
    wasted = rollout.is_reset_row[:-1]
    after_time_limit = np.concatenate([np.zeros((1, 16), bool), (rollout.is_reset_row[1:] & ~rollout.terminated)[:-1]])
    assert wasted.sum() > 10
    changed = rollout._replace(reward=np.where(wasted, np.float32(1e6), rollout.reward))
    if "value" in script.Behaviour._fields:
        value = np.where(wasted & ~after_time_limit, np.float32(1e6), rollout.behaviour.value)
        assert (value == 1e6).any()
        changed = changed._replace(behaviour=rollout.behaviour._replace(value=value))
    assert update(script, rollout)[0] == update(script, changed)[0]
    live = rollout._replace(reward=np.where(wasted, rollout.reward, rollout.reward + 1))
    assert update(script, rollout)[0] != update(script, live)[0]


@conftest.algorithms_fast
def test_a_reset_rows_observation_and_action_teach_nothing(script):
    """Different pixels and actions in reset rows after a termination do not change the update."""
    rollout = noise(script)
    after_termination = np.concatenate([np.zeros((1, 16), bool), rollout.terminated])
    obs = np.where(after_termination[..., None, None, None], 255 - rollout.obs, rollout.obs)
    action = np.where(after_termination[:-1], (rollout.behaviour.action + 1) % 5, rollout.behaviour.action)
    changed = rollout._replace(obs=obs, behaviour=rollout.behaviour._replace(action=action))
    assert update(script, rollout)[0] == update(script, changed)[0]


@conftest.ppo_fast
@pytest.mark.parametrize("flags", [{"num_shards": 1}, {"num_shards": 16}, {"gradient_accumulation_steps": 2}])
def test_pieces_change_rounding_only(script, flags):
    """One minibatch over everything is the same sum with any number of shards or pieces, in a different order."""
    whole = {"num_minibatches": 1} | ({"update_epochs": 1} if hasattr(script.Args, "update_epochs") else {})
    base, other = (update(script, noise(script), **whole, **more) for more in ({}, flags))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), base[1], other[1])
    for name, value in base[2].items():
        assert other[2][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_learning_rate_falls_to_zero(script):
    args = script.Args(**SMALL, total_timesteps=10 * 128)
    sizes = script.check_args(args)
    _, rate = script.make_optimizer(args, sizes)
    assert sizes.updates == 10
    rates = [float(rate(update)) for update in range(1, 11)]
    np.testing.assert_allclose(rates, args.learning_rate * np.linspace(1, 0, 11)[:-1], rtol=1e-6)


def test_tree_sum_is_one_tree(script):
    """Parts in equal groups, each summed as on its own device, give the bits of the whole tree."""
    parts = [np.float32(x) for x in np.random.default_rng(0).normal(size=12) * 10.0 ** np.arange(12)]
    (whole,) = script.tree_sum(parts)
    p = parts
    level = [p[0] + p[1], p[2] + p[3], p[4] + p[5], p[6] + p[7], p[8] + p[9], p[10] + p[11]]
    level = [level[0] + level[1], level[2] + level[3], level[4] + level[5]]
    assert whole == (level[0] + level[1]) + level[2]
    for devices in (1, 2, 3, 4, 6, 12):
        own = 12 // devices
        lower = [script.tree_sum(parts[i : i + own], while_even=True) for i in range(0, 12, own)]
        assert script.tree_sum([x for sums in lower for x in sums]) == [whole]


def gradient_program(script, **flags):
    """The gradient of one shard as a jaxpr, with the script's own network of five actions."""
    args = script.Args(**SMALL, **flags)
    network, rollout, numbers = script.ActorCritic(5, (4,), (8,), args.compute_dtype), noise(script), np.arange(16)
    params = network.init(jax.random.key(0), rollout.obs[0])
    if hasattr(script, "ppo_loss"):
        estimate = script.compute_gae(rollout, 0.9, 0.9)
        rows = numbers.reshape(2, 1, 8)
        sums = script.minibatch_sums(estimate, rows)
        squares = script.minibatch_squares(estimate, rows, sums)
        data = script.ShardData(rollout, estimate, rows, sums, squares)
    else:
        data = script.ShardData(rollout, numbers.reshape(2, 1, 8), 0)
    gradient = lambda params, data: script.piece_gradient(network, args, params, data, 0, 0)
    return params, jax.make_jaxpr(gradient)(params, data), jax.eval_shape(gradient, params, data)


@conftest.algorithms_fast
def test_a_gradient_has_no_scatter_and_no_loop(script):
    """A GPU would sort for a scatter and launch the kernels of a loop step by step."""
    _, program, _ = gradient_program(script)
    text = str(program)
    assert "conv_general_dilated" in text
    assert not [word for word in ("scatter", "scan[", "while[") if word in text]


@conftest.algorithms_fast
def test_bfloat16(script):
    """Convolutions and hidden layers use 16 bits. Parameters, heads, losses and gradients use 32."""
    for dtype in ("float32", "bfloat16"):
        params, program, (gradient, metrics) = gradient_program(script, compute_dtype=dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves((params, gradient, metrics))} == {"float32"}
        short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        outputs = re.findall(r":(\w+)\[[\d,]*\] = (conv_general_dilated|dot_general)\[", str(program))
        assert {kind for kind, name in outputs if name == "conv_general_dilated"} == {short}
        assert {kind for kind, name in outputs if name == "dot_general"} == {short, "f32"}
