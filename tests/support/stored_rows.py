"""Small row sets of a tokenizer whose tokens are bytes, for tests that read rows back as text."""

import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemo_prolong.data.mds import MdsReader, MdsWriter

COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "uint64"}
MASKED = {**COLUMNS, "mask": "ndarray:uint8"}


def byte_tokenizer():
    """Return a tokenizer whose tokens are bytes, then BOS 256 and EOS 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
    return tokenizer


TOKENIZER = byte_tokenizer()
BOS, EOS = 256, 257


def ids(text):
    return TOKENIZER.encode(text).ids


def packed(*documents, **changes):
    """Return a row of documents given as lists of ids."""
    ends = np.cumsum([len(document) for document in documents])
    row = {
        "input_ids": np.array([number for document in documents for number in document], np.uint32),
        "indices": np.stack([ends - [len(document) for document in documents], ends], axis=1).astype(np.uint32),
        "domain": "docs", "length": int(ends[-1]), **changes,
    }  # fmt: skip
    return {name: value for name, value in row.items() if value is not None}


def document(text):
    return [BOS, *ids(text), EOS]


def write_rows(directory, rows, columns=COLUMNS):
    with MdsWriter(directory, columns) as writer:
        for row in rows:
            writer.write(row)


def write_data(root):
    """Write a data directory of two row sets, one with masks, and return it."""
    docs = [packed(document("first one"), document("second")), packed(document("third text, alone"))]
    chat = packed(document("ask"), document("tell"), mask=np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0], np.uint8))
    write_rows(root / "docs-19", docs)
    write_rows(root / "deep" / "chat-11", [chat], MASKED)
    (root / "tokenizer").mkdir()
    TOKENIZER.save(str(root / "tokenizer" / "tokenizer.json"))
    entries = {}
    for path, rows, tokens in (("docs-19", 2, 38), ("deep/chat-11", 1, 11)):
        shards = {
            shard.raw.name: {"bytes": shard.raw.num_bytes, "sha256": shard.raw.hashes["sha256"]}
            for shard in MdsReader(root / path).shards
        }
        entries[path] = {
            "domain": "docs", "split": "train", "packing": "concat", "seq_length": tokens // rows, "rows": rows,
            "documents": 3, "tokens": tokens, "fill": 0.99951, "input_tokens": 2 * tokens,
            "dropped_tokens": {"last_row": tokens}, "shards": shards,
        }  # fmt: skip
    manifest = {"format": 2, "seed": 42, "tokenizer": "tokenizer", "vocab_size": 258, "row_sets": entries}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root
