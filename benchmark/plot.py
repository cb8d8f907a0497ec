"""From TensorBoard logs to pictures, CSV files and a table; no account needed.

    uv run benchmark/plot.py runs                       every run below runs, experiments side by side
    uv run benchmark/plot.py 'runs/Pong*' --out pong    the files go to the directory pong
    uv run benchmark/plot.py --reference all            the published results alone

An experiment is an --exp-name; its runs of one game, with different seeds, are averaged. Written are

    steps.png, steps.csv    return against environment steps, one panel a game
    hours.png, hours.csv    return against hours of training, without the pause between a kill and the resume
    scores.png, scores.csv  median, IQM, mean and optimality gap of the human-normalised scores
    profiles.csv            their performance profile, which scores.png has too
    runs.csv                one line a run
    table.md                what is printed too: those figures, the scores of every game, and what to know about them

A run's score is the mean of its last 100 games. Bands and brackets are 95 % bootstrap intervals over seeds, stratified
by game for the human-normalised figures (rliable, Agarwal et al. 2021); with two or three seeds the band of a game is
their range. Every game has the same weight, however many seeds it has.

The published results are in atari57_reference.csv beside this file: means and standard deviations over seeds and
minutes of a run, after 200 million frames (Cleanba, Huang et al. 2023, arXiv 2310.00036), with the usual random and
human scores. A human-normalised score is (score - random) / (human - random).
"""

import json
import logging
import math
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

RETURN, SPS, GAMES = "charts/avg_episodic_return", "charts/SPS", "stats/episodes"
PUBLISHED = "published "  # before the name of a reference column
METRICS = {
    "median": metrics.aggregate_median,
    "IQM": metrics.aggregate_iqm,
    "mean": metrics.aggregate_mean,
    "optimality gap": metrics.aggregate_optimality_gap,
}
LOOK = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
LOOK |= {"figure.constrained_layout.use": True, "legend.frameon": False, "savefig.dpi": 120}
COLORS = matplotlib.color_sequences["petroff10"]  # told apart with any colour vision


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # directories of runs, or above them, or globs
    out: Path = Path("plots")  # directory of the files that are written
    reference: tuple[str, ...] = ("auto",)  # published columns; auto: the algorithm's with one GPU; all; none
    finished_only: bool = False  # leave out runs that did not finish
    points: int = 100  # points of a curve
    reps: int = 2000  # samples of a bootstrap


def stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# === Reading ==========================================================================================================


@dataclass(frozen=True)
class Run:
    """One run. N: its logs with a finished game.

    Attributes:
        record: what run.json has, the flags under "args".
        done: the share of its steps that it has made.
        score: the game's own, mean of the last 100 games; NaN if no game has finished.
        x: {"steps": i[N], "hours": f[N]}, where the logs are.
        end: the same of the last log of all.
        value: f[N], mean return of the games that finished since the log before.
        games: f[N], how many they were.
    """

    path: Path
    record: dict[str, Any]
    experiment: str
    env_id: str
    seed: int
    published: str
    finished: bool
    done: float
    score: float
    x: dict[str, np.ndarray]
    end: dict[str, float]
    value: np.ndarray
    games: np.ndarray


def last_score(value: np.ndarray, games: np.ndarray, wanted: int = 100) -> float:
    """Mean return of the last logs f[N] that together hold `wanted` games, or of all logs; NaN if there is none."""
    logs = np.searchsorted(np.cumsum(games[::-1]), wanted) + 1
    return float(np.average(value[-logs:], weights=games[-logs:])) if len(value) else math.nan


def read_run(path: Path) -> Run | None:
    """The run in a directory, or None if it has not logged anything yet."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every log that a resumed run wrote again
    events = EventAccumulator(str(path), {"scalars": 0}).Reload()  # and forgets the first copy
    if not (path / "run.json").exists() or SPS not in events.Tags()["scalars"]:
        return None
    record = json.loads((path / "run.json").read_text())
    flags = record["args"]

    def scalars(tag: str) -> tuple[np.ndarray, np.ndarray]:
        found = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
        return np.array([event.step for event in found]), np.array([event.value for event in found])

    (logged, sps), (step, value), counts = scalars(SPS), scalars(RETURN), dict(zip(*scalars(GAMES), strict=True))
    games = np.array([counts.get(s, 1.0) for s in step])
    hours = logged / sps / 3600
    summary = json.loads((path / "summary.json").read_text()) if (path / "summary.json").exists() else {}
    finished, score = summary.get("status") == "finished", last_score(value, games)
    if finished and summary["mean_score"] is not None:  # of an unfinished run it may be older than the logs
        score = summary["mean_score"]
    return Run(
        path=path,
        record=record,
        experiment=flags["exp_name"],
        env_id=flags["env_id"],
        seed=flags["seed"],
        published="cleanba_ppo_sync_1gpu" if "clip_coef" in flags else "cleanba_impala_1gpu",
        finished=finished,
        done=1.0 if finished else logged[-1] / flags["total_timesteps"],
        score=score,
        x={"steps": step, "hours": np.interp(step, logged, hours)},
        end={"steps": logged[-1], "hours": hours[-1]},
        value=value,
        games=games,
    )


def find_runs(patterns: tuple[str, ...]) -> list[Path]:
    """Directories that hold event files, at or below what the patterns name."""
    found = set()
    for pattern in patterns:
        roots = [Path(name) for name in glob(pattern)]
        below = {events.parent for root in roots for events in root.rglob("events.out.tfevents.*")}
        if not below:
            stop(f"RUNS {pattern}: there is no TensorBoard log there or below. For example: runs")
        found |= below
    return sorted(found)


def read_runs(options: Options) -> tuple[list[Run], list[str]]:
    """The runs to show, one for each experiment, game and seed, and what to say about the others."""
    best, notes = {}, []
    for path in tqdm(find_runs(options.runs), unit=" runs", disable=None, leave=False):
        run = read_run(path)
        if run is None:
            notes.append(f"{path}: left out, there is no log of these scripts in it yet.")
        elif options.finished_only and not run.finished:
            notes.append(f"{path}: left out, not finished.")
        else:
            key = run.experiment, run.env_id, run.seed
            first, second = sorted([best.get(key, run), run], key=lambda r: (-r.finished, -r.end["steps"]))
            best[key] = first
            if second is not first:  # the same seed again is no new sample
                notes.append(f"{second.path}: left out, {first.path} has the same experiment, game and seed.")
    if not best:
        stop(f"RUNS {' '.join(options.runs)}: no run there has logged what can be shown. For example: runs")
    return [best[key] for key in sorted(best)], notes


# === Figures ==========================================================================================================


def on_grid(run: Run, axis: str, grid: np.ndarray) -> np.ndarray:
    """The run's return f[P] at the points of `grid` f[P]; NaN before its first finished game and after its end.

    Logs between two points of the grid become one, in which all games count alike; between them lines are straight.
    """
    if not len(run.value):
        return np.full(len(grid), np.nan)
    interval = np.searchsorted(grid, run.x[axis])
    total = np.bincount(interval, run.games)
    x, y = (np.bincount(interval, run.games * z)[total > 0] / total[total > 0] for z in (run.x[axis], run.value))
    return np.where(grid <= run.end[axis], np.interp(grid, x, y, left=np.nan), np.nan)


def curve(runs: list[Run], axis: str, points: int, reps: int) -> pd.DataFrame:
    """Return of runs of one game: columns `axis`, mean, low, high, seeds. No low and high where fewer than two are."""
    grid = np.linspace(0, max(run.end[axis] for run in runs), points + 1)[1:]
    curves = np.stack([on_grid(run, axis, grid) for run in runs])
    seeds = np.isfinite(curves).sum(0)
    picks = np.random.default_rng(0).integers(len(runs), size=(reps, len(runs)))  # whole curves are drawn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing but NaN
        mean = np.nanmean(curves, 0)
        band = np.nanpercentile(np.nanmean(curves[picks], 1), [2.5, 97.5], 0)
    low, high = np.where(seeds > 1, band, np.nan)
    return pd.DataFrame({axis: grid, "mean": mean, "low": low, "high": high, "seeds": seeds})


def matrix(*games: np.ndarray) -> np.ndarray:
    """Scores f[runs, games]; where games have different numbers of runs all are repeated, to give games one weight."""
    rows = math.lcm(*map(len, games))
    return np.stack([np.repeat(game, rows // len(game)) for game in games], axis=1)


def aggregate(games: list[np.ndarray], taus: np.ndarray, reps: int) -> tuple[np.ndarray, np.ndarray]:
    """METRICS and the performance profile at `taus` of normalised scores, one array of runs a game.

    Returns: figures f[4 + taus] and their intervals f[2, 4 + taus], NaN if no game has two runs.
    """

    def figures(*games: np.ndarray) -> np.ndarray:
        scores = matrix(*games)
        profile = np.mean(scores > taus[:, None, None], axis=(1, 2))
        return np.array([*(metric(scores) for metric in METRICS.values()), *profile])

    if max(map(len, games)) == 1:
        return figures(*games), np.full((2, len(METRICS) + len(taus)), np.nan)
    np.random.seed(0)  # noqa: NPY002 (rliable draws from the global state, whatever it is given)
    point, interval = library.get_interval_estimates({"all": games}, figures, reps=reps)
    return point["all"], interval["all"]


def score_frames(scores: dict[str, dict[str, np.ndarray]], reps: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """METRICS and performance profiles of {name: {game: human-normalised scores f[runs]}}."""
    shown = [games for name, games in scores.items() if not name.startswith(PUBLISHED)] or list(scores.values())
    every = np.concatenate([score for games in shown for score in games.values()])
    taus = np.linspace(min(0, every.min()), np.clip(every.max(), 0.1, 8), 101)  # few games are played above 800 %
    figures, profiles, count = [], [], len(METRICS)
    for name, games in scores.items():
        point, (low, high) = aggregate(list(games.values()), taus, reps)
        common = dict(experiment=name, games=len(games), runs=sum(map(len, games.values())))
        own = dict(metric=list(METRICS), value=point[:count], low=low[:count], high=high[:count])
        figures.append(pd.DataFrame(common | own))
        own = dict(tau=taus, share=point[count:], low=low[count:], high=high[count:])
        profiles.append(pd.DataFrame(common | own))
    return pd.concat(figures), pd.concat(profiles)


# === Pictures =========================================================================================================


def short(x: float, _: int = 0) -> str:
    """A number on an axis."""
    return f"{x / 1e6:.4g}M" if abs(x) >= 1e6 else f"{x / 1e3:.4g}k" if abs(x) >= 1e4 else f"{x:.4g}"


def percent(x: float, _: int = 0) -> str:
    return f"{100 * x:.4g} %"


def draw_reference(ax: plt.Axes, number: int, score: float, color: str) -> None:
    """A published score: a line, or an arrow and the number in a corner where a line would flatten the curves."""
    low, high = ax.dataLim.intervaly
    if 2 * low - high <= score <= 2 * high - low:
        ax.axhline(score, color=color, ls="--", lw=1)
        return
    top = score > high
    away = 3 + 1.3 * plt.rcParams["font.size"] * number  # points from the corner: one line for each reference
    corner, offset = ((0, 1), (3, -away)) if top else ((1, 0), (-3, away))  # where rising curves leave room
    align = dict(ha="left", va="top") if top else dict(ha="right", va="bottom")
    paper = dict(facecolor="white", alpha=0.7, lw=0, pad=1)
    text = ("↑ " if top else "↓ ") + short(score)
    ax.annotate(text, corner, offset, "axes fraction", "offset points", color=color, bbox=paper, **align)


def draw_panel(ax: plt.Axes, game: str, curves: dict[str, pd.DataFrame], axis: str, scale: float, colors: dict) -> None:
    """One game: a line and a band for the curve of each experiment, dotted where some of its seeds are missing."""
    for experiment, frame in curves.items():
        x, mean, whole = frame[axis] * scale, frame["mean"], frame["seeds"] == frame["seeds"].max()
        look = dict(color=colors[experiment], marker="." if mean.count() == 1 else None)
        ax.plot(x, mean, ":", lw=1.2, **look)
        ax.plot(x, mean.where(whole), "-", lw=1.5, **look)
        ax.fill_between(x, frame["low"], frame["high"], color=colors[experiment], alpha=0.25, lw=0)
    if not curves:
        ax.text(0.5, 0.5, "no finished game", ha="center", transform=ax.transAxes)
        ax.set_axis_off()
    ax.set(title=game)
    ax.xaxis.set_major_formatter(short)
    ax.yaxis.set_major_formatter(short)


def draw_curves(
    curves: dict[tuple[str, str], pd.DataFrame], axis: str, published: pd.DataFrame, colors: dict[str, str], path: Path
) -> None:
    """A panel for each game. curves: {(experiment, game): curve}; published: scores of games, a column a reference."""
    games = sorted({game for _, game in curves})
    columns = len(games) if len(games) <= 3 else math.ceil(len(games) ** 0.5)
    rows = math.ceil(len(games) / columns)
    width, height = (5.5, 4) if len(games) <= 4 else (3.4, 2.5) if len(games) <= 16 else (2.6, 2)
    fig, axes = plt.subplots(rows, columns, figsize=(max(columns * width, 6.5), rows * height + 1), squeeze=False)
    longest = max(frame[axis].iloc[-1] for frame in curves.values())
    scale, unit = (60, "minutes of training") if axis == "hours" and longest < 2 else (1, "hours of training")
    for ax, game in zip(axes.flat, games, strict=False):
        own = {name: frame for (name, g), frame in curves.items() if g == game and frame["seeds"].any()}
        draw_panel(ax, game, own, axis, scale, colors)
        for number, (name, score) in enumerate(published.loc[game].items() if own and game in published.index else ()):
            draw_reference(ax, number, score, colors[name])
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(plt.MaxNLocator(5 if width > 3 else 3))
    for ax in axes.flat[len(games) :]:
        ax.remove()
    fig.supxlabel("environment steps (4 frames each)" if axis == "steps" else unit, fontsize="large")
    fig.supylabel("return (the game's own score)", fontsize="large")
    draw_legend(fig, curves, published.columns, colors)
    fig.savefig(path)
    plt.close(fig)


def draw_legend(fig: plt.Figure, curves: dict[tuple[str, str], pd.DataFrame], references, colors: dict) -> None:
    """Above the panels: experiments with their seeds, references, and what dots and bands mean if there are any."""
    seeds = defaultdict(set)
    for (experiment, _), frame in curves.items():
        seeds[experiment].add(frame["seeds"].max())
    span = lambda n: f"{min(n)} to {max(n)} seeds" if len(n) > 1 else f"{max(n)} seed{'' if n == {1} else 's'}"
    lines = {f"{name} ({span(n)})": dict(color=colors[name]) for name, n in seeds.items()}
    lines |= {name: dict(color=colors[name], ls="--") for name in references}
    if any(frame["seeds"].replace(0, np.nan).nunique() > 1 for frame in curves.values()):
        lines["only some of the seeds"] = dict(color="gray", ls=":")
    if any(frame["low"].notna().any() for frame in curves.values()):
        lines["95 % bootstrap interval over seeds"] = dict(color="gray", lw=10, alpha=0.3)
    handles = [plt.Line2D([], [], label=label, **look) for label, look in lines.items()]
    widest = 0.6 + 0.09 * max(map(len, lines))  # inches, about
    fig.legend(handles=handles, loc="outside upper center", ncols=max(1, int(fig.get_figwidth() / widest)))


def draw_scores(figures: pd.DataFrame, profiles: pd.DataFrame, colors: dict[str, str], path: Path) -> None:
    """METRICS with their intervals above, the performance profiles below."""
    names = list(figures["experiment"].unique())
    mosaic, heights = [list(METRICS), ["profile"] * len(METRICS)], [0.5 + 0.3 * len(names), 4]
    fig, axes = plt.subplot_mosaic(mosaic, figsize=(11, sum(heights) + 1), height_ratios=heights)
    for metric, frame in figures.groupby("metric"):
        ax = axes[metric]
        for row in frame.itertuples():
            y, color = names.index(row.experiment), colors[row.experiment]
            ax.plot([row.low, row.high], [y, y], color=color, lw=7, alpha=0.35, solid_capstyle="butt")
            ax.plot(row.value, y, "o", color=color, ms=5)
        ax.set(title=metric, ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=[])
        ax.xaxis.set_major_formatter(percent)
        ax.xaxis.set_major_locator(plt.MaxNLocator(3))
        ax.margins(x=0.15)
        ax.grid(axis="y", visible=False)
    axes["median"].set_yticklabels(names)
    ax = axes["profile"]
    for name, frame in profiles.groupby("experiment", sort=False):
        line = "--" if name.startswith(PUBLISHED) else "-"
        ax.plot(frame["tau"], frame["share"], line, color=colors[name], label=name)
        ax.fill_between(frame["tau"], frame["low"], frame["high"], color=colors[name], alpha=0.25, lw=0)
    ax.set(xlabel="human-normalised score", ylabel="share of runs with a higher score", ylim=(0, 1.02))
    ax.set_xlim(profiles["tau"].min(), profiles["tau"].max())
    ax.xaxis.set_major_formatter(percent)
    ax.yaxis.set_major_formatter(percent)
    ax.legend()
    fig.suptitle("Human-normalised scores, with 95 % bootstrap intervals where seeds allow", fontsize="large")
    fig.savefig(path)
    plt.close(fig)


# === Table ============================================================================================================


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def listed(names: list[str], most: int = 8) -> str:
    """The first `most` of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def figures_table(figures: pd.DataFrame, runs: list[Run], minutes: dict[str, float]) -> str:
    """A line for each experiment and reference. minutes: the mean over its finished runs."""
    rows = []
    for name, frame in figures.groupby("experiment", sort=False):
        bracket = lambda row: f" [{100 * row.low:.1f}, {100 * row.high:.1f}]" if np.isfinite(row.low) else ""
        cells = [f"{100 * row.value:.1f} %{bracket(row)}" for row in frame.itertuples()]
        unfinished = sum(run.experiment == name and not run.finished for run in runs)
        count = f"{frame['runs'].iloc[0]}" + (f", {unfinished} unfinished" if unfinished else "")
        time = f"{minutes[name]:.1f}" if np.isfinite(minutes.get(name, np.nan)) else ""
        rows.append([name, f"{frame['games'].iloc[0]}", "means" if name.startswith(PUBLISHED) else count, *cells, time])
    return markdown(["experiment", "games", "runs", *METRICS, "minutes a run"], rows)


def games_table(runs: list[Run], table: pd.DataFrame, references: list[str]) -> str:
    """A line for each game: mean, standard deviation and number of the seeds' scores, beside the known ones."""
    experiments = sorted({run.experiment for run in runs})

    def cell(game: str, experiment: str) -> str:
        own = [run for run in runs if (run.env_id, run.experiment) == (game, experiment)]
        scores = [run.score for run in own if np.isfinite(run.score)]
        if not scores:
            return "no finished game" if own else ""
        spread = f" ± {np.std(scores):.1f}" if len(scores) > 1 else ""
        unfinished = sum(not run.finished for run in own)
        return f"{np.mean(scores):.1f}{spread} ({len(scores)}{f', {unfinished} unfinished' if unfinished else ''})"

    def known(game: str, column: str) -> str:
        return f"{table.loc[game, column]:.1f}" if game in table.index else ""

    rows = []
    for game in sorted({run.env_id for run in runs}):
        own = [cell(game, experiment) for experiment in experiments]
        rows.append([game, *own, *(known(game, column) for column in [*references, "random", "human"])])
    published = [PUBLISHED + column for column in references]
    return markdown(["score (seeds)", *experiments, *published, "random", "human"], rows)


def remarks(runs: list[Run], table: pd.DataFrame) -> list[str]:
    """What a reader must know about each experiment."""
    notes, all_games = [], {run.env_id for run in runs}
    name = lambda run: f"{run.env_id} seed {run.seed}"
    for experiment in sorted({run.experiment for run in runs}):
        own = [run for run in runs if run.experiment == experiment]
        seeds = Counter(run.env_id for run in own)
        for what, cases in {
            "not finished, shown as far as they came": [f"{name(r)} ({r.done:.0%})" for r in own if not r.finished],
            "no game has ended, so there is no score": [name(run) for run in own if np.isnan(run.score)],
            "one seed only, so no band": [game for game, count in seeds.items() if count == 1],
            "no human score is known, so not in the human-normalised figures": sorted(set(seeds) - set(table.index)),
            "no run, so not in its figures": sorted(all_games - set(seeds)),
        }.items():
            if cases:
                notes.append(f"{experiment}: {what}: {listed(cases)}.")
    return notes


# === Main =============================================================================================================


def pick_references(options: Options, runs: list[Run], table: pd.DataFrame) -> list[str]:
    """Columns of published means."""
    columns = [column for column in table if f"{column}_std" in table]
    named = {"auto": {run.published for run in runs if run.env_id in table.index}, "all": columns, "none": []}
    for name in options.reference:
        if name not in [*named, *columns]:
            close = get_close_matches(name, columns, 1) or ["all"]
            rule = f"must be auto, all, none or of {', '.join(columns)}"
            stop(f"--reference {name}: {rule}. For example: --reference {close[0]}")
    picked = {column for name in options.reference for column in named.get(name, [name])}
    return [column for column in columns if column in picked]


def normalised_scores(runs: list[Run], references: list[str], table: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """{experiment or reference: {game: human-normalised scores f[runs]}}; references over the games of the runs."""
    scores = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.env_id in table.index and np.isfinite(run.score):
            scores[run.experiment][run.env_id].append(run.score)
    played = sorted({game for games in scores.values() for game in games}) if runs else list(table.index)
    for column in references if played else ():
        scores[PUBLISHED + column] = {game: [table.loc[game, column]] for game in played}
    random, human = table["random"], table["human"]
    to_human = lambda game, score: (np.array(score) - random[game]) / (human[game] - random[game])
    return {name: {game: to_human(game, score) for game, score in games.items()} for name, games in scores.items()}


def mean_minutes(runs: list[Run], references: list[str], table: pd.DataFrame) -> dict[str, float]:
    """{experiment or reference: minutes of a run}, over finished runs, and over the games of the runs."""
    spent = defaultdict(list)
    for run in runs:
        if run.finished:
            spent[run.experiment].append(60 * run.end["hours"])
    games = table.index.isin([run.env_id for run in runs]) if runs else slice(None)
    for column in references:
        spent[PUBLISHED + column] = table.loc[games].get(f"{column}_minutes", [])
    return {name: float(np.mean(minutes)) for name, minutes in spent.items() if len(minutes)}


def write_all(options: Options, runs: list[Run], notes: list[str], table: pd.DataFrame, references: list[str]) -> str:
    """Write every file; return the table."""
    experiments = sorted({run.experiment for run in runs})
    names = experiments + [PUBLISHED + column for column in references]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    parts, out = [], options.out
    if runs:
        groups = defaultdict(list)
        for run in runs:
            groups[run.experiment, run.env_id].append(run)
        for axis in ("steps", "hours"):
            curves = {key: curve(own, axis, options.points, options.reps) for key, own in groups.items()}
            frame = pd.concat(curves, names=["experiment", "env_id"]).droplevel(2)
            frame.dropna(subset="mean").to_csv(out / f"{axis}.csv")
            draw_curves(curves, axis, table[references].add_prefix(PUBLISHED), colors, out / f"{axis}.png")
        columns = ["experiment", "env_id", "seed", "finished", "done", "score", "path"]
        rows = [{**{name: getattr(run, name) for name in columns}, **run.end} for run in runs]
        pd.DataFrame(rows).to_csv(out / "runs.csv", index=False)
    scores = normalised_scores(runs, references, table)
    if scores:
        figures, profiles = score_frames(scores, options.reps)
        figures.to_csv(out / "scores.csv", index=False)
        profiles.to_csv(out / "profiles.csv", index=False)
        draw_scores(figures, profiles, colors, out / "scores.png")
        minutes = mean_minutes(runs, references, table)
        parts.append("Human-normalised scores:\n\n" + figures_table(figures, runs, minutes))
    if runs:
        parts.append(games_table(runs, table, references))
    if references:
        notes = [*notes, "published: Huang et al. 2023, only the mean over seeds is known, so no interval."]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    text = "\n\n".join(parts) + "\n"
    (out / "table.md").write_text(text)
    return text


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    for flag, value in dict(points=options.points, reps=options.reps).items():
        if value < 2:
            stop(f"--{flag} {value}: must be 2 or more. For example: --{flag} {getattr(Options, flag)}")
    plt.rcParams |= LOOK
    table = pd.read_csv(Path(__file__).with_name("atari57_reference.csv"), index_col="env_id")
    runs, notes = read_runs(options) if options.runs else ([], [])
    references = pick_references(options, runs, table)
    if not runs and not references:
        stop("RUNS (empty): name directories of runs, or published results. For example: runs, or --reference all")
    options.out.mkdir(parents=True, exist_ok=True)
    print(write_all(options, runs, notes + remarks(runs, table), table, references))
    print(f"The files are in {options.out}.")


if __name__ == "__main__":
    main()
