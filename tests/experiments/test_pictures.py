"""The docs' sheets and the report's order know every distraction."""

import numpy as np
import pytest

from experiments import pictures
from experiments.pictures import labeled, sheet
from experiments.reporting.scores import KNOWN_ORDER, in_order
from wrappers.distraction import presets
from wrappers.distraction.presets import CLEAN, DISTRACTIONS


def test_every_distraction_is_shown_but_for_those_that_look_like_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[tuple[str, int]] = []

    def look(task: str, size: int, name: str, quality: str, steps: int) -> np.ndarray:
        if task == pictures.TASKS[0]:
            shown.append((name, steps))
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(pictures, "look", look)
    drawn = pictures.distraction_sheet(96)
    height, width, _ = drawn.shape
    assert (width, height) == (8 * 96, 4 * (34 + 4 * 96)), "bands are of one width"
    titles = drawn.reshape(4, 34 + 4 * 96, 8, 96, 3)[:, :34] < 128
    assert not titles[:, :, :, [0, -1]].any(), "no title reaches into the next column"
    names = {name for name, _ in shown}
    missing = set(DISTRACTIONS) - names
    assert {name for name in missing if not name.endswith("_static")} == set(pictures.SAME)
    levels = presets.SUITE_LEVELS
    for alike, named in zip(pictures.SAME, ("easy", "medium", "hard"), strict=True):
        assert levels[alike.removeprefix("dcs_")] == levels[named]
    for name in ("dcs_medium", "dcs_medium_static"):
        assert len([step for other, step in shown if other == name]) >= 2, "does it move?"


def test_what_is_static_looks_the_same_later_and_what_is_not_does_not() -> None:
    """Of the frame, what the arm does not cover: the background."""
    for name, still in (("dcs_medium_static", True), ("dcs_medium", False)):
        now, later = (
            pictures.look("toy/reach", 24, name, "reference", steps).astype(int)
            for steps in (5, 30)
        )
        same = (now == later).all(-1).mean()
        assert same > 0.5 if still else same < 0.5


def test_names_stand_above_their_columns() -> None:
    black = np.zeros((40, 96, 3), np.uint8)
    rows = [[black] * 3] * 2
    assert (sheet(rows) == 0).all()
    assert sheet(rows).shape == (80, 288, 3)
    band = labeled(rows, ("clean", "", "color_hard+camera_easy"))[:-80]
    ink = (band < 128).any(-1)
    assert ink[:, :96].any()
    assert not ink[:, 96:192].any()
    assert ink[:, 192:].sum() > 2 * ink[:, :96].sum()
    assert not ink[[0, -1]].any(), "two lines fit"
    assert not ink[:, [0, -1]].any()


def test_reports_put_every_distraction_in_its_place() -> None:
    assert set(KNOWN_ORDER) == {CLEAN, *DISTRACTIONS}
    assert len(KNOWN_ORDER) == len(DISTRACTIONS) + 1
    shuffled = {"a+b", "dcs_hard", "video_easy", "clean", "dcs_easy", "camera_easy", "dcs_0.15"}
    assert in_order(shuffled) == [
        "clean", "video_easy", "camera_easy", "dcs_easy", "dcs_0.15", "dcs_hard", "a+b",
    ]  # fmt: skip
