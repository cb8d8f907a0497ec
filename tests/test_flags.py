"""Invalid flags end a script with one helpful message before anything is built."""

import re
import resource
import sys
from pathlib import Path

import conftest
import jax
import numpy as np
import pytest
import tyro

BAD = [
    "--total-timesteps 10",
    "--env-id Nope-v5",
    "--env-id CartPole-v1",
    "--learner-device-ids 7",
    "--actor-device-ids 0 9",
    "--actor-device-ids 1 1",
    "--num-shards 3 --local-num-envs 64",
    "--num-shards 0",
    "--num-minibatches 5 --local-num-envs 64",
    "--num-minibatches 0",
    "--gradient-accumulation-steps 7",
    "--local-num-envs 0",
    "--num-shards 4 --learner-device-ids 0 1 2",
    "--channels",
    "--hiddens 0",
    "--img-size 4",
    "--learning-rate -1",
    "--learning-rate nan",
    "--max-grad-norm inf",
    "--gamma 1.5",
    "--ent-coef -0.1",
    "--seed -1",
    "--env-threads -1",
    "--log-frequency 0",
    "--peer-timeout 0",
    "--exp-name a/b",
    "--env-id ALE/Pong-v5",
    "--env-id PongNoFrameskip-v4",
    "--env-id Pong",
]
FLOATS = {"learning-rate": float, "gamma": float, "max-grad-norm": float, "ent-coef": float}


@pytest.mark.parametrize("line", BAD)
def test_bad_flag(script, line, monkeypatch, capsys):
    for name in ("make_env", "playing", "make_update", "ActorCritic"):
        monkeypatch.setattr(script, name, lambda *_: pytest.fail("built something before the flags were checked"))
    monkeypatch.setattr(script.os, "_exit", lambda code: pytest.fail("took the flags"))
    monkeypatch.setattr(script, "listen_for_signals", tuple)
    monkeypatch.setattr(sys, "argv", ["script", *line.split()])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err.strip()
    flag, *value = line.split(" --")[0].split()
    shown = " ".join(str(FLOATS.get(flag[2:], str)(v)) for v in value) or "(empty)"
    assert message.startswith(f"error: {flag} {shown}: ")
    assert "\n" not in message
    # the value that the message suggests is valid
    remedy = message.split("For example: ")[1].split()
    rest = [word for part in line.split(" --")[1:] for word in f"--{part}".split()]
    script.set_up(tyro.cli(script.Args, args=[*rest, *remedy]))


ONE_OF_MANY = "--coordinator-address 10.0.0.1:9876 --num-processes 2 --process-id 0"
BAD_PLACES = [
    "--coordinator-address 10.0.0.1 --num-processes 2 --process-id 0",
    "--coordinator-address host:abc --num-processes 2 --process-id 0",
    "--coordinator-address host:123456 --num-processes 2 --process-id 0",
    "--distributed",
    "--num-processes 2 --process-id 0",
    "--num-processes 0 --coordinator-address 10.0.0.1:9876 --process-id 0",
    "--process-id 2 --coordinator-address 10.0.0.1:9876 --num-processes 2",
]


@pytest.mark.parametrize("line", BAD_PLACES)
def test_a_place_among_processes_that_cannot_be(script, line, monkeypatch):
    """The error comes before the process waits for any other."""
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax._src.distributed._jax, "get_distributed_runtime_service", pytest.fail)
    args = tyro.cli(script.Args, args=line.split())
    with pytest.raises(script.FlagError, match=rf"^--coordinator-address .*For example: {ONE_OF_MANY}$"):
        script.join(args, ())


def test_many_processes_need_shards_for_all(script):
    """A shard is never split between two learner devices, so those of all processes count."""
    with pytest.raises(script.FlagError, match=r"--num-shards 4: .* a multiple of the learner devices \(3\)"):
        script.check_args(script.Args(num_shards=4), 3)
    assert script.check_args(script.Args(num_shards=12), 3).steps == 3 * script.check_args(script.Args()).steps


def test_the_value_that_works_is_near(script):
    """If no number of shards fits three learner devices, the suggested number of environments stays close."""
    with pytest.raises(script.FlagError, match=r"For example: --num-shards 3 --local-num-envs 60$"):
        script.check_args(script.Args(learner_device_ids=(0, 1, 2), local_num_envs=64))


def test_the_name_that_envpool_has_for_a_game(script):
    for typed in ("ALE/Pong-v5", "PongNoFrameskip-v4", "PongDeterministic-v4", "Pong-v4", "Pong"):
        with pytest.raises(script.FlagError, match=r"For example: --env-id Pong-v5$"):
            script.check_args(script.Args(env_id=typed))


def test_an_empty_resume(script):
    """An empty path would mean the current directory."""
    with pytest.raises(script.FlagError, match=r"^--resume \(empty\): must not be empty\."):
        script.check_args(script.Args(resume=""))


@conftest.one_fast
def test_flags_from_a_notebook(script):
    """Lists work like tuples. A value of a different type is refused before anything is written."""
    tiny = dict(img_size=16, local_num_envs=4, num_actor_threads=1, num_steps=8, num_minibatches=1, total_timesteps=32)
    as_list = script.train(script.Args(**tiny, channels=[4, 8], learner_device_ids=[0]))
    as_tuple = script.train(script.Args(**tiny, channels=(4, 8)))
    assert as_list["params_sha256"] == as_tuple["params_sha256"]
    runs = set(Path("runs").iterdir())
    for flag, value in dict(seed=np.int64(3), total_timesteps=1e5, channels="48", norm_adv="False").items():
        if hasattr(script.Args, flag):
            kind = type(getattr(script.Args, flag)).__name__
            with pytest.raises(script.FlagError, match=f"^--{flag.replace('_', '-')} .*must be of the type {kind}"):
                script.train(script.Args(**tiny | {flag: value}))
    assert set(Path("runs").iterdir()) == runs


@conftest.one_fast
@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ("", dict(NPROC=""), "NPROC (empty): must be a whole number, 1 or more. For example: NPROC "),
        ("", dict(NPROC="auto"), "NPROC auto: must be a whole number, 1 or more. For example: NPROC "),
        ("", dict(JAX_PLATFORMS="cuda"), "JAX_PLATFORMS cuda: a GPU was asked for, but "),
        ("", dict(JAX_PLATFORMS="cuda,cpu"), "JAX_PLATFORMS cuda,cpu: a GPU was asked for, but the devices here are "),
        ("--num-steps 100000000", {}, "--total-timesteps 50000000: an update takes "),
        ("--num-shards 7", {}, "--num-shards 7: must divide the "),
        ("--distributed", {}, "--coordinator-address None: no cluster says where the processes are"),
        ("--coordinator-address host:abc --num-processes 2 --process-id 1", {}, "--coordinator-address host:abc: must"),
    ],
)
def test_one_line_before_anything_is_done(script, launcher, tmp_path, flags, environment, message):
    """The error comes soon after the imports, in CPU time, because other programs may slow the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = launcher.start(script, *flags.split(), **environment)
    out, err = process.communicate(timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert err.startswith(f"error: {message}"), err
    assert err.count("\n") == 1, err
    assert process.returncode == 2
    assert out == "" or "--distributed" in flags  # --distributed prints that it waits
    assert not list(tmp_path.iterdir())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


@conftest.one_fast
def test_the_first_line_names_the_devices(script, launcher):
    process = launcher.start(script, "--learner-device-ids", "1", "2", "--actor-device-ids", "0", PYTHONUNBUFFERED="1")
    assert process.stdout.readline() == "devices: actors on cpu:0, learners on cpu:1, cpu:2\n"
    process.kill()
    process.communicate()


def test_track_without_wandb(script, monkeypatch):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(script.FlagError, match=r"--track True: .*pip install wandb.*uv run --with wandb"):
        script.check_args(script.Args(track=True))


def test_every_flag_is_explained(script, monkeypatch, capsys):
    """--help lists the flags in the order of `Args`, each with its default."""
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    _, options = capsys.readouterr().out.split("show this help message and exit")
    shown = re.findall(r"^\W*--(\S+?),? (.*?)\(default:\s", options, re.DOTALL | re.MULTILINE)
    assert [flag.replace("-", "_") for flag, _ in shown] == list(script.Args.__dataclass_fields__)
    assert [flag for flag, text in shown if len(text.split()) < 3] == []


def test_the_command_line_is_args(script):
    """Every flag has its default in `Args`, and every typed value arrives there."""
    assert script.parse_args([]) == script.Args()
    line = "--env-id Pong-v5 --channels 4 8 --no-anneal-lr --resume it --compute-dtype bfloat16 --learning-rate 1e-3"
    flags = dict(env_id="Pong-v5", channels=(4, 8), anneal_lr=False, resume="it", compute_dtype="bfloat16")
    assert script.parse_args(line.split()) == script.Args(**flags, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--anneal-lr=False --save_model True", dict(anneal_lr=False, save_model=True)),
        ("--anneal_lr=false --track=TRUE --seed 3", dict(anneal_lr=False, track=True, seed=3)),
        ("--no-anneal-lr --save-model", dict(anneal_lr=False, save_model=True)),
        ("--exp-name true-love --anneal-lr true", dict(exp_name="true-love")),
    ],
)
def test_booleans_as_sweeps_pass_them(script, line, flags):
    assert script.parse_args(line.split()) == script.Args(**flags)
