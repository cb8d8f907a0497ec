"""What many processes cost: the bytes that a learner's reductions send, and the time that they take.

    uv run benchmark/collectives.py cleanba_ppo_envpool.py --processes 1 2 4

Starts a short run of the script in 1, 2 and 4 processes on this machine, with the same environments in all, and prints
a table. In the third update every process repeats the update's reductions alone, without the arithmetic around them:
these are the times and the bytes of the table, each of one update. So the cores limit them only as far as the copying
itself does. The bytes are those that the loopback interface sends, as the kernel counts them; divided by the size of a
gradient, the minibatches and the pairs of processes they say how often a process sends a gradient to another.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated

import jax
import tyro


@dataclass(frozen=True)
class Options:
    script: tyro.conf.Positional[Path]  # the script to measure
    flags: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # flags of the script, after --
    processes: tuple[int, ...] = (1, 2, 4)  # numbers of processes to try
    envs: int = 16  # environments in all
    repeats: int = 20  # how often the reductions of an update are repeated


def bytes_sent() -> int:
    """Bytes that the loopback interface has sent since the machine started."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def measure(script: Path, flags: list[str], repeats: int) -> None:
    """One process: run the script, and print the measurement as JSON if this is process 0."""
    spec = spec_from_file_location(script.stem, script)
    module = module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    make_total, make_update = module.make_total, module.make_update
    calls, result = [], {}

    def recording_total(devices, wait):
        total = make_total(devices, wait)
        result["total"] = total
        return lambda parts: (calls.append(parts), total(parts))[1]

    def repeating_update(*arguments):
        update, updates = make_update(*arguments), []

        def wrapped(*inputs):
            calls.clear()
            start = time.perf_counter()
            outputs = jax.block_until_ready(update(*inputs))
            updates.append(time.perf_counter() - start)
            if len(updates) == 3:
                result["update"] = updates[-1]
                repeat()
            return outputs

        return wrapped

    def repeat():
        size = [sum(leaf.nbytes for leaf in jax.tree.leaves(parts[0])) for parts in calls]
        result["bytes"], result["minibatches"] = max(size), size.count(max(size))
        again, seconds = [list(parts) for parts in calls], []
        before = bytes_sent()
        for _ in range(repeats):
            start = time.perf_counter()
            for parts in again:
                jax.block_until_ready(result["total"](parts))
            seconds.append(time.perf_counter() - start)
        result["sent"] = (bytes_sent() - before) / repeats
        result["seconds"] = statistics.median(seconds)

    module.make_total, module.make_update = recording_total, repeating_update
    sys.argv = [str(script), *flags]
    module.main()
    result.pop("total")
    print("measured: " + json.dumps(result), flush=True)


def launch(options: Options, processes: int) -> dict:
    """Measure with so many processes; the dictionary of process 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    envs = options.envs // processes
    flags = ["--local-num-envs", str(envs), "--num-actor-threads", "1", "--num-steps", "16", *options.flags]
    flags += ["--total-timesteps", str(options.envs * 16 * 3), "--coordinator-address", address]
    workers = []
    for i in range(processes):
        worker = ["--worker", str(options.script.resolve()), str(options.repeats), *flags]
        command = [sys.executable, __file__, *worker, "--num-processes", str(processes), "--process-id", str(i)]
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"NPROC": "4"}))
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit(f"a process failed: {[worker.returncode for worker in workers]}")
    return json.loads(next(line for line in outputs[0].splitlines() if line.startswith("measured: "))[10:])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        measure(Path(sys.argv[2]), sys.argv[4:], int(sys.argv[3]))
        return
    options = tyro.cli(Options, description=__doc__)
    print("| processes | gradient | minibatches | sent in all | gradients to each peer | time | share of update |")
    print("|-|-|-|-|-|-|-|")
    for processes in options.processes:
        m = launch(options, processes)
        pairs = processes * (processes - 1)
        vectors = f"{m['sent'] / m['bytes'] / m['minibatches'] / pairs:.2f}" if pairs else "none"
        row = [processes, f"{m['bytes'] / 1e6:.2f} MB", m['minibatches'], f"{m['sent'] / 1e6:.1f} MB", vectors,
               f"{1e3 * m['seconds']:.0f} ms", f"{m['seconds'] / m['update']:.1%}"]  # fmt: skip
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
