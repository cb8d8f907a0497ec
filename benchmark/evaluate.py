"""Scores of a trained agent, a video of one of its games, and its upload to the Hugging Face Hub.

    uv run benchmark/evaluate.py cleanba_ppo_envpool.py runs/NAME --episodes 10
    uv run benchmark/evaluate.py cleanba_ppo_envpool.py runs/NAME --every-checkpoint
    uv run --extra video benchmark/evaluate.py cleanba_ppo_envpool.py runs/NAME --video game.mp4
    uv run --extra upload benchmark/evaluate.py cleanba_ppo_envpool.py runs/NAME --upload USER/NAME

The script plays the games with its own `play_games`: whole games, one for each environment so that short ones do not
count double, with the game's own points. Same model, script and flags: same scores. A game that does not end is cut
after --max-minutes, and counts with its score so far. The video shows the first game.

--every-checkpoint plays all checkpoints that the run has kept (--keep-checkpoints 0 keeps all) and writes, for plot.py
to draw, RUN/evaluation.csv: update, steps, games, cut (how many of them), mean and std of the scores, scores.

An upload is first written to the folder `upload` beside the model, so nothing is lost when the Hub is out of reach.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import jax
import numpy as np
import tyro
from common import find_run, load_script, read_json, require, stop
from tyro.conf import Positional, arg

STEPS_A_MINUTE = 900  # the console draws 60 frames a second, and a step is four


@dataclass(frozen=True)
class Options:
    script: Annotated[Path, Positional, arg(metavar="SCRIPT")]  # the script that trained the agent
    model: Annotated[Path, Positional, arg(metavar="MODEL_OR_RUN")]  # a run, or its model.msgpack
    episodes: int = 10  # games, each in an environment of its own
    max_minutes: float = 10.0  # of the console's time, after which a game is cut; the scripts' own limit is 30
    greedy: bool = False  # always play the most probable action, instead of sampling
    seed: int | None = None  # of the games and the actions; the run's own if not given
    every_checkpoint: bool = False  # play every checkpoint that the run has kept, and write its evaluation.csv
    video: Path | None = None  # film the first game, in colour, to this .mp4 (pip install imageio imageio-ffmpeg)
    upload: str | None = None  # push model, card, video to this repository, USER/NAME (pip install huggingface_hub)


def check_options(options: Options) -> None:
    """All that can be said before anything is loaded."""
    minutes = options.max_minutes
    seed = options.seed
    video = options.video
    repo = options.upload
    require(options.episodes >= 1, "--episodes", options.episodes, "must be 1 or more", "--episodes 10")
    require(0 < minutes < np.inf, "--max-minutes", minutes, "must be above 0", "--max-minutes 10")
    require(seed is None or 0 <= seed < 2**32, "--seed", seed, "must be 0 to 4294967295", "--seed 1")
    if options.every_checkpoint:
        rule = "plays many models, of which none is filmed or uploaded"
        require(video is None and repo is None, "--every-checkpoint", True, rule, "without --video and --upload")
    if video is not None:
        require(video.suffix == ".mp4", "--video", video, "must end in .mp4", f"--video {video.with_suffix('.mp4')}")
        installed = find_spec("imageio") and find_spec("imageio_ffmpeg")
        require(installed, "--video", video, "needs two packages", "pip install imageio imageio-ffmpeg")
    if repo is not None:
        require(find_spec("huggingface_hub"), "--upload", repo, "needs a package", "pip install huggingface_hub")
        require(re.fullmatch(r"[\w.-]+/[\w.-]+", repo), "--upload", repo, "must be USER/NAME", "--upload me/pong")


class Model(NamedTuple):
    """A trained agent."""

    source: str  # where it was found
    directory: Path  # of the file or the run
    trained_by: str  # the script's name
    args: Any  # the script's Args of the run
    network: Any
    params: Any
    update: int = 0  # of a checkpoint
    steps: int = 0  # of the environments, until that update


def read_checkpoints(script: ModuleType, run: Path, every: bool) -> list[Model]:
    """The newest checkpoint of a run, or every one, oldest first; those that are broken or gone are passed over."""
    models = []
    for path in reversed(script.find_checkpoints(run)):
        try:
            content = script.unpack(path.read_bytes())
        except (OSError, ValueError) as error:
            print(f"{path} is passed over: {error}")
            continue
        update = content["update"]
        params = content["state"]["0"]["params"]
        record = json.loads(content["record"])
        args = script.with_tuples(script.Args(**record["args"]))
        steps = update * args.local_num_envs * args.num_steps * record["hyper_parameters"]["actors"]
        source = f"{run}, checkpoint of update {update}"
        trained_by = record["platform"]["script"]
        models.insert(0, Model(source, run, trained_by, args, script.make_network(args), params, update, steps))
        if not every:
            break
    return models


def find_models(script: ModuleType, options: Options) -> list[Model]:
    """The model in a file, or of a run, or all checkpoints of the run; stops if another script's.

    A run that has not written model.msgpack, because it goes on or was killed, plays from its newest whole checkpoint.
    """
    path = find_run(options.model)
    file = path / "model.msgpack" if path.is_dir() else path
    every = options.every_checkpoint
    from_file = file.is_file() and not every
    missing = "no checkpoint" if every else "no model and no checkpoint"
    found = from_file or script.find_checkpoints(path)
    require(found, "MODEL_OR_RUN", path, f"no such run, or {missing} in it", "runs/NAME of a run that has ended")
    try:
        if from_file:
            trained_by = script.unpack(file.read_bytes())["script"]
            models = [Model(str(file), file.parent, trained_by, *script.load_model(file))]
        else:
            models = read_checkpoints(script, path, every)
            require(models, "MODEL_OR_RUN", path, "none of its checkpoints can be read", "another run")
        newest = models[-1]
        obs_shape, _ = script.env_spec(newest.args)
        wanted = jax.eval_shape(newest.network.init, jax.random.key(0), np.zeros((1, *obs_shape)))
    except Exception as error:  # whatever a foreign or broken file makes the libraries raise
        reason = " ".join(str(error).split())
        rule = f"is no model of {options.script.name} ({reason[:200]})"
        stop("MODEL_OR_RUN", path, rule, "the script that trained it")
    shapes = jax.tree.map(np.shape, wanted)
    for model in models:
        fits = jax.tree.map(np.shape, model.params) == shapes
        require(fits, "MODEL_OR_RUN", path, f"has not the network of {options.script.name}", "its own script")
    trainer = options.script.with_name(f"{newest.trained_by}.py")
    if trainer.is_file():  # siblings differ where no shape does; of any other script a user may judge
        rule = f"was trained by {trainer.name}, not by {options.script.name}"
        require(trainer == options.script, "MODEL_OR_RUN", path, rule, trainer.name)
    return models


class Greedy(NamedTuple):
    """Stands in for a network: its most probable action, the first of equals, has all the probability."""

    network: Any

    def apply(self, params, *inputs):
        logits, *rest = self.network.apply(params, *inputs)
        return 1e9 * jax.nn.one_hot(logits.argmax(1), logits.shape[1]), *rest  # sampling adds noise far below that


def open_film(path: Path):
    """The encoder, which is given one frame after the other: a long game has thousands."""
    os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")  # its usual fork may hang beside JAX's threads
    import imageio.v2 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    return imageio.get_writer(path, fps=15, macro_block_size=2)  # every fourth frame, and no resizing


@contextmanager
def watched(script: ModuleType, options: Options) -> Iterator[list[int]]:
    """While this lasts, the first games of the script's environments are shown, filmed (that of environment 0), cut.

    Yields the environments whose first game was cut. The scripts know nothing of this.
    """
    limit = round(options.max_minutes * STEPS_A_MINUTE)
    live = sys.stdout.isatty()
    film = open_film(options.video) if options.video else nullcontext()
    rendered = {"render_mode": "rgb_array"} if options.video else {}
    env_options = script.env_options
    cut = []

    class Watched(script.Envs):
        def __init__(self, pool):
            super().__init__(pool)
            self.over = self.game_over  # where the first game is over: nowhere yet
            self.film_frame()

        def find_games_over(self, ended, lives):
            """What is cut looks like an end to `play_games`, which counts the first game of each environment."""
            too_long = self.length >= limit
            cut.extend(np.flatnonzero(too_long & ~ended & ~self.over))
            super().find_games_over(ended | too_long, lives)

        def step(self, action):
            step = self.steps_begun
            result = super().step(action)
            self.film_frame()
            self.over = self.over | self.game_over
            if live and step % 15 == 0:
                most = f"{step / STEPS_A_MINUTE:.1f} of at most {options.max_minutes:g} minutes"
                print(f"\x1b[K{self.over.sum()} of {len(self.over)} games over, {most}", end="\r")
            return result

        def film_frame(self):
            if video and not self.over[0]:
                (frame,) = self.pool.render()  # of environment 0: u8[210 or 250, 160, 3]
                video.append_data(frame.repeat(2, 0).repeat(2, 1))  # the codec halves the resolution of colours

    patches = patch.multiple(script, Envs=Watched, env_options=lambda args: env_options(args) | rendered)
    with film as video, patches:
        yield cut
    if live:
        print("\x1b[K", end="")


def make_card(script: ModuleType, options: Options, model: Model, sha256: str, scores: list[float], result: str) -> str:
    """The text that the Hub shows, with its metadata."""
    from huggingface_hub import EvalResult, ModelCardData

    stem = options.script.stem
    game = model.args.env_id
    scored = EvalResult(
        task_type="reinforcement-learning",
        task_name="reinforcement-learning",
        dataset_type=game,
        dataset_name=game,
        metric_type="mean_reward",
        metric_value=f"{np.mean(scores):.2f} +/- {np.std(scores):.2f}",
    )
    metadata = ModelCardData(
        library_name="cleanba",
        pipeline_tag="reinforcement-learning",
        tags=["reinforcement-learning", "deep-reinforcement-learning", "atari", "jax", "envpool", game],
        model_name=stem,
        eval_results=[scored],
        script=options.script.name,
        params_sha256=sha256,
    )
    replay = f"uv run benchmark/evaluate.py agent/{options.script.name} agent/model.msgpack"
    replay += f" --episodes {options.episodes} --max-minutes {options.max_minutes}"
    if options.greedy:
        replay += " --greedy"
    if options.seed is not None:
        replay += f" --seed {options.seed}"
    versions = ", ".join(map(" ".join, script.VERSIONS.items()))
    return f"""---
{metadata.to_yaml()}
---

# {stem} on {game}

{result}

To play these games again, in a checkout of Cleanba:

```bash
hf download {options.upload} --local-dir agent
{replay}
```

The scores are in the game's own points, one game for each environment, played with {versions}.
`{stem}.py` trained the agent; `model.msgpack` holds its flags and parameters (`params sha256: {sha256}`).
"""


def upload(script: ModuleType, options: Options, model: Model, sha256: str, scores: list[float], result: str) -> None:
    """Write all that is to be uploaded to the folder `upload` beside the model, and push it in one commit."""
    from huggingface_hub import HfApi

    folder = model.directory / "upload"
    folder.mkdir(exist_ok=True)
    summary = model.directory / "summary.json"
    finished = read_json(summary).get("params_sha256") == sha256
    sources = {
        options.script.name: options.script,
        "summary.json": summary if finished else None,  # not that of later parameters
        "replay.mp4": options.video,  # the name that the Hub shows as a video
    }
    for name, source in sources.items():
        if source:
            (folder / name).write_bytes(source.read_bytes())
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier upload
    script.save_model(folder / "model.msgpack", model.args, model.params)
    (folder / "README.md").write_text(make_card(script, options, model, sha256, scores, result))
    try:
        url = HfApi().create_repo(options.upload, exist_ok=True)
        HfApi().upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=["README.md", "model.msgpack", *sources],
            commit_message="Upload agent, scores and card",
        )
    except Exception as error:  # no network, no token, no right to write: the same remedy
        reason = " ".join(str(error).split())
        retry = shlex.join(["hf", "upload", options.upload, str(folder), "."])
        sys.exit(f"not uploaded: {reason}\nNothing is lost. After `hf auth login`, try again with\n    {retry}")
    print(f"uploaded: {url}")


def evaluate(options: Options) -> list[float]:
    """Play, print and, where asked, write, film and upload; returns the scores of the last model.

    Stops before any game is played if an option cannot work, and after all else is done if the upload fails.
    """
    check_options(options)
    script = load_script(options.script)
    script.make_policy = cache(script.make_policy)  # compiled once for all checkpoints
    models = find_models(script, options)
    actions = "most probable" if options.greedy else "sampled"
    how = f"{options.episodes} games with {actions} actions"
    print(f"playing {how}, each for at most {options.max_minutes:g} minutes of the console's time")
    table = models[0].directory / "evaluation.csv"
    if options.every_checkpoint:
        rows = table.open("w", buffering=1)  # a line is there as soon as it is known
        print("update,steps,games,cut,mean,std,scores", file=rows)
    for model in models:
        args = model.args
        if options.seed is not None:
            args = replace(args, seed=options.seed)
        sha256 = script.params_sha256(model.params)
        print(f"model: {model.source}, {args.env_id}, params sha256: {sha256}")
        network = Greedy(model.network) if options.greedy else model.network
        with watched(script, options) as cut:
            scores = script.play_games(args, network, model.params, options.episodes)
        mean = np.mean(scores)
        std = np.std(scores)
        shown = " ".join(f"{score:g}" for score in scores)
        result = f"mean {mean:.2f}, standard deviation {std:.2f}, {how}: {shown}"
        if cut:
            result += f" ({len(cut)} cut after {options.max_minutes:g} minutes, with the score so far)"
        print(result)
        if options.every_checkpoint:
            print(f"{model.update},{model.steps},{len(scores)},{len(cut)},{mean},{std},{shown}", file=rows)
    if options.every_checkpoint:
        print(f"scores: {table}; uv run benchmark/plot.py {table.parent} draws them")
    if options.video:
        print(f"video: {options.video}, the first of these games, score {scores[0]:g}")
    if options.upload:
        upload(script, options, model, sha256, scores, result)
    return scores


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # what is said is seen at once, also in a file or through a pipe
    os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops=true {os.environ.get('XLA_FLAGS', '')}"  # as in the scripts
    evaluate(tyro.cli(Options, description=__doc__))


if __name__ == "__main__":
    main()
