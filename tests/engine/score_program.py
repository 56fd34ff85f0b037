"""Score the documents of a run's first global batch one by one; ``score_program.py WORKSPACE RUN OUTPUT``."""

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch

from nemo_prolong.config.schema import MixtureEntry
from nemo_prolong.data.dataset import PackedRowDataset
from nemo_prolong.engine import open_megatron_scorer


def main() -> None:
    """Write the sums of the losses of every document scored alone: of all, by position and by domain."""
    workspace, run, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    scorer = open_megatron_scorer(workspace / run)
    rows = PackedRowDataset(workspace / "data", [MixtureEntry(path="rows", proportion=1.0)], 64, 42, num_rows=4)
    loss_sum, target_tokens, largest_difference = 0.0, 0, 0.0
    by_position, by_domain = [0.0] * 64, Counter[str]()
    for row in (rows[index] for index in range(4)):
        boundaries = row.cu_seqlens.tolist()
        for start, end in pairwise(boundaries):
            if end - start < 2 or start >= row.real_tokens:
                continue
            tokens = row.tokens[start:end]
            losses = scorer.token_losses(tokens)
            by_logits = torch.nn.functional.cross_entropy(scorer.logits(tokens)[:-1], tokens[1:], reduction="none")
            largest_difference = max(largest_difference, float((losses - by_logits).abs().max()))
            loss_sum += float(losses.double().sum())
            target_tokens += end - start - 1
            by_domain[row.domain] += float(losses.double().sum())
            for position, loss in enumerate(losses.tolist(), start=1):
                by_position[position] += loss
    output.write_text(
        json.dumps(
            {
                "loss_sum": loss_sum,
                "target_tokens": target_tokens,
                "loss_by_position": by_position,
                "loss_by_domain": by_domain,
                "losses_agree_with_logits_within": largest_difference,
            }
        )
    )


if __name__ == "__main__":
    main()
