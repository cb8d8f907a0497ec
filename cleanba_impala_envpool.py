# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["envpool==1.2.5", "flax==0.12.8", "gymnasium==1.4.0", "jax==0.10.2", "numpy==2.4.6", "optax==0.2.8",
#                 "tensorboard==2.21.0", "tyro==1.0.17"]
# ///
"""IMPALA on Atari with many actors and many learner devices, reproducible to the bit (Cleanba, Huang et al. 2023).

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

To change the environment edit section 2, the network section 3, the loss or a metric section 7. What is learned ends
with `train`; below the stairs is where it runs and what is kept of it.

Departures from the published code (benchmark/results/README.md has all): (1) reset rows teach nothing, (2) time limits
are bootstrapped, (4) an action is paired with the reward it earned, (5) the loss is one sum over the global minibatch,
(6) RMSProp's mean squares start at 1, (7) seeds and keys are distinct, (8) gradients are added up in one order, so
devices do not change the result.
"""

import fcntl
import hashlib
import inspect
import json
import os
import queue
import re
import signal
import sys
import threading
import time
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, make_dataclass
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
from flax.training.train_state import TrainState
from jax._src.distributed import global_state  # has the key-value store, which nothing public gives; Orbax uses it too
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer import event_file_writer

sys.modules.setdefault("envpool.jumanji.registration", sys)  # games not used here, which load Matplotlib for a second
import envpool  # noqa: E402

# === §1 Args ==========================================================================================================
# A type has what a value must be: (rule, test). The comment behind a flag is its help; one alone heads a box of it.
Count = Annotated[int, "must be 1 or more", lambda x: x >= 1]
Natural = Annotated[int, "must be 0 or more", lambda x: x >= 0]
Positive = Annotated[float, "must be above 0", lambda x: 0 < x < np.inf]
Weight = Annotated[float, "must be 0 or more", lambda x: 0 <= x < np.inf]
Fraction = Annotated[float, "must lie between 0 and 1", lambda x: 0 <= x <= 1]
Widths = Annotated[tuple[int, ...], "needs one or more widths, each 1 or more", lambda x: min(x, default=0) >= 1]
Ids = Annotated[tuple[int, ...], "needs ids, 0 or more and different", lambda x: len({*x}) == len(x) > 0 <= min(x)]


@dataclass(frozen=True)
class Args:
    # experiment
    exp_name: str = Path(__file__).stem  # name of the experiment, a part of the run's name
    seed: Annotated[int, "must be 0 to 4294967295", lambda x: 0 <= x < 2**32] = 1  # of all that is random
    total_timesteps: int = 50_000_000  # environment steps of the run
    log_frequency: Count = 10  # updates between two logs
    track: bool = False  # sync TensorBoard to Weights & Biases (pip install wandb)
    wandb_project_name: str = "cleanba"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team or user
    # environment
    env_id: str = "Breakout-v5"  # an Atari game of EnvPool
    img_size: int = 84  # of observations; 42 suits a CPU
    local_num_envs: Count = 64  # environments of each actor thread
    env_threads: Natural = 0  # EnvPool threads of each actor; 0 shares the cores among the actors
    actor_timeout: Count = 300  # seconds that one step of an actor's environments may take before the run fails
    # algorithm
    learning_rate: Weight = 6e-4  # of RMSProp, at the start
    anneal_lr: bool = True  # let the learning rate fall linearly to 0
    num_steps: Count = 20  # T, the steps of a rollout
    gamma: Fraction = 0.99  # discount of a reward one step later
    num_minibatches: Count = 4  # optimizer steps of an epoch
    gradient_accumulation_steps: Count = 1  # pieces of a shard's part of a minibatch: less memory, same statistics
    ent_coef: Weight = 0.01  # weight of the entropy bonus
    vf_coef: Weight = 0.5  # weight of the value loss (which has a factor of 0.5 of its own)
    max_grad_norm: Positive = 40.0  # gradients are clipped to this global norm
    concurrency: bool = True  # play the next rollout while the learner learns: policies lag by one update
    # network
    channels: Widths = (16, 32, 32)  # channels of the network's convolution sequences
    hiddens: Widths = (256,)  # widths of the dense layers after them
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of convolutions and hidden layers; all else is float32
    # devices
    num_actor_threads: Count = 2  # actor threads on each actor device
    actor_device_ids: Ids = (0,)  # local devices that run the actors' forward passes
    learner_device_ids: Ids = (0,)  # local devices that compute gradients
    num_shards: Count = 4  # slices of a batch whose gradients are computed apart; learner devices must divide it
    # checkpoints
    checkpoint_frequency: Natural = 0  # updates between two checkpoints, all games start anew after each; 0 only at end
    keep_checkpoints: Natural = 2  # newest checkpoints that are kept, 0 keeps all
    resume: str | None = None  # go on with this run: its directory, or its name below runs
    start_fresh: bool = False  # with --resume, start the run if it has no checkpoint
    load_model: str | None = None  # start with the parameters of this model.msgpack, of the same network
    save_model: bool = False  # write parameters and flags to model.msgpack at the end, and play games with them
    eval_episodes: Count = 10  # games that --save-model plays, each in an environment of its own
    # processes
    distributed: bool = False  # be one of many processes; SLURM, Open MPI and Kubernetes say how many and which
    coordinator_address: str | None = None  # HOST:PORT of process 0, where nothing else says so
    num_processes: int | None = None  # processes of the run, where nothing else says so
    process_id: int | None = None  # which one this is, from 0, where nothing else says so
    peer_timeout: Count = 100  # seconds until a process that is missing or silent is given up, and the run with it


# === §2 Environment ===================================================================================================
def env_options(args: Args) -> dict[str, Any]:
    """EnvPool's options for the sticky-action protocol (Machado et al. 2018, table 5)."""
    return dict(
        episodic_life=False,
        repeat_action_probability=0.25,
        noop_max=1,  # none; but a reset presses FIRE where the game wants it (use_fire_reset)
        full_action_space=True,
        max_episode_steps=27_000,  # 108,000 frames, 30 minutes of play
        reward_clip=True,
        img_height=args.img_size,
        img_width=args.img_size,
    )


@cache
def env_spec(args: Args) -> tuple[tuple[int, ...], int]:
    """The shape of an observation (4, H, W) and the number of actions A, without building a pool."""
    games = [name for name, (module, *_) in envpool.registration.registry.specs.items() if module == "envpool.atari"]
    require(args.env_id in games, args, "env_id", f"must be one of EnvPool's {len(games)} Atari games", Args.env_id)
    require(8 <= args.img_size <= 1024, args, "img_size", "must be 8 to 1024", Args.img_size)
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
    """

    def __init__(self, pool: Any):
        self.pool, self.games = pool, []  # (score, length in steps) of games that ended
        self.obs, info = pool.reset()  # u8[B,4,H,W], what the agent sees now
        self.full = self.lives = info.get("lives", 0)  # at the start of a game
        # bool[B]: where `obs` ended an episode, so that the next step only resets; where it ended a whole game
        self.reset = self.over = np.zeros(len(self.obs), bool)
        self.score, self.length = np.zeros(len(self.obs)), np.zeros(len(self.obs), int)
        self.steps, self.since = 0, np.inf  # steps begun; when the one that is under way began

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Play action i32[B]; return reward f32[B], clipped as the agent learns it, and terminated bool[B]."""
        self.steps, self.since = self.steps + 1, time.monotonic()
        self.obs, reward, terminated, truncated, info = self.pool.step(action)
        self.since = np.inf
        # the game's own points, and its own end, which a last step has too where the time limit is all that is told
        points, ended = info.get("reward", reward), info.get("terminated", terminated).astype(bool)
        self.score, self.length, terminated = self.score + points, self.length + ~self.reset, terminated | ended
        before, self.lives = self.lives, info.get("lives", 0)
        # where a lost life ends an episode, a game that ends in a reset starts again without a word, or is told twice
        unsaid = self.reset & ~self.over & (before > 0) & (before < self.full) & (self.lives == self.full)
        over = self.over = (ended | truncated) & ~self.over | unsaid  # a whole game
        self.games += zip(self.score[over].tolist(), self.length[over].tolist(), strict=True)
        self.score[over], self.length[over] = 0, 0
        self.reset = terminated | truncated
        return reward, terminated


# === §3 Network [shared] ==============================================================================================
def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2, SAME, f32[N,H,W,C]: the bits of `nn.max_pool`, a third of its gradient's CPU time."""
    for axis in (1, 2):
        size = -(-x.shape[axis] // 2)
        total = 2 * size + 1 - x.shape[axis]
        padding = [(total // 2, total - total // 2) if i == axis else (0, 0) for i in range(x.ndim)]
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        x = reduce(jnp.maximum, (jax.lax.slice_in_dim(padded, i, i + 2 * size - 1, 2, axis) for i in range(3)))
    return x


class ResidualBlock(nn.Module):
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(self.channels, (3, 3), dtype=self.dtype)(nn.relu(x))
        return x + nn.Conv(self.channels, (3, 3), dtype=self.dtype)(nn.relu(y))


class ActorCritic(nn.Module):
    """IMPALA's large network (Espeholt et al. 2018, figure 3), no LSTM; obs -> (logits f32[N,A], value f32[N])."""

    num_actions: int
    channels: tuple[int, ...]
    hiddens: tuple[int, ...]
    dtype: Any = "float32"  # of convolutions and hidden layers

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.transpose(obs, (0, 2, 3, 1)) / 255.0
        for channels in self.channels:
            x = max_pool(nn.Conv(channels, (3, 3), dtype=self.dtype)(x))
            x = ResidualBlock(channels, self.dtype)(x)
            x = ResidualBlock(channels, self.dtype)(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        for width in self.hiddens:
            x = nn.relu(nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.orthogonal(np.sqrt(2)))(x))
        logits = nn.Dense(self.num_actions, kernel_init=nn.initializers.orthogonal(0.01))(x)
        value = nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(x)
        return logits, value[:, 0]


make_network = lambda args: ActorCritic(env_spec(args)[1], args.channels, args.hiddens, args.compute_dtype)


# === §4 Rollout =======================================================================================================
class Behaviour(NamedTuple):
    """What the acting policy did, and what its loss will ask about it."""

    action: jax.Array  # i32[T,B]
    logits: jax.Array  # f32[T,B,A]


class Rollout(NamedTuple):
    """T steps of B environments. Row t means obs[t] -> action[t] -> reward[t], terminated[t].

    An episode ended in row t (terminated or cut by a time limit) exactly where reset[t + 1]; obs[t + 1] is then its
    last observation. Every leaf has its environments on axis 1.
    """

    obs: jax.Array  # [T+1,B,...], here u8[T+1,B,4,H,W]
    reset: jax.Array  # bool[T+1,B], rows that an auto-reset wastes
    reward: jax.Array  # f32[T,B]
    terminated: jax.Array  # bool[T,B]
    behaviour: Behaviour


def make_policy(network: nn.Module) -> tuple[Callable, Callable]:
    """act: (params, obs u8[B,...], key, t) -> Behaviour; last: (params, obs, key) -> what a Rollout has of obs[T]."""

    @jax.jit
    def act(params, obs, key, t):
        logits, _ = network.apply(params, obs)
        return Behaviour(jax.random.categorical(jax.random.fold_in(key, t), logits), logits)

    return act, lambda params, obs, key: {}  # the learner evaluates obs[T] itself


# === §5 Actor [shared] ================================================================================================
# what an actor hands to the learner: the version that played, a rollout, (score, length) of the games that ended, times
Delivery = namedtuple("Delivery", "version rollout games seconds")


@contextmanager
def timed(seconds: dict[str, float], name: str):
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def collect(envs, policy, params, key, num_steps: int, seconds, stopped=None) -> Rollout:
    """Play `num_steps` steps from where the last rollout ended; NumPy arrays. When `stopped` is set the thread ends."""
    act, last = policy
    obs = np.empty((num_steps + 1, *envs.obs.shape), envs.obs.dtype)  # new each time: device_put may alias it
    reset = np.empty((num_steps + 1, len(envs.obs)), bool)
    reward = np.empty((num_steps, len(envs.obs)), np.float32)
    terminated = np.empty((num_steps, len(envs.obs)), bool)
    behaviour = []
    for t in range(num_steps):
        if stopped and stopped.is_set():
            sys.exit()  # ends this thread alone
        obs[t], reset[t] = envs.obs, envs.reset
        with timed(seconds, "inference_time"):
            behaviour.append(jax.device_get(act(params, obs[t], key, t)))
        with timed(seconds, "env_time"):
            reward[t], terminated[t] = envs.step(behaviour[t].action)
    obs[num_steps], reset[num_steps] = envs.obs, envs.reset
    with timed(seconds, "inference_time"):
        rest = jax.device_get(last(params, obs[num_steps], key))
    return Rollout(obs, reset, reward, terminated, jax.tree.map(lambda *rows: np.stack(rows), *behaviour), **rest)


@contextmanager
def playing(args: Args, sizes: "Sizes", devices: "Devices", policy, handoff: "HandOff", key, updates: range):
    """While this lasts, every actor of this process plays the rollouts of `updates`, in a thread of its own.

    It makes its environments anew after every checkpoint, so that a resumed actor meets the same games, and carries
    nothing random from rollout to rollout. So it can start at the first update, or after any checkpoint.
    """
    num_envs, env_threads = args.local_num_envs, args.env_threads or max(1, num_cores() // sizes.actors)

    def play(actor_id: int, here: int, key) -> None:  # here: the first environment's number within this process
        try:
            for update in updates:
                generation, since = divmod(update - 1, args.checkpoint_frequency or sys.maxsize)
                if since == 0 or update == updates[0]:
                    handoff.envs[actor_id] = envs = None  # the pool before goes first
                    seeds = env_seeds(args.seed, generation, actor_id * num_envs, num_envs)
                    handoff.envs[actor_id] = envs = Envs(make_env(args, seeds, env_threads))
                envs.games, seconds = [], Counter()
                with timed(seconds, "params_queue_get_time"):
                    version, params = handoff.take_params(actor_id)
                rollout_key = jax.random.fold_in(jax.random.fold_in(key, actor_id), update)
                with timed(seconds, "rollout_time"):
                    rollout = collect(envs, policy, params, rollout_key, args.num_steps, seconds, handoff.stopped)
                with timed(seconds, "storage_time"):
                    rollout = jax.block_until_ready(ship(rollout, here, sizes.shard_envs, devices))
                handoff.rollouts[actor_id].put(Delivery(version, rollout, envs.games, seconds))
        except BaseException as error:
            handoff.rollouts[actor_id].put(error)

    threads = []
    for i, (actor_id, device) in enumerate(devices.actors.items()):
        own = (actor_id, i * num_envs, jax.device_put(key, device))  # the key away from the learner's queue
        threads.append(threading.Thread(target=play, args=own, name=f"actor {actor_id}", daemon=True))
        threads[i].start()
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

    def __init__(self, actor_devices: dict[int, jax.Device], concurrency: bool, patience=lambda: np.inf):
        self.devices, self.concurrency = actor_devices, concurrency
        self.patience, self.envs = patience, {}  # seconds that one step may take, and of which actor's environments
        self.params = {actor_id: queue.SimpleQueue() for actor_id in actor_devices}
        self.rollouts = {actor_id: queue.SimpleQueue() for actor_id in actor_devices}
        self.stopped = threading.Event()

    def give_params(self, version: int, params: Any) -> None:
        """Give every actor one token, with the parameters on its own device."""
        copies = {device: jax.device_put(params, device) for device in dict.fromkeys(self.devices.values())}
        for actor_id, device in self.devices.items():
            self.params[actor_id].put((version, copies[device]))

    def take_params(self, actor_id: int) -> tuple[int, Any]:
        """Wait for the next token: (version, parameters ready on the actor's device)."""
        token = self.params[actor_id].get()
        if token is None:
            sys.exit()  # ends this thread alone
        return token[0], jax.block_until_ready(token[1])

    def get_rollouts(self, update: int) -> list[Delivery]:
        """Wait for one delivery of every actor, by id, of the version due. Raises TimeoutError if environments hang."""
        deliveries = []
        for actor_id, rollouts in self.rollouts.items():
            delivery = None
            while delivery is None:
                with suppress(queue.Empty):
                    delivery = rollouts.get(timeout=1)
                envs, limit = self.envs.get(actor_id), self.patience()
                if delivery is None and envs and time.monotonic() - envs.since > limit:
                    raise TimeoutError(f"actor {actor_id}: step {envs.steps} of its environments takes over {limit} s")
            if isinstance(delivery, BaseException):
                raise RuntimeError(f"actor {actor_id} failed: {delivery!r}") from delivery
            deliveries.append(delivery)
        if (versions := {delivery.version for delivery in deliveries}) != {max(0, update - 1 - self.concurrency)}:
            raise RuntimeError(f"update {update} got rollouts of versions {sorted(versions)}")
        return deliveries

    def stop(self) -> None:
        """Called by the learner: no actor waits or plays on."""
        self.stopped.set()
        for params in self.params.values():
            params.put(None)


# === §7 Loss ==========================================================================================================
def log_prob(logits: jax.Array, action: jax.Array) -> jax.Array:
    """log pi(action), f32[...,A], i32[...] -> f32[...]."""
    chosen = action[..., None] == jnp.arange(logits.shape[-1])  # no gather: its gradient would be a scatter
    return jnp.sum(jnp.where(chosen, jax.nn.log_softmax(logits), 0.0), axis=-1)


def vtrace(rollout: Rollout, value: jax.Array, rho: jax.Array, gamma: float) -> jax.Array:
    """V-trace (Espeholt et al. 2018, eq. 1, with lambda and all clips 1), which knows terminations from time limits.

    The value of the next observation is dropped where an episode terminated; the trace is cut where it ended for any
    reason. At a time limit obs[t + 1] is the episode's last observation, so its value bootstraps exactly.

    value: f32[T+1,B], V(obs); rho: f32[T,B], pi / mu, not clipped. Returns v - V, f32[T,B], 0 in reset rows. With these
    clips it is the policy's advantage too: rho (r + gamma v' - V) = rho (r + gamma V' - V) + gamma c (v' - V').
    """
    rho = jnp.minimum(rho, 1.0)  # and c, which has the same bound
    next_value = jnp.where(rollout.terminated, 0.0, value[1:])
    delta = rho * (rollout.reward + gamma * next_value - value[:-1])
    trace = jnp.where(rollout.reset[1:], 0.0, gamma * rho)
    # advantage[t] = delta[t] + trace[t] advantage[t + 1], not as a loop, which a GPU would run in T small steps
    join = lambda later, row: (row[0] + row[1] * later[0], row[1] * later[1])
    advantage, _ = jax.lax.associative_scan(join, (delta, trace), reverse=True)
    return jnp.where(rollout.reset[:-1], 0.0, advantage)


def impala_loss(params, apply, rollout: Rollout, args: Args) -> tuple[jax.Array, dict[str, jax.Array]]:
    """IMPALA's loss (Espeholt et al. 2018, section 4.2) summed over T rows of M environments, reset rows left out.

    apply: (params, obs) -> (logits f32[N,A], value f32[N]). Metrics are sums too; `summarise` divides by "weight".
    """
    steps, envs = rollout.reward.shape
    logits, value = apply(params, rollout.obs.reshape(-1, *rollout.obs.shape[2:]))
    logits, value = logits.reshape(steps + 1, envs, -1)[:-1], value.reshape(steps + 1, envs)
    weight = 1.0 - rollout.reset[:-1]
    total = lambda x: jnp.sum(weight * x)
    logprob = log_prob(logits, rollout.behaviour.action)
    rho = jnp.exp(logprob - log_prob(rollout.behaviour.logits, rollout.behaviour.action))
    error = jax.lax.stop_gradient(vtrace(rollout, value, rho, args.gamma))
    target = jax.lax.stop_gradient(value[:-1]) + error
    policy_loss = -total(error * logprob)
    value_loss = total(0.5 * jnp.square(target - value[:-1]))
    entropy = total(-jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1))
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy

    metrics = {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    metrics |= {
        "rho_mean": total(rho),
        "rho_max": jnp.max(weight * rho),
        "rho_clipped": total(rho > 1.0),
        "weight": total(1.0),
        "target": total(target),  # and three moments more, of which `summarise` makes explained_variance
        "target_square": total(jnp.square(target)),
        "error": total(error),
        "error_square": total(jnp.square(error)),
    }
    return loss, metrics


def summarise(metrics: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over the rows of an update, and what only such means can say."""
    rows = sum(m["weight"] for m in metrics)
    mean = {name: float(sum(m[name].sum() for m in metrics) / rows) for name in metrics[0] if name != "weight"}
    error = mean.pop("error_square") - mean.pop("error") ** 2
    target = mean.pop("target_square") - mean.pop("target") ** 2
    mean |= {"rho_max": float(max(m["rho_max"].max() for m in metrics))}
    mean |= {"grad_norm": float(np.mean([m["grad_norm"] for m in metrics]))}
    return mean | {"explained_variance": 1 - error / target if target > 0 else 0.0}


# === §8 Learner =======================================================================================================
def make_optimizer(args: Args, sizes: "Sizes") -> tuple[optax.GradientTransformation, Callable[[int], float]]:
    """The optimizer, and the learning rate of update u (from 1): constant in an update, linear to 0 over the run."""
    learning_rate = lambda u: args.learning_rate * (1 - (u - 1) / sizes.updates if args.anneal_lr else 1)
    rate = lambda count: learning_rate(1 + count // args.num_minibatches)
    # The mean squares start at 1, as in the TensorFlow of Espeholt et al. From 0, as PyTorch has them, the first step
    # would move every weight by ten learning rates, and silence many of the hidden units.
    rmsprop = optax.rmsprop(rate, decay=0.99, eps=0.01, initial_scale=1.0, eps_in_sqrt=False)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), rmsprop), learning_rate


# what the minibatches of a shard are drawn from: how many, and of what
shuffled = lambda args, shard_envs: (shard_envs, "environments")


def shuffle(args: Args, envs: int, key, *numbers) -> jax.Array:
    """Environment numbers in the order of an update, i32[minibatches, pieces, M]; numbers: that of the shard."""
    index = jax.random.permutation(reduce(jax.random.fold_in, numbers, key), envs)
    return index.reshape(args.num_minibatches, args.gradient_accumulation_steps, -1)


def shard_gradient(network, args: Args, params, rollout: Rollout, index, shard, at):
    """Gradient and metrics of one piece of a minibatch, `at` = (minibatch, piece), to be added to all the others."""
    minibatch = jax.tree.map(lambda x: x[:, index[at]], rollout)
    (_, metrics), gradient = jax.value_and_grad(impala_loss, has_aux=True)(params, network.apply, minibatch, args)
    pieces = args.gradient_accumulation_steps
    place = jax.nn.one_hot(shard * pieces + at[1], args.num_shards * pieces)  # a maximum cannot be added up
    return gradient, metrics | {"rho_max": place * metrics["rho_max"]}


def make_update(args: Args, network: nn.Module, devices: "Devices", sizes: "Sizes") -> Callable:
    """The learner: (states, rollouts, key) -> (states, metrics of every minibatch).

    states: one TrainState, the same on every local learner device; rollouts: one of every local shard, on its device.
    Minibatches are a Python loop: in `lax.scan` a convolution's gradient is ten times slower on a CPU. All arithmetic
    is in programs for one device and of fixed shape, so its bits do not depend on the topology.
    """
    permute = jax.jit(partial(shuffle, args, shuffled(args, sizes.shard_envs)[0]))
    gradient = jax.jit(partial(shard_gradient, network, args))
    accumulate = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
    step = jax.jit(lambda state, grads: (state.apply_gradients(grads=grads), optax.tree.norm(grads)))
    total, pieces = make_total(devices), range(args.gradient_accumulation_steps)

    def minibatch_gradient(params, shard, minibatch):
        return reduce(accumulate, (gradient(params, *shard, (minibatch, i)) for i in pieces))

    def update(states, rollouts, key):
        on = devices.of_shard  # on[i]: the place of the i-th shard's device among the local learner devices
        keys = [jax.device_put(key, device) for device in devices.learners]
        numbers = [devices.first_shard + i for i in range(len(on))]
        index, metrics = [permute(keys[d], shard) for d, shard in zip(on, numbers, strict=True)], []
        shards = list(zip(rollouts, index, numbers, strict=True))
        for m in range(args.num_minibatches):
            parts = [minibatch_gradient(states[d].params, shard, m) for d, shard in zip(on, shards, strict=True)]
            grads, values = zip(*total(parts), strict=True)
            before, (states, norms) = states, zip(*map(step, states, grads), strict=True)
            metrics.append(values[0] | {"grad_norm": norms[0]})
            jax.block_until_ready(before)  # one step ahead, so that an actor on the same device comes in between
        return states, metrics

    return update


# === §9 Train [shared] ================================================================================================
def train(args: Args, heard: Collection[int] = ()) -> dict[str, Any]:
    """A run, or this process's part of it, until a signal is `heard`; returns its summary.json. Raises FlagError."""
    sizes, devices, record = set_up(args)
    with nullcontext() if global_state.process_id else Report(args, sizes, record) as report:
        actor_key, learner_key, params_key = jax.random.split(jax.random.key(args.seed), 3)
        network, (optimizer, learning_rate) = make_network(args), make_optimizer(args, sizes)
        quick = {"xla_backend_optimization_level": 0}  # runs once: the default would compile for seconds
        params = jax.jit(network.init, compiler_options=quick)(params_key, np.zeros((1, *env_spec(args)[0])))
        params = params if args.load_model is None else load_params(args, params)
        state = jax.jit(partial(TrainState.create, apply_fn=network.apply, tx=optimizer))(params=params)
        done, (state, previous) = restore(args, report.data if report else b"", (state, params))
        states = [jax.device_put(state, device) for device in devices.learners]
        learn, updates = make_update(args, network, devices, sizes), range(done + 1, sizes.updates + 1)
        patience, status = lambda: 4 if heard else args.actor_timeout, "finished"  # who asks for an end waits less
        handoff = HandOff(devices.actors, args.concurrency, patience)
        print(f"{done} of {sizes.updates} updates of {sizes.steps} steps are done; making environments", flush=True)

        with playing(args, sizes, devices, make_policy(network), handoff, actor_key, updates):
            if args.concurrency:
                handoff.give_params(max(0, done - 1), previous)
            handoff.give_params(done, state.params)
            for update in updates:
                seconds = Counter()
                with timed(seconds, "rollout_queue_get_time"):
                    deliveries = handoff.get_rollouts(update)
                if update == updates[0]:
                    if len({*share(params_sha256(states[0].params))}) > 1:  # all are here now, as Gloo wants it
                        raise RuntimeError("the processes start from different parameters")
                    print("the first rollouts are here; compiling what learns from them", flush=True)
                with timed(seconds, "training_time"):
                    updated = learn(states, assemble(deliveries), jax.random.fold_in(learner_key, update))
                    previous, (states, metrics) = states[0].params, jax.block_until_ready(updated)
                handoff.give_params(update, states[0].params)
                news = share([signal.SIGTERM in heard, [(d.games, d.seconds) for d in deliveries]])
                if report:
                    due = update == sizes.updates or update % (args.checkpoint_frequency or sizes.updates) == 0
                    lag, rate = update - 1 - deliveries[0].version, learning_rate(update)
                    report.update(news, due, lag, rate, seconds, metrics, states[0].params)
                    if due:
                        report.save(update, (states[0], previous))
                if signal.SIGINT in heard:  # where its exception is lost: inside a callback of the garbage collector
                    raise KeyboardInterrupt
                if any(told for told, _ in news):
                    status = "preempted"
                    break
        if len({*share(params_sha256(states[0].params))}) > 1:
            raise RuntimeError("the processes end with different parameters")
        if report:
            report.end(status, network, states[0].params, heard)
    share("closed")  # else the others wait in JAX's own barrier, whose patience is shorter
    return report.summary if report else {"status": status}


# === The stairs: above, what is learned; below, where it runs, what is kept, what is shown ============================
# === §10 Flags, processes, devices [shared] ===========================================================================
# what the flags amount to: actors of this process, T * B, environments of a shard, updates of the run
Sizes = namedtuple("Sizes", "actors steps shard_envs updates")
# where: {actor_id: device} and learner devices of this process, the mesh of all learner devices, this process's first
# shard, and of each of its shards the place of its device among `learners`
Devices = namedtuple("Devices", "actors learners mesh first_shard of_shard")
num_cores = lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class FlagError(ValueError):
    """A flag whose value cannot work; the message names the flag, its value, the rule and a value that works."""

    def __init__(self, flag: str, value: Any, rule: str, instead: Any):
        show = lambda x: (" ".join(map(str, x)) or "(empty)") if isinstance(x, tuple | list) else str(x)
        flag = "--" + flag.replace("_", "-") if flag in Args.__dataclass_fields__ else flag
        super().__init__(f"{flag} {show(value)}: {rule}. For example: {flag} {show(instead)}")


def require(ok: Any, args: Args, flag: str, rule: str, instead: Any) -> None:
    """Raise FlagError about `flag` unless `ok`."""
    if not ok:
        raise FlagError(flag, getattr(args, flag), rule, instead)


def check_args(args: Args, num_processes: int = 1) -> Sizes:
    """Hold the flags against their rules and each other, before anything is built. Raises FlagError."""
    for flag, kind in get_type_hints(Args, include_extras=True).items():
        if rule := getattr(kind, "__metadata__", None):
            require(rule[1](getattr(args, flag)), args, flag, rule[0], getattr(Args, flag))
    require(not args.track or find_spec("wandb"), args, "track", "needs pip install wandb or uv run --with wandb", 0)

    def divides(flag: str, number: int, what: str, learners: int = 1) -> int:
        value, many = getattr(args, flag), f" and be a multiple of the {learners} learner devices" * (learners > 1)
        fitting = [d for d in range(learners, number + 1, learners) if number % d == 0]
        whole = max(unit := learners * args.num_minibatches, args.local_num_envs // unit * unit)
        instead = min(fitting, key=lambda d: abs(d - value), default=f"{learners} --local-num-envs {whole}")
        require(value in fitting, args, flag, f"must divide the {number} {what}{many}", instead)
        return number // value

    actors = args.num_actor_threads * len(args.actor_device_ids)
    envs, learners = actors * args.local_num_envs * num_processes, len(args.learner_device_ids) * num_processes
    shard_envs = divides("num_shards", envs, "environments of a batch", learners)
    units, what = shuffled(args, shard_envs)
    part = divides("num_minibatches", units, f"{what} of a shard")
    divides("gradient_accumulation_steps", part, f"{what} that a shard gives to a minibatch")
    steps = envs * args.num_steps
    require(args.total_timesteps >= steps, args, "total_timesteps", f"an update takes {steps} steps", steps)
    env_spec(args)
    return Sizes(actors, steps, shard_envs, args.total_timesteps // steps)


def join(args: Args) -> None:
    """Be one of the processes of a run, if the flags speak of any. Raises FlagError."""
    place = (args.coordinator_address, args.num_processes, args.process_id)
    if not args.distributed and place == (None, None, None):
        return
    others = [i for i in range(args.num_processes or 0) if i != args.process_id]
    print(f"waiting {args.peer_timeout} s at most for the processes {others} ({args.coordinator_address})", flush=True)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the run's own
    visible = sorted({*args.actor_device_ids, *args.learner_device_ids})
    patience = dict(initialization_timeout=args.peer_timeout, heartbeat_timeout_seconds=args.peer_timeout)
    try:
        jax.distributed.initialize(*place, visible, **patience, shutdown_timeout_seconds=10)
    except (ValueError, IndexError) as error:
        rule = f"where no cluster tells them, HOST:PORT and two numbers are needed ({error})"
        raise FlagError("coordinator_address", place, rule, "10.0.0.1:9876 --num-processes 2 --process-id 0") from None


def share(value: Any, rounds=count(1)) -> list:  # noqa: B008 - counts on, for this process
    """Everyone's `value` (JSON), by rank. Every process must call this at the same point of the run."""
    rank, size, client = global_state.process_id, global_state.num_processes, global_state.client
    if size == 1:
        return [value]
    number = next(rounds)

    def get(other: int) -> Any:
        while True:  # in short waits: between them Python hears Ctrl-C
            try:
                return json.loads(client.blocking_key_value_get(f"cleanba/{number}/{other}", 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    if rank == 0:  # collects, so n processes make 3 n calls
        value = [value, *map(get, range(1, size))]
        client.key_value_delete(f"cleanba/{number - 1}")  # who came to this round has read the one before
    client.key_value_set(f"cleanba/{number}/{rank}", json.dumps(value))
    return get(0)


def set_up(args: Args) -> tuple[Sizes, Devices, dict[str, Any]]:
    """Meet the other processes, hold their flags against each other, find the devices. Raises FlagError."""
    join(args)
    rank, processes = global_state.process_id, global_state.num_processes
    sizes, here = check_args(args, processes), jax.local_devices()
    cpu, ids = here[0].platform == "cpu", sorted({*args.actor_device_ids, *args.learner_device_ids})
    # of many processes on GPUs, each sees the devices that it names and no others
    local = dict(zip(range(len(here)) if processes == 1 or cpu else ids, here, strict=False))
    for flag in ("actor_device_ids", "learner_device_ids"):
        require(local.keys() >= {*getattr(args, flag)}, args, flag, f"the devices here are {[*local]}", min(local))
    around = {"script": Path(__file__).stem, "device": here[0].device_kind} | VERSIONS
    around |= {"threads of XLA (NPROC)": max(int(os.environ.get("NPROC", num_cores())), len(here))} if cpu else {}
    record = json.loads(json.dumps({"args": asdict(args), "actors": sizes.actors * processes, "around": around}))
    same = {name: value for name, value in record["args"].items() if name not in OWN_FLAGS}
    same |= {name: len(same[name]) for name in ("actor_device_ids", "learner_device_ids")}
    learners = [local[i] for i in args.learner_device_ids]
    everyone = share([same | around, [device.id for device in learners]])
    for other, (theirs, _) in enumerate(everyone):
        for name, value in everyone[0][0].items():
            if theirs[name] != value:
                raise FlagError(name, theirs[name], f"process {other} differs from process 0, which has {value}", value)
    by_id = {device.id: device for device in jax.devices()}
    mesh = Mesh(np.array([by_id[i] for _, ids in everyone for i in ids]), ("learner",))
    owners = [i for i in range(len(learners)) for _ in range(args.num_shards // mesh.size)]
    actors = [local[i] for i in args.actor_device_ids for _ in range(args.num_actor_threads)]
    names = {"actors": [*map(str, dict.fromkeys(actors))], "learners": [*map(str, mesh.devices)]}
    record |= {"processes": processes, "devices": names}
    actors = dict(enumerate(actors, rank * sizes.actors))
    return sizes, Devices(actors, learners, mesh, rank * len(owners), owners), record


def tree_sum(parts: list, while_even: bool = False) -> list:
    """Sum by a balanced binary tree: neighbours are added, level by level, and an odd last one moves up as it is."""
    while len(parts) > 1 and not (while_even and len(parts) % 2):
        sums = [jax.tree.map(jnp.add, a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = sums + parts[2 * len(sums) :]
    return parts


def make_total(devices: Devices) -> Callable[[list], list]:
    """The sum over all shards: takes what each local shard adds (a tree), returns the sum on each local learner device.

    One binary tree over the shard index, the same for any number of devices, and so are the bits. A device adds up its
    own shards as far as the tree has them together. Of these vectors an all-to-all gives device d the d-th slices, an
    all-gather brings the finished sums back: each of n devices sends 2 (n - 1) / n vectors, as in a ring all-reduce.
    """
    alone = jax.jit(lambda *parts: tree_sum(list(parts))[0])
    if devices.mesh.size == 1:
        return lambda parts: [alone(*parts)]
    cut = lambda *axes: NamedSharding(devices.mesh, PartitionSpec(*axes))

    @jax.jit
    def lower(*parts):  # f32[vectors, size], padded to a multiple of the number of devices
        rows = jnp.stack([ravel_pytree(part)[0] for part in tree_sum(list(parts), while_even=True)])
        return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % devices.mesh.size)))

    @partial(jax.jit, out_shardings=cut())
    def across(rows):
        slices = jax.lax.with_sharding_constraint(rows, cut(None, "learner"))
        return jax.lax.with_sharding_constraint(tree_sum(list(slices))[0], cut("learner"))

    unravel = jax.jit(lambda flat, like: ravel_pytree(like)[1](flat[: sum(x.size for x in jax.tree.leaves(like))]))

    def total(parts: list) -> list:
        own = len(parts) // len(devices.learners)
        sums = [lower(*parts[i : i + own]) for i in range(0, len(parts), own)]
        if devices.learners[0].platform == "cpu":  # with 32 programs under way XLA blocks: a deadlock at a collective
            jax.block_until_ready(sums)
        shape = (devices.mesh.size * sums[0].shape[0], sums[0].shape[1])
        whole = across(jax.make_array_from_single_device_arrays(shape, cut("learner"), sums))
        here = {shard.device: shard.data for shard in whole.addressable_shards}
        return [unravel(here[device], parts[i * own]) for i, device in enumerate(devices.learners)]

    return total


def ship(rollout: Rollout, first_env: int, shard_envs: int, devices: Devices) -> list[tuple[int, Rollout]]:
    """Cut a rollout at the borders of shards, send each piece to its shard's device; all numbers are this process's."""
    shard = (first_env + np.arange(rollout.reward.shape[1])) // shard_envs  # of each environment
    pieces = {i: slice(*np.searchsorted(shard, (i, i + 1))) for i in np.unique(shard).tolist()}
    cut = lambda own: jax.tree.map(lambda x: x[:, own], rollout)
    return [(i, jax.device_put(cut(own), devices.learners[devices.of_shard[i]])) for i, own in pieces.items()]


def assemble(deliveries: list[Delivery]) -> list[Rollout]:
    """The rollout of every shard of this process, put together from the pieces that the actors shipped."""
    shards = defaultdict(list)
    for shard, piece in (piece for delivery in deliveries for piece in delivery.rollout):
        shards[shard].append(piece)
    join = lambda *leaves: jnp.concatenate(leaves, axis=1) if len(leaves) > 1 else leaves[0]
    return [jax.tree.map(join, *shards[shard]) for shard in sorted(shards)]


# === §11 Run directory, checkpoints [shared] ==========================================================================
# flags that each process has for itself, and those that may change on resume: where a run is, and what is kept of it
OWN_FLAGS = {"coordinator_address", "num_processes", "process_id", "distributed", "env_threads"}
FREE_FLAGS = OWN_FLAGS | {"num_actor_threads", "actor_device_ids", "learner_device_ids", "peer_timeout", "exp_name"}
FREE_FLAGS |= {"track", "wandb_project_name", "wandb_entity", "log_frequency", "keep_checkpoints", "actor_timeout"}
FREE_FLAGS |= {"resume", "start_fresh", "save_model", "eval_episodes"}
find_checkpoints = lambda run: sorted((run / "checkpoints").glob("*.msgpack"), key=lambda path: int(path.stem))
VERSIONS = {name: package_version(name) for name in ("jax", "jaxlib", "flax", "optax", "envpool", "numpy")}
VERSIONS |= {"python": sys.version.split()[0]}


def params_sha256(params: Any) -> str:
    """SHA-256 over the bytes of the leaves in tree order: equal hashes mean equal bits."""
    return hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(jax.device_get(params)))).hexdigest()


def unpack(data: bytes) -> dict[str, Any]:
    """What `write_file` has written. Raises ValueError if a bit of it has changed."""
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise ValueError("its bits are not those that were written")
    try:
        return {**serialization.msgpack_restore(data[32:])}
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"no run wrote this: {error!r:.200}") from None


def write_file(path: Path, content: dict[str, Any]) -> None:
    """Arrays, strings and numbers as Flax's msgpack, after 32 bytes of SHA-256; a file is there whole or not at all."""
    data = serialization.msgpack_serialize(serialization.to_state_dict(jax.device_get(content)))
    with open(path.with_name("unfinished"), "wb") as file:  # one name: what a killed process left is written over
        file.write(hashlib.sha256(data).digest() + data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def load_checkpoint(run: Path) -> bytes:
    """The newest checkpoint that is whole, still packed; nothing if there is none."""
    for path in reversed(find_checkpoints(run)):
        try:
            unpack(data := path.read_bytes())
            return data
        except ValueError as error:
            print(f"the checkpoint {path} cannot be read, trying an older one: {error}", flush=True)
    return b""


def claim_run(args: Args, record: dict[str, Any]) -> tuple[Path, Any, bytes]:
    """The directory of a run, new or to be resumed, a lock on it, and its newest checkpoint. Raises FlagError."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run, fresh = Path(name if args.resume is None else args.resume), args.resume is None or args.start_fresh
    run = Path("runs") / run if len(run.parts) == 1 else run
    if data := load_checkpoint(run):
        old = json.loads(unpack(data)["record"])
        for name, before in old["around"].items():
            if (now := record["around"].get(name)) != before:
                print(f"{name}: {now} now and {before} before, the bits may differ", flush=True)
        flags = lambda of: of["args"] | {"num_actor_threads of all devices and processes": of["actors"]}
        for name, before in flags(old).items():
            if (now := flags(record).get(name)) != before and name not in FREE_FLAGS:
                raise FlagError(name, now, f"the run to resume has {before}", before)
    require(data or fresh, args, "resume", f"no checkpoint in {run} can be read", f"{args.resume} --start-fresh")
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(run / "checkpoints" / "lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when its process is gone
    except BlockingIOError:
        require(False, args, "resume", "another process has this run: end it first", f"{args.resume}-2 --start-fresh")
    except OSError as error:  # names no file where only the file system has no locks
        require(error.filename is None, args, "resume", f"{run} cannot be written: {error}", "/tmp/run --start-fresh")
    return run, lock, data


def restore(args: Args, data: bytes, tree: Any) -> tuple[int, Any]:
    """(update, tree) of process 0's checkpoint, on every process; (0, tree) if it has none. Raises FlagError."""
    if not (size := share(len(data))[0]):
        return 0, tree
    content = unpack(bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(data or bytes(size), np.uint8))))
    return content["update"], fit(args, "resume", content["state"], tree, f"{args.resume}-2 --start-fresh")


def fit(args: Args, flag: str, saved: Any, tree: Any, instead: str) -> Any:
    """What a file has `saved`, in the form of `tree`. Raises FlagError if it is of another one."""
    shapes = lambda tree: jax.tree.map(np.shape, serialization.to_state_dict(tree))
    require(shapes(saved) == shapes(tree), args, flag, "its network or optimizer is another", instead)
    return serialization.from_state_dict(tree, saved)


def load_params(args: Args, params: Any) -> Any:
    """The parameters of --load-model in the form of `params`. Raises FlagError."""
    try:
        saved = unpack(Path(args.load_model).read_bytes())["params"]
    except (OSError, ValueError, KeyError) as error:
        raise FlagError("load_model", args.load_model, f"cannot be read: {error}", "runs/RUN/model.msgpack") from None
    return fit(args, "load_model", saved, params, "runs/RUN/model.msgpack")


# === §12 Report [shared] ==============================================================================================
class Report(AbstractContextManager):
    """What process 0 keeps and shows of a run. It ends with summary.json, whatever is raised within it."""

    def __init__(self, args: Args, sizes: Sizes, record: dict[str, Any]):
        """Claim the run and open its logs. Raises FlagError."""
        self.args, self.sizes, self.record = args, sizes, record
        self.run, self.lock, self.data = claim_run(args, record)
        self.kept = dict(updates=0, episodes=0, scores=[], seconds=0.0, resumed_at=[], wandb_id=None)
        if self.data:
            self.kept = json.loads(unpack(self.data)["kept"])
            self.kept["resumed_at"].append(self.kept["updates"])
        self.start, self.thread, self.writing, self.games = time.perf_counter(), ThreadPoolExecutor(1), [], []
        self.status = self.params = self.evaluation = self.wandb = self.first = self.last = None
        if args.track:
            import wandb

            place = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=self.run.name)
            again = dict(id=self.kept["wandb_id"], resume="allow", sync_tensorboard=True)
            self.wandb = wandb.init(**place, **again, config=asdict(args), save_code=True)
            self.kept["wandb_id"] = self.wandb.id
        self.writer = event_file_writer.EventFileWriter(str(self.run))
        # what a run wrote after the checkpoint that it is resumed from is written again: TensorBoard forgets the first
        step = self.kept["updates"] * sizes.steps + 1
        self.writer.add_event(Event(wall_time=time.time(), step=step, session_log={"status": SessionLog.START}))
        (self.run / "run.json").write_text(json.dumps(record, indent=2))

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in scalars.items()]
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary={"value": values}))

    def save(self, update: int, tree: Any) -> None:
        """Begin to write a checkpoint; all that is logged so far is then on disk too."""
        self.finish()
        self.writer.flush()
        kept = json.dumps(self.kept | {"seconds": self.kept["seconds"] + time.perf_counter() - self.start})
        content = {"update": update, "record": json.dumps(self.record), "kept": kept, "state": tree}
        self.writing += [self.thread.submit(write_file, self.run / "checkpoints" / f"{update}.msgpack", content)]

    def finish(self) -> None:
        """Wait until the checkpoint is written; then older ones may go. Raises OSError if it could not be."""
        while self.writing:
            self.writing.pop().result()
            for old in find_checkpoints(self.run)[: -self.args.keep_checkpoints]:
                old.unlink()

    def update(self, news: list, due: bool, lag: int, rate: float, times: Counter, metrics, params) -> None:
        """Take in an update: `news` of all processes, the learner's `times`. Log it if that or a checkpoint is due."""
        kept, actors, self.params = self.kept, [actor for _, actors in news for actor in actors], params
        games, now = [game for played, _ in actors for game in played], time.perf_counter()
        kept["updates"], kept["episodes"] = kept["updates"] + 1, kept["episodes"] + len(games)
        kept["scores"], self.games = [*kept["scores"], *(score for score, _ in games)][-100:], self.games + games
        for _, spent in actors:
            times.update({name: seconds / len(actors) for name, seconds in spent.items()})
        step, total = (number * self.sizes.steps for number in (kept["updates"], self.sizes.updates))
        sps, recent = step / (kept["seconds"] + now - self.start), self.sizes.steps / (now - (self.last or self.start))
        due = due or kept["updates"] == 1 or kept["updates"] % self.args.log_frequency == 0
        self.first, self.last, live = self.first or (now, step), now, os.isatty(1) and step < total
        if due:
            charts = {"SPS": sps, "SPS_update": recent, "learning_rate": rate}
            if self.games:
                charts["avg_episodic_return"], charts["avg_episodic_length"] = np.mean(self.games, axis=0)
            stats = {**times, "policy_lag": lag, "episodes": len(self.games)}
            groups = {"charts": charts, "losses": summarise(jax.device_get(metrics)), "stats": stats}
            self.write(step, {f"{group}/{name}": x for group, values in groups.items() for name, x in values.items()})
            self.games = []
            with open(self.run / "hashes.tsv", "a") as file:  # compared by benchmark/compare.py
                file.write(f"{kept['updates']}\t{params_sha256(params)}\n")
            for name in (name for name, value in groups["losses"].items() if not np.isfinite(value)):
                raise FloatingPointError(f"update {kept['updates']}: losses/{name} is not finite, no checkpoint made")
        if due or live:
            part = "environments" if times["env_time"] > times["inference_time"] else "inference"
            waits = (wait := times["rollout_queue_get_time"]) / (wait + times["training_time"])
            score = f"score {np.mean(kept['scores']):.1f}" if kept["scores"] else "no game over yet"
            pace = (step - self.first[1]) / (now - self.first[0] or 1)  # after the first update, which compiles
            left = f"{(total - step) / pace:.0f} s left" if pace else "compilation included"
            speed = f"{step / total:4.0%} {step}/{total} steps, {pace or sps:.0f} steps/s, {left}"
            line = f"{speed}, {score}, learner waits {waits:.0%} of the time for {part}"
            print("\x1b[K" * live + line, end="\r" if live else "\n", flush=True)

    def end(self, status: str, network: nn.Module, params: Any, heard: Collection[int]) -> None:
        """What follows the last update: the last checkpoint on disk, --save-model and its games."""
        self.status, self.params = status, params
        self.finish()
        if self.args.save_model and status == "finished":
            save_model(self.run / "model.msgpack", self.args, params)
            print(f"playing {self.args.eval_episodes} games with the model", flush=True)
            scores = play_games(self.args, network, params, self.args.eval_episodes, heard)
            self.evaluation = {"scores": scores, "mean": float(np.mean(scores)), "std": float(np.std(scores))}
            self.write(self.kept["updates"] * self.sizes.steps, {"eval/episodic_return": np.mean(scores)})
            print(f"model: {self.run}/model.msgpack, mean score of {len(scores)} games {np.mean(scores):.2f}")

    def __exit__(self, kind, error, trace) -> None:
        """Flush everything, write summary.json and print its gist and, if not finished, how to go on."""
        if kind is FlagError:  # which leaves the run that was to be resumed as it was
            return self.lock.close()
        self.status = {None: self.status, KeyboardInterrupt: "interrupted", SystemExit: "preempted"}.get(kind, "failed")
        with suppress(Exception):  # whatever a checkpoint failed of, the summary is written
            self.finish()
        kept, end = self.kept, time.perf_counter()
        steps, seconds, scores = kept["updates"] * self.sizes.steps, kept["seconds"] + end - self.start, kept["scores"]
        first, at = self.first or (end, steps)
        self.summary = {"run_name": self.run.name, "status": self.status, "versions": VERSIONS} | self.record | kept
        self.summary |= {"global_step": steps, "seconds": seconds, "sps": steps / seconds}
        self.summary["sps_steady"] = (steps - at) / (end - first) if steps > at else None
        mean, std = (float(f(scores)) if scores else None for f in (np.mean, np.std))
        sha256 = None if self.params is None else params_sha256(self.params)
        self.summary |= {"mean_score": mean, "std_score": std, "evaluation": self.evaluation, "params_sha256": sha256}
        try:
            (self.run / "summary.json").write_text(json.dumps(self.summary, indent=2))
            self.writer.close()
        except OSError as failure:  # a full disk must not hide what it made fail
            print(f"summary.json or the log could not be written: {failure}", flush=True)
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(self.status != "finished"))
        games = f"{kept['episodes']} games" + (f", mean score {mean:.2f}" if scores else "")
        pace = f"{steps} steps in {seconds:.0f} s, {steps / seconds:.0f} steps/s"
        newest, how = find_checkpoints(self.run)[-1:], "it has no checkpoint; --checkpoint-frequency 100 makes more"
        how = f"go on from update {newest[0].stem} with --resume {self.run}" if newest else how
        with suppress(OSError):  # where nobody reads it, or the disk is full
            print(f"{self.status}: {pace}, {games}; {self.run}/summary.json")
            print(*[how] * (self.status != "finished"), f"params sha256: {sha256}", sep="\n", flush=True)
        self.lock.close()


# === §13 Models, games, main [shared] =================================================================================
def play_games(args: Args, network, params, episodes: int, heard=()) -> list[float]:
    """Scores of whole games, the first of each of `episodes` environments, so that short games do not count double."""
    envs = Envs(make_env(args, env_seeds(args.seed, 2**32 - 1, 0, episodes), num_cores()))  # training's count from 0
    (act, _), key, scores = make_policy(network), jax.random.key(args.seed), {}
    for step in count():
        envs.games = []
        envs.step(jax.device_get(act(params, envs.obs, key, step).action))
        for i, (score, _) in zip(np.flatnonzero(envs.over).tolist(), envs.games, strict=True):
            scores.setdefault(i, score)
        if heard:
            sys.exit(128 + signal.SIGTERM)
        if len(scores) == episodes:
            return [scores[i] for i in range(episodes)]


def save_model(path: Path, args: Args, params: Any) -> None:
    """Write flags and parameters to one file."""
    write_file(path, {"script": Path(__file__).stem, "args": json.dumps(asdict(args)), "params": params})


def load_model(path: Path) -> tuple[Args, nn.Module, Any]:
    """Flags, network and parameters of a file that `save_model` wrote. Raises ValueError if a bit of it has changed."""
    content = unpack(path.read_bytes())
    args = Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(content["args"]).items()})
    return args, make_network(args), content["params"]


def parse_args() -> Args:
    """The command line. A comment that has a line of `Args` to itself heads a box of --help."""
    boxes, hints = [], get_type_hints(Args, include_extras=True)
    for box in re.split(r"^    # ", inspect.getsource(Args), flags=re.M)[1:]:
        title, told = box.split("\n", 1)[0], re.findall(r"^    (\w+):[^#\n]*(?:# (.+))?$", box, re.M)
        fields = [(name, Annotated[hints[name], tyro.conf.arg(help=text)], getattr(Args, name)) for name, text in told]
        boxes.append((title, make_dataclass(title, fields)))
    flags = tyro.cli(tyro.conf.OmitArgPrefixes[make_dataclass("Flags", boxes)], description=__doc__)
    return Args(**{name: value for box in vars(flags).values() for name, value in vars(box).items()})


def main() -> None:
    args, heard = parse_args(), Counter()
    if not jax.config.jax_compilation_cache_dir:  # JAX_ENABLE_COMPILATION_CACHE=0 turns it off
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/cleanba"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.jax_num_cpu_devices < 0:  # a CPU is as many devices as are asked for
        jax.config.update("jax_num_cpu_devices", 1 + max(args.actor_device_ids + args.learner_device_ids, default=0))
    # read when the backend starts, that is by the first JAX call; a flag of the user's comes later and wins
    os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops=true {os.environ.get('XLA_FLAGS', '')}".strip()

    def on_signal(number, frame):
        heard[number] += 1
        if number == signal.SIGTERM and heard[number] == 1:
            return os.write(2, b"SIGTERM: the run ends after this update, at a second one at once\n")
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.alarm(1)  # the most that a summary may take
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    code, leave = 1, os._exit  # a thread may still wait inside XLA, and Python's own way out would abort over it
    try:
        code = 128 + signal.SIGTERM if train(args, heard)["status"] == "preempted" else 0
        leave = sys.exit
    except FlagError as error:
        code, leave = 2, sys.exit
        print(f"error: {error}", file=sys.stderr)
    except (KeyboardInterrupt, SystemExit) as error:
        code = getattr(error, "code", 128 + signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    leave(code)


if __name__ == "__main__":
    main()
