"""finetune_generator by two processes that torchrun starts: they train, resume, write and fail as one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agents.core.checkpoints import CheckpointStore
from experiments.finetune_generator import main
from tests.experiments.generator_base import write_base

pytestmark = pytest.mark.slow

REWARDS = """
import os

calls_left = -1  # until the second process gets a number that is none


def redness(images, prompts):
    global calls_left
    calls_left -= 1
    values = images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
    return values * float("nan") if calls_left == -1 and os.environ.get("RANK") == "1" else values
"""

PROCESS = """
import json, os, sys, zlib
from pathlib import Path

written, runs = [], sys.argv[1]


def listen(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        written.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove"):
        written.append(str(arguments[0]))


sys.addaudithook(listen)

import rank_rewards
from experiments.finetune_generator import FineTuningSession, main

sums, close = [], FineTuningSession.close


def close_and_sum(self):
    sums.append([zlib.crc32(p.detach().numpy().tobytes()) for p in self.tuner.parameters])
    close(self)


FineTuningSession.close = close_and_sum
codes = []
for plan in json.loads(Path(sys.argv[2]).read_text()):
    rank_rewards.calls_left = plan["calls_left"]
    if plan["port"]:  # torchrun's own store serves one group of a process's life
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(plan["port"])}
    try:
        codes.append(main(plan["words"]))
    except SystemExit as stop:
        codes.append(stop.code)
own = [path for path in written if path.startswith(runs)]
said = {"codes": codes, "sums": sums, "written": own}
Path(sys.argv[2]).with_name("said-" + os.environ["RANK"] + ".json").write_text(json.dumps(said))
"""


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two processes say of a whole run, one in two halves, and one whose reward breaks and is mended."""
    folder = tmp_path_factory.mktemp("torchrun")
    runs, base = folder / "runs", folder / "base"
    runs.mkdir()
    base.mkdir()
    write_base(base)

    def words(name, steps, **flags):
        values = {
            "base": base, "run-dir": runs / name, "steps": steps, "preset": "debug", "seed": 1,
            "threads": 1, "device": "cpu", "reward": "rank_rewards:redness", "gold": "brightness", "patience": 0,
            "learning-rate": 0.01, **flags,
        }  # fmt: skip
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]

    def resumed(name, steps):
        return ["--resume", str(runs / name), "--steps", str(steps)]

    plans = [
        (words("whole", 3), -1),
        (words("half", 2), -1),
        (resumed("half", 3), -1),
        (words("broken", 3), 2),
        (resumed("broken", 3), -1),
        (words("whole", 3), -1),
        (words("three", 3, prompts=3), -1),
    ]
    (folder / "rank_rewards.py").write_text(REWARDS)
    (folder / "process.py").write_text(PROCESS)
    (folder / "plans.json").write_text(
        json.dumps(
            [
                {"words": each, "calls_left": left, "port": free_port() if place else 0}
                for place, (each, left) in enumerate(plans)
            ]
        )
    )
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(folder), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(folder / "process.py"), str(runs), str(folder / "plans.json"),
        ],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, cwd=folder, capture_output=True,
        text=True, check=False, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]
    return {"runs": runs, "ranks": ranks, "out": done.stdout, "errors": done.stderr}


def weights(run):
    return CheckpointStore(run).load()["agent"]["networks"]["model"]


def assert_same(one, other):
    for key, value in weights(one).items():
        assert torch.equal(value, weights(other)[key]), key


def test_both_end_with_the_same_code_and_hold_the_same_weights(said):
    first, second = said["ranks"]
    assert first["codes"] == second["codes"] == [0, 0, 0, 2, 0, 2, 2]
    assert first["sums"] == second["sums"]
    assert len(first["sums"]) == 5
    assert first["sums"][2] == first["sums"][0] != first["sums"][1]


def test_the_first_one_alone_writes_and_speaks(said):
    first, second = said["ranks"]
    assert second["written"] == []
    assert first["written"]
    counts = {"run folder:": 6, "finished after": 4, "report:": 4, "evaluation:": 4 + 3 + 1 + 2 + 2}
    assert {line: said["out"].count(line) for line in counts} == counts
    assert (said["runs"] / "whole" / "report" / "report.md").is_file()
    assert json.loads((said["runs"] / "whole" / "config.json").read_text())["processes"] == 2


def test_a_run_in_two_halves_is_the_whole_one(said):
    assert_same(said["runs"] / "whole", said["runs"] / "half")
    one, other = (CheckpointStore(said["runs"] / name).load() for name in ("whole", "half"))
    assert one["monitor"] == other["monitor"]
    assert one["agent"]["extra"] == other["agent"]["extra"]
    states = one["ranks"]["generators"]
    assert not torch.equal(*states)
    assert all(map(torch.equal, states, other["ranks"]["generators"]))


def test_a_reward_that_breaks_in_one_ends_both_with_one_line_and_loses_nothing(said):
    """The iteration is drawn again: then the run is the one whose reward never broke."""
    broken = [line for line in said["errors"].splitlines() if "is nan" in line]
    assert len(broken) == 1
    assert broken[0].startswith("error: reward")
    assert "(rank 1 of 2)" in broken[0]
    assert_same(said["runs"] / "whole", said["runs"] / "broken")


def test_mistakes_are_said_once(said):
    for match in ("choose another --run-dir", "give --prompts a multiple of 2"):
        assert said["errors"].count(match) == 1
    assert not (said["runs"] / "three").exists()


def test_another_number_of_processes_is_refused(said, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(said["runs"].parent))
    assert main(["--resume", str(said["runs"] / "half"), "--steps", "4"]) == 2
    error = capsys.readouterr().err
    assert "one of 2 processes" in error
    assert "--nproc-per-node 2" in error
