"""The batch of a step depends on (seed, step) alone, for any number of processes, reuse and point of resuming."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from index.build.build_index import BuildConfig, build_index
from index.errors import OptionError
from index.search.ann import open_search
from index.search.exact import ExactSearch
from index.search.pairs import sample_neighbor
from index.table.schema import TRAIN
from index.table.table import open_table
from pipeline.encoders.text import TransformersTextEncoder
from trainer.stream import TENSORS, NeighborStream, StreamConfig, plan_reuse


def stream(table, search=None, *, start=0, process=0, processes=1, encode_tokens=None, **options) -> NeighborStream:
    config = StreamConfig(**{"batch_size": 16, "seed": 3, **options})
    return NeighborStream(
        table,
        search or open_search(table),
        config,
        start=start,
        process_index=process,
        num_processes=processes,
        encode_tokens=encode_tokens,
    )


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


@pytest.mark.slow
def test_iterating_gives_the_batches_of_the_steps_in_order(indexed):
    one = stream(indexed)
    for expected, (step, batch) in zip(range(70), one, strict=False):
        assert step == expected
        if step % 23 == 0:
            assert same(batch, one.batches(step, 1)[0])
    assert one.waiting_seconds > 0


def test_a_stream_that_starts_later_has_the_same_batches(indexed):
    whole = [batch for _, batch in itertools.islice(stream(indexed), 75)]
    later = list(itertools.islice(stream(indexed, start=70), 5))
    assert [step for step, _ in later] == [70, 71, 72, 73, 74]
    assert all(same(a, b) for a, (_, b) in zip(whole[70:], later, strict=True))


def test_a_larger_batch_begins_with_the_smaller_one(indexed):
    (small,), (large,) = stream(indexed).batches(9, 1), stream(indexed, batch_size=40).batches(9, 1)
    for name in TENSORS:
        assert torch.equal(getattr(small, name), getattr(large, name)[:16])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_divide_the_slots_of_a_step(indexed, processes):
    (whole,) = stream(indexed).batches(5, 1)
    parts = [stream(indexed, process=index, processes=processes).batches(5, 1)[0] for index in range(processes)]
    for name in TENSORS:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    with pytest.raises(OptionError, match="--batch-size 16 cannot be divided among 3 processes: use a multiple of 3"):
        stream(indexed, processes=3)


def test_a_reused_pair_comes_with_other_uniforms(indexed):
    steps = [batch for _, batch in itertools.islice(stream(indexed, reuse=3), 60)]
    once = stream(indexed).batches(0, 17)
    for first, retrieved in enumerate(once[:16]):
        for visit in range(3):
            again = steps[first + 16 * visit]
            assert same(replace(again, uniforms=retrieved.uniforms), retrieved)
    assert len({steps[5 + 16 * visit].uniforms.numpy().tobytes() for visit in range(3)}) == 3
    assert same(replace(steps[48], uniforms=once[16].uniforms), once[16])
    later = list(itertools.islice(stream(indexed, reuse=3, start=37), 23))
    assert [step for step, _ in later] == list(range(37, 60))
    assert all(same(a, b) for a, (_, b) in zip(steps[37:], later, strict=True))


def test_planned_reuse_grows_with_the_search_and_falls_with_the_network(indexed, encoded):
    plans = [plan_reuse(indexed, flops, exact=False) for flops in (10**4, 10**6, 10**7, 10**9)]
    assert plans == sorted(plans, reverse=True)
    assert (plans[0], plans[-1]) == (16, 1)
    assert plan_reuse(encoded, 10_000, exact=False) == plan_reuse(indexed, 10_000, exact=True) > 1
    assert plan_reuse(indexed, 10**9, exact=True) == 1


def test_the_condition_may_be_the_query(indexed):
    streams = {each: stream(indexed, condition=each, jitter=0.5) for each in ("retrieved", "query")}
    text = torch.from_numpy(streams["query"].queries.captions([4]).text)
    (retrieved,), (query,) = (each.batches(4, 1) for each in streams.values())
    assert torch.equal(query.text[:, 0], text)
    assert not torch.equal(retrieved.text[:, 0], text)
    assert torch.equal(query.y, retrieved.y)


def test_jitter_moves_the_queries_and_the_search_follows(encoded):
    exact = ExactSearch(encoded)
    still, moved = (stream(encoded, exact, batch_size=64, jitter=jitter) for jitter in (0.0, 0.5))
    before, after = (each.queries.captions([3]) for each in (still, moved))
    length = np.linalg.norm(after.text - before.text, axis=1) / np.linalg.norm(before.text, axis=1)
    assert length.mean() == pytest.approx(0.5, rel=0.1)
    geometry = encoded.meta.geometry
    nearest = exact.nearest(geometry.queries(after.text, moved.queries.noise([3])))
    (batch,) = moved.batches(3, 1)
    assert np.array_equal(batch.y.numpy(), geometry.to_coordinates(nearest.latent[:, 0]))
    assert not torch.equal(batch.y, still.batches(3, 1)[0].y)
    halves = [
        stream(encoded, exact, batch_size=64, jitter=0.5, process=i, processes=2).queries.captions([3]) for i in (0, 1)
    ]
    assert np.array_equal(after.text, np.concatenate([half.text for half in halves]))


@pytest.mark.parametrize(
    "options", [{}, {"condition": "query"}, {"coupling": "independent"}], ids=["retrieved", "query", "independent"]
)
def test_token_embeddings_are_those_of_the_condition(indexed, text_encoder, options):
    encoder = TransformersTextEncoder(text_encoder)
    encode_tokens = partial(encoder.encode_tokens, num_tokens=6)
    pooled, tokens = (stream(indexed, encode_tokens=each, **options).batches(2, 3) for each in (None, encode_tokens))
    for before, after in zip(pooled, tokens, strict=True):
        assert after.text.shape == (16, 7, 16)
        assert torch.allclose(after.text[:, 0], before.text[:, 0], atol=2e-3)
        assert after.text[:, 1].norm(dim=1).min() > 0
        assert torch.equal(after.y, before.y)


def test_a_pair_is_sampled_from_the_nearest_by_their_distance(encoded):
    exact = ExactSearch(encoded)
    nearest, cold, warm = (
        stream(encoded, exact, batch_size=256, **options)
        for options in (
            {},
            {"num_neighbors": 4, "temperature": 1e-6},
            {"num_neighbors": 4, "temperature": 1e6},
        )
    )
    assert same(nearest.batches(0, 1)[0], cold.batches(0, 1)[0])
    queries, geometry = warm.queries.captions([0]), encoded.meta.geometry
    four = geometry.to_coordinates(exact.nearest(geometry.queries(queries.text, warm.queries.noise([0])), 4).latent)
    chosen = (four == warm.batches(0, 1)[0].y.numpy()[:, None]).all(-1)
    assert (chosen.sum(1) >= 1).all()
    assert np.allclose(chosen.mean(0), 0.25, atol=0.1)


def test_a_neighbor_is_sampled_by_its_energy():
    uniform = np.random.default_rng(0).random(40_000, dtype=np.float32)
    energy = np.broadcast_to(np.array([3.0, 3.0 + np.log(2), 3.0 + np.log(4)]), (40_000, 3))
    counts = np.bincount(sample_neighbor(energy, uniform))
    assert np.allclose(counts / 40_000, [4 / 7, 2 / 7, 1 / 7], atol=0.01)


def test_seeds_and_steps_differ(indexed):
    a, b = stream(indexed).batches(0, 2)
    (c,) = stream(indexed, seed=4).batches(0, 1)
    assert not torch.equal(a.r, b.r)
    assert not torch.equal(a.r, c.r)


def test_targets_are_the_nearest_training_pairs(encoded):
    one = stream(encoded, ExactSearch(encoded), batch_size=64)
    queries, (batch,) = one.queries.captions([0]), one.batches(0, 1)
    geometry = encoded.meta.geometry
    vectors = encoded.column("vector").astype(np.float64)
    query_vectors = geometry.queries(queries.text, one.queries.noise([0])).astype(np.float64)
    best = np.square(query_vectors[:, None] - vectors[None]).sum(-1).argmin(1)
    assert np.array_equal(batch.r.numpy(), one.queries.noise([0]))
    assert np.array_equal(batch.y.numpy(), geometry.to_coordinates(encoded.column("latent")[best]))
    assert np.array_equal(batch.text[:, 0].numpy(), encoded.column("text")[best].astype(np.float32))
    training = {row.tobytes() for row in encoded.column("text", TRAIN).astype(np.float32)}
    assert all(row.tobytes() in training for row in queries.text)


def test_independent_coupling_pairs_a_caption_with_its_own_latent(encoded):
    one = stream(encoded, None, batch_size=64, coupling="independent")
    queries, (batch,) = one.queries.captions([0]), one.batches(0, 1)
    assert np.array_equal(batch.text[:, 0].numpy(), encoded.take(queries.position, "text").astype(np.float32))
    latents = encoded.meta.geometry.to_coordinates(encoded.take(queries.position, "latent"))
    assert np.array_equal(batch.y.numpy(), latents)
    assert set(queries.position) <= set(encoded.positions(TRAIN))


class Search:
    """A search that counts its queries, and fails after some of them."""

    def __init__(self, table, fail_after=np.inf):
        self.search, self.fail_after, self.queries = open_search(table), fail_after, 0

    def nearest(self, queries, k=1):
        self.queries += len(queries)
        if self.queries > self.fail_after:
            raise ValueError("the disk is gone")
        return self.search.nearest(queries, k)

    def nearest_rows(self, queries, k=1):
        return self.search.nearest_rows(queries, k)


def test_searches_ahead_are_bounded(indexed):
    search = Search(indexed)
    for step, _ in itertools.islice(stream(indexed, search, batch_size=512), 11):
        # Two steps fit into a search; one search is in use, three more have begun at most.
        assert search.queries <= (2 * (step // 2 + 1) + 6) * 512


def test_an_error_in_the_background_is_raised_in_the_foreground(indexed):
    batches = iter(stream(indexed, Search(indexed, fail_after=2048)))
    with pytest.raises(ValueError, match="the disk is gone"):
        list(itertools.islice(batches, 1000))


@pytest.mark.slow
def test_the_table_version_is_pinned(shapes, encode_shapes, tmp_path):
    table = build_index(encode_shapes(shapes, tmp_path / "t.lance").table, BuildConfig()).table
    before = stream(table).batches(0, 1)[0]
    build_index(open_table(table.uri), BuildConfig(desc_scale=1.5, geometry="raw"))
    assert same(stream(table).batches(0, 1)[0], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "random"}, "--coupling 'random' is unknown: choose one of nearest, independent"),
        ({"condition": "both"}, "--condition 'both' is unknown: choose one of retrieved, query"),
        ({"num_neighbors": 0}, "--num-neighbors 0 is out of range: use 1 or more"),
        ({"temperature": 0.0}, "--temperature 0 is out of range: use a number above 0"),
        ({"jitter": -0.1}, "--jitter -0.1 is out of range: use 0 or more"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        StreamConfig(batch_size=16, **options)
