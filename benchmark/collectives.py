"""What many processes cost: the bytes that a learner's reductions send, and the time that they take.

    uv run benchmark/collectives.py cleanba_ppo_envpool.py --processes 1 2 4 8

Runs three updates of the script in so many processes on this machine, with the same environments in all, then repeats
the reductions of the last one alone: so the cores limit them only as far as copying does. Bytes are what the loopback
interface sends, as the kernel counts it, so nothing else may use it. To add up a gradient, n processes must send
2 (n - 1) of its size in all; a minibatch should send at most 1.05 of that.
"""

import multiprocessing
import os
import socket
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import tyro
from common import load_script, recording


@dataclass(frozen=True)
class Options:
    script: tyro.conf.Positional[Path]  # the script to measure
    flags: tyro.conf.Positional[tuple[str, ...]] = ()  # flags of the script, after --
    processes: tuple[int, ...] = (1, 2, 4, 8)  # numbers of processes to try
    envs: int = 32  # environments in all
    repeats: int = 20  # how often the reductions of an update are repeated


def measure(options: Options, n: int, port: int, rank: int) -> tuple[float, ...]:
    """One of n processes: bytes of a gradient, minibatches, bytes sent in all, seconds of reductions and of update."""
    script = load_script(options.script.resolve())
    make_sum_over_shards = script.make_sum_over_shards
    make_update = script.make_update
    calls = []
    seconds = []

    def timed(function, *inputs):
        calls.clear()
        start = time.perf_counter()
        outputs = jax.block_until_ready(function(*inputs))
        seconds.append(time.perf_counter() - start)
        return outputs

    def make_recording_sum(devices):
        return recording(calls, "sum_over_shards", make_sum_over_shards(devices))

    def make_timed_update(*setting):
        return partial(timed, make_update(*setting))

    script.make_sum_over_shards = make_recording_sum
    script.make_update = make_timed_update
    size = dict(local_num_envs=options.envs // n, num_steps=16, total_timesteps=48 * options.envs, num_shards=8)
    place = dict(num_actor_threads=1, coordinator_address=f"127.0.0.1:{port}", num_processes=n, process_id=rank)
    os.dup2(2, 1)  # the table has the standard output for itself
    with TemporaryDirectory() as runs, chdir(runs):
        try:
            script.train(tyro.cli(script.Args, args=options.flags, default=script.Args(**size, **place)))
        except script.FlagError as error:
            sys.exit(f"error: {error}")
    last_calls = calls.copy()
    update = seconds[-1]

    def repeat_sums():
        for _, program in last_calls:
            jax.block_until_ready(program())

    before = bytes_sent(script)
    for _ in range(options.repeats):
        timed(repeat_sums)
    sent = (bytes_sent(script) - before) / options.repeats
    jax.distributed.shutdown()  # which a worker of a pool would leave out
    sizes = []
    for _, program in last_calls:
        (parts,) = program.args
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(parts[0])))
    gradient = max(sizes)
    return gradient, sizes.count(gradient), sent, statistics.median(seconds[-options.repeats :]), update


def bytes_sent(script) -> int:
    """What the loopback interface has sent, read while all processes wait for it: no gradient is on its way."""
    loopback = Path("/sys/class/net/lo/statistics/tx_bytes")
    script.share("here")
    return script.share(int(loopback.read_text()))[0]


def main() -> None:
    os.environ["NPROC"] = "4"
    options = tyro.cli(Options, description=__doc__)
    print("| processes | gradient | minibatches | sent in all | of 2 (n - 1) gradients | time | share of update |")
    print("|-|-|-|-|-|-|-|")
    for n in options.processes:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with ProcessPoolExecutor(n, multiprocessing.get_context("spawn")) as pool:
            runs = [pool.submit(measure, options, n, port, rank) for rank in range(n)]
        size, number, sent, seconds, update = runs[0].result()
        multiple = "none"
        if n > 1:
            multiple = f"{sent / number / size / (2 * n - 2):.3f}"
        cells = [str(n), f"{size / 1e6:.2f} MB", str(number), f"{sent / 1e6:.1f} MB", multiple]
        cells += [f"{1e3 * seconds:.0f} ms", f"{seconds / update:.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
