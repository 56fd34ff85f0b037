"""The card of the quick check. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from benchmarks.hopper.card import RESULTS, Reports, section, summary
from nemo_prolong.files import write_json_atomically, write_text_atomically
from nemo_prolong.plan.devices import dense_peak_flops_per_second

_HOW = """\
```
make gpu-check GPU_CHECK_ARGS=--quick                        # at most 9 minutes on one H200
make gpu-check GPU_CHECK_ARGS="--quick --cases te,te_fp8"    # some of them; the others stay as they are here
python -m benchmarks.hopper --quick --device cpu             # small sizes on a CPU
```

The cases run in the order of this page, the most valuable first. After every row this page and `hopper_quick.json` are
written. `--seconds N` gives it less time or more. A case that does not fit into what is left of it is not started, and
its row says so. A case that fails has a row with the error. One that takes more than twice its planned time is stopped.
The next case then runs in a new process. The exit code is 0 if nothing failed, 1 if something did, and 2 without a GPU.
[A machine without a network](README.md) takes one command too.
"""


def _conventions() -> str:
    """Return how the figures are counted, with the peaks that they are divided by."""
    peaks = [dense_peak_flops_per_second("NVIDIA H200", compute) for compute in ("bf16", "fp8")]
    bf16, fp8 = (f"{peak / 1e12:,.1f}" for peak in peaks if peak is not None)
    return f"""\
FLOPs are those of the model (causal, per document, forward + 2 x backward, no recomputation). MFU divides them by the
dense bf16 peak of the device, {bf16} TFLOPS on an H200, in FP8 too. The share of FP8's own dense peak, {fp8} TFLOPS, is
a row beside it. Times are the median of three runs after one that does not count. Layers of the torch backend have one
run after one.
"""


def write_card(path: Path, reports: Reports) -> None:
    """Write ``path`` and, beside it, the page of the same name.

    Args:
        path: A JSON file.
        reports: By name of the case, in the order of the page.
    """
    write_json_atomically(path, {"format": 1, "stages": dict(reports)})
    write_text_atomically(path.with_suffix(".md"), page(reports))


def page(reports: Reports) -> str:
    """Return the page of a card; without reports, one that says so."""
    head = ["# Quick check on a Hopper GPU", ""]
    if not reports:
        head += ["No case has run on a GPU yet.", ""]
    parts = [*head, _HOW, _conventions(), RESULTS]
    if not reports:
        return "\n".join(parts)
    parts += summary("case", reports)
    for name, report in reports.items():
        parts += ["", *section(name, report)]
    return "\n".join(parts) + "\n"
