"""On-policy agents train, resume and are evaluated by the same commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents import Policy
from experiments.evaluate import evaluate_run
from experiments.train import main
from tests.experiments.helpers import arguments, assert_same_run, metrics, resume, train


def test_discrete_actions_are_trained_resumed_exactly_and_evaluated(tmp_path: Path) -> None:
    flags = {"num_envs": 2, "workers": 1, "distraction": "color_hard", "scale_reward": True}
    whole = train("ppo", "toy/catch", tmp_path / "whole", steps=60, **flags)
    parts = train("ppo", "toy/catch", tmp_path / "parts", steps=32, **flags)
    resume(parts, steps=60)
    assert_same_run(whole, parts)
    counts = Policy.load(whole).progress
    assert counts["agent_steps"] == 60
    assert counts["gradient_updates"] == 5 * 2 * 3, "five rollouts of twelve steps, two passes"
    logged = {tag for _, tag, _ in metrics(whole)}
    assert {"loss/policy", "ratio/kl", "value/explained_variance", "time/update_ms"} <= logged
    file = evaluate_run(whole, distractions=["clean"], episodes=2, workers=0, media=False)
    assert len(json.loads(file.read_text())["results"]["clean"]["returns"]) == 2


VINES = {"rollout_length": 20, "branches": 2, "vines": 3, "vine_length": 2, "set_size": 2}


@pytest.mark.parametrize(
    ("agent", "task", "own"),
    [
        ("polychromic", "toy/goals", {**VINES, "behavior": "told"}),
        ("polychromic", "toy/reach", {**VINES, "behavior": "visited", "distraction": "video_hard"}),
        ("pg-rainbow", "toy/reach", {"quantiles": 4}),
    ],
)
def test_runs_go_on_exactly_after_an_interruption_in_a_rollout(
    agent: str, task: str, own: dict[str, object], tmp_path: Path
) -> None:
    flags = {"num_envs": 2, "workers": 1, **own}
    whole = train(agent, task, tmp_path / "whole", steps=96, **flags)
    parts = train(agent, task, tmp_path / "parts", steps=62, **flags)
    resume(parts, steps=96)
    assert_same_run(whole, parts)
    logged = {tag for _, tag, _ in metrics(whole)}
    assert (
        {"sets/score", "sets/diversity"} if agent == "polychromic" else {"loss/quantile"}
    ) <= logged


@pytest.mark.parametrize("agent", ["a2c", "lpo", "spo"])
def test_actions_out_of_range_are_cut_off_for_the_task_only(agent: str, tmp_path: Path) -> None:
    run = train(agent, "toy/reach", tmp_path / "run", steps=40, initial_log_std=2.0)
    assert all(value == value for _, _, value in metrics(run))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"surrogate": "ppo_clp"}, "invalid choice: 'ppo_clp'"),
        ({"rollout_length": 0}, "rollout_length is 0"),
        ({"drift_file": "mine"}, "drift_file is 'mine', but the surrogate is ppo_clip"),
        ({"surrogate": "learned_drift", "drift_file": "mine"}, "'mine' does not exist"),
        ({"replay_capacity": 100}, "unknown flag '--replay-capacity'"),
        ({"critic": "quantil"}, "invalid choice: 'quantil'"),
        ({"vines": 8, "vine_length": 2, "rollout_length": 10}, "rollout_length is 10"),
        ({"behavior": "visitd"}, "did you mean visited"),
    ],
)
def test_mistakes_are_one_line(
    flags: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = "polychromic" if "vines" in flags or "behavior" in flags else "ppo"
    words = arguments(agent, "toy/reach", tmp_path / "run", steps=20, **flags)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
