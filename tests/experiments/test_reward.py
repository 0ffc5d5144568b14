"""`train --reward success`: what any agent may learn from."""

from pathlib import Path

import pytest

from experiments.train import main
from tests.experiments.helpers import final_state, metrics, train


@pytest.mark.parametrize("reward", ["task", "success"])
def test_what_is_learned_from_is_success_alone_where_asked(reward: str, tmp_path: Path) -> None:
    run = train("sac", "toy/reach", tmp_path / "run", observation="state", steps=64, reward=reward)
    learned = set(final_state(run)["replay"]["closed_rows"]["reward"].tolist())
    assert (learned <= {0.0, 1.0}) == (reward == "success")
    returns = [value for _, tag, value in metrics(run) if tag == "train/episode_return"]
    assert returns, "episodes ended"
    assert any(value % 1 for value in returns), "what is logged is the task's"


def test_a_task_that_does_not_tell_is_refused_before_a_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["--env", "toy/balance", "--reward", "success", "--run-dir", str(run)]) == 2
    assert "does not tell whether it is solved" in capsys.readouterr().err
    assert not run.exists()
