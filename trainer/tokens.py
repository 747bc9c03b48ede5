"""Token embeddings of captions for the batches of training, computed in the threads that search ahead.

On a GPU they are computed in its data type, on a stream of their own, so that they wait for no training step, and kept
by caption. On a CPU they are computed anew for each step: their last bits depend on the other captions of a batch, and
a run that is resumed has to give the same bits.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from jaxtyping import Float32

from trainer.stream import EncodeTokens

CACHE_BYTES = 2**31
"""Memory of the embeddings that are kept."""


class TokenEncoder:
    """Captions to pooled text embeddings followed by token embeddings."""

    def __init__(self, encode: EncodeTokens, device: str, cache_bytes: int = CACHE_BYTES) -> None:
        """Encode with a function that computes on a device; raises what it raises for any caption."""
        self._encode_all = encode
        self._stream = None
        if device.startswith("cuda"):
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for the weights
        self._kept = None if device == "cpu" else CaptionCache(cache_bytes)
        self._lock = threading.Lock()
        self._length = self._encode(["a"]).shape[1]

    def __call__(self, captions: Sequence[str]) -> Float32[np.ndarray, "B K T"]:
        """Return the embeddings of captions, those that were not kept computed together."""
        if self._kept is None:
            return self._encode(captions)
        with self._lock:
            found = {caption: self._kept.get(caption) for caption in captions}
            missing = [caption for caption, embedding in found.items() if embedding is None]
            if missing:
                computed = dict(zip(missing, self._encode(missing), strict=True))
                for caption, embedding in computed.items():
                    self._kept.put(caption, embedding)
                found |= computed
        return np.stack([_padded(found[caption], self._length) for caption in captions])

    def _encode(self, captions: Sequence[str]) -> Float32[np.ndarray, "B K T"]:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return self._encode_all(captions)


class CaptionCache:
    """Embeddings by caption, without their padding, the least recently used of which make room for new ones."""

    def __init__(self, max_bytes: int) -> None:
        """Keep at most so many bytes of embeddings."""
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._kept: OrderedDict[str, Float32[np.ndarray, "_ T"]] = OrderedDict()

    def get(self, caption: str) -> Float32[np.ndarray, "_ T"] | None:
        """Return the embedding of a caption, without the zeros at its end; None if it is not kept."""
        if caption in self._kept:
            self._kept.move_to_end(caption)
        return self._kept.get(caption)

    def put(self, caption: str, embedding: Float32[np.ndarray, "K T"]) -> None:
        """Keep the embedding of a caption that is not kept."""
        used = np.flatnonzero(embedding.any(1))
        self._kept[caption] = embedding[: 1 + used[-1] if len(used) else 0].copy()
        self.num_bytes += self._kept[caption].nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes


def _padded(embedding: Float32[np.ndarray, "_ T"] | None, count: int) -> Float32[np.ndarray, "K T"]:
    assert embedding is not None
    return np.pad(embedding, ((0, count - len(embedding)), (0, 0)))
