"""benchmark/ablations.py, its patches and its confidence interval, and benchmark/tiny_game.py, the game it plays."""

import math

import conftest
import numpy as np
import pytest

ablations = conftest.load("benchmark/ablations")
tiny_game = conftest.load("benchmark/tiny_game")


def play(pool, actions):
    """(rewards, terminated, truncated) of environment 0, step by step."""
    steps = [pool.step(np.full(len(pool.env), action))[1:4] for action in actions]
    return [[row[i][0].item() for row in steps] for i in range(3)]


def place(pool, column, paddle):
    pool.reset()
    pool.column[:], pool.paddle[:] = column, paddle


def test_a_caught_and_a_missed_block():
    """Three rows allow two moves. The step after the end only resets."""
    pool = tiny_game.Catch([1], height=3)
    place(pool, 5, 3)
    assert play(pool, [2, 2, 0]) == [[0, 1, 0], [False, True, False], [False] * 3]
    place(pool, 5, 3)
    assert play(pool, [2, 1])[0] == [0, 0]
    assert pool.scores == [1, 0]


def test_a_point_that_comes_late():
    """Nothing moves until the point arrives."""
    pool = tiny_game.Catch([1], height=3, delay=3)
    place(pool, 5, 3)
    assert play(pool, [2, 2, 0, 0, 0]) == [[0, 0, 0, 0, 1], [False] * 4 + [True], [False] * 5]


def test_a_point_before_the_end():
    pool = tiny_game.Catch([1], height=3, wait=2)
    place(pool, 5, 3)
    assert play(pool, [2, 2, 0, 0]) == [[0, 1, 0, 0], [False] * 3 + [True], [False] * 4]


def test_a_time_limit_and_a_door():
    pool = tiny_game.Catch([1], height=3, limit=5)
    place(pool, 5, 5)
    rewards, terminated, truncated = play(pool, [1] * 5)
    assert rewards[1] == 1  # a catch does not end the episode: a new block falls
    assert (terminated, truncated) == ([False] * 5, [False] * 4 + [True])
    place(pool, 5, 1)
    pool.over[:] = False
    assert play(pool, [0, 0])[:2] == [[0, tiny_game.DOOR], [False, True]]


@pytest.mark.parametrize("options", [{}, {"height": 3}, {"delay": 3}, {"wait": 3}])
def test_every_block_can_be_caught(options):
    pool, points, ends = tiny_game.Catch(list(range(32)), **options), 0, 0
    pool.reset()
    for _ in range(100):
        _, reward, terminated, _, _ = pool.step(1 + np.sign(pool.column - pool.paddle))
        points, ends = points + reward.sum(), ends + terminated.sum()
    assert points == ends > 100


@pytest.mark.parametrize("ablation", [a for a in ablations.ABLATIONS if a.patches], ids=lambda a: a.variant[:20])
def test_a_patch_takes_the_fix_out(script, ablation):
    """The script contains the text that is replaced, and the patched script loads."""
    path = conftest.ROOT / f"{script.__name__}.py"
    text = path.read_text()
    assert any(old in text for old in ablation.patches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablations.sys.modules, path.stem, script)
        assert callable(ablations.load(path, ablation.patches).train)
        with pytest.raises(ValueError, match="has none of: nowhere"):
            ablations.load(path, {"nowhere": ""})


@conftest.one_fast
def test_a_run_that_plays_on_with_the_last_parameters(script, monkeypatch, tmp_path):
    """Only the game with a time limit does this. The test undoes what a worker does to its process."""
    (index,) = (i for i, ablation in enumerate(ablations.ABLATIONS) if "limit" in ablation.game)
    monkeypatch.setattr(ablations.tempfile, "tempdir", str(tmp_path))
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(ablations.sys, name, None)
    monkeypatch.setitem(ablations.sys.modules, script.__name__, script)
    row = ablations.run((conftest.ROOT / f"{script.__name__}.py", index, False, 1, 2048))
    assert (row["script"], row["fixed"]) == (script.__name__, False)
    assert row["score"] > row["score_of_all_games"] > 0  # games without the limit can last longer


def test_no_text_of_a_patch_is_out_of_date():
    """Every text that a patch replaces is still in a script, even if only one algorithm has it."""
    scripts = [(conftest.ROOT / f"{name}.py").read_text() for name in conftest.SCRIPTS]
    for old in {old for ablation in ablations.ABLATIONS for old in ablation.patches}:
        assert any(old in text for text in scripts), old


@pytest.mark.parametrize("words", [[], ["nowhere.py"]])
def test_scripts_are_needed(monkeypatch, words):
    monkeypatch.setattr(ablations.sys, "argv", ["ablations.py", *words])
    with pytest.raises(SystemExit, match=r"must be scripts\. For example: cleanba_ppo_envpool\.py"):
        ablations.main()


def test_the_interval_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.3027."""
    mean, low, high = ablations.interval(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert mean == 2
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert math.isnan(ablations.interval(np.array([1.0]), np.array([0.0]))[1])
