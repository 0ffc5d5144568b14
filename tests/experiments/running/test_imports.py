"""Third parties' tasks and agents: `--import` registers them, runs remember it, nobody imports behind one's back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
import wrappers.errors
from agents import AGENTS, Policy
from agents.core.errors import UserError
from agents.core.imports import import_modules, recorded_imports
from agents.core.replay import Batch
from agents.policy import read_config
from envs import registry
from experiments.benchmark import main as benchmark
from experiments.demo import main as demo
from experiments.evaluate import main as evaluate
from experiments.running.imports import import_for_run
from experiments.soak import main as soak
from experiments.train import main as train
from tests.experiments.helpers import TINY, as_arguments, final_state

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "docs" / "examples"
FOLLOW = {
    **TINY, "--import": "third_party", "--agent": "drq-averaged", "--env": "example/follow",
    "--size": 24, "--steps": 20, "--episode-length": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no module of a test, nor what it registers, reach the next one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    modules, agents = set(sys.modules), dict(AGENTS)
    tasks, gymnasium_tasks = dict(registry._TASKS), dict(gym.registry)
    yield
    for name in set(sys.modules) - modules:
        places = (str(EXAMPLES), str(tmp_path))
        if str(getattr(sys.modules[name], "__file__", None)).startswith(places):
            del sys.modules[name]
    for own, before in (
        (AGENTS, agents),
        (registry._TASKS, tasks),
        (gym.registry, gymnasium_tasks),
    ):
        for key in set(own) - set(before):
            del own[key]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Return a function that writes a module of some name and source where Python finds it."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def write(name: str, source: str) -> str:
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the example in docs, by the real command, with a worker process."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = as_arguments({**FOLLOW, "--run-dir": folder, "--num-envs": 2, "--workers": 1})
    path = os.pathsep.join([str(ROOT), str(EXAMPLES)])
    child = subprocess.run(
        [sys.executable, "-m", "experiments.train", *words],
        cwd=folder.parent, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert "finished after 20 agent steps" in child.stdout
    return folder


# -------------------------------------------------------------------------- the example in docs


def test_a_run_remembers_its_modules_and_goes_on_with_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_config(run)
    assert config["imports"] == ["third_party"]
    assert config["configs"]["AveragedConfig"]["target_copies"] == 2, "its fields are saved"
    assert train(["--resume", str(run), "--steps", "24"]) == 0
    assert capsys.readouterr().out.startswith("imports third_party, as the run's config says\n")
    assert final_state(run)["progress"]["agent_steps"] == 24
    assert read_config(run)["imports"] == ["third_party"]


def test_evaluate_imports_what_the_run_says_and_tells_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--distractions", "video_hard", "--episodes", "1", "--no-media"]
    words += ["--workers", "0"]
    assert evaluate([*words, "--name", "recorded"]) == 0
    assert capsys.readouterr().out.count("imports third_party, as the run's config says\n") == 1
    assert evaluate([*words, "--name", "again"]) == 0
    assert "imports" not in capsys.readouterr().out, "it was imported already"


def test_a_policy_of_a_third_partys_agent_asks_before_it_runs_their_code(run: Path) -> None:
    with pytest.raises(UserError, match="import third_party first, or let"):
        Policy.load(run)
    assert "third_party" not in sys.modules
    policy = Policy.load(run, imports=True)
    action = policy.act(np.zeros((9, 24, 24), np.uint8))
    assert action.shape == (2,)
    np.testing.assert_array_equal(Policy.load(run).act(np.zeros((9, 24, 24), np.uint8)), action)


def test_the_examples_task_is_exact_and_can_be_solved() -> None:
    import_modules(["third_party"])
    env = envs.make("example/follow", observation="state", seed=1)
    state, _ = env.reset()
    total = 0.0
    for _ in range(50):
        saved = env.get_state()
        action = (state[2:] - state[:2]) / 0.2
        state, reward, terminated, truncated, _ = env.step(action)
        env.set_state(saved)
        again = env.step(action)
        np.testing.assert_array_equal(again[0], state)
        assert again[1:4] == (reward, terminated, truncated)
        total += reward
    assert truncated
    assert 40 < total < 50
    env.reset()
    assert sum(env.step(np.zeros(2))[1] for _ in range(50)) < 16, "0.3 a step, standing still"


def test_the_examples_agent_averages_targets() -> None:
    import_modules(["third_party"])
    spec = AGENTS["drq-averaged"]
    pixels = gym.spaces.Box(0, 255, (9, 24, 24), np.uint8)
    action = gym.spaces.Box(-1, 1, (2,), np.float32)
    config = type(spec.configs[0])(encoder="small", hidden=(8,), feature_dim=4, target_copies=3)
    agent = spec.build(pixels, action, config, device="cpu", seed=0)
    seen = {"pixels": torch.randint(0, 256, (5, 9, 24, 24), dtype=torch.uint8)}
    ones = torch.ones(5)
    batch = Batch(seen, torch.zeros(5, 2), ones, ones, seen, torch.zeros(5, dtype=torch.int64), {})
    state = agent.generator.get_state()
    with torch.no_grad():
        single = [super(type(agent), agent).target_value(batch) for _ in range(3)]
        agent.generator.set_state(state)
        mean = agent.target_value(batch)
    assert not torch.equal(single[0], single[1])
    torch.testing.assert_close(mean, (single[0] + single[1] + single[2]) / 3)


# ----------------------------------------------------------------------------------- mechanics


def test_workers_import_what_registers_tasks_with_gymnasium(
    module: Callable[[str, str], str],
) -> None:
    name = module(
        "their_tasks",
        """
        import gymnasium
        gymnasium.register("Theirs-v0", "gymnasium.envs.classic_control:PendulumEnv")
        """,
    )
    import_modules([name])
    settings = {"workers": 1, "observation": "state", "episode_length": 4}
    with pytest.raises(wrappers.errors.UserError, match="unknown Gymnasium task"):
        envs.make_vec("gym/Theirs-v0", 1, **settings)
    vector = envs.make_vec("gym/Theirs-v0", 1, imports=[name], **settings)
    vector.reset(seed=0)
    vector.close()


def test_a_recorded_module_is_told_of_before_its_code_runs(
    module: Callable[[str, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = module("their_recorded", "print('code of theirs')")
    given = module("their_given", "print('code of mine')")
    assert import_for_run({"imports": [recorded, given]}, [given]) == [recorded, given]
    assert capsys.readouterr().out.splitlines() == [
        "code of mine", "imports their_recorded, as the run's config says", "code of theirs",
    ]  # fmt: skip


def test_a_run_from_before_there_were_imports_has_none() -> None:
    assert recorded_imports({"agent": "drq"}) == []


@pytest.mark.parametrize("entry", ["os", [1], {"os": 1}, None])
def test_a_damaged_entry_is_refused(entry: object) -> None:
    with pytest.raises(UserError, match="expected a list of names"):
        recorded_imports({"imports": entry})


def test_what_a_module_raises_itself_is_its_authors_to_see(
    module: Callable[[str, str], str],
) -> None:
    name = module("their_broken", "raise KeyError('mine')")
    with pytest.raises(KeyError, match="mine"):
        import_modules([name])


def test_two_registrations_of_one_name_are_refused_in_one_line(
    module: Callable[[str, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = module("their_reach", "import envs\nenvs.register('toy/reach', print)")
    assert train(["--import", name, "--list"]) == 2
    assert capsys.readouterr().err == (
        "error: cannot register 'toy/reach' a second time; choose another name\n"
    )


BAD_NAMES = [
    ("no_such_module_here", "there is no module 'no_such_module_here' here; install its package"),
    ("json.no_such_part", "there is no module 'json.no_such_part' here"),
    ("no_such_module_here.tasks", "there is no module 'no_such_module_here' here"),
    ("their_needy", "it needs 'no_such_need', which is not installed"),
    ("tasks/mine.py", "give a module's name such as mypackage"),
    ("", "give a module's name"),
]


@pytest.mark.parametrize(("name", "said"), BAD_NAMES)
@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train, ["--run-dir", "new"]),
        (benchmark, ["--agents", "drq", "--runs", "new", "--out", "new"]),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    main: Callable[[list[str]], int],
    words: list[str],
    name: str,
    said: str,
    module: Callable[[str, str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module("their_needy", "import no_such_need")
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--import", name]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot import '{name}': ")
    assert said in err
    assert err.count("\n") == 1
    assert not Path("new").exists()


def test_a_run_whose_module_is_not_installed_here_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    required = {"env": {}, "vector": {}, "train": {}, "configs": {}, "device": "cpu"}
    config = {**required, "agent": "theirs", "imports": ["no_such_module_here"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for main, words in ((train, ["--resume", str(tmp_path)]), (evaluate, [str(tmp_path)])):
        assert main(words) == 2
        assert "there is no module 'no_such_module_here' here" in capsys.readouterr().err


def test_the_benchmark_hands_its_modules_on(
    module: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def stop(command: list[str], log: Path) -> int:
        seen.append(command)
        return 1

    monkeypatch.setattr("experiments.benchmark.run_logged", stop)
    words = ["--agents", "drq-averaged", "--envs", "example/follow", "--seeds", "1"]
    folders = ["--runs", str(tmp_path), "--out", str(tmp_path)]
    assert benchmark([*words, *folders, "--import", "third_party"]) == 2  # nothing was evaluated
    assert "--import=third_party" in seen[0]


def test_the_demo_and_the_soak_hand_their_modules_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def stop(command: list[str], **_: object) -> int:
        seen.append(command)
        raise UserError("seen")

    monkeypatch.setattr("experiments.demo.train.main", stop)
    monkeypatch.setattr("experiments.soak.subprocess.Popen", stop)
    words = ["--agent", "drq-averaged", "--env", "example/follow", "--import", "third_party"]
    assert demo([*words, "--run-dir", str(tmp_path / "run")]) == 2
    assert soak([*words, "--out", str(tmp_path / "out")]) == 2
    assert all("--import=third_party" in command for command in seen)
    assert len(seen) == 2


def test_the_demo_goes_on_with_the_modules_that_its_run_remembers(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.demo.evaluate_run", lambda *_, **keywords: run)
    monkeypatch.setattr("experiments.demo.build_report", lambda *_, **keywords: run)
    assert demo(["--run-dir", str(run)]) == 0, "in a process that has not imported them"


def test_a_module_that_came_with_the_run_is_not_imported_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` puts the folder in which one stands on the path, which may be the run's."""
    (tmp_path / "came_along.py").write_text("raise SystemExit('code of the run folder')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"lies in the run folder.*add --import came_along"):
        import_for_run({"imports": ["came_along"]}, folder=tmp_path)
