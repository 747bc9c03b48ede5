"""One writer at a time: locks of files and leases of object stores, between real processes and on real S3 servers."""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from botocore.exceptions import ConnectionClosedError

from index.errors import TableError
from index.reach import is_store_failure
from index.table import lease as lease_module
from index.table import lock as lock_module
from index.table.lease import ConflictError, Lease, OtherObject, Stored, lease_of
from index.table.lock import hold_lock
from index.table.storage import Storage

ROOT = Path(__file__).parent.parent
VERSITYGW = Path(os.environ.get("VERSITYGW", ROOT.parent / "shared" / "bin" / "versitygw"))
KEYS = ("aws_access_key_id=key", "aws_secret_access_key=secret", "region=us-east-1")

HOLDER = """
import sys, time
from index.table import lock
from index.table.storage import Storage
uri, seconds, options = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
lock.LEASE_SECONDS = seconds
try:
    with lock.hold_lock(uri, Storage.of(options), "encode") as held:
        print("held", flush=True)
        for line in sys.stdin:
            try:
                held.check()
                print("checked", flush=True)
            except Exception as error:
                print(f"lost: {error}", flush=True)
            if line == "end\\n":
                break
    print("released", flush=True)
except Exception as error:
    print(f"refused: {error}", flush=True)
"""


class Holder:
    """A process that holds a lock until its input ends."""

    def __init__(self, uri: str, seconds: float = 60.0, options: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, uri, str(seconds), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def says(self) -> str:
        return self.process.stdout.readline().strip()

    def check(self) -> str:
        self.process.stdin.write("check\n")
        self.process.stdin.flush()
        return self.says()

    def end(self) -> str:
        self.process.stdin.close()
        said = self.says()
        self.process.wait()
        self.process.stdout.close()
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def holders():
    """A function that starts holders; those that are left are killed."""
    started: list[Holder] = []

    def start(*arguments, **options) -> Holder:
        started.append(Holder(*arguments, **options))
        return started[-1]

    yield start
    for holder in started:
        if holder.process.returncode is None:
            holder.kill()


# --- files


def test_a_lock_is_one_file_next_to_the_table(tmp_path):
    with hold_lock(str(tmp_path / "t.lance"), Storage(), "build-index") as held:
        record = json.loads((tmp_path / "t.lock").read_text())
        assert {
            "purpose": "build-index",
            "process": os.getpid(),
            "host": socket.gethostname(),
        }.items() <= record.items()
        held.check()
        with (
            pytest.raises(TableError, match=rf"t\.lance is locked by build-index, process {os.getpid()} on .* since"),
            hold_lock(str(tmp_path / "t.lance"), Storage(), "prune"),
        ):
            raise AssertionError("locked twice")
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_until_the_first_ends(tmp_path, holders):
    uri = str(tmp_path / "t.lance")
    first = holders(uri)
    assert first.says() == "held"
    said = holders(uri).says()
    assert said.startswith(f"refused: {uri} is locked by encode, process {first.process.pid} on ")
    assert first.end() == "released"
    assert holders(uri).says() == "held"


@pytest.mark.slow
def test_a_killed_holder_frees_its_lock_and_a_slow_one_keeps_it(tmp_path, holders):
    uri = str(tmp_path / "t.lance")
    slow = holders(uri, 0.4)
    assert slow.says() == "held"
    slow.process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    assert re.search(r"last heartbeat \d+ s ago", holders(uri, 0.4).says())
    slow.process.send_signal(signal.SIGCONT)
    assert slow.check() == "checked"
    slow.kill()
    assert (tmp_path / "t.lock").exists()
    assert holders(uri).says() == "held"


def test_a_half_written_owner_is_tolerated(tmp_path, holders):
    uri = str(tmp_path / "t.lance")
    first = holders(uri)
    assert first.says() == "held"
    for content in ("", '{"proc', "[1]"):
        (tmp_path / "t.lock").write_text(content)
        assert "t.lance is locked by another command" in holders(uri).says()
    first.kill()
    assert holders(uri).says() == "held"


def test_a_lock_that_does_not_reach_other_hosts_is_kept_by_its_heartbeat(tmp_path):
    uri, path = str(tmp_path / "t.lance"), tmp_path / "t.lock"
    path.write_text(json.dumps({"purpose": "encode", "process": 7, "host": "elsewhere", "since": "noon"}))
    with pytest.raises(TableError, match="process 7 on elsewhere since noon"), hold_lock(uri, Storage(), "prune"):
        raise AssertionError("taken from another host")
    os.utime(path, (time.time() - 100, time.time() - 100))
    with hold_lock(uri, Storage(), "prune"):
        pass


def test_a_lock_whose_file_was_deleted_or_replaced_is_lost(tmp_path):
    uri = str(tmp_path / "t.lance")
    with hold_lock(uri, Storage(), "encode") as first:
        (tmp_path / "t.lock").unlink()
        with pytest.raises(TableError, match=r"t\.lock was lost .*nothing is published"):
            first.check()
        with hold_lock(uri, Storage(), "encode") as second:
            second.check()
            with pytest.raises(TableError, match="was lost"):
                first.check()


def test_other_processes_check_a_lock_that_they_were_given(tmp_path):
    with hold_lock(str(tmp_path / "t.lance"), Storage(), "encode") as held:
        copy = pickle.loads(pickle.dumps(held))
        copy.check()
    with pytest.raises(TableError, match="another command holds it, or none"):
        copy.check()


def test_many_processes_never_hold_one_lock_together(tmp_path):
    code = f"""
import os
from index.errors import TableError
from index.table.lock import hold_lock
from index.table.storage import Storage
for _ in range(200):
    try:
        with hold_lock({str(tmp_path / "t.lance")!r}, Storage(), "encode"):
            os.close(os.open({str(tmp_path / "one")!r}, os.O_CREAT | os.O_EXCL))
            os.unlink({str(tmp_path / "one")!r})
    except TableError:
        pass
"""
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(4)]
    assert [each.wait() for each in running] == [0] * 4


# --- leases


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def versitygw(tmp_path_factory):
    """The address of a real S3 server."""
    if not VERSITYGW.exists():
        pytest.skip(f"no S3 server at {VERSITYGW}; VERSITYGW names another")
    port = free_port()
    options = ("--port", f"127.0.0.1:{port}", "--admin-port", f"127.0.0.1:{free_port()}", "--keep-alive", "--quiet")
    keys = {"ROOT_ACCESS_KEY": "key", "ROOT_SECRET_KEY": "secret"}
    folder = tmp_path_factory.mktemp("versitygw")
    server = subprocess.Popen([VERSITYGW, *options, "posix", folder], env=os.environ | keys)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def moto(tmp_path_factory):
    """The address of a mock of S3, which serves one request at a time as far as conditions go."""
    pytest.importorskip("moto", reason="the S3 test server is not installed: pip install 'moto[s3]' flask flask-cors")
    port, log = free_port(), (tmp_path_factory.mktemp("moto") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()
    log.close()


@pytest.fixture(params=["versitygw", "moto"])
def options(request, monkeypatch) -> tuple[str, ...]:
    """The storage options of a server that has a bucket `bucket`."""
    endpoint = request.getfixturevalue(request.param)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    options = (f"endpoint_url={endpoint}", *KEYS)
    files, _ = Storage.of(options).files("s3://bucket")
    for _ in range(100):
        try:
            if not files.exists("bucket"):
                files.call_s3("create_bucket", Bucket="bucket")
            return options
        except Exception:  # it is starting
            time.sleep(0.1)
    raise AssertionError(f"the S3 server at {endpoint} does not answer")


@pytest.fixture
def uri(request) -> str:
    return f"s3://bucket/{abs(hash(request.node.name))}/t.lance"


def lease(uri: str, options: tuple[str, ...], token: str, seconds: float = 60.0) -> Lease:
    files, path = Storage.of(options).files(lock_module.lock_uri(uri))
    record = {
        "token": token,
        "purpose": "encode",
        "process": 1,
        "host": token,
        "since": "noon",
        "lease_seconds": seconds,
    }
    return lease_of(files, path, record=record, seconds=seconds)


def test_a_lease_is_held_by_one_and_released(uri, options, holders):
    storage = Storage.of(options)
    with hold_lock(uri, storage, "build-index") as held:
        held.check()
        pickle.loads(pickle.dumps(held)).check()
        said = holders(uri, options=options).says()
        assert re.search(r"refused: .* locked by build-index, process \d+ on .* its lease expires in \d+ s", said)
        assert said.count("\n") == 0
    assert not storage.exists(lock_module.lock_uri(uri))
    with pytest.raises(TableError, match="was lost"):
        pickle.loads(pickle.dumps(held)).check()
    assert holders(uri, options=options).says() == "held"


@pytest.mark.slow
def test_the_lease_of_a_killed_run_expires_and_that_of_a_slow_one_does_not(uri, options, holders):
    slow = holders(uri, 2.0, options)
    assert slow.says() == "held"
    time.sleep(5)
    # It has renewed it, however long its step takes.
    assert "refused" in holders(uri, 2.0, options).says()
    assert slow.check() == "checked"
    slow.kill()
    assert "refused" in holders(uri, 2.0, options).says()
    time.sleep(5)
    assert holders(uri, 2.0, options).says() == "held"


@pytest.mark.slow
def test_of_two_runs_that_take_over_an_expired_lease_one_wins(uri, options):
    for round_ in range(12):
        place = f"{uri.removesuffix('.lance')}-{round_}.lance"
        assert lease(place, options, "dead", seconds=0.1).acquire() is None
    time.sleep(3)
    for round_ in range(12):
        place = f"{uri.removesuffix('.lance')}-{round_}.lance"
        leases = [lease(place, options, f"{each}") for each in range(2)]
        barrier, results = threading.Barrier(2), [None] * 2

        class Waiting:
            """Both have read the expired lease before either writes."""

            def __init__(self, inner, barrier=barrier):
                self.inner, self.barrier, self.read, self.delete = inner, barrier, inner.read, inner.delete

            def write(self, content, etag):
                self.barrier.wait()
                return self.inner.write(content, etag)

        for each in leases:
            each._place = Waiting(each._place)

        def take(number, leases=leases, results=results):
            results[number] = leases[number].acquire()

        threads = [threading.Thread(target=take, args=(each,)) for each in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(each is None for each in results) == [False, True], results
        (loser,) = (each for each in results if each is not None)
        assert json.loads(loser.content)["host"] == str(results.index(None))


@pytest.mark.slow
def test_of_two_processes_that_take_over_an_expired_lease_one_wins(uri, options, holders):
    places = [f"{uri.removesuffix('.lance')}-{round_}.lance" for round_ in range(10)]
    for place in places:
        assert lease(place, options, "dead", seconds=0.1).acquire() is None
    time.sleep(3)
    for place in places:
        pair = [holders(place, 60.0, options) for _ in range(2)]
        said = sorted(each.says().partition(":")[0] for each in pair)
        assert said == ["held", "refused"]
        for each in pair:
            each.end()


def test_a_holder_whose_lease_was_taken_over_publishes_nothing_and_deletes_nothing(uri, options):
    storage = Storage.of(options)
    with hold_lock(uri, storage, "encode") as held:
        files, path = storage.files(lock_module.lock_uri(uri))
        files.pipe_file(path, json.dumps({"token": "other", "lease_seconds": 60}).encode())
        with pytest.raises(TableError, match=r"was lost \(another command took it over\): nothing is published"):
            held.check()
        with pytest.raises(TableError, match="was lost"):
            pickle.loads(pickle.dumps(held)).check()
    assert json.loads(files.cat_file(path))["token"] == "other"


def test_a_lease_that_was_deleted_is_lost(uri, options):
    storage = Storage.of(options)
    with hold_lock(uri, storage, "encode") as held:
        storage.remove(lock_module.lock_uri(uri))
        with pytest.raises(TableError, match=r"was lost \(it was deleted\)"):
            held.check()
    assert not storage.exists(lock_module.lock_uri(uri))


def test_an_unreadable_lease_is_someone_elses(uri, options):
    storage = Storage.of(options)
    files, path = storage.files(lock_module.lock_uri(uri))
    files.pipe_file(path, b'{"tok')
    with pytest.raises(TableError, match="is locked by another command"), hold_lock(uri, storage, "encode"):
        raise AssertionError("taken")


def test_a_store_without_the_bucket_is_one_line(options):
    with (
        pytest.raises(TableError, match=r"s3://nowhere/t\.lock cannot be written \(.*bucket"),
        hold_lock("s3://nowhere/t.lance", Storage.of(options), "encode"),
    ):
        raise AssertionError("locked nothing")


# --- failures of a store


class FakeObject:
    """An object whose store can fail, and whose clock is the test's."""

    def __init__(self) -> None:
        self.stored: Stored | None = None
        self.failing = False
        self.answer_lost = False
        self.writes = 0

    def read(self) -> Stored | None:
        if self.failing:
            raise OSError("503 Slow Down")
        return self.stored

    def write(self, content: bytes, etag: str | None) -> str:
        if self.failing:
            raise OSError("503 Slow Down")
        if (None if self.stored is None else self.stored.etag) != etag:
            raise ConflictError("PreconditionFailed")
        self.writes += 1
        self.stored = Stored(content, f"{self.writes}", 0.0)
        if self.answer_lost:
            self.answer_lost = False
            raise ConflictError("PreconditionFailed")
        return self.stored.etag

    def delete(self, etag: str) -> None:
        assert self.stored.etag == etag
        self.stored = None


@pytest.fixture
def clock(monkeypatch):
    """A list with the time that leases see."""
    now = [1000.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now[0])
    return now


def test_a_lease_that_cannot_be_renewed_is_lost_after_its_time(clock):
    place = FakeObject()
    held = Lease(place, {"token": "a"}, 60.0)
    assert held.acquire() is None
    place.failing = True
    clock[0] += 59
    held.check()
    clock[0] += 2
    with pytest.raises(lease_module.LeaseLostError, match=r"it was not renewed for 60 s: 503 Slow Down"):
        held.check()
    # The store is back, and nobody has taken the lease over.
    place.failing = False
    held.check()
    clock[0] += 59
    held.check()


@pytest.mark.slow
def test_renewals_that_fail_are_repeated(monkeypatch):
    place = FakeObject()
    held = Lease(place, {"token": "a"}, 0.4)
    assert held.acquire() is None
    place.failing = True
    with held.renewed():
        time.sleep(0.15)
        place.failing = False
        time.sleep(1)
        assert place.writes > 3
        held.check()
    assert place.stored is None


@pytest.mark.parametrize("step", ["acquire", "renew"])
def test_a_write_whose_answer_was_lost_is_not_taken_for_another_holder(step):
    place = FakeObject()
    held = Lease(place, {"token": "a", "lease_seconds": 60}, 60.0)
    place.answer_lost = step == "acquire"
    assert held.acquire() is None
    place.answer_lost = step == "renew"
    held.check()
    held.check()
    assert Lease(place, {"token": "b"}, 60.0).acquire() is not None


def test_a_store_that_is_away_when_a_lease_is_taken_is_waited_for(monkeypatch):
    place, failures = FakeObject(), [ConnectionResetError("reset"), ConnectionResetError("reset")]
    write = place.write

    def lost(content: bytes, etag: str | None) -> str:
        """Write, and lose the answer, while there are failures left."""
        tag = write(content, etag)
        if failures:
            raise failures.pop()
        return tag

    place.write = lost
    monkeypatch.setattr("index.reach.FIRST_PAUSE", 0.01)
    monkeypatch.setattr(lock_module, "lease_of", lambda *_, record, seconds: Lease(place, record, seconds))
    with hold_lock("s3://bucket/t.lance", Storage.of(KEYS)) as held:
        assert json.loads(place.stored.content)["token"] == held.token
        assert len(failures) == 1
        held.check()


def test_a_connection_that_breaks_is_an_error_of_the_store():
    class Files:
        def split_path(self, path):
            return "bucket", path, None

        def call_s3(self, *_, **__):
            raise ConnectionClosedError(endpoint_url="http://store")

    with pytest.raises(OSError, match="Connection was closed") as caught:
        lease_module.S3Object(Files(), "t.lock").write(b"", None)
    assert is_store_failure(caught.value)


def test_the_clock_of_a_machine_decides_nothing(clock):
    place = FakeObject()
    held = Lease(place, {"token": "a", "lease_seconds": 60}, 60.0)
    assert held.acquire() is None
    # The other machine's clocks are hours ahead; the store says that 70 seconds have gone by.
    clock[0] += 7200
    place.stored = Stored(place.stored.content, place.stored.etag, 70.0)
    other = Lease(place, {"token": "b", "lease_seconds": 60}, 60.0)
    assert other.acquire() is place.stored
    place.stored = Stored(place.stored.content, place.stored.etag, 77.0)
    assert other.acquire() is None
    with pytest.raises(lease_module.LeaseLostError, match="another command took it over"):
        held.check()


def test_stores_without_conditional_replacement_are_never_taken_over():
    from fsspec.implementations.memory import MemoryFileSystem

    files = MemoryFileSystem()
    files.store.clear()
    first, second = (Lease(OtherObject(files, "/db/t.lock"), {"token": token}, 60.0) for token in "ab")
    assert first.acquire() is None
    first.check()
    assert second.acquire().age is None
    with first.renewed():
        pass
    assert second.acquire() is None
    files.pipe_file("/db/t.lock", b"{}")
    with pytest.raises(lease_module.LeaseLostError):
        second.check()
