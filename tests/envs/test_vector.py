"""The vector environment is exact, the same for any number of workers, and survives its workers."""

from __future__ import annotations

import functools
import gc
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
import warnings
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest

from envs import processes
from envs.vector import VectorEnv, WorkerError
from wrappers.errors import UserError

ROOT = Path(__file__).parents[2]


class Counting(gym.Env):
    """Counts its steps beside a random number; `trouble` strikes at one step (-1: in __init__)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    render_mode = "rgb_array"
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Dict(
        {
            "pixels": gym.spaces.Box(0, 255, (3, 4, 4), np.uint8),
            "state": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
        }
    )

    def __init__(self, length: int = 5, trouble: str = "", at: int = 0, once: str = "") -> None:
        self.length, self.trouble, self.at, self.once = length, trouble, at, once
        self.t = 0
        self.luck = 0.0
        self._strike(-1)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {"began": float(self.luck)}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        self._strike(self.t)
        observation = self._observe()
        reward = float(action[0]) + self.luck
        truncated = self.t >= self.length
        return observation, reward, self.luck > 0.9, truncated, {"success": float(self.luck > 0.5)}

    def render(self) -> np.ndarray:
        return np.full((2, 2, 3), self.t, np.uint8)

    def half_an_answer(self) -> str:
        """Stop in the middle of it, once."""
        if not Path(self.once).exists():
            Path(self.once).touch()
            (pipe,) = (obj for obj in gc.get_objects() if isinstance(obj, Connection))
            os.write(pipe.fileno(), struct.pack("!i", 1_000_000) + bytes(100_000))
            os.kill(os.getpid(), signal.SIGSTOP)
        return "a whole one"

    def get_state(self) -> dict:
        return {"t": self.t, "rng": self.np_random.bit_generator.state}

    def set_state(self, state: dict) -> None:
        self.t = state["t"]
        self.np_random.bit_generator.state = state["rng"]

    def imported(self) -> list[str]:
        return sorted(sys.modules)

    def threads(self) -> list[str | None]:
        return [os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")]

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def process(self) -> int:
        return os.getpid()

    def _observe(self) -> dict[str, np.ndarray]:
        self.luck = float(self.np_random.random())
        pixels = np.full((3, 4, 4), self.t, np.uint8)
        return {"pixels": pixels, "state": np.array([self.t, self.luck], np.float32)}

    def _strike(self, t: int) -> None:
        if not self.trouble or t != self.at:
            return
        if self.once:  # a file that remembers that trouble has struck
            if Path(self.once).exists():
                return
            Path(self.once).touch()
        if self.trouble == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "hang":
            signal.pause()
        if self.trouble == "dawdle":
            time.sleep(5)
        if self.trouble == "raise":
            raise ZeroDivisionError("the moon is full")
        if self.trouble == "user":
            raise UserError("unknown task 'walker-wlk'; did you mean walker-walk?")


def make(num_envs: int, workers: int, timeout: float = 30.0, **changes: Any) -> VectorEnv:
    factories = [functools.partial(Counting, length=4 + i) for i in range(num_envs)]
    if changes:
        factories[-1] = functools.partial(Counting, **changes)
    return VectorEnv(factories, workers=workers, timeout=timeout)


def roll(envs: VectorEnv, steps: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [envs.step(rng.uniform(-1, 1, (envs.num_envs, 1))) for _ in range(steps)]


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_same(one[name], two[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    elif isinstance(one, np.ndarray) and one.dtype == object:
        assert_same(list(one), list(two))
    else:
        np.testing.assert_array_equal(one, two, strict=True)


def test_results_do_not_depend_on_the_number_of_workers() -> None:
    runs = []
    for workers in (0, 2, 3):
        envs = make(3, workers)
        runs.append(
            [envs.reset(seed=11), *roll(envs, 12), envs.reset(), envs.reset(seed=[1, 2, 3])]
        )
        envs.close()
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_same_step_autoreset_tells_how_episodes_ended(workers: int) -> None:
    envs = make(2, workers)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    seen, _ = envs.reset(seed=5)
    assert seen in envs.observation_space
    returns, lengths = np.zeros(2), np.zeros(2, int)
    ends = 0
    for _ in range(30):
        action = envs.action_space.sample()
        seen, reward, terminated, truncated, info = envs.step(action)
        returns, lengths = returns + reward, lengths + 1
        assert not info["dropped"].any()
        ended = terminated | truncated
        np.testing.assert_array_equal(info.get("_final_obs", np.zeros(2, bool)), ended)
        np.testing.assert_array_equal(info.get("_episode", np.zeros(2, bool)), ended)
        for i in np.flatnonzero(ended):
            ends += 1
            final = info["final_obs"][i]
            assert final["pixels"].max() == final["state"][0] == lengths[i]
            assert terminated[i] == (final["state"][1] > 0.9)
            assert truncated[i] == (lengths[i] == 4 + i)
            assert info["final_info"]["success"][i] == (final["state"][1] > 0.5)
            assert seen["state"][i, 0] == 0
            assert info["began"][i] == pytest.approx(seen["state"][i, 1])
            assert info["episode"]["r"][i] == pytest.approx(returns[i])
            assert info["episode"]["l"][i] == lengths[i]
            returns[i] = lengths[i] = 0
    assert ends > 8
    envs.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_observations_are_not_overwritten_by_the_next_step(workers: int) -> None:
    envs = make(2, workers)
    first, _ = envs.reset(seed=5)
    kept = {name: values.copy() for name, values in first.items()}
    roll(envs, 2)
    assert_same(first, kept)
    envs.close()


def test_children_of_one_seed_differ_and_neighboring_seeds_share_none() -> None:
    envs = make(3, 0)
    luck = [envs.reset(seed=seed)[0]["state"][:, 1].tolist() for seed in (0, 1, 2, 0)]
    assert luck[0] == luck[3]
    assert len({value for draws in luck[:3] for value in draws}) == 9


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 3)])
def test_state_is_exact_in_mid_episode_for_any_number_of_workers(before: int, after: int) -> None:
    one, two = make(3, before), make(3, after)
    one.reset(seed=3)
    roll(one, 6)
    state = one.get_state()
    two.set_state(state)
    assert_same(roll(one, 12, seed=1), roll(two, 12, seed=1))
    with pytest.raises(UserError, match="of 3 environments and here are 2"):
        make(2, 0).set_state(state)
    one.close()
    two.close()


def test_call_render_and_attributes_reach_every_environment() -> None:
    for workers in (0, 2):
        envs = make(3, workers)
        envs.reset(seed=3)
        roll(envs, 2)
        assert envs.get_attr("length") == (4, 5, 6)
        pictures = envs.render()
        assert len(pictures) == 3
        np.testing.assert_array_equal(pictures[2], envs.render(2))
        assert envs.render_mode == "rgb_array"
        envs.close()


@pytest.mark.parametrize("trouble", ["die", "hang"])
def test_a_failing_worker_is_replaced_and_its_transitions_are_dropped(
    trouble: str, tmp_path: Path
) -> None:
    once = str(tmp_path / "struck")
    envs = make(3, 2, timeout=3.0, length=9, trouble=trouble, at=3, once=once)
    healthy = make(3, 0)
    envs.reset(seed=5)
    healthy.reset(seed=5)
    roll(envs, 2)
    roll(healthy, 2)
    cause = "was killed by SIGKILL" if trouble == "die" else "did not answer 'step' within 3 s"
    with pytest.warns(UserWarning, match=rf"worker 1 \(environments 2 to 2\) {cause}.* replaced"):
        (seen, reward, terminated, truncated, info), *_ = roll(envs, 1)
    (reference, *_), *_ = roll(healthy, 1)
    assert info["dropped"].tolist() == [False, False, True]
    assert reward[2] == 0
    assert not terminated[2]
    assert not truncated[2]
    assert seen["state"][2, 0] == 0  # a fresh episode
    assert_same(seen["state"][:2], reference["state"][:2])  # the others did not notice
    assert envs.worker_failures == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, info = roll(envs, 1)[0]
        lengths = [info["episode"]["l"][2] for *_, info in roll(envs, 12) if "episode" in info]
    assert not info["dropped"].any()
    assert max(lengths) <= 9  # episodes are counted from the fresh start
    envs.close()


def test_a_worker_that_dies_between_steps_still_answers_and_drops_the_next_transition() -> None:
    envs = make(2, 2)
    envs.reset(seed=5)
    roll(envs, 2)
    victim = envs.call("process")[1]
    os.kill(victim, signal.SIGKILL)
    with pytest.warns(UserWarning, match="worker 1 .* is replaced"):
        state = envs.get_state()
    assert state["envs"][1]["t"] == 0
    resumed = make(2, 0)  # what is pending travels with the state
    resumed.set_state(state)
    for either in (envs, resumed):
        (seen, *_, info), (_, *_, following) = roll(either, 2)
        assert info["dropped"].tolist() == [False, True]
        assert seen["state"][:, 0].tolist() == [state["envs"][0]["t"] + 1, 0]
        assert not following["dropped"].any()
        either.close()


def test_closing_does_not_mind_a_worker_whose_end_is_not_told_in_time(monkeypatch) -> None:
    envs = make(2, 2)
    envs.reset(seed=5)
    pids = envs.call("process")
    monkeypatch.setattr(BaseProcess, "join", lambda self, timeout=None: None)
    monkeypatch.setattr(BaseProcess, "exitcode", None)
    envs.close()
    monkeypatch.undo()
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_stopped_worker_that_does_not_take_a_large_state_is_replaced() -> None:
    envs, healthy = make(2, 2, timeout=3.0), make(2, 0)
    healthy.reset(seed=3)
    roll(healthy, 2)
    state = healthy.get_state()
    state["envs"][1]["frames"] = np.zeros(8 * 2**20, np.uint8)  # a pipe holds 200 kB
    envs.reset(seed=5)
    victim = envs.call("process")[1]
    os.kill(victim, signal.SIGSTOP)
    with pytest.warns(UserWarning, match="worker 1 .* did not take 'call' within 3 s.* replaced"):
        envs.set_state(state)
    assert envs.worker_failures == 1
    assert not alive(victim)
    assert_same(roll(envs, 6, seed=1), roll(healthy, 6, seed=1))
    envs.close()


def test_a_stopped_worker_does_not_hold_up_the_end() -> None:
    envs = make(2, 2, timeout=3.0)
    pids = envs.call("process")
    os.kill(pids[0], signal.SIGSTOP)
    envs.close()
    assert not any(alive(pid) for pid in pids)


def test_a_worker_that_stops_in_the_middle_of_an_answer_is_replaced(tmp_path: Path) -> None:
    envs = make(1, 1, timeout=3.0, once=str(tmp_path / "struck"))
    envs.reset(seed=5)
    with pytest.warns(UserWarning, match="did not answer 'call' within 3 s; it is replaced"):
        assert envs.call("half_an_answer") == ("a whole one",)
    envs.close()


@pytest.mark.parametrize("trouble", ["die", pytest.param("hang", marks=pytest.mark.slow)])
def test_failures_at_the_start_are_replaced(trouble: str, tmp_path: Path) -> None:
    once = str(tmp_path / "struck")
    with pytest.warns(UserWarning, match="worker 1 .* during 'build'|'build' within 6 s"):
        envs = make(2, 2, timeout=6.0, trouble=trouble, at=-1, once=once)
    assert envs.worker_failures == 1
    envs.reset(seed=1)
    assert not roll(envs, 1)[0][-1]["dropped"].any()
    envs.close()


def test_repeated_failures_at_the_start_are_an_error() -> None:
    with (
        pytest.warns(UserWarning, match="replaced"),
        pytest.raises(WorkerError, match=r"worker 1 .* failed 3 times in a row; it was killed by"),
    ):
        make(2, 2, trouble="die", at=-1)


def test_a_worker_that_fails_again_and_again_is_an_error() -> None:
    envs = make(2, 2, trouble="die", at=1)
    envs.reset(seed=1)
    with pytest.warns(UserWarning, match="replaced"):
        roll(envs, 2)
    with pytest.raises(WorkerError, match=r"worker 1 .* failed 3 times in a row; it was killed by"):
        roll(envs, 1)
    assert envs.worker_failures == 3
    envs.close()


def test_a_worker_that_fails_now_and_then_is_replaced_every_time() -> None:
    envs = make(1, 1, trouble="die", at=2)
    envs.reset(seed=1)
    with pytest.warns(UserWarning, match="replaced"):
        dropped = [bool(info["dropped"][0]) for *_, info in roll(envs, 8)]
    assert dropped == [False, True] * 4
    assert envs.worker_failures == 4
    envs.close()


def test_requests_out_of_turn_are_refused() -> None:
    envs = make(2, 2)
    envs.reset(seed=1)
    with pytest.raises(RuntimeError, match="is not taking a step: call step_async"):
        envs.step_wait()
    envs.step_async(np.zeros((2, 1)))
    for request in (envs.get_state, envs.reset, lambda: envs.step_async(np.zeros((2, 1)))):
        with pytest.raises(RuntimeError, match="is taking a step: call step_wait"):
            request()
    envs.step_wait()
    envs.get_state()
    envs.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_the_environment_come_with_their_traceback(workers: int) -> None:
    envs = make(2, workers, trouble="raise", at=2)
    envs.reset(seed=1)
    roll(envs, 1)
    error = WorkerError if workers else ZeroDivisionError
    with pytest.raises(error, match="the moon is full") as caught:
        roll(envs, 1)
    if workers:
        assert "in _strike" in str(caught.value)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    envs.reset()  # no reply is left over in the pipes
    assert envs.worker_failures == 0
    envs.close()


def test_an_error_does_not_leave_another_workers_late_reply_behind(tmp_path: Path) -> None:
    troubles = [{"trouble": "raise", "at": 1}, {"trouble": "dawdle", "at": 1}]
    factories = [functools.partial(Counting, **trouble) for trouble in troubles]
    envs = VectorEnv(factories, workers=2, timeout=3.0)
    envs.reset(seed=1)
    with pytest.raises(WorkerError, match="the moon is full"):
        roll(envs, 1)
    with pytest.warns(UserWarning, match="worker 1 .* failed while another one raised"):
        assert envs.get_attr("trouble") == ("raise", "dawdle")
    assert envs.worker_failures == 1
    envs.close()


def test_a_replacement_begins_the_episode_that_the_seed_decides(tmp_path: Path) -> None:
    def begun(seed: int) -> float:
        once = str(tmp_path / f"struck-{len(list(tmp_path.iterdir()))}")
        factories = [functools.partial(Counting, trouble="die", at=1, once=once)]
        envs = VectorEnv(factories, workers=1, seed=seed)
        envs.reset()
        with pytest.warns(UserWarning, match="replaced"):
            (seen, *_), *_ = roll(envs, 1)
        envs.close()
        return float(seen["state"][0, 1])

    assert begun(7) == begun(7) != begun(8)


@pytest.mark.parametrize("workers", [0, 2])
def test_mistakes_of_the_user_stay_one_line(workers: int) -> None:
    with pytest.raises(UserError, match=r"^unknown task 'walker-wlk'; did you mean"):
        make(2, workers, trouble="user", at=-1)
    with pytest.raises(UserError, match="expected at least 1"):
        VectorEnv([], workers=workers)


def test_environments_must_be_alike() -> None:
    other = functools.partial(gym.make, "CartPole-v1")
    for workers in (0, 2):
        with pytest.raises(UserError, match="must be alike"):
            VectorEnv([Counting, other], workers=workers)


def children() -> set[int]:
    return {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
        and any("multiproc" in a for a in process.cmdline())
    }


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # in a container none may reap
    except psutil.NoSuchProcess:
        return False


def test_close_leaves_no_process_behind() -> None:
    make(1, 1).close()  # the fork server and the resource tracker stay, once
    before = children()
    envs = make(3, 3)
    pids = envs.call("process")
    assert len(set(pids)) == 3
    assert os.getpid() not in pids
    envs.close()
    envs.close()
    assert children() == before
    assert not any(alive(pid) for pid in pids)


def test_an_interrupt_while_workers_start_leaves_no_process_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from multiprocessing import forkserver

    VectorEnv([Counting], workers=1).close()  # the fork server is there
    before = set(psutil.Process().children(recursive=True))

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(forkserver, "read_signed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        VectorEnv([Counting, Counting], workers=2)
    gc.collect()
    started = set(psutil.Process().children(recursive=True)) - before
    assert not psutil.wait_procs(started, timeout=30)[1]


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [(2, 1, None), (2, 2, "0"), (2, 3, "0"), (16, 4, "4"), (16, 16, "0")],
)
def test_workers_share_the_cores_for_software_gl(
    cores: int, workers: int, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_cores", lambda: cores)
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)
    assert processes.environment_of(workers).get("LP_NUM_THREADS") == threads
    for own in ("0", "7"):
        monkeypatch.setenv("LP_NUM_THREADS", own)
        assert processes.environment_of(workers)["LP_NUM_THREADS"] == own


def test_workers_have_the_variables_of_now_and_not_of_the_first_worker(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import os
            from test_vector import Counting, VectorEnv

            for value in ("0", None, "3"):
                os.environ.pop("LP_NUM_THREADS", None)
                if value:
                    os.environ["LP_NUM_THREADS"] = value
                envs = VectorEnv([Counting], workers=1)
                print(*envs.call("variable", "LP_NUM_THREADS"))
                envs.close()
        """)
    )
    done = run_script(script)
    assert done.stdout == "0\nNone\n3\n", done.stderr


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


SCRIPT = """
    import functools, os, signal, sys
    import numpy as np
    import torch                       # as every training script does
    from test_vector import Counting, VectorEnv

    if __name__ == "__main__":
        factory = functools.partial(Counting, trouble="hang", at=1)
        envs = VectorEnv([factory] * 2, workers=2)
        envs.reset(seed=0)
        for imported in envs.call("imported"):
            assert "torch" not in imported
        assert envs.call("threads") == (["1", "1"],) * 2
        print(*envs.call("process"), flush=True)
        if sys.argv[1] == "killed":
            envs.step_async(np.zeros((2, 1)))  # they hang, and do not see that the pipe is closed
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "closed":
            envs.close()
"""


@pytest.mark.parametrize("how", ["closed", "forgotten", "killed"])
def test_workers_end_with_their_parent_quietly_and_never_import_torch(
    how: str, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").touch()  # a stand-in: the real one takes seconds to import
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = run_script(script, how)
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    assert done.stderr == ""
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)


def test_classes_of_the_users_script_work_in_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            from test_vector import Counting, VectorEnv

            class Mine(Counting):
                pass

            if __name__ == "__main__":
                envs = VectorEnv([Mine] * 2, workers=1)
                print(envs.reset(seed=0)[0]["state"].shape)
        """)
    )
    done = run_script(script)
    assert done.stdout == "(2, 2)\n", done.stderr
