"""Fixtures of the report's tests."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from experiments.reporting import plots, plots_across
from tests.experiments.run_folders import MakeRun, run_maker


@pytest.fixture
def drawn() -> None:
    """Ask for real figures; other tests of reports get a pixel each, which saves a second."""


@pytest.fixture
def make_run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeRun:
    """Return a function that writes one run folder into tmp_path/runs."""
    if "drawn" not in request.fixturenames:
        pixel = io.BytesIO()
        Image.new("L", (1, 1)).save(pixel, "png")
        for module in (plots, plots_across):
            monkeypatch.setattr(module, "png", lambda figure: pixel.getvalue())
    return run_maker(tmp_path / "runs")


@pytest.fixture
def two_agents(make_run: MakeRun, tmp_path: Path) -> Path:
    """Return a folder of 2 agents x 3 seeds: sgqn learned, sac stayed at random's level."""
    for seed, clean, hard in ((1, 800, 600), (2, 900, 630), (3, 850, 300)):
        make_run("sgqn", seed, clean=[clean - 10.0, clean + 10.0], hard=[hard - 50.0, hard + 50.0])
        make_run("sac", seed, clean=[20.0, 21.0 + seed], hard=[20.0, 20.0])
    return tmp_path / "runs"
