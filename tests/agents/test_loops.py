"""The loop acts, stores, learns, logs and saves exactly as often as its settings say."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.core.agent import Agent, ReplaySettings
from agents.core.checkpoints import CheckpointStore, load_tree
from agents.core.errors import DivergedError, UserError
from agents.core.logging import COLUMNS, Logger, Progress
from agents.core.loops import Hooks, OffPolicyLoop, OffPolicySettings
from agents.core.replay import Batch, Replay

ENVS = 2
BOX = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
ACTION = gym.spaces.Box(-1, 1, (3,), np.float32)


class Counting:
    """A vector environment whose observations are (episode, step in it); the reward is 1.

    Args:
        length: steps of an episode.
        terminates: episodes truly end, instead of at a time limit.
        drops: (number of the step, environment) at which a worker is said to be replaced.
    """

    num_envs = ENVS
    single_action_space = ACTION
    action_space = gym.vector.utils.batch_space(ACTION, ENVS)

    def __init__(
        self,
        length: int = 5,
        terminates: bool = False,
        drops: frozenset[tuple[int, int]] = frozenset(),
    ) -> None:
        self.length, self.terminates, self.drops = length, terminates, drops
        self.state = np.zeros((ENVS, 2), np.float32)
        self.actions: list[np.ndarray] = []
        self.order: list[str] = []

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return self.state.copy(), {}

    def step_async(self, actions: np.ndarray) -> None:
        self.order.append("sent")
        self.actions.append(np.array(actions))

    def step_wait(self) -> Any:
        self.order.append("received")
        dropped = np.array([(len(self.actions), env) in self.drops for env in range(ENVS)])
        self.state[:, 1] += 1
        ended = (self.state[:, 1] == self.length) & ~dropped
        final = np.array([*self.state.copy(), None], dtype=object)[:ENVS]
        info: dict[str, Any] = {"dropped": dropped}
        if ended.any():
            info |= {
                "final_obs": final,
                "episode": {"r": self.state[:, 1].copy(), "l": self.state[:, 1].copy()},
                "_episode": ended,
            }
        self.state[ended | dropped, 0] += 1
        self.state[ended | dropped, 1] = 0
        never = np.zeros(ENVS, bool)
        ends = (ended, never) if self.terminates else (never, ended)
        return self.state.copy(), np.ones(ENVS), *ends, info

    def get_state(self) -> dict[str, Any]:
        return {"state": self.state.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.state = state["state"].copy()


class FakeAgent(Agent):
    """Remembers what it is asked; `metric` makes the loss of each update."""

    def __init__(self, envs: Counting, metric: Callable[[int], float] = float) -> None:
        self.envs, self.metric = envs, metric
        self.net = nn.Linear(2, 1)
        self.generator = torch.Generator()
        self.replay_settings = ReplaySettings(batch_size=32, n_step=1, discount=0.9)
        self.acted: list[dict[str, Any]] = []
        self.batches: list[Batch] = []
        self.progress = -1

    def act(self, observation: Any, state: Any = None, *, explore: bool) -> Any:
        self.acted.append({"explore": explore, "at": self.progress})
        return np.zeros((ENVS, 3), np.float32), None, {}

    def update(self, batch: Batch) -> dict[str, Tensor]:
        self.envs.order.append("update")
        self.batches.append(batch)
        return {"loss/critic": torch.tensor(self.metric(len(self.batches)))}

    def set_progress(self, agent_steps: int) -> None:
        self.progress = agent_steps

    def networks(self) -> dict[str, nn.Module]:
        return {"critic": self.net}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {}


def make_loop(
    folder: Path,
    envs: Counting | None = None,
    metric: Callable[[int], float] = float,
    hooks: Hooks | None = None,
    **settings: Any,
) -> OffPolicyLoop:
    """Build a loop of fakes; `.agent` and `.envs` tell afterwards what happened."""
    envs = envs or Counting()
    values = {"steps": 40, "random_steps": 10, "log_every": 10, "eval_every": 0} | settings
    replay = Replay(
        BOX, ACTION, capacity=200, num_envs=ENVS, frame_stack=1, storage="ram", log=lambda _: None
    )
    folder.mkdir(exist_ok=True)
    return OffPolicyLoop(
        FakeAgent(envs, metric),
        envs,  # type: ignore[arg-type]
        replay,
        OffPolicySettings(**values),
        logger=Logger(folder),
        checkpoints=CheckpointStore(folder),
        action_repeat=4,
        seed=7,
        hooks=hooks or Hooks(line=lambda _: None),
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.35, 0.5, 1.0, 2.0])
def test_updates_are_counted_per_agent_step_of_all_environments(
    rate: float, tmp_path: Path
) -> None:
    loop = make_loop(tmp_path, updates_per_step=rate)
    progress = loop.run().progress
    assert (progress.agent_steps, progress.env_frames) == (40, 160)
    assert len(loop.envs.actions) == 40 // ENVS
    assert progress.gradient_updates == len(loop.agent.batches) == int(rate * (40 - 10))


def test_a_part_of_an_update_is_not_lost_over_checkpoints(tmp_path: Path) -> None:
    first = make_loop(tmp_path, updates_per_step=0.35, steps=24)
    first.run()
    parts = first.checkpoints.load(replay=first.replay)
    second = make_loop(tmp_path, updates_per_step=0.35, steps=40)
    second.checkpoints.load(replay=second.replay)
    second.resume(parts)
    assert second.run().progress.gradient_updates == int(0.35 * 30)


def test_updates_run_while_the_environments_step(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    loop.run()
    order = loop.envs.order
    assert order[-4:] == ["sent", "update", "update", "received"]
    assert order[:2] == ["sent", "received"]


def test_random_actions_come_first_and_are_uniform_and_seeded(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "a", steps=300, random_steps=200)
    loop.run()
    random = np.stack(loop.envs.actions[:100])
    assert random.dtype == np.float32
    assert np.all(np.abs(random) <= 1)
    assert abs(random.mean()) < 0.1
    assert abs(random.std() - 1 / np.sqrt(3)) < 0.05
    assert len(np.unique(random)) == random.size, "every environment and joint draws its own"
    assert not np.any(loop.envs.actions[100:]), "then the agent's own"
    assert [call["at"] for call in loop.agent.acted] == list(range(200, 300, 2))
    assert all(call["explore"] for call in loop.agent.acted)
    again = make_loop(tmp_path / "b", steps=20, random_steps=20)
    again.run()
    np.testing.assert_array_equal(again.envs.actions, random[:10])


@pytest.mark.parametrize("terminates", [True, False])
def test_time_limits_bootstrap_and_true_ends_do_not(terminates: bool, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, Counting(length=3, terminates=terminates), steps=60)
    loop.run()
    last = 0
    for batch in loop.agent.batches:
        step = batch.observation["state"][:, 1]
        following = batch.next_observation["state"]
        torch.testing.assert_close(following[:, 1], step + 1, msg="the true last observation")
        torch.testing.assert_close(following[:, 0], batch.observation["state"][:, 0])
        is_last = step == 2
        last += int(is_last.sum())
        expected = torch.where(is_last & terminates, 0.0, 0.9)
        torch.testing.assert_close(batch.discount, expected)
    assert last > 50


def test_transitions_of_a_replaced_worker_are_thrown_away(tmp_path: Path) -> None:
    drops = frozenset({(4, 1), (9, 0), (9, 1)})
    loop = make_loop(tmp_path, Counting(length=7, drops=drops), steps=80)
    state = loop.run()
    assert state.progress.agent_steps == 80
    assert len(loop.replay) == 80 - len(drops)
    batch = loop.replay.sample(2000)
    seen, following = batch.observation["state"], batch.next_observation["state"]
    torch.testing.assert_close(following[:, 0], seen[:, 0], msg="no step into another episode")
    torch.testing.assert_close(following[:, 1], seen[:, 1] + 1)
    assert set(batch.discount.tolist()) == {np.float32(0.99)}


def test_returns_and_losses_are_logged_once_at_every_interval(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, log_every=8, steps=44, checkpoint_every=30)
    loop.run()
    lines = rows(tmp_path)
    steps = [int(row["agent_steps"]) for row in lines if row["tag"] == "time/fps"]
    assert steps == [8, 16, 24, 32, 40, 44], "and once more at the end"
    returns = [float(row["value"]) for row in lines if row["tag"] == "train/episode_return"]
    assert set(returns) == {5.0}
    losses = {int(r["agent_steps"]): float(r["value"]) for r in lines if r["tag"] == "loss/critic"}
    assert losses[16] == np.mean(range(1, 7)), "the mean over all updates since the last line"
    assert all(int(row["env_frames"]) == 4 * int(row["agent_steps"]) for row in lines)
    assert loop.checkpoints.latest().name == "step-000000044"  # type: ignore[union-attr]


class Solving(Counting):
    """A `Counting` whose environment 0 is solved in the second step of its even episodes, and 1 in its last steps."""

    def step_wait(self) -> Any:
        episode, place = self.state[:, 0].copy(), self.state[:, 1] + 1
        seen, reward, terminated, truncated, info = super().step_wait()
        now = np.array([place[0] == 2 and episode[0] % 2 == 0, place[1] == self.length], float)
        ended = terminated | truncated
        info["success"] = np.where(ended, 0.0, now)  # of an episode that begins
        if ended.any():
            info["final_info"] = {"success": np.where(ended, now, 0.0)}
        return seen, reward, terminated, truncated, info


def test_success_at_any_moment_of_an_episode_is_logged(tmp_path: Path) -> None:
    """Also that of an episode in which a run was interrupted; episodes end at the agent steps 10, 20, 30 ..."""

    def told(folder: Path = tmp_path) -> dict[int, float]:
        lines = [row for row in rows(folder) if row["tag"] == "train/success"]
        return {int(row["agent_steps"]): float(row["value"]) for row in lines}

    loop = make_loop(tmp_path, envs=Solving(), log_every=40, steps=26, checkpoint_every=30)
    loop.run()
    assert told() == {26: 3 / 4}
    other = make_loop(tmp_path, envs=Solving(), log_every=40, steps=80, checkpoint_every=30)
    other.resume(loop.checkpoints.load(replay=other.replay))
    other.run()
    assert told()[40] == 3 / 4, (
        "the third episode of environment 0 was solved before the interruption"
    )
    assert told()[80] == 6 / 8
    make_loop(tmp_path / "silent", steps=40).run()
    assert not told(tmp_path / "silent"), "a task that does not tell"


def test_a_last_step_that_is_logged_already_is_not_logged_again(tmp_path: Path) -> None:
    make_loop(tmp_path, log_every=20, steps=40, checkpoint_every=30).run()
    assert [row["agent_steps"] for row in rows(tmp_path) if row["tag"] == "time/fps"] == [
        "20",
        "40",
    ]


def test_a_finished_loop_that_is_resumed_writes_nothing(tmp_path: Path) -> None:
    first = make_loop(tmp_path)
    first.run()
    second = make_loop(tmp_path)
    second.resume(first.checkpoints.load(replay=second.replay))
    before = rows(tmp_path), next((tmp_path / "checkpoints").iterdir()).stat().st_ino
    second.run()
    assert before == (rows(tmp_path), next((tmp_path / "checkpoints").iterdir()).stat().st_ino)
    assert second.envs.actions == []


def test_a_last_step_that_is_saved_already_is_logged_all_the_same(tmp_path: Path) -> None:
    make_loop(tmp_path, log_every=16, steps=40, checkpoint_every=20).run()
    lines = rows(tmp_path)
    assert [row["agent_steps"] for row in lines if row["tag"] == "time/fps"] == ["16", "32", "40"]
    assert {row["agent_steps"] for row in lines if row["tag"] == "loss/critic"} == {
        "16",
        "32",
        "40",
    }


def test_every_evaluation_happens_once_however_the_run_is_cut(tmp_path: Path) -> None:
    evaluated: list[int] = []

    def evaluate(progress: Progress) -> dict[str, float]:
        evaluated.append(progress.agent_steps)
        return {"eval/clean/return_mean": 1.0}

    hooks = Hooks(evaluate=evaluate, line=lambda _: None)
    for steps in (40, 40, 20, 46, 60):  # finished, the same again, less than is done, more
        loop = make_loop(tmp_path, hooks=hooks, steps=steps, eval_every=10, checkpoint_every=15)
        if loop.checkpoints.latest():
            loop.resume(loop.checkpoints.load(replay=loop.replay))
        loop.run()
    assert evaluated == [10, 20, 30, 40, 50, 60]
    assert loop.checkpoints.latest().name == "step-000000060"  # type: ignore[union-attr]


def test_weights_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    def evaluate(progress: Progress) -> dict[str, float]:
        return {"eval/clean/return_mean": float(progress.agent_steps)}

    hooks = Hooks(evaluate=evaluate, line=lambda _: None)
    settings = {"eval_every": 10, "log_every": 1000, "checkpoint_every": 1000}
    loop = make_loop(tmp_path, hooks=hooks, **settings)
    real = loop.agent.update

    def poison(batch: Batch) -> dict[str, Tensor]:
        if len(loop.agent.batches) == 15:
            nn.init.constant_(loop.agent.net.bias, float("nan"))  # type: ignore[attr-defined]
        return real(batch)

    loop.agent.update = poison  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match=r"critic\.bias is not finite"):
        loop.run()
    best = tmp_path / "checkpoints" / "best"
    assert load_tree(best, "progress")["agent_steps"] == 20


class Opaque(Counting):
    """Its state cannot be read."""

    def __init__(self, state: Any = None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.unreadable = state
        self.seeds: list[int | None] = []

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.seeds.append(seed)
        return super().reset(seed)

    def get_state(self) -> dict[str, Any]:
        if isinstance(self.unreadable, dict):
            return self.unreadable
        raise self.unreadable or NotImplementedError("nothing to see here")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            NotImplementedError("no state\nto be had"),
            r"\(NotImplementedError: no state to be had\)",
        ),
        (UserError("gym/X keeps a secret"), r"\(gym/X keeps a secret\)"),
        ({"world": object()}, r"\(TypeError: 'environments/world' is a object;"),
    ],
)
def test_a_state_that_cannot_be_saved_is_said_before_training_begins(
    state: Any, said: str, tmp_path: Path
) -> None:
    loop = make_loop(tmp_path, Opaque(state))
    with pytest.raises(UserError, match=said) as refused:
        loop.run()
    assert "add --no-exact-resume" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert loop.envs.actions == []


def test_without_exact_resume_a_resumed_run_begins_new_episodes(tmp_path: Path) -> None:
    settings = {"exact_resume": False, "random_steps": 0, "checkpoint_every": 8}
    first = make_loop(tmp_path, Opaque(length=7), steps=24, **settings)
    first.run()
    second = make_loop(tmp_path, Opaque(length=7), steps=60, **settings)
    second.resume(second.checkpoints.load(replay=second.replay))
    assert second.run().progress.agent_steps == 60
    assert len(second.replay) == 60, "everything that was stored is still there"
    assert first.envs.seeds[0] != second.envs.seeds[0], "not the first episodes over again"
    assert all(len(loop.envs.seeds) == 1 for loop in (first, second))
    batch = second.replay.sample(3000)
    seen, following = batch.observation["state"], batch.next_observation["state"]
    torch.testing.assert_close(following[:, 1], seen[:, 1] + 1, msg="no step over the gap")
    torch.testing.assert_close(following[:, 0], seen[:, 0])


class Fragile(Counting):
    """Its state can be read, not restored."""

    def set_state(self, state: dict[str, Any]) -> None:
        raise RuntimeError("read only")


def test_a_state_that_cannot_be_restored_is_said_before_training_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(RuntimeError: read only\); add --no-exact-resume"):
        make_loop(tmp_path, Fragile()).run()


def test_environments_that_cannot_be_restored_any_more_can_be_left_behind(tmp_path: Path) -> None:
    first = make_loop(tmp_path, steps=24)
    first.run()
    second = make_loop(tmp_path, Fragile(), steps=40, exact_resume=False)
    second.resume(second.checkpoints.load(replay=second.replay))
    assert second.run().progress.agent_steps == 40


class Torn(Counting):
    """A film tears in the fourteenth step."""

    def step_wait(self) -> Any:
        if len(self.actions) == 14:
            raise UserError("cannot read 'film.mp4'")
        return super().step_wait()


def test_a_mistake_found_in_mid_training_loses_nothing(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, Torn(), steps=60, checkpoint_every=20)
    with pytest.raises(UserError, match=r"film\.mp4"):
        loop.run()
    newest = loop.checkpoints.latest()
    assert newest is not None
    assert newest.name == "step-000000026", "thirteen whole steps of two environments"
    again = make_loop(tmp_path, steps=60)
    parts = again.checkpoints.load(replay=again.replay)
    assert "environments" not in parts, "these were in the middle of a step"
    again.resume(parts)
    assert again.run().progress.agent_steps == 60
    assert len(again.replay) == 60


def test_an_action_that_is_not_finite_is_named_before_it_is_sent(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, random_steps=0)
    bad = np.full((ENVS, 3), np.nan, np.float32)
    loop.agent.act = lambda *_, explore: (bad, None, {})  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="action is not finite at agent step 0"):
        loop.run()
    assert loop.envs.actions == []


@pytest.mark.parametrize(("log_every", "noticed"), [(4, 28), (1000, 32)])
def test_a_loss_that_is_not_finite_is_named_and_the_last_checkpoint_kept(
    log_every: int, noticed: int, tmp_path: Path
) -> None:
    loop = make_loop(
        tmp_path,
        metric=lambda update: float("nan") if update >= 15 else 1.0,
        checkpoint_every=8,
        log_every=log_every,
    )
    with pytest.raises(DivergedError, match=f"loss/critic is nan at agent step {noticed}"):
        loop.run()
    newest = loop.checkpoints.latest()
    assert newest is not None
    assert newest.name == "step-000000024", "update 15 belongs to step 26"
    assert load_tree(newest, "progress")["gradient_updates"] == 14
    assert loop.checkpoints.load(replay=loop.replay)


def test_a_loss_that_was_not_finite_for_one_update_is_found_before_the_next_checkpoint(
    tmp_path: Path,
) -> None:
    loop = make_loop(
        tmp_path,
        metric=lambda update: float("inf") if update == 15 else 1.0,
        checkpoint_every=8,
        log_every=1000,
    )
    with pytest.raises(DivergedError, match="loss/critic is inf at agent step 32"):
        loop.run()
    newest = loop.checkpoints.latest()
    assert newest is not None
    assert newest.name == "step-000000024"


def test_a_line_of_metrics_averages_over_all_of_its_interval_however_the_run_is_cut(
    tmp_path: Path,
) -> None:
    flags = {"log_every": 20}
    whole = make_loop(tmp_path / "whole", **flags)
    whole.run()
    first = make_loop(tmp_path / "cut", checkpoint_every=14, **flags)
    first.hooks.stop = lambda: first.state.progress.agent_steps >= 36
    first.save = lambda **_: None if first.hooks.stop() else OffPolicyLoop.save(first)  # killed
    first.run()
    second = make_loop(tmp_path / "cut", metric=lambda update: update + 18.0, **flags)
    second.resume(second.checkpoints.load(replay=second.replay))
    assert second.state.progress.agent_steps == 28
    assert second.state.progress.gradient_updates == 18, "the fake must count on from here"
    second.logger = Logger(tmp_path / "cut", resume_from=28)
    second.run()

    def lines(name: str) -> list[tuple[str, str, str]]:
        return [
            (row["agent_steps"], row["tag"], row["value"])
            for row in rows(tmp_path / name)
            if not row["tag"].startswith("time/")
        ]

    assert lines("cut") == lines("whole")


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, checkpoint_every=8)
    real = loop.agent.update

    def poison(batch: Batch) -> dict[str, Tensor]:
        if len(loop.agent.batches) == 20:
            nn.init.constant_(loop.agent.net.bias, float("inf"))  # type: ignore[attr-defined]
        return real(batch)

    loop.agent.update = poison  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match=r"critic\.bias is not finite"):
        loop.run()
    newest = loop.checkpoints.latest()
    assert newest is not None
    assert torch.isfinite(load_tree(newest, "agent")["networks"]["critic"]["bias"]).all()


def test_the_best_evaluation_keeps_its_weights(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0, 3.0])
    hooks = Hooks(evaluate=lambda _: {"eval/clean/return_mean": next(scores)}, line=lambda _: None)
    make_loop(tmp_path, hooks=hooks, eval_every=10).run()
    best = tmp_path / "checkpoints" / "best"
    assert load_tree(best, "progress")["agent_steps"] == 20
    assert load_tree(best, "agent").keys() == {"networks"}
    logged = [float(r["value"]) for r in rows(tmp_path) if r["tag"] == "eval/clean/return_mean"]
    assert logged == [1.0, 3.0, 2.0, 3.0]


def test_a_loop_that_is_asked_to_stop_saves_where_it_is(tmp_path: Path) -> None:
    asked = iter([False] * 6 + [True] * 9)
    hooks = Hooks(stop=lambda: next(asked), line=lambda _: None)
    loop = make_loop(tmp_path, hooks=hooks)
    assert loop.run().progress.agent_steps == 12
    assert loop.checkpoints.latest().name == "step-000000012"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("log_every", 0), ("checkpoint_every", 0), ("keep_checkpoints", 0),
        ("eval_episodes", 0), ("random_steps", -1), ("eval_every", -1),
        ("updates_per_step", -0.5), ("updates_per_step", float("nan")),
        ("updates_per_step", float("inf")),
    ],
)  # fmt: skip
def test_settings_that_no_loop_can_run_with_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}"):
        OffPolicySettings(**{name: value})  # type: ignore[arg-type]


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    for step in (10, 20, 30):
        logger.scalars({"a": step / 8, "b": 1e-9}, Progress(step, 4 * step, step, 0.5))
    logger.close()
    with (tmp_path / "metrics.csv").open("a") as handle:
        handle.write("40,160,40,0.50,a")  # cut short by a kill
    logger = Logger(tmp_path, resume_from=20)
    logger.scalars({"a": 7.0}, Progress(30, 120, 30, 1.25))
    logger.close()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert lines[1:3] == ["10,40,10,0.50,a,1.25", "10,40,10,0.50,b,1e-09"]
    assert [line.split(",")[0] for line in lines[1:]] == ["10", "10", "20", "20", "30"]
    assert lines[-1] == "30,120,30,1.25,a,7"
    assert not (tmp_path / "metrics.tmp").exists()


def test_a_log_that_is_not_resumed_from_a_step_goes_on_at_its_end(tmp_path: Path) -> None:
    for step in (1, 2):
        logger = Logger(tmp_path)
        logger.scalars({"a": 1.0}, Progress(step))
        logger.close()
    assert [row["agent_steps"] for row in rows(tmp_path)] == ["1", "2"]
