"""benchmark/plot.py: the figures, the table and the pictures that it makes of event files with known numbers."""

import math
import struct
import sys
from pathlib import Path

import conftest
import numpy as np
import pandas as pd
import pytest
from tensorboard.summary.writer.event_file_writer import EventFileWriter

plot = conftest.load("benchmark/plot")


def finished(logs, score, **run):
    return conftest.write_run(logs, status="finished", mean_score=score, **run)


@pytest.fixture
def figures(monkeypatch):
    """The pictures in drawing order. Without this fixture none are drawn, because that takes most of the time."""
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    plot.plt.close("all")


@pytest.fixture
def run_plot(monkeypatch, request):
    """Runs the command line and returns the table that it wrote."""
    if "figures" not in request.fixturenames:
        for draw in ("draw_curves", "draw_scores"):
            monkeypatch.setattr(plot, draw, lambda *_: None)

    def run_plot(*flags):
        monkeypatch.setattr(sys, "argv", ["plot.py", "--reps", "200", *flags])
        plot.main()
        return Path("plots/table.md").read_text()

    return run_plot


def cells(table, row):
    """The cells of the first line of the table that begins with `row`."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def png_size(path):
    return struct.unpack(">II", Path(path).read_bytes()[16:24])


def test_reference_table_gives_the_published_medians(run_plot):
    """Acceptance test: medians and mean minutes are those of the paper."""
    table = run_plot("--reference", "all")
    medians = {
        "cleanba_impala_1gpu": ("165.8 %", "136.5"),
        "cleanba_ppo_sync_1gpu": ("159.6 %", "215.9"),
        "cleanba_impala_8gpu": ("157.2 %", "21.9"),
        "cleanba_ppo_sync_8gpu": ("159.0 %", "36.8"),
        "cleanba_ppo_async_8gpu": ("136.1 %", "28.7"),
        "moolib_impala_1gpu": ("124.4 %", "163.5"),
        "monobeast_impala_1gpu": ("159.7 %", "929.8"),
    }
    for column, (median, minutes) in medians.items():
        games, _, found, *_, spent = cells(table, f"published {column}")
        assert (games, found, spent) == ("57", median, minutes)
    assert not Path("plots/steps.png").exists()


def test_a_curve_is_the_mean_of_seeds_with_their_range_as_band(run_plot):
    """Two seeds take 3,600 and 7,200 seconds for 1,000 steps, and their scores rise linearly."""
    finished([(s, 3.6 * s, s / 100, 1) for s in range(100, 1001, 100)], 10.0, seed=1)
    finished([(s, 7.2 * s, s / 50, 1) for s in range(100, 1001, 100)], 20.0, seed=2)
    run_plot("runs", "--points", "10")
    steps = pd.read_csv("plots/steps.csv")
    assert list(steps.columns) == ["experiment", "env_id", "steps", "mean", "low", "high", "seeds"]
    assert set(steps.experiment) == {"ppo"}
    assert set(steps.env_id) == {"Pong-v5"}
    assert set(steps.seeds) == {2}
    np.testing.assert_allclose(steps.steps, np.arange(100, 1001, 100))
    np.testing.assert_allclose(steps["mean"], 1.5 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(steps.low, np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(steps.high, 2.0 * np.arange(1, 11), rtol=1e-6)
    hours = pd.read_csv("plots/hours.csv")  # 0.2 to 2 hours; the first seed ends after one
    np.testing.assert_allclose(hours.hours, np.arange(1, 11) / 5, rtol=1e-6)
    np.testing.assert_array_equal(hours.seeds, [2] * 5 + [1] * 5)
    np.testing.assert_allclose(hours["mean"], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20], rtol=1e-6)
    assert hours.low[4] == pytest.approx(10.0)
    assert hours.low[5:].isna().all()


def test_between_two_points_games_count_alike_and_gaps_are_straight(run_plot):
    run = [(100, 1.0, 1.0, 3), (200, 2.0, 5.0, 1), (400, 4.0, 4.0, 1), (1000, 10.0, None, 0)]
    finished(run, 4.0)
    run_plot("runs", "--points", "5")
    steps = pd.read_csv("plots/steps.csv")
    # logs 1 and 2 merge at step 125 with score 2; a line leads to (400, 4); no game ends later, so the last score stays
    np.testing.assert_allclose(steps.steps, [200, 400, 600, 800, 1000])
    np.testing.assert_allclose(steps["mean"], [2 + 2 * 75 / 275, 4, 4, 4, 4], rtol=1e-6)


def test_a_curve_begins_with_the_first_finished_game(run_plot):
    finished([(250, 1.0, None, 0), (500, 2.0, 7.0, 1), (1000, 4.0, 9.0, 1)], 9.0)
    run_plot("runs", "--points", "4")
    steps = pd.read_csv("plots/steps.csv")
    assert list(steps.steps) == [500, 750, 1000]
    assert list(steps["mean"]) == [7, 8, 9]


def test_resumed_run_forgets_what_it_logged_twice(run_plot):
    """A run is killed after step 600 and resumed from the checkpoint of step 400. Its working time continues."""
    conftest.write_run([(s, 1.0 * s, 1.0, 1) for s in (200, 400, 600)])
    finished([(600, 650.0, 2.0, 1), (1000, 1100.0, 3.0, 1)], 3.0, purge_step=401)
    run_plot("runs", "--points", "5")
    steps, runs = pd.read_csv("plots/steps.csv"), pd.read_csv("plots/runs.csv")
    np.testing.assert_allclose(steps["mean"], [1, 1, 2, 2.5, 3])
    assert runs.hours[0] == pytest.approx(1100 / 3600)


def test_human_normalised_figures_by_hand(run_plot):
    """Pong: random -20.7, human 14.6. Breakout: random 1.7, human 30.5. Normalised: 0 and 1; 2 and 5."""
    score = lambda game, x: {"Pong-v5": -20.7 + x * 35.3, "Breakout-v5": 1.7 + x * 28.8}[game]
    for game, seed, x in [("Pong-v5", 1, 0), ("Pong-v5", 2, 1), ("Breakout-v5", 1, 2), ("Breakout-v5", 2, 5)]:
        finished([(1000, 60.0, 0.0, 1)], score(game, x), game=game, seed=seed)
    table = run_plot("runs")
    figures = pd.read_csv("plots/scores.csv")
    own = figures[figures.experiment == "ppo"].set_index("metric")
    assert own.value["median"] == pytest.approx((0.5 + 3.5) / 2)  # of the means of games
    assert own.value["mean"] == pytest.approx(2.0)
    assert own.value["IQM"] == pytest.approx(1.5)  # without the lowest and the highest of 0, 1, 2, 5
    assert own.value["optimality gap"] == pytest.approx(1 - (0 + 1 + 1 + 1) / 4)
    assert (own.low["mean"], own.high["mean"]) == pytest.approx((1.0, 3.0))  # (0 + 2) / 2 and (1 + 5) / 2
    assert (own.games["IQM"], own.runs["IQM"]) == (2, 4)
    profile = pd.read_csv("plots/profiles.csv")
    profile = profile[profile.experiment == "ppo"]
    share = lambda tau: profile.share[(profile.tau - tau).abs().idxmin()]
    assert (share(-1), share(0.5), share(1.5), share(3), share(4.9)) == (0.75, 0.75, 0.5, 0.25, 0.25)
    assert cells(table, "ppo")[:3] == ["2", "4", "200.0 % [100.0, 300.0]"]
    assert cells(table, "ppo")[-1] == "1.0"
    published = figures[figures.experiment == "published cleanba_ppo_sync_1gpu"].set_index("metric")
    assert published.value["mean"] == pytest.approx(((18.07 + 20.7) / 35.3 + (422.2 - 1.7) / 28.8) / 2, rel=1e-3)
    assert cells(table, "Breakout-v5")[0] == "102.5 ± 43.2 (2)"  # 59.3 and 145.7


def test_a_game_with_more_seeds_has_no_more_weight():
    median, iqm, mean, gap, share = plot.aggregate([np.zeros(3), np.array([1.0, 3.0])], np.array([0.5]), 10)[0]
    assert (median, mean, gap, share) == (1, 1, 0.5, 0.5)
    assert iqm == pytest.approx((3 * 0 + 3 * 1) / 6)  # the middle half of 0 0 0 0 0 0 1 1 1 3 3 3


def test_interval_is_that_of_the_matrix_form_of_rliable():
    scores = np.random.default_rng(0).gamma(1.0, 1.0, (5, 20))
    _, low, high = plot.aggregate(list(scores.T), np.array([1.0]), 1000)
    iqm = lambda x: np.array([plot.metrics.aggregate_iqm(x)])
    _, interval = plot.library.get_interval_estimates({"": scores}, iqm, reps=1000)
    assert (low[1], high[1]) == pytest.approx(tuple(interval[""][:, 0]), rel=0.03)


def test_unfinished_run_counts_as_far_as_it_came_and_is_named(run_plot):
    """Its score is that of its last 100 games, (60 * 4 + 60 * 8) / 120. The summary of an earlier stop is ignored."""
    finished([(500, 5.0, 1.0, 10), (1000, 10.0, 10.0, 10)], 10.0, seed=1)
    logs = [(100, 1.0, 0.0, 60), (200, 2.0, 4.0, 60), (300, 3.0, 8.0, 60)]
    cut = conftest.write_run(logs, seed=2, status="preempted", mean_score=-5.0)
    table = run_plot("runs", "--points", "10")
    assert "Notes: unfinished, shown as far as they came: ppo Pong-v5 seed 2 (30%); " in table
    assert cells(table, "ppo")[1] == "2, 1 unfinished"
    assert cells(table, "Pong-v5")[0] == "8.0 ± 2.0 (2, 1 unfinished)"
    steps = pd.read_csv("plots/steps.csv").set_index("steps")
    assert steps.seeds[300.0] == 1
    assert steps.seeds[500.0] == 1
    assert math.isnan(steps.low[500.0])
    table = run_plot("runs", "--finished-only")
    assert f"Notes: {cut} left out, not finished; " in table
    assert cells(table, "Pong-v5")[0] == "10.0 (1)"
    with pytest.raises(SystemExit):
        run_plot(str(cut), "--finished-only")


@pytest.mark.parametrize("content", [b"", b'{"status": "finished", "mean', b"\xff", b"[]"])
def test_a_summary_that_is_not_whole_is_named_and_the_run_is_unfinished(run_plot, capsys, content):
    finished([(1000, 10.0, 10.0, 10)], 10.0, seed=1)
    summary = finished([(300, 3.0, 8.0, 60)], -5.0, seed=2) / "summary.json"
    summary.write_bytes(content)
    table = run_plot("runs")
    assert "Notes: unfinished, shown as far as they came: ppo Pong-v5 seed 2 (30%); " in table
    assert cells(table, "Pong-v5")[0] == "9.0 ± 1.0 (2, 1 unfinished)"
    assert f"{summary} counts as missing, as it cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b'{"args": {"exp_name"', b"[]", b"{}"])
def test_a_run_json_that_is_not_whole_is_named_and_the_others_are_shown(run_plot, capsys, content):
    finished([(1000, 10.0, 10.0, 10)], 10.0, seed=1)
    record = finished([(1000, 10.0, 8.0, 60)], 8.0, seed=2) / "run.json"
    record.write_bytes(content)
    table = run_plot("runs")
    assert cells(table, "Pong-v5")[0] == "10.0 (1)"
    assert f"{record.parent} left out, no log of these scripts in it yet, or no run.json" in table
    assert f"{record} counts as missing, as it cannot be read: " in capsys.readouterr().err


def test_missing_game_one_seed_unknown_game_and_no_finished_game_are_named(run_plot):
    logs = [(1000, 10.0, 5.0, 1)]
    for seed in (1, 2):
        finished(logs, 5.0, seed=seed)
        finished(logs, 5.0, seed=seed, game="Breakout-v5")
        finished([(1000, 10.0, None, 0)], None, seed=seed, exp="impala", impala=True)
    finished(logs, 5.0, exp="impala", game="Lunar-v5", impala=True)
    table = run_plot("runs")
    assert [line for line in table.splitlines() if line and line[0] not in "|H"] == [
        "Notes: no human score is known: Lunar-v5; "
        "published: Huang et al. 2023, only means over seeds known, so no intervals."
    ]
    assert cells(table, "Pong-v5")[:2] == ["no finished game", "5.0 ± 0.0 (2)"]
    assert cells(table, "Breakout-v5")[:2] == ["", "5.0 ± 0.0 (2)"]
    assert cells(table, "Lunar-v5") == ["5.0 (1)", "", "", "", "", ""]
    assert set(pd.read_csv("plots/scores.csv").experiment) == {
        "ppo",
        "published cleanba_impala_1gpu",
        "published cleanba_ppo_sync_1gpu",
    }
    assert pd.read_csv("plots/steps.csv").low[lambda low: low.notna()].size > 0


def test_one_seed_has_no_interval(run_plot):
    finished([(1000, 10.0, 5.0, 1)], 5.0)
    table = run_plot("runs", "--reference", "none")
    assert pd.read_csv("plots/steps.csv").low.isna().all()
    assert pd.read_csv("plots/scores.csv").low.isna().all()
    assert cells(table, "ppo")[2] == "72.8 %"  # (5 + 20.7) / 35.3
    assert "published" not in table
    assert "published" not in Path("plots/scores.csv").read_text()


def test_the_same_seed_twice_is_one_sample(run_plot):
    """The finished run is kept, else the one that came further, else the newer one."""
    kept = finished([(1000, 10.0, 5.0, 1)], 5.0, name="again")
    other = conftest.write_run([(1000, 10.0, 9.0, 1)])
    further = conftest.write_run([(400, 4.0, 1.0, 1)], seed=2)
    conftest.write_run([(200, 2.0, 1.0, 1)], seed=2, name="short")
    for hour in "1234":
        last = finished([(1000, 10.0, 5.0, 1)], 5.0, seed=3, name=f"Pong-v5__ppo__3__20261124-{hour}20000-1")
    table = run_plot("runs")
    assert str(last) not in table
    assert "120000-1 left out" in table
    assert f"{other} left out, another run has its experiment, game and seed" in table
    assert "runs/short left out, another run" in table
    assert list(pd.read_csv("plots/runs.csv").path) == [str(kept), str(further), str(last)]


def test_pictures_grow_with_the_games(run_plot, figures):
    games = sorted(pd.read_csv(conftest.ROOT / "benchmark" / "atari57_reference.csv").env_id)
    for game in games[:5]:
        finished([(500, 5.0, 1.0, 1), (1000, 10.0, 2.0, 1)], 2.0, game=game)
    for pattern, size in [(f"runs/{games[0]}*", (780, 600)), ("runs", (1224, 720))]:
        run_plot(pattern)
        for name in ("steps", "hours"):
            assert png_size(f"plots/{name}.png") == size
        assert Path("plots/steps.png").stat().st_size > 15_000  # a blank page of that size is smaller
        assert png_size("plots/scores.png")[0] == 1320


def test_a_long_legend_takes_no_room_from_the_curves(run_plot, figures):
    for exp in "abcdefgh":
        finished([(500, 5.0, 1.0, 1), (1000, 10.0, 2.0, 1)], 2.0, exp=exp)
    run_plot("runs/*__a__*", "--reference", "none")
    run_plot("runs", "--reference", "none")
    _, one, _, _, many, _ = figures
    height = lambda figure: figure.axes[0].get_position().height * figure.get_figheight()
    assert height(many) == pytest.approx(height(one), rel=0.1)


def test_the_points_of_a_grid_are_told_apart(run_plot, figures):
    """Pictures show what differs between twelve points, in colours of their own. The table keeps the whole names."""
    settings = [(rate, coef) for rate in ("1e-4", "3e-4", "1e-3", "3e-3") for coef in ("0.1", "0.01", "0.001")]
    for step, (rate, coef) in enumerate(settings):
        exp = f"cleanba_ppo_envpool__channels=4,8__learning-rate={rate}__ent-coef={coef}"
        finished([(500, 5.0, 1.0 + step, 1), (1000, 10.0, 2.0 + step, 1)], 2.0 + step, exp=exp)
    table = run_plot("runs")
    for step, (rate, coef) in enumerate(settings):
        exp = f"cleanba_ppo_envpool__channels=4,8__learning-rate={rate}__ent-coef={coef}"
        rows = [line for line in table.splitlines() if line.startswith(f"| {exp} |")]
        assert len(rows) == 2
        assert rows[1] == f"| {exp} | {2.0 + step} (1) |"
    scores, steps, _ = figures
    labels = {f"learning-rate={rate}, ent-coef={coef}" for rate, coef in settings}
    published = "published cleanba_ppo_sync_1gpu"
    for figure, suffix in [(scores, ""), (steps, " (1 seed)")]:
        (legend,) = figure.legends
        assert {text.get_text() for text in legend.get_texts()} == {label + suffix for label in labels} | {published}
        assert len({line.get_color() for line in legend.get_lines()}) == 13
        edges = legend.get_window_extent()
        assert edges.x0 >= 0
        assert edges.x1 <= figure.bbox.x1
    assert {tick.get_text() for tick in scores.axes[0].get_yticklabels()} == labels | {published}
    assert {band.get_alpha() for band in steps.axes[0].collections} == {1 / 12}  # the lines stay visible


def test_names_are_cut_to_whole_parts():
    short = lambda *names: list(plot.short_names(names).values())
    assert short("ppo__gamma=0.9", "ppo__gamma=0.99") == ["gamma=0.9", "gamma=0.99"]
    assert short("ppo", "ppo__gamma=0.9", "published ppo") == ["ppo", "ppo, gamma=0.9", "published ppo"]
    assert short("ppo__gamma=0.9", "impala__gamma=0.9") == ["ppo, gamma=0.9", "impala, gamma=0.9"]
    assert short("published ppo") == ["published ppo"]


def test_a_table_of_more_experiments_than_games_has_a_line_for_each_experiment(run_plot):
    for exp in "abc":
        for game in ("Pong-v5", "CartPole-v1"):
            finished([(1000, 10.0, 5.0, 1)], 5.0, exp=exp, game=game)
    table = run_plot("runs", "--reference", "none")
    assert "| score (seeds) | CartPole-v1 | Pong-v5 |" in table
    assert "| b | 5.0 (1) | 5.0 (1) |" in table
    assert "| human |  | 14.6 |" in table
    table = run_plot("runs/*__[ab]__*", "--reference", "none")
    assert "| score (seeds) | a | b | random | human |" in table


def test_errors_name_the_flag_and_what_works(run_plot, capsys):
    finished([(1000, 10.0, 5.0, 1)], 5.0)
    EventFileWriter("runs/empty").close()
    for flags, message in {
        (): "RUNS (empty): name directories of runs",
        ("nowhere",): "RUNS nowhere: there is no TensorBoard log there or below. For example: runs",
        ("runs/empty",): "RUNS runs/empty: no run there has logged what can be shown",
        ("runs", "--points", "1"): "--points 1: must be 2 or more. For example: --points 100",
        (
            "runs",
            "--reference",
            "cleanba",
        ): "--reference cleanba: must be one of auto, all, none, monobeast_impala_1gpu",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            run_plot(*flags)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert "runs/empty left out, no log of these scripts in it yet" in run_plot("runs")


def test_checkpoints_that_were_played_are_a_curve(run_plot):
    """The curve ends at 600 of 1,000 steps, which took 2 of 4 hours. The table shows the run alone."""
    run = finished([(400, 3600.0, 1.0, 1), (800, 10800.0, 2.0, 1), (1000, 14400.0, 3.0, 1)], 3.0)
    head = "update,steps,games,cut,mean,std,scores\n"
    (run / "evaluation.csv").write_text(head + "2,200,2,0,5.0,1.0,4 6\n6,600,2,1,7.0,0.0,7 7\n")
    table = run_plot("runs", "--points", "3", "--reference", "none")
    assert "played" not in table
    for axis, end, first in [("steps", 600, 5.0), ("hours", 2, 5 + 2 / 9)]:  # 200 steps took half an hour
        curve = pd.read_csv(f"plots/{axis}.csv").query("experiment == 'ppo, checkpoints played'")
        np.testing.assert_allclose(curve[axis], [end / 3, 2 * end / 3, end], rtol=1e-5)
        np.testing.assert_allclose(curve["mean"].iloc[[0, -1]], [first, 7], rtol=1e-5)


def test_checkpoints_whose_scores_are_not_whole(run_plot, capsys):
    """A truncated line is left out. Without a whole line no curve is drawn."""
    head = "update,steps,games,cut,mean,std,scores\n"
    path = finished([(1000, 14400.0, 3.0, 1)], 3.0) / "evaluation.csv"
    for text, points in [(head + "2,200,2,0,5.0,1.0,4 6\n6,600,2,1,7", [5.0]), (head, []), ("update,st", []), ("", [])]:
        path.write_text(text)
        run_plot("runs", "--points", "2", "--reference", "none")
        steps = pd.read_csv("plots/steps.csv")
        assert list(steps["mean"][steps["experiment"] == "ppo, checkpoints played"]) == points, text
        assert (f"{path} counts as missing" in capsys.readouterr().err) == (not text.startswith(head))


def test_equal_curves_are_both_seen_and_steps_are_frames_in_atari_games_only(run_plot, figures):
    for exp, step in [("a", 0.0), ("b", 0.0), ("c", 0.1)]:
        finished([(500, 5.0, 1.0 + step, 1), (1000, 10.0, 2.0, 1)], 2.0, exp=exp)
    finished([(1000, 10.0, 2.0, 1)], 2.0, game="CartPole-v1")
    run_plot("runs/Pong*", "--reference", "none")
    scores, steps, hours = figures
    dashed = lambda ax: [line.get_linestyle() for line in ax.lines][1::2]
    assert dashed(steps.axes[0]) == ["-", "--", "-"]
    assert dashed(hours.axes[0]) == ["-", "--", "-"]
    assert [line.get_linestyle() for line in scores.axes[-1].lines] == ["-", "--", "--"]  # all scored 2
    note = lambda figure: figure.legends[0].get_title().get_text()
    assert "dashes over a line: equal" in note(steps)
    assert steps.get_supxlabel() == "environment steps (4 frames each)"
    assert hours.get_supxlabel() == "minutes of training"
    run_plot("runs", "--reference", "none")
    assert figures[-2].get_supxlabel() == "environment steps"
    for exp, score in [("a", 1.0), ("b", 2.0)]:
        finished([(1000, 10.0, score, 1)], score, exp=exp, game="Breakout-v5")
    run_plot("runs/Breakout*", "--reference", "none")
    assert note(figures[-2]) == ""  # no band is drawn
    finished([(1000, 10.0, 3.0, 1)], 3.0, exp="a", game="Breakout-v5", seed=2)
    run_plot("runs/Breakout*", "--reference", "none")
    assert note(figures[-2]).endswith("some seeds only")


def test_the_profile_is_as_wide_as_the_scores(run_plot, figures):
    finished([(1000, 10.0, 0.0, 1)], 1.7 + 30 * 28.8, game="Breakout-v5")  # 3,000 %
    finished([(1000, 10.0, 0.0, 1)], -20.7 - 0.1 * 35.3, game="Pong-v5")  # -10 %
    run_plot("runs", "--reference", "none")
    assert figures[0].axes[-1].get_xlim() == pytest.approx((-0.1, 30))
    run_plot("runs/Pong*", "--reference", "none")
    assert figures[3].axes[-1].get_xlim() == pytest.approx((-0.1, 0.01))
