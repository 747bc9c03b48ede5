"""Choose the files of a folder or repository that make an encoder: a part of a pipeline, one variant of the weights."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from index.errors import EncoderError

PARTS = {"image": re.compile(r"vae|vqvae|vqgan|movq|autoencoder"), "text": re.compile(r"text_encoder(_\d+)?")}
"""Subfolders of diffusers pipelines that hold an encoder, by its role."""
CONFIGS = {"config.json", "modules.json"}
"""Of a model; the second of sentence-transformers."""
SMALL = (".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt")
"""Files of configs and tokenizers."""
WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model)(?:\.(?P<before>[^.-]+))?(?:-\d+-of-\d+)?(?:\.(?P<after>[^.-]+))?"
    r"\.safetensors(?P<index>\.index(?:\.(?P<of_index>[^.]+))?\.json)?"
)
"""Names by which diffusers and transformers look for safetensors, with a variant in one of several places."""
UNSAFE = (".bin", ".ckpt", ".h5", ".msgpack", ".pt", ".pth")
VARIANTS = ("", "fp32", "fp16", "bf16")
"""Of several variants the first is read; the one without a name is plain."""
MODULE = re.compile(r"\d+_\w+")
"""Folders of the modules of sentence-transformers, such as 1_Pooling."""


class Part(NamedTuple):
    """What is read of a folder or repository."""

    subfolder: str
    files: list[str]
    """All that is read, by their paths in the folder or repository."""
    variant: str | None
    """`variant` of from_pretrained."""


def choose_part(files: Iterable[str], subfolder: str, role: str | None, at: Callable[[str], object]) -> Part:
    """Choose what to read of the files of a folder or repository.

    Args:
        files: all paths in it.
        subfolder: where the encoder was named to be; empty for the folder or repository itself.
        role: image or text, to find the part of a pipeline; None: pipelines are refused.
        at: how the user types a subfolder.

    Raises EncoderError if there is none, or several.
    """
    files = list(files)
    inside = _inside(files, subfolder)
    if not inside:
        folders = ", ".join(sorted({str(at(os.path.dirname(file))) for file in files if _is_config(file)}))
        raise EncoderError(
            f"there is no {at(subfolder)}: " + (f"use one of {folders}" if folders else "it has no files")
        )
    has_weights = any(WEIGHTS.fullmatch(file) for file in inside)
    if not CONFIGS & set(inside) or ("model_index.json" in inside and not has_weights):
        found = _part_of_pipeline(inside, subfolder, role, at)
        return choose_part(files, found, None, at)
    weights, variant = _choose_weights(inside, at(subfolder))
    chosen = [file for file in inside if "/" not in file and _is_small(file)] + weights
    if "modules.json" in inside:
        chosen += _module_files(inside)
    read = [_joined(subfolder, file) for file in chosen]
    beside = _tokenizer_beside(subfolder)
    if role != "image" and beside != subfolder:
        read += [_joined(beside, file) for file in _inside(files, beside) if _is_small(file)]
    # Weights last: whoever finds them in the cache finds the rest too.
    return Part(subfolder, sorted(read, key=lambda file: file.endswith(".safetensors")), variant or None)


def list_files(folder: Path) -> list[str]:
    """Return the paths of the files of a folder and of its subfolders, but of none deeper."""
    files: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            with os.scandir(entry.path) as below:
                files += sorted(f"{entry.name}/{each.name}" for each in below if each.is_file())
        else:
            files.append(entry.name)
    return files


def _part_of_pipeline(inside: list[str], subfolder: str, role: str | None, at: Callable[[str], object]) -> str:
    folders = sorted(os.path.dirname(file) for file in inside if file.count("/") == 1 and _is_config(file))
    found = [folder for folder in folders if role and PARTS[role].fullmatch(folder)]
    if len(found) == 1:
        return _joined(subfolder, found[0])
    here, names = at(subfolder), ", ".join(str(at(_joined(subfolder, folder))) for folder in found or folders)
    if found:
        raise EncoderError(f"{here} is a pipeline with {len(found)} {role} encoders: name one of {names}")
    if folders:
        raise EncoderError(
            f"{here} is not {'an' if role == 'image' else 'a'} {role or 'single'} encoder: name one of {names}"
        )
    raise EncoderError(
        f"{here} holds no model: it has no config.json; use a folder with config.json and model weights, as "
        "save_pretrained of diffusers or transformers writes it"
    )


def _choose_weights(inside: list[str], here: object) -> tuple[list[str], str]:
    """Return the weights in the folder itself, of one variant, and the variant."""
    variants: dict[str, list[str]] = {}
    for file in inside:
        if found := WEIGHTS.fullmatch(file):
            variants.setdefault(found["before"] or found["after"] or found["of_index"] or "", []).append(file)
    for variant in VARIANTS:
        if variant in variants:
            files = variants[variant]
            whole = [file for file in files if "-of-" not in file and file.endswith(".safetensors")]
            return whole or files, variant
    if variants:
        raise EncoderError(
            f"the weights of {here} have the variant {' or '.join(variants)} alone, and of variants only fp32, fp16 "
            f"and bf16 are read: load it in Python with variant='{min(variants)}' and save it with save_pretrained"
        )
    if "modules.json" in inside and any(file.endswith(".safetensors") for file in inside):
        return [], ""
    unsafe = [file for file in inside if file.endswith(UNSAFE) and "/" not in file and file != "training_args.bin"]
    if unsafe:
        is_diffusers = any(file.startswith("diffusion_pytorch_model") for file in unsafe)
        load = "AutoencoderKL.from_pretrained" if is_diffusers else "AutoModel.from_pretrained"
        raise EncoderError(
            f"{here} has its weights as {unsafe[0]} alone, and only safetensors are read, which cannot hold code: if "
            f"you trust it, load it in Python with {'diffusers' if is_diffusers else 'transformers'}, as {load}(...), "
            f"write it with .save_pretrained('FOLDER'){'' if is_diffusers else ', its tokenizer too,'} and use FOLDER"
        )
    others = [file for file in inside if file.endswith((".safetensors", ".gguf", ".onnx")) and "/" not in file]
    if not others:  # what its config says tells more than that it has no weights
        return [], ""
    raise EncoderError(
        f"{here} has no weights under the names that diffusers and transformers read "
        f"(diffusion_pytorch_model.safetensors, model.safetensors), but {others[0]}: save it with save_pretrained"
    )


def _module_files(inside: list[str]) -> list[str]:
    """Return the files of the modules of sentence-transformers."""
    modules = [file for file in inside if MODULE.fullmatch(file.partition("/")[0]) and "/" in file]
    return [file for file in modules if _is_small(file) or WEIGHTS.fullmatch(os.path.basename(file))]


def _tokenizer_beside(subfolder: str) -> str:
    folder, name = os.path.split(subfolder)
    return _joined(folder, name.replace("text_encoder", "tokenizer"))


def _inside(files: Iterable[str], subfolder: str) -> list[str]:
    prefix = f"{subfolder}/" if subfolder else ""
    return [file[len(prefix) :] for file in files if file.startswith(prefix)]


def _joined(subfolder: str, name: str) -> str:
    return f"{subfolder}/{name}" if subfolder else name


def _is_config(file: str) -> bool:
    return os.path.basename(file) in CONFIGS


def _is_small(file: str) -> bool:
    return file.endswith(SMALL) and not WEIGHTS.fullmatch(os.path.basename(file)) and "bin.index" not in file
