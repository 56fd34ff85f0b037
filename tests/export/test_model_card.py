"""The model card: metadata that the Hub takes, and Markdown that no text from outside can break."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt

from nemo_prolong.export.hf_config import SpecialTokens
from nemo_prolong.export.model_card import model_card
from nemo_prolong.export.rendering import render
from nemo_prolong.export.source import ExportSource
from nemo_prolong.records.export_manifest import QuantizationRecord, TargetRecord
from nemo_prolong.records.stage_manifest import DataRecord, ParentRecord, StageManifest
from tests.support.export_tools import make_model, write_perplexity, write_recall

HOSTILE = (
    'a "b": |\n---\n# c `d` ``e <f> [g](h) ![i](j) *k* __l__ ${m} {{ n }} {% o %} | p |\n\n```\nhttps://q www.r\x1b'
)
HOSTILE_LINE = (
    'a "b": | --- # c `d` ``e <f> [g](h) ![i](j) *k* __l__ ${m} {{ n }} {% o %} | p | ``` https://q www.r\u241b'
)

# What the Hub's own check of `license` names: huggingface_hub issue 4218, of May 2026.
HUB_LICENSES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc "
    "cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 "
    "eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c "
    "ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa "
    "unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 "
    "llama3.2 llama3.3 llama4 grok2-community gemma unknown other".split()
)

STOPS = SpecialTokens(bos_id=1, eos_id=2, pad_id=None, stop_ids=(2, 9), stop_tokens=("</s>", "<|end|>"))

FP8 = QuantizationRecord(
    algorithm="FP8", kv_cache_algorithm="FP8", modelopt="0.37.0", calibration_rows=6, calibration_length=48,
    calibration_documents=12, calibration_tokens=300,
)  # fmt: skip


def make_source(run_dir: Path, text: str = "text", **model: Any) -> ExportSource:
    """Return a run whose every name from outside is ``text``."""
    sizes = make_model(name=text, license=text, **model)
    manifest = StageManifest(
        name=text, stage=text, status="complete", model=sizes, seq_length=64, trained_context_length=64,
        advertised_context_length=2**19, rotary_base=8e6, train_iters=4, step=4, consumed_train_rows=8,
        consumed_train_tokens=4096, consumed_target_tokens=4000, versions={"torch": text}, git_commit=text,
        world_size=1, started_at="", finished_at="", command="",
        parent=ParentRecord(path=f"hf:{text}", step=0, transition=text, rotary_base=5e5),
        data=DataRecord(
            root="", tokenizer="", manifest_sha256=None, mixture=[{"path": text, "proportion": 1.0, "domain": "a"}]
        ),
    )  # fmt: skip
    return ExportSource(run_dir, run_dir / "step_00000004", 4, manifest, sizes, run_dir, reader=None)


def with_model(source: ExportSource, **changes: Any) -> ExportSource:
    return dataclasses.replace(source, model=source.model.model_copy(update=changes))


def card_of(source: ExportSource, target: TargetRecord | None = None) -> str:
    return model_card(source, STOPS, torch.bfloat16, None, target)


def metadata_of(tmp_path: Path, card: str) -> dict[str, Any]:
    """Return the metadata as huggingface_hub reads them before it sends a card."""
    (tmp_path / "README.md").write_text(card)
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata is not None
    assert metadata == ModelCard.load(tmp_path / "README.md").data.to_dict()
    return metadata


def check_metadata(metadata: dict[str, Any]) -> None:
    """Check names and types against what the Hub accepts."""
    assert metadata.keys() <= {"license", "license_name", "library_name", "pipeline_tag", "base_model", "tags"}
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata.get("library_name", "transformers") == "transformers"
    assert isinstance(metadata["tags"], list) and all(isinstance(tag, str) for tag in metadata["tags"])
    assert metadata.get("license", "other") in HUB_LICENSES
    assert ("license_name" in metadata) <= (metadata.get("license") == "other")
    if "base_model" in metadata:
        validate_repo_id(metadata["base_model"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Meta Llama 3 Community License", {"license": "llama3"}),
        ("Llama 3.3 Community License", {"license": "llama3.3"}),
        ("My Licence: v2 (draft)", {"license": "other", "license_name": "my-licence-v2-draft"}),
        (HOSTILE, {"license": "other", "license_name": "a-b-c-d-e-f-g-h-i-j-k-l-m-n-o-p-https-q-www.r"}),
        ("\u8bb8\u53ef", {"license": "other"}),
        ("", {}),
    ],
)
def test_the_hub_takes_any_licence(tmp_path: Path, name: str, expected: dict[str, str]) -> None:
    metadata = metadata_of(tmp_path, card_of(with_model(make_source(tmp_path), license=name)))
    check_metadata(metadata)
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf:/c/hub/models--meta-llama--Meta-Llama-3-8B/snapshots/0e9e39f2", "meta-llama/Meta-Llama-3-8B"),
        ("hf:models/Meta-Llama-3-8B-Instruct", None),
        ("runs/stage1", None),
    ],
)
def test_the_base_model_is_named_only_where_the_path_tells_it(tmp_path: Path, path: str, expected: str | None) -> None:
    source = make_source(tmp_path)
    parent = source.manifest.parent.model_copy(update={"path": path})
    manifest = source.manifest.model_copy(update={"parent": parent})
    metadata = metadata_of(tmp_path, card_of(dataclasses.replace(source, manifest=manifest)))
    check_metadata(metadata)
    assert metadata.get("base_model") == expected


def structure(card: str) -> tuple[list[tuple[str, list[str]]], str]:
    """Return the kinds of blocks and of what is in them but text, and all text."""
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)
    inner = [[child for child in token.children or ()] for token in tokens]
    kinds = [[child.type for child in children if child.type != "text"] for children in inner]
    text = "\n".join("".join(child.content for child in children) for children in inner)
    return list(zip([token.type for token in tokens], kinds, strict=True)), text


def test_no_text_from_outside_is_taken_for_markup(tmp_path: Path) -> None:
    for directory in ("eval", "harmless/eval"):
        write_perplexity(tmp_path / directory)
        write_recall(tmp_path / directory)
    ours, _ = structure(card_of(make_source(tmp_path / "harmless")))
    card = card_of(make_source(tmp_path, HOSTILE))
    theirs, text = structure(card)
    assert theirs == ours
    # The model, the run three times, the stage twice, its data, the parent, a version, the commit, the licence.
    assert text.count(HOSTILE_LINE) == 11
    check_metadata(metadata_of(tmp_path, card))


def test_weights_in_fp8_are_not_offered_to_transformers(tmp_path: Path) -> None:
    target = TargetRecord(
        format="trtllm", gpu="h100_80gb", tensor_parallel_size=2, pipeline_parallel_size=1, quantization=FP8
    )
    card = card_of(make_source(tmp_path), target)
    metadata = metadata_of(tmp_path, card)
    check_metadata(metadata)
    assert "library_name" not in metadata and "fp8" in metadata["tags"]
    assert "from_pretrained" not in card and "Use the bf16 export there." in card
    assert "`bash serve.sh` starts the server with `serve.yaml`, which is sized for 2 x h100_80gb." in card
    assert "ModelOpt 0.37.0 calibrated the scales on 12 documents of the training data, 300 tokens." in card


def test_bf16_weights_for_a_server_are_for_transformers_too(tmp_path: Path) -> None:
    target = TargetRecord(
        format="vllm", gpu="h100_80gb", tensor_parallel_size=1, pipeline_parallel_size=1, quantization=None
    )
    card = card_of(make_source(tmp_path), target)
    assert metadata_of(tmp_path, card)["library_name"] == "transformers"
    assert "AutoModelForCausalLM.from_pretrained" in card and "## Serving" in card


def test_an_unreadable_result_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_perplexity(tmp_path / "eval")
    (tmp_path / "eval" / "recall.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        card = card_of(make_source(tmp_path))
    assert "| 0 to 512 | 600 | 54.60 |" in card and "recall" not in card
    assert f"model card: {tmp_path / 'eval' / 'recall.json'}: left out, it is not readable" in caplog.text


def test_a_result_of_an_earlier_checkpoint_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_perplexity(tmp_path / "eval")
    path = tmp_path / "eval" / "perplexity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 3, "model_sha256": "0" * 64}))
    checkpoint = tmp_path / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        card = card_of(make_source(tmp_path))
    assert "| 0 to 512 |" not in card
    assert f"left out: {tmp_path}: perplexity.json is of step 3, and the model is now at step 7" in caplog.text


def test_a_template_whose_value_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'settings_file' is undefined"):
        render("serve.sh.j2", server="vllm", start_file="serve.sh")
