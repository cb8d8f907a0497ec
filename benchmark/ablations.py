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
from typing import Annotated, Any

import jax
import numpy as np
import pandas as pd
import tyro
from common import markdown
from scipy import stats
from tqdm import tqdm

SIZE = 8  # of the board, and of the observation
DOOR = 1.5  # points for leaving: less than chance scores in 100 steps, more than a good player on average in 16


class Catch:
    """Stands in for an EnvPool pool. A block falls from a random column; a paddle moves left, stays or moves right.

    Catching it scores 1, missing 0; either ends the episode. Every block can be caught; chance catches one in eight.

    height: rows that the block falls through. delay: steps from the landing to its point, and wait: from there to the
    end, in which nothing moves.
    limit: with it a new block comes instead of the end, and the episode is cut after so many steps. There is then a
    door too: moving left from the leftmost column ends the episode and scores DOOR.
    """

    def __init__(self, seeds: list[int], height: int = SIZE, delay: int = 0, wait: int = 0, limit: int = 0):
        self.height, self.delay, self.wait, self.limit = height, delay, wait, limit
        self.generators = [np.random.default_rng(seed % 2**32) for seed in seeds]
        self.env = np.arange(len(seeds))
        self.score, self.scores = np.zeros(len(seeds)), []  # of whole games

    def drop(self, which: np.ndarray, place_paddle: bool) -> None:
        """Let new blocks fall in the environments `which`, bool[B], and place the paddle within reach."""
        for i in np.flatnonzero(which):
            self.column[i], self.row[i], self.waited[i] = self.generators[i].integers(SIZE), SIZE - self.height, 0
            if place_paddle:
                low, high = self.column[i] - self.height + 1, self.column[i] + self.height
                self.paddle[i] = self.generators[i].integers(max(0, low), min(SIZE, high))
                self.age[i] = 0

    def observe(self) -> np.ndarray:
        obs = np.zeros((len(self.env), 4, SIZE, SIZE), np.uint8)
        obs[self.env, 3, self.row, self.column] = 255
        obs[self.env, 3, SIZE - 1, self.paddle] = 255
        return obs

    def reset(self):
        self.column, self.paddle, self.row, self.waited, self.age = np.zeros((5, len(self.env)), int)
        self.over = np.zeros(len(self.env), bool)
        self.drop(~self.over, True)
        return self.observe(), {}

    def step(self, action: np.ndarray):
        """Like EnvPool's: after an episode's end the action is ignored, and a new episode begins."""
        wasted, falls = self.over, self.row < SIZE - 1
        leaves = ~wasted & (self.limit > 0) & (self.paddle == 0) & (action == 0)
        self.paddle = np.where(wasted | ~falls, self.paddle, np.clip(self.paddle + action - 1, 0, SIZE - 1))
        self.row = np.where(wasted | ~falls, self.row, self.row + 1)
        self.waited = np.where(wasted | falls, self.waited, self.waited + 1)
        self.age = self.age + ~wasted
        down = ~wasted & (self.row == SIZE - 1)
        landed, ends = down & (self.waited == self.delay), down & (self.waited == self.delay + self.wait)
        reward = np.where(leaves, DOOR, landed & (self.paddle == self.column)).astype(np.float32)
        terminated = leaves if self.limit else ends
        truncated = ~terminated & ~wasted & (self.limit > 0) & (self.age == self.limit)
        self.over = terminated | truncated
        self.score += reward
        self.scores += self.score[self.over].tolist()
        self.score[self.over] = 0
        self.drop(wasted, True)
        self.drop(landed & ~self.over & (self.limit > 0), False)
        info = {"reward": reward, "terminated": terminated.astype(np.int32)}
        return self.observe(), reward, terminated, truncated, info


# === The ablations ====================================================================================================
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
# the texts that the script has; flags: with and without
Ablation = namedtuple("Ablation", "name variant game patches flags", defaults=[({}, {})])
ABLATIONS = [
    Ablation("reset rows are masked", "every third row is a reset row", dict(height=3), UNMASKED),
    Ablation("rewards are aligned", "the point comes at the end", {}, {STEP: LATE}),
    Ablation("rewards are aligned", "the point comes 3 steps after the landing", dict(delay=3), {STEP: LATE}),
    Ablation("rewards are aligned", "the point comes 3 steps before the end", dict(wait=3), {STEP: LATE}),
    Ablation("rewards, ends and reset rows are aligned", "the point comes at the end", {}, {STEP: ALL_LATE}),
    Ablation("time limits are bootstrapped", DOORS, dict(limit=16), {STEP: ENDED}),
    Ablation("lag 0, not 1", "the point comes at the end", {}, {}, ({"concurrency": False}, {"concurrency": True})),
]
FLAGS = dict(img_size=SIZE, channels=(16,), hiddens=(64,), local_num_envs=16, num_actor_threads=2, num_steps=32)
TUNED = {True: dict(learning_rate=2e-3), False: dict(learning_rate=2e-2)}  # PPO; IMPALA


def load(path: Path, patches: dict[str, str]) -> ModuleType:
    """A script as a module, patched. Raises ValueError unless it has one of the texts."""
    text = path.read_text()
    if patches and not any(old in text for old in patches):
        raise ValueError(f"{path} has none of: {', '.join(patches)}")
    for old, new in patches.items():
        text = text.replace(old, new)
    module = ModuleType(path.stem)
    module.__file__, sys.modules[path.stem] = str(path), module  # dataclasses look their module up
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def play_unlimited(script: ModuleType, args: Any, params: Any, game: dict[str, int]) -> float:
    """Mean points that sampled actions score in 200 steps of 64 games without a time limit, until each ends."""
    network, pool = script.make_network(args), Catch(list(range(64)), **game)
    act = jax.jit(lambda p, obs, key: jax.random.categorical(key, network.apply(p, obs)[0]))
    (obs, _), points, alive = pool.reset(), np.zeros(64), np.ones(64, bool)
    for t in range(200):
        obs, reward, terminated, _, _ = pool.step(np.asarray(act(params, obs, jax.random.key(1000 * args.seed + t))))
        points += alive * reward
        alive &= ~terminated
    return float(points.mean())


def run(job: tuple[Path, int, bool, int, int]) -> dict[str, Any]:
    """One run; job: (script, index of the ablation, whether the fix is in, seed, steps)."""
    path, index, fixed, seed, steps = job
    ablation, pools, params = ABLATIONS[index], [], []
    script = load(path, {} if fixed else ablation.patches)
    script.env_spec = lambda args: ((4, SIZE, SIZE), 3)
    script.make_env = lambda args, seeds, threads: pools.append(Catch(seeds, **ablation.game)) or pools[-1]
    end = script.Report.end  # whose arguments are status, network, parameters, signals_received
    script.Report.end = lambda report, *last: params.append(last[2]) or end(report, *last)
    tuned = TUNED[hasattr(script, "ppo_loss")] | ablation.flags[not fixed]
    args = script.Args(**FLAGS, **tuned, seed=seed, total_timesteps=steps, log_frequency=10**6)
    os.chdir(tempfile.mkdtemp(prefix="cleanba-ablation-"))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (of a worker process)
    script.train(args)
    last = [pool.scores[-len(pool.scores) // 5 :] for pool in pools]
    points = float(np.mean(np.concatenate(last)))
    if "limit" in ablation.game:
        points = play_unlimited(script, args, params[0], ablation.game | dict(limit=10**9))
    row = dict(script=path.stem, fix=ablation.name, game=ablation.variant, fixed=fixed, seed=seed, steps=steps)
    return row | dict(score=points, score_of_all_games=float(np.mean(np.concatenate([pool.scores for pool in pools]))))


@dataclass(frozen=True)
class Options:
    scripts: tyro.conf.Positional[tuple[Path, ...]]  # scripts to take apart
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seeds of both arms
    steps: int = 60_000  # environment steps of a run
    only: Annotated[tuple[int, ...], tyro.conf.arg(help="numbers of ablations, from 0; none are all")] = ()
    workers: int = 2  # runs at a time
    out: Path | None = None  # a CSV of all runs


def interval(with_fix: np.ndarray, without: np.ndarray) -> tuple[float, float, float]:
    """Mean difference of pairs, and its 95 % interval by Student's t. NaN with fewer than two pairs."""
    difference = with_fix - without
    mean, few = float(difference.mean()), len(difference) < 2
    return mean, *((np.nan, np.nan) if few else stats.ttest_1samp(difference, 0).confidence_interval(0.95))


def table(rows: pd.DataFrame) -> str:
    """A line for each script and ablation."""
    lines = []
    for key, own in rows.groupby(["script", "fix", "game"], sort=False):
        arms = {fixed: arm.sort_values("seed") for fixed, arm in own.groupby("fixed")}
        with_fix, without = (f"{arms[fixed]['score'].mean():.2f}" for fixed in (True, False))
        worth = [
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval(*(arms[fixed][name].to_numpy() for fixed in (True, False))))
            for name in ("score", "score_of_all_games")
        ]
        lines.append([*key, with_fix, without, *worth])
    header = ["script", "fix", "game", "score with", "without", "worth [95 %]", "in all games"]
    return markdown(header, lines)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if missing := [str(path) for path in options.scripts or [Path("(empty)")] if not path.is_file()]:
        sys.exit(f"error: SCRIPTS {' '.join(missing)}: must be scripts. For example: cleanba_ppo_envpool.py")
    paths, chosen = [path.resolve() for path in options.scripts], options.only or range(len(ABLATIONS))
    jobs = list(product(paths, chosen, (True, False), options.seeds, [options.steps]))
    os.environ.setdefault("NPROC", "1")  # the network is too small for more, and the workers have the cores
    # a worker takes one run: patched modules leave no traces
    spawn = dict(mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with ProcessPoolExecutor(options.workers, **spawn) as pool:
        rows = pd.DataFrame(tqdm(pool.map(run, jobs), total=len(jobs), unit=" runs", disable=None))
    if options.out:
        rows.to_csv(options.out, index=False)
    print(table(rows))


if __name__ == "__main__":
    main()
