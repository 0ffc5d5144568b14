"""`--import`: modules of third parties that register tasks and agents before anything else is looked up."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.core.errors import UserError
from agents.core.imports import import_modules, recorded_imports


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--import`, which may be given several times; its values are the namespace's `imports`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers tasks or agents; may be given several times",
    )


def import_for_run(
    config: Mapping[str, Any],
    given: Sequence[str] = (),
    *,
    folder: Path | None = None,
    source: str = "the run's config",
) -> list[str]:
    """Import what the command line names and what a run was trained with, and return all of it.

    A recorded module is another person's word: a line tells of it before its code runs, and one that lies in the run
    folder itself is not imported unless the command line names it.

    Args:
        config: the run's config.json.
        given: the values of `--import`.
        folder: the run folder.
        source: what `config` is, for the line.

    Raises:
        UserError: a module cannot be imported, or came with the run.
    """
    import_modules(given)
    recorded = recorded_imports(config)
    for name in recorded:
        if name not in sys.modules:
            _refuse_from(folder, name)
            print(f"imports {name}, as {source} says", flush=True)
        import_modules([name])
    return list(dict.fromkeys([*recorded, *given]))


def _refuse_from(folder: Path | None, name: str) -> None:
    """Refuse a module that lies in a run folder, which `python -m` puts on the path for those who stand in it."""
    try:
        spec = importlib.util.find_spec(name.partition(".")[0])
    except ValueError:
        return  # what is wrong with the name is told by the import
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec else []
    if folder and any(
        Path(place).resolve().is_relative_to(folder.resolve()) for place in places if place
    ):
        raise UserError(
            f"the run's config names the module '{name}', which lies in the run folder '{folder}' itself; if you trust "
            f"it, add --import {name}"
        )
