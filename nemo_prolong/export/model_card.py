"""``README.md`` of an exported model: what it is, how it was made, how it did, what may be done with it.

Every number comes from a manifest, an evaluation result or the verification; nothing is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.errors import CheckpointError
from nemo_prolong.export.source import Source
from nemo_prolong.records.evaluation import evaluation_directory
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.units import format_tokens

# Licences by the identifiers of the Hugging Face Hub; any other is "other" with its name.
_HUB_LICENSES = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "Meta Llama 3 Community License": "llama3",
    "Llama 3.1 Community License": "llama3.1",
    "Llama 3.2 Community License": "llama3.2",
}


def read_lineage(manifest: StageManifest) -> list[StageManifest]:
    """Return the stages from the first one found to ``manifest``; a parent that is gone ends the chain."""
    lineage = [manifest]
    while (parent := lineage[0].parent) is not None:
        try:
            lineage.insert(0, StageManifest.read(Path(parent.path)))
        except CheckpointError:
            break
    return lineage


def model_card(source: Source, dtype: torch.dtype, verification: dict[str, Any] | None) -> str:
    """Return the model card.

    Args:
        source: What was exported.
        dtype: Number format of the weights.
        verification: What ``verify.verify`` returned, or None if it was not asked for.
    """
    lineage = read_lineage(source.manifest)
    sections = [
        _front_matter(source),
        f"# {source.model.name}, {format_tokens(source.manifest.advertised_context_length)} tokens of context",
        _summary(source, dtype),
        "## Use\n\n" + _usage(),
        "## Training\n\n" + _training(lineage),
        *_evaluation(source.run_dir, lineage),
        "## Verification\n\n" + _verification(verification),
        "## Software\n\n" + _versions(source.manifest),
        "## Licence\n\n" + _license(source.model.license),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(source: Source) -> str:
    name = source.model.license
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [long-context, llama, prolong]"]
    if name in _HUB_LICENSES:
        lines.insert(0, f"license: {_HUB_LICENSES[name]}")
    elif name:
        lines.insert(0, f"license: other\nlicense_name: {json.dumps(name)}")
    return "\n".join(["---", *lines, "---"])


def _summary(source: Source, dtype: torch.dtype) -> str:
    model, manifest = source.model, source.manifest
    return (
        f"A Llama with {model.num_layers} layers, hidden size {model.hidden_size}, {model.num_attention_heads} query "
        f"heads and {model.num_query_groups} key-value heads, vocabulary {model.vocab_size}. Longest training row: "
        f"{manifest.trained_context_length} tokens; advertised context: {manifest.advertised_context_length} tokens; "
        f"RoPE base {model.rotary_base:g} {_scaling(model)}. Weights in {str(dtype).removeprefix('torch.')}, from step "
        f"{source.step} of {manifest.train_iters} of `{manifest.name}`."
    )


def _scaling(model: ModelConfig) -> str:
    if model.rope_scaling is None:
        return "without scaling"
    scaling = model.rope_scaling
    return (
        f"with the scaling of Llama-3.1 (factor {scaling.factor:g} over {scaling.original_max_position_embeddings} "
        "positions)"
    )


def _usage() -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("DIR")\n'
        'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")\n'
        "```"
    )


def _training(lineage: list[StageManifest]) -> str:
    """Return the table of stages, oldest first, and their data mixtures."""
    header = ("stage", "from its parent", "seq_length", "rotary_base", "steps", "tokens", "target tokens")
    rows = [
        (
            stage.stage,
            stage.parent.transition.replace("_", " ") if stage.parent else "nothing, random weights",
            stage.seq_length,
            f"{stage.rotary_base:g}",
            stage.step,
            f"{stage.consumed_train_tokens:,}",
            f"{stage.consumed_target_tokens:,}",
        )
        for stage in lineage
    ]
    parts = [_table(header, rows), "Tokens are those of documents, without padding; target tokens have a loss."]
    parent = lineage[0].parent
    if parent is not None:
        known = [] if parent.path.startswith(HF_PREFIX) else [f"step {parent.step}"]
        known += [] if parent.rotary_base is None else [f"rotary_base {parent.rotary_base:g}"]
        what = f" ({', '.join(known)})" if known else ""
        parts.append(f"The first stage in the table continues `{parent.path}`{what}, not described here.")
    parts.append("Data mixture, as shares of the training rows:")
    mixtures = [
        (stage.stage, entry["path"], f"{entry['proportion']:.1%}") for stage in lineage for entry in stage.data.mixture
    ]
    parts.append(_table(("stage", "data", "share"), mixtures))
    return "\n\n".join(parts)


def _evaluation(run_dir: Path, lineage: list[StageManifest]) -> list[str]:
    """Return the section with whatever results the runs hold, oldest first, or nothing."""
    parents = [Path(stage.parent.path) for stage in lineage[1:] if stage.parent is not None]
    tables: list[str] = []
    for directory, stage in zip([*parents, run_dir], lineage, strict=True):
        tables += _results(evaluation_directory(str(directory)), stage.name)
    return ["\n\n".join(["## Evaluation", *tables])] if tables else []


def _results(directory: Path, name: str) -> list[str]:
    """Return the tables of one run with their headings."""
    tables = []
    if perplexity := _read_result(directory / "perplexity.json"):
        rows = [
            (f"{bucket['start']} to {bucket['end']}", bucket["tokens"], f"{bucket['perplexity']:.2f}")
            for bucket in perplexity["buckets"]
            if bucket["perplexity"] is not None
        ]
        tables.append(f"Perplexity of `{name}` by position, on `{perplexity['data']}`:")
        tables.append(_table(("positions", "tokens", "perplexity"), rows))
    if recall := _read_result(directory / "recall.json"):
        rows = [
            (entry["length"], entry["samples"], f"{entry['exact_match']:.0%}", f"{entry['answer_loss']:.2f}")
            for entry in recall["lengths"]
        ]
        tables.append(f"Key-value recall of `{name}` by prompt length:")
        tables.append(_table(("tokens", "prompts", "exact match", "answer loss (nats per token)"), rows))
    return tables


def _read_result(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _verification(verification: dict[str, Any] | None) -> str:
    if verification is None:
        return "This export was not compared with the model it was made from."
    return (
        f"All {verification['tensors']} tensors equal the training checkpoint bit for bit after the cast. Logits of "
        f"plain `transformers` differ from those of the training model by at most "
        f"{verification['max_logit_difference']:.1e} on {len(verification['prompts'])} prompts, the longest of "
        f"{max(prompt['tokens'] for prompt in verification['prompts'])} tokens, positions up to "
        f"{max(prompt['last_position'] for prompt in verification['prompts'])}. `export_manifest.json` has the details."
    )


def _versions(manifest: StageManifest) -> str:
    lines = [f"- {package} {version}" for package, version in manifest.versions.items()]
    if manifest.git_commit:
        lines.append(f"- commit {manifest.git_commit}")
    return "\n".join(["Trained with:", "", *lines])


def _license(name: str) -> str:
    if not name:
        return "The run does not record the licence of the model it started from. Find it out before you pass this on."
    return (
        f"The model that training started from is under: {name}. Its terms hold for these weights. The data has terms "
        "of its own."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
