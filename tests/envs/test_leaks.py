"""Environments that come and go leave nothing behind: memory, files, threads, GL, processes."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import psutil
import pytest

import envs
from envs.rendering import choose_backend, resolve_quality

resolve_quality("fast")
choose_backend()

from envs import rendering  # noqa: E402


def resources() -> dict[str, float]:
    """Return what this process and its children hold; GL contexts are ours and the simulators' own."""
    gc.collect()
    process = psutil.Process()
    children = process.children(recursive=True)
    children = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    kinds = [type(thing).__name__ for thing in gc.get_objects()]
    return {
        "megabytes": process.memory_info().rss / 2**20,
        "files": sum(each.num_fds() for each in (process, *children)),
        "threads": process.num_threads(),
        "processes": len(children),
        "GL contexts": kinds.count("GLContext"),
        "renderers": len(rendering._context().renderers),
        "environments": kinds.count("Environment"),
    }


def check_nothing_stays(cycle: Callable[[], None], times: int, megabytes: float) -> None:
    """Run cycles and compare what is held after them with what was after the first few."""
    resources()  # loads GL, which stays
    for _ in range(max(3, min(20, times // 10))):  # caches fill, the allocator gets its pools
        cycle()
    before = resources()
    for _ in range(times):
        cycle()
    after = resources()
    assert after.pop("megabytes") < before.pop("megabytes") + megabytes
    assert after == before


def in_a_fresh_process(function: Callable[..., None], *arguments: Any) -> None:
    """Call it where no other test has left a heap whose holes fill and open, by tens of megabytes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(function, *arguments).result()


def live_and_die(task: str, **settings: Any) -> None:
    env = envs.make(task, seed=0, quality="fast", **settings)
    env.reset()
    env.step(env.action_space.sample())
    env.close()


# One dm_control environment holds 3 MB and more, one file more per environment would show as well.
FAST = [
    ("toy/reach", {"size": 24}, 200),
    ("dmc/cartpole-swingup", {"distraction": "video_hard"}, 30),
    ("gym/HalfCheetah-v5", {}, 15),
]
SLOW = [
    ("toy/reach", {"size": 24}, 5000),
    ("dmc/cartpole-swingup", {"distraction": "video_hard"}, 2000),
    ("gym/HalfCheetah-v5", {}, 1000),
    ("metaworld/drawer-open", {}, 100),
]


@pytest.mark.parametrize(("task", "settings", "times"), FAST)
def test_environments_leave_nothing_behind(task: str, settings: dict, times: int) -> None:
    in_a_fresh_process(check_nothing_stays, partial(live_and_die, task, **settings), times, 30)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "settings", "times"), SLOW)
def test_thousands_of_environments_leave_nothing_behind(
    task: str, settings: dict, times: int
) -> None:
    in_a_fresh_process(check_nothing_stays, partial(live_and_die, task, **settings), times, 100)


def live_and_die_in_a_worker() -> None:
    vector = envs.make_vec("dmc/cartpole-swingup", 1, workers=1, seed=0, size=24, quality="fast")
    vector.reset()
    vector.step(vector.action_space.sample())
    vector.close()


@pytest.mark.parametrize("times", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_workers_leave_nothing_behind(times: int) -> None:
    in_a_fresh_process(check_nothing_stays, live_and_die_in_a_worker, times, 30)
