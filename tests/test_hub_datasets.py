"""Datasets of the hub: names, commits, identity, traffic and what is said when the hub refuses them."""

import io
import json
import os
import shutil
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback_hub import TOKEN, serve
from PIL import Image

from index.errors import SourceError, TableError
from index.table.hub_files import hub_files
from pipeline.sources.hub import commits_of
from pipeline.sources.listing import list_shards
from pipeline.sources.read import count_samples, read_samples, shard_identity
from pipeline.sources.sample import ReadOptions, Sample, Unreadable


def png(number: int = 0, side: int = 32) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 0)).save(data, "png")
    return data.getvalue()


def parquet(numbers, **extra) -> bytes:
    images = [{"bytes": png(n), "path": None} for n in numbers]
    data = io.BytesIO()
    pq.write_table(pa.table({"image": images, "text": [f"image {n}" for n in numbers], **extra}), data)
    return data.getvalue()


def tar(numbers) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        for number in numbers:
            for name, content in ((f"{number:05}.png", png(number)), (f"{number:05}.txt", b"image %d" % number)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return data.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback that this process takes for the hub, with empty caches."""
    monkeypatch.setattr("index.reach.LISTING_SECONDS", 0.0)
    with serve(monkeypatch, tmp_path / "home") as hub:
        forget()
        yield hub
    hub_files.cache_clear()


def forget() -> None:
    """Forget what this process knows of the hub, as if it were a worker that starts."""
    from huggingface_hub import HfFileSystem

    HfFileSystem._cache.clear()
    hub_files.cache_clear()


def captions(shards, options=None) -> list[str]:
    samples = [sample for shard in shards for sample in read_samples(shard, options)]
    assert not [sample for sample in samples if isinstance(sample, Unreadable)]
    return [sample.caption.decode() for sample in samples]


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("hf://datasets/org/name/data/*.parquet", "ab"),
        ("hf://datasets/org/name/data/{a,b}.parquet", "ab"),
        ("hf://datasets/org/name/data/b.parquet", "b"),
        ("hf://datasets/org/name/data", "ab"),
        ("hf://datasets/org/name", "ab"),
        ("hf://datasets/org/name/**/*.parquet", "ab"),
        ("hf://datasets/org/name@v1/data/*.parquet", "a"),
        ("hf://datasets/org/name@v1", "a"),
        ("hf:org/name", "ab"),
        ("hf:org/name@v1", "a"),
        ("hf:org/name?revision=v1", "a"),
    ],
)
def test_every_form_of_a_name_is_pinned_to_its_commit(hub, source, found):
    old = hub.commit_data("org/name", {"data/a.parquet": parquet([0])}, branch="v1")
    new = hub.commit_data(
        "org/name", {"data/a.parquet": parquet([0]), "data/b.parquet": parquet([1]), "README.md": b"words"}
    )
    commit = old if found == "a" else new
    shards = list_shards([source])
    assert shards == [f"hf://datasets/org/name@{commit}/data/{name}.parquet" for name in found]
    assert commits_of(shards) == {"org/name": commit}
    hub.commit_data("org/name", {})
    forget()
    assert captions(shards) == [f"image {'ab'.index(name)}" for name in found]
    assert [count_samples(shard) for shard in shards] == [1] * len(found)


def test_a_name_with_two_revisions_is_refused(hub):
    with pytest.raises(SourceError, match="has two revisions, v1 and v2: use one"):
        list_shards(["hf:org/name@v1?revision=v2"])


@pytest.mark.slow
def test_configurations_and_splits_of_a_readme(hub):
    readme = (
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: x/*.parquet\n"
        "  - split: test\n    path: y/*.parquet\n- config_name: two\n  data_files: z/*.tar\n---\n"
    )
    files = {
        "x/0.parquet": parquet([0]),
        "y/0.parquet": parquet([1]),
        "z/0.tar": tar([2, 3]),
        "README.md": readme.encode(),
    }
    hub.commit_data("org/name", files)
    assert captions(list_shards(["hf:org/name?name=one"])) == ["image 0"]
    assert captions(list_shards(["hf:org/name?name=one&split=test"])) == ["image 1"]
    assert captions(list_shards(["hf:org/name?name=two"])) == ["image 2", "image 3"]
    with pytest.raises(SourceError, match="has no split 'dev': choose one of train, test"):
        list_shards(["hf:org/name?name=one&split=dev"])
    with pytest.raises(SourceError, match="'one', 'two'"):
        list_shards(["hf:org/name"])


# --- what is read --------------------------------------------------------------------------------------------------


def test_every_row_of_a_webdataset_repository(hub):
    hub.commit_data("org/name", {f"{n}.tar": tar(range(50 * n, 50 * n + 50)) for n in range(2)})
    shards = list_shards(["hf:org/name"])
    forget()
    assert captions(shards) == [f"image {n}" for n in range(100)]


def test_an_image_folder_is_cut_into_ranges_that_are_listed_once(hub, monkeypatch):
    monkeypatch.setattr("pipeline.sources.ranges.SAMPLES_PER_RANGE", 20)
    lines = "\n".join(json.dumps({"file_name": f"{n:03}.png", "text": f"image {n}"}) for n in range(50))
    images = {f"train/{n:03}.png": png(n) for n in range(50)}
    commit = hub.commit_data("org/name", {**images, "train/metadata.jsonl": lines.encode()})
    shards = list_shards(["hf:org/name"])
    folder = f"hf://datasets/org/name@{commit}/train"
    assert shards == [f"{folder}#{part}" for part in ("0-20", "20-40", "40-50")]
    assert hub.api_calls < 10
    forget()
    hub.requests.clear()
    assert captions(shards) == [f"image {n}" for n in range(50)]
    assert hub.api_calls == 1
    assert len(hub.requests) < 60


def test_other_formats_are_streamed_by_datasets(hub):
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    hub.commit_data("org/name", {"0.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    (shard,) = list_shards(["hf:org/name"])
    assert shard.endswith("&shard=0/1")
    assert captions([shard]) == ["a", "b"]
    before = shard_identity(shard)
    forget()
    assert shard_identity(shard) == before


@pytest.mark.parametrize("name", ["url", "image", "image_url"])
def test_a_column_of_urls_is_explained(hub, name):
    data = io.BytesIO()
    pq.write_table(pa.table({name: ["https://host/a.jpg"] * 3, "text": ["a", "b", "c"]}), data)
    hub.commit_data("org/name", {"a.parquet": data.getvalue()})
    (shard,) = list_shards(["hf:org/name"])
    with pytest.raises(
        SourceError,
        match=rf"column '{name}' of .* holds URLs of images: .*img2dataset --url_list FILE --url_col {name}",
    ):
        list(read_samples(shard))


@pytest.mark.parametrize("bytes_type", [pa.binary(), pa.null()])
def test_paths_of_urls_are_explained(tmp_path, bytes_type):
    image = pa.struct([("bytes", bytes_type), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "https://host/a.jpg"}] * 2, image)
    pq.write_table(pa.table({"image": images, "text": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"column 'image' of .* holds URLs of images: .*img2dataset"):
        list(read_samples(str(tmp_path / "a.parquet")))


# --- traffic -------------------------------------------------------------------------------------------------------


def test_only_columns_that_are_needed_are_fetched(hub):
    data = parquet(range(20), other=pa.array([os.urandom(500_000) for _ in range(20)]))
    assert len(data) > 10_000_000
    hub.commit_data("org/name", {"a.parquet": data})
    (shard,) = list_shards(["hf:org/name"])
    hub.requests.clear()
    assert len(captions([shard])) == 20
    assert hub.bytes_of_files < 500_000


@pytest.mark.slow
def test_ten_thousand_shards_cost_few_api_calls(hub):
    """Listing and identities in the driver, reading in workers that have listed nothing."""
    data = {f"data/{n:05}.tar": tar([n]) for n in range(10_000)}
    hub.commit_data("org/name", data)
    shards = list_shards(["hf:org/name"])
    assert len(shards) == 10_000
    identities = [shard_identity(shard) for shard in shards]
    assert len(set(identities)) == 10_000
    driver = hub.api_calls
    assert driver < 100
    forget()
    for shard in shards[::500]:
        assert len(captions([shard])) == 1
        assert shard_identity(shard) == identities[shards.index(shard)]
    assert hub.api_calls == driver


# --- identity and append -------------------------------------------------------------------------------------------


def rows(table) -> Counter:
    return Counter(row["caption"] for row in table.dataset().to_table(columns=["caption"]).to_pylist())


@pytest.mark.slow
def test_append_adds_what_the_hub_has_new(hub, encode_shapes, tmp_path):
    files = {"data/a.parquet": parquet(range(10))}
    hub.commit_data("org/name", {**files, "README.md": b"one"})
    source, table = "hf:org/name", tmp_path / "t.lance"
    assert rows(encode_shapes(source, table).table).total() == 10

    hub.commit_data("org/name", {**files, "README.md": b"two"})
    added = encode_shapes(source, table, append=True)
    assert (added.report["rows"], added.report["shards_already_present"], added.already_complete) == (0, 1, True)
    again = encode_shapes(source, table)
    assert (again.already_complete, again.report["warnings"]) == (True, [])

    files["data/b.parquet"] = parquet(range(10, 14))
    hub.commit_data("org/name", files)
    added = encode_shapes(source, table, append=True)
    assert (added.report["rows"], added.report["shards_already_present"]) == (4, 1)

    files["data/a.parquet"] = parquet(range(2, 12))
    hub.commit_data("org/name", files)
    added = encode_shapes(source, table, append=True)
    assert (added.report["rows"], added.report["shards_already_present"]) == (0, 1)
    assert added.report["already_present"] == 10
    assert "1 files of the hub have changed since they were encoded, such as hf://" in added.report["warnings"][0]
    assert rows(added.table) == {f"image {n}": 1 for n in range(14)}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_at_its_own_commit(hub, encode_shapes, tmp_path, monkeypatch):
    from pipeline.encode import graph

    files = {f"data/train-{n:05}-of-00002.parquet": parquet(range(10 * n, 10 * n + 10)) for n in range(2)}
    first = hub.commit_data("org/name", files)
    write_shard = graph.write_shard

    def write_first_only(job, shard, duplicates):
        if "00001-of" in shard:
            raise KeyError("worker failure")
        return write_shard(job, shard, duplicates)

    monkeypatch.setattr(graph, "write_shard", write_first_only)
    with pytest.raises(Exception, match="worker failure"):
        encode_shapes("hf:org/name", tmp_path / "t.lance")
    monkeypatch.setattr(graph, "write_shard", write_shard)
    (plan,) = (tmp_path / "t.encode").glob("*/plan.json")
    assert first in plan.read_text()
    hub.commit_data("org/name", {"data/train-00000-of-00001.parquet": parquet(range(50, 53))})
    with pytest.raises(TableError, match="holds an unfinished run with other options"):
        encode_shapes("hf:org/name?name=default", tmp_path / "t.lance")
    resumed = encode_shapes("hf:org/name", tmp_path / "t.lance")
    assert rows(resumed.table) == {f"image {n}": 1 for n in range(20)}
    assert resumed.report["hub_commits"] == {"org/name": first}
    assert f"org/name at commit {first}" in resumed.report["warnings"][0]


@pytest.mark.slow
def test_an_interrupted_run_of_a_table_that_was_deleted_begins_anew(hub, encode_shapes, tmp_path, monkeypatch):
    from pipeline.encode import graph

    files = {f"{n}.parquet": parquet(range(10 * n, 10 * n + 10)) for n in range(2)}
    table = tmp_path / "t.lance"
    hub.commit_data("org/name", {"0.parquet": files["0.parquet"]})
    encode_shapes("hf:org/name", table)
    hub.commit_data("org/name", files)

    def fail(job, shard, duplicates):
        raise KeyError("worker failure")

    with monkeypatch.context() as patch:
        patch.setattr(graph, "write_shard", fail)
        with pytest.raises(Exception, match="worker failure"):
            encode_shapes("hf:org/name", table, append=True)
    shutil.rmtree(table)
    assert list((tmp_path / "t.encode").glob("*/plan.json"))
    assert rows(encode_shapes("hf:org/name", table).table).total() == 20


# --- what the hub refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["hf:{}", "hf://datasets/{}/data/*.parquet"])
@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        ({"is_private": True}, "", "no such dataset, or it is private: check the name, or log in with `hf auth login`"),
        ({"is_private": True}, "hf_wrong", "the hub refuses your access token: log in"),
        ({"is_gated": True}, "", "it is gated: ask for access at http://.*/datasets/org/name, then log in"),
        ({"kind": "models"}, "", "it is a model, and a dataset is needed"),
        ({"kind": "models"}, TOKEN, "it is a model, and a dataset is needed"),
    ],
)
def test_a_refusal_says_what_it_is_and_what_to_do(hub, monkeypatch, source, options, token, message):
    hub.commit("org/name", {"data/a.parquet": parquet([0])}, **{"kind": "datasets", **options})
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SourceError, match=message) as caught:
        list_shards([source.format("org/name")])
    assert "\n" not in str(caught.value)
    assert "hf_" not in str(caught.value).replace("hf_HUB", "")


@pytest.mark.parametrize("source", ["hf:org/none", "hf://datasets/org/none/data/*.parquet"])
def test_a_missing_dataset_with_a_good_token(hub, monkeypatch, source):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SourceError, match="no such dataset, or your account may not read it"):
        list_shards([source])


@pytest.mark.parametrize("options", [{"is_private": True}, {"is_gated": True}])
def test_a_token_opens_private_and_gated_datasets_and_is_in_no_name(hub, monkeypatch, options):
    hub.commit("org/name", {"data/a.parquet": parquet([0])}, **{"kind": "datasets", **options})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shards = list_shards(["hf:org/name"])
    assert captions(shards) == ["image 0"]
    assert TOKEN not in str(shards)


def test_a_missing_revision_offline_and_down(hub, monkeypatch):
    hub.commit_data("org/name", {"data/a.parquet": parquet([0])})
    with pytest.raises(SourceError, match="has no revision 'v9': use one of its branches, tags or commits"):
        list_shards(["hf:org/name@v9"])
    hub.fault = 503
    with pytest.raises(SourceError, match=r"the hub cannot be reached .*503.*: check the connection and HF_ENDPOINT"):
        list_shards(["hf:org/name"])
    hub.fault = 429
    with pytest.raises(SourceError, match=r"too many requests \(429\): wait some minutes and try again; log in"):
        list_shards(["hf:org/name"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set: unset it, or name a folder"):
        list_shards(["hf:org/name"])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["hf:org/name", "hf://datasets/org/name/data"])
@pytest.mark.parametrize(
    "path", ["/api/datasets/org/name", "/api/datasets/org/name/tree", "/datasets/org/name/resolve"]
)
def test_one_refusal_of_the_hub_is_waited_for(hub, monkeypatch, source, path):
    hub.commit_data("org/name", {"data/a.parquet": parquet([0]), "data/b.parquet": parquet([1])})
    monkeypatch.setattr("index.reach.LISTING_SECONDS", 10.0)
    monkeypatch.setattr("index.reach.FIRST_PAUSE", 0.01)
    hub.faults.append((path, 503))
    shards = list_shards([source])
    hub.faults.append(("/datasets/org/name/resolve", 503))
    forget()
    assert captions(shards) == ["image 0", "image 1"]


@pytest.mark.parametrize(
    ("page", "source"),
    [
        ("https://huggingface.co/datasets/org/name", "hf:org/name"),
        ("hf:https://huggingface.co/datasets/org/name", "hf:org/name"),
        ("https://huggingface.co/datasets/org/name/tree/main", "hf:org/name@main"),
        ("https://huggingface.co/datasets/org/name/tree/v1/data", "hf://datasets/org/name@v1/data"),
        ("https://huggingface.co/datasets/org/name/blob/main/a.tar", "hf://datasets/org/name@main/a.tar"),
        ("https://huggingface.co/org/name", "hf:ORG/NAME"),
    ],
)
def test_an_address_of_the_browser_is_explained(page, source):
    with pytest.raises(SourceError, match=f"is a page of the hub: a dataset of it is '{source}'"):
        list_shards([page])


@pytest.mark.parametrize("source", ["hf://org/name/a.tar", "hf://spaces/org/name/a.tar"])
def test_a_path_in_another_kind_of_repository_is_explained(hub, source):
    with pytest.raises(
        SourceError, match=r"names a (model|space) repository: files of a dataset are hf://datasets/org/name"
    ):
        list_shards([source])


def test_keys_of_rows_are_named_after_their_file(hub):
    hub.commit_data("org/name", {"a.parquet": parquet([0])})
    (sample,) = read_samples(list_shards(["hf:org/name"])[0], ReadOptions())
    assert isinstance(sample, Sample)
    assert sample.key == "a/00000000"
