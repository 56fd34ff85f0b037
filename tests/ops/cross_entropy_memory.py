"""Print the peak of memory that the loss head adds, in bytes, for each number of tokens in ascending order.

``cross_entropy_memory.py VOCABULARY TOKENS...``
"""

import sys
from pathlib import Path

import torch

from nemo_prolong.ops.linear_cross_entropy import linear_cross_entropy

HIDDEN_SIZE, CHUNK_TOKENS = 4, 256


def memory(field: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def head(tokens: int, vocab_size: int) -> None:
    """Run the loss head forward and backward once."""
    hidden = torch.ones(tokens, HIDDEN_SIZE, requires_grad=True)
    weight = torch.ones(vocab_size, HIDDEN_SIZE, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, labels, torch.ones(tokens), chunk_tokens=CHUNK_TOKENS).loss_sum.backward()


def main() -> None:
    """Warm up on a small head, then measure."""
    head(2, 16)
    before = memory("VmRSS")
    for tokens in sys.argv[2:]:
        head(int(tokens), int(sys.argv[1]))
        print(memory("VmHWM") - before)


if __name__ == "__main__":
    main()
