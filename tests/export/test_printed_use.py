"""How an export is used is printed so that it can be pasted, whatever its path is made of."""

from __future__ import annotations

import shlex

import pytest

from nemo_prolong.config.schema import ExportConfig
from nemo_prolong.export.run import _use

OUTPUT = "exports/it\"s a 'model'"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"format": "trtllm_engine_checkpoint"},
            ["trtllm-build", "--checkpoint_dir", OUTPUT, "--output_dir", "ENGINES"],
        ),
        ({"format": "vllm"}, ["bash", f"{OUTPUT}/serve.sh"]),
    ],
)
def test_commands_of_a_server_are_words_of_the_shell(settings: dict[str, str], words: list[str]) -> None:
    printed = _use(ExportConfig(run="runs/sft", output=OUTPUT, dtype="bf16", export=settings))
    assert shlex.split(printed.partition("\n")[2]) == words


def test_the_call_of_transformers_is_python() -> None:
    loaded: list[str] = []

    class Loader:
        from_pretrained = staticmethod(loaded.append)

    printed = _use(ExportConfig(run="runs/sft", output=OUTPUT))
    eval(printed.partition("\n")[2].strip(), {"AutoModelForCausalLM": Loader, "AutoTokenizer": Loader})
    assert loaded == [OUTPUT, OUTPUT]
