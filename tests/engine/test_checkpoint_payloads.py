"""Nothing in a checkpoint is executed, even when its manifest has been made to match.

Every payload is a pickle that makes a directory when a library unpickles it; the first test shows that it does.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.checkpoint.manifest import CheckpointManifest, checkpoint_directory
from nemo_prolong.records.checkpoint.verify import choose_checkpoint, hash_files, list_files, verify_checkpoint
from nemo_prolong.weights.checkpoint_reader import CheckpointReader
from nemo_prolong.weights.pickles import check_pickles, read_metadata
from tests.support.launches import run_module

PROGRAM = "tests.engine.payload_program"


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The directory that is there when a payload was executed."""
    return tmp_path / "executed"


@pytest.fixture
def checkpoint(one_rank_runs: Path, tmp_path: Path) -> Path:
    """A copy of a real checkpoint."""
    copy = checkpoint_directory(tmp_path / "run", 8)
    shutil.copytree(checkpoint_directory(one_rank_runs / "whole", 8), copy)
    return copy


def seal_again(checkpoint: Path) -> None:
    """Make the manifest match what is there."""
    manifest = CheckpointManifest.read(checkpoint)
    files = hash_files(checkpoint, sorted(list_files(checkpoint)))
    manifest.model_copy(update={"files": files}).write(checkpoint)


def archive(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def metadata_with(checkpoint: Path, change: Callable[[Metadata], None]) -> None:
    content = read_metadata(checkpoint)
    change(content)
    (checkpoint / "weights/.metadata").write_bytes(pickle.dumps(content))


def entry(content: Metadata, objects: bool) -> Any:
    """Return (key, storage information) of the first object or the first model tensor."""
    return next(
        (index.fqn, info)
        for index, info in content.storage_data.items()
        if isinstance(content.state_dict_metadata[index.fqn], BytesStorageMetadata) == objects
        and index.fqn.startswith("module.")
    )


def replace_slot(checkpoint: Path, objects: bool, data: bytes) -> Path:
    """Put ``data`` where an object or a tensor of a shard was, and return the shard."""

    def point_at_the_end(content: Metadata) -> None:
        _, info = entry(content, objects)
        path = checkpoint / "weights" / info.relative_path
        info.offset, info.length = path.stat().st_size, len(data)
        with path.open("ab") as file:
            file.write(data)
        paths.append(path)

    paths: list[Path] = []
    metadata_with(checkpoint, point_at_the_end)
    return paths[0]


def in_common(checkpoint: Path, marker: Path) -> Path:
    path = checkpoint / "weights/common.pt"
    common = torch.load(path, weights_only=True)
    torch.save({**common, "callbacks": Payload(marker)}, path)
    return path


def in_metadata(checkpoint: Path, marker: Path) -> Path:
    metadata_with(checkpoint, lambda content: setattr(content, "planner_data", Payload(marker)))
    return checkpoint / "weights/.metadata"


def as_metadata(checkpoint: Path, marker: Path) -> Path:
    (checkpoint / "weights/.metadata").write_bytes(pickle.dumps(Payload(marker), protocol=0))
    return checkpoint / "weights/.metadata"


def in_object(checkpoint: Path, marker: Path) -> Path:
    return replace_slot(checkpoint, True, archive([Payload(marker)]))


def as_bare_object(checkpoint: Path, marker: Path) -> Path:
    return replace_slot(checkpoint, True, pickle.dumps(Payload(marker)))


def in_extra_state(checkpoint: Path, marker: Path) -> Path:
    """Bytes of a layer that Transformer Engine unpickles after Megatron has handed them over."""
    state = torch.frombuffer(bytearray(pickle.dumps({"recipe": Payload(marker)})), dtype=torch.uint8)
    return replace_slot(checkpoint, True, archive([state]))


def in_tensor_of_extra_state(checkpoint: Path, marker: Path) -> Path:
    """An archive inside a pickle inside a tensor inside an archive: tensors of a pickle are unpickled once more."""

    class Storage:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return torch.storage._load_from_bytes, (archive(Payload(marker)),)

    state = torch.frombuffer(bytearray(pickle.dumps({"scale_fwd": Storage()})), dtype=torch.uint8)
    return replace_slot(checkpoint, True, archive([state]))


SLOTS = [in_common, in_metadata, as_metadata, in_object, as_bare_object, in_extra_state, in_tensor_of_extra_state]


def test_the_payloads_are_executed_by_those_who_unpickle_them(checkpoint: Path, marker: Path) -> None:
    in_metadata(checkpoint, marker)
    pickle.loads((checkpoint / "weights/.metadata").read_bytes())
    assert marker.exists()
    marker.rmdir()
    torch.load(io.BytesIO(archive([Payload(marker)])), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.__name__)
def test_a_payload_is_refused_by_file_and_not_executed(
    checkpoint: Path, marker: Path, slot: Callable[[Path, Path], Path]
) -> None:
    check_pickles(checkpoint)
    path = slot(checkpoint, marker)
    seal_again(checkpoint)
    assert choose_checkpoint(checkpoint.parents[1]).checkpoint == checkpoint
    with pytest.raises(CheckpointError) as refusal:
        check_pickles(checkpoint)
    assert not marker.exists()
    assert refusal.value.what == str(path)
    expected = "it holds posix.mkdir, which no checkpoint of this software holds."
    if slot is as_bare_object:
        expected = "it holds a bare pickle, which no checkpoint of this software holds."
    assert refusal.value.rule == expected


@pytest.fixture(scope="module")
def continued(
    one_rank_runs: Path, make_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What two ranks did with a payload in each slot, put there after the checkpoint had been verified."""
    directory, cases, paths = tmp_path_factory.mktemp("continued"), [], {}
    config = make_config(name="payloads", train={"train_iters": 10})
    roles = [("resume", slot) for slot in SLOTS] + [("parent_checkpoint", in_common), ("parent_checkpoint", in_object)]
    for role, slot in roles:
        name = f"{role}_{slot.__name__}"
        checkpoint = checkpoint_directory(directory / name, 8)
        shutil.copytree(checkpoint_directory(one_rank_runs / "whole", 8), checkpoint)
        verify_checkpoint(checkpoint)
        paths[name] = str(slot(checkpoint, directory / f"{name}.executed"))
        case = {"name": name, "config": config.model_dump(mode="json"), "resume": None, "parent_checkpoint": None}
        cases.append({**case, role: str(checkpoint)})
    (directory / "cases.json").write_text(json.dumps(cases))
    run_module(PROGRAM, str(directory / "cases.json"), str(directory / "statuses.json"))
    return {"directory": directory, "paths": paths, "statuses": json.loads((directory / "statuses.json").read_text())}


@pytest.mark.distributed
def test_all_ranks_refuse_a_payload_put_in_after_the_verification(
    continued: dict[str, Any],
) -> None:
    directory, refused = continued["directory"], [CheckpointError.exit_code] * 2
    assert continued["statuses"] == dict.fromkeys(continued["paths"], refused) and len(continued["paths"]) == 9
    for name, path in continued["paths"].items():
        assert not (directory / f"{name}.executed").exists()
        held = "a bare pickle" if "bare" in name else "posix.mkdir"
        for rank in range(2):
            message = (directory / f"{name}.rank{rank}.log").read_text()
            assert f"{path}: it holds {held}, which no checkpoint of this software holds." in message


def test_a_payload_instead_of_a_tensor_is_not_executed(checkpoint: Path, marker: Path) -> None:
    replace_slot(checkpoint, False, archive(Payload(marker)))
    key, _ = entry(read_metadata(checkpoint), False)
    reader = CheckpointReader(checkpoint)
    with pytest.raises(CheckpointError, match="the checkpoint does not hold all of"):
        reader.read(key.removeprefix(reader.wrapper_prefix))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["context/io.json", "context/model.yaml", "weights/modelopt_state/common.pt"])
def test_a_file_that_nemo_would_open_by_its_name_is_refused(checkpoint: Path, marker: Path, name: str) -> None:
    (checkpoint / name).parent.mkdir()
    (checkpoint / name).write_bytes(pickle.dumps(Payload(marker)))
    seal_again(checkpoint)
    with pytest.raises(CheckpointError, match="foreign: no checkpoint of this software has such a file"):
        choose_checkpoint(checkpoint.parents[1])
    assert not marker.exists()


@pytest.mark.parametrize("target", ["../../outside.distcp", "/etc/hostname", "common.pt"])
def test_metadata_that_points_out_of_the_shards_is_refused(checkpoint: Path, target: str) -> None:
    metadata_with(checkpoint, lambda content: setattr(entry(content, True)[1], "relative_path", target))
    with pytest.raises(CheckpointError, match=f"it points at {target}"):
        check_pickles(checkpoint)


def test_a_scaling_state_of_transformer_engine_is_accepted(checkpoint: Path) -> None:
    pickled = pickle.dumps({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}})
    replace_slot(checkpoint, True, archive([torch.frombuffer(bytearray(pickled), dtype=torch.uint8)]))
    check_pickles(checkpoint)


@pytest.mark.parametrize("name", ["weights/.metadata", "weights/common.pt"])
def test_a_damaged_or_missing_pickle_is_refused_as_unreadable(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:200])
    with pytest.raises(CheckpointError, match=f"{name}: it cannot be read"):
        check_pickles(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: it cannot be read \(\[Errno 2\]"):
        check_pickles(checkpoint)
