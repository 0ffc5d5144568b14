"""An interrupted run that is resumed ends bit for bit as one that was never interrupted.

Compared are all parameters, optimizer tensors, replay rows with their bookkeeping, generators, counters and the
simulators' states. The runs are cut in mid-episode, with two workers, under a distraction that keeps state of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agents import AGENTS
from agents.core.trees import load_tree
from experiments.train import main
from tests.experiments.helpers import (
    assert_same_run,
    difference,
    final_state,
    metrics,
    resume,
    train,
)

PARALLEL = {"num_envs": 2, "workers": 2, "distraction": "video_hard"}
TASKS = ("dmc/cartpole-swingup", "metaworld/drawer-open")


def check_resume(agent: str, env: str, folder: Path, half: int, **flags: object) -> None:
    """Train 2 * half steps at once and in two parts, and compare."""
    flags = PARALLEL | flags
    whole = train(agent, env, folder / "whole", steps=2 * half, **flags)
    parts = train(agent, env, folder / "parts", steps=half, **flags)
    state = final_state(parts)
    assert all(state["environments"]["lengths"] > 0), "must be cut in mid-episode"
    assert state["progress"]["gradient_updates"] > 5, "must be cut while learning"
    resume(parts, steps=2 * half)
    assert_same_run(whole, parts)


@pytest.mark.parametrize("agent", AGENTS)
def test_every_agent_resumes_exactly_on_the_toy_family(agent: str, tmp_path: Path) -> None:
    check_resume(agent, "toy/reach", tmp_path, half=36, episode_length=15)


@pytest.mark.parametrize("env", TASKS)
def test_simulators_resume_exactly_in_mid_episode(env: str, tmp_path: Path) -> None:
    check_resume("sgqn", env, tmp_path, half=16, random_steps=4, action_repeat=2, episode_length=18)


@pytest.mark.slow
@pytest.mark.parametrize("env", TASKS)
@pytest.mark.parametrize("agent", AGENTS)
def test_every_agent_resumes_exactly_on_every_simulator(
    agent: str, env: str, tmp_path: Path
) -> None:
    check_resume(agent, env, tmp_path, half=60, action_repeat=2, episode_length=50)
