"""experiments.imitate: from data sets to run folders that every other command takes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

import envs
from agents import Policy
from agents.core import fields
from agents.core.demonstrations import Demonstrations
from agents.core.offline import OfflineLoop
from experiments import collect, evaluate, export, imitate, record, train
from experiments.compare import difference, final_state
from experiments.data.datasets import Dataset, DatasetWriter, play
from experiments.evaluate import evaluate_run
from experiments.reporting.runs import read_run
from experiments.sessions import imitation as imitation_session
from tests.experiments.helpers import as_arguments, assert_same_run, metrics, refused_by

pytest.importorskip("minari")
STEPS = 12
AGENTS = ["bc", "diffusion-policy", "flow-policy"]
REACH = [
    "--env", "toy/reach", "--size", "24", "--observation", "both", "--frame-stack", "2",
    "--episode-length", str(STEPS), "--episodes", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data set reach/expert-v0, and the same episodes before a video."""
    root = tmp_path_factory.mktemp("datasets")
    assert collect.main(["reach/expert-v0", "--expert", *REACH, "--root", str(root)]) == 0
    video = ["--rerender", "reach/expert-v0", "--distraction", "video_hard", "--root", str(root)]
    assert collect.main(["reach/video-v0", *video]) == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, which a test may change."""
    shutil.copytree(made, tmp_path / "datasets")
    return tmp_path / "datasets"


def arguments(root: Path, run: Path, **flags: Any) -> list[str]:
    values: dict[str, Any] = {
        "--dataset": "reach/expert-v0", "--root": root, "--run-dir": run, "--preset": "debug",
        "--device": "cpu", "--threads": 1, "--seed": 3, "--steps": 8, "--log-every": 4, "--eval-every": 0,
        "--checkpoint-every": 4, "--action-chunk": 4, "--horizon": 6, "--observation": "both",
    }  # fmt: skip
    return as_arguments(values | {"--" + k.replace("_", "-"): v for k, v in flags.items()})


def make(root: Path, run: Path, **flags: Any) -> Path:
    assert imitate.main(arguments(root, run, **flags)) == 0
    return run


refused = partial(refused_by, imitate.main)


@pytest.mark.parametrize("observation", ["both", "state", "pixels"])
@pytest.mark.parametrize("agent", AGENTS)
def test_a_run_that_is_interrupted_goes_on_exactly(
    agent: str, observation: str, made: Path, tmp_path: Path
) -> None:
    flags = {"agent": agent, "observation": observation}
    whole = make(made, tmp_path / "whole", steps=16, **flags)
    parts = make(made, tmp_path / "parts", **flags)
    assert imitate.main(["--resume", str(parts), "--steps", "16"]) == 0
    assert_same_run(whole, parts)
    left, right = (
        [row for row in metrics(run) if not row[1].startswith("time/")] for run in (whole, parts)
    )
    assert left == right
    assert {tag for _, tag, _ in left} >= {"loss/imitation", "gradient/norm", "data/epochs"}


def test_a_killed_run_goes_on_from_its_checkpoint(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(made, tmp_path / "whole", steps=10)
    real = OfflineLoop._step

    def step_or_die(loop: OfflineLoop) -> None:
        if loop.state.progress.agent_steps >= 7:
            raise KeyboardInterrupt
        real(loop)

    with monkeypatch.context() as patched:
        patched.setattr(OfflineLoop, "_step", step_or_die)
        assert imitate.main(arguments(made, tmp_path / "killed", steps=10)) == 130
    assert imitate.main(["--resume", str(tmp_path / "killed")]) == 0
    assert_same_run(whole, tmp_path / "killed")


def test_evaluations_do_not_change_what_is_learned(made: Path, tmp_path: Path) -> None:
    plain = make(made, tmp_path / "plain")
    busy = make(made, tmp_path / "busy", eval_every=2, eval_episodes=2, workers=1)
    logged = {tag for _, tag, _ in metrics(busy)}
    assert {"eval/clean/return_mean", "eval/clean/success"} <= logged
    left, right = final_state(plain), final_state(busy)
    assert right["loop"].pop("best_return") > left["loop"].pop("best_return")
    assert difference(left, right) is None


@pytest.mark.parametrize("agent", AGENTS)
def test_every_command_takes_the_run(
    agent: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(made, tmp_path / "run", agent=agent, observation="pixels", eval_every=8)
    policy = Policy.load(run)
    with closing(envs.make(**policy.config["env"])) as env:
        seen, _ = env.reset(seed=0)
        action = policy.act(seen)
        assert env.action_space.contains(action)
        assert action.shape == (4, 2)
        assert policy.act(np.stack([seen] * 3)).shape == (3, 4, 2)
    flags: dict[str, Any] = {"episodes": 2, "workers": 0, "media": False}
    file = evaluate_run(run, distractions=["clean", "video_hard"], **flags)
    results = json.loads(file.read_text())["results"]
    other = evaluate_run(run, distractions=["video_hard"], name="other", **flags)
    alone = json.loads(other.read_text())["results"]
    assert alone["video_hard"] == results["video_hard"], "whatever was evaluated before"
    assert (
        evaluate.main(
            [
                str(run),
                "--distractions",
                "clean",
                "--episodes",
                "1",
                "--workers",
                "0",
                "--name",
                "m",
            ]
        )
        == 0
    )
    assert (run / "evaluations" / "m" / "clean.mp4").is_file()
    assert record.main([str(run), "--distractions", "clean", "--out", str(tmp_path / "films")]) == 0
    assert (tmp_path / "films" / "clean-1.mp4").is_file()
    if agent == "bc":
        assert export.main([str(run), "--format", "pt2", "--task-observations", "2"]) == 0
    else:
        assert "draws its actions from noise" in refused_by(export.main, capsys, [str(run)])


def test_several_datasets_are_learned_together_and_the_first_ones_task_is_evaluated(
    made: Path, tmp_path: Path
) -> None:
    both = make(
        made, tmp_path / "both", dataset=("reach/video-v0", "reach/expert-v0"), observation="pixels", eval_every=8,
    )  # fmt: skip
    config = json.loads((both / "config.json").read_text())
    assert config["env"]["distraction"] == "video_hard"
    assert config["demonstrations"]["datasets"] == ["reach/video-v0", "reach/expert-v0"]
    assert "eval/video_hard/return_mean" in {tag for _, tag, _ in metrics(both)}
    epochs = [value for _, tag, value in metrics(both) if tag == "data/epochs"]
    assert epochs == pytest.approx([4 * 8 / (6 * STEPS), 8 * 8 / (6 * STEPS)]), "of both"
    clean = make(made, tmp_path / "clean", dataset="reach/video-v0", distraction="clean")
    assert json.loads((clean / "config.json").read_text())["env"]["distraction"] is None


def test_what_is_learned_is_what_the_environment_will_show(made: Path, tmp_path: Path) -> None:
    """Observations of the store are those of the run's task, when it takes the demonstrated chunks."""
    run = make(made, tmp_path / "run", frame_stack=3)
    from experiments.sessions.imitation import ImitationSession

    config = json.loads((run / "config.json").read_text())
    with ImitationSession(run, config, resume=True) as session:
        store = session.demonstrations
    episode = Dataset(made, "reach/expert-v0")[1]
    settings = {**config["env"], "distraction": None}
    with closing(envs.make(**settings)) as env:
        seen, _ = env.reset(seed=episode.seed)
        for start in range(0, STEPS, 4):
            batch = store.read(np.array([STEPS + start]))
            np.testing.assert_array_equal(batch.observation["pixels"][0], seen["pixels"])
            np.testing.assert_array_equal(batch.observation["state"][0], seen["state"])
            np.testing.assert_array_equal(batch.chunk[0, :4], episode.actions[start : start + 4])
            seen, *_ = env.step(batch.chunk[0, :4].numpy())


def test_failed_episodes_can_be_left_out(root: Path, tmp_path: Path) -> None:
    assert collect.main(["reach/random-v0", "--random", *REACH, "--root", str(root)]) == 0
    data = Dataset(root, "reach/random-v0")
    solved = sum(bool(max(data[i].infos["success"])) for i in range(3))
    assert solved < 3
    flags = {"dataset": ("reach/random-v0", "reach/expert-v0"), "only_successful": True}
    run = make(root, tmp_path / "run", **flags)
    epochs = [value for _, tag, value in metrics(run) if tag == "data/epochs"]
    assert epochs[-1] == pytest.approx(8 * 8 / ((3 + solved) * STEPS))


def test_success_that_was_not_recorded_is_told_from_failure(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    balance = [*REACH, "--root", str(root)]
    balance[1] = "toy/balance"
    assert collect.main(["balance/expert-v0", "--expert", *balance]) == 0
    words = arguments(root, tmp_path / "run", dataset="balance/expert-v0", only_successful=True)
    said = refused(capsys, words)
    assert "dataset 'balance/expert-v0' does not say which of its episodes succeeded" in said
    assert "leave out --only-successful" in said
    assert not (tmp_path / "run").exists()


def test_data_that_does_not_fit_the_memory_names_flags_that_the_command_has(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields, "free_bytes", lambda *_: 100)
    words = arguments(made, tmp_path / "run", replay_storage="ram")
    said = refused(capsys, words)
    assert "the demonstrations need 0.00 GB, but ram has 0.00 GB free" in said
    known = {
        flag for action in imitate.parser("flow-policy")._actions for flag in action.option_strings
    }
    told = re.findall(r"--[a-z-]+", said)
    assert told == ["--episodes", "--observation", "--replay-storage"]
    assert known.issuperset(told)
    said = refused(capsys, arguments(made, tmp_path / "run", replay_storage="mmap"))
    assert "--replay-storage" not in said, "which is what was tried"


def write_broken(root: Path, kind: str) -> str:
    """Write a data set with one thing wrong, and return its id."""
    settings = dict(Dataset(root, "reach/expert-v0").about["settings"])
    name = f"reach/{kind}-v0"
    with closing(envs.make(**settings)) as env:
        good = play(env, lambda seen, scene: scene["state"][2:].astype(np.float32), 0)
        with DatasetWriter(root, name, env, {"source": "test"}) as writer:
            if kind == "empty":
                return name
            writer.add(good)
            actions = [np.array(action) for action in good.actions]
            seen = [{key: part.copy() for key, part in o.items()} for o in good.observations]
            if kind == "nan":
                seen[5]["state"][1] = np.nan
            if kind == "infinite":
                actions[2][0] = np.inf
            writer.add(dataclasses.replace(good, observations=seen, actions=actions))
    return name


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "there are no episodes in reach/empty-v0"),
        ("nan", "dataset 'reach/nan-v0', episode 1, step 5: 'state' is nan"),
        ("infinite", "dataset 'reach/infinite-v0', episode 1, step 2: 'action' is inf"),
    ],
)
def test_broken_data_is_refused_by_name(
    kind: str, said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(root, tmp_path / "run", dataset=write_broken(root, kind))
    assert said in refused(capsys, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"env": "toy/balance"}, "'reach/expert-v0' is of toy/reach, not of toy/balance"),
        ({"dataset": "reach/expret-v0"}, "did you mean reach/expert-v0"),
        (
            {"action_chunk": 13, "horizon": 16},
            "action_chunk is 13, but an episode of toy/reach ends after 12 actions",
        ),
        (
            {"action_chunk": 13, "horizon": 16, "episode_length": 20},
            "a chunk of 13 actions is longer than the longest episode",
        ),
        ({"inpaint_until": 0.5}, "--inpaint-until is given, but without --inpaint it changes"),
        ({"horizon": 3}, "horizon is 3, but the task executes chunks of 4"),
        ({"agent": "drq"}, "agent 'drq' does not learn from demonstrations alone"),
        ({"agent": "flow-polcy"}, "did you mean flow-policy"),
        ({"size": 32}, "unknown flag '--size'"),
        ({"episodes": 0}, "--episodes is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"rule": "posterior", "noise_level": 2.0}, "eta is 2.0"),
        ({"split": "test"}, "--split test"),
        ({"preset": "hpu"}, "unknown preset 'hpu'"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"threads": 0}, "--threads is 0"),
    ],
)
def test_mistakes_are_one_line(
    flags: dict[str, Any], said: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, arguments(made, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


def test_the_test_split_is_not_learned_from(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither its videos nor its colors, and no evaluation on the way is made of them."""
    shown = ["--rerender", "reach/expert-v0", "--root", str(root), "--split", "test"]
    assert collect.main(["reach/seen-v0", *shown, "--distraction", "video_hard"]) == 0
    assert collect.main(["reach/clean-v0", *shown]) == 0

    def said(*datasets: str, **flags: Any) -> str:
        return refused(capsys, arguments(root, tmp_path / "run", dataset=datasets, **flags))

    for flags in ({}, {"split": "train"}):
        told = said("reach/expert-v0", "reach/seen-v0", **flags)
        assert "dataset 'reach/seen-v0' shows video_hard of the test split" in told
    assert "--split test is what" in said("reach/clean-v0", distraction="color_hard")
    make(root, tmp_path / "run", dataset="reach/clean-v0", split="train")


def test_only_the_episodes_that_are_learned_are_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is asked for one episode, not for the three that the data set has."""
    rows = []

    class Counted(Demonstrations):
        def __init__(self, *spaces: Any, **settings: Any) -> None:
            rows.append(settings["rows"])
            super().__init__(*spaces, **settings)

    monkeypatch.setattr(imitation_session, "Demonstrations", Counted)
    make(made, tmp_path / "run", episodes=1)
    assert rows == [STEPS]


def test_data_that_does_not_fit_is_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put = ["--episode-length", "6", "--episodes", "1", "--root", str(root)]
    for name, flags in {
        "balance": ["--expert", "--env", "toy/balance", "--size", "24", "--observation", "both"],
        "catch": ["--expert", "--env", "toy/catch", "--observation", "state"],
        "chunked": [
            "--random",
            "--env",
            "toy/reach",
            "--action-chunk",
            "2",
            "--observation",
            "state",
        ],
        "blind": ["--expert", "--env", "toy/reach", "--size", "24", "--observation", "state"],
    }.items():
        assert collect.main([f"other/{name}-v0", *flags, *put]) == 0

    def said(**flags: Any) -> str:
        return refused(capsys, arguments(root, tmp_path / "run", **flags))

    two = ("reach/expert-v0", "other/balance-v0")
    assert "'other/balance-v0' has id toy/balance, 'reach/expert-v0' has toy/reach" in said(
        dataset=two
    )
    catch = {"dataset": "other/catch-v0", "observation": "state"}
    assert "only Box actions come in chunks" in said(**catch)
    assert "take Box [A] or [h, A] actions" in said(**catch, action_chunk=1)
    assert "was collected in chunks of 2" in said(dataset="other/chunked-v0", observation="state")
    assert "shows state, not pixels" in said(dataset="other/blind-v0", observation="pixels")
    two = ("reach/expert-v0", "other/blind-v0")
    assert "has no 'pixels', only state" in said(dataset=two, observation="pixels")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_data(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(root, tmp_path / "run")
    shutil.rmtree(root / "reach" / "expert-v0")
    more = ["--resume", str(run), "--steps", "12"]
    assert "unknown dataset 'reach/expert-v0'" in refused(capsys, more)
    assert collect.main(["reach/expert-v0", "--random", *REACH, "--root", str(root)]) == 0
    assert "are not those that the run began with" in refused(capsys, more)
    assert "--dataset cannot change with --resume" in refused(capsys, [*more, "--dataset", "x"])


def test_a_run_goes_on_with_data_that_was_moved(root: Path, tmp_path: Path) -> None:
    whole = make(root, tmp_path / "whole", steps=12)
    run = make(root, tmp_path / "run")
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    assert imitate.main(["--resume", str(run), "--steps", "12", "--root", str(moved)]) == 0
    assert_same_run(whole, run)
    config = json.loads((run / "config.json").read_text())
    assert config["demonstrations"]["root"] == str(moved), "the next time it needs no --root"


def test_training_says_where_demonstrations_are_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--agent", "flow-policy", "--env", "toy/reach", "--run-dir", str(tmp_path / "run")]
    assert "use python -m experiments.imitate" in refused_by(train.main, capsys, words)


def test_an_evaluation_may_act_otherwise_than_training(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(made, tmp_path / "run", inpaint=True)
    flags: dict[str, Any] = {"distractions": ["clean"], "episodes": 2, "workers": 0, "media": False}
    plain = json.loads(evaluate_run(run, **flags).read_text())
    assert "acting" not in plain
    file = evaluate_run(
        run, acting=["start-noise=0", "denoising_steps=1", "inpaint=false"], **flags
    )
    result = json.loads(file.read_text())
    changes = {"start_noise": 0.0, "denoising_steps": 1, "inpaint": False}
    assert result["acting"] == changes
    assert result["results"] != plain["results"]
    policy = Policy.load(run, acting=changes)
    assert policy.agent.policy.acting.steps == 1
    with closing(envs.make(**policy.config["env"])) as env:
        seen, _ = env.reset(seed=0)
        np.testing.assert_array_equal(policy.act(seen), policy.act(seen), "nothing is drawn")
    notes = read_run(run).notes
    assert any("acted otherwise than in training, left out" in note for note in notes)

    def said(text: str) -> str:
        return refused_by(evaluate.main, capsys, [str(run), "--acting", text])

    assert "did you mean start_noise" in said("start_nois=0")
    assert "unknown setting of acting 'width'" in said("width=3")
    assert "--acting rule=eular: give one of euler" in said("rule=eular")
    assert "--acting denoising_steps=few: give a number" in said("denoising_steps=few")
    assert "give NAME=VALUE" in said("start_noise")
    other = make(made, tmp_path / "bc", agent="bc")
    words = [str(other), "--acting", "start_noise=0"]
    assert "has no settings that only say how it acts" in refused_by(evaluate.main, capsys, words)


def test_inpainting_knows_the_last_chunk_while_an_episode_lasts(made: Path, tmp_path: Path) -> None:
    run = make(made, tmp_path / "run", inpaint=True, inpaint_until=0.0)
    policy = Policy.load(run)
    with closing(envs.make(**policy.config["env"])) as env:
        seen, _ = env.reset(seed=0)
        first = policy.act(seen)
        expected = policy.state[0].numpy()
        assert expected.shape == (2, 2), "six predicted, four executed"
        np.testing.assert_allclose(policy.act(env.step(first)[0])[:2], expected, atol=1e-5)
        policy.begin()
        assert policy.state is None


def test_a_dataset_is_shown_as_films_and_plots(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", "reach/video-v0", "--root", str(made), "--episodes", "9", "--scale", "2"]
    words += ["--fps", "5", "--out", str(tmp_path / "films")]
    assert record.main(words) == 0
    names = sorted(file.name for file in (tmp_path / "films").iterdir())
    films = [f"episode-{i}.{kind}" for i in (0, 1, 2) for kind in ("mp4", "png")]
    assert names == [*films, "index.html"]
    page = (tmp_path / "films" / "index.html").read_text()
    assert all(f'src="{name}"' in page for name in films)
    assert "3 of 3 shown" in page
    lines = capsys.readouterr().out.splitlines()
    episode = Dataset(made, "reach/video-v0")[1]
    assert lines[1].startswith(
        f"reach/video-v0, episode 1: {STEPS} agent steps, return {sum(episode.rewards):.1f}, "
    )
    film = iio.imread(tmp_path / "films" / "episode-1.mp4")
    shown: Any = episode.observations
    assert len(film) == STEPS + 1
    for picture, stack in zip(film, shown["pixels"], strict=True):
        frame = stack[-3:].transpose(1, 2, 0).repeat(2, 0).repeat(2, 1)
        assert np.abs(picture[:48, :48].astype(int) - frame).mean() < 12
    moments = list(record.dataset_moments(episode))
    assert moments[-1].total == pytest.approx(sum(episode.rewards))
    assert [moment.success for moment in moments] == [
        max(episode.infos["success"][: i + 1]) > 0 for i in range(STEPS + 1)
    ]
    assert "exists; use --overwrite" in refused_by(record.main, capsys, words)
    assert "give a run folder, or --dataset" in refused_by(record.main, capsys, [])
    assert "give a run folder, or --dataset" in refused_by(record.main, capsys, ["run", *words])
    assert "unknown dataset 'x-v0'" in refused_by(
        record.main, capsys, ["--dataset", "x-v0", "--root", made]
    )


def test_several_views_are_shown_side_by_side() -> None:
    """The newest picture of each, in the order of their names; the lower ones end in black."""
    wrist = np.full((3, 6, 4, 5), 7, np.uint8)
    wrist[:, :3] = 1  # the older one
    front = np.full((3, 3, 6, 2), 9, np.uint8)
    state = np.zeros((3, 4), np.float32)
    shown = record.shown_pictures({"wrist": wrist, "state": state, "front": front})
    assert shown is not None
    assert shown.shape == (3, 3, 6, 7)
    assert (shown[..., :2] == 9).all()
    assert (shown[:, :, :4, 2:] == 7).all()
    assert (shown[:, :, 4:, 2:] == 0).all()
    assert np.array_equal(record.shown_pictures({"wrist": wrist, "state": state}), wrist)
    assert np.array_equal(record.shown_pictures(wrist), wrist)
    assert record.shown_pictures({"state": state}) is None
    assert record.shown_pictures(state) is None


def test_a_dataset_of_states_has_plots_only(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--random", *REACH, "--observation", "state", "--root", str(root)]
    assert collect.main(["reach/states-v0", *words]) == 0
    flags = ["--dataset", "reach/states-v0", "--root", str(root), "--out", str(tmp_path / "films")]
    assert record.main(flags) == 0
    names = sorted(file.name for file in (tmp_path / "films").iterdir())
    assert names == ["episode-0.png", "index.html"]
    assert "--rerender reach/states-v0 --observation pixels" in capsys.readouterr().out
