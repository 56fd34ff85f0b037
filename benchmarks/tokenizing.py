"""Tokenizing against other libraries: megabytes of text per second of processor time, on one core.

Tokenizers of two sizes with Llama-3's split are trained on the Python files of this environment, other files are
encoded. Every side gives token ids as arrays; they are compared before anything is timed, on these files and on texts
made to be awkward. Every repetition has text of its own, because libraries remember words; sides are interleaved after
a warm-up; figures are medians. Peers other than tokenizers, tiktoken and transformers are measured where installed.

    python benchmarks/tokenizing.py [--json FILE]
"""

from __future__ import annotations

import os

os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # read when the libraries are loaded

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import resource
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.tokenizer import ChatEncoder, TextEncoder, train_tokenizer
from nemo_prolong.data.tokenizer.template import LLAMA3_TRAINING

REPEATS = 5
GROUP_BYTES = 1_500_000
VOCAB_SIZES = {2048: 3_000_000, 32_768: 30_000_000}
"""Tokens, and bytes of text that the tokenizer is trained on."""
HUGE_DOCUMENT_TOKENS = 20_000_000
PEERS = ("tokenizers", "tiktoken", "kitoken", "riptoken")
LONG_RUNS = ("a", " ", "\n", "1", ".", "\u4e2d", "\U0001f600", " a")
ALPHABET = (
    " \t\r\n\x0b\x85\u00a0\u2003\u3000\u2028\x1c\u200b'\u2019sStTlLrRvVeEmMaZz\u017f\u212a\u00e9\u0301\u0e33\u4e2d"
    "\u3042\ud55c\u1112\u1161\u3002\uff0c\U0001f600\u200d1\u06699\u00bd.=<|>/_-\x00"
)

Encode = Callable[[Sequence[str]], list[np.ndarray]]


def source_files() -> Iterator[str]:
    """Yield the Python files of this environment in a fixed random order."""
    paths = sorted(Path(sysconfig.get_path("purelib")).glob("**/*.py"))
    for number in np.random.default_rng(0).permutation(len(paths)):
        text = paths[number].read_text("utf-8", errors="ignore")
        if 200 < len(text) < 100_000:
            yield text


def take(texts: Iterator[str], num_bytes: int) -> list[str]:
    """Return the next texts, at least ``num_bytes`` of them."""
    taken: list[str] = []
    while num_bytes > 0:
        taken.append(next(texts))
        num_bytes -= len(taken[-1].encode())
    return taken


def awkward_texts() -> list[str]:
    """Return random mixtures of what tokenizers stumble over, every character, and long runs."""
    rng = np.random.default_rng(0)
    fragments = [
        *ALPHABET * 6,
        "<|eot_id|>",
        "<|begin_of_text|>",
        "'s",
        "'RE",
        "\r\n",
        "def ",
        "the",
        " " * 30,
        "1" * 20,
    ]
    drawn = rng.integers(len(fragments), size=(20_000, 60))
    texts = ["".join(fragments[n] for n in draw[: 1 + n % 60]) for n, draw in enumerate(drawn)]
    any_character = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts += ["a".join(any_character[start : start + 50]) for start in range(0, len(any_character), 50)]
    return texts + [character * 20_000 for character in LONG_RUNS]


def byte_ranks(definition: dict[str, Any]) -> dict[bytes, int]:
    """Return the id of every token by its bytes, of a byte-level ``tokenizer.json``."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    bytes_of = {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    return {bytes(bytes_of[c] for c in token): number for token, number in definition["model"]["vocab"].items()}


def make_peer(name: str, directory: Path) -> Encode:
    """Return a library's way to encode texts without special tokens."""
    path = directory / "tokenizer.json"
    definition = json.loads(path.read_text())
    split = definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    if name == "tokenizers":
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode_special_tokens = True
        return lambda texts: [
            np.array(encoding.ids, np.uint32)
            for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
    if name == "kitoken":
        from kitoken import Kitoken

        kitoken = Kitoken.from_file(str(path))
        return lambda texts: [np.array(kitoken.encode(text, False), np.uint32) for text in texts]
    if name == "tiktoken":
        from tiktoken._tiktoken import CoreBPE
    else:
        from riptoken import CoreBPE
    core = CoreBPE(byte_ranks(definition), {}, split)
    return lambda texts: [np.array(core.encode_ordinary(text), np.uint32) for text in texts]


def differing(encode: Encode, texts: Sequence[str], expected: Sequence[np.ndarray]) -> int:
    """Return for how many texts ``encode`` gives other ids."""
    return sum(not np.array_equal(ids, other) for ids, other in zip(encode(texts), expected, strict=True))


def count_wrong(peer: Encode, files: Sequence[str], expected: dict[str, list[np.ndarray]]) -> int:
    """Return for how many texts a peer gives other ids, long runs left out: tiktoken's time is quadratic in them."""
    shorter = slice(-len(LONG_RUNS))
    awkward = differing(peer, awkward_texts()[shorter], expected["awkward"][shorter])
    return differing(peer, files, expected["files"]) + awkward


def interleaved(sides: dict[str, Callable[[Any], object]], inputs: Sequence[Any]) -> dict[str, list[float]]:
    """Return processor seconds of every side on each input but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, given in enumerate(inputs):
        for name, side in sides.items():
            started = time.process_time()
            side(given)
            if number:
                seconds[name].append(time.process_time() - started)
    return seconds


def row(bar: str, ours: float, peer: float, unit: str, bound: float) -> dict[str, object]:
    """Return a record where more is better."""
    ratio = ours / peer
    numbers = {"ours": float(f"{ours:.4g}"), "peer": float(f"{peer:.4g}"), "unit": unit, "ratio": float(f"{ratio:.3g}")}
    return {"bar": bar, **numbers, "bound": bound, "met": ratio >= bound}


def measure_libraries(directory: Path, vocab_size: int, texts: Iterator[str]) -> list[dict[str, object]]:
    """Compare our encoder with every library on real files, after comparing the ids."""
    encoder = TextEncoder(directory)
    assert encoder.library == "fast"
    groups = [take(texts, GROUP_BYTES) for _ in range(REPEATS + 1)]
    reference = make_peer("tokenizers", directory)
    expected = {"files": reference(groups[0]), "awkward": reference(awkward_texts())}
    assert differing(encoder.encode_texts, groups[0], expected["files"]) == 0
    assert differing(encoder.encode_texts, awkward_texts(), expected["awkward"]) == 0
    peers = {name: make_peer(name, directory) for name in PEERS if importlib.util.find_spec(name)}
    wrong = {name: count_wrong(peer, groups[0], expected) for name, peer in peers.items()}
    seconds = interleaved({"ours": encoder.encode_texts, **peers}, groups)
    megabytes = [sum(len(text.encode()) for text in group) / 1e6 for group in groups[1:]]
    rates = {
        name: statistics.median(size / spent for size, spent in zip(megabytes, values, strict=True))
        for name, values in seconds.items()
    }
    notes = {name: f" ({wrong[name]} texts with other ids)" if wrong[name] else "" for name in peers}
    bounds = dict.fromkeys(peers, 1.0) | {"tokenizers": 2.0}
    return [
        row(
            f"code, {vocab_size} tokens, against {name}{notes[name]}",
            rates["ours"],
            rates[name],
            "MB/s of one core",
            bounds[name],
        )
        for name in peers
    ]


def measure_huge_document(directory: Path, texts: Iterator[str]) -> list[dict[str, object]]:
    """Compare the rate in one document with that in its files, and say how much memory a huge one takes."""
    encoder = TextEncoder(directory)
    groups = [take(texts, 4 * GROUP_BYTES) for _ in range(REPEATS + 1)]
    tokens = [sum(map(len, encoder.encode_texts(group))) for group in groups]
    copies = -(-HUGE_DOCUMENT_TOKENS // sum(tokens))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pieces = (text for _ in range(copies) for group in groups for text in group)
    streamed = sum(map(len, encoder.encode_stream(pieces)))
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    sides = {
        "ours": lambda group: sum(map(len, encoder.encode_stream(group))),
        "peer": lambda group: sum(len(encoder.encode_texts([text])[0]) for text in group),
    }
    # New strings: the library keeps the UTF-8 of those that it has seen.
    seconds = interleaved(sides, [[text[:1] + text[1:] for text in group] for group in groups])
    ours, peer = (
        statistics.median(count / spent / 1e6 for count, spent in zip(tokens[1:], seconds[name], strict=True))
        for name in ("ours", "peer")
    )
    memory = {"bar": f"memory that a document of {streamed} tokens adds", "ours": round(grown_mib, 1), "peer": None}
    bound = {"unit": "MiB", "ratio": None, "bound": 64.0, "met": grown_mib <= 64.0}
    return [row("one document against its files, each alone", ours, peer, "M tokens/s", 0.9), {**memory, **bound}]


def conversations(texts: Iterator[str]) -> list[Conversation]:
    """Return conversations of the length of UltraChat's, with real text in them."""
    words = " ".join(take(texts, 400_000)).replace("<|", "").split(" ")
    turns = [" ".join(words[start : start + 100]).strip() or "." for start in range(0, len(words), 100)]
    roles = ("user", "assistant") * 3
    return [
        Conversation(
            [{"role": role, "content": turn} for role, turn in zip(roles, turns[start : start + 6], strict=True)]
        )
        for start in range(0, len(turns) - 6, 6)
    ]


def measure_chat(directory: Path, texts: Iterator[str]) -> list[dict[str, object]]:
    """Compare with ``apply_chat_template`` of transformers, ids and masks, and then the time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoder = ChatEncoder(TextEncoder(directory))

    def peer(talks: Sequence[Conversation]) -> list[dict[str, list[int]]]:
        options = {"chat_template": LLAMA3_TRAINING.read_text(), "return_dict": True}
        return [
            tokenizer.apply_chat_template(talk.messages, return_assistant_tokens_mask=True, **options) for talk in talks
        ]

    groups = [conversations(texts) for _ in range(REPEATS + 1)]
    for chat, theirs in zip(encoder.encode_batch(groups[0]), peer(groups[0]), strict=True):
        assert chat.input_ids.tolist() == theirs["input_ids"]
        assert chat.mask.tolist() == theirs["assistant_masks"]
    seconds = interleaved({"ours": encoder.encode_batch, "peer": peer}, groups)
    rates = {
        name: statistics.median(len(group) / spent for group, spent in zip(groups[1:], values, strict=True))
        for name, values in seconds.items()
    }
    bar = "conversations of six turns with masks, against transformers"
    return [row(bar, rates["ours"], rates["peer"], "per s of one core", 1.0)]


def measure_all(directory: Path) -> list[dict[str, object]]:
    """Return all records."""
    rows = []
    for vocab_size, train_bytes in VOCAB_SIZES.items():
        texts = source_files()
        train_tokenizer(take(texts, train_bytes), vocab_size, directory / str(vocab_size))
        rows += measure_libraries(directory / str(vocab_size), vocab_size, texts)
    largest = directory / str(max(VOCAB_SIZES))
    return rows + measure_huge_document(largest, texts) + measure_chat(largest, texts)


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = measure_all(Path(directory))
    for record in rows:
        peer = "" if record["peer"] is None else f"{record['peer']:>10} {record['ratio']:>7}x"
        print(f"{record['bar']:66} {record['ours']:>10} {peer:>19} {record['unit']:18} {record['met']}")
    if arguments.json:
        packages = ("fastokens", "numpy", "transformers", *PEERS)
        versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
        versions["python"] = platform.python_version()
        machine = {"processor": platform.machine(), "threads": 1}
        arguments.json.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
