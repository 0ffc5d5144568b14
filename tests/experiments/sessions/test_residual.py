"""`train --agent resfit --base RUN`: the base goes along, demonstrations are mixed in, and a run resumes exactly."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from agents import Policy
from agents.core import fields
from agents.core.base_policy import BasePolicy, BaseStream
from agents.core.errors import UserError
from agents.off_policy.residual import BASE_ACTION, ResFiT
from agents.policy import load_base, read_config
from experiments import collect, export, imitate, record
from experiments import train as training
from experiments.compare import difference, final_state, run_difference
from experiments.data.datasets import Dataset
from experiments.evaluate import evaluate_run
from experiments.sessions.residual import (
    ResidualSession,
    base_actions,
    demonstrated,
    load_mixture,
)
from experiments.sessions.teachers import weights_digest
from experiments.train import main
from tests.experiments.helpers import (
    arguments,
    as_arguments,
    assert_same_run,
    metrics,
    refused_by,
    resume,
)
from tests.experiments.helpers import train as train_any

pytest.importorskip("minari")
STEPS = 11
"""Of an episode: chunks of 3 do not divide it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of toy/reach and toy/balance, and runs of policies to act on top of."""
    folder = tmp_path_factory.mktemp("residual")
    shown = {
        "--expert": True, "--size": 24, "--observation": "both", "--frame-stack": 1, "--episodes": 3,
        "--root": folder / "data",
    }  # fmt: skip
    reach = shown | {"--env": "toy/reach", "--episode-length": STEPS}
    assert collect.main(["reach/expert-v0", *as_arguments(reach)]) == 0
    assert collect.main(["reach/more-v0", *as_arguments(reach | {"--seed": 5})]) == 0
    assert collect.main(["balance/expert-v0", *as_arguments(shown | {"--env": "toy/balance"})]) == 0
    for agent, seen in (("flow-policy", "both"), ("bc", "state")):
        flags = {
            "--agent": agent, "--dataset": "reach/expert-v0", "--root": folder / "data", "--run-dir": folder / agent,
            "--preset": "debug", "--device": "cpu", "--threads": 1, "--seed": 3, "--steps": 4, "--log-every": 4,
            "--eval-every": 0, "--checkpoint-every": 4, "--action-chunk": 3, "--horizon": 4, "--observation": seen,
            "--frame-stack": 2,
        }  # fmt: skip
        assert imitate.main(as_arguments(flags)) == 0
    for agent, task in (("ppo", "toy/reach"), ("ppo", "toy/catch"), ("sac", "toy/balance")):
        name = folder / f"{agent}-{task.partition('/')[2]}"
        train_any(agent, task, name, steps=8, observation="state", episode_length=STEPS)
    return folder


def flags(made: Path, base: str = "flow-policy", **more: Any) -> dict[str, Any]:
    values = {
        "base": made / base,
        "critic_only_updates": 3,
        "threads": 1,
        "num_envs": 2,
        "updates_per_step": 1,
    }
    return values | more


def train(made: Path, run: Path, base: str = "flow-policy", **more: Any) -> Path:
    return train_any("resfit", "toy/reach", run, **flags(made, base, **more))


def shown(made: Path, *names: str) -> dict[str, Any]:
    return {"dataset": names or ("reach/expert-v0",), "root": made / "data"}


refused = partial(refused_by, main)


def test_what_the_base_takes_is_shared_by_the_environments_it_acts_in(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate asks the base for all of them at once, and a step of one takes its share."""
    run = train(made, tmp_path / "run", steps=2)
    asked: list[int] = []
    step = BasePolicy.step

    def counted(base: BasePolicy, observation: Any, *rest: Any) -> Any:
        asked.append(len(next(iter(observation.values()))))
        return step(base, observation, *rest)

    def one_second(call: Any, **_: int) -> float:
        call()
        return 1.0

    monkeypatch.setattr(BasePolicy, "step", counted)
    monkeypatch.setattr("experiments.sessions.residual.seconds_per_call", one_second)
    monkeypatch.setattr("experiments.sessions.training.seconds_per_call", lambda *_, **__: 0.0)
    monkeypatch.setattr("experiments.sessions.training.seconds_to_act", lambda *_, **__: 0.0)
    with ResidualSession(run, read_config(run), resume=True) as session:
        asked.clear()
        training, evaluation = session._measure_steps()
        episodes = session.settings.eval_episodes
    assert asked == [2, episodes]
    assert (training, evaluation) == (1 / 2, 1 / episodes)


def test_with_demonstrations_an_interrupted_run_goes_on_exactly_without_its_base(
    made: Path, tmp_path: Path
) -> None:
    """In mid-episode and mid-chunk, before a video, by two workers, rewarded for success; the base's run is gone."""
    shutil.copytree(made / "flow-policy", tmp_path / "base")
    more = shown(made, "reach/expert-v0", "reach/more-v0") | {
        "distraction": "video_hard", "workers": 2, "reward": "success", "base": tmp_path / "base", "log_every": 4,
    }  # fmt: skip
    whole = train(made, tmp_path / "whole", steps=48, **more)
    parts = train(made, tmp_path / "parts", steps=28, **more)
    state = final_state(parts)
    assert all(state["environments"]["lengths"] == 28 // 2 - STEPS)
    episodes = state["environments"][BASE_ACTION]["episodes"]
    assert episodes["used"].tolist() == [1, 1], "the second plan's first action was handed out"
    assert state["progress"]["gradient_updates"] > 10
    shutil.rmtree(tmp_path / "base")
    resume(parts, steps=48)
    assert run_difference(whole, parts) is None
    rewards = final_state(whole)["replay"]["closed_rows"]["reward"]
    assert set(rewards.tolist()) <= {0.0, 1.0}
    logged = {tag for _, tag, _ in metrics(whole)}
    assert {"policy/residual", "loss/actor", "loss/critic", "train/episode_return"} <= logged


def test_without_demonstrations_it_resumes_too(made: Path, tmp_path: Path) -> None:
    more = {"observation": "state"}
    whole = train(made, tmp_path / "whole", "bc", steps=44, **more)
    parts = train(made, tmp_path / "parts", "bc", steps=26, **more)
    resume(parts, steps=44)
    assert_same_run(whole, parts)
    resume(parts, steps=60, no_exact_resume=True)
    assert final_state(parts)["progress"]["agent_steps"] == 60


def test_evaluations_change_nothing(made: Path, tmp_path: Path) -> None:
    more = {"steps": 30, **shown(made)}
    plain = train(made, tmp_path / "plain", **more)
    busy = train(
        made, tmp_path / "busy", eval_every=10, eval_episodes=2, checkpoint_every=6, **more
    )
    left, right = final_state(plain), final_state(busy)
    assert right["loop"].pop("best_return") > left["loop"].pop("best_return")
    assert difference(left, right) is None


def test_it_begins_as_its_base_executes_its_chunks(made: Path, tmp_path: Path) -> None:
    """Return by return, in a task that takes single actions: behavior cloning draws nothing."""
    run = train(made, tmp_path / "run", "bc", steps=2)
    config = read_config(run)
    assert config["env"]["action_chunk"] == 1
    assert config["env"]["observation"] == "state"
    assert config["env"]["frame_stack"] == 2
    assert config["base"]["run"] == str(made / "bc")
    assert config["spaces"]["observation"] == {
        "box": [4], "dtype": "float32", "bounds": [-1.0, 1.0],
    }  # fmt: skip
    returns = []
    for folder in (run, run / "base", made / "bc"):
        file = evaluate_run(
            folder, distractions=["clean"], episodes=2, workers=0, media=False, name=folder.name
        )
        returns.append(json.loads(file.read_text())["results"]["clean"]["returns"])
    np.testing.assert_allclose(returns[0], returns[1], atol=1e-5)
    assert returns[1] == returns[2]


def test_every_command_takes_the_run(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(made, tmp_path / "run", steps=16)
    policy = Policy.load(run)
    with closing(envs.make(**policy.config["env"])) as env:
        seen, _ = env.reset(seed=0)
        assert env.action_space.contains(policy.act(seen))
        assert policy.state["used"].tolist() == [1]
        with pytest.raises(
            UserError, match="3 observations are given to a policy that remembers 1"
        ):
            policy.act({name: np.stack([part] * 3) for name, part in seen.items()})
    results = [
        evaluate_run(
            run, distractions=["clean"], episodes=2, workers=workers, media=False, name=str(workers)
        )
        for workers in (0, 1)
    ]
    again = [json.loads(file.read_text())["results"]["clean"]["returns"] for file in results]
    assert again[0] == again[1]
    films = tmp_path / "films"
    assert record.main([str(run), "--distractions", "clean", "--out", str(films)]) == 0
    assert (films / "clean-1.mp4").is_file()
    words = ["reach/residual-v0", "--run", str(run), "--episodes", "1", "--root", str(tmp_path)]
    assert collect.main(words) == 0
    assert len(Dataset(tmp_path, "reach/residual-v0")) == 1
    capsys.readouterr()
    assert export.main([str(run)]) == 2
    assert "acts on top of a base" in capsys.readouterr().err
    shutil.rmtree(run / "base")
    with pytest.raises(UserError, match="copy the run folder as a whole"):
        Policy.load(run)


@pytest.mark.parametrize("base", ["ppo-reach", "resfit"])
def test_any_policy_is_a_base(base: str, made: Path, tmp_path: Path) -> None:
    """Also one that acts on top of another one itself, with chunks of its own."""
    if base == "resfit":
        train(made, made / base, "bc", steps=2) if not (made / base).exists() else None
    whole = train(made, tmp_path / "whole", base, steps=40)
    parts = train(made, tmp_path / "parts", base, steps=26)
    resume(parts, steps=40)
    assert_same_run(whole, parts)
    assert (whole / "base" / "base").is_dir() == (base == "resfit")
    own, theirs = Policy.load(made / base), Policy.load(whole / "base")
    seen = np.zeros((3, 4), np.float32)
    np.testing.assert_array_equal(own.act(seen), theirs.act(seen))


def test_a_policy_of_stable_baselines3_is_a_base(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    from experiments import baseline

    words = {
        "--agent": "sb3-ppo", "--env": "toy/reach", "--observation": "state", "--steps": 16, "--seed": 1,
        "--rollout-length": 16, "--minibatch-size": 16, "--epochs": 2, "--hidden": 8, "--threads": 1,
        "--run-dir": tmp_path / "sb3", "--device": "cpu",
    }  # fmt: skip
    assert baseline.main(as_arguments(words)) == 0
    run = train(made, tmp_path / "run", base=tmp_path / "sb3", steps=16)
    shutil.rmtree(tmp_path / "sb3")
    resume(run, steps=20)
    assert Policy.load(run).act(np.zeros(4, np.float32)).shape == (2,)


def test_base_actions_of_demonstrations_are_those_of_the_base_alone_in_each(
    made: Path, tmp_path: Path
) -> None:
    """Episode by episode, in order; whoever else is asked with it."""
    run = train(made, tmp_path / "run", "bc", steps=2, **shown(made))
    base, data = load_base(run), Dataset(made / "data", "reach/expert-v0")
    with closing(envs.make(**read_config(run)["env"])) as env:
        spaces = env.observation_space, env.action_space
    episodes = [demonstrated(data.read(i), *spaces, "task", "") for i in range(3)]
    cut = [{k: v[: 12 - 4 * i] for k, v in e.observation.items()} for i, e in enumerate(episodes)]
    actions = base_actions(cut, base, np.random.default_rng(0))
    for seen, found in zip(cut, actions, strict=True):
        stream = BaseStream(base, 0)
        expected = [stream.act({"state": row[None]})[0] for row in seen["state"]]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    mixture = load_mixture(read_config(run), spaces, "success", 1.0, base, seed=0)
    own = np.random.default_rng(0).bit_generator.state
    assert mixture.demonstrations.generator_state != own, "drawn by the numbers of the run's replay"
    batch = mixture.sample(mixture.demonstrations, 300, n_step=1, discount=0.9)
    told = {
        tuple(np.round(state, 5)): success
        for e, i in zip(episodes, range(3), strict=True)
        for state, success in zip(
            e.observation["state"], data.read(i).infos["success"][1:], strict=False
        )
    }
    for state, reward in zip(batch.observation["state"].numpy(), batch.reward, strict=True):
        assert told[tuple(np.round(state, 5))] == reward
    assert 0 < batch.reward.mean() < 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"actions": np.full((STEPS, 2), 1.5)}, "E1, step 0: an action is 1.5, outside [-1, 1]"),
        ({"actions": np.zeros((STEPS, 3))}, "E1 has actions of shape"),
        ({"actions": np.zeros((0, 2))}, "E1 is empty"),
        ({"rewards": np.array([*[0.0] * (STEPS - 1), np.nan])}, f"E1, step {STEPS - 1}: 'reward' is nan"),
        ({"observations": {"state": np.full((STEPS + 1, 4), np.inf)}}, "E1, step 0: 'state' is inf"),
        ({"observations": {"left": np.zeros((STEPS + 1, 4))}}, "E1 has no 'state', only left"),
    ],
)  # fmt: skip
def test_a_damaged_demonstration_is_named(
    change: dict[str, Any], said: str, made: Path, tmp_path: Path
) -> None:
    episode = Dataset(made / "data", "reach/expert-v0").read(0)
    space, action = (gym.spaces.Box(-1, 1, (size,), np.float32) for size in (4, 2))
    assert demonstrated(episode, space, action, "task", "E1").action.shape == (STEPS, 2)
    with pytest.raises(UserError, match=re.escape(said)):
        demonstrated(dataclasses.replace(episode, **change), space, action, "task", "E1")


def test_demonstrations_that_do_not_fit_say_what_makes_them_fewer(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = None  # nobody is asked
    space, action = (gym.spaces.Box(-1, 1, (size,), np.float32) for size in (4, 2))
    about = {
        "root": made / "data",
        "datasets": ["reach/expert-v0"],
        "episodes": None,
        "only_successful": False,
    }
    config = {
        "demonstrations": about, "env": {"frame_stack": 1}, "device": "cpu", "replay_storage": "ram",
    }  # fmt: skip
    monkeypatch.setattr(fields, "free_bytes", lambda *_: 0)
    with pytest.raises(UserError, match=r"the demonstrations need .* give fewer --episodes"):
        load_mixture(config, (space, action), "task", 0.5, base, seed=0)


def test_another_base_in_the_runs_own_folder_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(made, tmp_path / "run", "ppo-reach", steps=4)
    other = train_any(
        "ppo", "toy/reach", tmp_path / "other", steps=8, observation="state", episode_length=STEPS, seed=9
    )  # fmt: skip
    for folder in (run / "base", other):
        assert read_config(folder)["agent"] == "ppo"
    shutil.rmtree(run / "base")
    shutil.copytree(other, run / "base")
    assert "is not the base that this run began with" in refused(
        capsys, ["--resume", str(run), "--steps", "8"]
    )


def test_a_base_below_the_base_is_a_part_of_its_digest(made: Path, tmp_path: Path) -> None:
    agent = Policy.load(train(made, tmp_path / "run", "bc", steps=2)).agent
    assert isinstance(agent, ResFiT)
    assert agent.base is not None
    before = weights_digest(agent)
    next(iter(agent.base.agent.networks()["average"].parameters())).data.add_(1)
    assert weights_digest(agent) != before


def test_it_teaches_others_and_they_resume_exactly(made: Path, tmp_path: Path) -> None:
    """Its memory of the base's chunks is a tree, and goes into their checkpoints."""
    teacher = train(made, tmp_path / "teacher", "bc", steps=2)
    more = {
        "observation": "state", "frame_stack": 2, "episode_length": STEPS, "teacher": teacher, "num_envs": 2,
    }  # fmt: skip
    whole = train_any("ppo", "toy/reach", tmp_path / "whole", steps=40, **more)
    parts = train_any("ppo", "toy/reach", tmp_path / "parts", steps=26, **more)
    assert final_state(parts)["memories"]["teacher"]["used"].tolist() == [2, 2]
    resume(parts, steps=40)
    assert_same_run(whole, parts)


def test_changed_demonstrations_are_refused_on_resume(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    run = train(made, tmp_path / "run", steps=4, dataset="reach/expert-v0", root=tmp_path / "data")
    shutil.rmtree(tmp_path / "data/reach/expert-v0")
    shutil.copytree(made / "data/reach/more-v0", tmp_path / "data/reach/expert-v0")
    assert "not those that the run began with" in refused(
        capsys, ["--resume", str(run), "--steps", "8"]
    )


@pytest.mark.parametrize(
    ("env", "more", "said"),
    [
        ("toy/reach", {"base": "nowhere"}, "is no run folder"),
        ("toy/reach", {"base": "ppo-catch"}, "needs a base with continuous actions|acts in 3 choices"),
        ("toy/reach", {"base": "sac-balance"}, "acts in float32 [1], this task in float32 [2]"),
        ("toy/reach", {"base": "bc", "observation": "pixels"}, "observes state float32 [4], this task shows uint8"),
        ("toy/reach", {"size": 32}, "observes pixels uint8 [6, 24, 24], this task shows"),
        ("toy/reach", {"action_chunk": 3}, "corrects every action; leave the flag out"),
        ("toy/catch", {}, "corrects single continuous actions"),
        ("toy/reach", {"dataset": "balance/expert-v0"}, "is of toy/balance, not of toy/reach"),
        ("toy/reach", {"dataset": "reach/expert-v1"}, "did you mean reach/expert-v0"),
        ("toy/reach", {"dataset": "reach/expert-v0", "action_repeat": 2}, "has action_repeat 1, this task 2"),
        ("toy/reach", {"dataset": "reach/expert-v0", "episodes": 0}, "--episodes is 0"),
        ("toy/reach", {"demonstration_share": 0.25}, "no demonstrations; add --dataset"),
        ("toy/reach", {"episodes": 0}, "--episodes is given, but no demonstrations"),
        ("toy/balance", {"base": "sac-balance", "reward": "success"}, "does not tell whether it is solved"),
        ("toy/reach", {"residual_scale": 3}, "residual_scale is 3.0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    env: str, more: dict[str, Any], said: str, made: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    values = flags(made, more.get("base", "flow-policy"), steps=8)
    values |= {k: v for k, v in more.items() if k != "base"}
    if "dataset" in more:
        values["root"] = made / "data"
    error = refused(capsys, arguments("resfit", env, tmp_path / "run", **values))
    assert any(part in error for part in said.split("|")), error
    assert not (tmp_path / "run").exists()


def test_a_base_is_needed_and_only_by_agents_that_take_one(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments("resfit", "toy/reach", tmp_path / "run", steps=8)
    assert "give its run folder with --base" in refused(capsys, words)
    words = arguments("sac", "toy/reach", tmp_path / "run", steps=8, base=made / "bc")
    assert "--base" in refused(capsys, words)


def test_a_base_that_changes_before_it_is_copied_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = training.begin_run

    def begin(run: Path, config: dict[str, Any]) -> None:
        config["base"]["digest"] = "0" * 64
        real(run, config)

    monkeypatch.setattr(training, "begin_run", begin)
    words = arguments("resfit", "toy/reach", tmp_path / "run", **flags(made, steps=4))
    assert "has changed since this run was made" in refused(capsys, words)


def test_the_base_is_not_learned(made: Path, tmp_path: Path) -> None:
    run = train(made, tmp_path / "run", steps=30, **shown(made))
    agent, before = Policy.load(run).agent, Policy.load(made / "flow-policy").agent
    assert isinstance(agent, ResFiT)
    assert agent.base is not None
    ours, theirs = agent.base.agent.networks(), before.networks()
    for name, network in theirs.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, ours[name].state_dict()[key])
    assert agent.actor.state_dict()["last.weight"].abs().sum() > 0
