"""Agents that imitate: what acts, how far it looks ahead, what is saved, and that learning goes on exactly."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import AGENTS, make_agent
from agents.core.checkpoints import CheckpointStore
from agents.core.demonstrations import ChunkBatch, Demonstrations
from agents.core.errors import DivergedError, UserError
from agents.core.logging import Logger
from agents.core.offline import OfflineLoop, OfflineSettings
from agents.core.run_loop import Hooks
from agents.generative_policies.imitation import Imitation

OFFLINE = sorted(name for name, spec in AGENTS.items() if spec.offline)
STATE = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
PIXELS = gym.spaces.Box(0, 255, (6, 24, 24), np.uint8)
ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)
CHUNK = gym.spaces.Box(-1, 1, (4, 2), np.float32)
SMALL = {
    "horizon": 6, "denoiser": "mlp", "width": 16, "blocks": 1, "time_features": 8, "batch_size": 8,
    "feature_dim": 8, "encoder": "small", "denoising_steps": 3, "warmup": 5, "learning_rate": 1e-2,
}  # fmt: skip


def make(
    name: str, space: gym.Space = STATE, action: gym.Space = CHUNK, **changes: Any
) -> Imitation:
    values = {**SMALL, **changes}
    configs = [
        dataclasses.replace(
            config,
            **{f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values},
        )
        for config in AGENTS[name].configs
    ]
    agent = make_agent(name, space, action, configs=configs, seed=1)
    assert isinstance(agent, Imitation)
    return agent


def data(space: gym.Space = STATE, *, length: int = 12, stride: int = 4) -> Demonstrations:
    random = np.random.default_rng(0)
    stack = 2 if space is PIXELS else 1
    store = Demonstrations(
        space,
        ACTION,
        rows=5 * length,
        horizon=6,
        frame_stack=stack,
        stride=stride,
        log=lambda _: None,
    )
    for _ in range(5):
        seen = (
            random.integers(0, 256, (length, 3, 24, 24), dtype=np.uint8)
            if space is PIXELS
            else random.normal(size=(length, 3))
        )
        store.add(seen, random.uniform(-1, 1, (length, 2)))
    return store


def loop(folder: Path, agent: Imitation, store: Demonstrations, steps: int) -> OfflineLoop:
    folder.mkdir(exist_ok=True)
    settings = OfflineSettings(steps=steps, log_every=4, eval_every=0, checkpoint_every=100)
    return OfflineLoop(
        agent, store, settings, logger=Logger(folder), checkpoints=CheckpointStore(folder),
        hooks=Hooks(line=lambda _: None),
    )  # fmt: skip


def seen_by(agent: Imitation, count: int = 3) -> dict[str, torch.Tensor]:
    return {"state": torch.randn(count, 3, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("space", [STATE, PIXELS], ids=["state", "pixels"])
@pytest.mark.parametrize("name", OFFLINE)
def test_learning_in_two_parts_is_learning_at_once(
    name: str, space: gym.Space, tmp_path: Path
) -> None:
    whole = make(name, space)
    loop(tmp_path / "whole", whole, data(space), 12).run()
    first = loop(tmp_path / "parts", make(name, space), data(space), 8)
    first.run()
    second = loop(tmp_path / "parts", make(name, space), data(space), 12)
    second.resume(second.checkpoints.load())
    state = second.run()
    assert state.progress.gradient_updates == state.progress.agent_steps == 12
    assert state.progress.env_frames == 0
    for key, network in whole.networks().items():
        for tensor, other in zip(
            network.state_dict().values(),
            second.agent.networks()[key].state_dict().values(),
            strict=True,
        ):
            assert torch.equal(tensor, other)
    left, right = (losses(tmp_path / run / "metrics.csv") for run in ("whole", "parts"))
    assert left == right
    assert [steps for steps, _ in left] == [4, 8, 12]


def losses(file: Path) -> list[tuple[int, str]]:
    """Return steps and loss of every line of metrics."""
    rows = [line.split(",") for line in file.read_text().split()]
    return [(int(row[0]), row[5]) for row in rows if row[4] == "loss/imitation"]


@pytest.mark.parametrize("name", OFFLINE)
def test_the_environment_gets_the_first_actions_of_what_is_predicted(name: str) -> None:
    agent = make(name)
    agent.prepare(data())
    seen = seen_by(agent)
    agent.seed_actions(3)
    policy = agent.average.module
    chunk = policy.sample(seen, None if name == "bc" else torch.Generator().manual_seed(3))
    action, state, extras = agent.act(seen, explore=False)
    np.testing.assert_array_equal(action, chunk[:, :4].numpy())
    assert (action.shape, action.dtype, state, extras) == ((3, 4, 2), np.float32, None, {})
    single = make(name, action=ACTION)
    single.prepare(data(stride=1))
    assert single.act(seen, explore=False)[0].shape == (3, 2)
    assert (single.executed, single.horizon) == (1, 6)


@pytest.mark.parametrize("name", OFFLINE)
def test_an_average_acts_and_follows_what_learns(name: str) -> None:
    agent = make(name, ema_decay=0.9, ema_power=0.0, warmup=0)
    store = data()
    agent.prepare(store)
    before = [p.clone() for p in agent.average.module.parameters()]
    agent.update(store.sample(8))
    for average, old, new in zip(
        agent.average.module.parameters(), before, agent.policy.parameters(), strict=True
    ):
        torch.testing.assert_close(average, 0.9 * old + 0.1 * new)
    torch.testing.assert_close(
        agent.average.module.condition.ranges["state"].center,
        (store.column("state").amin(0) + store.column("state").amax(0)) / 2,
    )
    seen = seen_by(agent)
    agent.seed_actions(0)
    first = agent.act(seen, explore=False)[0]
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(1.0)
    agent.seed_actions(0)
    np.testing.assert_array_equal(agent.act(seen, explore=False)[0], first)


def test_acting_draws_anew_and_does_not_disturb_learning() -> None:
    agent, other = make("flow-policy"), make("flow-policy")
    for each in (agent, other):
        each.prepare(data())
    seen = seen_by(agent)
    first, again = (agent.act(seen, explore=False)[0] for _ in range(2))
    assert not np.array_equal(first, again), "a policy is a distribution"
    batch = data().sample(8)
    assert torch.equal(agent.update(batch)["loss/imitation"], other.update(batch)["loss/imitation"])
    agent.seed_actions(5)
    drawn = agent.act(seen, explore=False)[0]
    agent.seed_actions(5)
    np.testing.assert_array_equal(agent.act(seen, explore=False)[0], drawn)


def test_inpainting_begins_a_chunk_with_what_was_predicted() -> None:
    agent = make("flow-policy", inpaint=True, inpaint_until=0.0)
    agent.prepare(data())
    seen = seen_by(agent)
    _, state, _ = agent.act(seen, explore=False)
    assert state.shape == (3, 2, 2), "six predicted, four executed"
    state = agent.reset_state(state, np.array([False, True, False]))
    assert state[1].isnan().all()
    action, _, _ = agent.act(seen, state, explore=False)
    np.testing.assert_allclose(action[[0, 2], :2], state[[0, 2]], atol=1e-5)
    assert np.isfinite(action).all()
    assert agent.reset_state(None, np.ones(3, bool)) is None


@pytest.mark.parametrize("name", OFFLINE)
def test_a_policy_looks_where_its_actions_come_from(name: str) -> None:
    agent = make(name, PIXELS)
    agent.prepare(data(PIXELS))
    with torch.no_grad():  # the encoder sees nothing of the older frame
        first = agent.average.module.condition.encoders["pixels"].convs[0].weight
        first[:, :3] = 0
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 6, 24, 24), dtype=torch.uint8, generator=random)
    seen = agent.saliency({"pixels": pixels}, torch.zeros(3, 4, 2))
    assert seen is not None
    assert (seen.shape, seen.dtype, seen.requires_grad) == ((3, 2, 24, 24), torch.float32, False)
    assert seen.min() >= 0
    assert not seen[:, 0].any(), "what cannot matter is not looked at"
    assert (seen[:, 1].flatten(1).amax(1) > 0).all()
    assert agent.images({"pixels": pixels}, torch.zeros(3, 4, 2))["saliency"].dtype == np.uint8
    assert make(name).saliency(seen_by(agent), torch.zeros(3, 4, 2)) is None


def test_pictures_are_shifted_while_learning_if_asked_for() -> None:
    store = data(PIXELS)
    batch = store.sample(4)
    still, moved = make("bc", PIXELS, pad=0), make("bc", PIXELS, pad=84)
    for agent, is_still in ((still, True), (moved, False)):
        shown: list[torch.Tensor] = []
        agent.policy.condition.register_forward_pre_hook(
            lambda _, inputs, shown=shown: shown.append(inputs[0]["pixels"])
        )
        agent.update(batch)
        assert torch.equal(shown[0], batch.observation["pixels"]) == is_still
        assert shown[0].dtype == torch.uint8


def test_padding_is_learned_only_if_asked_for() -> None:
    store = data(length=4)
    rows = np.full(8, 3)  # the last action of an episode: five of six are repeated
    losses = {}
    for masked in (True, False):
        agent = make("bc", mask_padding=masked)
        agent.prepare(store)
        batch = store.read(rows)
        other = ChunkBatch(batch.observation, batch.chunk.clone(), batch.mask)
        other.chunk[:, 1:] = 0.9
        losses[masked] = [
            float(make_loss) for make_loss in (_loss(agent, batch), _loss(agent, other))
        ]
    assert losses[True][0] == losses[True][1]
    assert losses[False][0] != losses[False][1]


def _loss(agent: Imitation, batch: ChunkBatch) -> torch.Tensor:
    mask = batch.mask if agent.learning.mask_padding else None
    return (
        agent.policy.loss(batch.observation, batch.chunk, torch.Generator(), mask=mask)
        .mean()
        .detach()
    )


def test_the_learning_rate_warms_up_and_stays() -> None:
    agent = make("flow-policy", warmup=4, learning_rate=0.1)
    rates = []
    for step in range(6):
        agent.set_progress(step)
        rates.append(agent.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_numbers_that_are_not_finite_stop_learning_by_name(tmp_path: Path) -> None:
    agent, store = make("flow-policy"), data()
    running = loop(tmp_path / "run", agent, store, 20)
    running.begin()
    with torch.no_grad():
        next(agent.policy.denoiser.parameters()).fill_(torch.nan)
    with pytest.raises(
        DivergedError,
        match=r"(gradient/norm|loss/imitation) is nan at gradient step 4.*--learning-rate",
    ):
        running.run()


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
@pytest.mark.parametrize(
    "name", ["learning_rate", "weight_decay", "max_gradient_norm", "ema_decay", "ema_power"]
)
def test_numbers_that_nothing_can_be_learned_with_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}; give"):
        make("flow-policy", **{name: value})


def test_a_chunk_longer_than_every_episode_is_refused() -> None:
    with pytest.raises(UserError, match="a chunk of 4 actions is longer than the longest episode"):
        make("bc").prepare(data(length=3))


def test_a_gaussian_policy_can_be_exported_and_others_say_why_not() -> None:
    for space, action in ((STATE, CHUNK), (STATE, ACTION)):
        agent = make("bc", space, action)
        agent.prepare(data(stride=1))
        seen = seen_by(agent, 7)
        expected = agent.act(seen, explore=False)[0]
        np.testing.assert_array_equal(agent.greedy()(**seen).detach(), expected)
    for name in ("flow-policy", "diffusion-policy"):
        with pytest.raises(UserError, match="draws its actions from noise"):
            make(name).greedy()
