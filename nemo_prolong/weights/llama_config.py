"""``config.json`` of a Hugging Face directory: the model it describes, or why Megatron would compute another one.

Each key that changes what the Llama of transformers computes is read, or must have the one value that Megatron
computes. A key that is absent has the default of transformers. Keys of other kinds of models are refused unless they
change nothing. ``pretraining_tp`` and dropout are not read: the first changes rounding alone, the second nothing
outside of training, and nothing here has dropout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from nemo_prolong.config.schema import RopeScaling
from nemo_prolong.errors import CheckpointError

Refuse = Callable[[str, str], CheckpointError]
"""Makes the refusal of a directory from rule and remedy."""

_DEFAULT_ROPE_BASE = 10000.0
_DEFAULT_EPSILON = 1e-6

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0,),
    # Keys that the Llama of transformers does not read. With another value the model is of another kind.
    "sliding_window": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "use_parallel_residual": (False,),
    "no_rope_layers": ([],),
}
"""What must have one of some values for the model to be Megatron's Llama. The first is named; null is as good."""


class LlamaConfigFile:
    """The model that a ``config.json`` describes.

    Args:
        content: The file.
        refuse: Makes the error for what is wrong.

    Attributes:
        fields: Values of the fields of ``ModelConfig`` that decide the model, but for its RoPE base.
        rotary_base: RoPE base.
        rope_scaling: Llama-3.1's scaling, or None.
        context_length: ``max_position_embeddings``: tokens that the model was made for.

    Raises:
        CheckpointError: If it is not of a Llama that Megatron computes, or contradicts itself.
    """

    def __init__(self, content: Mapping[str, Any], refuse: Refuse) -> None:
        self._content = content
        self._refuse = refuse
        self._check_architecture()
        self.rotary_base, self.rope_scaling = self._read_rope()
        self.context_length = self._positive("max_position_embeddings")
        self.fields = self._read_fields()

    def _read_fields(self) -> dict[str, Any]:
        heads, hidden = self._positive("num_attention_heads"), self._positive("hidden_size")
        return {
            "num_layers": self._positive("num_hidden_layers"),
            "hidden_size": hidden,
            "ffn_hidden_size": self._positive("intermediate_size"),
            "num_attention_heads": heads,
            "num_query_groups": self._positive("num_key_value_heads", heads),
            "kv_channels": self._positive("head_dim", hidden // heads),
            "vocab_size": self._positive("vocab_size"),
            "layernorm_epsilon": self._number("rms_norm_eps", self._content, _DEFAULT_EPSILON),
            "share_embeddings_and_output_weights": self._flag("tie_word_embeddings"),
            "rope_scaling": self.rope_scaling,
        }

    def _check_architecture(self) -> None:
        config = self._content
        if "auto_map" in config:
            raise self._refuse(
                "config.json asks for code of its own (auto_map), and no code of a model is run here.",
                "Use a directory that plain transformers loads without trust_remote_code.",
            )
        kind, architectures = config.get("model_type"), config.get("architectures") or ["LlamaForCausalLM"]
        problems = []
        if kind != "llama" or architectures != ["LlamaForCausalLM"]:
            problems.append(f"it is a {kind} ({', '.join(map(str, architectures))}), not a llama (LlamaForCausalLM)")
        problems += [
            f"{key}={json.dumps(config[key])} ({json.dumps(allowed[0] if allowed else None)} is what can be trained)"
            for key, allowed in _NEUTRAL.items()
            if config.get(key) is not None and config[key] not in allowed
        ]
        layers = sorted({str(layer) for layer in config.get("layer_types") or ()} - {"full_attention"})
        if layers:
            problems.append(f"some of its layers are {', '.join(layers)}")
        if problems:
            raise self._refuse(f"{'; '.join(problems)}.", "Start from a Llama without these.")
        for key in ("quantization_config", "compression_config"):
            if config.get(key):
                raise quantized(f"{key} of config.json{_method(config[key])}", self._refuse)

    # ---- RoPE -------------------------------------------------------------------------------------------------------

    def _read_rope(self) -> tuple[float, RopeScaling | None]:
        """Return base and scaling from the keys of transformers 4 and 5, which must agree where several are there."""
        sections = {key: self._rope_section(key) for key in ("rope_parameters", "rope_scaling")}
        bases = {
            f"{key}.rope_theta" if key else "rope_theta": self._number("rope_theta", values)
            for key, values in (("", self._content), *sections.items())
            if values.get("rope_theta") is not None
        }
        if len(set(bases.values())) > 1:
            named = " and ".join(f"{key} ({base:g})" for key, base in bases.items())
            raise self._refuse(
                f"{named} name different RoPE bases.",
                "Correct config.json: with the wrong base the model fails on every long text.",
            )
        described = {
            key: self._parse_scaling(values)
            for key, values in sections.items()
            if values.keys() - {"rope_theta", "partial_rotary_factor"}
        }
        if len({str(scaling) for scaling in described.values()}) > 1:
            named = " and ".join(f"{key} ({scaling})" for key, scaling in described.items())
            raise self._refuse(f"{named} differ.", "Correct config.json.")
        base = next(iter(bases.values()), _DEFAULT_ROPE_BASE)
        return base, next(iter(described.values()), None)

    def _rope_section(self, key: str) -> dict[str, Any]:
        """Return ``rope_parameters`` or ``rope_scaling``; where each kind of layer has its own, they must be equal."""
        values = self._content.get(key) or {}
        if isinstance(values, dict) and values and all(isinstance(value, dict) for value in values.values()):
            first, *others = values.values()
            if any(other != first for other in others):
                raise self._refuse(
                    f"its {key} differ between layers ({', '.join(values)}).", "Start from a model with one RoPE."
                )
            values = first
        if not isinstance(values, dict):
            raise self._refuse(f"its {key} is no JSON object.", "Correct config.json.")
        if values.get("partial_rotary_factor", 1.0) not in (1.0, None):
            raise self._refuse(
                f"only a part of each head is rotated (partial_rotary_factor of {key}).", "Use another model."
            )
        return values

    def _parse_scaling(self, values: dict[str, Any]) -> RopeScaling | None:
        kinds = {str(values[key]) for key in ("rope_type", "type") if values.get(key) is not None}
        if len(kinds) > 1:
            raise self._refuse(
                f"rope_type ({values['rope_type']}) and type ({values['type']}) of its RoPE scaling differ.",
                "Correct config.json.",
            )
        kind = next(iter(kinds), None)
        if kind == "default" or (kind == "linear" and values.get("factor") == 1.0):
            return None
        if kind != "llama3":
            raise self._refuse(
                f"its RoPE scaling is {kind}, and Megatron computes none but Llama-3.1's (llama3).",
                "Start from a model without RoPE scaling or with llama3.",
            )
        known = {key: value for key, value in values.items() if key in RopeScaling.model_fields}
        ignored = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        unknown = sorted(values.keys() - known.keys() - ignored)
        if unknown:
            raise self._refuse(f"its RoPE scaling has {', '.join(unknown)}, which llama3 has not.", "Correct it.")
        try:
            return RopeScaling(**known)
        except ValidationError as error:
            named = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise self._refuse(f"its RoPE scaling cannot be read ({named}).", "Correct config.json.") from error

    # ---- Values -----------------------------------------------------------------------------------------------------

    def _positive(self, key: str, default: int | None = None) -> int:
        value = self._content.get(key)
        if value is None:
            if default is None:
                raise self._refuse(f"config.json has no {key}.", "Download it again.")
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._refuse(f"{key}={json.dumps(value)} is no positive whole number.", "Correct config.json.")
        return value

    def _number(self, key: str, values: Mapping[str, Any], default: float | None = None) -> float:
        value = values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self._refuse(f"{key}={json.dumps(value)} is no positive number.", "Correct config.json.")
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self._content.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._refuse(f"{key}={json.dumps(value)} is neither true nor false.", "Correct config.json.")
        return bool(value)


def quantized(found: str, refuse: Refuse) -> CheckpointError:
    """Return the refusal of weights that are quantized, by what says so."""
    return refuse(
        f"its weights are quantized ({found}).",
        "Start from the weights in BF16, F16 or F32 that these were made of, or dequantize them first.",
    )


def _method(section: Any) -> str:
    method = section.get("quant_method") if isinstance(section, dict) else None
    return f": {method}" if method else ""
