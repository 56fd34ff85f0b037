"""The text of an installation, and the data that ``format=installation`` makes of it."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_prolong.config.rules import check
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.miniature.corpus import DOMAINS, read_corpus, write_corpus
from nemo_prolong.data.miniature.docstrings import api_entries, conversations, reference_text, topics_text
from nemo_prolong.data.miniature.installation import Installation
from nemo_prolong.data.preparation.run import prepare
from nemo_prolong.errors import DataError

ROW_SETS: list[dict[str, Any]] = [
    {"path": "docs-64", "domain": "docs", "seq_length": 64},
    {"path": "code-256", "domain": "code_by_repo", "seq_length": 256, "document_length": 256},
    {"path": "chat-128", "domain": "chat", "seq_length": 128},
    {
        "path": "validation-256",
        "domain": "code_by_repo+reference",
        "seq_length": 256,
        "document_length": 256,
        "split": "validation",
    },
]


def config(output: Path, **changes: Any) -> PrepareConfig:
    settings = {
        "output": str(output),
        "sources": [{"domain": domain, "format": "installation", "max_bytes": "1M"} for domain in DOMAINS],
        "tokenizer": {"vocab_size": 320, "train_bytes": 50_000},
        "validation_fraction": 0.2,
        "row_sets": ROW_SETS,
        "workers": 1,
    }
    cfg = PrepareConfig(**{**settings, **changes})
    check(cfg)
    return cfg


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, installation: Installation) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(config(output), installation=installation)
    return output


def test_an_installation_becomes_data_with_its_own_tokenizer(prepared: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert len(AutoTokenizer.from_pretrained(prepared / "tokenizer")) == manifest["vocab_size"] == 320
    assert {(source["domain"], source["split"]) for source in manifest["sources"]} == {
        (domain, split) for domain in DOMAINS for split in ("train", "validation")
    }
    assert {source["format"] for source in manifest["sources"]} == {"installation"}
    code = manifest["domains"]["code_by_repo"]
    assert code["train"]["documents"] + code["validation"]["documents"] == 12
    reader = MdsReader(prepared / "validation-256")
    assert [reader[number]["domain"] for number in range(4)] == ["code_by_repo", "reference"] * 2
    chat = MdsReader(prepared / "chat-128")
    bos = AutoTokenizer.from_pretrained(prepared / "tokenizer").bos_token_id
    assert manifest["row_sets"]["chat-128"]["packing"] == "intact" and "mask" in chat.columns
    assert all(chat[number]["input_ids"][0] == bos for number in range(len(chat)))


def test_the_same_installation_gives_the_same_bytes(prepared: Path, installation: Installation, tmp_path: Path) -> None:
    prepare(config(tmp_path / "again"), installation=installation)
    for path in sorted(prepared.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(prepared)).read_bytes(), path


def test_another_seed_chooses_other_documents(prepared: Path, installation: Installation, tmp_path: Path) -> None:
    manifest = prepare(config(tmp_path / "other", seed=7), installation=installation)
    before = json.loads((prepared / "manifest.json").read_text())
    assert manifest.row_sets["docs-64"].sha256 != before["row_sets"]["docs-64"]["sha256"]


def test_too_little_text_for_a_tokenizer_is_refused(installation: Installation, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=30000: the text has only"):
        prepare(
            config(tmp_path / "data", tokenizer={"vocab_size": 30_000, "train_bytes": 50_000}),
            installation=installation,
        )


def test_repositories_are_held_out_in_all_domains_at_once(installation: Installation, tmp_path: Path) -> None:
    write_corpus(read_corpus(installation, DOMAINS, 10**6, 0.2, 42), tmp_path)
    groups = {
        split: {
            json.loads(line)["group"]
            for path in tmp_path.glob(f"*.{split}.jsonl")
            for line in path.open(encoding="utf-8")
        }
        for split in ("train", "validation")
    }
    assert groups["train"] and groups["validation"] and groups["train"].isdisjoint(groups["validation"])


def test_tests_licences_and_generated_files_are_not_read(installation: Installation) -> None:
    corpus = read_corpus(installation, DOMAINS, 4 * 10**6, 0.2, 42)
    texts = [doc.text for documents in corpus.documents.values() for doc in documents]
    assert not any("UNWANTED" in text for text in texts)
    [package0] = [doc.text for doc in corpus.documents["code_by_repo"] if doc.repository == "package0"]
    assert package0.startswith("# file: package0/copy_of_module0.py\n")
    assert "# file: package0/module0.py" not in package0
    assert package0.count("# file: ") == 6


def test_a_repository_gives_at_most_its_fair_share(installation: Installation) -> None:
    corpus = read_corpus(installation, ["code_by_repo"], 64 * 1000, 0.0, 42)
    sizes = [doc.num_bytes for doc in corpus.documents["code_by_repo"]]
    assert len(sizes) == 12 and max(sizes) <= 1000
    assert all(doc.text.endswith("\n") for doc in corpus.documents["code_by_repo"])
    assert corpus.held_out == frozenset()


def test_the_budget_of_a_domain_is_kept(installation: Installation) -> None:
    for domain in DOMAINS:
        documents = read_corpus(installation, [domain], 64_000, 0.2, 42).documents[domain]
        assert 0 < sum(doc.num_bytes for doc in documents) <= 64_000


def test_an_api_reference_has_public_names_in_their_order() -> None:
    source = '''"""About the module itself."""
class Box(Base):
    """Holds things, among them many."""
    def put(self, thing: str, *, where=None) -> bool:
        """Put a thing into the box now."""
    def _hidden(self):
        """Nobody should read this line."""
def free(x):
    """A function outside of classes."""
def silent(x): ...
'''
    entries = api_entries(source, "pkg/sub/__init__.py")
    assert [(entry.kind, entry.module, entry.name) for entry in entries] == [
        ("module", "pkg.sub", ""),
        ("class", "pkg.sub", "Box"),
        ("function", "pkg.sub", "Box.put"),
        ("function", "pkg.sub", "free"),
    ]
    assert "".join(map(reference_text, entries)) == (
        "# pkg.sub\n\nAbout the module itself.\n\n## class Box\n\nHolds things, among them many.\n\n"
        "## function Box.put(self, thing: str, *, where=None) -> bool\n\nPut a thing into the box now.\n\n"
        "## function free(x)\n\nA function outside of classes.\n\n"
    )
    assert api_entries("def broken(:", "pkg/x.py") == []


def test_conversations_ask_for_signatures_and_get_docstrings() -> None:
    answer = "Return the window of the buffer, with all that belongs to it, in the order in which it came in. "
    methods = "".join(f'    def m{n}(self):\n        """{answer}{n}"""\n' for n in range(40))
    entries = api_entries(f"class Box:\n{methods}", "pkg.py")
    talks = conversations(entries, random.Random(0))
    assert sum(len(talk) // 2 for talk in talks) == 40
    assert {len(talk) for talk in talks} == {2, 4}
    for talk in talks:
        assert [message["role"] for message in talk] == ["user", "assistant"] * (len(talk) // 2)
        for question, reply in zip(talk[::2], talk[1::2], strict=True):
            number = reply["content"].removeprefix(answer)
            assert f"m{number}(self)" in question["content"]
    assert len({talk[0]["content"].split("m")[0] for talk in talks}) > 2


def test_the_language_reference_is_read_from_its_table() -> None:
    assert topics_text("topics = {'if': 'The if statement.\\n', 'for': 'Loops.'}") == [
        "# if\n\nThe if statement.\n\n",
        "# for\n\nLoops.\n\n",
    ]
    assert topics_text("x = 1") == []
    real = Path(ast.__file__).parent / "pydoc_data" / "topics.py"
    assert len(topics_text(real.read_text("utf-8"))) > 50


def test_the_running_interpreter_has_text_of_every_domain() -> None:
    repositories = {repository.name: repository for repository in Installation.current().repositories()}
    assert any(file.relative == "json/decoder.py" for file in repositories["json"].code)
    assert any(file.relative.endswith("METADATA") for file in repositories["numpy"].documents)
    assert "nemo_prolong" not in repositories  # its README would change the figures that it gives
    assert "test" not in repositories and "site-packages" not in repositories
