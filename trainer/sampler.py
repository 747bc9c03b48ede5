"""Captions to images: `CoalescerPipeline.from_pretrained(RUN)("a caption", num_inference_steps=2).images[0]`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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
from trainer.objectives.base import Objective, StepInput
from trainer.objectives.registry import make_objective
from trainer.run_folder import NOT_MOVED, EncoderPlaces, find_run, open_encoders, read_config

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
    ) -> None:
        """Put the components together; `from_pretrained` is the usual way."""
        self.network, self.objective, self.meta, self.device = network, objective, meta, device
        self.image_encoder, self.text_encoder = image_encoder, text_encoder

    @property
    def geometry(self) -> Geometry:
        """The geometry that the network was trained in."""
        return self.meta.geometry

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str = "auto", encoders: EncoderPlaces = NOT_MOVED
    ) -> "CoalescerPipeline":
        """Open a run folder, or a hub id `ORG/NAME[@REVISION]` with the same files; reads safetensors and JSON only.

        `encoders` says where they are if they were moved.

        Raises:
            EncoderError: an encoder is not where it was, or is not the one that the table was encoded with.
            RunError: the folder or repository is not a run, or its weights do not fit its config.
        """
        folder = find_run(name)
        config, device = read_config(folder), resolve_device(device)
        network = open_network(folder).to(device).eval().requires_grad_(False)
        fitted, meta = config["fit"], TableMeta.from_json(config["table"]["meta"])
        objective = make_objective(fitted["objective"], fitted["preset"], **config["objective"])
        return cls.from_network(network, objective, meta, folder, device, encoders)

    @classmethod
    def from_network(
        cls,
        network: Network,
        objective: Objective,
        meta: TableMeta,
        folder: Path,
        device: str,
        encoders: EncoderPlaces = NOT_MOVED,
    ) -> "CoalescerPipeline":
        """Combine a network, such as one in training, with the encoders of its run folder."""
        return cls(network, objective, meta, *open_encoders(folder, meta, encoders, device), device)

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
            num_images_per_prompt: images of each prompt; the j-th starts from the same noise for every prompt.
            seed: with j, all that the noise of an image depends on; its batch has no influence.
            guidance_scale: 1 samples the captions as trained, more exaggerates them.
            redraws: further images to sample per image; the one with the highest confidence is kept.
            batch_size: images per batch.

        Raises:
            OptionError: there is no prompt, a prompt is blank, or a number is out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check_call(prompts, num_inference_steps, num_images_per_prompt, guidance_scale, redraws, seed)
        indices = [j for _ in prompts for j in range(num_images_per_prompt)]
        text = self.encode_prompt(prompts).repeat(num_images_per_prompt, axis=0)
        latents, confidences = [], []
        for start in range(0, len(indices), batch_size):
            batch = slice(start, start + batch_size)
            sample = partial(
                self.sample_latents,
                text[batch],
                indices[batch],
                num_inference_steps=num_inference_steps,
                seed=seed,
                guidance_scale=guidance_scale,
            )
            x, confidence = _most_confident([sample(attempt=attempt) for attempt in range(redraws + 1)])
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
        attempt: int = 0,
        guidance_scale: float = 1.0,
    ) -> tuple[Float32[np.ndarray, "B L"], Float32[np.ndarray, "B"]]:
        """Sample one latent per text embedding.

        Args:
            text: what `encode_prompt` returns.
            indices: for each sample an integer that, with seed and attempt, determines its noise.
            num_inference_steps: network evaluations per sample, twice as many with guidance.
            seed: of all samples.
            attempt: which redraw this is.
            guidance_scale: 1 for no guidance.

        Returns:
            Latents in coordinates, and the confidence at the first step.
        """
        x, condition = self.noise(indices, seed, attempt), torch.from_numpy(text).to(self.device)
        first = None
        with torch.inference_mode():
            for i in range(num_inference_steps):
                inputs = StepInput(
                    x=x,
                    text=condition,
                    i=i,
                    n=num_inference_steps,
                    guidance_scale=guidance_scale,
                    noise=partial(self.noise, indices, seed, attempt, 1 + i),
                )
                x, confidence = self.objective.step(self.network, inputs)
                first = confidence if first is None else first
        assert first is not None
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


def _most_confident(
    attempts: list[tuple[Float32[np.ndarray, "B L"], Float32[np.ndarray, "B"]]],
) -> tuple[Float32[np.ndarray, "B L"], Float32[np.ndarray, "B"]]:
    """Choose for each row the attempt of the highest confidence; the first if there is no confidence."""
    x, confidence = (np.stack(each) for each in zip(*attempts, strict=True))
    best = confidence.argmax(0), np.arange(confidence.shape[1])
    return x[best], confidence[best]
