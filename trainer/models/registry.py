"""Networks by name: build one for a table, or load one that was saved."""

import json
from pathlib import Path

from safetensors import SafetensorError

from index.errors import OptionError, RunError, one_line
from index.table.schema import TableMeta
from pipeline.encoders.files import quiet_libraries
from trainer.models import mlp, transformer
from trainer.models.base import Network
from trainer.models.mlp import LatentMLP
from trainer.models.transformer import LatentTransformer

NETWORK_NAMES = ("auto", "mlp", "transformer")
MIN_TRANSFORMER_HEIGHT = 16
"""`auto` is a transformer for latents of this height or more."""
CLASSES: dict[str, type[Network]] = {each.__name__: each for each in (LatentMLP, LatentTransformer)}
"""By the `_class_name` in a network's config.json."""


def make_network(meta: TableMeta, *, size: str, network: str = "auto", num_tokens: int | None = None) -> Network:
    """Build a network with fresh weights for the latents and text embeddings of a table.

    Args:
        meta: the table's metadata.
        size: one of SIZE_NAMES.
        network: mlp, transformer, or auto, which decides by the latents' height.
        num_tokens: token embeddings that a transformer reads; None is 77 for a transformer and 0 for an MLP.

    Raises:
        OptionError: the network cannot read so many token embeddings.
    """
    if network == "auto":
        network = "transformer" if meta.latent_shape[1] >= MIN_TRANSFORMER_HEIGHT else "mlp"
    if num_tokens and (num_tokens < 0 or network == "mlp"):
        raise OptionError(
            f"--num-tokens {num_tokens} does not go with --network {network}: an mlp reads no token embeddings, "
            "a transformer 0 or more"
        )
    built: Network
    if network == "mlp":
        built = LatentMLP(meta.latent_shape, meta.text_dim, *mlp.SIZES[size])
    else:
        num_tokens = transformer.MAX_TOKENS if num_tokens is None else num_tokens
        built = LatentTransformer(meta.latent_shape, meta.text_dim, *transformer.SIZES[size], num_tokens=num_tokens)
    return built


def load_network(folder: Path) -> Network:
    """Load a network that `save_pretrained` has written, of the class that its config names.

    Raises:
        RunError: files are missing or unreadable, or the weights do not fit the config.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise RunError(
            f"{folder} holds no trained network (config.json and safetensors): "
            "train it to the end with `trainer fit --resume`, or train a new run with `trainer fit`"
        )
    try:
        class_name = json.loads((folder / "config.json").read_text())["_class_name"]
        # By default diffusers builds on the meta device and raises at the first missing weight instead of listing all.
        with quiet_libraries():
            network, report = CLASSES[class_name].from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"the network in {folder} cannot be read ({one_line(error, typed=True)}): train again with `trainer fit`"
        ) from error
    misfits = [*report["missing_keys"], *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if misfits:
        raise RunError(
            f"{len(misfits)} weights in {folder} do not fit its config.json, such as {misfits[0]}: "
            "train again with `trainer fit`"
        )
    return network  # type: ignore[no-any-return]
