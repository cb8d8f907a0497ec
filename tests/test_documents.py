"""The documents are true: every command is valid, and every table agrees with the code."""

import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import conftest
import pytest
import sync_siblings
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

README = (conftest.ROOT / "README.md").read_text()
OURS = re.compile(r"(cleanba_|benchmark/|mine)\w*\.py")
DOCUMENTS = ["README.md", "benchmark/README.md", "benchmark/results/README.md"]


def check(program: str, flags: list[str], tasks: int, gpus: str | None) -> None:
    """Check flags as the program itself does on a machine with eight devices, without starting anything."""
    module = conftest.load("cleanba_ppo_envpool" if program == "mine" else program)  # README copies this to mine.py
    if program == "benchmark/gpu":  # its arguments are scripts with their flags
        for name, *own in map(str.split, flags):
            check(name.removesuffix(".py"), own, 1, None)
    elif program.startswith("benchmark/"):
        tyro.cli(module.Options, args=flags)
    else:
        args = tyro.cli(module.Args, args=flags)
        module.check_args(args, args.num_processes or (tasks if args.distributed else 1))
        visible = range(len(gpus.split(",")) if gpus else 8)
        assert {*visible} >= {*args.actor_device_ids, *args.learner_device_ids}, "there are no such devices"


def test_every_command_that_we_tell_people_to_type_is_valid(type_in, type_sweep, capsys):
    """Stand-ins record every command that a shell starts. A sweep is expanded to its runs and its SLURM jobs."""
    records, sources = [], Counter()
    for document in (path for path in DOCUMENTS if (conftest.ROOT / path).exists()):
        for block in re.findall(r"```bash\n(.*?)```", (conftest.ROOT / document).read_text(), re.DOTALL):
            records += type_in(block, document)
    sweeps = [path for path in sorted((conftest.ROOT / "benchmark").glob("*.sh")) if "/run.py" in path.read_text()]
    for path in sweeps:
        records += type_in(f"bash {shlex.quote(f'benchmark/{path.name}')}", path.name)
    for words, source, *_ in records.copy():
        if "benchmark/run.py" in words:
            flags = [word for word in words[words.index("benchmark/run.py") + 1 :] if word != "--slurm"]
            flags += ["--env-ids", "Pong-v5", "--seeds", "1"]
            records += type_in(type_sweep(*flags, "--dry-run"), source)
            records += type_in(f"sbatch <<'END'\n{type_sweep(*flags, '--slurm')}END\n", source)
    for words, source, tasks, gpus, _ in records:
        program = next((i for i, word in enumerate(words) if OURS.match(word)), None)
        if program is not None:
            try:
                check(words[program].removesuffix(".py"), words[program + 1 :], int(tasks or 1), gpus)
            except (Exception, SystemExit) as error:
                pytest.fail(f"{source}: {shlex.join(words)}: {error!r} {capsys.readouterr().err}")
            sources[source] += 1
    assert sources["README.md"] >= 7
    for path in sweeps:
        assert sources[path.name] >= 3  # the sweep, its run, its job


def test_flags_of_the_readme_are_valid(script):
    """Every command line and every row of flags in README.md and the docstring passes the scripts' own validation."""
    text = README + script.__doc__.replace("THIS_FILE", script.__name__)
    text = "\n".join(line for line in text.splitlines() if "benchmark/" not in line)  # the test above checks those
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
    """They are valid for the two tasks that it starts, and the template is valid bash."""
    path = conftest.ROOT / "benchmark" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    line = re.search(r'--distributed (.*?)"\$@"', path.read_text(), re.DOTALL).group(1).replace("\\\n", " ")
    args = tyro.cli(script.Args, args=shlex.split(line))
    script.check_args(args, 2)


def test_ci_runs_the_readme_s_test_command():
    assert "uv run pytest" in README
    assert "uv run pytest" in (conftest.ROOT / ".ci" / "run").read_text()
    assert "uv run pytest" in (conftest.ROOT / ".github" / "workflows" / "tests.yml").read_text()


def test_every_metric_is_in_the_readme(script):
    flags = dict(img_size=16, channels=(4,), local_num_envs=4, num_actor_threads=1, num_steps=8, num_minibatches=1)
    summary = script.train(script.Args(**flags, total_timesteps=32, save_model=True, eval_episodes=1))
    events = EventAccumulator(str(Path("runs", summary["run_name"]))).Reload()
    assert len(events.Tags()["scalars"]) > 15
    assert [name for name in events.Tags()["scalars"] if f"`{name}`" not in README] == []


@pytest.mark.parametrize("sibling", sync_siblings.SIBLINGS, ids=lambda path: path.stem)
def test_lines_that_differ_are_counted(sibling):
    diff = subprocess.run(["diff", sync_siblings.SOURCE, sibling], capture_output=True, text=True).stdout
    changed = sum(line[0] in "<>" for line in diff.splitlines())
    (row,) = [row for row in README.splitlines() if row.startswith(f"| `{sibling.name}` |")]
    assert row.endswith(f"| {changed} |")


@pytest.mark.parametrize(
    "path", sorted((conftest.ROOT / "tests" / "forks").glob("*.patch")), ids=lambda path: path.stem
)
def test_forks_are_listed_with_their_sizes(path):
    shown, diff = path.read_text().split("\n--- ")
    assert len(shown.strip().splitlines()) == 1  # one line says what the fork shows
    added, removed = (len(re.findall(rf"^\{sign}(?!\+\+ )", diff, re.M)) for sign in "+-")
    assert re.search(rf"^\| `{path.name}` \|.*\| {added}, {removed} \|$", README, re.M), (added, removed)
    assert f"**`{path.name}`**" in (path.parent / "README.md").read_text()
