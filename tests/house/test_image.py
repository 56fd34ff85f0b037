"""The Dockerfile, what goes into the image, and its entrypoint; ``make test-image`` carries the steps out."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.image.dockerfile import assignments, context, instructions, is_ignored, substituted

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STEPS = list(instructions(DOCKERFILE))
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


def steps(name: str) -> list[str]:
    """Return what follows each instruction of a name."""
    return [step.text for step in STEPS if step.name == name]


def settings_of_the_image() -> dict[str, str]:
    """Return the variables that the image sets."""
    return {name: value for text in steps("ENV") for name, value in assignments(text, {}).items()}


def test_the_reader_joins_lines_and_leaves_comments_out():
    text = "# one\nARG A=b\nRUN first \\\n    # between\n    && second $A\n"
    assert [str(step) for step in instructions(text)] == ["ARG A=b", "RUN first && second $A"]
    assert substituted("${A}/$B/$C", {"A": "a", "B": "b"}) == "a/b/"
    assert assignments('X=1 Y="two words"', {}) == {"X": "1", "Y": "two words"}


def test_the_last_pattern_that_matches_decides():
    patterns = ["*", "!conf", "**/__pycache__", "conf/local"]
    names = ["a.py", "conf/a.yaml", "conf/x/__pycache__/a.pyc", "conf/local/a.yaml", "configuration"]
    assert [name for name in names if not is_ignored(name, patterns)] == ["conf/a.yaml"]


def test_the_base_is_pinned_by_digest():
    (base,) = (text for text in steps("ARG") if text.startswith("BASE_IMAGE="))
    assert re.fullmatch(r"BASE_IMAGE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", base)
    assert steps("FROM") == ["${BASE_IMAGE}"]


def test_every_package_is_installed_by_hash():
    installs = [command for text in steps("RUN") for command in re.findall(r"pip install [^&]*", text)]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert installs[0].split()[-4:] == ["-r", "requirements/gpu-py312.lock", "-r", "requirements/image.lock"]
    assert installs[1].split()[2:] == ["--no-deps", "--no-build-isolation", "-e", "."]


def test_the_image_ends_as_a_numeric_user_and_is_checked_as_that_user():
    (user,) = (text.partition("=")[2] for text in steps("ARG") if text.startswith("USER_ID="))
    assert user.isdigit() and int(user) > 0
    assert steps("USER")[-1] == "${USER_ID}"
    after = [
        step.text for step in STEPS[[str(step) for step in STEPS].index("USER ${USER_ID}") :] if step.name == "RUN"
    ]
    assert after == ['python docker/smoke.py --lock requirements/gpu-py312.lock --image && chmod -R a+rwX "$HOME"']


def test_every_cache_that_the_smoke_test_writes_is_set_below_the_home():
    names = re.search(r"^CACHES = \((.*?)^\)", (ROOT / "docker/smoke.py").read_text(), re.DOTALL | re.MULTILINE)[1]
    found = {name: settings_of_the_image().get(name, "") for name in re.findall(r'"(\w+)"', names)}
    assert len(found) == 10
    assert {name for name, folder in found.items() if not folder.startswith("/home/prolong")} == set()


def test_a_uid_without_an_entry_has_a_name():
    settings = settings_of_the_image()
    assert {settings["USER"], settings["LOGNAME"]} == {"prolong"}, "torch asks getpass.getuser() when it is imported"


def test_versions_stand_in_the_table_and_not_in_the_dockerfile():
    assert re.findall(r"_VERSION=|--expect|--at-least", DOCKERFILE) == []


def test_the_image_holds_what_its_commands_need():
    names = context(ROOT)
    needed = ["Makefile", "benchmarks/hopper/__main__.py", "docs/verification/hopper.json", "conf/train.yaml"]
    needed += ["scripts/train.py", "docker/entrypoint.sh", "requirements/image.lock", "tests/conftest.py", "LICENSE"]
    assert [name for name in needed if name not in names] == []
    assert [name for name in names if name.startswith((".", "runs/", "data/", "conf/local"))] == []


def test_signals_reach_the_command_through_both_entrypoints():
    (entrypoint,) = (json.loads(text) for text in steps("ENTRYPOINT"))
    assert entrypoint == ["/opt/nvidia/nvidia_entrypoint.sh", "/workspace/nemo_prolong/docker/entrypoint.sh"]
    assert os.access(ENTRYPOINT, os.X_OK)
    assert steps("WORKDIR") == [str(Path(entrypoint[1]).parents[1])]


def test_the_served_container_is_still_described():
    services = yaml.safe_load((ROOT / "docker/serve/compose.yaml").read_text())["services"]
    assert services


@pytest.fixture
def container(tmp_path):
    """Return a function that starts the entrypoint with a python on PATH that notes its arguments."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" >> {tmp_path}/arguments\n'
        'echo "to the user"; [[ -z ${SECONDS_OF_DOCTOR:-} ]] || exec sleep "$SECONDS_OF_DOCTOR"\n'
        '[[ $1 == */doctor.py ]] && exit "${CODE_OF_DOCTOR:-0}"; exit 0\n'
    )
    python.chmod(0o755)

    def start(*command, **environment):
        clean = {"PATH": f"{tmp_path}:/usr/bin:/bin", **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([ENTRYPOINT, *command], env=clean, cwd=ROOT, **pipes)

    def noted():
        path = tmp_path / "arguments"
        return path.read_text().splitlines() if path.exists() else []

    start.noted = noted
    return start


def test_the_command_takes_the_place_of_the_entrypoint(container):
    process = container("bash", "-c", 'echo $$; exit "$1"', "-", "7")
    assert process.communicate()[0] == f"{process.pid}\n"
    assert process.returncode == 7
    assert container.noted() == []


def test_a_stage_is_given_to_the_doctor_with_its_settings(container):
    command = ["torchrun", "--nproc-per-node", "8", "scripts/train.py", "+exp=sft", "name=two words"]
    process = container(*command)
    process.communicate()
    assert process.returncode == 127, "there is no torchrun here"
    assert container.noted() == [str(ROOT / "scripts/doctor.py"), "+exp=sft", "name=two words"]


def test_what_the_doctor_says_is_not_in_the_output_of_the_command(container):
    process = container("python", "scripts/train.py")
    output, errors = process.communicate()
    assert (output, errors) == ("to the user\n", "to the user\n")
    assert container.noted() == [str(ROOT / "scripts/doctor.py"), "scripts/train.py"]


def test_a_no_of_the_doctor_stops_the_command_with_its_code(container):
    process = container("python", "scripts/train.py", "+exp=sft", CODE_OF_DOCTOR="7")
    errors = process.communicate()[1]
    assert process.returncode == 7
    assert errors.splitlines()[-1] == (
        "The command was not started, because the doctor ended with 7. NEMO_PROLONG_SKIP_DOCTOR=1 leaves it out."
    )
    assert container.noted() == [str(ROOT / "scripts/doctor.py"), "+exp=sft"]


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        (["scripts/train.py", "+exp=sft"], {"NEMO_PROLONG_SKIP_DOCTOR": "1"}),
        (["scripts/train.py", "+exp=sft"], {"LOCAL_RANK": "3"}),
        (["scripts/train.py", "+exp=sft"], {"SLURM_LOCALID": "1"}),
        (["scripts/train.py", "+exp=sft", "--cfg", "job"], {}),
        (["scripts/train.py", "--help"], {}),
        (["scripts/report.py"], {}),
    ],
    ids=["switched off", "rank of torch", "rank of Slurm", "composed only", "help", "another script"],
)
def test_the_doctor_is_left_out(container, command, environment):
    process = container("python", *command, CODE_OF_DOCTOR="7", **environment)
    process.communicate()
    assert process.returncode == 0
    assert container.noted() == command


def test_a_signal_while_the_doctor_looks_ends_both_at_once(container):
    process = container("python", "scripts/train.py", SECONDS_OF_DOCTOR="60")
    deadline = time.monotonic() + 20
    while not container.noted() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert container.noted() == [str(ROOT / "scripts/doctor.py")]
