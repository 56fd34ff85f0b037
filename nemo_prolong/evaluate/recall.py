"""Key-value recall: can the model copy one value out of a long JSON object, wherever in it the value stands?

It has the shape of HELMET's JSON KV task, sized for any tokenizer. Keys are four consonants (160,000 of them, never a
word) and values are four digits. So a pair costs about ten tokens even with a small vocabulary, and the value starts
where every pre-tokenizer splits. The prompt is a completion, not a chat turn, so that base and instruct models see the
same text. Everything is generated from the seed and nothing is downloaded.

The prompt ends inside the second object::

    Below is a JSON object of keys and values.

    {"bdfg": "4821", "kqtz": "9034", ...}

    The value of one of its keys is:

    {"kqtz": "
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nemo_prolong.data.tokenizer.joined import JoinedEncoder
from nemo_prolong.errors import ConfigError
from nemo_prolong.evaluate.scorer import Scorer
from nemo_prolong.records.evaluation import RecallEntry

log = logging.getLogger(__name__)

KEYS = tuple("".join(letters) for letters in itertools.product("bcdfghjklmnpqrstvwxz", repeat=4))
VALUES = range(1000, 10000)
CLOSING = '"}'
"""What follows a value. It is encoded with it, because a tokenizer may merge its quote with the last digit."""
MIN_TOKENS_PER_PAIR = 4
"""No tokenizer writes a pair with fewer tokens: bounds how many pairs are drawn for a prompt."""
LIKELY_TOKENS_PER_PAIR = 12
"""First guess of what a pair costs."""
_VALUE = 1
"""Which piece of prompt, value and closing the value is."""


@dataclass(frozen=True)
class RecallPrompt:
    """One question with its answer.

    Attributes:
        text: The prompt as text, without the beginning-of-sequence token.
        prompt: int64 [T], with what ``beginning_ids`` gives, and without tokens that hold a digit of the value.
        answer: int64 [A], the tokens of the joined text that hold a digit of the value. The first and the last may hold
            a quote too. ``T + A`` is at most the length asked for.
        key: The key asked about.
        value: Its value.
        depth: Where the pair stands in the object, 0.0 first to 1.0 last.
        num_pairs: Pairs in the object.
    """

    text: str
    prompt: Tensor
    answer: Tensor
    key: str
    value: str
    depth: float
    num_pairs: int

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt) + len(self.answer)


def build_prompt(encode: _PromptEncoder, length_tokens: int, depth: float, random: Random) -> RecallPrompt:
    """Fill a prompt with as many pairs as fit, and ask for the one at ``depth``.

    Args:
        encode: Writes and tokenizes prompts; lengths are in its tokens.
        length_tokens: Budget for prompt and answer together, so that a length up to the trained one is inside it.
        depth: Where the needle stands, 0.0 first to 1.0 last.
        random: Source of keys and values.

    Raises:
        ConfigError: If not even one pair fits, or the tokenizer has no tokens for a value.
    """
    keys = random.sample(KEYS, min(len(KEYS), max(length_tokens // MIN_TOKENS_PER_PAIR, 1)))
    pairs = [(key, str(random.choice(VALUES))) for key in keys]
    best: RecallPrompt | None = None
    fitting, too_many = 0, len(pairs) + 1
    guess = length_tokens // LIKELY_TOKENS_PER_PAIR
    # Only the whole text tells its number of tokens. It grows evenly, so interpolation needs some five attempts where
    # bisection needs seventeen of half a million tokens each.
    while too_many - fitting > 1:
        guess = min(max(guess, fitting + 1), too_many - 1)
        prompt = encode(pairs[:guess], depth)
        if prompt.num_tokens <= length_tokens:
            best, fitting = prompt, guess
        else:
            too_many = guess
        guess += math.floor((length_tokens - prompt.num_tokens) * guess / prompt.num_tokens)
    if best is None:
        shortest = encode(pairs[:1], depth).num_tokens
        raise ConfigError(
            f"recall_lengths={length_tokens}",
            "A prompt with a single pair is longer than that in this model's tokens.",
            f"Use lengths of at least {shortest}.",
        )
    return best


class _PromptEncoder:
    """Writes and tokenizes prompts. The answer is what a model that has seen joined text would write.

    Args:
        tokenizer: The model's own.

    Raises:
        ConfigError: If it does not say which characters a token stands for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError(
                f"tokenizer={tokenizer.name_or_path}",
                "is no fast tokenizer, so where the tokens of an answer begin is not known.",
                "Save it with a tokenizer.json, as AutoTokenizer and save_pretrained of transformers do.",
            )
        self._name = tokenizer.name_or_path
        self._unknown_id = tokenizer.unk_token_id
        self._begin = beginning_ids(tokenizer)
        self._encode = JoinedEncoder(tokenizer.backend_tokenizer)

    def __call__(self, pairs: list[tuple[str, str]], depth: float) -> RecallPrompt:
        """Return the prompt over ``pairs``.

        Raises:
            ConfigError: If the tokenizer has no tokens for the value.
        """
        key, value = pairs[round(depth * (len(pairs) - 1))]
        listing = ", ".join(f'"{name}": "{number}"' for name, number in pairs)
        text = (
            "Below is a JSON object of keys and values.\n\n"
            f"{{{listing}}}\n\n"
            f'The value of one of its keys is:\n\n{{"{key}": "'
        )
        joined = self._encode([text, value, CLOSING])
        answer = joined.of(_VALUE)
        if not len(answer) or self._unknown_id in answer:
            raise ConfigError(
                f"tokenizer={self._name}",
                f"has no tokens for {value}, one of the values that recall asks for.",
                "Evaluate recall with a tokenizer that can write digits.",
            )
        prompt = torch.tensor([*self._begin, *joined.before(_VALUE).tolist()])
        return RecallPrompt(text, prompt, torch.from_numpy(answer), key, value, depth, len(pairs))


def beginning_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what stands before the first token of a text.

    What the tokenizer itself puts there, else its ``bos_token``, unless it is configured with ``add_bos_token=false``.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    specials = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    own = [token for token, _ in itertools.takewhile(lambda pair: pair[1], specials)]
    if own or tokenizer.bos_token_id is None or tokenizer.init_kwargs.get("add_bos_token") is False:
        return own
    return [tokenizer.bos_token_id]


def build_prompts(
    tokenizer: PreTrainedTokenizerBase, length_tokens: int, num_samples: int, seed: int
) -> Iterator[RecallPrompt]:
    """Yield ``num_samples`` prompts with the needle at evenly spread depths from first to last.

    A prompt depends on the tokenizer, the length, the seed, its number and the number of samples, and on nothing else.
    """
    encode = _PromptEncoder(tokenizer)
    depths = np.linspace(0.0, 1.0, num_samples) if num_samples > 1 else np.array([0.5])
    for sample, depth in enumerate(depths.tolist()):
        random = Random(f"{seed}/{length_tokens}/{sample}")  # noqa: S311 - repeatable on purpose
        yield build_prompt(encode, length_tokens, depth, random)


@dataclass
class RecallScore:
    """Sums over the prompts of one length."""

    samples: int = 0
    exact_matches: int = 0
    answer_tokens: int = 0
    correct_tokens: int = 0
    loss_sum: float = 0.0

    def add(self, logits: Tensor, answer: Tensor) -> None:
        """Add one prompt: ``logits`` float32 [A, V] at the positions that predict ``answer`` int64 [A].

        Greedy decoding writes the answer if and only if, given the prompt and the true tokens so far, every next
        token of the answer is the most likely one. So one forward pass over prompt and answer decides exact match.
        Nothing has to be generated. What the model would write after the value is not judged.
        """
        correct = logits.argmax(dim=-1) == answer
        self.samples += 1
        self.exact_matches += int(correct.all())
        self.answer_tokens += len(answer)
        self.correct_tokens += int(correct.sum())
        self.loss_sum += float(cross_entropy(logits, answer, reduction="none").to(torch.float64).sum())

    def entry(self, length_tokens: int) -> RecallEntry:
        """Return the entry of a length; losses are nats per answer token.

        ``chance_loss`` is what a model pays that knows the form of a value and does not look it up.
        """
        return RecallEntry(
            length=length_tokens,
            samples=self.samples,
            exact_match=self.exact_matches / self.samples,
            token_accuracy=self.correct_tokens / self.answer_tokens,
            answer_loss=self.loss_sum / self.answer_tokens,
            chance_loss=self.samples * math.log(len(VALUES)) / self.answer_tokens,
            answer_tokens=self.answer_tokens,
        )


def measure_recall(scorer: Scorer, lengths_tokens: list[int], num_samples: int, seed: int) -> list[RecallEntry]:
    """Return an entry for every length, in the order given.

    Lengths beyond the trained one are measured too: how a model fails there is part of the answer.

    Args:
        scorer: The model.
        lengths_tokens: Prompt and answer together, in the model's tokens.
        num_samples: Prompts per length.
        seed: Source of keys and values; the same prompts for every model that shares a tokenizer.

    Raises:
        ConfigError: If a length does not hold one pair.
    """
    entries = []
    for length in lengths_tokens:
        score = RecallScore()
        for prompt in build_prompts(scorer.tokenizer, length, num_samples, seed):
            tokens = torch.cat([prompt.prompt, prompt.answer[:-1]])
            score.add(scorer.logits(tokens, start=len(prompt.prompt) - 1), prompt.answer)
            log.debug("%s: %d tokens, %d pairs, depth %.2f", scorer.name, length, prompt.num_pairs, prompt.depth)
        entries.append(score.entry(length))
    return entries
