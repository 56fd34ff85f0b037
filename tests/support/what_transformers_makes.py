"""What transformers makes of an exported directory, in plain JSON, whatever its version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

CHAT = [{"role": "user", "content": " Hi <|eot_id|> there "}]


@torch.inference_mode()
def record(directory: Path) -> dict[str, Any]:
    """Return version, RoPE frequencies, logits, greedy tokens, the ids of a conversation, and where generation stops.

    Logits are fp32, of a short prompt and of one whose positions reach the end of the advertised context.
    """
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.arange(64)[None] * 7 % model.config.vocab_size
    context = model.config.max_position_embeddings
    spread = torch.cat([torch.arange(32), torch.arange(context - 32, context)])[None]
    positions = {"position_ids": spread, "attention_mask": torch.ones_like(tokens)}
    prompt = tokenizer("def add(first, second):", return_tensors="pt")
    greedy = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    return {
        "transformers": transformers.__version__,
        "context_length": context,
        "inv_freq": model.model.rotary_emb.inv_freq.tolist(),
        "logits": model(tokens, use_cache=False).logits[0].tolist(),
        "spread_logits": model(tokens, use_cache=False, **positions).logits[0].tolist(),
        "greedy": greedy[0].tolist(),
        "chat": tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
        "text": tokenizer("x = 12345  # \u00e4\u00f6")["input_ids"],
        "stop_ids": sorted(torch.tensor(model.generation_config.eos_token_id).flatten().tolist()),
        "tied": model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(),
    }
