"""Did it learn? The games of finished runs against those of a random policy.

    uv run benchmark/learns.py cleanba_ppo_envpool.py 'runs/KungFuMaster-v5__*'

The random policy plays in the script's own environments, with the game and the image size of the run. A run has
learned if the mean score of its last 50 games is at least three times the random policy's and it was still rising: the
games that ended in the last quarter of its steps scored more than those of the quarter before. Prints a table and exits
with 1 unless every run has learned.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tyro
from evaluate import OptionError, load_script
from plot import Run, find_runs, last_score, markdown, read_run, stop

FACTOR, LAST = 3, 50


@dataclass(frozen=True)
class Options:
    script: tyro.conf.Positional[Path]  # the script that trained the runs
    runs: tyro.conf.Positional[tuple[str, ...]]  # directories of runs, or above them, or globs
    games: int = 200  # games of the random policy


def random_scores(script: ModuleType, args: Any, games: int) -> list[float]:
    """Scores of the first `games` games that end while every action is equally probable, as a run counts its own."""
    envs = script.Envs(script.make_env(args, script.env_seeds(args.seed, 0, 0, 16), script.num_cores()))
    generator, actions, scores = np.random.default_rng(args.seed), script.env_spec(args)[1], []
    while len(scores) < games:
        envs.step(generator.integers(actions, size=16, dtype=np.int32))
        scores += [score for score, _ in envs.pop_games()]
    return scores[:games]


def quarters(run: Run) -> list[float]:
    """Mean scores of the games that ended in each quarter of the run's steps; NaN where there are none."""
    number = np.ceil(4 * run.x["steps"] / run.end["steps"])
    own = [number == i for i in range(1, 5)]
    return [float(np.average(run.value[o], weights=run.games[o])) if o.any() else np.nan for o in own]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        script = load_script(options.script)
    except OptionError as error:
        stop(f"SCRIPT: {error}")
    if not options.runs:
        stop("RUNS (empty): name directories of runs. For example: runs")
    rows, failed, randoms = [], 0, {}
    for path in find_runs(options.runs):
        run = read_run(path)
        if run is None:
            stop(f"RUNS {path}: has not logged anything yet. For example: a finished run")
        flags, trained_by = run.record["args"], run.record["around"]["script"]
        if trained_by != options.script.stem:
            stop(f"SCRIPT {options.script}: the run {path} is one of {trained_by}.py. For example: {trained_by}.py")
        game = flags["env_id"], flags["img_size"]
        if game not in randoms:
            args = script.Args(env_id=game[0], img_size=game[1])
            randoms[game] = float(np.mean(random_scores(script, args, options.games)))
            if randoms[game] <= 0:
                stop(f"RUNS {path}: chance scores {randoms[game]:g} in {game[0]}, of which no multiple says anything")
        scores, last = quarters(run), last_score(run.value, run.games, LAST)
        ratio = last / randoms[game]
        learned = run.finished and run.games.sum() >= LAST and ratio >= FACTOR and scores[3] > scores[2]
        failed += not learned
        cells = [f"{number:.1f}" for number in (60 * run.end["hours"], randoms[game], *scores, last)]
        rows.append([path.name, f"{run.end['steps']}", *cells, f"{ratio:.1f} x", "yes" if learned else "no"])
    parts = ["first quarter", "second", "third", "fourth"]
    header = ["run", "steps", "minutes", "random", *parts, f"last {LAST} games", "last / random", "learned"]
    print(markdown(header, rows))
    if failed:
        sys.exit(f"{failed} of {len(rows)} runs have not learned: {FACTOR} times the random score, and still rising.")


if __name__ == "__main__":
    main()
