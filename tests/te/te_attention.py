"""What our attention asks of Transformer Engine: every call against its signature, with kernels in plain torch."""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te_pytorch
from torch.nn.functional import scaled_dot_product_attention
from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from nemo_prolong.config.schema import ParallelismConfig
from nemo_prolong.engine.training.packed_step import packed_seq_params
from nemo_prolong.ops.attention import document_attention
from nemo_prolong.ops.context_parallel import DocumentPartition, with_empty_documents
from tests.support.te_layouts import TINY, build, enter, te

HEADS, KEY_HEADS, CHANNELS = 2, 1, 128
EQUAL, MIXED = [256, 256], [200, 300, 12]


class Kernels:
    """Stands for Transformer Engine's attention: keeps what it was asked, and computes what its documentation says."""

    def __init__(self) -> None:
        self.signature = inspect.signature(te_pytorch.DotProductAttention.forward)
        self.calls: list[dict[str, Any]] = []

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return attention in the layout that was asked for."""
        asked = dict(self.signature.bind(*args, **kwargs).arguments)
        asked["fp8"] = FP8GlobalStateManager.is_fp8_enabled()
        self.calls.append(asked)
        query, key, value = asked["query_layer"], asked["key_layer"], asked["value_layer"]
        if asked["qkv_format"] == "thd":
            assert asked["attn_mask_type"] == "padding_causal" and asked["cu_seqlens_q"].dtype == torch.int32
            return document_attention(query, key, value, asked["cu_seqlens_q"]).flatten(1)
        assert asked["qkv_format"] == "bshd" and asked["attn_mask_type"] == "causal"
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).flatten(2)


@pytest.fixture
def kernels(monkeypatch):
    """Transformer Engine's attention in plain torch."""
    stand_in = Kernels()
    monkeypatch.setattr(
        te_pytorch.DotProductAttention, "forward", lambda *args, **kwargs: stand_in.run(*args, **kwargs)
    )
    return stand_in


def attention_of(precision, layout: ParallelismConfig | None = None) -> torch.nn.Module:
    """Return the core attention of the first layer."""
    layout = layout or ParallelismConfig()
    enter(layout, 0, layout.model_parallel_size)
    return build(TINY, 1024, layout, precision).decoder.layers[0].self_attention.core_attention


def row_with_empty_documents(lengths: list[int]) -> tuple[list[torch.Tensor], torch.Tensor, Any]:
    """Return what ``row_of`` does, with the boundaries that the data step of this backend gives."""
    inputs, bounds, params = row_of(lengths)
    params.cu_seqlens = torch.from_numpy(with_empty_documents(bounds.numpy()))
    return inputs, bounds, params


def row_of(lengths: list[int]) -> tuple[list[torch.Tensor], torch.Tensor, Any]:
    """Return queries, keys, values and boundaries of a row, and what the model passes with them."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = int(bounds[-1])
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(total, HEADS + 2 * KEY_HEADS, CHANNELS, generator=generator)
    inputs = [part for part in mixed.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)]
    equal = len(lengths) if len(set(lengths)) == 1 else None
    # The model hides the boundaries from what comes before the attention.
    params = packed_seq_params(bounds, 512, equal_documents=equal)
    params.cu_seqlens_q = params.cu_seqlens_kv = None
    return inputs, bounds, params


def run(attention: torch.nn.Module, lengths: list[int], fp8: bool) -> None:
    """Call the attention as Megatron's layer does, and compare with attention inside documents."""
    inputs, bounds, params = row_of(lengths)
    recipe = DelayedScaling(fp8_dpa=True)
    with te_pytorch.autocast(enabled=fp8, recipe=recipe):
        output = attention(*inputs, None, attn_mask_type=None, attention_bias=None, packed_seq_params=params)
        assert FP8GlobalStateManager.is_fp8_enabled() is fp8
    torch.testing.assert_close(output, document_attention(*inputs, bounds).flatten(1))


def test_a_packed_row_is_one_list_of_boundaries(kernels):
    run(attention_of(te()), MIXED, fp8=False)
    (call,) = kernels.calls
    assert call["cu_seqlens_q"] is call["cu_seqlens_kv"] and call["cu_seqlens_q"].tolist() == [0, 200, 500, 512]
    assert call["cu_seqlens_q_padded"] is call["cu_seqlens_kv_padded"] is None
    assert call["max_seqlen_q"] == call["max_seqlen_kv"] == 512 and type(call["max_seqlen_q"]) is int
    assert "pad_between_seqs" not in call and call["attention_mask"] is None


@pytest.mark.parametrize(
    "precision", [te("fp8", "delayed"), te("fp8"), te("fp8", "blockwise")], ids=lambda p: p.fp8_recipe
)
def test_under_fp8_the_attention_of_every_row_stays_outside(kernels, precision):
    attention = attention_of(precision)
    for lengths in (EQUAL, MIXED):
        run(attention, lengths, fp8=True)
    assert [(call["qkv_format"], call["fp8"]) for call in kernels.calls] == [("thd", False)] * 2
    assert attention.fp8_attention is None


def test_fp8_attention_batches_rows_of_equal_documents_only(kernels):
    attention = attention_of(te("fp8_attention", "delayed"))
    for lengths in (EQUAL, MIXED, EQUAL, [300, 300], [512]):
        run(attention, lengths, fp8=True)
    asked = [(call["qkv_format"], call["fp8"], call["self"] is attention.fp8_attention) for call in kernels.calls]
    batch, packed = ("bshd", True, True), ("thd", False, False)
    assert asked == [batch, packed, batch, packed, batch]
    assert kernels.calls[0]["query_layer"].shape == (2, 256, HEADS, CHANNELS)
    assert all(call["max_seqlen_q"] is None for call in kernels.calls if call["qkv_format"] == "bshd")


def test_neither_attention_has_an_entry_in_a_state_dict():
    attention = attention_of(te("fp8_attention", "delayed"))
    assert list(attention.state_dict()) == [] and attention.sharded_state_dict() == {}


def test_megatron_builds_the_recipe_of_the_configuration():
    from megatron.core.fp8_utils import get_fp8_recipe

    attention_of(te())
    for precision, name, in_attention in [
        (te("fp8", "tensorwise"), "Float8CurrentScaling", False),
        (te("fp8", "delayed"), "TEDelayedScaling", False),
        (te("fp8", "blockwise"), "Float8BlockScaling", False),
        (te("fp8_attention", "delayed"), "TEDelayedScaling", True),
    ]:
        recipe = get_fp8_recipe(attention_of(precision).config)
        assert (type(recipe).__name__, recipe.fp8_dpa, recipe.fp8_mha) == (name, in_attention, False)
    assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.reduce_amax) == (1024, "max", True)


def test_empty_documents_reach_the_attention_and_change_nothing(kernels):
    inputs, bounds, params = row_with_empty_documents(MIXED)
    attention = attention_of(te())
    output = attention(*inputs, None, attn_mask_type=None, attention_bias=None, packed_seq_params=params)
    assert torch.equal(output, document_attention(*inputs, bounds).flatten(1))
    (call,) = kernels.calls
    assert call["cu_seqlens_q"].tolist() == [0, 200, 500, *[512] * 30]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_partition_of_few_shapes_is_the_one_of_transformer_engine(size):
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    bounds = torch.tensor([0, 1, 700, 703, 703, 1500]).to(torch.int32)
    for rank in range(size):
        ours = DocumentPartition.of_row(bounds, size, rank, row_tokens=1500)
        assert len(ours.cu_seqlens) == 33
        enter(ParallelismConfig(context_parallel_size=size), rank, size)
        padded = torch.arange(ours.row_length)
        theirs, *_ = context_parallel.get_batch_on_this_cp_rank(ours.cu_seqlens, padded, padded, padded)
        assert theirs.tolist() == ours.padded_of_rank_major[rank * ours.shard_length :][: ours.shard_length].tolist()


@pytest.mark.parametrize(("kernels_asked", "variables"), [("auto", "110"), ("cudnn", "010"), ("flash", "100")])
def test_transformer_engine_is_told_which_kernels_it_may_take(kernels_asked, variables):
    for precision in (te(), te().model_copy(update={"attention": kernels_asked})):
        # The second model of a process may be told otherwise.
        attention_of(precision)
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    assert "".join(os.environ[name] for name in names) == variables


@pytest.mark.parametrize("size", [2, 4, 8])
def test_our_partition_is_the_one_of_transformer_engine(monkeypatch, size):
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    bounds = torch.tensor([0, 1, 700, 703, 703, 1500]).to(torch.int32)
    for rank in range(size):
        ours = DocumentPartition.of_row(bounds, size, rank)
        enter(ParallelismConfig(context_parallel_size=size), rank, size)
        padded = torch.arange(ours.row_length)
        theirs, *_ = context_parallel.get_batch_on_this_cp_rank(ours.cu_seqlens, padded, padded, padded)
        assert theirs.tolist() == ours.padded_of_rank_major[rank * ours.shard_length :][: ours.shard_length].tolist()
