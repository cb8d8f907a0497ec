"""benchmark/compare.py: whether two runs are the same, where they diverge, and what differs."""

import json
import re
import signal
from pathlib import Path

import conftest
import pytest

compare = conftest.load("benchmark/compare")

PLATFORM = {"script": "cleanba_ppo_envpool", "device": "cpu", "jax": "0.10.2", "threads of XLA (NPROC)": 4}
sha = lambda x: f"{x:064x}"


def write_run(name, hashes, *, actors=2, platform=(), end="\n", **flags):
    """Write a run's directory below runs. hashes: [(update, number that becomes its hash)]."""
    run = Path("runs") / name
    run.mkdir(parents=True, exist_ok=True)
    args = dict(seed=1, exp_name="a", channels=[4, 8], learner_device_ids=[0]) | flags
    free = {"exp_name", "learner_device_ids", "log_frequency", "load_model"}
    hyper_parameters = {flag: value for flag, value in args.items() if flag not in free} | {"actors": actors}
    record = dict(args=args, hyper_parameters=hyper_parameters, platform=PLATFORM | dict(platform))
    (run / "run.json").write_text(json.dumps(record))
    (run / "hashes.tsv").write_text("\n".join(f"{update}\t{sha(x)}" for update, x in hashes) + end)


def compared(monkeypatch, capsys, a="a", b="b"):
    """Exit code and output of the command line."""
    monkeypatch.setattr("sys.argv", ["compare.py", a, b])
    with pytest.raises(SystemExit) as end:
        compare.main()
    out, err = capsys.readouterr()
    return int(end.value.code), out or err


def test_the_same_as_far_as_both_logged(monkeypatch, capsys):
    """Only updates that both logged count. A run that still goes on may have written half of its last line."""
    write_run("a", [(1, 1), (10, 10), (20, 20), (30, 30)])
    write_run("b", [(1, 1), (5, 5), (10, 10), (15, 15), (20, 20)], end="\n30\tabc", log_frequency=5)
    code, out = compared(monkeypatch, capsys, "a", "runs/b")
    line = "same: equal in all 3 updates that both logged, to update 20 (logged so far: 30 and 20)"
    table = ["may differ without changing bits  RUN_A      RUN_B", "--log-frequency                   (not set)  5"]
    assert (code, out.splitlines()) == (0, [line, "", *table])


def test_where_they_part_and_what_differs(monkeypatch, capsys):
    write_run("a", [(1, 1), (10, 10), (20, 20), (30, 30)])
    write_run("b", [(1, 1), (10, 10), (20, 21), (30, 31)], seed=2, channels=[4], learner_device_ids=[0, 1],
              exp_name="b", actors=3, platform={"jax": "0.11", "threads of XLA (NPROC)": 2})  # fmt: skip
    code, out = compared(monkeypatch, capsys)
    first, *tables = out.split("\n\n")
    assert code == 1
    assert first == "not the same: last equal at update 10, first different at update 20, of 4 that both logged"
    words = [[line.split("  ")[0] for line in table.splitlines()] for table in tables]
    given = ["--seed", "--channels", "actors in all", "jax", "threads of XLA (NPROC)"]
    assert words[0] == ["changes the bits, or may", *given]
    assert words[1] == ["may differ without changing bits", "--exp-name", "--learner-device-ids"]
    assert [line.split()[-3:] for line in tables[0].splitlines()[1:3]] == [["--seed", "1", "2"], ["4", "8", "4"]]


def test_all_of_the_platform_is_shown(monkeypatch, capsys):
    """The table also shows what only one run has, and what turns out not to change the bits."""
    common = "fma sse4_1 sse4_2 f16c avx avx2 avx512f avx512dq avx512cd avx512bw avx512vl"
    a = {"processor": "AMD EPYC 7B13", "XLA_FLAGS": "--xla_a=1", "jax_enable_x64": True, "instruction set": common}
    b = {"processor": "Intel Xeon", "XLA_FLAGS": "", "instruction set": f"{common} amx_bf16 amx_int8"}
    write_run("a", [(1, 1)], platform=a)
    write_run("b", [(1, 1)], platform=b)
    code, out = compared(monkeypatch, capsys)
    first, table = out.split("\n\n")
    assert (code, first) == (0, "same: equal in all 1 updates that both logged, to update 1")
    assert [re.split(r"  +", line) for line in table.splitlines()[1:]] == [
        ["processor", "AMD EPYC 7B13", "Intel Xeon"],
        ["XLA_FLAGS", "--xla_a=1", "(empty)"],
        ["jax_enable_x64", "True", "(not set)"],
        ["instruction set", "...", "... amx_bf16 amx_int8"],
    ]


@pytest.mark.parametrize("text", ["", '{"args": {"seed": 1', "[]", '{"args": {}}', None])
def test_without_a_whole_run_json_the_hashes_are_compared(monkeypatch, capsys, text):
    """run.json may be half-written, from an older version, or missing."""
    write_run("a", [(1, 1), (2, 2)])
    write_run("b", [(1, 1), (2, 3)], seed=2)
    record = Path("runs/b/run.json")
    record.unlink()
    if text is not None:
        record.write_text(text)
    monkeypatch.setattr("sys.argv", ["compare.py", "a", "b"])
    with pytest.raises(SystemExit) as end:
        compare.main()
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert out.startswith("not the same: last equal at update 1, first different at update 2, of 2 that both logged\n")
    assert out.endswith("\nWhat they were given is not compared: that takes run.json of both.\n")
    assert err.startswith("runs/b/run.json counts as missing, as it cannot be read: " if text is not None else "")


def test_nothing_explains_it(monkeypatch, capsys):
    write_run("a", [(1, 1)])
    write_run("b", [(1, 2)])
    code, out = compared(monkeypatch, capsys)
    assert code == 1
    assert out.startswith("not the same: at no logged update equal, first different at update 1, of 1 that both logged")
    assert "No flag, package, device or setting explains it." in out
    assert "processor" not in out
    assert "XLA_FLAGS" not in out


def test_what_a_resumed_run_writes_again_counts(monkeypatch, capsys):
    """Run b was at update 40 and resumed before 20. What it had logged from 20 on no longer counts."""
    write_run("a", [(1, 1), (10, 10), (20, 20), (30, 30), (40, 40)])
    write_run("b", [(1, 1), (10, 10), (20, 21), (30, 31), (40, 41), (20, 20)])
    assert compared(monkeypatch, capsys)[0] == 0
    write_run("b", [(1, 1), (10, 10), (20, 20), (10, 11), (20, 21)])
    assert "first different at update 10" in compared(monkeypatch, capsys)[1]


def test_errors(monkeypatch, capsys):
    write_run("a", [(1, 1)])
    write_run("b", [(2, 1)])
    Path("runs/empty").mkdir()
    for other, message in {
        "nowhere": "error: RUN_B runs/nowhere: must be a run that has logged ([Errno 2]",
        "empty": "error: RUN_B runs/empty: must be a run that has logged",
        "b": "error: RUN_A and RUN_B b: have no update that both logged. For example: the same --log-frequency",
    }.items():
        code, err = compared(monkeypatch, capsys, b=other)
        assert code == 2
        assert err.startswith(message)
        assert err.count("\n") == 1


@pytest.mark.slow
def test_real_runs(monkeypatch, capsys):
    """A different log frequency and a resume change nothing."""
    script = conftest.load("cleanba_ppo_envpool")
    small = dict(env_id="Breakout-v5", img_size=16, channels=(4,), hiddens=(16,), local_num_envs=4, num_steps=4)
    small |= dict(num_actor_threads=1, num_minibatches=1, update_epochs=1, start_fresh=True, checkpoint_frequency=1)
    whole = dict(total_timesteps=64, log_frequency=1)
    train = lambda name, heard=(), **flags: script.train(script.Args(**small | dict(resume=name) | flags), heard)
    train("a", **whole)
    train("twin", [signal.SIGTERM], **whole | dict(log_frequency=3))
    train("twin", **whole)
    capsys.readouterr()
    code, out = compared(monkeypatch, capsys, "a", "twin")
    assert (code, out.split("\n\n")[0]) == (0, "same: equal in all 4 updates that both logged, to update 4")


def test_a_model_to_start_from_changes_the_bits(monkeypatch, capsys):
    """--load-model is not a hyper-parameter, because a resumed run does not load the model again."""
    write_run("a", [(1, 1)])
    write_run("b", [(1, 2)], load_model="model.msgpack")
    _, out = compared(monkeypatch, capsys)
    assert "changes the bits, or may" in out
    assert "--load-model" in out
    assert "without changing bits" not in out


def test_hyper_parameters_are_all_flags_but_the_free_ones(script):
    args = script.Args()
    _, _, record = script.set_up(args)
    assert set(script.FREE_FLAGS) <= set(record["args"])
    assert set(record["hyper_parameters"]) == set(record["args"]) - set(script.FREE_FLAGS) | {"actors"}
    assert record["hyper_parameters"]["actors"] == args.num_actor_threads
