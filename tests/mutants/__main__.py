"""Tries the mutants and compares what is left with ``survivors.toml``. ``python -m tests.mutants --help``."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.mutants.imports import dependents
from tests.mutants.operators import Mutant, Mutants
from tests.mutants.session import (
    BROKEN,
    KILLED,
    MOST_TESTS_AT_IMPORT,
    SURVIVED,
    TIMED_OUT,
    Baseline,
    Outcome,
    Runner,
    in_fork,
    start_fork,
    try_import,
)
from tests.mutants.survivors import Survivors
from tests.mutants.targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
LEAST_KILLED = 0.95
# Tests of several ranks start programs, which are no mutants.
PYTEST = [
    "-qq",
    "-s",
    "--no-header",
    "--no-summary",
    "--hypothesis-profile=mutants",
    "-p",
    "no:cacheprovider",
    # A mutant may crash in a kernel, which is as good as found.
    "-p",
    "no:faulthandler",
    "-m",
    "not distributed and not slow and not gpu and not layouts and not recipe",
]
PROGRESS_SECONDS = 30.0


def main() -> int:
    """Try the mutants of the targets that are named, and return the exit status."""
    arguments = _arguments()
    prepare()
    if arguments.results:
        arguments.results.write_text("")
    outcomes: list[Outcome] = []
    seconds: Counter[str] = Counter()
    targets = [target for target in TARGETS if not arguments.targets or target.name in arguments.targets]
    # What takes long begins first.
    targets.sort(key=lambda target: -sum((ROOT / path).stat().st_size for path in target.sources(ROOT)))
    for target, (found, took) in zip(targets, try_targets(targets, arguments), strict=True):
        outcomes += found
        seconds[target.name] = round(took)
    survivors = Survivors.read(Path(__file__).with_name("survivors.toml"))
    whole = not (arguments.file or arguments.function or arguments.again)
    return report(outcomes, survivors, seconds, whole)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    names = [target.name for target in TARGETS]
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(names)}; all if none are named")
    parser.add_argument("--file", action="append", help="pattern of the files, such as '*/step_guard.py', or several")
    parser.add_argument("--function", help="pattern of the functions, such as 'StepGuard.*'")
    parser.add_argument("--again", type=Path, help="results of an earlier call, whose survivors are tried again")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="targets at a time; as many as processors"
    )
    parser.add_argument("--results", type=Path, help="file for what became of every mutant, a line of JSON each")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(names)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}. There are {', '.join(names)}.")
    return arguments


def chosen(arguments: argparse.Namespace) -> Callable[[Mutant], bool]:
    """Return which mutants the command line asks for."""
    again = None
    if arguments.again:
        results = map(json.loads, arguments.again.read_text().splitlines())
        again = {tuple(result["key"]) for result in results if result["status"] in (SURVIVED, BROKEN)}

    def is_chosen(mutant: Mutant) -> bool:
        return (
            any(fnmatch.fnmatch(mutant.file, pattern) for pattern in arguments.file or ["*"])
            and fnmatch.fnmatch(mutant.function, arguments.function or "*")
            and (again is None or mutant.key in again)
        )

    return is_chosen


def prepare() -> None:
    """Set the process up as ``tests/conftest.py`` does, before torch is imported, and make forks safe."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from hypothesis import Phase, settings

    # No search for the smallest example, and none is kept.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", deadline=None, derandomize=True, database=None, phases=phases)


def try_targets(targets: list[Target], arguments: argparse.Namespace) -> list[tuple[list[Outcome], float]]:
    """Try all mutants of the targets, several at a time. Return for each what became of them, and the seconds."""
    is_chosen = chosen(arguments)
    # Each byte is the number of a target. Whoever is free takes the next one.
    waiting, tasks = os.pipe()
    os.write(tasks, bytes(range(len(targets))))
    os.close(tasks)
    with tempfile.TemporaryDirectory() as results:

        def work(_: Path) -> int:
            while taken := os.read(waiting, 1):
                started = time.monotonic()
                outcomes = try_target(targets[taken[0]], is_chosen, arguments.results)
                (Path(results) / str(taken[0])).write_bytes(pickle.dumps((outcomes, time.monotonic() - started)))
            return 0

        # No threads: the tests fork ranks, which want to be children of a main thread.
        workers = [start_fork(work, silent=False) for _ in range(min(arguments.processes, len(targets)))]
        for worker in workers:
            status, _ = worker.wait()
            assert status == SURVIVED, f"a target could not be tried ({status})"
        return [pickle.loads((Path(results) / str(number)).read_bytes()) for number in range(len(targets))]


def try_target(target: Target, is_chosen: Callable[[Mutant], bool], results: Path | None) -> list[Outcome]:
    """Try all mutants of a target, and return what became of them."""
    sources = {path: Mutants(path, (ROOT / path).read_text(), str(ROOT / path)) for path in target.sources(ROOT)}
    wanted = [mutant for source in sources.values() for mutant in source.all if is_chosen(mutant)]
    if not wanted:
        return []
    print(f"{target.name}: {len(wanted)} mutants\n", end="", flush=True)
    tests = [f"tests/{name}" for name in target.tests]

    def session(directory: Path) -> int:
        outcomes: list[Outcome] = []
        runner = Runner(ROOT, sources, wanted, Progress(target.name, outcomes, len(wanted), results).add)
        code = pytest.main([*PYTEST, *tests], plugins=[runner])
        result = outcomes, [mutant.key for mutant in runner.at_import], runner.baseline, list(sys.modules)
        (directory / "result").write_bytes(pickle.dumps(result))
        return int(code) if code != pytest.ExitCode.NO_TESTS_COLLECTED else 0

    status, result = in_fork(session, None, silent=False)
    assert status == SURVIVED and result, f"{target.name}: the tests could not be run ({status})"
    outcomes, at_import, baseline, modules = result
    for test in baseline.failed:
        print(f"{target.name}: fails without a mutant, not used: {test}\n", end="", flush=True)
    by_key = {mutant.key: mutant for mutant in wanted}
    import_modules(name for name in modules if not name.startswith(("nemo_prolong", "tests", "_pytest", "pytest")))
    for file in dict.fromkeys(key[0] for key in at_import):
        mutants = [by_key[key] for key in at_import if key[0] == file]
        outcomes += try_at_import(mutants, sources[file], baseline, modules, results)
    return outcomes


class Progress:
    """Keeps outcomes, also in a file where one is given, and prints now and then how many there are."""

    def __init__(self, name: str, outcomes: list[Outcome], total: int, results: Path | None) -> None:
        self._name = name
        self._outcomes = outcomes
        self._total = total
        self._results = results
        self._printed = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome."""
        self._outcomes.append(outcome)
        if self._results:
            with self._results.open("a") as file:
                file.write(f"{json.dumps(vars(outcome))}\n")
        if time.monotonic() - self._printed > PROGRESS_SECONDS:
            self._printed = time.monotonic()
            survived = sum(outcome.status == SURVIVED for outcome in self._outcomes)
            print(
                f"{self._name}: {len(self._outcomes)} of {self._total} tried, {survived} survive\n", end="", flush=True
            )


def import_modules(names: Iterable[str]) -> None:
    """Import what the tests import, so that the forks need not."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def try_at_import(
    mutants: list[Mutant], source: Mutants, baseline: Baseline, modules: list[str], results: Path | None
) -> list[Outcome]:
    """Try the mutants of what happens when one file is imported."""
    tests = baseline.near(source.file)[:MOST_TESTS_AT_IMPORT]
    cpu_seconds = 4 * sum(baseline.seconds[test] for test in tests)
    print(f"{source.file}: {len(mutants)} at import\n", end="", flush=True)

    def try_all(directory: Path) -> int:
        # What does not need the file can be there before it is changed.
        anew = dependents(ROOT, source.file)
        import_modules(name for name in modules if name.startswith("nemo_prolong") and name not in anew)
        outcomes: list[Outcome] = []
        progress = Progress(source.file, outcomes, len(mutants), results)
        for mutant in mutants:
            progress.add(try_import(mutant, source, tests, PYTEST, cpu_seconds))
        (directory / "result").write_bytes(pickle.dumps(outcomes))
        return 0

    status, outcomes = in_fork(try_all, None, silent=False)
    assert status == SURVIVED, f"{source.file}: its mutants could not be tried ({status})"
    return list(outcomes)


def report(outcomes: list[Outcome], survivors: Survivors, seconds: Counter[str], whole: bool) -> int:
    """Print a line for each file and every survivor that is not listed. Return the exit status."""
    rows: dict[str, Counter[str]] = {}
    unlisted: list[Outcome] = []
    for outcome in outcomes:
        row = rows.setdefault(outcome.key[0], Counter())
        row[outcome.status] += 1
        if outcome.status == SURVIVED:
            kind = survivors.kind(outcome.key)
            row[kind or "unlisted"] += 1
            unlisted += [] if kind else [outcome]
    print(f"{'file':<55}{'mutants':>8}{'killed':>8}{'timeout':>8}{'equivalent':>11}{'accepted':>9}{'unlisted':>9}")
    for file, row in [*sorted(rows.items()), ("all", sum(rows.values(), Counter()))]:
        count = row[KILLED] + row[TIMED_OUT] + row[SURVIVED] + row[BROKEN]
        figures = f"{count:>8}{row[KILLED]:>8}{row[TIMED_OUT]:>8}"
        print(f"{file:<55}{figures}{row['equivalent']:>11}{row['accepted']:>9}{row['unlisted']:>9}")
    total = sum(rows.values(), Counter())
    found = total[KILLED] + total[TIMED_OUT]
    share = found / max(found + total[SURVIVED] + total[BROKEN] - total["equivalent"], 1)
    print(f"{share:.1%} of those that are not equivalent; seconds: {dict(seconds)}")
    stale = survivors.stale(outcomes) if whole else []
    for outcome in unlisted:
        print(f"survives, {outcome.tests} tests: " + " | ".join(outcome.key))
    for key in stale:
        print("listed, and does not survive or does not exist: " + " | ".join(key))
    broken = [outcome for outcome in outcomes if outcome.status == BROKEN]
    for outcome in broken:
        print("could not be tried: " + " | ".join(outcome.key))
    return int(bool(unlisted or stale or broken or (whole and share < LEAST_KILLED)))


if __name__ == "__main__":
    sys.exit(main())
