"""The commands that the documents name exist, and continuous integration runs the one of the README."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NO_TARGET_NAMED_SO = {"PYTHON"}


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


def test_the_image_installs_the_lock_by_hash_and_is_not_root():
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    assert "--no-deps --require-hashes -r requirements/gpu-py312.lock" in text
    assert "python docker/smoke.py --lock requirements/gpu-py312.lock" in text
    assert [line for line in lines if line.startswith("USER")][-1] == "USER prolong"
    assert not re.search(r"^ENTRYPOINT", text, flags=re.MULTILINE)
