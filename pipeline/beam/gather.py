"""Wait for all elements, gather them in one list, and spread them over the workers, the same way on every Beam runner.

Beam's own `ToList` reads a side input, which its Dask runner computes inside a task of one worker, and `Reshuffle` does
nothing there. What all runners do the same way is to group by key, so all transforms here are groups.
"""

from typing import Any, TypeVar

import apache_beam as beam

Element = TypeVar("Element")


class Barrier(beam.PTransform):  # type: ignore[misc]
    """PCollection -> PCollection with one number: how many elements there were, once all of them are there.

    What the elements have done is in files, so that nothing needs to hold all of them.
    """

    def expand(self, elements: Any) -> Any:
        """Build the graph."""
        # The zero keeps the group from being empty, so that what follows happens without elements, too.
        zero = elements.pipeline | "Zero" >> beam.Create([(0, 0)])
        return (
            (elements | "One" >> beam.Map(lambda _: (0, 1)), zero)
            | "With zero" >> beam.Flatten()
            | "Count" >> beam.CombinePerKey(sum)
            | "Number" >> beam.MapTuple(lambda _, number: number)
        )


class Gather(beam.PTransform):  # type: ignore[misc]
    """PCollection -> PCollection with one list of its elements in any order; an empty list if there are none."""

    def expand(self, elements: Any) -> Any:
        """Build the graph."""
        # The empty list keeps the group from being empty, so that what follows happens without elements, too.
        nothing = elements.pipeline | "Nothing" >> beam.Create([[]])
        return (
            (elements | "One" >> beam.Map(_list_of_one), nothing)
            | "With nothing" >> beam.Flatten()
            | "Key" >> beam.Map(_with_same_key)
            | "Group" >> beam.GroupByKey()
            | "Join" >> beam.MapTuple(_join)
        )


class Spread(beam.PTransform):  # type: ignore[misc]
    """PCollection of (key, value) with distinct keys -> the same, spread over the workers by key."""

    def expand(self, pairs: Any) -> Any:
        """Build the graph."""
        return pairs | "Group" >> beam.GroupByKey() | "Ungroup" >> beam.FlatMapTuple(_ungroup)


def _list_of_one(element: Element) -> list[Element]:
    return [element]


def _with_same_key(element: Element) -> tuple[int, Element]:
    return 0, element


def _join(_: int, lists: Any) -> list[Any]:
    return [element for each in lists for element in each]


def _ungroup(key: Any, values: Any) -> list[tuple[Any, Any]]:
    return [(key, value) for value in values]
