"""What the code of commit 20c882f left on disk goes on with this code, command by command.

``tests/fixtures/make_written_by_20c882f.sh`` made the archive. Its paths are relative: the directory may lie anywhere.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.report.data_card.write import write_card
from nemo_prolong.stages.manifest import StageManifest
from tests.support.launches import run_module
from tests.support.tiny import read_metrics

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "written_by_20c882f.tar.gz"
PROGRAM = "tests.support.scripts_program"
# What makes the losses of two machines differ: the order of sums in their kernels.
OTHER_PROCESSOR = 1e-3
TIMEOUT_SECONDS = 900

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT_SECONDS)]


@dataclass(frozen=True)
class Scripts:
    """What became of the scripts.

    Attributes:
        directory: Where they ran, on what the old code wrote.
        statuses: Exit status by the name of the job.
    """

    directory: Path
    statuses: dict[str, int]

    def log(self, name: str) -> str:
        """Return what a job printed."""
        return (self.directory / f"{name}.log").read_text()

    def json(self, path: str) -> Any:
        """Return a file."""
        return json.loads((self.directory / path).read_text())


def unpack(directory: Path) -> Path:
    """Unpack the archive and return the directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    """Every script once, one after the other."""
    directory = unpack(tmp_path_factory.mktemp("written_by_20c882f"))
    commands = (directory / f"{name}.args" for name in ("prepare", "base", "stage1"))
    prepare, base, stage1 = (command.read_text().splitlines() for command in commands)
    evaluation = ["rows=data/validation-128", "position_buckets=[64,128]", "max_documents=4", "recall_samples=2"]
    evaluation += ["recall_lengths=[128]"]
    runs = "runs=[runs/base,runs/stopped,runs/stage1,runs/child]"
    jobs: dict[str, tuple[str, list[str]]] = {
        "prepare": ("prepare_data", prepare),
        "resume": ("train", ["name=stopped", *base]),
        "scratch": ("train", ["name=scratch", *base]),
        "complete": ("train", ["name=stage1", *stage1]),
        "child": ("train", ["name=child", *stage1]),
        "refused": ("export", ["run=runs/stage1", "output=export/hf"]),
        "overwrite": ("export", ["run=runs/stage1", "output=export/hf", "overwrite=true"]),
        "evaluate": ("evaluate", ["models=[runs/stage1,hf:export/hf]", *evaluation]),
        "report": ("report", [runs, "exported=export/hf", "output=report.html"]),
        "lineage": ("lineage", ["runs/child"]),
        "watch": ("watch", ["runs/base", "--once"]),
        "inspect": ("inspect_data", ["data"]),
        "rows": ("inspect_data", ["data/words-64", "0", "39"]),
        "verify": ("inspect_data", ["data", "--verify"]),
    }
    described = [
        {"script": script, "arguments": arguments, "log": f"{name}.log"} for name, (script, arguments) in jobs.items()
    ]
    (directory / "jobs.json").write_text(json.dumps(described))
    run_module(PROGRAM, "jobs.json", timeout_seconds=TIMEOUT_SECONDS, cwd=directory)
    statuses = json.loads((directory / "jobs.json.statuses").read_text())
    return Scripts(directory, dict(zip(jobs, statuses, strict=True)))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive as the old code left it."""
    return unpack(tmp_path_factory.mktemp("untouched"))


def losses(run: Path) -> list[list[float]]:
    """Return step, loss and gradient norm of every step."""
    records = [record for record in read_metrics(run) if "loss" in record]
    return [[record[key] for key in ("step", "loss", "grad_norm")] for record in records]


def test_every_script_ends_as_it_should(scripts: Scripts) -> None:
    refused = {name: status for name, status in scripts.statuses.items() if status}
    assert refused == {"complete": 4, "refused": 5}, "\n".join(scripts.log(name)[-2000:] for name in refused)


def test_a_stopped_run_goes_on_to_its_end(scripts: Scripts, untouched: Path) -> None:
    before, after = (StageManifest.read(place / "runs" / "stopped") for place in (untouched, scripts.directory))
    assert (before.status, after.status, after.step) == ("stopped", "complete", 40)
    assert 0 < before.step < 40
    assert f"from step_{before.step:08d}" in (scripts.directory / "runs/stopped/events.jsonl").read_text()


def test_it_has_the_losses_of_a_run_that_was_never_stopped(scripts: Scripts, untouched: Path) -> None:
    resumed, scratch = (losses(scripts.directory / "runs" / name) for name in ("stopped", "scratch"))
    old, before = (losses(untouched / "runs" / name) for name in ("base", "stopped"))
    assert [step for step, *_ in resumed] == list(range(1, 41))
    for found in (resumed, scratch):
        assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in old], rel=OTHER_PROCESSOR)
    if scratch[: len(before)] == before:
        # This processor computes as the one that wrote the checkpoint: every bit is the same.
        assert resumed == scratch == old


def test_an_old_run_is_the_parent_of_a_new_stage(scripts: Scripts, untouched: Path) -> None:
    child, old = scripts.json("runs/child/stage.json"), json.loads((untouched / "runs/stage1/stage.json").read_text())
    assert child["status"] == "complete"
    added = {"stop_token_ids": [], "working_directory": str(scripts.directory), "grown_vocab_rows": 0, "wrappers": []}
    assert child["parent"] == {**old["parent"], **added}
    # The parent does not say what ends its texts. Exports of that time did.
    stops = json.loads((untouched / "export/hf/generation_config.json").read_text())["eos_token_id"]
    assert child["stop_token_ids"] == stops
    new, before = (losses(place) for place in (scripts.directory / "runs/child", untouched / "runs/stage1"))
    assert [loss for _, loss, _ in new] == pytest.approx([loss for _, loss, _ in before], rel=OTHER_PROCESSOR)


def test_a_complete_run_is_recognised_and_left_alone(scripts: Scripts, untouched: Path) -> None:
    assert "runs/stage1 already holds a complete run of stage1" in scripts.log("complete")
    for name in ("metrics.jsonl", "stage.json"):
        path = Path("runs") / "stage1" / name
        assert (scripts.directory / path).read_bytes() == (untouched / path).read_bytes()


def test_an_old_run_and_its_export_are_evaluated(scripts: Scripts, untouched: Path) -> None:
    old = json.loads((untouched / "runs/stage1/eval/perplexity.json").read_text())
    expected = [bucket["loss"] for bucket in old["buckets"]]
    for place in ("runs/stage1/eval", "export/hf_eval"):
        found = scripts.json(f"{place}/perplexity.json")
        assert [bucket["loss"] for bucket in found["buckets"]] == pytest.approx(expected, rel=OTHER_PROCESSOR)


def test_an_old_export_is_ours_and_may_be_overwritten(scripts: Scripts, untouched: Path) -> None:
    refusal = "output=export/hf: it already exists. Set overwrite=true to replace an earlier export"
    assert refusal in scripts.log("refused")
    new, old = (place / "export/hf/model-00001-of-00001.safetensors" for place in (scripts.directory, untouched))
    assert new.read_bytes() == old.read_bytes()


def test_the_report_is_about_old_and_new_runs(scripts: Scripts, untouched: Path) -> None:
    found, old = scripts.json("summary.json"), json.loads((untouched / "summary.json").read_text())
    directories = [stage["directory"] for stage in found["stages"]]
    assert directories == ["runs/base", "runs/stopped", "runs/stage1", "runs/child"]
    # Targets are counted since, and FP8 has a peak of its own.
    since = {"target_tokens": 5024, "target_share": 0.98125, "fp8_peak_share": None}
    assert found["stages"][0] == {**old["stages"][0], **since}
    assert "runs/child" in (scripts.directory / "report.html").read_text()


def test_the_lineage_and_the_watch_read_old_runs(scripts: Scripts) -> None:
    assert "weights of runs/base, step 40" in scripts.log("lineage")
    assert "commit 20c882f56ca8" in scripts.log("lineage")
    assert "step 40 of 40" in scripts.log("watch")


def test_an_old_data_directory_is_reused_shown_and_verified(scripts: Scripts, untouched: Path) -> None:
    assert "data is complete and has this configuration: reused" in scripts.log("prepare")
    assert "words-128" in scripts.log("inspect")
    assert "data/words-64 row 39 of 40  64 tokens" in scripts.log("rows")
    assert scripts.log("verify").count(": whole, ") == 4


def test_an_old_manifest_renders_the_same_card(untouched: Path) -> None:
    before = (untouched / "data/card.md").read_text()
    write_card(untouched / "data")
    # Since then amounts below 10K that are no whole number of K are written in full.
    for rounded, exact in (("3.78K", "3867"), ("2.5K", "2560")):
        before = before.replace(f" {rounded} ", f" {exact} ")
    assert (untouched / "data/card.md").read_text() == before
    assert "<svg" in (untouched / "data/card.html").read_text()
