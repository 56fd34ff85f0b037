"""``export_manifest.json`` is written as it always was, and manifests of older and newer versions are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_prolong.records.export_manifest import (
    ExportManifest,
    GreedyRecord,
    PromptRecord,
    QuantizationRecord,
    SharpenedRecord,
    TargetRecord,
    VerificationRecord,
)
from tests.support.export_tools import make_export_manifest

PROMPT = {
    "name": "prompt of 1", "tokens": 1, "last_position": 0, "compared_positions": 1, "max_logit_difference": 1e-7,
    "argmax_equal": 1,
}  # fmt: skip
VERIFICATION = {
    "tensors": 21, "max_logit_difference": 1e-7, "logit_tolerance": 1e-4, "prompts": [PROMPT],
    "sharpened": {"factor": 8, "argmax_equal_share": 1.0, "max_difference": 0.5}, "greedy": {"tokens": 16, "equal": 16},
    "stop_ids": [2, 3], "transformers": "4.57.6",
}  # fmt: skip
QUANTIZATION = {
    "algorithm": "FP8", "kv_cache_algorithm": "FP8", "modelopt": "0.37.0", "calibration_rows": 6,
    "calibration_length": 48, "calibration_documents": 12, "calibration_tokens": 300,
}  # fmt: skip
MANIFEST = {
    "format": 1,
    "software": "nemo_prolong",
    "source": {
        "run": "runs/sft", "name": "sft", "stage": "sft", "checkpoint": "step_00000004", "step": 4, "git_commit": None,
    },
    "dtype": "float32",
    "rotary_base": 10000.0,
    "trained_context_length": 64,
    "advertised_context_length": 64,
    "stop_token_ids": [2, 3],
    "chat_template_sha256": "1" * 64,
    "chat_date": "2024-07-26",
    "verification": VERIFICATION,
    "target": {
        "format": "trtllm", "gpu": "h100_80gb", "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
        "quantization": {**QUANTIZATION, "verified_matrices": 14, "relative_logit_difference": 0.02},
    },
    "versions": {"torch": "2.13.0"},
    "exported_at": "2026-11-24T14:00:00Z",
    "files": {"config.json": {"sha256": "0" * 64, "bytes": 1}},
}  # fmt: skip


def read(tmp_path: Path, content: object) -> ExportManifest:
    (tmp_path / "export_manifest.json").write_text(json.dumps(content))
    return ExportManifest.read(tmp_path)


def test_a_manifest_is_written_key_by_key_as_it_is_read(tmp_path: Path) -> None:
    read(tmp_path, MANIFEST).write(tmp_path)
    assert (tmp_path / "export_manifest.json").read_text() == json.dumps(MANIFEST, indent=2) + "\n"


def test_what_is_made_in_code_is_written_the_same(tmp_path: Path) -> None:
    verification = VerificationRecord(
        tensors=21,
        max_logit_difference=1e-7,
        logit_tolerance=1e-4,
        prompts=[PromptRecord(**PROMPT)],
        sharpened=SharpenedRecord(factor=8, argmax_equal_share=1.0, max_difference=0.5),
        greedy=GreedyRecord(tokens=16, equal=16),
        stop_ids=[2, 3],
        transformers="4.57.6",
    )
    quantization = QuantizationRecord(**QUANTIZATION)
    target = TargetRecord(
        format="trtllm", gpu="h100_80gb", tensor_parallel_size=1, pipeline_parallel_size=1, quantization=quantization
    )
    versions = {"torch": "2.13.0"}
    chat = {"stop_token_ids": [2, 3], "chat_template_sha256": "1" * 64, "chat_date": "2024-07-26"}
    manifest = make_export_manifest("config.json", verification=verification, target=target, versions=versions, **chat)
    manifest.write(tmp_path)
    # Without verification the two keys of the comparison are not there.
    expected = {**MANIFEST, "target": {**MANIFEST["target"], "quantization": QUANTIZATION}}
    assert (tmp_path / "export_manifest.json").read_text() == json.dumps(expected, indent=2) + "\n"


def test_a_plain_export_without_verification_says_null(tmp_path: Path) -> None:
    make_export_manifest().write(tmp_path)
    written = json.loads((tmp_path / "export_manifest.json").read_text())
    assert list(written) == list(MANIFEST)
    assert written["verification"] is None and written["target"] is None


def test_manifests_of_the_first_versions_are_read(tmp_path: Path) -> None:
    later = ("target", "stop_token_ids", "chat_template_sha256", "chat_date")
    early = {key: value for key, value in MANIFEST.items() if key not in later}
    early["verification"] = {key: value for key, value in VERIFICATION.items() if key not in ("sharpened", "stop_ids")}
    manifest = read(tmp_path, early)
    assert manifest.target is None
    assert (manifest.stop_token_ids, manifest.chat_template_sha256, manifest.chat_date) == ([], None, None)
    assert manifest.verification.sharpened is None and manifest.verification.max_logit_difference == 1e-7


def test_keys_of_later_versions_are_left_out(tmp_path: Path) -> None:
    later = {**MANIFEST, "signature": "...", "source": {**MANIFEST["source"], "host": "a"}}
    assert read(tmp_path, later) == read(tmp_path, MANIFEST)


@pytest.mark.parametrize("content", [[], {}, {**MANIFEST, "files": None}, {**MANIFEST, "source": {}}])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match="ExportManifest"):
        read(tmp_path, content)


def test_a_key_that_the_format_has_not_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        make_export_manifest(signature="...")
