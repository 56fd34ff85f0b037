"""Any rows and columns of a Megatron tensor out of the tensors of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.weights import hf_reader
from nemo_prolong.weights.hf_reader import HuggingFaceReader
from tests.support.tiny import tiny_config

QKV = "decoder.layers.self_attention.linear_qkv.weight"
EMBEDDING, NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"


@pytest.fixture
def model() -> ModelConfig:
    """4 query heads in 2 groups, of 16 channels; 64 channels, 2 layers, 512 token ids."""
    return tiny_config(Path("data"), Path("runs")).model


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    sizes = {
        "model.embed_tokens.weight": (500, 64),
        "model.norm.weight": (64,),
        **{
            f"model.layers.{layer}.self_attn.{part}_proj.weight": (rows, 64)
            for layer in range(2)
            for part, rows in (("q", 64), ("k", 32), ("v", 32))
        },
    }
    return {name: torch.randn(size) for name, size in sizes.items()}


@pytest.fixture
def reader(tensors: dict[str, torch.Tensor], model: ModelConfig, tmp_path: Path) -> HuggingFaceReader:
    """A reader of two files."""
    names = sorted(tensors)
    files = {name: tmp_path / ("first" if name < names[4] else "second") for name in names}
    for path in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == path}, path)
    directory: Any = SimpleNamespace(
        file_of=files.__getitem__,
        stored_name=lambda name: name,
        model_of=lambda model: model.model_copy(update={"vocab_size": 500}),
    )
    return HuggingFaceReader(directory, model)


def fused(tensors: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """Return queries, keys and values group by group, as Megatron has them."""
    query, key, value = (tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
    groups = [(query[g * 32 : g * 32 + 32], key[g * 16 : g * 16 + 16], value[g * 16 : g * 16 + 16]) for g in range(2)]
    return torch.cat([part for group in groups for part in group])


@pytest.mark.parametrize(("first", "rows"), [(0, 128), (0, 5), (30, 40), (63, 2), (100, 28)])
def test_rows_of_a_fused_tensor_are_gathered(
    first: int, rows: int, reader: HuggingFaceReader, tensors: dict[str, torch.Tensor]
) -> None:
    for layer in range(2):
        found = torch.full((rows, 64), torch.nan)
        reader.fill(found, QKV, layer, first_row=first)
        assert torch.equal(found, fused(tensors, layer)[first : first + rows])


def test_columns_are_those_that_are_asked_for(reader: HuggingFaceReader, tensors: dict[str, torch.Tensor]) -> None:
    found = torch.full((128, 8), torch.nan)
    reader.fill(found, QKV, 1, first_column=24)
    assert torch.equal(found, fused(tensors, 1)[:, 24:32])


def test_a_norm_has_no_columns(reader: HuggingFaceReader, tensors: dict[str, torch.Tensor]) -> None:
    found = torch.full((10,), torch.nan)
    reader.fill(found, NORM, first_row=5)
    assert torch.equal(found, tensors["model.norm.weight"][5:15])


def test_new_rows_of_the_vocabulary_are_the_mean_and_padding_zero(
    reader: HuggingFaceReader, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_reader, "_BLOCK_ROWS", 64)
    embedding = tensors["model.embed_tokens.weight"]
    mean = embedding.double().mean(dim=0).float()
    found = torch.full((30, 64), torch.nan)
    assert reader.fill(found, EMBEDDING, first_row=490) == {}
    assert torch.equal(found[:10], embedding[490:])
    torch.testing.assert_close(found[10:22], mean.expand(12, 64), rtol=1e-6, atol=1e-7)
    assert not found[22:].any()
    columns = torch.full((4, 8), torch.nan)
    reader.fill(columns, EMBEDDING, first_row=510, first_column=24)
    torch.testing.assert_close(columns[:2], mean[24:32].expand(2, 8), rtol=1e-6, atol=1e-7)
    assert not columns[2:].any()
    beyond = torch.full((3, 64), torch.nan)
    reader.fill(beyond, EMBEDDING, first_row=600)
    assert not beyond.any()


def test_values_that_are_no_numbers_are_counted_by_tensor(
    reader: HuggingFaceReader, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    query, key = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    tensors[query][3, :2] = torch.nan
    tensors[query][40, 5] = torch.inf
    tensors[key][20, 7] = -torch.inf
    for path in (tmp_path / "first", tmp_path / "second"):
        names = [name for name in tensors if reader._directory.file_of(name) == path]
        save_file({name: tensors[name] for name in names}, path)
    assert reader.fill(torch.empty(128, 64), QKV, 0) == {query: 3, key: 1}
    assert reader.fill(torch.empty(128, 64), QKV, 1) == {}


def test_what_is_read_is_cast_to_the_destination(reader: HuggingFaceReader, tensors: dict[str, torch.Tensor]) -> None:
    found = torch.empty(500, 64, dtype=torch.bfloat16)
    reader.fill(found, EMBEDDING)
    assert torch.equal(found, tensors["model.embed_tokens.weight"].bfloat16())


def test_each_file_is_opened_once(reader: HuggingFaceReader, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    safe_open = hf_reader.safe_open

    def noting(path: Path, **settings: Any) -> Any:
        opened.append(path.name)
        return safe_open(path, **settings)

    monkeypatch.setattr(hf_reader, "safe_open", noting)
    for layer in (0, 1, 0):
        reader.fill(torch.empty(128, 64), QKV, layer)
    assert sorted(opened) == ["first", "second"]
