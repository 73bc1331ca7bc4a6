"""The house keeps its order: imports go down, no circle, few files in the hall, none too large.

Everything is read from the syntax tree: imports within functions count, those for type checkers do not.
"""

import ast
import functools
import itertools
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "hvdext"
MOST_LINES = 450
MOST_AT_ROOT = 4

# A room may import from its own floor, as long as there is no circle, and from lower ones.
FLOORS = [
    {"common", "keras_tools"},
    {"comm", "engine"},
    {"collectives", "data", "launch", "config", "sync_batch_norm", "testing"},
    {"gradients"},
    {"placement", "sync", "elastic"},
    {"inference", "consensus"},
    {"serving", "callbacks"},
    {"strategy", "cli"},
]


def modules():
    """Module name -> file, for all of hvdext but the hall's own `__init__`, which names modules only."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = ("hvdext", *file.relative_to(ROOT).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != "hvdext":
            found[name] = file
    return found


def imports_of(tree):
    """What a module imports of hvdext: (module or module.name, line); not what type checkers alone see."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hvdext":
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("hvdext."):
                    yield alias.name, node.lineno


@functools.cache
def arrows():
    """(importing module, imported module, line) for each import of one module of hvdext by another."""
    known, found = modules(), []
    for name, file in known.items():
        for target, line in imports_of(ast.parse(file.read_text())):
            while target not in known and target != "hvdext":
                target = target.rpartition(".")[0]
            if target not in ("hvdext", name):
                found.append((name, target, line))
    return found


def room(module, depth):
    """The folder a module lies in, at most `depth` names below hvdext; a file beside folders is its own."""
    parts = module.split(".")[1:]
    is_package = (ROOT / Path(*parts)).is_dir()
    folders = parts if is_package else parts[:-1]
    return ".".join(folders[:depth]) if folders else parts[0]


@pytest.mark.slow
def test_no_import_goes_up():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    up = [
        f"{source}:{line} (floor {floor[room(source, 1)] + 1}, {room(source, 1)}) imports "
        f"{target} (floor {floor[room(target, 1)] + 1}, {room(target, 1)})"
        for source, target, line in arrows()
        if floor[room(source, 1)] < floor[room(target, 1)]
    ]
    assert not up, "imports go down only:\n" + "\n".join(up)


@pytest.mark.parametrize("depth", [1, 2, 9], ids=["rooms", "one below", "files"])
def test_there_is_no_circle(depth):
    edges, examples = defaultdict(set), {}
    for source, target, line in arrows():
        a, b = (source, target) if depth == 9 else (room(source, depth), room(target, depth))
        # What a package re-exports to its users is its door, not an arrow among its files.
        inside = depth != 9 and (a.startswith(f"{b}.") or b.startswith(f"{a}."))
        if a != b and not inside:
            edges[a].add(b)
            examples.setdefault((a, b), f"{source}:{line} imports {target}")
    circle = find_circle(edges)
    assert circle is None, "a circle:\n" + "\n".join(examples[pair] for pair in itertools.pairwise(circle))


def find_circle(edges):
    """The nodes of one circle, the first again at its end; None if there is none."""
    state = {}

    def visit(node, path):
        state[node] = "open"
        for following in sorted(edges.get(node, ())):
            if state.get(following) == "open":
                return [*path[path.index(following) :], following]
            if following not in state:
                found = visit(following, [*path, following])
                if found is not None:
                    return found
        state[node] = "done"
        return None

    for start in sorted(edges):
        if start not in state:
            found = visit(start, [start])
            if found is not None:
                return found
    return None


def test_a_circle_is_found_and_named():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}}) is None


def test_the_hall_and_the_files_are_small():
    hall = sorted(file.name for file in ROOT.glob("*.py"))
    assert len(hall) <= MOST_AT_ROOT, f"at the root of hvdext/ there is room for {MOST_AT_ROOT}: {hall}"
    lines = {str(f.relative_to(ROOT.parent)): len(f.read_text().splitlines()) for f in modules().values()}
    large = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not large, f"a file has one job, and at most {MOST_LINES} lines: {large}"
    assert {name.split(".")[1] for name in modules()} <= set().union(*FLOORS)
