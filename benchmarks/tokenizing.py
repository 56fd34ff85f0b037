"""Text to token ids with the quicker library against the reference, ``tokenizers``, on one core of this machine.

The text is Python sources and documentation of this installation; the tokenizer is trained on it. Ids are checked to be
equal before anything is timed, and a fuzz of random Unicode is compared too. Runs are interleaved after a warm-up;
figures are medians.

    python benchmarks/tokenizing.py [--json FILE] [--tokenizer DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

# One core for both sides: preparing runs a process per core.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np

from nemo_prolong.data.miniature.corpus import read_corpus
from nemo_prolong.data.miniature.installation import Installation
from nemo_prolong.data.tokenizer import TextEncoder, train_tokenizer

REPEATS = 5
TEXT_BYTES = 8 * 2**20
VOCAB_SIZE = 32_768
FUZZ_TEXTS = 2000


def read_texts() -> dict[str, list[str]]:
    """Return texts of this installation by kind."""
    corpus = read_corpus(Installation.current(), ["code_by_repo", "reference", "docs"], TEXT_BYTES, 0.0, 0)
    return {domain: [document.text for document in documents] for domain, documents in corpus.documents.items()}


def random_texts(count: int) -> list[str]:
    """Return texts of random characters of all planes, runs of one character, and words."""
    rng = random.Random(0)  # noqa: S311 - texts are no secrets
    pools = [(32, 127), (0, 0x300), (0x400, 0x700), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]
    texts = []
    for _ in range(count):
        low, high = rng.choice(pools)
        run = chr(rng.randint(low, high)) * rng.randint(1, 60)
        letters = "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 80)))
        texts.append(letters + rng.choice([" ", "\n\n  ", "\r\n", "'s ", "<|eot_id|>"]) + run)
    return texts


def measure(domain: str, texts: list[str], encoders: dict[str, TextEncoder]) -> dict[str, object]:
    """Time both libraries on the texts and return the benchmark's record."""
    ids = {name: encoder.encode_texts(texts) for name, encoder in encoders.items()}
    for ours, reference in zip(ids["fast"], ids["tokenizers"], strict=True):
        np.testing.assert_array_equal(ours, reference)
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(REPEATS):
        for name, encoder in encoders.items():
            started = time.perf_counter()
            encoder.encode_texts(texts)
            seconds[name].append(time.perf_counter() - started)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ours, peer = (megabytes / statistics.median(seconds[name]) for name in ("fast", "tokenizers"))
    return {
        "bar": f"{domain}: {megabytes:.1f} MB, {sum(map(len, ids['fast'])):,} tokens",
        "ours": round(ours, 2),
        "peer": round(peer, 2),
        "unit": "MB/s",
        "ratio": round(ours / peer, 2),
        "bound": 2.0,
        "met": ours >= 2 * peer,
    }


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory; one of 32K tokens is trained by default")
    arguments = parser.parse_args()
    texts = read_texts()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = arguments.tokenizer or Path(directory)
        if arguments.tokenizer is None:
            train_tokenizer((text[:50_000] for kind in texts.values() for text in kind), VOCAB_SIZE, tokenizer)
        encoders = {name: TextEncoder(tokenizer, name) for name in ("fast", "tokenizers")}
        for ours, reference in zip(
            *(encoder.encode_texts(random_texts(FUZZ_TEXTS)) for encoder in encoders.values()), strict=True
        ):
            np.testing.assert_array_equal(ours, reference)
        rows = [measure(domain, documents, encoders) for domain, documents in texts.items()]
    print(f"{'':44} {'fastokens':>11} {'tokenizers':>11} {'ratio':>7}   (same ids, also of {FUZZ_TEXTS} random texts)")
    for row in rows:
        print(f"{row['bar']:44} {row['ours']:>6} MB/s {row['peer']:>6} MB/s {row['ratio']:>6}x")
    if arguments.json:
        versions = {name: metadata.version(name) for name in ("fastokens", "tokenizers")}
        versions["python"] = platform.python_version()
        machine = {"processor": platform.machine(), "threads": 1}
        arguments.json.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
