"""What a run was trained with, held against what a command line asks for today."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agents.baselines import BASELINE
from agents.core.settings import to_dict
from agents.registry import find
from envs.settings import Settings
from experiments.running.settings import VectorSettings, loop_settings


def with_new_fields(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config with the fields that later versions added: a run without them had their defaults.

    Args:
        config: config.json of the run.
        wanted: the config that this version would write; it has the fields.
    """
    agent = config["agent"].removeprefix(BASELINE)
    own = {type(own).__name__: to_dict(own) for own in find(agent).configs}
    defaults = {
        "env": asdict(Settings(config["env"]["id"])),
        "vector": asdict(VectorSettings()),
        "train": asdict(loop_settings(agent)),
    }

    def complete(
        found: Mapping[str, Any], new: Mapping[str, Any], default: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {**{name: default[name] for name in new if name in default}, **found}

    parts: dict[str, Any] = {
        name: complete(config.get(name, {}), wanted[name], defaults[name]) for name in defaults
    }
    configs = {
        name: complete(config["configs"][name], fields, own[name])
        for name, fields in wanted["configs"].items()
        if name in config.get("configs", {})
    }
    return {"reward": "task", **config, **parts, "configs": configs}
