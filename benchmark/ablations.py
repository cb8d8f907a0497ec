"""What each fix of the learning signal is worth: a tiny game, learned with the fix and without it.

    uv run benchmark/ablations.py cleanba_ppo_envpool.py cleanba_impala_envpool.py --seeds 1 2 3 4 5

Every ablation is a patch of the script's text, made on the fly, and a variant of the game in which the fix should
matter. Both arms play with the same seeds; the table gives their means and the mean difference with its 95 % interval
(Student's t over seeds). Rows of the CSV are single runs.
"""

import multiprocessing
import os
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pandas as pd
import tyro
from common import markdown
from scipy import stats
from tiny_game import FLAGS, TUNED, Catch, env_spec
from tqdm import tqdm

STEP = "        return reward, terminated\n"
LATE = """\
        late, self.late = getattr(self, "late", np.zeros_like(reward)), reward
        return late, terminated
"""
ENDED = "        return reward, terminated | truncated\n"
DOORS = "a limit of 16 steps and a door; played without the limit"
ALL_LATE = """\
        nothing = np.zeros_like(reward), np.zeros_like(terminated), np.zeros_like(self.is_reset_row)
        now = reward, terminated, self.is_reset_row
        reward, terminated, self.is_reset_row = getattr(self, "late", nothing)
        self.late = now
        return reward, terminated
"""
UNMASKED = {  # texts that only one of the algorithms has
    "is_reset_row = rollout.is_reset_row[:-1]": "is_reset_row = jnp.zeros_like(rollout.is_reset_row[:-1])",
    "weight = 1.0 - rollout.is_reset_row[:-1]": "weight = jnp.ones_like(rollout.reward)",
    "return jnp.where(rollout.is_reset_row[:-1], 0.0, error)": "return error",
}


# name: what is taken out; variant: of the game, in words; game: options of Catch; patches: {text: what it becomes}, for
# the texts that the script has; flags: that take it out
Ablation = namedtuple("Ablation", "name variant game patches flags", defaults=[{}])
ABLATIONS = [
    Ablation("reset rows are masked", "every third row is a reset row", dict(height=3), UNMASKED),
    Ablation("rewards are aligned", "the point comes at the end", {}, {STEP: LATE}),
    Ablation("rewards are aligned", "the point comes 3 steps after the landing", dict(delay=3), {STEP: LATE}),
    Ablation("rewards are aligned", "the point comes 3 steps before the end", dict(wait=3), {STEP: LATE}),
    Ablation("rewards, ends and reset rows are aligned", "the point comes at the end", {}, {STEP: ALL_LATE}),
    Ablation("time limits are bootstrapped", DOORS, dict(limit=16), {STEP: ENDED}),
    Ablation("lag 0, not 1", "the point comes at the end", {}, {}, dict(concurrency=True)),
]


def load(path: Path, patches: dict[str, str]) -> ModuleType:
    """A script as a module, patched. Raises ValueError unless it has one of the texts."""
    text = path.read_text()
    if patches and not any(old in text for old in patches):
        raise ValueError(f"{path} has none of: {', '.join(patches)}")
    for old, new in patches.items():
        text = text.replace(old, new)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    sys.modules[path.stem] = module  # dataclasses look their module up
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def play_unlimited(script: ModuleType, args: Any, params: Any, game: dict[str, int]) -> float:
    """Mean points that sampled actions score in 200 steps of 64 games without a time limit, until each ends."""
    network = script.make_network(args)

    @jax.jit
    def act(params, obs, key):
        logits, _ = network.apply(params, obs)
        return jax.random.categorical(key, logits)

    pool = Catch(list(range(64)), **game | dict(limit=10**9))
    obs, _ = pool.reset()
    points = np.zeros(64)
    alive = np.ones(64, bool)
    for t in range(200):
        key = jax.random.key(1000 * args.seed + t)
        action = np.asarray(act(params, obs, key))
        obs, reward, terminated, _, _ = pool.step(action)
        points[alive] += reward[alive]
        alive &= ~terminated
    return points.mean()


def isolate() -> None:
    """Let this process, a worker, write to a folder of its own and print nothing."""
    os.chdir(tempfile.mkdtemp(prefix="cleanba-ablation-"))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def run(job: tuple[Path, int, bool, int, int]) -> dict[str, Any]:
    """One run; job: (script, index of the ablation, whether the fix is in, seed, steps)."""
    path, index, fixed, seed, steps = job
    ablation = ABLATIONS[index]
    script = load(path, {} if fixed else ablation.patches)
    pools = []
    reports = []

    def make_env(args, seeds, num_threads):
        pools.append(Catch(seeds, **ablation.game))
        return pools[-1]

    class Report(script.Report):
        def begin(self):
            reports.append(self)
            super().begin()

    script.env_spec = env_spec
    script.make_env = make_env
    script.Report = Report
    flags = FLAGS | TUNED[hasattr(script, "ppo_loss")]
    if not fixed:
        flags |= ablation.flags
    args = script.Args(**flags, seed=seed, total_timesteps=steps, log_frequency=10**6)
    isolate()
    script.train(args)
    last_scores = [pool.scores[-len(pool.scores) // 5 :] for pool in pools]
    score = np.concatenate(last_scores).mean()
    if "limit" in ablation.game:
        score = play_unlimited(script, args, reports[0].params, ablation.game)
    score_of_all_games = np.concatenate([pool.scores for pool in pools]).mean()
    row = dict(script=path.stem, fix=ablation.name, game=ablation.variant, fixed=fixed, seed=seed, steps=steps)
    return row | dict(score=score, score_of_all_games=score_of_all_games)


@dataclass(frozen=True)
class Options:
    scripts: tyro.conf.Positional[tuple[Path, ...]]  # scripts to take apart
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seeds of both arms
    steps: int = 60_000  # environment steps of a run
    only: tuple[int, ...] = ()  # numbers of ablations, from 0; none are all
    workers: int = 2  # runs at a time
    out: Path | None = None  # a CSV of all runs


def interval(with_fix: np.ndarray, without: np.ndarray) -> tuple[float, float, float]:
    """Mean difference of pairs, and its 95 % interval by Student's t. NaN with fewer than two pairs."""
    difference = with_fix - without
    mean = difference.mean()
    if len(difference) < 2:
        return mean, np.nan, np.nan
    low, high = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    return mean, low, high


def table(rows: pd.DataFrame) -> str:
    """A line for each script and ablation."""
    header = ["script", "fix", "game", "score with", "without", "worth [95 %]", "in all games"]
    lines = []
    for key, own in rows.groupby(["script", "fix", "game"], sort=False):
        runs = own.sort_values("seed")
        with_fix = runs[runs["fixed"]]
        without = runs[~runs["fixed"]]
        line = [*key]
        for arm in (with_fix, without):
            line.append(f"{arm['score'].mean():.2f}")
        for score in ("score", "score_of_all_games"):
            worth = interval(with_fix[score].to_numpy(), without[score].to_numpy())
            line.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*worth))
        lines.append(line)
    return markdown(header, lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    missing = [str(path) for path in options.scripts if not path.is_file()]
    if missing or not options.scripts:
        named = " ".join(missing) or "(empty)"
        sys.exit(f"error: SCRIPTS {named}: must be scripts. For example: cleanba_ppo_envpool.py")
    paths = [path.resolve() for path in options.scripts]
    chosen = options.only or range(len(ABLATIONS))
    jobs = list(product(paths, chosen, (True, False), options.seeds, [options.steps]))
    os.environ.setdefault("NPROC", "1")  # the network is too small for more, and the workers have the cores
    context = multiprocessing.get_context("spawn")
    # a worker takes one run: patched modules leave no traces
    with ProcessPoolExecutor(options.workers, context, max_tasks_per_child=1) as workers:
        runs = tqdm(workers.map(run, jobs), total=len(jobs), unit=" runs", disable=None)
        rows = pd.DataFrame(runs)
    if options.out:
        rows.to_csv(options.out, index=False)
    print(table(rows))


if __name__ == "__main__":
    main()
