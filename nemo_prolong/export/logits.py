"""Compare the model that plain transformers makes of an export with the Megatron model it came from.

Both compute in float32 on the same weights: a bf16 export is loaded into float32, and the Megatron model's weights
are rounded to bf16 first, so that one bound serves both. Models are loaded one after the other. The prompts are short
ones, one of the whole advertised context where that fits, and one whose positions are spread to its end, for RoPE.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_prolong.engine import open_megatron_scorer
from nemo_prolong.export.hf_config import special_tokens
from nemo_prolong.export.source import ExportSource
from nemo_prolong.export.verify import mismatch
from nemo_prolong.records.export_manifest import GreedyRecord, LogitsRecord, PromptRecord, SharpenedRecord
from nemo_prolong.weights.hf_model import load_model

log = logging.getLogger(__name__)

MAX_LOGIT_DIFFERENCE = 1e-4
"""Largest difference of a logit. Two orders of the same float32 sums differ by less; a wrong weight or base by more."""

MAX_FULL_PROMPT_TOKENS = 16384
"""An advertised context up to this is scored whole."""

COMPARED_POSITIONS = 1024
"""Last positions of a prompt that are compared: they see everything before them, and all would not fit in memory."""

SHARPENING = 8
"""Factor of queries and keys in the prompt that is to see positions."""

MIN_SHARPENED_AGREEMENT = 0.95

GREEDY_TOKENS = 16
GREEDY_PROMPT = "The quick brown fox jumps over the lazy dog. "

# fp32 rounds the exponent of base ** (i / C) to half a unit: up to ln(base) * 2**-25, 7e-7 at a base of 1e9.
_INV_FREQ_RELATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Prompt:
    """Tokens to score.

    Attributes:
        name: What it tests.
        tokens: int64 [T].
        position_ids: int64 [T] ascending, or None for 0, 1, 2, ...
    """

    name: str
    tokens: Tensor
    position_ids: Tensor | None = None

    @property
    def start(self) -> int:
        """First position that is compared."""
        return max(0, len(self.tokens) - COMPARED_POSITIONS)

    @property
    def last_position(self) -> int:
        """Position of the last token."""
        return len(self.tokens) - 1 if self.position_ids is None else int(self.position_ids[-1])


@dataclass(frozen=True)
class TransformersResult:
    """What plain transformers computed.

    Attributes:
        logits: float32 [T - start, V] per prompt.
        prompt_tokens: Length of the greedy prompt.
        generated: int64 [T + N], the greedy prompt and its continuation.
        sharpened: float32 [T - start, V] of the last prompt, with queries and keys multiplied.
        inv_freq: RoPE frequencies, float32 [C / 2].
        stop_ids: Tokens after which generation was seen to end.
    """

    logits: list[Tensor]
    prompt_tokens: int
    generated: Tensor
    sharpened: Tensor
    inv_freq: Tensor
    stop_ids: list[int]


def make_prompts(vocab_size: int, context_length: int) -> list[Prompt]:
    """Return the prompts for a model; the same for the same arguments.

    Args:
        vocab_size: Ids are drawn from all of it.
        context_length: Advertised tokens of context.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randint(vocab_size, (length,), generator=generator)

    lengths = sorted({length for length in (1, 67, 509) if length < context_length})
    if context_length <= MAX_FULL_PROMPT_TOKENS:
        lengths.append(context_length)
    prompts = [Prompt(f"prompt of {length}", draw(length)) for length in lengths]
    # Two blocks, at the beginning and the end of the context: shifting all positions alike would test nothing, because
    # RoPE sees only distances.
    block = min(256, context_length // 2)
    if block:
        ends = torch.cat([torch.arange(block), torch.arange(context_length - block, context_length)])
        prompts.append(Prompt("positions spread over the context", draw(2 * block), ends))
    return prompts


def verify_logits(
    source: ExportSource, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype
) -> LogitsRecord:
    """Compare RoPE frequencies, logits, a greedy continuation, and check that generation stops.

    Returns:
        What was compared.

    Raises:
        ExportError: If a logit differs by more than ``MAX_LOGIT_DIFFERENCE``, or a frequency or token differs.
    """
    prompts = make_prompts(source.model.vocab_size, source.manifest.advertised_context_length)
    log.info("scoring %d prompts with transformers %s", len(prompts), transformers.__version__)
    result = _run_transformers(source, tokenizer, directory, prompts)
    log.info("scoring them with Megatron")
    scorer = open_megatron_scorer(source.run_dir, weights_dtype=dtype)
    if scorer.description.step != source.step:
        raise mismatch(
            f"run={source.run_dir}", f"it saved step {scorer.description.step} meanwhile; exported {source.step}"
        )
    _compare_frequencies(result.inv_freq, scorer.inv_freq)
    compared = []
    for prompt, logits in zip(prompts, result.logits, strict=True):
        megatron = scorer.logits(prompt.tokens, start=prompt.start, position_ids=prompt.position_ids)
        compared.append(_compare(prompt, logits, megatron))
    greedy = _compare_greedy(result, scorer.logits(result.generated[:-1], start=result.prompt_tokens - 1))
    scorer.sharpen_attention(SHARPENING)
    prompt = prompts[-1]
    sharpened = scorer.logits(prompt.tokens, start=prompt.start, position_ids=prompt.position_ids)
    return LogitsRecord(
        max_logit_difference=max(record.max_logit_difference for record in compared),
        logit_tolerance=MAX_LOGIT_DIFFERENCE,
        prompts=compared,
        sharpened=_compare_sharpened(result.sharpened, sharpened),
        greedy=greedy,
        stop_ids=result.stop_ids,
        transformers=transformers.__version__,
    )


@torch.inference_mode()
def _run_transformers(
    source: ExportSource, tokenizer: PreTrainedTokenizerBase, directory: Path, prompts: list[Prompt]
) -> TransformersResult:
    """Load the export as a user would, in float32, and run everything that is to be compared."""
    model = _load(directory)
    if model.model.rotary_emb.attention_scaling != 1.0:
        raise mismatch("config.json rope_parameters", "transformers scales the attention")
    prompt = tokenizer(GREEDY_PROMPT, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(prompt)
    generated = model.generate(prompt, attention_mask=mask, max_new_tokens=GREEDY_TOKENS, do_sample=False)
    stop_ids = list(special_tokens(source, tokenizer).stop_ids)
    for stop_id in stop_ids:
        _verify_stop(model, prompt, stop_id)
    logits = [_score(model, p) for p in prompts]
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= SHARPENING
        layer.self_attn.k_proj.weight *= SHARPENING
    return TransformersResult(
        logits=logits,
        prompt_tokens=prompt.shape[1],
        generated=generated[0],
        sharpened=_score(model, prompts[-1]),
        inv_freq=model.model.rotary_emb.inv_freq,
        stop_ids=stop_ids,
    )


def _verify_stop(model: Any, prompt: Tensor, stop_id: int) -> None:
    """Check that generation ends where the model writes a stop token, by the directory's own settings."""

    def only_stop(batch: int, ids: Tensor) -> list[int]:
        return [stop_id]

    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, prefix_allowed_tokens_fn=only_stop
    )
    if generated.shape[1] != prompt.shape[1] + 1:
        raise mismatch("generation_config.json eos_token_id", f"generation goes on after token {stop_id}")


def _load(directory: Path) -> Any:
    model, problems = load_model(directory, torch.float32)
    for kind, names in problems.items():
        raise mismatch("transformers", f"{kind.replace('_', ' ')}: {names[:3]}")
    return model


def _compare_frequencies(found: Tensor, expected: Tensor) -> None:
    """Check the frequencies that transformers derived from the configuration against those of the Megatron model."""
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=_INV_FREQ_RELATIVE_TOLERANCE, atol=0.0
    ):
        raise mismatch(
            "config.json rope_theta",
            f"transformers rotates by {found[-1]:.6g} per position in the slowest dimension, Megatron by "
            f"{expected[-1]:.6g}",
        )


def _score(model: Any, prompt: Prompt) -> Tensor:
    """Return float32 [T - start, V]."""
    tokens = prompt.tokens[None]
    positions: dict[str, Tensor] = {}
    if prompt.position_ids is not None:
        # Without a mask transformers takes a jump in the positions for the start of another document.
        positions = {"position_ids": prompt.position_ids[None], "attention_mask": torch.ones_like(tokens)}
    kept = len(prompt.tokens) - prompt.start
    logits: Tensor = model(tokens, use_cache=False, logits_to_keep=kept, **positions).logits[0]
    return logits


def _compare(prompt: Prompt, logits: Tensor, megatron: Tensor) -> PromptRecord:
    """Return the record of one prompt, or refuse it."""
    if not torch.isfinite(logits).all():
        raise mismatch(prompt.name, "transformers computes NaN or infinity")
    difference = float((logits - megatron).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise mismatch(
            prompt.name,
            f"logits of transformers and Megatron differ by up to {difference:.3g}, more than {MAX_LOGIT_DIFFERENCE:g}",
        )
    return PromptRecord(
        name=prompt.name,
        tokens=len(prompt.tokens),
        last_position=prompt.last_position,
        compared_positions=len(logits),
        max_logit_difference=difference,
        argmax_equal=int((logits.argmax(-1) == megatron.argmax(-1)).sum()),
    )


def _compare_sharpened(logits: Tensor, megatron: Tensor) -> SharpenedRecord:
    """Return the record of the prompt with multiplied queries and keys, or refuse it.

    Attention is then all or nothing, and positions decide: with a wrong base most of the choices are others, while two
    orders of the same sums may differ in a near tie.
    """
    equal = float((logits.argmax(-1) == megatron.argmax(-1)).double().mean())
    if not equal >= MIN_SHARPENED_AGREEMENT:
        raise mismatch(
            "positions spread over the context",
            f"with sharpened attention transformers and Megatron choose the same token at {equal:.1%} of the positions",
        )
    difference = float((logits - megatron).abs().max())
    return SharpenedRecord(factor=SHARPENING, argmax_equal_share=equal, max_difference=difference)


def _compare_greedy(result: TransformersResult, megatron: Tensor) -> GreedyRecord:
    """Compare tokens that transformers chose one by one, through its cache, with Megatron's logits of the whole.

    Args:
        result: Of transformers.
        megatron: float32 [N, V], of the positions that the N generated tokens follow.
    """
    chosen = result.generated[result.prompt_tokens :]
    behind = megatron.max(-1).values - megatron.gather(1, chosen[:, None]).squeeze(1)
    # Two tokens whose logits are closer than both errors together are equally right.
    if float(behind.max()) > 2 * MAX_LOGIT_DIFFERENCE:
        step = int((behind > 2 * MAX_LOGIT_DIFFERENCE).nonzero()[0])
        raise mismatch("greedy tokens", f"token {step + 1} that transformers generates is not Megatron's choice")
    return GreedyRecord(tokens=len(chosen), equal=int((megatron.argmax(-1) == chosen).sum()))
