"""Shards and tables in an object store: a real S3 server on loopback, reached by options or by the environment."""

import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError, SourceError, TableError
from index.search.ann import ApproximateSearch
from index.table.storage import Storage
from index.table.table import open_table, table_uri
from pipeline.sources.listing import list_shards
from pipeline.sources.read import count_samples, read_samples
from pipeline.sources.sample import ReadOptions

KEYS = ("aws_access_key_id=me", "aws_secret_access_key=secret", "region=us-east-1")


@pytest.fixture(scope="module")
def endpoint():
    """The address of a new S3 server with one bucket, `bucket`."""
    pytest.importorskip("moto", reason="the S3 test server is not installed: pip install 'moto[s3]' flask flask-cors")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with server.stderr:
            while not (found := re.search(r"Running on (http://127.0.0.1:\d+)", line := server.stderr.readline())):
                assert line, f"the S3 test server did not start: {server.poll()}"
            urllib.request.urlopen(urllib.request.Request(f"{found[1]}/bucket", method="PUT")).close()
            drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        yield found[1]
    finally:
        server.terminate()
        server.wait()
    drain.wait()


@pytest.fixture
def s3(endpoint, monkeypatch) -> Storage:
    """Options that reach the server, with nothing in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return Storage.of([f"endpoint_url={endpoint}", *KEYS])


@pytest.fixture
def uploaded(s3, shapes) -> str:
    """The shapes' shards in the bucket."""
    files, path = s3.files("s3://bucket/shapes")
    if not files.exists(path):
        files.put(f"{shapes}/*.tar", path + "/")
        files.put(f"{shapes}/*_stats.json", path + "/")
    return "s3://bucket/shapes"


def test_shards_are_listed_counted_and_read(uploaded, s3, shapes):
    reading = ReadOptions(storage=s3)
    shards = list_shards([uploaded], reading)
    assert (
        shards
        == list_shards([f"{uploaded}/{{00000..00002}}.tar"], reading)
        == list_shards([f"{uploaded}/*.tar"], reading)
    )
    assert [shard.rsplit("/", 1)[1] for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert count_samples(shards[0], reading) == 120
    local = list(read_samples(str(shapes / "00000.tar")))
    assert [s.image for s in read_samples(shards[0], reading)] == [s.image for s in local]


@pytest.mark.slow
def test_a_table_in_a_bucket_is_encoded_indexed_and_searched(uploaded, s3, encoded, encode_shapes, content, rejects):
    result = encode_shapes(uploaded, "s3://bucket/db/shapes.lance", keep_images=True, storage=s3)
    assert (result.table.uri, result.report["rows"]) == ("s3://bucket/db/shapes.lance", 360)
    assert rejects(result.table) == []

    def without_shard(table):
        return [{name: row[name] for name in row if name != "shard"} for row in content(table)]

    assert without_shard(result.table) == without_shard(encoded)
    again = encode_shapes(uploaded, "s3://bucket/db/shapes.lance", keep_images=True, storage=s3)
    assert (again.already_complete, again.report) == (True, result.report)
    assert s3.names("s3://bucket/db/shapes.encode") == []
    built = build_index(open_table(result.table.uri, storage=s3), BuildConfig(index_type="ivf_flat"))
    assert built.table.report("index")["index_type"] == "ivf_flat"
    table = open_table(result.table.uri, indexed=True, storage=s3)
    vectors = table.column("vector")[:8]
    assert ApproximateSearch(table).nearest(vectors.astype("float32")).text.shape == (8, 1, 16)


@pytest.mark.slow
def test_two_workers_append_to_a_table_in_a_bucket(uploaded, s3, encode_shapes, content):
    first = encode_shapes(f"{uploaded}/00000.tar", "s3://bucket/db/two.lance", storage=s3)
    added = encode_shapes(uploaded, first.table.uri, storage=s3, append=True, num_workers=2)
    assert (added.report["rows"], len(content(added.table))) == (240, 360)


def test_the_command_line_reaches_a_bucket(uploaded, s3, endpoint, image_encoder, text_encoder, capsys):
    from typer.testing import CliRunner

    from pipeline.cli import app

    options = [f"--storage-option={option}" for option in (f"endpoint={endpoint}", *KEYS)]
    command = [
        "encode",
        uploaded,
        "--table",
        "s3://bucket/db/cli.lance",
        "--image-size",
        "32",
        "--limit",
        "30",
        *options,
    ]
    command += ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--device", "cpu"]
    encoded = CliRunner().invoke(app, command, catch_exceptions=False)
    assert encoded.exit_code == 0
    shown = CliRunner().invoke(app, ["inspect", "s3://bucket/db/cli.lance", "--json", *options], catch_exceptions=False)
    assert json.loads(shown.stdout)["rows"] == 30


def test_the_environment_names_the_endpoint(uploaded, s3, endpoint, monkeypatch):
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "me"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    reading = ReadOptions(storage=Storage.of())
    assert len(list_shards([uploaded], reading)) == 3
    with pytest.raises(TableError, match=r"no table at s3://bucket/db/none\.lance"):
        open_table("s3://bucket/db/none.lance")


def test_a_bucket_that_is_not_there_is_one_line(s3, shapes, encode_shapes):
    with pytest.raises(TableError, match=r"s3://nowhere/t.lance cannot be written .*--storage-option"):
        encode_shapes(shapes, "s3://nowhere/t.lance", storage=s3)
    with pytest.raises(SourceError, match=r"s3://nowhere/\*\.tar"):
        list_shards(["s3://nowhere/*.tar"], ReadOptions(storage=s3))


def test_an_unreachable_store_is_one_line(s3, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    unreachable = Storage.of(["endpoint=http://127.0.0.1:9", *KEYS])
    with pytest.raises(TableError, match=r"s3://bucket/t.lance cannot be reached \(.*\): check the address"):
        open_table("s3://bucket/t.lance", storage=unreachable)
    with pytest.raises(SourceError, match=r"'s3://bucket/\*\.tar' cannot be listed \("):
        list_shards(["s3://bucket/*.tar"], ReadOptions(storage=unreachable))


def test_options_are_named_as_lance_names_them():
    storage = Storage.of(["endpoint=http://x", "aws_secret_access_key=s", "region=r", "timeout=1s"])
    assert dict(storage.options) == {
        "allow_http": "true",
        "aws_endpoint": "http://x",
        "aws_region": "r",
        "aws_secret_access_key": "s",
        "timeout": "1s",
    }
    with pytest.raises(OptionError, match="--storage-option 'region' is not of the form name=value"):
        Storage.of(["region"])


@pytest.mark.parametrize("uri", ["memory://db/t.lance", "ftp://host/t.lance"])
def test_a_scheme_that_lance_does_not_write_to_is_refused(uri):
    with pytest.raises(TableError, match=r"a scheme that Lance does not write to: use a path, s3://"):
        table_uri(uri)
