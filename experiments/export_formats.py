"""What a policy can be exported to: ONNX, and torch.export's archive."""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from agents.core.errors import UserError

Act = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""From a batch of observations by name to actions."""

KEY = "sightline"
"""Of the metadata: in ONNX's `metadata_props`; the archive's extra file is named so, with `.json`."""

_EXTRA = f"{KEY}.json"
_MISSING = (
    "ONNX needs a package that is not installed ({0}): "
    "python -m pip install --constraint constraints.txt --editable '.[export]', or use --format pt2"
)


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        needs: packages of the extra `export` without which it is not written.
        write: writes a program and its metadata, a JSON text, into a file.
        load: makes a function of the file, as its users do.
    """

    needs: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, str], None]
    load: Callable[[Path], Act]

    def check(self) -> None:
        """Raise a UserError where a package is missing."""
        for name in self.needs:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise UserError(_MISSING.format(name)) from error


def trace(module: nn.Module, example: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """Export a module for any batch size.

    Args:
        module: takes the parts of an observation by name.
        example: a batch of them, of two or more: a batch of one would be taken for a constant.
    """
    batch = Dim("batch")
    shapes = {name: {0: batch} for name in example}
    with torch.no_grad(), _quiet():
        return torch.export.export(module.eval(), (), dict(example), dynamic_shapes=shapes)


def _write_onnx(program: ExportedProgram, file: Path, about: str) -> None:
    names = [str(name) for name in program.graph_signature.user_inputs]
    with torch.no_grad(), _quiet():
        converted = torch.onnx.export(
            program, dynamo=True, external_data=False, verbose=False,
            input_names=names, output_names=["action"],
            dynamic_shapes={name: {0: "batch"} for name in names},
        )  # fmt: skip
    assert converted is not None
    converted.model.metadata_props[KEY] = about
    converted.save(file, external_data=False)


def _load_onnx(file: Path) -> Act:
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda observation: session.run(["action"], dict(observation))[0]


def _write_archive(program: ExportedProgram, file: Path, about: str) -> None:
    # Through memory: of a file that cannot be written PyTorch's own writer tells by a RuntimeError.
    content = io.BytesIO()
    with _quiet():
        torch.export.save(program, content, extra_files={_EXTRA: about})
    file.write_bytes(content.getvalue())


def _load_archive(file: Path) -> Act:
    with _quiet():
        module = torch.export.load(file).module()
    return lambda observation: module(
        **{name: torch.as_tensor(part) for name, part in observation.items()}
    ).numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch from telling of its own deprecations, and of axes and operators that nothing here needs.

    (That torchvision is missing; that the batch is one axis for all inputs, so that it has its name only once.)
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
            yield
    finally:
        logger.setLevel(level)


FORMATS: dict[str, Format] = {
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "pt2": Format((), _write_archive, _load_archive),
}
"""By the ending of the file."""
