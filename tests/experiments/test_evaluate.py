"""An evaluation is repeatable, counts every environment alike, and is what the report reads."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
import torch

import envs
from agents import AGENTS, Policy
from agents.core.agent import as_observation
from agents.core.loops import OffPolicySettings
from agents.core.settings import from_dict
from agents.policy import read_config
from envs.vector import VectorEnv
from experiments.evaluate import evaluate_run, main
from experiments.evaluating.rollouts import SCORES, random_policy, run_episodes
from experiments.reporting.runs import read_run
from experiments.running.runs import file_stem, git_commit, uses_gl, write_json
from experiments.sessions.training import Session
from experiments.train import main as train_main
from tests.experiments.helpers import arguments, train

FLAGS = {"distractions": ("clean", "video_hard"), "episodes": 5, "num_envs": 2, "seed": 11}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the toy family, with a best checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(
        "sgqn",
        "toy/reach",
        folder,
        steps=24,
        eval_every=8,
        eval_episodes=1,
        episode_length=9,
        checkpoint_every=12,
    )


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that nothing was evaluated in."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def test_the_report_reads_what_evaluate_wrote(run: Path) -> None:
    content = read(evaluate_run(run, **FLAGS, workers=0, media=False))
    assert content["agent_steps"] == 24
    assert content["env_frames"] == 24
    assert content["gradient_updates"] == 14
    assert content["checkpoint"] == "step-000000024"
    assert content["foreground"] == "all but sky, floor and walls"
    assert (content["split"], content["videos"], content["seed"]) == ("test", "procedural", 11)
    seen = read_run(run)
    assert seen.notes == []
    assert seen.evaluation is not None
    assert {*seen.evaluation.results} == {"clean", "video_hard"}
    for name, row in content["results"].items():
        assert len(row["returns"]) == len(row["lengths"]) == 5
        np.testing.assert_array_equal(seen.evaluation.results[name].returns, row["returns"])
    assert seen.random_returns == [tuple(content["random_policy"]["returns"])]


def test_numbers_do_not_depend_on_workers_and_repeat(run: Path) -> None:
    none = read(evaluate_run(run, **FLAGS, workers=0, media=False, name="none"))
    two = read(evaluate_run(run, **FLAGS, workers=2, media=False, name="two"))
    assert two == none
    other = read(
        evaluate_run(run, **FLAGS | {"seed": 12}, workers=0, media=False, name="other seed")
    )
    assert other["results"]["clean"]["returns"] != none["results"]["clean"]["returns"]
    assert other["random_policy"] != none["random_policy"]


def test_distractions_and_checkpoints_make_a_difference(run: Path) -> None:
    evaluate_run(run, **FLAGS, workers=0, media=False, name="latest")
    latest = read(run / "evaluations" / "latest.json")
    best = read(evaluate_run(run, **FLAGS, workers=0, media=False, name="best", checkpoint="best"))
    assert best["checkpoint"] == "best"
    if best["agent_steps"] < 24:
        assert best["results"] != latest["results"]
    before = "step-000000012"
    earlier = read(
        evaluate_run(run, **FLAGS, workers=0, media=False, name="earlier", checkpoint=before)
    )
    assert (earlier["checkpoint"], earlier["agent_steps"]) == (before, 12)
    assert earlier["results"] != latest["results"]
    assert latest["results"]["clean"] != latest["results"]["video_hard"]


def test_an_existing_evaluation_is_kept_unless_overwriting_is_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--distractions", "clean", "--episodes", "1", "--workers", "0"]
    assert main([*words, "--no-media"]) == 0
    (file,) = (run / "evaluations").glob("*.json")
    file.write_text("precious")
    assert main([*words, "--no-media"]) == 2
    assert "exists; use --overwrite" in capsys.readouterr().err
    assert file.read_text() == "precious"
    assert main([*words, "--no-media", "--overwrite"]) == 0
    assert read(file)["episodes_per_distraction"] == 1


def test_a_video_and_the_saliency_are_written_for_every_distraction(run: Path) -> None:
    file = evaluate_run(run, **FLAGS, workers=0)
    folder = file.with_suffix("")
    assert {path.name for path in folder.iterdir()} == {
        f"{name}{kind}" for name in FLAGS["distractions"] for kind in (".mp4", "_saliency.png")
    }
    clean, hard = (iio.imread(folder / f"{name}.mp4") for name in ("clean", "video_hard"))
    assert len(clean) == 9, "one picture for each step of the episode"
    top = np.s_[:, : clean.shape[1] // 4]
    assert np.abs(clean[top].astype(int) - hard[top]).mean() > 5, "the sky is replaced"


def test_an_evaluation_tells_how_much_of_the_saliency_is_on_the_body(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = read(evaluate_run(run, **FLAGS, workers=0, media=False))["results"]
    for row in results.values():
        assert row["saliency"].keys() == set(SCORES)
        for scores in row["saliency"].values():
            assert len(scores) == len(row["returns"])
            assert all(0 <= score <= 1 for score in scores)
    energy, area = (np.mean(results["clean"]["saliency"][name]) for name in ("energy", "area"))
    assert f"{energy:.2f} ({area:.2f})" in capsys.readouterr().out


def test_looks_are_scored_against_the_picture_that_was_looked_at() -> None:
    with closing(envs.make_vec("toy/reach", 2, size=24, episode_length=12, seed=0)) as vector:
        act = random_policy(vector, 0)
        seen = run_episodes(
            act, vector, 4, seed=0, look=lambda *_: np.stack(vector.call("foreground")) * 3.0
        )
        nothing = run_episodes(act, vector, 2, seed=0, look=lambda *_: None)
    assert seen.looks["energy"] == seen.looks["iou"] == seen.looks["pointing"] == [1.0] * 4
    assert all(0.05 < area < 0.5 for area in seen.looks["area"])
    assert nothing.looks == {}


def test_every_episode_is_looked_at_however_short_it_is() -> None:
    with closing(envs.make_vec("toy/reach", 2, size=24, episode_length=3, seed=0)) as vector:
        looks = np.zeros(2, int)

        def look(observation: Any, action: np.ndarray) -> np.ndarray:
            looks[:] += 1
            return np.stack(vector.call("foreground")) * 1.0

        seen = run_episodes(random_policy(vector, 0), vector, 12, seed=0, look=look)
    assert seen.looks["energy"] == [1.0] * 12
    assert looks[0] == 6, "at the first step of each"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The distractions that an evaluation began with, in turn; SIGTERM comes at the third."""
    names: list[str | None] = []

    real = envs.make_vec

    def make_vec(*args: Any, **keywords: Any) -> VectorEnv:
        names.append(keywords["distraction"])
        if len(names) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **keywords)

    monkeypatch.setattr(envs, "make_vec", make_vec)
    return names


WORDS = ["--distractions", "clean", "video_hard", "color_hard", "--episodes", "3", "--num-envs", "2",
         "--workers", "0", "--name", "it"]  # fmt: skip


def media(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_stopped_evaluation_goes_on_with_what_is_left(
    run: Path, trained: Path, begun: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main([str(run), *WORDS]) == 130
    told = capsys.readouterr()
    assert "to do are video_hard, color_hard: the same command goes on there" in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    folder = run / "evaluations"
    assert [path.name for path in folder.iterdir()] == ["it.partial"]
    assert begun == [None, None, "video_hard"]
    assert read_run(run).evaluation is None, "no report takes a part for the whole"

    assert main([str(run), *WORDS]) == 0
    assert begun[3:] == ["video_hard", "color_hard"], "what is done is not repeated"
    assert "done are random policy, clean" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["it", "it.json"]

    other = Path(shutil.copytree(trained, run.with_name("undisturbed")))
    assert main([str(other), *WORDS]) == 0
    assert (folder / "it.json").read_text() == (other / "evaluations" / "it.json").read_text()
    assert media(folder / "it") == media(other / "evaluations" / "it")
    assert len(media(folder / "it")) == 6


@pytest.mark.parametrize("change", ["seed", "episodes", "weights", "video", "rows"])
def test_a_stopped_evaluation_of_something_else_is_begun_anew(
    run: Path, begun: list[str | None], change: str, tmp_path: Path
) -> None:
    assert main([str(run), *WORDS]) == 130
    words = [str(run), *WORDS]
    partial = run / "evaluations" / "it.partial"
    if change == "seed":
        words += ["--seed", "5"]
    elif change == "episodes":
        words += ["--episodes", "2"]
    elif change == "weights":  # another training in the same folder, as far as its config tells
        other = train(
            "sgqn", "toy/reach", tmp_path / "other", steps=24, checkpoint_every=12, seed=4
        )
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(other / "checkpoints", run / "checkpoints")
    elif change == "video":
        (partial / "clean.mp4").unlink()
    else:
        (partial / "rows.json").write_text("half writ")
    begun[3:] = []  # the other training's environments
    assert main(words) == 0
    again = {"video": ["random policy"]}.get(change, [])
    todo = [None, "video_hard", "color_hard"]
    assert begun[3:] == (todo if again else [None, *todo])


def test_two_evaluations_of_one_name_do_not_take_each_others_films(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = envs.make_vec
    told: list[int] = []

    def make_vec(*args: Any, **keywords: Any) -> VectorEnv:
        if keywords["distraction"] == "video_hard" and not told:
            # Other episodes under the same name, which once threw away what was there.
            told.append(main([str(run), *WORDS, "--episodes", "1"]))
        return real(*args, **keywords)

    monkeypatch.setattr(envs, "make_vec", make_vec)
    assert main([str(run), *WORDS]) == 0
    assert told == [2]
    assert "another process is writing" in capsys.readouterr().err
    assert len(media(run / "evaluations" / "it")) == 6


def test_a_folder_of_somebody_elses_is_not_taken_for_a_stopped_evaluation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine.partial" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("chapter 1")
    assert main([str(run), *WORDS, "--out", str(tmp_path / "mine.json")]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert own.read_text() == "chapter 1"
    assert not (tmp_path / "mine.json").exists()


def test_a_result_that_its_media_would_stand_in_the_way_of_is_refused_before_the_work(
    run: Path, tmp_path: Path, begun: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main([str(run), *WORDS, "--out", str(tmp_path / "result")]) == 2
    assert "ends in .json" in capsys.readouterr().err
    assert begun == []
    assert sorted(tmp_path.iterdir()) == before


def test_an_evaluation_that_cannot_begin_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_vec(*args: Any, **keywords: Any) -> VectorEnv:
        raise RuntimeError("no GL")

    monkeypatch.setattr(envs, "make_vec", make_vec)
    with pytest.raises(RuntimeError, match="no GL"):
        main([str(run), *WORDS])
    assert list((run / "evaluations").iterdir()) == []


def test_overwriting_removes_the_media_of_the_replaced_result_only(run: Path) -> None:
    file = evaluate_run(run, **FLAGS, workers=0, name="it")
    folder = file.with_suffix("")
    (folder / "color_hard.mp4").write_text("somebody else's")
    once = {"episodes": 1, "workers": 0, "name": "it", "overwrite": True}
    evaluate_run(run, distractions=["clean"], **once)
    assert {*media(folder)} == {"clean.mp4", "clean_saliency.png", "color_hard.mp4"}
    evaluate_run(run, distractions=["clean"], **once, media=False)
    assert media(folder) == {"color_hard.mp4": b"somebody else's"}
    (folder / "color_hard.mp4").unlink()
    evaluate_run(run, distractions=["clean"], **once, media=False)
    assert not folder.exists()


class Countdown(gym.Env):
    """Episodes of a given length; the return tells which environment it was."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length: int) -> None:
        self.length, self.left = length, length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.left = self.length
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, False, self.left == 0, {}


def test_every_environment_gives_the_same_number_of_episodes() -> None:
    vector = VectorEnv([lambda n=n: Countdown(n) for n in (2, 3, 50)])
    done: list[int] = []
    seen = run_episodes(
        lambda _: np.zeros((3, 1), np.float32), vector, 7, seed=0, progress=done.append
    )
    assert sorted(seen.returns) == [2, 2, 2, 3, 3, 50, 50], "short episodes are not favored"
    assert sorted(seen.lengths) == [2, 2, 2, 3, 3, 50, 50]
    assert done == [1, 2, 3, 4, 5, 6, 7]


def test_policies_act_as_the_agent_does_singly_and_in_batches(run: Path) -> None:
    config = read_config(run)
    with Session(run, config, resume=True) as session:
        observation, _ = session.envs.reset(seed=5)
        observation = np.concatenate([observation, 255 - observation])
        seen = as_observation(observation, torch.device("cpu"))
        expected, _, _ = session.agent.act(seen, explore=False)
    policy = Policy.load(run)
    assert policy.progress == {"agent_steps": 24, "env_frames": 24, "gradient_updates": 14}
    np.testing.assert_array_equal(policy.act(observation), expected)
    single = policy.act(observation[0])
    assert single.shape == expected[0].shape
    np.testing.assert_allclose(single, expected[0], rtol=0, atol=1e-6)
    assert not np.allclose(expected[0], expected[1], atol=1e-4)


@pytest.mark.parametrize("observation", ["state", "both"])
def test_policies_take_states_and_dicts(observation: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments("drqv2", "toy/reach", run, steps=14, observation=observation)
    assert train_main(words) == 0
    policy = Policy.load(str(run))
    env = envs.make(**policy.config["env"])
    seen, _ = env.reset(seed=1)
    action = policy.act(seen)
    assert action.shape == env.action_space.shape
    batch = (
        {key: np.stack([part, part]) for key, part in seen.items()}
        if isinstance(seen, dict)
        else np.stack([seen, seen])
    )
    np.testing.assert_allclose(policy.act(batch), [action, action], atol=1e-6)


def test_a_policy_tells_which_checkpoint_it_fell_back_to(tmp_path: Path) -> None:
    run = train("drq", "toy/reach", tmp_path / "run", steps=20, checkpoint_every=12)
    (run / "checkpoints" / "step-000000020" / "agent.safetensors").write_bytes(b"cut")
    with pytest.warns(UserWarning, match="falling back to step-000000012"):
        policy = Policy.load(run)
    assert policy.checkpoint == "step-000000012"
    assert policy.progress["agent_steps"] == 12


def test_a_runs_config_rebuilds_every_dataclass(run: Path) -> None:
    config = read_config(run)
    loop = {k: v for k, v in config["train"].items() if k not in ("num_envs", "seed")}
    assert from_dict(OffPolicySettings, loop).steps == 24
    for default in AGENTS["sgqn"].configs:
        saved = config["configs"][type(default).__name__]
        assert from_dict(type(default), saved) != default, "the run's values, not the defaults"


LONG = ",".join(
    ["clean", *(f"color_hard+video_easy+camera_{level}" for level in ("easy", "hard"))] * 4
)


def test_a_list_of_distractions_longer_than_a_files_name_may_be_has_its_media(run: Path) -> None:
    assert len(LONG) > 255
    other = LONG.replace("camera_hard", "camera_easy")
    both = evaluate_run(run, distractions=(LONG, other), episodes=1, num_envs=1, name="long")
    found = read_run(run).evaluation
    assert found is not None
    assert set(found.videos) == set(found.saliency) == set(found.results) == {LONG, other}
    assert len({file.name for file in found.videos.values()}) == 2, "cut, and yet told apart"
    assert all(len(file.name) < 130 for file in both.with_suffix("").iterdir())
    assert file_stem("color_hard+camera_easy") == "color_hard+camera_easy"


def test_an_evaluation_says_by_whom_and_on_what_it_was_drawn(run: Path) -> None:
    file = evaluate_run(run, distractions=("clean",), episodes=1, name="drawn")
    system = read(file)["system"]
    assert system["commit"] == git_commit()
    assert system["hardware"]["cpu"]
    assert system["gl_renderer"] is None, "nobody: the toy task draws itself"
    assert uses_gl({"observation": "pixels", "id": "dmc/walker-walk"})
    assert not uses_gl({"observation": "state", "id": "dmc/walker-walk"})
    found = read_run(run).evaluation
    assert found is not None
    assert found.system == system
    write_json(file, {key: value for key, value in read(file).items() if key != "system"})
    older = read_run(run).evaluation
    assert older is not None
    assert older.system == {}
