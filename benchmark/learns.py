"""Did it learn? The games of finished runs against those of a random policy.

    uv run benchmark/learns.py cleanba_ppo_envpool.py 'runs/KungFuMaster-v5__*'

The random policy plays in the script's own environments, with the game and the image size of the run. A run has
learned if the mean score of its last 50 games is at least three times the random policy's and it was still rising: the
games that ended in the last quarter of its steps scored more than those of the quarter before. Prints a table and exits
with 1 unless every run has learned. A run that has no log, or no run.json that can be read, is named and has not.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tyro
from common import load_script, markdown, require
from plot import find_runs, last_score, read_run

FACTOR = 3
LAST = 50
HEADER = ["run", "steps", "minutes", "random", "quarter 1", "quarter 2", "quarter 3", "quarter 4", f"last {LAST} games"]
HEADER += ["last / random", "learned"]


@dataclass(frozen=True)
class Options:
    script: tyro.conf.Positional[Path]  # the script that trained the runs
    runs: tyro.conf.Positional[tuple[str, ...]]  # directories of runs, or above them, or globs
    games: int = 200  # games of the random policy


def random_scores(script: ModuleType, args: Any, games: int) -> list[float]:
    """Scores of the first `games` games that end while every action is equally probable, as a run counts its own."""
    seeds = script.env_seeds(args.seed, 0, 0, 16)
    envs = script.Envs(script.make_env(args, seeds, script.num_cores()))
    generator = np.random.default_rng(args.seed)
    _, actions = script.env_spec(args)
    while len(envs.games) < games:
        envs.step(generator.integers(actions, size=16, dtype=np.int32))
    return [score for score, _ in envs.games[:games]]


def judge(run: dict[str, Any], chance: float) -> list[Any]:
    """A run's line of the table. chance: the random policy's mean score."""
    log = run["log"]
    quarter = np.ceil(4 * log["steps"] / run["steps"])
    quarters = [last_score(log[quarter == i], sys.maxsize) for i in (1, 2, 3, 4)]
    last = last_score(log, LAST)
    whole = run["finished"] and log["games"].sum() >= LAST
    rising = quarters[3] > quarters[2]
    learned = whole and rising and last >= FACTOR * chance
    figures = [60 * run["hours"], chance, *quarters, last]
    cells = [f"{figure:.1f}" for figure in figures]
    return [run["path"].name, run["steps"], *cells, f"{last / chance:.1f} x", "yes" if learned else "no"]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    script = load_script(options.script)
    require(options.runs, "RUNS", "(empty)", "name directories of runs", "runs")
    paths = find_runs(options.runs)
    chances = {}  # {(game, image size): the random policy's mean score}
    lines = []
    for path in paths:
        run = read_run(path)
        if run is None or "platform" not in run["record"]:
            print(f"{path} is passed over: it has no log yet, or no run.json of these scripts", file=sys.stderr)
            continue
        flags = run["record"]["args"]
        trained_by = f"{run['record']['platform']['script']}.py"
        rule = f"the run {path} is one of {trained_by}"
        require(trained_by == options.script.name, "SCRIPT", options.script, rule, trained_by)
        game = {name: flags[name] for name in ("env_id", "img_size") if name in flags}
        key = tuple(game.values())
        if key not in chances:
            chances[key] = np.mean(random_scores(script, script.Args(**game), options.games))
        chance = chances[key]
        rule = f"chance scores {chance:g} in {key[0]}, of which no multiple says anything"
        require(chance > 0, "RUNS", path, rule, "runs of another game")
        lines.append(judge(run, chance))
    require(lines, "RUNS", " ".join(options.runs), "no run there has logged what can be judged", "runs")
    print(markdown(HEADER, lines))
    failed = len(paths) - sum(line[-1] == "yes" for line in lines)
    if failed:
        sys.exit(f"{failed} of {len(paths)} runs have not learned: {FACTOR} times the random score, and still rising.")


if __name__ == "__main__":
    main()
