"""Runs that learn from another run's actions: what they remember of it, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch

from agents import Policy
from agents.core.rollout import TEACHER_ACTION, Experience
from agents.policy import read_config
from experiments.compare import final_state
from experiments.running.runs import begin_run, make_run_dir
from experiments.sessions.teachers import weights_digest
from experiments.sessions.training import Session
from experiments.train import main, new_config, parser
from tests.agents.test_baselines import their_model
from tests.experiments.helpers import (
    arguments,
    assert_same_run,
    metrics,
    refused_by,
    resume,
    train,
)

STATE = {"observation": "state", "episode_length": 9}


def rollout_of(agent: str, run: Path, *, steps: int, **flags: Any) -> Experience:
    """Train on toy/reach, and return what the last rollout, still unused, remembers."""
    words = arguments(agent, "toy/reach", run, steps=steps, **flags)
    config = new_config(vars(parser(agent).parse_args(words)))
    make_run_dir(run)
    begin_run(run, config)
    with Session(run, config, resume=False) as session:
        session.train()
        return session.replay.experience()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent with a memory on toy/reach."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    return train("ppo", "toy/reach", folder, steps=24, memory_size=4, sequence_length=3, **STATE)


def test_its_actions_in_what_the_student_sees_are_stored_and_learned_from(
    teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = STATE | {"teacher": teacher, "num_envs": 2, "rollout_length": 25}
    experience = rollout_of("ppo", run, steps=40, **flags)
    policy = Policy.load(teacher)
    for env in range(2):
        policy.begin()
        for step in range(20):
            seen = experience.observation(torch.tensor([2 * step + env]))["state"].numpy()
            action = experience.extras[TEACHER_ACTION][step, env].numpy()
            np.testing.assert_allclose(policy.act(seen)[0], action, atol=1e-6)
            if experience.truncated[step, env]:
                policy.begin()
    assert experience.truncated.sum() == 4, "the teacher's memory was reset in between"
    about = read_config(run)["teacher"]
    assert about["path"] == str(teacher)
    assert about["checkpoint"] == "step-000000024"
    assert about["digest"] == weights_digest(policy.agent)


@pytest.mark.parametrize("agent", ["ppo", "a2c"])
def test_a_taught_run_resumes_exactly_and_its_teacher_may_have_been_moved(
    agent: str, teacher: Path, tmp_path: Path
) -> None:
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    flags = STATE | {"teacher": own, "num_envs": 2, "teacher_decay": 40, "memory_size": 4}
    whole = train(agent, "toy/reach", tmp_path / "whole", steps=56, **flags)
    parts = train(agent, "toy/reach", tmp_path / "parts", steps=26, **flags)
    state = final_state(parts)["memories"]
    assert set(state) == {"agent", "teacher"}
    assert all(values.abs().sum() > 0 for values in state.values())
    assert "loss/teacher" in {tag for _, tag, _ in metrics(parts)}
    own.rename(tmp_path / "elsewhere")
    resume(parts, steps=56, teacher=tmp_path / "elsewhere")
    assert read_config(parts)["teacher"]["path"] == str(tmp_path / "elsewhere")
    assert_same_run(whole, parts)


def test_a_tasks_own_script_teaches_from_the_simulators_state_and_the_run_resumes_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the student sees, and in chunks: what is remembered is where the target lies, step by step."""
    flags: dict[str, Any] = {
        "teacher": "expert", "num_envs": 2, "guidance": 0.7, "guided_decisions": 3, "action_chunk": 3,
        "rollout_length": 5, "episode_length": 9, "observation": "both", "frame_stack": 1,
    }  # fmt: skip
    whole = train("fpo", "toy/reach", tmp_path / "whole", steps=36, **flags)
    parts = train("fpo", "toy/reach", tmp_path / "parts", steps=16, **flags)
    assert read_config(parts)["teacher"] == {"script": "toy/reach"}
    again = ["--resume", str(parts), "--steps", "36"]
    assert main([*again, "--teacher", "expert"]) == 2
    assert "the teacher of this run is its task's script; leave" in capsys.readouterr().err
    resume(parts, steps=36)
    assert_same_run(whole, parts)
    told = {tag: value for _, tag, value in metrics(whole)}
    assert 0 < told["policy/guided"] < 1
    assert "loss/teacher" in told
    experience = rollout_of(
        "fpo", tmp_path / "looked-at", steps=8, **flags | {"rollout_length": 25}
    )
    for step in range(4):
        for env in range(2):
            seen = experience.observation(torch.tensor([2 * step + env]))["state"]
            action = experience.extras[TEACHER_ACTION][step, env]
            torch.testing.assert_close(action, seen[:, 2:].expand(3, -1))


@pytest.mark.parametrize(
    ("agent", "env", "said"),
    [
        ("dppo", "dmc/walker-walk", "dmc/walker-walk has no script that knows how it is done"),
        ("dppo", "toy/recall", "toy/recall has no scripted expert; those of balance, catch, reach"),
        ("sac", "toy/reach", "--teacher is for agents that learn from one"),
    ],
)
def test_a_script_that_nobody_wrote_is_one_line(
    agent: str, env: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(agent, env, tmp_path / "run", teacher="expert", observation="state")
    assert said in refused_by(main, capsys, words)
    assert not (tmp_path / "run").exists()


def test_a_teacher_begins_episodes_of_a_policy_that_denoises_and_the_run_resumes_exactly(
    teacher: Path, tmp_path: Path
) -> None:
    """In the middle of a rollout and of an episode: who decides it goes on, and so does the teacher's memory."""
    flags = STATE | {
        "teacher": teacher, "num_envs": 2, "guidance": 0.7, "guidance_decay": 60, "guided_decisions": 3,
        "rollout_length": 25, "action_chunk": 1,
    }  # fmt: skip
    whole = train("fpo", "toy/reach", tmp_path / "whole", steps=76, **flags)
    parts = train("fpo", "toy/reach", tmp_path / "parts", steps=26, **flags)
    assert set(final_state(parts)["memories"]) == {"agent", "teacher"}
    resume(parts, steps=76)
    assert_same_run(whole, parts)
    told = {tag: value for _, tag, value in metrics(whole)}
    assert 0 < told["policy/guided"] < 0.7
    assert "loss/teacher" in told
    experience = rollout_of("fpo", tmp_path / "looked-at", steps=40, **flags)
    guided, advice = experience.extras["guided"], experience.extras[TEACHER_ACTION].clamp(-1, 1)
    assert 0 < guided.float().mean() < 1
    assert torch.equal(experience.action.clamp(-1, 1)[guided], advice[guided])
    assert not torch.equal(experience.action[~guided], advice[~guided])


def test_a_teacher_that_counts_for_nothing_leaves_the_run_as_it_is(
    teacher: Path, tmp_path: Path
) -> None:
    alone = train("ppo", "toy/reach", tmp_path / "alone", steps=40, **STATE)
    flags = STATE | {"teacher": teacher, "teacher_coefficient": 0}
    watched = train("ppo", "toy/reach", tmp_path / "watched", steps=40, **flags)
    ours, theirs = (final_state(run)["agent"]["networks"]["network"] for run in (alone, watched))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("agent", "flags", "said"),
    [
        ("ppo", {"observation": "both"}, "has the observation space"),
        ("ppo", {"env": "toy/balance"}, "has the observation space"),
        ("ppo", {"teacher": "nowhere"}, "/nowhere' does not exist; give --teacher a run folder"),
        ("ppo", {"teacher": "."}, "is no run folder"),
        ("sac", {}, "--teacher is for agents that learn from one (a2c, "),
        ("ppo", {"teacher": None, "teacher_decay": 5}, "--teacher-decay is 5, but there is no teacher"),
        ("fpo", {"teacher": None, "guidance": 0.5}, "--guidance is 0.5, but there is no teacher; add --teacher"),
        ("ppo", {"teacher_coefficient": -1}, "teacher_coefficient is -1.0; give 0 or more"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    agent: str, flags: dict[str, object], said: str, teacher: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run, flags = tmp_path / "run", STATE | {"teacher": teacher} | flags
    words = arguments(agent, str(flags.pop("env", "toy/reach")), run, steps=20,
                      **{name: value for name, value in flags.items() if value is not None})  # fmt: skip
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not run.exists()


def test_another_action_space_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = tmp_path / "run"
    words = arguments(
        "ppo", "toy/reach", taught, steps=20, **STATE, teacher=teacher, action_chunk=2
    )
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "has the action space" in error
    assert error.count("\n") == 1


def test_another_teacher_on_resume_is_refused_and_so_is_one_that_is_gone(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    shutil.copytree(teacher, own)
    run = train("ppo", "toy/reach", tmp_path / "run", steps=20, **STATE, teacher=own)
    config = (run / "config.json").read_bytes()
    train("ppo", "toy/reach", other, steps=24, memory_size=4, seed=9, **STATE)
    shutil.rmtree(own)
    for words, said in (
        ([], f"the teacher '{own}' does not exist; give --teacher a run folder that training wrote, or "
             "a zip of Stable-Baselines3, where the one of this run is now"),
        (["--teacher", str(other)], "is not the one that this run began with"),
        (["--teacher-coefficient", "2"], "--teacher-coefficient cannot change with --resume"),
    ):  # fmt: skip
        assert main(["--resume", str(run), "--steps", "30", *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert (run / "config.json").read_bytes() == config
    shutil.copytree(teacher, own)
    shutil.rmtree(own / "checkpoints" / "step-000000024")
    assert main(["--resume", str(run), "--steps", "30"]) == 2
    assert "the teacher cannot be loaded: " in capsys.readouterr().err
    untaught = train("ppo", "toy/reach", tmp_path / "untaught", steps=8, **STATE)
    assert main(["--resume", str(untaught), "--teacher", str(other)]) == 2
    assert "--teacher cannot change with --resume" in capsys.readouterr().err
    assert "teacher" not in json.loads((untaught / "config.json").read_text())


def test_a_zip_of_stable_baselines3_teaches_and_stays_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = gym.spaces.Box(-1, 1, (4,), np.float32)
    model = their_model(stable_baselines3.PPO, space)
    model.save(tmp_path / "teacher.zip")
    flags = STATE | {"teacher": tmp_path / "teacher.zip", "rollout_length": 64}
    run = tmp_path / "run"
    config = new_config(
        vars(parser("ppo").parse_args(arguments("ppo", "toy/reach", run, steps=20, **flags)))
    )
    make_run_dir(run)
    begin_run(run, config)
    with Session(run, config, resume=False) as session:
        session.train()
        experience = session.replay.experience()  # type: ignore[attr-defined]
    seen = experience.observation(torch.arange(20))["state"].numpy()
    theirs = model.predict(seen, deterministic=True)[0]
    ours = experience.extras[TEACHER_ACTION][:, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    resume(run, steps=30)
    their_model(stable_baselines3.PPO, space, shake=0.5).save(tmp_path / "teacher.zip")
    capsys.readouterr()
    assert main(["--resume", str(run), "--steps", "40"]) == 2
    assert "is not the one that this run began with" in capsys.readouterr().err
    words = arguments("ppo", "toy/balance", tmp_path / "other", steps=20, **flags)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "the teacher cannot be loaded: " in error
    assert error.count("\n") == 1
