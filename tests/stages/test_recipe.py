"""A recipe is checked as a whole before anything starts, goes on where it was, and passes requests to stop on."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_prolong.config.compose import compose
from nemo_prolong.config.schema.recipe import RecipeConfig, RecipeStage
from nemo_prolong.data.storage.remote import read_bytes
from nemo_prolong.distributed import processes
from nemo_prolong.errors import CheckpointError, ConfigError, DataError, ExportError
from nemo_prolong.export.run import check_planned
from nemo_prolong.files import write_json_atomically
from nemo_prolong.records.checkpoint.manifest import checkpoint_directory
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.evaluation import (
    Bucket,
    PerplexityResult,
    RecallEntry,
    RecallResult,
    state_of,
    write_result,
)
from nemo_prolong.records.export_manifest import ExportManifest, SourceRecord, TargetRecord
from nemo_prolong.records.run_directory import CONFIG_FILE
from nemo_prolong.stages import recipe_run
from nemo_prolong.stages.manifest import new_manifest
from nemo_prolong.stages.preflight import dump
from nemo_prolong.stages.recipe_plan import PlannedStage, compose_recipe, plan_recipe
from nemo_prolong.stages.recipe_run import run_recipe
from tests.support.fake_checkpoint import write_checkpoint
from tests.support.recipe_tools import SCRIPT, STAGES, STEPS, recipe_command, write_recipe_data
from tests.support.tiny import write_plain_tokenizer

# A part of the recipe without NeMo: writes what it was started with, then does as the file "behaviour" says.
PROGRAM = """\
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
rank = os.environ.get("RANK", "alone")
behaviour = json.loads((here / "behaviour").read_text())[rank]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with (here / f"started.{rank}").open("a") as file:
    print(json.dumps([pathlib.Path(__file__).name, sys.argv[1:], os.getpid(), dict(os.environ)]), file=file)
if behaviour == "wait":
    time.sleep(60)
sys.exit(behaviour)
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of every stage, and a tokenizer."""
    root = write_recipe_data(tmp_path / "data")
    write_plain_tokenizer(root / "tokenizer")
    return root


@pytest.fixture
def make_recipe(tmp_path: Path, data: Path) -> Callable[..., RecipeConfig]:
    """A function from overrides to the tiny recipe."""

    def make(*more: str) -> RecipeConfig:
        return compose(RecipeConfig, "recipe", [*recipe_command(tmp_path, data)[2:], *more])

    return make


def leave(stage: PlannedStage, status: str, *steps: int) -> Path:
    """Write what a run of a stage leaves."""
    run_dir = Path(stage.cfg.run_dir)
    manifest = new_manifest(
        stage.cfg, None, None, "python scripts/train.py", 1, DataManifestFile.read(stage.cfg.data.root, read_bytes)
    )
    manifest.model_copy(update={"status": status, "step": max(steps, default=0)}).write(run_dir)
    write_json_atomically(run_dir / CONFIG_FILE, dump(stage.cfg))
    for step in steps:
        write_checkpoint(run_dir, step)
    return run_dir


def refusal(kind: type[Exception], cfg: RecipeConfig) -> str:
    with pytest.raises(kind) as error:
        plan_recipe(cfg)
    assert type(error.value) is kind
    return str(error.value)


# The plan.


def test_the_miniature_recipe_is_four_stages_and_an_export() -> None:
    recipe = compose(RecipeConfig, "recipe", ["+exp=mini/recipe"])
    assert [stage.exp for stage in recipe.stages] == [f"mini/{stage}" for stage in STAGES]
    assert recipe.export_overrides == ["output=runs/demo/export/hf"]


def test_the_runs_of_a_chain_move_together(make_recipe, tmp_path):
    plan = plan_recipe(make_recipe())
    runs = [f"{tmp_path}/runs/demo/{stage}" for stage in STAGES]
    assert [stage.cfg.run_dir for stage in plan.stages] == runs
    assert [stage.cfg.parent for stage in plan.stages] == [None, *runs[:-1]]
    assert plan.export is not None and plan.export.cfg.run == runs[-1]


def test_a_stage_that_does_not_start_from_the_last_is_refused(make_recipe, tmp_path):
    shuffled = make_recipe("stages=[{exp: mini/base, overrides: []}, {exp: mini/stage2, overrides: []}]")
    assert refusal(ConfigError, shuffled) == (
        f"stages[1] parent={tmp_path}/runs/demo/stage1: the stage before it is {tmp_path}/runs/demo/base, and "
        f"demo/stage2 does not start from that. Add parent={tmp_path}/runs/demo/base to stages[1].overrides, or put "
        "the stages in order."
    )
    from_scratch = make_recipe(
        "stages=[{exp: mini/base, overrides: []}, {exp: mini/base, overrides: ['name=other']}]", "export_overrides=null"
    )
    assert refusal(ConfigError, from_scratch).startswith("stages[1] parent=null: the stage before it is ")


def test_a_model_of_another_shape_than_before_is_refused(make_recipe):
    cfg = make_recipe()
    wide = cfg.stages[1].model_copy(update={"overrides": [*cfg.stages[1].overrides, "model.num_layers=3"]})
    changed = cfg.model_copy(update={"stages": [cfg.stages[0], wide]})
    assert "the model differs from the parent's in model.num_layers (2 -> 3)." in refusal(ConfigError, changed)


def test_two_stages_in_one_directory_are_refused(make_recipe):
    cfg = make_recipe()
    runs_dir = plan_recipe(cfg).stages[0].cfg.runs_dir
    again = cfg.stages[3].model_copy(
        update={"overrides": [*cfg.stages[3].overrides, f"parent={runs_dir}/demo/sft", "name=demo/stage1"]}
    )
    changed = cfg.model_copy(update={"stages": [*cfg.stages, again]})
    assert refusal(ConfigError, changed).startswith(
        "stages[4] name=demo/stage1: another stage of the recipe has the same run directory."
    )


def test_missing_rows_of_a_late_stage_are_found_at_the_start(make_recipe, data):
    (data / "sft" / "index.json").unlink()
    assert refusal(DataError, make_recipe()).startswith(f"data.mixture path=sft: {data}/sft holds no packed rows.")


def test_ranks_that_cannot_hold_a_layout_are_refused_early(make_recipe):
    assert "train.global_batch_size=2: must be a multiple of" in refusal(ConfigError, make_recipe("ranks=4"))


def test_a_complete_run_of_other_settings_is_refused(make_recipe):
    other = make_recipe()
    leave(plan_recipe(other).stages[0], "complete", STEPS)
    changed = other.model_copy(update={"overrides": [*other.overrides, "seed=7"]})
    message = refusal(CheckpointError, changed)
    assert "it differs in seed (42 -> 7)." in message and "resume.allow" not in message


def test_a_recipe_typed_for_another_script_says_which() -> None:
    with pytest.raises(ConfigError) as error:
        compose(RecipeConfig, "recipe", ["+exp=mini/base"])
    assert str(error.value) == (
        "+exp=mini/base: is an experiment of scripts/train.py. Type +exp=NAME, one of: mini/recipe, prolong."
    )


# Where it goes on.


def test_the_next_stage_is_the_first_that_is_not_complete(make_recipe):
    plan = plan_recipe(make_recipe())
    assert plan.next_stage() == 0
    leave(plan.stages[0], "complete", STEPS)
    assert plan.next_stage() == 1
    leave(plan.stages[1], "running", 3)
    assert plan.next_stage() == 1
    assert [line.partition(": ")[2] for line in plan.describe()] == [
        f"complete, {STEPS} of {STEPS} steps",
        f"goes on after step 3, 3 of {STEPS} steps",
        f"starts, 0 of {STEPS} steps",
        f"starts, 0 of {STEPS} steps",
        "starts",
    ]


def test_a_damaged_parent_is_trained_again_for_its_child(make_recipe):
    plan = plan_recipe(make_recipe())
    run_dir = leave(plan.stages[0], "complete", STEPS - 3, STEPS)
    assert plan.next_stage() == 1
    (checkpoint_directory(run_dir, STEPS) / "weights" / "common.pt").write_bytes(b"damaged")
    assert plan.next_stage() == 0
    leave(plan.stages[1], "running", 3)
    assert plan.next_stage() == 1


def test_an_export_is_complete_for_its_run_step_and_format(make_recipe):
    plan = plan_recipe(make_recipe())
    assert plan.export is not None
    last, output = plan.stages[-1], Path(plan.export.cfg.output)
    leave(last, "complete", STEPS)
    source = SourceRecord(
        run=last.cfg.run_dir, name="sft", stage="sft", checkpoint="step_00000004", step=STEPS, git_commit=None
    )
    written = ExportManifest(
        source=source, dtype="float32", rotary_base=1e4, trained_context_length=64, advertised_context_length=64,
        verification=None, versions={}, exported_at="2026-11-24T14:00:00Z", files={},
    )  # fmt: skip
    target = TargetRecord(
        format="vllm", gpu="h100_80gb", tensor_parallel_size=1, pipeline_parallel_size=1, quantization=None
    )
    for changes, complete in (
        ({}, True),
        ({"dtype": "bfloat16"}, False),
        ({"source": source.model_copy(update={"run": "runs/other"})}, False),
        ({"source": source.model_copy(update={"step": STEPS - 1})}, False),
        ({"target": target}, False),
    ):
        written.model_copy(update=changes).write(output)
        assert plan.export.is_complete(last) == complete
    (output / "export_manifest.json").write_text("{}")
    assert not plan.export.is_complete(last)


def evaluated(make_recipe, tmp_path) -> RecipeConfig:
    """The tiny recipe with an evaluation."""
    rows = [f"rows={tmp_path}/data/sft", "recall_samples=2"]
    return make_recipe().model_copy(update={"evaluate_overrides": rows})


def test_an_evaluation_is_complete_for_a_state_and_its_settings(make_recipe, tmp_path):
    plan = plan_recipe(evaluated(make_recipe, tmp_path))
    assert plan.evaluation is not None
    last, cfg = plan.stages[-1], plan.evaluation.cfg
    assert cfg.models == [last.cfg.run_dir] and not plan.evaluation.is_complete(last)
    leave(last, "complete", STEPS)
    state = state_of(last.cfg.run_dir)
    common = {
        "model": "m",
        "backend": "megatron",
        "seconds": 1.0,
        "settings": cfg.settings,
        "model_sha256": state.sha256,
    }
    bucket = Bucket(start=0, end=8, documents=0, tokens=0, loss=None, perplexity=None)
    entry = RecallEntry(length=8, samples=1, exact_match=0.0, token_accuracy=0.0, answer_loss=1.0)
    perplexity = PerplexityResult(data="rows", documents=1, buckets=[bucket], **common)
    directory = Path(last.cfg.run_dir) / "eval"
    directory.mkdir()
    write_result(directory, perplexity)
    assert not plan.evaluation.is_complete(last)
    write_result(directory, RecallResult(lengths=[entry], **common))
    assert plan.evaluation.is_complete(last)
    for change in ({"settings": cfg.settings | {"seed": 1}}, {"model_sha256": "other"}):
        write_result(directory, perplexity.model_copy(update=change))
        assert not plan.evaluation.is_complete(last)


def test_the_first_stage_of_a_recipe_takes_its_parent_alone(make_recipe):
    stages = [{"exp": f"mini/{stage}", "overrides": ["runs_dir=out"]} for stage in ("stage1", "stage2")]
    cfg = make_recipe().model_copy(
        update={"stages": [RecipeStage(**stage) for stage in stages], "overrides": [], "parent": "hf:DIR"}
    )
    assert [stage.cfg.parent for stage in compose_recipe(cfg).stages] == ["hf:DIR", "out/demo/stage1"]


# The processes.


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts without NeMo in place of the real ones."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("train.py", "evaluate.py", "export.py"):
        (scripts / name).write_text(PROGRAM)
    monkeypatch.setattr(recipe_run, "CONFIG_DIR", tmp_path / "conf")
    return scripts


def started(parts: Path, rank: str = "alone") -> list[list]:
    path = parts / f"started.{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def code_of(cfg: RecipeConfig) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        run_recipe(cfg)
    return end.value.code


def test_a_dry_run_prints_the_plan_and_starts_nothing(make_recipe, parts, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run_recipe(make_recipe("dry_run=true"))
    assert caplog.messages == [
        *(f"{n}. {stage} {tmp_path}/runs/demo/{stage}: starts, 0 of 12 steps" for n, stage in enumerate(STAGES, 1)),
        f"5. export {tmp_path}/export: starts",
    ]
    assert not list(parts.glob("started.*")) and not (tmp_path / "runs").exists()


def test_a_recipe_evaluates_its_last_stage_before_it_exports(make_recipe, parts, tmp_path):
    for stage in plan_recipe(make_recipe()).stages:
        leave(stage, "complete", STEPS)
    (parts / "behaviour").write_text(json.dumps({"alone": 0}))
    run_recipe(evaluated(make_recipe, tmp_path))
    assert [script for script, *_ in started(parts)] == ["evaluate.py", "export.py"]
    last = f"{tmp_path}/runs/demo/sft"
    assert [arguments[-1] for _, arguments, *_ in started(parts)] == [f"models=[{last}]", f"run={last}"]


def test_an_export_that_would_be_refused_stops_the_recipe_at_once(make_recipe, parts, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError) as taken:
        run_recipe(make_recipe(), check_export=check_planned)
    assert str(taken.value) == (
        f"output={tmp_path}/export: it already exists. "
        "Set overwrite=true to replace an earlier export, or name another output or remove it."
    )
    serve = [f"output={tmp_path}/served", "export=vllm", "export.max_batch_size=5000"]
    served = advertise(make_recipe(), "512K").model_copy(update={"export_overrides": serve})
    with pytest.raises(ExportError, match=r"5000 x 512K tokens do not fit.*Set export\.max_batch_size="):
        run_recipe(served, check_export=check_planned)
    assert not list(parts.glob("started.*")) and not (tmp_path / "runs").exists()


def advertise(cfg: RecipeConfig, length: str) -> RecipeConfig:
    """Let the last stage advertise a context."""
    *stages, last = cfg.stages
    last = last.model_copy(update={"overrides": [*last.overrides, f"advertised_context_length={length}"]})
    return cfg.model_copy(update={"stages": [*stages, last]})


def test_the_context_of_a_plan_is_the_longest_or_what_is_typed(make_recipe):
    assert plan_recipe(make_recipe()).advertised_context_length == 256
    assert plan_recipe(advertise(make_recipe(), "4K")).advertised_context_length == 4096


@pytest.mark.parametrize(("code", "expected"), [(4, 4), (75, 75), (76, 76)])
def test_the_code_of_a_failed_part_ends_the_recipe(code, expected, make_recipe, parts):
    (parts / "behaviour").write_text(json.dumps({"alone": code}))
    assert code_of(make_recipe()) == expected
    ((script, arguments, _, environment),) = started(parts)
    assert (script, arguments[0]) == ("train.py", "+exp=mini/base")
    # A plain process: what torchrun would set is not there.
    assert "WORLD_SIZE" not in environment or environment["WORLD_SIZE"] == os.environ.get("WORLD_SIZE")


def test_several_ranks_get_what_torchrun_would_give_them(make_recipe, parts, monkeypatch):
    monkeypatch.setattr(processes, "_SECONDS_AFTER_FIRST_FAILURE", 0.5)
    (parts / "behaviour").write_text(json.dumps({"0": "wait", "1": 4}))
    assert code_of(make_recipe("ranks=2")) == 4
    environments = [started(parts, rank)[0][3] for rank in ("0", "1")]
    for rank, environment in enumerate(environments):
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("2", "2")
    assert environments[0]["MASTER_PORT"] == environments[1]["MASTER_PORT"]
    assert not Path(f"/proc/{started(parts, '0')[0][2]}").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_reaches_every_rank_and_ends_with_75(number, make_recipe, parts):
    (parts / "behaviour").write_text(json.dumps({"0": "wait", "1": "wait"}))
    waiting = f"while [ ! -s {parts}/started.0 ] || [ ! -s {parts}/started.1 ]; do sleep 0.05; done"
    process = subprocess.Popen(["bash", "-c", f"{waiting}; kill -{int(number)} {os.getpid()}"])
    before = signal.getsignal(number)
    began = time.monotonic()
    assert code_of(make_recipe("ranks=2")) == 75
    assert time.monotonic() - began < 30
    assert process.wait() == 0
    assert signal.getsignal(number) is before


def test_a_part_dies_with_the_recipe_that_started_it(tmp_path, data, parts):
    (parts / "behaviour").write_text(json.dumps({"alone": "wait"}))
    command = recipe_command(tmp_path, data)
    program = (
        "import pathlib, runpy, sys\n"
        "from nemo_prolong.stages import recipe_run\n"
        f"recipe_run.CONFIG_DIR = pathlib.Path({str(tmp_path / 'conf')!r})\n"
        f"sys.argv[0] = {str(SCRIPT)!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, *command[2:]], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not started(parts) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (part,) = started(parts)
    process.kill()
    process.wait()
    # Well before it would end by itself.
    deadline = time.monotonic() + 15
    while Path(f"/proc/{part[2]}/cmdline").exists() and Path(f"/proc/{part[2]}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the part outlived the recipe"
        time.sleep(0.05)
