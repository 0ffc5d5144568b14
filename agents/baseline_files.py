"""What a Stable-Baselines3 zip says without running its author's code.

Its `data` is JSON in which whatever JSON cannot hold is a pickle in base64, with the object's fields as text beside it:
the text is read, the pickle never. `policy.pth` is read by `torch.load(weights_only=True)`, which builds tensors and
nothing else. Statistics of `VecNormalize` are a pickle of the whole object, and are read only where they are trusted.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.core.errors import UserError

TRUST = "add --trust-pickle if you trust its author: that runs code which the file brings"
"""What to do about a pickle."""


@dataclass(frozen=True)
class BaselineFile:
    """The parts of a zip that say how a policy acts."""

    path: Path
    data: dict[str, Any]
    """The JSON; a value that is no JSON is a dict of texts, of which `:type:` is the class."""
    weights: dict[str, Tensor]
    """policy.pth."""

    @classmethod
    def read(cls, path: str | Path) -> BaselineFile:
        """Read a zip that Stable-Baselines3's `save` wrote.

        Raises:
            UserError: it is none, is damaged, or its weights are more than tensors.
        """
        path = Path(path)
        members = _members(path, "data", "policy.pth")
        data, stored = json.loads(members["data"]), io.BytesIO(members["policy.pth"])
        try:
            weights = torch.load(stored, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(f"policy.pth of '{path}' holds more than tensors; {TRUST}") from None
        except (RuntimeError, ValueError, EOFError, KeyError) as error:
            raise UserError(f"policy.pth of '{path}' is damaged ({_line(error)})") from error
        if not isinstance(weights, dict) or not all(
            isinstance(w, Tensor) for w in weights.values()
        ):
            raise UserError(f"'{path}' is no checkpoint of Stable-Baselines3; give another zip")
        return cls(path, data, weights)

    def text(self, name: str, field: str) -> str:
        """Return a field of a value that is no JSON, as text; empty where it is missing."""
        value = self.data.get(name)
        return str(value.get(field, "")) if isinstance(value, dict) else ""

    def option(self, name: str, default: Any) -> Any:
        """Return one of the policy's keyword arguments; a class is the text `<class '...'>`."""
        keywords = self.data.get("policy_kwargs")
        return keywords.get(name, default) if isinstance(keywords, dict) else default

    def class_option(self, name: str) -> str | None:
        """Return the name of a class among the policy's keyword arguments, without its module."""
        return _class_name(str(self.option(name, None)))

    def class_name(self, name: str) -> str | None:
        """Return the name of the class of a value that is no JSON, without its module."""
        return _class_name(self.text(name, ":type:"))

    def action_bounds(self, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and largest actions that it was trained with, float64 [parts].

        Raises:
            UserError: the file does not tell them, or not that many.
        """
        bounds = []
        for name in ("low", "high"):
            words = self.text("action_space", name).replace("[", " ").replace("]", " ").split()
            try:
                bounds.append(np.array([float(word) for word in words]))
            except ValueError:
                bounds.append(np.zeros(0))
        low, high = bounds
        if not (len(low) == len(high) == parts) or not (low < high).all():
            raise UserError(
                f"'{self.path}' acts between {self.text('action_space', 'low') or '?'} and "
                f"{self.text('action_space', 'high') or '?'}, the task takes {parts} numbers; "
                "give a checkpoint of this task"
            )
        return low, high


def training_counts(path: str | Path) -> dict[str, int]:
    """Return the agent steps and gradient updates behind a zip.

    PPO counts passes over a rollout, of so many minibatches each; the others count gradient steps.
    """
    data = _read_data(Path(path))
    updates = _count(data.get("_n_updates"))
    if "n_epochs" in data:
        rollout = _count(data.get("n_steps")) * _count(data.get("n_envs"))
        updates *= -(-rollout // max(1, _count(data.get("batch_size"))))
    return {"agent_steps": _count(data.get("num_timesteps")), "gradient_updates": updates}


def _read_data(path: Path) -> dict[str, Any]:
    return json.loads(_members(path, "data")["data"])


def _members(path: Path, *names: str) -> dict[str, bytes]:
    """Return members of a zip.

    Raises:
        UserError: it is none, or lacks one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in names}
            json.loads(members["data"]).keys()
    except FileNotFoundError:
        raise UserError(f"there is no '{path}'; give a zip that model.save wrote") from None
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"'{path}' is no checkpoint of Stable-Baselines3 ({_line(error)}); give a zip that model.save wrote"
        ) from error
    return members


class Normalization(nn.Module):
    """What `VecNormalize` does to a state: mean 0 and spread 1 by fixed statistics, clipped.

    Args:
        mean: [D].
        variance: [D].
        epsilon: added to the variance.
        limit: of what comes out.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, mean: Any, variance: Any, *, epsilon: float, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float64))
        variance = torch.as_tensor(variance, dtype=torch.float64)
        self.register_buffer("spread", (variance + epsilon).sqrt())

    def forward(self, state: Tensor) -> Tensor:
        """Return float32 [B, D]."""
        scaled = (state.double() - self.mean) / self.spread
        return scaled.clamp(-self.limit, self.limit).float()

    @classmethod
    def read(cls, path: str | Path, *, trust_pickle: bool = False) -> Normalization:
        """Read statistics: `normalization_json`'s, or what `VecNormalize.save` wrote.

        Raises:
            UserError: they are a pickle that is not trusted, or no such statistics.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no '{path}'; give the file that VecNormalize.save wrote")
        if path.suffix == ".json":
            try:
                return cls(**json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(f"'{path}' is damaged ({_line(error)}); train anew") from error
        if not trust_pickle:
            raise UserError(f"'{path}', VecNormalize's statistics, is a pickle; {TRUST}")
        try:
            with path.open("rb") as handle:
                values = normalization_json(pickle.load(handle))
        except Exception as error:  # a pickle raises whatever it likes
            raise UserError(
                f"'{path}' holds no statistics of VecNormalize ({_line(error)}); give another file"
            ) from error
        return cls(**values)


def normalization_json(statistics: Any) -> dict[str, Any]:
    """Return what a `VecNormalize` does to observations as JSON can hold it."""
    moments = statistics.obs_rms
    return {
        "mean": moments.mean.tolist(),
        "variance": moments.var.tolist(),
        "epsilon": float(statistics.epsilon),
        "limit": float(statistics.clip_obs),
    }


def _class_name(text: str) -> str | None:
    found = re.fullmatch(r"<class '(?:.*\.)?(\w+)'>", text)
    return found[1] if found else None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
