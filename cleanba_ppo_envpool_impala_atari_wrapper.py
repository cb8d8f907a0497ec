# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "envpool==1.2.5; python_version < '3.12'", "envpool==1.2.7; python_version >= '3.12'",
#     "flax==0.12.8; python_version < '3.12'", "flax==0.12.12; python_version >= '3.12'",
#     "jax==0.10.2; python_version < '3.12'", "jax==0.12.0.1; python_version >= '3.12'",
#     "numpy==2.4.6; python_version < '3.12'", "numpy==2.5.5; python_version >= '3.12'",
#     "gymnasium==1.4.0", "optax==0.2.8", "tensorboard==2.21.0", "tyro==1.0.17",
# ]
# ///
"""PPO under IMPALA's Atari protocol (a lost life ends the episode, no sticky actions), reproducible to the bit.

Actors (threads, each with a pool of environments) play rollouts; the learner (one or more devices) turns one rollout of
every actor into one update. Parameters are handed to the actors as tokens, one per rollout, so the version that plays a
rollout never depends on which thread was fast:

             rollout 1   rollout 2      rollout 3      rollout 4
    actors   play v0     play v0        play v1        play v2          by default
    learner              v0 -> v1       v1 -> v2       v2 -> v3

    actors   play v0                    play v1                         with --no-concurrency
    learner              v0 -> v1                      v1 -> v2

    python THIS_FILE.py --env-id Pong-v5
    python THIS_FILE.py --actor-device-ids 0 --learner-device-ids 1 2 3 --num-shards 6 --local-num-envs 60

To change the environment edit section 2, the network section 3, the loss or a metric section 7. Everything about
learning comes before the stairs and ends with `train`; below them is where it runs and what is kept. A copy needs no
other file. Sections marked [shared] are the same in all three scripts.

Departures from the published code (benchmark/results/README.md has all): (1) reset rows teach nothing, (2) time limits
are bootstrapped, (3) advantages are normalised over the global minibatch, (7) seeds and keys are distinct, (8)
gradients are added up in one order, so devices do not change the result.
"""

import fcntl
import hashlib
import json
import os
import queue
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from importlib.metadata import version as package_version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import serialization
from flax.linen.initializers import orthogonal
from flax.training.train_state import TrainState
from jax._src.distributed import global_state  # has the key-value store, which nothing public gives; Orbax uses it too
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer import event_file_writer  # W&B replaces its EventFileWriter when a run begins

# EnvPool imports all its games. These are not used here, and drawing them takes Matplotlib, a second to import.
sys.modules.setdefault("envpool.jumanji.registration", sys)
import envpool  # noqa: E402

print = partial(print, flush=True)  # what a run says is seen at once, also in a file or through a pipe

# === §1 Args ==========================================================================================================
# A type says what a value must be: (rule, test). The comment behind a flag is its help.
Count = Annotated[int, "must be 1 or more", lambda x: x >= 1]
Natural = Annotated[int, "must be 0 or more", lambda x: x >= 0]
Positive = Annotated[float, "must be above 0 and finite", lambda x: 0 < x < np.inf]
Weight = Annotated[float, "must be 0 or more and finite", lambda x: 0 <= x < np.inf]
Fraction = Annotated[float, "must be between 0 and 1", lambda x: 0 <= x <= 1]
Widths = Annotated[tuple[int, ...], "must be one or more widths, each 1 or more", lambda x: min(x, default=0) >= 1]
Ids = Annotated[tuple[int, ...], "must be distinct ids, 0 or more", lambda x: x and min(x) >= 0 and len({*x}) == len(x)]
Seed = Annotated[int, "must be between 0 and 4294967295", lambda x: 0 <= x < 2**32]
Name = Annotated[str, "must be a name without a path separator", lambda x: x and os.sep not in x]
Place = Annotated[str | None, "must not be empty", lambda x: x != ""]


@dataclass(frozen=True)
class Args:
    # Experiment
    exp_name: Name = Path(__file__).stem  # name of the experiment, a part of the run's name
    seed: Seed = 1  # seed of everything that is random
    total_timesteps: int = 50_000_000  # environment steps of the whole run
    log_frequency: Count = 10  # updates between two logs
    track: bool = False  # sync TensorBoard to Weights & Biases (pip install wandb)
    wandb_project_name: str = "cleanba"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team or user
    # Environment
    env_id: str = "Breakout-v5"  # one of EnvPool's Atari games
    img_size: int = 84  # height and width of observations; 42 suits a CPU
    local_num_envs: Count = 60  # environments of each actor thread
    env_threads: Natural = 0  # EnvPool threads of each actor; 0 shares the cores among the actors
    actor_timeout: Count = 300  # seconds that making an actor's environments, or one step of them, may take
    # Algorithm
    learning_rate: Weight = 2.5e-4  # learning rate of Adam at the start
    anneal_lr: bool = True  # decrease the learning rate linearly to 0
    num_steps: Count = 128  # T, the number of steps of a rollout
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of generalized advantage estimation
    num_minibatches: Count = 4  # optimizer steps per epoch
    gradient_accumulation_steps: Count = 1  # pieces per shard and minibatch: less memory, same statistics
    update_epochs: Count = 4  # passes over a batch
    norm_adv: bool = True  # normalise advantages over the global minibatch
    clip_coef: Positive = 0.1  # PPO's clip range of the probability ratio
    ent_coef: Weight = 0.01  # weight of the entropy bonus
    vf_coef: Weight = 0.5  # weight of the value loss (which has a factor of 0.5 of its own)
    max_grad_norm: Positive = 0.5  # clip gradients to this global norm
    concurrency: bool = True  # play the next rollout while the learner learns: policies lag by one update
    # Network
    channels: Widths = (16, 32, 32)  # channels of the convolution sequences
    hiddens: Widths = (256,)  # widths of the dense layers after them
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of convolutions and hidden layers; all else is float32
    # Devices
    num_actor_threads: Count = 1  # actor threads on each actor device
    actor_device_ids: Ids = (0,)  # local devices that compute the actors' forward passes
    learner_device_ids: Ids = (0,)  # local devices that compute gradients
    num_shards: Count = 4  # slices of a batch, one gradient each; a multiple of the number of learner devices
    # Checkpoints
    checkpoint_frequency: Natural = 0  # updates between checkpoints (each restarts the games); 0: only at the end
    keep_checkpoints: Natural = 2  # number of newest checkpoints to keep; 0 keeps all
    resume: Place = None  # resume this run: its directory, or its name below runs
    start_fresh: bool = False  # with --resume, start the run if it has no checkpoint
    load_model: Place = None  # start with the parameters of this model.msgpack or checkpoint, of the same network
    save_model: bool = False  # at the end write parameters and flags to model.msgpack, and play games with them
    eval_episodes: Count = 10  # games that --save-model plays, each in its own environment
    # Processes
    distributed: bool = False  # join the processes that SLURM, Open MPI or Kubernetes started
    coordinator_address: str | None = None  # HOST:PORT of process 0; a cluster sets it itself
    num_processes: int | None = None  # number of processes of the run; a cluster sets it itself
    process_id: int | None = None  # number of this process, from 0; a cluster sets it itself
    peer_timeout: Count = 100  # seconds after which a missing or silent process ends the run


# === §2 Environment ===================================================================================================
def env_options(args):
    """EnvPool's options for IMPALA's protocol (Espeholt et al. 2018, table G.1); A depends on the game."""
    return dict(
        episodic_life=True,
        repeat_action_probability=0.0,
        noop_max=30,  # the last frame with FIRE if the game's action set has it (use_fire_reset)
        full_action_space=False,
        max_episode_steps=27_000,  # 108,000 frames, 30 minutes of play
        reward_clip=True,
        img_height=args.img_size,
        img_width=args.img_size,
    )


@cache
def env_spec(args):
    """The shape of an observation (4, H, W) and the number of actions A, without building a pool."""
    games = [name for name, (module, *_) in envpool.registration.registry.specs.items() if module == "envpool.atari"]
    example = re.sub(r"^ALE/|NoFrameskip|Deterministic|-v\d$", "", args.env_id) + "-v5"  # from Gymnasium's names
    rule = f"must be one of EnvPool's {len(games)} Atari games"
    require(args.env_id in games, args, "env_id", rule, example if example in games else Args.env_id)
    require(8 <= args.img_size <= 1024, args, "img_size", "must be between 8 and 1024", Args.img_size)
    spec = envpool.make_spec(args.env_id, **env_options(args))
    return spec.observation_space.shape, int(spec.action_space.n)


def env_seeds(seed, generation, first, count):
    """Seeds (int32) of the environments `first` to `first + count - 1`, numbered over all actors of all processes.

    generation: how many checkpoints were made before, each of which brings new games.
    """
    seeds = []
    for number in range(first, first + count):
        sequence = np.random.SeedSequence(seed, spawn_key=(generation, number))
        env_seed = sequence.generate_state(1).view(np.int32).item()
        seeds.append(0 if env_seed == -1 else env_seed)  # with -1 ALE takes its seed from the clock
    return seeds


def make_env(args, seeds, num_threads):
    """A pool of len(seeds) environments in lock-step: with partial batches the order of data would depend on timing."""
    return envpool.make(
        args.env_id,
        env_type="gymnasium",
        num_envs=len(seeds),
        seed=seeds,
        num_threads=num_threads,
        **env_options(args),
    )


class Envs:
    """B environments that are never reset by hand; hides what is peculiar to the simulator.

    EnvPool resets an environment on the step *after* its episode ended: that step ignores its action and returns the
    first observation of the next episode. The row of such a step is a reset row.
    """

    def __init__(self, pool):
        self.pool = pool
        self.obs, info = pool.reset()  # u8[B,4,H,W], what the agent sees now
        num_envs = len(self.obs)
        self.is_reset_row = np.zeros(num_envs, bool)  # where `obs` ended an episode, so that the next step only resets
        self.game_over = np.zeros(num_envs, bool)  # where it ended a whole game, too
        self.lives = info.get("lives", np.zeros(num_envs, int))
        self.full_lives = self.lives  # at the start of a game
        self.score = np.zeros(num_envs)
        self.length = np.zeros(num_envs, int)  # in steps
        self.games = []  # (score, length) of the games that ended
        self.steps_begun = 0
        self.is_stepping = False

    def step(self, action):
        """Play action i32[B]; return reward f32[B], clipped as the agent learns it, and terminated bool[B]."""
        self.steps_begun += 1
        self.is_stepping = True
        self.obs, reward, terminated, truncated, info = self.pool.step(action)
        self.is_stepping = False

        # The game's own points, unclipped, and its true end, which EnvPool may report as a time limit.
        self.score += info.get("reward", reward)
        self.length += ~self.is_reset_row
        game_terminated = info.get("terminated", terminated).astype(bool)
        terminated = terminated | game_terminated
        self.find_games_over(game_terminated | truncated, info.get("lives", self.lives))
        self.is_reset_row = terminated | truncated
        return reward, terminated

    def find_games_over(self, ended, lives):
        """Count the whole games that are over: where the simulator says `ended`, and where it restarted one silently.

        Where a lost life ends an episode, the game may end during the reset that follows. EnvPool then starts the next
        game without a word, or it reports the same end twice.
        """
        restarted = (self.lives > 0) & (self.lives < self.full_lives) & (lives == self.full_lives)
        silent_game_over = self.is_reset_row & ~self.game_over & restarted
        game_over = ended & ~self.game_over | silent_game_over
        self.games += zip(self.score[game_over].tolist(), self.length[game_over].tolist())
        self.score[game_over] = 0
        self.length[game_over] = 0
        self.game_over = game_over
        self.lives = lives


# === §3 Network [shared] ==============================================================================================
def max_pool(x):
    """3x3 maximum with stride 2, SAME, f32[N,H,W,C]: the bits of `nn.max_pool`, a third of its gradient's CPU time."""
    for axis in (1, 2):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (x.shape[axis] % 2, 1)  # SAME
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        end = padded.shape[axis] - 2
        left, middle, right = [jax.lax.slice_in_dim(padded, i, end + i, 2, axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(left, middle), right)
    return x


class ResidualBlock(nn.Module):
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.channels, (3, 3), dtype=self.dtype)(nn.relu(x))
        y = nn.Conv(self.channels, (3, 3), dtype=self.dtype)(nn.relu(y))
        return x + y


class ActorCritic(nn.Module):
    """IMPALA's large network (Espeholt et al. 2018, figure 3), no LSTM; obs -> (logits f32[N,A], value f32[N])."""

    num_actions: int
    channels: tuple
    hiddens: tuple
    dtype: Any = "float32"  # of convolutions and hidden layers

    @nn.compact
    def __call__(self, obs):
        x = jnp.transpose(obs, (0, 2, 3, 1)) / 255.0
        for channels in self.channels:
            x = max_pool(nn.Conv(channels, (3, 3), dtype=self.dtype)(x))
            x = ResidualBlock(channels, self.dtype)(x)
            x = ResidualBlock(channels, self.dtype)(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        for width in self.hiddens:
            x = nn.Dense(width, dtype=self.dtype, kernel_init=orthogonal(np.sqrt(2)))(x)
            x = nn.relu(x)
        logits = nn.Dense(self.num_actions, kernel_init=orthogonal(0.01))(x)
        value = nn.Dense(1, kernel_init=orthogonal(1.0))(x)
        return logits, value[:, 0]


def make_network(args):
    _, num_actions = env_spec(args)
    return ActorCritic(num_actions, args.channels, args.hiddens, args.compute_dtype)


# === §4 Rollout =======================================================================================================
class Behaviour(NamedTuple):
    """What the acting policy did, and what its loss will ask about it."""

    action: jax.Array  # i32[T,B]
    logprob: jax.Array  # f32[T,B]
    value: jax.Array  # f32[T,B]


class Rollout(NamedTuple):
    """T steps of B environments. Row t means obs[t] -> action[t] -> reward[t], terminated[t].

    An episode ended in row t (terminated or cut by a time limit) exactly where is_reset_row[t + 1]; obs[t + 1] is then
    its last observation. Every leaf has its environments on axis 1.
    """

    obs: jax.Array  # [T+1,B,...], here u8[T+1,B,4,H,W]
    is_reset_row: jax.Array  # bool[T+1,B], rows that an auto-reset wastes
    reward: jax.Array  # f32[T,B]
    terminated: jax.Array  # bool[T,B]
    behaviour: Behaviour
    last_value: jax.Array  # f32[1,B], V(obs[T]) of the acting parameters, as all values of a rollout are


def make_policy(network):
    """act: (params, obs u8[B,...], key, t) -> Behaviour; last: (params, obs, key) -> what a Rollout has of obs[T]."""

    @jax.jit
    def act(params, obs, key, t):
        logits, value = network.apply(params, obs)
        action = jax.random.categorical(jax.random.fold_in(key, t), logits)
        return Behaviour(action, log_prob(logits, action), value)

    def last(params, obs, key):
        return {"last_value": act(params, obs, key, 0).value[None]}  # `act` is compiled already

    return act, last


# === §5 Actor [shared] ================================================================================================
# What an actor hands to the learner: the version that played; the pieces of its rollout, each (shard, Rollout), on the
# shard's device; the games that ended, each (score, length); {name: seconds}, where the time went.
Delivery = namedtuple("Delivery", "version pieces games seconds")


@contextmanager
def timed(seconds, name):
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def collect(envs, policy, params, key, num_steps, seconds, stopped=None):
    """Play `num_steps` steps from where the last rollout ended; NumPy arrays. When `stopped` is set the thread ends."""
    act, last = policy
    obs = np.empty((num_steps + 1, *envs.obs.shape), envs.obs.dtype)  # new each time: device_put may alias it
    obs[0] = envs.obs
    is_reset_row = [envs.is_reset_row]
    steps = []
    for t in range(num_steps):
        if stopped and stopped.is_set():
            sys.exit()  # ends this thread alone
        with timed(seconds, "inference_time"):
            behaviour = jax.device_get(act(params, obs[t], key, t))
        with timed(seconds, "env_time"):
            reward, terminated = envs.step(behaviour.action)
        steps.append((reward, terminated, behaviour))
        obs[t + 1] = envs.obs
        is_reset_row.append(envs.is_reset_row)
    with timed(seconds, "inference_time"):
        rest = jax.device_get(last(params, obs[num_steps], key))
    reward, terminated, behaviour = jax.tree.map(lambda *rows: np.stack(rows), *steps)
    return Rollout(obs, np.stack(is_reset_row), reward, terminated, behaviour, **rest)


@contextmanager
def playing(args, sizes, devices, policy, handoff, key, updates):
    """While this lasts, every actor of this process plays the rollouts of `updates`, each in its own thread.

    An actor makes its environments anew after every checkpoint, so that a resumed actor meets the same games, and its
    keys depend on the update alone. So it can start at the first update, or after any checkpoint.
    """
    env_threads = args.env_threads or max(1, num_cores() // sizes.actors)

    def play(actor_id, device):
        first_env = actor_id * args.local_num_envs  # counted over all processes
        try:
            actor_key = jax.random.fold_in(jax.device_put(key, device), actor_id)  # away from the learner's programs
            for update in updates:
                generation, updates_since_checkpoint = divmod(update - 1, args.checkpoint_frequency or sys.maxsize)
                if updates_since_checkpoint == 0:  # as at a run's start, be it the first or a later one
                    handoff.envs[actor_id] = envs = None  # the previous pool goes first: two might not fit in memory
                    seeds = env_seeds(args.seed, generation, first_env, args.local_num_envs)
                    handoff.envs[actor_id] = envs = Envs(make_env(args, seeds, env_threads))
                envs.games = []
                seconds = Counter()
                with timed(seconds, "params_queue_get_time"):
                    version, params = handoff.take_params(actor_id)
                with timed(seconds, "rollout_time"):
                    rollout_key = jax.random.fold_in(actor_key, update)
                    rollout = collect(envs, policy, params, rollout_key, args.num_steps, seconds, handoff.stopped)
                with timed(seconds, "storage_time"):
                    pieces = jax.block_until_ready(ship(rollout, first_env, sizes.shard_envs, devices))
                handoff.rollouts[actor_id].put(Delivery(version, pieces, envs.games, seconds))
        except BaseException as error:
            handoff.rollouts[actor_id].put(error)

    threads = []
    for actor_id, device in devices.actors.items():
        thread = threading.Thread(target=play, args=(actor_id, device), name=f"actor {actor_id}", daemon=True)
        thread.start()
        threads.append(thread)
    try:
        yield
    finally:
        handoff.stop()
        for thread in threads:
            thread.join(2 / len(threads))  # it hangs if its device waits for a process that is gone


# === §6 Hand-off [shared] =============================================================================================
class HandOff:
    """Parameters one way, rollouts the other. The tokens that the learner gives bound both kinds of queue.

    The learner primes every actor with 1 + concurrency copies of version 0 and gives one more per update; an actor
    spends one per rollout. So the versions acting in updates 1, 2, 3, 4 are 0, 1, 2, 3, or 0, 0, 1, 2 with concurrency.
    """

    def __init__(self, actor_devices, concurrency, actor_timeout=np.inf, signals_received=()):
        self.devices = actor_devices
        self.concurrency = concurrency
        self.actor_timeout = actor_timeout  # seconds that making an actor's environments, or one step of them, may take
        self.signals_received = signals_received
        self.envs = dict.fromkeys(actor_devices)  # of each actor; None while they are made
        self.params = {actor_id: queue.SimpleQueue() for actor_id in actor_devices}
        self.rollouts = {actor_id: queue.SimpleQueue() for actor_id in actor_devices}
        self.stopped = threading.Event()

    def give_params(self, version, params):
        """Give every actor one token, with the parameters on its own device."""
        for actor_id, device in self.devices.items():
            self.params[actor_id].put((version, jax.device_put(params, device)))

    def take_params(self, actor_id):
        """Wait for the next token: (version, parameters ready on the actor's device)."""
        token = self.params[actor_id].get()
        if token is None:
            sys.exit()  # ends this thread alone
        version, params = token
        return version, jax.block_until_ready(params)

    def get_rollouts(self, update):
        """Wait for one delivery of every actor, by id, of the version due. Raises TimeoutError if environments hang."""
        deliveries = []
        for actor_id in self.rollouts:
            delivery = self.wait_for_delivery(actor_id)
            if isinstance(delivery, BaseException):
                raise RuntimeError(f"actor {actor_id} failed: {delivery!r}") from delivery
            deliveries.append(delivery)
        versions = {delivery.version for delivery in deliveries}
        if versions != {max(0, update - 1 - self.concurrency)}:
            raise RuntimeError(f"update {update} got rollouts of versions {sorted(versions)}")
        return deliveries

    def wait_for_delivery(self, actor_id):
        """Counts its own waits of a second, because a clock runs on while the process is frozen."""
        waited = Counter()
        while True:
            with suppress(queue.Empty):
                return self.rollouts[actor_id].get(timeout=1)
            envs = self.envs[actor_id]
            step = "making its environments"
            if envs:
                step = f"step {envs.steps_begun} of its environments" if envs.is_stepping else "waiting"
            waited[step] += 1
            if step == "waiting":
                continue
            if waited[step] > self.actor_timeout:
                raise TimeoutError(f"actor {actor_id}: {step} takes more than {self.actor_timeout} s")
            if waited[step] > 6 and self.signals_received:
                sys.exit(128 + signal.SIGTERM)  # whoever wants to end does not wait for environments that hang

    def stop(self):
        """Called by the learner: no actor waits or plays on."""
        self.stopped.set()
        for params in self.params.values():
            params.put(None)


# === §7 Loss ==========================================================================================================
# f32[T,B] each: the advantage; the target, that is the return that the value is fitted to; the weight, 0 in reset rows
# and else 1. In reset rows all three are 0.
Estimate = namedtuple("Estimate", "advantage target weight")
# M rows of one shard: obs [M,...]; Behaviour; f32[M] each: the advantage, normalised; the target; the weight, which is
# the row's share of the global minibatch, so that all shards' weights sum to 1, and alone masks reset rows.
Minibatch = namedtuple("Minibatch", "obs behaviour advantage target weight")


def log_prob(logits, action):
    """log pi(action), f32[...,A], i32[...] -> f32[...]."""
    chosen = action[..., None] == jnp.arange(logits.shape[-1])  # no gather: its gradient would be a scatter
    return jnp.sum(jnp.where(chosen, jax.nn.log_softmax(logits), 0.0), axis=-1)


def compute_gae(rollout, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), which knows terminations from time limits.

    The value of the next observation is dropped where an episode terminated; the trace is cut where it ended for any
    reason. At a time limit obs[t + 1] is the episode's last observation, so its value bootstraps exactly.
    """
    value = jnp.concatenate([rollout.behaviour.value, rollout.last_value])
    next_value = jnp.where(rollout.terminated, 0.0, value[1:])
    delta = rollout.reward + gamma * next_value - value[:-1]
    trace = jnp.where(rollout.is_reset_row[1:], 0.0, gamma * gae_lambda)

    def add_row(next_advantage, row):
        delta, trace = row
        advantage = delta + trace * next_advantage
        return advantage, advantage  # to carry, and to keep

    _, advantage = jax.lax.scan(add_row, jnp.zeros_like(delta[0]), (delta, trace), reverse=True)
    is_reset_row = rollout.is_reset_row[:-1]
    target = jnp.where(is_reset_row, 0.0, advantage + value[:-1])
    weight = jnp.where(is_reset_row, 0.0, 1.0)
    return Estimate(jnp.where(is_reset_row, 0.0, advantage), target, weight)


def ppo_loss(params, apply, minibatch, args):
    """PPO's clipped objective (Schulman et al. 2017, eq. 7 and 9): these rows' part of a mean over the minibatch.

    apply: (params, obs) -> (logits f32[M,A], value f32[M]). Returns (loss f32[], metrics). Metrics are added up over
    all shards with the gradient, and `summarise` takes the mean over minibatches: each must be a `mean(...)`. (For a
    maximum see rho_max in the IMPALA script.) One that is not finite ends the run.
    """
    mean = lambda x: jnp.sum(minibatch.weight * x)
    logits, value = apply(params, minibatch.obs)
    log_ratio = log_prob(logits, minibatch.behaviour.action) - minibatch.behaviour.logprob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    advantage = minibatch.advantage
    policy_loss = mean(jnp.maximum(-advantage * ratio, -advantage * clipped))
    value_loss = mean(0.5 * jnp.square(value - minibatch.target))
    entropies = -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=1)
    entropy = mean(entropies)
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy

    error = minibatch.target - minibatch.behaviour.value
    metrics = {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    metrics["approx_kl"] = mean(ratio - 1 - log_ratio)  # Schulman's estimate, joschu.net/blog/kl-approx
    metrics["clipfrac"] = mean(jnp.abs(ratio - 1) > args.clip_coef)
    # four moments, of which `summarise` makes explained_variance
    metrics["target"] = mean(minibatch.target)
    metrics["target_square"] = mean(jnp.square(minibatch.target))
    metrics["error"] = mean(error)
    metrics["error_square"] = mean(jnp.square(error))
    return loss, metrics


def summarise(metrics):
    """Means over the minibatches of an update, and explained_variance, which is made of them."""

    def mean(*values):
        return float(np.mean(values, dtype=np.float64))

    summary = jax.tree.map(mean, *metrics)
    error_variance = summary.pop("error_square") - summary.pop("error") ** 2
    target_variance = summary.pop("target_square") - summary.pop("target") ** 2
    summary["explained_variance"] = 1 - error_variance / target_variance if target_variance > 0 else 0.0
    return summary


# === §8 Learner =======================================================================================================
def make_optimizer(args, sizes):
    """The optimizer, and the learning rate of update u (from 1): constant in an update, linear to 0 over the run."""

    def learning_rate(update):
        if not args.anneal_lr:
            return args.learning_rate
        return args.learning_rate * (1 - (update - 1) / sizes.updates)

    def schedule(step):
        return learning_rate(1 + step // (args.update_epochs * args.num_minibatches))

    adam = optax.adam(schedule, eps=1e-5)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam), learning_rate


def shuffled(args, shard_envs):
    """What a shard's minibatches are drawn from: the number and the unit."""
    return args.num_steps * shard_envs, "rows (steps x environments)"


def take_rows(tree, rows):
    """The rows of [time, env, ...] arrays, numbered step by step."""
    return jax.tree.map(lambda x: x[rows // x.shape[1], rows % x.shape[1]], tree)


def shuffle(args, shard_envs, key, epoch, shard):
    """Row numbers of a shard in the order of an epoch, i32[minibatches, pieces, M]."""
    key = jax.random.fold_in(jax.random.fold_in(key, epoch), shard)
    rows = jax.random.permutation(key, args.num_steps * shard_envs)
    return rows.reshape(args.num_minibatches, args.gradient_accumulation_steps, -1)


@jax.jit
def minibatch_sums(estimate, rows):
    """This shard's part of the weight and of the advantage of each minibatch, f32[minibatches] each."""
    taken = take_rows(estimate, rows)
    return {"weight": taken.weight.sum((1, 2)), "advantage": (taken.weight * taken.advantage).sum((1, 2))}


@jax.jit
def minibatch_squares(estimate, rows, sums):
    """This shard's part of the squared deviations from the global mean of each minibatch, f32[minibatches]."""
    taken = take_rows(estimate, rows)
    mean = sums["advantage"] / jnp.maximum(sums["weight"], 1.0)
    deviation = taken.advantage - mean[:, None, None]
    return (taken.weight * jnp.square(deviation)).sum((1, 2))


# What the gradients of one shard are computed from in an epoch: its Rollout, its Estimate, the order of its rows,
# i32[minibatches, pieces, M], and the sums and squares of the advantages of every global minibatch.
ShardData = namedtuple("ShardData", "rollout estimate order sums squares")


def piece_gradient(network, args, params, data, minibatch, piece):
    """Gradient and metrics of one piece of a shard's part of a minibatch, to be added to all the others.

    minibatch, piece: their numbers.
    """
    rollout, estimate, order, sums, squares = data
    taken, obs, behaviour = take_rows((estimate, rollout.obs, rollout.behaviour), order[minibatch, piece])
    total_weight = jnp.maximum(sums["weight"][minibatch], 1.0)
    advantage = taken.advantage
    if args.norm_adv:
        mean = sums["advantage"][minibatch] / total_weight
        deviation = jnp.sqrt(squares[minibatch] / total_weight)
        advantage = (advantage - mean) / (deviation + 1e-8)
    rows = Minibatch(obs, behaviour, advantage, taken.target, taken.weight / total_weight)
    return jax.grad(ppo_loss, has_aux=True)(params, network.apply, rows, args)


def make_update(args, network, devices, sizes):
    """The learner: (states, rollouts, key) -> (states, metrics of every minibatch).

    states: one TrainState, the same on every local learner device; rollouts: one of every local shard, on its device.
    A Python loop, because in `lax.scan` a convolution's gradient is ten times slower on a CPU. Gradients are programs
    for one device and of fixed shape, added up as one fixed tree, so the bits do not depend on the topology.
    """
    shards = devices.shards
    estimate_advantages = jax.jit(partial(compute_gae, gamma=args.gamma, gae_lambda=args.gae_lambda))
    shuffle_rows = jax.jit(partial(shuffle, args, sizes.shard_envs))
    gradient_of_piece = jax.jit(partial(piece_gradient, network, args))
    sum_over_shards = make_sum_over_shards(devices)  # [part of each local shard] -> [sum, on each local learner device]

    @jax.jit
    def apply_gradient(state, gradient):
        return state.apply_gradients(grads=gradient), optax.tree.norm(gradient)

    def shard_gradient(params, data, minibatch):
        """Gradient and metrics of one shard's part of a minibatch, its pieces added up one after the other."""
        pieces = range(args.gradient_accumulation_steps)
        return reduce(add_trees, (gradient_of_piece(params, data, minibatch, piece) for piece in pieces))

    def shuffle_shards(rollouts, estimates, keys, epoch):
        """For every shard, on its device: the order of an epoch, and the statistics of its global minibatches."""
        orders = [shuffle_rows(keys[shard.learner], epoch, shard.number) for shard in shards]
        totals = sum_over_shards([*map(minibatch_sums, estimates, orders)])
        sums = [totals[shard.learner] for shard in shards]
        totals = sum_over_shards([*map(minibatch_squares, estimates, orders, sums)])
        squares = [totals[shard.learner] for shard in shards]
        return [*map(ShardData, rollouts, estimates, orders, sums, squares)]

    def update(states, rollouts, key):
        keys = [jax.device_put(key, device) for device in devices.learners]
        estimates = [estimate_advantages(rollout) for rollout in rollouts]
        metrics = []
        for epoch in range(args.update_epochs):
            shard_data = shuffle_shards(rollouts, estimates, keys, epoch)
            for minibatch in range(args.num_minibatches):
                parts = []
                for shard, data in zip(shards, shard_data):
                    parts.append(shard_gradient(states[shard.learner].params, data, minibatch))
                totals = sum_over_shards(parts)
                previous_states = states
                states = []
                for state, (gradient, _) in zip(previous_states, totals):
                    state, norm = apply_gradient(state, gradient)
                    states.append(state)
                _, minibatch_metrics = totals[-1]  # of the last learner, as the norm: all have the same bits
                metrics.append(minibatch_metrics | {"grad_norm": norm})
                # Queue one step ahead and no more, so that an actor on the same device gets its turn.
                jax.block_until_ready(previous_states)
        return states, metrics

    return update


# === §9 Train [shared] ================================================================================================
def train(args, signals_received=()):
    """A run, or this process's part of it. `signals_received`: so far. Returns summary.json; raises FlagError."""
    args = with_tuples(args)
    sizes, devices, record = set_up(args, signals_received)
    # Process 0 alone keeps and shows something.
    with in_all_processes(NoReport if global_state.process_id else Report, args, sizes, record) as report:
        actor_key, learner_key, params_key = jax.random.split(jax.random.key(args.seed), 3)
        network = make_network(args)
        optimizer, learning_rate = make_optimizer(args, sizes)
        done, state, previous_params = start_or_restore(args, network, optimizer, params_key, report.checkpoint)
        in_all_processes(report.begin)

        states = [jax.device_put(state, device) for device in devices.learners]
        learn = make_update(args, network, devices, sizes)
        updates = range(done + 1, sizes.updates + 1)
        status = "finished"

        handoff = HandOff(devices.actors, args.concurrency, args.actor_timeout, signals_received)
        with playing(args, sizes, devices, make_policy(network), handoff, actor_key, updates):
            if args.concurrency:
                handoff.give_params(max(0, done - 1), previous_params)
            handoff.give_params(done, state.params)

            for update in updates:
                stats = Counter()
                with timed(stats, "rollout_queue_get_time"):
                    deliveries = handoff.get_rollouts(update)
                if update == updates[0]:
                    check_same_params(state.params, "at the start")  # all are here now, as Gloo wants it
                    print("the first rollouts are here; compiling what learns from them")

                with timed(stats, "training_time"):
                    previous_params = state.params
                    update_key = jax.random.fold_in(learner_key, update)
                    states, metrics = learn(states, assemble(deliveries), update_key)
                    state = states[0]
                    jax.block_until_ready((states, metrics))
                handoff.give_params(update, state.params)

                actors = [(delivery.games, delivery.seconds) for delivery in deliveries]
                messages = share([signal.SIGTERM in signals_received, actors])
                checkpoint_due = update == sizes.updates or update % (args.checkpoint_frequency or sizes.updates) == 0
                stats["policy_lag"] = update - 1 - deliveries[0].version
                report.update(messages, checkpoint_due, learning_rate(update), stats, metrics, state.params)
                if checkpoint_due:
                    check_same_params(state.params, f"after update {update}")
                    report.save(update, (state, previous_params))

                if signal.SIGINT in signals_received:  # its exception was lost in a callback of the garbage collector
                    raise KeyboardInterrupt
                if any(wants_to_end for wants_to_end, _ in messages):
                    status = "preempted"
                    break

        report.end(status, network, state.params, signals_received)
    share("closed")  # else the others wait in JAX's own barrier, whose timeout is shorter
    return report.summary


# === The stairs: above, what is learned; below, where it runs, what is kept, what is shown ============================
# === §10 The reproducible sum [shared] ================================================================================
add_trees = jax.jit(partial(jax.tree.map, jnp.add))


def tree_sum(parts, while_even=False):
    """[sum] by a balanced binary tree: neighbours are added, level by level, and an odd last one moves up as it is.

    while_even: stop where a level is odd, because its last part may have its neighbour on another device.
    """
    while len(parts) > 1 and not (while_even and len(parts) % 2):
        sums = [*map(add_trees, parts[::2], parts[1::2])]
        parts = sums + parts[2 * len(sums) :]
    return parts


def make_sum_over_shards(devices):
    """The sum over all shards: takes what each local shard adds (a tree), returns the sum on each local learner device.

    One binary tree over the shard index adds up, the same for any number of devices, so the bits are the same too. A
    device first adds up the subtrees that are all its own. Then an all-to-all gives device d the d-th slices, which it
    adds up, and an all-gather brings the sums back: each of n devices sends 2 (n - 1) / n vectors, as in a ring
    all-reduce.
    """
    num_devices = devices.mesh.size
    if num_devices == 1:
        add_all = jax.jit(lambda *parts: tree_sum(list(parts))[0])
        return lambda parts: [add_all(*parts)]

    rows_sharded = NamedSharding(devices.mesh, PartitionSpec("learner"))
    columns_sharded = NamedSharding(devices.mesh, PartitionSpec(None, "learner"))
    replicated = NamedSharding(devices.mesh, PartitionSpec())

    @jax.jit
    def add_own(*parts):  # -> f32[vectors, size], padded to a multiple of the number of devices
        vectors = [ravel_pytree(part)[0] for part in tree_sum(list(parts), while_even=True)]
        rows = jnp.stack(vectors)
        return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % num_devices)))

    @partial(jax.jit, out_shardings=replicated)
    def add_across(rows):
        slices = jax.lax.with_sharding_constraint(rows, columns_sharded)
        total = tree_sum(list(slices))[0]
        return jax.lax.with_sharding_constraint(total, rows_sharded)

    @jax.jit
    def unravel(vector, like):
        flat, to_tree = ravel_pytree(like)
        return to_tree(vector[: flat.size])

    def sum_over_shards(parts):
        shards_each = len(parts) // len(devices.learners)
        own_sums = [add_own(*parts[i : i + shards_each]) for i in range(0, len(parts), shards_each)]
        if devices.learners[0].platform == "cpu":  # with 32 programs under way XLA blocks: a deadlock at a collective
            jax.block_until_ready(own_sums)
        vectors, size = own_sums[0].shape
        rows = jax.make_array_from_single_device_arrays((num_devices * vectors, size), rows_sharded, own_sums)
        totals = {shard.device: shard.data for shard in add_across(rows).addressable_shards}
        return [unravel(totals[device], like) for device, like in zip(devices.learners, parts[::shards_each])]

    return sum_over_shards


def ship(rollout, first_env, shard_envs, devices):
    """Cut a rollout at the borders of shards: [(index into devices.shards, piece on the device of that shard)]."""
    shard_of_env = (first_env + np.arange(rollout.reward.shape[1])) // shard_envs - devices.shards[0].number
    pieces = []
    for shard in np.unique(shard_of_env).tolist():
        start, end = np.searchsorted(shard_of_env, (shard, shard + 1))
        piece = jax.tree.map(lambda x, envs=slice(start, end): x[:, envs], rollout)
        pieces.append((shard, jax.device_put(piece, devices.learners[devices.shards[shard].learner])))
    return pieces


def assemble(deliveries):
    """The rollout of every shard of this process, put together from the pieces that the actors shipped."""
    pieces_of_shard = defaultdict(list)
    for delivery in deliveries:
        for shard, piece in delivery.pieces:
            pieces_of_shard[shard].append(piece)
    concatenate = partial(jax.tree.map, lambda *leaves: jnp.concatenate(leaves, axis=1))
    return [concatenate(*pieces) for _, pieces in sorted(pieces_of_shard.items())]


# === §11 Flags, processes, devices [shared] ===========================================================================
PACKAGES = "jax jaxlib flax optax envpool numpy".split()
VERSIONS = {name: package_version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
# what else may change bits: environment variables, and JAX's own settings
ENVIRONMENT = "XLA_FLAGS LIBTPU_INIT_ARGS NVIDIA_TF32_OVERRIDE".split()
JAX_SETTINGS = """
    jax_enable_x64 jax_default_matmul_precision jax_numpy_dtype_promotion jax_allow_f16_reductions jax_disable_jit
    jax_default_prng_impl jax_threefry_partitionable jax_threefry_gpu_kernel_lowering jax_random_seed_offset
    jax_high_dynamic_range_gumbel jax_use_direct_linearize jax_softmax_custom_jvp jax_compiler_enable_remat_pass
    jax_disable_most_optimizations jax_optimization_level jax_memory_fitting_level jax_enable_pgle
""".split()
# flags that may change on resume and, except load_model, between processes: where a run is, what is kept and shown
FREE_FLAGS = """
    coordinator_address num_processes process_id distributed peer_timeout actor_timeout
    num_actor_threads env_threads actor_device_ids learner_device_ids
    exp_name track wandb_project_name wandb_entity log_frequency
    keep_checkpoints resume start_fresh load_model save_model eval_episodes
""".split()


# What the flags amount to: actors of this process, steps of an update (T * B over all processes), environments of a
# shard, updates of the run.
Sizes = namedtuple("Sizes", "actors steps shard_envs updates")
# A shard: its number within the whole run, which seeds its shuffle, and which of this process's learners has it.
Shard = namedtuple("Shard", "number learner")
# Which device does what: {actor_id: device} and learner devices of this process, the mesh of all learner devices, and
# this process's shards, a list of Shard.
Devices = namedtuple("Devices", "actors learners mesh shards")


class FlagError(ValueError):
    """A flag whose value cannot work; the message names the flag, its value, the rule and a value that works."""


def flag_error(flag, value, rule, example):
    def show(value):
        return " ".join(map(str, np.ravel(value))) or "(empty)"  # a tuple as it is typed

    if flag in Args.__dataclass_fields__:
        flag = f"--{flag.replace('_', '-')}"
    return FlagError(f"{flag} {show(value)}: {rule}. For example: {flag} {show(example)}")


def require(condition, args, flag, rule, example):
    """Raise FlagError about `flag` unless `condition`."""
    if not condition:
        raise flag_error(flag, getattr(args, flag), rule, example)


def with_tuples(args):
    """Lists, as a notebook or a JSON file has them, become the tuples that flags are."""
    return replace(args, **{flag: tuple(value) for flag, value in vars(args).items() if isinstance(value, list)})


def check_args(args, num_processes=1):
    """Check the flags against their rules and each other, before anything is built. Raises FlagError."""
    for flag, kind in get_type_hints(Args, include_extras=True).items():
        value = getattr(args, flag)
        default = getattr(Args, flag)
        kind_of_default = (float, int) if isinstance(default, float) else type(default)
        rule = f"must be of the type {type(default).__name__}"
        require(default is None or isinstance(value, kind_of_default), args, flag, rule, default)
        if hasattr(kind, "__metadata__"):
            rule, is_met = kind.__metadata__
            require(is_met(value), args, flag, rule, default)
    rule = "needs the package wandb: pip install wandb, or uv run --with wandb"
    require(not args.track or find_spec("wandb"), args, "track", rule, False)

    actors = args.num_actor_threads * len(args.actor_device_ids)
    envs = actors * args.local_num_envs * num_processes
    learners = len(args.learner_device_ids) * num_processes
    unit = learners * args.num_minibatches
    example = f"{learners} --local-num-envs {max(unit, args.local_num_envs // unit * unit)}"
    rule = f"must divide the {envs} environments of a batch and be a multiple of the learner devices ({learners})"
    require(args.num_shards % learners == 0 and envs % args.num_shards == 0, args, "num_shards", rule, example)
    shard_envs = envs // args.num_shards
    number, units = shuffled(args, shard_envs)
    part = divide(number, args, "num_minibatches", f"{units} of a shard")
    divide(part, args, "gradient_accumulation_steps", f"{units} that a shard gives to a minibatch")
    steps = envs * args.num_steps
    require(args.total_timesteps >= steps, args, "total_timesteps", f"an update takes {steps} steps", steps)
    env_spec(args)
    return Sizes(actors, steps, shard_envs, args.total_timesteps // steps)


def divide(number, args, flag, what):
    """`number` divided by the flag's value. Raises FlagError, with a smaller divisor, if that leaves a rest."""
    value = getattr(args, flag)
    require(number % value == 0, args, flag, f"must divide the {number} {what}", np.gcd(number, value))
    return number // value


def join(args, signals_received):
    """Become one of the processes of a run, if the flags speak of any. Raises FlagError."""
    address = args.coordinator_address
    place = (address, args.num_processes, args.process_id)
    if not args.distributed and set(place) == {None}:
        return
    example = "10.0.0.1:9876 --num-processes 2 --process-id 0"
    is_address = address is None or re.fullmatch(r"\S+:\d{1,5}", address)
    require(is_address, args, "coordinator_address", "must be HOST:PORT", example)
    if address and not args.process_id:
        try:
            socket.create_server(("", int(address.rpartition(":")[2]))).close()
        except (OSError, OverflowError) as error:
            rule = f"each run needs a port of its own, and this one cannot be used ({error})"
            raise flag_error("coordinator_address", address, rule, example) from None

    others = f"{args.num_processes or 'the other'} processes to meet at {address or 'the address of the cluster'}"
    print(f"waiting at most {args.peer_timeout} s for {others}")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the run's own

    def connect(*place, **bind):
        connecting = ThreadPoolExecutor(1).submit(  # so that this thread hears signals
            jax.distributed.initialize,
            *place,
            local_device_ids=sorted({*args.actor_device_ids, *args.learner_device_ids}),  # of GPUs it sees no others
            initialization_timeout=args.peer_timeout,
            heartbeat_timeout_seconds=args.peer_timeout,
            shutdown_timeout_seconds=10,
            **bind,
        )
        while True:
            with suppress(TimeoutError):
                return connecting.result(timeout=0.5)
            if signals_received:
                sys.exit(128 + signal.SIGTERM)

    try:
        connect(*place)
    except (ValueError, IndexError) as error:
        rule = f"no cluster says where the processes are, so all three flags are needed ({error})"
        raise flag_error("coordinator_address", address, rule, example) from None
    # The run moves to a port that no other run knows: a stranger that came to the first one would end it.
    host, _, _ = global_state.coordinator_address.rpartition(":")
    with socket.create_server(("", 0)) as free:
        port = share(free.getsockname()[1])[0]
    place = (f"{host}:{port}", global_state.num_processes, global_state.process_id)
    jax.distributed.shutdown()
    connect(*place, coordinator_bind_address=f"[::]:{port}")


share_rounds = count(1)


def share(value):
    """Everyone's `value` (JSON), by process. Every process must call this at the same point of the run."""
    client = global_state.client
    if global_state.num_processes == 1:
        return [value]
    number = next(share_rounds)

    def get(process):
        while True:  # in short waits: between them Python hears Ctrl-C
            try:
                return json.loads(client.blocking_key_value_get(f"cleanba/{number}/{process}", 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    if not global_state.process_id:  # collects, so that n processes make 3 n calls
        value = [value, *map(get, range(1, global_state.num_processes))]
        client.key_value_delete(f"cleanba/{number - 1}")  # who came to this round has read the one before
    client.key_value_set(f"cleanba/{number}/{global_state.process_id}", json.dumps(value))
    return get(0)


def in_all_processes(action, *arguments):
    """What `action` returns. A FlagError of one process is raised in all, so that all end with its message."""
    result = message = None
    try:
        result = action(*arguments)
    except FlagError as error:
        message = str(error)
    for error in filter(None, share(message)):
        raise FlagError(error)
    return result


def check_same_params(params, moment):
    """Raise RuntimeError if the processes have different parameters."""
    hashes = share(params_sha256(params))
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the processes have different parameters {moment}: {hashes}")


def set_up(args, signals_received=()):
    """Meet the other processes, check the flags, say which device does what. Raises FlagError."""
    join(args, signals_received)
    processes = global_state.num_processes
    sizes = in_all_processes(check_args, args, processes)
    by_id = in_all_processes(local_devices, args)
    learners = [by_id[i] for i in args.learner_device_ids]
    actor_devices = [by_id[i] for i in args.actor_device_ids for _ in range(args.num_actor_threads)]

    hyper_parameters = {flag: value for flag, value in vars(args).items() if flag not in FREE_FLAGS}
    platform = describe_platform(jax.local_devices())
    given = hyper_parameters | {
        "load_model": args.load_model,
        "actors of a process": sizes.actors,
        "learner devices of a process": len(learners),
    }
    everyone = share([given | platform, [device.id for device in learners]])
    check_all_given_the_same([theirs for theirs, _ in everyone])

    global_device = {device.id: device for device in jax.devices()}
    all_learners = [global_device[i] for _, ids in everyone for i in ids]
    mesh = Mesh(np.array(all_learners), ("learner",))
    shards_each = args.num_shards // mesh.size
    own_shards = len(learners) * shards_each
    first_shard = global_state.process_id * own_shards
    shards = [Shard(first_shard + i, i // shards_each) for i in range(own_shards)]
    actors = dict(enumerate(actor_devices, start=global_state.process_id * sizes.actors))

    names = {"actors": [*map(str, dict.fromkeys(actor_devices))], "learners": [*map(str, all_learners)]}
    print(f"devices: actors on {', '.join(names['actors'])}, learners on {', '.join(names['learners'])}")
    record = {
        "args": vars(args),
        "hyper_parameters": hyper_parameters | {"actors": sizes.actors * processes},
        "platform": platform,
        "processes": processes,
        "devices": names,
    }
    return sizes, Devices(actors, learners, mesh, shards), json.loads(json.dumps(record))


def check_all_given_the_same(given):
    """Raise FlagError if a process was given something else than process 0."""
    for process, theirs in enumerate(given):
        for name, value in given[0].items():
            if theirs[name] != value:
                rule = f"process {process} differs from process 0, which has {value}"
                raise flag_error(name, theirs[name], rule, value)


def local_devices(args):
    """This process's devices, by the number that the flags use. Raises FlagError if they name another."""
    num_threads()
    platforms = jax.config.jax_platforms or "cpu"
    try:
        devices = jax.local_devices()
        if devices[0].platform == "cpu" and not platforms.startswith("cpu"):
            raise RuntimeError(f"the devices here are {devices}")
    except (AssertionError, RuntimeError) as error:
        if platforms.startswith("cpu"):
            raise
        rule = f"a GPU was asked for, but {str(error) or 'JAX has none'}"
        raise flag_error("JAX_PLATFORMS", platforms, rule, "cpu") from None
    by_id = {device.local_hardware_id: device for device in devices}
    for flag in ("actor_device_ids", "learner_device_ids"):
        require(by_id.keys() >= {*getattr(args, flag)}, args, flag, f"the devices here are {list(by_id)}", min(by_id))
    return by_id


def num_cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def num_threads():
    """Threads of XLA's pool on a CPU: NPROC, or as many as there are cores. Raises FlagError."""
    threads = os.environ.get("NPROC", str(num_cores()))
    if not re.fullmatch("0*[1-9][0-9]*", threads):
        raise flag_error("NPROC", threads, "must be a whole number, 1 or more", num_cores())
    return int(threads)


def describe_platform(devices):
    """What the bits depend on besides the flags, as far as it is known."""
    described = {"script": Path(__file__).stem, "device": devices[0].device_kind} | VERSIONS
    for name in ENVIRONMENT:
        described[name] = os.environ.get(name, "")
    for name in JAX_SETTINGS:
        described[name] = str(jax.config.values.get(name))
    if devices[0].platform == "cpu":
        described["threads of XLA (NPROC)"] = max(num_threads(), len(devices))
        described |= describe_processor()
    return described


def describe_processor():
    """Model and vector instructions, for which XLA compiles."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {"processor": os.uname().machine}
    first_core = cpuinfo.read_text().split("\n\n")[0]
    model = re.findall(r"^(?:model name|cpu family|model|CPU \w+)\s*: (.*)$", first_core, re.MULTILINE)
    vector = re.findall(r"\b(?:sse4|avx|fma|amx|f16c|asimd|sve|bf16|i8mm)\w*", first_core)
    return {"processor": ", ".join(model), "instruction set": " ".join(vector)}


# === §12 Run directory, checkpoints [shared] ==========================================================================
def params_sha256(params):
    """SHA-256 over the bytes of the leaves in tree order: equal hashes mean equal bits."""
    leaves = jax.tree.leaves(jax.device_get(params))
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def pack(content):
    """Arrays, strings and numbers as Flax's msgpack, after 32 bytes of SHA-256."""
    data = serialization.msgpack_serialize(serialization.to_state_dict(jax.device_get(content)))
    return hashlib.sha256(data).digest() + data


def unpack(data):
    """What `pack` has packed. Raises ValueError if a bit of it has changed."""
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise ValueError("its bits are not those that were written")
    return serialization.msgpack_restore(data[32:])


def write_file(path, data):
    """Write a file whole or not at all, even on a full disk."""
    with open(path.with_name("unfinished"), "wb") as file:  # one name: what a killed process left is written over
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def find_checkpoints(run):
    """Checkpoints by update; files with other names are the user's own."""
    paths = [path for path in (run / "checkpoints").glob("*.msgpack") if path.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem))


def read_newest_checkpoint(run):
    """The newest checkpoint that is whole, still packed; nothing if there is none."""
    for path in reversed(find_checkpoints(run)):
        data = path.read_bytes()
        try:
            unpack(data)
            return data
        except ValueError as error:
            print(f"the checkpoint {path} cannot be read, trying an older one: {error}")
    return b""


def run_directory(args):
    """A new one below runs, or that of --resume: a directory that exists, else a name below runs."""
    if not args.resume:
        moment = time.strftime("%Y%m%d-%H%M%S")  # not unique: containers may start in the same second
        return Path("runs", f"{args.env_id}__{args.exp_name}__{args.seed}__{moment}-{secrets.token_hex(3)}")
    if os.sep in args.resume or Path(args.resume).is_dir():
        return Path(args.resume)
    return Path("runs", args.resume)


def check_resume(before, now, updates):
    """Compare the record of the run to resume, which has done `updates`, with that of now.

    Raises FlagError for flags that decide the bits.
    """
    for name, value in before["platform"].items():
        if now["platform"].get(name) != value:
            print(f"{name}: {now['platform'].get(name)} now and {value} before, the bits may differ")
    for flag, value in before["hyper_parameters"].items():
        value_now = now["hyper_parameters"].get(flag)
        rule = f"the run to resume has {value}"
        if flag == "total_timesteps" and value_now > value:
            rule = why_not_longer(now["args"], updates)
        if value_now != value and rule:
            raise flag_error(flag, value_now, rule, value)


def why_not_longer(args, updates):
    """Why a run that has done `updates` is not the beginning of a longer one; nothing if it is."""
    if args.get("anneal_lr", True):  # a fork may have a schedule of its own
        return "a longer run has other learning rates (--anneal-lr); start another with --load-model CHECKPOINT"
    if updates % (args["checkpoint_frequency"] or sys.maxsize):
        return f"a longer run has no checkpoint at update {updates}; start another with --load-model CHECKPOINT"
    return ""


def lock_run(args, run):
    """Make the directory of a run and hold a lock on it. Raises FlagError."""
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(run / "checkpoints" / "lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when its process is gone
    except BlockingIOError:
        rule = "another process has this run: end it first"
        raise flag_error("resume", args.resume, rule, f"{args.resume}-2 --start-fresh") from None
    except OSError as error:
        if error.filename is not None:  # else only the file system has no locks
            raise flag_error("the directory", run, f"cannot be written: {error}", "--resume /tmp/run") from None
    return lock


def start_or_restore(args, network, optimizer, key, checkpoint):
    """(updates done, state, parameters of the version before), from process 0's checkpoint if it has one.

    With --concurrency two versions are in flight, so a checkpoint holds both. Raises FlagError.
    """
    init = jax.jit(network.init, compiler_options={"xla_backend_optimization_level": 0})  # runs once: compile quickly
    params = init(key, np.zeros((1, *env_spec(args)[0])))
    size = share(len(checkpoint))[0]
    if args.load_model and size == 0:
        params = in_all_processes(load_params, args, params)
    state = jax.jit(partial(TrainState.create, apply_fn=network.apply, tx=optimizer))(params=params)
    if size == 0:
        return 0, state, params
    data = np.frombuffer(checkpoint or bytes(size), np.uint8)
    content = unpack(bytes(multihost_utils.broadcast_one_to_all(data)))
    example = f"{args.resume}-2 --start-fresh"
    return content["update"], *match_structure(args, "resume", content["state"], (state, params), example)


def match_structure(args, flag, saved, tree, example):
    """What a file has `saved`, in the structure of `tree`. Raises FlagError if it has another one."""
    shapes = jax.tree.map(np.shape, serialization.to_state_dict(tree))
    require(jax.tree.map(np.shape, saved) == shapes, args, flag, "it has another network or optimizer", example)
    return serialization.from_state_dict(tree, saved)


def load_params(args, params):
    """The parameters of --load-model in the structure of `params`. Raises FlagError."""
    example = "runs/RUN/model.msgpack"
    try:
        content = unpack(Path(args.load_model).read_bytes())
        saved = content.get("params") or content["state"]["0"]["params"]
    except (OSError, ValueError, KeyError) as error:
        raise flag_error("load_model", args.load_model, f"cannot be read: {error}", example) from None
    return match_structure(args, "load_model", saved, params, example)


# === §13 Report [shared] ==============================================================================================
# counters of a run over all its starts, which a checkpoint has too
RUN_COUNTERS = "updates episodes scores seconds_before resumed_at wandb_id".split()


class Report(AbstractContextManager):
    """What process 0 keeps and shows of a run. Once begun it ends with summary.json, whatever is raised within it."""

    updates = episodes = seconds_before = 0  # seconds_before: this start
    newest_checkpoint = 0  # its update
    writing = None  # of a checkpoint
    first_update = None  # (time, step) when this start's first one ended
    params = evaluation = writer = wandb = wandb_id = None

    def __init__(self, args, sizes, record):
        """Find the run, and what it has come to. Raises FlagError."""
        self.args = args
        self.sizes = sizes
        self.record = record
        self.run = run_directory(args)
        self.checkpoint = read_newest_checkpoint(self.run)
        self.games = []  # (score, length) of those that ended since the last log
        self.scores = []  # of the last 100 games
        self.resumed_at = []  # updates
        if self.checkpoint:
            content = unpack(self.checkpoint)
            vars(self).update(json.loads(content["counters"]))
            check_resume(json.loads(content["record"]), record, self.updates)
            self.newest_checkpoint = self.updates
            self.resumed_at.append(self.updates)
        can_start = self.checkpoint or not args.resume or args.start_fresh
        require(can_start, args, "resume", f"no checkpoint in {self.run} can be read", f"{args.resume} --start-fresh")
        self.started_at = time.perf_counter()

    @property
    def step(self):
        return self.updates * self.sizes.steps

    @property
    def seconds(self):
        """Of the run to its last update, over all its starts."""
        return self.seconds_before + self.last_update_at - self.started_at

    def counters(self):
        return {name: getattr(self, name) for name in RUN_COUNTERS}

    def begin(self):
        """Lock the run and open its logs. Raises FlagError, and leaves nothing behind."""
        if self.args.track:
            self.wandb = start_wandb(self.args, self.run.absolute().name, self.wandb_id)
            self.wandb_id = self.wandb.id
        self.lock = lock_run(self.args, self.run)
        self.last_update_at = time.perf_counter()
        self.writer = event_file_writer.EventFileWriter(str(self.run))
        # What was logged after the checkpoint will be logged again: TensorBoard forgets the first.
        self.add_event(self.step + 1, session_log=SessionLog(status=SessionLog.START))
        write_file(self.run / "run.json", json.dumps(self.record, indent=2).encode())
        print(
            f"{self.updates} of {self.sizes.updates} updates of {self.sizes.steps} steps are done; making environments"
        )

    def add_event(self, step, **content):
        self.writer.add_event(Event(wall_time=time.time(), step=step, **content))

    def write(self, group, scalars):
        values = [{"tag": f"{group}/{name}", "simple_value": value} for name, value in scalars.items()]
        self.add_event(self.step, summary={"value": values})

    def save(self, update, tree):
        """Begin to write a checkpoint; all that is logged so far is then on disk too."""
        self.wait_for_checkpoint()
        self.writer.flush()
        content = {
            "update": update,
            "record": json.dumps(self.record),
            "counters": json.dumps(self.counters() | {"seconds_before": self.seconds}),
            "state": tree,
        }
        self.writing = ThreadPoolExecutor(1).submit(self.write_checkpoint, update, content)

    def write_checkpoint(self, update, content):
        write_file(self.run / "checkpoints" / f"{update}.msgpack", pack(content))
        self.newest_checkpoint = update
        # A checkpoint of a later update is damaged, or the run would have resumed it.
        older = [path for path in find_checkpoints(self.run) if int(path.stem) <= update]
        for path in older[: -self.args.keep_checkpoints]:
            path.unlink()

    def wait_for_checkpoint(self):
        """Raises OSError if it could not be written."""
        if self.writing:
            self.writing.result()  # Ctrl-C may interrupt this: forget it only afterwards
            self.writing = None

    def update(self, messages, checkpoint_due, learning_rate, stats, metrics, params):
        """Take in an update: `messages` of all processes, `stats` of the learner. Log it where that is due."""
        actors = [actor for _, actors_of_process in messages for actor in actors_of_process]
        for games, seconds in actors:
            self.games += games
            self.episodes += len(games)
            self.scores += [score for score, _ in games]
            stats.update({name: value / len(actors) for name, value in seconds.items()})
        self.scores = self.scores[-100:]
        self.updates += 1
        self.params = params
        now = time.perf_counter()
        sps_update = self.sizes.steps / (now - self.last_update_at)
        self.last_update_at = now
        self.first_update = self.first_update or (now, self.step)

        log_due = checkpoint_due or self.updates == 1 or self.updates % self.args.log_frequency == 0
        if log_due:
            charts = {"SPS": self.step / self.seconds, "SPS_update": sps_update, "learning_rate": learning_rate}
            self.write_log(charts, summarise(jax.device_get(metrics)), stats)
        self.show_progress(stats, log_due)

    def write_log(self, charts, losses, stats):
        """Raises FloatingPointError if a loss is not finite."""
        if self.games:
            charts["avg_episodic_return"], charts["avg_episodic_length"] = np.mean(self.games, axis=0)
        stats["episodes"] = len(self.games)
        self.games = []
        self.write("charts", charts)
        self.write("losses", losses)
        self.write("stats", stats)
        with open(self.run / "hashes.tsv", "a") as file:  # compared by benchmark/compare.py
            file.write(f"{self.updates}\t{params_sha256(self.params)}\n")
        for name, value in losses.items():
            if not np.isfinite(value):
                raise FloatingPointError(f"update {self.updates}: losses/{name} is not finite, no checkpoint made")

    def show_progress(self, stats, log_due):
        """A line for every log; on a terminal also one for every update, in place."""
        total = self.sizes.updates * self.sizes.steps
        in_place = os.isatty(1) and self.step < total
        if not (log_due or in_place):
            return
        speed = f"{self.step / self.seconds:.0f} steps/s, compilation included"
        pace = self.steady_pace()
        if pace:
            speed = f"{pace:.0f} steps/s, {(total - self.step) / pace:.0f} s left"
        score = f"score {np.mean(self.scores):.1f}" if self.scores else "no game over yet"
        waiting = stats["rollout_queue_get_time"]
        waiting_share = waiting / (waiting + stats["training_time"])
        slower = "environments" if stats["env_time"] > stats["inference_time"] else "inference"
        line = f"{self.step / total:4.0%} {self.step}/{total} steps, {speed}, {score}"
        line += f", learner waits {waiting_share:.0%} of the time for {slower}"
        if os.isatty(1):
            line = f"\x1b[K{line}"  # over the line before
        print(line, end="\r" if in_place else "\n")

    def steady_pace(self):
        """Steps per second after this start's first update, which compiles."""
        if not self.first_update or self.step == self.first_update[1]:
            return None
        began_at, first_step = self.first_update
        return (self.step - first_step) / (self.last_update_at - began_at)

    def end(self, status, network, params, signals_received):
        """What follows the last update: the last checkpoint on disk, --save-model and its games."""
        self.status = status
        self.params = params
        self.wait_for_checkpoint()
        if self.args.save_model and status == "finished":
            save_model(self.run / "model.msgpack", self.args, params)
            print(f"playing {self.args.eval_episodes} games with the model")
            scores = play_games(self.args, network, params, self.args.eval_episodes, signals_received)
            mean = float(np.mean(scores))
            self.evaluation = {"scores": scores, "mean": mean}
            self.write("eval", {"episodic_return": mean})
            print(f"model: {self.run}/model.msgpack, mean score of {len(scores)} games {mean:.2f}")

    def __exit__(self, kind, error, trace):
        """Flush everything, write summary.json, and print its gist. If the run is not finished, say how to resume."""
        if not self.writer:  # the run has not begun
            return
        if kind:
            self.status = {KeyboardInterrupt: "interrupted", SystemExit: "preempted"}.get(kind, "failed")
        with suppress(Exception):  # whatever a checkpoint failed of, the summary is written
            self.wait_for_checkpoint()
        self.summary = self.summarise_run()
        try:
            write_file(self.run / "summary.json", json.dumps(self.summary, indent=2).encode())
            self.writer.close()
        except OSError as failure:  # a full disk must not hide the first error
            print(f"summary.json or the log could not be written: {failure}")
        if self.wandb:
            self.wandb.finish(exit_code=int(self.status != "finished"))
        with suppress(OSError):  # where nobody reads it, or the disk is full
            self.print_ending()
        self.lock.close()

    def summarise_run(self):
        summary = self.record | self.counters()
        summary |= {
            "run_name": self.run.absolute().name,
            "status": self.status,
            "global_step": self.step,
            "seconds": self.seconds,
            "sps": self.step / self.seconds,
            "sps_steady": self.steady_pace(),
            "mean_score": float(np.mean(self.scores)) if self.scores else None,
            "evaluation": self.evaluation,
            "params_sha256": None,
        }
        with suppress(Exception):  # a device may be what failed
            summary["params_sha256"] = self.params and params_sha256(self.params)
        return summary

    def print_ending(self):
        games = f"{self.episodes} games"
        if self.scores:
            games += f", mean score {np.mean(self.scores):.2f}"
        steps = f"{self.step} steps in {self.seconds:.0f} s, {self.step / self.seconds:.0f} steps/s"
        print(f"{self.status}: {steps}, {games}; {self.run}/summary.json")
        if self.status != "finished":
            go_on = f"go on from update {self.newest_checkpoint} with --resume {self.run}"
            print(go_on if self.newest_checkpoint else "it has no checkpoint; --checkpoint-frequency 100 makes more")
        print(f"params sha256: {self.summary['params_sha256']}")


def start_wandb(args, name, wandb_id):
    """Raises FlagError."""
    import wandb

    try:
        return wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=name,
            id=wandb_id,
            resume="allow",
            config=vars(args),
            sync_tensorboard=True,
            save_code=True,
        )
    except wandb.Error as error:
        rule = f"Weights & Biases cannot be used ({error}); WANDB_MODE=offline works without a login"
        raise flag_error("track", True, rule, False) from None


class NoReport(AbstractContextManager):
    """The report of every process but the first: it keeps and shows nothing."""

    checkpoint = b""

    def do_nothing(self, *ignored):
        pass

    __init__ = begin = update = save = __exit__ = do_nothing

    def end(self, status, *ignored):
        self.summary = {"status": status}


# === §14 Models, games, main [shared] =================================================================================
def play_games(args, network, params, episodes, signals_received=()):
    """Scores of whole games, the first of each of `episodes` environments, so that short games do not count double."""
    seeds = env_seeds(args.seed, 2**32 - 1, 0, episodes)  # a generation that training, which counts from 0, never has
    envs = Envs(make_env(args, seeds, num_cores()))
    act, _ = make_policy(network)
    key = jax.random.key(args.seed)
    scores = {}
    while len(scores) < episodes:
        envs.games = []
        behaviour = act(params, envs.obs, key, envs.steps_begun)
        envs.step(jax.device_get(behaviour.action))
        for env, (score, _) in zip(np.flatnonzero(envs.game_over), envs.games):
            scores.setdefault(env, score)
        if signals_received:
            sys.exit(128 + signal.SIGTERM)
    return [scores[env] for env in range(episodes)]


def save_model(path, args, params):
    """Write flags and parameters to one file."""
    write_file(path, pack({"script": Path(__file__).stem, "args": json.dumps(vars(args)), "params": params}))


def load_model(path):
    """Flags, network and parameters of a file that `save_model` wrote. Raises ValueError if a bit of it has changed."""
    content = unpack(path.read_bytes())
    args = with_tuples(Args(**json.loads(content["args"])))
    return args, make_network(args), content["params"]


def parse_args(words):
    """The command line. Sweeps write `--flag=False` and `--flag True` for what tyro calls `--no-flag` and `--flag`."""
    line = "".join(f"{word}\0" for word in words)
    line = re.sub(r"--([\w-]+)[=\0]true\0", r"--\1\0", line, flags=re.IGNORECASE)
    line = re.sub(r"--([\w-]+)[=\0]false\0", r"--no-\1\0", line, flags=re.IGNORECASE)
    return tyro.cli(Args, args=line.split("\0")[:-1], description=__doc__)


def configure_jax(args):
    """Must come before the first JAX call, which starts the backend."""
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        print("no home directory: compiled programs are not kept (JAX_COMPILATION_CACHE_DIR)", file=sys.stderr)
    elif not jax.config.jax_compilation_cache_dir:  # JAX_ENABLE_COMPILATION_CACHE=0 turns it off
        jax.config.update("jax_compilation_cache_dir", f"{home}/.cache/cleanba")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # keep what compiles fast, too
    if jax.config.jax_num_cpu_devices < 0:  # a CPU is as many devices as are asked for
        jax.config.update("jax_num_cpu_devices", 1 + max(args.actor_device_ids + args.learner_device_ids))
    # A flag of the user's comes later and wins.
    os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops=true {os.environ.get('XLA_FLAGS', '')}"


def listen_for_signals():
    """Count signals from now on. Ctrl-C also raises KeyboardInterrupt, and a second SIGTERM raises SystemExit."""
    signals_received = Counter()

    def on_signal(number, frame):
        signals_received[number] += 1
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if signals_received[number] > 1:
            sys.exit(128 + number)
        with suppress(OSError):  # where nobody reads it
            os.write(2, b"SIGTERM: the run ends after this update, at a second one at once\n")

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return signals_received


def main():
    # A new file gets the lowest free number. If 0, 1 or 2 were closed, a file of the run would get what is printed.
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass
    args = parse_args(sys.argv[1:])
    configure_jax(args)
    signals_received = listen_for_signals()
    code = 1
    try:
        status = train(args, signals_received)["status"]
        code = 128 + signal.SIGTERM if status == "preempted" else 0
        jax.distributed.shutdown()  # together: a process that loses process 0 before aborts
    except FlagError as error:
        code = 2
        with suppress(Exception):
            print(f"error: {error}", file=sys.stderr)
            jax.distributed.shutdown()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    if code in (0, 2):
        sys.exit(code)
    os._exit(code)  # an actor may still be inside XLA, and Python's own way out would abort over it


if __name__ == "__main__":
    main()
