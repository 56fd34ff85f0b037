"""Values and words survive Hydra's command line and the shell, whatever they are made of."""

from __future__ import annotations

import doctest
import shlex
import subprocess
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_prolong.config import commands
from nemo_prolong.config.commands import hydra_override, hydra_value, shell_command, shell_word, train_command, typed
from nemo_prolong.config.compose import Request
from nemo_prolong.config.schema import RunConfig

NASTY = [
    "a b", "a,b", "{a:b}", "[a]", "a=b", "a'b", 'a"b', "a\\", "a\\'", "\\", "${x}", "\\${x}", "\\\\${x}", "$HOME",
    "`id`", "a\nb", "a\tb", "-n", "--x", "007", "1e5", "0x10", "true", "null", "NaN", "\u00e9",
    "\u65e5\u672c", "a#b", "a%20b",
    "s3://b/a b%2F", "a:b", "hf:dir/x", "a:", ":a", "a:1", "04:00:00", "a:null", "!a", "*", "~", "(x)",
    "choice(a,b)", "", " a", "a ", "\x1b[31m", "${oc.env:HOME}", "a${", "?", "+5", "1_000",
    "'${x}'", "\\'${x}", "1.0", "inf", "a;b", "a&b", "a|b", "\u202e", "\x85",
]  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
PIECES = st.lists(st.sampled_from([*NASTY, "'", '"', "\\", "${", "}", "$", ",", " ", "x"]), max_size=5).map("".join)


def read_back(override: str) -> Any:
    """Return what Hydra and OmegaConf make of an override."""
    parsed = OverridesParser.create().parse_override(override)
    return OmegaConf.to_container(OmegaConf.create({"key": parsed.value()}), resolve=True)["key"]


@pytest.mark.parametrize("text", NASTY)
def test_hydra_reads_a_text_back(text: str) -> None:
    assert read_back(hydra_override("key", text)) == text


@given(text=TEXTS | PIECES)
@settings(max_examples=400, deadline=None)
def test_hydra_reads_any_text_back(text: str) -> None:
    # OmegaConf takes it for a missing value, however it is quoted.
    assume(text != "???")
    assert read_back(hydra_override("key", text)) == text
    assert read_back(hydra_override("key", [text, {"path": [text]}])) == [text, {"path": [text]}]


@pytest.mark.parametrize("value", [None, True, 7, -1.5, 1e-30, [], ["a, b", 1, None, True], {"a": "b c", "d": [1]}])
def test_hydra_reads_other_values_back(value: Any) -> None:
    assert read_back(hydra_override("key", value)) == value


def test_plain_text_stays_as_it_is_typed() -> None:
    assert [hydra_value(text) for text in ("runs/stage1", "mini-llama", "a.b_c")] == [
        "runs/stage1",
        "mini-llama",
        "a.b_c",
    ]


def test_bash_reads_words_back() -> None:
    words = [typed("key", text) for text in NASTY] + [shell_word(text) for text in NASTY]
    assert not any(character in word for word in words for character in "\n\x1b\x85")
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {' '.join(words)}"], capture_output=True, check=True)
    expected = [hydra_override("key", text) for text in NASTY] + NASTY
    assert printed.stdout.decode().split("\0")[:-1] == expected


@given(words=st.lists(TEXTS.filter(lambda text: text.isprintable()), min_size=1, max_size=4))
def test_a_command_is_split_into_its_words(words: list[str]) -> None:
    assert shlex.split(shell_command(words)) == words


def test_a_command_to_train_quotes_what_was_typed() -> None:
    overrides = ["+exp=stage2", "parent='a b'"]
    assert shlex.split(train_command(overrides, 8, 2))[-2:] == overrides


@pytest.mark.parametrize(
    "text", ["a b", "a,b", "{a:b}", "it's", 'a"b', "\\", "${x}", "$HOME", "007", "-n", "\u65e5\u672c"]
)
def test_a_printed_command_composes_to_what_was_typed(text: str) -> None:
    typed_overrides = ["+exp=mini/stage1", hydra_override("parent", f"parents/{text}"), hydra_override("name", text)]
    words = shlex.split(train_command(typed_overrides))
    cfg, overrides = Request.of(RunConfig, "train", get_args_parser().parse_args(words[2:])).load()
    assert (cfg.parent, cfg.name) == (f"parents/{text}", text)
    assert overrides == typed_overrides


def test_the_examples_of_the_module_are_right() -> None:
    assert doctest.testmod(commands).failed == 0
