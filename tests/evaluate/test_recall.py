import json
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_prolong.errors import ConfigError
from nemo_prolong.evaluate.recall import build_prompts, measure_recall
from nemo_prolong.evaluate.transformers_scorer import TransformersScorer


class Oracle:
    """Reads the question and the object in the tokens it is given, and predicts the value it finds there."""

    name, backend = "oracle", "test"

    def __init__(self, tokenizer, wrong_from=None):
        self.tokenizer = tokenizer
        self.wrong_from = wrong_from

    def logits(self, tokens, start=0):
        prompt = self.tokenizer.decode(tokens[: start + 1], skip_special_tokens=True)
        key = re.search(r'\{"(\w+)": "$', prompt)[1]
        value = json.loads(prompt.split("\n\n")[1])[key]
        answer = self.tokenizer(value, add_special_tokens=False)["input_ids"]
        logits = torch.zeros(len(tokens) - start, len(self.tokenizer))
        for position, token in enumerate(answer):
            right = self.wrong_from is None or position < self.wrong_from
            logits[position, token if right else 0] = 50.0
        return logits


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(160, 1500), seed=st.integers(0, 2**32))
def test_a_prompt_fills_its_budget_and_holds_the_needle_once(tokenizer, length, seed):
    for prompt in build_prompts(tokenizer, length, num_samples=3, seed=seed):
        # A pair costs at most 16 of these tokens: one more would not have fitted.
        assert length - 16 <= prompt.num_tokens <= length
        assert prompt.text.count(f'"{prompt.key}": "{prompt.value}"') == 1
        assert prompt.text.endswith(f'{{"{prompt.key}": "')
        pairs = json.loads(prompt.text.split("\n\n")[1])
        assert len(pairs) == prompt.num_pairs and pairs[prompt.key] == prompt.value
        assert list(pairs).index(prompt.key) == round(prompt.depth * (prompt.num_pairs - 1))


def test_a_long_prompt_is_as_full_as_a_short_one(tokenizer):
    prompt = next(build_prompts(tokenizer, 40_000, num_samples=2, seed=5))
    assert 40_000 - 16 <= prompt.num_tokens <= 40_000


def test_prompt_and_answer_are_the_tokens_of_their_text(tokenizer):
    prompt = next(build_prompts(tokenizer, 400, num_samples=1, seed=5))
    assert prompt.prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt.prompt[1:]) == prompt.text
    assert tokenizer.decode(prompt.answer) == prompt.value
    whole = tokenizer(prompt.text + prompt.value, add_special_tokens=False)["input_ids"]
    assert prompt.prompt[1:].tolist() + prompt.answer.tolist() == whole


def test_needles_are_spread_evenly_from_first_to_last(tokenizer):
    assert [p.depth for p in build_prompts(tokenizer, 300, 5, seed=0)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [p.depth for p in build_prompts(tokenizer, 300, 1, seed=0)] == [0.5]


def test_the_same_seed_gives_the_same_prompts(tokenizer):
    def texts(seed):
        return [prompt.text for prompt in build_prompts(tokenizer, 300, 4, seed)]

    assert texts(1) == texts(1)
    assert not set(texts(1)) & set(texts(2))


def test_a_length_without_a_pair_is_refused_with_the_shortest(tokenizer):
    with pytest.raises(ConfigError, match=r"recall_lengths=20: .* Use lengths of at least (\d+)\.") as caught:
        next(build_prompts(tokenizer, 20, 1, seed=0))
    shortest = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert next(build_prompts(tokenizer, shortest, 1, seed=0)).num_pairs == 1


def test_a_model_that_looks_the_value_up_has_full_marks(tokenizer):
    entries = measure_recall(Oracle(tokenizer), [200, 600], num_samples=8, seed=0)
    assert [entry.length for entry in entries] == [200, 600]
    for entry in entries:
        assert (entry.samples, entry.exact_match, entry.token_accuracy) == (8, 1.0, 1.0)
        assert entry.answer_loss == pytest.approx(0.0, abs=1e-6)


def test_one_wrong_token_is_no_exact_match_but_counts_in_part(tokenizer):
    (entry,) = measure_recall(Oracle(tokenizer, wrong_from=1), [300], num_samples=4, seed=0)
    assert entry.exact_match == 0.0
    assert entry.token_accuracy == pytest.approx(4 / entry.answer_tokens)
    assert 0.0 < entry.token_accuracy < 1.0


def test_a_random_model_recalls_nothing(hf_directory):
    (entry,) = measure_recall(TransformersScorer(hf_directory), [400], num_samples=8, seed=0)
    assert entry.exact_match == 0.0
    assert entry.answer_loss > entry.chance_loss > 0.0


def test_the_chance_loss_is_one_uniform_guess_per_value(tokenizer):
    (entry,) = measure_recall(Oracle(tokenizer), [200], num_samples=3, seed=0)
    assert entry.chance_loss * entry.answer_tokens == pytest.approx(3 * math.log(9000))
