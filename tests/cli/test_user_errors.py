"""A user's mistake: one clear line on stderr, exit code 2, and nothing lost, overwritten or left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import agents.core.fields
from agents import Policy
from agents.core.errors import UserError
from agents.policy import read_config
from experiments.campaign import main as campaign
from experiments.compare import final_state
from experiments.demo import main as demo
from experiments.evaluate import main as evaluate
from experiments.speed import main as speed
from experiments.train import main, new_config, parser
from tests.experiments.helpers import arguments, train

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[[list[str]], int]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that checks how a command refuses its arguments, and returns its one line."""

    def check(*words: object, command: Command = main) -> str:
        capsys.readouterr()
        assert command([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.endswith("\n")
        return captured.err

    return check


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train("drq", "toy/reach", folder, steps=20, checkpoint_every=12)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "tensorboard" not in file.parts
    }


BAD_FLAGS = [
    # what is given, what the line must offer or say
    ("--agent sqgn", "unknown agent 'sqgn'; did you mean sgqn"),
    ("--agent", "--agent: expected one argument"),
    ("--env toy/reech", "did you mean toy/reach"),
    ("--env dmc/cartpole-swngup", "did you mean dmc/cartpole-swingup"),
    ("--env metaworld/drawr-open", "did you mean metaworld/drawer-open"),
    ("--env gym/HalfCheeta-v5", "did you mean gym/HalfCheetah-v5"),
    ("--env toy/catch", "needs continuous actions"),
    ("--distraction video_hrad", "did you mean video_hard"),
    ("--preset cpuu", "did you mean cpu"),
    ("--protocol drqv3", "did you mean drqv2"),
    ("--protocol drqv2", "is for dmc/ tasks, not for toy/reach"),
    (
        "--env dmc/walker-walk --protocol drqv2 --size 48",
        "size is 48, but protocol 'drqv2' fixes 84",
    ),
    ("--split test", "what evaluations are made of"),
    ("--stepz 4", "unknown flag '--stepz'; did you mean --steps"),
    ("--step 4", "unknown flag '--step'; did you mean --steps"),
    ("--distractoin=video_hard", "unknown flag '--distractoin'; did you mean --distraction"),
    ("stray", "unrecognized arguments: stray"),
    ("--encoder drqv3", "choose from 'dmc-gb', 'drqv2', 'small'"),
    ("--steps -5", "steps is -5"),
    ("--steps 0", "steps is 0"),
    ("--steps 4.5", "--steps: invalid int value: '4.5'"),
    ("--random-steps -1", "random_steps is -1"),
    ("--updates-per-step nan", "updates_per_step is nan"),
    ("--eval-every -1", "eval_every is -1"),
    ("--log-every 0", "log_every is 0"),
    ("--seed -1", "seed is -1"),
    ("--threads 0", "threads is 0"),
    ("--num-envs 0", "num_envs is 0"),
    ("--workers -1", "workers -1"),
    ("--batch-size 0", "batch_size is 0"),
    ("--hidden -4", "hidden is (-4,)"),
    ("--actor-learning-rate nan", "actor_learning_rate is nan"),
    ("--agent sgqn --quantile 95", "quantile is 95.0"),
    ("--agent sgqn --auxiliary-every 0", "auxiliary_every is 0"),
    ("--agent sgqn --observation state", "use --observation pixels or both"),
    ("--size 0", "size is 0; expected a whole number from 8"),
    ("--size 100000", "size is 100000"),
    ("--size 8", "8 x 8 are too small for encoder 'small'"),
    ("--camera behind", "unknown camera 'behind'"),
    ("--camera left rihgt", "unknown camera 'rihgt'; did you mean right"),
    ("--camera left left", "camera 'left' is given twice; give each once"),
    ("--device gpu", "device 'gpu' is not available"),
    ("--device meta", "device 'meta' is not available"),
    ("--replay-capacity 10000000000000", "lower --replay-capacity or --size"),
    ("--replay-capacity 2", "raise it to at least 5"),
]


@pytest.mark.parametrize(("given", "said"), BAD_FLAGS, ids=[given for given, _ in BAD_FLAGS])
def test_a_bad_flag_is_one_line_and_leaves_no_run_behind(
    given: str, said: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    base = arguments("drq", "toy/reach", tmp_path / "new", steps=20)
    assert said in refused(*base, *given.split())
    assert not (tmp_path / "new").exists(), "the name must be free for the corrected command"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_said(tmp_path: Path, refused: Callable[..., str]) -> None:
    base = arguments("drq", "toy/reach", tmp_path / "new", steps=20, device="cuda")
    assert "device 'cuda' is not available here; use cpu" in refused(*base)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_video_folders_are_named(
    workers: int, tmp_path: Path, refused: Callable[..., str]
) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "cut.mp4").write_bytes(bytes(100))

    def say(folder: Path) -> str:
        words = arguments(
            "drq", "toy/reach", tmp_path / "new", steps=20,
            distraction="video_hard", videos=folder, workers=workers,
        )  # fmt: skip
        line = refused(*words)
        assert not (tmp_path / "new").exists()
        return line

    assert f"no video folder '{tmp_path / 'missing'}'" in say(tmp_path / "missing")
    assert f"no videos in '{empty}'" in say(empty)
    assert f"cannot read '{broken / 'cut.mp4'}'" in say(broken)


def test_too_little_memory_is_said_before_anything_is_allocated(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents.core.fields, "free_bytes", lambda *_: 1_000_000)

    def no_allocation(*_: object) -> None:
        raise AssertionError("allocated before it was checked")

    monkeypatch.setattr("agents.core.rows.allocate", no_allocation)
    line = refused(*arguments("drq", "toy/reach", tmp_path / "new", steps=20))
    assert "ram has 0.00 GB free" in line
    assert "lower --replay-capacity" in line
    assert not (tmp_path / "new").exists()


def test_a_batch_that_no_memory_holds_is_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    words = arguments("drq", "toy/reach", tmp_path / "new", steps=20, batch_size=10**9)
    assert "lower --batch-size" in refused(*words)
    assert not (tmp_path / "new").exists()


def test_the_demo_refuses_flags_of_another_run_than_its_folder_holds(
    run: Path, refused: Callable[..., str]
) -> None:
    before = contents(run)
    line = refused("--run-dir", run, "--agent", "svea", command=demo)
    assert "--agent is svea, but the run in" in line
    assert "has drq" in line
    assert contents(run) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch-size 16", "batch_size is 16, but protocol 'dmc-gb' fixes 128"),
        ("--camera 1", "camera is 1, but protocol 'dmc-gb' fixes the task's own"),
        ("--episode-length 100", "episode_length is 100, but protocol 'dmc-gb' fixes 1000"),
        ("--encoder drqv2", "encoder is drqv2, but protocol 'dmc-gb' fixes dmc-gb"),
    ],
)
def test_what_a_protocol_fixes_cannot_be_changed(
    flags: str, said: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    words = ["--env", "dmc/walker-walk", "--protocol", "dmc-gb", "--run-dir", tmp_path / "new"]
    assert said in refused(*words, *flags.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [speed, campaign])
def test_files_that_would_be_lost_or_cannot_be_written_are_refused_before_the_work(
    command: Command, tmp_path: Path, refused: Callable[..., str]
) -> None:
    kept = tmp_path / "kept.md"
    kept.write_text("precious")
    assert "exists; add --overwrite" in refused("--out", kept, command=command)
    assert "is a folder" in refused("--out", tmp_path, command=command)
    assert "does not exist" in refused("--out", tmp_path / "no" / "file.md", command=command)
    assert kept.read_text() == "precious"


def test_another_quality_than_the_protocols_is_warned_of() -> None:
    words = ["--env", "dmc/walker-walk", "--protocol", "dmc-gb", "--quality", "fast"]
    with pytest.warns(UserWarning, match="quality fast draws other pixels"):
        new_config(vars(parser("sgqn").parse_args(words)))


def test_an_existing_run_folder_is_never_written_to(
    run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    before = contents(run)
    line = refused(*arguments("drq", "toy/reach", run, steps=20))
    assert f"run folder '{run}' exists" in line
    assert f"--resume {run}" in line
    assert contents(run) == before
    file = tmp_path / "file"
    file.write_text("precious")
    assert "exists" in refused(*arguments("drq", "toy/reach", file, steps=20))
    assert "cannot create" in refused(*arguments("drq", "toy/reach", file / "new", steps=20))
    assert file.read_text() == "precious"


@pytest.mark.parametrize(("command", "words"), [(main, ["--resume"]), (evaluate, [])])
def test_what_is_no_run_cannot_be_resumed_or_evaluated(
    command: Command, words: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "folder"
    assert "is no run folder" in refused(*words, folder, command=command)
    folder.mkdir()
    assert "is no run folder" in refused(*words, folder, command=command)
    for text in ("[]", "{}", '{"agent": "drq"}'):
        (folder / "config.json").write_text(text)
        assert "is no run's config" in refused(*words, folder, command=command)
    (folder / "config.json").write_text('{"agent": "dr')
    assert "is damaged" in refused(*words, folder, command=command)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "flags", ["--hidden 8", "--agent sac", "--seed=4", "--env toy/balance", "--run-dir elsewhere"]
)
def test_resume_refuses_what_would_make_it_another_run(
    flags: str, run: Path, refused: Callable[..., str]
) -> None:
    before = contents(run)
    line = refused("--resume", run, "--steps", 24, *flags.split())
    assert f"{flags.replace('=', ' ').split()[0]} cannot change with --resume" in line
    assert "--steps" in line.partition("run);")[2]
    assert contents(run) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [("--steps -4", "steps is -4"), ("--device gpu", "device 'gpu'"), ("--stepz 40", "--steps")],
)
def test_resume_with_a_bad_value_changes_nothing(
    flags: str, said: str, run: Path, refused: Callable[..., str]
) -> None:
    before = contents(run)
    assert said in refused("--resume", run, *flags.split())
    assert contents(run) == before


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.parametrize("agent", ["sac", "drqv2-sgqn"])
def test_a_checkpoint_of_another_agent_is_refused_and_kept(
    agent: str, copy: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    # The networks of `sac` and `drq` have the same names and shapes: only the checkpoint's own word tells.
    other = train(agent, "toy/reach", tmp_path / "other", steps=16)
    checkpoint = copy / "checkpoints" / "step-000000020"
    before = contents(copy), contents(other)
    line = refused(other, "--checkpoint", checkpoint, command=evaluate)
    assert f"'{checkpoint}' was saved with agent 'drq', and this run is of agent '{agent}'" in line
    with pytest.raises(UserError, match="was saved with agent 'drq'"):
        Policy.load(other, checkpoint=str(checkpoint))
    assert (contents(copy), contents(other)) == before
    shutil.copy(other / "config.json", copy / "config.json")
    before = contents(copy), contents(other)
    for words, command in ((["--resume", copy, "--steps", 40], main), ([copy], evaluate)):
        line = refused(*words, command=command)
        assert f"was saved with agent 'drq', and this run is of agent '{agent}'" in line
        assert "put back the config.json" in line
    assert (contents(copy), contents(other)) == before


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("id", "toy/balance", "env 'toy/reach', and this run is of env 'toy/balance'"),
        ("observation", "state", "observation 'pixels', and this run is of observation 'state'"),
    ],
)
def test_a_checkpoint_of_another_task_or_observation_is_refused(
    field: str, value: str, said: str, copy: Path, refused: Callable[..., str]
) -> None:
    config = read_config(copy)
    config["env"][field] = value
    (copy / "config.json").write_text(json.dumps(config))
    assert f"was saved with {said}" in refused(copy, command=evaluate)


@pytest.fixture
def opaque() -> Iterator[str]:
    """Register a third party's task that keeps what no snapshot can hold, as Box2D's do; return its id."""
    gym.register("Opaque-v0", entry_point=Opaque, max_episode_steps=9)
    yield "gym/Opaque-v0"
    del gym.registry["Opaque-v0"]


class Opaque(gym.Env):
    """A task whose world cannot be read."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self) -> None:
        self.world = threading.Lock()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 1.0, False, False, {}


def test_a_task_whose_state_cannot_be_read_is_said_at_once_and_can_be_trained_all_the_same(
    opaque: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    flags = {"steps": 30, "observation": "state", "checkpoint_every": 12}
    words = arguments("sac", opaque, tmp_path / "run", **flags)
    line = refused(*words)
    assert "gym/Opaque-v0 cannot be saved in mid-episode: its attribute 'world' is a lock" in line
    assert "add --no-exact-resume" in line
    assert not (tmp_path / "run").exists(), "the name must be free for the corrected command"
    (tmp_path / "run").mkdir()
    refused(*words)
    assert [*(tmp_path / "run").iterdir()] == [], (
        "a folder that a person made stays, empty as it was"
    )
    assert main([*words, "--no-exact-resume"]) == 0
    assert main(["--resume", str(tmp_path / "run"), "--steps", "60"]) == 0
    assert final_state(tmp_path / "run")["progress"]["agent_steps"] == 60


def damage(folder: Path) -> None:
    """Cut the largest file of a checkpoint in half."""
    file = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_truncated_checkpoint_falls_back_to_the_one_before_with_one_warning(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy / "checkpoints" / "step-000000020")
    command = [sys.executable, "-m", "experiments.train", "--resume", str(copy), "--steps", "24"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stderr.startswith("warning: ")
    assert child.stderr.count("\n") == 1
    assert "safetensors' is damaged" in child.stderr
    assert "falling back to step-000000012" in child.stderr
    assert "for 12 agent steps" in child.stdout
    assert "finished after 24 agent steps" in child.stdout


def test_with_every_checkpoint_truncated_nothing_is_resumed_and_nothing_lost(
    copy: Path, refused: Callable[..., str]
) -> None:
    shutil.rmtree(copy / "checkpoints" / "step-000000012")
    damage(copy / "checkpoints" / "step-000000020")
    before = contents(copy)
    assert "is damaged" in refused("--resume", copy, "--steps", 40)
    assert "is damaged" in refused(copy, command=evaluate)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--distractions clean video_hrad", "did you mean video_hard"),
        ("--checkpoint bst", "has no checkpoint bst"),
        ("--checkpoint best", "has no checkpoint best"),
        ("--device gpu", "device 'gpu' is not available"),
        ("--seed -1", "seed is -1"),
        ("--episodes 0", "--episodes and --num-envs must be at least 1"),
        ("--episode 3", "did you mean --episodes"),
        ("--split tset", "choose from 'train', 'validation', 'test'"),
        ("--name ../../evil", "give a name without folders"),
        (
            "--distractions video_easy --videos missing --workers 0",
            "missing'; give a folder of videos",
        ),
    ],
)
def test_evaluate_refuses_bad_flags_and_writes_nothing(
    flags: str, said: str, run: Path, refused: Callable[..., str]
) -> None:
    before = contents(run)
    assert said in refused(run, *flags.split(), command=evaluate)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("train", ["--agent", "sqgn"], "did you mean sgqn?"),
        ("evaluate", ["nowhere"], "'nowhere' is no run folder"),
    ],
)
def test_a_real_process_exits_with_two_and_prints_one_line(
    module: str, words: list[str], said: str
) -> None:
    command = [sys.executable, "-m", f"experiments.{module}", *words]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == 2
    assert child.stderr.startswith("error: ")
    assert said in child.stderr
    assert child.stderr.count("\n") == 1
    assert child.stdout == ""


@pytest.mark.parametrize(
    ("agent", "own", "foreign"),
    [("sgqn", "SGQNConfig (sgqn)", "noise_clip"), ("drqv2", "DDPGConfig (drqv2)", "quantile")],
)
def test_help_shows_an_agents_flags_in_groups_with_defaults_and_sources(
    agent: str, own: str, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--agent", agent, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for group in ("task:", "parallel environments:", "loop:", f"{own}:"):
        assert group in text
    assert "--distraction" in text
    assert "--steps INT Agent steps in all, over all environments" in text
    assert "[500000]" in text
    assert "(DMControl-GB" in text, "a default without its source"
    assert "--channels-last, --no-channels-last" in text
    assert "--hidden INT [INT ...]" in text
    assert "[1024 1024]" in text
    assert f"--{foreign.replace('_', '-')}" not in text


def test_list_names_tasks_of_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    ids = capsys.readouterr().out.split()
    assert {"toy/reach", "dmc/walker-walk", "metaworld/drawer-open", "gym/HalfCheetah-v5"} <= {*ids}
    assert len(ids) == len(set(ids)) > 80
