"""The four packages come from one place, or one line says who is in the way."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.running.packages import PACKAGES, PackagesError, check_packages, package_folders

ROOT = Path(__file__).resolve().parents[3]


def test_the_packages_of_this_checkout_are_accepted() -> None:
    folders = package_folders()
    assert folders == {name: ROOT / name for name in PACKAGES}
    check_packages()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_from_elsewhere_is_refused_with_its_folder(name: str, tmp_path: Path) -> None:
    folders = package_folders() | {name: tmp_path / name}
    with pytest.raises(PackagesError, match=f"package '{name}' comes from '{tmp_path / name}'"):
        check_packages(folders)
    with pytest.raises(PackagesError, match=f"package '{name}'"):
        check_packages(package_folders() | {name: None})


def test_the_distribution_in_the_way_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = {"agents": ["sightline", "openai-agents"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    with pytest.raises(PackagesError, match="comes from distribution 'openai-agents'"):
        check_packages(package_folders() | {"agents": tmp_path})


@pytest.mark.parametrize("name", ["agents", "envs", "wrappers"])
def test_a_foreign_package_on_the_path_stops_a_command_with_one_line(
    name: str, tmp_path: Path
) -> None:
    # Nothing of ours is in it: a command that imported it first would end in an ImportError.
    stranger = tmp_path / name
    stranger.mkdir()
    (stranger / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    child = subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", "nowhere"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: package '{name}' comes from '{stranger}'")
    assert child.stderr.count("\n") == 1
