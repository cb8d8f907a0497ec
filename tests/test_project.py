"""pyproject.toml agrees with the scripts, and importing a script starts nothing."""

import re
import subprocess
import sys
import tomllib

import conftest

PYPROJECT = tomllib.loads((conftest.ROOT / "pyproject.toml").read_text())


def header(script) -> dict:
    text = (conftest.ROOT / f"{script.__name__}.py").read_text()
    block = re.search(r"^# /// script\n(.*?)^# ///$", text, re.MULTILINE | re.DOTALL).group(1)
    return tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))


def test_pins_agree(script):
    dependencies = header(script)["dependencies"]
    assert dependencies == PYPROJECT["project"]["dependencies"]
    pin = r"[\w-]+==[\d.]+(; python_version (<|>=) '3\.12')?"
    assert all(re.fullmatch(pin, line) for line in dependencies)
    cuda = [line.replace("jax", "jax[cuda13]") for line in dependencies if line.startswith("jax==")]
    assert PYPROJECT["project"]["optional-dependencies"]["cuda"] == cuda


def test_python_versions_agree(script):
    assert header(script)["requires-python"] == PYPROJECT["project"]["requires-python"]


@conftest.one_fast
def test_importing_a_script_starts_nothing(script):
    """It starts no thread or backend, writes no file, and does not load Matplotlib, as EnvPool's other games would."""
    code = (
        f"import sys; sys.path.insert(0, {str(conftest.ROOT / 'tests')!r}); import conftest, threading, os\n"
        f"conftest.load({script.__name__!r})\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized(), threading.active_count(), os.listdir('.'))\n"
        "print('matplotlib' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False 1 []\nFalse", result.stderr
