"""Decompression gives the bytes that the index promises, or an error; never more bytes than promised."""

import hashlib
import logging
import resource

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.data.storage.checks import Digests, check_hashes
from nemo_prolong.data.storage.compression import decompress_zstd, is_zstd
from nemo_prolong.errors import DataError

EXAMPLES = settings(max_examples=60, deadline=None)


def sha256(content):
    return {"sha256": hashlib.sha256(content).hexdigest()}


def decompress(directory, packed, raw_bytes, hashes=None, raw_hashes=None):
    source, destination = directory / "a.zstd", directory / "a"
    source.write_bytes(packed)
    decompress_zstd(source, destination, "a.zstd", hashes or {}, raw_bytes, raw_hashes or {})
    return destination.read_bytes()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("compression")


@EXAMPLES
@given(contents=st.lists(st.binary(max_size=3000), min_size=1, max_size=3), level=st.integers(-5, 12))
def test_what_was_compressed_comes_back_from_several_frames(directory, contents, level):
    packed = b"".join(zstandard.compress(content, level) for content in contents)
    content = b"".join(contents)
    assert decompress(directory, packed, len(content), sha256(packed), sha256(content)) == content


@EXAMPLES
@given(content=st.binary(min_size=1, max_size=3000), data=st.data())
def test_a_truncated_file_is_refused_at_every_length(directory, content, data):
    packed = zstandard.compress(content)
    kept = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(DataError, match=r"a\.zstd: (decompresses to \d+ of the|cannot be decompressed)"):
        decompress(directory, packed[:kept], len(content))


@EXAMPLES
@given(content=st.binary(min_size=1, max_size=3000), data=st.data())
def test_a_flipped_bit_is_refused_wherever_it_is(directory, content, data):
    packed = bytearray(zstandard.compress(content))
    hashes = sha256(packed)
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DataError, match=r"a\.zstd.*: (decompresses to|cannot be decompressed|has the sha256)"):
        decompress(directory, bytes(packed), len(content), hashes)


@pytest.mark.parametrize("raw_bytes", [0, 1000])
def test_a_bomb_is_stopped_at_the_promised_size(directory, raw_bytes):
    packed = zstandard.compress(bytes(2**29), 1)
    assert len(packed) < 2**17
    peak_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        DataError, match=rf"a\.zstd: decompresses to more than the {raw_bytes} bytes that its index says"
    ):
        decompress(directory, packed, raw_bytes)
    assert (directory / "a").stat().st_size <= raw_bytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kilobytes < 100_000


def test_text_that_is_no_zstd_is_refused(directory):
    with pytest.raises(DataError, match=r"a\.zstd: cannot be decompressed \(.*\)\. The file is damaged: copy"):
        decompress(directory, b"plain text, and no frame of zstd", 10)


def test_bytes_after_the_last_frame_are_refused(directory):
    with pytest.raises(DataError, match=r"a\.zstd: cannot be decompressed"):
        decompress(directory, zstandard.compress(b"12345") + b"trailing garbage", 5)


def test_wrong_hashes_of_result_and_source_are_told_apart(directory):
    packed = zstandard.compress(b"12345")
    with pytest.raises(DataError, match=r"^a\.zstd \(decompressed\): has the md5 827ccb0eea8a706c4c34a16891f84e7b, "):
        decompress(directory, packed, 5, raw_hashes={"md5": "0" * 32})
    with pytest.raises(DataError, match=r"^a\.zstd: has the sha256 "):
        decompress(directory, packed, 5, hashes=sha256(b"other"))


def test_a_window_too_large_to_trust_is_refused(directory):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = compressor.compress(b"12345") + compressor.flush()
    with pytest.raises(DataError, match=r"a\.zstd: cannot be decompressed"):
        decompress(directory, packed, 5)


def test_a_source_that_is_gone_is_named_by_its_own_name(tmp_path):
    with pytest.raises(DataError, match=r"^a\.zstd: cannot be read \(No such file or directory\)"):
        decompress_zstd(tmp_path / "copy", tmp_path / "out", "a.zstd", {}, 5, {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("zstd", True), ("zstd:7", True), ("zstd:-3", True), ("zstd:", False), ("gz", False), ("zstd:x", False)],
)
def test_the_names_of_compressions_that_are_read(name, expected):
    assert is_zstd(name) is expected


def test_hashes_that_cannot_be_computed_are_a_warning(tmp_path, caplog):
    path = tmp_path / "a.mds"
    path.write_bytes(b"12345")
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=r"^shard: has the sha1 8cb2237d0679"):
        check_hashes(path, "shard", {"xxh3_64": "1", "sha1": "0"})
    assert [record.getMessage() for record in caplog.records] == ["shard: hashes of type xxh3_64 are not checked"]


def test_a_digest_in_capitals_is_the_same_digest():
    digests = Digests("a", {"md5": "827CCB0EEA8A706C4C34A16891F84E7B"})
    digests.update(b"123")
    digests.update(b"45")
    digests.check()
