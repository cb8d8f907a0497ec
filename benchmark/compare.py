"""Same seed, different result? Say whether two runs have the same bits, where they diverge, and which settings differ.

    uv run benchmark/compare.py runs/NAME runs/OTHER

At every log a run writes the hash of its parameters to hashes.tsv. This tool compares the updates that both runs have
logged so far; a run may still be going on. Exit code 0: same; 1: different; 2: nothing to compare.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import find_run, read_json, require, stop

LONG = 60  # characters that are shown whole


@dataclass(frozen=True)
class Options:
    run_a: tyro.conf.Positional[Path]  # the directory of a run, or its name below runs
    run_b: tyro.conf.Positional[Path]  # that of the other


def read_hashes(flag: str, run: Path) -> dict[int, str]:
    """{update: hash of its parameters}. Stops if the run has not logged."""
    try:
        text = (run / "hashes.tsv").read_text()
    except (OSError, ValueError) as error:
        stop(flag, run, f"must be a run that has logged ({error})", "runs/NAME")
    hashes = {}
    for update, sha256 in re.findall(r"^(\d+)\t([0-9a-f]{64})$", text, re.MULTILINE):
        if int(update) <= next(reversed(hashes), 0):  # a resumed run writes anew what came after its checkpoint
            hashes = {number: known for number, known in hashes.items() if number < int(update)}
        hashes[int(update)] = sha256
    return hashes


def say_where_they_part(a: dict[int, str], b: dict[int, str], common: list[int]) -> bool:
    """Print whether the hashes of two runs agree in the updates `common`; returns it."""
    agree = [update for update in common if a[update] == b[update]]
    apart = next((update for update in common if a[update] != b[update]), None)
    if apart is None:
        so_far = f" (logged so far: {max(a)} and {max(b)})" if max(a) != max(b) else ""
        print(f"same: equal in all {len(common)} updates that both logged, to update {common[-1]}{so_far}")
        return True
    last = max((update for update in agree if update < apart), default=None)
    before = "at no logged update equal" if last is None else f"last equal at update {last}"
    print(f"not the same: {before}, first different at update {apart}, of {len(common)} that both logged")
    return False


def show(given: dict[str, Any], name: str) -> str:
    """The value of a flag or a setting, as it was given to a run."""
    if name not in given:
        return "(not set)"
    value = given[name]
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text or "(empty)"


def shorten(text: str, other: str) -> str:
    """A long text, as the instruction set of a processor is, without the words that another has too."""
    own = [word for word in text.split() if word not in other.split()]
    return " ".join(["...", *own]) if len(text) > LONG else text


def show_differences(title: str, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Print a table of what two runs were not given alike; returns whether there is anything."""
    differing = [name for name in a | b if a.get(name) != b.get(name)]
    if differing:
        rows = [(title, "RUN_A", "RUN_B")]
        for name in differing:
            one, other = show(a, name), show(b, name)
            rows.append((name, shorten(one, other), shorten(other, one)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print()
        for row in rows:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
    return bool(differing)


def explain(a: dict[str, Any], b: dict[str, Any], same: bool) -> None:
    """Print what two runs, given by their records, were not given alike."""

    def decides(flag: str, record: dict[str, Any]) -> bool:
        return flag in record["hyper_parameters"] or flag == "load_model"

    def flags(record: dict[str, Any], deciding: bool) -> dict[str, Any]:
        chosen = {flag: value for flag, value in record["args"].items() if decides(flag, record) == deciding}
        return {f"--{flag.replace('_', '-')}": value for flag, value in chosen.items()}

    def bits(record: dict[str, Any]) -> dict[str, Any]:
        return flags(record, True) | {"actors in all": record["hyper_parameters"]["actors"]} | record["platform"]

    explained = show_differences("changes the bits, or may", bits(a), bits(b))
    if not same and not explained:
        print("\nNo flag, package, device or setting explains it. Not in run.json: edits of the script, and what a run")
        print("had before it was resumed.")
    show_differences("may differ without changing bits", flags(a, False), flags(b, False))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    runs = find_run(options.run_a), find_run(options.run_b)
    a, b = read_hashes("RUN_A", runs[0]), read_hashes("RUN_B", runs[1])
    common = sorted(a.keys() & b.keys())
    require(common, "RUN_A and RUN_B", options.run_b, "have no update that both logged", "the same --log-frequency")
    same = say_where_they_part(a, b, common)
    records = [read_json(run / "run.json", "args", "hyper_parameters", "platform") for run in runs]
    if all(records):
        explain(*records, same)
    else:
        print("\nWhat they were given is not compared: that takes run.json of both.")
    sys.exit(not same)


if __name__ == "__main__":
    main()
