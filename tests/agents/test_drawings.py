"""Drawings: sentences are read back, held-out combinations stay unseen, pictures are right, the cache holds."""

import itertools

import numpy as np
import pytest

from agents.core.errors import UserError
from agents.generative_models.drawings import (
    GAP,
    RADII,
    Drawings,
    DrawingSettings,
    draw,
    glyph_scale,
    load_drawings,
    longest_text,
    make_drawings,
    render_shapes,
    shape_distance,
)
from agents.generative_models.font import CHARACTERS, GLYPHS
from agents.generative_models.scenes import (
    COLORS,
    KINDS,
    SHAPES,
    Group,
    Scene,
    draw_scenes,
    parse_prompt,
    scenes,
    split_scenes,
)
from agents.generative_models.text import Vocabulary, split_prompt

SMALL = DrawingSettings(size=32, pictures=300, kinds=KINDS)


# -------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize("kind", KINDS)
def test_every_sentence_is_read_back(kind):
    every = list(scenes(kind))
    assert len({scene.prompt for scene in every}) == len(every)
    for scene in every:
        assert parse_prompt(scene.prompt) == scene
        assert scene.kind == kind


@pytest.mark.parametrize(
    "prompt",
    ["", "red circle", "two red circle", "a red circles", "a red circle at the left", "five red circles", 'text "A"'],
)  # fmt: skip
def test_other_sentences_are_refused(prompt):
    with pytest.raises(UserError, match="is no prompt for a drawing; write one like"):
        parse_prompt(prompt)


def test_some_sentences_word_for_word():
    assert parse_prompt("two small red circles on the left") == Scene(
        (Group(2, "red", "circle", "small", "left"),)
    )
    assert parse_prompt("a red circle above a blue square") == Scene(
        (Group(1, "red", "circle"), Group(1, "blue", "square")), "top"
    )
    assert parse_prompt('the text "B7"') == Scene(text="B7")


# ------------------------------------------------------------------------------------------ split


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_meanings_are_never_in_training(kind):
    training = {scene.meaning for scene in split_scenes(kind, held_out=False)}
    held_out = {scene.meaning for scene in split_scenes(kind, held_out=True)}
    assert training.isdisjoint(held_out)
    assert training | held_out == {scene.meaning for scene in scenes(kind)}
    assert 0.08 < len(held_out) / (len(training) + len(held_out)) < 0.22


def test_two_ways_to_say_the_same_are_on_one_side():
    """Independent of `meaning`: sentences are turned around here word by word."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    held_out = {s.prompt for kind in KINDS for s in split_scenes(kind, held_out=True)}
    turned = 0
    for prompt in sorted(held_out):
        for joint, back in [*opposite.items(), ("and", "and")]:
            if f" {joint} " in prompt:
                one, other = prompt.split(f" {joint} ")
                assert f"{other} {back} {one}" in held_out
                turned += 1
    assert turned > 100


def test_drawn_pictures_never_show_a_held_out_combination():
    held_out = {s.meaning for kind in KINDS for s in split_scenes(kind, held_out=True)}
    shown = {parse_prompt(prompt).meaning for prompt in make_drawings(SMALL).prompts}
    assert shown.isdisjoint(held_out)


def test_every_word_is_seen_in_training():
    for kind in KINDS:
        words = {w for s in scenes(kind) for w in split_prompt(s.prompt)}
        seen = {w for s in split_scenes(kind, held_out=False) for w in split_prompt(s.prompt)}
        assert words == seen


def test_numbers_and_kinds_are_drawn_equally_often():
    rng = np.random.default_rng(0)
    chosen = draw_scenes(("single", "relation"), 4000, rng, held_out=False)
    kinds = [scene.kind for scene in chosen]
    assert abs(kinds.count("single") / 4000 - 0.5) < 0.04
    counts = [scene.count for scene in chosen if scene.kind == "single"]
    for number in range(1, 5):
        assert abs(counts.count(number) / len(counts) - 0.25) < 0.04


def test_unknown_kinds_name_the_nearest():
    with pytest.raises(UserError, match="unknown kind of drawing 'singel'; did you mean single"):
        DrawingSettings(kinds=("singel",))


@pytest.mark.parametrize(
    "settings", [{"size": 8}, {"pictures": 0}, {"held_out_share": 0.0}, {"kinds": ()}]
)
def test_settings_that_draw_nothing_are_refused(settings):
    with pytest.raises(UserError, match="give"):
        DrawingSettings(**settings)


# --------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_that_of_many_small_samples(shape, seed):
    """Against supersampling with 16 x 16 points a pixel of a shape's plain definition."""
    rng = np.random.default_rng(seed)
    x, y, radius = rng.uniform(8, 12), rng.uniform(8, 12), rng.uniform(3, 6.4)
    image = render_shapes(
        20,
        np.zeros((1, 3)),
        np.array([0]),
        np.array([SHAPES.index(shape)]),
        np.array([[x, y]]),
        np.array([radius]),
        np.ones((1, 3)),
    )[0, 0]
    points = (np.arange(20 * 16) + 0.5) / 16
    dx, dy = np.meshgrid(points - x, points - y)
    if shape == "circle":
        inside = dx**2 + dy**2 <= radius**2
    elif shape == "square":
        inside = (abs(dx) <= radius) & (abs(dy) <= radius)
    else:  # between the lines from the apex to the corners of the base
        inside = (dy <= radius) & (abs(dx) <= (dy + radius) / 2)
    sampled = inside.reshape(20, 16, 20, 16).mean((1, 3))
    # A distance is an exact coverage only along straight edges that are parallel to the pixels: corners differ.
    pixel, area = {"circle": (0.1, 0.02), "square": (0.3, 0.04), "triangle": (0.4, 0.09)}[shape]
    assert abs(image - sampled).max() < pixel
    assert abs(image.sum() - sampled.sum()) < area * sampled.sum()


def test_shapes_have_their_widths():
    for shape in SHAPES:
        line = np.linspace(-2, 2, 4001)
        u, v = np.meshgrid(line, line[::8])
        inside = shape_distance(u, v, np.ones(()), shape) <= 0
        columns, rows = np.nonzero(inside.any(0))[0], np.nonzero(inside.any(1))[0]
        assert line[columns[[0, -1]]] == pytest.approx([-1, 1], abs=0.005)
        assert line[::8][rows[[0, -1]]] == pytest.approx([-1, 1], abs=0.01)


def test_overlapping_order_does_not_matter_in_different_pictures():
    """Shapes of one call go into their own pictures, first things and second ones alike."""
    rng = np.random.default_rng(0)
    picture = np.array([0, 0, 1, 2, 2, 2])
    center = np.array([[6, 6], [24, 24], [16, 16], [6, 24], [24, 6], [24, 24]], float)
    shape, radius = rng.integers(3, size=6), rng.uniform(3, 4, 6)
    color, background = rng.random((6, 3)), rng.random((3, 3)) * 0.1
    together = render_shapes(32, background, picture, shape, center, radius, color)
    for index in range(3):
        own = picture == index
        alone = render_shapes(
            32, background[[index]], np.zeros(own.sum(), int), shape[own], center[own], radius[own], color[own]
        )  # fmt: skip
        np.testing.assert_allclose(together[index], alone[0], atol=1e-6)


def test_pictures_repeat_with_the_seed():
    one, other = make_drawings(SMALL), make_drawings(SMALL)
    assert np.array_equal(one.images, other.images)
    assert one.prompts == other.prompts
    different = make_drawings(DrawingSettings(size=32, pictures=300, kinds=KINDS, seed=1))
    assert not np.array_equal(one.images, different.images)


@pytest.mark.parametrize("size", [16, 24, 32, 64])
def test_letters_are_drawn_dot_by_dot(size):
    text = "B7"[: longest_text(size)]
    picture = draw([Scene(text=text)], size, np.random.default_rng(0))[0]
    bright = picture.max(0) > 100
    rows, columns = np.nonzero(bright)
    scale = glyph_scale(size)
    ink = bright[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    letters = [GLYPHS[CHARACTERS.index(c)] for c in text]
    gap = np.zeros((7, 1), bool)
    dots = np.concatenate(
        list(itertools.chain(*[(letter, gap) for letter in letters]))[:-1], axis=1
    )
    assert np.array_equal(ink, dots.repeat(scale, 0).repeat(scale, 1))


def test_letters_differ():
    assert len({glyph.tobytes() for glyph in GLYPHS}) == len(CHARACTERS) == 36


@pytest.mark.parametrize("text", ["ABC", "a", "?"])
def test_texts_that_do_not_fit_are_refused(text):
    with pytest.raises(UserError, match="cannot be written into 32 pixels"):
        draw([Scene(text=text)], 32, np.random.default_rng(0))


def test_things_keep_their_distance_and_their_edges():
    """Read from the pixels: between two things of one picture lies at least a pixel of background."""
    wanted = [s for s in split_scenes("single", held_out=False) if s.count == 4]
    pictures = draw(wanted, 32, np.random.default_rng(0)).max(1) > 60
    assert not pictures[:, 0].any() and not pictures[:, :, 0].any()  # noqa: PT018
    assert GAP * 32 > 2 * 0.5 + 1
    assert RADII["small"][1] < RADII["large"][0]


# ------------------------------------------------------------------------------------------ cache


def test_cache_is_used_and_follows_the_settings(tmp_path):
    first = load_drawings(SMALL, tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    again = load_drawings(SMALL, tmp_path)
    assert file.stat().st_mtime_ns == stamp
    _assert_same(first, again)
    _assert_same(first, make_drawings(SMALL))
    load_drawings(DrawingSettings(size=32, pictures=300, kinds=KINDS, seed=1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def _assert_same(one: Drawings, other: Drawings) -> None:
    assert np.array_equal(one.images, other.images)
    assert np.array_equal(one.prompt, other.prompt)
    assert one.prompts == other.prompts


def test_a_damaged_cache_is_drawn_anew(tmp_path):
    first = load_drawings(SMALL, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    _assert_same(first, load_drawings(SMALL, tmp_path))
    _assert_same(first, load_drawings(SMALL, tmp_path))
    assert len(list(tmp_path.iterdir())) == 1  # no leftovers


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"cannot keep drawings in .*SIGHTLINE_CACHE"):
        load_drawings(SMALL, blocked)


def test_colors_are_apart_in_hue():
    """ShapesEval tells colors by their hue: no two are nearer than twice the distance at which it stops."""
    from agents.generative_models.shapes_eval import FARTHEST_COLOR

    hues = [np.array(color) / max(color) for color in COLORS.values()]
    least = min(np.linalg.norm(a - b) for a, b in itertools.combinations(hues, 2))
    assert least > FARTHEST_COLOR


def test_vocabulary_of_the_prompts_reads_them_all():
    drawings = make_drawings(SMALL)
    words = Vocabulary.of(drawings.prompts)
    assert words.tokens(drawings.prompts).shape == (len(drawings.prompts), words.length)
