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

FACTOR, LAST = 3, 50


@dataclass(frozen=True)
class Options:
    script: tyro.conf.Positional[Path]  # the script that trained the runs
    runs: tyro.conf.Positional[tuple[str, ...]]  # directories of runs, or above them, or globs
    games: int = 200  # games of the random policy


def random_scores(script: ModuleType, args: Any, games: int) -> list[float]:
    """Scores of the first `games` games that end while every action is equally probable, as a run counts its own."""
    envs = script.Envs(script.make_env(args, script.env_seeds(args.seed, 0, 0, 16), script.num_cores()))
    generator, actions = np.random.default_rng(args.seed), script.env_spec(args)[1]
    while len(envs.games) < games:
        envs.step(generator.integers(actions, size=16, dtype=np.int32))
    return [score for score, _ in envs.games[:games]]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    script, rows, randoms = load_script(options.script), [], {}
    require(options.runs, "RUNS", "(empty)", "name directories of runs", "runs")
    paths = find_runs(options.runs)
    for path in paths:
        run = read_run(path)
        if run is None or "platform" not in run["record"]:
            print(f"{path} is passed over: it has no log yet, or no run.json of these scripts", file=sys.stderr)
            continue
        flags, trained_by, log = run["record"]["args"], f"{run['record']['platform']['script']}.py", run["log"]
        rule = f"the run {path} is one of {trained_by}"
        require(trained_by == options.script.name, "SCRIPT", options.script, rule, trained_by)
        game = {name: flags[name] for name in ("env_id", "img_size") if name in flags}
        chance = randoms.get(key := tuple(game.values())) or np.mean(
            random_scores(script, script.Args(**game), options.games)
        )
        rule, randoms[key] = f"chance scores {chance:g} in {key[0]}, of which no multiple says anything", chance
        require(chance > 0, "RUNS", path, rule, "runs of another game")
        quarter, last = np.ceil(4 * log["steps"] / run["steps"]), last_score(log, LAST)
        scores = {f"quarter {i}": last_score(log[quarter == i], sys.maxsize) for i in range(1, 5)}
        enough = run["finished"] and log["games"].sum() >= LAST and last >= FACTOR * chance
        learned = "yes" if enough and scores["quarter 4"] > scores["quarter 3"] else "no"
        figures = {"minutes": 60 * run["hours"], "random": chance, **scores, f"last {LAST} games": last}
        cells = {name: f"{x:.1f}" for name, x in figures.items()}
        row = {"run": path.name, "steps": run["steps"], **cells, "last / random": f"{last / chance:.1f} x"}
        rows.append(row | {"learned": learned})
    require(rows, "RUNS", " ".join(options.runs), "no run there has logged what can be judged", "runs")
    print(markdown(rows[0], [row.values() for row in rows]))
    if failed := len(paths) - sum(row["learned"] == "yes" for row in rows):
        sys.exit(f"{failed} of {len(paths)} runs have not learned: {FACTOR} times the random score, and still rising.")


if __name__ == "__main__":
    main()
