"""The page of a data set: every shown episode with its pictures, film, return and success."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from experiments.data.page import HEIGHT, PICTURES, Shown, first_solved, strip, write_page

ABOUT = {
    "source": "expert",
    "settings": {"id": "toy/reach", "size": 24, "distraction": None, "split": "train"},
}


def test_the_strip_is_the_newest_frames_from_first_to_last_evenly() -> None:
    pictures = np.zeros((15, 6, 24, 20), np.uint8)
    pictures[:, 3:] = np.arange(15, dtype=np.uint8)[:, None, None, None]
    pictures[:, 3, 0, 0] = 200  # red of the upper left corner
    shown = strip(pictures)
    assert shown.shape == (HEIGHT, PICTURES * 20 * HEIGHT // 24, 3)
    own = shown.reshape(HEIGHT, PICTURES, -1, 3)
    assert own[-1, :, -1, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert (own[:4, :, :4] == [200, 0, 0]).all(axis=-1)[:, 0].all()
    assert (own[0, :, 0, 0] == 200).all()


def test_a_short_episode_repeats_pictures() -> None:
    assert strip(np.zeros((2, 3, 96, 96), np.uint8)).shape == (96, PICTURES * 96, 3)


@pytest.mark.parametrize(
    ("success", "steps"), [(None, None), ([0, 0], None), ([0, 0, 1, 0], 2), ([1.0], 0)]
)
def test_an_episode_is_solved_when_it_first_was(success: list | None, steps: int | None) -> None:
    assert first_solved(success) == steps


def test_the_page_shows_every_episode_and_what_they_are_of(tmp_path: Path) -> None:
    picture = np.arange(96 * 8 * 96 * 3, dtype=np.uint8).reshape(96, 8 * 96, 3)
    first = Shown(0, 7, 40, 12.34, 31, True, picture, "episode-0.mp4", "episode-0.png")
    second = replace(first, number=1, total=4.0, solved=None, film="episode-1.mp4")
    file = tmp_path / "index.html"
    write_page(file, "reach/<expert>-v0", ABOUT, 5, [first, second])
    page = file.read_text()
    assert "reach/&lt;expert&gt;-v0" in page
    assert "<expert>" not in page
    assert "episode 0: 40 agent steps, return 12.3, solved after 31 (seed 7)" in page
    assert "episode 1: 40 agent steps, return 4.0, not solved" in page
    for said in ("2 of 5 shown", "1 of 2", "toy/reach", "clean", "expert", "8.2 ± 4.2"):
        assert f"<td>{said}</td>" in page
    assert page.count("<video") == 2
    (data, _) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    np.testing.assert_array_equal(iio.imread(base64.b64decode(data)), picture)


def test_states_alone_have_plots_and_no_word_of_success_that_nobody_told(tmp_path: Path) -> None:
    shown = Shown(0, None, 40, 1.0, None, False, None, None, "episode-0.png")
    file = tmp_path / "index.html"
    write_page(file, "balance/states-v0", ABOUT | {"rerendered_from": "balance/a-v0"}, 1, [shown])
    page = file.read_text()
    assert "<video" not in page
    assert "data:image" not in page
    assert "solved" not in page
    assert "<td>balance/a-v0</td>" in page
    assert 'src="episode-0.png"' in page
