"""What the export tests share: models of any shape, the runs of the session, configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from nemo_prolong.config.schema import ExportConfig, ModelConfig
from nemo_prolong.records.evaluation import Bucket, PerplexityResult, RecallEntry, RecallResult, write_result
from nemo_prolong.records.export_manifest import ExportedFile, ExportManifest, SourceRecord
from tests.support.tiny import VOCAB_SIZE

TOKENIZER_TEXT = ["def add(first, second):\n    return first + second\n", "A document about the number 12345.\n"]


@dataclass(frozen=True)
class Workspace:
    """Where the runs lie.

    Attributes:
        root: Directory that holds them.
        base: fp32, trained from scratch; advertises 4K.
        child: Continues ``base`` with another RoPE base; advertises 512K.
        tied: bf16, with a tied LM head and a padded vocabulary.
    """

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def child(self) -> Path:
        return self.root / "child"

    @property
    def tied(self) -> Path:
        return self.root / "tied"


def export_config(run: Path, output: Path, **changes: Any) -> ExportConfig:
    """Return an fp32 export in several shards; ``changes`` replace fields."""
    values = {"run": str(run), "output": str(output), "dtype": "fp32", "max_shard_bytes": 100_000, **changes}
    return ExportConfig(**values)


def make_export_manifest(*files: str, **changes: Any) -> ExportManifest:
    """Return the manifest of an export that was not verified; ``changes`` replace fields."""
    values: dict[str, Any] = {
        "source": SourceRecord(
            run="runs/sft", name="sft", stage="sft", checkpoint="step_00000004", step=4, git_commit=None
        ),
        "dtype": "float32",
        "rotary_base": 1e4,
        "trained_context_length": 64,
        "advertised_context_length": 64,
        "verification": None,
        "versions": {},
        "exported_at": "2026-11-24T14:00:00Z",
        "files": {name: ExportedFile(sha256="0" * 64, num_bytes=1) for name in files},
    }
    return ExportManifest(**{**values, **changes})


def write_perplexity(directory: Path) -> None:
    """Write a result with one bucket that no document reaches."""
    buckets = [
        Bucket(start=0, end=512, documents=2, tokens=600, loss=4.0, perplexity=54.6),
        Bucket(start=512, end=2048, documents=0, tokens=0, loss=None, perplexity=None),
    ]
    result = PerplexityResult(
        model="runs/sft", backend="megatron", data="data/validation", documents=2, buckets=buckets, seconds=1.0
    )
    write_result(directory, result)


def write_recall(directory: Path) -> None:
    entry = RecallEntry(length=512, samples=8, exact_match=0.25, token_accuracy=0.5, answer_loss=3.217)
    write_result(directory, RecallResult(model="runs/sft", backend="megatron", lengths=[entry], seconds=1.0))


def make_model(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "name": "test",
        "nemo_config": "LlamaConfig",
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 100,
        "rotary_base": 1e4,
    }
    return ModelConfig(**{**values, **changes})


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.integers(1, 4))
    return make_model(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 4)),
        kv_channels=draw(st.integers(1, 6)),
        vocab_size=draw(st.integers(1, 40)),
        share_embeddings_and_output_weights=draw(st.booleans()),
    )


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with Llama-3's special tokens and exactly ``VOCAB_SIZE`` tokens."""
    from nemo_prolong.data.tokenizer import train_tokenizer

    # Enough different words for every merge asked for.
    words = " ".join(f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst")
    train_tokenizer([*TOKENIZER_TEXT, words], VOCAB_SIZE, directory)
