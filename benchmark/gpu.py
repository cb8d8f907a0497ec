"""The gradient of one shard, alone: its time, memory and kernels on a GPU, and a hash of its bits.

    uv run --with 'jax[cuda13]' benchmark/gpu.py 'cleanba_ppo_envpool.py --num-minibatches 1' cleanba_impala_envpool.py

Every argument is a script with its flags, and gives one line of JSON. The frames are random, and seen by the first
parameters, so two processes must give one hash. Operations are deterministic unless XLA_FLAGS says otherwise.
"""

import importlib.util
import json
import os
import re
import sys
from collections import Counter
from statistics import median
from timeit import Timer, default_timer

import jax
import numpy as np
import tyro


def milliseconds(work, calls: int = 1) -> float:
    """Of one of the `calls` that `work` makes, and waits for: the median of five."""
    number, _ = (timer := Timer(work)).autorange()
    return round(1e3 * median(timer.repeat(5, number)) / number / calls, 4)


class Frames:
    def __init__(self, shape: tuple[int, ...]):
        self.random, self.reset = np.random.default_rng(1), np.zeros(shape[0], bool)
        self.frame = lambda: self.random.integers(0, 256, shape, np.uint8)
        self.obs = self.frame()

    def step(self, action):
        self.obs = self.frame()
        return self.random.integers(-1, 2, len(action)), self.random.random(len(action)) < 0.01


def measure(path: str, *flags: str) -> dict:
    spec, key = importlib.util.spec_from_file_location(path, path), jax.random.key(1)
    script = sys.modules[path] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args = tyro.cli(script.Args, args=flags)
    sizes, network, (shape, _) = script.check_args(args), script.make_network(args), script.env_spec(args)
    params, policy = jax.jit(network.init)(key, np.zeros((1, *shape))), script.make_policy(network)
    envs = Frames((sizes.shard_envs, *shape))
    rollout = jax.device_put(script.collect(envs, policy, params, key, args.num_steps, Counter()))
    index = script.shuffle(args, key, 0, script.shuffled(args, sizes.shard_envs)[0])
    shard = (rollout, index, 0)  # what `shard_gradient` takes
    if hasattr(script, "compute_gae"):  # PPO
        estimate = jax.jit(script.compute_gae)(rollout, args.gamma, args.gae_lambda)
        sums = script.advantage_sums(estimate, index)
        shard = (rollout, estimate, index, sums, script.advantage_sums(estimate, index, sums))
    begin, pieces = default_timer(), [(m, 0) for m in range(args.num_minibatches)]
    gradient = jax.jit(script.partial(script.shard_gradient, network, args)).lower(params, *shard, (0, 0)).compile()
    took = round(default_timer() - begin, 1)
    ops = Counter(re.findall(r" (scatter|while|sort|convolution|fusion|custom-call)\(", gradient.as_text()))
    obs = Frames((args.local_num_envs, *shape)).obs
    hashes = [script.params_sha256(gradient(params, *shard, (0, 0))) for _ in range(5)]
    each = lambda: jax.block_until_ready([gradient(params, *shard, at) for at in pieces])
    figures = {"gradient_ms": milliseconds(each, len(pieces)), "sha256": hashes[0][:16], "of 5": len({*hashes})}
    figures |= {"inference_ms": milliseconds(lambda: jax.device_get(policy[0](params, obs, key, 0))), "compile_s": took}
    return figures | {"temporary_mb": gradient.memory_analysis().temp_size_in_bytes / 1e6} | ops


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops=true {os.environ.get('XLA_FLAGS', '')}"
    for setting in sys.argv[1:]:
        print(json.dumps({"setting": setting, "xla": os.environ["XLA_FLAGS"]} | measure(*setting.split())), flush=True)
