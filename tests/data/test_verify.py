import pytest

from nemo_prolong.data.verify import verify
from nemo_prolong.errors import DataError
from tests.support.stored_rows import document, packed, write_data, write_rows


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def test_a_whole_directory_verifies_with_a_line_per_row_set(data):
    assert list(verify(data)) == [
        f"{data / 'docs-19'}: whole, 2 rows in 1 shard, as in the manifest",
        f"{data / 'deep/chat-11'}: whole, 1 row in 1 shard, as in the manifest",
    ]
    assert "as in the manifest" in next(iter(verify(data / "docs-19")))


def test_a_changed_byte_is_found_and_checking_goes_on(data):
    shard = data / "docs-19" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    findings = list(verify(data))
    assert isinstance(findings[0], DataError) and "shard.00000.mds" in str(findings[0])
    assert "sha256" in str(findings[0]).lower()
    assert "chat-11: whole, 1 row in 1 shard" in findings[-1]


def test_a_row_set_written_anew_differs_from_the_manifest(data):
    for file in (data / "docs-19").iterdir():
        file.unlink()
    (data / "docs-19").rmdir()
    write_rows(data / "docs-19", [packed(document("other text"))])
    texts = [str(finding) for finding in verify(data / "docs-19") if isinstance(finding, DataError)]
    assert "index.json: lists 1 row in 1 shard, the manifest 2 in 1." in texts[0]
    assert "shard.00000.mds: has the SHA-256 " in texts[1] and ", the manifest says " in texts[1]


def test_a_missing_row_set_is_an_error_among_the_others(data):
    (data / "docs-19" / "index.json").unlink()
    findings = list(verify(data))
    assert isinstance(findings[0], DataError) and "docs-19" in str(findings[0])
    assert isinstance(findings[1], str)
