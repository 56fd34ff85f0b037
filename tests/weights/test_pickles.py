"""What is in a checkpoint is looked at before a library unpickles it, and refused by file and class."""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from nemo_prolong.errors import CheckpointError
from nemo_prolong.weights import pickles
from nemo_prolong.weights.pickles import check_pickles, read_metadata
from tests.weights.conftest import TENSORS

REMEDY = "Do not open this checkpoint with anything else; use one that this software wrote on your machines."


class Payload:
    """A class that no checkpoint holds."""


FOREIGN = f"{Payload.__module__}.Payload"


def archive(value: Any) -> bytes:
    """Return a torch archive."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def refusal_of(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_pickles(checkpoint)
    return str(caught.value)


def holds(path: Path, name: str) -> str:
    return f"{path}: it holds {name}, which no checkpoint of this software holds. {REMEDY}"


@pytest.fixture
def checkpoint(write_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with tensors, an object and an extra state."""
    (state, *_) = extra_states(pickle.dumps(collections.OrderedDict(a=1)))
    plain = {"seed": 1, "tensor": torch.ones(2)}
    return write_checkpoint({**TENSORS, "rng_state/shard_0": plain, "layer._extra_state/shard_0": state})


def shard_of(checkpoint: Path) -> Path:
    (shard,) = (checkpoint / "weights").glob("*.distcp")
    return shard


def change_metadata(checkpoint: Path, change: Callable[[Metadata], Metadata | None]) -> None:
    path = checkpoint / "weights" / ".metadata"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(content) or content))


def test_a_checkpoint_as_it_was_written_passes(checkpoint: Path) -> None:
    check_pickles(checkpoint)
    assert set(read_metadata(checkpoint).state_dict_metadata) == {
        *TENSORS,
        "rng_state/shard_0",
        "layer._extra_state/shard_0",
    }


def test_every_dtype_of_torch_may_be_in_the_metadata(write_checkpoint: Callable[..., Path]) -> None:
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
    entries = {str(dtype): torch.ones(2, dtype=dtype) for dtype in dtypes}
    check_pickles(write_checkpoint(entries))


def test_megatrons_classes_of_the_metadata_are_read_as_torchs() -> None:
    module = "megatron.core.dist_checkpointing.strategies.torch"
    text = f"c{module}\nMCoreMetadata\n.".encode()
    assert pickles._MetadataUnpickler(io.BytesIO(text)).load() is Metadata
    plan = f"c{module}\nMCoreSavePlan\n.".encode()
    assert pickles._MetadataUnpickler(io.BytesIO(plan)).load() is torch.distributed.checkpoint.SavePlan


def test_a_foreign_class_in_the_metadata_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "weights" / ".metadata"
    path.write_bytes(pickle.dumps(Payload()))
    assert refusal_of(checkpoint) == holds(path, FOREIGN)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}])
def test_metadata_of_another_kind_is_refused(content: Any, checkpoint: Path) -> None:
    path = checkpoint / "weights" / ".metadata"
    path.write_bytes(pickle.dumps(content))
    assert refusal_of(checkpoint) == holds(path, type(content).__name__)


def test_metadata_without_a_list_of_what_is_where_is_refused(checkpoint: Path) -> None:
    change_metadata(checkpoint, lambda content: dataclasses.replace(content, storage_data=None))
    assert refusal_of(checkpoint) == holds(checkpoint / "weights" / ".metadata", "Metadata")


def test_metadata_that_is_damaged_cannot_be_read(checkpoint: Path) -> None:
    path = checkpoint / "weights" / ".metadata"
    path.write_bytes(b"")
    assert refusal_of(checkpoint) == f"{path}: it cannot be read (Ran out of input). Use another checkpoint."
    path.unlink()
    reason = f"[Errno 2] No such file or directory: '{path}'"
    assert refusal_of(checkpoint) == f"{path}: it cannot be read ({reason[:200]}). Use another checkpoint."


def test_a_common_file_with_a_foreign_class_is_refused(write_checkpoint: Callable[..., Path]) -> None:
    checkpoint = write_checkpoint(TENSORS, common={"args": Payload()})
    assert refusal_of(checkpoint) == holds(checkpoint / "weights" / "common.pt", FOREIGN)


def test_a_common_file_that_is_missing_or_damaged_cannot_be_read(checkpoint: Path) -> None:
    path = checkpoint / "weights" / "common.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    message = refusal_of(checkpoint)
    assert message.startswith(f"{path}: it cannot be read (PytorchStreamReader failed")
    assert message.endswith("). Use another checkpoint.")
    path.unlink()
    reason = f"[Errno 2] No such file or directory: '{path}'"
    assert refusal_of(checkpoint) == f"{path}: it cannot be read ({reason[:200]}). Use another checkpoint."


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_what_is_no_tensor_and_no_plain_value_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "weights" / "common.pt"
    torch.save({"iteration": 2}, path, pickle_protocol=4)
    assert refusal_of(checkpoint) == holds(path, "something else than tensors and plain values")


def test_a_foreign_class_in_an_object_of_a_shard_is_refused(write_checkpoint: Callable[..., Path]) -> None:
    checkpoint = write_checkpoint({**TENSORS, "rng_state/shard_0": [Payload()]})
    assert refusal_of(checkpoint) == holds(shard_of(checkpoint), FOREIGN)


def test_a_bare_pickle_in_a_shard_is_refused(write_checkpoint: Callable[..., Path]) -> None:
    checkpoint = write_checkpoint({**TENSORS, "rng_state/shard_0": {"seed": 1}})
    content = pickle.loads((checkpoint / "weights" / ".metadata").read_bytes())
    (place,) = [info for index, info in content.storage_data.items() if index.fqn == "rng_state/shard_0"]
    with shard_of(checkpoint).open("r+b") as file:
        file.seek(place.offset)
        file.write(pickle.dumps({"harmless": 1}))
    assert refusal_of(checkpoint) == holds(shard_of(checkpoint), "a bare pickle")


def extra_states(state: bytes) -> list[Any]:
    """Return objects in which an extra state may lie."""
    tensor = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    return [[tensor], state, bytearray(state), {"a": [1, (tensor,)]}, [{"b": state}], (state,)]


@pytest.mark.parametrize("place", range(6))
def test_a_foreign_class_in_an_extra_state_is_refused(place: int, write_checkpoint: Callable[..., Path]) -> None:
    entry = extra_states(pickle.dumps({"recipe": Payload()}))[place]
    checkpoint = write_checkpoint({**TENSORS, "decoder.layers.0._extra_state/shard_0": entry})
    assert refusal_of(checkpoint) == holds(shard_of(checkpoint), FOREIGN)


def test_bytes_that_nobody_unpickles_are_left_alone(write_checkpoint: Callable[..., Path]) -> None:
    entry = extra_states(pickle.dumps({"recipe": Payload()}))[0]
    check_pickles(write_checkpoint({**TENSORS, "rng_state/shard_0": entry}))


def test_an_extra_state_of_nothing_passes(write_checkpoint: Callable[..., Path]) -> None:
    empty = [torch.empty(0, dtype=torch.uint8), torch.ones(3), 5, None]
    check_pickles(write_checkpoint({**TENSORS, "layer._extra_state/shard_0": empty}))


def test_an_extra_state_that_is_damaged_cannot_be_read(write_checkpoint: Callable[..., Path]) -> None:
    checkpoint = write_checkpoint({**TENSORS, "layer._extra_state/shard_0": extra_states(b"\x80\x04")[0]})
    shard = shard_of(checkpoint)
    assert refusal_of(checkpoint) == f"{shard}: it cannot be read (Ran out of input). Use another checkpoint."


def scaling(tensor_archive: bytes) -> bytes:
    """Return what Transformer Engine keeps of its scaling: its recipe, and tensors as archives."""
    recipe = "transformer_engine.common.recipe"
    classes = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    names = [(recipe, name) for name in (*classes, "Format", "_FormatHelper", "MMParams", "QParams")]
    names += [("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")]
    text = b"".join(f"c{module}\n{name}\n0".encode() for module, name in names)
    # A recipe with a state and an item, and the archive of a tensor.
    built = f"c{recipe}\nDelayedScaling\n(I1\ntR}}(V a\nI2\nub".encode() + b"0"
    items = b"ccollections\nOrderedDict\n)R(Va\nI1\nu0"
    stored = b"B" + len(tensor_archive).to_bytes(4, "little") + tensor_archive
    load = b"ctorch.storage\n_load_from_bytes\n(" + stored + b"tR."
    return text + built + items + load


def test_the_scaling_of_transformer_engine_passes(write_checkpoint: Callable[..., Path]) -> None:
    state = extra_states(scaling(archive(torch.ones(2))))[0]
    check_pickles(write_checkpoint({**TENSORS, "layer._extra_state/shard_0": state}))


def test_an_archive_inside_an_extra_state_is_looked_at_too(write_checkpoint: Callable[..., Path]) -> None:
    state = extra_states(scaling(archive(Payload())))[0]
    checkpoint = write_checkpoint({**TENSORS, "layer._extra_state/shard_0": state})
    assert refusal_of(checkpoint) == holds(shard_of(checkpoint), FOREIGN)


@pytest.mark.parametrize("name", ["../outside.distcp", "__0_0.distcp/../x", "weights.pt", "x__0_0.distcp"])
def test_metadata_that_points_elsewhere_is_refused(name: str, checkpoint: Path) -> None:
    def point(content: Metadata) -> None:
        for info in content.storage_data.values():
            info.relative_path = name

    change_metadata(checkpoint, point)
    path = checkpoint / "weights" / ".metadata"
    assert refusal_of(checkpoint) == f"{path}: it points at {name}. {REMEDY}"


def test_metadata_that_asks_for_a_transformation_is_refused(checkpoint: Path) -> None:
    def transform(content: Metadata) -> None:
        for info in content.storage_data.values():
            info.transform_descriptors = ["zstd"]

    change_metadata(checkpoint, transform)
    path = checkpoint / "weights" / ".metadata"
    assert refusal_of(checkpoint) == f"{path}: it asks for a transformation of __0_0.distcp. {REMEDY}"


def test_an_object_outside_its_file_cannot_be_read(checkpoint: Path) -> None:
    shard = shard_of(checkpoint)

    def move(content: Metadata) -> None:
        for info in content.storage_data.values():
            info.offset = -1

    change_metadata(checkpoint, move)
    message = refusal_of(checkpoint)
    assert message.startswith(f"{shard}: it cannot be read (") and message.endswith("). Use another checkpoint.")


def test_a_reason_without_words_is_the_kind_of_error_and_a_long_one_is_cut() -> None:
    assert "it cannot be read (ValueError)." in str(pickles._unreadable(Path("a"), ValueError()))
    assert f"({'x' * 200})." in str(pickles._unreadable(Path("a"), ValueError("x" * 300)))
    assert "(two words)." in str(pickles._unreadable(Path("a"), ValueError("two\n  words")))
