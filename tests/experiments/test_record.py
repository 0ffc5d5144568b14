"""A film shows what the agent saw, where it looked and what it earned, in the very episodes that are evaluated."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

import envs
from agents import Policy
from experiments import evaluate, record
from experiments.evaluate import evaluate_run
from experiments.evaluating.captions import LONGEST, Caption
from experiments.evaluating.rollouts import episode_seeds
from experiments.evaluating.videos import videos_of
from experiments.record import Moment, draw, episode, main, speed
from tests.experiments.helpers import train

STEPS = 9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train("sgqn", "toy/reach", folder, steps=16, episode_length=STEPS)


def moments(run: Path, seed: int, **settings: Any) -> list[Moment]:
    policy = Policy.load(run)
    with closing(envs.make(**{**policy.config["env"], **settings})) as env:
        return list(episode(policy, env, seed))


def test_a_film_has_a_picture_for_every_observation_and_a_line_for_each(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--distractions", "clean", "video_hard", "--episodes", "2", "--scale", "4"]
    assert main([*words, "--out", str(tmp_path / "films"), "--fps", "10"]) == 0
    names = sorted(file.name for file in (tmp_path / "films").iterdir())
    assert names == [f"{name}-{i}.mp4" for name in ("clean", "video_hard") for i in (1, 2)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    first = tmp_path / "films" / "clean-1.mp4"
    seen = moments(run, episode_seeds(0, 1)[0])
    assert lines[0] == f"clean: {STEPS} agent steps, return {seen[-1].total:.1f}, {first}"
    assert iio.immeta(first)["fps"] == 10
    film = iio.imread(first)
    assert len(film) == STEPS + 1
    for picture, moment in zip(film, seen, strict=True):
        panels = np.asarray(draw(moment)).repeat(4, axis=0).repeat(4, axis=1)
        assert picture.shape[1] == panels.shape[1] == 4 * 3 * 24
        bar = picture[panels.shape[0] :]
        assert bar.max() > 128, "the caption"
        difference = np.abs(picture[: len(panels)].astype(int) - panels)
        assert difference.mean() < 12, "a film is compressed, and no more than that"
    captions = [picture[4 * 24 :].astype(int) for picture in film]
    assert all(np.abs(a - b).max() > 64 for a, b in pairwise(captions)), "it counts"


def test_films_are_the_episodes_that_evaluate_counts(run: Path) -> None:
    file = evaluate_run(
        run, distractions=["video_hard"], episodes=3, num_envs=3, seed=5, workers=0, media=False
    )
    evaluated = json.loads(file.read_text())["results"]["video_hard"]["returns"]
    seeds = episode_seeds(5, 3)
    totals = [
        moments(run, seed, distraction="video_hard", split="test")[-1].total for seed in seeds
    ]
    # Singly and in batches the actions differ in their last bits (of bfloat16 where the CPU has it).
    np.testing.assert_allclose(totals, evaluated, rtol=1e-3)
    assert np.abs(np.subtract.outer(totals, totals))[np.triu_indices(3, 1)].min() > 0.1
    # Each environment begins with one of them, and goes on with episodes of its own.
    file = evaluate_run(
        run,
        distractions=["video_hard"],
        episodes=3,
        num_envs=2,
        seed=5,
        workers=0,
        media=False,
        name="two",
    )
    evaluated = json.loads(file.read_text())["results"]["video_hard"]["returns"]
    np.testing.assert_allclose(totals[:2], evaluated[:2], rtol=1e-3)
    assert not np.isclose(totals[2], evaluated, rtol=1e-3).any()


def test_moments_hold_what_the_agent_saw_looked_at_and_earned(run: Path) -> None:
    policy = Policy.load(run)
    seen = moments(run, 7)
    with closing(envs.make(**policy.config["env"])) as env:
        observation, _ = env.reset(seed=7)
        total, success = 0.0, False
        for number, moment in enumerate(seen):
            np.testing.assert_array_equal(moment.frame.transpose(2, 0, 1), observation[-3:])
            action = policy.act(observation)
            looked = policy.saliency(observation[None], action[None])
            assert looked is not None
            np.testing.assert_array_equal(moment.saliency, looked[0])
            assert (moment.step, moment.total, moment.success) == (number, total, success)
            observation, reward, _, _, info = env.step(action)
            total, success = total + reward, success or bool(info["success"])
            if number + 1 < len(seen):
                assert seen[number + 1].reward == reward


def test_an_agent_without_pixels_is_filmed_without_saliency(tmp_path: Path) -> None:
    run = train("sac", "toy/balance", tmp_path / "run", steps=14, observation="state",
                episode_length=5)  # fmt: skip
    assert main([str(run), "--distractions", "clean", "--scale", "2"]) == 0
    (film,) = (run / "films" / "step-000000014").iterdir()
    assert iio.imread(film).shape[0] == 6
    seen = moments(run, 0)
    assert seen[0].saliency is None
    np.testing.assert_array_equal(draw(seen[0]), seen[0].frame)


def test_a_film_runs_at_the_tasks_own_speed() -> None:
    with closing(envs.make("toy/reach", action_repeat=4)) as env:
        assert speed(env) == 20 / 4


def test_an_existing_film_is_kept_unless_overwriting_is_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--distractions", "clean", "color_hard", "--out", str(tmp_path)]
    (tmp_path / "color_hard-1.mp4").write_text("precious")
    assert main(words) == 2
    err = capsys.readouterr().err
    assert (
        err
        == f"error: '{tmp_path / 'color_hard-1.mp4'}' exists; use --overwrite, or another --out\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["color_hard-1.mp4"]
    assert main([*words, "--overwrite"]) == 0
    assert len(iio.imread(tmp_path / "color_hard-1.mp4")) == STEPS + 1


def test_a_film_that_fails_midway_leaves_the_old_one_and_no_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("midway")

    (tmp_path / "clean-1.mp4").write_text("precious")
    monkeypatch.setattr(record, "describe", fail)
    with pytest.raises(RuntimeError, match="midway"):
        main([str(run), "--distractions", "clean", "--out", str(tmp_path), "--overwrite"])
    assert [file.name for file in tmp_path.iterdir()] == ["clean-1.mp4"]
    assert (tmp_path / "clean-1.mp4").read_text() == "precious"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--distractions clean video_hrad", "did you mean video_hard"),
        ("--checkpoint bst", "has no checkpoint bst"),
        ("--episodes 0", "--episodes and --scale must be at least 1"),
        ("--scale 0", "--episodes and --scale must be at least 1"),
        ("--fps 0", "--fps is 0.0; give a number above 0"),
        ("--fps nan", "--fps is nan"),
        ("--seed -1", "seed is -1"),
        ("--device gpu", "device 'gpu' is not available"),
        ("--distraction clean", "did you mean --distractions"),
        ("--videos missing --distractions video_easy", "missing'"),
        ("--import no_such_module_here", "there is no module 'no_such_module_here'"),
    ],
)
def test_a_bad_flag_is_one_line_and_makes_no_folder(
    flags: str, said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--out", str(tmp_path / "new"), *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_an_out_that_is_a_file_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main([str(run), "--distractions", "clean", "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith(f"error: --out {out}: cannot create this folder")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("flags", "own", "played"),
    [
        ([], "/my/videos", "/my/videos"),
        ([], None, None),
        (["--videos", "procedural"], "/my/videos", None),
        (["--videos", "/others"], "/my/videos", "/others"),
    ],
)
def test_films_and_evaluations_play_the_same_videos(
    flags: list[str], own: str | None, played: str | None
) -> None:
    for command in (record, evaluate):
        given = command.parser().parse_args(["RUN", *flags])
        assert videos_of(given.videos, {"videos": own}) == played
        assert "[the run's own]" in " ".join(command.parser().format_help().split())


def test_procedural_videos_are_filmed(run: Path, tmp_path: Path) -> None:
    words = [str(run), "--distractions", "video_easy", "--videos", "procedural"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "video_easy-1.mp4").is_file()


def test_a_long_list_of_distractions_is_filmed_under_a_short_name(tmp_path: Path) -> None:
    name = ",".join(["color_hard+camera_easy"] * 20)
    [file] = record.film_files(tmp_path / "new", [name], 1, overwrite=False).values()
    assert len(file.name) < 130
    file.write_text("a film")


# ------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize("width", [97, 576, 1000])
def test_captions_stand_below_and_sides_are_even(width: int) -> None:
    picture = np.full((33, width, 3), 200, np.uint8)
    caption = Caption(width)
    above = caption.below(picture, "step 1")
    assert above.shape[0] % 2 == above.shape[1] % 2 == 0
    np.testing.assert_array_equal(above[:33, :width], picture)
    assert (above[33:] > 0).any()
    assert not (caption.below(picture, "")[33:] > 0).any()
    other = caption.below(picture, "step 2")
    assert other.shape == above.shape
    assert (other != above).any()


def test_the_longest_line_fits_three_panels_of_the_usual_width() -> None:
    drawn = Caption(3 * record.PANEL).below(np.zeros((2, 3 * record.PANEL, 3), np.uint8), LONGEST)
    columns = np.flatnonzero(drawn.any(axis=(0, 2)))
    assert columns[0] >= 2
    assert columns[-1] < 3 * record.PANEL - 2
