"""The replay gives back exactly what a naive list of episodes would, and fits in memory."""

from __future__ import annotations

import errno
import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.core.errors import NotFiniteError, UserError
from agents.core.replay import Field, Replay

SIDE = 2
ACTION_SPACE = gym.spaces.Box(-1, 1, (2,), np.float32)


def space_of(frame_stack: int) -> gym.spaces.Dict:
    return gym.spaces.Dict(
        {
            "pixels": gym.spaces.Box(0, 255, (3 * frame_stack, SIDE, SIDE), np.uint8),
            "state": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
        }
    )


@dataclass
class Episode:
    """Plain lists: L + 1 observations, L steps."""

    frames: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # counters of the rows in the ring

    def observation(self, t: int, frame_stack: int) -> dict[str, np.ndarray]:
        stack = [self.frames[max(t - back, 0)] for back in range(frame_stack - 1, -1, -1)]
        return {"pixels": np.concatenate(stack), "state": self.states[t]}


class Naive:
    """N environments that write random episodes into a replay and into lists."""

    def __init__(self, replay: Replay, seed: int) -> None:
        self.replay, self.k, self.n = replay, replay.frame_stack, replay.num_envs
        self.rng = np.random.default_rng(seed)
        self.episodes: list[list[Episode]] = [[] for _ in range(self.n)]
        self.rows = [0] * self.n
        for env in range(self.n):
            self.begin(env)
        replay.start(self.batch(self.current()))

    def current(self) -> list[Episode]:
        return [episodes[-1] for episodes in self.episodes]

    def see(self, episode: Episode, env: int) -> None:
        episode.frames.append(self.rng.integers(0, 256, (3, SIDE, SIDE)).astype(np.uint8))
        episode.states.append(self.rng.normal(size=2).astype(np.float32))
        episode.rows.append(self.rows[env])
        self.rows[env] += 1

    def begin(self, env: int) -> None:
        self.episodes[env].append(Episode())
        self.see(self.episodes[env][-1], env)

    def batch(self, episodes: list[Episode]) -> dict[str, np.ndarray]:
        views = [episode.observation(len(episode.frames) - 1, self.k) for episode in episodes]
        return {name: np.stack([view[name] for view in views]) for name in views[0]}

    def step(self, kind: list[str]) -> np.ndarray:
        """Take one step; `kind` of each environment: go, terminate, truncate or drop."""
        action = self.rng.uniform(-1, 1, (self.n, 2)).astype(np.float32)
        reward = self.rng.normal(size=self.n).astype(np.float32)
        note = self.rng.integers(0, 100, (self.n, 1))
        old = self.current()
        for env, what in enumerate(kind):
            if what == "drop":
                reward[env] = np.nan  # what a dead worker reports is not read
            else:
                old[env].steps.append(
                    {
                        "action": action[env],
                        "reward": reward[env],
                        "terminated": what == "terminate",
                        "note": note[env],
                    }
                )
                self.see(old[env], env)
        final = self.batch(old)
        for env, what in enumerate(kind):
            if what != "go":
                self.begin(env)
        return self.replay.add(
            action,
            reward,
            np.array([what == "terminate" for what in kind]),
            np.array([what == "truncate" for what in kind]),
            self.batch(self.current()),
            final,
            np.array([what == "drop" for what in kind]),
            {"note": note},
        )

    def random_steps(self, steps: int) -> None:
        kinds = ["go", "terminate", "truncate", "drop"]
        for _ in range(steps):
            self.step(list(self.rng.choice(kinds, self.n, p=[0.76, 0.08, 0.1, 0.06])))

    def find(self, id_: int) -> tuple[int, Episode, int]:
        counter, env = divmod(int(id_), self.n)
        for episode in self.episodes[env]:
            if counter in episode.rows:
                return env, episode, episode.rows.index(counter)
        raise AssertionError(f"id {id_} was never written")

    def oldest(self, env: int) -> int:
        return max(self.rows[env] - self.replay.ring, 0)

    def valid_ids(self) -> set[int]:
        """Every transition whose whole stack is still in the ring."""
        return {
            episode.rows[t] * self.n + env
            for env, episodes in enumerate(self.episodes)
            for episode in episodes
            for t in range(len(episode.steps))
            if episode.rows[max(t - self.k + 1, 0)] >= self.oldest(env)
        }


def make(frame_stack: int = 3, num_envs: int = 2, rows: int = 30, **changes: object) -> Replay:
    settings = {
        "capacity": rows * num_envs,
        "num_envs": num_envs,
        "frame_stack": frame_stack,
        "extras": {"note": Field((1,), torch.int64)},
        "seed": 3,
        "log": lambda line: None,
    }
    return Replay(space_of(frame_stack), ACTION_SPACE, **(settings | changes))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_envs=st.integers(1, 4),
    frame_stack=st.integers(1, 4),
    n_step=st.integers(1, 5),
    rows=st.integers(8, 40),
    steps=st.integers(3, 100),
)
def test_every_sampled_transition_is_the_naive_one(
    seed: int, num_envs: int, frame_stack: int, n_step: int, rows: int, steps: int
) -> None:
    replay = make(frame_stack, num_envs, rows)
    naive = Naive(replay, seed)
    naive.random_steps(steps)
    valid = naive.valid_ids()
    if not valid:
        with pytest.raises(ValueError, match="no whole transition"):
            replay.sample(1)
        return
    batch = replay.sample(200, n_step=n_step, discount=0.9)
    assert set(batch.ids.tolist()) <= valid
    for i, id_ in enumerate(batch.ids.tolist()):
        _, episode, t = naive.find(id_)
        window = episode.steps[t : t + n_step]
        end = t + len(window)
        now, then = (episode.observation(at, frame_stack) for at in (t, end))
        for name in now:
            np.testing.assert_array_equal(batch.observation[name][i], now[name])
            np.testing.assert_array_equal(batch.next_observation[name][i], then[name])
        np.testing.assert_array_equal(batch.action[i], window[0]["action"])
        np.testing.assert_array_equal(batch.extras["note"][i], window[0]["note"])
        expected = sum(0.9**j * step["reward"] for j, step in enumerate(window))
        assert batch.reward[i] == pytest.approx(expected, abs=1e-5)
        bootstrap = 0.0 if window[-1]["terminated"] else 0.9 ** len(window)
        assert batch.discount[i] == pytest.approx(bootstrap, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_envs=st.integers(1, 3),
    length=st.integers(1, 7),
    steps=st.integers(12, 90),
)
def test_every_sampled_sequence_is_a_stretch_of_naive_rows(
    seed: int, num_envs: int, length: int, steps: int
) -> None:
    replay = make(3, num_envs, 20)
    naive = Naive(replay, seed)
    naive.random_steps(steps)
    batch = replay.sample_sequences(50, length)
    for i, ids in enumerate(batch.ids.tolist()):
        envs = {id_ % num_envs for id_ in ids}
        counters = [id_ // num_envs for id_ in ids]
        (env,) = envs
        assert counters == list(range(counters[0], counters[0] + length))
        assert counters[0] >= naive.oldest(env)
        assert counters[-1] < naive.rows[env]
        for t, id_ in enumerate(ids):
            _, episode, at = naive.find(id_)
            seen = episode.observation(at, 3)
            for name in seen:
                np.testing.assert_array_equal(batch.observation[name][i, t], seen[name])
            assert batch.is_first[i, t] == (at == 0)
            taken = at < len(episode.steps)
            assert batch.taken[i, t] == taken
            step = episode.steps[at] if taken else dict.fromkeys(("action", "reward", "note"), 0)
            np.testing.assert_array_equal(batch.action[i, t], np.broadcast_to(step["action"], 2))
            assert batch.reward[i, t] == step["reward"]
            assert batch.extras["note"][i, t] == step["note"]
            assert batch.terminated[i, t] == (taken and step["terminated"])


def test_all_valid_transitions_are_drawn_equally_often() -> None:
    replay = make(num_envs=3, rows=25)
    naive = Naive(replay, 1)
    naive.random_steps(60)
    valid = sorted(naive.valid_ids())
    draws = np.concatenate([replay.sample(500).ids.numpy() for _ in range(40)])
    drawn, counts = np.unique(draws, return_counts=True)
    assert drawn.tolist() == valid
    expected = len(draws) / len(valid)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = len(valid) - 1
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_environments_that_filled_differently_are_drawn_by_transition_not_by_ring() -> None:
    replay = make(num_envs=2, rows=300)
    naive = Naive(replay, 1)
    for _ in range(40):  # the second environment loses every transition
        naive.step(["go", "drop"])
    naive.step(["go", "go"])
    draws = replay.sample(4000).ids.numpy()
    share = (draws % 2 == 1).mean()
    assert 0.3 / 42 < share < 3 / 42


def test_ids_are_stable_and_stale_ones_are_refused() -> None:
    replay = make(rows=12)
    naive = Naive(replay, 5)
    ids = np.stack([naive.step(["go", "truncate"]) for _ in range(20)])
    values = np.arange(ids.size, dtype=np.float32).reshape(ids.shape)
    alive = np.stack(
        [replay.write(row, "reward", value) for row, value in zip(ids, values, strict=True)]
    )
    expected = [[id_ // 2 >= naive.oldest(id_ % 2) for id_ in row] for row in ids]
    np.testing.assert_array_equal(alive, expected)
    assert alive.any()
    assert not alive.all()
    np.testing.assert_array_equal(replay.read(ids[alive], "reward"), values[alive])
    with pytest.raises(ValueError, match="rows are gone"):
        replay.read(ids[~alive], "reward")
    assert not replay.write([-1], "reward", [1.0]).any()
    batch = replay.sample(50)
    for id_, reward in zip(batch.ids.tolist(), batch.reward.tolist(), strict=True):
        assert reward == values[ids == id_].item()
    with pytest.raises(UserError, match="did you mean reward"):
        replay.write(ids[-1], "rewards", values[-1])


def test_dropped_transitions_have_no_id_and_are_not_counted() -> None:
    replay = make()
    naive = Naive(replay, 5)
    naive.step(["go", "go"])
    assert naive.step(["drop", "go"]).tolist() == [-1, 3]
    assert len(replay) == 3


def test_length_counts_stored_transitions_through_the_wraparound() -> None:
    replay = make(num_envs=3, rows=15)
    naive = Naive(replay, 2)
    for _ in range(50):
        naive.random_steps(1)
        stored = sum(
            episode.rows[t] >= naive.oldest(env)
            for env, episodes in enumerate(naive.episodes)
            for episode in episodes
            for t in range(len(episode.steps))
        )
        assert len(replay) == stored


def test_same_seed_draws_the_same_and_state_continues_the_stream() -> None:
    one, two = make(), make()
    for replay in (one, two):
        Naive(replay, 4).random_steps(50)
    assert one.sample(64).ids.tolist() == two.sample(64).ids.tolist()
    state = one.get_state()
    restored = make(seed=99)
    restored.set_state(state)
    ids = one.closed_ids(np.zeros(2, np.int64))
    restored.import_rows(ids, one.export_rows(ids))
    assert len(restored) == len(one)
    for name, column in one._columns.items():
        assert torch.equal(restored._columns[name], column), name
    assert restored.sample(64).ids.tolist() == one.sample(64).ids.tolist()


def test_state_of_another_layout_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"rows_per_env 30 \(now 40\)"):
        make(rows=40).set_state(make(rows=30).get_state())


def test_discrete_actions_and_plain_box_observations() -> None:
    pixels = gym.spaces.Box(0, 255, (3, SIDE, SIDE), np.uint8)
    replay = Replay(pixels, gym.spaces.Discrete(4), capacity=20, num_envs=2, frame_stack=1)
    frames = np.arange(24, dtype=np.uint8).reshape(2, 3, SIDE, SIDE)
    replay.start(frames)
    replay.add([3, 1], [0.5, 1.5], [False] * 2, [False] * 2, frames + 100)
    batch = replay.sample(8)
    assert batch.action.dtype == torch.int64
    assert set(batch.action.tolist()) <= {3, 1}
    np.testing.assert_array_equal(batch.observation["pixels"], frames[batch.ids % 2])
    np.testing.assert_array_equal(batch.next_observation["pixels"], frames[batch.ids % 2] + 100)


def test_final_observations_may_come_as_gymnasiums_object_array() -> None:
    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    replay = Replay(space, ACTION_SPACE, capacity=20, num_envs=2)
    start, last, reset = np.zeros((2, 2)), np.full(2, 0.5), np.ones((2, 2))
    replay.start(start)
    final = np.array([None, None], dtype=object)
    final[1] = last
    replay.add(start, [1, 1], [False, False], [False, True], reset, final)
    batch = replay.sample(32)
    expected = np.where((batch.ids % 2)[:, None] == 1, 0.5, 1.0)
    np.testing.assert_array_equal(
        batch.next_observation["state"], np.broadcast_to(expected, (32, 2))
    )
    with pytest.raises(ValueError, match=r"environments \[0\] ended an episode without"):
        replay.add(start, [1, 1], [True, False], [False, False], reset)


def test_memory_stays_within_a_twentieth_of_the_frames_own_bytes() -> None:
    pixels = gym.spaces.Box(0, 255, (9, 84, 84), np.uint8)
    action = gym.spaces.Box(-1, 1, (38,), np.float32)  # the suite's widest: dog
    replay = Replay(pixels, action, capacity=1000, num_envs=4)
    held = sum(column.nbytes for column in replay._columns.values())
    held += sum(a.nbytes for a in vars(replay).values() if isinstance(a, np.ndarray))
    assert held <= 1.05 * 1000 * 3 * 84 * 84
    assert abs(held - replay.nbytes) < 100  # and the estimate says so


def test_too_little_memory_is_said_before_anything_is_taken(tmp_path) -> None:
    lines: list[str] = []
    pixels = gym.spaces.Box(0, 255, (9, 84, 84), np.uint8)
    for storage in ("auto", "ram", "mmap"):
        with pytest.raises(UserError, match=r"needs 2118\d\d.*GB free.*--replay-capacity"):
            Replay(
                pixels,
                ACTION_SPACE,
                capacity=10**10,
                num_envs=1,
                storage=storage,
                directory=tmp_path,
                log=lines.append,
            )
    assert not lines
    assert not list(tmp_path.iterdir())
    Replay(pixels, ACTION_SPACE, capacity=100, num_envs=1, log=lines.append)
    assert "GB in ram" in lines[0]


def test_memory_mapped_storage_gives_the_same_batches(tmp_path) -> None:
    in_ram, on_disk = make(), make(storage="mmap", directory=tmp_path)
    for replay in (in_ram, on_disk):
        Naive(replay, 4).random_steps(50)
    one, two = in_ram.sample(64, n_step=3), on_disk.sample(64, n_step=3)
    for name in one.observation:
        assert torch.equal(one.observation[name], two.observation[name])
        assert torch.equal(one.next_observation[name], two.next_observation[name])
    assert torch.equal(one.reward, two.reward)
    assert not list(tmp_path.iterdir()), "a killed run must leave no gigabytes behind"
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "pixels.bin") in maps.read_text()


@pytest.mark.parametrize("bad", ["reward", "action", "state"])
def test_what_is_not_finite_is_refused_by_name(bad: str) -> None:
    replay = make(extras={})
    values = {
        "action": np.zeros((2, 2)),
        "reward": np.zeros(2),
        "state": np.zeros((2, 2)),
    }
    seen = {"pixels": np.zeros((2, 9, SIDE, SIDE), np.uint8)}
    replay.start(seen | {"state": values["state"].copy()})
    values[bad].flat[1] = np.nan
    no = np.zeros(2, bool)
    with pytest.raises(ValueError, match=f"'{bad}' is nan"):
        replay.add(values["action"], values["reward"], no, no, seen | {"state": values["state"]})
    assert len(replay) == 0


@pytest.mark.parametrize("where", ["start", "reward", "observation", "final"])
def test_the_environment_that_gave_what_is_not_finite_is_named_and_nothing_is_stored(
    where: str,
) -> None:
    space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    replay = Replay(space, ACTION_SPACE, capacity=40, num_envs=4, log=lambda line: None)
    given = {name: np.zeros((4, 2)) for name in ("start", "observation", "final")}
    given["reward"] = np.zeros(4)
    given[where][2] = np.inf
    final = np.array([None, None, given["final"][2], given["final"][3]], dtype=object)
    drop, ends = np.array([0, 1, 0, 0], bool), np.array([0, 0, 1, 1], bool)
    name = "reward" if where == "reward" else "state"
    action, no = np.zeros((4, 2)), np.zeros(4, bool)
    step = (action, given["reward"], ends, no, given["observation"], final, drop)
    store = functools.partial(replay.start, given["start"])
    if where != "start":
        store()
        store = functools.partial(replay.add, *step)
    with pytest.raises(NotFiniteError, match=f"'{name}' is inf in environment 2"):
        store()
    assert len(replay) == 0


def test_a_reward_of_a_transition_that_is_thrown_away_may_be_anything() -> None:
    space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    replay = Replay(space, ACTION_SPACE, capacity=40, num_envs=2, log=lambda line: None)
    zeros, no = np.zeros((2, 2)), np.zeros(2, bool)
    replay.start(zeros)
    replay.add(zeros, [0.0, np.nan], no, no, zeros, dropped=[False, True])
    assert len(replay) == 1


def test_a_file_for_the_replay_has_its_blocks_before_anything_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: dict[str, int] = {}
    real = os.posix_fallocate

    def reserve(handle: int, start: int, length: int) -> None:
        real(handle, start, length)
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).stem
        reserved[name] = 512 * os.fstat(handle).st_blocks

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    replay = make(rows=4000, storage="mmap", directory=tmp_path)
    assert reserved.keys() == replay._columns.keys()
    assert all(size >= replay._columns[name].nbytes for name, size in reserved.items())
    assert not replay._columns["pixels"].any()


def test_a_disk_that_is_too_full_for_the_replays_file_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:  # somebody else was quicker than the check of what is free
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=f"the disk of '{tmp_path}' is full"):
        make(storage="mmap", directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_first_observation_that_is_no_repeated_frame_is_refused() -> None:
    replay = make()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, SIDE, SIDE)).astype(np.uint8)
    with pytest.raises(ValueError, match="one frame repeated"):
        replay.start({"pixels": pixels, "state": np.zeros((2, 2))})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 4}, "raise it to at least 10"),
        ({"frame_stack": 3, "extras": {"reward": Field()}}, "in use already"),
        ({"storage": "mmap"}, "needs a directory"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_wrong_frame_stack_is_refused() -> None:
    with pytest.raises(UserError, match="no stack of 4 frames"):
        Replay(space_of(3), ACTION_SPACE, capacity=100, num_envs=1, frame_stack=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["device", "ram"])
def test_batches_on_the_gpu_equal_those_on_the_cpu(storage: str) -> None:
    replays = [make(), make(device="cuda", storage=storage)]
    for replay in replays:
        Naive(replay, 4).random_steps(50)
    one, two = (replay.sample(64, n_step=3) for replay in replays)
    for name in one.observation:
        assert two.observation[name].is_cuda
        assert torch.equal(one.observation[name], two.observation[name].cpu())
        assert torch.equal(one.next_observation[name], two.next_observation[name].cpu())
    assert torch.allclose(one.reward, two.reward.cpu())
    assert torch.equal(one.discount, two.discount.cpu())
    assert torch.equal(replays[0].read(one.ids, "reward"), replays[1].read(one.ids, "reward").cpu())
