"""The streamed files, judged by the safetensors library, and the plan of shards."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.export import safetensors_file
from nemo_prolong.export.safetensors_file import TensorSpec, write_safetensors
from nemo_prolong.export.writer import all_finite, piece_bytes, plan_shards
from nemo_prolong.weights.names import pieces
from tests.support.export_tools import make_model, models

shapes = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)


@given(shapes, st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=50, deadline=None)
def test_the_safetensors_library_reads_back_what_was_streamed(
    tensor_shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    tensors = {f"tensor.{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(tensor_shapes)}
    specs = [TensorSpec(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        written = write_safetensors(path, specs, dtype, (tensor.split(2) for tensor in tensors.values()))
        loaded = load_file(path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        data = path.read_bytes()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert written.num_bytes == len(data)


def test_a_part_of_a_tensor_is_written_as_it_looks(tmp_path: Path) -> None:
    transposed = torch.arange(6.0).reshape(2, 3).T
    write_safetensors(tmp_path / "a", [TensorSpec("a", (3, 2))], torch.float32, [[transposed]])
    assert torch.equal(load_file(tmp_path / "a")["a"], transposed)


def test_the_disk_works_on_all_but_the_last_bytes_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(safetensors_file, "_WRITEBACK_BYTES", 1000)
    monkeypatch.setattr(safetensors_file, "_start_writeback", lambda file, start, count: asked.append((start, count)))
    tensor = torch.randn(1000, 3)
    write_safetensors(tmp_path / "a", [TensorSpec("a", (1000, 3))], torch.float32, [tensor.split(70)])
    ends = [start + count for start, count in asked]
    assert [start for start, _ in asked] == [0, *ends[:-1]]
    assert all(1000 <= count < 1000 + 70 * 3 * 4 for _, count in asked)
    assert 0 <= (tmp_path / "a").stat().st_size - ends[-1] < 1000


def test_every_bf16_number_is_told_from_infinity_and_nan() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    expected = torch.isfinite(every)
    assert [all_finite(number) for number in every[:, None]] == expected.tolist()
    assert all_finite(every[expected])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_fp32_number_is_finite_and_the_next_is_not(sign: int) -> None:
    largest = sign * torch.tensor([0.0, torch.finfo(torch.float32).max])
    assert all_finite(largest)
    assert not all_finite(torch.nextafter(largest, sign * torch.tensor(torch.inf)))
    assert not all_finite(torch.copysign(torch.tensor([1.0, torch.nan]), largest))


@given(models(), st.integers(1, 4000), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=100, deadline=None)
def test_every_tensor_is_in_one_shard_and_no_shard_is_too_large(
    model: ModelConfig, max_shard_bytes: int, dtype: torch.dtype
) -> None:
    shards = plan_shards(model, dtype, max_shard_bytes)
    assert [piece for shard in shards.values() for piece in shard] == list(pieces(model))
    for shard in shards.values():
        assert shard
        assert len(shard) == 1 or sum(piece_bytes(piece, dtype) for piece in shard) <= max_shard_bytes


def test_what_megatron_fuses_is_in_one_shard() -> None:
    for shard in plan_shards(make_model(), torch.float32, 1).values():
        assert len(shard) == 1
        assert {name.split(".")[-2][1:] for name in shard[0].names} >= {"_proj"} or len(shard[0].names) != 3


def test_shards_are_numbered_as_transformers_numbers_them() -> None:
    names = list(plan_shards(make_model(), torch.float32, 2**40))
    assert names == ["model-00001-of-00001.safetensors"]
    names = list(plan_shards(make_model(num_layers=1), torch.float32, 12_000))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 1
