"""Same seed, other result? Whether two runs have the same bits, where they part, and what they were not given alike.

    uv run benchmark/compare.py runs/NAME runs/OTHER

With every log a run writes the hash of its parameters to hashes.tsv. The updates that both runs have logged are held
against each other, as far as both have come: a run may still go on. Exit code 0: same; 1: not; 2: nothing to compare.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import find_run, require, stop

# flags that say where a run is or what is kept of it: FREE_FLAGS of the scripts, which take seconds to import
FREE_FLAGS = {"coordinator_address", "num_processes", "process_id", "distributed", "env_threads", "num_actor_threads"}
FREE_FLAGS |= {"actor_device_ids", "learner_device_ids", "peer_timeout", "actor_timeout", "exp_name", "track", "resume"}
FREE_FLAGS |= {"wandb_project_name", "wandb_entity", "log_frequency", "keep_checkpoints", "start_fresh", "save_model"}
FREE_FLAGS |= {"eval_episodes"}


@dataclass(frozen=True)
class Options:
    run_a: tyro.conf.Positional[Path]  # the directory of a run, or its name below runs
    run_b: tyro.conf.Positional[Path]  # that of the other


def read_run(flag: str, path: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """{update: hash of its parameters}; what changes the bits, or may, and what does not. Stops if it is no run."""
    path, hashes = find_run(path), {}
    try:
        record, text = json.loads((path / "run.json").read_text()), (path / "hashes.tsv").read_text()
    except (OSError, ValueError) as error:
        stop(flag, path, f"must be a run that has logged ({error})", "runs/NAME")
    for update, sha256 in re.findall(r"^(\d+)\t([0-9a-f]{64})$", text, re.MULTILINE):
        if int(update) <= next(reversed(hashes), 0):  # a resumed run writes anew what came after its checkpoint
            hashes = {number: known for number, known in hashes.items() if number < int(update)}
        hashes[int(update)] = sha256
    named = lambda free: {
        f"--{flag.replace('_', '-')}": value for flag, value in record["args"].items() if (flag in FREE_FLAGS) == free
    }
    return hashes, [named(False) | {"actors in all": record["actors"]} | record["around"], named(True)]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    (a, given_a), (b, given_b) = read_run("RUN_A", options.run_a), read_run("RUN_B", options.run_b)
    common = sorted(a.keys() & b.keys())
    require(common, "RUN_A and RUN_B", options.run_b, "have no update that both logged", "the same --log-frequency")
    agree = [update for update in common if a[update] == b[update]]
    apart = next((update for update in common if a[update] != b[update]), None)
    if apart is None:
        print(f"same: equal in all {len(common)} updates that both logged, to update {common[-1]}", end="")
        print(f" (logged so far: {max(a)} and {max(b)})" if max(a) != max(b) else "")
    else:
        last = max((update for update in agree if update < apart), default=None)
        before = "at no logged update equal" if last is None else f"last equal at update {last}"
        print(f"not the same: {before}, first different at update {apart}, of {len(common)} that both logged")
    show = lambda x: (" ".join(map(str, x)) or "(empty)") if isinstance(x, list) else str(x)
    titles = ["changes the bits, or may", "may differ without changing bits"]
    for title, one, other in zip(titles, given_a, given_b, strict=True):
        differ = [name for name in one | other if one.get(name) != other.get(name)]
        rows = [(title, "RUN_A", "RUN_B"), *((name, show(one.get(name)), show(other.get(name))) for name in differ)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in ["", *rows] if differ else []:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
        if apart and title == titles[0] and not differ:
            print(
                "\nNo flag, package or device explains it. Not in run.json: the kind of processor, XLA_FLAGS, edits of"
            )
            print("the script, and what it was before a resume.")
    sys.exit(apart is not None)


if __name__ == "__main__":
    main()
