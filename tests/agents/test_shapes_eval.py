"""ShapesEval: drawn truth is right, everything else is wrong, strict and graded agree."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.core.errors import UserError
from agents.generative_models.drawing_eval import evaluate_drawings, text_verdict
from agents.generative_models.drawings import DrawingSettings, draw, make_drawings, render_shapes
from agents.generative_models.glyphs import edit_distance, read_text
from agents.generative_models.scenes import (
    COLORS,
    SHAPES,
    Group,
    Scene,
    parse_prompt,
    split_scenes,
)
from agents.generative_models.shapes_eval import OTHER, Thing, evaluate, find_things, judge


def drawings(size=32, pictures=400, kinds=("single", "mixture", "relation"), seed=0):
    data = make_drawings(DrawingSettings(size=size, pictures=pictures, kinds=kinds, seed=seed))
    return data.images.astype(np.float32) / 255, [data.prompts[i] for i in data.prompt]


@pytest.mark.parametrize("size", [24, 32, 64])
def test_drawn_truth_is_right(size):
    images, prompts = drawings(size)
    verdicts = evaluate(images, prompts)
    assert all(verdict.strict == 1 for verdict in verdicts)
    assert all(verdict.graded == 1 for verdict in verdicts)


def test_drawn_truth_is_right_under_some_noise():
    images, prompts = drawings()
    noisy = images + np.random.default_rng(0).normal(0, 0.05, images.shape)
    assert np.mean([v.strict for v in evaluate(noisy.clip(0, 1), prompts)]) > 0.97


def test_held_out_combinations_are_read_as_well():
    scenes = [
        s for kind in ("single", "mixture", "relation") for s in split_scenes(kind, held_out=True)
    ]
    images = draw(scenes[::3], 32, np.random.default_rng(0)) / np.float32(255)
    assert all(v.strict for v in evaluate(images, [s.prompt for s in scenes[::3]]))


def _entails(drawn: Scene, asked: Scene) -> bool:
    """Whether a picture of one scene surely shows another: the same, with less said of it."""
    if drawn.meaning == asked.meaning:
        return True
    if len(drawn.groups) != len(asked.groups) or asked.relation:
        return False
    free = [Scene(drawn.groups), Scene(drawn.groups[::-1])]
    if asked.meaning in (free[0].meaning, free[1].meaning):
        return True
    if len(drawn.groups) == 2:
        return False
    (d,), (a,) = drawn.groups, asked.groups
    same = (d.count, d.color, d.shape) == (a.count, a.color, a.shape)
    return same and a.size in (None, d.size) and a.place in (None, d.place)


def test_other_prompts_are_wrong():
    """Confusion: every picture against prompts of others; right ones are those that the picture may well show."""
    images, prompts = drawings(pictures=300)
    scenes = [parse_prompt(prompt) for prompt in prompts]
    wrong = right = 0
    for shift in range(1, 12):
        verdicts = evaluate(images, prompts[shift:] + prompts[:shift])
        for index, verdict in enumerate(verdicts):
            asked, drawn = scenes[(index + shift) % len(scenes)], scenes[index]
            if _entails(drawn, asked):
                continue
            compatible = _compatible(drawn, asked)
            if verdict.strict:
                assert compatible, (drawn.prompt, asked.prompt)
                right += 1
            else:
                assert verdict.graded < 1
                wrong += 1
    assert wrong > 100 * max(right, 1)


def _compatible(drawn: Scene, asked: Scene) -> bool:
    """Whether a picture of one scene can show the other: number, colors and shapes of their things are the same."""

    def inventory(scene):
        return sorted((g.color, g.shape) for g in scene.groups for _ in range(g.count))

    return inventory(drawn) == inventory(asked)


PALETTE = list(COLORS.values())


def picture(*things, size=32, background=0.04):
    """Draw (color, shape, x, y, radius) in pixels of 32, without going through scenes."""
    columns = list(zip(*things, strict=True))
    return render_shapes(
        size,
        np.full((1, 3), background),
        np.zeros(len(things), int),
        np.array([SHAPES.index(s) for s in columns[1]]),
        np.array([columns[2], columns[3]], float).T,
        np.array(columns[4], float),
        np.array([COLORS[c] for c in columns[0]]),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_one_thing_is_seen_where_it_is(color, shape):
    rng = np.random.default_rng(0)
    for radius in (3.0, 3.5, 5.5, 6.4):
        x, y = rng.uniform(8, 24, 2)
        (things,) = find_things(picture((color, shape, x, y, radius)))
        (thing,) = things
        size = "large" if radius > 5 else "small"
        assert (thing.color, thing.shape, thing.size) == (color, shape, size)
        assert thing.x * 32 == pytest.approx(x, abs=0.25)
        assert thing.y * 32 == pytest.approx(y, abs=0.35)


def test_touching_things_of_two_colors_are_two():
    image = picture(("red", "square", 10, 16, 4), ("blue", "square", 18, 16, 4))
    assert [t.color for t in find_things(image)[0]] == ["red", "blue"]


def test_shapes_that_are_none_of_ours():
    image = np.full((1, 3, 32, 32), 0.04, np.float32)
    image[0, 0, 15:17, 4:28] = 0.9  # a bar
    (thing,) = find_things(image)[0]
    assert (thing.color, thing.shape) == ("red", OTHER)
    image[0, :, 15:17, 4:28] = np.array([0.04, 0.9, 0.9], np.float32)[:, None, None]  # a cyan one
    (thing,) = find_things(image)[0]
    assert thing.color == OTHER


def test_crumbs_count_as_a_thing_when_there_are_many():
    image = picture(("red", "circle", 16, 16, 6))
    prompts = ["a red circle"]
    image[0, :, 2, 2] = 0.9
    assert evaluate(image, prompts)[0].strict == 1
    image[0, :, 2, 2:30:3] = 0.9
    assert evaluate(image, prompts)[0].strict == 0


@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
def test_empty_pictures_are_wrong(fill):
    _, prompts = drawings(pictures=50)
    image = np.full((50, 3, 32, 32), fill, np.float32)
    assert not any(verdict.strict for verdict in evaluate(image, prompts))


def test_noise_is_wrong():
    _, prompts = drawings(pictures=50)
    noise = np.random.default_rng(0).random((50, 3, 32, 32)).astype(np.float32)
    verdicts = evaluate(noise, prompts)
    assert not any(verdict.strict for verdict in verdicts)
    assert np.mean([verdict.graded for verdict in verdicts]) < 0.2


def test_a_picture_does_not_depend_on_those_beside_it():
    images, prompts = drawings(pictures=40)
    together = evaluate(images, prompts[::-1])
    for index in range(40):
        alone = evaluate(images[[index]], [prompts[::-1][index]])[0]
        assert alone == together[index]


# ----------------------------------------------------------------------------------------- judging

RED = Thing("red", "circle", "small", 0.2, 0.5)
BLUE = Thing("blue", "square", "large", 0.7, 0.5)


@pytest.mark.parametrize(
    ("prompt", "things", "aspects"),
    [
        ("a red circle", [RED], {"number": 1, "color": 1, "shape": 1, "binding": 1}),
        ("two red circles", [RED], {"number": 0.5, "color": 0.5, "shape": 0.5, "binding": 0.5}),
        ("a red circle", [RED, BLUE], {"number": 0, "color": 0.5, "shape": 0.5, "binding": 0.5}),
        ("a red circle", [], {"number": 0, "color": 0, "shape": 0, "binding": 0}),
        (
            "a large red circle on the right",
            [RED],
            {"number": 1, "color": 1, "shape": 1, "size": 0, "binding": 0, "place": 0},
        ),
        (
            "a small red circle on the left",
            [RED],
            {"number": 1, "color": 1, "shape": 1, "size": 1, "binding": 1, "place": 1},
        ),
        (
            "a red circle left of a blue square",
            [RED, BLUE],
            {"number": 1, "color": 1, "shape": 1, "binding": 1, "relation": 1},
        ),
        (
            "a red circle above a blue square",
            [RED, BLUE],
            {"number": 1, "color": 1, "shape": 1, "binding": 1, "relation": 0},
        ),
        (
            "a red square left of a blue circle",  # colors and shapes are there, but not together
            [RED, BLUE],
            {"number": 1, "color": 1, "shape": 1, "binding": 0, "relation": 0},
        ),
        (
            "a red circle and two blue squares",
            [RED, BLUE, BLUE, BLUE],
            {"number": 2 / 3, "color": 0.75, "shape": 0.75, "binding": 0.75},
        ),
    ],
)
def test_aspects_by_hand(prompt, things, aspects):
    verdict = judge(parse_prompt(prompt), things)
    assert verdict.aspects == pytest.approx(aspects)
    assert verdict.graded == pytest.approx(sum(aspects.values()) / len(aspects))
    assert verdict.strict == float(min(aspects.values()) == 1)


THINGS = st.builds(
    Thing,
    st.sampled_from([*COLORS, OTHER]),
    st.sampled_from([*SHAPES, OTHER]),
    st.sampled_from(["small", "large"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
SCENES = [
    s for kind in ("single", "mixture", "relation") for s in split_scenes(kind, held_out=True)
]


@given(st.sampled_from(SCENES), st.lists(THINGS, max_size=6))
def test_graded_is_one_exactly_where_strict_is(scene, things):
    verdict = judge(scene, things)
    assert all(0 <= value <= 1 for value in verdict.aspects.values())
    assert (verdict.graded == 1) == (verdict.strict == 1)


def test_text_is_refused():
    with pytest.raises(UserError, match="use the reward glyphs"):
        judge(Scene(text="A"), [])
    with pytest.raises(UserError, match="is no prompt for a drawing"):
        evaluate(np.zeros((1, 3, 32, 32), np.float32), ["a dog"])


# ------------------------------------------------------------------------------------------ glyphs


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
def test_drawn_text_is_read(noise):
    images, prompts = drawings(pictures=200, kinds=("text",))
    noisy = images + np.random.default_rng(0).normal(0, noise, images.shape)
    read = read_text(torch.from_numpy(noisy.clip(0, 1)))
    asked = [parse_prompt(prompt).text for prompt in prompts]
    assert np.mean([a == b for a, b in zip(asked, read, strict=True)]) > 0.99


def test_nothing_is_read_where_nothing_is_written():
    assert read_text(torch.zeros(1, 3, 32, 32)) == [""]
    noise = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert read_text(noise) == [""] * 20


def test_part_of_a_letter_is_not_the_letter():
    images, prompts = drawings(pictures=60, kinds=("text",))
    cut = images.copy()
    for image in cut:
        ink = np.nonzero(image.max(0).max(1) > 0.5)[0]
        image[:, ink[len(ink) // 2] :] = 0.04  # the lower half is gone
    asked = [parse_prompt(prompt).text for prompt in prompts]
    assert (
        np.mean([a == b for a, b in zip(asked, read_text(torch.from_numpy(cut)), strict=True)])
        < 0.3
    )


@given(st.text("AB", max_size=5), st.text("AB", max_size=5))
def test_edit_distance_is_that_of_its_recursion(one, other):
    def plain(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))

    assert edit_distance(one, other) == plain(one, other)


def test_text_verdicts():
    assert text_verdict("B7", "B7").strict == 1
    assert text_verdict("B7", "BX").graded == 0.5
    assert text_verdict("B7", "").graded == 0
    assert text_verdict("B", "BBB").graded == pytest.approx(1 / 3)


def test_all_kinds_of_drawings_in_one_batch():
    images, prompts = drawings(pictures=120, kinds=("text", "single", "relation"))
    verdicts = evaluate_drawings(torch.from_numpy(images), prompts)
    assert all(verdict.strict for verdict in verdicts)
    assert {"text"} in [set(v.aspects) for v in verdicts]
    shuffled = evaluate_drawings(torch.from_numpy(images), prompts[1:] + prompts[:1])
    assert np.mean([v.strict for v in shuffled]) < 0.05


def test_groups_say_their_numbers():
    assert Group(3, "red", "circle").words == "three red circles"
