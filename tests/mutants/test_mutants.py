"""Which changes are tried, and that a change is found by the tests that run it and by no others."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tests.mutants.imports import dependents
from tests.mutants.operators import Mutants
from tests.mutants.session import KILLED, SURVIVED, TIMED_OUT, Outcome, Runner, in_fork, try_import
from tests.mutants.survivors import Survivors
from tests.mutants.targets import TARGETS

ROOT = Path(__file__).parents[2]
LISTED = ROOT / "tests" / "mutants" / "survivors.toml"


def changes(source: str) -> list[str]:
    return [mutant.change for mutant in Mutants("a.py", source, "a.py").all]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", ["a < b -> LtE"]),
        ("x = a == b != c", ["a == b != c -> NotEq", "a == b != c -> Eq"]),
        ("x = a is None or b in c", ["a is None or b in c -> And", "a is None -> IsNot", "b in c -> NotIn"]),
        ("x = a + b", ["a + b -> Sub"]),
        ("x = 3", ["3 -> 4"]),
        ("x = True", ["True -> False"]),
        ("x = 'text'", ["'text' -> XX"]),
        ("x = f'{a} of {b} or {c:.2f}'", ["' of ' -> XX", "c -> without its format"]),
        ("x = not a", ["not a -> a"]),
        ("x = max(a)", ["max -> min"]),
        ("x += y", ["x += y -> Sub", "x += y -> pass"]),
        ("a.b = c", ["a.b = c -> pass"]),
        ("f(a)", ["f(a) -> pass"]),
        ("del a[b]", ["del a[b] -> pass"]),
        ("raise Error(a) from b", ["raise Error(a) from b -> pass"]),
        ("if a: b = c", ["a -> not a"]),
        ("x = [a for a in b if c]", ["c -> not c"]),
        ("while a:\n  continue", ["a -> not a", "continue -> break"]),
        ("def f():\n  return a", ["return a -> return None"]),
        ("def f():\n  return", ["return -> pass"]),
    ],
)
def test_these_changes_are_tried(source: str, expected: list[str]) -> None:
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "'''A docstring.'''",
        "import a",
        "x: Literal['a'] = b",
        "def f(a: 'A') -> 'B': pass",
        "@decorated(frozen=True)\ndef f(): pass",
        "assert a == 1, 'text'",
        "x = zip(a, b, strict=True)",
        "log = logging.getLogger('name')",
        "__all__ = ['a']",
        "T = TypeVar('T')",
        "try: a\nexcept (A, b['c']): pass",
    ],
)
def test_these_are_left_alone(source: str) -> None:
    assert changes(source) == []


def test_a_log_call_may_go_but_keeps_its_text() -> None:
    assert changes("log.info('%d of %s', a + b, f'{c} rows')") == [
        "log.info('%d of %s', a + b, f'{c} rows') -> pass",
        "a + b -> Sub",
    ]


def test_the_same_change_twice_in_a_line_has_two_names() -> None:
    assert changes("x = f(1, 1)") == ["1 -> 2", "1 -> 2 #2"]


def test_a_mutant_is_named_by_its_function_and_compiles_to_the_change() -> None:
    mutants = Mutants("a.py", "class C:\n    def f(self):\n        return 1 + 2\n", "a.py")
    found = {mutant.change: mutant for mutant in mutants.all}
    assert found["1 + 2 -> Sub"].key == ("a.py", "C.f", "return 1 + 2", "1 + 2 -> Sub")
    for change, expected in (("1 + 2 -> Sub", -1), ("1 -> 2", 4), ("return 1 + 2 -> return None", None)):
        names: dict[str, type] = {}
        exec(mutants.code(found[change]), names)
        assert names["C"]().f() == expected


MODULE = """
LIMIT = 3

def is_large(number):
    return number > LIMIT

def count(number):
    while number > LIMIT:
        number -= 1
    return number

def untested(number):
    return number + 1
"""
TESTS = """
from counted import count, is_large

def test_is_large():
    assert is_large(5) and not is_large(2)

def test_count():
    assert count(5) == 3
"""


def test_each_mutant_is_tried_with_the_tests_that_run_it(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(MODULE)
    (tmp_path / "test_counted.py").write_text(TESTS)
    sources = {"counted.py": Mutants("counted.py", MODULE, str(tmp_path / "counted.py"))}

    def session(directory: Path) -> int:
        outcomes: list[Outcome] = []
        runner = Runner(tmp_path, sources, sources["counted.py"].all, outcomes.append, cpu_seconds=0.5)
        arguments = ["-qq", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null"]
        pytest.main([*arguments, "-o", f"pythonpath={tmp_path}", str(tmp_path)], plugins=[runner])
        result = outcomes, [mutant.change for mutant in runner.at_import]
        (directory / "result").write_bytes(pickle.dumps(result))
        return 0

    _, (outcomes, at_import) = in_fork(session, None)
    assert at_import == ["3 -> 4"]
    assert {(outcome.key[1], outcome.key[3]): (outcome.status, outcome.tests) for outcome in outcomes} == {
        ("is_large", "return number > LIMIT -> return None"): (KILLED, 1),
        # No test asks for 3.
        ("is_large", "number > LIMIT -> GtE"): (SURVIVED, 1),
        ("count", "number > LIMIT -> GtE"): (KILLED, 1),
        ("count", "number -= 1 -> Add"): (TIMED_OUT, 1),
        ("count", "number -= 1 -> pass"): (TIMED_OUT, 1),
        ("count", "1 -> 2"): (SURVIVED, 1),
        ("count", "return number -> return None"): (KILLED, 1),
        ("untested", "return number + 1 -> return None"): (SURVIVED, 0),
        ("untested", "number + 1 -> Sub"): (SURVIVED, 0),
        ("untested", "1 -> 2"): (SURVIVED, 0),
    }


@pytest.mark.parametrize(
    ("change", "status", "killer"),
    [("3 -> 4", KILLED, "test_counted.py::test_count"), ("'a' -> XX", SURVIVED, "")],
)
def test_what_happens_at_import_is_imported_anew(change: str, status: str, killer: str, tmp_path: Path) -> None:
    source = f"NAME = 'a'\n{MODULE}"
    (tmp_path / "counted.py").write_text(source)
    (tmp_path / "test_counted.py").write_text(TESTS)
    mutants = Mutants("counted.py", source, str(tmp_path / "counted.py"))
    (mutant,) = [mutant for mutant in mutants.all if mutant.change == change]
    tests = ["test_counted.py::test_is_large", "test_counted.py::test_count"]
    arguments = ["-qq", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        outcome = try_import(mutant, mutants, tests, [*arguments, "-o", f"pythonpath={tmp_path}"], 10.0)
    assert (outcome.status, outcome.tests, outcome.killer) == (status, 2, killer or "pytest ended with 0")


def test_whoever_needs_a_module_is_imported_after_it_is_changed(tmp_path: Path) -> None:
    sources = {
        "__init__": "",
        "base": "",
        "schema/__init__": "from package.base import a",
        "schema/run": "",
        "rules": "import package.schema.run",
        "above": "def f():\n    from package import rules",
        "beside": "import base",
    }
    for name, text in sources.items():
        path = tmp_path / "package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert dependents(tmp_path, "package/rules.py") == {"package.rules", "package.above"}
    everyone = {"package.base", "package.schema", "package.schema.run", "package.rules", "package.above"}
    assert dependents(tmp_path, "package/base.py") == everyone


def test_every_listed_survivor_is_still_a_mutant() -> None:
    existing = {
        mutant.key
        for target in TARGETS
        for file in target.sources(ROOT)
        for mutant in Mutants(file, (ROOT / file).read_text(), file).all
    }
    assert [key for key in Survivors.read(LISTED).kinds if key not in existing] == []
