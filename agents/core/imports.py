"""Modules of third parties, imported for what they register: tasks with `envs.register`, agents with `agents.register`.

A run's config.json names the modules that it was trained with. Nobody imports them just because a folder says so: a
module must be installed here, and a person asks for it, by `--import`, by a command on that run (which tells before it
imports), or by `Policy.load(run, imports=True)`. Commands do not take a module from the run folder itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from agents.core.errors import UserError


def import_modules(names: Iterable[str]) -> None:
    """Import modules in order; those that are imported already do nothing.

    Args:
        names: such as `mypackage` or `mypackage.tasks`.

    Raises:
        UserError: a name is none, there is no such module, or it needs one that is missing. What else a module raises
            is its author's to see and passes through.
    """
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(
                f"cannot import '{name}': give a module's name such as mypackage or mypackage.tasks"
            )
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(_explanation(name, str(error.name))) from error


def _explanation(name: str, missing: str) -> str:
    if name == missing or name.startswith(f"{missing}."):
        return (
            f"cannot import '{name}': there is no module '{missing}' here; "
            "install its package, or put the folder that holds it on PYTHONPATH"
        )
    return f"cannot import '{name}': it needs '{missing}', which is not installed; install that"


def recorded_imports(config: Mapping[str, Any]) -> list[str]:
    """Return the modules that a run's config.json names; runs from before there were any have none.

    Raises:
        UserError: the entry is no list of names.
    """
    names = config.get("imports", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"the run's config.json has imports {names!r}; expected a list of names")
    return names
