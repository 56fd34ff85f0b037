"""The shard cache: fetched once, whole and checked, whoever asks and whoever is killed."""

import hashlib
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from nemo_prolong.data.storage.cache import ShardCache, default_cache_directory
from nemo_prolong.data.storage.locks import locked
from nemo_prolong.errors import DataError

CONTENT = b"".join(hashlib.sha256(bytes([n])).digest() for n in range(256)) * 20
PACKED = zstandard.compress(CONTENT, 3)


def sha256(content):
    return {"sha256": hashlib.sha256(content).hexdigest()}


def copies(directory):
    return sorted(path.name for path in Path(directory).iterdir() if not path.name.endswith(".lock"))


def used_long_ago(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache")


def test_the_second_get_makes_no_request(store, cache):
    url = store.put("shard.00000.mds", CONTENT)
    first = cache.get(url, len(CONTENT), sha256(CONTENT))
    assert first.read_bytes() == CONTENT and first.parent == cache.directory
    requests = len(store.proxy.requests)
    assert requests == 1
    assert ShardCache(cache.directory).get(url, len(CONTENT), sha256(CONTENT)) == first
    assert len(store.proxy.requests) == requests
    assert copies(cache.directory) == [first.name]


@pytest.mark.parametrize("compression", ["zstd", "zstd:7"])
def test_of_a_remote_compressed_shard_only_the_result_is_kept(store, cache, compression):
    url = store.put("shard.00000.mds.zstd", PACKED)
    path = cache.get(url, len(PACKED), sha256(PACKED), compression, len(CONTENT), sha256(CONTENT))
    assert path.read_bytes() == CONTENT and path.name.endswith("-shard.00000.mds")
    assert copies(cache.directory) == [path.name]


def test_a_local_shard_is_itself_or_decompressed_once(tmp_path, cache):
    plain, packed = tmp_path / "a.mds", tmp_path / "a.mds.zstd"
    plain.write_bytes(CONTENT)
    packed.write_bytes(PACKED)
    assert cache.get(str(plain), len(CONTENT), {}) == plain
    assert not cache.directory.exists()
    path = cache.get(str(packed), len(PACKED), {}, "zstd", len(CONTENT))
    status = path.stat()
    assert path.read_bytes() == CONTENT
    assert cache.get(str(packed), len(PACKED), {}, "zstd", len(CONTENT)) == path
    assert path.stat().st_ino == status.st_ino


def test_a_shard_written_anew_is_decompressed_anew(tmp_path, cache):
    packed = tmp_path / "a.mds.zstd"
    other = bytes(reversed(CONTENT))
    for content in (CONTENT, other):
        compressed = zstandard.ZstdCompressor(level=-50).compress(content).ljust(0)
        packed.write_bytes(compressed)
        assert cache.get(str(packed), len(compressed), {}, "zstd", len(content)).read_bytes() == content


def test_one_address_with_two_sizes_or_hashes_is_two_shards(store, cache):
    url = store.put("a.mds", CONTENT)
    first = cache.get(url, len(CONTENT), sha256(CONTENT))
    store.put("a.mds", CONTENT[::-1])
    second = cache.get(url, len(CONTENT), sha256(CONTENT[::-1]))
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, CONTENT[::-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_bytes=5), r"a\.mds: has 163840 bytes in the store, 5 were expected"),
        (dict(hashes={"sha1": "00"}), r"a\.mds: has the sha1 [0-9a-f]{40}, its index says 00\. The file is damaged"),
    ],
)
def test_a_remote_shard_that_differs_from_its_index_is_not_kept(store, cache, arguments, message):
    wanted = {"num_bytes": len(CONTENT), "hashes": {}} | arguments
    with pytest.raises(DataError, match=message):
        cache.get(store.put("a.mds", CONTENT), **wanted)
    assert copies(cache.directory) == []


def test_a_local_shard_of_another_size_or_missing_is_refused(tmp_path, cache):
    path = tmp_path / "a.mds"
    with pytest.raises(DataError, match=r"/a\.mds: cannot be read \(No such file or directory\)"):
        cache.get(str(path), 5, {})
    path.write_bytes(b"123")
    with pytest.raises(DataError, match=r"/a\.mds: has 3 bytes, its index says 5\. The file is truncated"):
        cache.get(str(path), 5, {})


def test_another_compression_is_refused_by_name(tmp_path, cache):
    with pytest.raises(DataError, match=r"a\.mds\.br: compression=br:11: only zstd is decompressed"):
        cache.get(str(tmp_path / "a.mds.br"), 5, {}, "br:11", 10)


def test_threads_that_want_one_shard_at_once_fetch_it_once(store, cache):
    url = store.put("a.mds", CONTENT)
    store.proxy.faults = ["slow"]
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: cache.get(url, len(CONTENT), {}), range(8)))
    assert [path.read_bytes() for path in paths] == [CONTENT]
    assert len(store.proxy.gets("a.mds")) == 1


GETS = """
import sys
from pathlib import Path
from nemo_prolong.data.storage.cache import ShardCache
print("ready", flush=True)
path = ShardCache(Path(sys.argv[1])).get(sys.argv[2], int(sys.argv[3]), {}, "zstd", int(sys.argv[4]))
print(path, path.stat().st_size)
"""


def test_processes_that_want_one_shard_at_once_fetch_it_once(store, cache, start_python):
    url = store.put("a.mds.zstd", PACKED)
    store.proxy.faults = ["stall"]
    arguments = (cache.directory, url, str(len(PACKED)), str(len(CONTENT)))
    processes = [start_python(GETS, *arguments) for _ in range(3)]
    assert {process.stdout.readline() for process in processes} == {"ready\n"}
    time.sleep(0.3)
    store.proxy.resume.set()
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert len(outputs) == 1 and outputs.pop().endswith(f"-a.mds {len(CONTENT)}\n")
    assert len(store.proxy.gets("a.mds.zstd")) == 1


def test_a_process_killed_while_it_fetches_holds_up_nobody(store, cache, start_python):
    url, other = store.put("a.mds.zstd", PACKED), store.put("b.mds", CONTENT)
    store.proxy.faults = ["stall"]
    process = start_python(GETS, cache.directory, url, str(len(PACKED)), str(len(CONTENT)))
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in cache.directory.glob("*.partial")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert [name.endswith(".fetched.partial") for name in copies(cache.directory)] == [True]
    fetched = cache.get(other, len(CONTENT), {})
    assert copies(cache.directory) == [fetched.name], (
        "the half-written file is swept away by the next fetch of any shard"
    )
    assert cache.get(url, len(PACKED), {}, "zstd", len(CONTENT)).read_bytes() == CONTENT


def test_the_half_written_file_of_a_living_process_stays(store, cache):
    cache.directory.mkdir()
    partial = cache.directory / "zz-living.raw.partial"
    partial.write_bytes(b"half")
    with locked(cache.directory / "zz.lock"):
        cache.get(store.put("a.mds", CONTENT), len(CONTENT), {})
        assert partial.exists()
    cache.get(store.put("b.mds", CONTENT), len(CONTENT), {})
    assert not partial.exists()


def test_copies_used_longest_ago_go_at_the_limit(store, tmp_path):
    cache = ShardCache(tmp_path / "cache", limit_bytes=3 * len(CONTENT))
    urls = [store.put(f"{name}.mds", CONTENT) for name in "abcd"]
    paths = [cache.get(url, len(CONTENT), {}) for url in urls[:3]]
    for path, seconds in zip(paths, (300, 400, 200), strict=True):
        used_long_ago(path, seconds)
    cache.get(urls[1], len(CONTENT), {})
    paths.append(cache.get(urls[3], len(CONTENT), {}))
    assert [path.exists() for path in paths] == [False, True, True, True]
    cache.get(urls[0], len(CONTENT), {})
    assert [path.exists() for path in paths] == [True, True, False, True]


def test_a_copy_in_use_is_not_evicted_beyond_the_limit(store, tmp_path):
    cache = ShardCache(tmp_path / "cache", limit_bytes=len(CONTENT))
    paths = [cache.get(store.put(f"{name}.mds", CONTENT), len(CONTENT), {}) for name in "ab"]
    assert [path.exists() for path in paths] == [True, True]


def test_a_mapped_copy_can_be_read_after_its_eviction(store, tmp_path):
    cache = ShardCache(tmp_path / "cache", limit_bytes=len(CONTENT))
    path = cache.get(store.put("a.mds", CONTENT), len(CONTENT), {})
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        used_long_ago(path, 100)
        cache.get(store.put("b.mds", CONTENT), len(CONTENT), {})
        assert not path.exists()
        assert mapped[:] == CONTENT


def test_without_a_limit_nothing_is_evicted(store, cache):
    paths = [cache.get(store.put(f"{name}.mds", CONTENT), len(CONTENT), {}) for name in "ab"]
    used_long_ago(paths[0], 1e6)
    cache.get(store.put("c.mds", CONTENT), len(CONTENT), {})
    assert paths[0].exists()


def test_a_damaged_copy_of_another_size_is_fetched_again(store, cache):
    url = store.put("a.mds", CONTENT)
    path = cache.get(url, len(CONTENT), {})
    path.write_bytes(b"short")
    assert cache.get(url, len(CONTENT), {}).read_bytes() == CONTENT


def test_a_directory_that_cannot_be_written_is_named(store, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"/cache: cannot be written to \(.*\)\. Name a directory of your own .*cache="):
        ShardCache(tmp_path / "cache").get(store.put("a.mds", CONTENT), len(CONTENT), {})


def test_the_default_directory_follows_xdg_and_is_not_at_home(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", "/local/scratch")
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache().directory == tmp_path / "nemo_prolong" / "shards"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_directory() == Path("/local/scratch/nemo_prolong-1234/shards")


def test_a_directory_of_another_user_in_the_place_of_ours_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    directory = default_cache_directory()
    directory.mkdir(parents=True)
    assert default_cache_directory() == directory
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    (tmp_path / f"nemo_prolong-{uid + 1}").mkdir()
    with pytest.raises(DataError) as refusal:
        default_cache_directory()
    assert str(refusal.value) == (
        f"{tmp_path}/nemo_prolong-{uid + 1}: belongs to another user, who could put other rows there. Name a directory "
        "of your own on a local disk, as cache= or XDG_CACHE_HOME."
    )
