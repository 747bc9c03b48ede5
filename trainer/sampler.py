"""Captions to images: `CoalescerPipeline.from_pretrained(RUN)("a caption", num_inference_steps=2).images[0]`."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float32

from index.errors import OptionError
from index.ranges import COUNT, COUNT_FROM_0, NOT_NEGATIVE, SEED
from index.space.geometry import Geometry
from index.table.schema import TableMeta
from pipeline.encoders.devices import resolve_device
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder
from trainer.checkpoints import open_network
from trainer.models.base import Network
from trainer.objectives.base import Objective, StepInput, StepOutput
from trainer.objectives.registry import make_objective, name_of
from trainer.run_folder import (
    NOT_MOVED,
    RESULT,
    EncoderPlaces,
    check_is_free,
    find_run,
    open_encoders,
    read_config,
    write_export,
)

if TYPE_CHECKING:
    from PIL.Image import Image

DECODE_BATCH = 64


@dataclass(frozen=True, eq=False, slots=True)
class CoalescerOutput:
    """Images, prompt by prompt, `num_images_per_prompt` each."""

    images: "list[Image]"
    prompts: list[str]
    """The prompt of each image."""
    confidence: Float32[np.ndarray, "B"]
    """The network's confidence at the first step, 0 to 1; NaN if its objective predicts none."""
    latents: Float32[np.ndarray, "B C H W"]
    """Latents as the image encoder decodes them."""


class CoalescerPipeline:
    """A trained network with the encoders of its table, ready to sample."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        meta: TableMeta,
        image_encoder: DiffusersAutoencoder,
        text_encoder: TransformersTextEncoder,
        device: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Put the components together; `from_pretrained` is the usual way.

        `settings` are those in config.json of a run, for `save_pretrained` to keep.
        """
        self.network, self.objective, self.meta, self.device = network, objective, meta, device
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self._settings = settings or {}

    @property
    def geometry(self) -> Geometry:
        """The geometry that the network was trained in."""
        return self.meta.geometry

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str = "auto", encoders: EncoderPlaces = NOT_MOVED
    ) -> "CoalescerPipeline":
        """Open a run, a folder of `save_pretrained`, or a hub id `ORG/NAME[@REVISION]` with the files of either.

        Safetensors and JSON only are read. `encoders` says where they are if they were moved.

        Raises:
            EncoderError: an encoder is not where it was, or is not the one that the table was encoded with.
            RunError: the folder or repository is not a run, or its weights do not fit its config.
        """
        folder = find_run(name)
        config, device = read_config(folder), resolve_device(device)
        network = open_network(folder).to(device).eval().requires_grad_(False)
        fitted, meta = config["fit"], TableMeta.from_json(config["table"]["meta"])
        objective = make_objective(fitted["objective"], fitted["preset"], **config["objective"])
        return cls(network, objective, meta, *open_encoders(folder, meta, encoders, device), device, config)

    @classmethod
    def from_network(
        cls,
        network: Network,
        objective: Objective,
        meta: TableMeta,
        folder: Path,
        device: str,
        encoders: EncoderPlaces = NOT_MOVED,
        dtype: str = "float32",
    ) -> "CoalescerPipeline":
        """Combine a network, such as one in training, with the encoders of its run, which compute in `dtype`."""
        return cls(network, objective, meta, *open_encoders(folder, meta, encoders, device, dtype), device)

    def move_encoders(self, device: str) -> None:
        """Move the encoders' weights to a device; to sample they must be on that of the pipeline."""
        self.image_encoder.model.to(device)
        self.text_encoder.model.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write network, encoders and settings to a folder that needs no other to be opened by `from_pretrained`.

        Each component has a subfolder, as in a pipeline of diffusers. Raises RunError if `folder` is there and not
        empty.
        """
        fit = {"objective": name_of(self.objective), "preset": "default", **self._settings.get("fit", {})}
        table = self._settings.get("table", {"uri": "", "version": None})
        settings = {"fit": fit, "objective": asdict(self.objective), "table": table}
        write_export(Path(folder), settings, self.meta, self.network, (self.image_encoder, self.text_encoder))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 2,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        guidance_scale: float = 1.0,
        redraws: int = 0,
        batch_size: int = 64,
    ) -> CoalescerOutput:
        """Sample images of one or several prompts.

        Args:
            prompt: one or several captions.
            num_inference_steps: network evaluations per image, twice as many with guidance.
            num_images_per_prompt: images of each prompt, from different noise.
            seed: with the prompt and the image's number, all that the noise depends on, so that no two images of a call
                start from the same; other prompts and the batch have no influence.
            guidance_scale: 1 samples the captions as trained, more exaggerates them.
            redraws: further noise samples to try per image, with one evaluation each; the one with the highest
                confidence is kept.
            batch_size: images per batch.

        Raises:
            OptionError: there is no prompt, a prompt is blank, a number is out of range, or the network was not trained
                for guidance or predicts no confidence.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check_call(prompts, num_inference_steps, num_images_per_prompt, guidance_scale, redraws, seed)
        _check_objective(self.objective, guidance_scale, redraws)
        indices = noise_indices(prompts, num_images_per_prompt)
        text = self.encode_prompt(prompts).repeat(num_images_per_prompt, axis=0)
        latents, confidences = [], []
        for start in range(0, len(indices), batch_size):
            batch = slice(start, start + batch_size)
            x, confidence = self.sample_latents(
                text[batch],
                indices[batch],
                num_inference_steps=num_inference_steps,
                seed=seed,
                redraws=redraws,
                guidance_scale=guidance_scale,
            )
            latents.append(self.geometry.to_latent(x))
            confidences.append(confidence)
        latent = np.concatenate(latents).reshape(-1, *self.meta.latent_shape)
        repeated = [each for each in prompts for _ in range(num_images_per_prompt)]
        return CoalescerOutput(self.decode(latent), repeated, np.concatenate(confidences), latent)

    def encode_prompt(self, prompts: Sequence[str]) -> Float32[np.ndarray, "B K T"]:
        """Return the pooled text embedding of each prompt, then the token embeddings that the network reads."""
        return self.text_encoder.encode_tokens(prompts, num_tokens=self.network.num_tokens)

    def sample_latents(
        self,
        text: Float32[np.ndarray, "B K T"],
        indices: Sequence[int],
        *,
        num_inference_steps: int,
        seed: int = 0,
        redraws: int = 0,
        guidance_scale: float = 1.0,
    ) -> tuple[Float32[np.ndarray, "B L"], Float32[np.ndarray, "B"]]:
        """Sample one latent per text embedding.

        Args:
            text: what `encode_prompt` returns.
            indices: for each sample an integer that, with the seed, determines its noise.
            num_inference_steps: network evaluations per sample, twice as many with guidance.
            seed: of all samples.
            redraws: further first steps to take; only the one of the highest confidence goes on.
            guidance_scale: 1 for no guidance.

        Returns:
            Latents in coordinates, and the confidence at the first step.
        """
        condition = torch.from_numpy(text).to(self.device)

        def step(i: int, x: Float32[torch.Tensor, "B L"]) -> StepOutput:
            inputs = StepInput(
                x=x,
                text=condition,
                i=i,
                n=num_inference_steps,
                guidance_scale=guidance_scale,
                noise=partial(self.noise, indices, seed, 0, 1 + i),
            )
            return self.objective.step(self.network, inputs)

        with torch.inference_mode():
            x, first = step(0, self.noise(indices, seed, 0))
            for attempt in range(1, 1 + redraws):
                other, confidence = step(0, self.noise(indices, seed, attempt))
                better = confidence > first
                x, first = torch.where(better[:, None], other, x), torch.where(better, confidence, first)
            for i in range(1, num_inference_steps):
                x, _ = step(i, x)
        return x.cpu().numpy(), first.cpu().numpy()

    def noise(self, indices: Sequence[int], seed: int, *key: int) -> Float32[torch.Tensor, "B L"]:
        """Draw noise R for each index, in coordinates; it depends on seed, index and key alone."""
        size = self.geometry.latent_dim
        rows = [np.random.default_rng([seed, index, *key]).standard_normal(size) for index in indices]
        return torch.from_numpy(self.geometry.project(np.stack(rows))).to(self.device)

    def decode(self, latents: Float32[np.ndarray, "B C H W"]) -> "list[Image]":
        """Decode latents to images."""
        from PIL import Image

        starts = range(0, len(latents), DECODE_BATCH)
        batches = [self.image_encoder.decode(latents[start : start + DECODE_BATCH]) for start in starts]
        return [Image.fromarray(pixels) for batch in batches for pixels in batch]


def export_run(run: str | Path, out: Path, encoders: EncoderPlaces = NOT_MOVED) -> None:
    """Write a folder that stands alone, from a run and its encoders: to move, to share, to upload.

    Raises:
        EncoderError: an encoder is not where it was, or is not the one that the table was encoded with.
        RunError: there is no such run, or something is at `out` already.
    """
    check_is_free(out)
    folder = find_run(run)
    CoalescerPipeline.from_pretrained(folder, device="cpu", encoders=encoders).save_pretrained(out)
    if (folder / RESULT).is_file():
        shutil.copyfile(folder / RESULT, out / RESULT)  # what training took, for `trainer compare`


def noise_indices(prompts: Sequence[str], num_images_per_prompt: int) -> list[int]:
    """Return an integer for each image: its prompt's hash, and its number among the images of that prompt."""
    count, indices = Counter[str](), []
    for prompt in prompts:
        key = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) << 32
        indices += [key + count[prompt] + j for j in range(num_images_per_prompt)]
        count[prompt] += num_images_per_prompt
    return indices


def _check_objective(objective: Objective, guidance_scale: float, redraws: int) -> None:
    """Raise OptionError for options that do nothing, or nothing good, with a network that was not trained for them."""
    if guidance_scale != 1 and not objective.dropout:
        raise OptionError(
            f"--guidance-scale {guidance_scale:g} extrapolates from samples without a caption, which this network was "
            "not trained to make (dropout 0): use --guidance-scale 1, or train with --set dropout=0.1"
        )
    if redraws and not objective.has_confidence:
        raise OptionError(
            f"--redraws {redraws} keeps the sample of the highest confidence, but {name_of(objective)} predicts none: "
            "use --redraws 0"
        )


def _check_call(
    prompts: list[str],
    num_inference_steps: int,
    num_images_per_prompt: int,
    guidance_scale: float,
    redraws: int,
    seed: int,
) -> None:
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise OptionError("a prompt is empty: pass at least one caption")
    COUNT.check("--num-inference-steps", num_inference_steps)
    COUNT.check("--num-images-per-prompt", num_images_per_prompt)
    NOT_NEGATIVE.check("--guidance-scale", guidance_scale)
    COUNT_FROM_0.check("--redraws", redraws)
    SEED.check("--seed", seed)
