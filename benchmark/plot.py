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
from dataclasses import dataclass
from glob import glob
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from common import markdown, read_json, require, say_unreadable
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

SPS, SCALARS = "charts/SPS", {"charts/avg_episodic_return": "score", "stats/episodes": "games"}
PUBLISHED, EVALUATED = "published ", ", checkpoints played"  # before a reference column, after an experiment
METRICS = {"median": metrics.aggregate_median, "IQM": metrics.aggregate_iqm, "mean": metrics.aggregate_mean}
METRICS |= {"optimality gap": metrics.aggregate_optimality_gap}
LOOK = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
LOOK |= {"figure.constrained_layout.use": True, "legend.frameon": False, "savefig.dpi": 120, "backend": "agg"}
unfinished = lambda runs: "" if runs["finished"].all() else f", {sum(~runs['finished'])} unfinished"
COLORS = plt.color_sequences["petroff10"]  # told apart with any colour vision


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # directories of runs, or above them, or globs
    out: Path = Path("plots")  # directory of the files that are written
    reference: tuple[str, ...] = ("auto",)  # published columns; auto: the algorithm's with one GPU; all; none
    finished_only: bool = False  # leave out runs that did not finish
    points: int = 100  # points of a curve
    reps: int = 2000  # samples of a bootstrap


# === Reading ==========================================================================================================
def last_score(log: pd.DataFrame, wanted: int = 100) -> float:
    """Mean score of the last logs that together hold `wanted` games, or of all logs; NaN if there is none."""
    last = log[-1 - np.searchsorted(np.cumsum(log["games"][::-1]), wanted) :]
    return float(np.average(last["score"], weights=last["games"])) if len(last) else np.nan


def read_evaluation(path: Path) -> pd.DataFrame:
    """steps, games, score of the checkpoints that evaluate.py has played; no row if it has not, or if none is whole."""
    nothing = pd.DataFrame(columns=["steps", "games", "score"], dtype=float)
    if not path.exists():
        return nothing
    try:
        whole = pd.read_csv(path).dropna()
        return whole[["steps", "games", "mean"]].rename(columns={"mean": "score"})
    except (OSError, ValueError, KeyError) as error:
        say_unreadable(path, error)
        return nothing


def read_run(path: Path) -> dict | None:
    """The run in a directory, or None if it has no log or no run.json. What it has made: steps, hours, done (of 1).

    log: steps, hours, score, games: where games have ended since the log before, how many and their mean score.
    evaluation: the same of the checkpoints that evaluate.py has played. score: the mean of the last 100 games, or NaN.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every log that a resumed run wrote again
    events = EventAccumulator(str(path), {"scalars": 0}).Reload()  # and forgets the first copy
    tags = events.Tags()["scalars"]
    record = read_json(path / "run.json", "args")
    if not record or SPS not in tags:
        return None
    read = lambda tag: pd.Series({x.step: x.value for x in events.Scalars(tag)} if tag in tags else {}, dtype=float)
    every = pd.DataFrame({"sps": read(SPS)} | {name: read(tag) for tag, name in SCALARS.items()}).rename_axis("steps")
    every = every.reset_index().assign(hours=lambda frame: frame["steps"] / frame["sps"] / 3600)
    log, (steps, hours) = every.dropna(subset="score").fillna({"games": 1}), every[["steps", "hours"]].iloc[-1]
    flags = record["args"]
    summary = read_json(path / "summary.json", "status", "mean_score")
    finished = bool(summary) and summary["status"] == "finished"
    # the score of an unfinished run's summary may be older than the logs
    score = summary["mean_score"] if finished and summary["mean_score"] is not None else last_score(log)
    evaluation = read_evaluation(path / "evaluation.csv")
    evaluation["hours"] = np.interp(evaluation["steps"], [0, *every["steps"]], [0, *every["hours"]])
    run = dict(experiment=flags["exp_name"], env_id=flags["env_id"], seed=flags["seed"], finished=finished)
    run |= dict(done=1.0 if finished else steps / flags["total_timesteps"], score=score, path=path, steps=int(steps))
    return run | dict(hours=hours, record=record, log=log, evaluation=evaluation)


def find_runs(patterns: tuple[str, ...]) -> list[Path]:
    """Directories that hold event files, at or below what the patterns name."""
    logs = lambda pattern: (log for root in glob(pattern) for log in Path(root).rglob("events.out.tfevents.*"))
    found = {pattern: {log.parent for log in logs(pattern)} for pattern in patterns}
    for pattern, paths in found.items():
        require(paths, "RUNS", pattern, "there is no TensorBoard log there or below", "runs")
    return sorted(set().union(*found.values()))


def read_runs(options: Options) -> tuple[pd.DataFrame, list[str]]:
    """The runs to show, one for each experiment, game and seed, and what to say about the others."""
    read = {path: read_run(path) for path in tqdm(find_runs(options.runs), unit=" runs", disable=None, leave=False)}
    why = "left out, no log of these scripts in it yet, or no run.json"
    notes = [f"{path} {why}" for path, run in read.items() if run is None]
    runs = pd.DataFrame(filter(None, read.values()))
    if len(runs) and options.finished_only:
        notes += [f"{path} left out, not finished" for path in runs["path"][~runs["finished"]]]
        runs = runs[runs["finished"]]
    require(len(runs), "RUNS", " ".join(options.runs), "no run there has logged what can be shown", "runs")
    runs, key = runs.sort_values(["finished", "steps"], ascending=False), ["experiment", "env_id", "seed"]
    again = runs.duplicated(key)  # the same seed again is no new sample
    notes += [f"{path} left out, another run has its experiment, game and seed" for path in runs["path"][again]]
    return runs[~again].sort_values(key), notes


# === Figures ==========================================================================================================
def on_grid(log: pd.DataFrame, axis: str, end: float, grid: np.ndarray) -> np.ndarray:
    """The return of a log at the points of `grid` f[P]: f[P]; NaN before its first finished game and after its end.

    Logs between two points of the grid become one, in which all games count alike; between them lines are straight.
    """
    if log.empty:
        return np.full(len(grid), np.nan)
    interval = np.searchsorted(grid, log[axis])
    total = np.bincount(interval, log["games"])
    merged = lambda x: np.bincount(interval, log["games"] * log[x])[total > 0] / total[total > 0]
    return np.where(grid <= end, np.interp(grid, merged(axis), merged("score"), left=np.nan), np.nan)


def curve(runs: pd.DataFrame, axis: str, points: int, reps: int) -> pd.DataFrame:
    """Return of runs of one game: columns `axis`, mean, low, high, seeds. No low and high where fewer than two are."""
    grid = np.linspace(0, runs[axis].max(), points + 1)[1:]
    curves = np.stack([on_grid(run["log"], axis, run[axis], grid) for _, run in runs.iterrows()])
    seeds = np.isfinite(curves).sum(0)
    picks = np.random.default_rng(0).integers(len(runs), size=(reps, len(runs)))  # whole curves are drawn
    warnings.simplefilter("ignore", RuntimeWarning)  # of means of nothing but NaN
    low, high = np.where(seeds > 1, np.nanpercentile(np.nanmean(curves[picks], 1), [2.5, 97.5], 0), np.nan)
    return pd.DataFrame({axis: grid, "mean": np.nanmean(curves, 0), "low": low, "high": high, "seeds": seeds})


def aggregate(games: list[np.ndarray], taus: np.ndarray, reps: int) -> np.ndarray:
    """METRICS and performance profile at `taus` of normalised scores, one array of runs a game: f[3, 4 + taus].

    The rows are the figures and the ends of their intervals, which are NaN if no game has two runs.
    """

    def figures(*games: np.ndarray) -> np.ndarray:
        rows = np.lcm.reduce([*map(len, games)])  # fewer runs are repeated, to give all games one weight
        scores = np.stack([np.repeat(game, rows // len(game)) for game in games], axis=1)
        profile = np.mean(scores > taus[:, None, None], axis=(1, 2))
        return np.array([*(metric(scores) for metric in METRICS.values()), *profile])

    if max(map(len, games)) == 1:
        return figures(*games) * np.array([[1], [np.nan], [np.nan]])
    np.random.seed(0)  # noqa: NPY002 (rliable draws from the global state, whatever it is given)
    point, interval = library.get_interval_estimates({"all": games}, figures, reps=reps)
    return np.stack([point["all"], *interval["all"]])


def score_frames(runs: pd.DataFrame, references: list[str], table: pd.DataFrame, reps: int) -> list[pd.DataFrame]:
    """METRICS and performance profiles of the human-normalised scores of runs and, over their games, of references."""
    own = runs[runs["env_id"].isin(table.index)][["experiment", "env_id", "score"]].dropna()
    shown = table if runs.empty else table[table.index.isin(own["env_id"])]
    known = shown[references].add_prefix(PUBLISHED).melt(var_name="experiment", value_name="score", ignore_index=False)
    scores = pd.concat([own, known.reset_index()] if len(own) else [known.reset_index()])
    random, human = (scores["env_id"].map(table[name]) for name in ("random", "human"))
    scores["score"] = (scores["score"] - random) / (human - random)
    least, most = min(0, scores["score"].min()), max(0.01, scores["score"].max())
    taus = [*np.linspace(least, min(most, 1), 101), *np.geomspace(1, max(most, 1), 101)[1 if most > 1 else 101 :]]
    frames = []
    for name, own in scores.groupby("experiment", sort=False):
        games = [game["score"].to_numpy() for _, game in own.groupby("env_id")]
        common = dict(experiment=name, games=len(games), runs=len(own), metric=[*METRICS, *taus])
        value, low, high = aggregate(games, np.array(taus), reps)
        frames.append(pd.DataFrame(common | dict(value=value, low=low, high=high)))
    figures, profiles = (pd.concat([f[part] for f in frames or [scores]]) for part in (slice(4), slice(4, None)))
    return [figures, profiles.rename(columns={"metric": "tau", "value": "share"}).infer_objects()]


# === Pictures =========================================================================================================
# a number on an axis; the line of a curve over others, among which dashes let an equal one be seen
short = lambda x, _=0: f"{x / 1e6:.4g}M" if abs(x) >= 1e6 else f"{x / 1e3:.4g}k" if abs(x) >= 1e4 else f"{x:.4g}"
line = lambda frame, others: (0, (4, 4)) if any(frame.equals(other) for other in others) else "-"


def draw_panel(ax: plt.Axes, axis: str, curves: dict[str, pd.DataFrame], published: dict[str, float], colors: dict):
    """One game: a line and a band for the curve of each experiment, dotted where some of its seeds are missing."""
    for i, (name, frame) in enumerate(curves.items()):
        x, mean, color = frame[axis], frame["mean"], colors[name]
        ax.plot(x, mean, ":", lw=1.2, color=color, marker="." if mean.count() == 1 else None)
        whole = mean.where(frame["seeds"] == frame["seeds"].max())
        ax.plot(x, whole, ls=line(frame, list(curves.values())[:i]), lw=1.5, color=color)
        ax.fill_between(x, frame["low"], frame["high"], color=color, alpha=0.25, lw=0)
    low, high = ax.dataLim.intervaly
    for i, (name, score) in enumerate(published.items()):
        if 2 * low - high <= score <= 2 * high - low:
            ax.axhline(score, color=colors[name], ls="--", lw=1)
        else:  # a line so far away would flatten the curves; the corner is where rising ones leave room
            at, text = (3, -3 - 13 * i), f"{'↑' if score > high else '↓'} {short(score)}"
            ax.annotate(text, (0, 1), at, "axes fraction", "offset points", color=colors[name], va="top")
    ax.set_xlim(left=0)


def draw_curves(curves: dict, axis: str, label: str, published: pd.DataFrame, colors: dict[str, str], path: Path):
    """A panel for each game. curves: {(experiment, game): curve}; published: scores of games, a column a reference."""
    games, seeds = {game: {} for _, game in curves}, dict.fromkeys((name for name, _ in curves), 0)
    for (name, game), frame in curves.items():
        seeds[name] = max(seeds[name], count := int(frame["seeds"].max()))
        games[game] |= {name: frame} if count else {}
    columns = len(games) if len(games) <= 3 else int(np.ceil(len(games) ** 0.5))
    rows = -(-len(games) // columns)
    width, height = (5.5, 4) if len(games) <= 4 else (3.4, 2.5) if len(games) <= 16 else (2.6, 2)
    fig = plt.figure(figsize=(max(columns * width, 6.5), rows * height + 1))
    for i, (game, own) in enumerate(sorted(games.items())):
        ax = fig.add_subplot(rows, columns, i + 1, title=game if own else f"{game}: no finished game")
        draw_panel(ax, axis, own, dict(published.loc[game]) if own and game in published.index else {}, colors)
        ax.xaxis.set(major_locator=MaxNLocator(5 if width > 3 else 3), major_formatter=short)
        ax.yaxis.set_major_formatter(short)
    fig.supxlabel(label, fontsize="large")
    fig.supylabel("return (the game's own score)", fontsize="large")
    lines = {f"{name} ({count} seed{'s' * (count != 1)})": (name, "-") for name, count in seeds.items()}
    lines |= {name: (name, "--") for name in published}
    handles = [plt.Line2D([], [], label=text, color=colors[name], ls=ls) for text, (name, ls) in lines.items()]
    equal = any(one.equals(other) for own in games.values() for one, other in combinations(own.values(), 2))
    note = "bands: 95 % bootstrap intervals over seeds; dotted: some seeds only" + "; dashes over a line: equal" * equal
    note = dict(title=note, title_fontsize="small") if max(seeds.values()) > 1 or len(seeds) > 1 else {}
    fig.legend(handles=handles, loc="outside upper center", ncols=1 if len(games) == 1 else 3, **note)
    fig.savefig(path)
    plt.close(fig)


def draw_scores(figures: pd.DataFrame, profiles: pd.DataFrame, colors: dict[str, str], path: Path) -> None:
    """METRICS with their intervals above, the performance profiles below."""
    names, percent = list(figures["experiment"].unique()), PercentFormatter(1)
    mosaic, heights = [list(METRICS), ["profile"] * len(METRICS)], [0.5 + 0.3 * len(names), 4]
    fig, axes = plt.subplot_mosaic(mosaic, figsize=(11, sum(heights) + 1), height_ratios=heights)
    profile = axes.pop("profile")
    for row in figures.itertuples():
        ax, y, color = axes[row.metric], names.index(row.experiment), colors[row.experiment]
        ax.plot([row.low, row.high], [y, y], color=color, lw=7, alpha=0.35, solid_capstyle="butt")
        ax.plot(row.value, y, "o", color=color, ms=5)
    for metric, ax in axes.items():
        ax.set(title=metric, ylim=(len(names) - 0.5, -0.5), xmargin=0.15)
        ax.set_yticks(range(len(names)), names if metric == "median" else [""] * len(names))
        ax.xaxis.set(major_formatter=percent, major_locator=MaxNLocator(3))
        ax.grid(axis="y", visible=False)
    curves = {
        name: frame[["tau", "share", "low", "high"]] for name, frame in profiles.groupby("experiment", sort=False)
    }
    for i, (name, frame) in enumerate(curves.items()):
        ls = "--" if name.startswith(PUBLISHED) else line(frame, list(curves.values())[:i])
        profile.plot(frame["tau"], frame["share"], ls=ls, color=colors[name], label=name)
        profile.fill_between(frame["tau"], frame["low"], frame["high"], color=colors[name], alpha=0.25, lw=0)
    if profiles["tau"].max() > 1:
        profile.set_xscale("symlog", linthresh=1)
        profile.set_xticks([0, 0.25, 0.5, 1, 2, 4, 8, 16, 64, 256])
    profile.set(xlim=profiles["tau"].agg(["min", "max"]), ylim=(0, 1.02))
    profile.set(xlabel="human-normalised score, 95 % bootstrap intervals", ylabel="share of runs with a higher score")
    profile.xaxis.set_major_formatter(percent)
    profile.yaxis.set_major_formatter(percent)
    profile.legend()
    fig.savefig(path)
    plt.close(fig)


# === Table ============================================================================================================
def figures_table(figures: pd.DataFrame, runs: pd.DataFrame, table: pd.DataFrame) -> str:
    """A line for each experiment and reference."""
    lines, played = [], table if runs.empty else table[table.index.isin(runs["env_id"])]
    for name, frame in figures.groupby("experiment", sort=False):
        bracket = lambda row: f" [{100 * row.low:.1f}, {100 * row.high:.1f}]" if np.isfinite(row.low) else ""
        cells = {row.metric: f"{100 * row.value:.1f} %{bracket(row)}" for row in frame.itertuples()}
        own = runs[runs["experiment"] == name]
        games, count, hours = frame["games"].iloc[0], f"{frame['runs'].iloc[0]}{unfinished(own)}", own["hours"]
        minutes = 60 * hours[own["finished"].astype(bool)].mean()
        if name.startswith(PUBLISHED):
            count, minutes = "means", played.get(f"{name.removeprefix(PUBLISHED)}_minutes", pd.Series()).mean()
        cells |= {"minutes a run": f"{minutes:.1f}".replace("nan", "")}
        lines.append({"experiment": name, "games": games, "runs": count} | cells)
    return markdown(lines[0], [line.values() for line in lines])


def games_table(runs: pd.DataFrame, table: pd.DataFrame, references: list[str]) -> str:
    """A line for each game: mean, standard deviation and number of the seeds' scores, beside the known ones."""

    def cell(own: pd.DataFrame) -> str:
        scores = own["score"].dropna()
        spread = f" ± {np.std(scores):.1f}" if len(scores) > 1 else ""
        return f"{scores.mean():.1f}{spread} ({len(scores)}{unfinished(own)})" if len(scores) else "no finished game"

    groups = runs.groupby(["experiment", "env_id"])
    cells = pd.Series({key: cell(own) for key, own in groups}).unstack(0, fill_value="")
    known = table[references].add_prefix(PUBLISHED).join(table[["random", "human"]]).map("{:.1f}".format)
    cells = cells.join(known).fillna("")
    return markdown(["score (seeds)", *cells], cells.itertuples())


def write_curves(options: Options, runs: pd.DataFrame, published: pd.DataFrame, colors: dict[str, str]) -> None:
    """steps and hours, as CSV and PNG; checkpoints that were played are an experiment of their own."""
    played = runs[runs["evaluation"].map(len) > 0]
    played = played.assign(log=played["evaluation"], experiment=played["experiment"] + EVALUATED)
    for axis in ("steps", "hours"):
        played[axis] = [log[axis].iloc[-1] for log in played["log"]]
    groups = pd.concat([runs, played]).groupby(["experiment", "env_id"])
    frames = " (4 frames each)" if runs["env_id"].isin(published.index).all() else ""  # others may be no Atari games
    for axis, label in [("steps", f"environment steps{frames}"), ("hours", "hours of training")]:
        curves = {key: curve(own, axis, options.points, options.reps) for key, own in groups}
        frame = pd.concat(curves, names=["experiment", "env_id"]).droplevel(2).dropna(subset="mean")
        frame.to_csv(options.out / f"{axis}.csv")
        if axis == "hours" and runs["hours"].max() < 2:
            curves = {key: own.assign(hours=60 * own["hours"]) for key, own in curves.items()}
            label = "minutes of training"
        draw_curves(curves, axis, label, published, colors, options.out / f"{axis}.png")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    require(options.points >= 2, "--points", options.points, "must be 2 or more", "--points 100")
    require(options.reps >= 2, "--reps", options.reps, "must be 2 or more", "--reps 2000")
    plt.rcParams |= LOOK
    none = pd.DataFrame(columns=["experiment", "env_id", "score", "finished", "hours", "record"])
    runs, notes = read_runs(options) if options.runs else (none, [])
    table = pd.read_csv(Path(__file__).with_name("atari57_reference.csv"), index_col="env_id")
    columns = [column for column in table if f"{column}_std" in table]
    ppo = {"clip_coef" in record["args"] for record in runs[runs["env_id"].isin(table.index)]["record"]}
    named = {"auto": ["cleanba_ppo_sync_1gpu" if clips else "cleanba_impala_1gpu" for clips in ppo]}
    named |= {"all": columns, "none": []} | {column: [column] for column in columns}
    for name in options.reference:
        require(name in named, "--reference", name, f"must be one of {', '.join(named)}", "--reference all")
    references = [column for column in columns if any(column in named[name] for name in options.reference)]
    require(len(runs) or references, "RUNS", "(empty)", "name directories of runs", "runs, or --reference all")
    options.out.mkdir(parents=True, exist_ok=True)
    names, parts, out = sorted({*runs["experiment"]}), [], options.out
    names += [PUBLISHED + column for column in references] + [name + EVALUATED for name in names]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    figures, profiles = score_frames(runs, references, table, options.reps)
    if len(figures):
        figures.to_csv(out / "scores.csv", index=False)
        profiles.to_csv(out / "profiles.csv", index=False)
        draw_scores(figures, profiles, colors, out / "scores.png")
        parts.append("Human-normalised scores:\n\n" + figures_table(figures, runs, table))
    if len(runs):
        write_curves(options, runs, table[references].add_prefix(PUBLISHED), colors)
        runs.drop(columns=["record", "log", "evaluation"]).to_csv(out / "runs.csv", index=False)
        parts.append(games_table(runs, table, references))
    late = [f"{r.experiment} {r.env_id} seed {r.seed} ({r.done:.0%})" for r in runs.itertuples() if not r.finished]
    unknown = sorted({*runs["env_id"]} - {*table.index})
    for what, names in {"unfinished, shown as far as they came": late, "no human score is known": unknown}.items():
        more = f" and {len(names) - 8} more" * (len(names) > 8)
        notes += [f"{what}: {', '.join(names[:8])}{more}"] * bool(names)
    notes += ["published: Huang et al. 2023, only means over seeds known, so no intervals"] * bool(references)
    parts += [f"Notes: {'; '.join(notes)}."] if notes else []
    (out / "table.md").write_text("\n\n".join(parts) + "\n")
    print(*parts, f"The files are in {out}.", sep="\n\n")


if __name__ == "__main__":
    main()
