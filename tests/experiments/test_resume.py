"""An interrupted run that is resumed ends bit for bit as one that was never interrupted.

Compared are all parameters, optimizer tensors, replay rows with their bookkeeping, generators, counters and the
simulators' states. The runs are cut in mid-episode, with two workers, under a distraction that keeps state of its own.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from agents import AGENTS
from agents.core.checkpoints import CheckpointStore
from agents.core.loops import OffPolicyLoop
from experiments.compare import difference, final_state, run_difference
from experiments.running.runs import begin_run, make_run_dir
from experiments.sessions.training import Session
from experiments.train import main, new_config, parser
from tests.experiments.helpers import (
    arguments,
    assert_same_run,
    metrics,
    resume,
    train,
)

ACTING = [name for name, spec in AGENTS.items() if not spec.offline and not spec.needs_base]
"""Agents that `train` trains; those of `imitate`, and those that need a base, have tests of their own."""
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


@pytest.mark.parametrize("agent", ACTING)
def test_every_agent_resumes_exactly_on_the_toy_family(agent: str, tmp_path: Path) -> None:
    check_resume(agent, "toy/reach", tmp_path, half=24, episode_length=9)


def test_without_the_environments_states_a_resumed_run_remembers_nothing(tmp_path: Path) -> None:
    flags = {"memory_size": 4, "num_envs": 2, "observation": "state", "no_exact_resume": True}
    run = train("ppo", "toy/reach", tmp_path / "run", steps=26, **flags)
    assert "memories" not in final_state(run)
    resume(run, steps=34, no_exact_resume=True)
    cut = final_state(run)["replay"]["state"]["rollout"]["cut"]
    assert cut[0].all(), "the step before the new episodes is cut off from them"


def test_what_a_teacher_did_resumes_exactly(tmp_path: Path) -> None:
    teacher = train(
        "sac", "toy/reach", tmp_path / "teacher", steps=24, episode_length=9, **PARALLEL
    )
    check_resume("ppo", "toy/reach", tmp_path, half=26, episode_length=9, teacher=teacher)


@pytest.mark.parametrize("agent", ["ppo", "drq"])
def test_chunks_of_actions_resume_exactly(agent: str, tmp_path: Path) -> None:
    check_resume(agent, "toy/reach", tmp_path, half=24, episode_length=25, action_chunk=3)


def test_a_penalty_that_adapts_resumes_exactly(tmp_path: Path) -> None:
    flags = {"surrogate": "kl_penalty", "adaptive_kl_target": 0.01, "kl_coefficient": 0.1}
    check_resume("ppo", "toy/reach", tmp_path, half=24, episode_length=9, **flags)
    coefficients = [
        v for _, tag, v in metrics(tmp_path / "parts") if tag == "policy/kl_coefficient"
    ]
    assert coefficients[-1] != 0.1, "it must have adapted"


WITH_MEMORY = [
    # Surrogates share their memory's code: one learner of each file is enough for every run.
    name if name in ("ppo", "trpo", "vmpo", "rebel") else pytest.param(name, marks=pytest.mark.slow)
    for name, spec in AGENTS.items()
    if spec.on_policy and name != "polychromic" and not spec.fine_tunes
]


@pytest.mark.parametrize("agent", WITH_MEMORY)
def test_a_memory_resumes_exactly_in_mid_episode_and_mid_rollout(
    agent: str, tmp_path: Path
) -> None:
    flags = {"memory_size": 4, "sequence_length": 3, "episode_length": 9}
    check_resume(agent, "toy/reach", tmp_path, half=26, **flags)
    state = final_state(tmp_path / "parts")
    assert state["memories"]["agent"].abs().sum() > 0


@pytest.mark.parametrize("env", TASKS)
def test_simulators_resume_exactly_in_mid_episode(env: str, tmp_path: Path) -> None:
    check_resume("sgqn", env, tmp_path, half=16, random_steps=4, action_repeat=2, episode_length=12)


@pytest.mark.slow
@pytest.mark.parametrize("env", TASKS)
@pytest.mark.parametrize("agent", ACTING)
def test_every_agent_resumes_exactly_on_every_simulator(
    agent: str, env: str, tmp_path: Path
) -> None:
    check_resume(agent, env, tmp_path, half=40, action_repeat=2, episode_length=30)


def test_training_twice_with_one_seed_gives_the_same_run_and_another_seed_another(
    tmp_path: Path,
) -> None:
    flags = {"steps": 20, "distraction": "color_hard"}
    first = train("svea", "toy/reach", tmp_path / "first", **flags)
    again = train("svea", "toy/reach", tmp_path / "again", **flags)
    other = train("svea", "toy/reach", tmp_path / "other", seed=4, **flags)
    assert_same_run(first, again)
    with pytest.raises(AssertionError, match="first and other differ"):
        assert_same_run(first, other)


def test_workers_checkpoints_logs_and_evaluations_do_not_change_what_is_learned(
    tmp_path: Path,
) -> None:
    flags = {"steps": 40, "num_envs": 2, "distraction": "video_hard", "episode_length": 9}
    plain = train("drqv2-sgqn", "toy/reach", tmp_path / "plain", **flags)
    busy = train(
        "drqv2-sgqn", "toy/reach", tmp_path / "busy", workers=2,
        checkpoint_every=6, log_every=2, eval_every=12, eval_episodes=1, **flags,
    )  # fmt: skip
    left, right = final_state(plain), final_state(busy)
    assert right["loop"].pop("best_return") > left["loop"].pop("best_return")
    assert left.keys() == right.keys()
    assert difference(left, right) is None


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make the loop end without saving, as a kill does, when it has taken `step` steps."""
    real = OffPolicyLoop._step

    def step_or_die(loop: OffPolicyLoop) -> None:
        if loop.state.progress.agent_steps >= step:
            raise KeyboardInterrupt
        real(loop)

    monkeypatch.setattr(OffPolicyLoop, "_step", step_or_die)
    return monkeypatch


@pytest.mark.parametrize("checkpoint_every", [16, 14], ids=["at a line", "between two lines"])
def test_metrics_have_no_gap_and_no_double_line_after_a_kill(
    checkpoint_every: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = {"log_every": 4, "episode_length": 9, "num_envs": 2}
    flags["checkpoint_every"] = checkpoint_every
    whole = train("drq", "toy/reach", tmp_path / "whole", steps=64, **flags)
    killed = tmp_path / "killed"
    with monkeypatch.context() as context:
        kill_at(42, context)
        assert main(arguments("drq", "toy/reach", killed, steps=64, **flags)) == 130
    assert max(step for step, _, _ in metrics(killed)) == 40, "lines are written while it trains"
    with (killed / "metrics.csv").open("a") as handle:
        handle.write("42,42,32,0.5")  # a line that the kill cut short
    resume(killed)

    def lines(run: Path) -> list[tuple[int, str, float]]:
        return [row for row in metrics(run) if not row[1].startswith("time/")]

    assert lines(killed) == lines(whole)
    for run in (whole, killed):
        counts = Counter((step, tag) for step, tag, _ in metrics(run))
        assert set(counts.values()) == {1}
        steps = [step for step, tag, _ in metrics(run) if tag == "time/fps"]
        assert steps == list(range(4, 65, 4))
    assert "interrupted" in capsys.readouterr().err


def test_a_new_total_of_steps_is_kept_through_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("sac", "toy/reach", tmp_path / "whole", steps=40)
    run = train("sac", "toy/reach", tmp_path / "run", steps=16, checkpoint_every=8)
    with monkeypatch.context() as context:
        kill_at(30, context)
        assert main(["--resume", str(run), "--steps", "40"]) == 130
    resume(run)
    assert_same_run(whole, run)


def test_a_replay_that_has_wrapped_around_goes_on_after_kills_between_writing_and_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {
        "num_envs": 2, "episode_length": 9, "replay_capacity": 30, "eval_every": 10,
        "eval_episodes": 1, "checkpoint_every": 12, "distraction": "video_hard",
    }  # fmt: skip
    whole = train("drq", "toy/reach", tmp_path / "whole", steps=120, **flags)
    run = tmp_path / "run"
    assert main(arguments("drq", "toy/reach", run, steps=48, **flags)) == 0
    for unpruned, steps in enumerate((72, 120), start=1):
        with monkeypatch.context() as context:

            def die(store: CheckpointStore, step: int) -> None:
                raise KeyboardInterrupt

            context.setattr(CheckpointStore, "_prune", die)
            assert main(["--resume", str(run), "--steps", str(steps)]) == 130
        names = sorted(folder.name for folder in (run / "checkpoints").glob("step-*"))
        assert len(names) == 2 + unpruned, "more than are kept"
    resume(run, steps=120)
    assert_same_run(whole, run)
    for each in (whole, run):
        names = sorted(folder.name for folder in (each / "checkpoints").iterdir())
        assert names == ["best", "step-000000108", "step-000000120"]
        stored = sum(file.stat().st_size for file in (each / "replay").iterdir())
        assert stored < 4 * 30 * (3 * 24 * 24 + 100), "rows that nobody needs are gone"
    evaluations = [step for step, tag, _ in metrics(run) if tag == "eval/video_hard/return_mean"]
    assert evaluations == list(range(10, 121, 10))


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("sac", "toy/reach", tmp_path / "run", steps=24)

    def contents() -> dict[Path, bytes]:
        files = [f for f in run.rglob("*") if f.is_file() and "tensorboard" not in f.parts]
        return {file: file.read_bytes() for file in files}

    before = contents()
    capsys.readouterr()
    resume(run)
    resume(run, steps=12)
    out = capsys.readouterr().out
    assert "nothing to do: it has 24 of 24 agent steps; give more --steps" in out
    assert "it has 24 of 12 agent steps" in out
    assert contents() == before
    resume(run, steps=32)
    assert final_state(run)["progress"]["agent_steps"] == 32


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    whole = train("drq", "toy/reach", tmp_path / "whole", steps=30)
    killed = train("drq", "toy/reach", tmp_path / "killed", steps=30)
    for folder in ("checkpoints", "replay"):
        shutil.rmtree(killed / folder)
    resume(killed)
    assert difference(final_state(killed), final_state(whole)) is None


@pytest.mark.parametrize("at", [13, 16, 24])
def test_a_run_that_is_asked_to_stop_leaves_no_mark_in_its_metrics(at: int, tmp_path: Path) -> None:
    """Between two lines, where a checkpoint was just saved, and where both fell together."""
    flags = {"steps": 40, "log_every": 12, "checkpoint_every": 8}
    whole = train("drq", "toy/reach", tmp_path / "whole", **flags)
    parts = tmp_path / "parts"
    config = new_config(
        vars(parser("drq").parse_args(arguments("drq", "toy/reach", parts, **flags)))
    )
    make_run_dir(parts)
    begin_run(parts, config)
    with Session(parts, config, resume=False) as session:
        session.train(lambda: session.loop.state.progress.agent_steps >= at)
    resume(parts)
    assert run_difference(whole, parts) is None


@pytest.mark.parametrize("agent", ["drqv2", "ppo"])
def test_frames_are_the_control_steps_that_were_taken(agent: str, tmp_path: Path) -> None:
    # 9 control steps are agent steps of 4, 4 and 1.
    flags = {"num_envs": 2, "action_repeat": 4, "episode_length": 9}
    whole = train(agent, "toy/reach", tmp_path / "whole", steps=28, workers=2, **flags)
    progress = final_state(whole)["progress"]
    assert (progress["agent_steps"], progress["env_frames"]) == (28, 2 * (4 * 9 + 2 * 4))
    cut = train(agent, "toy/reach", tmp_path / "cut", steps=14, **flags)
    assert final_state(cut)["progress"]["env_frames"] == 2 * (2 * 9 + 4)
    resume(cut, steps=28)
    assert final_state(cut)["progress"]["env_frames"] == progress["env_frames"]
