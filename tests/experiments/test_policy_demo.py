"""The demonstration of imitation and fine-tuning goes the whole way, and goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.core.checkpoints import CheckpointStore
from agents.policy import read_config
from experiments import policy_demo
from experiments.demo import steps_left
from experiments.policy_demo import (
    BASE,
    SHOWN,
    TABLE,
    TUNED,
    DemoSettings,
    comparison,
    datasets,
    main,
)

pytest.importorskip("minari")


def words(folder: Path, **changed: object) -> list[str]:
    flags = {
        "run-dir": folder, "env": "toy/reach", "preset": "debug", "seed": 3, "demonstrations": 2,
        "episode-length": 12, "action-chunk": 2, "imitation-steps": 6, "fine-tuning-steps": 40, "episodes": 2,
        "workers": 0,
    } | changed  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def test_it_shows_imitates_fine_tunes_compares_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    with monkeypatch.context() as patch:  # as if a signal had stopped it
        patch.setattr("experiments.train.main", lambda words: 130)
        assert main(words(folder)) == 130
    assert steps_left(folder / BASE) == 0
    assert not (folder / TABLE).exists()
    data = [folder / "data" / name / "data" / "metadata.json" for name in datasets()]
    written = [file.stat().st_mtime_ns for file in data]
    shown = [json.loads(file.read_text())["sightline"]["settings"] for file in data]
    assert [one["distraction"] for one in shown] == [None, *SHOWN[1:]]
    assert {one["split"] for one in shown} == {"train"}

    assert main(["--run-dir", str(folder)]) == 0, "all that it was begun with is remembered"
    assert "trained already" in capsys.readouterr().out
    assert [file.stat().st_mtime_ns for file in data] == written
    tuned = read_config(folder / TUNED)
    assert tuned["base"]["run"] == str(folder / BASE)
    assert tuned["env"]["size"] == read_config(folder / BASE)["env"]["size"] == 48
    assert tuned["env"]["split"] == "train"
    assert tuned["env"]["end_at_success"], "both meet the task that was shown"
    assert tuned["reward"] == "success", "what is compared is what was learned from"
    assert CheckpointStore(folder / TUNED).load()["progress"]["gradient_updates"] > 0
    text = (folder / TABLE).read_text()
    assert all(f"| {name} |" in text.replace("\\", "") for name in SHOWN)
    for run in (BASE, TUNED):
        result = json.loads((folder / run / "evaluations" / "demo.json").read_text())
        assert list(result["results"]) == list(SHOWN)
        assert result["split"] == "test"
        assert len(list((folder / run / "evaluations" / "demo").glob("*.mp4"))) == len(SHOWN)
    assert "Fine-tuning" in (folder / "report" / "report.html").read_text()

    before = (folder / TUNED / "metrics.csv").read_bytes()
    (newest,) = sorted((folder / TUNED / "checkpoints").glob("step-*"))[-1:]
    shutil.rmtree(folder / TUNED / "evaluations")
    assert main(words(folder)) == 0
    assert (folder / TUNED / "metrics.csv").read_bytes() == before
    assert newest.exists()
    assert (folder / TUNED / "evaluations" / "demo.json").is_file()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"episodes": 0}, "--episodes is 0; give at least 1"),
        ({"env": "toy/reachh"}, "reach"),
        ({"action-chunk": 0}, "action_chunk is 0"),
        (
            {"action-chunk": 13},
            "action_chunk is 13, but an episode of toy/reach ends after 12 actions",
        ),
        ({"episode-length": 0}, "episode_length is 0"),
        ({"workers": -1}, "workers -1"),
        ({"preset": "cpus"}, "unknown preset 'cpus'"),
        ({"env": "gym/Pendulum-v1"}, "nobody shows how gym/Pendulum-v1 is done"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(
    changed: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "demo", **changed)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_another_demonstration_needs_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_demo, "demonstrate", lambda *_: 130)
    assert main(words(tmp_path / "demo")) == 130
    assert main(words(tmp_path / "demo", episodes=3)) == 2
    assert "--episodes is 3, but what is in" in capsys.readouterr().err


@pytest.mark.parametrize(("env", "reward"), [("toy/reach", "success"), ("toy/balance", "task")])
def test_a_task_that_does_not_tell_of_success_is_learned_from_its_own_reward(
    env: str, reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("experiments.collect.main", lambda words: asked.append(words) or 0)
    settings = DemoSettings(env=env)
    assert policy_demo.demonstrate(tmp_path, settings, []) == 0
    assert ("--end-at-success" in asked[0]) == (reward == "success")
    tuning = policy_demo._fine_tuning(tmp_path, settings)
    assert tuning[tuning.index("--reward") + 1] == reward


def results(**successes: list[float]) -> dict[str, Any]:
    rows = {name: {"success": s, "returns": s} for name, s in successes.items()}
    return {"results": rows}


def test_the_change_is_told_episode_by_episode() -> None:
    """Ten episodes that fail and ten that succeed before; the same, all, or the other ones after."""
    half = [0.0] * 10 + [1.0] * 10
    before = results(clean=half, color_hard=half, video_hard=half)
    after = results(clean=half, color_hard=[1.0] * 20, video_hard=half[::-1])
    table = comparison(before, after, "toy/reach")
    same, better, other = table.rows
    assert [row[-1].text for row in table.rows] == ["not told apart", "better", "not told apart"]
    assert (same[1].text, same[2].text, same[3].text) == ("50.0", "50.0", "0.00".replace("0.00", "0.0"))  # fmt: skip
    assert same[3].aside == "[0.0, 0.0]", "no episode changed, however many succeed"
    assert (better[2].text, better[2].aside) == ("100", "[100, 100]")
    low, high = (float(x) for x in other[3].aside.replace("−", "-").strip("[]").split(","))
    # Twenty changes of -100 and 100: a binomial's 2.5 % and 97.5 % of 20 at one half are 6 and 14.
    np.testing.assert_allclose([low, high], [-40, 40], atol=10)
    worse = comparison(after, before, "toy/reach")
    assert worse.rows[1][-1].text == "worse"


def test_a_task_without_success_is_told_in_returns() -> None:
    before = results(**{name: [1.0, 3.0] for name in SHOWN})
    for row in before["results"].values():
        row["success"] = None
    table = comparison(before, before, "toy/balance")
    assert "return in 2 episodes" in table.caption
    assert table.rows[0][1].text == "2.0"
