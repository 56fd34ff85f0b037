"""A Hugging Face directory as the parent of a stage: what it must be, and whether it is the model configured.

Needs no torch: a stage that cannot start from it is refused in a second. Safetensors only, and nothing in the directory
is ever executed or unpickled. Other architectures, other RoPE scalings than Llama-3.1's, biases and quantized weights
are refused by name, because Megatron would train another model without a word.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from nemo_prolong.config.schema import ModelConfig, RopeScaling
from nemo_prolong.errors import CheckpointError, ConfigError
from nemo_prolong.files import digest_file
from nemo_prolong.weights.names import pieces

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ADAPTER = "adapter_config.json"
_NAMED_WEIGHTS = "transformers_weights"
DTYPES = ("BF16", "F16", "F32")

# What must have one value for the model to be Megatron's Llama; a missing key has that value in transformers.
_FIXED: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}

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

    Raises:
        CheckpointError: If it is no Hugging Face directory of a Llama in safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise self._refusal("the directory does not exist.", "Download the model, or correct the path.")
        self._config = self._read_json(CONFIG_FILE)
        self._check_architecture()
        self.rotary_base, self.rope_scaling = self._read_rope()
        self.context_length = int(self._get("max_position_embeddings"))
        self._files = self._read_weight_map()

    def model_fields(self) -> dict[str, Any]:
        """Return what the directory says about the fields of ``ModelConfig`` that decide the model."""
        heads, hidden = self._get("num_attention_heads"), self._get("hidden_size")
        return {
            "num_layers": self._get("num_hidden_layers"),
            "hidden_size": hidden,
            "ffn_hidden_size": self._get("intermediate_size"),
            "num_attention_heads": heads,
            "num_query_groups": self._config.get("num_key_value_heads") or heads,
            "kv_channels": self._config.get("head_dim") or hidden // heads,
            "vocab_size": self._get("vocab_size"),
            "layernorm_epsilon": self._config.get("rms_norm_eps", 1e-6),
            "share_embeddings_and_output_weights": bool(self._config.get("tie_word_embeddings", False)),
            "rope_scaling": self.rope_scaling,
        }

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
            file, config = CONFIG_FILE, self._config
        found = config.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        vocab_size = self._get("vocab_size")
        if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
            raise self._refusal(
                f"{file} has eos_token_id={json.dumps(found)}, and token ids of the model are 0 to {vocab_size - 1}.",
                f"Correct eos_token_id in {file}: it is what ends the texts that the model generates.",
            )
        return ids

    def check_fields(self, model: ModelConfig) -> None:
        """Check that the directory is of the model configured; its RoPE base may be another.

        Raises:
            ConfigError: Naming what differs.
        """
        fields = self.model_fields()
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

        Raises:
            CheckpointError: Naming what is missing or of another kind.
        """
        headers = self._all_headers()
        expected = {
            name: shape for piece in pieces(model) for name, shape in zip(piece.names, piece.shapes, strict=True)
        }
        problems = [f"{name} is missing" for name in expected if name not in headers]
        problems += [
            f"{name} is not part of a Llama" for name in headers if name not in expected and not _ignored(name, model)
        ]
        for name in expected.keys() & headers.keys():
            shape, dtype = headers[name]
            if shape != expected[name]:
                problems.append(f"{name} has shape {list(shape)}, not {list(expected[name])}")
            elif dtype not in DTYPES:
                problems.append(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
        if problems:
            more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise self._refusal(f"{'; '.join(problems[:_LISTED])}{more}.", "Download the model again.")

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self.path / self._files[name]

    def sha256(self) -> str:
        """Return one hash over the configuration, the index and every weight file; reads all of them."""
        names = [name for name in (CONFIG_FILE, INDEX_FILE) if (self.path / name).is_file()]
        names += sorted(set(self._files.values()))
        with ThreadPoolExecutor() as pool:
            hashes = [digest.sha256 for digest in pool.map(digest_file, [self.path / name for name in names])]
        lines = "".join(f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _check_architecture(self) -> None:
        config = self._config
        if "auto_map" in config:
            raise self._refusal(
                "config.json asks for code of its own (auto_map), and no code of a model is run here.",
                "Use a directory that plain transformers loads without trust_remote_code.",
            )
        kind, architectures = config.get("model_type"), config.get("architectures") or ["LlamaForCausalLM"]
        problems = []
        if kind != "llama" or architectures != ["LlamaForCausalLM"]:
            problems.append(f"it is a {kind} ({', '.join(map(str, architectures))}), not a llama (LlamaForCausalLM)")
        problems += [
            f"{key}={json.dumps(config[key])} ({json.dumps(value)} is what can be trained)"
            for key, value in _FIXED.items()
            if config.get(key, value) != value
        ]
        if config.get("quantization_config"):
            problems.append("its weights are quantized")
        if problems:
            raise self._refusal(f"{'; '.join(problems)}.", "Start from a Llama without these.")

    def _read_rope(self) -> tuple[float, RopeScaling | None]:
        """Return base and scaling from the keys of transformers 4 and 5, which must agree where both are there."""
        config = self._config
        newer = dict(config.get("rope_parameters") or {})
        scaling = dict(config.get("rope_scaling") or {})
        bases = [float(base) for base in (config.get("rope_theta"), newer.pop("rope_theta", None)) if base is not None]
        if len(set(bases)) > 1:
            raise self._refusal(
                f"rope_theta ({bases[0]:g}) and rope_parameters ({bases[1]:g}) name different RoPE bases.",
                "Correct config.json: with the wrong base the model fails on every long text.",
            )
        if config.get("partial_rotary_factor", 1.0) != 1.0:
            raise self._refusal("only a part of each head is rotated (partial_rotary_factor).", "Use another model.")
        scaling.pop("rope_theta", None)
        found = [self._parse_scaling(value) for value in (newer, scaling) if value]
        if len(found) > 1 and scaling and found[0] != found[1]:
            raise self._refusal(
                f"rope_parameters ({found[0]}) and rope_scaling ({found[1]}) differ.", "Correct config.json."
            )
        return (bases or [10000.0])[0], found[0] if found else None

    def _parse_scaling(self, values: dict[str, Any]) -> RopeScaling | None:
        kind = values.get("rope_type", values.get("type"))
        if kind == "default":
            return None
        if kind != "llama3":
            raise self._refusal(
                f"its RoPE scaling is {kind}, and Megatron computes none but Llama-3.1's (llama3).",
                "Start from a model without RoPE scaling or with llama3.",
            )
        try:
            return RopeScaling(**{key: value for key, value in values.items() if key not in ("rope_type", "type")})
        except ValidationError as error:
            raise self._refusal(f"its RoPE scaling cannot be read: {error}.", "Correct config.json.") from error

    def _read_weight_map(self) -> dict[str, str]:
        """Return the file of every tensor."""
        check_one_set_of_weights(self.path, f"parent=hf:{self.path}")
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
        astray = [f"{name} is not in {file}" for name, file in self._files.items() if name not in files[file]]
        if astray:
            raise self._refusal(f"{'; '.join(astray[:_LISTED])}.", "Download the model again.")
        return {name: files[file][name] for name, file in self._files.items()}

    def _get(self, key: str) -> Any:
        if key not in self._config:
            raise self._refusal(f"config.json has no {key}.", "Download it again.")
        return self._config[key]

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
    if single.is_file() and index.is_file() and _indexed_files(index) != {SINGLE_FILE}:
        raise CheckpointError(
            what,
            f"it holds two sets of weights, {SINGLE_FILE} and the files of {INDEX_FILE}, and programs differ in which "
            "they read.",
            f"Remove {SINGLE_FILE}, or the index and its files.",
        )
    if (directory / _ADAPTER).is_file():
        raise CheckpointError(
            what,
            f"it holds an adapter ({_ADAPTER}), which is not part of the weights that are read here.",
            "Merge the adapter into the weights (merge_and_unload of peft), or move its files out.",
        )
    named = _config_of(directory).get(_NAMED_WEIGHTS)
    if named is not None and named not in (SINGLE_FILE, INDEX_FILE):
        raise CheckpointError(
            what,
            f"config.json names a weight file of its own, {_NAMED_WEIGHTS}={json.dumps(named)}.",
            f"Save the model again, so that its weights are {SINGLE_FILE} or the files of {INDEX_FILE}.",
        )


def _indexed_files(index: Path) -> set[str] | None:
    """Return the files that an index names, None where it cannot be read."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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
