"""Runs that break stop with one line that says what broke, and exit code 1."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from envs.toy import Reach
from experiments.sessions.training import Session
from experiments.train import main
from tests.experiments.helpers import arguments

AGENTS = ("ppo", "trpo", "vmpo", "rebel", "reinforce")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("checkpoint_every", [20, 1000])
@pytest.mark.parametrize("agent", AGENTS)
def test_a_reward_that_is_not_a_number_is_named_with_its_step(
    agent: str,
    checkpoint_every: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, steps = Reach._advance, []

    def advance(self: Reach, action: Any) -> Any:
        reward, terminated, info = real(self, action)
        steps.append(action)
        return (math.nan if len(steps) == 40 else reward), terminated, info

    monkeypatch.setattr(Reach, "_advance", advance)
    monkeypatch.setattr(Session, "estimate", lambda self: "no estimate")
    words = arguments(
        agent, "toy/reach", tmp_path / "run", steps=200, observation="state", threads=1,
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    assert main(words) == 1
    line = last_line(capsys)
    assert "'reward' is nan in environment 0 at agent step 39; training stops" in line
    written = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    if checkpoint_every < 39:
        assert (
            ", the last checkpoint is kept (mend the task, or begin new episodes from there" in line
        )
        assert written
    else:
        assert line.endswith("training stops before its first checkpoint (mend the task)")
        assert not written


@pytest.mark.parametrize("env", ["toy/reach", "gym/CartPole-v1"])
def test_a_log_ratio_that_is_not_finite_stops_the_run_by_name(
    env: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One gradient step of absurd size; from the next on, nothing that the policy says is a number.

    Without the check at the end of the update, the next action would be blamed, or torch's sampling raise.
    """
    monkeypatch.setattr(Session, "estimate", lambda self: "no estimate")
    words = arguments(
        "ppo", env, tmp_path / "run", steps=200, observation="state", learning_rate=1e37,
        value_coefficient=0, threads=1,
    )  # fmt: skip
    assert main(words) == 1
    line = last_line(capsys)
    # A choice that has become impossible may show in the entropy first: 0 times -inf.
    culprit = "a log-ratio" if env == "toy/reach" else "(a log-ratio|policy/entropy)"
    assert re.match(f"error: {culprit} is not finite", line), line
    assert re.search(r"in gradient step [1234] of 4 of an update", line), line
    assert "training stops before its first checkpoint (lower the learning rate" in line
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")) == [], "none was written"


@pytest.mark.parametrize(
    ("agent", "observation", "said"),
    [
        ("sac", "state", r"loss/critic is (nan|inf) at agent step \d+;"),
        ("drqv2", "pixels", r"(loss|value)/\S+ is (nan|inf) at agent step \d+;"),
        # Its actor sees through the critic's encoder, which one step has made too large: no loss was computed since.
        ("sac", "pixels", r"the agent's action is not finite at agent step \d+, with weights up to 1e\+30 in critic\."),
    ],
)  # fmt: skip
def test_a_loss_that_is_not_finite_is_blamed_before_the_action_that_it_spoiled(
    agent: str,
    observation: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Session, "estimate", lambda self: "no estimate")
    words = arguments(
        agent, "toy/reach", tmp_path / "run", steps=200, threads=1, critic_learning_rate=1e30,
        log_every=1000, observation=observation,
    )  # fmt: skip
    assert main(words) == 1
    line = last_line(capsys)
    assert re.match(f"error: {said}", line), line
    assert line.endswith("(lower a learning rate, or use --precision fp32)")
