"""Fixtures that all tests share. The fixture `script` runs a test on every script."""

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

# Every machine shows four devices, and the size of XLA's thread pool must not depend on the number of cores. Workers of
# the suite and the processes that they start share a cache, so each program is compiled once.
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
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("cleanba_*.py"))
SMALL = ["--img-size", "24", "--channels", "4", "8", "--local-num-envs", "8", "--num-steps", "16"]
sys.path.append(str(ROOT / "benchmark"))  # the tools there import one another


def load(name: str, path: Path | None = None):
    """Import a script, a tool or the file at `path`, as a module of its own."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path or ROOT / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def fast_on(*fast: str):
    """A mark for long tests. Scripts whose names end with `fast` run by default, the rest in the slow suite."""
    names = [name if name.endswith(fast) else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
    return pytest.mark.parametrize("script", names, indirect=True)


one_fast = fast_on("impala_envpool")  # for code that is identical in all scripts
ppo_fast, wrapper_fast = fast_on("ppo_envpool"), fast_on("atari_wrapper")  # for what is harder in that script
algorithms_fast = fast_on("impala_envpool", "ppo_envpool")


@pytest.fixture(params=SCRIPTS)
def script(request):
    return load(request.param)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):  # the main process, which ends after the workers
        shutil.rmtree(os.environ["CLEANBA_TEST_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Give each test a current directory of its own, because runs write below it."""
    monkeypatch.chdir(tmp_path)


def wait_for_line(process, text: str) -> str:
    """Return the first line of the process's output that contains `text`."""
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
        """Start a line of bash in which $PYTHON is this Python."""
        return self.open(["bash", "-c", line], {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"})

    def start_patched(self, script, patch: str, *flags: str, pass_fds=(), **environment: str) -> subprocess.Popen:
        """Like `start`, but first execute the code `patch`, which may change `script`."""
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest, os, time\n"
        code += f"script = conftest.load({script.__name__!r})\n{patch}\n"
        code += f"sys.argv = ['script', *{flags!r}]; script.main()"
        environment = {"PYTHONUNBUFFERED": "1"} | environment
        return self.open([sys.executable, "-c", code], environment, pass_fds=pass_fds)

    def run(self, script, *flags: str, **environment: str) -> dict:
        """Start a run that must finish, and return its summary."""
        return self.summary(self.start(script, *flags, **environment))

    def summary(self, process: subprocess.Popen) -> dict:
        """Wait for a process that must finish, and return its summary."""
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, out + err
        *_, gist, last = out.strip().splitlines()
        summary = json.loads((self.directory / gist.split("; ")[1]).read_text())
        assert last == f"params sha256: {summary['params_sha256']}"
        assert summary["status"] == "finished"
        return summary

    def start_processes(self, script, *flags: str, differing={}, environments={}, count=2, ranks=None) -> list:  # noqa: B006
        """Start `count` processes of one run on this machine, or only those of `ranks`.

        differing, environments: {rank of a process: its additional flags, variables}.
        """
        common = [*flags, "--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", str(count)]
        own = lambda i: ["--process-id", str(i), *differing.get(i, [])]
        environment = lambda i: {"PYTHONUNBUFFERED": "1"} | environments.get(i, {})
        return [self.start(script, *common, *own(i), **environment(i)) for i in ranks or range(count)]

    def run_all(self, script, *runs: list[str]) -> list[dict]:
        """Run the script with each list of flags and return the summaries."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda flags: self.run(script, *flags), runs))


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


# Stands in for every program that the documents and shell scripts call, and records its arguments. As sbatch it also
# runs the script, as SLURM would run index $INDEX of an array, and records how many tasks the header asks for.
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
    """Runs a text in a shell and returns [words, source, tasks, GPUs, platforms] of every program called."""
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
    """Calls benchmark/run.py and returns its output. For --dry-run and --slurm, which start no run."""
    run = load("benchmark/run")

    def type_sweep(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *flags])
        run.main()
        return capsys.readouterr().out

    return type_sweep


# Flags of a run of four updates with a checkpoint every two updates, and what a longer run changes.
TINY = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8,
            num_minibatches=1, log_frequency=1, checkpoint_frequency=2, total_timesteps=4 * 32)  # fmt: skip
LONGER = dict(total_timesteps=6 * 32)


class PowerCut(Exception):
    pass


def train_until(script, monkeypatch, update, **flags):
    """Start a run named "it" and end it without warning after `update`."""
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
    """(script, flags) -> the hash of the uninterrupted run, trained once."""
    return cache(lambda script, **flags: script.train(script.Args(**TINY | flags))["params_sha256"])


class CountingPool:
    """Stands in for an EnvPool pool: the observation encodes (env, t), the reward is t, episodes last 3 + env steps.

    Like EnvPool, it resets on the step after an episode's end and ignores the action. Episodes of odd environments end
    by a time limit. `log` holds (t of the observation acted on, action) for every step of environment 0.
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


def write_run(logs, *, game="Pong-v5", exp="ppo", seed=1, name=None, purge_step=None, impala=False, **summary):
    """Write a run's directory below runs. logs: [(step, seconds, mean return or None, finished games)]."""
    directory = Path("runs") / (name or f"{game}__{exp}__{seed}__20261124-120000-1")
    flags = dict(exp_name=exp, env_id=game, seed=seed, total_timesteps=1000) | ({} if impala else dict(clip_coef=0.1))
    writer = EventFileWriter(str(directory), filename_suffix=f".{purge_step or 0:09}")
    (directory / "run.json").write_text(json.dumps({"args": flags}))
    writer.add_event(Event(step=purge_step or 0, session_log=SessionLog(status=SessionLog.START)))
    for step, seconds, score, games in logs:
        scalars = {"charts/SPS": step / seconds, "stats/episodes": games}
        scalars |= {} if score is None else {"charts/avg_episodic_return": score}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer.add_event(Event(step=step, summary=Summary(value=values)))
    writer.close()
    if summary:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory
