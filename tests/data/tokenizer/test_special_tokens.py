"""The named special tokens are those that transformers gives to chat templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_prolong.data.tokenizer import TextEncoder

BOS, EOS, OTHER = "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"
DECODER = {"2": {"content": EOS, "special": True, "normalized": False}}


@pytest.mark.parametrize(
    ("config", "special_tokens_map"),
    [
        ({}, None),
        ({"bos_token": BOS, "eos_token": EOS}, None),
        ({"bos_token": {"__type": "AddedToken", "content": BOS, "special": True}}, None),
        ({}, {"bos_token": BOS, "eos_token": {"content": EOS, "lstrip": False}}),
        ({"bos_token": OTHER, "pad_token": OTHER}, {"bos_token": BOS}),
        ({"bos_token": OTHER, "added_tokens_decoder": DECODER}, {"bos_token": BOS, "pad_token": BOS}),
        ({"added_tokens_decoder": {}}, {"bos_token": BOS}),
        ({"sep_token": BOS, "cls_token": EOS, "mask_token": OTHER, "unk_token": EOS}, None),
        ({"additional_special_tokens": [BOS]}, {"additional_special_tokens": [EOS, {"content": BOS}]}),
        ({"bos_token": None, "additional_special_tokens": []}, {"eos_token": EOS}),
        ({"extra_special_tokens": {"image_token": OTHER}}, None),
    ],
)
def test_special_tokens_are_named_as_transformers_names_them(
    tokenizer_directory: Path, tmp_path: Path, config: dict[str, Any], special_tokens_map: dict[str, Any] | None
) -> None:
    shutil.copy(tokenizer_directory / "tokenizer.json", tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if special_tokens_map is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    theirs = AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    ours = TextEncoder(tmp_path).named_tokens
    for named in (ours, theirs):
        named["additional_special_tokens"] = sorted({*map(str, named.get("additional_special_tokens", ()))})
    assert ours == theirs
