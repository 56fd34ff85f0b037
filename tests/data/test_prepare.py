from __future__ import annotations

import ast
import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_prolong.config.schema import MixtureEntry, PrepareConfig
from nemo_prolong.data import prepare as prepare_module
from nemo_prolong.data.dataset import PackedRowDataset
from nemo_prolong.data.miniature.docstrings import api_entries, conversations, reference_text, topics_text
from nemo_prolong.data.miniature.installation import Installation
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.prepare import directory_sha256, prepare
from nemo_prolong.data.miniature.corpus import DOMAINS, read_corpus
from nemo_prolong.errors import ConfigError, DataError

ROW_SETS: list[dict[str, Any]] = [
    {"path": "docs-64", "domain": "docs", "seq_length": 64},
    {"path": "code-256", "domain": "code_by_repo", "seq_length": 256, "document_length": 256},
    {"path": "code-64-in-256", "domain": "code_by_repo", "seq_length": 256, "document_length": 64},
    {"path": "chat-128", "domain": "chat", "seq_length": 128},
    {"path": "reference-64", "domain": "reference", "seq_length": 64, "max_rows": 5},
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
        "vocab_size": 320,
        "tokenizer_train_bytes": 50_000,
        "max_bytes_per_domain": "1M",
        "validation_fraction": 0.2,
        "row_sets": ROW_SETS,
    }
    return PrepareConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, installation: Installation) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(config(output), installation)
    return output


def manifest_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "manifest.json").read_text())


def test_the_directory_holds_a_tokenizer_the_row_sets_and_a_manifest_that_describes_them(prepared: Path) -> None:
    manifest = manifest_of(prepared)
    assert sorted(path.name for path in prepared.iterdir()) == sorted(
        ["manifest.json", "tokenizer", *(row_set["path"] for row_set in ROW_SETS)]
    )
    assert (manifest["format"], manifest["seed"], manifest["tokenizer"]) == (1, 42, "tokenizer")
    assert len(AutoTokenizer.from_pretrained(prepared / "tokenizer")) == manifest["vocab_size"] == 320
    for path, entry in manifest["row_sets"].items():
        reader = MdsReader(prepared / path)
        rows = [reader[number] for number in range(len(reader))]
        assert entry["rows"] == len(rows)
        assert entry["tokens"] == sum(len(row["input_ids"]) for row in rows) == len(rows) * entry["seq_length"]
        assert entry["documents"] == sum(len(row["indices"]) for row in rows)
        assert all(int(row["length"]) == len(row["input_ids"]) for row in rows)
        assert entry["sha256"] == directory_sha256(prepared / path)


def test_every_token_of_a_row_set_is_in_a_row_or_dropped_for_a_reason(prepared: Path) -> None:
    entries = manifest_of(prepared)["row_sets"]
    for entry in entries.values():
        assert entry["input_tokens"] == entry["tokens"] + sum(entry["dropped_tokens"].values())
        assert min(entry["dropped_tokens"].values()) >= 0
    assert set(entries["docs-64"]["dropped_tokens"]) == {"last_row", "max_rows"}
    assert set(entries["chat-128"]["dropped_tokens"]) == {"truncated", "last_row", "max_rows"}
    assert entries["reference-64"]["dropped_tokens"]["max_rows"] > 0
    both = [entries["code-256"], entries["code-64-in-256"]]
    assert set(both[0]["dropped_tokens"]) == {"last_row", "max_rows"}
    assert set(both[1]["dropped_tokens"]) == {"short_document", "remainder", "last_row", "max_rows"}


def test_row_sets_that_cut_the_same_documents_share_no_text(prepared: Path) -> None:
    quarters = range(0, 256, 64)
    long = {bytes(row["input_ids"][q : q + 64]) for row in MdsReader(prepared / "code-256") for q in quarters}
    assert len(long) > 20
    for row in MdsReader(prepared / "code-64-in-256"):
        assert row["indices"].tolist() == [[0, 64], [64, 128], [128, 192], [192, 256]]
        assert not any(bytes(row["input_ids"][q : q + 64]) in long for q in quarters)


def test_chat_rows_train_on_the_answers(prepared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    mixture = [MixtureEntry(path="chat-128", proportion=1.0)]
    rows = PackedRowDataset(prepared, mixture, 128, 0, 10, apply_instruct_masks=True, vocab_size=320)
    for index in range(10):
        row = rows[index]
        assert row["tokens"][0] == tokenizer.bos_token_id
        assert 0 < row["loss_mask"].sum() < 128
        assert "user" not in tokenizer.decode(row["labels"][row["loss_mask"] == 1])


def test_validation_rows_come_from_repositories_that_no_training_row_has(prepared: Path) -> None:
    sources = manifest_of(prepared)["sources"]
    splits: dict[str, set[str]] = {}
    for source in sources:
        splits.setdefault(source["repository"], set()).add(source["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert {"validation"} in splits.values() and {"train"} in splits.values()
    assert sum(source["documents"] for source in sources if source["domain"] == "code_by_repo") == 12


def test_a_row_set_of_two_domains_takes_rows_of_each_in_turn(prepared: Path) -> None:
    reader = MdsReader(prepared / "validation-256")
    assert [reader[number]["domain"] for number in range(4)] == ["code_by_repo", "reference"] * 2


def test_no_test_licence_generated_or_minified_file_is_read_and_no_file_twice(installation: Installation) -> None:
    corpus = read_corpus(installation, DOMAINS, 4 * 10**6, 0.2, 42)
    texts = [doc.text for documents in corpus.documents.values() for doc in documents]
    assert not any("UNWANTED" in text for text in texts)
    [package0] = [doc.text for doc in corpus.documents["code_by_repo"] if doc.repository == "package0"]
    assert package0.startswith("# file: package0/copy_of_module0.py\n")
    assert "# file: package0/module0.py" not in package0
    assert package0.count("# file: ") == 6


def test_a_repository_gives_at_most_its_fair_share_and_is_cut_at_a_line(installation: Installation) -> None:
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


def test_conversations_ask_for_the_signature_and_answer_with_the_docstring() -> None:
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


def test_the_same_installation_gives_the_same_bytes(prepared: Path, installation: Installation, tmp_path: Path) -> None:
    prepare(config(tmp_path / "again"), installation)
    for path in sorted(prepared.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(prepared)).read_bytes(), path


def test_another_seed_chooses_other_documents(prepared: Path, installation: Installation, tmp_path: Path) -> None:
    manifest = prepare(config(tmp_path / "other", seed=7), installation)
    assert manifest["row_sets"]["docs-64"]["sha256"] != manifest_of(prepared)["row_sets"]["docs-64"]["sha256"]


def test_a_complete_directory_of_the_same_configuration_is_reused(
    prepared: Path, installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    with caplog.at_level(logging.INFO, logger="nemo_prolong"):
        assert prepare(config(prepared), installation) == manifest_of(prepared)
    assert "is complete and has this configuration: reused" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_a_directory_of_another_configuration_is_refused(prepared: Path, installation: Installation) -> None:
    with pytest.raises(DataError, match=r"output=.*data: holds data of another configuration. Remove .*or set output"):
        prepare(config(prepared, seed=1), installation)


def test_a_directory_that_is_something_else_is_refused_and_left_alone(
    installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="exists and is no complete data directory"):
        prepare(config(tmp_path), installation)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_complete_looking_directory_that_lost_a_row_set_is_refused(
    installation: Installation, tmp_path: Path
) -> None:
    output = tmp_path / "data"
    prepare(config(output, row_sets=ROW_SETS[:2]), installation)
    (output / "docs-64" / "index.json").unlink()
    with pytest.raises(DataError, match="lacks docs-64, which its manifest lists"):
        prepare(config(output, row_sets=ROW_SETS[:2]), installation)


def test_a_run_that_is_killed_leaves_no_directory_and_the_next_run_completes(
    prepared: Path, installation: Installation, tmp_path: Path
) -> None:
    output = tmp_path / "data"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from nemo_prolong.config.schema import PrepareConfig\n"
        "from nemo_prolong.data import prepare\n"
        "from nemo_prolong.data.miniature.installation import Installation\n"
        "prepare.write_json_atomically = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare.prepare(PrepareConfig.model_validate_json(sys.argv[1]), Installation((Path(sys.argv[2]),)))\n"
    )
    arguments = [config(output).model_dump_json(), str(installation.roots[0])]
    killed = subprocess.run([sys.executable, "-c", program, *arguments], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".data.partial"]
    assert prepare(config(output), installation)["row_sets"] == manifest_of(prepared)["row_sets"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failure_leaves_nothing(installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare_module, "write_json_atomically", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(config(tmp_path / "data"), installation)
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_for_one_row_is_refused_by_the_name_of_the_row_set(
    installation: Installation, tmp_path: Path
) -> None:
    row_sets = [{"path": "huge", "domain": "docs", "seq_length": "1M", "split": "validation"}]
    with pytest.raises(DataError, match=r"row set huge: the validation text of docs does not fill one row of 1048576"):
        prepare(config(tmp_path / "data", row_sets=row_sets), installation)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "books"}, r"row_sets\[0\].domain=books: 'books' is no domain. Use code_by_repo, reference, docs"),
        ({"document_length": 100}, r"row_sets\[0\].document_length=100: pieces fill rows of seq_length=256 exactly"),
        ({"domain": "chat", "document_length": 64}, "conversations are packed whole and alone"),
        ({"domain": "docs+chat", "document_length": None}, "conversations are packed whole and alone"),
        ({"path": "../x"}, r"row_sets\[0\].path=../x: names one directory of its own"),
        ({"path": "tokenizer"}, "names one directory of its own"),
        ({"path": "docs-64"}, r"row_sets\[1\].path=docs-64: names one directory of its own"),
    ],
)
def test_a_contradictory_row_set_is_refused_before_anything_is_read(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    row_sets = [{**ROW_SETS[1], **change}, ROW_SETS[0]]
    with pytest.raises(ConfigError, match=message):
        prepare(config(tmp_path / "data", row_sets=row_sets), Installation(()))


def test_the_running_interpreter_has_text_of_every_domain() -> None:
    repositories = {repository.name: repository for repository in Installation.current().repositories()}
    assert any(file.relative == "json/decoder.py" for file in repositories["json"].code)
    assert any(file.relative.endswith("METADATA") for file in repositories["numpy"].documents)
    assert "test" not in repositories and "site-packages" not in repositories
