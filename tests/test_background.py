"""Work in background threads: in order, bounded, and over when its consumer is."""

import itertools
import threading
import time

import pytest

from index.background import look_up, prefetch, repeat


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_prefetch_keeps_order(depth):
    assert list(prefetch(iter(range(50)), depth)) == list(range(50))
    assert list(prefetch(iter(()), depth)) == []
    assert list(prefetch(iter([None, None]), depth)) == [None, None]


def test_prefetch_computes_no_more_than_its_depth_in_advance():
    computed = []
    items = prefetch((computed.append(i) or i for i in range(100)), 4)
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(computed) < 6 and time.monotonic() < deadline:  # one returned, four queued, one waits for its place
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(computed) == 6
    items.close()


def test_prefetch_raises_what_its_items_raise_in_its_place():
    def items():
        yield 1
        yield 2
        raise KeyError("third")

    fetched = prefetch(items(), 8)
    assert (next(fetched), next(fetched)) == (1, 2)
    with pytest.raises(KeyError, match="third"):
        next(fetched)


def test_prefetch_yields_exceptions_that_are_items():
    error = ValueError("an item")
    assert list(prefetch(iter([error]), 1)) == [error]


def test_prefetch_ends_its_thread_when_the_consumer_stops():
    items = prefetch(itertools.count(), 2)
    assert next(items) == 0
    items.close()
    assert threads("prefetch") == []


def test_repeat_calls_until_the_block_ends():
    called = threading.Semaphore(0)
    calls = []
    with repeat(0.01, lambda: (calls.append(1), called.release())):
        assert all(called.acquire(timeout=10) for _ in range(3))
    assert threads("repeat") == []
    count = len(calls)
    time.sleep(0.05)
    assert len(calls) == count


def test_repeat_waits_before_the_first_call_and_stops_at_an_exception():
    calls = []
    with pytest.raises(KeyError), repeat(60.0, lambda: calls.append(1)):
        raise KeyError
    assert calls == []
    assert threads("repeat") == []


def test_look_up_keeps_the_order_and_goes_ahead_by_one_portion():
    called = []

    def double(number):
        called.append(number)
        return 2 * number

    results = look_up(double, range(100), at_once=10)
    assert next(results) == 0
    assert sorted(called) == list(range(10))
    assert list(results) == list(range(2, 200, 2))
    assert sorted(called) == list(range(100))


def test_look_up_raises_the_exception_of_an_item_after_the_items_before_it():
    results = look_up(lambda number: 1 // number, [2, 1, 0, 3])
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
