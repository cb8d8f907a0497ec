"""The Atari protocol of each script on real games."""

import ast
import re

import conftest
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
    """The protocol with sticky actions has the full action set, and IMPALA's has the game's own."""
    counts = [script.env_spec(script.Args(env_id=game))[1] for game in ("Breakout-v5", "Pong-v5", "Alien-v5")]
    assert counts == ([18, 18, 18] if PROTOCOL[script.__name__] is STICKY else [4, 6, 18])


def test_other_protocols_in_readme():
    """EnvPool accepts the options of each row, and they make the protocol that the row names."""
    ppo, _, wrapper = map(conftest.load, PROTOCOL)
    readme = (conftest.ROOT / "README.md").read_text()
    rows = []
    for row in re.findall(r"^\| \.\.\. .*$", readme, re.MULTILINE):
        rows.append({option: ast.literal_eval(value) for option, value in re.findall(r"`(\w+)=(\S+)`", row)})
    v5, atari_100k, not_sticky = rows
    protocol = lambda script, changes: (
        ppo.envpool.make_spec("Breakout-v5", **script.env_options(script.Args()) | changes).config
    )
    config = protocol(ppo, v5)
    assert (config.repeat_action_probability, config.noop_max, config.use_fire_reset) == (0.25, 1, False)
    assert (config.full_action_space, config.episodic_life) == (False, False)
    assert atari_100k == {}
    config = protocol(wrapper, atari_100k)
    assert (config.repeat_action_probability, config.noop_max, config.episodic_life) == (0, 30, True)
    config = protocol(ppo, not_sticky)
    assert (config.repeat_action_probability, config.noop_max, config.full_action_space) == (0, 30, True)


class Record:
    """A pool that records its answers."""

    def __init__(self, pool):
        self.pool, self.rows, self.reset = pool, [], pool.reset

    def step(self, action):
        row = self.pool.step(action)
        self.rows.append((row[2].copy(), row[3].copy(), {key: np.array(row[4][key]) for key in KEYS}))
        return row


KEYS = ("reward", "terminated", "lives", "elapsed_step")


@pytest.fixture
def played(script):
    """Breakout, played at random until games are lost: (Envs, reset rows, terminations, the pool's answers)."""
    args = script.Args(img_size=16)
    pool = Record(script.make_env(args, script.env_seeds(1, 0, 0, 4), 2))
    envs, rng, resets, terminations = script.Envs(pool), np.random.default_rng(0), [], []
    actions = script.env_spec(args)[1]
    for _ in range(900):
        resets.append(envs.is_reset_row)
        _, terminated = envs.step(rng.integers(0, actions, 4).astype(np.int32))
        terminations.append(terminated)
    return envs, np.stack(resets), np.stack(terminations), pool.rows


def test_lost_lives(script, played):
    """Under IMPALA's protocol a lost life terminates, and a reset row follows although the game goes on."""
    _, resets, terminated, rows = played
    lives = np.stack([info["lives"] for *_, info in rows])
    elapsed = np.stack([info["elapsed_step"] for *_, info in rows])
    lost = (np.diff(lives, axis=0, prepend=lives[:1]) < 0) & (lives > 0)
    assert lost.sum() > 10
    if PROTOCOL[script.__name__] is IMPALA:
        assert terminated[lost].all()
        after = np.argwhere(lost[:-1])
        assert all(resets[t + 1, env] for t, env in after)
        assert all(elapsed[t + 1, env] > 0 for t, env in after)  # elapsed_step does not show it
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


@conftest.wrapper_fast
@pytest.mark.parametrize("game", ["RoadRunner-v5", pytest.param("Atlantis-v5", marks=pytest.mark.slow)])
def test_games_that_end_among_the_no_ops_of_a_reset(script, game):
    """Under IMPALA's protocol EnvPool silently restarts such a game. The script counts it, with its own score.

    The expected count comes from the lives alone: a game ends where they are back at their starting number. RoadRunner
    has such games. Atlantis gives lives during play, which must not count. Nothing may count twice.
    """
    args = script.Args(img_size=16, env_id=game)
    pool = Record(script.make_env(args, script.env_seeds(1, 0, 0, 8), 2))
    envs, rng, resets = script.Envs(pool), np.random.default_rng(0), []
    full, actions = envs.lives.copy(), script.env_spec(args)[1]
    for _ in range(1500):
        resets.append(envs.is_reset_row)
        envs.step(rng.integers(0, actions, 8).astype(np.int32))
    column = lambda name: np.stack([info[name] for *_, info in pool.rows])
    lives, reward, resets = column("lives"), column("reward"), np.stack(resets)
    expected = []
    for env in range(8):
        starts = [t for t in np.flatnonzero(resets[:, env]) if lives[t, env] == full[env] > lives[t - 1, env]]
        starts += [1500] * bool(column("terminated")[-1, env])  # over in the last row and not restarted
        expected += [reward[a:b, env].sum() for a, b in zip([0, *starts], starts, strict=False)]
    assert sorted(score for score, _ in envs.games) == sorted(expected)
    silent = len(expected) - sum((i["terminated"].astype(bool) | truncated).sum() for _, truncated, i in pool.rows)
    assert (silent > 5) == (game == "RoadRunner-v5" and PROTOCOL[script.__name__] is IMPALA)


def test_a_game_over_at_the_last_step_is_no_time_limit(script, monkeypatch):
    """A game that is lost exactly at max_episode_steps terminates, and is not bootstrapped."""
    args = script.Args(img_size=16)

    def first_end(limit):
        options = script.env_options(args) | {"episodic_life": False, "max_episode_steps": limit}
        with monkeypatch.context() as patch:
            patch.setattr(script, "env_options", lambda args: options)
            envs = script.Envs(script.make_env(args, [1], 1))
        rng = np.random.default_rng(0)
        for t in range(2000):
            _, terminated = envs.step(rng.integers(0, 4, 1).astype(np.int32))
            if envs.game_over[0]:
                return t + 1, bool(terminated[0])
        raise AssertionError("the game does not end")

    length, terminated = first_end(27_000)
    assert terminated
    assert first_end(length) == (length, True)
    assert first_end(length - 1) == (length - 1, False)
