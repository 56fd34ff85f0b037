"""The chain of a run, from the stage.json files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.errors import CheckpointError
from nemo_prolong.report.terminal.lineage import chain_of, describe_chain
from tests.support.terminal import printed


def paragraphs(run):
    return printed(describe_chain(chain_of(run))).strip().split("\n\n")


def test_a_chain_holds_every_stage_from_the_first_on(tree):
    described = paragraphs(tree.runs[3])
    assert [text.split()[0] for text in described] == ["base", "stage1", "stage2", "sft"]
    assert [text.splitlines()[0].split()[1] for text in described] == tree.runs
    for run, text in zip(tree.runs, described, strict=True):
        steps = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        losses = [step["loss"] for step in steps if "loss" in step]
        validation = [step["val_loss"] for step in steps if "val_loss" in step][-1]
        assert f"{losses[0]:.3f} -> {losses[-1]:.3f}, validation {validation:.3f}" in text
        assert "torch 2.13.0" in text and "commit d96a9f3c0ffe" in text and "manifest ab12ab12ab12" in text
    assert "nothing, from scratch" in described[0] and "rotary_base 10,000" in described[0]
    assert f"weights + optimizer of {tree.runs[1]}, step 60" in described[2]
    assert "30 of 30, complete" in described[2] and "in rows of 8K" in described[2]
    assert "trained 8K, advertised 8K, rotary_base 640,000" in described[3]


def test_a_chain_from_the_middle_ends_there(tree):
    assert len(paragraphs(tree.runs[1])) == 2


def test_a_hugging_face_parent_is_where_a_chain_begins(tree):
    tree.edit_manifest(1, parent={"path": "hf:models/llama", "step": 0, "transition": "weights"})
    described = paragraphs(tree.runs[1])
    assert described[0] == "hf:models/llama  (Hugging Face directory)" and len(described) == 2


def test_a_parent_that_was_removed_is_said(tree):
    shutil.rmtree(tree.runs[0])
    assert paragraphs(tree.runs[2])[0] == f"{tree.runs[0]}  (its stage.json is not there)"


def test_a_run_without_metrics_has_dashes(tree):
    (Path(tree.runs[0]) / "metrics.jsonl").unlink()
    assert "\u2013 -> \u2013, validation \u2013" in paragraphs(tree.runs[0])[0]


def test_what_a_run_recorded_neither_formats_nor_controls_the_terminal(tree):
    tree.edit_manifest(0, versions={"[bold]torch[/x]": "2.13\x1b[2J"})
    assert "[bold]torch[/x] 2.13\\x1b[2J; commit" in paragraphs(tree.runs[0])[0]


def test_a_circle_ends(tree):
    tree.edit_manifest(0, parent={"path": tree.runs[1], "step": 1, "transition": "weights"})
    assert len(chain_of(tree.runs[1])) == 2


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a run directory has a stage\.json"):
        chain_of(str(tmp_path))


def test_the_script_prints_the_chain(tree):
    script = CONFIG_DIR.parent / "scripts" / "lineage.py"
    done = subprocess.run([sys.executable, str(script), tree.runs[3]], capture_output=True, text=True, check=True)
    assert done.stdout == printed(describe_chain(chain_of(tree.runs[3])))
    refused = subprocess.run([sys.executable, str(script), "nowhere"], capture_output=True, text=True, check=False)
    assert refused.returncode == 4 and refused.stderr.startswith("nowhere: a run directory has a stage.json")
