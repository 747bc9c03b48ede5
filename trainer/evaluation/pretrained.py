"""Viewers that others have trained: Inception and CLIP, from files that the user has. Nothing is downloaded."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from index.errors import OptionError, one_line
from pipeline.encoders import quiet_libraries
from trainer.evaluation.viewers import Viewer, feature_distances


class Inception:
    """An Inception network as one TorchScript file, called as `model(uint8 pictures, return_features=True)`.

    StyleGAN and clean-fid share such a file, inception-2015-12-05.pt; it scales pictures to its own size.
    """

    def __init__(self, path: Path, device: str) -> None:
        """Open the file; OptionError where it is none."""
        if not path.is_file():
            raise OptionError(f"--inception {path} is no file: give a TorchScript such as inception-2015-12-05.pt")
        self._device = device
        try:
            with warnings.catch_warnings():
                # The file is passed around in this form and in no other.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._model = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise OptionError(f"--inception {path} is no TorchScript: {one_line(error)}") from error

    def look(self, pictures: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> Float32[np.ndarray, "B F"]:
        """Its features."""
        with torch.inference_mode():
            given = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(self._device)
            return np.asarray(self._model(given, return_features=True).float().cpu())

    def figures(
        self, found: Float32[np.ndarray, "N F"], truth: Float32[np.ndarray, "M F"], captions: Sequence[str]
    ) -> dict[str, float]:
        """FID and KID."""
        return feature_distances("inception", found, truth)


class Clip:
    """A CLIPModel folder of transformers: how well a picture goes with its caption."""

    def __init__(self, folder: Path, device: str) -> None:
        """Open the folder; OptionError where it holds no whole CLIP."""
        if not (folder / "config.json").is_file():
            raise OptionError(f"--clip {folder} holds no config.json: give a folder with a CLIPModel of transformers")
        quiet_libraries()
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
            if kind != "clip":
                raise OptionError(f"--clip {folder} holds a {kind} model: give a folder with a CLIPModel")
            model, info = CLIPModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
            self._pictures = AutoImageProcessor.from_pretrained(folder)
            self._words = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise OptionError(f"--clip {folder} cannot be opened: {one_line(error)}") from error
        if info["missing_keys"]:
            raise OptionError(f"--clip {folder} lacks weights, such as {sorted(info['missing_keys'])[0]}")
        self._model, self._device = model.to(device).eval(), device

    def look(self, pictures: UInt8[np.ndarray, "B H W 3"], captions: Sequence[str]) -> Float32[np.ndarray, "B F"]:
        """A hundred times the cosine of picture and caption, as the only feature."""
        longest = self._model.config.text_config.max_position_embeddings
        words: Any = self._words(list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        seen = self._pictures(images=list(pictures), return_tensors="pt")
        with torch.inference_mode():
            out = self._model(
                input_ids=words["input_ids"].to(self._device),
                attention_mask=words["attention_mask"].to(self._device),
                pixel_values=seen["pixel_values"].to(self._device),
            )
        return np.asarray(100 * (out.image_embeds * out.text_embeds).sum(1, keepdim=True).float().cpu())

    def figures(
        self, found: Float32[np.ndarray, "N F"], truth: Float32[np.ndarray, "M F"], captions: Sequence[str]
    ) -> dict[str, float]:
        """The mean, as in arXiv 2104.08718 with a weight of 100 and nothing cut at zero."""
        return {"clip_score": float(found.mean())}


def open_pretrained(clip: Path | None, inception: Path | None, device: str) -> list[Viewer]:
    """Those for which the user has files."""
    viewers: list[Viewer] = []
    if inception is not None:
        viewers.append(Inception(inception, device))
    if clip is not None:
        viewers.append(Clip(clip, device))
    return viewers
