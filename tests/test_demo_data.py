"""Captioned shapes: known scenes, and a checker that recognizes them."""

import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from index.errors import OptionError
from pipeline.demo.checker import check_images
from pipeline.demo.shapes import Scene, all_scenes, draw_scene, is_heldout, write_demo_data


def some_scenes(count: int) -> list[Scene]:
    scenes = list(all_scenes())
    return [scenes[i] for i in np.random.default_rng(0).permutation(len(scenes))[:count]]


def draw_images(scenes: list[Scene], image_size: int) -> np.ndarray:
    return np.stack([np.asarray(draw_scene(s, image_size, np.random.default_rng(i))) for i, s in enumerate(scenes)])


def test_captions_parse_back():
    for scene in all_scenes(3):
        assert Scene.parse(scene.caption) == scene


@pytest.mark.slow
def test_each_background_has_all_captions_and_a_color_of_its_own():
    scenes = list(all_scenes(33))
    assert len({scene.caption for scene in scenes}) == 33 * len(list(all_scenes()))
    first = [scenes[number] for number in range(0, len(scenes), len(scenes) // 33)]
    corners = np.stack([np.asarray(draw_scene(scene, 32, np.random.default_rng(0)))[0, 0] for scene in first])
    assert len(np.unique(corners, axis=0)) == len({scene.background for scene in first}) == 33


@pytest.mark.parametrize("image_size", [32, 64])
def test_the_checker_confirms_true_images(image_size):
    scenes = some_scenes(300)
    verdicts = check_images(draw_images(scenes, image_size), [s.caption for s in scenes])
    assert np.mean([v.colors for v in verdicts]) > 0.99
    assert np.mean([v.relation for v in verdicts]) > 0.97


def test_the_checker_refuses_images_of_other_captions():
    scenes = some_scenes(300)
    images = draw_images(scenes, 32)
    shifted = [s.caption for s in scenes[1:] + scenes[:1]]
    assert np.mean([v.colors for v in check_images(images, shifted)]) < 0.15
    swapped = [Scene(s.second, s.relation, s.first).caption for s in scenes]
    verdicts = check_images(images, swapped)
    assert np.mean([v.colors for v in verdicts]) > 0.99
    assert not any(v.relation for v in verdicts)
    blank = np.full((1, 32, 32, 3), 245, np.uint8)
    assert not check_images(blank, [scenes[0].caption])[0].colors


def test_shards_have_the_layout_of_img2dataset(shapes):
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
    train = {caption for path in shapes.glob("*.tar") for caption in captions_of(path)}
    heldout = set(captions_of(shapes / "heldout" / "00000.tar"))
    assert heldout == {s.caption for s in all_scenes() if is_heldout(s)}
    assert not train & heldout
    assert 0.07 < len(heldout) / len(list(all_scenes())) < 0.13


def test_an_image_depends_on_seed_and_number_alone(tmp_path, shapes):
    write_demo_data(tmp_path, num_samples=150, image_size=32, seed=0, samples_per_shard=150)
    with tarfile.open(tmp_path / "00000.tar") as one, tarfile.open(shapes / "00001.tar") as other:
        name = "00000125.png"
        assert one.extractfile(name).read() == other.extractfile(name).read()


@pytest.mark.parametrize(
    ("num_samples", "image_size", "message"),
    [
        (0, 32, "--num-samples 0 is out of range: use at least 1"),
        (10, 8, "--image-size 8 is too small: use at least 16"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, num_samples, image_size, message):
    with pytest.raises(OptionError, match=message):
        write_demo_data(tmp_path / "out", num_samples=num_samples, image_size=image_size, seed=0)
    assert not (tmp_path / "out").exists()


def test_shards_are_not_overwritten(shapes):
    with pytest.raises(OptionError, match="already holds shards: name another folder"):
        write_demo_data(shapes, num_samples=10, image_size=32, seed=0)
