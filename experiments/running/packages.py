"""The four packages must come from one place: `agents` and `envs` are names that others use too.

(`openai-agents` installs an `agents`; people have an `envs/` in their folder, which Python finds first.)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

PACKAGES = ("agents", "envs", "wrappers", "experiments")


def package_folders() -> dict[str, Path | None]:
    """Return the folder that each package would be imported from, None where it is not found."""
    folders: dict[str, Path | None] = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        locations = list(spec.submodule_search_locations or []) if spec else []
        folders[name] = Path(locations[0]).resolve() if locations else None
    return folders


class PackagesError(ImportError):
    """Another distribution's package stands in the way; the commands print the one line and exit with code 2."""

    exit_code = 2


def check_packages(folders: dict[str, Path | None] | None = None) -> None:
    """Raise a PackagesError unless all four packages lie side by side; name the distribution in the way."""
    folders = package_folders() if folders is None else folders
    home = Path(__file__).resolve().parents[2]
    for name, folder in folders.items():
        if folder is not None and folder.parent == home:
            continue
        owners = importlib.metadata.packages_distributions().get(name, [])
        others = sorted({owner for owner in owners if owner != "sightline"})
        source = f"distribution '{others[0]}'" if others else f"'{folder}'"
        raise PackagesError(
            f"package '{name}' comes from {source} instead of {home}; "
            "uninstall it or use an environment of Sightline's own"
        )
