"""Single small mistakes in source files: finding the places where one fits, and importing a module with one made.

A mutant changes one node of a module's syntax tree. Texts, annotations, messages and decorators stay as they are. The
file itself is never written: `install` lets the import system compile the changed tree in place of the file's.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OTHER_COMPARISON = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OTHER_OPERATOR = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
OTHER_FUNCTION = {
    "min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil", "add": "sub",
    "sin": "cos", "cos": "sin", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "rmtree": "isdir",
}  # fmt: skip
#: methods and functions that hand on their object, changed a little
PASSING_METHODS = {"float", "clone", "detach", "strip", "lower", "resolve", "absolute", "double", "sort", "contiguous"}
PASSING_FUNCTIONS = {"sorted", "set", "abs", "round", "reversed", "int", "float", "ceil", "floor", "sqrt", "exp", "log"}
MESSAGES = {"debug", "info", "warning", "error", "exception", "warn", "print"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Mutant:
    """One mistake. `first`..`last` are the lines of its node, `scope` those of its statement; `number` tells it apart.

    `is_import` is true where the code runs when the module is imported.
    """

    file: str  # relative to the root
    number: int  # among the edits of the file
    kind: str
    first: int
    last: int
    scope: tuple[int, int]
    is_import: bool
    before: str
    after: str

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py").replace("/", ".")

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Mutant:
        """What `to_json` gave; other keys are left out."""
        values = json.loads(text)
        return cls(**{name: values[name] for name in cls.__dataclass_fields__} | {"scope": tuple(values["scope"])})

    def __str__(self) -> str:
        return f"{self.file}:{self.first}  {self.kind}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Edit:
    """A change of one field of a node (or one item of a list in it)."""

    kind: str
    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None
    new: ast.AST | None  # None: the item is taken out

    def make(self) -> None:
        """Change the tree."""
        if self.index is None:
            setattr(self.parent, self.field, self.new)
            return
        items: list[ast.AST] = getattr(self.parent, self.field)
        items[self.index : self.index + 1] = [] if self.new is None else [self.new]
        if self.new is None and isinstance(self.parent, ast.Dict):
            del self.parent.values[self.index]

    def texts(self) -> tuple[str, str]:
        """The node before and after, each on one line."""
        if isinstance(self.node, ast.keyword):
            return f"{self.node.arg}={_short(self.node.value)}", "(left out)"
        return _short(self.node), "(left out)" if self.new is None else _short(self.new)


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:87]}..."


@dataclass(frozen=True)
class Place:
    """Where a node stands: the field that holds it, its statement, and whether that runs on import."""

    parent: ast.AST
    field: str
    index: int | None
    statement: ast.stmt
    is_import: bool


def mutants_of(path: Path, defaults: Mapping[str, Any]) -> list[Mutant]:
    """Every mutant of a source file, in the order of `edits_of`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for number, (edit, place) in enumerate(edits_of(tree, defaults)):
        node: Any = edit.node
        statement = place.statement
        before, after = edit.texts()
        last = node.test.end_lineno if isinstance(node, ast.If | ast.While) else node.end_lineno
        found.append(
            Mutant(
                path.resolve().relative_to(ROOT).as_posix(), number, edit.kind, node.lineno, last,
                (statement.lineno, _end_of_head(statement)), place.is_import, before, after,
            )
        )  # fmt: skip
    return found


def _end_of_head(statement: ast.stmt) -> int:
    """The last line of a statement, without the statements that it holds."""
    body = getattr(statement, "body", None)
    return max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno or statement.lineno


def edits_of(tree: ast.Module, defaults: Mapping[str, Any]) -> Iterator[tuple[Edit, Place]]:
    """Every edit of a module; `defaults` holds the default value of each option by name."""
    for node, place in _walk(tree, None, is_import=True):
        for kind, new in _changes(node, place, defaults):
            if new is not None:
                ast.copy_location(new, node)
                ast.fix_missing_locations(new)
            yield Edit(kind, node, place.parent, place.field, place.index, new), place


def _walk(parent: ast.AST, statement: ast.stmt | None, *, is_import: bool) -> Iterator[tuple[ast.AST, Place]]:
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else ((None, value),):
            if not isinstance(node, ast.AST) or _is_skipped(node):
                continue
            of = node if isinstance(node, ast.stmt) else statement
            inside = is_import and not (isinstance(parent, FUNCTIONS) and field == "body")
            if of is not None:
                yield node, Place(parent, field, index, of, inside)
            yield from _walk(node, of, is_import=inside)


def _is_skipped(node: ast.AST) -> bool:
    """Messages, docstrings, imports, what is only for type checkers, and errors' texts."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Raise | ast.Global | ast.Assert):
        return True
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr):
        value = node.value
        return isinstance(value, ast.Constant) or isinstance(value, ast.Call) and name_of(value.func) in MESSAGES
    if isinstance(node, ast.Assign) and any(name_of(target) in ("__all__", "logger") for target in node.targets):
        return True
    return isinstance(node, ast.Call) and name_of(node.func) in ("TypeVar", "cast", "getLogger")


def name_of(node: ast.AST) -> str:
    """The last name of a dotted expression; empty for others."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


Change = tuple[str, ast.AST | None]


def _changes(node: ast.AST, place: Place, defaults: Mapping[str, Any]) -> Iterator[Change]:
    """(kind, new node) for each mistake that can be made at a node; a new node None takes an item out."""
    for makes in (_of_operators, _of_conditions, _of_statements, _of_constants, _of_calls):
        yield from makes(node, place)
    if isinstance(node, ast.Attribute) and node.attr in defaults and _is_read_from_record(node, place):
        yield "option not read", ast.Constant(defaults[node.attr])


def _is_read_from_record(node: ast.Attribute, place: Place) -> bool:
    """Whether the attribute may be an option: it is read, not called, and no name of a package."""
    return (
        isinstance(node.ctx, ast.Load) and place.field != "func" and name_of(node.value) not in ("torch", "os", "cls")
    )


def _of_operators(node: ast.AST, place: Place) -> Iterator[Change]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OTHER_COMPARISON:
        yield "comparison", ast.Compare(node.left, [OTHER_COMPARISON[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.Compare) and len(node.ops) == 2:
        yield "comparison", ast.Compare(node.left, node.ops[:1], node.comparators[:1])
    if isinstance(node, ast.BoolOp):
        yield "and/or", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for index in range(len(node.values)):
            rest = [value for number, value in enumerate(node.values) if number != index]
            yield "part of a condition", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    if isinstance(node, ast.BinOp) and type(node.op) in OTHER_OPERATOR and not _has_text(node):
        yield "operator", ast.BinOp(node.left, OTHER_OPERATOR[type(node.op)](), node.right)
    if isinstance(node, ast.AugAssign) and type(node.op) in OTHER_OPERATOR:
        yield "operator", ast.AugAssign(node.target, OTHER_OPERATOR[type(node.op)](), node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "sign", node.operand


def _has_text(node: ast.BinOp) -> bool:
    """Whether the operands are texts, types or sets, whose operators mean something else."""
    sides = [each for side in (node.left, node.right) for each in ast.walk(side)]
    return any(isinstance(each, ast.JoinedStr) or _is_text(each) for each in sides)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes | type(None))


def _of_conditions(node: ast.AST, place: Place) -> Iterator[Change]:
    if place.field == "test" and isinstance(place.parent, ast.If | ast.IfExp) or place.field == "ifs":
        if not isinstance(node, ast.UnaryOp):
            yield "negated condition", ast.UnaryOp(ast.Not(), node)
        yield "condition always true", ast.Constant(True)
        yield "condition always false", ast.Constant(False)
    if isinstance(node, ast.Continue):
        yield "continue/break", ast.Break()
    if isinstance(node, ast.Break):
        yield "continue/break", ast.Continue()


def _of_statements(node: ast.AST, place: Place) -> Iterator[Change]:
    if not isinstance(node, ast.stmt) or not isinstance(place.index, int):
        return
    is_store = isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets
    )
    if is_store or isinstance(node, ast.Expr | ast.AugAssign | ast.Delete):
        yield "dropped statement", ast.Pass()
    if isinstance(node, ast.With) and all(item.optional_vars is None for item in node.items):
        yield "dropped context", ast.If(ast.Constant(True), node.body, [])
    returns = place.parent.returns if isinstance(place.parent, ast.FunctionDef) else None
    is_procedure = isinstance(returns, ast.Constant) and returns.value is None
    if is_procedure and place.index > 0 and isinstance(node, ast.Expr | ast.If | ast.For | ast.With | ast.Assign):
        yield "early return", ast.Return(None)


def _of_constants(node: ast.AST, place: Place) -> Iterator[Change]:
    if not isinstance(node, ast.Constant) or isinstance(place.parent, ast.FormattedValue):
        return
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(1 if value == 0 else 0 if value == 1 else value + 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(1.0 if value == 0 else value * 2)
    elif value is None and place.field == "orelse":
        yield "constant", ast.Constant(0)


def _of_calls(node: ast.AST, place: Place) -> Iterator[Change]:
    if isinstance(node, ast.keyword) and node.arg is not None:
        yield "dropped argument", None
    if isinstance(place.parent, ast.Tuple | ast.Set | ast.List) and place.field == "elts" and place.is_import:
        if len(place.parent.elts) > 2 and isinstance(getattr(place.parent, "ctx", None), ast.Load | None):
            yield "entry left out", None
    if isinstance(place.parent, ast.Dict) and place.field == "keys" and len(place.parent.keys) > 1:
        yield "entry left out", None
    if not isinstance(node, ast.Call):
        return
    if (name := name_of(node.func)) in OTHER_FUNCTION:
        other = OTHER_FUNCTION[name]
        function = node.func
        renamed = ast.Name(other, ast.Load()) if isinstance(function, ast.Name) else None
        if isinstance(function, ast.Attribute):
            renamed = ast.Attribute(function.value, other, ast.Load())
        yield "other function", ast.Call(renamed, node.args, node.keywords)
    if isinstance(node.func, ast.Attribute) and not node.args and not node.keywords and name in PASSING_METHODS:
        yield "dropped call", node.func.value
    if name in PASSING_FUNCTIONS and len(node.args) == 1 and not node.keywords:
        yield "dropped call", node.args[0]


# --- importing a mutant ----------------------------------------------------------------------------------------
def option_defaults(folder: Path = ROOT / "library" / "options") -> dict[str, Any]:
    """The default of every option by name, read from the declarations without importing them."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
                continue
            kind = name_of(node.value.func)
            if kind in ("option", "flag"):
                found[name_of(node.target)] = False if kind == "flag" else _default_in(node.value)
    return found


def _default_in(call: ast.Call) -> Any:
    given: Sequence[ast.expr] = [word.value for word in call.keywords if word.arg == "default"] or call.args[1:2]
    return given[0].value if given and isinstance(given[0], ast.Constant) else None


def compiled(mutant: Mutant, filename: str) -> CodeType:
    """The code of the module with the mistake in it."""
    tree = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))
    edits = [edit for edit, _ in edits_of(tree, option_defaults())]
    edit = edits[mutant.number]
    if edit.texts() != (mutant.before, mutant.after):
        raise ValueError(f"{mutant.file} has changed since the mutant was made: {mutant}")
    edit.make()
    return compile(tree, filename, "exec")


def install(mutant: Mutant) -> None:
    """From now on importing the mutant's module gives the mutant, in this process and its forks."""

    class Loader(SourceFileLoader):
        def get_code(self, fullname: str) -> CodeType:
            return compiled(mutant, self.get_filename(fullname))

    class Finder:
        find_spec: Callable[..., ModuleSpec | None]

        def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: F811
            if fullname != mutant.module:
                return None
            file = str(ROOT / mutant.file)
            return importlib.util.spec_from_file_location(fullname, file, loader=Loader(fullname, file))

    sys.meta_path.insert(0, Finder())
