"""A row of equal documents as a batch, on every context-parallel rank, against attention inside documents."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nemo_prolong.ops.attention import document_attention
from nemo_prolong.ops.batch_of_documents import as_batch, runs_in_fp8
from nemo_prolong.ops.context_parallel import DocumentPartition

DOCUMENTS, LENGTH, HEADS, KEY_HEADS, CHANNELS = 3, 16, 4, 2, 8
TOKENS = DOCUMENTS * LENGTH
BOUNDARIES = torch.arange(0, TOKENS + 1, LENGTH, dtype=torch.int32)


def row(heads: int, seed: int) -> torch.Tensor:
    """Return a random row [T, heads, C] in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, heads, CHANNELS, generator=generator, dtype=torch.float64)


def shards(tensor: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Return the part [T / CP, heads, C] of every rank, by our partition."""
    partitions = [DocumentPartition.of_row(BOUNDARIES, size, rank) for rank in range(size)]
    return [partition.split(tensor.movedim(0, -1)).movedim(-1, 0).contiguous() for partition in partitions]


def whole_sequences(batches: list[torch.Tensor]) -> torch.Tensor:
    """Return the batch [B, L, heads, C] that an exchange of Transformer Engine sees in those of all ranks.

    Its rule: chunk c of a sequence is on rank min(c, 2 CP - 1 - c), in the first half of that rank's part if c < CP.
    """
    size = len(batches)
    halves = [batch.unflatten(1, (2, -1)) for batch in batches]
    chunks = [halves[min(c, 2 * size - 1 - c)][:, 0 if c < size else 1] for c in range(2 * size)]
    return torch.cat(chunks, dim=1)


def parts_of_ranks(sequences: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Return what every rank keeps of whole sequences: the inverse of ``whole_sequences``."""
    chunks = sequences.chunk(2 * size, dim=1)
    return [torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1) for rank in range(size)]


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return attention of a batch [B, L, heads, C] with no mask but the causal one."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_of_the_batch_stays_inside_documents_on_every_rank(size):
    inputs = row(HEADS, 0), row(KEY_HEADS, 1), row(KEY_HEADS, 2)
    expected = shards(document_attention(*inputs, BOUNDARIES), size)
    batches = [[as_batch(shard, DOCUMENTS) for shard in shards(tensor, size)] for tensor in inputs]
    output = causal_attention(*(whole_sequences(batch) for batch in batches))
    for rank, part in enumerate(parts_of_ranks(output, size)):
        torch.testing.assert_close(part.flatten(0, 1), expected[rank], rtol=1e-12, atol=1e-12)


def test_a_batch_is_a_view_of_values_between_queries_and_keys():
    packed = torch.randn(TOKENS, HEADS + 2 * KEY_HEADS, CHANNELS)[:, -KEY_HEADS:]
    batch = as_batch(packed, DOCUMENTS)
    assert batch.shape == (DOCUMENTS, LENGTH, KEY_HEADS, CHANNELS)
    assert batch.data_ptr() == packed.data_ptr() and batch.stride()[1:] == packed.stride()


@pytest.mark.parametrize(
    ("documents", "length", "size", "expected"),
    [
        (1, 524_288, 8, True),
        (8, 65_536, 16, True),
        (1, 128, 1, True),
        # The ring multiplies halves of a part: 128 tokens each.
        (1, 256, 1, True),
        (1, 512, 2, True),
        (1, 256, 2, False),
        (3, 640, 1, True),
        (3, 600, 1, False),
        (2, 512 * 3, 2, True),
        (2, 512 * 3 + 256, 2, False),
    ],
)
def test_the_kernel_takes_multiples_of_its_tile_on_each_rank(documents, length, size, expected):
    assert runs_in_fp8(documents, documents * length // size, size) is expected


def test_documents_of_different_lengths_never_run_in_fp8():
    assert runs_in_fp8(None, 65_536, 1) is False
