"""``scripts/prepare_data.py`` from the command line: a mixed folder in, a data directory with its card out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.mixed import ROW_SETS

REPOSITORY = Path(__file__).parents[3]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "prepare_data.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_mixed_folder_becomes_data_with_a_card(
    mixed_sources: list[dict[str, Any]], tokenizer_directory: Path, tmp_path: Path
) -> None:
    experiment = {
        "sources": mixed_sources,
        "row_sets": ROW_SETS,
        "tokenizer": {"path": str(tokenizer_directory)},
        "validation_fraction": 0.3,
        "shuffle": True,
    }
    path = tmp_path / "conf" / "exp" / "data" / "mixed.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\n" + yaml.safe_dump(experiment, allow_unicode=True))
    done = run_script(
        "--config-dir", str(tmp_path / "conf"), "+exp=data/mixed", f"output={tmp_path / 'data'}", "workers=2"
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert set(manifest["row_sets"]) == {row_set["path"] for row_set in ROW_SETS}
    assert manifest["command"].endswith("+exp=data/mixed")
    assert "workers" not in manifest["command"] and "output" not in manifest["command"]
    card = (tmp_path / "data" / "card.html").read_text()
    assert "web-fit-512" in card and "<svg" in card
    assert "books" in (tmp_path / "data" / "card.md").read_text()
    assert "packed web-128: " in done.stderr and "Traceback" not in done.stderr


def test_a_bad_line_ends_the_script_with_one_message(tokenizer_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    done = run_script(
        f"sources=[{{domain:d,path:{tmp_path}/bad.jsonl}}]", "row_sets=[{path:r,domain:d,seq_length:16}]",
        f"tokenizer.path={tokenizer_directory}", f"output={tmp_path / 'data'}",
    )  # fmt: skip
    assert done.returncode == 3
    assert f"{tmp_path}/bad.jsonl:2" in done.stderr or "bad.jsonl:2" in done.stderr
    assert "on_bad_document=drop" in done.stderr and "Traceback" not in done.stderr
