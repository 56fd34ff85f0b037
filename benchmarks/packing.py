"""Packing against other people's packers: documents per second, tokens per second with the tokens moved, fill.

Peers are given by path and loaded as they are; libraries that they import and that do no packing are replaced by empty
ones. Each part is left out where its peer is not given:

    --trl       trl/data_utils.py of TRL 1.x (``_pack_bfd``)
    --bridge    data/packing/algorithms.py of Megatron-Bridge (``first_fit_decreasing``)
    --datatools checkout of CodeCreator/datatools (``pack_fn``)
    --lengths   JSON lists of document lengths, such as DistCA's dist_prolong.json and dist_wlbllm.json

A list of lengths drawn here is always measured. What two sides return is compared before anything is timed. Runs are
interleaved after a warm-up; figures are medians.

    python benchmarks/packing.py [--trl FILE] [--bridge FILE] [--datatools DIR] [--lengths FILE ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa

from nemo_prolong.data.packing import Layout, best_fit, concat, gather, split

REPEATS = 5
SEQ_LENGTHS = (65_536, 524_288)
MOVED_TOKENS = 30_000_000
HUGE_DOCUMENT_TOKENS = 20_000_000
MANY_DOCUMENTS = 2_000_000


def load_peer(path: Path, without: Sequence[str] = ()) -> ModuleType:
    """Import a file as it is, with the modules it names and does not need replaced."""
    for name in without:
        sys.modules.setdefault(name, MagicMock())
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_datatools(checkout: Path) -> ModuleType:
    """Import datatools' packer; of its argument parser only the defaults of options are needed."""

    def field(default: Any = None, default_factory: Callable[[], Any] | None = None, **_: object) -> Any:
        return dataclasses.field(default_factory=default_factory or (lambda: default))

    sys.modules["simple_parsing"] = MagicMock(field=field)
    streaming = ["streaming", "streaming.base", "streaming.base.array"]
    return load_peer(checkout / "datatools/scripts/pack.py", without=["datatools", *streaming])


def interleaved(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of every side."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def record(bar: str, ours: float, peer: float | None, unit: str, bound: float) -> dict[str, Any]:
    """Return one row of the result; the bound is on the ratio, or on ours where there is no peer."""
    ratio = None if peer is None else ours / peer
    met = (ours if ratio is None else ratio) >= bound
    ours, peer, ratio = (value if value is None else float(f"{value:.5g}") for value in (ours, peer, ratio))
    return {"bar": bar, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "bound": bound, "met": bool(met)}


def drawn_lengths(count: int) -> np.ndarray:
    """Return lengths like those of web text with some books, int64 [count]."""
    rng = np.random.default_rng(0)
    long = rng.random(count) < 0.01
    return 1 + np.where(long, rng.lognormal(10.5, 0.8, count), rng.lognormal(6.8, 1.0, count)).astype(np.int64)


def measure_best_fit(
    name: str, lengths: np.ndarray, seq_length: int, bridge: ModuleType | None
) -> list[dict[str, Any]]:
    """Report the fill of best_fit, and time the layout against a packer that also works on lengths alone."""
    layout = best_fit(lengths, seq_length)
    layout.validate(lengths)
    bar = f"best_fit, {name}, {len(lengths)} documents, rows of {seq_length}"
    total = int(lengths.sum())
    fill = record(f"{bar}: fill", layout.fill, None, "of the row tokens", 0.999)
    fill |= {"num_rows": layout.num_rows, "fewest_possible_rows": -(-total // seq_length)}
    fill |= {"dropped_share": round(layout.dropped_tokens["underfilled_row"] / total, 6)}
    fill |= {"dropped_documents": layout.dropped_documents["underfilled_row"]}
    if bridge is None:
        return [fill]
    # It takes no document longer than a row: it is given the full rows and the rest, as best_fit makes them.
    parts = np.concatenate([np.full(int((lengths // seq_length).sum()), seq_length), lengths % seq_length])
    peer = partial(bridge.first_fit_decreasing, parts[parts > 0].tolist(), seq_length)
    rows = peer()
    assert sum(map(sum, rows)) == total
    assert layout.num_rows + (layout.dropped_tokens["underfilled_row"] > 0) <= len(rows)
    seconds = interleaved({"ours": partial(best_fit, lengths, seq_length), "peer": peer})
    rates = len(lengths) / seconds["ours"], len(lengths) / seconds["peer"]
    against = record(f"{bar}, layout alone, against Megatron-Bridge", *rates, unit="documents/s", bound=5.0)
    return [fill, against | {"peer_rows": len(rows), "peer_fill": round(total / (len(rows) * seq_length), 5)}]


class Corpus:
    """Tokens of documents in a file of uint32, mapped, and as the items that datatools reads."""

    def __init__(self, directory: Path, name: str, lengths: np.ndarray) -> None:
        self.lengths = lengths
        self.bounds = np.concatenate([[0], np.cumsum(lengths)])
        path = directory / f"{name}.bin"
        np.arange(self.bounds[-1], dtype=np.uint32).tofile(path)
        self.tokens = np.memmap(path, np.uint32, mode="r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> dict[str, np.ndarray]:
        return {"input_ids": np.asarray(self.tokens[self.bounds[document] : self.bounds[document + 1]])}


def our_rows(corpus: Corpus, layout: Layout) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of a layout."""
    return (gather(layout, row, corpus.tokens, corpus.bounds) for row in range(layout.num_rows))


def our_pass(corpus: Corpus, pack: Callable[[], Layout]) -> int:
    """Lay out, then take every row and keep none."""
    return sum(1 for _ in our_rows(corpus, pack()))


def datatools_rows(datatools: ModuleType, corpus: Corpus, options: dict[str, Any]) -> Iterator[tuple[Any, dict]]:
    """Yield datatools' rows."""
    return datatools.pack_fn(corpus, None, 1, datatools.PackOptions(**options))


def peer_pass(rows: Callable[[], Iterator[object]]) -> int:
    """Take every row and keep none."""
    return sum(1 for _ in rows())


def measure_moving(corpus: Corpus, name: str, seq_length: int, datatools: ModuleType | None) -> list[dict[str, Any]]:
    """Time laying out and moving tokens, concat and split, against datatools' pack_fn."""
    target = seq_length // 32
    cases: dict[str, tuple[Callable[[], Layout], dict[str, Any]]] = {
        "concat": (lambda: concat(corpus.lengths, seq_length), {}),
        f"split to {target}": (
            lambda: split(corpus.lengths, [target], seq_length)[target],
            {"split_by_lengths": [target]},
        ),
    }
    results = []
    for case, (pack, options) in cases.items():
        sides: dict[str, Callable[[], object]] = {"ours": partial(our_pass, corpus, pack)}
        if datatools is not None:
            peer = partial(datatools_rows, datatools, corpus, {"pack_length": seq_length, **options})
            check_equal(list(our_rows(corpus, pack())), list(peer()), ordered=case == "concat")
            sides["peer"] = partial(peer_pass, peer)
        seconds = interleaved(sides)
        rates = {side: pack().num_tokens / value / 1e6 for side, value in seconds.items()}
        bar = f"{case}, {name}, rows of {seq_length}, tokens moved" + (", against datatools" if datatools else "")
        results.append(record(bar, rates["ours"], rates.get("peer"), "Mtokens/s", 1.0))
    return results


def measure_best_fit_moving(corpus: Corpus, name: str, seq_length: int, trl: ModuleType) -> dict[str, Any]:
    """Time laying out and moving tokens, best_fit, against TRL's packer."""
    offsets, values = pa.array(corpus.bounds, pa.int64()), pa.array(np.asarray(corpus.tokens))
    table = pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, values)})
    pack, peer = partial(best_fit, corpus.lengths, seq_length), partial(trl._pack_bfd, table, seq_length, "split")
    layout, packed = pack(), peer()
    used = np.concatenate([input_ids for input_ids, _ in our_rows(corpus, layout)])
    assert len(np.unique(used)) == len(used) == len(corpus.tokens) - layout.dropped_tokens["underfilled_row"]
    assert layout.num_rows + (layout.dropped_tokens["underfilled_row"] > 0) <= len(packed)
    seconds = interleaved({"ours": partial(our_pass, corpus, pack), "peer": peer})
    rates = [layout.num_tokens / seconds[side] / 1e6 for side in ("ours", "peer")]
    bar = f"best_fit, {name}, rows of {seq_length}, tokens moved, against TRL"
    peer_fill = len(corpus.tokens) / (len(packed) * seq_length)
    more = {"fill": round(layout.fill, 5), "peer_fill": round(peer_fill, 5)}
    return record(bar, *rates, unit="Mtokens/s", bound=1.0) | more


def check_equal(
    ours: list[tuple[np.ndarray, np.ndarray]], peer: list[tuple[Any, dict[str, Any]]], ordered: bool
) -> None:
    """Compare rows with datatools'; split has another order of pieces, so there only the pieces are the same."""
    assert len(ours) == len(peer)
    if ordered:
        for (input_ids, indices), (_, item) in zip(ours, peer, strict=True):
            np.testing.assert_array_equal(input_ids, item["input_ids"])
            np.testing.assert_array_equal(indices, item["indices"])
        return
    firsts = [
        sorted(int(ids[start]) for ids, indices in rows for start in indices[:, 0])
        for rows in (ours, [(item["input_ids"], item["indices"]) for _, item in peer])
    ]
    # The last row is incomplete and dropped: it holds other pieces where the order is another.
    different = set(firsts[0]) ^ set(firsts[1])
    assert len(firsts[0]) == len(firsts[1]) and len(different) <= 2 * len(ours[0][1])


def measure_huge(directory: Path, lengths: np.ndarray, seq_length: int) -> list[dict[str, Any]]:
    """Compare the rate on one huge document with that on the same tokens in normal documents."""
    enough = int(np.searchsorted(np.cumsum(lengths), HUGE_DOCUMENT_TOKENS)) + 1
    normal = Corpus(directory, "normal", lengths[:enough])
    huge = Corpus(directory, "huge", np.array([normal.bounds[-1]]))
    packs: dict[str, Callable[[np.ndarray], Layout]] = {
        "concat": lambda lengths: concat(lengths, seq_length),
        "split": lambda lengths: split(lengths, [1024], seq_length)[1024],
        "best_fit": lambda lengths: best_fit(lengths, seq_length),
    }
    results = []
    for name, pack in packs.items():
        corpora = {"huge": huge, "normal": normal}
        tokens = {kind: pack(corpus.lengths).num_tokens for kind, corpus in corpora.items()}
        seconds = interleaved(
            {kind: partial(our_pass, corpus, partial(pack, corpus.lengths)) for kind, corpus in corpora.items()}
        )
        rate = {kind: tokens[kind] / seconds[kind] / 1e6 for kind in corpora}
        bar = f"{name}, one document of {HUGE_DOCUMENT_TOKENS} tokens against {enough} documents, rows of {seq_length}"
        results.append(record(bar, rate["huge"], rate["normal"], "Mtokens/s", 0.9))
    return results


def measure_many(lengths: np.ndarray) -> list[dict[str, Any]]:
    """Time the layouts of millions of documents."""
    many = np.random.default_rng(0).choice(lengths, MANY_DOCUMENTS)
    packs = {"concat": concat, "best_fit": best_fit}
    seconds = interleaved({name: lambda pack=pack: pack(many, 65_536) for name, pack in packs.items()})
    return [
        record(f"{name}, {MANY_DOCUMENTS} documents, rows of 65536, layout alone", value, None, "documents/s", 1e6)
        for name, value in ((name, MANY_DOCUMENTS / seconds[name]) for name in packs)
    ]


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every part whose peers are given."""
    trl = load_peer(arguments.trl) if arguments.trl else None
    megatron = ["megatron", "megatron.bridge", "megatron.bridge.utils", "megatron.bridge.utils.safe_pickle"]
    bridge = load_peer(arguments.bridge, without=megatron) if arguments.bridge else None
    datatools = load_datatools(arguments.datatools) if arguments.datatools else None
    lists = {path.stem: np.array(json.loads(path.read_text()), np.int64) for path in arguments.lengths}
    lists["drawn"] = drawn_lengths(100_000)
    results = []
    for name, lengths in lists.items():
        for seq_length in SEQ_LENGTHS:
            results += measure_best_fit(name, lengths[:20_000], seq_length, None)
            results += measure_best_fit(name, lengths, seq_length, bridge)
    name, lengths = next(iter(lists.items()))
    with tempfile.TemporaryDirectory() as directory:
        moved = lengths[: int(np.searchsorted(np.cumsum(lengths), MOVED_TOKENS))]
        corpus = Corpus(Path(directory), "moved", moved)
        title = f"{name}, {len(moved)} documents"
        results += measure_moving(corpus, title, 65_536, datatools)
        results += [measure_best_fit_moving(corpus, title, 65_536, trl)] if trl else []
        results += measure_huge(Path(directory), lengths, 65_536)
    return results + measure_many(lengths)


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="trl/data_utils.py")
    parser.add_argument("--bridge", type=Path, help="Megatron-Bridge's data/packing/algorithms.py")
    parser.add_argument("--datatools", type=Path, help="checkout of datatools")
    parser.add_argument("--lengths", type=Path, nargs="*", default=[], help="JSON lists of document lengths")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    rows = measure_all(arguments)
    for row in rows:
        peer = "" if row["peer"] is None else f"{row['peer']:>10.4g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        print(f"{row['bar']:100} {row['ours']:>10.5g} {peer:>10} {row['unit']:18} {ratio:>8} {row['met']}")
    if arguments.json:
        versions = {"numpy": np.__version__, "pyarrow": pa.__version__, "python": platform.python_version()}
        machine = {"processor": platform.machine()}
        arguments.json.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
