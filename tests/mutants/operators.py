"""Every small change of a source file that a test should notice.

What is not changed, by rule: annotations, docstrings, decorators, imports, ``assert`` and ``zip(strict=...)`` (they are
for our own bugs), the texts of ``log`` calls, loggers, ``__all__``, names of type variables, and the classes that
``except`` names.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.MatMult: ast.Mult,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Fields that are not looked into.
LEFT_ALONE = {
    ast.FunctionDef: ("returns", "decorator_list"),
    ast.AsyncFunctionDef: ("returns", "decorator_list"),
    ast.ClassDef: ("decorator_list",),
    ast.arg: ("annotation",),
    ast.AnnAssign: ("annotation",),
    ast.ExceptHandler: ("type",),
    ast.FormattedValue: ("format_spec",),
    ast.Raise: ("cause",),
}


@dataclass(frozen=True, eq=False)
class Place:
    """A child of a node of the syntax tree, which can be replaced."""

    parent: ast.AST
    field: str
    index: int | None = None

    def put(self, node: Any) -> None:
        """Put another node there."""
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node

    def get(self) -> Any:
        """Return the node that is there."""
        child = getattr(self.parent, self.field)
        return child if self.index is None else child[self.index]


@dataclass(frozen=True, eq=False)
class Mutant:
    """One change.

    Attributes:
        file: Path from the root of the repository.
        function: Qualified name of what it is in; ``<module>`` outside of functions.
        line: Text of the line that it begins in.
        change: What becomes what.
        lines: Numbers of the lines of the statement, or of the head of a compound one.
        around: Numbers of the lines of the function, outside of functions of the statement.
        place: Where the new node goes.
        new: The new node.
        outer: Name, first line of the outermost function around it; None where it happens at import.
    """

    file: str
    function: str
    line: str
    change: str
    lines: range
    around: range
    place: Place
    new: Any
    outer: tuple[str, int] | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is called in ``survivors.toml``. It stays when lines are added elsewhere in the file."""
        return self.file, self.function, self.line, self.change


@dataclass(frozen=True)
class _Where:
    """Where the walk through a file is. See the attributes of ``Mutant``."""

    names: tuple[str, ...] = ()
    outer: tuple[str, int] | None = None
    around: range | None = None
    lines: range | None = None


class Mutants:
    """All mutants of a source file, and the code of each."""

    def __init__(self, file: str, source: str, absolute: str) -> None:
        self.file = file
        self.lines = source.splitlines()
        self.absolute = absolute
        self.tree = ast.parse(source)
        self._seen: Counter[tuple[str, ...]] = Counter()
        self.all = list(self._of_children(self.tree, _Where()))

    def code(self, mutant: Mutant) -> CodeType:
        """Compile the file with one change."""
        old = mutant.place.get()
        mutant.place.put(ast.fix_missing_locations(ast.copy_location(mutant.new, old)) if mutant.new else None)
        try:
            return compile(self.tree, self.absolute, "exec", dont_inherit=True)
        finally:
            mutant.place.put(old)

    # ---- the walk ---------------------------------------------------------------------------------------------------

    def _of_children(self, node: ast.AST, where: _Where) -> Iterator[Mutant]:
        for field, value in ast.iter_fields(node):
            if field in LEFT_ALONE.get(type(node), ()):
                continue
            inner = where
            if isinstance(node, Function) and field == "body" and where.outer is None:
                inner = replace(where, outer=(".".join(where.names), _first_line(node)), around=_lines(node))
            children = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for index, child in children:
                if isinstance(child, ast.AST) and not _is_left_alone(node, child):
                    yield from self._of(Place(node, field, index), inner)

    def _of(self, place: Place, where: _Where) -> Iterator[Mutant]:
        node = place.get()
        if isinstance(node, ast.stmt):
            where = replace(where, lines=None if hasattr(node, "body") else _lines(node))
        for new, change in replacements(node, place.parent):
            yield self._mutant(place, new, change, where)
        nested = ("<locals>",) if where.outer else ()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            where = replace(where, names=(*where.names, *nested, node.name))
        elif isinstance(node, ast.Lambda):
            where = replace(where, names=(*where.names, *nested, "<lambda>"))
        yield from self._of_children(node, where)

    def _mutant(self, place: Place, new: Any, change: str, where: _Where) -> Mutant:
        own = _lines(place.get())
        function, line = ".".join(where.names) or "<module>", self.lines[own[0] - 1].strip()
        self._seen[function, line, change] += 1
        count = self._seen[function, line, change]
        change = change if count == 1 else f"{change} #{count}"
        lines = where.lines or own
        return Mutant(self.file, function, line, change, lines, where.around or lines, place, new, where.outer)


def _lines(node: Any) -> range:
    return range(node.lineno, node.end_lineno + 1)


def _first_line(node: Function) -> int:
    """Return the line that the code object of a function begins at, which is that of its first decorator."""
    decorators = getattr(node, "decorator_list", [])
    return decorators[0].lineno if decorators else node.lineno


def _is_left_alone(parent: ast.AST, node: ast.AST) -> bool:
    if isinstance(node, ast.Assert | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "log"):
        return True
    if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("TypeVar("):
        return True
    if isinstance(parent, ast.Call) and _is_log(parent):
        return isinstance(node, ast.Constant | ast.JoinedStr)
    return isinstance(node, ast.keyword) and node.arg == "strict"


def _is_log(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")


# ---- what becomes what ----------------------------------------------------------------------------------------------


def replacements(node: Any, parent: ast.AST) -> Iterator[tuple[Any, str]]:
    """Yield what a node may become, with a text for the reader."""
    for kind, make in MAKERS.items():
        if isinstance(node, kind):
            yield from make(node, parent)
    if _is_condition(node, parent) and not isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node), f"{_text(node)} -> not {_text(node)}"


def _is_condition(node: Any, parent: ast.AST) -> bool:
    if isinstance(parent, ast.If | ast.IfExp | ast.While):
        return node is parent.test
    return isinstance(parent, ast.comprehension) and node in parent.ifs


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _constant(node: ast.Constant, parent: ast.AST) -> Iterator[tuple[Any, str]]:
    value: Any = node.value
    if isinstance(parent, ast.JoinedStr):
        # One change of a text is enough; the first part that has any.
        parts = [part for part in parent.values if isinstance(part, ast.Constant) and part.value.strip()]
        if not parts or node is not parts[0]:
            return
    if isinstance(value, bool):
        yield ast.Constant(not value), f"{value} -> {not value}"
    elif isinstance(value, int | float):
        yield ast.Constant(value + 1), f"{value} -> {value + 1}"
    elif isinstance(value, str):
        yield ast.Constant(f"XX{value}XX"), f"{_text(node)} -> XX"
    elif isinstance(value, bytes):
        yield ast.Constant(b"XX" + value), f"{_text(node)} -> XX"


def _compare(node: ast.Compare, parent: ast.AST) -> Iterator[tuple[Any, str]]:
    for index, operator in enumerate(node.ops):
        other = COMPARISONS[type(operator)]()
        operators = [*node.ops[:index], other, *node.ops[index + 1 :]]
        new = ast.Compare(node.left, operators, node.comparators)
        yield new, f"{_text(node)} -> {type(other).__name__}"


def _arithmetic(node: ast.BinOp | ast.AugAssign, parent: ast.AST) -> Iterator[tuple[Any, str]]:
    other = ARITHMETIC[type(node.op)]()
    if isinstance(node, ast.BinOp):
        yield ast.BinOp(node.left, other, node.right), f"{_text(node)} -> {type(other).__name__}"
    else:
        yield ast.AugAssign(node.target, other, node.value), f"{_text(node)} -> {type(other).__name__}"
        yield ast.Pass(), f"{_text(node)} -> pass"


def _boolean(node: ast.BoolOp, parent: ast.AST) -> Iterator[tuple[Any, str]]:
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield ast.BoolOp(other, node.values), f"{_text(node)} -> {type(other).__name__}"


def _unary(node: ast.UnaryOp, parent: ast.AST) -> Iterator[tuple[Any, str]]:
    yield node.operand, f"{_text(node)} -> {_text(node.operand)}"


def _name(node: ast.Name, parent: ast.AST) -> Iterator[tuple[Any, str]]:
    if node.id in NAMES and isinstance(parent, ast.Call) and node is parent.func:
        yield ast.Name(NAMES[node.id], ast.Load()), f"{node.id} -> {NAMES[node.id]}"


def _format(node: ast.FormattedValue, parent: ast.AST) -> Iterator[tuple[Any, str]]:
    if node.format_spec is not None:
        yield ast.FormattedValue(node.value, node.conversion), f"{_text(node.value)} -> without its format"


def _statement(node: ast.stmt, parent: ast.AST) -> Iterator[tuple[Any, str]]:
    if isinstance(node, ast.Return):
        if node.value is not None and ast.unparse(node.value) != "None":
            yield ast.Return(ast.Constant(None)), f"{_text(node)} -> return None"
        elif node.value is None:
            yield ast.Pass(), "return -> pass"
    elif isinstance(node, ast.Continue | ast.Break):
        other = ast.Break() if isinstance(node, ast.Continue) else ast.Continue()
        yield other, f"{_text(node)} -> {_text(other)}"
    elif _can_go(node):
        yield ast.Pass(), f"{_text(node)} -> pass"


def _can_go(node: ast.stmt) -> bool:
    """Return whether a statement can be left out without leaving a name unknown."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    return isinstance(node, ast.Raise | ast.Delete)


MAKERS: dict[Any, Any] = {
    ast.Constant: _constant,
    ast.Compare: _compare,
    ast.BinOp | ast.AugAssign: _arithmetic,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _unary,
    ast.Name: _name,
    ast.FormattedValue: _format,
    ast.Return | ast.Continue | ast.Break | ast.Expr | ast.Assign | ast.Raise | ast.Delete: _statement,
}
