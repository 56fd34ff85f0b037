"""A folder with documents of every local format, for the tests of the preparation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from nemo_prolong.data.mds import MdsWriter

WORDS = [
    *"window buffer token length shard order value branch naive".split(),
    *"caf\u00e9 \u6570\u636e zebra matrix signal filter".split(),
]


def prose(rng: random.Random, num_words: int) -> str:
    """Random words, ten to a line."""
    words = [rng.choice(WORDS) for _ in range(num_words)]
    return "\n".join(" ".join(words[start : start + 10]) for start in range(0, num_words, 10)) + "\n"


def write_mixed(root: Path, tokenizer_size: int) -> list[dict[str, Any]]:
    """Write the folder and return the ``sources`` that read it."""
    rng = random.Random(5)
    root.mkdir(parents=True)
    _write_jsonl(root / "books.jsonl", [{"text": prose(rng, 900 + 40 * n), "id": n} for n in range(12)])
    compressed = zstandard.compress((root / "books.jsonl").read_bytes().replace(b"window", b"mirror"))
    (root / "more.jsonl.zst").write_bytes(compressed)
    texts = [prose(rng, 50 + n) for n in range(60)]
    pq.write_table(
        pa.table({"text": texts, "url": [f"u{n}" for n in range(60)]}), root / "web.parquet", row_group_size=7
    )
    datasets.Dataset.from_dict({"text": [prose(rng, 80) for _ in range(30)]}).save_to_disk(str(root / "saved"))
    for number in range(8):
        path = root / "notes" / f"part{number % 3}" / f"note{number}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# Note {number}\n\n{prose(rng, 120)}")
    for repository in range(6):
        for module in range(3):
            path = root / "code" / f"repo{repository}" / "src" / f"m{module}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'"""{prose(rng, 30)}"""\n\ndef f{module}(x):\n    return x + {module}\n' * 3)
    talks = [_talk(rng) for _ in range(40)]
    _write_jsonl(root / "chat.jsonl", [{"messages": talk} for talk in talks])
    ids = np.random.default_rng(1)
    with MdsWriter(root / "tokenized", {"input_ids": "ndarray:uint32", "domain": "str", "length": "int"}) as writer:
        for _ in range(9):
            tokens = ids.integers(0, 256, int(ids.integers(300, 900)), np.uint32)
            writer.write({"input_ids": tokens, "domain": "anything", "length": len(tokens)})
    columns = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str"}
    with MdsWriter(root / "packed", columns) as writer:
        for _ in range(4):
            spans = np.array([[0, 100], [100, 101], [101, 256]], np.uint32)
            row = ids.integers(0, tokenizer_size, 256).astype(np.uint32)
            writer.write({"input_ids": row, "indices": spans, "domain": "x"})
    return sources(root)


def sources(root: Path) -> list[dict[str, Any]]:
    """Return the sources of a folder that ``write_mixed`` wrote."""
    return [
        {"domain": "books", "path": str(root / "books.jsonl"), "group_field": "id"},
        {"domain": "books", "path": str(root / "more.jsonl.zst")},
        {"domain": "books", "path": str(root / "tokenized"), "format": "tokenized_mds"},
        {"domain": "web", "path": str(root / "web.parquet")},
        {"domain": "web", "path": str(root / "saved")},
        {"domain": "web", "path": str(root / "notes")},
        {"domain": "web", "path": str(root / "packed"), "format": "packed_mds"},
        {"domain": "code", "path": str(root / "code"), "format": "repositories"},
        {"domain": "chat", "path": str(root / "chat.jsonl"), "messages_field": "messages"},
    ]


ROW_SETS: list[dict[str, Any]] = [
    {"path": "books-256", "domain": "books", "seq_length": 256, "document_length": 256},
    {"path": "books-64-in-256", "domain": "books", "seq_length": 256, "document_length": 64},
    {"path": "web-128", "domain": "web", "seq_length": 128},
    {"path": "web-fit-512", "domain": "web", "seq_length": 512, "packing": "best_fit"},
    {"path": "code-512", "domain": "code", "seq_length": 512, "max_rows": 5},
    {"path": "chat-256", "domain": "chat", "seq_length": 256},
    {"path": "validation-64", "domain": "books+web", "seq_length": 64, "document_length": 64, "split": "validation"},
]


def _talk(rng: random.Random) -> list[dict[str, str]]:
    turns = rng.randint(1, 3)
    return [
        {"role": role, "content": prose(rng, rng.randint(3, 25))}
        for _ in range(turns)
        for role in ("user", "assistant")
    ]


def _write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
