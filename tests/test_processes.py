"""Several processes form one run, on one machine or on two connected ones; what a user sees when one fails."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import jax
import pytest
from conftest import wait_for_line

ENDLESS = [*conftest.SMALL, "--num-actor-threads", "1", "--log-frequency", "1", "--peer-timeout", "10"]


class Store:
    """A key-value store for threads, like that of the coordination service. `calls` counts the requests."""

    def __init__(self):
        self.values, self.changed, self.calls = {}, threading.Condition(), 0

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key], self.calls = value, self.calls + 1
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            self.calls += 1
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]

    def key_value_delete(self, prefix):
        with self.changed:
            self.calls += 1
            for key in [key for key in self.values if key.startswith(f"{prefix}/")]:
                del self.values[key]


def test_everyone_gets_what_everyone_said(script, monkeypatch):
    """Three threads stand for processes, and one is late. A round takes 3 n calls, and the store does not grow."""
    store, mine, rounds = Store(), threading.local(), 5
    state = type("State", (), {"process_id": property(lambda self: mine.rank), "num_processes": 3, "client": store})()
    counters = [iter(range(1, rounds + 1)) for _ in range(3)]
    monkeypatch.setattr(script, "global_state", state)
    monkeypatch.setattr(script, "next", lambda _: next(counters[mine.rank]), raising=False)  # a counter for each thread
    heard = [[], [], []]

    def process(rank):
        mine.rank = rank
        for i in range(rounds):
            if rank == 2 and i == 1:
                time.sleep(1.2)  # longer than one wait for a key
            heard[rank].append(script.share([i, {"score": 0.1 * rank}]))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    said = [[[i, {"score": 0.1 * rank}] for rank in range(3)] for i in range(rounds)]
    assert heard == [said] * 3
    assert store.calls <= rounds * 3 * 3 + 6  # plus retries for the late one
    assert len(store.values) == 3  # values of the last round


def test_a_process_alone_shares_with_itself(script):
    assert script.share({"a": 1}) == [{"a": 1}]


@conftest.one_fast
def test_two_processes_are_one_run(script, launcher):
    """They have the same bits and scores as two threads of one process. Only process 0 writes."""
    flags = [*conftest.SMALL, "--total-timesteps", "512"]
    writer, silent = launcher.start_processes(script, *flags, "--num-actor-threads", "1")
    summary, (out, err) = launcher.summary(writer), silent.communicate(timeout=60)
    assert silent.returncode == 0, err
    assert "steps/s" not in out
    alone = launcher.run(script, *flags, "--num-actor-threads", "2")
    for name in ("params_sha256", "episodes", "mean_score", "global_step"):
        assert summary[name] == alone[name]
    assert (summary["processes"], alone["processes"]) == (2, 1)
    assert len(list((launcher.directory / "runs").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--no-concurrency", "--concurrency"])
def test_partitions(script, launcher, mode):
    """Sixteen environments, split 2 x 8 or 4 x 4, give the same bits in processes and in threads."""
    flags = [*conftest.SMALL, mode, "--total-timesteps", "2048"]
    for count, envs in ((2, "8"), (4, "4")):
        one = [*flags, "--local-num-envs", envs]
        processes = launcher.start_processes(script, *one, "--num-actor-threads", "1", count=count)
        summary = launcher.summary(processes[0])
        assert [process.wait(60) for process in processes] == [0] * count
        alone = launcher.run(script, *one, "--num-actor-threads", str(count), "--learner-device-ids", "0", "1")
        assert summary["params_sha256"] == alone["params_sha256"]
        assert (summary["episodes"], summary["mean_score"]) == (alone["episodes"], alone["mean_score"])


def end(process, code, seconds, since):
    """Wait for a process that must end, and return its stdout and stderr."""
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - since < seconds
    assert process.returncode == code if code else process.returncode not in (0, None)
    return out, err


def all_wait(processes):
    """Return the time at which all processes have imported and wait for one another."""
    for process in processes:
        wait_for_line(process, "waiting")
    return time.monotonic()


@conftest.one_fast
def test_what_differs_is_named_by_all(script, launcher):
    """All processes name a differing flag or size of XLA's thread pool. Nothing is left on disk."""
    common = [*conftest.SMALL, "--num-actor-threads", "1", "--peer-timeout", "30"]
    processes = launcher.start_processes(script, *common, differing={1: ["--seed", "2"]})
    start = all_wait(processes)
    for process in processes:
        _, err = end(process, 2, 15, start)
        assert err == "error: --seed 2: process 1 differs from process 0, which has 1. For example: --seed 1\n"
    processes = launcher.start_processes(script, *common, environments={1: {"NPROC": "5"}})
    start = all_wait(processes)
    for process in processes:
        _, err = end(process, 2, 15, start)
        assert err.startswith("error: threads of XLA (NPROC) 5: process 1 differs from process 0, which has 4.")
    assert not (launcher.directory / "runs").exists()


@conftest.one_fast
@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"JAX_ENABLE_X64": "1"}, "jax_enable_x64 True: process 1 differs from process 0, which has False."),
        pytest.param(
            {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2"},
            "XLA_FLAGS --xla_gpu_deterministic_ops=true --xla_cpu_max_isa=SSE4_2: process 1 differs",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_settings_that_differ_are_named_by_all(script, launcher, environment, told):
    """These settings decide the bits: the processes would start from the same parameters and diverge."""
    flags = [*conftest.SMALL, "--num-actor-threads", "1", "--peer-timeout", "30"]
    processes = launcher.start_processes(script, *flags, environments={1: environment})
    start = all_wait(processes)
    for process in processes:
        _, err = end(process, 2, 15, start)
        assert err.startswith(f"error: {told}")
        assert err.count("\n") == 1


def test_a_processor_is_described(script, monkeypatch):
    """The description has the model and the vector instructions that XLA compiles for, and nothing that varies."""
    x86 = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon\ncpu MHz\t: 9\nflags\t: fpu avx2 fma\n"
    arm = "processor\t: 0\nBogoMIPS\t: 1\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    for text, described in (
        (x86, {"processor": "6, 85, Xeon", "instruction set": "avx2 fma"}),
        (arm, {"processor": "0x41, 0xd40", "instruction set": "asimd sve"}),
    ):
        monkeypatch.setattr(script.Path, "read_text", lambda path, text=text: f"{text}\n{text}")
        assert script.describe_processor() == described


@conftest.one_fast
@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({0: ["--resume", "nothing-here"]}, "--resume nothing-here: no checkpoint in runs/nothing-here can be read."),
        pytest.param({1: ["--num-shards", "3"]}, "--num-shards 3: must divide the ", marks=pytest.mark.slow),
        pytest.param({1: ["--load-model", "gone"]}, "--load-model gone: ", marks=pytest.mark.slow),
    ],
)
def test_an_error_that_one_process_finds_ends_all(script, launcher, own, told):
    """All end with its error line and its exit code, and without a C++ stack trace."""
    flags = [*conftest.SMALL, "--num-actor-threads", "1", "--peer-timeout", "30"]
    if 0 in own:
        own[1] = own[0]  # both get the flag, and only process 0 checks it
    processes = launcher.start_processes(script, *flags, differing=own)
    start = all_wait(processes)
    for process in processes:
        _, err = end(process, 2, 20, start)
        assert err.startswith(f"error: {told}"), err
        assert err.count("\n") == 1
    assert not (launcher.directory / "runs").exists()


@conftest.one_fast
def test_a_port_that_is_taken(script, launcher):
    """Another run that follows the same example may have taken it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = ["--coordinator-address", f"127.0.0.1:{taken.getsockname()[1]}", "--num-processes", "2"]
        process = launcher.start(script, *place, "--process-id", "0")
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert "each run needs a port of its own, and this one cannot be used ([Errno 98] Address already in use" in err
    assert err.count("\n") == 1


@conftest.one_fast
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_of_another_run_on_the_same_port(script, launcher, rank):
    """A run leaves its given port once its processes have met. A stranger on that port would end it."""
    place = ["--coordinator-address", f"127.0.0.1:{conftest.free_port()}", "--num-processes", "2", "--process-id"]
    flags = [*ENDLESS, "--peer-timeout", "30"]
    run = [launcher.start(script, *flags, *place, str(i), PYTHONUNBUFFERED="1") for i in range(2)]
    wait_for_line(run[0], "steps/s,")
    stranger = launcher.start(script, *flags, *place, str(rank), PYTHONUNBUFFERED="1")
    wait_for_line(stranger, "waiting")
    for _ in range(20):
        wait_for_line(run[0], "steps/s,")
    time.sleep(3)
    assert [process.poll() for process in run] == [None, None]
    run[0].send_signal(signal.SIGTERM)
    assert [process.wait(30) for process in run] == [143, 143]
    stranger.kill()
    stranger.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes(script, launcher, rank):
    process = launcher.start_processes(script, *ENDLESS, ranks=[rank])[0]
    wait_for_line(process, "waiting at most 10 s for 2 processes to meet at 127.0.0.1:")
    _, err = end(process, None, 20, time.monotonic())
    assert "DEADLINE_EXCEEDED" in err


@conftest.one_fast
def test_kill_9_of_one_ends_the_other(script, launcher):
    survivor, victim = launcher.start_processes(script, *ENDLESS)
    wait_for_line(survivor, "steps/s,")
    victim.kill()
    out, _ = end(survivor, None, 15, time.monotonic())
    if survivor.returncode == 1:  # it was in a collective, not waiting inside JAX
        assert "failed: " in out
        (path,) = (launcher.directory / "runs").glob("*/summary.json")
        assert json.loads(path.read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGINT])
def test_no_process_outlives_another(script, launcher, victim, number):
    """The first, the second or the last of three processes is killed, frozen or interrupted."""
    processes = launcher.start_processes(script, *ENDLESS, "--num-shards", "6", count=3)
    wait_for_line(processes[0], "steps/s,")
    start = time.monotonic()
    processes[victim].send_signal(number)
    try:
        for rank, process in enumerate(processes):
            if rank != victim:
                end(process, None, 20 if number == signal.SIGSTOP else 15, start)
        if number == signal.SIGINT:
            assert processes[victim].wait(20) == 130
    finally:
        processes[victim].kill()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_ends_all_at_the_same_update(script, launcher, rank):
    processes = launcher.start_processes(script, *ENDLESS)
    wait_for_line(processes[0], "steps/s,")
    processes[rank].send_signal(signal.SIGTERM)
    out, err = processes[0].communicate(timeout=30)
    assert "preempted: " in out
    assert [process.wait(10) for process in processes] == [143, 143], err


@pytest.mark.slow
def test_a_cluster_is_found(script, launcher, monkeypatch):
    """SLURM's variables give the address, the number of processes and the rank."""
    slurm = {"JOB_ID": str(conftest.free_port()), "STEP_NODELIST": "localhost", "NTASKS": "2", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    flags = [*conftest.SMALL, "--num-actor-threads", "1", "--total-timesteps", "256", "--distributed"]
    first, second = (launcher.start(script, *flags, SLURM_PROCID=str(i)) for i in range(2))
    assert launcher.summary(first)["processes"] == 2
    assert second.wait(60) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2")
def test_two_machines(script, launcher):
    """Two network namespaces see each other only through a cable. Each resolves its own name to its address there."""
    name = f"cb{os.getpid()}"
    ip = lambda line: subprocess.run(["ip", *line.split()], check=True)
    try:
        for i in (1, 2):
            ip(f"netns add {name}{i}")
            hosts = Path(f"/etc/netns/{name}{i}/hosts")  # what `ip netns exec` shows as /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n10.77.0.{i} {socket.gethostname()}\n")
        ip(f"link add {name}v1 netns {name}1 type veth peer name {name}v2 netns {name}2")
        for i in (1, 2):
            ip(f"-n {name}{i} addr add 10.77.0.{i}/24 dev {name}v{i}")
            ip(f"-n {name}{i} link set {name}v{i} up")
            ip(f"-n {name}{i} link set lo up")
        flags = [*conftest.SMALL, "--total-timesteps", "512"]
        where = ["--coordinator-address", "10.77.0.1:9876", "--num-processes", "2", "--process-id"]
        command = [sys.executable, str(conftest.ROOT / f"{script.__name__}.py"), *flags, "--num-actor-threads", "1"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=launcher.directory)
        enter = lambda i: ["ip", "netns", "exec", f"{name}{i + 1}", *command, *where, str(i)]
        first, second = (subprocess.Popen(enter(i), **pipes) for i in (0, 1))
        summary = launcher.summary(first)
        assert second.wait(60) == 0
    finally:
        for i in (1, 2):
            ip(f"netns del {name}{i}")
            shutil.rmtree(f"/etc/netns/{name}{i}")
    assert summary["params_sha256"] == launcher.run(script, *flags, "--num-actor-threads", "2")["params_sha256"]
