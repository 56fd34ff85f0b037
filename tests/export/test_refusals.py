"""An export that does not equal its model, or cannot be made, leaves one message and no directory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.errors import CheckpointError, DataError, ExportError
from nemo_prolong.export import assemble, hf_config, logits, run, source, verify, writer
from nemo_prolong.export.hf_config import load_tokenizer
from nemo_prolong.export.serving.calibration import calibration_documents
from nemo_prolong.export.source import ExportSource, open_source
from nemo_prolong.records.export_manifest import GreedyRecord, LogitsRecord
from nemo_prolong.records.row_origin import RowOrigin
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.weights import names as hf_names
from tests.support.export_tools import Workspace, export_config

FP32 = torch.float32


@pytest.fixture
def refused(workspace: Workspace, tmp_path: Path) -> Callable[..., str]:
    """Export ``child``, expect a refusal that leaves nothing, and return its message."""

    def attempt(run_dir: Path = workspace.child, **changes: Any) -> str:
        with pytest.raises(ExportError) as refusal:
            run.export(export_config(run_dir, tmp_path / "out" / "hf", **changes))
        assert not list((tmp_path / "out").glob("*")), "something was left behind"
        assert refusal.value.exit_code == 5
        return str(refusal.value)

    return attempt


def after_writing(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]) -> None:
    """Let ``spoil`` change the files between writing and verification."""
    write_weights = assemble.write_weights

    def write_and_spoil(exported: ExportSource, directory: Path, *args: Any) -> Any:
        written = write_weights(exported, directory, *args)
        spoil(directory)
        return written

    monkeypatch.setattr(assemble, "write_weights", write_and_spoil)


def edit_json(path: Path, *keys: str, value: Any) -> None:
    """Set one entry of a JSON file."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def test_a_wrong_value_in_a_configuration_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    after_writing(monkeypatch, lambda directory: edit_json(directory / "config.json", "rope_theta", value=10000.0))
    assert refused() == (
        "config.json rope_theta=10000.0: the export does not equal the model: the checkpoint and its manifest say "
        "80000.0. Nothing was written. Run the export again; if it fails again, please report it with export.log."
    )


def test_a_flipped_bit_in_a_shard_is_refused(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    def spoil(directory: Path) -> None:
        path = sorted(directory.glob("*.safetensors"))[2]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    after_writing(monkeypatch, spoil)
    assert ": the export does not equal the model: 1 values differ from decoder.layers." in refused()


@pytest.fixture
def spoiled(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may change."""
    return shutil.copytree(exported, tmp_path / "spoiled")


def verify_logits(workspace: Workspace, directory: Path) -> LogitsRecord:
    child = open_source(str(workspace.child))
    return logits.verify_logits(child, load_tokenizer(child.tokenizer), directory, FP32)


def set_rope_base(directory: Path, base: float) -> None:
    edit_json(directory / "config.json", "rope_theta", value=base)
    edit_json(directory / "config.json", "rope_parameters", "rope_theta", value=base)


def test_an_unspoiled_copy_passes(workspace: Workspace, spoiled: Path) -> None:
    assert verify_logits(workspace, spoiled).max_logit_difference <= 1e-4


def test_the_frequencies_see_a_rope_base_off_by_0_01_percent(workspace: Workspace, spoiled: Path) -> None:
    set_rope_base(spoiled, 80008.0)
    with pytest.raises(ExportError, match=r"config\.json rope_theta: .* rotates by .* per position"):
        verify_logits(workspace, spoiled)


def test_the_logits_alone_refuse_a_wrong_rope_base(
    monkeypatch: pytest.MonkeyPatch, workspace: Workspace, spoiled: Path
) -> None:
    monkeypatch.setattr(logits, "_compare_frequencies", lambda found, expected: None)
    set_rope_base(spoiled, 10000.0)
    with pytest.raises(ExportError, match="logits of transformers and Megatron differ by up to"):
        verify_logits(workspace, spoiled)


def test_spread_positions_see_what_short_prompts_do_not(
    monkeypatch: pytest.MonkeyPatch, workspace: Workspace, spoiled: Path
) -> None:
    monkeypatch.setattr(logits, "_compare_frequencies", lambda found, expected: None)
    monkeypatch.setattr(logits, "MAX_LOGIT_DIFFERENCE", 1e9)
    monkeypatch.setattr(logits, "MIN_SHARPENED_AGREEMENT", 0.0)
    set_rope_base(spoiled, 80001.0)
    *short, spread = verify_logits(workspace, spoiled).prompts
    assert max(prompt.max_logit_difference for prompt in short) < 1e-2
    assert spread.max_logit_difference > 10 * max(prompt.max_logit_difference for prompt in short)


def test_sharpened_attention_sees_a_rope_base_off_by_0_001_percent(
    monkeypatch: pytest.MonkeyPatch, workspace: Workspace, spoiled: Path
) -> None:
    monkeypatch.setattr(logits, "_compare_frequencies", lambda found, expected: None)
    monkeypatch.setattr(logits, "MAX_LOGIT_DIFFERENCE", 1e9)
    assert verify_logits(workspace, spoiled).sharpened.argmax_equal_share == 1.0
    set_rope_base(spoiled, 80001.0)
    with pytest.raises(ExportError, match=r"with sharpened attention .* choose the same token at [789]\d\.\d% of the"):
        verify_logits(workspace, spoiled)


def test_a_mapping_wrong_both_ways_is_refused_by_the_logits(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def swap(rule: hf_names.TensorRule) -> hf_names.TensorRule:
        if not rule.megatron.endswith("linear_fc1.weight"):
            return rule
        return dataclasses.replace(rule, hugging_face=rule.hugging_face[::-1])

    monkeypatch.setattr(hf_names, "_LAYER", tuple(map(swap, hf_names._LAYER)))
    assert "logits of transformers and Megatron differ by up to" in refused()


@pytest.mark.parametrize("lost", ["<|end_of_text|>", "<|eot_id|>"])
def test_a_stop_token_that_does_not_stop_is_refused(workspace: Workspace, spoiled: Path, lost: str) -> None:
    lost_id = load_tokenizer(spoiled).convert_tokens_to_ids(lost)
    stop_ids = json.loads((spoiled / "generation_config.json").read_text())["eos_token_id"]
    kept = [stop_id for stop_id in stop_ids if stop_id != lost_id]
    assert len(kept) == len(stop_ids) - 1 == 1
    edit_json(spoiled / "generation_config.json", "eos_token_id", value=kept)
    message = f"generation_config.json eos_token_id: .* generation goes on after token {lost_id}"
    with pytest.raises(ExportError, match=message):
        verify_logits(workspace, spoiled)


def generated(*tokens: int) -> logits.TransformersResult:
    """Return what transformers generated after a prompt of one token."""
    nothing = torch.empty(0)
    return logits.TransformersResult([], 1, torch.tensor(tokens), sharpened=nothing, inv_freq=nothing, stop_ids=[])


def test_a_wrong_greedy_token_is_refused() -> None:
    result = generated(0, 1, 1)
    megatron = torch.tensor([[0.0, 5.0], [5.0, 0.0]])
    with pytest.raises(ExportError, match="token 2 that transformers generates is not Megatron's choice"):
        logits._compare_greedy(result, megatron)


def test_a_tie_between_two_greedy_tokens_is_no_difference() -> None:
    result = generated(0, 1)
    assert logits._compare_greedy(result, torch.tensor([[1.0 + 1e-6, 1.0]])) == GreedyRecord(tokens=1, equal=0)


def test_nan_in_the_logits_is_refused() -> None:
    prompt = logits.Prompt("one", torch.tensor([0]))
    with pytest.raises(ExportError, match="NaN or infinity"):
        logits._compare(prompt, torch.tensor([[float("nan")]]), torch.tensor([[float("nan")]]))


def test_a_weight_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    read_rows = ExportSource.read_rows

    def read_with_nan(self: ExportSource, piece: hf_names.Piece, start: int, rows: torch.Tensor) -> None:
        read_rows(self, piece, start, rows)
        if piece.rule.megatron.endswith("linear_fc2.weight"):
            rows[3, 4] = float("nan")

    monkeypatch.setattr(ExportSource, "read_rows", read_with_nan)
    assert ".mlp.down_proj.weight of step_00000004 has NaN or infinity in it" in refused()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_end_between_two_shards_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, workspace: Workspace, tmp_path: Path, error: BaseException
) -> None:
    write_safetensors = writer.write_safetensors
    third = sorted(writer.plan_shards(open_source(str(workspace.child)).model, FP32, 100_000))[2]
    written = []

    def fail_at_the_third(path: Path, *args: Any) -> Any:
        if path.name == third:
            raise error
        written.append(write_safetensors(path, *args))
        return written[-1]

    monkeypatch.setattr(writer, "write_safetensors", fail_at_the_third)
    with pytest.raises(type(error)):
        run.export(export_config(workspace.child, tmp_path / "out" / "hf"))
    assert written
    assert not list((tmp_path / "out").iterdir())


def test_a_manifest_with_another_rope_base_is_refused(
    workspace: Workspace, tmp_path: Path, refused: Callable[..., str]
) -> None:
    copy = shutil.copytree(workspace.child, tmp_path / "child")
    edit_json(copy / "stage.json", "rotary_base", value=10000.0)
    message = refused(copy)
    assert "model.json of step_00000004 and stage.json disagree in rotary_base (80000.0 and 10000.0)" in message


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are opened without a look at their hashes."""
    monkeypatch.setattr(source, "newest_checkpoint", lambda run: sorted((run / "checkpoints").glob("step_*"))[-1])


def test_a_checkpoint_of_another_shape_is_refused(
    workspace: Workspace, tmp_path: Path, refused: Callable[..., str], unverified: None
) -> None:
    copy = shutil.copytree(workspace.child, tmp_path / "child")
    for path, prefix in ((copy / "stage.json", ()), (copy / "checkpoints/step_00000004/model.json", ())):
        edit_json(path, *prefix, "model", "num_query_groups", value=4)
    assert "decoder.layers.self_attention.linear_qkv.weight has shape [2, 128, 64]" in refused(copy)


def test_a_missing_run_or_checkpoint_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run=nowhere: the run directory does not exist"):
        run.export(export_config(Path("nowhere"), tmp_path / "hf"))
    copy = shutil.copytree(workspace.base, tmp_path / "base")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="the run has no complete checkpoint"):
        run.export(export_config(copy, tmp_path / "hf"))
    (copy / "stage.json").unlink()
    with pytest.raises(CheckpointError, match=r"a run directory has a stage\.json"):
        run.export(export_config(copy, tmp_path / "hf"))


def test_a_checkpoint_with_a_file_missing_is_refused(workspace: Workspace, tmp_path: Path, unverified: None) -> None:
    copy = shutil.copytree(workspace.base, tmp_path / "base")
    for path in (copy / "checkpoints").rglob("*.distcp"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"does not hold all of embedding\.word_embeddings\.weight"):
        run.export(export_config(copy, tmp_path / "hf"))


def test_a_broken_tokenizer_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(assemble, "load_tokenizer", lambda path: hf_config.load_tokenizer(tmp_path / "tokenizer"))
    message = refused()
    assert message.startswith(f"tokenizer={tmp_path / 'tokenizer'}: transformers cannot load the tokenizer")


def test_calibration_on_rows_of_another_tokenizer_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    root = Path(shutil.copytree(workspace.root / "data", tmp_path / "data"))
    manifest = StageManifest.read(workspace.child)
    moved = manifest.model_copy(update={"data": manifest.data.model_copy(update={"root": str(root)})})
    RowOrigin(tokenizer_sha256=TextEncoder(root / "tokenizer").sha256).write(root / "rows")
    assert calibration_documents(moved, 2, 64)
    RowOrigin(tokenizer="models/other", tokenizer_sha256="0" * 64).write(root / "rows")
    with pytest.raises(DataError, match=r"data\.mixture path=rows: the rows were made with models/other"):
        calibration_documents(moved, 2, 64)


def test_a_tokenizer_of_transformers_5_is_exported_for_both(workspace: Workspace, tmp_path: Path) -> None:
    tokenizer = shutil.copytree(workspace.root / "data" / "tokenizer", tmp_path / "tokenizer")
    edit_json(tokenizer / "tokenizer_config.json", "tokenizer_class", value="TokenizersBackend")
    edit_json(tokenizer / "tokenizer_config.json", "extra_special_tokens", value=["<|eot_id|>"])
    edit_json(tokenizer / "special_tokens_map.json", "extra_special_tokens", value=["<|eot_id|>"])
    newer = dataclasses.replace(open_source(str(workspace.child)), tokenizer=tokenizer)
    loaded, output = load_tokenizer(tokenizer), tmp_path / "hf"
    output.mkdir()
    hf_config.write_configuration(newer, loaded, output, FP32)
    (output / "model.safetensors.index.json").write_text("{}")
    verify.verify_configuration(newer, loaded, output, FP32)
    exported = AutoTokenizer.from_pretrained(output)
    assert exported.additional_special_tokens == ["<|eot_id|>"]
    assert exported.get_vocab() == loaded.get_vocab() and exported.chat_template == loaded.chat_template


def test_a_template_that_refuses_the_probe_is_compared_by_that(workspace: Workspace, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(workspace.root / "data" / "tokenizer")
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0]['role']) }}"
    assert verify._chat_ids(tokenizer) == "TemplateError: no user"
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    assert str(verify._chat_ids(tokenizer)).startswith("ValueError: ")


def test_a_tokenizer_without_a_name_for_the_end_is_refused(workspace: Workspace) -> None:
    tokenizer = load_tokenizer(workspace.root / "data" / "tokenizer")
    tokenizer.eos_token = None
    with pytest.raises(
        ExportError, match=r"it has no eos_token\. Set eos_token in .*tokenizer_config\.json, each to a"
    ):
        hf_config.special_tokens(open_source(str(workspace.child)), tokenizer)


def test_a_tokenizer_with_too_many_tokens_is_refused(workspace: Workspace) -> None:
    source = open_source(str(workspace.base))
    smaller = dataclasses.replace(source, model=source.model.model_copy(update={"vocab_size": 511}))
    with pytest.raises(ExportError, match="it has 512 tokens, the model's vocabulary 511"):
        hf_config.special_tokens(smaller, load_tokenizer(source.tokenizer))
