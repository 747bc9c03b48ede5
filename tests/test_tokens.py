"""Token embeddings of training: on a GPU those of a caption are kept, in bounded memory, and are what they would be."""

import numpy as np
import pytest

from trainer.tokens import CaptionCache, TokenEncoder

NUM_TOKENS, DIM = 4, 3


class Letters:
    """Embeds each of the first letters of a caption; notes what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, captions):
        self.calls.append(list(captions))
        result = np.zeros((len(captions), 1 + NUM_TOKENS, DIM), np.float32)
        for row, caption in enumerate(captions):
            for place, letter in enumerate(caption[:NUM_TOKENS]):
                result[row, 1 + place] = ord(letter)
            result[row, 0] = len(caption)
        return result


@pytest.mark.parametrize("memory", [2**20, 2 * DIM * 5, 0])
def test_kept_embeddings_are_those_that_are_computed(memory):
    kept, computed = (TokenEncoder(Letters(), device, memory) for device in ("simulated", "cpu"))
    rng = np.random.default_rng(0)
    words = ["a", "bb", "ccc", "dddd", "eeeee", ""]
    for _ in range(30):
        captions = rng.choice(words, size=5).tolist()
        assert np.array_equal(kept(captions), computed(captions))
    counts = [sum(map(len, each._encode_all.calls)) for each in (kept, computed)]
    assert counts[1] == 1 + 30 * 5  # the first is a trial
    assert counts[0] == 1 + len(words) if memory == 2**20 else 1 + len(words) < counts[0] < counts[1]


def test_the_least_recently_used_captions_make_room():
    cache = CaptionCache(3 * 2 * DIM * 4)
    embedding = np.ones((5, DIM), np.float32)
    embedding[2:] = 0  # padding, which takes no room
    for caption in "abc":
        cache.put(caption, embedding)
    assert np.array_equal(cache.get("a"), embedding[:2])
    cache.put("d", embedding)
    assert cache.num_bytes == 3 * 2 * DIM * 4
    assert [caption for caption in "abcd" if cache.get(caption) is not None] == ["a", "c", "d"]
