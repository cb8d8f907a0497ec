"""Scores of a trained agent, a video of one of its games, and its upload to the Hugging Face Hub.

    uv run benchmark/evaluate.py cleanba_ppo_envpool.py runs/NAME --episodes 10
    uv run --extra video benchmark/evaluate.py cleanba_ppo_envpool.py runs/NAME --video game.mp4
    uv run --extra upload benchmark/evaluate.py cleanba_ppo_envpool.py runs/NAME --upload USER/NAME

The script plays the games with its own `play_games`: whole games, one for each environment so that short ones do not
count double, with the game's own points. Same model, script and flags: same scores. The video shows the first of them.
An upload is first written to the folder `upload` beside the model, so nothing is lost when the Hub is out of reach.
"""

import json
import os
import shlex
import shutil
import sys
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import jax
import numpy as np
import tyro


@dataclass(frozen=True)
class Options:
    script: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT")]  # the script that trained the agent
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_OR_RUN")]  # a run, or its model.msgpack
    episodes: int = 10  # games, each in an environment of its own
    greedy: bool = False  # always play the most probable action, instead of sampling
    seed: int | None = None  # of the games and the actions; the run's own if not given
    video: Path | None = None  # film the first game, in colour, to this .mp4 (pip install imageio imageio-ffmpeg)
    upload: str | None = None  # push model, card, video to this repository, USER/NAME (pip install huggingface_hub)


class OptionError(ValueError):
    """An option that cannot work; the message says what it is, its value, the rule and a value that works."""


def require(ok: bool, option: str, value: Any, rule: str, instead: Any) -> None:
    """Raise OptionError unless `ok`."""
    if not ok:
        raise OptionError(f"{option} {value}: {rule}. For example: {instead}")


def check_options(options: Options) -> None:
    """All that can be said before anything is loaded. Raises OptionError."""
    seed, video, repo = options.seed, options.video, options.upload
    require(options.episodes >= 1, "--episodes", options.episodes, "must be 1 or more", "--episodes 10")
    require(seed is None or 0 <= seed < 2**32, "--seed", seed, "must be 0 to 4294967295", "--seed 1")
    if video is not None:
        require(video.suffix == ".mp4", "--video", video, "must end in .mp4", f"--video {video.with_suffix('.mp4')}")
        installed = find_spec("imageio") and find_spec("imageio_ffmpeg")
        pip = "pip install imageio imageio-ffmpeg"
        require(installed, "--video", video, "needs the packages imageio and imageio-ffmpeg", pip)
    if repo is not None:
        pip = "pip install huggingface_hub"
        require(find_spec("huggingface_hub"), "--upload", repo, "needs the package huggingface_hub", pip)
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            require(False, "--upload", repo, str(error).rstrip("."), "--upload USER/NAME")


def load_script(path: Path) -> ModuleType:
    """The script as a module of its own. Raises OptionError if there is none, or none of the project's kind."""
    require(path.is_file(), "script", path, "there is no such file", "cleanba_ppo_envpool.py")
    spec = spec_from_file_location(f"evaluated_{path.stem}", path)
    require(spec is not None, "script", path, "must be a Python file", "cleanba_ppo_envpool.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    rule = "has no load_model and play_games"
    require(hasattr(module, "load_model") and hasattr(module, "play_games"), "script", path, rule, "cleanba_*.py")
    return module


class Model(NamedTuple):
    """A trained agent."""

    source: str  # where it was found
    directory: Path  # that of the file or the run
    trained_by: str  # name of the script, without .py
    args: Any  # the script's Args of the run
    network: Any  # its ActorCritic
    params: Any


def find_model(script: ModuleType, path: Path) -> Model:
    """The model in the file, or of the run, at `path`. Raises OptionError if there is none or the script's is another.

    A run that has not written model.msgpack, because it goes on or was killed, plays from its newest whole checkpoint.
    """
    if not path.exists() and len(path.parts) == 1:
        path = Path("runs") / path
    file = path / "model.msgpack" if path.is_dir() else path
    rule = "there is no such file or run, or nothing in it yet; a run writes a model with --save-model"
    found = file.is_file() or script.find_checkpoints(path)
    require(found, "model", path, rule, "runs/NAME/model.msgpack")
    name = Path(script.__file__).name
    try:
        if file.is_file():
            trained_by = script.unpack(file.read_bytes())["script"]
            model = Model(str(file), file.parent, trained_by, *script.load_model(file))
        else:
            model = checkpoint_model(script, path)
        obs = np.zeros((1, *script.env_spec(model.args)[0]), np.uint8)
        wanted = jax.eval_shape(model.network.init, jax.random.key(0), obs)
    except Exception as error:  # whatever a foreign or broken file makes the libraries raise
        reason = f"is no model of {name} ({' '.join(str(error).split())[:200]})"
        require(False, "model", path, reason, "the script that trained it")
    shape = lambda tree: jax.tree.map(np.shape, tree)
    require(shape(model.params) == shape(wanted), "model", path, f"has not the network of {name}", "its own script")
    by = model.trained_by  # siblings differ where no shape does; a file that a user named is theirs to judge
    other = by != Path(script.__file__).stem and Path(script.__file__).with_name(f"{by}.py").is_file()
    require(not other, "model", path, f"was trained by {by}.py, not by {name}", f"{by}.py")
    return model


def checkpoint_model(script: ModuleType, run: Path) -> Model:
    """The newest whole checkpoint of a run."""
    record = json.loads((run / "run.json").read_text())
    flags = record["args"]
    args = script.Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()})
    data = script.load_checkpoint(run)
    if not data:
        raise ValueError("no checkpoint can be read")
    content = script.unpack(data)
    source, params = f"{run}, checkpoint of update {content['update']}", content["state"]["0"]["params"]
    return Model(source, run, record["around"]["script"], args, script.make_network(args), params)


class Greedy(NamedTuple):
    """Stands in for a network: its most probable action, the first of equals, has all the probability."""

    network: Any

    def apply(self, params, obs):
        logits, value = self.network.apply(params, obs)
        return 1e9 * jax.nn.one_hot(logits.argmax(1), logits.shape[1]), value  # sampling adds noise far below that


@contextmanager
def filmed(script: ModuleType, path: Path):
    """While this lasts, the script's environments film the first game of environment 0 to `path`.

    Frames go straight to the encoder: a long game has 27,000 of them. The scripts know nothing of this.
    """
    os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")  # its usual fork may hang beside JAX's threads
    import imageio.v2 as imageio

    env_options, envs = script.env_options, script.Envs
    path.parent.mkdir(parents=True, exist_ok=True)

    class Filmed(envs):
        def __init__(self, pool):
            super().__init__(pool)
            self.shoot()

        def step(self, action):
            result = super().step(action)
            if not self.cut:
                self.shoot()
            return result

        def shoot(self):
            frame = self.pool.render(env_ids=[0])[0]  # u8[210 or 250, 160, 3]
            video.append_data(frame.repeat(2, 0).repeat(2, 1))  # the codec halves the resolution of colours
            self.cut = self.over[0]

    # the console draws 60 frames a second and EnvPool shows every fourth; both sides are even, so nothing is resized
    with (
        imageio.get_writer(path, fps=15, macro_block_size=2) as video,
        patch.object(script, "Envs", Filmed),
        patch.object(script, "env_options", lambda args: env_options(args) | {"render_mode": "rgb_array"}),
    ):
        yield


def summarise(options: Options, scores: list[float]) -> str:
    how = "most probable actions" if options.greedy else "sampled actions"
    spread = f"mean {np.mean(scores):.2f}, standard deviation {np.std(scores):.2f}"
    return f"{spread}, {len(scores)} games with {how}: {' '.join(f'{score:g}' for score in scores)}"


CARD = """---
{metadata}
---

# {script} on {game}

{result}

`params sha256: {sha256}`

To play these games again, in a checkout of Cleanba:

```bash
hf download {repo} --local-dir agent
{replay}
```

The scores are whole games in the game's own points, one for each environment, played with {versions}.
`{script}.py` is the script that trained the agent; `model.msgpack` holds the parameters and the flags of the run.
"""


def write_upload(script: ModuleType, model: Model, options: Options, scores: list[float], folder: Path) -> list[Path]:
    """Write all that is to be uploaded to `folder`; returns the files."""
    from huggingface_hub import EvalResult, ModelCardData

    name, sha256 = Path(script.__file__).name, script.params_sha256(model.params)
    summary = model.directory / "summary.json"
    finished = summary.is_file() and json.loads(summary.read_text()).get("params_sha256") == sha256
    sources = {
        name: script.__file__,
        "summary.json": summary if finished else None,  # not that of later parameters
        "replay.mp4": options.video,  # the name that the Hub shows as a video
    }
    for to, source in sources.items():
        if source is None:
            (folder / to).unlink(missing_ok=True)  # of an earlier upload
        else:
            with suppress(shutil.SameFileError):
                shutil.copy(source, folder / to)
    script.save_model(folder / "model.msgpack", model.args, model.params)
    game, result = model.args.env_id, summarise(options, scores)
    task = dict(task_type="reinforcement-learning", task_name="reinforcement-learning")
    metric = dict(metric_type="mean_reward", metric_value=f"{np.mean(scores):.2f} +/- {np.std(scores):.2f}")
    metadata = ModelCardData(
        library_name="cleanba",
        pipeline_tag="reinforcement-learning",
        tags=["reinforcement-learning", "deep-reinforcement-learning", "atari", "jax", "envpool", game],
        model_name=Path(name).stem,
        eval_results=[EvalResult(dataset_name=game, dataset_type=game, **task, **metric)],
        script=name,
        params_sha256=sha256,
    )
    replay = f"uv run benchmark/evaluate.py agent/{name} agent/model.msgpack --episodes {options.episodes}"
    replay += " --greedy" * options.greedy + (f" --seed {options.seed}" if options.seed is not None else "")
    fields = dict(metadata=metadata.to_yaml(), script=Path(name).stem, game=game, result=result, sha256=sha256)
    versions = ", ".join(f"{package} {version}" for package, version in script.VERSIONS.items())
    card = CARD.format(**fields, repo=options.upload, replay=replay, versions=versions)
    (folder / "README.md").write_text(card)
    own = ["README.md", "model.msgpack", *(to for to, source in sources.items() if source is not None)]
    return [folder / file for file in own]


def upload(repo: str, files: list[Path]) -> str:
    """Make the repository if need be and push the files in one commit; returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    url = HfApi().create_repo(repo, exist_ok=True)
    operations = [CommitOperationAdd(path.name, path) for path in files]
    HfApi().create_commit(url.repo_id, operations, commit_message="Upload agent, scores and card")
    return url


def evaluate(options: Options) -> list[float]:
    """Play, print and, where asked, film and upload; returns the score of every game.

    Raises OptionError before any game is played, and SystemExit after all else is done if the upload fails.
    """
    check_options(options)
    script = load_script(options.script)
    model = find_model(script, options.model)
    args = model.args if options.seed is None else replace(model.args, seed=options.seed)
    sha256 = script.params_sha256(model.params)
    print(f"model: {model.source}, {args.env_id}, params sha256: {sha256}", flush=True)
    folder = model.directory / "upload"
    if options.upload is not None:
        folder.mkdir(exist_ok=True)  # fails here, and not after the games
    network = Greedy(model.network) if options.greedy else model.network
    with filmed(script, options.video) if options.video else nullcontext():
        scores = script.play_games(args, network, model.params, options.episodes)
    print(summarise(options, scores))
    if options.video is not None:
        print(f"video: {options.video}, the first of these games, score {scores[0]:g}")
    if options.upload is not None:
        files = write_upload(script, model, options, scores, folder)
        try:
            print(f"uploaded: {upload(options.upload, files)}")
        except Exception as error:  # no network, no token, no right to write: the same remedy
            retry = shlex.join(["hf", "upload", options.upload, str(folder), "."])
            reason = " ".join(str(error).split())
            sys.exit(f"not uploaded: {reason}\nNothing is lost. After `hf auth login`, try again with\n    {retry}")
    return scores


def main() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:  # as the scripts do; read by the first JAX call
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    try:
        evaluate(tyro.cli(Options, description=__doc__))
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
