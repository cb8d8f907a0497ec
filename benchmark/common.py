"""What the tools share: how they refuse what cannot work, find a script and a run, and read what a run wrote."""

import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn


def stop(flag: str, value: Any, rule: str, instead: Any) -> NoReturn:
    """End with exit code 2 and a line that says the flag, its value, the rule and a value that works."""
    print(f"error: {flag} {value}: {rule}. For example: {instead}", file=sys.stderr)
    raise SystemExit(2)


def require(ok: Any, flag: str, value: Any, rule: str, instead: Any) -> None:
    """Stop unless `ok`."""
    if not ok:
        stop(flag, value, rule, instead)


def find_run(path: Path) -> Path:
    """The directory of a run, which may be given by its name below runs."""
    return Path("runs") / path if len(path.parts) == 1 and not path.exists() else path


def say_unreadable(path: Path, error: Exception) -> None:
    """Name a file that a full disk or a crash left incomplete. Not among the output: that may be a table or a job."""
    print(f"{path} counts as missing, as it cannot be read: {error}", file=sys.stderr, flush=True)


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """What a run has written to a JSON file, with the keys `needed`; nothing if it is missing or cannot be read."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        if missing := set(needed) - content.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        say_unreadable(path, error)
        return {}
    return content


def markdown(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table."""
    lines = [header := list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def load_script(path: Path) -> ModuleType:
    """A script of the project, or a fork, as a module of its own."""
    require(path.is_file() and path.suffix == ".py", "SCRIPT", path, "must be a Python file", "cleanba_ppo_envpool.py")
    spec = spec_from_file_location(f"loaded_{path.stem}", path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    whole = hasattr(module, "load_model") and hasattr(module, "play_games")
    require(whole, "SCRIPT", path, "has no load_model and play_games", "cleanba_ppo_envpool.py")
    return module


def recording(calls: list[tuple[str, Callable]], name: str, program: Callable) -> Callable:
    """`program`, each call of which is added to `calls`: its name, and a function that repeats it."""

    def run(*inputs):
        calls.append((name, partial(program, *inputs)))
        return program(*inputs)

    return run
