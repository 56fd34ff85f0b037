import json
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nemo_prolong.errors import ConfigError
from nemo_prolong.evaluate.recall import beginning_ids, build_prompts, measure_recall
from nemo_prolong.evaluate.transformers_scorer import TransformersScorer
from tests.support.tokenizers import KINDS


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


class PerfectModel:
    """Goes on as the joined text of the prompts does, token by token, and knows nothing of characters."""

    name, backend = "perfect", "test"

    def __init__(self, tokenizer, prompts):
        self.tokenizer = tokenizer
        self.texts = []
        for prompt in prompts:
            ids = tokenizer(f'{prompt.text}{prompt.value}"}}', add_special_tokens=False)["input_ids"]
            begin = len(prompt.prompt) - len(prompt_tokens(tokenizer, prompt))
            self.texts.append([*prompt.prompt[:begin].tolist(), *ids])

    def logits(self, tokens, start=0):
        seen = tokens.tolist()
        (text,) = [text for text in self.texts if text[: len(seen)] == seen]
        logits = torch.zeros(len(seen) - start, len(self.tokenizer))
        for row, position in enumerate(range(start, len(seen))):
            logits[row, text[position + 1]] = 50.0
        return logits


def prompt_tokens(tokenizer, prompt):
    """Return the tokens of a prompt that stand after the beginning of the text."""
    return prompt.prompt[len(beginning_ids(tokenizer)) :]


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp(request.param) / "tokenizer")


@pytest.mark.parametrize("length", [220, 700])
def test_a_perfect_model_has_full_marks_with_any_tokenizer(any_tokenizer, length):
    prompts = list(build_prompts(any_tokenizer, length, num_samples=6, seed=1))
    assert all(prompt.num_tokens <= length for prompt in prompts)
    (entry,) = measure_recall(PerfectModel(any_tokenizer, prompts), [length], num_samples=6, seed=1)
    assert (entry.exact_match, entry.token_accuracy) == (1.0, 1.0)
    assert entry.answer_loss == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("length", [220, 700])
def test_prompt_and_answer_are_tokens_of_the_joined_text(any_tokenizer, length):
    for prompt in build_prompts(any_tokenizer, length, num_samples=3, seed=2):
        whole = any_tokenizer(f'{prompt.text}{prompt.value}"}}', add_special_tokens=False)["input_ids"]
        found = [*prompt_tokens(any_tokenizer, prompt).tolist(), *prompt.answer.tolist()]
        assert found == whole[: len(found)]
        assert re.sub(r"\D", "", any_tokenizer.decode(prompt.answer)) == prompt.value
        assert all(re.search(r"\d", any_tokenizer.decode(token)) for token in prompt.answer)


def test_a_tokenizer_without_digits_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "Below": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(ConfigError, match=r"has no tokens for \d{4}, one of the values that recall asks for"):
        next(build_prompts(tokenizer, 300, 1, seed=0))


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tmp_path, tokenizer):
    wordpiece = KINDS["wordpiece"](tmp_path)
    assert beginning_ids(wordpiece) == [wordpiece.cls_token_id]
    llama3 = KINDS["llama3"](tmp_path / "llama3")
    assert beginning_ids(llama3) == [llama3.bos_token_id]
    prompt = next(build_prompts(llama3, 300, 1, seed=0)).prompt.tolist()
    assert prompt.count(llama3.bos_token_id) == 1
    # It puts nothing there, and names a token for it.
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    assert beginning_ids(tokenizer) == [tokenizer.bos_token_id]


def test_a_tokenizer_that_wants_no_beginning_gets_none(tokenizer):
    silent = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token=tokenizer.bos_token, add_bos_token=False
    )
    assert beginning_ids(silent) == []
    assert tokenizer.bos_token_id not in next(build_prompts(silent, 300, 1, seed=0)).prompt.tolist()


def test_a_slow_tokenizer_is_refused_with_the_way_out():
    slow = PreTrainedTokenizerBase()
    slow.name_or_path = "models/old"
    with pytest.raises(ConfigError, match=r"tokenizer=models/old: is no fast tokenizer.* Save it with a tokenizer"):
        next(build_prompts(slow, 300, 1, seed=0))


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
