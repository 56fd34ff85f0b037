"""Directories behind an S3 protocol server on the loopback interface."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.storage import stores
from nemo_prolong.errors import DataError
from tests.support.mds_examples import COLUMNS, SMALL_COLUMNS, domains, numbered_row, packed_row, same_row, write

Upload = Callable[[Path], str]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[tuple[str, int]]:
    """An S3 server that keeps its objects in memory, on a free port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3(s3_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client; the environment leads to the server."""
    import boto3
    from s3fs import S3FileSystem

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    endpoint = "http://{}:{}".format(*s3_server)
    settings = {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": endpoint,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "_FIRST_DELAY_SECONDS", 0.01)
    S3FileSystem.clear_instance_cache()
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")


@pytest.fixture
def bucket(s3: Any, request: pytest.FixtureRequest) -> str:
    """An empty bucket."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name)[:60].strip("-")
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def upload(s3: Any, bucket: str) -> Upload:
    """Put a directory into the bucket; return its address."""

    def put(directory: Path) -> str:
        for file in directory.rglob("*"):
            if file.is_file():
                key = file.relative_to(directory.parent).as_posix()
                s3.put_object(Bucket=bucket, Key=key, Body=file.read_bytes())
        return f"s3://{bucket}/{directory.name}"

    return put


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_remote_directory_is_read_shard_by_shard_once(
    tmp_path: Path, upload: Upload, s3: Any, bucket: str, compression: str | None
) -> None:
    rows = [packed_row(n, 4096) for n in range(4)]
    options = {"shard_bytes": 30_000, "compression": compression}
    address = upload(write(tmp_path / "rows", rows, COLUMNS, **options))
    reader = MdsReader(f"{address}/", tmp_path / "cache")
    assert (len(reader), reader.directory) == (4, address)
    assert same_row(reader[2], rows[2])
    assert len(list((tmp_path / "cache").glob("*.mds"))) == 1
    assert all(same_row(reader[number], row) for number, row in enumerate(rows))
    for shard in reader.shards:
        s3.delete_object(Bucket=bucket, Key=f"rows/{(shard.packed or shard.raw).name}")
    again = pickle.loads(pickle.dumps(reader))
    assert all(same_row(again[number], row) for number, row in enumerate(rows))
    assert list(again.verify()) == []


def test_a_remote_tree_is_read_in_the_order_of_its_paths(tmp_path: Path, upload: Upload) -> None:
    for number, place in enumerate(["code/0", "code/2", "code/10", "code/0/deeper", ".hidden"]):
        rows = [numbered_row(10 * number + row) for row in range(3)]
        write(tmp_path / "tree" / place, rows, SMALL_COLUMNS)
    address = upload(tmp_path / "tree")
    local, remote = MdsReader(tmp_path / "tree"), MdsReader(address, tmp_path / "cache")
    assert domains(local) == [f"row {n}" for n in (0, 1, 2, 20, 21, 22, 10, 11, 12)]
    assert domains(remote) == domains(local)
    assert remote.shards == local.shards


def test_a_remote_shard_of_another_size_or_content_is_named(
    tmp_path: Path, upload: Upload, s3: Any, bucket: str
) -> None:
    address = upload(write(tmp_path / "rows", [numbered_row(1)], SMALL_COLUMNS))
    data = (tmp_path / "rows" / "shard.00000.mds").read_bytes()
    for damaged in (data[:-1], data[:-1] + b"x"):
        s3.put_object(Bucket=bucket, Key="rows/shard.00000.mds", Body=damaged)
        with pytest.raises(DataError, match=f"{address}/shard.00000.mds: has "):
            MdsReader(address, tmp_path / "cache")[0]


def test_a_remote_shard_or_directory_that_is_missing_is_named(
    tmp_path: Path, upload: Upload, s3: Any, bucket: str
) -> None:
    address = upload(write(tmp_path / "rows", [numbered_row(1)], SMALL_COLUMNS))
    s3.delete_object(Bucket=bucket, Key="rows/shard.00000.mds")
    with pytest.raises(DataError, match=f"{address}/shard.00000.mds: is not in the store"):
        MdsReader(address, tmp_path / "cache")[0]
    with pytest.raises(DataError, match=f"s3://{bucket}/nothing"):
        MdsReader(f"s3://{bucket}/nothing", tmp_path / "cache")
    s3.put_object(Bucket=bucket, Key="other/readme.txt", Body=b"x")
    with pytest.raises(DataError, match=f"s3://{bucket}/other: has no index.json, nor has a directory below it"):
        MdsReader(f"s3://{bucket}/other", tmp_path / "cache")
