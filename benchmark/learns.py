"""Did it learn? The games of finished runs against those of a random policy.

    uv run benchmark/learns.py cleanba_ppo_envpool.py 'runs/KungFuMaster-v5__*'

The random policy plays in the script's own environments, with the flags of the runs. A run has learned if the mean
score of its last 50 games is at least three times the random policy's and it was still rising: the games that ended
in the last quarter of its steps scored more than those of the quarter before. Prints a table and exits with 1 unless
every run has learned.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tyro
from evaluate import load_script
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


def quarter(run: Run, number: int) -> float:
    """Mean score of the games that ended in a quarter of the run's steps, 0 to 3; NaN if there are none."""
    quarters = np.ceil(4 * run.x["steps"] / run.end["steps"]) - 1
    own = quarters == number
    return float(np.average(run.value[own], weights=run.games[own])) if own.any() else np.nan


def has_learned(run: Run, random: float) -> bool:
    high = last_score(run.value, run.games, LAST) >= FACTOR * random
    return run.finished and run.games.sum() >= LAST and high and quarter(run, 3) > quarter(run, 2)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    script, rows, failed, randoms = load_script(options.script), [], 0, {}
    for path in find_runs(options.runs):
        run = read_run(path)
        if run is None:
            stop(f"RUNS {path}: has not logged anything yet. For example: a finished run")
        flags = json.loads((path / "run.json").read_text())["args"]
        game = flags["env_id"], flags["img_size"]
        if game not in randoms:
            args = script.Args(env_id=game[0], img_size=game[1])
            randoms[game] = float(np.mean(random_scores(script, args, options.games)))
            if randoms[game] <= 0:
                stop(f"RUNS {path}: chance scores {randoms[game]:g} in {game[0]}, of which no multiple says anything")
        last, learned = last_score(run.value, run.games, LAST), has_learned(run, randoms[game])
        failed += not learned
        numbers = [60 * run.end["hours"], randoms[game], *(quarter(run, number) for number in range(4)), last]
        cells = [f"{number:.1f}" for number in numbers]
        rows.append(
            [path.name, f"{run.end['steps']}", *cells, f"{last / randoms[game]:.0f} x", "yes" if learned else "no"]
        )
    quarters = ["first quarter", "second", "third", "fourth"]
    header = ["run", "steps", "minutes", "random", *quarters, f"last {LAST} games", "last / random", "learned"]
    print(markdown(header, rows))
    if failed:
        sys.exit(f"{failed} of {len(rows)} runs have not learned: {FACTOR} times the random score, and still rising.")


if __name__ == "__main__":
    main()
