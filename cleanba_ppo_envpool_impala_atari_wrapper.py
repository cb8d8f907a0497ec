# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "envpool==1.2.5",
#     "flax==0.12.8",
#     "gymnasium==1.4.0",
#     "jax==0.10.2",
#     "numpy==2.4.6",
#     "optax==0.2.8",
#     "orbax-checkpoint==0.12.8",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""PPO under IMPALA's Atari protocol, with many actors and many learner devices, reproducible to the bit.

The PPO of Cleanba (Huang et al. 2023) in the environments of Espeholt et al. 2018: a lost life ends the episode, 30
no-ops, no sticky actions, the game's own actions. Scores are still those of whole games.

Actors (threads, each with a pool of environments) play rollouts; the learner (one or more devices) turns one rollout
of every actor into one update. Parameters are handed to the actors as tokens, one token a rollout, so which version
plays which rollout never depends on which thread was fast:

             rollout 1   rollout 2      rollout 3      rollout 4
    actors   play v0     play v0        play v1        play v2          by default
    learner              v0 -> v1       v1 -> v2       v2 -> v3

    actors   play v0                    play v1                         with --no-concurrency
    learner              v0 -> v1                      v1 -> v2

    python THIS_FILE.py --env-id Pong-v5
    python THIS_FILE.py --actor-device-ids 0 --learner-device-ids 1 2 3 --num-shards 6 --local-num-envs 60
    python THIS_FILE.py --img-size 42 --channels 8 16 16 --local-num-envs 8    (small; README.md has one for a laptop)

To change the environment edit section 2, the network section 3, the loss or a metric section 7.

Departures from the published code, numbered as in README.md: (1) the row that an auto-reset wastes teaches nothing,
(2) a time limit is bootstrapped, (3) advantages are normalised over the whole minibatch, (7) no two environments share
a seed and no two actors a key, (8) gradients are added up in one fixed order, so devices do not change the result.
"""

import base64
import fcntl
import hashlib
import json
import os
import platform
import queue
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache, partial, reduce
from importlib.metadata import version as package_version
from importlib.util import find_spec
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import envpool
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import serialization
from flax.training.train_state import TrainState
from jax._src.clusters import ClusterEnv
from jax._src.lib import _jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

# === §1 Args ==========================================================================================================


@dataclass(frozen=True)
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, a part of the run's name
    seed: int = 1  # seed of the parameters, the environments and the actions
    track: bool = False  # sync TensorBoard to Weights & Biases (pip install wandb)
    wandb_project_name: str = "cleanba"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team or user
    log_frequency: int = 10  # updates between two logs
    checkpoint_frequency: int = 0  # updates between two checkpoints, all games start anew after each; 0 only at the end
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    resume: str | None = None  # go on with this run: its directory, or its name below runs
    start_fresh: bool = False  # with --resume, start the run if it has no checkpoint
    save_model: bool = False  # write parameters and flags to model.msgpack at the end, and play games with them
    eval_episodes: int = 10  # games that --save-model plays, each in an environment of its own
    env_id: str = "Breakout-v5"  # an Atari game of EnvPool
    img_size: int = 84  # height and width of an observation; 42 makes a CPU usable
    env_threads: int = 0  # EnvPool threads of each actor; 0 shares the cores among the actors
    total_timesteps: int = 50_000_000  # environment steps of the run, 4 frames each
    learning_rate: float = 2.5e-4  # of Adam, at the start
    local_num_envs: int = 60  # environments of each actor thread
    num_actor_threads: int = 1  # actor threads on each actor device
    num_steps: int = 128  # T, the steps of a rollout
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    gamma: float = 0.99  # discount of a reward one step later
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 4  # optimizer steps of an epoch
    gradient_accumulation_steps: int = 1  # pieces of a shard's part of a minibatch: less memory, same statistics
    update_epochs: int = 4  # passes over a batch
    norm_adv: bool = True  # normalise advantages over the global minibatch
    clip_coef: float = 0.1  # PPO's clip range of the probability ratio
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss (which has a factor of 0.5 of its own)
    max_grad_norm: float = 0.5  # gradients are clipped to this global norm
    channels: tuple[int, ...] = (16, 32, 32)  # channels of the network's convolution sequences
    hiddens: tuple[int, ...] = (256,)  # widths of the dense layers after them
    actor_device_ids: tuple[int, ...] = (0,)  # local devices that run the actors' forward passes
    learner_device_ids: tuple[int, ...] = (0,)  # local devices that compute gradients
    num_shards: int = 4  # slices of a batch whose gradients are computed apart; learner devices must divide it
    concurrency: bool = True  # play the next rollout while the learner learns: policies lag by one update
    distributed: bool = False  # be one of many processes; SLURM, Open MPI and Kubernetes say how many and which
    coordinator_address: str | None = None  # HOST:PORT of process 0, where nothing else says so
    num_processes: int | None = None  # processes of the run, where nothing else says so
    process_id: int | None = None  # which one this is, from 0, where nothing else says so
    peer_timeout: int = 100  # seconds until a process that is missing or silent is given up, and the run with it


CPU_FLAGS = (  # what a laptop learns from in minutes
    "--env-id KungFuMaster-v5 --img-size 42 --channels 8 16 16 --local-num-envs 16 --num-steps 64 --update-epochs 3 "
    "--learning-rate 5e-4 --total-timesteps 131072 --log-frequency 4"
)


class FlagError(ValueError):
    """A flag whose value cannot work; the message names the flag, its value, the rule and a value that works."""


def show(value: Any) -> str:
    """A flag's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def require(ok: bool, args: Args, flag: str, rule: str, instead: Any) -> None:
    """Raise FlagError about `flag` unless `ok`."""
    if not ok:
        name, value = "--" + flag.replace("_", "-"), getattr(args, flag)
        value = "(not given)" if value is None else show(value) or "(empty)"
        raise FlagError(f"{name} {value}: {rule}. For example: {name} {show(instead)}")


RANGES = {  # rule: (test of a value, flags)
    "must be 0 or more": (lambda x: 0 <= x < np.inf, "env_threads checkpoint_frequency ent_coef vf_coef"),
    "must be 0 to 4294967295": (lambda x: 0 <= x < 2**32, "seed"),
    "must be above 0": (lambda x: 0 < x < np.inf, "learning_rate clip_coef max_grad_norm"),
    "must be 1 or more": (
        lambda x: x >= 1,
        "log_frequency keep_checkpoints eval_episodes local_num_envs num_actor_threads num_steps num_minibatches "
        "gradient_accumulation_steps update_epochs num_shards peer_timeout",
    ),
    "must be 8 or more": (lambda x: x >= 8, "img_size"),
    "must lie between 0 and 1": (lambda x: 0 <= x <= 1, "gamma gae_lambda"),
    "needs one or more widths, each 1 or more": (lambda x: len(x) > 0 and min(x) >= 1, "channels hiddens"),
    "needs one or more device ids, each 0 or more and different": (
        lambda x: len(x) > 0 and min(x) >= 0 and len(set(x)) == len(x),
        "actor_device_ids learner_device_ids",
    ),
}


class Sizes(NamedTuple):
    """What the flags amount to."""

    actors: int  # actor threads of this process
    steps: int  # T * B, steps of an update
    shard_envs: int  # environments of a shard
    updates: int  # updates of the run


def nearest_divisor(value: int, number: int, multiple_of: int = 1) -> int | None:
    """The divisor of `number` that is a multiple of `multiple_of` and nearest to `value`; None if there is none."""
    divisors = (d for d in range(multiple_of, number + 1, multiple_of) if number % d == 0)
    return min(divisors, key=lambda d: abs(d - value), default=None)


def even_split(ids: tuple[int, ...], num_shards: int) -> tuple[int, ...]:
    """The first of `ids`, as many as divide `num_shards`."""
    return next(ids[:n] for n in range(len(ids), 0, -1) if num_shards % n == 0)


def check_args(args: Args, num_processes: int = 1) -> Sizes:
    """Hold the flags against each other before anything is built. Raises FlagError."""
    if args.track and find_spec("wandb") is None:
        raise FlagError("--track True: needs the package wandb, which is not installed. For example: pip install wandb")
    for rule, (holds, flags) in RANGES.items():
        for flag in flags.split():
            require(holds(getattr(args, flag)), args, flag, rule, getattr(Args, flag))

    def divides(flag: str, number: int, what: str, multiple_of: int = 1) -> int:
        divisor = nearest_divisor(getattr(args, flag), number, multiple_of)
        rule = f"must divide the {number} {what}"
        rule += f" and be a multiple of {multiple_of}, the processes" if multiple_of > 1 else ""
        require(divisor == getattr(args, flag), args, flag, rule, divisor)
        return number // divisor

    actors = args.num_actor_threads * len(args.actor_device_ids)
    envs = actors * args.local_num_envs * num_processes
    shard_envs = divides("num_shards", envs, "environments of a batch", num_processes)
    learners = len(args.learner_device_ids) * num_processes
    if args.num_shards % learners:
        rule = f"the number of learner devices ({learners}) must divide --num-shards {args.num_shards}"
        wider = nearest_divisor(args.num_shards, envs, learners)
        rule += f" (--num-shards {wider} would do)" if wider else ""
        fitting = even_split(args.learner_device_ids, args.num_shards // num_processes)
        require(False, args, "learner_device_ids", rule, fitting)
    rows = divides("num_minibatches", args.num_steps * shard_envs, "rows (steps x environments) of a shard")
    divides("gradient_accumulation_steps", rows, "rows that a shard gives to a minibatch")
    steps = envs * args.num_steps
    rule = f"must allow one update of {steps} steps ({envs} environments x {args.num_steps} steps)"
    require(args.total_timesteps >= steps, args, "total_timesteps", rule, steps)
    return Sizes(actors, steps, shard_envs, args.total_timesteps // steps)


# === §2 Environment ===================================================================================================


def env_options(args: Args) -> dict[str, Any]:
    """EnvPool's options for IMPALA's protocol (Espeholt et al. 2018, table G.1); A depends on the game."""
    return dict(
        episodic_life=True,
        repeat_action_probability=0.0,
        noop_max=30,
        full_action_space=False,
        max_episode_steps=27_000,  # 108,000 frames, 30 minutes of play
        reward_clip=True,
        img_height=args.img_size,
        img_width=args.img_size,
    )


@cache
def env_spec(args: Args) -> tuple[tuple[int, ...], int]:
    """The shape of an observation (4, H, W) and the number of actions A, without building a pool."""
    games = [name for name, (module, *_) in envpool.registration.registry.specs.items() if module == "envpool.atari"]
    close = get_close_matches(args.env_id, games, 1) or [Args.env_id]
    require(args.env_id in games, args, "env_id", f"must be one of EnvPool's {len(games)} Atari games", close[0])
    spec = envpool.make_spec(args.env_id, **env_options(args))
    return spec.observation_space.shape, int(spec.action_space.n)


def env_seeds(seed: int, generation: int, first: int, count: int) -> list[int]:
    """Seeds (int32) of the environments `first` to `first + count - 1`, numbered over all actors of all processes."""
    sequences = [np.random.SeedSequence(seed, spawn_key=(generation, first + i)) for i in range(count)]
    return [int(sequence.generate_state(1).view(np.int32)[0]) for sequence in sequences]


def make_env(args: Args, seeds: list[int], num_threads: int) -> Any:
    """A pool of len(seeds) environments in lock-step: with partial batches the order of data would depend on timing."""
    options = dict(env_type="gymnasium", num_envs=len(seeds), seed=seeds, num_threads=num_threads)
    return envpool.make(args.env_id, **options, **env_options(args))


class Envs:
    """B environments that are never reset by hand; hides what is peculiar to the simulator.

    EnvPool resets an environment on the step *after* its episode ended: that step ignores its action and returns the
    first observation of the next episode. The row of such a step is a reset row.

    Attributes:
        obs: u8[B, 4, H, W], what the agent sees now.
        reset: bool[B], True where `obs` ended an episode, so that the next step only resets.
        over: bool[B], True where it ended a whole game.
    """

    def __init__(self, pool: Any):
        self.pool = pool
        self.obs, _ = pool.reset()
        self.reset = self.over = np.zeros(len(self.obs), bool)
        self.score, self.length = np.zeros(len(self.obs)), np.zeros(len(self.obs), int)
        self.games: list[tuple[float, int]] = []

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Play action i32[B]; return reward f32[B], clipped as the agent learns it, and terminated bool[B]."""
        self.obs, reward, terminated, truncated, info = self.pool.step(action)
        self.score += info["reward"]  # the game's own points
        self.length += ~self.reset
        over = info["terminated"].astype(bool) | truncated  # a whole game, also where a lost life ends an episode
        self.over = over
        self.games += zip(self.score[over].tolist(), self.length[over].tolist(), strict=True)
        self.score[over], self.length[over] = 0, 0
        self.reset = terminated | truncated
        return reward, terminated

    def pop_games(self) -> list[tuple[float, int]]:
        """(score, length in steps) of every game that ended since the last call."""
        games, self.games = self.games, []
        return games

    def close(self) -> None:
        """Let the pool go; EnvPool ends its threads when the last reference is dropped."""
        self.pool = None


# === §3 Network [shared] ==============================================================================================


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 and SAME padding, f32[N,H,W,C] -> f32[N,ceil(H/2),ceil(W/2),C].

    Two passes of strided slices give the bits of `nn.max_pool`; their gradient takes a third of the time on a CPU.
    """
    for axis in (1, 2):
        size = -(-x.shape[axis] // 2)
        total = 2 * size + 1 - x.shape[axis]
        padding = [(0, 0)] * x.ndim
        padding[axis] = (total // 2, total - total // 2)
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        x = reduce(jnp.maximum, (jax.lax.slice_in_dim(padded, i, i + 2 * size - 1, 2, axis) for i in range(3)))
    return x


class ResidualBlock(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(self.channels, (3, 3))(nn.relu(x))
        return x + nn.Conv(self.channels, (3, 3))(nn.relu(y))


class ActorCritic(nn.Module):
    """IMPALA's large network (Espeholt et al. 2018, figure 3) without the LSTM.

    u8[N,4,H,W] -> (logits f32[N,A], value f32[N])
    """

    num_actions: int
    channels: tuple[int, ...]
    hiddens: tuple[int, ...]

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.transpose(obs, (0, 2, 3, 1)) / 255.0
        for channels in self.channels:
            x = max_pool(nn.Conv(channels, (3, 3))(x))
            x = ResidualBlock(channels)(x)
            x = ResidualBlock(channels)(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        for width in self.hiddens:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.orthogonal(np.sqrt(2)))(x))
        logits = nn.Dense(self.num_actions, kernel_init=nn.initializers.orthogonal(0.01))(x)
        value = nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(x)
        return logits, value[:, 0]


# === §4 Rollout =======================================================================================================


class Behaviour(NamedTuple):
    """What the acting policy did, and what its loss will ask about it."""

    action: jax.Array  # i32[T,B]
    logprob: jax.Array  # f32[T,B]
    value: jax.Array  # f32[T,B]


class Rollout(NamedTuple):
    """T steps of B environments. Row t means obs[t] -> action[t] -> reward[t], terminated[t].

    An episode ended in row t (terminated or cut by a time limit) exactly where reset[t + 1]; obs[t + 1] is then its
    last observation. Every leaf has its environments on axis 1.
    """

    obs: jax.Array  # u8[T+1,B,4,H,W]
    reset: jax.Array  # bool[T+1,B], rows that an auto-reset wastes
    reward: jax.Array  # f32[T,B]
    terminated: jax.Array  # bool[T,B]
    behaviour: Behaviour
    last_value: jax.Array  # f32[1,B], V(obs[T]) of the acting parameters, as all values of a rollout are


class Policy(NamedTuple):
    """How an actor uses the network; plain callables, so that a test needs no network and no thread."""

    act: Callable  # (params, obs u8[B,...], key, t) -> Behaviour of one row
    last: Callable  # (params, obs u8[B,...]) -> the fields of Rollout that depend on obs[T]


def make_policy(network: nn.Module) -> Policy:
    @jax.jit
    def act(params, obs, key, t):
        logits, value = network.apply(params, obs)
        action = jax.random.categorical(jax.random.fold_in(key, t), logits)
        return Behaviour(action, log_prob(logits, action), value)

    @jax.jit
    def last(params, obs):
        return {"last_value": network.apply(params, obs)[1][None]}

    return Policy(act, last)


# === §5 Actor [shared] ================================================================================================


class Stopped(Exception):
    """Raised in an actor when the run ends around it."""


class Delivery(NamedTuple):
    """What an actor hands to the learner: a rollout and the numbers that travel with it."""

    version: int  # of the parameters that played
    rollout: Any
    games: list[tuple[float, int]]  # (score, length) of the games that ended
    seconds: dict[str, float]


@contextmanager
def timed(seconds: dict[str, float], name: str):
    """Add the seconds that the block takes to seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def collect(envs, policy: Policy, params, key, num_steps: int, seconds, stopped=lambda: False) -> Rollout:
    """Play `num_steps` steps and return them as NumPy arrays; a rollout begins where the last one ended.

    `seconds` takes the times; `stopped` is asked at every step and, where it says so, Stopped raised.
    """
    obs = np.empty((num_steps + 1, *envs.obs.shape), envs.obs.dtype)  # new each time: device_put may alias it
    reset = np.empty((num_steps + 1, len(envs.obs)), bool)
    reward = np.empty((num_steps, len(envs.obs)), np.float32)
    terminated = np.empty((num_steps, len(envs.obs)), bool)
    behaviour = []
    for t in range(num_steps):
        if stopped():
            raise Stopped
        obs[t], reset[t] = envs.obs, envs.reset
        with timed(seconds, "inference_time"):
            behaviour.append(jax.device_get(policy.act(params, obs[t], key, t)))
        with timed(seconds, "env_time"):
            reward[t], terminated[t] = envs.step(behaviour[t].action)
    obs[num_steps], reset[num_steps] = envs.obs, envs.reset
    with timed(seconds, "inference_time"):
        last = jax.device_get(policy.last(params, obs[num_steps]))
    with timed(seconds, "storage_time"):
        return Rollout(obs, reset, reward, terminated, jax.tree.map(lambda *rows: np.stack(rows), *behaviour), **last)


def run_actor(actor_id: int, make_envs, policy: Policy, ship, handoff, key, args, updates: range) -> None:
    """The life of an actor thread: for every update, take parameters, play a rollout, `ship` it to the learner.

    make_envs: generation -> Envs, called anew after every checkpoint, so that a resumed actor meets the same games.
    ship: Rollout -> what the learner receives. `key` is the run's; nothing random is carried from one rollout to the
    next. So an actor can start at the first update, or after any checkpoint.
    """
    envs = None
    try:
        for update in updates:
            generation, since = divmod(update - 1, args.checkpoint_frequency or sys.maxsize)
            if envs is None or since == 0:
                if envs is not None:
                    envs.close()
                envs = make_envs(generation)
            seconds = defaultdict(float)
            with timed(seconds, "params_queue_get_time"):
                version, params = handoff.take_params(actor_id)
            rollout_key = jax.random.fold_in(jax.random.fold_in(key, actor_id), update)
            with timed(seconds, "rollout_time"):
                rollout = collect(envs, policy, params, rollout_key, args.num_steps, seconds, handoff.stopped.is_set)
            with timed(seconds, "storage_time"):
                rollout = jax.block_until_ready(ship(rollout))
            handoff.put_rollout(actor_id, Delivery(version, rollout, envs.pop_games(), seconds))
    except Stopped:
        pass
    except BaseException as error:
        failure = RuntimeError(f"actor {actor_id} failed: {error!r}")
        failure.__cause__ = error
        handoff.fail(failure)
    finally:
        if envs is not None:
            envs.close()


# === §6 Hand-off [shared] =============================================================================================


class HandOff:
    """Parameters one way, rollouts the other. The tokens that the learner gives bound both kinds of queue.

    The learner primes every actor with 1 + concurrency copies of version 0 and gives one more per update; an actor
    spends one per rollout. So the versions acting in updates 1, 2, 3, 4 are 0, 1, 2, 3, or 0, 0, 1, 2 with concurrency.
    """

    def __init__(self, actor_ids, concurrency: bool):
        self.concurrency = concurrency
        self.params = {actor_id: queue.SimpleQueue() for actor_id in actor_ids}
        self.rollouts = {actor_id: queue.SimpleQueue() for actor_id in actor_ids}
        self.ready, self.stopped, self.preempted = queue.SimpleQueue(), threading.Event(), threading.Event()

    def give_params(self, actor_id: int, version: int, params: Any) -> None:
        self.params[actor_id].put((version, params))

    def take_params(self, actor_id: int) -> tuple[int, Any]:
        """Wait for the next token: (version, parameters ready on the actor's device)."""
        token = self.params[actor_id].get()
        if token is None:
            raise Stopped
        return token[0], jax.block_until_ready(token[1])

    def put_rollout(self, actor_id: int, delivery: Delivery) -> None:
        self.rollouts[actor_id].put(delivery)

    def get_rollouts(self, update: int) -> list[Delivery]:
        """Wait for one delivery of every actor, in the order of their ids; all were played by the version due."""
        deliveries = [receive(rollouts) for rollouts in self.rollouts.values()]
        versions = {delivery.version for delivery in deliveries}
        if versions != {max(0, update - 1 - self.concurrency)}:
            raise RuntimeError(f"update {update} got rollouts of versions {sorted(versions)}")
        return deliveries

    def wait_until_ready(self, tree: Any) -> None:
        """jax.block_until_ready, in a thread of its own: XLA's wait is deaf to signals and failures, a queue is not."""

        def wait():
            try:
                jax.block_until_ready(tree)
                self.ready.put(None)
            except BaseException as error:
                self.ready.put(error)

        threading.Thread(target=wait, daemon=True).start()
        receive(self.ready)

    def check(self) -> None:
        """Raise what would end a wait, or Stopped after SIGTERM; for work that waits for nothing."""
        if not self.ready.empty():
            receive(self.ready)
        if self.preempted.is_set():
            raise Stopped

    def fail(self, error: BaseException) -> None:
        """Make the learner raise `error`, whatever it waits for. A signal handler may call this at any moment."""
        for waiting in (self.ready, *self.rollouts.values()):
            waiting.put(error)

    def stop(self) -> None:
        """Called by the learner: no actor waits or plays on."""
        self.stopped.set()
        for params in self.params.values():
            params.put(None)


def receive(waiting: queue.SimpleQueue) -> Any:
    """Wait for the next item; raise it if it is an exception."""
    item = waiting.get()
    if isinstance(item, BaseException):
        raise item
    return item


# === §7 Loss ==========================================================================================================


class Estimate(NamedTuple):
    """What the loss is told about every row of a rollout."""

    advantage: jax.Array  # f32[T,B], 0 in reset rows
    target: jax.Array  # f32[T,B], the return that the value is fitted to
    weight: jax.Array  # f32[T,B], 0 in reset rows and 1 elsewhere


class Minibatch(NamedTuple):
    """M rows of one shard."""

    obs: jax.Array  # u8[M,4,H,W]
    behaviour: Behaviour  # of [M]
    advantage: jax.Array  # f32[M], normalised
    target: jax.Array  # f32[M]
    weight: jax.Array  # f32[M], the row's share of the global minibatch; all shards together sum to 1


def log_prob(logits: jax.Array, action: jax.Array) -> jax.Array:
    """log pi(action), f32[...,A], i32[...] -> f32[...]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1)[..., 0]


def compute_gae(rollout: Rollout, gamma: float, gae_lambda: float) -> Estimate:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), which knows terminations from time limits.

    The value of the next observation is dropped where an episode terminated; the trace is cut where it ended for any
    reason. At a time limit obs[t + 1] is the episode's last observation, so its value bootstraps exactly.
    """
    value = jnp.concatenate([rollout.behaviour.value, rollout.last_value])
    next_value = jnp.where(rollout.terminated, 0.0, value[1:])
    delta = rollout.reward + gamma * next_value - value[:-1]
    trace = jnp.where(rollout.reset[1:], 0.0, gamma * gae_lambda)

    def backward(advantage, row):
        delta, trace = row
        advantage = delta + trace * advantage
        return advantage, advantage

    _, advantage = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, trace), reverse=True)
    keep = lambda x: jnp.where(rollout.reset[:-1], 0.0, x)
    return Estimate(keep(advantage), keep(advantage + value[:-1]), keep(jnp.ones_like(advantage)))


def ppo_loss(params, apply, minibatch: Minibatch, args: Args) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7 and 9), weighted; the sum over all shards is the loss.

    apply: (params, obs) -> (logits f32[M,A], value f32[M]). Every metric is a weighted mean like the loss itself.
    """
    mean = lambda x: jnp.sum(minibatch.weight * x)
    logits, value = apply(params, minibatch.obs)
    log_ratio = log_prob(logits, minibatch.behaviour.action) - minibatch.behaviour.logprob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = mean(jnp.maximum(-minibatch.advantage * ratio, -minibatch.advantage * clipped))
    value_loss = mean(0.5 * jnp.square(value - minibatch.target))
    entropy = mean(-jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=1))
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy

    error = minibatch.target - minibatch.behaviour.value
    metrics = {
        "loss": loss,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": mean(ratio - 1 - log_ratio),  # Schulman's low-variance estimate, joschu.net/blog/kl-approx
        "clipfrac": mean(jnp.abs(ratio - 1) > args.clip_coef),
        # the moments that `summarise` makes explained_variance of
        "target": mean(minibatch.target),
        "target_square": mean(jnp.square(minibatch.target)),
        "error": mean(error),
        "error_square": mean(jnp.square(error)),
    }
    return loss, metrics


def summarise(metrics: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over the minibatches of an update, and what only such means can say."""
    mean = {name: float(np.mean([m[name] for m in metrics], dtype=np.float64)) for name in metrics[0]}
    error = mean.pop("error_square") - mean.pop("error") ** 2
    target = mean.pop("target_square") - mean.pop("target") ** 2
    return mean | {"explained_variance": 1 - error / target if target > 0 else 0.0}


# === §8 Learner =======================================================================================================


def make_optimizer(args: Args, sizes: Sizes) -> tuple[optax.GradientTransformation, Callable[[int], float]]:
    """The optimizer, and the learning rate of update u (from 1): constant in an update, linear to 0 over the run."""

    learning_rate = lambda u: args.learning_rate * (1 - (u - 1) / sizes.updates if args.anneal_lr else 1)
    steps = args.update_epochs * args.num_minibatches
    adam = optax.adam(lambda count: learning_rate(1 + count // steps), eps=1e-5)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam), learning_rate


def shuffle(args: Args, key, shard, rows: int) -> jax.Array:
    """Row numbers of a shard in the order of one epoch, i32[minibatches, pieces, M]."""
    index = jax.random.permutation(jax.random.fold_in(key, shard), rows)
    return index.reshape(args.num_minibatches, args.gradient_accumulation_steps, -1)


def pick(tree: Any, index: jax.Array) -> Any:
    """The rows `index` (numbered step by step) of [time, env, ...] arrays."""
    return jax.tree.map(lambda x: x[index // x.shape[1], index % x.shape[1]], tree)


def advantage_sums(estimate: Estimate, index) -> dict[str, jax.Array]:
    """What a shard adds to the weight and the advantage of every minibatch, f32[minibatches]."""
    rows = pick(estimate, index)
    return {"weight": rows.weight.sum((1, 2)), "advantage": (rows.weight * rows.advantage).sum((1, 2))}


def advantage_squares(estimate: Estimate, index, sums: dict[str, jax.Array]) -> jax.Array:
    """What a shard adds to the squared deviations from the mean of every minibatch, f32[minibatches]."""
    rows = pick(estimate, index)
    mean = sums["advantage"] / jnp.maximum(sums["weight"], 1.0)
    return (rows.weight * jnp.square(rows.advantage - mean[:, None, None])).sum((1, 2))


def shard_gradient(network, args: Args, params, rollout: Rollout, estimate: Estimate, index, sums, squares, at):
    """Gradient and metrics of one piece of a minibatch, `at` = (minibatch, piece), to be added to all the others."""
    rows = index[at[0], at[1]]
    weight = jnp.maximum(sums["weight"][at[0]], 1.0)
    row = pick(estimate, rows)
    mean, deviation = sums["advantage"][at[0]] / weight, jnp.sqrt(squares[at[0]] / weight)
    advantage = (row.advantage - mean) / (deviation + 1e-8) if args.norm_adv else row.advantage
    obs, behaviour = pick((rollout.obs, rollout.behaviour), rows)
    minibatch = Minibatch(obs, behaviour, advantage, row.target, row.weight / weight)
    (_, metrics), gradient = jax.value_and_grad(ppo_loss, has_aux=True)(params, network.apply, minibatch, args)
    return gradient, metrics


def make_update(args: Args, network: nn.Module, devices: "Devices", sizes: Sizes, wait: Callable) -> Callable:
    """The learner: (states, rollouts, key) -> (states, metrics of every minibatch).

    states: one TrainState, always the same, on every local learner device; rollouts: one of every local shard, on its
    device. Epochs and minibatches are a Python loop: inside `lax.scan` a convolution's gradient is ten times slower on
    a CPU. All arithmetic is in programs for one device and of fixed shape, so its bits do not depend on the topology.
    wait: blocks until arrays are there; it holds Python to one step ahead of the devices, so that the forward passes of
    an actor on the same device come in between.
    """
    jit = lambda function, *first: jax.jit(partial(function, *first))
    estimate = jit(lambda rollout: compute_gae(rollout, args.gamma, args.gae_lambda))
    permute = jit(lambda key, shard: shuffle(args, key, shard, args.num_steps * sizes.shard_envs))
    sum_advantages, sum_squares = jit(advantage_sums), jit(advantage_squares)
    gradient = jit(shard_gradient, network, args)
    accumulate = jit(lambda a, b: jax.tree.map(jnp.add, a, b))
    step = jit(lambda state, grads: (state.apply_gradients(grads=grads), optax.tree.norm(grads)))
    total = make_total(devices, wait)

    def minibatch_gradient(state, shard, sums, squares, minibatch):
        pieces = range(args.gradient_accumulation_steps)
        return reduce(accumulate, (gradient(state.params, *shard, sums, squares, (minibatch, i)) for i in pieces))

    def update(states, rollouts, key):
        on = devices.of_shard  # on[i]: the place of the i-th shard's device among the local learner devices
        estimates, metrics = [estimate(rollout) for rollout in rollouts], []
        for epoch in range(args.update_epochs):
            keys = [jax.device_put(jax.random.fold_in(key, epoch), device) for device in devices.learners]
            index = [permute(keys[d], devices.first_shard + i) for i, d in enumerate(on)]
            sums = total([sum_advantages(e, i) for e, i in zip(estimates, index, strict=True)])
            squares = total([sum_squares(e, i, sums[d]) for e, i, d in zip(estimates, index, on, strict=True)])
            shards = list(zip(rollouts, estimates, index, strict=True))
            for m in range(args.num_minibatches):
                parts = [
                    minibatch_gradient(states[d], shard, sums[d], squares[d], m)
                    for d, shard in zip(on, shards, strict=True)
                ]
                grads, values = zip(*total(parts), strict=True)
                before, (states, norms) = states, zip(*map(step, states, grads), strict=True)
                metrics.append(values[0] | {"grad_norm": norms[0]})
                wait(before)
        return states, metrics

    return update


# === §9 Devices, checkpoints, logging [shared] ========================================================================


class PeerError(RuntimeError):
    """Another process of the run is missing, failed or is gone. Whoever makes one has already said so on stderr."""


def find_processes(args: Args) -> tuple[int, int, str]:
    """(number of this process, number of processes, HOST:PORT of process 0), by flags or cluster. Raises FlagError."""
    given = (args.coordinator_address, args.num_processes, args.process_id)
    if not args.distributed and given == (None, None, None):
        return 0, 1, ""
    address, size, rank, _ = ClusterEnv.auto_detect_unset_distributed_params(*given, [0], None, args.peer_timeout)
    for flag, value, instead in zip(PROCESS_FLAGS, (address, size, rank), ("10.0.0.1:9876", 2, 0), strict=True):
        rule = "must be given with the other two flags of its kind where no SLURM, Open MPI or Kubernetes tells it"
        require(value is not None, args, flag, rule, instead)
    host, _, port = address.rpartition(":")
    rule = "must be HOST:PORT, a free port of the machine of process 0"
    require(bool(host) and port.isdigit() and 0 < int(port) < 2**16, args, PROCESS_FLAGS[0], rule, "10.0.0.1:9876")
    require(size >= 1, args, "num_processes", "must be 1 or more", 2)
    require(0 <= rank < size, args, "process_id", f"must be 0 to {size - 1} with {size} processes", 0)
    return rank, size, address


PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id")
OWN_FLAGS = {*PROCESS_FLAGS, "distributed", "env_threads"}  # may differ between the processes of a run


class Peers:
    """The processes of a run. Process 0 has a TCP connection, a wire, to each of the others.

    XLA moves arrays between devices; everything else that processes tell each other goes over the wires: flags, scores,
    failures. When one process fails, all end. A process alone has no wires and shares with itself.
    """

    def __init__(self, rank: int, size: int, address: str, timeout: float, on_failure: Callable):
        self.rank, self.size, self.address, self.timeout = rank, size, address, timeout
        self.on_failure = on_failure  # told the PeerError, from another thread
        self.host = ""  # the address at which the others reach this machine
        self.wires: dict[int, Connection] = {}
        self.listeners: list[threading.Thread] = []
        self.inboxes = {other: queue.SimpleQueue() for other in range(size)}
        self.sending, self.failed, self.leaving = threading.Lock(), threading.Event(), threading.Event()
        self.failure: PeerError | None = None

    def connect(self) -> None:
        """Meet the other processes. Raises PeerError if one does not come in time, FlagError if they do not fit."""
        if self.size > 1:
            host, _, port = self.address.rpartition(":")
            meet = self._call if self.rank else self._wait_for_calls
            threading.Thread(target=self._beat, daemon=True).start()
            meet(host.strip("[]"), int(port), time.monotonic() + self.timeout)

    def _wait_for_calls(self, host: str, port: int, deadline: float) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", port), family=family, dualstack_ipv6=dual) as server:
            while missing := [str(other) for other in range(1, self.size) if other not in self.wires]:
                server.settimeout(max(1e-3, deadline - time.monotonic()))
                try:
                    caller = server.accept()[0]
                except TimeoutError:
                    which = f"process {', '.join(missing)} of {self.size}"
                    raise self._lost(f"{which} did not come to {self.address} in {self.timeout} s") from None
                caller.settimeout(None)
                name, wire = caller.getsockname()[0], Connection(caller.detach())
                try:
                    rank, size = json.loads(wire.recv_bytes(1000)) if wire.poll(5) else (0, 0)
                except (OSError, EOFError, ValueError):
                    continue  # no process of ours
                if size != self.size or str(rank) not in missing:
                    problem = f"process {rank} of {size} came where {', '.join(missing)} of {self.size} was missing"
                    problem = f"--process-id {rank}: {problem}. For example: --process-id {missing[0]}"
                    wire.send_bytes(json.dumps({"failure": problem}).encode())
                    raise FlagError(problem)
                self._wire(rank, wire, name.removeprefix("::ffff:"))

    def _call(self, host: str, port: int, deadline: float) -> None:
        while True:
            try:
                wire = socket.create_connection((host, port), timeout=max(1e-3, deadline - time.monotonic()))
                if wire.getsockname() != wire.getpeername():  # on one machine a socket may call itself
                    break
                wire.close()
            except OSError:
                if time.monotonic() > deadline:
                    raise self._lost(f"process 0 did not answer at {self.address} in {self.timeout} s") from None
            time.sleep(0.1)
        wire.settimeout(None)
        name = wire.getsockname()[0]
        self._wire(0, Connection(wire.detach()), name)
        self._send(0, [self.rank, self.size])

    def _wire(self, other: int, wire: Connection, host: str) -> None:
        self.wires[other], self.host = wire, host
        self.listeners.append(threading.Thread(target=self._listen, args=(other,), daemon=True))
        self.listeners[-1].start()

    def agree(self, args: Args) -> None:
        """Raise FlagError about a flag or package that differs between the processes."""
        mine = {f"--{name.replace('_', '-')}": value for name, value in asdict(args).items() if name not in OWN_FLAGS}
        for flag in ("--actor-device-ids", "--learner-device-ids"):
            mine[flag] = f"({len(mine[flag])} devices)"
        everyone = self.share({name: str(value) for name, value in (mine | versions()).items()})
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs[name] != value:
                    self.leaving.set()  # every process finds the same
                    rule = f"process {rank} differs from process 0, which has {value}"
                    raise FlagError(f"{name} {theirs[name]}: {rule}. For example: {name} {value}")

    def agree_on(self, what: str, value: str) -> None:
        """Raise RuntimeError unless all processes have the same value."""
        everyone = self.share(value)
        for rank, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                raise RuntimeError(f"process {rank} has other {what} ({theirs}) than process 0 ({everyone[0]})")

    def start_jax(self, device_ids) -> None:
        """Let JAX see the local devices `device_ids` and, through it, those of the other processes."""
        if self.size > 1:
            jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the hand-off's
            # on CPUs: else Gloo would listen where the machine's own name points, which is often 127.0.1.1
            _jax.make_gloo_tcp_collectives = partial(_jax.make_gloo_tcp_collectives, hostname=self.host)
            place = (self.address, self.size, self.rank, sorted(device_ids))
            # the wires notice a failure first; JAX would abort the process
            times = dict(initialization_timeout=self.timeout, heartbeat_timeout_seconds=2 * self.timeout)
            jax.distributed.initialize(*place, **times, shutdown_timeout_seconds=self.timeout)

    def share(self, value: Any) -> list:
        """Everyone's `value` (JSON), by rank. Every process must call this at the same point of the run."""
        if self.size == 1:
            return [value]
        if self.rank:
            self._send(0, {"value": value})
            return receive(self.inboxes[0])
        values = [value, *(receive(self.inboxes[other]) for other in range(1, self.size))]
        for other in self.wires:
            self._send(other, {"value": values})
        return values

    def _send(self, other: int, message: Any) -> None:
        with self.sending, suppress(OSError):  # a broken wire is the listener's to report
            self.wires[other].send_bytes(json.dumps(message).encode())

    def _beat(self) -> None:
        while not self.leaving.wait(self.timeout / 4):
            for other in list(self.wires):
                self._send(other, {})

    def _listen(self, other: int) -> None:
        try:
            while self.wires[other].poll(self.timeout):
                message = json.loads(self.wires[other].recv_bytes())
                if "failure" in message:
                    return self._fail(message["failure"])
                if "value" in message:
                    self.inboxes[other].put(message["value"])
            self._fail(f"process {other} has been silent for {self.timeout} s")
        except (OSError, EOFError):
            self._fail(f"process {other} is gone: killed, or its machine lost")

    def _lost(self, what: str) -> PeerError:
        print(f"error: {what}", file=sys.stderr, flush=True)  # now: JAX aborts this process if its coordinator is gone
        return PeerError(what)

    def _fail(self, what: str) -> None:
        """Wake the main thread, whatever it waits for; if it cannot be woken, end the process."""
        if not self.leaving.is_set() and self.failure is None:
            self.failure = self._lost(what)
            self.failed.set()
            for waiting in self.inboxes.values():
                waiting.put(self.failure)
            self.on_failure(self.failure)
            if self.rank == 0:
                self._tell(what)
            timer = threading.Timer(10, os._exit, (1,))
            timer.daemon = True
            timer.start()

    def _tell(self, what: str) -> None:
        for other in self.wires:
            self._send(other, {"failure": what})

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        """End with all others, or tell them why not. An error that another process caused becomes its PeerError."""
        if self.size == 1:
            return
        if isinstance(error, Exception) and not isinstance(error, FlagError | PeerError):
            self.failed.wait(2)  # a broken collective is noticed before its cause
        news = error is not None and self.failure is None and not self.leaving.is_set()
        self.leaving.set()
        if news:
            self._tell(str(error) if isinstance(error, PeerError) else f"process {self.rank} failed: {error!r}")
        if error is None:
            jax.distributed.shutdown()
        elif self.rank == 0:  # the others first: JAX aborts them when their coordinator is gone
            deadline = time.monotonic() + 5
            for listener in self.listeners:
                listener.join(max(0, deadline - time.monotonic()))
        if self.failure is not None and self.failure is not error:
            raise self.failure from error


class Devices(NamedTuple):
    """Where things are computed. Learner devices own equal runs of consecutive shards, in the order of the mesh."""

    actors: list[jax.Device]  # of this process
    learners: list[jax.Device]  # of this process
    mesh: Mesh  # the learner devices of all processes
    first_shard: int  # of this process
    of_shard: list[int]  # the index in `learners` of each shard of this process


def find_devices(args: Args, peers: Peers) -> Devices:
    """Turn device ids into devices, and learn which ones the other processes have. Raises FlagError."""
    ids = sorted({*args.actor_device_ids, *args.learner_device_ids})
    alone = peers.size == 1 or jax.default_backend() == "cpu"  # else JAX shows the named devices only
    local = dict(zip(range(len(jax.local_devices())) if alone else ids, jax.local_devices(), strict=False))
    for flag in ("actor_device_ids", "learner_device_ids"):
        fits = tuple(i for i in getattr(args, flag) if i in local) or (min(local),)
        rule = f"there are {len(local)} {jax.default_backend()} device(s) here, numbered from {min(local)}"
        require(fits == getattr(args, flag), args, flag, rule, even_split(fits, args.num_shards // peers.size))
    learners = [local[i] for i in args.learner_device_ids]
    by_id = {device.id: device for device in jax.devices()}
    everywhere = peers.share([device.id for device in learners])
    mesh = Mesh(np.array([by_id[i] for ids in everywhere for i in ids]), ("learner",))
    owners = [i for i in range(len(learners)) for _ in range(args.num_shards // mesh.size)]
    return Devices([local[i] for i in args.actor_device_ids], learners, mesh, peers.rank * len(owners), owners)


def tree_sum(parts: list, while_even: bool = False) -> list:
    """Sum by a balanced binary tree: neighbours are added, level by level, and an odd last one moves up as it is."""
    while len(parts) > 1 and not (while_even and len(parts) % 2):
        sums = [jax.tree.map(jnp.add, a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = sums + parts[2 * len(sums) :]
    return parts


def make_total(devices: Devices, wait: Callable) -> Callable[[list], list]:
    """The sum over all shards: takes what each local shard adds (a tree), returns the sum on each local learner device.

    One binary tree over the shard index. A device adds up its own shards as far as the tree has them together; an
    all-gather, which computes nothing, brings these vectors to all devices; each device finishes the same tree. So
    the order of additions, and with it every bit, is the same however many devices there are.
    """
    alone = jax.jit(lambda *parts: tree_sum(list(parts))[0])
    if devices.mesh.size == 1:
        return lambda parts: [alone(*parts)]
    lower = jax.jit(lambda *parts: jnp.stack([ravel_pytree(p)[0] for p in tree_sum(list(parts), while_even=True)]))
    split, everywhere = NamedSharding(devices.mesh, P("learner")), NamedSharding(devices.mesh, P())
    gather = jax.jit(lambda x: x, out_shardings=everywhere)
    upper = jax.jit(lambda sums, like: ravel_pytree(like)[1](tree_sum(list(sums))[0]))
    cpu = devices.learners[0].platform == "cpu"

    def total(parts: list) -> list:
        own = len(parts) // len(devices.learners)
        sums = [lower(*parts[i : i + own]) for i in range(0, len(parts), own)]
        if cpu:  # XLA blocks when 32 programs of a device are under way; around a collective that is a deadlock
            wait(sums)
        shape = (devices.mesh.size * sums[0].shape[0], sums[0].shape[1])
        whole = gather(jax.make_array_from_single_device_arrays(shape, split, sums))
        here = {shard.device: shard.data for shard in whole.addressable_shards}
        return [upper(here[device], parts[i * own]) for i, device in enumerate(devices.learners)]

    return total


def ship(rollout: Rollout, first_env: int, shard_envs: int, devices: Devices) -> list[tuple[int, Rollout]]:
    """Cut a rollout at the borders of shards and send each piece to the device of its shard: [(shard, piece), ...].

    Environments (`first_env` is the rollout's first one) and shards are numbered within this process.
    """
    end, pieces = first_env + rollout.reward.shape[1], []
    for shard in range(first_env // shard_envs, -(-end // shard_envs)):
        start, stop = max(first_env, shard * shard_envs) - first_env, min(end, (shard + 1) * shard_envs) - first_env
        piece = jax.tree.map(lambda x, cut=slice(start, stop): x[:, cut], rollout)
        pieces.append((shard, jax.device_put(piece, devices.learners[devices.of_shard[shard]])))
    return pieces


def assemble(deliveries: list[Delivery]) -> list[Rollout]:
    """The rollout of every shard of this process, put together from the pieces that the actors shipped."""
    shards = defaultdict(list)
    for shard, piece in (piece for delivery in deliveries for piece in delivery.rollout):
        shards[shard].append(piece)
    join = lambda *leaves: jnp.concatenate(leaves, axis=1) if len(leaves) > 1 else leaves[0]
    return [jax.tree.map(join, *shards[shard]) for shard in sorted(shards)]


def params_sha256(params: Any) -> str:
    """SHA-256 over the bytes of the leaves in tree order: equal hashes mean equal bits."""
    leaves = jax.tree.leaves(jax.device_get(params))
    return hashlib.sha256(b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in leaves)).hexdigest()


# flags that may change when a run is resumed: where it is computed, and what is kept of it
FREE_FLAGS = OWN_FLAGS | {"num_actor_threads", "actor_device_ids", "learner_device_ids", "peer_timeout"}
FREE_FLAGS |= {"exp_name", "track", "wandb_project_name", "wandb_entity", "log_frequency", "keep_checkpoints"}
FREE_FLAGS |= {"resume", "start_fresh", "save_model", "eval_episodes"}


def describe(args: Args, actors: int) -> dict[str, Any]:
    """What the bits of a run depend on (JSON), and its other flags. actors: of all processes."""
    cpu = jax.default_backend() == "cpu"
    around = {"script": Path(__file__).stem, "device": jax.devices()[0].device_kind} | versions()
    around["threads of XLA"] = int(os.environ.get("NPROC", max(num_cores(), jax.local_device_count()))) if cpu else None
    return json.loads(json.dumps({"args": asdict(args), "actors": actors, "around": around}))


def check_resumed(args: Args, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Hold a run against the one that it goes on with, both as `describe` has them. Raises FlagError."""
    rule = f"is a run of {old['around']['script']}.py, which has other flags"
    require(old["args"].keys() == new["args"].keys(), args, "resume", rule, f"{args.resume}-2 --start-fresh")
    for flag, value in old["args"].items():
        same = flag in FREE_FLAGS or new["args"][flag] == value
        require(same, args, flag, f"the run to resume has {show(value)}", value)
    rule = f"must amount to the {old['actors']} actors of the run to resume, in all processes"
    threads = max(1, args.num_actor_threads * old["actors"] // new["actors"])
    require(new["actors"] == old["actors"], args, "num_actor_threads", rule, threads)
    for what, before in old["around"].items():
        if new["around"][what] != before:
            print(f"{what}: {new['around'][what]} now and {before} before, the bits may differ", flush=True)


@contextmanager
def open_run(args: Args, record: dict[str, Any]):
    """The directory of a new run, or of the one to resume, for this process alone. Raises FlagError.

    record: of `describe`.
    """
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    require(args.resume != "", args, "resume", "must name a run", "my-run")
    directory = Path(args.resume or name)
    directory = Path("runs") / directory if len(directory.parts) == 1 else directory
    checkpoints = directory / "checkpoints"
    if any(path.name.isdigit() for path in checkpoints.glob("*")):
        check_resumed(args, json.loads((directory / "run.json").read_text()), record)
    elif args.resume is not None:
        close = get_close_matches(directory.name, [path.parent.name for path in directory.parent.glob("*/run.json")], 1)
        instead = close[0] if close and not directory.exists() else f"{args.resume} --start-fresh"
        require(args.start_fresh, args, "resume", f"there is no checkpoint in {checkpoints}", instead)
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = os.open(checkpoints, os.O_RDONLY)
    except OSError as error:
        example = "start the script in a directory that can be written"
        raise FlagError(f"the run's directory cannot be written: {error}. For example: {example}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a process that is killed, the system lets it go
        except BlockingIOError:
            require(False, args, "resume", "another process has this run", f"{args.resume}-2 --start-fresh")
        except OSError:
            pass  # a file system without locks
        for leftover in checkpoints.glob("*.orbax-checkpoint-tmp"):  # of one that was killed while it wrote
            shutil.rmtree(leftover)
        yield directory
    finally:
        os.close(lock)


def write_json(path: Path, content: Any) -> None:
    """Write a file that is there whole or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)


class Checkpoints:
    """The checkpoints of a run, by Orbax: atomic, written in the background, the newest kept. Process 0 has them."""

    def __init__(self, directory: Path, keep: int):
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, multiprocessing_options=alone)
        self.directory, self.manager = directory, ocp.CheckpointManager(directory.resolve(), options=options)

    def save(self, update: int, tree: Any, counters: dict[str, Any]) -> None:
        """Begin to write arrays and a dictionary (JSON)."""
        tree = jax.tree.map(np.asarray, jax.device_get(serialization.to_state_dict(tree)))
        record = ocp.args.JsonSave({"sha256": params_sha256(tree), "counters": counters})
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), shutil.disk_usage(self.directory).free
        with self.explained():
            if free < needed:
                raise OSError(f"the disk is full, {free} bytes are free and {needed} needed")
            if update in self.manager.all_steps():  # one that could not be read
                self.manager.delete(update)
            items = ocp.args.Composite(state=ocp.args.StandardSave(tree), record=record)
            self.manager.save(update, args=items, force=True)

    def load(self) -> tuple[int, Any, dict[str, Any]] | None:
        """(update, tree of dictionaries, counters) of the newest checkpoint that is whole."""
        for update in sorted(self.manager.all_steps(), reverse=True):
            try:
                items = ocp.args.Composite(state=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
                items = self.manager.restore(update, args=items)
                if params_sha256(items.state) != items.record["sha256"]:
                    raise ValueError("its bits are not those that were written")
                return update, items.state, items.record["counters"]
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                print(f"the checkpoint of update {update} cannot be read, trying an older one: {reason}", flush=True)
        return None

    def check(self) -> None:
        """Raise RuntimeError if a checkpoint could not be written."""
        with self.explained():
            self.manager.check_for_errors()

    def finish(self) -> None:
        """Wait until all is written. Raises RuntimeError if it could not be."""
        with self.explained():
            self.manager.wait_until_finished()

    def hint(self) -> str:
        """How to go on with the run."""
        newest = max((int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdigit()), default=None)
        return f"go on from update {newest} with --resume {self.directory.parent}" if newest else "it has no checkpoint"

    @contextmanager
    def explained(self):
        try:
            yield
        except Exception as error:
            raise RuntimeError(f"a checkpoint could not be written, {self.hint()}: {error}") from error


def checkpoint_due(args: Args, sizes: Sizes, update: int) -> bool:
    """Whether a checkpoint is written after this update."""
    return update == sizes.updates or update % (args.checkpoint_frequency or sizes.updates) == 0


def resume(checkpoints: Checkpoints | None, peers: Peers, args: Args, tree: Any) -> tuple[int, Any, dict | None]:
    """(update, tree, counters) of the newest checkpoint of process 0, on every process; (0, tree, None) if none.

    Raises FlagError if it is of other arrays than `tree`, or if the run may not start afresh.
    """
    saved, shapes = None, lambda tree: jax.tree.map(np.shape, serialization.to_state_dict(tree))
    if checkpoints and args.resume is not None and (saved := checkpoints.load()):
        rule = "the network or the optimizer of the run to resume is another"
        require(shapes(saved[1]) == shapes(tree), args, "resume", rule, f"{args.resume}-2 --start-fresh")
    saved = saved and [saved[0], base64.b64encode(serialization.msgpack_serialize(saved[1])).decode(), saved[2]]
    saved = peers.share(saved)[0]
    if saved is None:
        rule = "no checkpoint of the run can be read"
        require(args.resume is None or args.start_fresh, args, "resume", rule, f"{args.resume} --start-fresh")
        return 0, tree, None
    update, text, counters = saved
    return update, serialization.from_state_dict(tree, serialization.msgpack_restore(base64.b64decode(text))), counters


def versions() -> dict[str, str]:
    """Versions of what the bits depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "envpool", "numpy")
    return {"python": platform.python_version()} | {name: package_version(name) for name in packages}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warn_if_endless(args: Args, network: nn.Module, params: Any, device: jax.Device) -> None:
    """On a CPU, say so when the run would take more than a day, at 10 GFLOP/s a core (a gradient costs 3 passes)."""
    if device.platform == "cpu":
        obs = np.zeros((1, *env_spec(args)[0]), np.uint8)
        flops = jax.jit(network.apply).lower(params, obs).cost_analysis()["flops"]
        flops *= 1 + 3 * getattr(args, "update_epochs", 1)
        days = args.total_timesteps * flops / (1e10 * num_cores()) / 86400
        if days > 1:
            command = f"python {Path(__file__).name} {CPU_FLAGS}"
            print(f"On this CPU the run would take about {days:.0f} days. Made for a CPU: {command}", flush=True)


def scalar_summary(scalars: dict[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()])


class Report:
    """What a person sees of a run: TensorBoard, the live line, summary.json."""

    def __init__(self, args: Args, sizes: Sizes, devices: Devices, directory: Path, counters: dict[str, Any] | None):
        self.args, self.sizes, self.devices, self.directory = args, sizes, devices, directory
        counters = counters or dict(updates=0, episodes=0, scores=[], seconds=0.0, resumed_at=[], wandb_id=None)
        self.updates, self.episodes, self.scores = counters["updates"], counters["episodes"], counters["scores"]
        self.resumed_at = counters["resumed_at"] + [self.updates] * (self.updates > 0)
        self.evaluation, self.wandb, self.wandb_id = None, None, counters["wandb_id"]
        if args.track:
            import wandb

            place = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=directory.name)
            again = dict(id=self.wandb_id, resume="allow") if self.wandb_id else {}
            self.wandb = wandb.init(**place, **again, sync_tensorboard=True, config=asdict(args), save_code=True)
            self.wandb_id = self.wandb.id
        done, total = self.updates * sizes.steps, sizes.updates * sizes.steps
        self.writer = event_file_writer.EventFileWriter(str(directory))
        # what a run wrote after the checkpoint that it is resumed from is written again: TensorBoard forgets the first
        self.write(done + 1, session_log=SessionLog(status=SessionLog.START))
        table = "\n".join(f"|{flag}|{value}|" for flag, value in asdict(args).items())
        self.write(done + 1, summary=text_pb("hyperparameters", f"|flag|value|\n|-|-|\n{table}"))
        line = "{percentage:3.0f}% {n_fmt}/{total_fmt} steps, {rate_fmt}, {remaining} left{postfix}"
        self.bar = tqdm(total=total, initial=done, unit=" steps", disable=None, bar_format=line)
        self.logged_at = self.steady_from = time.perf_counter()
        self.start, self.steady_steps = self.logged_at - counters["seconds"], None  # steps before steady_from
        self.logged, self.games, self.seconds = self.updates, [], defaultdict(float)  # since the last log

    def write(self, step: int, **content: Any) -> None:
        """Add one event to the TensorBoard log."""
        self.writer.add_event(Event(wall_time=time.time(), step=step, **content))

    def counters(self) -> dict[str, Any]:
        """What another Report needs in order to go on after a log (JSON), which is then on disk."""
        self.writer.flush()
        names = ("updates", "episodes", "scores", "resumed_at", "wandb_id")
        return {name: getattr(self, name) for name in names} | {"seconds": time.perf_counter() - self.start}

    def update(self, news: list, lag: int, seconds: dict[str, float], rate: float, metrics) -> None:
        """Take in one update, and write it out if a log is due.

        news: what every process says, (preempted, (games, seconds) of each actor's delivery). `metrics` is still on the
        device.
        """
        actors = [actor for _, deliveries in news for actor in deliveries]
        self.updates += 1
        if self.steady_steps is None:
            self.steady_from, self.steady_steps = time.perf_counter(), self.updates * self.sizes.steps
        games = [game for played, _ in actors for game in played]
        self.episodes += len(games)
        self.scores = [*self.scores, *(score for score, _ in games)][-100:]
        self.games += games
        for source, share in [(seconds, 1.0), *((spent, 1 / len(actors)) for _, spent in actors)]:
            for name, value in source.items():
                self.seconds[name] += value * share
        waited, learned = self.seconds["rollout_queue_get_time"], self.seconds["training_time"]
        part = "environments" if self.seconds["env_time"] > self.seconds["inference_time"] else "inference"
        state = f"score {np.mean(self.scores):.1f}" if self.scores else "no game over yet"
        state += f", learner waits {waited / (waited + learned):.0%} of the time for {part}"
        self.bar.set_postfix_str(state, refresh=False)
        self.bar.update(self.sizes.steps)
        due = self.updates == 1 or self.updates % self.args.log_frequency == 0
        if due or checkpoint_due(self.args, self.sizes, self.updates):
            self.log(state, rate, lag, summarise(jax.device_get(metrics)))

    def log(self, state: str, rate: float, lag: int, losses: dict[str, float]) -> None:
        now, step, rounds = time.perf_counter(), self.updates * self.sizes.steps, self.updates - self.logged
        sps, recent = step / (now - self.start), rounds * self.sizes.steps / (now - self.logged_at)
        charts = {"SPS": sps, "SPS_update": recent, "learning_rate": rate}
        if self.games:
            charts["avg_episodic_return"], charts["avg_episodic_length"] = np.mean(self.games, axis=0)
        stats = {name: value / rounds for name, value in self.seconds.items()}
        stats |= {"policy_lag": lag, "episodes": len(self.games)}
        groups = {"charts": charts, "losses": losses, "stats": stats}
        scalars = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        self.write(step, summary=scalar_summary(scalars))
        if self.bar.disable:
            share, left = step / self.bar.total, (self.bar.total - step) / sps
            pace = f"{step}/{self.bar.total} steps, {sps:.0f} steps/s, {left:.0f} s left"
            print(f"{share:4.0%} {pace}, {state}", flush=True)
        self.games, self.logged, self.logged_at, self.seconds = [], self.updates, now, defaultdict(float)

    def leave_model(self, network: nn.Module, params: Any, check: Callable) -> str:
        """Write the model of --save-model and play its games; returns the run's status. check: `HandOff.check`."""
        start = time.perf_counter()
        save_model(self.directory / "model.msgpack", self.args, params)
        try:
            scores = play_games(self.args, network, params, self.args.eval_episodes, check=check)
        except Stopped:
            return "preempted"
        finally:  # training has ended, its time too
            self.start, self.steady_from = (at + time.perf_counter() - start for at in (self.start, self.steady_from))
        self.evaluation = {"scores": scores, "mean": float(np.mean(scores)), "std": float(np.std(scores))}
        scalars = {"eval/episodic_return": self.evaluation["mean"]}
        self.write(self.updates * self.sizes.steps, summary=scalar_summary(scalars))
        games = f"mean score of {len(scores)} games {np.mean(scores):.2f}"
        print(f"model: {self.directory}/model.msgpack, {games}", flush=True)
        return "finished"

    def close(self, status: str, params: Any, hint: str) -> dict[str, Any]:
        """Flush everything, write summary.json and print its gist and, if not finished, the hint how to go on."""
        now, steps, scores = time.perf_counter(), self.updates * self.sizes.steps, self.scores
        steady = steps - (self.steady_steps or steps)
        actors, _, mesh, *_ = self.devices
        summary = {
            "run_name": self.directory.name,
            "status": status,
            "args": asdict(self.args),
            "versions": versions(),
            "processes": mesh.size // len(self.devices.learners),
            "devices": {"actors": list(map(str, actors)), "learners": list(map(str, mesh.devices))},
            "global_step": steps,
            "updates": self.updates,
            "seconds": now - self.start,
            "sps": steps / (now - self.start),
            "sps_steady": steady / (now - self.steady_from) if steady else None,
            "episodes": self.episodes,
            "mean_score": float(np.mean(scores)) if scores else None,
            "std_score": float(np.std(scores)) if scores else None,
            "evaluation": self.evaluation,
            "resumed_at": self.resumed_at,
            "params_sha256": params_sha256(params),
        }
        self.bar.close()
        try:
            write_json(self.directory / "summary.json", summary)
            self.writer.close()
        except OSError as error:  # a full disk must not hide what it made fail
            print(f"summary.json or the log could not be written: {error}", flush=True)
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(status != "finished"))
        games = f"{self.episodes} games" + (f", mean score {np.mean(scores):.2f}" if scores else "")
        pace = f"{steps} steps in {summary['seconds']:.0f} s, {summary['sps']:.0f} steps/s"
        print(f"{status}: {pace}, {games}; {self.directory}/summary.json")
        if status != "finished":
            print(hint)
        print(f"params sha256: {summary['params_sha256']}", flush=True)
        return summary


# === §10 Train, evaluate, main [shared] ===============================================================================


def start_actors(args: Args, sizes: Sizes, devices: Devices, policy, handoff: HandOff, key, updates: range) -> list:
    """One thread for every actor of this process."""
    env_threads = args.env_threads or max(1, num_cores() // sizes.actors)
    threads = []

    def make_envs(generation: int, first: int) -> Envs:
        return Envs(make_env(args, env_seeds(args.seed, generation, first, args.local_num_envs), env_threads))

    for i, actor_id in enumerate(handoff.params):
        own_envs = partial(make_envs, first=actor_id * args.local_num_envs)
        here = i * args.local_num_envs  # the first environment's number within this process
        to_learner = partial(ship, first_env=here, shard_envs=sizes.shard_envs, devices=devices)
        own_key = jax.device_put(key, devices.actors[i // args.num_actor_threads])  # away from the learner's queue
        actor = (actor_id, own_envs, policy, to_learner, handoff, own_key, args, updates)
        threads.append(threading.Thread(target=run_actor, args=actor, name=f"actor {actor_id}", daemon=True))
        threads[-1].start()
    return threads


@contextmanager
def caught_signals(handoff: HandOff):
    """Let Ctrl-C end the run at its next wait, SIGTERM after this update, and a second one at once.

    A handler that raises does not do: raised inside a callback of the garbage collector, an exception is lost.
    """

    def handle(number, frame):
        signal.signal(number, previous[number])
        if number == signal.SIGINT:
            handoff.fail(KeyboardInterrupt())
        else:
            handoff.preempted.set()

    main_thread = threading.current_thread() is threading.main_thread()
    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM) if main_thread}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


EVALUATION = 2**32 - 1  # the generation of evaluation's seeds; those of training count from 0


def play_games(args: Args, network, params, episodes: int, greedy=False, check=lambda: None) -> list[float]:
    """Scores of whole games, the first of each of `episodes` environments, so that short games do not count double.

    Actions are sampled from the policy, or its most probable ones if `greedy`. check: called at every step.
    """
    envs = Envs(make_env(args, env_seeds(args.seed, EVALUATION, 0, episodes), num_cores()))
    key, scores = jax.random.key(args.seed), {}

    @jax.jit
    def act(params, obs, key, step):
        logits, _ = network.apply(params, obs)
        return logits.argmax(1) if greedy else jax.random.categorical(jax.random.fold_in(key, step), logits)

    for step in count():
        check()
        envs.step(jax.device_get(act(params, envs.obs, key, step)).astype(np.int32))
        for i, (score, _) in zip(np.flatnonzero(envs.over).tolist(), envs.pop_games(), strict=True):
            scores.setdefault(i, score)
        if len(scores) == episodes:
            envs.close()
            return [scores[i] for i in range(episodes)]


def save_model(path: Path, args: Args, params: Any) -> None:
    """Write flags and parameters to one file (Flax serialization)."""
    content = {"script": Path(__file__).stem, "args": json.dumps(asdict(args))}
    content["params"] = serialization.to_state_dict(jax.device_get(params))
    path.write_bytes(serialization.msgpack_serialize(content))


def load_model(path: Path) -> tuple[Args, nn.Module, Any]:
    """Flags, network and parameters of a file that `save_model` wrote."""
    content = serialization.msgpack_restore(path.read_bytes())
    flags = json.loads(content["args"])
    args = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()})
    return args, ActorCritic(env_spec(args)[1], args.channels, args.hiddens), content["params"]


def train(args: Args) -> dict[str, Any]:
    """One whole run; returns what summary.json says. Raises FlagError before anything is built."""
    rank, size, address = find_processes(args)
    sizes = check_args(args, size)
    env_spec(args)
    handoff = HandOff(range(rank * sizes.actors, (rank + 1) * sizes.actors), args.concurrency)
    with Peers(rank, size, address, args.peer_timeout, handoff.fail) as peers:
        peers.connect()
        peers.agree(args)
        peers.start_jax({*args.actor_device_ids, *args.learner_device_ids})
        devices, record = find_devices(args, peers), describe(args, size * sizes.actors)
        with open_run(args, record) if rank == 0 else nullcontext() as directory:
            return run(args, sizes, devices, handoff, peers, directory, record)


def make_state(args: Args, sizes: Sizes, device: jax.Device, key) -> tuple[nn.Module, TrainState, Callable]:
    """The network, what is learned, and the learning rate of every update."""
    obs_shape, num_actions = env_spec(args)
    network = ActorCritic(num_actions, args.channels, args.hiddens)
    quick = {"xla_backend_optimization_level": 0}  # runs once: the default would compile for seconds
    params = jax.jit(network.init, compiler_options=quick)(key, np.zeros((1, *obs_shape), np.uint8))
    optimizer, learning_rate = make_optimizer(args, sizes)
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optimizer)
    return network, jax.device_put(state, device), learning_rate


def give_params(handoff: HandOff, devices: Devices, version: int, params: Any) -> None:
    """Give every actor of this process one token, with the parameters on its own device."""
    copies = [jax.device_put(params, device) for device in devices.actors]
    for i, actor_id in enumerate(handoff.params):
        handoff.give_params(actor_id, version, copies[i * len(copies) // len(handoff.params)])


def run(args: Args, sizes: Sizes, devices: Devices, handoff: HandOff, peers: Peers, directory, record) -> dict:
    """What this process does of a run. Process 0 has the directory and returns the summary, the others the status."""
    actor_key, learner_key, params_key = jax.random.split(jax.random.key(args.seed), 3)
    learner_key = jax.device_put(learner_key, devices.learners[0])
    network, state, learning_rate = make_state(args, sizes, devices.learners[0], params_key)
    peers.agree_on("initial parameters", params_sha256(state.params))
    checkpoints = Checkpoints(directory / "checkpoints", args.keep_checkpoints) if directory else None
    done, (state, previous), counters = resume(checkpoints, peers, args, (state, state.params))
    if directory:
        write_json(directory / "run.json", record)
    states = [jax.device_put(state, device) for device in devices.learners]
    learn = make_update(args, network, devices, sizes, handoff.wait_until_ready)
    report = Report(args, sizes, devices, directory, counters) if directory else None
    if report:
        warn_if_endless(args, network, state.params, devices.learners[0])
    updates, status, actors = range(done + 1, sizes.updates + 1), "finished", []

    try:
        with caught_signals(handoff):
            actors += start_actors(args, sizes, devices, make_policy(network), handoff, actor_key, updates)
            if args.concurrency:
                give_params(handoff, devices, max(0, done - 1), previous)
            give_params(handoff, devices, done, states[0].params)
            for update in updates:
                seconds = defaultdict(float)
                with timed(seconds, "rollout_queue_get_time"):
                    deliveries = handoff.get_rollouts(update)
                with timed(seconds, "training_time"):
                    updated = learn(states, assemble(deliveries), jax.random.fold_in(learner_key, update))
                    handoff.wait_until_ready(updated)
                previous, (states, metrics) = states[0].params, updated
                give_params(handoff, devices, update, states[0].params)
                news = peers.share([handoff.preempted.is_set(), [(d.games, d.seconds) for d in deliveries]])
                if report:
                    report.update(news, update - 1 - deliveries[0].version, seconds, learning_rate(update), metrics)
                    checkpoints.check()
                    if checkpoint_due(args, sizes, update):
                        checkpoints.save(update, (states[0], previous), report.counters())
                if any(preempted for preempted, _ in news) and update < sizes.updates:
                    status = "preempted"
                    break
            if report:
                checkpoints.finish()
            if report and args.save_model and status == "finished":
                status = report.leave_model(network, states[0].params, handoff.check)
        peers.agree_on("final parameters", params_sha256(states[0].params))
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        raise
    finally:
        handoff.stop()
        for actor in actors:
            actor.join(2 if status == "failed" else None)  # it hangs if its device waits for a process that is gone
        summary = {"status": status}
        if report:
            with suppress(RuntimeError):  # told already
                checkpoints.finish()
            summary = report.close(status, states[0].params, checkpoints.hint())
    return summary


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:  # read when the backend starts, that is by the first JAX call
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    leave = os._exit  # a thread may still wait inside XLA, and Python's own way out would abort over it
    try:
        code = 128 + signal.SIGTERM if train(args)["status"] == "preempted" else 0
        leave = sys.exit
    except FlagError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
        leave = os._exit if jax.distributed.is_initialized() else sys.exit
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException as error:
        if not isinstance(error, PeerError):
            traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        leave(code)


if __name__ == "__main__":
    main()
