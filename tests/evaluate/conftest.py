"""A tiny random Llama with a tokenizer of its own, saved as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_prolong.data.mds import MdsWriter

BOS = "<|begin_of_text|>"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens: the worst case for the length of keys and values."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(['{"name": "value", "key": "1234"} def function(x): return the value'] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS)


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two layers of random weights and the tokenizer, as safetensors."""
    directory = tmp_path_factory.mktemp("model") / "hf"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Weights large enough that losses differ between positions.
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def rows() -> list[dict[str, np.ndarray]]:
    """Three packed rows: one document of 64 tokens; three documents, one of them a single token; one of 50 tokens."""
    random = np.random.default_rng(1)
    spans = [[[0, 64]], [[0, 20], [20, 21], [21, 64]], [[0, 50]]]
    return [
        {
            "input_ids": random.integers(0, 290, span[-1][1]).astype(np.uint32),
            "indices": np.array(span, dtype=np.uint32),
        }
        for span in spans
    ]


@pytest.fixture
def data_directory(tmp_path: Path, rows: list[dict[str, np.ndarray]]) -> Path:
    """The same rows as an MDS directory."""
    directory = tmp_path / "validation"
    columns = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "int"}
    with MdsWriter(directory, columns) as writer:
        for row in rows:
            writer.write({**row, "domain": "reference", "length": len(row["input_ids"])})
    return directory
