"""Flags that cannot work end a script before anything is built, with one message that helps."""

import re
import resource
import shlex
import subprocess
import sys

import conftest
import jax
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
]
FLOATS = {"learning-rate": float, "gamma": float, "max-grad-norm": float, "ent-coef": float}


@pytest.mark.parametrize("line", BAD)
def test_bad_flag(script, line, monkeypatch, capsys):
    for name in ("make_env", "playing", "make_update", "ActorCritic"):
        monkeypatch.setattr(script, name, lambda *_: pytest.fail("built something before the flags were checked"))
    monkeypatch.setattr(script.os, "_exit", lambda code: pytest.fail("took the flags"))
    monkeypatch.setattr(sys, "argv", ["script", *line.split()])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err.strip()
    flag, *value = line.split(" --")[0].split()
    shown = " ".join(str(FLOATS.get(flag[2:], str)(v)) for v in value) or "(empty)"
    assert message.startswith(f"error: {flag} {shown}: ")
    assert "\n" not in message
    # the value that works, works
    remedy = message.split("For example: ")[1].split()
    rest = [word for part in line.split(" --")[1:] for word in f"--{part}".split()]
    script.set_up(tyro.cli(script.Args, args=[*rest, *remedy]))


ONE_OF_MANY = "--coordinator-address 10.0.0.1:9876 --num-processes 2 --process-id 0"
BAD_PLACES = [
    "--coordinator-address 10.0.0.1 --num-processes 2 --process-id 0",
    "--distributed",
    "--num-processes 2 --process-id 0",
    "--num-processes 0 --coordinator-address 10.0.0.1:9876 --process-id 0",
    "--process-id 2 --coordinator-address 10.0.0.1:9876 --num-processes 2",
]


@pytest.mark.parametrize("line", BAD_PLACES)
def test_a_place_among_processes_that_cannot_be(script, line, monkeypatch):
    """Told before any other process is waited for."""
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax._src.distributed._jax, "get_distributed_runtime_service", pytest.fail)
    args = tyro.cli(script.Args, args=line.split())
    with pytest.raises(script.FlagError, match=rf"^--coordinator-address .*For example: {ONE_OF_MANY}$"):
        script.join(args)


def test_many_processes_need_shards_for_all(script):
    """A shard is not divided between two learner devices, of whatever process."""
    with pytest.raises(script.FlagError, match=r"--num-shards 4: .* a multiple of the 3 learner devices"):
        script.check_args(script.Args(num_shards=4), 3)
    assert script.check_args(script.Args(num_shards=12), 3).steps == 3 * script.check_args(script.Args()).steps


def test_the_value_that_works_is_near(script):
    """Where no number of shards fits three learner devices, the number of environments does not fall to a few."""
    with pytest.raises(script.FlagError, match=r"For example: --num-shards 3 --local-num-envs 60$"):
        script.check_args(script.Args(learner_device_ids=(0, 1, 2), local_num_envs=64))


@conftest.one_fast
def test_a_bad_flag_is_quick(script, launcher):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = launcher.start(script, "--num-shards", "7")
    out, err = process.communicate(timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: another program may keep it busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert process.returncode == 2
    assert out == ""
    assert err.startswith("error: --num-shards 7: must divide the ")
    assert err.count("\n") == 1


def test_track_without_wandb(script, monkeypatch):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(script.FlagError, match=r"--track True: .*pip install wandb.*uv run --with wandb"):
        script.check_args(script.Args(track=True))


BOXES = ["experiment", "environment", "algorithm", "network", "devices", "checkpoints", "processes"]


def test_every_flag_is_explained(script, monkeypatch, capsys):
    """In boxes of at most one screen, in the order of `Args`, each with its default."""
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        script.parse_args()
    # with a frame on a terminal, without one here
    _, *parts = re.split(r"^\W*(\w+) options\b.*\n", capsys.readouterr().out, flags=re.MULTILINE)
    assert parts[::2] == BOXES
    shown = []
    for box in parts[1::2]:
        assert len(box.splitlines()) <= 40
        flags = re.findall(r"^\W*--(\S+?),? (.*?)\(default:\s", box, re.DOTALL | re.MULTILINE)
        shown += [flag.replace("-", "_") for flag, _ in flags]
        assert [flag for flag, told in flags if len(told.split()) < 3] == []
    assert shown == list(script.Args.__dataclass_fields__)


def test_the_command_line_is_args(script, monkeypatch):
    """All flags have their defaults in `Args`, and what is typed arrives."""
    monkeypatch.setattr(sys, "argv", ["script"])
    assert script.parse_args() == script.Args()
    line = "--env-id Pong-v5 --channels 4 8 --no-anneal-lr --resume it --compute-dtype bfloat16 --learning-rate 1e-3"
    monkeypatch.setattr(sys, "argv", ["script", *line.split()])
    flags = dict(env_id="Pong-v5", channels=(4, 8), anneal_lr=False, resume="it", compute_dtype="bfloat16")
    assert script.parse_args() == script.Args(**flags, learning_rate=1e-3)


def test_flags_of_the_readme_are_valid(script):
    """Every command line and every row of flags in README.md and the docstring passes the scripts' own validation."""
    text = (conftest.ROOT / "README.md").read_text() + script.__doc__.replace("THIS_FILE", script.__name__)
    text = "\n".join(line for line in text.splitlines() if "benchmark/" not in line)  # those test_launcher.py checks
    text = text.replace("$address", "127.0.0.1:9876")
    lines = re.findall(rf"{script.__name__}\.py (--[^`#\n(&]*)", text) + re.findall(
        r"`(--actor-device-ids [^`]*)`", text
    )
    lines = [line for line in lines if "--help" not in line]
    assert len(lines) >= 6
    for line in lines:
        args = tyro.cli(script.Args, args=shlex.split(line))
        script.check_args(args, args.num_processes or 1)


def test_flags_of_the_slurm_template_are_valid(script):
    """For the two tasks that it starts; as bash it parses."""
    path = conftest.ROOT / "benchmark" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    line = re.search(r'--distributed (.*?)"\$@"', path.read_text(), re.DOTALL).group(1).replace("\\\n", " ")
    args = tyro.cli(script.Args, args=shlex.split(line))
    script.check_args(args, 2)
