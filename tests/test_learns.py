"""benchmark/learns.py: which runs have learned, and how the random policy plays."""

import sys

import conftest
import numpy as np
import pytest

learns = conftest.load("benchmark/learns")


def play(monkeypatch, *flags, chance=4.0):
    """Run the command line. Every game of the random policy scores `chance`."""
    monkeypatch.setattr(learns, "random_scores", lambda script, args, games: [chance] * games)
    monkeypatch.setattr(sys, "argv", ["learns.py", str(conftest.ROOT / "cleanba_ppo_envpool.py"), *flags])
    learns.main()


def run_of(scores, games=50, status="finished", **run):
    """A run of 1,000 steps with one log for each score."""
    part = 1000 // len(scores)
    logs = [(part * (i + 1), i + 1, score, games) for i, score in enumerate(scores)]
    path = conftest.write_run(logs, **run, status=status, mean_score=scores[-1])
    text = (path / "run.json").read_text().replace('"args": {', '"args": {"img_size": 42, ')
    (path / "run.json").write_text(text[:-1] + ', "platform": {"script": "cleanba_ppo_envpool"}}')
    return path


def test_a_run_that_learned(monkeypatch, capsys):
    run_of([4, 6, 8, 12])
    play(monkeypatch, "runs")
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[2:-1]]
    assert cells == ["1000", "0.1", "4.0", "4.0", "6.0", "8.0", "12.0", "12.0", "3.0 x", "yes"]


@pytest.mark.parametrize(
    ("scores", "run"),
    [
        ([4, 6, 8, 11], {}),  # less than three times the random score
        ([4, 6, 13, 12], {}),  # no longer rising
        ([4, 6, 8, 12], dict(games=12)),  # 48 games in all
        ([4, 6, 8, 12], dict(status="interrupted")),
    ],
)
def test_a_run_that_did_not(monkeypatch, capsys, scores, run):
    run_of([4, 6, 8, 12])
    run_of(scores, seed=2, **run)
    with pytest.raises(SystemExit, match="1 of 2 runs have not learned"):
        play(monkeypatch, "runs")
    last = [line.split("|")[-2].strip() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert last == ["yes", "no"]


def test_what_is_not_whole_is_named_and_the_others_are_judged(monkeypatch, capsys):
    """A run with half a summary counts as unfinished. A run with a damaged run.json is passed over."""
    run_of([4, 6, 8, 12])
    unfinished = run_of([4, 6, 8, 12], seed=2) / "summary.json"
    unknown = run_of([4, 6, 8, 12], seed=3) / "run.json"
    unfinished.write_text('{"status": "finished", "mean')
    unknown.write_text("")
    with pytest.raises(SystemExit, match="2 of 3 runs have not learned"):
        play(monkeypatch, "runs")
    out, err = capsys.readouterr()
    assert [line.split("|")[-2].strip() for line in out.splitlines()[2:]] == ["yes", "no"]
    for path in (unfinished, unknown):
        assert f"{path} counts as missing, as it cannot be read: " in err
    assert f"{unknown.parent} is passed over: " in err


def test_nothing_to_judge(monkeypatch, capsys):
    (run_of([4, 6, 8, 12]) / "run.json").write_text("")
    with pytest.raises(SystemExit) as end:
        play(monkeypatch, "runs")
    assert end.value.code == 2
    assert "error: RUNS runs: no run there has logged what can be judged" in capsys.readouterr().err


def test_the_last_games_count_not_the_last_quarter(monkeypatch, capsys):
    """The last quarter has 100 games, and only the later 50 count."""
    run_of([4, 4, 6, 6, 8, 8, 9, 12])
    play(monkeypatch, "runs")
    assert capsys.readouterr().out.splitlines()[-1].split("|")[-5:-2] == [" 10.5 ", " 12.0 ", " 3.0 x "]


def test_no_multiple_of_nothing(monkeypatch, capsys):
    run_of([4, 6, 8, 12], game="Freeway-v5")
    with pytest.raises(SystemExit):
        play(monkeypatch, "runs", chance=0.0)
    assert "chance scores 0 in Freeway-v5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cleanba_ppo_envpool.py"], "RUNS (empty): name directories of runs"),
        (["cleanba_impala_envpool.py", "runs"], "is one of cleanba_ppo_envpool.py. For example: cleanba_ppo"),
        (["nowhere.py", "runs"], "error: SCRIPT "),
    ],
)
def test_a_wrong_command_says_why(monkeypatch, capsys, words, message):
    run_of([4, 6, 8, 12])
    monkeypatch.setattr(sys, "argv", ["learns.py", str(conftest.ROOT / words[0]), *words[1:]])
    with pytest.raises(SystemExit):
        learns.main()
    assert message in capsys.readouterr().err


def test_a_random_policy_plays_whole_games_with_all_actions(script, monkeypatch):
    """Games have 3 steps, score the sum of their actions, and have a reset step between them."""
    played = []

    class Pool:
        def reset(self):
            self.over, self.age = np.zeros(16, bool), 0
            return np.zeros((16, 4, 8, 8), np.uint8), {}

        def step(self, action):
            played.append(action)
            points, self.age = action * ~self.over, (self.age + 1) % 4
            self.over = np.full(16, self.age == 3)
            info = {"reward": points, "terminated": self.over.astype(np.int32)}
            return np.zeros((16, 4, 8, 8), np.uint8), np.sign(points), self.over, np.zeros(16, bool), info

    monkeypatch.setattr(script, "make_env", lambda args, seeds, num_threads: len(set(seeds)) == 16 and Pool())
    scores = learns.random_scores(script, script.Args(env_id="RoadRunner-v5"), 40)
    actions = np.stack(played)
    assert actions.shape == (11, 16)  # three games in 16 environments
    assert scores == np.stack([actions[i : i + 3].sum(0) for i in (0, 4, 8)]).ravel()[:40].tolist()
    assert set(actions.ravel()) == set(range(18))
