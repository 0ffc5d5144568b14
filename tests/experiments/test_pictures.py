"""The docs' sheets and the report's order know every distraction."""

import numpy as np

from experiments.pictures import NAMES, labeled, sheet
from experiments.reporting.scores import KNOWN_ORDER, in_order
from wrappers.distraction.presets import CLEAN, DISTRACTIONS


def test_every_distraction_is_shown_but_for_those_that_look_like_another() -> None:
    missing = set(DISTRACTIONS) - set(NAMES)
    assert {name for name in missing if not name.endswith("_static")} == {
        "dcs_0.1",
        "dcs_0.2",
        "dcs_0.3",
        "dcs_0.4",
    }


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
