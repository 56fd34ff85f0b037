import hashlib
import json
import re
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import DataManifest
from nemo_prolong.report.data_card.charts import Segment, StackedBar, StackedBars, share_axis, strip
from nemo_prolong.report.data_card.figures import length_figures
from nemo_prolong.report.data_card.markdown import escape
from nemo_prolong.report.data_card.write import write_card
from tests.support.html_page import Page

SCRIPT = "<script>alert('x')</script>\"&amp;"
EVERYTHING = st.text(st.characters(codec=None), max_size=30)


def row_set(**changes):
    """Return 100 rows of 2,048 tokens, each split into whole documents of that length."""
    return {
        "domain": "code", "split": "train", "packing": "split", "seq_length": 2048, "document_length": 2048,
        "rows": 100, "documents": 100, "tokens": 204_800, "fill": 1.0, "input_documents": 60,
        "input_tokens": 256_000, "dropped_tokens": {"short_document": 12_800, "remainder": 38_400},
        "dropped_documents": {"short_document": 9}, "sum_squared_lengths": 100 * 2048**2,
        "length_histogram": {"documents": [0] * 11 + [100], "tokens": [0] * 11 + [204_800]},
        "sha256": "5e" * 32, "shards": {"shard.00000.mds": {"bytes": 10, "sha256": "ab" * 32}}, **changes,
    }  # fmt: skip


def manifest(**changes):
    """Return the manifest of two domains, three row sets and one stage."""
    docs = row_set(domain="docs", packing="concat", document_length=None, dropped_tokens={"last_row": 0},
                   input_tokens=204_800, sum_squared_lengths=100 * 4 * 512**2, documents=400)  # fmt: skip
    best = row_set(domain="docs", packing="best_fit", document_length=None, fill=0.99951, tokens=204_700,
                   input_tokens=204_700, dropped_tokens={}, split="validation")  # fmt: skip
    return {
        "format": 2, "config_sha256": "c0" * 32, "config": {"seed": 42, "shard_bytes": 67_108_864}, "seed": 42,
        "command": "python scripts/prepare_data.py +exp=mini/data", "tokenizer": "tokenizer",
        "tokenizer_sha256": "70" * 32, "tokenizer_library": "tokenizers", "vocab_size": 2048,
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
        "sources": [
            {"domain": "code", "format": "repositories", "path": "src", "split": "auto", "documents": 60,
             "tokens": 256_000, "input_bytes": 768_000, "rejected": {"invalid_utf8": {"documents": 2, "bytes": 2048}},
             "rejected_examples": [{"key": "src/a.bin", "reason": "invalid_utf8", "bytes": 1024, "detail": "byte 7"}],
             "files": [{"name": f"src/{n}.py", "bytes": 12_800, "sha256": f"{n:064x}"} for n in range(60)]},
            {"domain": "docs", "format": "jsonl", "path": "docs.jsonl", "split": "auto", "documents": 400,
             "tokens": 204_800, "input_bytes": 819_200, "rejected": {}, "rejected_examples": [],
             "files": [{"name": "docs.jsonl", "bytes": 819_200, "sha256": "d0" * 32}]},
        ],
        "domains": {
            "code": {"train": {"documents": 60, "tokens": 256_000,
                               "length_histogram": {"documents": [0] * 10 + [30, 15, 15],
                                                    "tokens": [0] * 10 + [51_200, 25_600, 179_200]}}},
            "docs": {"train": {"documents": 300, "tokens": 150_000,
                               "length_histogram": {"documents": [0] * 8 + [300], "tokens": [0] * 8 + [150_000]}},
                     "validation": {"documents": 100, "tokens": 54_800,
                                    "length_histogram": {"documents": [0] * 9 + [100],
                                                         "tokens": [0] * 9 + [54_800]}}},
        },
        "row_sets": {"code-2048": row_set(), "docs-2048": docs, "validation-2048": best},
        "stages": {"stage1": {"tokens": 409_600, "row_sets": {
            "code-2048": {"proportion": 0.6, "rows_taken": 120, "epochs": 1.2},
            "docs-2048": {"proportion": 0.4, "rows_taken": 80, "epochs": 0.8}}}},
        "python": "3.11.4", "versions": {"tokenizers": "0.22.2"}, **changes,
    }  # fmt: skip


def sample(**changes):
    return {
        "row": 7, "domain": "docs", "tokens": 2048, "spans": [[0, 900], [900, 2048]],
        "boundaries": [
            {"position": 0, "before": "", "after": "<|begin_of_text|># file: a.py"},
            {"position": 900, "before": "the end<|end_of_text|>", "before_special": [[7, 22]],
             "after": "<|begin_of_text|>next", "after_special": [[0, 17]]},
        ],
        "masked_text": [{"text": "question", "target": False}, {"text": "answer", "target": True},
                        {"text": "<|eot_id|>", "target": True, "special": True}], **changes,
    }  # fmt: skip


def write_inputs(directory, facts=None, rows=None):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").write_text(json.dumps(facts or manifest()))
    (directory / "samples.json").write_text(json.dumps({"row_sets": rows or {"docs-2048": [sample()]}}))


def card(directory, facts=None, rows=None):
    """Write a card; return the parsed page, the page and the Markdown."""
    write_inputs(directory, facts, rows)
    write_card(directory)
    html = (directory / "card.html").read_text("utf-8")
    return Page(html), html, (directory / "card.md").read_text("utf-8")


def rectangles(svg, class_):
    """Return (x, y, width, height) of every rectangle of a class."""
    found = re.findall(rf'<rect x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)" class="{class_}">', str(svg))
    return [tuple(map(float, numbers)) for numbers in found]


def test_what_was_not_read_is_in_the_card_with_a_warning(tmp_path):
    facts = manifest()
    facts["sources"][1].update(
        unread_columns={"url": 400, "tools": 7, **{f"n{n}": 1 for n in range(30)}},
        columns_to_check=["tools"],
        dropped_keys={"emotion": 12},
    )
    page, _, markdown = card(tmp_path, facts)
    warning = (
        "The source docs.jsonl of docs has columns that were not read, and their names say that they change what is"
    )
    for text in (page.text, re.sub(r"\\(?=\W)", "", markdown)):
        assert warning in text
        assert "learned: tools. If that is meant, name them in its ignore_fields." in text
        assert "Columns and keys that were not read" in text
        assert "and 12 more" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.replace("\\", "").splitlines()]
    assert ["docs.jsonl", "docs", "column", "tools", "7"] in rows
    assert ["docs.jsonl", "docs", "key of messages", "emotion", "12"] in rows
    plain = card(tmp_path / "plain")
    assert all("not read" not in text for text in (plain[0].text, plain[2]))


def test_page_and_markdown_say_what_the_directory_holds(tmp_path):
    page, _, markdown = card(tmp_path)
    flat = re.sub(r"\\(?=\W)", "", markdown)
    for text in (page.text, flat):
        for fact in (
            "450K tokens of code and docs, in rows of 2K", "2 sources, packed into 3 row sets for stage1", "460",
            "396K train", "53.5K validation", "99.984%", "validation-2048", "99.951%", "split at 2K", "best_fit",
            "shorter than a piece", "12,800", "38,400", "src/a.bin", "byte 7", "d0" * 32, "70" * 32, "5e" * 32,
            "<|begin_of_text|>", "python scripts/prepare_data.py +exp=mini/data", "0.22.2", "67108864",
            "and 40 more",
            hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest(),
        ):  # fmt: skip
            assert fact in text, fact
    assert "120 of 100" in page.text and "1.20 epochs" in page.text


def test_a_card_loads_nothing_and_runs_nothing(tmp_path):
    page, html, _ = card(tmp_path)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "srcset", "onload"} & {name for name, _ in page.attributes}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "@import" not in html and "url(" not in html


def test_two_directories_with_the_same_result_have_the_same_card(tmp_path, monkeypatch):
    first = card(tmp_path / "one")[1:]
    monkeypatch.setattr(time, "time", lambda: 1.0)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert card(tmp_path / "elsewhere" / "two")[1:] == first
    assert str(tmp_path) not in first[0] + first[1]


def hostile(value):
    """Return JSON with every string replaced, and every key that names something of the data."""
    if isinstance(value, str):
        return SCRIPT
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return {key: hostile(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_no_text_of_the_data_becomes_markup(tmp_path):
    facts = {**hostile(manifest()), "format": 2}
    facts["row_sets"] = {SCRIPT: row_set(domain=SCRIPT, packing=SCRIPT, dropped_tokens={SCRIPT: 51_200})}
    facts["domains"] = {SCRIPT: {SCRIPT: manifest()["domains"]["code"]["train"]}}
    facts["stages"] = {
        SCRIPT: {"tokens": 9, "row_sets": {SCRIPT: {"proportion": 1.0, "rows_taken": 900, "epochs": 9.0}}}
    }
    usual = card(tmp_path / "usual")[0]
    page, _, markdown = card(tmp_path / "hostile", facts, {SCRIPT: [hostile(sample())]})
    assert set(page.tags) - set(usual.tags) <= {"aside"}
    assert page.text.count("<script>alert('x')</script>") > 30
    outside_code = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    assert "<script" not in outside_code.replace("\\<", "")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=EVERYTHING)
def test_any_text_can_be_written_and_breaks_no_table(tmp_path, text):
    rows = {"docs-2048": [sample(domain=text, boundaries=[{"position": 3, "before": text, "after": text}])]}
    facts = manifest(command=text, bos_token=text, config={"a": text})
    facts["sources"][0]["path"] = text
    _, _, markdown = card(tmp_path, facts, rows)
    outside_code = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\|$\n?)+", outside_code, flags=re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table


@given(EVERYTHING)
def test_escaped_text_is_one_line_without_a_bare_mark(text):
    escaped = escape(text)
    assert len(escaped.splitlines()) <= 1
    assert not re.search(r"(?<!\\)[`*\[\]<>|]", re.sub(r"\\\\", "", escaped))


def test_control_characters_are_shown_and_special_tokens_stay(tmp_path):
    boundary = {"position": 1, "before": "\x00\x1b[31m\u202e\ud800<eos>", "before_special": [[8, 13]], "after": ""}
    _, html, _ = card(tmp_path, None, {"docs-2048": [sample(boundaries=[boundary])]})
    assert "\u2400\u241b[31m\ufffd\ufffd" in html
    assert re.search(r'<b class="special">&lt;eos&gt;</b>', html)


def test_only_what_the_sample_calls_special_is_set_off(tmp_path):
    _, html, _ = card(tmp_path)
    assert html.count('<b class="special">&lt;|begin_of_text|&gt;</b>') == 1
    assert "<pre>&lt;|begin_of_text|&gt;# file: a.py</pre>" in html
    assert '<span class="target">answer</span><b class="special target">&lt;|eot_id|&gt;</b>' in html


def chat_card(directory, **changes):
    """Write the card of a directory with one row set of conversations more; return the page's text and the Markdown."""
    counted = {
        "target_tokens": 150_000, "input_target_tokens": 200_000, "cut_documents": 17, "cut_target_tokens": 45_678,
        "dropped_documents": {"no_target": 0, "last_row": 1},
    }  # fmt: skip
    facts = manifest()
    facts["row_sets"]["chat-2048"] = row_set(domain="docs", packing="intact", **{**counted, **changes})
    page, _, markdown = card(directory, facts)
    return page.text, re.sub(r"\\(?=\W)", "", markdown)


def test_the_targets_of_row_sets_with_masks_are_in_the_card(tmp_path):
    for text in chat_card(tmp_path):
        for fact in ("Targets in rows", "150,000", "200,000", "73.2%", "17", "45,678"):
            assert fact in text, fact
        assert "Warning" not in text


def test_a_card_without_masks_or_of_an_older_version_counts_no_targets(tmp_path):
    for text in card(tmp_path)[1:]:
        assert "Targets in rows" not in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dropped_documents": {"no_target": 12}},
         "packing leaves 12 of 60 documents no target token, so they are left out. Longer rows keep them."),
        ({"cut_target_tokens": 60_000},
         "the ends of rows cut off 60,000 target tokens of documents that are in rows, and 150,000 are left."),
        ({"input_tokens": 500_000, "dropped_tokens": {"truncated": 280_000, "last_row": 15_200}},
         "59% of the tokens are in no row, most of them because of truncated."),
    ],
)  # fmt: skip
def test_what_packing_lost_is_warned_of(tmp_path, changes, sentence):
    text, markdown = chat_card(tmp_path, **changes)
    assert f"chat-2048: {sentence}" in text
    assert f"> **Warning:** chat-2048: {sentence}" in markdown


def test_rows_beyond_max_rows_are_no_loss(tmp_path):
    text, _ = chat_card(tmp_path, input_tokens=900_000, dropped_tokens={"max_rows": 690_000, "last_row": 5_200})
    assert "are in no row, most of them" not in text


@pytest.mark.parametrize(("epochs", "warned"), [(2.7, False), (2.71, True)])
def test_a_stage_that_repeats_too_much_is_warned_of(tmp_path, epochs, warned):
    facts = manifest()
    facts["stages"]["stage1"]["row_sets"]["docs-2048"]["epochs"] = epochs
    page, html, markdown = card(tmp_path, facts)
    sentence = f"stage1 walks {epochs:.2f} times through docs-2048, more than the 2.7 times"
    assert (sentence in page.text, f"> **Warning:** {sentence}" in markdown) == (warned, warned)
    assert ('<td class="beyond">' in html) == warned


def test_an_unknown_reason_of_a_drop_is_shown_by_its_name(tmp_path):
    facts = manifest()
    facts["row_sets"]["docs-2048"]["dropped_tokens"] = {"near_duplicate": 4_321}
    page, _, _ = card(tmp_path, facts)
    assert "near duplicate" in page.text and "4,321" in page.text


def test_histogram_bars_are_as_high_as_their_shares():
    figure = next(figure for figure in length_figures(DataManifest(**manifest())) if figure.title == "code")
    documents, tokens = (rectangles(figure.wide, f"bar s{style}") for style in (0, 2))
    # The axis ends at the first tick at or above the tallest bar of any domain, which is all of docs: 100%.
    full = 230 - 42 - 26
    assert [height / full for *_, height in documents] == pytest.approx([0.5, 0.25, 0.25], abs=1e-3)
    assert [height / full for *_, height in tokens] == pytest.approx([0.2, 0.1, 0.7], abs=1e-3)
    assert "2K\u20134K tokens: 10% of the tokens" in figure.wide


def test_stacked_segments_follow_one_another_to_the_end():
    bar = StackedBar("a", "", [Segment(0.25, 2, ""), Segment(0.5, 2, ""), Segment(9.0, 2, "")])
    drawn = rectangles(StackedBars("", share_axis("", 1.0, 10), [bar]).render(1015), "bar s2")
    assert [(x, width) for x, _, width, _ in drawn] == [(1, 250), (251, 500), (751, 250)]


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=60), st.sampled_from([360.0, 1032.0]))
def test_documents_of_a_strip_lie_in_proportion(lengths, width):
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    drawn = rectangles(strip(spans, ends[-1], width), r"document s2(?: odd)?")
    assert [x for x, *_ in drawn] == pytest.approx([start * width / ends[-1] for start, _ in spans], abs=0.01)
    last_x, _, last_width, _ = drawn[-1]
    assert last_x + last_width == pytest.approx(width, abs=0.6)


def test_attention_cost_is_a_share_of_full_rows():
    sets = DataManifest(**manifest()).row_sets
    assert sets["code-2048"].attention_share == 1.0
    assert sets["docs-2048"].attention_share == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "manifest.json: format: no data card can be made of it: Input should be 2."),
        ({"row_sets": {}}, "manifest.json: row_sets: no data card can be made of it:"),
        ({"row_sets": {"code-2048": row_set()}}, "stage stage1 takes rows of docs-2048, which row_sets does not hold"),
    ],
)
def test_a_manifest_that_makes_no_card_is_refused_by_key(tmp_path, change, message):
    write_inputs(tmp_path, manifest(**change))
    with pytest.raises(DataError) as caught:
        write_card(tmp_path)
    assert message in str(caught.value) and "Prepare the data again." in str(caught.value)
    assert not (tmp_path / "card.html").exists()


def test_a_missing_or_torn_file_is_named(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "samples.json").write_text('{"row_sets": ')
    with pytest.raises(DataError, match=r"samples\.json: cannot be read \(Expecting value"):
        write_card(tmp_path)
    (tmp_path / "samples.json").unlink()
    with pytest.raises(DataError, match=r"samples\.json: cannot be read \(\[Errno 2\]"):
        write_card(tmp_path)


def test_a_card_leaves_out_sections_that_have_nothing_to_say(tmp_path):
    facts = manifest(stages={}, sources=[{**source, "rejected": {}} for source in manifest()["sources"]])
    facts["sources"][0]["rejected_examples"] = []
    page, html, markdown = card(tmp_path, facts, {"docs-2048": []})
    for heading in ("Mixture", "Rejected documents", "Samples"):
        assert f">{heading}<" not in html and f"# {heading}\n" not in markdown
    assert "0 rejected" in page.text


def test_a_card_is_written_without_importing_torch(tmp_path):
    write_inputs(tmp_path)
    program = (
        "import sys; from pathlib import Path; from nemo_prolong.report.data_card.write import write_card; "
        "write_card(Path(sys.argv[1])); assert not {'torch', 'transformers', 'nemo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, timeout=60)
    assert (tmp_path / "card.md").exists()
