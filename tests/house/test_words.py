"""One word for one thing: shape letters mean the same everywhere, and a class name names one class."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "nemo_prolong").rglob("*.py"))
BRACKETS = re.compile(r"(?<![\w\]`])\[([^][]+)\]")
DIM = re.compile(r"[\w .+*/()-]+")
LETTER = re.compile(r"(?<![A-Za-z_.])[A-Za-z](?![A-Za-z_])")


def legend() -> set[str]:
    """Return the letters of the section "Shape letters" of docs/architecture.md."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Shape letters\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| ([A-Z]) \|", section, re.MULTILINE))


def letters_of_shapes(text: str) -> set[str]:
    """Return the single letters among the dims of every shape such as [T, H, C] in a text."""
    shapes = [shape.split(",") for shape in BRACKETS.findall(text)]
    dims = [dim for shape in shapes if all(DIM.fullmatch(dim) for dim in shape) for dim in shape]
    return {letter for dim in dims for letter in LETTER.findall(dim)}


def docstrings(source: str) -> Iterator[str]:
    """Yield every string of a module that stands for itself: docstrings, those of attributes included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def public_classes(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return the files that define each public class of a module."""
    found = defaultdict(list)
    for name, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    return found


def test_the_check_sees_letters_and_leaves_words_alone():
    text = "float [T, 2K, V_local], [D+1], [P / CP, ...], rows[i], list[X], [n, length], ``[a-z]``, [A-Z0-9!]"
    assert letters_of_shapes(text) == {"T", "K", "D", "P", "n"}


def test_the_legend_explains_every_letter_once():
    assert {"T", "S", "D", "H", "K", "C", "E", "V"} <= legend()


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_letter_of_a_shape_is_in_the_legend(file):
    found = {letter for text in docstrings(file.read_text()) for letter in letters_of_shapes(text)}
    assert found <= legend()


def test_a_class_name_names_one_class():
    classes = public_classes({str(file.relative_to(ROOT)): file.read_text() for file in SOURCES})
    assert {name: files for name, files in classes.items() if len(files) > 1} == {}


def test_the_check_sees_a_class_that_exists_twice():
    twice = public_classes({"a.py": "class Run: ...\nclass _Own: ...", "b.py": "class Run: ..."})
    assert twice == {"Run": ["a.py", "b.py"]}
