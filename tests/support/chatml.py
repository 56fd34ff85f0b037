"""A tokenizer with ChatML's special tokens, data of conversations in that format, and stages that train on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema.prepare import PrepareConfig
from tests.support.export_tools import write_tokenizer
from tests.support.tiny import SEQ_LENGTH

TRAINING_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content ~ '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_NAMES = {
    "<|begin_of_text|>": "<|endoftext|>",
    "<|end_of_text|>": "<|reserved_special_token_11|>",
    "<|start_header_id|>": "<|im_start|>",
    "<|eot_id|>": "<|im_end|>",
}


def write_chatml_tokenizer(directory: Path) -> Path:
    """Write a tokenizer of ``VOCAB_SIZE`` tokens, ChatML's among them, without a chat template."""
    write_tokenizer(directory)
    text = (directory / "tokenizer.json").read_text("utf-8")
    for old, new in _NAMES.items():
        text = text.replace(old, new)
    (directory / "tokenizer.json").write_text(text, "utf-8")
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **names}))
    (directory / "chat_template.jinja").unlink()
    (directory / "special_tokens_map.json").unlink()
    return directory


def token_ids(directory: Path) -> dict[str, int]:
    """Return the ids of the added tokens of a tokenizer."""
    definition = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    return {token["content"]: token["id"] for token in definition["added_tokens"]}


def write_talks(path: Path, number: int = 48) -> Path:
    """Write short conversations as JSON lines."""
    talks = [
        [{"role": "user", "content": f"add {n} and {n}"}, {"role": "assistant", "content": f"{n + n}."}]
        for n in range(number)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


def chat_data_config(
    output: Path, tokenizer: Path, template: Path | None, talks: Path, **changes: Any
) -> PrepareConfig:
    """Return the preparation of conversations into rows of ``SEQ_LENGTH`` tokens; ``changes`` replace keys."""
    values: dict[str, Any] = {
        "output": str(output),
        "sources": [{"domain": "chat", "path": str(talks), "messages_field": "messages"}],
        "tokenizer": {"path": str(tokenizer), "chat_template": template and str(template)},
        "row_sets": [{"path": "rows", "domain": "chat", "seq_length": SEQ_LENGTH}],
        "workers": 1,
    }
    return PrepareConfig(**{**values, **changes})


def chat_entry(template: Path | None, tokenizer: Path, end_of_turn: str = "<|im_end|>") -> dict[str, Any]:
    """Return ``chat`` of a data manifest whose conversations end a turn with one token."""
    return {
        "template": template and str(template),
        "template_sha256": "0" * 64,
        "end_of_turn": [end_of_turn],
        "end_of_turn_ids": [token_ids(tokenizer)[end_of_turn]],
    }


def name_chat(data: Path, **chat: Any) -> None:
    """Write ``chat`` into the manifest of a data directory."""
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, "chat": chat}))
