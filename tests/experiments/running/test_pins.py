"""Versions are compared as pip compares them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from experiments.running.pins import HOME, differing, installed, normalized, pinned, required, unmet

CONSTRAINTS = """# a comment
Stable_Baselines3==2.9.2  # why
torch==2.13.0

# torchvision==0.28.0
"""

PYPROJECT = """
[project]
dependencies = ["dm_control>=1.0.49,<1.0.50", "imageio[ffmpeg]>=2.37", "metaworld==3.0.0", "tqdm"]
"""


def test_constraints_are_read_by_normalized_name(tmp_path: Path) -> None:
    assert pinned(tmp_path) is None
    (tmp_path / "constraints.txt").write_text(CONSTRAINTS)
    assert pinned(tmp_path) == {"stable-baselines3": "2.9.2", "torch": "2.13.0"}


def test_requirements_are_read_without_their_extras(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    assert required(tmp_path) == {
        "dm-control": ">=1.0.49,<1.0.50",
        "imageio": ">=2.37",
        "metaworld": "==3.0.0",
        "tqdm": "",
    }


def test_an_installed_package_says_what_it_needs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["mujoco<3.17,>=3.16", "imageio[ffmpeg]>=2.37", 'ruff>=0.11; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert required(tmp_path) == {"mujoco": "<3.17,>=3.16", "imageio": ">=2.37"}


def test_missing_and_unsuitable_packages_are_named() -> None:
    needs = {"mujoco": ">=3.16,<3.17", "numpy": ">=2.1", "torch": ">=2.11", "tqdm": ""}
    have = {"mujoco": "4.0.0", "torch": "2.13.0+cpu", "tqdm": "1"}
    assert unmet(needs, have) == ["mujoco is 4.0.0, needed is >=3.16,<3.17", "numpy is missing"]


def test_a_builds_suffix_is_no_difference_and_an_absent_package_neither() -> None:
    pins = {"torch": "2.13.0", "numpy": "2.4.6", "ruff": "0.17.5"}
    assert differing(pins, {"torch": "2.13.0+cpu", "numpy": "2.4.7"}) == {
        "numpy": ("2.4.7", "2.4.6")
    }


def test_this_checkouts_own_files_agree_with_each_other() -> None:
    pins = pinned()
    assert pins is not None
    needs = required()
    assert needs.keys() <= pins.keys(), "a dependency without a pin"
    assert unmet(needs, pins) == [], "a pin that pyproject.toml refuses"
    assert (HOME / "pyproject.toml").is_file()


def test_installed_versions_are_those_of_the_metadata() -> None:
    have = installed()
    for name in ("numpy", "dm_control", "stable_baselines3"):
        assert have[normalized(name)] == importlib.metadata.version(name)
