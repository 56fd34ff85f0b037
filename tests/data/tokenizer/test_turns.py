"""The token that ends a turn and the date are found from the template."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pytest

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.tokenizer import ChatEncoder, TextEncoder
from nemo_prolong.data.tokenizer.template import LLAMA3_TRAINING
from nemo_prolong.errors import ConfigError
from tests.support.chat_templates import DATE, THINKING, TOOLS
from tests.support.chat_tokenizers import LLAMA2_TRAINING, add_special_tokens, llama2_tokenizer

TALK = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
CHATML = """{%- for message in messages %}{{- '<|im_start|>' ~ message.role ~ '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content ~ '<|im_end|>' }}{% endgeneration %}
{{- '\\n' }}{%- else %}{{- message.content ~ '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<end_of_turn>
{% endgeneration %}{% else %}{{ m.content | trim }}<end_of_turn>
{% endif %}{% endfor %}"""
PHI = """{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content
~ '<|end|>\\n' }}{% endgeneration %}{% else %}{{ m.content ~ '<|end|>\\n' }}{% endif %}{% endfor %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]
{%- elif m.role == 'assistant' %}{% generation %}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}
{%- else %} {{ m.content }}{% endif %}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
CALL_ENDS = TOOLS.replace(
    "            {%- endif %}\n            {{-", '            {{- "<|reserved_special_token_4|>" }}{%- else %}{{-'
).replace("        {%- endgeneration", "{%- endif %}{%- endgeneration")
"""Ends a turn of calls with a token of its own, as Llama-3.1's does."""


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    """The tokenizer with the special tokens of several families."""
    directory = tmp_path_factory.mktemp("families") / "tokenizer"
    shutil.copytree(tokenizer_directory, directory)
    turns = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>")
    add_special_tokens(directory, *turns, "[INST]", "[/INST]", "[TOOL_CALLS]")
    return TextEncoder(directory)


def encoder_of(tokenizer: TextEncoder, template: str, directory: Path, today: date | None = None) -> ChatEncoder:
    path = directory / "train.jinja"
    path.write_text(template)
    return ChatEncoder(tokenizer, str(path), today)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (LLAMA3_TRAINING.read_text(), ["<|eot_id|>"]),
        (TOOLS, ["<|eot_id|>"]),
        (THINKING, ["<|eot_id|>"]),
        (CALL_ENDS, ["<|eot_id|>", "<|reserved_special_token_4|>"]),
        (CHATML, ["<|im_end|>"]),
        (GEMMA, ["<end_of_turn>"]),
        (PHI, ["<|end|>"]),
        (MISTRAL, ["<|end_of_text|>"]),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes(
    tokenizer: TextEncoder, tmp_path: Path, template: str, ends: list[str]
) -> None:
    chat = encoder_of(tokenizer, template, tmp_path)
    assert chat.format.end_of_turn == ends
    assert chat.format.end_of_turn_ids == [tokenizer.special_id(end) for end in ends]
    encoded = chat.encode(Conversation(TALK))
    assert tokenizer.special_id(ends[0]) in encoded.input_ids[encoded.mask == 1]
    assert (chat.format.template, chat.format.date) == (str(tmp_path / "train.jinja"), None)


def test_the_end_of_a_turn_of_llama_2_is_its_eos(tmp_path: Path) -> None:
    chat = encoder_of(TextEncoder(llama2_tokenizer(tmp_path / "tokenizer")), LLAMA2_TRAINING, tmp_path)
    assert (chat.format.end_of_turn, chat.format.end_of_turn_ids) == (["</s>"], [2])


def test_tokens_that_close_calls_do_not_end_a_turn(tokenizer: TextEncoder, tmp_path: Path) -> None:
    template = TOOLS.replace("(call.function | tojson)", '(call.function | tojson) ~ "[/INST]"')
    template = template.replace(
        'trim ~ "<|eot_id|>" }}\n        {%- endg', 'trim ~ "<|eot_id|><|end_of_text|>" }}{%- endg'
    )
    assert "<|eot_id|><|end_of_text|>" in template
    assert encoder_of(tokenizer, template, tmp_path).format.end_of_turn == ["<|eot_id|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML.replace(" ~ '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{- '<|im_end|>' }}"),
            r"ends an answer with <\|im_end\|> outside of its generation block, so a model never learns to stop\. Put "
            r"<\|im_end\|> before {% endgeneration %}\.",
        ),
        (
            CHATML.replace("<|im_end|>", "<|im_stop|>"),
            r"ends an answer with '<\|im_stop\|>\\n', which is no special token, so a model never learns",
        ),
        (
            CHATML.replace("<|im_end|>", ""),
            r"ends an answer with '\\n', which is no special token, so a model never learns to stop",
        ),
        (CHATML.replace("messages %}", "messages[:1] %}"), "does not write what an assistant says"),
        (
            CHATML.replace("message.role ~", "message.no.role ~"),
            "refuses a question and an answer: .* has no attribute",
        ),
    ],
)
def test_a_template_that_does_not_teach_to_stop_is_refused(
    tokenizer: TextEncoder, tmp_path: Path, template: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_of(tokenizer, template, tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        DATE,
        DATE.replace("strftime_now is defined", "messages[0].role == 'system'"),
        DATE.replace("strftime_now is defined", "tools"),
    ],
)
def test_a_template_that_asks_for_the_date_is_refused(tokenizer: TextEncoder, tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        encoder_of(tokenizer, template, tmp_path)
    assert str(refusal.value) == (
        f"tokenizer.chat_template={tmp_path}/train.jinja: asks for today's date, and the same conversation must give "
        "the same tokens tomorrow. Set tokenizer.chat_date to a date, such as 2024-07-26."
    )


def test_a_date_that_is_fixed_is_written_and_recorded(tokenizer: TextEncoder, tmp_path: Path) -> None:
    chat = encoder_of(tokenizer, DATE, tmp_path, date(2023, 3, 5))
    assert "Today is 05 March 2023<|eot_id|>" in chat.render(Conversation(TALK)).text
    assert chat.format.date == "2023-03-05"


def test_a_date_that_the_template_carries_stays_until_another_is_set(tokenizer: TextEncoder, tmp_path: Path) -> None:
    carried = DATE.replace("strftime_now is defined", "date_string is defined")
    carried = carried.replace('strftime_now("%d %B %Y")', "date_string")
    assert "Today is 26 July 2024<" in encoder_of(tokenizer, carried, tmp_path).render(Conversation(TALK)).text
    chat = encoder_of(tokenizer, carried, tmp_path, date(2023, 3, 5))
    assert "Today is 05 Mar 2023<" in chat.render(Conversation(TALK)).text


def test_a_date_that_nothing_asks_for_is_refused(tokenizer: TextEncoder) -> None:
    with pytest.raises(ConfigError) as refusal:
        ChatEncoder(tokenizer, None, date(2023, 3, 5))
    assert str(refusal.value) == (
        "tokenizer.chat_date=2023-03-05: the chat template asks for no date. Set tokenizer.chat_date=null."
    )
