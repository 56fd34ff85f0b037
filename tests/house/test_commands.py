"""The commands that the documents name exist and compose, and continuous integration runs the one of the README."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from hydra._internal.utils import get_args_parser

from nemo_prolong.config.compose import Request
from nemo_prolong.config.defaults import ENTRY_POINTS
from nemo_prolong.config.rules import check_world, ranks_to_start
from nemo_prolong.errors import ConfigError
from nemo_prolong.launch.parts import recipe_arguments

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMING_COMMANDS = [
    *DOCUMENTS,
    *sorted((ROOT / "docs" / "verification").glob("*.md")),
    ROOT / "Dockerfile",
    *sorted((ROOT / "conf").rglob("*.yaml")),
]
SCRIPTS = {**ENTRY_POINTS, "launch": ENTRY_POINTS["train"]}
"""Scripts that read a configuration, and what it must be."""

ABBREVIATIONS = {"MINI": ["+exp=mini/base", "precision=bf16"]}
"""Words that docs/verification/unverified.md uses for settings."""

_END = re.compile(r"`|\s\||\s>|\s&&|\s;|\s#\s|\s{2,}[#(]")
"""What a command in a document ends with, where it does not end with its line."""


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the repository without standard input."""
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def targets() -> set[str]:
    """Return the targets that ``make help`` lists."""
    return set(re.findall(r"^  make (\S+)", make("help").stdout, flags=re.MULTILINE))


def targets_named_in(text: str) -> set[str]:
    """Return the targets of every ``make ...`` in code: fenced, indented, or between backticks."""
    commands = re.findall(r"(?:^|`|&& |\$ )make((?: +[A-Za-z_]+=\S+| +[a-z][a-z-]*)+)", text, flags=re.MULTILINE)
    return {word for command in commands for word in command.split() if "=" not in word}


def test_make_alone_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    assert make().stdout == make("help").stdout
    assert targets() == set(phony)


def test_the_reader_of_documents_sees_targets():
    text = "run `make setup`, or\n\nmake PYTHON=/x/python3.11 clean setup\n\nto make a model"
    assert targets_named_in(text) == {"setup", "clean"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_make_target_in_a_document_exists(document):
    assert targets_named_in(document.read_text()) - targets() == set()


@dataclass(frozen=True)
class Command:
    """A command line of a script in a document.

    Attributes:
        launcher: What starts the script: ``python``, or a launcher of many ranks with its options.
        script: Its name without ``.py``.
        arguments: What is typed after it; ``...`` stands for more of it.
        refusal: What the document says it prints, if that is a refusal.
    """

    launcher: str
    script: str
    arguments: tuple[str, ...]
    refusal: str | None = None

    @property
    def ranks(self) -> int | None:
        """Processes that the launcher starts; None where the document leaves it open."""
        count = re.search(r"--nproc-per-node (\d+)", self.launcher)
        return int(count[1]) if count else 1 if self.launcher == "python" else None

    def __str__(self) -> str:
        return f"{self.launcher} scripts/{self.script}.py {shlex.join(self.arguments)}"


_COMMAND = re.compile(
    r"(\$ )?\b(srun[^`\n]* python|python|torchrun[^`\n]*|ft_launcher[^`\n]*) scripts/(\w+)\.py([^\n]*)"
)


def commands_in(text: str) -> Iterator[Command]:
    """Yield every ``LAUNCHER scripts/NAME.py ...`` of a document, in prose, blocks, tables or comments."""
    joined = re.sub(r"\\\n[# ]*", "", text)
    for match in _COMMAND.finditer(joined):
        typed = _END.split(match[4])[0]
        printed = joined[match.end() + 1 :].splitlines()
        refusal = printed[0] if match[1] and printed and printed[0][:2] not in ("$ ", "``") else None
        yield Command(match[2], match[3], tuple(shlex.split(typed)), refusal)


def why_not(command: Command) -> str | None:
    """Return what is wrong with a command, or None."""
    try:
        run_checks(command)
    except ConfigError as error:
        return None if str(error) == command.refusal else str(error)
    return None if command.refusal is None else f"is not refused with: {command.refusal}"


def run_checks(command: Command) -> None:
    """Compose, load and check the configuration of a command, as its script would before it imports torch.

    Raises:
        ConfigError: If the script would refuse it.
    """
    words = [part for word in command.arguments for part in ABBREVIATIONS.get(word, [word])]
    arguments = [word for word in words if word != "..."]
    if "..." in words and not any(word.startswith("+exp=") for word in arguments):
        arguments.append("+exp=mini/base")
    schema, entry_point = SCRIPTS[command.script], "train" if command.script == "launch" else command.script
    recipe = recipe_arguments(arguments) if command.script == "launch" else None
    if recipe is not None:
        arguments, schema, entry_point = recipe, ENTRY_POINTS["recipe"], "recipe"
    parsed = get_args_parser().parse_args(arguments)
    request = Request.of(schema, entry_point, parsed)
    if parsed.cfg or "..." in words:
        request.check_what_is_given()
        return
    cfg, overrides = request.load()
    if entry_point != "train":
        return
    ranks = cfg.parallelism.planned_world_size if command.script == "launch" else command.ranks
    if command.script == "train" and command.launcher == "python":
        # On a CPU. On GPUs it starts as many or refuses to.
        ranks = ranks_to_start(cfg, 0, overrides)
    if ranks is not None:
        check_world(cfg, ranks, overrides)


def parse_only(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script without a configuration read its command line, and stop it there; a wrong one exits."""

    class Parsed(Exception):
        pass

    real = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> None:
        real(parser, arguments)
        raise Parsed

    # The parsers need none of what the scripts import beside them.
    for name in ("torch", "transformers", "transformers.utils"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    path = str(ROOT / "scripts" / f"{command.script}.py")
    monkeypatch.setattr(sys, "argv", [path, *command.arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        runpy.run_path(path, run_name="__main__")


def test_the_reader_of_documents_sees_commands_wherever_they_end():
    text = """
say `python scripts/train.py +exp=a 'x=[1, 2]'` or
$ python scripts/train.py exp=b
exp=b: no.
| `torchrun --nproc-per-node 8 scripts/train.py +exp=c ...` |
# Command: python scripts/launch.py +exp=d | sbatch
python scripts/report.py   # all
#   python scripts/export.py \\
#     run=e   (after c)
by scripts/watch.py"""
    commands = list(commands_in(text))
    assert [(command.script, command.arguments) for command in commands] == [
        ("train", ("+exp=a", "x=[1, 2]")),
        ("train", ("exp=b",)),
        ("train", ("+exp=c", "...")),
        ("launch", ("+exp=d",)),
        ("report", ()),
        ("export", ("run=e",)),
    ]
    assert [command.ranks for command in commands] == [1, 1, 8, 1, 1, 1]
    assert [command.refusal for command in commands] == [None, "exp=b: no.", None, None, None, None]


def test_a_command_that_a_script_would_refuse_is_found():
    wrong = Command("python", "train", ("+exp=mini/base", "seq_lenght=4K"))
    assert why_not(wrong) == "seq_lenght=4K: no such key in the configuration. Did you mean seq_length=4K?"
    assert why_not(Command("python", "train", ("+exp=mini/base",), "no.")) == "is not refused with: no."
    too_few = Command("torchrun --nproc-per-node 4", "train", ("+exp=stage1", "parent=hf:DIR"))
    assert why_not(too_few).startswith("parallelism=TP 4 x PP 1 x CP 2: needs a multiple of 8 ranks, and 4 ranks were ")
    one_machine = Command("python", "train", ("+exp=stage2", "parent=runs/stage1"))
    assert why_not(one_machine).startswith("parallelism=TP 8 x PP 1 x CP 8: needs a multiple of 64 ranks, and 8 ranks")


@pytest.mark.parametrize("path", NAMING_COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_in_a_document_passes_the_rules(path, monkeypatch):
    commands = list(commands_in(path.read_text()))
    configured = [command for command in commands if command.script in SCRIPTS]
    assert {str(command): reason for command in configured if (reason := why_not(command))} == {}
    for command in commands:
        if command.script not in SCRIPTS:
            with monkeypatch.context() as patch:
                parse_only(command, patch)


def test_continuous_integration_starts_from_nothing():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^exec (.*)$", script, flags=re.MULTILINE) == ["make test < /dev/null"]
    plan = make("--dry-run", "--always-make", "test").stdout
    assert plan.index("-m venv .venv") < plan.index("cpu.lock") < plan.index("torch.txt") < plan.index("-m pytest")


def test_setup_without_a_python_3_11_says_what_to_install(tmp_path):
    for tool in ("bash", "echo", "sed", "touch", "cat"):
        (tmp_path / tool).symlink_to(f"/bin/{tool}")
    (tmp_path / "make").symlink_to("/usr/bin/make")
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "requirements").symlink_to(ROOT / "requirements")
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    command = [tmp_path / "make", "setup", "PYTHON=python9"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert result.returncode == 2
    assert "error: no Python 3.11 (tried python9, python3.11, python3)." in result.stderr
    assert "make PYTHON=/path/to/python3.11 setup" in result.stderr
