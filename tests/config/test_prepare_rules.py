"""Every rule between the fields of ``PrepareConfig``, with what it says."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_prolong.config.rules import check, findings
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.errors import ConfigError

SOURCE = {"domain": "docs", "path": "corpus/docs"}
ROW_SET = {"path": "docs-8192", "domain": "docs", "seq_length": "8K"}
MIXTURE = {"root": "data", "tokenizer": "tokenizer", "mixture": [{"path": "docs-8192", "proportion": 1.0}]}


def config(**changes: Any) -> PrepareConfig:
    settings = {"output": "data", "sources": [SOURCE], "tokenizer": {"path": "llama"}, "row_sets": [ROW_SET]}
    return PrepareConfig(**{**settings, **changes})


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config(**changes))
    return str(caught.value)


def test_a_plain_configuration_passes() -> None:
    check(config())


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "a prompt without a completion": (
        {"sources": [{**SOURCE, "prompt_field": "question"}]},
        "sources[0].prompt_field=question: a prompt and its completion are a pair. "
        "Set sources[0].completion_field=completion, or sources[0].prompt_field=null.",
    ),
    "a completion without a prompt": (
        {"sources": [{**SOURCE, "completion_field": "answer"}]},
        "sources[0].completion_field=answer: a prompt and its completion are a pair. "
        "Set sources[0].prompt_field=prompt, or sources[0].completion_field=null.",
    ),
    "messages and tokens": (
        {"sources": [{**SOURCE, "messages_field": "messages", "tokens_field": "input_ids"}]},
        "sources[0].messages_field=messages, tokens_field=input_ids: a document is made of one of them. "
        "Set sources[0].tokens_field=null.",
    ),
    "messages in a tree of text": (
        {"sources": [{**SOURCE, "format": "text", "messages_field": "messages"}]},
        "sources[0].messages_field=messages: format=text has no such columns. "
        "Set sources[0].messages_field=null, or sources[0].format to one of jsonl, parquet, huggingface.",
    ),
    "groups of a tree of text": (
        {"sources": [{**SOURCE, "format": "text", "group_field": "site"}]},
        "sources[0].group_field=site: format=text has no columns, and its groups are files or repositories. "
        "Set sources[0].group_field=null.",
    ),
    "messages that are to be ignored": (
        {"sources": [{**SOURCE, "messages_field": "messages", "ignore_fields": ["messages"]}]},
        "sources[0].ignore_fields=[messages]: the documents are made of it. Take messages out of it.",
    ),
    "pieces do not fill rows": (
        {"row_sets": [{**ROW_SET, "document_length": "3K"}]},
        "row_sets[0].document_length=3K: pieces of one length must fill the row of seq_length=8K exactly. "
        "Set row_sets[0].document_length=1K, or null to pack whole documents.",
    ),
    "one directory twice": (
        {"row_sets": [ROW_SET, ROW_SET]},
        "row_sets[1].path=docs-8192: is the directory of an earlier row set. Set row_sets[1].path=docs-8192-2.",
    ),
    "a path that leaves the output": (
        {"row_sets": [{**ROW_SET, "path": "../docs"}]},
        "row_sets[0].path=../docs: names one directory of its own below output. "
        "Set row_sets[0].path=docs-8192, or such.",
    ),
    "the directory of the tokenizer": (
        {"row_sets": [{**ROW_SET, "path": "tokenizer"}]},
        "row_sets[0].path=tokenizer: names one directory of its own below output. "
        "Set row_sets[0].path=docs-8192, or such.",
    ),
    "an unknown domain": (
        {"row_sets": [ROW_SET, {**ROW_SET, "path": "b", "domain": "docs+books"}]},
        "row_sets[1].domain=docs+books: no source has the domain 'books'. Use docs, or several joined by +.",
    ),
    "a domain that nothing packs": (
        {"sources": [SOURCE, {**SOURCE, "domain": "books"}]},
        "sources[1].domain=books: no row set packs this domain, so its tokens would be lost. "
        "Add a row set of domain books, or remove the source.",
    ),
    "a source without a place": (
        {"sources": [{"domain": "docs"}]},
        "sources[0].path='': a source lies somewhere. Set sources[0].path.",
    ),
    "text and conversations in one row set": (
        {
            "sources": [SOURCE, {"domain": "chat", "path": "chat", "messages_field": "messages"}],
            "row_sets": [{**ROW_SET, "domain": "docs+chat"}],
        },
        "row_sets[0].domain=docs+chat: conversations have target masks and text has none. Make a row set of each.",
    ),
    "split without a length": (
        {"row_sets": [{**ROW_SET, "packing": "split"}]},
        "row_sets[0].packing=split: cuts documents to one length, which is not given. "
        "Set row_sets[0].document_length=8K, or a divisor of it.",
    ),
    "a length without split": (
        {"row_sets": [{**ROW_SET, "packing": "best_fit", "document_length": "4K"}]},
        "row_sets[0].document_length=4K: packing=best_fit keeps documents as they are. "
        "Set row_sets[0].packing=split, or row_sets[0].document_length=null.",
    ),
    "no tokenizer": (
        {"tokenizer": {}},
        "tokenizer.path=null: there is no tokenizer, and nothing says what to train. Set tokenizer.path to the "
        "directory of the model, or tokenizer.vocab_size and tokenizer.train_bytes.",
    ),
    "a given tokenizer that is to be trained": (
        {"tokenizer": {"path": "llama", "vocab_size": 2048}},
        "tokenizer.path=llama: a given tokenizer is not trained. "
        "Set tokenizer.vocab_size=null and tokenizer.train_bytes=null, or tokenizer.path=null.",
    ),
    "an installation without such text": (
        {"sources": [{"domain": "docs", "format": "installation", "max_bytes": "1M"},
                     {"domain": "books", "format": "installation", "max_bytes": "1M"}],
         "row_sets": [{**ROW_SET, "domain": "docs+books"}]},
        "sources[1].domain=books: an installation has no such text. Use one of code_by_repo, reference, docs, chat.",
    ),
    "an installation without a size": (
        {"sources": [{"domain": "docs", "format": "installation"}]},
        "sources[0].max_bytes=None: an installation is read up to one size, the same for all its domains. "
        "Set the same max_bytes, such as 8M, for every source with format=installation.",
    ),
    "a stage that wants other rows": (
        {"stages": {"stage1": {"tokens": "1M", "data": {**MIXTURE, "mixture": [{"path": "books", "proportion": 1}]}}}},
        "stages.stage1: mixture path=books: is no row set of this configuration. "
        "Add it to row_sets, or remove stages.stage1.",
    ),
    "a stage whose shares do not sum to 1": (
        {"stages": {"s": {"tokens": "1M", "data": {**MIXTURE, "mixture": [{"path": "docs-8192", "proportion": 0.5}]}}}},
        "stages.s: sum of proportions=0.5: proportions sum to 1. Scale them so that they do.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_contradictions_are_refused_with_rule_and_remedy(name: str) -> None:
    changes, message = REFUSALS[name]
    assert refusal(**changes) == message


def test_a_sum_that_almost_is_1_is_printed_with_its_digits() -> None:
    almost = {**MIXTURE, "mixture": [{"path": "docs-8192", "proportion": 0.9999985}]}
    assert refusal(stages={"s": {"tokens": "1M", "data": almost}}) == (
        "stages.s: sum of proportions=0.9999985: proportions sum to 1. Scale them so that they do."
    )


def test_the_rows_of_one_stage_have_one_length() -> None:
    both = {**MIXTURE, "mixture": [{"path": "docs-8192", "proportion": 0.5}, {"path": "docs-4096", "proportion": 0.5}]}
    row_sets = [ROW_SET, {"path": "docs-4096", "domain": "docs", "seq_length": "4K"}]
    stages = {"stage1": {"tokens": "1M", "data": both}}
    assert refusal(row_sets=row_sets, stages=stages) == (
        "stages.stage1: the row sets of one stage have one seq_length. Use row sets of one length."
    )


def test_a_sum_is_printed_without_what_rounding_leaves() -> None:
    shares = [{"path": "docs-8192", "proportion": share} for share in (0.7, 0.2)]
    assert refusal(stages={"s": {"tokens": "1M", "data": {**MIXTURE, "mixture": shares}}}) == (
        "stages.s: sum of proportions=0.9: proportions sum to 1. Scale them so that they do."
    )


def messages(**changes: Any) -> list[str]:
    return [str(finding) for finding in findings(config(**changes))]


@pytest.mark.parametrize("domain", ["", "a+b", "a/b"])
def test_a_domain_is_a_plain_name(domain: str) -> None:
    assert messages(sources=[SOURCE, {**SOURCE, "domain": domain}]) == [
        f"sources[1].domain={domain!r}: a domain is a plain name. Set sources[1].domain=books, or such."
    ]


@pytest.mark.parametrize("given", [{"vocab_size": 512}, {"train_bytes": "1M"}])
def test_a_tokenizer_is_trained_with_both_settings(given: dict[str, Any]) -> None:
    assert messages(tokenizer=given) == [
        "tokenizer.path=null: there is no tokenizer, and nothing says what to train. Set tokenizer.path to the "
        "directory of the model, or tokenizer.vocab_size and tokenizer.train_bytes."
    ]
    assert messages(tokenizer={"path": "llama", **given}) == [
        "tokenizer.path=llama: a given tokenizer is not trained. Set tokenizer.vocab_size=null and "
        "tokenizer.train_bytes=null, or tokenizer.path=null."
    ]


def test_an_installation_is_read_up_to_one_size() -> None:
    installed = [
        {"domain": domain, "format": "installation", "max_bytes": size}
        for domain, size in (("docs", "8M"), ("reference", "4M"))
    ]
    row_sets = [ROW_SET, {**ROW_SET, "path": "reference", "domain": "reference"}]
    rule = (
        "an installation is read up to one size, the same for all its domains. Set the same max_bytes, such as 8M, for "
    )
    assert messages(sources=installed, row_sets=row_sets) == [
        f"sources[{number}].max_bytes={size}: {rule}every source with format=installation."
        for number, size in enumerate((8 * 2**20, 4 * 2**20))
    ]
    # Another source may be read up to another size.
    others = [installed[0], {"domain": "reference", "path": "corpus", "max_bytes": "4M"}]
    assert messages(sources=others, row_sets=row_sets) == []


def test_a_prompt_and_its_completion_make_a_document() -> None:
    assert messages(sources=[{**SOURCE, "prompt_field": "question", "completion_field": "answer"}]) == []


def test_the_column_of_groups_cannot_be_ignored() -> None:
    source = {**SOURCE, "format": "jsonl", "group_field": "site", "ignore_fields": ["date", "site"]}
    assert messages(sources=[source]) == [
        "sources[0].ignore_fields=[site]: the documents are made of it. Take site out of it."
    ]


def test_a_directory_whose_name_begins_with_a_dot_is_refused() -> None:
    assert messages(row_sets=[{**ROW_SET, "path": ".hidden"}]) == [
        "row_sets[0].path=.hidden: names one directory of its own below output. Set row_sets[0].path=docs-8192, or "
        "such."
    ]


def test_the_domains_there_are_are_all_named() -> None:
    sources = [SOURCE, {"domain": "code", "path": "corpus/code"}]
    row_sets = [ROW_SET, {**ROW_SET, "path": "both", "domain": "code+prose"}]
    assert messages(sources=sources, row_sets=row_sets) == [
        "row_sets[1].domain=code+prose: no source has the domain 'prose'. Use docs, code, or several joined by +."
    ]
