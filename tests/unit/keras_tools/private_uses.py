"""Finds, in syntax trees, where code names something private of a library's.

A name is private if it begins with one underscore, or lies in `keras.src` or `tensorflow.python`. Whose it is
a tree does not say. It is taken for hvdext's own, and else for somebody else's:

    other._x  if a class in the same file defines `_x`, unless `_x` is listed as a name of Keras'
    self._x   in classes that inherit from a library's: if some class of hvdext's defines `_x`, unless the
              library's class has one, too (then it is hidden, by accident or on purpose)
    self._x   in other classes: always
    "_x"      as for `other._x`, wherever it stands: it may go to `getattr`, or be a key of `vars()`
"""

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3] / "hvdext"
PRIVATE_PACKAGES = ("keras.src", "tensorflow.python")
_LIBRARIES = ("keras", "tensorflow")
_ACCESS = ("getattr", "setattr", "hasattr", "delattr")
_PRIVATE = re.compile(r"_[A-Za-z]\w*(?<!__)")


@dataclass(frozen=True)
class Use:
    """A private name, and where it stands.

    Attributes:
        file: below the folder that hvdext lies in.
        line: from 1.
        name: the attribute's, function's or module's name.
        owner: the private module that it lies in; "" where a tree does not say.
    """

    file: str
    line: int
    name: str
    owner: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}"


class House:
    """The modules of a package, and which classes there are.

    Args:
        root: the package's folder.
        listed: names that are a library's even where a class of the package defines them as well.
    """

    def __init__(self, root: Path, listed: frozenset[str] = frozenset()):
        self.root, self.listed = root, listed
        self.trees = {file: ast.parse(file.read_text()) for file in sorted(root.rglob("*.py"))}
        self.aliases = {file: _aliases(tree, self._module(file)) for file, tree in self.trees.items()}
        self.classes: dict[str, tuple[Path, ast.ClassDef]] = {}
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.classes[f"{self._module(file)}.{node.name}"] = file, node
        self.own = {name for _, node in self.classes.values() for name in defined_in(node)}
        self.own_by_file: dict[Path, set[str]] = {file: set() for file in self.trees}
        for file, node in self.classes.values():
            self.own_by_file[file] |= defined_in(node).keys()

    def uses(self) -> Iterator[Use]:
        """Every private name of somebody else's."""
        for file, tree in self.trees.items():
            for line, name, owner in sorted(_Walk(self, file).found_in(tree)):
                yield Use(str(file.relative_to(self.root.parent)), line, name, owner)

    def bases_of(self, file: Path, node: ast.ClassDef) -> frozenset[str]:
        """The classes of Keras' and TensorFlow's that a class inherits from, also by way of the package's."""
        found = set()
        for base in node.bases:
            name = self.resolved(file, base)
            if name.split(".")[0] in _LIBRARIES:
                found.add(name)
            elif name in self.classes and self.classes[name][1] is not node:
                found |= self.bases_of(*self.classes[name])
        return frozenset(found)

    def resolved(self, file: Path, expression: ast.expr) -> str:
        """`keras.layers.Dense` for what a file calls so, by whatever alias; "" for what is no dotted name."""
        parts = []
        while isinstance(expression, ast.Attribute):
            parts.append(expression.attr)
            expression = expression.value
        if not isinstance(expression, ast.Name):
            return ""
        first = self.aliases[file].get(expression.id, f"{self._module(file)}.{expression.id}")
        return ".".join([first, *reversed(parts)])

    def _module(self, file: Path) -> str:
        return ".".join(file.relative_to(self.root.parent).with_suffix("").parts)


class _Walk(ast.NodeVisitor):
    """Looks through one file."""

    def __init__(self, house: House, file: Path):
        self._house, self._file = house, file
        self._hidden: list[frozenset[str] | None] = []  # by class around: what its library's bases have
        self._docstrings: set[int] = set()
        self._found: set[tuple[int, str, str]] = set()

    def found_in(self, tree: ast.Module) -> set[tuple[int, str, str]]:
        self._docstrings = set(map(id, _docstrings(tree)))
        self.visit(tree)
        return self._found

    def visit_ClassDef(self, node):
        bases = self._house.bases_of(self._file, node)
        hidden = frozenset().union(*map(names_of, sorted(bases))) if bases else None
        for name, line in defined_in(node).items():
            if hidden and name in hidden:
                self._note(line, name)
        self._hidden.append(hidden)
        self.generic_visit(node)
        self._hidden.pop()

    def visit_Attribute(self, node):
        whole = self._house.resolved(self._file, node)
        if is_within_private(whole):
            self._note(node.lineno, node.attr, whole.removesuffix(f".{node.attr}"))
        elif is_private(node.attr):
            self._judge(node.value, node.attr, node.lineno)
        self.generic_visit(node)

    def visit_Import(self, node):
        for alias in node.names:
            if is_within_private(alias.name):
                self._note(node.lineno, *reversed(alias.name.rpartition(".")[::2]))

    def visit_ImportFrom(self, node):
        for alias in node.names:
            if is_within_private(f"{node.module}.{alias.name}"):
                self._note(node.lineno, alias.name, node.module)
            elif is_private(alias.name) and not (node.module or "").startswith("hvdext"):
                self._note(node.lineno, alias.name, node.module or "")

    def visit_Constant(self, node):
        text = node.value
        if not isinstance(text, str) or id(node) in self._docstrings or text.startswith("_hvdext"):
            return
        if (is_private(text) and self._is_foreign(text)) or (is_within_private(text) and " " not in text):
            self._note(node.lineno, text)

    def visit_JoinedStr(self, node):
        for part in node.values:  # pieces of a text are no names
            if isinstance(part, ast.FormattedValue):
                self.visit(part)

    def visit_Call(self, node):
        is_access = isinstance(node.func, ast.Name) and node.func.id in _ACCESS and len(node.args) > 1
        if is_access and isinstance(node.args[1], ast.JoinedStr):
            first = node.args[1].values[0]
            if isinstance(first, ast.Constant) and re.match("_(?!_|hvdext)", first.value):
                self._note(node.lineno, ast.unparse(node.args[1]))
        for keyword in node.keywords:
            if keyword.arg and is_private(keyword.arg) and self._is_foreign(keyword.arg):
                self._note(node.lineno, keyword.arg)
        self.generic_visit(node)

    def _judge(self, owner, name, line):
        theirs = self._hidden[-1] if self._hidden else None
        if not (_is_self(owner) or _is_super(owner)):
            is_foreign = self._is_foreign(name)
        else:
            is_foreign = theirs is not None and (name in theirs or name not in self._house.own)
        if is_foreign:
            self._note(line, name)

    def _is_foreign(self, name: str) -> bool:
        return name in self._house.listed or name not in self._house.own_by_file[self._file]

    def _note(self, line, name, owner=""):
        self._found.add((line, name, owner))


def is_private(name: str) -> bool:
    """Whether a name begins with an underscore, and is none of Python's own between two of them."""
    return _PRIVATE.fullmatch(name) is not None


def defined_in(node: ast.ClassDef) -> dict[str, int]:
    """The private names that a class defines, methods and what is given to `self` included, with lines."""
    found = {}
    for child in node.body:
        targets = [child.target] if isinstance(child, ast.AnnAssign) else getattr(child, "targets", [])
        found.update((t.id, t.lineno) for t in targets if isinstance(t, ast.Name))
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[child.name] = child.lineno
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and _is_self(child.value):
            found.setdefault(child.attr, child.lineno)
    return {name: line for name, line in found.items() if is_private(name)}


@functools.cache
def names_of(path: str) -> frozenset[str]:
    """The names of a library's class or module.

    Of a class also the private ones that its methods give to `self`; of a module those that it gives to
    other objects, and its texts, which may be keys.
    """
    owner = imported(path)
    names = set(dir(owner))
    if isinstance(owner, type):
        for base in owner.__mro__[:-1]:
            names |= defined_in(*tree.body).keys() if (tree := _source(base)) else set()
    elif tree := _source(owner):
        nodes = list(ast.walk(tree))
        names |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        names |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return frozenset(names)


def _source(owner) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError):  # written in C
        return None


def imported(path: str):
    """The module, or what stands in one, at a dotted path.

    Raises:
        AttributeError, ImportError: if there is nothing.
    """
    try:
        return importlib.import_module(path)
    except ImportError:
        module, _, name = path.rpartition(".")
        if not module:
            raise
        return getattr(imported(module), name)


def _aliases(tree, module) -> dict[str, str]:
    """What the names that a file imports stand for, wherever in the file it does."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            found.update((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
    return found


def _docstrings(tree):
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if not isinstance(node, (ast.Lambda, ast.IfExp)) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                yield child.value


def is_within_private(module: str) -> bool:
    """Whether a dotted path leads into what a library keeps to itself."""
    return any(module == package or module.startswith(f"{package}.") for package in PRIVATE_PACKAGES)


def _is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_super(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
