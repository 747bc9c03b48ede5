"""Shards and tables in an object store: a real S3 server on loopback, reached by options or by the environment."""

import contextlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, replace

import lance
import numpy as np
import pyarrow as pa
import pytest
from outages import proxy
from synthetic_tables import random_table

from index import reach, terminal
from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError, OutOfReachError, SourceError, TableError
from index.report.report import describe
from index.search.ann import ApproximateSearch
from index.search.exact import ExactSearch
from index.table.storage import Storage
from index.table.store_options import fsspec_options
from index.table.table import READ_COLUMNS, Table, is_table, open_table, table_uri
from pipeline.sources.listing import list_shards
from pipeline.sources.read import count_samples, read_samples
from pipeline.sources.sample import ReadOptions
from trainer.stream import NeighborStream, StreamConfig

KEYS = ("aws_access_key_id=me", "aws_secret_access_key=secret", "region=us-east-1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


@pytest.mark.slow
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
    with pytest.raises(SourceError, match=r"s3://nowhere does not exist"):
        list_shards(["s3://nowhere/*.tar"], ReadOptions(storage=s3))


@pytest.mark.slow
def test_an_unreachable_store_is_one_line(s3, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    unreachable = Storage.of(["endpoint=http://127.0.0.1:9", *KEYS])
    monkeypatch.setattr("index.table.storage.LISTING_SECONDS", 0.1)
    monkeypatch.setattr(reach, "LISTING_SECONDS", 0.1)
    monkeypatch.setattr("index.table.storage._answered", set())
    with pytest.raises(SourceError, match=r"s3://bucket/t.lance/_versions cannot be reached \(.*\): check the address"):
        open_table("s3://bucket/t.lance", storage=unreachable)
    with pytest.raises(SourceError, match=r"'s3://bucket/\*\.tar' cannot be listed \("):
        list_shards(["s3://bucket/*.tar"], ReadOptions(storage=unreachable))


@pytest.fixture
def outage(endpoint, s3):
    """A proxy in front of the server, and options that lead to it."""
    with proxy(endpoint) as outage:
        outage.storage = Storage.of([f"endpoint={outage.url}", *KEYS])
        yield outage


def test_a_file_is_read_in_one_request(outage):
    """Whether it exists or not, as a whole or in part."""
    storage, uri = outage.storage, "s3://bucket/files/a.json"
    storage.write_json(uri, [1, 2])
    storage.write_text("s3://bucket/files/empty", "")
    outage.requests.clear()
    assert storage.read_json(uri) == [1, 2]
    assert storage.read_json("s3://bucket/files/missing.json") is None
    assert storage.read_bytes("s3://bucket/files/empty") == b""
    text = storage.read_bytes(uri)
    assert [storage.read_range(uri, *part) for part in ((0, 3), (2, 9), (4, 4))] == [text[:3], text[2:9], b""]
    names = ["a.json", "missing.json", "empty", "a.json", "a.json", "a.json"]
    assert outage.requests == [("GET", f"/bucket/files/{name}") for name in names]


@pytest.fixture(scope="module")
def small_table(endpoint):
    """A table of two fragments in the bucket, as Lance alone writes it; only its columns are read."""
    uri = "s3://bucket/small/t.lance"
    rows = pa.table({"n": np.arange(2000)})
    options = Storage.of([f"endpoint_url={endpoint}", *KEYS]).lance
    lance.write_dataset(rows, uri, storage_options=options, max_rows_per_file=1000)
    return uri


def test_what_was_read_of_a_file_serves_all_versions(outage, tmp_path):
    meta = random_table(tmp_path / "t.lance", 20).meta
    lance_options = outage.storage.lance
    uri = "s3://bucket/versions/t.lance"
    # Larger than what Lance reads of a file's end, so that metadata and data are requests of their own.
    noise = np.random.default_rng(0).normal(size=100_000)
    rows = pa.table({"split": ["train", "val"] * 50_000, "x": noise})
    first = lance.write_dataset(rows, uri, storage_options=lance_options, max_rows_per_file=25_000)
    first.update_config({"a": "b"})
    table = Table(uri, 1, meta, outage.storage)

    def requests(version: Table) -> int:
        outage.requests.clear()
        assert version.dataset().version == version.version
        assert (version.column("x", None) == noise).all()
        return sum("/data/" in path for _, path in outage.requests)

    other = table.at(2)
    counts = requests(table), requests(other), requests(Table(uri, 2, meta, outage.storage))
    assert counts[1] < counts[0] == counts[2]
    assert len(table.positions("val")) == 50_000
    outage.requests.clear()
    assert len(table.positions("train")) + len(table.positions("val")) == 100_000
    assert not any("/_versions/" in path for _, path in outage.requests)
    outage.requests.clear()
    assert len(table.positions("train")) == 50_000
    assert outage.requests == []


FRAGMENTS = 12


@pytest.fixture
def remote(outage, tmp_path):
    """A table of many fragments on this disk, and a copy in the bucket."""
    local = random_table(tmp_path / "t.lance", 960, captions=240, latent_dim=32, heldout=160, fragments=FRAGMENTS)
    files, path = outage.storage.files("s3://bucket/fragments/t.lance")
    files.put(local.uri, path, recursive=True)
    outage.requests.clear()
    yield local, open_table("s3://bucket/fragments/t.lance", storage=outage.storage)
    files.rm("bucket/fragments", recursive=True)


def data_requests(outage) -> int:
    return sum("/data/" in path for _, path in outage.requests)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "most"), [({}, 4), ({"desc_scale": 3.0, "balance": True, "balance_time_limit": 1e9}, 6)]
)
def test_build_index_reads_each_fragment_a_few_times(remote, outage, options, most):
    """The report is that of the same table on a disk."""
    config = BuildConfig(index_type="ivf_rq", target_recall=0.5, **options)
    local, copy = (asdict(build_index(table, config).report) for table in remote)
    timed = {"table", "p50_ms", "queries_per_second", "build_seconds", "candidates", "balance"}
    assert {name: local[name] for name in local if name not in timed} == {
        name: copy[name] for name in copy if name not in timed
    }
    assert data_requests(outage) <= most * FRAGMENTS
    assert len(outage.requests) <= most * FRAGMENTS + 150


def test_training_reads_each_fragment_of_a_store_once(remote, outage):
    local, copy = remote
    copy.hold_remote(READ_COLUMNS)
    assert data_requests(outage) <= 3 * FRAGMENTS
    outage.requests.clear()
    streams = [NeighborStream(table, ExactSearch(table, memory=2**30), StreamConfig(batch_size=8)) for table in remote]
    expected, batches = (stream.batches(0, 4) for stream in streams)
    for batch, other in zip(batches, expected, strict=True):
        assert (batch.y == other.y).all()
        assert (batch.text == other.text).all()
    assert data_requests(outage) <= 2 * FRAGMENTS  # the vectors
    assert not local.holds("caption")


@pytest.mark.parametrize("part", ["/_versions/", "/data/"])
@pytest.mark.slow
def test_a_table_is_read_through_an_outage(small_table, outage, part):
    assert is_table(small_table, outage.storage)
    outage.away(lambda method, path: part in path, 2.0)
    dataset = lance.dataset(small_table, storage_options=outage.storage.lance)
    assert dataset.to_table()["n"].to_pylist() == list(range(2000))


@pytest.mark.slow
def test_files_of_a_store_are_read_and_written_through_an_outage(outage):
    storage, uri = outage.storage, "s3://bucket/files/a.json"
    storage.write_json(uri, {"a": 1})
    for call in (
        lambda: storage.write_json(uri, {"a": 2}),
        lambda: storage.read_json(uri),
        lambda: storage.names("s3://bucket/files"),
        lambda: storage.exists(uri),
        lambda: storage.remove(uri),
    ):
        outage.away(lambda method, path: True, 1.0)
        call()
    assert not storage.exists(uri)


@pytest.mark.slow
def test_a_store_that_stays_away_is_one_line(outage, monkeypatch):
    storage = replace(outage.storage, patience=0.0)
    outage.refuse = lambda method, path: 503
    with pytest.raises(OutOfReachError, match=r"^s3://bucket/t.lance/_versions cannot be reached \(.*rerun"):
        is_table("s3://bucket/t.lance", storage)


def test_a_failure_of_a_store_ends_a_command_with_one_line(capsys):
    def command(*arguments, **options):
        raise OSError("LanceError(IO): Generic S3 error: Error performing GET http://h in 1s, after 3 retries")

    with pytest.raises(SystemExit) as exit:
        terminal.run(command)
    assert exit.value.code == 2
    assert re.fullmatch(
        r"error: a store could not be reached \(OSError.*rerun the same command\n", capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_key_that_may_not_write_is_one_line(uploaded, s3, encode_shapes, outage):
    table = encode_shapes(f"{uploaded}/00000.tar", "s3://bucket/db/readonly.lance", storage=s3).table
    outage.refuse = lambda method, path: 403 if method in ("PUT", "POST", "DELETE") else None
    reader = open_table(table.uri, storage=outage.storage)
    with pytest.raises(TableError, match=r"^s3://bucket/db/readonly.lock cannot be written \(.*key may write"):
        build_index(reader, BuildConfig(index_type="ivf_flat"))
    assert describe(reader)["rows"] == 120


def test_the_server_says_what_is_wrong(s3, outage):
    with pytest.raises(TableError, match=r"^s3://nowhere does not exist \(NoSuchBucket\)"):
        open_table("s3://nowhere/db/t.lance", storage=s3)
    with pytest.raises(SourceError, match=r"s3://nowhere does not exist"):
        list_shards(["s3://nowhere/shapes/"], ReadOptions(storage=s3))
    outage.refuse = lambda method, path: 403
    with pytest.raises(TableError, match=r"cannot be reached \(PermissionError: .*credentials and --storage-option"):
        open_table("s3://bucket/db/t.lance", storage=outage.storage)


@pytest.mark.parametrize("how", ["option", "environment", "services"])
def test_a_profile_names_endpoint_region_and_keys(uploaded, endpoint, s3, monkeypatch, tmp_path, how):
    keys = "aws_access_key_id = me\naws_secret_access_key = secret\n"
    address = f"endpoint_url = {endpoint}\n"
    if how == "services":
        address = f"services = mine\n[services mine]\ns3 =\n  {address}"
    (tmp_path / "config").write_text(f"[profile p]\nregion = eu-west-1\n{keys}{address}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "p")
    storage = Storage.of(["profile=p"] if how == "option" else [])
    assert dict(storage.options)["aws_region"] == "eu-west-1"
    assert len(list_shards([uploaded], ReadOptions(storage=storage))) == 3
    uri = f"s3://bucket/profile/{how}.lance"
    lance.write_dataset(pa.table({"n": [1]}), uri, storage_options=storage.lance)
    assert is_table(uri, pickle.loads(pickle.dumps(storage)))
    with pytest.raises(OptionError, match=r"\(nope\) could not be found: use one of those in .* \(p\)"):
        Storage.of(["profile=nope"])


def test_options_reach_shards_and_tables_alike():
    options = dict(Storage.of(["anonymous=true", "region=r"]).options)
    assert fsspec_options("s3://b/x", options)["anon"] is True
    assert fsspec_options("gs://b/x", options)["token"] == "anon"
    assert fsspec_options("az://b/x", options)["anon"] is True
    assert Storage.of(["anon=true"]).lance["aws_skip_signature"] == "true"
    texts = ["account_name=n", "azure_account_key=k==", "azure_endpoint=http://h/n"]
    named = Storage.of(texts)
    connection = "DefaultEndpointsProtocol=http;AccountName=n;AccountKey=k==;BlobEndpoint=http://h/n"
    assert fsspec_options("az://b/x", dict(named.options))["connection_string"] == connection
    by_string = Storage.of([f"connection_string={connection}"])
    for storage in (named, by_string):
        taken = storage.lance
        assert (taken["azure_storage_account_name"], taken["azure_storage_account_key"]) == ("n", "k==")
        assert (taken["azure_storage_endpoint"], taken["allow_http"]) == ("http://h/n", "true")
    assert "connection_string" not in by_string.lance


@pytest.mark.parametrize("name", ["aws_regoin=x", "azure_storage_account_nam=x", "skip_signatur=true"])
def test_a_misspelt_option_is_refused_with_the_names(name):
    with pytest.raises(OptionError, match=r"is unknown: did you mean \w+\? use one of \w+, "):
        Storage.of([name])


AZURITE = os.environ.get("AZURITE") or shutil.which("azurite-blob")
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of the account that every azurite has; Microsoft has published it."""


@pytest.fixture
def azure(monkeypatch) -> Iterator[Storage]:
    """Options that reach a new azurite with a container `box`."""
    pytest.importorskip("adlfs", reason="adlfs is not installed: pip install 'coalescer[az]'")
    if not AZURITE:
        pytest.skip("azurite is not installed: npm install azurite; AZURITE names its azurite-blob")
    port = free_port()
    command = [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent", "--inMemoryPersistence"]
    server = subprocess.Popen([*command, "--skipApiVersionCheck", "--disableTelemetry"], stdout=subprocess.DEVNULL)
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.1)
    texts = ["account_name=devstoreaccount1", f"account_key={AZURITE_KEY}"]
    storage = Storage.of([*texts, f"azure_endpoint=http://127.0.0.1:{port}/devstoreaccount1"])
    storage.files("az://box")[0].mkdir("box")
    yield storage
    server.terminate()
    server.wait()


@pytest.mark.slow
def test_shards_and_a_table_in_azure(azure, shapes, encode_shapes, encoded, content):
    files, path = azure.files("az://box/shapes")
    for each in shapes.iterdir():
        if each.is_file():
            files.put_file(str(each), f"{path}/{each.name}")
    table = encode_shapes("az://box/shapes", "az://box/db/t.lance", keep_images=True, storage=azure).table

    def without_shard(table):
        return [{name: row[name] for name in row if name != "shard"} for row in content(table)]

    assert without_shard(table) == without_shard(encoded)
    build_index(table, BuildConfig(index_type="ivf_flat"))
    assert open_table(table.uri, indexed=True, storage=azure).version > table.version
    with pytest.raises(TableError, match=r"az://nowhere does not exist"):
        open_table("az://nowhere/t.lance", storage=azure)


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
