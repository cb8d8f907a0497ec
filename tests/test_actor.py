"""The actor against a pool whose observations say where they come from."""

import gc
import threading
import weakref
from collections import defaultdict

import jax
import numpy as np
import pytest


def counting_policy(script):
    """Acts t modulo 4. The rest of a rollout comes from the script's own act, with a stub network."""

    def apply(params, obs):
        t = obs[:, 0, 0, 1].astype(np.int32)
        return 1e4 * jax.nn.one_hot(t % 4, 4), t.astype(np.float32)

    class Network:
        pass

    network = Network()
    network.apply = apply
    return script.make_policy(network)


def rollouts(script, pool, count, num_steps):
    envs, policy, seconds = script.Envs(pool), counting_policy(script), defaultdict(float)
    return envs, [script.collect(envs, policy, {}, jax.random.key(i), num_steps, seconds) for i in range(count)]


def test_rows_line_up(script, counting_pool):
    pool = counting_pool(num_envs=5)
    _, (first, second) = rollouts(script, pool, 2, num_steps=11)
    for rollout in (first, second):
        assert rollout.obs.shape == (12, 5, 4, 8, 8)
        assert rollout.obs.dtype == np.uint8
        assert rollout.is_reset_row.shape == (12, 5)
        assert rollout.reward.shape == rollout.terminated.shape == rollout.behaviour.action.shape == (11, 5)
    t = np.concatenate([first.obs[:-1], second.obs])[:, :, 0, 0, 1].astype(int)
    env = np.concatenate([first.obs[:-1], second.obs])[:, :, 0, 0, 0]
    assert (env == np.arange(5)).all()
    assert (first.obs[-1] == second.obs[0]).all()
    assert (first.is_reset_row[-1] == second.is_reset_row[0]).all()

    reset = np.concatenate([first.is_reset_row[:-1], second.is_reset_row])
    action = np.concatenate([first.behaviour.action, second.behaviour.action])
    reward = np.concatenate([first.reward, second.reward])
    terminated = np.concatenate([first.terminated, second.terminated])
    length = 3 + np.arange(5)
    assert (action == t[:-1] % 4).all()  # obs[t] -> action[t]
    assert (reward == np.where(reset[:-1], 0, t[:-1])).all()  # action[t] -> reward[t]
    assert (reset == (t == length)).all()  # a reset row is the observation that arrives with an end
    assert (t[1:] == np.where(reset[:-1], 0, t[:-1] + 1)).all()  # a reset row leads to a first observation
    assert (terminated == (reset[1:] & (np.arange(5) % 2 == 0))).all()  # a time limit does not terminate
    assert pool.log == list(zip(t[:-1, 0], action[:, 0], strict=True))


def test_one_program_plays(script, counting_pool):
    """The same program computes the value of the last observation. Parameters and key are on the actor's device."""
    envs, (act, last) = script.Envs(counting_pool(num_envs=5)), counting_policy(script)
    params, key = jax.device_put(({"unused": np.zeros(3, np.float32)}, jax.random.key(0)), jax.devices()[1])
    for _ in range(2):
        script.collect(envs, (act, last), params, key, 4, defaultdict(float))
    assert act._cache_size() == 1


def test_games_count_each_step_once(script, counting_pool):
    envs, _ = rollouts(script, counting_pool(num_envs=3), 2, num_steps=20)
    # environment i plays 3 + i steps with rewards 0, 1, ..., 2 + i (times 10 in the game's own points), then resets
    expected = {(10 * sum(range(3 + i)), 3 + i) for i in range(3)}
    assert set(envs.games) == expected
    assert len(envs.games) == sum(40 // (4 + i) + (40 % (4 + i) >= 3 + i) for i in range(3))


def played(script, monkeypatch, pool, actor_id, updates):
    """Yield what one actor delivers for `updates`, with uniform logits."""
    network = type("Network", (), {"apply": lambda self, params, obs: (np.zeros((len(obs), 6)), np.zeros(len(obs)))})()
    monkeypatch.setattr(script, "make_env", lambda args, seeds, num_threads: pool(len(seeds)))
    monkeypatch.setattr(script, "ship", lambda rollout, *where: rollout)
    args = script.Args(num_steps=8, local_num_envs=4, num_actor_threads=1, checkpoint_frequency=1)
    sizes = script.Sizes(1, 32, 1, 8)
    devices = script.Devices({actor_id: jax.devices()[0]}, None, None, None)
    handoff = script.HandOff(devices.actors, False)
    with script.playing(args, sizes, devices, script.make_policy(network), handoff, jax.random.key(0), updates):
        for update in updates:
            handoff.give_params(update - 1, {})
            yield handoff.get_rollouts(update)[0]


def test_actions_depend_on_actor_and_update_alone(script, counting_pool, monkeypatch):
    """Random actions depend on (actor, update) and on nothing that came before."""

    def actions(actor_id, updates):
        deliveries = played(script, monkeypatch, counting_pool, actor_id, updates)
        return [delivery.pieces.behaviour.action for delivery in deliveries]

    first, second = actions(0, range(1, 3))
    assert (second == actions(0, range(2, 3))[0]).all()
    assert not (first == second).all()
    assert not (first == actions(1, range(1, 2))[0]).all()


def test_an_actor_that_is_stopped_ends(script, counting_pool, monkeypatch):
    """It ends in the middle of a rollout and while it waits for parameters, and its pool is freed."""
    pools = []
    make = lambda num_envs: pools.append(weakref.ref(pool := counting_pool(num_envs))) or pool
    for delivery in played(script, monkeypatch, make, 0, range(1, 9)):
        assert delivery.version == 0
        break  # leaves the actor waiting
    gc.collect()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("actor")] == []
    assert {pool() for pool in pools} == {None}
    stopped = threading.Event()
    stopped.set()
    envs = script.Envs(counting_pool(2))
    with pytest.raises(SystemExit):
        script.collect(envs, counting_policy(script), {}, jax.random.key(0), 4, defaultdict(float), stopped)
    assert envs.pool.log == []


@pytest.mark.parametrize("shard_envs", [1, 2, 3, 4, 6, 12])
def test_pieces_come_together_as_they_were(script, shard_envs):
    """Two actors have 6 environments each. Shards are smaller than an actor's part, larger, or cross its border."""
    args = script.Args(num_shards=12 // shard_envs, local_num_envs=6, num_actor_threads=2, num_minibatches=1)
    _, devices, _ = script.set_up(args)
    batch = np.arange(3 * 12).reshape(3, 12)
    rollout = lambda x: script.Rollout(**dict.fromkeys(script.Rollout._fields, x))
    deliveries = [
        script.Delivery(0, script.ship(rollout(batch[:, first : first + 6]), first, shard_envs, devices), [], {})
        for first in (0, 6)
    ]
    shards = script.assemble(deliveries)
    assert (np.concatenate([shard.reward for shard in shards], axis=1) == batch).all()
    assert {shard.reward.shape for shard in shards} == {(3, shard_envs)}
