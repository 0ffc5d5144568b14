"""Stable-Baselines3's policies act here exactly as there, and a zip's pickles are left alone."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from agents.baseline_files import Normalization, normalization_json
from agents.baselines import SB3Agent, load_sb3
from agents.core.agent import as_observation
from agents.core.errors import UserError

STATE = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
PIXELS = gym.spaces.Box(0, 255, (9, 36, 36), np.uint8)
UNIT = gym.spaces.Box(-1, 1, (2,), np.float32)
CHOICES = gym.spaces.Discrete(3)
SKEWED = gym.spaces.Box(np.array([-2.0, 0.5], np.float32), np.array([4.0, 0.75], np.float32))


class Task(gym.Env):
    """Spaces, and nothing that happens in them."""

    def __init__(self, observation: gym.Space, action: gym.Space) -> None:
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 1.0, False, False, {}


def their_model(
    kind: Any,
    seen: gym.Space = STATE,
    action: gym.Space = UNIT,
    shake: float = 1.0,
    **keywords: Any,
) -> Any:
    """Return a model whose weights are random enough for every layer to matter."""
    if kind in (SAC, TD3, DDPG):
        keywords["buffer_size"] = 10
    policy = "CnnPolicy" if seen is PIXELS else "MlpPolicy"
    options = keywords.pop("options", {})
    model = kind(
        policy, Task(seen, action), policy_kwargs=options, seed=3, device="cpu", **keywords
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            inputs = parameter[0].numel()
            spread = shake * (inputs**-0.5 if inputs > 1 else 0.1)  # small biases: inputs decide
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model


def observations(space: gym.Space, count: int = 64) -> np.ndarray:
    rng = np.random.default_rng(5)
    if space is PIXELS:
        return rng.integers(0, 256, (count, *PIXELS.shape), np.uint8)
    return (2 * rng.standard_normal((count, *STATE.shape))).astype(np.float32)


def greedy(agent: SB3Agent, seen: np.ndarray) -> np.ndarray:
    return agent.act(as_observation(seen, torch.device("cpu")), explore=False)[0]


FORMS: dict[str, dict[str, Any]] = {
    "ppo": {"kind": PPO},
    "ppo discrete": {"kind": PPO, "action": CHOICES},
    "ppo relu, other sizes": {
        "kind": PPO,
        "options": {"activation_fn": nn.ReLU, "net_arch": {"pi": [8, 7, 6], "vf": [9]}},
    },
    "ppo linear": {"kind": PPO, "options": {"net_arch": []}},
    "ppo with state-dependent exploration": {"kind": PPO, "use_sde": True},
    "ppo with a range of its own": {"kind": PPO, "action": SKEWED},
    "a2c": {"kind": A2C},
    "ppo pixels": {"kind": PPO, "seen": PIXELS},
    "ppo pixels, discrete, layers behind": {
        "kind": PPO, "seen": PIXELS, "action": CHOICES, "options": {"net_arch": [16]},
    },
    "a2c pixels, extractors apart": {
        "kind": A2C, "seen": PIXELS, "options": {"share_features_extractor": False},
    },
    "ppo pixels as they are": {
        "kind": PPO, "seen": PIXELS, "options": {"normalize_images": False}, "shake": 0.0,
    },
    "sac": {"kind": SAC, "action": SKEWED},
    "td3": {"kind": TD3, "action": SKEWED},
    "ddpg, one layer": {"kind": DDPG, "options": {"net_arch": [12]}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_actions_are_those_of_their_own_predict(form: str, tmp_path: Path) -> None:
    keywords = {"seen": STATE, "action": UNIT} | FORMS[form]
    model = their_model(**keywords)
    model.save(tmp_path / "model.zip")
    seen, action = keywords["seen"], keywords["action"]
    task_action = action if action is CHOICES else UNIT
    agent = load_sb3(tmp_path / "model.zip", seen, task_action)
    batch = observations(seen)
    theirs, _ = model.predict(batch, deterministic=True)
    ours = greedy(agent, batch)
    seen_tensors = as_observation(batch, torch.device("cpu"))
    exported = agent.greedy()(**seen_tensors)
    np.testing.assert_array_equal(exported.numpy(), ours)
    if action is CHOICES:
        assert ours.dtype == np.int64
        assert len(set(ours.tolist())) > 1
        np.testing.assert_array_equal(ours, theirs)
        return
    assert ours.dtype == np.float32
    assert np.abs(ours).max() <= 1
    # As a task sends it on: the middle of its range plus the half of it.
    sent = (action.high + action.low) / 2 + (action.high - action.low) / 2 * ours
    np.testing.assert_allclose(sent, theirs, atol=2e-5)
    assert sent.std(0).min() > 0.01, "another observation, another action"


@pytest.mark.parametrize("form", ["ppo", "ppo pixels", "a2c pixels, extractors apart"])
def test_values_are_theirs(form: str, tmp_path: Path) -> None:
    keywords = {"seen": STATE} | FORMS[form]
    model = their_model(**keywords)
    model.save(tmp_path / "model.zip")
    agent = load_sb3(tmp_path / "model.zip", keywords["seen"], UNIT)
    batch = observations(keywords["seen"])
    with torch.no_grad():
        theirs = model.policy.predict_values(torch.as_tensor(batch))[:, 0]
        seen = as_observation(batch, torch.device("cpu"))
        ours = agent.network.value(agent.network.prepare(seen))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_saliency_is_where_the_value_changes(tmp_path: Path) -> None:
    their_model(PPO, PIXELS).save(tmp_path / "model.zip")
    agent = load_sb3(tmp_path / "model.zip", PIXELS, UNIT)
    seen = as_observation(observations(PIXELS, 2), torch.device("cpu"))
    looks = agent.saliency(seen, torch.zeros(2, 2))
    assert looks is not None
    assert looks.shape == (2, 3, 36, 36)
    assert looks.max() > 0
    assert agent.images(seen, torch.zeros(2, 2))["saliency"].shape == (2 * 36, 3 * 36, 3)
    their_model(PPO).save(tmp_path / "state.zip")
    blind = load_sb3(tmp_path / "state.zip", STATE, UNIT)
    seen = as_observation(observations(STATE, 2), torch.device("cpu"))
    assert blind.saliency(seen, torch.zeros(2, 2)) is None


def test_exploration_draws_from_their_distribution(tmp_path: Path) -> None:
    model = their_model(PPO, shake=0.5)
    with torch.no_grad():
        model.policy.log_std.copy_(torch.tensor([-2.0, -1.5]))
    model.save(tmp_path / "model.zip")
    agent = load_sb3(tmp_path / "model.zip", STATE, UNIT)
    batch = np.repeat(observations(STATE, 1) / 8, 4000, axis=0)
    drawn = agent.act(as_observation(batch, torch.device("cpu")), explore=True)[0]
    middle = greedy(agent, batch[:1])[0]
    assert np.abs(middle).max() < 0.5, "nothing is clipped"
    np.testing.assert_allclose(drawn.mean(0), middle, atol=0.02)
    np.testing.assert_allclose(drawn.std(0), np.exp([-2.0, -1.5]), rtol=0.05)


def test_an_activation_can_be_told(tmp_path: Path) -> None:
    model = their_model(PPO, options={"activation_fn": nn.ReLU})
    model.save(tmp_path / "model.zip")
    batch = observations(STATE)
    theirs, _ = model.predict(batch, deterministic=True)
    silent = rewrite(tmp_path / "model.zip", policy_kwargs={})
    np.testing.assert_allclose(
        greedy(load_sb3(silent, STATE, UNIT, activation="relu"), batch), theirs, atol=1e-5
    )
    wrong = greedy(load_sb3(silent, STATE, UNIT), batch)
    assert np.abs(wrong - theirs).max() > 0.01, "without a word it is taken for tanh"


class Swish(nn.SiLU):
    """An activation of somebody's own."""


def test_an_unknown_activation_is_not_guessed(tmp_path: Path) -> None:
    their_model(PPO, options={"activation_fn": Swish}).save(tmp_path / "model.zip")
    with pytest.raises(UserError, match=r"Swish.*--sb3-activation"):
        load_sb3(tmp_path / "model.zip", STATE, UNIT)
    load_sb3(tmp_path / "model.zip", STATE, UNIT, activation="silu")
    with pytest.raises(UserError, match="unknown activation 'rleu'; did you mean relu"):
        load_sb3(tmp_path / "model.zip", STATE, UNIT, activation="rleu")


def test_it_does_not_learn(tmp_path: Path) -> None:
    their_model(PPO).save(tmp_path / "model.zip")
    with pytest.raises(UserError, match="does not learn"):
        load_sb3(tmp_path / "model.zip", STATE, UNIT).update(None)


# ------------------------------------------------------------------------------------ other tasks


@pytest.mark.parametrize(
    ("seen", "action", "said"),
    [
        (gym.spaces.Box(-1, 1, (4,), np.float32), UNIT, r"sees \[5\] and the task gives \[4\]"),
        (PIXELS, UNIT, "sees a state and the task gives pixels; give --observation state"),
        (gym.spaces.Dict({"pixels": PIXELS, "state": STATE}), UNIT, "gives pixels and state"),
        (STATE, CHOICES, "acts by 2 numbers and the task takes 3 choices"),
        (STATE, gym.spaces.Discrete(2), "acts by 2 numbers and the task takes 2 choices"),
        (STATE, gym.spaces.Box(-1, 1, (3,), np.float32), "by 2 numbers .* takes 3 numbers"),
    ],
)
def test_another_tasks_spaces_are_one_line(
    seen: gym.Space, action: gym.Space, said: str, tmp_path: Path
) -> None:
    their_model(PPO).save(tmp_path / "model.zip")
    with pytest.raises(UserError, match=said):
        load_sb3(tmp_path / "model.zip", seen, action)


def test_pixels_of_another_size_are_one_line(tmp_path: Path) -> None:
    their_model(PPO, PIXELS).save(tmp_path / "model.zip")
    larger = gym.spaces.Box(0, 255, (9, 48, 48), np.uint8)
    with pytest.raises(
        UserError, match=r"sees \[9, 36, 36\] .* \[9, 48, 48\]; give the task's --s"
    ):
        load_sb3(tmp_path / "model.zip", larger, UNIT)


# ---------------------------------------------------------------------------------------- pickles


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def rewrite(path: Path, members: dict[str, bytes] | None = None, **data: Any) -> Path:
    """Return a copy of a zip with other members, or another word in its JSON."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["data"] = json.dumps(json.loads(content["data"]) | data).encode()
    target = path.with_name(f"other-{path.name}")
    with zipfile.ZipFile(target, "w") as archive:
        for name, value in (content | (members or {})).items():
            archive.writestr(name, value)
    return target


def test_nothing_of_a_zip_is_run_without_trust(tmp_path: Path) -> None:
    their_model(PPO).save(tmp_path / "model.zip")
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded), protocol=2)
    serialized = base64.b64encode(bomb).decode()
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    armed = {
        name: value | {":serialized:": serialized}
        for name, value in data.items()
        if isinstance(value, dict) and ":serialized:" in value
    }
    armed["_last_obs"] = {":type:": "<class 'numpy.ndarray'>", ":serialized:": serialized}
    members = {"pytorch_variables.pth": bomb, "policy.optimizer.pth": bomb}
    zipped = rewrite(tmp_path / "model.zip", members, **armed)
    batch = observations(STATE)
    before = greedy(load_sb3(tmp_path / "model.zip", STATE, UNIT), batch)
    np.testing.assert_array_equal(greedy(load_sb3(zipped, STATE, UNIT), batch), before)
    assert not exploded.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 - theirs to choose
        PPO.load(zipped)
    assert exploded.exists(), "the bomb works"


def test_weights_that_are_more_than_tensors_are_refused(tmp_path: Path) -> None:
    their_model(PPO).save(tmp_path / "model.zip")
    exploded, stored = tmp_path / "exploded", io.BytesIO()
    torch.save({"action_net.weight": Bomb(exploded)}, stored)
    zipped = rewrite(tmp_path / "model.zip", {"policy.pth": stored.getvalue()})
    with pytest.raises(UserError, match=r"holds more than tensors; add --trust-pickle"):
        load_sb3(zipped, STATE, UNIT)
    assert not exploded.exists()


class Halved(BaseFeaturesExtractor):
    """Somebody's own extractor, without any weights by which it could be told."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space, 5)

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        return seen / 2


OTHERS: dict[str, dict[str, Any]] = {
    "Halved": {"kind": PPO, "options": {"features_extractor_class": Halved}},
    "another kind": {"kind": SAC, "use_sde": True},
    "actor.features_extractor": {"kind": SAC, "seen": PIXELS},
    "squashed": {"kind": PPO, "use_sde": True, "options": {"squash_output": True}},
    "MultiDiscrete": {"kind": PPO, "action": gym.spaces.MultiDiscrete([2, 1])},
}


@pytest.mark.parametrize("said", OTHERS)
def test_other_forms_are_theirs_to_load_when_trusted(said: str, tmp_path: Path) -> None:
    keywords = {"seen": STATE, "action": UNIT} | OTHERS[said]
    model = their_model(**keywords)
    model.save(tmp_path / "model.zip")
    seen = keywords["seen"]
    with pytest.raises(UserError, match=rf"({said}).*--trust-pickle"):
        load_sb3(tmp_path / "model.zip", seen, UNIT)
    if said == "MultiDiscrete":
        with pytest.raises(UserError, match="has the spaces"):
            load_sb3(tmp_path / "model.zip", seen, UNIT, trust_pickle=True)
        return
    agent = load_sb3(tmp_path / "model.zip", seen, UNIT, trust_pickle=True)
    batch = observations(seen)
    theirs, _ = model.predict(batch, deterministic=True)
    np.testing.assert_allclose(greedy(agent, batch), theirs, atol=1e-5)
    with pytest.raises(UserError, match="cannot be exported"):
        agent.greedy()


@pytest.mark.parametrize("content", [b"", b"PK nothing", None])
def test_what_is_no_zip_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.zip'.*give a zip that model.save wrote"):
        load_sb3(tmp_path / "model.zip", STATE, UNIT)


# -------------------------------------------------------------------------------- VecNormalize


def test_statistics_of_vec_normalize(tmp_path: Path) -> None:
    venv = VecNormalize(DummyVecEnv([lambda: Task(STATE, UNIT)]), clip_obs=1.5)
    venv.obs_rms.update(3 + 2 * np.random.default_rng(0).standard_normal((50, 5)))
    model = their_model(PPO)
    model.save(tmp_path / "model.zip")
    venv.save(str(tmp_path / "statistics.pkl"))
    batch = observations(STATE)
    theirs, _ = model.predict(venv.normalize_obs(batch), deterministic=True)
    plain, _ = model.predict(batch, deterministic=True)
    assert np.abs(theirs - plain).max() > 0.01

    with pytest.raises(UserError, match=r"is a pickle; add --trust-pickle"):
        load_sb3(tmp_path / "model.zip", STATE, UNIT, normalization=tmp_path / "statistics.pkl")
    (tmp_path / "statistics.json").write_text(json.dumps(normalization_json(venv)))
    for name in ("statistics.pkl", "statistics.json"):
        agent = load_sb3(
            tmp_path / "model.zip", STATE, UNIT,
            normalization=tmp_path / name, trust_pickle=name.endswith("pkl"),
        )  # fmt: skip
        np.testing.assert_allclose(greedy(agent, batch), theirs, atol=1e-5)
    with pytest.raises(
        UserError, match=r"statistics are of states of \[4\] and the task gives \[5\]"
    ):
        load_sb3(
            tmp_path / "model.zip", STATE, UNIT,
            normalization=_other(tmp_path, mean=[0.0] * 4, variance=[1.0] * 4),
        )  # fmt: skip


def _other(folder: Path, **values: Any) -> Path:
    (folder / "other.json").write_text(json.dumps({"epsilon": 0.0, "limit": 10.0, **values}))
    return folder / "other.json"


def test_a_pickle_of_something_else_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="no statistics of VecNormalize"):
        Normalization.read(tmp_path / "x.pkl", trust_pickle=True)
    with pytest.raises(UserError, match="there is no"):
        Normalization.read(tmp_path / "y.pkl", trust_pickle=True)
