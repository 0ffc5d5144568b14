"""Opening a diffusers pipeline from a folder or the hub, and what is missing said in one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from agents.core.errors import UserError
from agents.generative_models.pipeline_networks import FAMILIES

INDEX = "model_index.json"
"""File that makes a folder a pipeline."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that are not loaded."""
PACKAGES = ("diffusers", "transformers", "peft")


def is_pipeline(source: str) -> bool:
    """Whether a name is that of a pipeline's folder, or may be one of the hub: OWNER/NAME where there is no OWNER."""
    path = Path(source)
    if path.exists():
        return (path / INDEX).is_file()
    # Where a folder OWNER is, a mistyped name in it was meant.
    return HUB_NAME.fullmatch(source) is not None and not path.parent.is_dir()


def pipeline_kind(source: str) -> str:
    """Return the name of a pipeline's class, before its weights are read.

    Args:
        source: folder, or name on the hub; with HF_HUB_OFFLINE=1 only what was downloaded before is taken.

    Raises:
        UserError: a package is missing, or files of a folder are, or the pipeline is of a kind that is not known.
    """
    for package in PACKAGES:
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise UserError(
                f"'{source}' is a pipeline of diffusers, which needs the package {error.name}: "
                "pip install 'sightline[pipelines]'"
            ) from error
    from diffusers import DiffusionPipeline

    if Path(source).exists():
        check_files(Path(source))
    with _one_line(source):
        about = DiffusionPipeline.load_config(source, local_files_only=_is_offline(source))
    kind = str(about.get("_class_name"))
    _check_kind(source, kind)
    return kind


def open_pipeline(source: str, dtype: torch.dtype) -> Any:
    """Return a pipeline of diffusers, on the CPU.

    Args:
        source: see `pipeline_kind`.
        dtype: of its networks.

    Raises:
        UserError: see `pipeline_kind`; or its weights cannot be read.
    """
    kind = pipeline_kind(source)
    from diffusers import DiffusionPipeline

    unused: dict[str, Any] = {name: None for name in UNUSED if name in _components(kind)}
    if "safety_checker" in unused:
        unused["requires_safety_checker"] = False
    options: dict[str, Any] = {
        "dtype": dtype, "use_safetensors": True, "local_files_only": _is_offline(source),
    }  # fmt: skip
    with _one_line(source), _quiet():
        encoders = _text_encoders(source, options)
        pipe = DiffusionPipeline.from_pretrained(source, **options, **unused, **encoders)
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            # diffusers leaves what the files lack without numbers.
            absent = [key for key, value in module.state_dict().items() if value.is_meta]
            _refuse_absent(source, name, absent)
    return pipe


def _text_encoders(source: str, options: dict[str, Any]) -> dict[str, nn.Module]:
    """Return a pipeline's text encoders; transformers fills what the files lack with random numbers.

    Raises:
        UserError: something is lacking.
    """
    import transformers
    from diffusers import DiffusionPipeline

    encoders: dict[str, nn.Module] = {}
    index = DiffusionPipeline.load_config(source, local_files_only=options["local_files_only"])
    for name, entry in index.items():
        if name.startswith("text_encoder") and isinstance(entry, list) and entry[0] is not None:
            encoders[name], found = getattr(transformers, entry[1]).from_pretrained(
                source, subfolder=name, output_loading_info=True, **options
            )
            _refuse_absent(source, name, found["missing_keys"])
    return encoders


def _refuse_absent(source: str, component: str, absent: Iterable[str]) -> None:
    """Refuse weights that are not whole.

    Raises:
        UserError: names the component and the first tensor.
    """
    tensors = sorted(absent)
    if tensors:
        others = f" and {len(tensors) - 1} other tensors" if len(tensors) > 1 else ""
        raise UserError(
            f"the weights of {component} in '{source}' lack {tensors[0]}{others}; download the pipeline again"
        )


def _is_offline(source: str) -> bool:
    """Whether nothing is to be downloaded."""
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return asked or Path(source).exists()


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Say in one line why a pipeline cannot be read."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        where = "" if Path(source).exists() else " (there is no such folder, and from the hub)"
        raise UserError(f"cannot load the pipeline '{source}'{where}: {reason}") from error


def check_files(folder: Path) -> None:
    """Refuse a folder that lacks files of its pipeline.

    Raises:
        UserError: says which and where, and how to get them.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"'{folder}' is no pipeline of diffusers: it has no {INDEX}")
    try:
        index = json.loads((folder / INDEX).read_text())
        kind = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{folder / INDEX}' is damaged ({error}); download it again") from error
    _check_kind(str(folder), kind)
    missing = [
        what
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] is not None and name not in UNUSED
        for what in _missing(folder, name)
    ]
    if missing:
        raise UserError(
            f"'{folder}' lacks {' and '.join(missing)}; download the whole pipeline with safetensors: "
            "huggingface-cli download OWNER/NAME --local-dir FOLDER"
        )


def _missing(folder: Path, component: str) -> list[str]:
    """Return what a component lacks, as paths in the folder."""
    place = folder / component
    if component == "scheduler":
        names = ["scheduler_config.json"]
    elif component.startswith("tokenizer"):
        names = missing_of_tokenizer(place)
    else:
        stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        index = place / f"{stem}.safetensors.index.json"
        names = ["config.json", f"{stem}.safetensors"]
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            names = ["config.json", *sorted(shards)]
    return [f"{component}/{name}" for name in names if not (place / name).is_file()]


def missing_of_tokenizer(folder: Path) -> list[str]:
    """Return what a tokenizer's folder lacks: without its words the package makes one that knows none."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        return []
    if (folder / "vocab.json").is_file():
        return [] if (folder / "merges.txt").is_file() else ["merges.txt"]
    return ["tokenizer.json"]


def _check_kind(source: str, kind: str) -> None:
    if kind not in FAMILIES:
        raise UserError(
            f"'{source}' is a {kind}, which is not known here; give one of {', '.join(FAMILIES)}"
        )


def _components(kind: str) -> set[str]:
    """Return the names of a pipeline's components."""
    import diffusers
    from transformers.utils import logging

    # Where torchvision is missing, processors of components that are not loaded say so.
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return set(getattr(diffusers, kind)._get_signature_types())
    finally:
        logging.set_verbosity(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Load without the packages' bars and reports: runs that log lines have no use for them, and errors are ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.enable_progress_bar()
            library.set_verbosity(verbosity)
