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
from common import load_script


@dataclass(frozen=True)
class Options:
    script: tyro.conf.Positional[Path]  # the script to measure
    flags: tyro.conf.Positional[tuple[str, ...]] = ()  # flags of the script, after --
    processes: tuple[int, ...] = (1, 2, 4, 8)  # numbers of processes to try
    envs: int = 32  # environments in all
    repeats: int = 20  # how often the reductions of an update are repeated


def measure(options: Options, n: int, port: int, rank: int) -> tuple[float, ...]:
    """One of n processes: bytes of a gradient, minibatches, bytes sent in all, seconds of reductions and of update."""
    script, calls, seconds = load_script(options.script.resolve()), [], []

    def timed(function, *inputs):
        calls.clear()
        start = time.perf_counter()
        outputs = jax.block_until_ready(function(*inputs))
        seconds.append(time.perf_counter() - start)
        return outputs

    def recording_sum(devices, make=script.make_sum_over_shards):
        total = make(devices)
        return lambda parts: calls.append((total, parts)) or total(parts)

    loopback = Path("/sys/class/net/lo/statistics/tx_bytes")  # read while all wait for it: no gradient is on its way
    bytes_sent = lambda: script.share("here") and script.share(int(loopback.read_text()))[0]
    script.make_sum_over_shards = recording_sum
    script.make_update = lambda *arguments, make=script.make_update: partial(timed, make(*arguments))
    size = dict(local_num_envs=options.envs // n, num_steps=16, total_timesteps=48 * options.envs, num_shards=8)
    place = dict(num_actor_threads=1, coordinator_address=f"127.0.0.1:{port}", num_processes=n, process_id=rank)
    os.dup2(2, 1)  # the table has the standard output for itself
    with TemporaryDirectory() as runs, chdir(runs):
        try:
            script.train(tyro.cli(script.Args, args=options.flags, default=script.Args(**size, **place)))
        except script.FlagError as error:
            sys.exit(f"error: {error}")
    last, update, before = calls.copy(), seconds[-1], bytes_sent()
    sizes = [sum(x.nbytes for x in jax.tree.leaves(parts[0])) for _, parts in last]
    for _ in range(options.repeats):
        timed(lambda: [jax.block_until_ready(total(parts)) for total, parts in last])
    sent = (bytes_sent() - before) / options.repeats
    jax.distributed.shutdown()  # which a worker of a pool would leave out
    return max(sizes), sizes.count(max(sizes)), sent, statistics.median(seconds[-options.repeats :]), update


def main() -> None:
    options, os.environ["NPROC"] = tyro.cli(Options, description=__doc__), "4"
    print("| processes | gradient | minibatches | sent in all | of 2 (n - 1) gradients | time | share of update |")
    print("|-|-|-|-|-|-|-|")
    for n in options.processes:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with ProcessPoolExecutor(n, multiprocessing.get_context("spawn")) as pool:
            runs = [pool.submit(measure, options, n, port, rank) for rank in range(n)]
        size, number, sent, seconds, update = runs[0].result()
        multiple = f"{sent / number / size / (2 * n - 2):.3f}" if n > 1 else "none"
        cells = [n, f"{size / 1e6:.2f} MB", number, f"{sent / 1e6:.1f} MB", multiple, f"{1e3 * seconds:.0f} ms"]
        print("| " + " | ".join(map(str, [*cells, f"{seconds / update:.1%}"])) + " |", flush=True)


if __name__ == "__main__":
    main()
