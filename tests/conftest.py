"""Fixtures that every test shares. A behaviour is tested on all scripts through the fixture `script`."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Four devices on any machine; the size of XLA's thread pool must not depend on the number of cores. Each program is
# compiled once for the whole suite: its workers and the processes that they start.
os.environ["CLEANBA_TEST_CACHE"] = os.environ.get("CLEANBA_TEST_CACHE") or tempfile.mkdtemp(prefix="cleanba-xla-")
os.environ |= {
    "NPROC": "4",
    "JAX_NUM_CPU_DEVICES": "4",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": os.environ["CLEANBA_TEST_CACHE"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("cleanba_*.py"))
SMALL = ["--img-size", "24", "--channels", "4", "8", "--local-num-envs", "8", "--num-steps", "16"]
sys.path.append(str(ROOT / "benchmark"))  # where its tools import one another


def load(name: str):
    """Import a script by its path, as a module of its own."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def fast_on(*fast: str):
    """A mark for long tests: of the scripts whose name ends so by default, of the others in the slow suite."""
    names = [name if name.endswith(fast) else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
    return pytest.mark.parametrize("script", names, indirect=True)


one_fast = fast_on("impala_envpool")  # for what is the same bytes in all
ppo_fast, wrapper_fast = fast_on("ppo_envpool"), fast_on("atari_wrapper")  # where theirs is the harder part
algorithms_fast = fast_on("impala_envpool", "ppo_envpool")


@pytest.fixture(params=SCRIPTS)
def script(request):
    return load(request.param)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):  # the workers have ended
        shutil.rmtree(os.environ["CLEANBA_TEST_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs write below the current directory."""
    monkeypatch.chdir(tmp_path)


def wait_for_line(process, text: str) -> str:
    """The first line of its output that has `text`."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"no line with {text!r}: {process.stderr.read()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launcher:
    """Runs scripts in processes of their own, two at a time."""

    def __init__(self, directory: Path):
        self.directory = directory

    def open(self, command: list[str], environment: dict[str, str], **options) -> subprocess.Popen:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, cwd=self.directory, env=os.environ | environment, **pipes, **options)

    def start(self, script, *flags: str, **environment: str) -> subprocess.Popen:
        return self.open([sys.executable, str(ROOT / f"{script.__name__}.py"), *flags], environment)

    def start_shell(self, line: str) -> subprocess.Popen:
        """A line of bash, in which $PYTHON is this Python."""
        return self.open(["bash", "-c", line], {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"})

    def start_patched(self, script, patch: str, *flags: str, pass_fds=(), **environment: str) -> subprocess.Popen:
        """As `start`, after the code `patch`, which may change `script`."""
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest, os, time\n"
        code += f"script = conftest.load({script.__name__!r})\n{patch}\n"
        code += f"sys.argv = ['script', *{flags!r}]; script.main()"
        environment = {"PYTHONUNBUFFERED": "1"} | environment
        return self.open([sys.executable, "-c", code], environment, pass_fds=pass_fds)

    def run(self, script, *flags: str, **environment: str) -> dict:
        """The summary of a run that must finish."""
        return self.summary(self.start(script, *flags, **environment))

    def summary(self, process: subprocess.Popen) -> dict:
        """The summary of a process that must finish."""
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, out + err
        *_, gist, last = out.strip().splitlines()
        summary = json.loads((self.directory / gist.split("; ")[1]).read_text())
        assert last == f"params sha256: {summary['params_sha256']}"
        assert summary["status"] == "finished"
        return summary

    def start_processes(self, script, *flags: str, differing={}, environments={}, count=2, ranks=None) -> list:  # noqa: B006
        """`count` processes of one run on this machine, or those of `ranks`.

        differing, environments: {number of a process: its own further flags, variables}.
        """
        common = [*flags, "--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", str(count)]
        own = lambda i: ["--process-id", str(i), *differing.get(i, [])]
        environment = lambda i: {"PYTHONUNBUFFERED": "1"} | environments.get(i, {})
        return [self.start(script, *common, *own(i), **environment(i)) for i in ranks or range(count)]

    def run_all(self, script, *runs: list[str]) -> list[dict]:
        """Summaries of runs given by their flags."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda flags: self.run(script, *flags), runs))


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


class CountingPool:
    """Stands in for an EnvPool pool: the observation encodes (env, t), the reward is t, episodes last 3 + env steps.

    Like EnvPool it resets on the step after an episode's end, ignoring the action; episodes of odd environments end by
    a time limit. `log` holds (t of the observation acted on, action) of every step of environment 0.
    """

    def __init__(self, num_envs: int, size: int = 8):
        self.num_envs, self.size = num_envs, size
        self.lengths = 3 + np.arange(num_envs)
        self.log = []

    def observe(self):
        obs = np.zeros((self.num_envs, 4, self.size, self.size), np.uint8)
        obs[:, 0, 0, 0], obs[:, 0, 0, 1] = np.arange(self.num_envs), self.t
        return obs

    def info(self, reward, terminated):
        return {"reward": 10 * reward, "terminated": terminated.astype(np.int32)}

    def reset(self):
        self.t, self.over = np.zeros(self.num_envs, int), np.zeros(self.num_envs, bool)
        return self.observe(), self.info(np.zeros(self.num_envs), self.over)

    def step(self, action):
        self.log.append((int(self.t[0]), int(action[0])))
        reward = np.where(self.over, 0, self.t).astype(np.float32)
        self.t = np.where(self.over, 0, self.t + 1)
        self.over = ~self.over & (self.t == self.lengths)
        odd = np.arange(self.num_envs) % 2 == 1
        terminated, truncated = self.over & ~odd, self.over & odd
        return self.observe(), reward, terminated, truncated, self.info(reward, terminated)


@pytest.fixture
def counting_pool():
    return CountingPool
