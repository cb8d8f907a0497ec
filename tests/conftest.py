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
from functools import cache
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


def load(name: str, path: Path | None = None):
    """Import a script, a tool or the file at `path`, as a module of its own."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path or ROOT / f"{name}.py")
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


# Stands in for every program that the documents and shell scripts call. It writes down what it is given; sbatch runs
# its script as SLURM would run index $INDEX of an array, and notes how many tasks the header asks for.
STAND_IN = f"""#!{sys.executable} -SI
import json, os, re, subprocess, sys

tool, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["RECORDS"], "a") as records:
    place = [os.environ.get(name) for name in ("SOURCE", "TASKS", "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS")]
    records.write(json.dumps([[tool, *words], *place]) + "\\n")
if tool == "sbatch":
    while words and words[0].startswith("-"):
        words.pop(0)
    text = open(words[0]).read() if words else sys.stdin.read()
    sizes = re.findall("^#SBATCH --(nodes|ntasks|ntasks-per-node)=([0-9]+)", text, re.MULTILINE)
    tasks = 1
    for _, size in sizes:
        tasks *= int(size)
    index = os.environ.get("INDEX", "0")
    job = dict(SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="10", SLURM_ARRAY_TASK_ID=index, TASKS=str(tasks))
    sys.exit(subprocess.run(["bash", "-s", *words[1:]], input=text, text=True, env=os.environ | job).returncode)
sys.exit(int(os.environ.get("EXIT_" + tool, 0)))
"""


@pytest.fixture
def type_in(tmp_path, monkeypatch):
    """Types a text in a shell; returns [words, source, tasks, GPUs, platforms] of every program that it called."""
    tools, records = tmp_path / "tools", tmp_path / "records"
    tools.mkdir()
    for name in ["pip", "uv", "python", "tensorboard", "sbatch", "srun", "scontrol"]:
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    for name in ["benchmark", *(f"{script}.py" for script in SCRIPTS)]:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORDS", str(records))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def type_in(text: str, source: str = "", code: int = 0) -> list[list]:
        records.write_text("")
        options = dict(input=text + "\nwait", text=True, env=os.environ | {"SOURCE": source}, timeout=60)
        result = subprocess.run(["bash", "-e"], **options)
        assert result.returncode == code, source
        return [json.loads(line) for line in records.read_text().splitlines()]

    return type_in


@pytest.fixture
def type_sweep(monkeypatch, capsys):
    """Flags of benchmark/run.py -> what it prints; for --dry-run and --slurm, which run nothing."""
    run = load("benchmark/run")

    def type_sweep(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *flags])
        run.main()
        return capsys.readouterr().out

    return type_sweep


# A run of four updates with a checkpoint after every second, and what a longer one has.
TINY = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8,
            num_minibatches=1, log_frequency=1, checkpoint_frequency=2, total_timesteps=4 * 32)  # fmt: skip
LONGER = dict(total_timesteps=6 * 32)


class PowerCut(Exception):
    pass


def train_until(script, monkeypatch, update, **flags):
    """Start a run of the name "it" and end it without warning after `update`."""
    log = script.Report.update

    def cut(report, *args):
        log(report, *args)
        if report.updates == update:
            raise PowerCut

    args = script.Args(**TINY | flags, resume="it", start_fresh=True)
    with monkeypatch.context() as patch:
        patch.setattr(script.Report, "update", cut)
        with pytest.raises(PowerCut):
            script.train(args)


def resume(script, **flags):
    return script.train(script.Args(**TINY | flags, resume="it"))


@pytest.fixture(scope="module")
def whole():
    """(script, flags) -> the hash of the uninterrupted run, played once."""
    return cache(lambda script, **flags: script.train(script.Args(**TINY | flags))["params_sha256"])


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
