"""The per-document zigzag, against its definition written out token by token, and attention over all shards at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.ops.attention import attention_backward, document_attention, empty_partial, merge_attention
from nemo_prolong.ops.context_parallel import DocumentPartition
from tests.support.attention_tools import QUERY_HEADS, boundaries, random_inputs, random_weights

SIZES = st.sampled_from([1, 2, 3, 4, 8])
LENGTHS = st.one_of(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.lists(st.sampled_from([1, 2, 16]), min_size=1, max_size=8),
    st.lists(st.integers(100, 200), min_size=1, max_size=2),
).filter(any)


def partitions(lengths: list[int], size: int, row_multiple: int | None = None) -> list[DocumentPartition]:
    return [DocumentPartition.of_row(boundaries(lengths), size, rank, row_multiple) for rank in range(size)]


def zigzag(lengths: list[int], size: int, rank: int) -> list[tuple[int, int]]:
    """Return (document, offset in the padded document) of the tokens of a rank, by definition."""
    tokens = []
    for document, length in enumerate(lengths):
        chunk = -(-length // (2 * size))
        for number in (rank, 2 * size - 1 - rank):
            tokens += [(document, offset) for offset in range(number * chunk, (number + 1) * chunk)]
    return tokens


@settings(deadline=None)
@given(lengths=LENGTHS, size=SIZES)
def test_a_shard_is_two_mirrored_chunks_of_every_document(lengths: list[int], size: int) -> None:
    row = torch.arange(1, sum(lengths) + 1)
    starts = boundaries(lengths).tolist()
    for rank, partition in enumerate(partitions(lengths, size)):
        expected = [
            starts[document] + offset + 1 if offset < lengths[document] else 0
            for document, offset in zigzag(lengths, size, rank)
        ]
        assert partition.split(row).tolist() == expected


@settings(deadline=None)
@given(lengths=LENGTHS, size=SIZES, blocks=st.integers(1, 20))
def test_joined_shards_are_the_row_each_token_once(lengths: list[int], size: int, blocks: int) -> None:
    row = torch.arange(1, sum(lengths) + 1)
    parts = partitions(lengths, size, row_multiple=2 * size * blocks)
    shards = torch.stack([partition.split(row) for partition in parts])
    for partition in parts:
        assert torch.equal(partition.join(shards), row)
    counts = shards.flatten().bincount(minlength=len(row) + 1)
    assert (counts[1:] == 1).all(), "every token of the row is on exactly one rank"
    assert counts[0] == parts[0].row_length - len(row), "all else is padding"
    assert parts[0].row_length % (2 * size * blocks) == 0


@settings(deadline=None)
@given(lengths=LENGTHS, size=SIZES)
def test_rank_order_and_the_padded_row_are_permutations(lengths: list[int], size: int) -> None:
    parts = partitions(lengths, size)
    padded = parts[0].padded_boundaries
    tokens = [zigzag(lengths, size, rank) for rank in range(size)]
    place = [int(padded[document]) + offset for shard in tokens for document, offset in shard]
    for partition in parts:
        assert partition.padded_of_rank_major.tolist() == place
        restored = partition.padded_of_rank_major[partition.rank_major_of_padded]
        assert restored.tolist() == list(range(partition.row_length))


@settings(deadline=None)
@given(lengths=LENGTHS, size=SIZES)
def test_causal_attention_costs_every_rank_the_same(lengths: list[int], size: int) -> None:
    everywhere = [sum(offset + 1 for _, offset in zigzag(lengths, size, rank)) for rank in range(size)]
    for partition in partitions(lengths, size):
        by_ring = [partition.block_of_rank(rank) for rank in range(size)]
        for blocks in (by_ring, partition.blocks_of_padded_row):
            scores = 0
            for block in blocks:
                for queries, keys in zip(block.query_lengths.tolist(), block.key_lengths.tolist(), strict=True):
                    scores += queries * (queries + 1) // 2 if block.causal else queries * keys
            assert [scores] * size == everywhere, "scores that are computed, by rank and by exchange"
    # Padding is what they are equal up to: at most two chunks of it on a rank, each token seeing its document.
    real = [
        sum(offset + 1 for document, offset in zigzag(lengths, size, rank) if offset < lengths[document])
        for rank in range(size)
    ]
    padded = [-(-length // (2 * size)) * 2 * size for length in lengths]
    bound = sum(min(p - length, p // size) * p for p, length in zip(padded, lengths, strict=True))
    assert max(real) - min(real) <= bound


@settings(deadline=None, max_examples=20)
@given(lengths=LENGTHS, size=st.sampled_from([2, 3, 4]), key_heads=st.sampled_from([1, 2, QUERY_HEADS]))
def test_blocks_of_an_exchange_add_up_to_attention(lengths: list[int], size: int, key_heads: int) -> None:
    parts = partitions(lengths, size)
    tokens = sum(lengths)
    inputs, weights = random_inputs(tokens, key_heads), random_weights(tokens)
    output = document_attention(*inputs, boundaries(lengths))
    expected = [output, *torch.autograd.grad(output, inputs, weights)]
    rows = [x.detach() for x in (*inputs, weights)]
    shards = [[part.split(x.movedim(0, -1)).movedim(-1, 0) for x in rows] for part in parts]
    padded_keys = [torch.cat([shard[i] for shard in shards])[parts[0].rank_major_of_padded] for i in (1, 2)]
    by_ring = [[(shards[rank][1:3], part.block_of_rank(rank)) for rank in range(size)] for part in parts]
    by_gathering = [[(padded_keys, block) for block in part.blocks_of_padded_row] for part in parts]
    for blocks in (by_ring, by_gathering):
        results = [attend_blocks(shard, steps) for shard, steps in zip(shards, blocks, strict=True)]
        for number, wanted in enumerate(expected[:2]):
            got = parts[0].join(torch.stack([result[number] for result in results]))
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for number in (0, 1):
        # What the all-gather's ranks add to the gradient of the padded row.
        got = sum(result[2][number] for result in results)[parts[0].padded_of_rank_major]
        joined = parts[0].join(got.unflatten(0, (size, -1)))
        torch.testing.assert_close(joined, expected[2 + number], rtol=1e-12, atol=1e-12)


def attend_blocks(
    shard: list[torch.Tensor], steps: list[tuple[list[torch.Tensor], object]]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return output, gradient of the query, and the summed gradients of keys and values, of one rank."""
    query, _, _, weight = shard
    output, lse = empty_partial(query)
    for keys, block in steps:
        merge_attention(output, lse, query, *keys, block)
    grad_query = torch.zeros_like(query)
    grad_keys = [torch.zeros_like(x) for x in steps[0][0]]
    for keys, block in steps:
        attention_backward((grad_query, *grad_keys), weight, query, *keys, output, lse, block)
    return output, grad_query, grad_keys


def test_a_row_is_split_with_its_mask_and_positions() -> None:
    lengths = [3, 6]
    first, second = partitions(lengths, 2)
    tokens, loss_mask = torch.arange(10, 19)[None], torch.ones(1, 9)
    assert first.split(tokens).tolist() == [[10, 0, 13, 14, 0, 0]]
    assert second.split(tokens).tolist() == [[11, 12, 15, 16, 17, 18]]
    assert first.split(loss_mask).tolist() == [[1, 0, 1, 1, 0, 0]]
    assert first.split(loss_mask).dtype == torch.float32 and first.split(tokens).dtype == torch.int64
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    assert first.split_positions(positions).tolist() == [[0, 3, 0, 1, 6, 7]], "positions of padding run on"
    assert second.split_positions(positions).tolist() == [[1, 2, 2, 3, 4, 5]]
    assert first.split_positions(positions).dtype == torch.int64
    # Those of tokens are as they are given, the first one's too.
    assert first.split_positions(positions + 100).tolist() == [[100, 3, 100, 101, 6, 7]]


def test_boundaries_are_those_of_the_padded_row() -> None:
    partition = DocumentPartition.of_row(boundaries([1, 0, 9, 4]), 2, 1, row_multiple=32)
    assert partition.cu_seqlens.tolist() == [0, 4, 4, 16, 20, 32], "the last document is padding alone"
    assert partition.cu_seqlens.dtype == torch.int32
    assert partition.max_seqlen == 12 and type(partition.max_seqlen) is int
    assert (partition.row_length, partition.shard_length) == (32, 16)
    assert DocumentPartition.of_row(boundaries([0, 0]), 2, 1).max_seqlen == 0
    assert DocumentPartition.of_row(boundaries([]), 2, 1).max_seqlen == 0


def test_ranks_can_be_without_any_token_of_the_row() -> None:
    shards = [part.split(torch.tensor([7])).tolist() for part in partitions([1], 4)]
    assert shards == [[7, 0], [0, 0], [0, 0], [0, 0]]


def test_one_rank_keeps_its_row_up_to_padding_to_even_lengths() -> None:
    (partition,) = partitions([3, 2], 1)
    assert partition.split(torch.arange(1, 6)).tolist() == [1, 2, 3, 0, 4, 5]


def test_a_row_multiple_that_cannot_be_cut_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="cannot be cut into 8 chunks"):
        DocumentPartition.of_row(boundaries([5]), 4, 0, row_multiple=12)
