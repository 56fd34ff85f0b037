"""Reading from a store that refuses, fails for a while, or fails for good."""

import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_prolong.data.storage import disk, stores, transfer
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.remote import download, is_remote, list_files, local_copy, read_bytes
from nemo_prolong.errors import ConfigError, DataError

CONTENT = bytes(range(256)) * 2000


def left_behind(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("path", "remote"),
    [("s3://b/k", True), ("hf://datasets/x", True), ("/a/b", False), ("a b", False), ("c:/x", False), ("s3:/b", False)],
)
def test_an_address_has_a_scheme_and_two_slashes(path, remote):
    assert is_remote(path) is remote


def test_a_download_is_the_object_and_leaves_nothing_else(store, tmp_path):
    url = store.put("some/key with space+plus.bin", CONTENT)
    path = download(url, tmp_path / "new" / "copy.bin", len(CONTENT))
    assert path.read_bytes() == CONTENT == read_bytes(url)
    assert left_behind(path.parent) == ["copy.bin"]


def test_an_empty_object_is_an_empty_file(store, tmp_path):
    assert download(store.put("empty", b""), tmp_path / "empty", 0).read_bytes() == b""


def test_another_size_than_expected_is_refused_with_both(store, tmp_path):
    url = store.put("a.bin", CONTENT)
    with pytest.raises(DataError) as caught:
        download(url, tmp_path / "a.bin", 5)
    assert str(caught.value) == (
        f"{url}: has 512000 bytes in the store, 5 were expected. "
        "Use the index or listing that belongs to the file, or copy the file there again."
    )
    assert left_behind(tmp_path) == []
    assert len(store.proxy.gets("a.bin")) == 1


def test_a_server_that_fails_twice_is_asked_three_times(store, tmp_path, caplog):
    url = store.put("a.bin", CONTENT)
    store.proxy.faults = ["503", "503"]
    with caplog.at_level(logging.WARNING):
        assert download(url, tmp_path / "a.bin", len(CONTENT)).read_bytes() == CONTENT
    assert len(store.proxy.gets("a.bin")) == 3
    assert [record.getMessage().split("; next")[0] for record in caplog.records] == [
        f"{url}: attempt {attempt} of 5 failed (ServiceUnavailable was injected)" for attempt in (1, 2)
    ]


def test_a_cut_connection_is_made_again_and_the_file_is_whole(store, tmp_path):
    url = store.put("a.bin", CONTENT)
    store.proxy.faults = ["cut", "cut"]
    assert download(url, tmp_path / "a.bin", len(CONTENT)).read_bytes() == CONTENT
    assert len(store.proxy.gets("a.bin")) == 3


class EndsEarly:
    """A file system whose first answer ends before the announced size without saying so."""

    def __init__(self):
        self.answers = [CONTENT[:1000], CONTENT]

    def get_file(self, url, path, callback):
        callback.set_size(len(CONTENT))
        Path(path).write_bytes(self.answers.pop(0))


def test_an_answer_shorter_than_announced_is_asked_for_again(tmp_path, monkeypatch, caplog):
    store = EndsEarly()
    monkeypatch.setattr(transfer, "filesystem", lambda _: store)
    monkeypatch.setattr(stores, "_FIRST_DELAY_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING):
        assert download("s3://b/a.bin", tmp_path / "a.bin").read_bytes() == CONTENT
    assert "failed (the connection ended after 1000 of 512000 bytes)" in caplog.text
    assert store.answers == []


def test_a_small_file_survives_a_cut_connection_too(store):
    url = store.put("index.json", CONTENT)
    store.proxy.faults = ["cut", "503"]
    assert read_bytes(url) == CONTENT


def test_after_the_last_attempt_the_error_says_how_many(store, tmp_path, monkeypatch):
    url = store.put("a.bin", CONTENT)
    store.proxy.faults = ["503"] * 9
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    with pytest.raises(DataError) as caught:
        download(url, tmp_path / "a.bin", len(CONTENT))
    assert str(caught.value) == (
        f"{url}: could not be read in 3 attempts; the last ended with: ServiceUnavailable was injected. "
        "Check the network and AWS_ENDPOINT_URL, or be more patient with AWS_MAX_ATTEMPTS=10."
    )
    assert len(store.proxy.gets("a.bin")) == 3
    assert left_behind(tmp_path) == []


def test_an_endpoint_that_nobody_listens_at_is_named(store, new_clients, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        with pytest.raises(DataError, match=rf'in 2 attempts; .*Could not connect to the endpoint URL: "{endpoint}'):
            read_bytes(store.url("a.bin"))


@pytest.mark.parametrize("text", ["0", "many", "-1"])
def test_a_number_of_attempts_that_is_none_is_refused(store, monkeypatch, text):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", text)
    with pytest.raises(
        ConfigError, match=rf"AWS_MAX_ATTEMPTS={text}: is no whole number above 0\. Set AWS_MAX_ATTEMPTS=5"
    ):
        read_bytes(store.url("a.bin"))


@pytest.mark.parametrize("read", [read_bytes, lambda url: download(url, "unused")], ids=["read_bytes", "download"])
def test_a_missing_key_is_an_error_at_once(store, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"/none\.bin: is not in the store \(The specified key does not exist\)"):
        read(store.url("none.bin"))
    assert len(store.proxy.gets("none.bin")) == 1


def test_refused_access_says_which_variables_to_set(store, tmp_path):
    url = store.put("a.bin", CONTENT)
    store.deny("s3:GetObject")
    with pytest.raises(DataError) as caught:
        download(url, tmp_path / "a.bin", len(CONTENT))
    assert str(caught.value) == (
        f"{url}: may not be read with the credentials of this environment (Forbidden). "
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; where the reader pays for the transfer also "
        "AWS_REQUEST_PAYER=requester; for a public bucket AWS_NO_SIGN_REQUEST=yes."
    )
    assert len(store.proxy.gets("a.bin")) == 1


def test_refused_listing_says_so(store):
    store.proxy.faults = ["403"]
    with pytest.raises(
        DataError, match=r"/data: may not be read with .* environment \(AccessDenied was injected\)\. Set"
    ):
        list_files(store.url("data"))


def test_a_listing_that_fails_for_a_moment_is_tried_again(store):
    store.put("data/a.bin", CONTENT)
    store.proxy.faults = ["503", "cut"]
    assert [file.name for file in list_files(store.url("data"))] == ["a.bin"]
    assert len(store.proxy.requests) == 3


def test_without_credentials_nothing_is_sent(store, new_clients, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=r"environment \(Unable to locate credentials\)\. Set AWS_ACCESS_KEY_ID"):
        read_bytes(store.url("a.bin"))
    assert store.proxy.requests == []


def test_requests_of_a_reader_who_pays_say_so(store, monkeypatch, tmp_path):
    url = store.put("data/a.bin", CONTENT)
    read_bytes(url)
    assert all("x-amz-request-payer" not in headers for _, _, headers in store.proxy.requests)
    store.proxy.requests.clear()
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    list_files(store.url("data"))
    read_bytes(url)
    download(url, tmp_path / "a.bin")
    assert len(store.proxy.requests) == 3
    assert {headers.get("x-amz-request-payer") for _, _, headers in store.proxy.requests} == {"requester"}


def test_requests_are_unsigned_where_that_is_asked_for(store, monkeypatch):
    url = store.put("a.bin", CONTENT)
    store.client.put_object_acl(Bucket=store.bucket, Key="a.bin", ACL="public-read")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    assert read_bytes(url) == CONTENT
    assert "authorization" not in store.proxy.gets("a.bin")[0]


def test_a_bucket_name_that_cannot_be_is_refused_on_one_line():
    with pytest.raises(DataError, match=r"^s3://Bad_Bucket!/k: cannot be asked for \(.*Invalid bucket name[^\n]*$"):
        read_bytes("s3://Bad_Bucket!/k")


def test_a_scheme_that_nothing_reads_is_refused():
    with pytest.raises(DataError, match=r"zz://a/b: nothing that is installed reads zz:// \(Protocol not known: zz\)"):
        read_bytes("zz://a/b")


def test_another_scheme_that_fsspec_knows_works_too(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/tests/a/b.bin", CONTENT)
    (file,) = list_files("memory://tests/a")
    assert (file.path, file.name, file.num_bytes) == ("memory:///tests/a/b.bin", "b.bin", len(CONTENT))
    assert local_copy(file, tmp_path).read_bytes() == CONTENT == read_bytes(file.path)


def test_a_local_file_is_read_where_it_is(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    assert read_bytes(path) == read_bytes(str(path)) == CONTENT
    assert local_copy(SourceFile(str(path), "a.bin", len(CONTENT)), tmp_path / "cache") == path
    assert left_behind(tmp_path) == ["a.bin"]


def test_a_missing_local_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"/a\.bin: cannot be read \(No such file or directory\)\. Check the path"):
        read_bytes(tmp_path / "a.bin")


def test_a_remote_raw_file_is_copied_once_and_keeps_its_suffix(store, tmp_path):
    store.put("raw/text.jsonl.zst", CONTENT)
    (file,) = list_files(store.url("raw"))
    first, second = local_copy(file, tmp_path), local_copy(file, tmp_path)
    assert first == second and first.name.endswith("-text.jsonl.zst") and first.read_bytes() == CONTENT
    assert len(store.proxy.gets("text.jsonl.zst")) == 1


def test_a_disk_with_too_little_room_is_found_early(store, tmp_path, monkeypatch):
    url = store.put("a.bin", CONTENT)
    free = disk.shutil.disk_usage(tmp_path)._replace(free=1024)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError) as caught:
        download(url, tmp_path / "a.bin", len(CONTENT))
    assert str(caught.value) == (
        f"{tmp_path}: has too little room: 500.0 KiB more are needed, 1.0 KiB are free. "
        "Free some, or name a directory on another disk, as cache= or XDG_CACHE_HOME."
    )
    assert store.proxy.requests == []


FILLS_UP = """
import resource, sys
from nemo_prolong.data.storage.remote import download
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    download(sys.argv[1], sys.argv[2])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_file_that_stops_growing_is_explained_and_removed(store, tmp_path, start_python):
    url = store.put("a.bin", CONTENT)
    out, _ = start_python(FILLS_UP, url, tmp_path / "a.bin").communicate(timeout=60)
    assert out.startswith(f"DataError {tmp_path}: has too little room: more is needed, ")
    assert left_behind(tmp_path) == []
    assert len(store.proxy.gets("a.bin")) == 1


def test_a_directory_that_cannot_be_made_is_named(store, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"/file: cannot be written to \(File exists\)\. Name a directory of your own"):
        download(store.put("a.bin", CONTENT), tmp_path / "file" / "a.bin")


FORKS = """
import os, sys
from nemo_prolong.data.storage.remote import read_bytes
read_bytes(sys.argv[1])
child = os.fork()
if child == 0:
    os._exit(read_bytes(sys.argv[1]) != read_bytes(sys.argv[1]) or 7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_reads_after_its_parent_has_read(store, start_python):
    process = start_python(FORKS, store.put("a.bin", CONTENT))
    process.communicate(timeout=60)
    assert process.returncode == 7
    assert len(store.proxy.gets("a.bin")) == 3


def test_importing_the_room_loads_no_network_library():
    script = (
        "import sys, nemo_prolong.data.storage.remote as _; print({'s3fs', 'botocore', 'aiohttp'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
