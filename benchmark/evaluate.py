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
from collections import namedtuple
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import jax
import numpy as np
import tyro
from common import find_run, load_script, read_json, require, stop

STEPS_A_MINUTE = 60 * 60 // 4  # the console draws 60 frames a second, and a step is four


@dataclass(frozen=True)
class Options:
    script: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT")]  # the script that trained the agent
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_OR_RUN")]  # a run, or its model.msgpack
    episodes: int = 10  # games, each in an environment of its own
    max_minutes: float = 10.0  # of the console's time, after which a game is cut; the scripts' own limit is 30
    greedy: bool = False  # always play the most probable action, instead of sampling
    seed: int | None = None  # of the games and the actions; the run's own if not given
    every_checkpoint: bool = False  # play every checkpoint that the run has kept, and write its evaluation.csv
    video: Path | None = None  # film the first game, in colour, to this .mp4 (pip install imageio imageio-ffmpeg)
    upload: str | None = None  # push model, card, video to this repository, USER/NAME (pip install huggingface_hub)


def check_options(options: Options) -> None:
    """All that can be said before anything is loaded."""
    minutes, seed, video, repo = options.max_minutes, options.seed, options.video, options.upload
    require(options.episodes >= 1, "--episodes", options.episodes, "must be 1 or more", "--episodes 10")
    require(0 < minutes < np.inf, "--max-minutes", minutes, "must be above 0", "--max-minutes 10")
    require(seed is None or 0 <= seed < 2**32, "--seed", seed, "must be 0 to 4294967295", "--seed 1")
    one, rule = video is None and repo is None, "plays many models, of which none is filmed or uploaded"
    require(one or not options.every_checkpoint, "--every-checkpoint", True, rule, "without --video and --upload")
    if video is not None:
        require(video.suffix == ".mp4", "--video", video, "must end in .mp4", f"--video {video.with_suffix('.mp4')}")
        installed = find_spec("imageio") and find_spec("imageio_ffmpeg")
        require(installed, "--video", video, "needs two packages", "pip install imageio imageio-ffmpeg")
    if repo is not None:
        require(find_spec("huggingface_hub"), "--upload", repo, "needs a package", "pip install huggingface_hub")
        require(re.fullmatch(r"[\w.-]+/[\w.-]+", repo), "--upload", repo, "must be USER/NAME", "--upload me/pong")


# a trained agent. source: where it was found; directory: that of the file or the run; trained_by: the script's name;
# args, network: the script's Args of the run, its ActorCritic; steps: of the environments, until a checkpoint's update
Model = namedtuple("Model", "source directory trained_by args network params update steps", defaults=(0, 0))


def checkpoints(script: ModuleType, run: Path, paths: Iterable[Path]) -> Iterator[Model]:
    """The agents in checkpoints of a run, those passed over that cannot be read or are gone."""
    for path in paths:
        try:
            content = script.unpack(path.read_bytes())
        except (OSError, ValueError) as error:
            print(f"{path} is passed over: {error}", flush=True)
            continue
        record = json.loads(content["record"])
        args = script.with_tuples(script.Args(**record["args"]))
        trained_by = record["platform"]["script"]
        update, params = content["update"], content["state"]["0"]["params"]
        source = f"{run}, checkpoint of update {update}"
        steps = args.local_num_envs * args.num_steps * record["hyper_parameters"]["actors"]
        yield Model(source, run, trained_by, args, script.make_network(args), params, update, update * steps)


def find_models(script: ModuleType, path: Path, every: bool) -> list[Model]:
    """The model in the file, or of the run, at `path`, or all checkpoints of the run; stops if the script's is another.

    A run that has not written model.msgpack, because it goes on or was killed, plays from its newest whole checkpoint.
    """
    path, name = find_run(path), Path(script.__file__).name
    file, found = path / "model.msgpack" if path.is_dir() else path, script.find_checkpoints(path)
    rule = f"no such run, or {'' if every else 'no model and '}no checkpoint in it"
    require(found or (file.is_file() and not every), "MODEL_OR_RUN", path, rule, "runs/NAME of a run that has ended")
    try:
        if file.is_file() and not every:
            trained_by = script.unpack(file.read_bytes())["script"]
            models = [Model(str(file), file.parent, trained_by, *script.load_model(file))]
        else:
            models = list(islice(checkpoints(script, path, found[::-1]), None if every else 1))[::-1]
            require(models, "MODEL_OR_RUN", path, "none of its checkpoints can be read", "another run")
        model = models[-1]
        obs = np.zeros((1, *script.env_spec(model.args)[0]))
        wanted = jax.eval_shape(model.network.init, jax.random.key(0), obs)
    except Exception as error:  # whatever a foreign or broken file makes the libraries raise
        rule = f"is no model of {name} ({' '.join(str(error).split())[:200]})"
        stop("MODEL_OR_RUN", path, rule, "the script that trained it")
    shape = lambda tree: jax.tree.map(np.shape, tree)
    same = all(shape(model.params) == shape(wanted) for model in models)
    require(same, "MODEL_OR_RUN", path, f"has not the network of {name}", "its own script")
    by = Path(script.__file__).with_name(f"{model.trained_by}.py")
    fits = by.name == name or not by.is_file()  # siblings differ where no shape does; of another file a user may judge
    require(fits, "MODEL_OR_RUN", path, f"was trained by {by.name}, not by {name}", by.name)
    return models


class Greedy(NamedTuple):
    """Stands in for a network: its most probable action, the first of equals, has all the probability."""

    network: Any

    def apply(self, params, *inputs):
        logits, *rest = self.network.apply(params, *inputs)
        return 1e9 * jax.nn.one_hot(logits.argmax(1), logits.shape[1]), *rest  # sampling adds noise far below that


@contextmanager
def watched(script: ModuleType, options: Options) -> Iterator[set[int]]:
    """While this lasts, the first games of the script's environments are shown, filmed (that of environment 0), cut.

    Yields the environments whose first game was cut. The scripts know nothing of this.
    """
    limit, live = round(options.max_minutes * STEPS_A_MINUTE) or 1, sys.stdout.isatty()
    steps, over, cut = count(), set(), set()  # environments whose first game is over, was cut
    film, rendered, env_options = nullcontext(), {}, script.env_options
    if options.video:
        os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")  # its usual fork may hang beside JAX's threads
        import imageio.v2 as imageio

        options.video.parent.mkdir(parents=True, exist_ok=True)
        film = imageio.get_writer(options.video, fps=15, macro_block_size=2)  # every fourth frame, and no resizing
        rendered = {"render_mode": "rgb_array"}

    class Watched(script.Envs):
        def __init__(self, pool):
            super().__init__(pool)
            self.shoot()

        def step(self, action):
            result, step = super().step(action), next(steps)
            ended = dict(zip(np.flatnonzero(self.game_over).tolist(), self.games, strict=True))
            for i in np.flatnonzero(self.length >= limit).tolist():
                ended[i] = float(self.score[i]), int(self.length[i])
                cut.update({i} - over)
            self.games = [ended[i] for i in sorted(ended)]
            self.game_over = np.isin(np.arange(len(self.obs)), list(ended))
            if 0 not in over:
                self.shoot()
            over.update(ended)
            if live and step % 15 == 0:
                most = f"{step / STEPS_A_MINUTE:.1f} of at most {options.max_minutes:g} minutes"
                print(f"\x1b[K{len(over)} of {len(self.obs)} games over, {most}", end="\r", flush=True)
            return result

        def shoot(self):
            if video:
                frame = self.pool.render(env_ids=[0])[0]  # u8[210 or 250, 160, 3]
                video.append_data(frame.repeat(2, 0).repeat(2, 1))  # the codec halves the resolution of colours

    with (
        film as video,  # straight to the encoder: a long game has thousands of frames
        patch.object(script, "Envs", Watched),
        patch.object(script, "env_options", lambda args: env_options(args) | rendered),
    ):
        yield cut
    print("\x1b[K" * live, end="", flush=True)


CARD = """---
{metadata}
---

# {script} on {game}

{result}

To play these games again, in a checkout of Cleanba:

```bash
hf download {repo} --local-dir agent
{replay}
```

The scores are in the game's own points, one game for each environment, played with {versions}.
`{script}.py` trained the agent; `model.msgpack` holds its flags and parameters (`params sha256: {sha256}`).
"""


def upload(script: ModuleType, model: Model, options: Options, scores: list[float], result: str) -> None:
    """Write all that is to be uploaded to the folder `upload` beside the model, and push it in one commit."""
    from huggingface_hub import EvalResult, HfApi, ModelCardData

    folder, name, sha256 = model.directory / "upload", Path(script.__file__).name, script.params_sha256(model.params)
    summary = folder.with_name("summary.json")
    folder.mkdir(exist_ok=True)
    finished = read_json(summary).get("params_sha256") == sha256
    sources = {
        name: script.__file__,
        "summary.json": summary if finished else None,  # not that of later parameters
        "replay.mp4": options.video,  # the name that the Hub shows as a video
    }
    for to, source in sources.items():
        if source is None:
            (folder / to).unlink(missing_ok=True)  # of an earlier upload
        else:
            (folder / to).write_bytes(Path(source).read_bytes())
    script.save_model(folder / "model.msgpack", model.args, model.params)
    game, metric = model.args.env_id, f"{np.mean(scores):.2f} +/- {np.std(scores):.2f}"
    task = dict(task_type="reinforcement-learning", task_name="reinforcement-learning", metric_type="mean_reward")
    metadata = ModelCardData(
        library_name="cleanba",
        pipeline_tag="reinforcement-learning",
        tags=["reinforcement-learning", "deep-reinforcement-learning", "atari", "jax", "envpool", game],
        model_name=Path(name).stem,
        eval_results=[EvalResult(dataset_name=game, dataset_type=game, metric_value=metric, **task)],
        script=name,
        params_sha256=sha256,
    )
    replay = f"uv run benchmark/evaluate.py agent/{name} agent/model.msgpack --episodes {options.episodes}"
    replay += f" --max-minutes {options.max_minutes}" + " --greedy" * options.greedy
    replay += "" if options.seed is None else f" --seed {options.seed}"
    fields = dict(metadata=metadata.to_yaml(), script=Path(name).stem, game=game, result=result, sha256=sha256)
    fields |= dict(repo=options.upload, replay=replay, versions=", ".join(map(" ".join, script.VERSIONS.items())))
    (folder / "README.md").write_text(CARD.format(**fields))
    own = ["README.md", "model.msgpack", *(to for to, source in sources.items() if source is not None)]
    try:
        url, message = HfApi().create_repo(options.upload, exist_ok=True), "Upload agent, scores and card"
        HfApi().upload_folder(repo_id=url.repo_id, folder_path=folder, allow_patterns=own, commit_message=message)
    except Exception as error:  # no network, no token, no right to write: the same remedy
        retry, reason = shlex.join(["hf", "upload", options.upload, str(folder), "."]), " ".join(str(error).split())
        sys.exit(f"not uploaded: {reason}\nNothing is lost. After `hf auth login`, try again with\n    {retry}")
    print(f"uploaded: {url}")


def evaluate(options: Options) -> list[float]:
    """Play, print and, where asked, write, film and upload; returns the scores of the last model.

    Stops before any game is played if an option cannot work, and after all else is done if the upload fails.
    """
    check_options(options)
    script = load_script(options.script)
    script.make_policy = cache(script.make_policy)  # compiled once for all checkpoints
    models, minutes = find_models(script, options.model, options.every_checkpoint), f"{options.max_minutes:g}"
    how = f"{options.episodes} games with {'most probable' if options.greedy else 'sampled'} actions"
    print(f"playing {how}, each for at most {minutes} minutes of the console's time")
    table = models[0].directory / "evaluation.csv" if options.every_checkpoint else Path(os.devnull)
    rows = table.open("w", buffering=1)  # a line is there as soon as it is known
    print("update,steps,games,cut,mean,std,scores", file=rows)
    for model in models:
        args = model.args if options.seed is None else replace(model.args, seed=options.seed)
        sha256 = script.params_sha256(model.params)
        print(f"model: {model.source}, {args.env_id}, params sha256: {sha256}", flush=True)
        network = Greedy(model.network) if options.greedy else model.network
        with watched(script, options) as cut:
            scores = script.play_games(args, network, model.params, options.episodes)
        mean, std, shown = np.mean(scores), np.std(scores), " ".join(f"{score:g}" for score in scores)
        result = f"mean {mean:.2f}, standard deviation {std:.2f}, {how}: {shown}"
        result += f" ({len(cut)} cut after {minutes} minutes, with the score so far)" * bool(cut)
        print(result, flush=True)
        print(model.update, model.steps, len(scores), len(cut), mean, std, shown, sep=",", file=rows)
    if options.every_checkpoint:
        print(f"scores: {table}; uv run benchmark/plot.py {models[0].directory} draws them")
    if options.video is not None:
        print(f"video: {options.video}, the first of these games, score {scores[0]:g}")
    if options.upload is not None:
        upload(script, models[0], options, scores, result)
    return scores


def main() -> None:
    os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops=true {os.environ.get('XLA_FLAGS', '')}"  # as in the scripts
    evaluate(tyro.cli(Options, description=__doc__))


if __name__ == "__main__":
    main()
