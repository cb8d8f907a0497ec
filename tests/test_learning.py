"""Do the scripts learn a tiny game of a block and a paddle, with the real actors, hand-off and learner?"""

import time

import conftest
import numpy as np
import pytest

tiny_game = conftest.load("benchmark/tiny_game")
FLAGS = tiny_game.FLAGS | dict(log_frequency=10**6)
TUNED = {True: dict(total_timesteps=45_000), False: dict(total_timesteps=100_000)}  # PPO; IMPALA


def play(script, monkeypatch, **flags):
    """Mean score of the last 100 games of a run on the tiny game."""
    monkeypatch.setattr(script, "env_spec", tiny_game.env_spec)
    monkeypatch.setattr(script, "make_env", lambda args, seeds, num_threads: tiny_game.Catch(seeds))
    ppo = hasattr(script, "ppo_loss")
    return script.train(script.Args(**FLAGS | tiny_game.TUNED[ppo] | TUNED[ppo] | flags))["mean_score"]


@conftest.algorithms_fast
def test_it_learns(script, monkeypatch):
    assert play(script, monkeypatch) >= 0.9


@pytest.mark.slow
def test_it_learns_in_half_a_minute(script, monkeypatch):
    """In the slow suite, as time depends on the machine: on two threads of one core IMPALA took 35 s and PPO 37 s."""
    start = time.process_time()  # CPU time, because other programs may slow the machine
    assert play(script, monkeypatch) >= 0.9
    assert time.process_time() - start < 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_it_learns_with_any_seed(script, monkeypatch, seed):
    assert play(script, monkeypatch, seed=seed) >= 0.9


@pytest.mark.slow
def test_it_does_not_learn_from_the_reward_before(script, monkeypatch):
    """Each action is paired with the reward before it, and episodes end where they did."""
    step = script.Envs.step

    def shifted(self, action):
        before = getattr(self, "before", np.zeros(len(action), np.float32))
        self.before, terminated = step(self, action)
        return before, terminated

    monkeypatch.setattr(script.Envs, "step", shifted)
    assert play(script, monkeypatch) < 0.5


@pytest.mark.slow
def test_it_does_not_learn_with_the_sign_flipped(script, monkeypatch):
    """Only the policy term of the loss changes its sign, so good actions become less likely."""
    name = "ppo_loss" if hasattr(script, "ppo_loss") else "impala_loss"
    loss = getattr(script, name)

    def flipped(*args):
        value, metrics = loss(*args)
        return value - 2 * metrics["policy_loss"], metrics

    monkeypatch.setattr(script, name, flipped)
    assert play(script, monkeypatch) < 0.5


def test_the_game_can_be_lost_and_won():
    """A random policy stays far below 0.9, and a perfect one catches every block."""
    pool, rng = tiny_game.Catch(list(range(64))), np.random.default_rng(0)
    pool.reset()
    scores = {"random": [], "perfect": []}
    for name in scores:
        for _ in range(200):
            perfect = 1 + np.sign(pool.column - pool.paddle)
            _, reward, over, _, _ = pool.step(perfect if name == "perfect" else rng.integers(0, 3, 64))
            scores[name] += reward[over].tolist()
    assert np.mean(scores["perfect"][100:]) == 1
    assert 0.05 < np.mean(scores["random"]) < 0.3
