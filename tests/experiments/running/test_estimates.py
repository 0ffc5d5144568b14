"""What a run says it will take: all of an update, chains of denoising steps, and evaluations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agents.policy import read_config
from experiments.running import estimates
from experiments.running.estimates import ENOUGH, Learning, measured_learning
from experiments.sessions.training import Session
from tests.experiments.helpers import train

ENVS = 4


class Clock:
    """Time that passes as learners say.

    Args:
        once: seconds of what an update does once (a fixed cost).
        step: of what it does once for every step of the rollout.
        gradient: of a gradient step, of which there are `epochs` for every minibatch of 16 steps.
        epochs: passes.
    """

    def __init__(self, once: float, step: float, gradient: float, epochs: int) -> None:
        self.now, self.updates = 0.0, 0
        self.once, self.step, self.gradient, self.epochs = once, step, gradient, epochs

    def perf_counter(self) -> float:
        return self.now

    def update_seconds(self, length: int) -> float:
        steps = length * ENVS
        return self.once + self.step * steps + self.gradient * self.epochs * steps / 16

    def make(self, length: int) -> Any:
        learner = SimpleNamespace(gradient_updates=0)

        def update(_: Any) -> None:
            self.now += self.update_seconds(length)
            learner.gradient_updates += 1 + self.epochs * length * ENVS // 16
            self.updates += 1

        learner.update = update
        return learner, SimpleNamespace(num_envs=ENVS, experience=lambda: None)


@pytest.mark.parametrize(
    ("once", "step", "gradient", "epochs"),
    [
        (0.01, 1e-6, 1e-4, 10),  # a policy step that costs the same for any rollout, many passes
        (0.0, 2e-5, 2e-4, 10),
        (0.2, 0.0, 1e-3, 1),
    ],
)
def test_an_update_is_counted_whole_for_the_rollout_of_the_run(
    once: float, step: float, gradient: float, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One minibatch's update, times passes over minibatches, would count TRPO's step once for each of these."""
    clock = Clock(once, step, gradient, epochs)
    monkeypatch.setattr(estimates, "time", clock)
    told = measured_learning(clock.make, shortest=4, longest=512)
    truth = clock.update_seconds(512) / (512 * ENVS)
    assert told.seconds * told.per_step == pytest.approx(truth, rel=0.1)
    of_a_minibatch = clock.update_seconds(4) / 16
    assert of_a_minibatch > 1.5 * truth or once == 0


def test_a_slow_update_is_not_measured_at_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0, 0.0, 0.3, 10)
    monkeypatch.setattr(estimates, "time", clock)
    told = measured_learning(clock.make, shortest=4, longest=2048)
    assert clock.updates == 2, "the first one is left out"
    assert clock.now > ENOUGH
    assert told.seconds * told.per_step == pytest.approx(0.3 * 10 / 16)


@pytest.mark.parametrize("agent", ["dppo", "trpo"])
def test_acting_and_learning_are_in_the_estimate(
    agent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1,000 steps at 20 ms of learning and 30 ms of acting, 10 evaluations of 2 episodes of 12 steps at 40 ms."""
    flags = {"observation": "state", "episode_length": 12, "num_envs": 2}
    run = train(agent, "toy/reach", tmp_path / "run", steps=2, **flags)
    config = read_config(run)
    config["train"] |= {"steps": 1002, "eval_every": 100, "eval_episodes": 2}
    monkeypatch.setattr(
        "experiments.sessions.training.measured_learning", lambda *_, **__: Learning(0.1, 0.2)
    )
    monkeypatch.setattr("experiments.sessions.training.seconds_per_call", lambda *_, **__: 0.0)
    monkeypatch.setattr(
        "experiments.sessions.training.seconds_to_act",
        lambda *_, explore: 0.03 if explore else 0.04,
    )
    with Session(run, json.loads(json.dumps(config)), resume=True) as session:
        said = session.estimate()
    found = re.search(r"estimate: (\d+) min .*\(100 ms an update, 30.0 ms a step\)", said)
    assert found, said
    assert int(found[1]) == round((1000 * 0.05 + 10 * 2 * 12 * 0.04) / 60)


def test_a_chain_takes_its_steps_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Acting is measured on the agent: what it asks its network, as often as it has steps."""
    flags = {"observation": "state", "episode_length": 12, "num_envs": 2, "denoising_steps": 7}
    run = train("dppo", "toy/reach", tmp_path / "run", steps=2, **flags)
    with Session(run, read_config(run), resume=True) as session:
        twin = session.make_agent(seed=0)
        asked: list[int] = []
        twin.policy.denoiser.register_forward_pre_hook(lambda _, x: asked.append(len(x[0])))  # type: ignore[attr-defined]
        twin.base.denoiser.register_forward_pre_hook(lambda _, x: asked.append(len(x[0])))  # type: ignore[attr-defined]
        estimates.seconds_to_act(twin, session.envs, 3, "cpu", explore=True)
    assert asked == [3] * 7 * 5, "four calls and a first one"
