"""Feature extractors: batches of images to features, and features of many images to metrics.

The referee (`referee.py`) is trained on the table's own images. Inception and CLIP are loaded from files that the user
has; nothing is downloaded.
"""

import hashlib
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from index.errors import OptionError, one_line
from pipeline.encoders.files import digest_of, quiet_libraries
from trainer.evaluation.metrics import frechet, kernel_mmd


@runtime_checkable
class FeatureExtractor(Protocol):
    """An extractor of image features, with the metrics that are computed from them.

    Several threads may call it at a time.
    """

    digest: str
    """Tells its weights from others'."""

    def extract(self, images: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> Float32[np.ndarray, "B F"]:
        """Return the features of images that were generated for these captions."""
        ...

    def metrics(
        self, samples: Float32[np.ndarray, "N F"], real: Float32[np.ndarray, "M F"], captions: Sequence[str]
    ) -> dict[str, float]:
        """Return metrics by name, from the features of N samples with their captions and of M real images."""
        ...


class Inception:
    """An Inception network as one TorchScript file, called as `model(uint8 images, return_features=True)`.

    StyleGAN and clean-fid share such a file, inception-2015-12-05.pt; it resizes images to its own size.
    """

    def __init__(self, path: Path, device: str) -> None:
        """Load the file; raises OptionError if it is missing or not a TorchScript."""
        if not path.is_file():
            raise OptionError(f"--inception {path} is not a file: pass a TorchScript such as inception-2015-12-05.pt")
        self._device = device
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated, but this network is distributed in no other format.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._model = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise OptionError(
                f"--inception {path} is not a TorchScript ({one_line(error)}): pass for instance "
                "inception-2015-12-05.pt"
            ) from error

    def extract(self, images: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> Float32[np.ndarray, "B F"]:
        """Return the features before the last layer."""
        with torch.inference_mode():
            batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self._device)
            return np.asarray(self._model(batch, return_features=True).float().cpu())

    def metrics(
        self, samples: Float32[np.ndarray, "N F"], real: Float32[np.ndarray, "M F"], captions: Sequence[str]
    ) -> dict[str, float]:
        """Return FID and KID."""
        return {"fid": frechet(samples, real), "kid": kernel_mmd(samples, real)}


class Clip:
    """A CLIPModel folder of transformers, for the CLIP score."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load the folder; raises OptionError if it does not hold a complete CLIPModel."""
        if not (folder / "config.json").is_file():
            raise OptionError(f"--clip {folder} has no config.json: pass a folder with a CLIPModel of transformers")
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            with quiet_libraries():
                model_type = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
                if model_type != "clip":
                    raise OptionError(f"--clip {folder} holds a {model_type} model: pass a folder with a CLIPModel")
                model, info = CLIPModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
                self._processor = AutoImageProcessor.from_pretrained(folder)
                self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise OptionError(
                f"--clip {folder} cannot be loaded ({one_line(error)}): pass a folder with a CLIPModel"
            ) from error
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])[0]
            raise OptionError(f"--clip {folder} lacks weights such as {missing}: pass a complete CLIPModel")
        self._model, self._device = model.to(device).eval(), device
        self.digest = digest_of(model)
        self._tokenizing = threading.Lock()  # a tokenizer that sets its padding refuses a second thread

    def extract(self, images: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> Float32[np.ndarray, "B F"]:
        """Return 100 times the cosine similarity of image and caption, as the only feature."""
        limit = self._model.config.text_config.max_position_embeddings
        with self._tokenizing:
            tokens: Any = self._tokenizer(
                list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
        pixels = self._processor(images=list(images), return_tensors="pt")
        with torch.inference_mode():
            out = self._model(
                input_ids=tokens["input_ids"].to(self._device),
                attention_mask=tokens["attention_mask"].to(self._device),
                pixel_values=pixels["pixel_values"].to(self._device),
            )
        return np.asarray(100 * (out.image_embeds * out.text_embeds).sum(1, keepdim=True).float().cpu())

    def metrics(
        self, samples: Float32[np.ndarray, "N F"], real: Float32[np.ndarray, "M F"], captions: Sequence[str]
    ) -> dict[str, float]:
        """Return the CLIP score, the mean as in arXiv 2104.08718 but with weight 100 and without clipping at zero."""
        return {"clip_score": float(samples.mean())}


def load_extractors(clip: Path | None, inception: Path | None, device: str) -> list[FeatureExtractor]:
    """Load the pretrained extractors for which the user has passed files."""
    extractors: list[FeatureExtractor] = []
    if inception is not None:
        extractors.append(Inception(inception, device))
    if clip is not None:
        extractors.append(Clip(clip, device))
    return extractors
