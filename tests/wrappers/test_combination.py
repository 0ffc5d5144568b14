"""Combined distractions, lists of them, and the suites that are made of others."""

import numpy as np
import pytest

from envs.toy import Reach
from envs.toy_view import ToyView
from wrappers.distraction.camera import RandomCamera
from wrappers.distraction.color import ColorWalk, RandomColors
from wrappers.distraction.combination import Combination, OneOf
from wrappers.distraction.presets import DISTRACTIONS, make_distraction, parse_name
from wrappers.distraction.textures import ProceduralVideo, ProceduralVideos
from wrappers.distraction.video import SKY, SURROUNDINGS, VideoBackground, composite
from wrappers.errors import UserError
from wrappers.view import undress


def view_of(seed: int = 0, size: int = 24) -> ToyView:
    env = Reach()
    env.reset(seed=seed)
    return env.view(size, size)


def made(name: str, **keywords):
    distraction = make_distraction(name, **keywords)
    assert distraction is not None
    return distraction


# All at once -------------------------------------------------------------------------------------


def test_a_combination_is_what_composing_by_hand_gives() -> None:
    view, by_hand = view_of(), view_of()
    combined = made("noise_easy+video_easy+camera_hard+color_hard", split="test")
    combined.reset(view, np.random.default_rng(7))
    parts = [
        made(n, split="test") for n in ("color_hard", "camera_hard", "video_easy", "noise_easy")
    ]
    seeds = np.random.default_rng(7)
    for part in parts:
        part.reset(by_hand, np.random.default_rng(seeds.integers(2**63)))
    for _ in range(3):
        # Colors and camera act on the view, the video replaces its sky, the noise comes last.
        expected = parts[3].touch_up(parts[2].frame(by_hand))
        assert (combined.frame(view) == expected).all()
        assert (combined.frame(view) == expected).all(), "looking twice changes nothing"
        combined.advance(view)
        for part in parts:
            part.advance(by_hand)


def test_the_order_of_names_changes_nothing() -> None:
    pictures = []
    for name in ("light_hard+textures+objects_easy", "objects_easy+light_hard+textures"):
        view, distraction = view_of(), made(name)
        distraction.reset(view, np.random.default_rng(0))
        pictures.append(distraction.frame(view))
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "color_hard+color_easy",
            "color_hard and color_easy cannot be combined: both change the colors",
        ),
        ("video_easy+video_hard", "both change the background; leave one of them out"),
        ("textures+objects_hard", "both change the textures"),
        ("dcs_easy+camera_easy", "dcs_easy and camera_easy cannot .* both change the camera"),
        ("randomized+noise_easy", "both change the noise"),
        ("color_hard+color_hard", "color_hard is given twice"),
        ("color_hrad+video_easy", "unknown distraction 'color_hrad'; did you mean color_hard"),
        ("clean+video_easy", "unknown distraction 'clean'"),
        ("clean,color_hrad", "unknown distraction 'color_hrad'; did you mean color_hard"),
        ("clean,video_easy+vdeo_hard", "unknown distraction 'vdeo_hard'; did you mean video_hard"),
        ("color_hard,", "unknown distraction ''"),
        ("dcs_mediun", "unknown distraction 'dcs_mediun'; did you mean dcs_medium"),
        ("dcs_0.12", "unknown distraction 'dcs_0.12'; did you mean dcs_0.2 or dcs_0.1"),
        ("", "unknown distraction ''"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_distraction(name)
    assert "\n" not in str(caught.value)


def test_names_are_parsed() -> None:
    assert parse_name("clean") == [[]]
    assert parse_name("video_easy") == [["video_easy"]]
    assert parse_name("clean,color_hard+noise_easy") == [
        [],
        ["color_hard", "noise_easy"],
    ]


# One per episode ---------------------------------------------------------------------------------


def test_every_member_of_a_list_is_drawn_as_often_and_leaves_nothing_behind() -> None:
    view, rng = view_of(), np.random.default_rng(0)
    clean = view.render()
    names = ("clean", "color_hard", "camera_hard+textures", "light_hard", "objects_hard")
    listed = made(",".join(names))
    assert isinstance(listed, OneOf)
    counts = dict.fromkeys(names, 0)
    for _ in range(400):
        listed.reset(view, rng)
        name = listed.get_state()["name"]
        counts[name] += 1
        assert ((listed.frame(view) == clean).all()) == (name == "clean")
        if name == "camera_hard+textures":
            assert (listed.frame(view)[0, 0] == clean[0, 0]).all(), "colors are the view's own"
    assert min(counts.values()) > 50
    undress(view)
    assert (view.render() == clean).all()


def test_a_member_is_what_it_would_be_alone() -> None:
    view, alone_view = view_of(), view_of()
    listed, rng = made("clean,color_hard"), np.random.default_rng(4)
    for _ in range(6):
        twin = np.random.default_rng(0)
        twin.bit_generator.state = rng.bit_generator.state
        listed.reset(view, rng)
        twin.integers(2)
        if listed.get_state()["name"] == "color_hard":
            alone = made("color_hard")
            alone.reset(alone_view, twin)
            assert (listed.frame(view) == alone.frame(alone_view)).all()


# The Distracting Control Suite -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale", "videos"),
    [
        ("dcs_easy", 0.1, 4),
        ("dcs_medium", 0.2, 8),
        ("dcs_hard", 0.3, 60),
        ("dcs_0.025", 0.025, 2),
        ("dcs_0.05", 0.05, 2),
        ("dcs_0.15", 0.15, 6),
        ("dcs_0.5", 0.5, 60),
    ],
)
def test_levels_mean_what_their_authors_made_them(name: str, scale: float, videos: int) -> None:
    for suffix, steps in (("", 4), ("_static", 0)):
        suite = made(name + suffix, control_steps=4, floor_opacity=0.5)
        assert isinstance(suite, Combination)
        camera, colors = suite.parts["camera"], suite.parts["colors"]
        background = suite.parts["background"]
        assert isinstance(camera, RandomCamera)
        assert isinstance(colors, ColorWalk)
        assert isinstance(background, VideoBackground)
        assert (camera.scale, camera.control_steps) == (scale, steps)
        assert (colors.scale, colors.control_steps) == (scale, steps)
        assert (background.count, background.steps) == (videos, steps)
        assert (background.hidden, background.floor_opacity) == (SKY, 0.5)


def test_the_suite_draws_from_as_many_videos_as_it_says() -> None:
    source, rng = ProceduralVideos(), np.random.default_rng(0)
    names = {split: {source.draw(rng, split, 4) for _ in range(200)} for split in ("train", "test")}
    assert {split: len(found) for split, found in names.items()} == {"train": 4, "test": 4}
    assert not names["train"] & names["test"]
    more = {source.draw(rng, "train", 6) for _ in range(200)}
    assert more > names["train"], "the first ones are the same"


@pytest.mark.parametrize("opacity", [0.0, 0.3, 0.5, 1.0])
def test_the_video_shines_through_the_floor_as_far_as_it_is_not_opaque(opacity: float) -> None:
    view = view_of(3)
    clean, layers = view.render(), view.render_layers(SURROUNDINGS)
    video = VideoBackground(ProceduralVideos(), SKY, floor_opacity=opacity)
    video.reset(view, np.random.default_rng(0))
    picture, state = video.frame(view), video.get_state()
    frame = ProceduralVideo(int(state["name"]), 24, 24).frame(int(state["start"] * 10_000))
    background = composite(layers, frame)
    floor = (layers.coverage == 1) & (view.render_layers(SKY).coverage == 0)
    expected = opacity * clean[floor] + (1 - opacity) * background[floor].astype(float)
    assert np.abs(picture[floor] - expected).max() <= 1.5
    rest = ~floor & ((layers.coverage == 1) | (layers.coverage == 0))
    assert (picture[rest] == background[rest]).all()


def test_dynamic_parts_go_on_by_control_steps() -> None:
    for steps in (1, 4):
        view, suite = view_of(), made("dcs_hard", control_steps=steps)
        suite.reset(view, np.random.default_rng(0))
        before = suite.get_state()
        suite.advance(view)
        after = suite.get_state()
        assert after["background"]["step"] - before["background"]["step"] == steps
        assert (after["camera"]["pose"] != before["camera"]["pose"]).any()
        assert (after["colors"]["colors"] != before["colors"]["colors"]).any()


# Everything --------------------------------------------------------------------------------------


def test_randomized_draws_everything_in_every_episode() -> None:
    randomized = made("randomized")
    assert randomized.writes == {
        "colors", "objects", "textures", "lights", "camera", "background", "noise",
    }  # fmt: skip
    view, rng = view_of(), np.random.default_rng(0)
    seen: dict[str, set[str]] = {}
    for _ in range(5):
        randomized.reset(view, rng)
        for part, state in randomized.get_state().items():
            seen.setdefault(part, set()).add(repr(state))
    assert len(seen) == 7
    assert all(len(states) == 5 for states in seen.values())


@pytest.mark.parametrize("name", [*DISTRACTIONS, "clean,dcs_easy,noise_easy+color_hard"])
def test_a_state_goes_on_exactly_on_another_view(name: str) -> None:
    view, other = view_of(), view_of()
    first, second = made(name, control_steps=2), made(name, control_steps=2)
    second.reset(other, np.random.default_rng(99))
    rng = np.random.default_rng(3)
    for _ in range(3):
        first.reset(view, rng)
        first.advance(view)
        second.set_state(other, first.get_state())
        for _ in range(3):
            assert (first.frame(view) == second.frame(other)).all()
            first.advance(view)
            second.advance(other)


def test_colors_of_a_part_are_of_the_asked_split() -> None:
    combined = made("color_hard+noise_easy", split="validation")
    assert isinstance(combined, Combination)
    part = combined.parts["color_hard"]
    assert isinstance(part, RandomColors)
    assert part.split == "validation"
