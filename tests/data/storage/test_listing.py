"""Listings: one order everywhere, names relative to the configured path, and nothing left out silently."""

import os

import pytest

from nemo_prolong.data.storage.remote import list_files
from nemo_prolong.errors import DataError

TREE = ["b.jsonl", "a/x.jsonl", "a/y.txt", "a/deep/z.jsonl", "Z.jsonl", "\u00e9.txt", "a-b/x.jsonl", ".hidden"]


def names(path, pattern=None):
    return [file.name for file in list_files(str(path), pattern)]


@pytest.fixture
def tree(tmp_path):
    for number, name in enumerate(TREE):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * number)
    return tmp_path / "data"


def test_a_local_directory_is_listed_with_names_and_sizes(tree):
    files = list_files(str(tree))
    assert [file.name for file in files] == sorted(TREE)
    assert [(file.path, file.num_bytes) for file in files] == [(f"{tree}/{n}", TREE.index(n)) for n in sorted(TREE)]


def test_a_remote_prefix_is_listed_like_a_local_directory(tree, store):
    for number, name in enumerate(TREE):
        store.put(f"raw/data/{name}", b"x" * number)
    store.put("raw/database/other", b"not below the prefix")
    store.put("raw/data/empty-directory/", b"")
    for path in ("raw/data", "raw/data/"):
        assert [(f.name, f.num_bytes) for f in list_files(store.url(path))] == [
            (f.name, f.num_bytes) for f in list_files(str(tree))
        ]
    assert [f.path for f in list_files(store.url("raw/data"), "Z*")] == [store.url("raw/data/Z.jsonl")]


def test_more_files_than_one_page_of_a_listing_are_all_there(store, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")
    for number in range(23):
        store.put(f"many/{number:04d}", b"")
    assert names(store.url("many")) == [f"{number:04d}" for number in range(23)]
    assert len(store.proxy.requests) == 4


def test_a_single_file_is_named_by_its_last_part(tree, store):
    store.put("raw/one.jsonl", b"123")
    assert names(tree / "a" / "y.txt") == ["y.txt"]
    assert [(f.path, f.name, f.num_bytes) for f in list_files(store.url("raw/one.jsonl"))] == [
        (store.url("raw/one.jsonl"), "one.jsonl", 3)
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["Z.jsonl", "a-b/x.jsonl", "a/deep/z.jsonl", "a/x.jsonl", "b.jsonl"]),
        ("a/*.jsonl", ["a/x.jsonl"]),
        ("x.*", ["a-b/x.jsonl", "a/x.jsonl"]),
        ("*.parquet", []),
    ],
)
def test_a_pattern_is_compared_with_the_end_of_the_name(tree, pattern, expected):
    assert names(tree, pattern) == expected


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*.jsonl", ["Z.jsonl", "b.jsonl"]),
        ("a*/*.jsonl", ["a-b/x.jsonl", "a/x.jsonl"]),
        ("**/*.jsonl", ["Z.jsonl", "a-b/x.jsonl", "a/deep/z.jsonl", "a/x.jsonl", "b.jsonl"]),
        ("a/[xy].*", ["x.jsonl", "y.txt"]),
        ("a?b", ["a-b/x.jsonl"]),
        ("a/de*", ["deep/z.jsonl"]),
    ],
)
def test_a_glob_takes_files_and_what_is_below_directories(tree, store, glob, expected):
    for name in TREE:
        store.put(f"d/{name}", b"")
    assert names(f"{tree}/{glob}") == names(store.url(f"d/{glob}")) == expected


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(tmp_path):
    (tmp_path / "part[1].txt").write_text("1")
    (tmp_path / "part1.txt").write_text("2")
    assert names(tmp_path / "part[1].txt") == ["part[1].txt"]


@pytest.mark.parametrize("path", ["missing", "data/*.nothing"])
def test_a_path_with_no_file_is_an_error_locally(tree, path):
    with pytest.raises(DataError, match=rf"{tree.parent}/.* does not exist, or holds no file\. Check the path"):
        list_files(f"{tree.parent}/{path}")


def test_a_prefix_with_no_object_is_an_error(store):
    with pytest.raises(DataError, match=r"/nothing: does not exist, or holds no file"):
        list_files(store.url("nothing"))


def test_a_missing_bucket_is_named_with_what_the_store_says(store):
    with pytest.raises(DataError) as caught:
        list_files("s3://nobodys-bucket/data")
    assert str(caught.value) == (
        "s3://nobodys-bucket/data: is not in the store (The specified bucket does not exist). "
        "Check bucket and key; where the store is not Amazon's, AWS_ENDPOINT_URL."
    )


def test_linked_files_are_listed_under_the_link(tree, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "more").symlink_to(tree / "a")
    (tmp_path / "linked" / "one").symlink_to(tree / "b.jsonl")
    assert names(tmp_path / "linked") == ["more/deep/z.jsonl", "more/x.jsonl", "more/y.txt", "one"]


def test_a_link_to_a_directory_above_is_refused(tree):
    (tree / "a" / "up").symlink_to(tree)
    with pytest.raises(DataError, match=r"/a/up: links to a directory above it, so its files have no end"):
        list_files(str(tree))


def test_a_link_that_leads_nowhere_is_refused(tree):
    (tree / "a" / "gone").symlink_to(tree / "nothing")
    with pytest.raises(DataError, match=r"/a/gone: is a link that leads nowhere"):
        list_files(str(tree))


def test_a_file_name_that_is_no_utf8_is_refused(tmp_path):
    try:
        open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"caf\\udce9.*has a name that is no UTF-8"):
        list_files(str(tmp_path))
