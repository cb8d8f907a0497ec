"""Disks that fill up, files that are damaged or gone, environments that hang, homes that are not there."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import conftest
import pytest

TINY = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8,
            num_minibatches=1, log_frequency=1, total_timesteps=64)  # fmt: skip
IT = dict(resume="it", start_fresh=True)


def train(script, **flags):
    return script.train(script.Args(**TINY | flags))


def test_a_file_is_whole_or_the_old_one(script, tmp_path, monkeypatch):
    """A full disk says so when the last bytes are forced onto it."""
    path = tmp_path / "summary.json"
    script.write_file(path, b"old")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            script.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    script.write_file(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("summary.json", b"new")]


@conftest.one_fast
def test_json_files_of_a_run_are_written_whole(script, monkeypatch):
    """run.json and summary.json keep what they had where a disk is full."""
    train(script, **IT)
    before = {name: Path("runs/it", name).read_text() for name in ("run.json", "summary.json")}
    write_file = script.write_file

    def write(path, data):
        if path.suffix == ".json":
            monkeypatch.setattr(os, "fsync", full)
        write_file(path, data)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "write_file", write)
    with pytest.raises(OSError, match="No space"):
        train(script, **IT)
    assert {name: Path("runs/it", name).read_text() for name in before} == before


@conftest.one_fast
def test_unreadable_checkpoints_of_later_updates(script):
    """A run that starts afresh among them keeps its own, and goes on from these."""
    flags = dict(checkpoint_frequency=1, total_timesteps=6 * 32)
    whole = train(script, **flags, **IT)
    folder = Path("runs/it/checkpoints")
    for update in (5, 6):
        (folder / f"{update}.msgpack").write_bytes(b"")
    train(script, **flags | dict(total_timesteps=3 * 32), anneal_lr=False, **IT)
    sizes = {path.stem: path.stat().st_size for path in folder.glob("*.msgpack")}
    assert sorted(sizes) == ["2", "3", "5", "6"]
    assert sizes["2"] > 0 < sizes["3"]
    shutil.rmtree("runs/it")
    assert train(script, **flags, **IT)["params_sha256"] == whole["params_sha256"]


@conftest.one_fast
def test_a_checkpoint_that_a_user_has_copied(script):
    """Only names of digits are checkpoints; a copy neither ends the run nor is it removed."""
    flags = dict(checkpoint_frequency=1, total_timesteps=4 * 32)
    train(script, **flags | dict(total_timesteps=64), anneal_lr=False, **IT)
    folder = Path("runs/it/checkpoints")
    shutil.copy(folder / "2.msgpack", folder / "best.msgpack")
    summary = train(script, **flags | dict(total_timesteps=64), anneal_lr=False, resume="it")
    assert summary["status"] == "finished"
    names = [path.name for path in script.find_checkpoints(Path("runs/it"))]
    assert names == ["1.msgpack", "2.msgpack"]
    assert (folder / "best.msgpack").exists()


@conftest.one_fast
def test_a_loaded_model_that_is_gone(script, monkeypatch):
    """A checkpoint has everything: a run that began with --load-model resumes without the file, or without the flag."""
    parent = train(script, save_model=True, eval_episodes=1, env_id="Pong-v5")
    model = Path("runs", parent["run_name"], "model.msgpack")
    flags = dict(env_id="Pong-v5", load_model=str(model), total_timesteps=96)
    first = train(script, **flags, **IT)
    model.unlink()
    again = train(script, **flags, resume="it")
    without = train(script, **flags | dict(load_model=None), resume="it")
    assert first["params_sha256"] == again["params_sha256"] == without["params_sha256"]
    with pytest.raises(script.FlagError, match=r"--load-model .*: cannot be read: .*No such file"):
        train(script, **flags, resume="another", start_fresh=True)
    assert not Path("runs/another").exists()  # an error about a flag leaves nothing behind


def test_two_runs_of_one_second_have_two_names(script, monkeypatch):
    """Process ids do not tell containers apart, and clocks do not either."""
    monkeypatch.setattr(time, "strftime", lambda *_: "20261127-000000")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    names = {script.run_directory(script.Args()).name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(f"Breakout-v5__{script.__name__}__1__20261127-000000") for name in names)


def test_where_a_run_is(script, tmp_path, monkeypatch):
    """An existing directory first, then a name below runs; with a separator it is a path."""
    (tmp_path / "here").mkdir()
    directory = lambda resume: script.run_directory(script.Args(resume=resume))
    assert directory("here") == Path("here")
    assert directory("it") == Path("runs/it")
    assert directory("./it") == Path("it")
    assert directory("a/it") == Path("a/it")
    assert directory(str(tmp_path / "it")) == tmp_path / "it"
    (tmp_path / "runs" / "it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    assert directory("it") == Path("it")


@conftest.one_fast
def test_parameters_that_part_never_reach_a_checkpoint(script, monkeypatch):
    """Two processes of which one, from the third update on, has other parameters."""
    share, hashes = script.share, []

    def share_with_another(value):
        if isinstance(value, str) and len(value) == 64:
            hashes.append(value)
            return [value, value if len(hashes) < 3 else "other"]
        return share(value)

    monkeypatch.setattr(script, "share", share_with_another)
    with pytest.raises(RuntimeError, match="different parameters after update 2"):
        train(script, checkpoint_frequency=1, total_timesteps=4 * 32, **IT)
    assert [path.stem for path in script.find_checkpoints(Path("runs/it"))] == ["1"]


@conftest.one_fast
def test_environments_whose_construction_hangs(script, launcher, tmp_path):
    """As the second pool's would, where the games lie on a file server that is gone."""
    hang = """
make_env, pools = script.make_env, []
def make(*arguments):
    pools.append(1)
    if len(pools) > 1:
        time.sleep(10**6)
    return make_env(*arguments)
script.make_env = make
"""
    flags = "--img-size 16 --channels 4 --local-num-envs 4 --num-actor-threads 1 --num-steps 8 --num-minibatches 1"
    flags += " --total-timesteps 3200 --checkpoint-frequency 2 --actor-timeout 2 --resume it --start-fresh"
    process = launcher.start_patched(script, hang, *flags.split())
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "TimeoutError: actor 0: making its environments takes more than 2 s" in err
    assert "go on from update 2 with --resume runs/it" in out


@conftest.one_fast
def test_a_device_that_failed_does_not_hide_the_summary(script, monkeypatch):
    """Its parameters cannot be fetched any more."""

    def fail(params):
        raise RuntimeError("the device is gone")

    update = script.Report.update

    def lose_device(report, *arguments):
        update(report, *arguments)
        monkeypatch.setattr(script, "params_sha256", fail)

    monkeypatch.setattr(script.Report, "update", lose_device)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(script, **IT)
    summary = json.loads(Path("runs/it/summary.json").read_text())
    assert (summary["status"], summary["updates"], summary["params_sha256"]) == ("failed", 2, None)


@conftest.one_fast
def test_an_error_about_a_flag_leaves_the_run_as_it_was(script):
    """Also one that is found late, when the checkpoint is opened: here the network is another."""
    train(script, **IT)
    files = lambda: {path: path.stat().st_mtime_ns for path in Path("runs/it").rglob("*")}
    before = files()
    content = script.unpack(Path("runs/it/checkpoints/2.msgpack").read_bytes())
    content["state"]["1"]["params"].popitem()
    Path("runs/it/checkpoints/2.msgpack").write_bytes(script.pack(content))
    before[Path("runs/it/checkpoints/2.msgpack")] = Path("runs/it/checkpoints/2.msgpack").stat().st_mtime_ns
    with pytest.raises(script.FlagError, match="--resume it: it has another network or optimizer"):
        train(script, resume="it")
    assert files() == before


@conftest.one_fast
def test_no_home_directory(script, launcher, tmp_path):
    """As in a container: no folder named ~ appears."""
    environment = dict(JAX_COMPILATION_CACHE_DIR="")
    forget = "import posixpath; posixpath.expanduser = lambda path: path"  # HOME is not set, and no user has this id
    flags = "--img-size 16 --channels 4 --local-num-envs 4 --num-actor-threads 1 --num-steps 8 --num-minibatches 1"
    process = launcher.start_patched(script, forget, *flags.split(), "--total-timesteps", "32", **environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "no home directory: compiled programs are not kept" in err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@conftest.one_fast
def test_final_games_cost_no_training_time(script, monkeypatch):
    """seconds, sps and sps_steady leave them out, and a finished run that is started again keeps their scores."""
    play_games = script.play_games

    def play_slowly(*arguments):
        time.sleep(30)
        return play_games(*arguments)

    slept = []
    monkeypatch.setattr(script, "play_games", play_slowly)
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds))
    clock, started = time.perf_counter, time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(slept))
    flags = dict(save_model=True, eval_episodes=1, env_id="Pong-v5")
    summary = train(script, **flags, **IT)
    assert slept == [30]
    assert summary["seconds"] <= clock() - started
    assert summary["sps"] == pytest.approx(summary["global_step"] / summary["seconds"])
    again = train(script, **flags | dict(save_model=False), resume="it")
    assert summary["evaluation"] is not None
    assert again["evaluation"] == summary["evaluation"]
