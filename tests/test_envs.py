"""Seeds of environments, and the behaviour of the real EnvPool."""

import os

import numpy as np
import pytest


def play(script, envs, steps=60):
    """Every number that an agent would see, under fixed actions that differ by environment and step."""
    rows = []
    for t in range(steps):
        action = (np.arange(len(envs.obs)) * 7 + t * 5) % 6
        obs = envs.obs
        reward, terminated = envs.step(action.astype(np.int32))
        rows.append((obs.copy(), reward.copy(), terminated.copy(), envs.is_reset_row.copy()))
    return [np.stack(column) for column in zip(*rows, strict=True)]


def test_seeds_are_distinct(script):
    """They differ between 64 actors of 64 environments, neighbouring run seeds and generations of pools."""
    runs = [script.env_seeds(seed, generation, 0, 4096) for seed in (1, 2) for generation in (0, 1)]
    seeds = [seed for run in runs for seed in run]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**31) <= seed < 2**31 for seed in seeds)


def test_seeds_do_not_depend_on_the_split_into_actors(script):
    whole = script.env_seeds(3, 0, 0, 24)
    assert whole == [seed for first in range(0, 24, 8) for seed in script.env_seeds(3, 0, first, 8)]


@pytest.mark.parametrize("threads", [1, 3])
def test_streams_do_not_depend_on_the_split_into_pools(script, threads):
    args = script.Args(img_size=42, env_id="SpaceInvaders-v5")
    seeds = script.env_seeds(1, 0, 0, 6)
    whole = play(script, script.Envs(script.make_env(args, seeds, 2)))
    first = play(script, script.Envs(script.make_env(args, seeds[:2], threads)))
    # `play` chooses actions by the place in a pool, so only the first two environments get the same ones in both
    for together, apart in zip(whole, first, strict=True):
        np.testing.assert_array_equal(together[:, :2], apart)
    assert not np.array_equal(whole[0][:, 0], whole[0][:, 1])


def test_spec_agrees_with_the_pool(script):
    args = script.Args(img_size=42)
    shape, actions = script.env_spec(args)
    pool = script.make_env(args, [1, 2], 1)
    envs = script.Envs(pool)
    assert envs.obs.shape == (2, *shape) == (2, 4, 42, 42)
    assert pool.action_space.n == actions


def test_a_pool_that_is_dropped_ends_its_threads(script):
    threads = lambda: len(os.listdir("/proc/self/task"))
    before = threads()
    envs = script.Envs(script.make_env(script.Args(img_size=42), [1, 2, 3], 3))
    assert threads() >= before + 3
    del envs
    assert threads() <= before


def test_time_limit_on_real_games(script, monkeypatch):
    """A game cut by the time limit does not terminate, counts as a game, and is followed by one reset row."""
    options = script.env_options
    monkeypatch.setattr(script, "env_options", lambda args: options(args) | {"max_episode_steps": 10})
    args = script.Args(img_size=42, env_id="Pong-v5")
    envs = script.Envs(script.make_env(args, [1, 2], 1))
    _, _, terminated, reset = play(script, envs, 33)
    assert not terminated.any()
    assert [t for t in range(33) if reset[t].all()] == [9, 20, 31]
    assert reset.sum() == 6
    assert [length for _, length in envs.games] == [10] * 6
