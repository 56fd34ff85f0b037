"""Size limits of files and functions, and what a source file may contain."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
TREES = ["nemo_prolong", "scripts", "benchmarks", "docker", "tests"]
SOURCES = sorted(file for tree in TREES for file in (ROOT / tree).rglob("*.py"))


def long_functions(source: str) -> dict[str, int]:
    """Return name -> lines of every function in ``source`` that is too long, decorators not counted."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes}
    return {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}


def test_the_check_sees_61_lines_and_lets_60_pass():
    def body(lines: int) -> str:
        return "def f():\n" + "    x = 1\n" * (lines - 1)

    assert long_functions(body(61)) == {"f": 61}
    assert long_functions(body(60)) == {}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_source_file_is_short_ascii_and_short_functions(file):
    source = file.read_text()
    assert source.isascii()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    assert long_functions(source) == {}


def test_tests_import_what_they_share_from_one_package():
    changing = [file.name for file in (ROOT / "tests").rglob("*.py") if "sys.path." + "insert" in file.read_text()]
    assert changing == []


def test_no_name_of_a_test_is_longer_than_70():
    names = [
        name for file in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    ]
    assert [name for name in names if len(name) > 70] == []


def test_no_large_file_is_tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = {str(file.relative_to(ROOT)) for file in files if file.exists() and file.stat().st_size > 2**20}
    assert large == set()
