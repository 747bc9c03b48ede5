"""Batches of an evaluation beside each other: their order, their bits, and the threads of Torch before and after."""

import threading

import pytest
import torch

from trainer.evaluation.threads import map_batches, single_thread, split


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_batches_are_mapped_in_their_order_on_one_thread_each(threads):
    barrier, done = threading.Barrier(threads, timeout=60), []

    def square(batch):
        barrier.wait()  # passed only if as many batches are computed at a time
        return batch**2, torch.get_num_threads()

    results = map_batches(square, range(6), "cpu", done=done.append)
    assert results == [(n**2, 1) for n in range(6)]
    assert done == list(range(6))
    assert torch.get_num_threads() == threads


def test_an_error_in_a_batch_is_raised_and_the_threads_are_as_before(threads):
    with pytest.raises(ZeroDivisionError):
        map_batches(lambda n: 1 / n, [1, 0, 2], "cpu")
    assert torch.get_num_threads() == threads
    assert map_batches(abs, [], "cpu") == []


def test_other_devices_compute_one_batch_after_the_other():
    here = threading.get_ident()
    assert map_batches(lambda _: threading.get_ident(), [0, 1], "cuda") == [here, here]


def test_libraries_divide_no_work_in_a_single_thread(threads):
    from threadpoolctl import threadpool_info

    with single_thread():
        assert torch.get_num_threads() == 1
        assert {library["num_threads"] for library in threadpool_info()} <= {1}
    assert torch.get_num_threads() == threads


def test_parts_cover_everything_once():
    assert [range(7)[part] for part in split(7, 3)] == [range(3), range(3, 6), range(6, 7)]
    assert split(0, 3) == []
