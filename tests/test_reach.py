"""A store that is away is waited for; the run is not finished without it, and no sample is rejected for it."""

import contextlib
import errno
import io
import re
import tarfile
import threading
import time
import zipfile
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from index import reach
from index.errors import OutOfReachError, SourceError, one_line
from index.table.ledger import read_ledger, unread_shards
from index.table.storage import Storage
from index.table.table import is_table
from pipeline.config import RuntimeConfig
from pipeline.encode.plan import plan_encode
from pipeline.encode.run import encode_dataset
from pipeline.rejects import Rejected
from pipeline.sources.dataset_images import is_inside, read_image
from pipeline.sources.hub import DatasetURI
from pipeline.sources.listing import list_shards
from pipeline.sources.read import read_samples, shard_identity
from pipeline.sources.sample import ReadOptions, Sample


def tar_bytes(count: int = 3, *, red: int = 0, captions: bool = True) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for number in range(count):
            image = io.BytesIO()
            Image.new("RGB", (8, 8), (number, red, 0)).save(image, "png")
            for name, content in ((f"{number}.png", image.getvalue()), (f"{number}.txt", b"a caption"))[: 1 + captions]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


class Store:
    """A web server whose files fail as often as they are told to, with a status or by a reset connection."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[int]] = {}
        """Of the GET requests of a file, in order; 0 resets the connection, after half of the content was sent."""
        self.head_faults: dict[str, list[int]] = {}
        self.requests: Counter[str] = Counter()
        self.retry_after: str | None = None
        self.hangs: list[str] = []
        """Files of which the next GET request is not answered."""

    def handler(store):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                self.answer(is_get=False)

            def do_GET(self):
                self.answer(is_get=True)

            def answer(self, is_get):
                name = self.path.lstrip("/").partition("?")[0]
                store.requests[name] += 1
                faults = (store.faults if is_get else store.head_faults).get(name, [])
                fault = faults.pop(0) if faults else None
                if is_get and name in store.hangs:
                    store.hangs.remove(name)
                    time.sleep(1)
                    self.close_connection = True
                    return
                if fault or name not in store.files:
                    body = b"no"
                    self.send_response(fault or 404)
                    if store.retry_after:
                        self.send_header("Retry-After", store.retry_after)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    if is_get:
                        self.wfile.write(body)
                    return
                content = store.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{len(content)}"')
                self.end_headers()
                if is_get:
                    self.wfile.write(content[: len(content) // 2] if fault == 0 else content)
                if fault == 0:
                    self.close_connection = True

        return Handler


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(reach, "FIRST_PAUSE", 0.01)
    store = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), store.handler())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{server.server_port}"
    yield store
    server.shutdown()
    server.server_close()
    thread.join()
    with contextlib.suppress(Exception):
        import fsspec

        fsspec.filesystem("http").clear_instance_cache()


@pytest.mark.parametrize("fault", [503, 500, 429, 0], ids=["503", "500", "429", "reset"])
def test_a_store_that_fails_for_a_while_costs_no_sample(store, fault, caplog):
    store.files["a.tar"] = tar_bytes()
    (shard,) = list_shards([f"{store.url}/a.tar"])
    store.faults["a.tar"] = [fault] * 3
    with caplog.at_level("WARNING"):
        assert [sample.key for sample in read_samples(shard)] == ["0", "1", "2"]
    assert "is out of reach" in caplog.text


@pytest.mark.parametrize(("fault", "error"), [(503, "503"), (404, "404"), (401, "401")])
def test_a_store_that_stays_away_is_an_error_and_no_reject(store, fault, error, monkeypatch):
    monkeypatch.setattr(reach, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(reach, "DENIED_SECONDS", 0.05)
    store.files["a.tar"] = tar_bytes()
    (shard,) = list_shards([f"{store.url}/a.tar"])
    store.faults["a.tar"] = [fault] * 1000
    with pytest.raises(SourceError, match=rf"^not finished: http.*a\.tar is out of reach \(.*{error}.*rerun"):
        list(read_samples(shard))


def test_a_local_shard_that_is_gone_is_an_error_and_no_reject(tmp_path):
    with pytest.raises(SourceError, match=r"^not finished: .*gone\.tar is out of reach \(FileNotFoundError"):
        list(read_samples(str(tmp_path / "gone.tar")))
    with pytest.raises(SourceError, match="not finished"):
        shard_identity(str(tmp_path / "gone.tar"))


@pytest.mark.slow
def test_a_run_whose_shard_is_out_of_reach_publishes_nothing_and_resumes(store, encode_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(reach, "RETRY_SECONDS", 0.1)
    for name in ("a.tar", "b.tar"):
        store.files[name] = tar_bytes()
    sources = [f"{store.url}/{name}" for name in store.files]
    listed = list_shards(sources)
    assert len(listed) == 2
    fail = store.faults.setdefault("b.tar", [])

    def refuse(*arguments, list_shards=list_shards, **options):
        found = list_shards(*arguments, **options)
        fail.extend([503] * 1000)
        return found

    monkeypatch.setattr("pipeline.encode.plan.list_shards", refuse)
    with pytest.raises(SourceError, match=r"not finished: these shards .*b\.tar \(.*503.*: 1 of 2 shards are kept"):
        encode_shapes(sources, tmp_path / "t.lance", val_fraction=0.0)
    assert not is_table(str(tmp_path / "t.lance"), Storage())
    monkeypatch.setattr("pipeline.encode.plan.list_shards", list_shards)
    fail.clear()
    report = encode_shapes(sources, tmp_path / "t.lance", val_fraction=0.0).report
    assert (report["rows"], report["rejected"]) == (6, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dedup", [None, "image"])
def test_shards_out_of_reach_are_named_and_can_be_left_for_the_next_run(
    store, encode_shapes, image_encoder, text_encoder, tmp_path, monkeypatch, content, dedup
):
    for name in ("a.tar", "b.tar", "c.tar", "d.tar"):
        store.files[name] = tar_bytes(3, red=ord(name[0]))
    sources = [f"{store.url}/{name}" for name in store.files]
    missing = {name: store.files[name] for name in ("b.tar", "d.tar")}
    options = {"image_encoder": image_encoder, "text_encoder": text_encoder, "image_size": 32, "val_fraction": 0.0}
    options |= {"dedup": dedup}

    def encode(table, **runtime):
        runtime = RuntimeConfig(batch_size=32, device="cpu", storage=Storage(patience=0.05), **runtime)
        config = replace(plan_encode(sources[:1], options, runtime), shards=tuple(sources))
        return encode_dataset(config, runtime, str(table))

    for name in missing:
        del store.files[name]
    names = r"could not be read: http\S+/b\.tar \(.*404.*; http\S+/d\.tar \(.*404"
    with pytest.raises(OutOfReachError, match=rf"^not finished: these shards {names}.*2 of 4 shards are kept"):
        encode(tmp_path / "t.lance")
    assert not is_table(str(tmp_path / "t.lance"), Storage())
    part = encode(tmp_path / "t.lance", allow_missing_shards=True)
    assert (part.report["rows"], part.report["unread_shards"]) == (6, [sources[1], sources[3]])
    assert "2 shards could not be read and are not in the table" in part.report["warnings"][0]
    assert unread_shards(read_ledger(part.table)) == [sources[1], sources[3]]
    store.files |= missing
    rest = encode(tmp_path / "t.lance")
    assert (rest.report["rows"], rest.report["unread_shards"], len(content(rest.table))) == (6, [], 12)
    assert encode(tmp_path / "t.lance").already_complete
    whole = encode(tmp_path / "whole.lance")
    assert content(rest.table) == content(whole.table) or {row["id"]: row["latent"] for row in content(rest.table)} == {
        row["id"]: row["latent"] for row in content(whole.table)
    }


def test_a_run_of_which_no_shard_can_be_read_publishes_nothing(
    store, image_encoder, text_encoder, tmp_path, monkeypatch
):
    store.files["a.tar"] = tar_bytes()
    options = {"image_encoder": image_encoder, "text_encoder": text_encoder, "image_size": 32}
    runtime = RuntimeConfig(device="cpu", storage=Storage(patience=0.05), allow_missing_shards=True)
    config = plan_encode([f"{store.url}/a.tar"], options, runtime)
    del store.files["a.tar"]
    with pytest.raises(OutOfReachError, match=r"not finished: these shards could not be read: .*a\.tar"):
        encode_dataset(config, runtime, str(tmp_path / "t.lance"))


def test_a_server_says_how_long_to_wait_and_the_wait_is_told(store, monkeypatch):
    slept, told = [], []
    monkeypatch.setattr(reach.time, "sleep", slept.append)
    store.files["a.tar"] = tar_bytes()
    (shard,) = list_shards([f"{store.url}/a.tar"])
    store.retry_after = "7"
    store.faults["a.tar"] = [429, 429]
    assert len(list(read_samples(shard, ReadOptions(on_wait=told.append)))) == 3
    assert slept == [7.0, 7.0]
    assert re.fullmatch(r".*a\.tar is out of reach \(.*429.*\): waiting for it until \d\d:\d\d:\d\d", told[0])
    assert told[-1] is None
    store.retry_after = "100000"  # not longer than we wait in all
    store.faults["a.tar"] = [429]
    list(read_samples(shard))
    assert slept[-1] <= reach.RETRY_SECONDS


def test_a_sidecar_that_cannot_be_fetched_for_a_while_is_not_taken_for_none(store):
    store.files["a.tar"] = tar_bytes(captions=False)
    rows = io.BytesIO()
    pq.write_table(pa.table({"key": ["0", "1", "2"], "caption": ["x", "y", "z"], "status": ["success"] * 3}), rows)
    store.files["a.parquet"] = rows.getvalue()
    store.head_faults["a.parquet"] = [503, 503]
    store.faults["a.parquet"] = [503, 503]
    assert all(isinstance(sample, Sample) for sample in read_samples(f"{store.url}/a.tar"))


def test_a_server_that_sends_nothing_counts_as_away(store, monkeypatch):
    monkeypatch.setattr("index.table.storage.READ_SECONDS", 0.2)
    store.files["a.tar"] = tar_bytes()
    store.hangs.append("a.tar")
    assert len(list(read_samples(f"{store.url}/a.tar"))) == 3
    assert not store.hangs


@pytest.mark.slow
def test_a_refused_connection_is_named(monkeypatch):
    monkeypatch.setattr(reach, "LISTING_SECONDS", 0.1)
    with pytest.raises(SourceError, match=r"'http://127.0.0.1:9/a.tar' cannot be listed \(.*[Cc]onnect"):
        list_shards(["http://127.0.0.1:9/a.tar"])
    with pytest.raises(SourceError, match=r"cannot be (listed|reached) \(.*[Cc]onnect"):
        list_shards(["http://127.0.0.1:9/{00000..00040}.tar"])


def test_errors_of_lance_tell_whether_a_store_is_away():
    away = OSError("LanceError(IO): Generic S3 error: Error performing GET http://h/b in 1.5s, after 3 retries, ...")
    denied = OSError("LanceError(IO): Generic S3 error: Client error with status 403 Forbidden: <Error>...")
    assert reach.is_store_failure(away)
    assert not reach.is_denied(away)
    assert reach.is_store_failure(denied)
    assert reach.is_denied(denied)
    assert not reach.is_store_failure(ValueError("column x does not exist"))
    answer = "Generic S3 error: " + "x" * 500 + "<Error><Code>NoSuchBucket</Code><Message>It&#34;s gone</Message>"
    assert one_line(OSError(answer)) == 'NoSuchBucket: It"s gone'


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("late"), True),
        (FileNotFoundError("gone"), True),
        (OSError(errno.EBUSY, "slow down"), True),
        (OSError(errno.ESTALE, "stale"), True),
        (OSError("Couldn't deserialize thrift"), False),
        (tarfile.ReadError("truncated"), False),
        (EOFError("Compressed file ended"), False),
        (ValueError("no caption column"), False),
    ],
)
def test_what_is_out_of_reach_and_what_is_bad(error, expected):
    assert reach.is_out_of_reach(error) is expected
    wrapped = tarfile.ReadError("in a reader")
    wrapped.__cause__ = error
    assert reach.is_out_of_reach(wrapped) is expected


@pytest.mark.slow
def test_brace_patterns_of_many_names_on_a_web_server(store):
    for number in range(40):
        if number != 7:
            store.files[f"{number:05d}.tar"] = tar_bytes(1)
    shards = list_shards([f"{store.url}/{{00000..00039}}.tar"])
    assert shards == [f"{store.url}/{number:05d}.tar" for number in range(40) if number != 7]
    store.faults["00003.tar"] = [403] * 9
    store.files.pop("00003.tar")
    with pytest.raises(SourceError, match=r"cannot be listed \(.*403"):
        list_shards([f"{store.url}/{{00000..00039}}.tar"])


def test_a_presigned_url_is_a_shard_and_its_signature_is_not_stored(store, monkeypatch):
    monkeypatch.setattr(reach, "RETRY_SECONDS", 0.05)
    store.files["a.tar"] = tar_bytes()
    (shard,) = list_shards([f"{store.url}/a.tar?X-Amz-Signature=secret"])
    samples = list(read_samples(shard))
    assert [sample.shard for sample in samples] == [f"{store.url}/a.tar"] * 3
    store.faults["a.tar"] = [503] * 1000
    with pytest.raises(SourceError, match="out of reach") as caught:
        list(read_samples(shard))
    assert "secret" not in str(caught.value)


def test_options_of_s3_do_not_reach_other_stores(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store.files["a.tar"] = tar_bytes()
    options = ReadOptions(storage=Storage.of())
    (shard,) = list_shards([f"{store.url}/a.tar"], options)
    assert len(list(read_samples(shard, options))) == 3


def test_a_hub_row_cannot_chain_to_another_file(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    with zipfile.ZipFile(data / "a.zip", "w") as file:
        file.writestr("in.png", b"inside")
    assert read_image(str(data), f"zip://in.png::{data}/a.zip", 100) == b"inside"
    assert read_image(str(data), f"file://{tmp_path}/secret.png::{data}/a.zip", 100) is None
    hub = DatasetURI.parse("hf:org/name?revision=abc").root
    assert is_inside(hub, "zip://x.png::hf://datasets/org/name@abc/a.zip")
    for path in (
        "file:///etc/passwd::hf://datasets/org/name@abc/a.zip",
        "zip://x.png::file:///etc/a.zip::hf://datasets/org/name@abc/a.zip",
        "http://host/x::hf://datasets/org/name@abc/a.zip",
        "simplecache::hf://datasets/org/name@abc/a.zip",
        "hf://datasets/org/name@abc/../../other/private@main/x.png",
        "hf://datasets/org/other@abc/x.png",
        "/etc/passwd",
    ):
        assert not is_inside(hub, path), path


def test_an_archive_in_a_row_cannot_be_larger_than_allowed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("in.png", bytes(5 * 2**20))
    with pytest.raises(Rejected, match="sample_too_large: more than --max-sample-mb 1 allows"):
        read_image(str(tmp_path), f"zip://in.png::{tmp_path}/a.zip", 2**20)
