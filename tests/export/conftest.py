"""Tiny stages trained once per session through NeMo, with a real tokenizer, and one export of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.export_tools import Workspace, export_config, write_tokenizer
from tests.support.hf_llama import write_llama
from tests.support.tiny import tiny_config, write_data


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("export")
    write_data(root / "data")
    (root / "data" / "tokenizer" / "tokenizer.json").unlink()
    write_tokenizer(root / "data" / "tokenizer")

    from nemo_prolong.stages.run import run_stage

    def stage(name: str, **changes: Any) -> None:
        run_stage(tiny_config(root / "data", root, name=name, **changes), [])

    # Long enough for sharp attention: a model that hardly uses positions would hide a wrong RoPE base.
    stage("base", train={"train_iters": 16}, advertised_context_length=4096)
    stage(
        "child",
        stage="stage2",
        parent=str(root / "base"),
        transition="weights_and_optimizer",
        model={"rotary_base": 80000.0, "license": "Apache-2.0"},
        train={"train_iters": 4},
        advertised_context_length=2**19,
    )
    tied = {"share_embeddings_and_output_weights": True, "make_vocab_size_divisible_by": 384}
    stage("tied", model=tied, precision={"compute": "bf16"}, train={"train_iters": 2})
    return Workspace(root)


@pytest.fixture(scope="session")
def exported(workspace: Workspace) -> Path:
    """The verified fp32 export of ``child``; tests only read it."""
    from nemo_prolong.export.run import export

    output = workspace.root / "exported"
    export(export_config(workspace.child, output))
    return output


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Hugging Face directory of a small Llama in two shards."""
    return write_llama(tmp_path)
