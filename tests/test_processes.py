"""Many processes: what they tell each other over their wires, and whole runs in several processes on this machine."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import conftest
import pytest

ENDLESS = [*conftest.SMALL, "--num-actor-threads", "1", "--log-frequency", "1", "--peer-timeout", "20"]


class Group:
    """The processes of a run as threads of this one, without JAX."""

    def __init__(self, script, size=3, timeout=5, numbers=None):
        self.failures = [[] for _ in range(size)]
        address = f"127.0.0.1:{conftest.free_port()}"
        numbers = numbers or [(rank, size) for rank in range(size)]
        places = zip(numbers, self.failures, strict=True)
        self.peers = [script.Peers(*number, address, timeout, told.append) for number, told in places]

    def do(self, action, ranks=None):
        """What `action(peers)` returned or raised in each process."""
        results = {}

        def work(peers):
            try:
                results[peers.rank] = action(peers)
            except Exception as error:
                results[peers.rank] = error

        chosen = [self.peers[rank] for rank in ranks or range(len(self.peers))]
        threads = [threading.Thread(target=work, args=(peers,)) for peers in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return [results[peers.rank] for peers in chosen]

    def close(self):
        """End all threads. First all leave: one that did not would take another's going for a failure."""
        for peers in self.peers:
            peers.leaving.set()
        for peers in self.peers:
            for wire in peers.wires.values():
                with suppress(OSError):  # hung up already
                    conftest.hang_up(wire)
        for peers in self.peers:
            for listener in peers.listeners:
                listener.join(5)
                assert not listener.is_alive()


@pytest.fixture
def group(script, monkeypatch):
    """Groups whose wires are closed after the test; no timer may end this process."""
    monkeypatch.setattr(script.os, "_exit", lambda code: None)
    groups = []
    make = lambda **options: groups.append(Group(script, **options)) or groups[-1]
    yield make
    for made in groups:
        made.close()


def test_everyone_gets_what_everyone_said(group):
    trio = group()
    assert trio.do(lambda peers: peers.connect()) == [None] * 3
    for round in range(3):
        said = [[round, {"score": 0.1 * rank}] for rank in range(3)]
        assert trio.do(lambda peers, said=said: peers.share(said[peers.rank])) == [said] * 3
    assert trio.failures == [[], [], []]


def test_a_process_alone_shares_with_itself(script):
    with conftest.alone(script) as peers:
        peers.connect()
        assert peers.share({"a": 1}) == [{"a": 1}]
        peers.agree(script.Args())


def test_a_differing_flag_is_named(script, group):
    """Flags and packages must agree; what only one process needs may differ."""
    trio = group()
    trio.do(lambda peers: peers.connect())
    devices = [(0,), (1,), (2,)]
    same = lambda peers: script.Args(
        process_id=peers.rank, env_threads=peers.rank, actor_device_ids=devices[peers.rank]
    )
    assert trio.do(lambda peers: peers.agree(same(peers))) == [None] * 3
    other = {2: dict(gamma=0.9)}
    errors = trio.do(lambda peers: peers.agree(script.Args(**other.get(peers.rank, {}))))
    message = "--gamma 0.9: process 2 differs from process 0, which has 0.99. For example: --gamma 0.99"
    assert [str(error) for error in errors] == [message] * 3
    assert all(isinstance(error, script.FlagError) for error in errors)


def test_a_differing_number_of_devices_or_package_is_named(script, group, monkeypatch):
    pair = group(size=2)
    pair.do(lambda peers: peers.connect())
    ids = {0: (0,), 1: (0, 1)}
    errors = pair.do(lambda peers: peers.agree(script.Args(learner_device_ids=ids[peers.rank])))
    assert all("--learner-device-ids (2 devices): process 1 differs" in str(error) for error in errors)
    pair = group(size=2)
    pair.do(lambda peers: peers.connect())
    threads = threading.local()
    versions = script.versions
    monkeypatch.setattr(script, "versions", lambda: versions() | {"jax": threads.jax})

    def agree(peers):
        threads.jax = f"0.{peers.rank}"
        peers.agree(script.Args())

    assert all("jax 0.1: process 1 differs from process 0" in str(error) for error in pair.do(agree))


def test_other_parameters_are_named(group):
    pair = group(size=2)
    pair.do(lambda peers: peers.connect())
    errors = pair.do(lambda peers: peers.agree_on("initial parameters", "ab"[peers.rank]))
    assert [str(e) for e in errors] == ["process 1 has other initial parameters (b) than process 0 (a)"] * 2


def meet(peers):
    """What a process does until it ends."""
    try:
        with peers:
            peers.connect()
            peers.share(None)
    finally:
        if peers.rank:
            for wire in peers.wires.values():
                conftest.hang_up(wire)


def test_a_process_that_never_comes_is_named(script, group, capsys):
    """By those who wait, process 0 and the others."""
    errors = group(timeout=1).do(meet, ranks=[0, 2])
    assert all(isinstance(error, script.PeerError) for error in errors)
    assert all("process 1 of 3 did not come to 127.0.0.1:" in str(error) for error in errors)
    assert "error: process 1 of 3 did not come" in capsys.readouterr().err
    (error,) = group(timeout=1).do(meet, ranks=[1])
    assert "process 0 did not answer at 127.0.0.1:" in str(error)


def test_two_processes_with_one_number(script, group):
    trio = group(numbers=[(0, 3), (1, 3), (1, 3)])
    start = time.monotonic()
    errors = trio.do(meet)
    assert time.monotonic() - start < 4
    assert all("--process-id 1: process 1 of 3 came where 2 of 3 was missing" in str(error) for error in errors)
    assert {type(error) for error in errors} == {script.FlagError, script.PeerError}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_gone_is_named_by_all(script, group, rank):
    trio = group()
    trio.do(lambda peers: peers.connect())
    dying = trio.peers[rank]
    dying.leaving.set()
    for wire in dying.wires.values():  # what the kernel does to the sockets of a killed process
        conftest.hang_up(wire)
    left = [other for other in range(3) if other != rank]
    errors = trio.do(lambda peers: peers.share(None), ranks=left)
    assert [str(error) for error in errors] == [f"process {rank} is gone: killed, or its machine lost"] * 2
    assert all(isinstance(error, script.PeerError) for error in errors)
    assert [trio.failures[other] for other in left] == [[error] for error in errors]  # the hand-off is told too


def test_a_silent_process_is_named_and_a_beating_one_is_not(script, group):
    trio = group(timeout=1)
    trio.do(lambda peers: peers.connect())
    time.sleep(2.5)
    assert trio.failures == [[], [], []]  # nobody spoke, all hearts beat
    trio.peers[1].leaving.set()  # its heart stops
    errors = trio.do(lambda peers: peers.share(None), ranks=[0, 2])
    assert [str(error) for error in errors] == ["process 1 has been silent for 1 s"] * 2


@conftest.one_fast
def test_two_processes_are_one_run(script, launcher):
    """Same bits, same scores as two threads of one process; process 0 alone writes."""
    flags = [*conftest.SMALL, "--total-timesteps", "512"]
    writer, silent = launcher.start_processes(script, *flags, "--num-actor-threads", "1")
    summary, (out, err) = launcher.summary(writer), silent.communicate(timeout=60)
    assert silent.returncode == 0, err
    assert "steps" not in out
    alone = launcher.run(script, *flags, "--num-actor-threads", "2")
    for name in ("params_sha256", "episodes", "mean_score", "global_step"):
        assert summary[name] == alone[name]
    assert (summary["processes"], alone["processes"]) == (2, 1)
    assert len(list((launcher.directory / "runs").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--no-concurrency", "--concurrency"])
def test_partitions(script, launcher, mode):
    """Sixteen environments: 2 x 8 and 4 x 4, in processes and in threads."""
    flags = [*conftest.SMALL, mode, "--total-timesteps", "2048"]
    for count, envs in ((2, "8"), (4, "4")):
        one = [*flags, "--local-num-envs", envs]
        processes = launcher.start_processes(script, *one, "--num-actor-threads", "1", count=count)
        summary = launcher.summary(processes[0])
        assert [process.wait(60) for process in processes] == [0] * count
        alone = launcher.run(script, *one, "--num-actor-threads", str(count), "--learner-device-ids", "0", "1")
        assert summary["params_sha256"] == alone["params_sha256"]
        assert (summary["episodes"], summary["mean_score"]) == (alone["episodes"], alone["mean_score"])


@conftest.one_fast
def test_a_wrong_seed_ends_all(script, launcher):
    start = time.monotonic()
    for process in launcher.start_processes(script, *conftest.SMALL, differing={1: ["--seed", "2"]}):
        _, err = process.communicate(timeout=30)
        assert process.returncode == 2
        assert err.endswith("error: --seed 2: process 1 differs from process 0, which has 1. For example: --seed 1\n")
    assert time.monotonic() - start < 30


def wait_for_update(process):
    for line in process.stdout:
        if "steps/s," in line:
            return
    raise AssertionError(process.stderr.read())


@conftest.one_fast
def test_kill_9_of_one_ends_the_other(script, launcher):
    survivor, victim = launcher.start_processes(script, *ENDLESS)
    wait_for_update(survivor)
    victim.kill()
    start = time.monotonic()
    out, err = survivor.communicate(timeout=20)
    assert time.monotonic() - start < 10
    assert survivor.returncode == 1
    assert "error: process 1 is gone" in err
    assert "Traceback" not in err
    assert "failed: " in out


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGINT])
def test_no_process_outlives_another(script, launcher, victim, number):
    """Killed, frozen or interrupted, the first, the second or the last of three."""
    processes = launcher.start_processes(script, *ENDLESS, "--num-shards", "6", "--peer-timeout", "5", count=3)
    wait_for_update(processes[0])
    time.sleep(1)
    processes[victim].send_signal(number)
    try:
        for rank, process in enumerate(processes):
            if rank != victim:
                _, err = process.communicate(timeout=20)
                assert process.returncode != 0
                assert f"process {victim} " in err
        if number == signal.SIGINT:
            assert processes[victim].wait(20) == 130
    finally:
        processes[victim].kill()


@pytest.mark.slow
def test_sigterm_to_one_ends_all_at_the_same_update(script, launcher):
    processes = launcher.start_processes(script, *ENDLESS)
    wait_for_update(processes[0])
    processes[1].send_signal(signal.SIGTERM)
    out, err = processes[0].communicate(timeout=30)
    assert "preempted: " in out
    assert [process.wait(10) for process in processes] == [143, 143], err


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2")
def test_two_machines(script, launcher):
    """Two network namespaces that see each other through a cable alone."""
    name = f"cb{os.getpid()}"
    ip = lambda line: subprocess.run(["ip", *line.split()], check=True)
    try:
        for i in (1, 2):
            ip(f"netns add {name}{i}")
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
    assert summary["params_sha256"] == launcher.run(script, *flags, "--num-actor-threads", "2")["params_sha256"]
