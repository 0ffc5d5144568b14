"""The tables of `make speed`: whole, consistent, and measured in turns. No time is asserted."""

from __future__ import annotations

import functools
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agents.core.compilation import Program
from agents.on_policy.ppo import PPOConfig
from experiments import speed
from experiments.measuring import agents, compiled, environments, on_policy, timing, training
from experiments.measuring.timing import ROUNDS, Elsewhere, Table, interleave, rates
from experiments.running import settings

TINY = 0.02
"""Seconds for each comparison."""


def check_whole(table: Table, names: list[str]) -> None:
    """Every row has a name and a cell per column, all numbers are finite, and markdown shows all of it."""
    assert [row[0] for row in table.rows] == names
    for row in table.rows:
        assert len(row) == len(table.columns)
        assert all(np.isfinite(cell) for cell in row if not isinstance(cell, str))
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(names)
    assert {line.count("|") for line in lines} == {len(table.columns) + 1}


def check_ratio(table: Table, ratio: str, over: str, under: str) -> None:
    expected = np.array(table.column(over), float) / np.array(table.column(under), float)
    np.testing.assert_allclose(np.array(table.column(ratio), float), expected, rtol=1e-9)


def test_what_is_compared_takes_turns_after_a_warm_up() -> None:
    seen: list[str] = []
    interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, seconds=1e-9)
    assert seen == ["a", "a", "b", "b"] + ["a", "b"] * ROUNDS


def test_the_median_turn_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    durations = iter([1.0, 1.0, 3.0, 1.0, 900.0, 2.0, 4.0, 3.5, 1.5])

    def call() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert interleave({"a": call}, seconds=1.0) == {"a": 3.0}


def test_calls_repeat_until_their_share_of_the_time_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    seen: list[str] = []

    def call(name: str, duration: float) -> None:
        clock[0] += duration
        seen.append(name)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    calls = {name: functools.partial(call, name, d) for name, d in (("a", 0.1), ("b", 0.5))}
    measured = rates(calls, seconds=2.0 * ROUNDS, per_call=3)
    assert measured == pytest.approx({"a": 30.0, "b": 6.0})
    assert (seen.count("a"), seen.count("b")) == (2 + 10 * ROUNDS, 2 + 2 * ROUNDS)


def test_a_device_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def finish() -> None:
        clock[0] += 2.0

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert interleave({"a": lambda: None}, seconds=1.0, finish=finish) == {"a": 2.0}


OTHER_PROCESS = """
import os, sys, time
from experiments.measuring.timing import serve

log = open(sys.argv[1], "a", buffering=1)
calls = {
    "threads": lambda: print("there", os.environ.get("LP_NUM_THREADS"), file=log),
    "nap": lambda: time.sleep(0.01),
    "die": lambda: os._exit(3),
}
serve(calls, sys.stdin, sys.stdout)
"""


@pytest.fixture(name="elsewhere")
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "other_process.py").write_text(OTHER_PROCESS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LP_NUM_THREADS", "0")
    log = str(tmp_path / "log")
    with closing(Elsewhere("other_process", log, without=["LP_NUM_THREADS"])) as process:
        yield process


def test_processes_take_turns_too_and_the_other_has_its_threads(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    log = (tmp_path / "log").open("a", buffering=1)
    calls = {"here": lambda: print("here", file=log), "there": elsewhere.calls["threads"]}
    interleave(calls, seconds=1e-9)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["here"] * 2 + ["there None"] * 2 + ["here", "there None"] * ROUNDS


def test_calls_elsewhere_are_timed_there(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # our clock stands still
    assert rates({"nap": elsewhere.calls["nap"]}, seconds=0.05)["nap"] <= 100


def test_what_was_called_elsewhere_ends_with_the_measurement(elsewhere: Elsewhere) -> None:
    elsewhere.close()
    assert elsewhere._process.returncode == 0


def test_a_process_that_dies_is_told_by_its_command(elsewhere: Elsewhere) -> None:
    with pytest.raises(RuntimeError, match=r"-m other_process .* ended with exit code 3"):
        elsewhere.calls["die"]()


def test_the_shipped_renderer_is_measured_apart_with_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple] = []

    class Spy(Elsewhere):
        def __init__(self, *arguments: str, without: tuple[str, ...]) -> None:
            asked.append((*arguments, *without))
            super().__init__(*arguments, without=without)

    measured = {}

    def fake_rates(calls: dict, seconds: float) -> dict[str, float]:
        for name, call in calls.items():
            call()
            measured[name] = getattr(call, "name", "here")
        return dict.fromkeys(calls, 1.0) | {"shipped": 2.0, "fast": 12.0, "fast there": 10.0}

    monkeypatch.setattr(environments, "Elsewhere", Spy)
    monkeypatch.setattr(environments, "rates", fake_rates)
    (table,) = environments.rendering(TINY, ("dmc/cartpole-swingup",))
    assert asked == [
        ("experiments.measuring.environments", "dmc/cartpole-swingup", "LP_NUM_THREADS")
    ]
    assert measured == {
        "shipped": "shipped",
        "reference": "reference",
        "fast": "here",
        "bare": "here",
        "fast there": "fast",
    }
    assert table.rows[0][1:] == [2.0, 1.0, 12.0, 1.0, 0.5, 6.0, 5.0]


def test_rendering_compares_shipped_reference_and_fast() -> None:
    tasks = ("dmc/cartpole-swingup", "gym/HalfCheetah-v5")
    (table,) = environments.rendering(TINY, tasks)
    means = ["geometric mean of dmc", "geometric mean of gym"]
    check_whole(table, [*tasks, *means])
    check_ratio(table, "reference / shipped", "reference", "as shipped")
    check_ratio(table, "fast / shipped", "fast", "as shipped")
    assert table.rows[2][1:] == pytest.approx(table.rows[0][1:])  # the mean of one


@pytest.mark.slow
def test_rendering_knows_every_listed_task() -> None:
    (table,) = environments.rendering(TINY)
    check_whole(
        table,
        [
            *environments.RENDERED,
            *(f"geometric mean of {family}" for family in ("dmc", "metaworld", "gym")),
        ],
    )
    fast = np.array(table.column("fast / shipped"), float)
    assert fast[7] == pytest.approx(np.exp(np.log(fast[:5]).mean()))


@pytest.mark.parametrize("family", ["dmc", "metaworld", "gym"])
def test_what_is_timed_as_shipped_is_the_same_picture(family: str) -> None:
    from envs.mujoco_view import MujocoView

    task = next(t for t in environments.RENDERED if t.startswith(family))
    scene = environments._SCENES[family](task)
    size = {"height": environments.SIZE, "width": environments.SIZE}
    view = MujocoView(lambda: (scene.model, scene.data), camera=scene.camera, **size)
    ours, shipped = view.render(), scene.shipped()
    view.close()
    scene.close()
    assert ours.std() > 0
    np.testing.assert_array_equal(ours, shipped)


def test_distractions_are_compared_with_the_clean_picture() -> None:
    (table,) = environments.distractions(TINY, "toy/reach")
    names = [*environments.DISTRACTIONS, "clean, supersample 4"]
    check_whole(table, names)
    times = np.array(table.column("ms per picture"), float)
    np.testing.assert_allclose(np.array(table.column("more than clean"), float), times - times[0])


def test_environments_are_stepped_with_and_without_workers() -> None:
    (table,) = environments.environments(TINY, ("toy/reach",))
    check_whole(table, ["toy/reach"])
    check_ratio(table, "2 workers / in process", "2 workers", "in process")


def test_trainings_time_is_taken_apart(capsys: pytest.CaptureFixture[str]) -> None:
    (table,) = training.training(TINY, "cpu", agents=["drqv2"], task="toy/reach")
    check_whole(table, ["drqv2"])
    assert capsys.readouterr().out == "", "only the tables are printed"
    (row,) = table.rows
    numbers = dict(zip(table.columns, row, strict=True))
    parts = [float(numbers[name]) for name in ("act", "simulate", "render", "learn", "rest")]
    assert sum(parts) == pytest.approx(1000 / float(numbers["agent steps/s"]))
    assert all(part > 0 for part in parts)
    assert float(numbers["updates/s"]) == pytest.approx(float(numbers["agent steps/s"]) / 4)


def test_replay_is_compared_in_memory_and_speed() -> None:
    (table,) = agents.replay(TINY, steps=300, size=32)
    check_whole(table, ["ours", "list of stacks", "Stable-Baselines3", "copying the bytes"])
    rate = np.array(table.column("samples/s"), float)
    np.testing.assert_allclose(np.array(table.column("ours / it"), float), rate[0] / rate)
    ours, stacks, theirs = np.array(table.column("bytes / frame's own")[:3], float)
    assert 1 <= ours < 1.05
    assert (stacks, theirs) == (3, 6)


def test_all_three_replays_hold_the_same_steps() -> None:
    import gymnasium as gym
    from stable_baselines3.common.buffers import ReplayBuffer

    from agents.core.replay import Replay

    pixels = gym.spaces.Box(0, 255, (9, 8, 8), np.uint8)
    action = gym.spaces.Box(-1, 1, (2,), np.float32)
    ours = Replay(pixels, action, capacity=300, num_envs=1, log=lambda line: None)
    theirs = ReplayBuffer(260, pixels, action, "cpu")
    stacks = agents._fill(ours, theirs, pixels, action, 260)
    assert len(ours) == len(stacks) == theirs.size() == 260
    batch = ours.sample(200)
    by_action = {actions.tobytes(): (seen, after) for seen, actions, _, after, _ in stacks}
    for i in range(200):
        seen, after = by_action[batch.action[i].numpy().tobytes()]
        assert np.array_equal(batch.observation["pixels"][i], seen)
        assert np.array_equal(batch.next_observation["pixels"][i], after)
    assert np.array_equal(theirs.observations[:, 0], np.stack([row[0] for row in stacks]))


def test_updates_are_compared_between_agents_and_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "find_preset", lambda *_: settings.PRESETS["debug"])
    monkeypatch.setattr(agents, "resolve_precision", lambda *_: "bf16")
    table, ratios = agents.updates(TINY, agents=("drqv2", "drqv2-sgqn"))
    check_whole(table, ["drqv2", "drqv2-sgqn"])
    check_ratio(table, "bf16 NHWC / fp32", "bf16 NHWC", "fp32")
    check_ratio(table, "of the floor", "bf16 NHWC", "floor of bf16 NHWC")
    check_whole(ratios, ["drqv2-sgqn"])
    for name in agents.SETTINGS:
        plain, guided = np.array(table.column(name), float)
        assert ratios.column(name) == pytest.approx([plain / guided])


def test_compiled_updates_are_compared_with_the_same_ones_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "find_preset", lambda *_: settings.PRESETS["debug"])
    monkeypatch.setattr(Program, "compile", lambda *_: None)
    ran: list[str] = []
    run = Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda *a: ran.append(a[0].name) or run(*a))
    (table,) = compiled.compiled(TINY, cases=("ppo pixels", "ppo state"))
    check_whole(table, ["ppo, pixels", "ppo, state"])
    check_ratio(table, "compiled / eager", "compiled", "eager")
    assert set(ran) == {"PPO.gradients"}


def test_operations_are_counted_forward_and_backward() -> None:
    x, w = torch.ones(3, 5), torch.ones(5, 7, requires_grad=True)
    agent = SimpleNamespace(update=lambda batch: torch.autograd.grad((batch @ w).sum(), w))
    assert agents._flops(agent, x) == 2 * (2 * 3 * 5 * 7)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_peer_is_stepped_on_our_task() -> None:
    (table,) = agents.peer(TINY)
    check_whole(table, ["gradient steps/s", "training steps/s"])
    check_ratio(table, "Sightline / Stable-Baselines3", "Sightline sac", "Stable-Baselines3")


def test_on_policy_training_is_compared_and_taken_apart() -> None:
    settings = {"rollout_length": 8, "minibatch_size": 8, "epochs": 1}
    cases = (
        on_policy.Case("gym/CartPole-v1", PPOConfig(**settings), {"observation": "state"}, 2),
        on_policy.Case("toy/reach", replace(on_policy.PIXELS, **settings), {"size": 36}, 2),
    )
    speed_table, parts = on_policy.on_policy(TINY, cases)
    names = ["gym/CartPole-v1", "toy/reach"]
    check_whole(speed_table, names)
    check_whole(parts, names)
    check_ratio(speed_table, "ours / theirs", "ours", "theirs")
    assert speed_table.column("operations / theirs") == pytest.approx([1.0, 1.0], rel=0.05)
    for row in parts.rows:
        assert all(float(part) > 0 for part in row[1:])


def test_both_learn_from_as_many_steps_in_a_turn() -> None:
    case = on_policy.Case(
        "gym/CartPole-v1",
        PPOConfig(rollout_length=8, minibatch_size=4, epochs=3),
        {"observation": "state"},
        2,
    )
    ours, theirs = on_policy._Ours(case), on_policy._Theirs(case)
    for trainer in (ours, theirs):
        trainer.turn()
        trainer.turn()
        trainer.close()
    assert ours.loop.state.progress.agent_steps == theirs.model.num_timesteps == 2 * 16
    assert ours.agent.gradient_updates == 4 * theirs.model._n_updates == 2 * 12


def test_the_command_prints_and_writes_the_same_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    tiny = functools.partial(agents.replay, steps=300, size=16)
    monkeypatch.setattr(agents, "replay", tiny)
    out = tmp_path / "speed.md"
    assert speed.main(["replay", "--seconds", "0.01", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("measured replay in ")
    assert printed.out.strip() == out.read_text().strip()
    assert "# Speed" in printed.out
    assert "| ours |" in printed.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["replays"], "did you mean replay"),
        (["--seconds", "0"], "positive"),
        (["--seconds", "nan"], "positive"),
        (["--out", "nowhere/speed.md"], "folder 'nowhere' does not exist"),
        (["--device", "tpu"], "not available"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speed.main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_numbers_are_short() -> None:
    table = Table("t", ["name", "x"], rows=[["a", 12345.6], ["b", 12.34], ["c", 1.234]])
    assert [timing._text(row[1]) for row in table.rows] == ["12,346", "12.3", "1.23"]
