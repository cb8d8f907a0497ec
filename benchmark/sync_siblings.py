"""Copy what the three scripts have in common from the PPO file outward.

    python benchmark/sync_siblings.py

Then read `git diff`. Shared are the header with the pins, the imports, and every section whose title carries [shared].
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "cleanba_ppo_envpool.py"
SIBLINGS = [ROOT / "cleanba_impala_envpool.py", ROOT / "cleanba_ppo_envpool_impala_atari_wrapper.py"]


def split(text: str) -> dict[str, str]:
    """Title -> text of every part: "header", "docstring", "imports", then the sections by their title lines."""
    head, *sections = re.split(r"^(?=# === §)", text, flags=re.MULTILINE)
    header, docstring, imports = re.fullmatch(r'(.*?# ///\n)(""".*?"""\n)(.*)', head, re.DOTALL).groups()
    parts = {"header": header, "docstring": docstring, "imports": imports}
    for section in sections:
        title, _ = section.split("\n", 1)
        parts[title] = section
    return parts


def shared(title: str) -> bool:
    return title in ("header", "imports") or "[shared]" in title


def synced(text: str, source: dict[str, str]) -> str:
    """`text` with the shared parts of `source`."""
    return "".join(source[title] if shared(title) else part for title, part in split(text).items())


def main() -> None:
    source = split(SOURCE.read_text())
    for path in SIBLINGS:
        text = path.read_text()
        path.write_text(synced(text, source))


if __name__ == "__main__":
    main()
