"""The tables of ``docs/precision.md``, made from the rules that refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from nemo_prolong.config.rules.attention import Attention, Platform, dotted
from nemo_prolong.config.rules.constraints import CONSTRAINTS, broken_rules
from nemo_prolong.config.schema import CpCommType, KernelBackend
from nemo_prolong.text import markdown_table

BEGIN = "<!-- made by scripts/constraints.py; do not edit -->"
END = "<!-- end of what scripts/constraints.py made -->"

EXCHANGES: tuple[CpCommType | None, ...] = (None, *get_args(CpCommType))
"""Columns of the tables; None is CP 1."""

FP8_RECIPES = ("tensorwise", "delayed", "blockwise")


def platforms() -> list[Platform]:
    """Return what the tables are made for: Hopper and Blackwell, each Transformer Engine that changed what is legal."""
    hopper = [Platform((2, minor), (9, 0), cudnn=(9, 19), cuda=(13, 0)) for minor in (9, 10, 18, 19)]
    return [*hopper, *(replace(hopper[index], compute_capability=(10, 0)) for index in (0, -1))]


def torch_attentions() -> list[Attention]:
    """Return the rows of the torch backend, as they are at CP 1."""
    return [_attention(Platform(), compute, "tensorwise", KernelBackend.TORCH) for compute in ("fp32", "bf16", "fp8")]


def te_attentions(platform: Platform) -> list[Attention]:
    """Return the rows of Transformer Engine on one platform, as they are at CP 1."""
    rows = [_attention(platform, "fp32"), _attention(platform, "bf16")]
    rows += [_attention(platform, "fp8", recipe) for recipe in FP8_RECIPES]
    for recipe in FP8_RECIPES:
        masked = _attention(platform, "fp8_attention", recipe)
        rows += [masked, replace(masked, dtype="fp8", layout="bshd")]
    return [*rows, replace(_attention(platform, "fp8_attention", "delayed"), dtype="fp8")]


def _attention(
    platform: Platform, compute: str, fp8_recipe: str = "tensorwise", backend: KernelBackend = KernelBackend.TE
) -> Attention:
    """Return Llama-3-8B's attention over documents at TP 8, CP 1."""
    return Attention(
        compute=compute,
        fp8_recipe=fp8_recipe,
        backend=backend,
        kernels="auto",
        dtype="fp32" if compute == "fp32" else "bf16",
        layout="thd",
        cp_comm_type=None,
        deterministic=False,
        num_attention_heads=4,
        num_query_groups=1,
        kv_channels=128,
        max_seqlen=524_288,
        rank_tokens=524_288,
        platform=platform,
    )


def markdown() -> str:
    """Return the tables with their reasons, as they stand between the markers of the document."""
    return "\n".join([BEGIN, *_tables(), *_reasons(), "", END])


def refresh(document: str) -> str:
    """Return a document with what stands between the markers made anew."""
    before, found, rest = document.partition(BEGIN)
    assert found and END in rest, "the document has no markers"
    return before + markdown() + rest.partition(END)[2]


def _tables() -> Iterator[str]:
    yield from _table("Torch backend, CPU or any GPU", torch_attentions())
    for platform in platforms():
        device = "Hopper (sm90)" if platform.compute_capability == (9, 0) else "Blackwell (sm100)"
        yield from _table(
            f"Transformer Engine {dotted(platform.transformer_engine)}, {device}", te_attentions(platform)
        )


def _table(title: str, attentions: list[Attention]) -> Iterator[str]:
    yield from ("", f"### {title}", "")
    head = ["`precision`", "`fp8_recipe`", "attention", *(f"`{e}`" if e else "CP 1" for e in EXCHANGES)]
    yield markdown_table(head, map(_row, attentions))


def _row(attention: Attention) -> list[str]:
    recipe = f"`{attention.fp8_recipe}`" if attention.compute.startswith("fp8") else "-"
    verdicts = [_verdict(replace(attention, cp_comm_type=exchange)) for exchange in EXCHANGES]
    return [f"`{attention.compute}`", recipe, f"{attention.dtype.upper()} `{attention.layout}`", *verdicts]


def _verdict(attention: Attention) -> str:
    numbers = [f"[{CONSTRAINTS.index(rule) + 1}](#reasons)" for rule in broken_rules(attention)]
    return f"no: {', '.join(numbers)}" if numbers else "yes"


def _reasons() -> Iterator[str]:
    yield from ("", "### Reasons", "")
    for number, rule in enumerate(CONSTRAINTS, start=1):
        yield f"{number}. {rule.reason[0].upper()}{rule.reason[1:]} {rule.remedy}"
