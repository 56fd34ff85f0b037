"""A run tree as the four stages of the miniature recipe leave it, with made-up but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.config.schema import ReportConfig
from nemo_prolong.records.export_manifest import ExportManifest, GreedyRecord, SourceRecord, VerificationRecord

BUCKETS = [512, 1024, 2048, 4096, 8192]
VERSIONS = {"nemo_prolong": "0.1.0", "torch": "2.13.0", "nemo-toolkit": "2.7.3", "megatron-core": "0.15.3"}


@dataclass(frozen=True)
class Recipe:
    """What one made-up stage is made of."""

    stage: str
    seq_length: int
    trained: int
    rotary_base: float
    iters: int
    rows: int
    first: float
    last: float
    tokens_per_second: float
    transition: str | None
    mixture: dict[str, float]


RECIPES = [
    Recipe("base", 512, 512, 1e4, 200, 8, 8.35, 4.62, 3150, None,
           {"code-512": 0.6, "reference-512": 0.3, "docs-512": 0.1}),
    Recipe("stage1", 2048, 2048, 8e4, 60, 4, 4.75, 4.21, 3020, "weights", {"code_by_repo-2048": 0.3, "docs-2048": 0.7}),
    Recipe("stage2", 8192, 8192, 6.4e5, 30, 2, 4.32, 3.98, 2640, "weights_and_optimizer",
           {"code_by_repo-8192": 0.5, "reference-8192": 0.5}),
    Recipe("sft", 2048, 8192, 6.4e5, 20, 4, 5.10, 4.05, 2900, "weights", {"chat-2048": 1.0}),
]  # fmt: skip


@dataclass(frozen=True)
class RunTree:
    """Where the tree is."""

    root: Path
    runs: list[str]
    export: str

    def config(self, **changes: Any) -> ReportConfig:
        """Return the report's configuration for the whole tree."""
        values = {"runs": self.runs, "exported": self.export, "output": str(self.root / "report.html")}
        return ReportConfig(**{**values, **changes})

    def edit_manifest(self, number: int, **changes: Any) -> None:
        """Change keys of one stage's ``stage.json``."""
        path = Path(self.runs[number]) / "stage.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def tree(tmp_path: Path) -> RunTree:
    """Four finished stages with evaluations, and an export with its own."""
    return write_run_tree(tmp_path / "demo")


def write_run_tree(root: Path) -> RunTree:
    """Write the tree below ``root``."""
    runs = [root / recipe.stage for recipe in RECIPES]
    export = root / "export" / "hf"
    _write_data(root / "data")
    for recipe, run in zip(RECIPES, runs, strict=True):
        _write_run(recipe, run, root)
        _write_evaluation(recipe, run / "eval", str(run), "megatron", [str(r) for r in runs])
    _write_export_manifest(export, runs[-1])
    name = f"hf:{export}"
    _write_evaluation(RECIPES[-1], root / "export" / "hf_eval", name, "transformers", [name])
    return RunTree(root, [str(run) for run in runs], str(export))


def _write_export_manifest(directory: Path, run: Path) -> None:
    verification = VerificationRecord(
        tensors=39, max_logit_difference=3.1e-06, logit_tolerance=1e-4, prompts=[], transformers="4.57.6",
        greedy=GreedyRecord(tokens=16, equal=16),
    )  # fmt: skip
    source = SourceRecord(run=str(run), name="sft", stage="sft", checkpoint="step_00000004", step=4, git_commit=None)
    ExportManifest(
        source=source, dtype="float32", rotary_base=1e6, trained_context_length=8192, advertised_context_length=8192,
        verification=verification, versions={}, exported_at="2026-11-24T14:00:00Z", files={},
    ).write(directory)  # fmt: skip


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _write_data(directory: Path) -> None:
    row_sets = {
        path: {"seq_length": recipe.seq_length, "rows": 310, "tokens": 310 * recipe.seq_length, "documents": 1200,
               "domain": path.split("-")[0], "split": "train"}
        for recipe in RECIPES for path in recipe.mixture
    }  # fmt: skip
    _write_json(
        directory / "manifest.json",
        {"format": 2, "seed": 42, "command": "python scripts/prepare_data.py +exp=data/mini", "row_sets": row_sets},
    )


def _write_run(recipe: Recipe, run: Path, root: Path) -> None:
    number = RECIPES.index(recipe)
    tokens = write_metrics(recipe, run / "metrics.jsonl")
    write_events(recipe, run / "events.jsonl")
    parent = None
    if recipe.transition:
        before = RECIPES[number - 1]
        parent = {"path": str(root / before.stage), "step": before.iters, "transition": recipe.transition}
    _write_json(
        run / "stage.json",
        {
            "format": 1, "name": f"demo/{recipe.stage}", "stage": recipe.stage, "status": "complete", "parent": parent,
            "model": {"name": "mini-llama", "nemo_config": "LlamaConfig", "num_layers": 4, "hidden_size": 256,
                      "ffn_hidden_size": 768, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 32,
                      "vocab_size": 4096, "rotary_base": recipe.rotary_base},
            "seq_length": recipe.seq_length, "trained_context_length": recipe.trained,
            "advertised_context_length": recipe.trained, "rotary_base": recipe.rotary_base,
            "train_iters": recipe.iters, "step": recipe.iters, "consumed_train_rows": recipe.iters * recipe.rows,
            "consumed_train_tokens": tokens, "consumed_target_tokens": tokens - 900,
            "data": {"root": str(root / "data"), "tokenizer": "tokenizer", "manifest_sha256": "ab12" * 16,
                     "mixture": [{"path": p, "proportion": s} for p, s in recipe.mixture.items()]},
            "versions": VERSIONS, "git_commit": "d96a9f3c0ffee", "world_size": 1,
            "started_at": f"2026-11-24T14:{10 * number:02d}:00Z",
            "finished_at": f"2026-11-24T14:{10 * number + 4:02d}:30Z",
            "command": f"scripts/train.py +exp=mini/{recipe.stage}",
        },
    )  # fmt: skip
    config = {
        "train": {"global_batch_size": recipe.rows}, "seed": 42,
        "optim": {"lr": 3e-3 / (number + 1), "min_lr": 1e-4, "lr_warmup_iters": 5, "weight_decay": 0.1},
        "parallelism": {"tensor_model_parallel_size": 1, "num_nodes": 1, "ranks_per_node": 2},
        "precision": {"compute": "fp32", "backend": "torch"},
        "data": {"apply_instruct_masks": recipe.stage == "sft"},
    }  # fmt: skip
    _write_json(run / "config.json", config)


def write_metrics(recipe: Recipe, path: Path) -> int:
    """Write ``metrics.jsonl`` with a noisy falling loss; return the real tokens of the stage."""
    noise = random.Random(recipe.stage)
    row_tokens = recipe.rows * recipe.seq_length
    consumed, records = 0, []
    for step in range(1, recipe.iters + 1):
        real = row_tokens - noise.randrange(row_tokens // 50 + 1)
        consumed += real
        progress = (step - 1) / max(recipe.iters - 1, 1)
        loss = recipe.last + (recipe.first - recipe.last) * math.exp(-5 * progress) + noise.gauss(0, 0.06)
        rate = recipe.tokens_per_second * noise.uniform(0.93, 1.03) * (0.5 if step <= 2 else 1.0)
        records.append(
            {
                "step": step, "loss": loss, "grad_norm": 2.0 - progress, "learning_rate": 1e-3 * (1 - progress),
                "target_tokens": real - recipe.rows, "real_tokens": real, "row_tokens": row_tokens,
                "consumed_train_tokens": consumed, "step_seconds": real / rate, "tokens_per_second": rate,
                "memory_bytes": int((1.3 + 0.1 * RECIPES.index(recipe)) * 2**30), "time": 1.79e9 + step,
                **write_telemetry(recipe, step, loss, real - recipe.rows, real / rate),
            }
        )  # fmt: skip
        if step % (recipe.iters // 4) == 0:
            records.append({"step": step, "val_loss": loss + 0.12, "val_target_tokens": 8000, "time": 1.79e9 + step})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return consumed


def write_telemetry(recipe: Recipe, step: int, loss: float, target_tokens: int, seconds: float) -> dict[str, Any]:
    """Return what a step records besides: earlier positions and the second domain are harder."""
    quarter, share = target_tokens // 4, target_tokens // 3
    length = recipe.seq_length
    positions = {
        f"0-{length // 2 - 1}": (loss + 0.3, quarter),
        f"{length // 2}-{length - 1}": (loss - 0.1, target_tokens - quarter),
    }
    domains = {"code": (loss - 0.2, target_tokens - share), "docs": (loss + 0.4, share)}
    sums = [
        {name: {"loss_sum": mean * tokens, "target_tokens": tokens} for name, (mean, tokens) in groups.items()}
        for groups in (positions, domains)
    ]
    return {
        "loss_by_position": sums[0], "loss_by_domain": sums[1], "data_wait_seconds": 0.02 * seconds,
        "checkpoint_seconds": seconds if step % 10 == 1 and step > 1 else 0.0, "mfu": 0.31,
        "model_flops_per_second_per_rank": 3.07e14, "skipped_steps": int(step >= 15),
    }  # fmt: skip


def write_events(recipe: Recipe, path: Path) -> None:
    """Write ``events.jsonl`` of a run that was stopped once and skipped a step."""
    events = [
        (0, 0, "started", "from scratch, on 1 rank"),
        (10, 10, "checkpoint_saved", "step_00000010: 1.0 MiB in 0.5 s, training waited 0.1 s"),
        (14, 14, "stopped_by_signal", "state saved"),
        (14, 14, "resumed", "from step_00000014, on 1 rank"),
        (15, 15, "step_skipped", "loss is nan"),
        (recipe.iters, recipe.iters, "complete", f"{recipe.iters} of {recipe.iters} steps"),
    ]
    lines = [
        {"time": 1.79e9 + at, "step": step, "event": event, "detail": detail} for at, step, event, detail in events
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_evaluation(recipe: Recipe, directory: Path, model: str, through: str, models: list[str]) -> None:
    settings = {
        "models": models, "output": None, "rows": "runs/demo/data/validation-8192", "position_buckets": BUCKETS,
        "max_documents": 12, "recall_lengths": BUCKETS, "recall_samples": 8, "seed": 42,
    }  # fmt: skip
    identity = {"model": model, "through": through, "seconds": 3.1, "settings": settings}
    buckets, lengths = [], []
    for start, end in zip([0, *BUCKETS], BUCKETS, strict=False):
        beyond = max(0.0, math.log2(end / recipe.trained))
        loss = recipe.last + 0.25 - 0.09 * min(math.log2(end / 512), math.log2(recipe.trained / 512)) + 0.75 * beyond
        buckets.append(
            {"start": start, "end": end, "documents": 12, "tokens": 12 * (end - max(start, 1)), "loss": loss,
             "perplexity": math.exp(loss)}
        )  # fmt: skip
        exact = (
            max(0.0, 0.5 - 0.125 * math.log2(end / 512)) if recipe.trained >= end and recipe.stage != "base" else 0.0
        )
        lengths.append(
            {"length": end, "samples": 8, "exact_match": exact, "token_accuracy": 0.2 + exact / 2,
             "answer_loss": 4.6 - 3.2 * exact + 0.4 * beyond, "chance_loss": 4.552, "answer_tokens": 16}
        )  # fmt: skip
    _write_json(directory / "perplexity.json", {"task": "perplexity", **identity, "data": settings["rows"],
                                                "documents": 12, "buckets": buckets})  # fmt: skip
    _write_json(directory / "recall.json", {"task": "recall", **identity, "lengths": lengths})
