"""A Hugging Face directory as the parent of a stage: what it must be, and whether it is the model configured.

Needs no torch: a stage that cannot start from it is refused in a second. Safetensors only, and nothing in the directory
is ever executed or unpickled. Other architectures, other RoPE scalings than Llama-3.1's, biases, quantized weights and
adapters are refused by name, because Megatron would train another model without a word.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.errors import CheckpointError, ConfigError
from nemo_prolong.files import digest_file
from nemo_prolong.weights.llama_config import LlamaConfigFile, quantized
from nemo_prolong.weights.names import pieces

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NAMED_WEIGHTS = "transformers_weights"
DTYPES = ("BF16", "F16", "F32")

QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""ModelOpt, AutoGPTQ and AutoAWQ say here how weights are quantized, some versions nowhere else."""

_QUANTIZED_DTYPES = re.compile(r"(F8_.*|F6_.*|F4.*|[IU]\d+|BOOL)$")
_QUANTIZED_NAMES = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_shape|(weight|input|output|k|v)_scale\w*|absmax|quant_map"
    r"|SCB|weight_format|weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+))$"
)
"""Tensors that GPTQ, AWQ, compressed-tensors, FP8 and bitsandbytes keep beside the weights."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put into the names of a module's tensors."""

_ADAPTER_NAMES = re.compile(r"(^base_model\.model\.|\.lora_|\.modules_to_save\.|\.base_layer\.)")
"""Names that PEFT gives to tensors of a model with an adapter."""

_BLOCK_BYTES = 2**22

_LISTED = 5
"""Problems that a message names."""


class HuggingFaceDirectory:
    """Configuration and tensors of a Hugging Face directory of a Llama.

    Args:
        path: The directory.

    Attributes:
        path: The directory.
        context_length: ``max_position_embeddings``: tokens that the model was made for.
        rotary_base: RoPE base.
        rope_scaling: Llama-3.1's scaling, or None.
        vocab_size: Rows of the embedding.
        wrappers: What is in the names of its tensors that is not part of a Llama's, such as ``_orig_mod``.

    Raises:
        CheckpointError: If it is no Hugging Face directory of a Llama in safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise self._refusal("the directory does not exist.", "Download the model, or correct the path.")
        self._check_kind()
        check_one_set_of_weights(path, f"parent=hf:{path}")
        self._config = LlamaConfigFile(self._read_json(CONFIG_FILE), self._refusal)
        self.rotary_base, self.rope_scaling = self._config.rotary_base, self._config.rope_scaling
        self.context_length = self._config.context_length
        self.vocab_size: int = self._config.fields["vocab_size"]
        stored = self._read_weight_map()
        self._stored_names, self.wrappers = self._unwrap(stored)
        self._files = {name: stored[wrapped] for name, wrapped in self._stored_names.items()}

    def model_fields(self) -> dict[str, Any]:
        """Return what the directory says about the fields of ``ModelConfig`` that decide the model."""
        return dict(self._config.fields)

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends generation, by ``generation_config.json`` and failing that ``config.json``; empty if neither says.

        Raises:
            CheckpointError: If it is no token id of the model.
        """
        file, config = GENERATION_FILE, {}
        if (self.path / GENERATION_FILE).is_file():
            config = self._read_json(GENERATION_FILE)
        if config.get("eos_token_id") is None:
            file, config = CONFIG_FILE, self._read_json(CONFIG_FILE)
        found = config.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        last = self.vocab_size - 1
        if any(type(token) is not int or not 0 <= token <= last for token in ids):
            raise self._refusal(
                f"{file} has eos_token_id={json.dumps(found)}, and token ids of the model are 0 to {last}.",
                f"Correct eos_token_id in {file}: it is what ends the texts that the model generates.",
            )
        return ids

    def check_fields(self, model: ModelConfig) -> None:
        """Check that the directory is of the model configured.

        The RoPE base may be another, and the vocabulary configured may be larger: see ``HuggingFaceReader``.

        Raises:
            ConfigError: Naming what differs.
        """
        fields = self.model_fields()
        if fields["vocab_size"] <= model.vocab_size:
            del fields["vocab_size"]
        differing = [
            f"model.{key} ({value} there, {getattr(model, key)} here)"
            for key, value in fields.items()
            if getattr(model, key) != value
        ]
        if differing:
            raise ConfigError(
                f"parent=hf:{self.path}",
                f"its model differs from the one configured in {', '.join(differing)}.",
                "Use the model of the directory: set model=..., or these fields.",
            )

    def check_tensors(self, model: ModelConfig) -> None:
        """Check that the files hold every tensor of the model, in its shape; reads headers only.

        A larger vocabulary than the directory's is none of its tensors.

        Raises:
            CheckpointError: Naming what is missing or of another kind.
        """
        theirs = self.model_of(model)
        headers = self._all_headers()
        self._check_numbers(headers)
        expected = {
            name: shape for piece in pieces(theirs) for name, shape in zip(piece.names, piece.shapes, strict=True)
        }
        problems = [f"{name} is missing" for name in expected if name not in headers]
        problems += [
            f"{name} is not part of a Llama" for name in headers if name not in expected and not _ignored(name, theirs)
        ]
        for name in expected.keys() & headers.keys():
            shape, _ = headers[name]
            if shape != expected[name]:
                problems.append(f"{name} has shape {list(shape)}, not {list(expected[name])}")
        if problems:
            remedy = "Download the model again, or correct config.json."
            if problems == ["lm_head.weight is missing"]:
                remedy = "Download the model again. If its LM head is tied, set tie_word_embeddings to true."
            raise self._refusal(_listed(problems), remedy)
        if theirs.share_embeddings_and_output_weights and "lm_head.weight" in headers:
            self._check_tied_head()

    def model_of(self, model: ModelConfig) -> ModelConfig:
        """Return the model whose tensors the directory holds: the one configured, with the directory's vocabulary."""
        return model.model_copy(update={"vocab_size": self.vocab_size})

    def _check_numbers(self, headers: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """Refuse quantized weights by what shows that they are, and number formats that are not read."""
        found = [f"{name} beside the weights" for name in headers if _QUANTIZED_NAMES.search(name)]
        found += [f"{name} is {dtype}" for name, (_, dtype) in headers.items() if _QUANTIZED_DTYPES.match(dtype)]
        if found:
            raise quantized(_listed(found).rstrip("."), self._refusal)
        other = [f"{name} is {dtype}, not one of {', '.join(DTYPES)}" for name, (_, dtype) in headers.items()]
        other = [text for text, (_, dtype) in zip(other, headers.values(), strict=True) if dtype not in DTYPES]
        if other:
            raise self._refusal(_listed(other), "Convert the weights to one of these.")

    def _check_tied_head(self) -> None:
        """Refuse an LM head of other values than the embedding it is tied to; versions of transformers differ then."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        digests = [self._tensor_digest(name) for name in (head, embedding)]
        if digests[0] != digests[1]:
            raise self._refusal(
                f"tie_word_embeddings is true, and {head} has other values than {embedding}.",
                f"Set tie_word_embeddings to false in config.json, or remove {head}, whichever is the model.",
            )

    def _tensor_digest(self, name: str) -> bytes:
        """Return a hash over the dtype and the bytes of a tensor, read in blocks."""
        path = self.file_of(name)
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(header_bytes))[self.stored_name(name)]
            start, end = entry["data_offsets"]
            file.seek(8 + header_bytes + start)
            digest = hashlib.sha256(entry["dtype"].encode())
            left = end - start
            while left:
                block = file.read(min(left, _BLOCK_BYTES))
                digest.update(block)
                left -= len(block)
        return digest.digest()

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self.path / self._files[name]

    def stored_name(self, name: str) -> str:
        """Return what a tensor is called in its file, where its name may have wrappers."""
        return self._stored_names[name]

    def sha256(self) -> str:
        """Return one hash over the configuration, the index and every weight file; reads all of them."""
        names = [name for name in (CONFIG_FILE, INDEX_FILE) if (self.path / name).is_file()]
        names += sorted(set(self._files.values()))
        with ThreadPoolExecutor() as pool:
            hashes = [digest.sha256 for digest in pool.map(digest_file, [self.path / name for name in names])]
        lines = "".join(f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _check_kind(self) -> None:
        """Refuse adapters, and weights whose quantization is described beside ``config.json``."""
        for name in QUANTIZATION_FILES:
            if (self.path / name).is_file():
                raise quantized(name, self._refusal)

    def _unwrap(self, stored: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
        """Return the stored name of every tensor by its name in a Llama, and which wrappers are in the names."""
        names: dict[str, str] = {}
        wrappers: dict[str, None] = {}
        for wrapped in stored:
            if _ADAPTER_NAMES.search(wrapped):
                raise _adapter(f"parent=hf:{self.path}", wrapped)
            parts = wrapped.split(".")
            found = [part for part in parts if part in _WRAPPERS]
            kept = [part for part in parts if part not in _WRAPPERS]
            while kept[0] == "module":
                found.append(kept.pop(0))
            wrappers.update(dict.fromkeys(found))
            name = ".".join(kept)
            if name in names:
                raise self._refusal(
                    f"{names[name]} and {wrapped} are both {name}.", "Save the model again without its wrappers."
                )
            names[name] = wrapped
        return names, tuple(wrappers)

    def _read_weight_map(self) -> dict[str, str]:
        """Return the file of every tensor by its stored name."""
        if (self.path / INDEX_FILE).is_file():
            files = self._read_json(INDEX_FILE).get("weight_map")
            if not isinstance(files, dict) or any(Path(str(name)).name != name for name in files.values()):
                raise self._refusal(f"{INDEX_FILE} has no weight_map of files beside it.", "Download it again.")
            return files
        if (self.path / SINGLE_FILE).is_file():
            return dict.fromkeys(self._headers(SINGLE_FILE), SINGLE_FILE)
        pickles = sorted(path.name for pattern in PICKLES for path in self.path.glob(pattern))
        if pickles:
            raise self._refusal(
                f"its weights are pickles ({', '.join(pickles[:3])}), which can run code when they are opened.",
                "Convert them to safetensors where you trust them: save_pretrained of transformers does.",
            )
        raise self._refusal(f"it has no {INDEX_FILE} and no {SINGLE_FILE}.", "Download all of the model.")

    def _headers(self, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of every tensor in a file."""
        path = self.path / file
        if not path.is_file():
            raise self._refusal(f"{file} is missing.", "Download it again.")
        try:
            with safe_open(path, framework="np") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except SafetensorError as error:
            raise self._refusal(f"{file} is not whole ({error}).", "Download it again.") from error

    def _all_headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of every tensor of the index, each in the file it is said to be in."""
        files = {file: self._headers(file) for file in sorted(set(self._files.values()))}
        stored = self._stored_names
        astray = [f"{name} is not in {file}" for name, file in self._files.items() if stored[name] not in files[file]]
        if astray:
            raise self._refusal(_listed(astray), "Download the model again.")
        return {name: files[file][stored[name]] for name, file in self._files.items()}

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._refusal(f"{name} cannot be read ({error}).", "Name the directory of a model.") from error
        if not isinstance(content, dict):
            raise self._refusal(f"{name} is no JSON object.", "Download it again.")
        return content

    def _refusal(self, rule: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"parent=hf:{self.path}", rule, remedy)


def check_one_set_of_weights(directory: Path, what: str) -> None:
    """Refuse a directory whose weights depend on who reads them.

    transformers takes ``model.safetensors`` before an index, servers take the files of the index. It takes another file
    where ``config.json`` names one, and puts an adapter on the weights where its library is installed. A directory with
    safetensors and pickles is no such case, because pickles are never read here.

    Args:
        directory: Hugging Face directory.
        what: The setting that names it.

    Raises:
        CheckpointError: Naming the files.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    places = _indexed_places(index)
    if single.is_file() and index.is_file() and set(places.values()) != {SINGLE_FILE}:
        raise CheckpointError(
            what,
            f"it holds two sets of weights, {SINGLE_FILE} and the files of {INDEX_FILE}, and programs differ in which "
            "they read.",
            f"Remove {SINGLE_FILE}, or the index and its files.",
        )
    for file, name in _tensors_beside_the_index(directory, places):
        raise CheckpointError(
            what,
            f"{file} holds {name}, which {INDEX_FILE} says is in {places[name]}. Programs differ in which of the two "
            "they read.",
            "Load the model with the program that you trust, and save it again into an empty directory.",
        )
    if (directory / ADAPTER_FILE).is_file():
        raise _adapter(what, ADAPTER_FILE)
    named = _config_of(directory).get(_NAMED_WEIGHTS)
    if named is not None and named not in (SINGLE_FILE, INDEX_FILE):
        raise CheckpointError(
            what,
            f"config.json names a weight file of its own, {_NAMED_WEIGHTS}={json.dumps(named)}.",
            f"Save the model again, so that its weights are {SINGLE_FILE} or the files of {INDEX_FILE}.",
        )


def _adapter(what: str, found: str) -> CheckpointError:
    return CheckpointError(
        what,
        f"it holds an adapter of PEFT ({found}), not a whole model.",
        "Merge it first (merge_and_unload() and save_pretrained(DIR) of PeftModel), and name that directory.",
    )


def _indexed_places(index: Path) -> dict[str, str]:
    """Return the file of every tensor by an index, empty where there is none that can be read."""
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _tensors_beside_the_index(directory: Path, places: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (file, name) of tensors that are in the file that the index names and in another; reads headers only."""
    held = {file: _names_in(directory / file) for file in sorted(set(places.values()))}
    for file, names in held.items():
        elsewhere = sorted(name for name in names & places.keys() if places[name] != file)
        yield from ((file, name) for name in elsewhere if name in held[places[name]])


def _names_in(file: Path) -> set[str]:
    """Return the tensors of a file, none where it is missing or damaged: whoever reads it says so."""
    try:
        with safe_open(file, framework="np") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError):
        return set()


def _config_of(directory: Path) -> dict[str, Any]:
    """Return ``config.json``, empty where it is no object: whoever reads the model says what is wrong with it."""
    try:
        content = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _ignored(name: str, model: ModelConfig) -> bool:
    """Whether a tensor may be there and is not read: a tied LM head, and frequencies that old versions saved."""
    if name == "lm_head.weight":
        return model.share_embeddings_and_output_weights
    return name.endswith(".rotary_emb.inv_freq")


def _listed(problems: list[str]) -> str:
    """Return the first of some problems as a sentence."""
    more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return f"{'; '.join(problems[:_LISTED])}{more}."
