"""A reader who knows one script knows all three: what the files have in common, and how far they may differ."""

import ast
import dataclasses
import subprocess
import sys

import conftest
import pytest
import sync_siblings
from sync_siblings import SIBLINGS, SOURCE

ALLOWED = "envpool flax jax numpy optax tensorboard tyro wandb".split()
BUDGET = {"cleanba_ppo_envpool_impala_atari_wrapper": 60, "cleanba_impala_envpool": 280}
CHANGED = {  # every default that differs from the PPO script's
    "cleanba_ppo_envpool_impala_atari_wrapper": {"local_num_envs": 60, "num_actor_threads": 1, "concurrency": True},
    "cleanba_impala_envpool": {
        "learning_rate": 6e-4,
        "num_steps": 20,
        "max_grad_norm": 40.0,
        "concurrency": True,
    },
}
MISSING = {"cleanba_impala_envpool": {"gae_lambda", "update_epochs", "norm_adv", "clip_coef"}}
SCREEN = 60  # lines


@pytest.mark.parametrize("sibling", SIBLINGS, ids=lambda path: path.stem)
class TestSibling:
    def test_sections(self, sibling):
        assert list(sync_siblings.split(sibling.read_text())) == list(sync_siblings.split(SOURCE.read_text()))

    def test_shared_parts_are_the_same_bytes(self, sibling):
        ours, theirs = sync_siblings.split(SOURCE.read_text()), sync_siblings.split(sibling.read_text())
        titles = [title for title in ours if sync_siblings.shared(title)]
        assert len(titles) == 11
        assert [title for title in titles if ours[title] != theirs[title]] == []

    def test_diff_budget(self, sibling):
        diff = subprocess.run(["diff", SOURCE, sibling], capture_output=True, text=True).stdout.splitlines()
        changed = sum(line[0] in "<>" for line in diff)
        assert 0 < changed <= BUDGET[sibling.stem]

    def test_flags(self, sibling):
        ours, theirs = (conftest.load(path.stem).Args for path in (SOURCE, sibling))
        missing = MISSING.get(sibling.stem, set())
        names = [field.name for field in dataclasses.fields(ours) if field.name not in missing]
        assert [field.name for field in dataclasses.fields(theirs)] == names
        rule = lambda field: getattr(field.type, "__metadata__", [""])[0]  # [1] is a different lambda in each file
        kind = lambda field: (getattr(field.type, "__origin__", field.type), rule(field))
        types = {field.name: kind(field) for field in dataclasses.fields(ours)}
        assert all(kind(field) == types[field.name] for field in dataclasses.fields(theirs))
        same = lambda name: getattr(ours, name) == getattr(theirs, name) or name == "exp_name"
        assert {name: getattr(theirs, name) for name in names if not same(name)} == CHANGED[sibling.stem]


def test_sync_carries_a_change_outward():
    source = sync_siblings.split(SOURCE.read_text())
    title = next(title for title in source if "Hand-off" in title)
    changed = source | {title: source[title] + "# a new line\n", "docstring": "not copied"}
    for sibling in SIBLINGS:
        text = sibling.read_text()
        assert sync_siblings.synced(text, source) == text
        assert sync_siblings.synced(text, changed) == text.replace(source[title], changed[title])


def test_imports(script):
    tree = ast.parse((conftest.ROOT / f"{script.__name__}.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {module.split(".")[0] for module in modules}
    assert roots - set(sys.stdlib_module_names) == set(ALLOWED)


def test_functions_fit_a_screen_and_nest_at_most_twice(script):
    def visit(node, depth):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                length = child.end_lineno - child.lineno + 1
                assert length <= SCREEN, f"{child.name} has {length} lines"
                assert depth < 2, f"{child.name} is nested too deep"
                visit(child, depth + 1)
            else:
                visit(child, depth)

    visit(ast.parse((conftest.ROOT / f"{script.__name__}.py").read_text()), 0)
