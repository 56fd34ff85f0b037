"""The JSON files of a Hugging Face directory: ``config.json``, ``generation_config.json`` and the tokenizer's.

The context a model claims and its RoPE base come from the stage manifest and the checkpoint, never from a default:
with the base lost a model still answers short prompts and writes noise after long ones.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.data.tokenizer import loading
from nemo_prolong.data.tokenizer.generation_tags import without_generation_tags
from nemo_prolong.data.tokenizer.saved import MAP_FILE, TEMPLATE_FILE, SavedTokenizer, missing_names, too_many_tokens
from nemo_prolong.errors import ExportError
from nemo_prolong.export.source import ExportSource
from nemo_prolong.files import write_json_atomically, write_text_atomically
from nemo_prolong.records.stage_manifest import MANIFEST_FILE

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
"""Copied as they are, unless one is in words that transformers 4 does not understand."""
CHAT_TEMPLATE_FILE = TEMPLATE_FILE


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokenizer that the configuration repeats.

    Attributes:
        bos_id: Beginning of a document.
        eos_id: End of a document.
        pad_id: Padding, or None.
        stop_ids: Every id that ends a generation.
        stop_tokens: The tokens of ``stop_ids``.
    """

    bos_id: int
    eos_id: int
    pad_id: int | None
    stop_ids: tuple[int, ...]
    stop_tokens: tuple[str, ...]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer without running code from its directory.

    Raises:
        ExportError: If there is none, or it cannot be loaded.
    """
    try:
        return loading.load_tokenizer(directory)
    # A broken tokenizer.json makes the tokenizers library raise a bare Exception.
    except Exception as error:
        raise ExportError(
            f"tokenizer={directory}",
            f"transformers cannot load the tokenizer that the model was trained with: {error}",
            "Restore the data directory, or prepare it again with the same configuration.",
        ) from error


def special_tokens(source: ExportSource, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Return the ids for the configuration.

    Generation ends where the run says it does, and at the end that the tokenizer names.

    Raises:
        ExportError: If the tokenizer has no beginning or end, or ids that the model has not, or not those of the run.
    """
    what, vocab_size = f"tokenizer={tokenizer.name_or_path}", source.model.vocab_size
    excess = too_many_tokens(len(tokenizer), vocab_size)
    if excess is not None:
        raise ExportError(what, excess, "Restore the tokenizer that the run was trained with.")
    problem = missing_names(tokenizer.bos_token, tokenizer.eos_token, tokenizer.name_or_path)
    if problem is not None:
        raise ExportError(what, *problem)
    stop_ids = tuple(dict.fromkeys([*source.stop_token_ids, tokenizer.eos_token_id]))
    unknown = [token for token in stop_ids if not 0 <= token < len(tokenizer)]
    if unknown:
        raise ExportError(
            what,
            f"has no token {unknown[0]}, and {source.run_dir / MANIFEST_FILE} names it as one that ends a text.",
            "Restore the tokenizer that the run was trained with.",
        )
    return SpecialTokens(
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        stop_ids=stop_ids,
        stop_tokens=tuple(map(str, tokenizer.convert_ids_to_tokens(list(stop_ids)))),
    )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template that is exported: the tokenizer's, without marks of what is trained on.

    One of a tokenizer with several templates is in ``tokenizer_config.json`` only.
    """
    template = tokenizer.chat_template
    return without_generation_tags(template) if isinstance(template, str) else None


def model_config(source: ExportSource, special: SpecialTokens, dtype: torch.dtype) -> dict[str, Any]:
    """Return ``config.json``, in the words of transformers 4 and 5 at once."""
    model = source.model
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": model.layernorm_epsilon,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "max_position_embeddings": source.manifest.advertised_context_length,
        # transformers 4 and most servers read the first, transformers 5 reads the second.
        "rope_theta": model.rotary_base,
        "rope_parameters": {**_rope_scaling(model), "rope_theta": model.rotary_base},
        "rope_scaling": _rope_scaling(model) if model.rope_scaling else None,
        "bos_token_id": special.bos_id,
        "eos_token_id": special.eos_id,
        "pad_token_id": special.pad_id,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
        "use_cache": True,
        "transformers_version": transformers.__version__,
    }


def _rope_scaling(model: ModelConfig) -> dict[str, Any]:
    """Return the scaling of RoPE in the words of Hugging Face."""
    if model.rope_scaling is None:
        return {"rope_type": "default"}
    return {"rope_type": "llama3", **model.rope_scaling.model_dump()}


def generation_config(special: SpecialTokens) -> dict[str, Any]:
    """Return ``generation_config.json``: generation stops at every one of the stop ids.

    Temperature and other choices of how to sample are not taken from a parent. They were made for its weights, and
    servers follow them without being asked.
    """
    config = {
        "bos_token_id": special.bos_id,
        "eos_token_id": list(special.stop_ids),
        "transformers_version": transformers.__version__,
    }
    return config if special.pad_id is None else {**config, "pad_token_id": special.pad_id}


def tokenizer_config(source: ExportSource, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return ``tokenizer_config.json``: the source's, with the context length and the chat template."""
    config = dict(SavedTokenizer.read(source.tokenizer).config)
    config["model_max_length"] = source.manifest.advertised_context_length
    if (template := chat_template(tokenizer)) is not None:
        # Older servers know only this place, transformers writes only a file of its own.
        config["chat_template"] = template
    return config


def configuration_files(
    source: ExportSource, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Return the content of every JSON file that is made for the export.

    Raises:
        ExportError: If the tokenizer does not fit the model.
    """
    special = special_tokens(source, tokenizer)
    return {
        "config.json": model_config(source, special, dtype),
        "generation_config.json": generation_config(special),
        TOKENIZER_CONFIG_FILE: tokenizer_config(source, tokenizer),
        **_translated_map(source.tokenizer),
    }


def _translated_map(tokenizer: Path) -> dict[str, dict[str, Any]]:
    """Return ``special_tokens_map.json`` if transformers 5 wrote it, else nothing: it is copied."""
    saved = SavedTokenizer.read(tokenizer)
    return {MAP_FILE: saved.special_tokens_map} if saved.translated and (tokenizer / MAP_FILE).is_file() else {}


def copied_files(source: ExportSource) -> list[str]:
    """Return the names of the tokenizer's files that are copied as they are."""
    translated = _translated_map(source.tokenizer)
    return [name for name in TOKENIZER_FILES if (source.tokenizer / name).is_file() and name not in translated]


def write_configuration(
    source: ExportSource, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype
) -> None:
    """Write configuration and tokenizer into ``directory``.

    Raises:
        ExportError: If the tokenizer does not fit the model.
    """
    for name, content in configuration_files(source, tokenizer, dtype).items():
        write_json_atomically(directory / name, content)
    for name in copied_files(source):
        shutil.copyfile(source.tokenizer / name, directory / name)
    if (template := chat_template(tokenizer)) is not None:
        write_text_atomically(directory / CHAT_TEMPLATE_FILE, template)
