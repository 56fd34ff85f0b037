"""A byte-level BPE tokenizer with Llama-3's split, special tokens and chat template.

Special tokens lie at the top of the vocabulary in Llama-3's order, so that ``<|begin_of_text|>`` is the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nemo_prolong.errors import DataError

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"

SPECIAL_TOKENS = (
    BOS,
    EOS,
    *(f"<|reserved_special_token_{number}|>" for number in range(4)),
    START_HEADER,
    END_HEADER,
    "<|reserved_special_token_4|>",
    END_OF_TURN,
    *(f"<|reserved_special_token_{number}|>" for number in range(5, 11)),
)
"""The first 16 special tokens of Llama-3 in its order; it has 256, the others are reserved."""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role ' ~ message['role']) }}"
    "{%- endif %}"
    "{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim ~ '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: str | Path) -> None:
    """Train on ``texts`` and save as a ``transformers`` tokenizer that ``AutoTokenizer`` loads.

    Args:
        texts: Training text; the same text gives the same tokenizer.
        vocab_size: Total, special tokens included.
        directory: Directory to write.

    Raises:
        DataError: If the text is too little for that many tokens, or ``vocab_size`` has no room for bytes and specials.
    """
    from transformers import PreTrainedTokenizerFast  # imports torch, which processes that only encode do without

    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size={vocab_size}",
            f"a byte-level vocabulary holds 256 bytes and {len(SPECIAL_TOKENS)} special tokens.",
            f"Set vocab_size to at least {smallest}.",
        )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size() + len(SPECIAL_TOKENS)
    if found != vocab_size:
        raise DataError(
            f"vocab_size={vocab_size}",
            f"the text has only {found} tokens in it.",
            f"Set vocab_size={found} or raise tokenizer_train_bytes.",
        )
    _add_special_tokens(tokenizer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token_type_ids
    ).save_pretrained(str(directory))


def _add_special_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    template = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
