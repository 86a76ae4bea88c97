"""Pages that can be read: columns, sizes, no line that does two things. Limits are limits, not aims."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# file: (lines, characters) at most, 0 = any. README.md comes later: 200 lines, 14 KB
LIMITS = {
    'train_gpt2.py': (625, 31200),
    'configurator.py': (170, 0),
    'model.py': (645, 0),  # its GPT half
    'prepare/fineweb.py': (0, 0),
    'prepare/hellaswag.py': (0, 0),
    'prepare/pydocs.py': (0, 0),
}
COLUMNS = {name: 100 for name in LIMITS}
COLUMNS.update({f'tests/test_{name}.py': 110 for name in ('reliability', 'fences', 'style')})
# the first line that is not of the new form yet
UNTIL = {'model.py': '# What stands from here on is of the four other scripts'}


def read(name):
    """The part of a file that is of the new form, as lines."""
    lines = (ROOT / name).read_text().splitlines()
    end = [i for i, line in enumerate(lines) if name in UNTIL and line.startswith(UNTIL[name])]
    return lines[:end[0]] if end else lines


@pytest.mark.parametrize('name', COLUMNS)
def test_columns(name):
    assert [f'{i}: {line}' for i, line in enumerate(read(name), 1) if len(line) > COLUMNS[name]] == []


@pytest.mark.parametrize('name', [name for name in LIMITS if any(LIMITS[name])])
def test_size(name):
    lines, characters = LIMITS[name]
    source = read(name)
    assert len(source) <= lines
    assert not characters or len('\n'.join(source)) <= characters


def crowded(source):
    """What does too much at once, as (line, what)."""
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        inside = list(ast.walk(node))[1:]
        if isinstance(node, ast.NamedExpr):
            found.append((node.lineno, 'walrus'))
        if isinstance(node, ast.IfExp) and any(isinstance(part, ast.IfExp) for part in inside):
            found.append((node.lineno, 'a conditional expression inside another'))
        clauses = [1 + len(part.ifs) for part in getattr(node, 'generators', [])]
        if sum(clauses) > 2:
            found.append((node.lineno, 'a comprehension of more than two clauses'))
        for block in ('body', 'orelse', 'finalbody'):
            statements = getattr(node, block, [])
            ends = [s.end_lineno for s in statements] if isinstance(statements, list) else []
            begins = [s.lineno for s in statements[1:]] if ends else []
            found += [(line, 'a semicolon') for line, end in zip(begins, ends, strict=False) if line == end]
    return sorted(found)


@pytest.mark.parametrize('name', LIMITS)
def test_one_thing_a_line(name):
    assert crowded('\n'.join(read(name))) == []


def test_what_is_crowded_is_seen():
    source = '(n := 1)\nx = 1 if n else (2 if x else 3)\ny = [a for b in c if b for a in b]\nx = 1; y = 2'
    whats = ['walrus', 'a conditional expression', 'a comprehension', 'a semicolon']
    assert [(line, what) for line, what in enumerate(whats, 1)] == \
        [(line, next(w for w in whats if what.startswith(w))) for line, what in crowded(source)]
