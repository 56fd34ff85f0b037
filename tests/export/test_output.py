"""What may be replaced, and that nothing half-written ever has the output's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_prolong.errors import ExportError
from nemo_prolong.export.output import check_output, working_directory
from tests.support.export_tools import make_export_manifest


def earlier_export(output: Path) -> Path:
    output.mkdir()
    (output / "config.json").write_text("old")
    make_export_manifest("config.json").write(output)
    return output


def test_a_new_or_empty_output_is_taken(tmp_path: Path) -> None:
    check_output(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=False)


def test_an_existing_output_is_refused_with_what_replaces_it(tmp_path: Path) -> None:
    output = earlier_export(tmp_path / "hf")
    with pytest.raises(ExportError, match=r"output=.*hf: it already exists\. Set overwrite=true"):
        check_output(output, overwrite=False)
    check_output(output, overwrite=True)


FOREIGN = json.dumps({**make_export_manifest().model_dump(), "software": "other"})


@pytest.mark.parametrize("manifest", [None, "{", "[]", FOREIGN, '{"software": "nemo_prolong", "files": {}}'])
def test_what_is_no_earlier_export_is_never_replaced(tmp_path: Path, manifest: str | None) -> None:
    output = tmp_path / "hf"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (output / "export_manifest.json").write_text(manifest)
    with pytest.raises(ExportError, match="is not an export of this software, so it is not replaced"):
        check_output(output, overwrite=True)


def test_a_file_or_a_link_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(earlier_export(tmp_path / "hf"))
    for name in ("file", "link"):
        with pytest.raises(ExportError, match="is not an export of this software"):
            check_output(tmp_path / name, overwrite=True)


def test_foreign_files_in_an_earlier_export_are_not_lost(tmp_path: Path) -> None:
    output = earlier_export(tmp_path / "hf")
    (output / "notes.md").write_text("mine")
    with pytest.raises(ExportError, match=r"did not write: notes\.md\. Move them out"):
        check_output(output, overwrite=True)


def test_the_output_appears_whole_and_replaces_the_earlier_one(tmp_path: Path) -> None:
    output = earlier_export(tmp_path / "hf")
    with working_directory(output) as directory:
        (directory / "config.json").write_text("new")
        assert (output / "config.json").read_text() == "old"
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert (output / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_export_leaves_the_earlier_one(tmp_path: Path, error: type[BaseException]) -> None:
    output = earlier_export(tmp_path / "hf")
    with pytest.raises(error), working_directory(output) as directory:
        (directory / "config.json").write_text("half")
        raise error
    assert (output / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".hf.exporting").mkdir()
    (tmp_path / ".hf.exporting" / "model-00001-of-00002.safetensors").write_text("half")
    with working_directory(tmp_path / "hf") as directory:
        assert not list(directory.iterdir())
        (directory / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_earlier_export_survives_a_kill_between_renames(tmp_path: Path) -> None:
    earlier_export(tmp_path / "hf").rename(tmp_path / ".hf.replaced")
    with pytest.raises(RuntimeError), working_directory(tmp_path / "hf"):
        raise RuntimeError
    assert (tmp_path / "hf" / "config.json").read_text() == "old"
