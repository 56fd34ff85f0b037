"""The recipe as one command: killed three times at random, it ends with the export of one that was left alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.data.tokenizer import train_tokenizer
from nemo_prolong.errors import EXIT_PREEMPTED
from nemo_prolong.records.stage_manifest import StageManifest
from tests.support.recipe_tools import STAGES, STEPS, recipe_command, write_recipe_data
from tests.support.tiny import VOCAB_SIZE, read_metrics

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(1200)]

SEED = int(os.environ.get("PROLONG_RECIPE_SEED", time.time()))
KILLS = 3
TIMEOUT_SECONDS = 500
STARTED: list[subprocess.Popen[bytes]] = []


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, stdin=subprocess.DEVNULL)
    STARTED.append(process)
    return process


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def progress(directory: Path) -> int:
    """Return the steps of all stages that are on record, of which every stage has ``STEPS``."""
    runs = (directory / "runs" / "demo" / stage for stage in STAGES)
    return sum(len(read_metrics(run)) for run in runs if (run / "metrics.jsonl").exists())


def kill_at(directory: Path, command: list[str], log: Path, steps: int, victim: str, number: int) -> dict[str, Any]:
    """Run the command until so many steps are on record, send a signal to it or to its child, and see what happens."""
    process = start(command, log)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while progress(directory) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, log.read_text()[-4000:]
    children = children_of(process.pid)
    # Whoever trains is the child: steps come from nowhere else.
    os.kill(process.pid if victim == "parent" else children[0], number)
    code = process.wait(TIMEOUT_SECONDS)
    deadline = time.monotonic() + 10
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return {"code": code, "left": [child for child in children if is_alive(child)]}


def is_alive(process: int) -> bool:
    """Return whether a process runs; what nobody has waited for yet has no command line any more."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two recipes side by side, one of which is killed three times and asked to stop once."""
    root = tmp_path_factory.mktemp("recipe")
    data = write_recipe_data(root / "data")
    words = " ".join(f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst")
    train_tokenizer(["A document about the number 12345.\n", words], VOCAB_SIZE, data / "tokenizer")
    commands = {name: recipe_command(root / name, data) for name in ("whole", "killed")}
    log = {name: root / f"{name}.log" for name in commands}
    whole = start(commands["whole"], log["whole"])
    # One in each of the first three stages, by turns the child, the command and the child again; then a polite request.
    generator = random.Random(SEED)
    at = [stage * STEPS + generator.randrange(1, STEPS) for stage in range(KILLS)]
    victims = ["child", "parent", generator.choice(["child", "parent"])]
    seen: dict[str, Any] = {"at": at, "root": root, "log": log}
    try:
        seen["kills"] = [
            kill_at(root / "killed", commands["killed"], log["killed"], steps, victim, signal.SIGKILL)
            for steps, victim in zip(at, victims, strict=True)
        ]
        stop_at = 3 * STEPS + generator.randrange(1, STEPS - 4)
        seen["stop"] = kill_at(root / "killed", commands["killed"], log["killed"], stop_at, "parent", signal.SIGTERM)
        codes = {
            "killed": start(commands["killed"], log["killed"]).wait(TIMEOUT_SECONDS),
            "whole": whole.wait(TIMEOUT_SECONDS),
        }
    finally:
        # Parts die with the recipe that started them.
        for process in STARTED:
            process.kill()
    for name, code in codes.items():
        assert code == 0, (SEED, log[name].read_text()[-4000:])
    return {**seen, "victims": victims, "commands": commands}


def test_every_kill_ends_the_command_and_its_child(recipes: dict[str, Any]) -> None:
    codes = [kill["code"] for kill in recipes["kills"]]
    expected = [-signal.SIGKILL if victim == "parent" else 128 + signal.SIGKILL for victim in recipes["victims"]]
    assert codes == expected, SEED
    assert all(kill["left"] == [] for kill in recipes["kills"]), SEED


def test_a_request_to_stop_is_handed_on_and_ends_with_75(recipes: dict[str, Any]) -> None:
    assert recipes["stop"] == {"code": EXIT_PREEMPTED, "left": []}, SEED
    events = (recipes["root"] / "killed" / "runs" / "demo" / "sft" / "events.jsonl").read_text().splitlines()
    assert "stopped_by_signal" in [json.loads(event)["event"] for event in events], SEED


def test_the_exported_weights_are_the_same_to_the_last_bit(recipes: dict[str, Any]) -> None:
    hashes = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (recipes["root"] / name / "export").glob("*.safetensors")
        }
        for name in ("whole", "killed")
    ]
    assert len(hashes[0]) >= 1
    assert hashes[0] == hashes[1], (SEED, recipes["at"])


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_of_every_stage_is_on_record_once(stage: str, recipes: dict[str, Any]) -> None:
    whole, killed = (
        [
            (r["step"], r["loss"], r["grad_norm"], r["learning_rate"])
            for r in read_metrics(recipes["root"] / name / "runs" / "demo" / stage)
        ]
        for name in ("whole", "killed")
    )
    assert [record[0] for record in whole] == list(range(1, STEPS + 1))
    assert killed == whole, (SEED, recipes["at"])


def test_the_chain_and_what_every_stage_took_are_on_record(recipes: dict[str, Any]) -> None:
    runs = recipes["root"] / "killed" / "runs" / "demo"
    manifests = {stage: StageManifest.read(runs / stage) for stage in STAGES}
    assert manifests["base"].parent is None
    for before, stage in itertools.pairwise(STAGES):
        parent = manifests[stage].parent
        assert parent is not None and (parent.path, parent.step) == (str(runs / before), STEPS)
        carried = stage == "stage2"
        assert ("moments of Adam" in parent.taken, "moments of Adam" in parent.not_taken) == (carried, not carried)


def test_the_command_of_a_complete_recipe_does_nothing(recipes: dict[str, Any]) -> None:
    log = recipes["root"] / "again.log"
    assert start(recipes["commands"]["killed"], log).wait(100) == 0
    assert "the recipe is complete" in log.read_text()
    assert "takes" not in log.read_text() and "exporting" not in log.read_text()
