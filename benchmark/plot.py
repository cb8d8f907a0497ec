"""From TensorBoard logs to pictures, CSV files and a table; no account needed.

    uv run benchmark/plot.py runs                       every run below runs, experiments side by side
    uv run benchmark/plot.py 'runs/Pong*' --out pong    the files go to the directory pong
    uv run benchmark/plot.py --reference all            the published results alone

An experiment is an --exp-name; its runs of one game, with different seeds, are averaged. Written are

    steps.png, hours.png and .csv      return against environment steps and hours of training, one panel a game
    scores.png, .csv and profiles.csv  human-normalised: median, IQM, mean, optimality gap and performance profile
    runs.csv                           one line a run
    table.md                           what is printed too: those figures and the scores of every game

A run's score is the mean of its last 100 games. Bands and brackets are 95 % bootstrap intervals over seeds, stratified
by game for the human-normalised figures (rliable, Agarwal et al. 2021); with two or three seeds the band of a game is
their range. Every game has the same weight. What evaluate.py --every-checkpoint has played is a curve of its own.

The published results, atari57_reference.csv, are means and standard deviations over seeds after 200 million frames
(Cleanba, Huang et al. 2023). A human-normalised score is (score - random) / (human - random).
"""

import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from glob import glob
from itertools import combinations, cycle
from math import ceil
from os.path import commonprefix
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from common import markdown, read_json, require, say_unreadable
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import PercentFormatter
from pandas import DataFrame, Series
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

SCALARS = {"sps": "charts/SPS", "score": "charts/avg_episodic_return", "games": "stats/episodes"}
PUBLISHED = "published "  # before the name of a reference column
EVALUATED = ", checkpoints played"  # after the name of an experiment
METRICS = {
    "median": metrics.aggregate_median,
    "IQM": metrics.aggregate_iqm,
    "mean": metrics.aggregate_mean,
    "optimality gap": metrics.aggregate_optimality_gap,
}
LOOK = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "backend": "agg",
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.title_fontsize": "small",
    "savefig.dpi": 120,
}
DASHES = (0, (4, 4))  # of a line over an equal one, so that both are seen
PALETTE = [to_rgb(color) for color in plt.color_sequences["petroff10"]]  # told apart with any colour vision
PALETTE += [tuple(np.array(color) / 2) for color in PALETTE]  # darker ones, for a grid of many points
Colors = dict[str, tuple]  # of experiments and references


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # directories of runs, or above them, or globs
    out: Path = Path("plots")  # directory of the files that are written
    reference: tuple[str, ...] = ("auto",)  # published columns; auto: the algorithm's with one GPU; all; none
    finished_only: bool = False  # leave out runs that did not finish
    points: int = 100  # points of a curve
    reps: int = 2000  # samples of a bootstrap


# === Reading ==========================================================================================================
def last_score(log: DataFrame, wanted: int = 100) -> float:
    """Mean score of the last logs that together hold `wanted` games, or of all logs; NaN if there is none."""
    if log.empty:
        return np.nan
    games_after = log.games.sum() - log.games.cumsum()
    last = log[games_after < wanted]
    return float(np.average(last.score, weights=last.games))


def read_scalars(path: Path) -> DataFrame:
    """steps, sps, score, games of every log of a run; NaN where it has not logged one."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every log that a resumed run wrote again
    events = EventAccumulator(str(path), {"scalars": 0}).Reload()  # and forgets the first copy
    tags = events.Tags()["scalars"]
    scalars = {}
    for name, tag in SCALARS.items():
        logged = events.Scalars(tag) if tag in tags else []
        scalars[name] = Series({event.step: event.value for event in logged}, dtype=float)
    return DataFrame(scalars).rename_axis("steps").reset_index()


def read_evaluation(path: Path) -> DataFrame:
    """steps, games, score of the checkpoints that evaluate.py has played; no row if it has not, or if none is whole."""
    try:
        whole = pd.read_csv(path).dropna()
        return whole[["steps", "games", "mean"]].rename(columns={"mean": "score"})
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        say_unreadable(path, error)
    return DataFrame(columns=["steps", "games", "score"], dtype=float)


def read_run(path: Path) -> dict | None:
    """The run in a directory, or None if it has no log or no run.json. What it has made: steps, hours, done (of 1).

    log: steps, hours, score, games: where games have ended since the log before, how many and their mean score.
    evaluation: the same of the checkpoints that evaluate.py has played. score: the mean of the last 100 games, or NaN.
    """
    logs = read_scalars(path)
    record = read_json(path / "run.json", "args")
    if not record or logs.sps.isna().all():
        return None
    logs["hours"] = logs.steps / logs.sps / 3600
    steps, hours = logs[["steps", "hours"]].iloc[-1]
    log = logs.dropna(subset="score").fillna({"games": 1})

    flags = record["args"]
    summary = read_json(path / "summary.json", "status", "mean_score")
    finished = summary.get("status") == "finished"
    done = 1.0 if finished else steps / flags["total_timesteps"]
    score = summary["mean_score"] if finished else None  # that of an unfinished run may be older than its logs
    if score is None:
        score = last_score(log)
    evaluation = read_evaluation(path / "evaluation.csv")
    evaluation["hours"] = np.interp(evaluation.steps, [0, *logs.steps], [0, *logs.hours])
    return {
        "experiment": flags["exp_name"],
        "env_id": flags["env_id"],
        "seed": flags["seed"],
        "finished": finished,
        "done": done,
        "score": score,
        "path": path,
        "steps": int(steps),
        "hours": hours,
        "record": record,
        "log": log,
        "evaluation": evaluation,
    }


def find_runs(patterns: tuple[str, ...]) -> list[Path]:
    """Directories that hold event files, at or below what the patterns name."""
    found = set()
    for pattern in patterns:
        logs = [log for root in glob(pattern) for log in Path(root).rglob("events.out.tfevents.*")]
        require(logs, "RUNS", pattern, "there is no TensorBoard log there or below", "runs")
        found |= {log.parent for log in logs}
    return sorted(found)


def read_runs(options: Options) -> tuple[DataFrame, list[str]]:
    """The runs to show, one for each experiment, game and seed, and what to say about the others."""
    runs = []
    unreadable = []
    unfinished = []
    for path in tqdm(find_runs(options.runs), unit=" runs", disable=None, leave=False):
        run = read_run(path)
        if run is None:
            unreadable.append(f"{path} left out, no log of these scripts in it yet, or no run.json")
        elif options.finished_only and not run["finished"]:
            unfinished.append(f"{path} left out, not finished")
        else:
            runs.append(run)
    require(runs, "RUNS", " ".join(options.runs), "no run there has logged what can be shown", "runs")
    key = ["experiment", "env_id", "seed"]
    newest_first = DataFrame(reversed(runs))  # their directories have the time in their names
    best_first = newest_first.sort_values(["finished", "steps"], ascending=False)
    is_repeated = best_first.duplicated(key)  # the same seed again is no new sample
    repeated = best_first.path[is_repeated]
    notes = unreadable + unfinished
    notes += [f"{path} left out, another run has its experiment, game and seed" for path in repeated]
    return best_first[~is_repeated].sort_values(key), notes


# === Figures ==========================================================================================================
def on_grid(log: DataFrame, axis: str, end: float, grid: np.ndarray) -> np.ndarray:
    """The return of a log at the points of `grid` f[P]: f[P]; NaN before its first finished game and after its end.

    Logs between two points of the grid become one, in which all games count alike; between them lines are straight.
    """
    if log.empty:
        return np.full(len(grid), np.nan)
    interval = np.searchsorted(grid, log[axis])
    games = np.bincount(interval, log.games)
    has_games = games > 0
    merged = {}
    for column in (axis, "score"):
        sums = np.bincount(interval, log.games * log[column])
        merged[column] = sums[has_games] / games[has_games]
    returns = np.interp(grid, merged[axis], merged["score"], left=np.nan)
    return np.where(grid <= end, returns, np.nan)


def curve(runs: DataFrame, axis: str, points: int, reps: int) -> DataFrame:
    """Return of runs of one game: columns `axis`, mean, low, high, seeds. No low and high where fewer than two are."""
    grid = np.linspace(0, runs[axis].max(), points + 1)[1:]
    returns = np.stack([on_grid(run["log"], axis, run[axis], grid) for _, run in runs.iterrows()])
    seeds = np.isfinite(returns).sum(axis=0)
    picks = np.random.default_rng(0).integers(len(runs), size=(reps, len(runs)))  # whole curves are drawn
    warnings.simplefilter("ignore", RuntimeWarning)  # of means of nothing but NaN
    mean = np.nanmean(returns, axis=0)
    means = np.nanmean(returns[picks], axis=1)
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    frame = DataFrame({axis: grid, "mean": mean, "low": low, "high": high, "seeds": seeds})
    frame.loc[seeds < 2, ["low", "high"]] = np.nan
    return frame


def aggregate(games: list[np.ndarray], taus: np.ndarray, reps: int) -> np.ndarray:
    """METRICS and performance profile at `taus` of normalised scores, one array of runs a game: f[3, 4 + taus].

    The rows are the figures and the ends of their intervals, which are NaN if no game has two runs.
    """

    def figures(*games):
        rows = np.lcm.reduce([len(game) for game in games])  # fewer runs are repeated, to give all games one weight
        columns = [np.repeat(game, rows // len(game)) for game in games]
        scores = np.stack(columns, axis=1)
        values = [metric(scores) for metric in METRICS.values()]
        profile = np.mean(scores > taus[:, None, None], axis=(1, 2))
        return np.array([*values, *profile])

    point = figures(*games)
    interval = np.full((2, len(point)), np.nan)
    if max(len(game) for game in games) > 1:
        np.random.seed(0)  # noqa: NPY002 (rliable draws from the global state, whatever it is given)
        _, intervals = library.get_interval_estimates({"all": games}, figures, reps=reps)
        interval = intervals["all"]
    return np.stack([point, *interval])


def normalised_scores(runs: DataFrame, published: DataFrame, table: DataFrame) -> DataFrame:
    """experiment, env_id and human-normalised score of runs and, over their games, of the published results."""
    scores = runs[["experiment", "env_id", "score"]].dropna()
    if len(runs):
        published = published[published.index.isin(scores.env_id)]
    known = published.melt(var_name="experiment", value_name="score", ignore_index=False).reset_index()
    scores = pd.concat([scores, known]) if len(scores) else known
    games = scores.env_id
    random = games.map(table.random)
    human = games.map(table.human)
    scores["score"] = (scores.score - random) / (human - random)
    return scores.dropna()


def profile_taus(scores: Series) -> np.ndarray:
    """The scores at which a performance profile is computed: evenly spaced up to 1, on a log scale beyond."""
    least = min(0, scores.min())
    most = max(0.01, scores.max())
    taus = np.linspace(least, min(most, 1), 101)
    if most > 1:
        taus = np.append(taus, np.geomspace(1, most, 101)[1:])
    return taus


def score_frames(scores: DataFrame, reps: int) -> tuple[DataFrame, DataFrame]:
    """METRICS and performance profiles of normalised scores."""
    taus = profile_taus(scores.score)
    frames = []
    for name, own in scores.groupby("experiment", sort=False):
        games = [game.to_numpy() for _, game in own.groupby("env_id")["score"]]
        value, low, high = aggregate(games, taus, reps)
        columns = {"experiment": name, "games": len(games), "runs": len(own)}
        columns |= {"metric": [*METRICS, *taus], "value": value, "low": low, "high": high}
        frames.append(DataFrame(columns))
    frame = pd.concat(frames)
    is_figure = frame.metric.isin(METRICS)
    profiles = frame[~is_figure].rename(columns={"metric": "tau", "value": "share"})
    return frame[is_figure], profiles.infer_objects()


# === Pictures =========================================================================================================
def short(value: float, _: int = 0) -> str:
    """A number on an axis."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What pictures call experiments: of the points of a grid, SCRIPT__FLAG=VALUE__FLAG=VALUE, only what differs."""
    experiments = [name for name in names if not name.startswith(PUBLISHED)]
    prefix = commonprefix(experiments)  # noqa: RUF071 (it is cut to whole parts)
    shared, separator, _ = prefix.rpartition("__")
    short = {}
    for name in names:
        own = name.removeprefix(shared + separator)
        short[name] = own.replace("__", ", ")
    return short


def find_repeated(curves: dict[str, DataFrame]) -> set[str]:
    """The names of curves that equal one before them."""
    names = set()
    for (_, earlier), (name, later) in combinations(curves.items(), 2):
        if later.equals(earlier):
            names.add(name)
    return names


def draw_panel(ax: Axes, axis: str, curves: dict[str, DataFrame], colors: Colors) -> None:
    """One game: a line and a band for the curve of each experiment, dotted where some of its seeds are missing."""
    dashed = find_repeated(curves)
    alpha = 1 / max(4, len(curves))  # many bands over each other must not hide the lines
    for name, frame in curves.items():
        x = frame[axis]
        mean = frame["mean"]
        color = colors[name]
        marker = "." if mean.count() == 1 else None
        ax.plot(x, mean, ":", color=color, marker=marker)
        has_all_seeds = frame.seeds == frame.seeds.max()
        style = DASHES if name in dashed else "-"
        ax.plot(x, mean.where(has_all_seeds), ls=style, color=color)
        ax.fill_between(x, frame.low, frame.high, color=color, alpha=alpha, lw=0)
    ax.set_xlim(left=0)


def draw_published(ax: Axes, scores: Series, colors: Colors) -> None:
    """A dashed line for the published score of each reference."""
    low, high = ax.dataLim.intervaly
    margin = high - low
    for i, (name, score) in enumerate(scores.items()):
        color = colors[name]
        if low - margin <= score <= high + margin:
            ax.axhline(score, color=color, ls="--", lw=1)
        else:  # a line so far away would flatten the curves; the corner is where rising ones leave room
            arrow = "↑" if score > high else "↓"
            y = 0.9 - 0.1 * i
            ax.text(0.02, y, f"{arrow} {short(score)}", color=color, transform=ax.transAxes)


def draw_curves(curves: dict, axis: str, label: str, published: DataFrame, colors: Colors, path: Path) -> None:
    """A panel for each game. curves: {(experiment, game): curve}; published: scores of games, a column a reference."""
    games = sorted({game for _, game in curves})
    count = len(games)
    columns = count if count <= 3 else ceil(count**0.5)
    rows = ceil(count / columns)
    width, height = (6.5, 3.8) if columns == 1 else (3.4, 2.5)
    if columns > 4:
        width, height = 2.6, 2
    fig = plt.figure(figsize=(columns * width, rows * height + 0.8))
    has_dashes = False
    for i, game in enumerate(games, start=1):
        own = {name: frame for (name, played), frame in curves.items() if played == game and frame.seeds.any()}
        ax = fig.add_subplot(rows, columns, i, title=game)
        draw_panel(ax, axis, own, colors)
        has_dashes |= bool(find_repeated(own))
        if not own:
            ax.set_title(f"{game}: no finished game")
        elif game in published.index:
            draw_published(ax, published.loc[game], colors)
        ax.xaxis.set_major_formatter(short)
        ax.yaxis.set_major_formatter(short)
    fig.supxlabel(label)
    fig.supylabel("return (the game's own score)")
    draw_legend(fig, curves, published, has_dashes, colors)
    fig.savefig(path)
    plt.close(fig)


def draw_legend(fig: plt.Figure, curves: dict, published: DataFrame, has_dashes: bool, colors: Colors) -> None:
    """Above the panels: experiments with the number of their seeds, references, and what lines and bands mean."""
    seeds = pd.concat(curves)["seeds"].groupby(level=0).max()
    names = short_names(seeds.index)
    handles = []
    for name, count in seeds.items():
        plural = "" if count == 1 else "s"
        label = f"{names[name]} ({count} seed{plural})"
        handles.append(plt.Line2D([], [], label=label, color=colors[name]))
    for name in published:
        handles.append(plt.Line2D([], [], label=name, color=colors[name], ls="--"))
    note = ""
    if seeds.max() > 1:
        note = "bands: 95 % bootstrap intervals over seeds; dotted: some seeds only"
    if has_dashes:
        note += "; dashes over a line: equal"
    longest = max(len(handle.get_label()) for handle in handles)
    inches = 0.8 + 0.08 * longest
    columns = max(1, int(fig.get_figwidth() // inches))
    fig.legend(handles=handles, loc="outside upper center", ncols=columns, title=note)
    height = fig.get_figheight() + 0.2 * ceil(len(handles) / columns)
    fig.set_figheight(height)  # the panels keep theirs


def draw_figures(axes: dict[str, Axes], figures: DataFrame, colors: Colors) -> None:
    """METRICS with their intervals, a line for each experiment and reference."""
    for metric, ax in axes.items():
        own = figures[figures.metric == metric]
        names = own.experiment
        shades = names.map(colors)
        ax.hlines(names, own.low, own.high, shades, lw=7, alpha=0.35)
        ax.scatter(own.value, names, c=shades)
        ax.set(title=metric, xlabel="human-normalised score", ylim=(len(names) - 0.5, -0.5))
        ax.tick_params(labelleft=metric == "median")
    axes["optimality gap"].set_xlabel("less is better")


def draw_profiles(ax: Axes, profiles: DataFrame, colors: Colors) -> None:
    """A curve for each experiment, and dashes for each reference."""
    numbers = ["tau", "share", "low", "high"]
    curves = {name: own[numbers] for name, own in profiles.groupby("experiment", sort=False)}
    dashed = find_repeated(curves)
    alpha = 1 / max(4, len(curves))
    for name, frame in curves.items():
        color = colors[name]
        style = DASHES if name in dashed or name.startswith(PUBLISHED) else "-"
        ax.plot(frame.tau, frame.share, ls=style, color=color, label=name)
        ax.fill_between(frame.tau, frame.low, frame.high, color=color, alpha=alpha, lw=0)
    if profiles.tau.max() > 1:
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xticks([0, 0.25, 0.5, 1, 2, 4, 8, 16, 64, 256])
    ax.set(xlim=profiles.tau.agg(["min", "max"]), ylim=(0, 1.02))
    ax.set(xlabel="human-normalised score", ylabel="share of runs with a higher score")
    ax.yaxis.set_major_formatter(PercentFormatter(1))


def draw_scores(figures: DataFrame, profiles: DataFrame, colors: Colors, path: Path) -> None:
    """METRICS with their intervals above, the performance profiles below."""
    names = short_names(figures.experiment.unique())
    figures = figures.replace({"experiment": names})
    profiles = profiles.replace({"experiment": names})
    colors = {names[name]: colors[name] for name in names}
    mosaic = [[*METRICS], ["profile"] * len(METRICS)]
    heights = [0.5 + 0.3 * figures.experiment.nunique(), 4]
    fig, axes = plt.subplot_mosaic(mosaic, figsize=(11, sum(heights) + 2), height_ratios=heights)
    draw_profiles(axes.pop("profile"), profiles, colors)
    draw_figures(axes, figures, colors)
    for ax in fig.axes:
        ax.xaxis.set_major_formatter(PercentFormatter(1))
    fig.legend(loc="outside upper center", ncols=2, title="bars and bands: 95 % bootstrap intervals")
    fig.savefig(path)
    plt.close(fig)


# === Table ============================================================================================================
def count_unfinished(runs: DataFrame) -> str:
    """What follows a number of runs if some of them are unfinished."""
    count = sum(~runs.finished)
    return f", {count} unfinished" if count else ""


def percent(figure) -> str:
    """The value in a row of the figures, with its interval where it has one."""
    text = f"{100 * figure.value:.1f} %"
    if np.isfinite(figure.low):
        text += f" [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
    return text


def figures_table(figures: DataFrame, runs: DataFrame, table: DataFrame) -> str:
    """A line for each experiment and reference."""
    played = table if runs.empty else table[table.index.isin(runs.env_id)]
    lines = []
    for name, frame in figures.groupby("experiment", sort=False):
        line = {"experiment": name, "games": frame.games.iloc[0]}
        if name.startswith(PUBLISHED):
            column = name.removeprefix(PUBLISHED)
            line["runs"] = "means"
            minutes = played.get(f"{column}_minutes", Series()).mean()
        else:
            own = runs[runs.experiment == name]
            line["runs"] = f"{frame['runs'].iloc[0]}{count_unfinished(own)}"
            minutes = 60 * own.hours[own.finished].mean()
        for figure in frame.itertuples():
            line[figure.metric] = percent(figure)
        line["minutes a run"] = f"{minutes:.1f}".replace("nan", "")
        lines.append(line)
    return markdown(lines[0], [line.values() for line in lines])


def score_cell(runs: DataFrame) -> str:
    """Mean, standard deviation and number of the scores of runs."""
    scores = runs.score.dropna()
    if scores.empty:
        return "no finished game"
    spread = f" ± {np.std(scores):.1f}" if len(scores) > 1 else ""
    return f"{scores.mean():.1f}{spread} ({len(scores)}{count_unfinished(runs)})"


def games_table(runs: DataFrame, published: DataFrame, table: DataFrame) -> str:
    """Mean, standard deviation and number of the seeds' scores, beside the known ones.

    A line for each game or, if they are more, for each experiment.
    """
    groups = runs.groupby(["experiment", "env_id"])
    cells = Series({key: score_cell(own) for key, own in groups})
    known = published.join(table[["random", "human"]]).map("{:.1f}".format)
    cells = cells.unstack(0, fill_value="").join(known).fillna("")
    if len(cells) < runs.experiment.nunique():
        cells = cells.T
    return markdown(["score (seeds)", *cells], cells.itertuples())


def shortened(names: list[str]) -> str:
    """The first eight names, and how many more there are."""
    text = ", ".join(names[:8])
    if len(names) > 8:
        text += f" and {len(names) - 8} more"
    return text


def describe(runs: DataFrame, published: DataFrame, table: DataFrame) -> list[str]:
    """What to say about the runs and published results that are shown."""
    notes = []
    late = [f"{r.experiment} {r.env_id} seed {r.seed} ({r.done:.0%})" for r in runs.itertuples() if not r.finished]
    if late:
        notes.append(f"unfinished, shown as far as they came: {shortened(late)}")
    unknown = sorted({*runs.env_id} - {*table.index})
    if unknown:
        notes.append(f"no human score is known: {shortened(unknown)}")
    if published.size:
        notes.append("published: Huang et al. 2023, only means over seeds known, so no intervals")
    return notes


# === All of it ========================================================================================================
def choose_published(names: tuple[str, ...], runs: DataFrame, table: DataFrame) -> DataFrame:
    """The columns of the table that --reference names."""
    columns = [column for column in table if f"{column}_std" in table]
    named = {"auto": [], "all": columns, "none": []}
    named |= {column: [column] for column in columns}
    for record in runs.record[runs.env_id.isin(table.index)]:
        is_ppo = "clip_coef" in record["args"]
        named["auto"].append("cleanba_ppo_sync_1gpu" if is_ppo else "cleanba_impala_1gpu")
    chosen = set()
    for name in names:
        require(name in named, "--reference", name, f"must be one of {', '.join(named)}", "--reference all")
        chosen.update(named[name])
    shown = [column for column in columns if column in chosen]
    return table[shown].add_prefix(PUBLISHED)


def write_curves(options: Options, runs: DataFrame, published: DataFrame, colors: Colors) -> None:
    """steps and hours, as CSV and PNG; checkpoints that were played are an experiment of their own."""
    played = runs[runs.evaluation.map(len) > 0]
    played = played.assign(log=played.evaluation, experiment=played.experiment + EVALUATED)
    for axis in ("steps", "hours"):
        played[axis] = [log[axis].iloc[-1] for log in played.log]
    groups = pd.concat([runs, played]).groupby(["experiment", "env_id"])
    labels = {"steps": "environment steps", "hours": "hours of training"}
    if runs.env_id.isin(published.index).all():  # others may be no Atari games
        labels["steps"] += " (4 frames each)"
    for axis, label in labels.items():
        curves = {key: curve(own, axis, options.points, options.reps) for key, own in groups}
        frame = pd.concat(curves, names=["experiment", "env_id"]).droplevel(2)
        frame.dropna(subset="mean").to_csv(options.out / f"{axis}.csv")
        if axis == "hours" and runs.hours.max() < 2:
            label = "minutes of training"
            for frame in curves.values():
                frame["hours"] *= 60
        draw_curves(curves, axis, label, published, colors, options.out / f"{axis}.png")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    require(options.points >= 2, "--points", options.points, "must be 2 or more", "--points 100")
    require(options.reps >= 2, "--reps", options.reps, "must be 2 or more", "--reps 2000")
    plt.rcParams |= LOOK
    table = pd.read_csv(Path(__file__).with_name("atari57_reference.csv"), index_col="env_id")
    runs = DataFrame(columns=["experiment", "env_id", "score", "finished", "hours", "record"])
    notes = []
    if options.runs:
        runs, notes = read_runs(options)
    published = choose_published(options.reference, runs, table)
    require(runs.size or published.size, "RUNS", "(empty)", "name directories of runs", "runs, or --reference all")
    options.out.mkdir(parents=True, exist_ok=True)
    experiments = runs.experiment.unique()
    evaluated = experiments + EVALUATED
    colors = dict(zip([*experiments, *published, *evaluated], cycle(PALETTE)))  # the same in all pictures
    parts = []
    scores = normalised_scores(runs, published, table)
    if len(scores):
        figures, profiles = score_frames(scores, options.reps)
        figures.to_csv(options.out / "scores.csv", index=False)
        profiles.to_csv(options.out / "profiles.csv", index=False)
        draw_scores(figures, profiles, colors, options.out / "scores.png")
        parts.append(f"Human-normalised scores:\n\n{figures_table(figures, runs, table)}")
    if len(runs):
        write_curves(options, runs, published, colors)
        runs.drop(columns=["record", "log", "evaluation"]).to_csv(options.out / "runs.csv", index=False)
        parts.append(games_table(runs, published, table))
    notes += describe(runs, published, table)
    if notes:
        parts.append(f"Notes: {'; '.join(notes)}.")
    (options.out / "table.md").write_text("\n\n".join(parts) + "\n")
    print(*parts, f"The files are in {options.out}.", sep="\n\n")


if __name__ == "__main__":
    main()
