"""Drawn shapes: known truth, and a reader that finds it again."""

import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from index.errors import OptionError
from pipeline.demo.checker import judge
from pipeline.demo.shapes import Scene, all_scenes, draw, is_heldout, write_demo_data


def scenes(count: int) -> list[Scene]:
    every = list(all_scenes())
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))[:count]]


def test_captions_parse_back():
    for scene in all_scenes():
        assert Scene.parse(scene.caption) == scene


@pytest.mark.parametrize("side", [32, 64])
def test_the_reader_confirms_true_pictures(side):
    chosen = scenes(300)
    pictures = np.stack([np.asarray(draw(s, side, np.random.default_rng(i))) for i, s in enumerate(chosen)])
    verdicts = judge(pictures, [s.caption for s in chosen])
    assert np.mean([v.colors for v in verdicts]) > 0.99
    assert np.mean([v.relation for v in verdicts]) > 0.97


def test_the_reader_refuses_pictures_of_other_captions():
    chosen = scenes(300)
    pictures = np.stack([np.asarray(draw(s, 32, np.random.default_rng(i))) for i, s in enumerate(chosen)])
    others = [s.caption for s in chosen[1:] + chosen[:1]]
    assert np.mean([v.colors for v in judge(pictures, others)]) < 0.15
    turned = [Scene(s.second, s.relation, s.first).caption for s in chosen]
    verdicts = judge(pictures, turned)
    assert np.mean([v.colors for v in verdicts]) > 0.99
    assert not any(v.relation for v in verdicts)
    blank = np.full((1, 32, 32, 3), 245, np.uint8)
    assert not judge(blank, [chosen[0].caption])[0].colors


def test_shards_are_img2dataset_shards(shapes):
    assert sorted(p.name for p in shapes.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(shapes / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["00000000.png", "00000000.txt", "00000000.json"]
        caption = tar.extractfile("00000000.txt").read().decode()
        truth = json.loads(tar.extractfile("00000000.json").read())["truth"]
    scene = Scene.parse(caption)
    assert truth["relation"] == scene.relation
    assert truth["second"]["color"] == scene.second.color
    assert pq.read_table(shapes / "00000.parquet").num_rows == 120
    assert json.loads((shapes / "00000_stats.json").read_text())["successes"] == 120


def captions_of(path) -> list[str]:
    with tarfile.open(path) as tar:
        return [tar.extractfile(m).read().decode() for m in tar.getmembers() if m.name.endswith(".txt")]


def test_heldout_captions_are_never_drawn_for_training(shapes):
    drawn = {caption for path in shapes.glob("*.tar") for caption in captions_of(path)}
    kept = set(captions_of(shapes / "heldout" / "00000.tar"))
    assert kept == {s.caption for s in all_scenes() if is_heldout(s)}
    assert not drawn & kept
    assert 0.07 < len(kept) / len(list(all_scenes())) < 0.13


def test_same_seed_same_bytes_whatever_the_shards(tmp_path, shapes):
    write_demo_data(tmp_path, samples=150, size=32, seed=0, per_shard=150)
    with tarfile.open(tmp_path / "00000.tar") as one, tarfile.open(shapes / "00001.tar") as other:
        name = "00000125.png"
        assert one.extractfile(name).read() == other.extractfile(name).read()


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(OptionError):
        write_demo_data(tmp_path / "out", samples=0, size=32, seed=0)
    assert not (tmp_path / "out").exists()


def test_shards_are_not_overwritten(shapes):
    with pytest.raises(OptionError, match="holds shards already"):
        write_demo_data(shapes, samples=10, size=32, seed=0)
