"""Which versions are installed, which ones this version needs, and which ones its tests passed with."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
"""Where pyproject.toml and constraints.txt lie in a checkout; an installed package has neither."""

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def normalized(name: str) -> str:
    """Return a distribution's name as PyPI compares it.

    Example:
        >>> normalized("Stable_Baselines3")
        'stable-baselines3'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Return the version of every installed distribution by normalized name; the first one on the path counts."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a folder that an interrupted pip left behind has none
            versions.setdefault(normalized(name), distribution.version)
    return versions


def pinned(home: Path = HOME) -> dict[str, str] | None:
    """Return constraints.txt's versions by normalized name, None where the file is not shipped."""
    file = home / "constraints.txt"
    if not file.is_file():
        return None
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {normalized(name.strip()): version.strip() for name, version in pairs}


def required(home: Path = HOME) -> dict[str, str]:
    """Return what Sightline itself needs, such as {"mujoco": "<3.17,>=3.16"}, as pyproject.toml or pip says."""
    file = home / "pyproject.toml"
    if file.is_file():
        lines = tomllib.loads(file.read_text())["project"]["dependencies"]
    else:
        everything = importlib.metadata.requires("sightline") or []
        lines = [line.partition(";")[0] for line in everything if "extra ==" not in line]
    needs = {}
    for line in lines:
        name = _NAME.match(line)
        assert name is not None
        specifier = line[name.end() :].partition("]")  # behind extras such as imageio[ffmpeg]
        needs[normalized(name[0])] = (specifier[2] or specifier[0]).strip()
    return needs


def unmet(needs: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    """Return a few words on every requirement that is missing or of a version that does not work.

    Args:
        needs: as `required` gives them.
        versions: as `installed` gives them.
    """
    from packaging.specifiers import SpecifierSet  # absent only where much else is

    lacking = []
    for name, specifier in needs.items():
        if name not in versions:
            lacking.append(f"{name} is missing")
        elif not SpecifierSet(specifier).contains(versions[name], prereleases=True):
            lacking.append(f"{name} is {versions[name]}, needed is {specifier}")
    return lacking


def differing(pins: Mapping[str, str], versions: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return installed and pinned version of every package that is installed in another than its pinned version.

    A build's own suffix (`2.13.0+cpu`) does not count.
    """
    return {
        name: (versions[name], pin)
        for name, pin in pins.items()
        if name in versions and versions[name].partition("+")[0] != pin.partition("+")[0]
    }
