"""Limits on how much a reader of a script has to hold in mind: one idea per statement."""

import ast
import io
import statistics
import token
import tokenize

import conftest
import pytest

SILENT = (token.COMMENT, token.NL, token.INDENT, token.DEDENT, token.ENDMARKER)
FSTRING = tuple(getattr(token, name, None) for name in ("FSTRING_START", "FSTRING_END"))  # Python 3.12 and newer


def statements(text):
    """[(line, number of tokens)] of all statements, however they are wrapped, without docstrings and comments."""
    found, parts, nested = [], [], 0
    for part in tokenize.generate_tokens(io.StringIO(text).readline):
        if part.type == token.NEWLINE:
            if [p.type for p in parts] != [token.STRING]:
                found.append((parts[0].start[0], len(parts)))
            parts = []
        elif part.type not in SILENT and not nested:  # an f-string is one token, as it was before Python 3.12
            parts.append(part)
        nested += (part.type == FSTRING[0]) - (part.type == FSTRING[1])
    return found


@pytest.fixture
def text(script):
    return (conftest.ROOT / f"{script.__name__}.py").read_text()


def test_statements_are_counted():
    text = '"""A docstring."""\nx = f(  # a comment\n    1,\n    f"{2:>{3}} {4}",\n)\n\nif x: y = 1\n'
    assert statements(text) == [(2, 9), (7, 6)]


def test_statements_hold_one_idea(text):
    sizes = [size for _, size in statements(text)]
    assert sum(sizes) <= 11_200
    assert statistics.mean(sizes) <= 12
    assert statistics.median(sizes) <= 10
    assert statistics.quantiles(sizes, n=10)[-1] <= 23


def test_no_section_is_dense(text):
    titles = [i for i, line in enumerate(text.splitlines(), 1) if line.startswith("# === ")]
    assert len(titles) > 10
    sections = {}
    for line, size in statements(text):
        sections.setdefault(sum(title < line for title in titles), []).append(size)
    assert [i for i, sizes in sections.items() if i and statistics.mean(sizes) > 14] == []


def test_habits(text):
    nodes = [*ast.walk(ast.parse(text))]
    simple = [node for node in nodes if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    calls = [sum(isinstance(part, ast.Call) for part in ast.walk(node)) for node in simple]
    assert sum(n >= 3 for n in calls) <= 0.06 * len(simple)
    assigned = [(node.targets[0], node.value) for node in nodes if isinstance(node, ast.Assign)]
    assert sum(isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) for target, value in assigned) <= 12
    assert sum(isinstance(value, ast.Lambda) for _, value in assigned) <= 6
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert len(arguments) <= 7, f"{node.name} has {len(arguments)} parameters"
