"""`--import`: modules of third parties that register tasks and agents before anything else is looked up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

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
    config: Mapping[str, Any], given: Sequence[str] = (), *, source: str = "the run's config"
) -> list[str]:
    """Import what the command line names and what a run was trained with, and return all of it.

    A recorded module is another person's word: a line tells of it before its code runs.

    Args:
        config: the run's config.json.
        given: the values of `--import`.
        source: what `config` is, for the line.

    Raises:
        UserError: a module cannot be imported.
    """
    import_modules(given)
    recorded = recorded_imports(config)
    for name in recorded:
        if name not in sys.modules:
            print(f"imports {name}, as {source} says", flush=True)
        import_modules([name])
    return list(dict.fromkeys([*recorded, *given]))
