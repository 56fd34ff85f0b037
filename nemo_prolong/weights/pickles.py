"""Open the pickles of a checkpoint without executing anything that is in them.

Megatron's distributed format holds four kinds: ``.metadata`` (a bare pickle), ``common.pt`` and the objects and tensors
inside the ``.distcp`` files (torch archives), and in objects of the name ``_extra_state`` bytes that Transformer Engine
unpickles itself. The manifest says that they are what was written, not who wrote the manifest. So everything that a
library would unpickle freely is read here first, by readers that know the classes which occur and refuse any other.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.checkpoint.manifest import COMMON_FILE, METADATA_FILE, WEIGHTS

_MEGATRON_TORCH = "megatron.core.dist_checkpointing.strategies.torch"
_TE_RECIPE = "transformer_engine.common.recipe"

# What .metadata is made of. Megatron's two classes add attributes to torch's, which are read in their place.
_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    (_MEGATRON_TORCH, "MCoreMetadata"): metadata.Metadata,
    (_MEGATRON_TORCH, "MCoreSavePlan"): planner.SavePlan,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                metadata,
                "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
                "TensorStorageMetadata _MEM_FORMAT_ENCODING",
            ),
            (filesystem, "_StorageInfo _StoragePrefix"),
            (planner, "SavePlan TensorWriteData WriteItem WriteItemType"),
        )
        for name in names.split()
    },
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    },
}

# What Transformer Engine keeps of FP8 scaling beside a layer: its recipe and some tensors.
_EXTRA_STATE_NAMES = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "_load_from_bytes"),
    *(
        (_TE_RECIPE, name)
        for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    ),
    *((_TE_RECIPE, name) for name in ("Format", "_FormatHelper", "MMParams", "QParams")),
}

_SHARD = re.compile(r"__\d+_\d+\.distcp")
_REMEDY = "Do not open this checkpoint with anything else; use one that this software wrote on your machines."


def check_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint with anything in it that a library would execute on loading.

    Call before Megatron opens it.

    Args:
        checkpoint: A directory ``checkpoints/step_XXXXXXXX``.

    Raises:
        CheckpointError: Names the file and the class.
    """
    content = read_metadata(checkpoint)
    _check_common(checkpoint / COMMON_FILE)
    for path, key, data in _objects(checkpoint, content):
        if data.startswith(pickle.PROTO):
            raise _refusal(path, "a bare pickle")
        value = _load_archive(path, data)
        if "_extra_state" in key:
            for state in _byte_strings(value):
                _check_extra_state(path, state)


def _check_common(path: Path) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    _load_archive(path, data)


def read_metadata(checkpoint: Path) -> metadata.Metadata:
    """Return ``.metadata`` of a checkpoint.

    Raises:
        CheckpointError: If it cannot be read, or holds something else than Megatron writes.
    """
    path = checkpoint / METADATA_FILE
    try:
        with path.open("rb") as file:
            content = _MetadataUnpickler(file).load()
    except _UnknownClass as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:  # a damaged pickle raises anything
        raise _unreadable(path, error) from error
    if not isinstance(content, metadata.Metadata) or not isinstance(content.storage_data, dict):
        raise _refusal(path, type(content).__name__)
    return content


class _UnknownClass(pickle.UnpicklingError):
    """A pickle names something that is not on the list."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_CLASSES:
            raise _UnknownClass(f"{module}.{name}")
        return _METADATA_CLASSES[module, name]


class _Inert:
    """Stands for every class and function while a pickle is only looked at."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take anything."""

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep nothing."""


class _ExtraStateUnpickler(pickle.Unpickler):
    """Builds nothing; collects the archives of tensors, which are pickles again."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.archives: list[bytes] = []

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _EXTRA_STATE_NAMES:
            raise _UnknownClass(f"{module}.{name}")
        return self.archives.append if name == "_load_from_bytes" else _Inert


def _check_extra_state(path: Path, state: bytes) -> None:
    """Look at what Transformer Engine would unpickle."""
    unpickler = _ExtraStateUnpickler(io.BytesIO(state))
    try:
        unpickler.load()
    except _UnknownClass as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:  # a damaged pickle raises anything
        raise _unreadable(path, error) from error
    for archive in unpickler.archives:
        _load_archive(path, archive)


def _objects(checkpoint: Path, content: metadata.Metadata) -> Iterator[tuple[Path, str, bytes]]:
    """Yield (file, key, bytes) of everything in the shards that is not a tensor."""
    for index, info in content.storage_data.items():
        path = checkpoint / WEIGHTS / str(info.relative_path)
        if not _SHARD.fullmatch(str(info.relative_path)):
            raise CheckpointError(str(checkpoint / METADATA_FILE), f"it points at {info.relative_path}.", _REMEDY)
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                str(checkpoint / METADATA_FILE), f"it asks for a transformation of {path.name}.", _REMEDY
            )
        if isinstance(content.state_dict_metadata.get(index.fqn), metadata.BytesStorageMetadata):
            try:
                with path.open("rb") as file:
                    file.seek(info.offset)
                    data = file.read(info.length)
            except (OSError, ValueError, OverflowError) as error:
                raise _unreadable(path, error) from error
            yield path, index.fqn, data


def _load_archive(path: Path, data: bytes) -> Any:
    """Return the content of a torch archive, if it is made of tensors and plain values only."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _refusal(path, named[1] if named else "something else than tensors and plain values") from error
    except Exception as error:  # a damaged archive raises anything
        raise _unreadable(path, error) from error


def _byte_strings(value: Any) -> Iterator[bytes]:
    """Yield the bytes in lists, dicts and uint8 tensors of an object."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.numel():
        yield value.numpy().tobytes()
    elif isinstance(value, bytes | bytearray):
        yield bytes(value)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _byte_strings(item)


def _refusal(path: Path, name: str) -> CheckpointError:
    return CheckpointError(str(path), f"it holds {name}, which no checkpoint of this software holds.", _REMEDY)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(str(path), f"it cannot be read ({reason}).", "Use another checkpoint.")
