"""The batch of a step depends on (seed, step) alone, and resuming needs nothing else."""

import itertools
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError
from index.search.ann import ExactSearch, open_search
from index.table.schema import TRAIN
from index.table.table import open_table
from pipeline.encoders import TransformersTextEncoder
from trainer import stream as stream_module
from trainer.reuse import measure_reuse, plan_reuse
from trainer.stream import NeighborStream, draw_one


def stream(table, **options) -> NeighborStream:
    return NeighborStream(table, open_search(table), **{"batch_size": 16, "seed": 3, **options})


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.__slots__)


def test_iterating_gives_the_batches_of_the_steps_in_order(indexed):
    one = stream(indexed)
    for wanted, (step, batch) in zip(range(70), one, strict=False):
        assert step == wanted
        if step % 23 == 0:
            assert same(batch, one.batches(step, 1)[0])
    assert one.waited > 0


def test_a_stream_that_starts_later_goes_on_the_same(indexed):
    whole = [batch for _, batch in itertools.islice(stream(indexed), 75)]
    later = list(itertools.islice(stream(indexed, start=70), 5))
    assert [step for step, _ in later] == [70, 71, 72, 73, 74]
    assert all(same(a, b) for a, (_, b) in zip(whole[70:], later, strict=True))


def test_a_larger_batch_begins_with_the_smaller_one(indexed):
    (small,), (large,) = stream(indexed).batches(9, 1), stream(indexed, batch_size=40).batches(9, 1)
    for name in small.__slots__:
        assert torch.equal(getattr(small, name), getattr(large, name)[:16])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_slots_of_a_step(indexed, processes):
    (whole,) = stream(indexed).batches(5, 1)
    shares = [stream(indexed, process=number, processes=processes).batches(5, 1)[0] for number in range(processes)]
    for name in whole.__slots__:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(share, name) for share in shares]))
    with pytest.raises(OptionError, match="--batch-size 16 cannot be shared by 3 processes"):
        stream(indexed, processes=3)


def test_a_reused_draw_comes_back_with_other_dice(indexed):
    steps = [batch for _, batch in itertools.islice(stream(indexed, reuse=3), 60)]
    once = stream(indexed).batches(0, 17)
    for place, drawn in enumerate(once[:16]):
        for visit in range(3):
            again = steps[place + 16 * visit]
            assert same(replace(again, uniforms=drawn.uniforms), drawn)
    assert len({steps[5 + 16 * visit].uniforms.numpy().tobytes() for visit in range(3)}) == 3
    assert same(replace(steps[48], uniforms=once[16].uniforms), once[16])
    later = list(itertools.islice(stream(indexed, reuse=3, start=37), 23))
    assert [step for step, _ in later] == list(range(37, 60))
    assert all(same(a, b) for a, (_, b) in zip(steps[37:], later, strict=True))


def test_draws_are_reused_as_often_as_searching_takes_longer(indexed, monkeypatch):
    assert measure_reuse(stream(indexed), lambda _: time.sleep(0.1)) == 1
    whole = NeighborStream.batches
    monkeypatch.setattr(stream_module, "QUERIES_PER_SEARCH", 16)
    monkeypatch.setattr(NeighborStream, "batches", lambda *given: (time.sleep(0.1), whole(*given))[1])
    assert 3 <= measure_reuse(stream(indexed), lambda _: time.sleep(0.01)) <= 8


def test_planned_reuse_grows_with_the_search_and_falls_with_the_network(indexed, encoded):
    plans = [plan_reuse(indexed, flops, exact=False) for flops in (10**4, 10**6, 10**7, 10**9)]
    assert plans == sorted(plans, reverse=True)
    assert (plans[0], plans[-1]) == (16, 1)
    assert plan_reuse(encoded, 10_000, exact=False) == plan_reuse(indexed, 10_000, exact=True) > 1
    assert plan_reuse(indexed, 10**9, exact=True) == 1


def test_the_network_may_be_told_the_query(indexed):
    (close,), (asked,) = (stream(indexed, condition=each, jitter=0.5).batches(4, 1) for each in ("retrieved", "query"))
    assert torch.equal(asked.text[:, 0], close.query)
    assert not torch.equal(close.text[:, 0], close.query)
    assert torch.equal(asked.y, close.y)
    with pytest.raises(OptionError, match="--condition 'both' is unknown: choose one of retrieved, query"):
        stream(indexed, condition="both")


def test_jitter_moves_what_is_asked_for_and_the_search_follows(encoded):
    exact = ExactSearch(encoded)

    def batch(jitter, **options):
        return NeighborStream(encoded, exact, batch_size=64, seed=0, jitter=jitter, **options).batches(3, 1)[0]

    still, moved = batch(0.0), batch(0.5)
    length = still.query.norm(dim=1)
    assert ((moved.query - still.query).norm(dim=1) / length).mean().item() == pytest.approx(0.5, rel=0.1)
    geometry = encoded.meta.geometry
    found = exact.nearest(geometry.queries(moved.query.numpy(), moved.r.numpy()))
    assert np.array_equal(moved.y.numpy(), geometry.to_coordinates(found.latent[:, 0]))
    assert not torch.equal(moved.y, still.y)
    halves = [batch(0.5, process=number, processes=2) for number in range(2)]
    assert torch.equal(moved.query, torch.cat([half.query for half in halves]))


@pytest.mark.parametrize(
    "options", [{}, {"condition": "query"}, {"coupling": "independent"}], ids=["retrieved", "query", "independent"]
)
def test_token_states_are_those_of_the_caption_that_is_told(indexed, text_encoder, options):
    encoder = TransformersTextEncoder(text_encoder)
    words = partial(encoder.encode_tokens, num_tokens=6)
    plain, told = (
        stream(indexed, describe=each, **options).batches(2, 3) for each in (None, words)
    )  # fmt: skip
    for before, after in zip(plain, told, strict=True):
        assert after.text.shape == (16, 7, 16)
        assert torch.allclose(after.text[:, 0], before.text[:, 0], atol=2e-3)
        assert after.text[:, 1].norm(dim=1).min() > 0
        assert torch.equal(after.y, before.y)


def test_a_pair_is_drawn_from_the_nearest_by_their_distance(encoded):
    exact = ExactSearch(encoded)

    def pairs(**options):
        return NeighborStream(encoded, exact, batch_size=256, seed=0, **options).batches(0, 1)[0]

    nearest, cold, warm = pairs(), pairs(k=4, temperature=1e-6), pairs(k=4, temperature=1e6)
    assert same(nearest, cold)
    geometry = encoded.meta.geometry
    found = exact.nearest(geometry.queries(nearest.query.numpy(), nearest.r.numpy()), 4)
    latents = geometry.to_coordinates(found.latent)
    chosen = (latents == warm.y.numpy()[:, None]).all(-1)
    assert (chosen.sum(1) >= 1).all()
    assert np.allclose(chosen.mean(0), 0.25, atol=0.1)


def test_one_of_several_is_drawn_by_its_energy():
    die = np.random.default_rng(0).random(40_000, dtype=np.float32)
    energy = np.broadcast_to(np.array([3.0, 3.0 + np.log(2), 3.0 + np.log(4)]), (40_000, 3))
    assert np.allclose(np.bincount(draw_one(energy, die)) / 40_000, [4 / 7, 2 / 7, 1 / 7], atol=0.01)


def test_seeds_and_steps_differ(indexed):
    a, b = stream(indexed).batches(0, 2)
    (c,) = stream(indexed, seed=4).batches(0, 1)
    assert not torch.equal(a.r, b.r)
    assert not torch.equal(a.r, c.r)


def test_targets_are_the_nearest_training_pairs(encoded):
    table = encoded
    exact = ExactSearch(table)
    (batch,) = NeighborStream(table, exact, batch_size=64, seed=0).batches(0, 1)
    geometry = table.meta.geometry
    vectors = table.column("vector").astype(np.float64)
    queries = geometry.queries(batch.query.numpy(), batch.r.numpy()).astype(np.float64)
    best = np.square(queries[:, None] - vectors[None]).sum(-1).argmin(1)
    assert np.array_equal(batch.y.numpy(), geometry.to_coordinates(table.column("latent")[best]))
    assert np.array_equal(batch.text[:, 0].numpy(), table.column("text")[best].astype(np.float32))
    training = {row.tobytes() for row in table.column("text", TRAIN).astype(np.float32)}
    assert all(row.tobytes() in training for row in batch.query.numpy())


def test_independent_coupling_pairs_a_description_with_its_own_latent(encoded):
    table = encoded
    (batch,) = NeighborStream(table, ExactSearch(table), batch_size=64, seed=0, coupling="independent").batches(0, 1)
    assert torch.equal(batch.text[:, 0], batch.query)
    texts = [row.tobytes() for row in table.column("text").astype(np.float32)]
    latents = table.meta.geometry.to_coordinates(table.column("latent"))
    pairs = {(text, latent.tobytes()) for text, latent in zip(texts, latents, strict=True)}
    drawn = zip(batch.text[:, 0].numpy(), batch.y.numpy(), strict=True)
    assert all((text.tobytes(), latent.tobytes()) in pairs for text, latent in drawn)


def test_searches_ahead_are_bounded(indexed, monkeypatch):
    asked = []
    whole = NeighborStream.batches
    monkeypatch.setattr(NeighborStream, "batches", lambda self, a, n: (asked.append(a), whole(self, a, n))[1])
    for step, _ in stream(indexed, batch_size=512):
        assert max(asked) <= step + 2 * stream_module.SEARCHES_AHEAD * 2
        if step == 10:
            break


def test_an_error_in_the_background_is_raised_where_batches_are_used(indexed, monkeypatch):
    def broken(self, first, count):
        raise ValueError("the disk is gone")

    monkeypatch.setattr(NeighborStream, "batches", broken)
    with pytest.raises(ValueError, match="the disk is gone"):
        next(iter(stream(indexed)))


def test_the_table_version_is_pinned(shapes, encode_shapes, tmp_path):
    table = build_index(encode_shapes(shapes, tmp_path / "t.lance").table, BuildConfig()).table
    before = stream(table).batches(0, 1)[0]
    build_index(open_table(table.uri), BuildConfig(desc_scale=1.5, geometry="raw"))
    assert same(stream(table).batches(0, 1)[0], before)


def test_an_unknown_coupling_is_refused(indexed):
    with pytest.raises(OptionError, match="nearest, independent"):
        stream(indexed, coupling="random")
