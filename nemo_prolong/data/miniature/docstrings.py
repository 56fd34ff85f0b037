"""API documentation as text, read from source with ``ast``; packages are never imported.

Two uses: a package's whole reference as one long document, and questions with their answers as conversations.
"""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

Messages = list[dict[str, str]]
"""A conversation: ``{"role": "user" | "assistant" | "system", "content": ...}``."""

_MIN_DOCSTRING_CHARACTERS = 20
_MAX_SIGNATURE_CHARACTERS = 300
_MIN_ANSWER_CHARACTERS = 80
_MAX_ANSWER_CHARACTERS = 4000
_MULTI_TURN_SHARE = 0.5

_FUNCTION_QUESTIONS = (
    "What does `{name}` in the module `{module}` do?\n\n{signature}",
    "Explain the Python function `{signature}` from `{module}`.",
    "Write the docstring of this function of `{module}`:\n\n{signature}",
    "How do I use `{module}.{name}`? Its signature is `{signature}`.",
    "I found `{signature}` in `{module}`. What is it for?",
    "Document `{signature}` (module `{module}`).",
)
_METHOD_QUESTIONS = (
    "What does the method `{name}` in the module `{module}` do?\n\n{signature}",
    "Explain `{signature}` of the class `{owner}` in `{module}`.",
    "Write the docstring of this method of `{owner}`:\n\n{signature}",
    "When would I call `{name}`? Its signature is `{signature}`.",
)
_FOLLOW_UP_QUESTIONS = (
    "And what about `{signature}`?",
    "Thanks. What does `{signature}` of the same class do?",
    "Now explain `{signature}`.",
)


@dataclass(frozen=True)
class ApiEntry:
    """One documented module, class or function.

    Attributes:
        kind: ``module``, ``class`` or ``function``.
        module: Dotted module name.
        name: Name inside the module, e.g. ``Path.glob``; empty for a module.
        signature: ``glob(self, pattern)``; the name itself for modules and classes.
        docstring: Cleaned docstring.
    """

    kind: str
    module: str
    name: str
    signature: str
    docstring: str

    @property
    def owner(self) -> str:
        """Class that holds a method; empty elsewhere."""
        return self.name.rpartition(".")[0]


def api_entries(source: str, relative: str) -> list[ApiEntry]:
    """Return the documented names of one Python file in source order; none where it does not parse.

    Args:
        source: Text of the file.
        relative: Its path below the root, e.g. ``json/decoder.py``.
    """
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    return [entry for entry in _walk(tree, module, "") if len(entry.docstring) >= _MIN_DOCSTRING_CHARACTERS]


def _walk(node: ast.Module | ast.ClassDef, module: str, prefix: str) -> Iterator[ApiEntry]:
    kind = "module" if isinstance(node, ast.Module) else "class"
    name = prefix.removesuffix(".")
    yield ApiEntry(kind, module, name, name or module, ast.get_docstring(node) or "")
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _walk(child, module, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            docstring = ast.get_docstring(child)
            if docstring:
                yield ApiEntry("function", module, prefix + child.name, _signature(child), docstring)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    text = f"{node.name}({ast.unparse(node.args)}){returns}"
    return text if len(text) <= _MAX_SIGNATURE_CHARACTERS else f"{node.name}(...)"


def reference_text(entry: ApiEntry) -> str:
    """Return one entry of an API reference: heading, then docstring."""
    owner = f"{entry.owner}." if entry.owner and entry.kind == "function" else ""
    heading = f"# {entry.module}" if entry.kind == "module" else f"## {entry.kind} {owner}{entry.signature}"
    return f"{heading}\n\n{entry.docstring}\n\n"


def topics_text(source: str) -> list[str]:
    """Return the chapters of the language reference in ``pydoc_data/topics.py``; none where there is no such table."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [f"# {name}\n\n{text.strip()}\n\n" for name, text in topics.items()]
    return []


def conversations(entries: list[ApiEntry], rng: random.Random) -> list[Messages]:
    """Return questions about functions with their docstrings as answers.

    Two neighbouring methods of one class become one conversation of two turns about half the time.

    Args:
        entries: Entries of one package, in source order.
        rng: Chooses the phrasings.
    """
    functions = [
        entry
        for entry in entries
        if entry.kind == "function" and _MIN_ANSWER_CHARACTERS <= len(entry.docstring) <= _MAX_ANSWER_CHARACTERS
    ]
    found: list[Messages] = []
    position = 0
    while position < len(functions):
        first, second = functions[position], functions[position + 1 : position + 2]
        turns = _turn(first, _METHOD_QUESTIONS if first.owner else _FUNCTION_QUESTIONS, rng)
        same_class = second and first.owner and (first.module, first.owner) == (second[0].module, second[0].owner)
        if same_class and rng.random() < _MULTI_TURN_SHARE:
            turns += _turn(second[0], _FOLLOW_UP_QUESTIONS, rng)
            position += 1
        position += 1
        found.append(turns)
    return found


def _turn(entry: ApiEntry, questions: tuple[str, ...], rng: random.Random) -> Messages:
    question = rng.choice(questions).format(
        name=entry.name, module=entry.module, signature=entry.signature, owner=entry.owner
    )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": entry.docstring.strip()}]
