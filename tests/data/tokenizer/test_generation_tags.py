"""A chat template without its tags renders the same text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.tokenizer.generation_tags import without_generation_tags
from nemo_prolong.data.tokenizer.template import LLAMA3_TRAINING, ChatTemplate
from tests.support.chatml import TRAINING_TEMPLATE

PIECES = st.lists(st.sampled_from([" ", "\n", "\t", "a", "{{ x }}", "{%- if x %}b{% endif %}", "{# c #}"]), max_size=5)
OPENING = st.sampled_from(["{%- generation %}", "{% generation -%}", "{%+generation%}"])
CLOSING = st.sampled_from(["{%-endgeneration-%}", "{% endgeneration %}", "{% endgeneration +%}"])
TALK = Conversation([{"role": "user", "content": " why? "}, {"role": "assistant", "content": " so."}] * 2)


@given(PIECES, OPENING, PIECES, CLOSING, PIECES)
def test_without_its_tags_a_template_renders_the_same(
    before: list[str], opening: str, within: list[str], closing: str, after: list[str]
) -> None:
    source = "".join([*before, opening, *within, closing, *after])
    check(source, {"x": "y"})


def test_the_training_templates_render_conversations_the_same() -> None:
    for source in (LLAMA3_TRAINING.read_text(), TRAINING_TEMPLATE):
        check(source, {"bos_token": "<s>"})


def test_a_template_without_tags_stays_as_it_is() -> None:
    source = "{% set generation = 1 %}{{ generation }} {%- if generation %}{% endif %}"
    assert without_generation_tags(source) == source


def check(source: str, variables: dict[str, str]) -> None:
    tagged = ChatTemplate(source, "tagged", variables)
    served = ChatTemplate(without_generation_tags(source), "served", variables)
    assert tagged.marks_targets and not served.marks_targets
    assert served.render(TALK) == tagged.render(TALK)
