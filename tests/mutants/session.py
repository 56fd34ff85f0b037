"""One pytest session that runs the tests of a room again and again, each time with another mutant.

The tests are collected once. Each run is a fork of this process. A mutant inside a function is tried by giving that
function the code of the mutant, wherever it is referred to. A mutant of what happens at import is tried in a fork of a
process that has imported the libraries, and of ours what does not need the file.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import math
import mmap
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NoReturn

import pytest
from _pytest.runner import runtestprotocol
from hypothesis import settings

from tests.mutants.imports import module_name
from tests.mutants.operators import Mutant, Mutants

Line = tuple[str, int]
Called = set[tuple[str, str, int]]

SURVIVED, KILLED, TIMED_OUT, BROKEN = "survived", "killed", "timed out", "broken"
EXIT_KILLED, EXIT_BROKEN = 1, 70
# A mutant that computes this much longer than its tests do without it, or waits, is as good as found.
CPU_SECONDS, WAIT_SECONDS = 4, 30
MORE_MEMORY_BYTES = 6 << 30
MOST_EXAMPLES = 20
# One that takes longer starts programs, or is the same on a larger scale.
SLOWEST_TEST_SECONDS = 10
# Of those that run a mutant, the most telling ones. Without a limit, what survives takes most of the time.
MOST_TESTS, MOST_TESTS_AT_IMPORT = 200, 1000


@dataclass
class Baseline:
    """What the tests do without a mutant.

    Attributes:
        seconds: Processor time of each test, with its fixtures and the programs that it starts.
        lines: Lines of the mutated files that each test runs.
        failed: Tests that fail without any mutant.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, set[Line]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def covering(self, mutant: Mutant) -> list[str]:
        """Return the tests that run the statement. First come those that run lines of the function that few others do.

        A condition is run by every test of a function, and what it decides by few.
        """
        wanted = {(mutant.file, number) for number in mutant.lines}
        found = [test for test in self._usable if self.lines[test] & wanted]
        return self._most_telling_first(found, wanted | {(mutant.file, number) for number in mutant.around})

    def near(self, file: str) -> list[str]:
        """Return all tests. First come those that run lines of a file that few others do."""
        return self._most_telling_first(self._usable, {line for line in self._counts if line[0] == file})

    @cached_property
    def _usable(self) -> list[str]:
        return [test for test in self.lines if test not in self.failed and self.seconds[test] <= SLOWEST_TEST_SECONDS]

    @cached_property
    def _counts(self) -> Counter[Line]:
        return Counter(line for lines in self.lines.values() for line in lines)

    def _most_telling_first(self, tests: list[str], among: set[Line]) -> list[str]:
        def tests_of_its_rarest_line(test: str) -> tuple[float, int]:
            rarest = min((self._counts[line] for line in self.lines[test] & among), default=math.inf)
            # Of equals, tests of little else come first.
            return rarest, len(self.lines[test])

        return sorted(tests, key=tests_of_its_rarest_line)


@dataclass
class Outcome:
    """What became of a mutant.

    Attributes:
        key: Of the mutant.
        status: One of the four.
        tests: How many tests ran what was changed.
        killer: The first that failed.
    """

    key: tuple[str, str, str, str]
    status: str
    tests: int
    killer: str = ""


# ---- forks ----------------------------------------------------------------------------------------------------------


def processor_seconds() -> float:
    """Return the processor time of this process and of all that it has started, whether they have ended or not."""
    ticks, waiting = 0, [os.getpid()]
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(FileNotFoundError):
            # User and system time, then the same of children that were waited for.
            ticks += sum(map(int, Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:15]))
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                waiting += map(int, children.read_text().split())
    return ticks / os.sysconf("SC_CLK_TCK")


def in_fork(run: Callable[[Path], int], cpu_seconds: float | None, silent: bool = True) -> tuple[str, Any]:
    """Run a function in a fork and return what became of it, and what it left in ``result`` of its directory."""
    return start_fork(run, cpu_seconds, silent).wait()


def start_fork(run: Callable[[Path], int], cpu_seconds: float | None = None, silent: bool = True) -> Fork:
    """Start a function in a fork."""
    directory = Path(tempfile.mkdtemp(prefix="mutant-"))
    child = os.fork()
    if child == 0:
        _be_child(run, directory, cpu_seconds, silent)
    return Fork(child, directory, None if cpu_seconds is None else WAIT_SECONDS + 5 * cpu_seconds)


@dataclass
class Fork:
    """A function that runs in a fork.

    Attributes:
        child: Its process.
        directory: Where it may leave something.
        wait_seconds: What it may take.
    """

    child: int
    directory: Path
    wait_seconds: float | None

    def wait(self) -> tuple[str, Any]:
        """Return what became of it, and what it left in ``result`` of its directory."""
        status = _wait(self.child, self.wait_seconds)
        result = self.directory / "result"
        found = pickle.loads(result.read_bytes()) if result.exists() else None
        shutil.rmtree(self.directory, ignore_errors=True)
        return status, found


def _be_child(run: Callable[[Path], int], directory: Path, cpu_seconds: float | None, silent: bool) -> NoReturn:
    code = EXIT_BROKEN
    try:
        os.setsid()
        # Tests and pytest collect garbage often, and what is shared with the parent is none.
        gc.freeze()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2) if silent else (0,):
            os.dup2(null, descriptor)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(directory)
        tempfile.tempdir = str(directory)
        if cpu_seconds is not None:
            limit = int(cpu_seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY_BYTES,) * 2)
        code = run(directory)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(child: int, seconds: float | None) -> str:
    deadline = None if seconds is None else time.monotonic() + seconds
    pause = 0.002
    while True:
        pid, wait_status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if deadline is not None and time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return TIMED_OUT
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)
    code = os.waitstatus_to_exitcode(wait_status)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return TIMED_OUT
    return {0: SURVIVED, EXIT_BROKEN: BROKEN}.get(code, KILLED)


class Tracer:
    """Notes the lines that are run, in every thread and in forks of this process.

    Args:
        files: Path of each file that is looked at, and what it is called.
    """

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files
        lengths = [len(Path(path).read_text().splitlines()) + 1 for path in files]
        self._starts = dict(zip(files, accumulate(lengths, initial=0), strict=False))
        # Forks share it.
        self._seen = mmap.mmap(-1, sum(lengths))

    def start(self, lines: Iterable[Line] = ()) -> None:
        """Note from now on, as if some lines had been run."""
        self._seen[:] = bytes(len(self._seen))
        paths = {called: path for path, called in self._files.items()}
        for file, number in lines:
            self._seen[self._starts[paths[file]] + number] = 1
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def stop(self) -> set[Line]:
        """Return the lines that were run since the start."""
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        starts = sorted((start, path) for path, start in self._starts.items())
        lines = set()
        for offset in (index for index, seen in enumerate(self._seen[:]) if seen):
            start, path = starts[bisect.bisect_right(starts, (offset, "\U0010ffff")) - 1]
            lines.add((self._files[path], offset - start))
        return lines

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._note(frame, event, argument) if frame.f_code.co_filename in self._starts else None

    def _note(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._seen[self._starts[frame.f_code.co_filename] + frame.f_lineno] = 1
        return self._note


# ---- mutants of functions -------------------------------------------------------------------------------------------


class Runner:
    """A plugin that takes the place of pytest's loop over tests.

    Args:
        root: Of the repository.
        sources: Mutants of each file.
        wanted: Which of them are tried.
        report: Told of every outcome.
        cpu_seconds: What a mutant may compute beyond four times what its tests take without it.
    """

    def __init__(
        self,
        root: Path,
        sources: dict[str, Mutants],
        wanted: Iterable[Mutant],
        report: Callable[[Outcome], None],
        cpu_seconds: float = CPU_SECONDS,
    ) -> None:
        self.root = root
        self.sources = sources
        self.wanted = list(wanted)
        self.report = report
        self.cpu_seconds = cpu_seconds
        self.at_import: list[Mutant] = []
        self.baseline = Baseline()
        self._files = {str(root / file): file for file in sources}
        self._items: dict[str, pytest.Item] = {}
        self._called_at_import: Called = set()
        self._tracer: Tracer | None = None
        self._fixture_lines: dict[str, set[Line]] = {}
        self._killers: defaultdict[str, list[str]] = defaultdict(list)
        sys.setprofile(self._note_call)

    def _note_call(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename in self._files:
            self._called_at_import.add((self._files[code.co_filename], code.co_qualname, code.co_firstlineno))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Have property tests try few examples, and print none."""
        few_examples(items)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run all tests once, then those that may find it for each mutant."""
        sys.setprofile(None)
        self._items = {item.nodeid: item for item in session.items}
        status, baseline = in_fork(self._measure, None)
        assert status == SURVIVED and baseline is not None, f"the tests could not be run without a mutant: {status}"
        self.baseline = baseline
        functions = self._live_functions()
        for mutant in self.wanted:
            outer = mutant.outer and (mutant.file, *mutant.outer)
            found = functions.get(outer, []) if outer and outer not in self._called_at_import else []
            code = find_code(self.sources[mutant.file].code(mutant), mutant.outer) if len(found) == 1 else None
            # A function keeps its cells, so it cannot take code that needs others, as without its super().
            if code is None or code.co_freevars != found[0][0].__code__.co_freevars:
                self.at_import.append(mutant)
            else:
                self.report(self._try(mutant, code, found[0]))
        return True

    def _measure(self, directory: Path) -> int:
        baseline, self._tracer = Baseline(), Tracer(self._files)
        items = list(self._items.items())
        for (name, item), following in zip(items, [*(item for _, item in items[1:]), None], strict=True):
            started = processor_seconds()
            self._tracer.start()
            passed = passes(item, following)
            lines = self._tracer.stop()
            baseline.seconds[name] = processor_seconds() - started
            shared = (self._fixture_lines.get(fixture, set()) for fixture in getattr(item, "fixturenames", ()))
            baseline.lines[name] = lines.union(*shared)
            if not passed:
                baseline.failed.append(name)
        (directory / "result").write_bytes(pickle.dumps(baseline))
        return 0

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Note what a fixture runs that is made for several tests, since it is made only once."""
        if self._tracer is None or fixturedef.scope == "function":
            return (yield)
        before = self._tracer.stop()
        self._tracer.start()
        result = yield
        self._fixture_lines.setdefault(fixturedef.argname, set()).update(self._tracer.stop())
        self._tracer.start(before)
        return result

    def _live_functions(self) -> dict[tuple[str, str, int], list[list[FunctionType]]]:
        """Return the functions by file, name and first line. Each list has an entry for every code object."""
        found: dict[tuple[str, str, int], dict[int, list[FunctionType]]] = defaultdict(lambda: defaultdict(list))
        for thing in gc.get_objects():
            if type(thing) is FunctionType and thing.__code__.co_filename in self._files:
                code = thing.__code__
                key = (self._files[code.co_filename], code.co_qualname, code.co_firstlineno)
                found[key][id(code)].append(thing)
        return {key: list(functions.values()) for key, functions in found.items()}

    def _try(self, mutant: Mutant, code: CodeType, functions: list[FunctionType]) -> Outcome:
        covering = self.baseline.covering(mutant)
        # What found the last ones in this function comes first.
        recent = [test for test in reversed(self._killers[mutant.function]) if test in covering]
        tests = list(dict.fromkeys([*recent, *covering]))[:MOST_TESTS]
        if not tests:
            return Outcome(mutant.key, SURVIVED, 0)

        def run(directory: Path) -> int:
            for function in functions:
                function.__code__ = code
            for test, following in zip(tests, [*tests[1:], None], strict=True):
                if not passes(self._items[test], self._items[following] if following else None):
                    (directory / "result").write_bytes(pickle.dumps(test))
                    return EXIT_KILLED
            return 0

        cpu_seconds = self.cpu_seconds + 4 * sum(self.baseline.seconds[test] for test in tests)
        status, killer = in_fork(run, cpu_seconds)
        if killer:
            self._killers[mutant.function] = [*self._killers[mutant.function], killer][-4:]
        return Outcome(mutant.key, status, len(tests), killer or "")


def passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Run a test, and return whether it passed or was skipped. Fixtures that the following one needs stay."""
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def few_examples(items: list[pytest.Item]) -> None:
    """Have property tests try few examples, whatever they ask for themselves."""
    for item in items:
        function = getattr(item, "obj", None)
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if own is not None:
            function._hypothesis_internal_use_settings = settings(
                own, max_examples=min(own.max_examples, MOST_EXAMPLES)
            )


def find_code(code: CodeType, outer: tuple[str, int] | None) -> CodeType | None:
    """Return the code object of a function inside that of its module."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if (constant.co_qualname, constant.co_firstlineno) == outer:
                return constant
            found = find_code(constant, outer)
            if found is not None:
                return found
    return None


# ---- mutants of what happens at import ------------------------------------------------------------------------------


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module as a mutant."""

    def __init__(self, name: str, path: str, code: CodeType) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the mutant."""
        return self._code


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, path: str, code: CodeType) -> None:
        self._loader = _Loader(name, path, code)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """Find the mutated module, and no other."""
        if fullname != self._loader.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._loader.path, loader=self._loader)


class _Selection:
    """A plugin that runs some of the tests, in an order, until one fails."""

    def __init__(self, tests: list[str]) -> None:
        self._tests = tests
        self.killer = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Choose."""
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[test] for test in self._tests]
        few_examples(items)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run them."""
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            if not passes(item, following):
                self.killer = item.nodeid
                break
        return True


def try_import(mutant: Mutant, source: Mutants, tests: list[str], arguments: list[str], cpu_seconds: float) -> Outcome:
    """Try a mutant of what happens at import, in a fork of a process that has not imported its file."""
    name = module_name(mutant.file)
    assert name not in sys.modules, f"{name} is imported before it is changed"
    if not tests:
        return Outcome(mutant.key, SURVIVED, 0)

    def run(directory: Path) -> int:
        sys.meta_path.insert(0, _Finder(name, source.absolute, source.code(mutant)))
        selection = _Selection(tests)
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        code = pytest.main([*arguments, *files], plugins=[selection])
        (directory / "result").write_bytes(pickle.dumps(selection.killer or f"pytest ended with {int(code)}"))
        return EXIT_KILLED if selection.killer or code else 0

    status, killer = in_fork(run, CPU_SECONDS + cpu_seconds)
    return Outcome(mutant.key, status, len(tests), killer or "")
