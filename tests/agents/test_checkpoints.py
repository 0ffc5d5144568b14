"""Checkpoints are exact, whole or absent, and do not cost one replay each."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.core.checkpoints import CheckpointStore, DamagedFileError, load_tree, save_tree
from agents.core.errors import UserError
from agents.core.replay import Field, Replay

ROOT = Path(__file__).parents[2]


def make_replay(rows: int = 40, num_envs: int = 2) -> Replay:
    return Replay(
        gym.spaces.Box(0, 255, (6, 8, 8), np.uint8),
        gym.spaces.Discrete(5),
        capacity=rows * num_envs,
        num_envs=num_envs,
        frame_stack=2,
        extras={"latent": Field((2,))},
        log=lambda line: None,
    )


class Player:
    """Fills a replay with random episodes; the same seed plays the same."""

    def __init__(self, replay: Replay, seed: int = 0) -> None:
        self.replay, self.rng = replay, np.random.default_rng(seed)
        self.seen = self.first(replay.num_envs)
        replay.start(self.seen)

    def first(self, n: int) -> np.ndarray:
        return np.tile(self.frames(n), (1, 2, 1, 1))

    def frames(self, n: int) -> np.ndarray:
        return self.rng.integers(0, 256, (n, 3, 8, 8)).astype(np.uint8)

    def play(self, steps: int) -> np.ndarray:
        n = self.replay.num_envs
        ids = []
        for _ in range(steps):
            done = self.rng.random(n) < 0.1
            following = np.concatenate([self.seen[:, 3:], self.frames(n)], axis=1)
            self.seen = np.where(done[:, None, None, None], self.first(n), following)
            step = self.rng.integers(5, size=n), self.rng.normal(size=n), done, np.zeros(n, bool)
            extras = {"latent": self.rng.normal(size=(n, 2))}
            ids.append(self.replay.add(*step, self.seen, following, extras=extras))
        return np.concatenate(ids)


def assert_same_replay(one: Replay, two: Replay) -> None:
    assert len(one) == len(two)
    ids = one.closed_ids(np.zeros_like(one.closed))
    np.testing.assert_array_equal(ids, two.closed_ids(np.zeros_like(two.closed)))
    assert_same_tree(one.export_rows(ids), two.export_rows(ids))
    assert_same_tree(one.get_state(), two.get_state())


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --------------------------------------------------------------------------------------- trees


def assert_same_tree(one: object, two: object) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_same_tree(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same_tree(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, np.ndarray | np.generic):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two, strict=True)
    else:
        assert one == two or (one != one and two != two)


def test_trees_come_back_with_their_exact_types_and_values(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tree = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),  # integer keys and tuples
        "dtypes": [torch.ones(2, 3).to(d) for d in (torch.bfloat16, torch.bool, torch.uint8)],
        "empty": [torch.zeros(0, 3), {}, [], (), ""],
        "arrays": [
            np.array([2**64 - 1], np.uint64),
            np.array(7, np.int16),
            np.arange(6, dtype=np.float64).reshape(2, 3)[:, ::-1],
        ],
        "scalars": [np.float32(0.1), np.int64(-3), np.bool_(True)],
        "generator": np.random.default_rng(3).bit_generator.state,
        "plain": [None, True, 3, -0.0, 0.1, math.inf, math.nan, 2**200, "é\n\x00"],
        "$array": "a key that looks like ours",
        "a/b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
    }
    save_tree(tmp_path, "tree", tree)
    loaded = load_tree(tmp_path, "tree")
    assert_same_tree(loaded, tree)
    rng = np.random.default_rng()
    rng.bit_generator.state = loaded["generator"]
    assert rng.random() == np.random.default_rng(3).random()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["tree.json", "tree.safetensors"]


def test_shared_memory_is_stored_once_and_overlapping_views_are_kept_apart(tmp_path: Path) -> None:
    big = torch.arange(100_000, dtype=torch.float32)
    tree = {"one": big, "two": big, "half": big[:4], "grid": big[:12].view(3, 4).t()}
    save_tree(tmp_path, "tree", tree)
    loaded = load_tree(tmp_path, "tree")
    assert_same_tree(loaded, tree)
    assert loaded["one"] is loaded["two"]
    assert (tmp_path / "tree.safetensors").stat().st_size < 410_000


def test_channels_last_is_saved_contiguous_with_the_same_values(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    save_tree(tmp_path, "tree", {"weight": weight})
    loaded = load_tree(tmp_path, "tree")["weight"]
    assert torch.equal(loaded, weight)
    assert loaded.is_contiguous()


def test_a_leaf_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'agent/a/1' is a object"):
        save_tree(tmp_path, "agent", {"a": [1, object()]})
    with pytest.raises(TypeError, match="'agent/names' cannot be saved"):
        save_tree(tmp_path, "agent", {"names": np.array(["x"])})


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "gone"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, suffix: str, damage: str) -> None:
    save_tree(tmp_path, "agent", {"weight": torch.arange(50)})
    file = tmp_path / f"agent.{suffix}"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[1 if suffix == "json" else -1] ^= 255
    file.write_bytes({"cut": data[:-5], "empty": b"", "flip": data, "gone": b""}[damage])
    if damage == "gone":
        file.unlink()
    with pytest.raises(UserError, match=rf"agent\.{suffix}' is damaged .*earlier checkpoint"):
        load_tree(tmp_path, "agent")


# --------------------------------------------------------------------------------------- store


def test_parts_and_replay_come_back_exactly_and_go_on_alike(tmp_path: Path) -> None:
    replay = make_replay()
    player = Player(replay)
    store = CheckpointStore(tmp_path)
    for step in (10, 25, 90, 100, 300):  # before, across and long after the ring's wraparound
        player.play(step - (getattr(player, "at", 0)))
        player.at = step
        replay.sample(8)
        store.save(step, {"agent": {"step": step, "weight": torch.full((3,), step)}}, replay)
        restored = make_replay()
        resumed = CheckpointStore(tmp_path)
        parts = resumed.load(replay=restored)
        assert_same_tree(parts, {"agent": {"step": step, "weight": torch.full((3,), step)}})
        assert_same_replay(restored, replay)
    # A resumed store goes on writing increments that a third process can read.
    ours, theirs = Player(make_replay(), 7), Player(make_replay(), 7)
    ours.replay, theirs.replay = replay, restored
    ours.seen = theirs.seen = player.seen
    ours.play(30), theirs.play(30)
    resumed.save(330, {}, restored)
    again = make_replay()
    CheckpointStore(tmp_path).load(replay=again)
    assert_same_replay(again, replay)


def test_rewritten_rows_come_back_whether_or_not_they_were_stored_before(tmp_path: Path) -> None:
    replay = make_replay()
    player = Player(replay)
    store = CheckpointStore(tmp_path)
    old = player.play(20)
    store.save(1, {}, replay)
    new = player.play(5)
    for number, ids in enumerate((old[:6], old[3:9], new[-4:])):
        replay.write(ids, "reward", np.full(len(ids), number))
        replay.write(ids, "latent", np.full((len(ids), 2), -number))
    folder = store.save(2, {}, replay)
    latest = load_tree(folder, "replay")["changed"]["reward"]["ids"]
    assert sorted(latest) == sorted(old[:9])  # not the new ones: their rows were written just now
    player.play(3)
    replay.write(old[10:12], "reward", [9, 9])
    folder = store.save(3, {}, replay)
    latest = load_tree(folder, "replay")["changed"]["reward"]["ids"]
    assert sorted(latest) == sorted([*old[:9], *old[10:12]])
    restored = make_replay()
    resumed = CheckpointStore(tmp_path)
    resumed.load(replay=restored)
    assert_same_replay(restored, replay)
    resumed.save(4, {}, restored)  # what was rewritten before the resume is not forgotten
    again = make_replay()
    CheckpointStore(tmp_path).restore_replay(again)
    assert_same_replay(again, replay)


def test_several_checkpoints_cost_little_more_than_one_buffer(tmp_path: Path) -> None:
    replay = make_replay(rows=500)
    player = Player(replay)
    store = CheckpointStore(tmp_path, keep=3)
    for step in range(1, 20):
        player.play(100)  # a fifth of the ring
        store.save(step, {"agent": torch.zeros(10)}, replay)
    assert [f.name for f in store._folders()] == [f"step-{s:09d}" for s in (17, 18, 19)]
    # The ring itself, two intervals that only older checkpoints need, one half-needed segment.
    assert bytes_in(tmp_path) < 1.75 * replay.nbytes
    for step in (17, 18, 19):
        CheckpointStore(tmp_path).load(step, replay=make_replay(rows=500))


def test_a_checkpoint_writes_only_rows_that_are_new(tmp_path: Path) -> None:
    replay = make_replay(rows=500)
    player = Player(replay)
    store = CheckpointStore(tmp_path)
    player.play(300)
    store.save(1, {}, replay)
    before = bytes_in(tmp_path)
    player.play(10)
    store.save(2, {}, replay)
    assert bytes_in(tmp_path) - before < 0.1 * before


def test_large_additions_are_split_into_several_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.core.checkpoints.SEGMENT_BYTES", 5_000)
    replay = make_replay()
    Player(replay).play(100)
    CheckpointStore(tmp_path).save(1, {}, replay)
    assert len(list((tmp_path / "replay").iterdir())) > 3
    restored = make_replay()
    CheckpointStore(tmp_path).load(replay=restored)
    assert_same_replay(restored, replay)


def test_best_keeps_weights_only_is_replaced_and_never_counts_as_latest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save_best(step, {"agent": {"step": step}})
    assert store.latest() is None
    assert store.load("best") == {"agent": {"step": 2}}
    with pytest.raises(UserError, match="saved without a replay"):
        store.load("best", replay=make_replay())
    for step in range(3, 8):
        store.save(step, {})
    assert store.load("best") == {"agent": {"step": 2}}
    assert store.latest() == tmp_path / "checkpoints" / "step-000000007"


def test_checkpoints_can_be_asked_for_by_step_name_or_folder(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        store.load()
    folders = [store.save(step, {"agent": step}) for step in (5, 6)]
    assert store.load(5) == store.load(folders[0]) == store.load(folders[0].name) == {"agent": 5}
    with pytest.raises(UserError, match=r"no checkpoint 7; it has .*step-000000005"):
        store.load(7)


@pytest.mark.parametrize("what", ["agent.safetensors", "agent.json", "manifest.json", "segment"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, what: str
) -> None:
    replay, store = make_replay(), CheckpointStore(tmp_path)
    player = Player(replay)
    player.play(10)
    store.save(1, {"agent": {"step": 1}}, replay)
    snapshot = make_replay()
    CheckpointStore(tmp_path).load(replay=snapshot)
    player.play(10)
    newest = store.save(2, {"agent": {"step": 2}}, replay)
    if what == "segment":
        (file,) = (tmp_path / "replay").glob("segment-000000002*")
    else:
        file = newest / what
    file.write_bytes(file.read_bytes()[:-7])

    restored, resumed = make_replay(), CheckpointStore(tmp_path)
    with pytest.warns(UserWarning, match=f"{file.name}.*falling back to step-000000001") as caught:
        assert resumed.load(replay=restored) == {"agent": {"step": 1}}
    assert len(caught) == 1
    assert_same_replay(restored, snapshot)
    with pytest.raises(DamagedFileError):
        CheckpointStore(tmp_path).load(2, replay=make_replay())
    # The damaged one does not count among those to keep, and goes with the next save.
    resumed.save(3, {"agent": {"step": 3}}, restored)
    assert [f.name[-1] for f in resumed._folders()] == ["1", "3"]
    assert CheckpointStore(tmp_path).load(replay=make_replay()) == {"agent": {"step": 3}}


def test_a_checkpoint_that_replaces_a_damaged_one_stays(tmp_path: Path) -> None:
    replay, store = make_replay(), CheckpointStore(tmp_path)
    player = Player(replay)
    for step in (1, 2):
        player.play(10)
        newest = store.save(step, {"agent": {"step": step}}, replay)
    (newest / "agent.json").write_text("{")
    restored, resumed = make_replay(), CheckpointStore(tmp_path)
    with pytest.warns(UserWarning, match="falling back to step-000000001"):
        resumed.load(replay=restored)
    player.replay = restored
    player.play(10)
    for _ in range(2):  # as a run does that goes on to the step which was damaged
        resumed.save(2, {"agent": {"step": "anew"}}, restored)
        again = make_replay()
        assert CheckpointStore(tmp_path).load(2, replay=again) == {"agent": {"step": "anew"}}
        assert_same_replay(again, restored)


def test_a_checkpoint_of_another_agent_is_refused_and_no_reason_to_fall_back(
    tmp_path: Path,
) -> None:
    sac = {"agent": "sac", "env": "toy/reach", "observation": "pixels"}
    drq = sac | {"agent": "drq", "observation": "both"}
    replay = make_replay()
    ours, theirs = CheckpointStore(tmp_path, identity=sac), CheckpointStore(tmp_path, identity=drq)
    ours.save(1, {"agent": 1}, replay)
    ours.save_best(1, {"agent": 1})
    newest = theirs.save(2, {"agent": 2}, replay)
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["identity"] == drq
    said = (
        "step-000000002' was saved with agent 'drq', observation 'both', "
        "and this run is of agent 'sac', observation 'pixels'; give a checkpoint of this run"
    )
    for action in (
        lambda: ours.load(),
        lambda: ours.load(2),
        lambda: ours.load(replay=make_replay()),
        lambda: ours.restore_replay(make_replay()),
    ):
        with pytest.raises(UserError, match=said) as refused:
            action()
        assert not isinstance(refused.value, DamagedFileError)
        assert "\n" not in str(refused.value)
    assert theirs.load() == {"agent": 2}
    assert ours.load(1) == ours.load("best") == {"agent": 1}
    with pytest.raises(UserError, match="best' was saved with agent 'sac'"):
        theirs.load("best")


def test_a_checkpoint_that_names_no_agent_is_taken_for_the_runs_own(tmp_path: Path) -> None:
    folder = CheckpointStore(tmp_path).save(1, {"agent": 1})
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["identity"]  # as before the manifest named it
    file.write_text(json.dumps(manifest))
    assert CheckpointStore(tmp_path, identity={"agent": "drq"}).load() == {"agent": 1}


def test_when_every_checkpoint_is_damaged_the_error_names_the_file(tmp_path: Path) -> None:
    (CheckpointStore(tmp_path).save(1, {"agent": 1}) / "agent.json").write_text("{")
    with pytest.raises(UserError, match=r"agent\.json' is damaged"):
        CheckpointStore(tmp_path).load()


def test_a_replay_of_other_settings_is_an_error_and_no_reason_to_fall_back(tmp_path: Path) -> None:
    store, replay = CheckpointStore(tmp_path), make_replay()
    for step in (1, 2):
        store.save(step, {}, replay)
    with pytest.raises(UserError, match=r"rows_per_env 40 \(now 50\)"):
        CheckpointStore(tmp_path).load(replay=make_replay(rows=50))


def test_full_disk_leaves_the_previous_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, store = make_replay(), CheckpointStore(tmp_path)
    player = Player(replay)
    player.play(10)
    store.save(1, {"agent": torch.zeros(5)}, replay)
    snapshot = make_replay()
    CheckpointStore(tmp_path).load(replay=snapshot)
    files = sorted(tmp_path.rglob("*"))
    player.play(10)
    messages: list[str] = []
    for allowed in range(100):
        with monkeypatch.context() as patch:
            writes = 0

            def full(handle: int, allowed: int = allowed) -> None:
                nonlocal writes
                writes += 1
                if writes > allowed:
                    raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "fsync", full)
            try:
                store.save(2, {"agent": torch.zeros(5)}, replay)
                break
            except UserError as error:
                messages.append(str(error))
        if store.latest() != tmp_path / "checkpoints" / "step-000000002":
            assert sorted(tmp_path.rglob("*")) == files
            restored = make_replay()
            CheckpointStore(tmp_path).load(replay=restored)
            assert_same_replay(restored, snapshot)
    assert len(messages) >= 8
    assert all("is full" in message and "free some space" in message for message in messages)
    restored = make_replay()
    CheckpointStore(tmp_path).load(replay=restored)
    assert_same_replay(restored, replay)


KILLED = """
    import os, shutil, signal, stat, sys, warnings
    import torch
    torch.set_num_threads(1)
    sys.path[:0] = [sys.argv[2]]
    from pathlib import Path
    from tests_checkpoints import CheckpointStore, Player, assert_same_replay, make_replay

    warnings.simplefilter("error")  # falling back would warn: a kill never damages a checkpoint
    run = Path(sys.argv[1])
    replay = make_replay(rows=8)  # small: segments die and are deleted too
    player = Player(replay)
    store = CheckpointStore(run, keep=1)
    for step in range(1, 4):
        player.play(5)
        store.save(step, {"agent": torch.full((3,), step)}, replay)
    store.save_best(3, {"agent": 3})
    before = make_replay(rows=8)
    CheckpointStore(run).load(replay=before)
    player.play(5)

    def die_at(point):
        # Die before the point-th call that changes the disk; before a flush with half a file.
        calls = 0
        def wrap(call):
            def counted(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == point:
                    if call is fsync and stat.S_ISREG(os.fstat(args[0]).st_mode):
                        os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return counted
        fsync = os.fsync
        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, wrap(getattr(os, name)))

    def attempt(folder, point):
        child = os.fork()
        if child == 0:
            die_at(point)
            store.folder, store.replay_folder = folder / "checkpoints", folder / "replay"
            step = 4 if point % 2 else 3   # a new step, and the same step again
            store.save(step, {"agent": torch.full((3,), 4)}, replay)
            store.save_best(4, {"agent": 4})
            os._exit(0)
        return os.waitpid(child, 0)[1]

    point, status = 0, None
    while status != 0:
        point += 1
        folder = run.parent / str(point)
        shutil.copytree(run, folder)
        status = attempt(folder, point)
        assert status in (0, signal.SIGKILL), status
        restored = make_replay(rows=8)
        resumed = CheckpointStore(folder, keep=1)
        value = int(resumed.load(replay=restored)["agent"][0])
        assert value in (3, 4), value
        assert_same_replay(restored, before if value == 3 else replay)
        assert resumed.load("best")["agent"] in (3, 4)
        for whole in resumed._folders():  # what can be seen can be loaded
            CheckpointStore(folder).load(whole, replay=make_replay(rows=8))
        # The next save works, and tidies up whatever the kill left.
        resumed.save(5, {"agent": 5}, restored)
        left = sorted(f.name for f in (folder / "checkpoints").iterdir())
        assert left == ["best", "step-000000005"], left
        listed = {s["file"] for s in resumed._segments}
        assert {f.name for f in (folder / "replay").iterdir()} == listed
        CheckpointStore(folder).load(replay=make_replay(rows=8))
        shutil.rmtree(folder)
    killed = point - 1
    print("killed", killed)
"""


def test_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    script = textwrap.dedent(KILLED).replace("tests_checkpoints", Path(__file__).stem)
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), str(Path(__file__).parent)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[-1]) >= 15
