"""The Atari protocol of each script on real games."""

import numpy as np
import pytest

STICKY = {"episodic_life": False, "repeat_action_probability": 0.25, "noop_max": 1, "full_action_space": True}
IMPALA = {"episodic_life": True, "repeat_action_probability": 0.0, "noop_max": 30, "full_action_space": False}
PROTOCOL = {
    "cleanba_ppo_envpool": STICKY,
    "cleanba_impala_envpool": STICKY,
    "cleanba_ppo_envpool_impala_atari_wrapper": IMPALA,
}


def test_options(script):
    common = {"max_episode_steps": 27_000, "reward_clip": True, "img_height": 84, "img_width": 84}
    assert script.env_options(script.Args()) == PROTOCOL[script.__name__] | common


def test_number_of_actions(script):
    """Sticky actions come with the full action set; IMPALA's protocol with the game's own."""
    counts = [script.env_spec(script.Args(env_id=game))[1] for game in ("Breakout-v5", "Pong-v5", "Alien-v5")]
    assert counts == ([18, 18, 18] if PROTOCOL[script.__name__] is STICKY else [4, 6, 18])


class Record:
    """A pool that keeps what it said."""

    def __init__(self, pool):
        self.pool, self.rows, self.reset = pool, [], pool.reset

    def step(self, action):
        row = self.pool.step(action)
        self.rows.append((row[2].copy(), row[3].copy(), {key: np.array(row[4][key]) for key in KEYS}))
        return row


KEYS = ("reward", "terminated", "lives", "elapsed_step")


@pytest.fixture
def played(script):
    """Breakout, played at random long enough to lose games: the Envs, its reset rows, and what the pool said."""
    args = script.Args(img_size=16)
    pool = Record(script.make_env(args, script.env_seeds(1, 0, 0, 4), 2))
    envs, rng, resets, terminations = script.Envs(pool), np.random.default_rng(0), [], []
    actions = script.env_spec(args)[1]
    for _ in range(900):
        resets.append(envs.reset)
        _, terminated = envs.step(rng.integers(0, actions, 4).astype(np.int32))
        terminations.append(terminated)
    return envs, np.stack(resets), np.stack(terminations), pool.rows


def test_lost_lives(script, played):
    """Under IMPALA's protocol a lost life terminates, and the row after it is wasted although the game goes on."""
    _, resets, terminated, rows = played
    lives = np.stack([info["lives"] for *_, info in rows])
    elapsed = np.stack([info["elapsed_step"] for *_, info in rows])
    lost = (np.diff(lives, axis=0, prepend=lives[:1]) < 0) & (lives > 0)
    assert lost.sum() > 10
    if PROTOCOL[script.__name__] is IMPALA:
        assert terminated[lost].all()
        after = np.argwhere(lost[:-1])
        assert all(resets[t + 1, env] for t, env in after)
        assert all(elapsed[t + 1, env] > 0 for t, env in after)  # elapsed_step would not tell
    else:
        assert not terminated[lost].any()
    assert (resets[1:] == terminated[:-1]).all()


def test_scores_are_sums_over_whole_games(played):
    envs, resets, _, rows = played
    reward = np.stack([info["reward"] for *_, info in rows])
    over = np.stack([info["terminated"].astype(bool) | truncated for _, truncated, info in rows])
    expected = []
    for env in range(4):
        start = 0
        for t in np.flatnonzero(over[:, env]):
            expected.append((reward[start : t + 1, env].sum(), (~resets[start : t + 1, env]).sum()))
            start = t + 1
    assert len(expected) > 4
    assert sorted(envs.games) == sorted(expected)
