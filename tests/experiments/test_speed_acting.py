"""The table of acting: what is compared is the same chunk, and another Python is asked in its own words."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from agents.generative_policies.parts import DenoisingConfig
from experiments import speed
from experiments.measuring import acting
from experiments.measuring.acting import COMPARED, PEER, Compared, _case
from experiments.measuring.lerobot_policy import ACTION, EXECUTED, HORIZON
from tests.experiments.test_speed import TINY, check_ratio, check_whole

pytest.importorskip("diffusers")
SAMPLERS = (("DDPM", 2), ("DDIM", 3), ("Euler", 2), ("Heun", 2))
SMALL = (
    Compared(
        "U-Net",
        DenoisingConfig(horizon=HORIZON, denoiser="unet", channels=(32, 64), time_features=16),
        SAMPLERS[:2],
    ),
    Compared("MLP", DenoisingConfig(horizon=HORIZON, denoiser="mlp", width=16), SAMPLERS),
)


def test_samplers_are_compared_with_diffusers() -> None:
    (table,) = acting.acting(TINY, compared=SMALL)
    names = [f"{c.name}: {name}, {steps} steps" for c in SMALL for name, steps in c.samplers]
    check_whole(table, names)
    check_ratio(table, "ours / diffusers", "ours", "diffusers")
    assert table.column("ours, an action") == pytest.approx(
        [float(x) / EXECUTED for x in table.column("ours")]
    )
    assert set(table.column(PEER)) == {""}
    assert "was not measured" in table.note


@pytest.mark.parametrize(("name", "steps"), SAMPLERS)
def test_both_loops_ask_the_network_as_often(name: acting.Name, steps: int) -> None:
    case = _case(SMALL[1].policy, "cpu")
    asked: list[int] = []
    case.policy.denoiser.register_forward_hook(lambda *_: asked.append(1))
    counts = []
    for call in (case.ours(name, steps), case.theirs(name, steps, fast=False)):
        asked.clear()
        assert call().shape == (1, EXECUTED, ACTION)
        counts.append(len(asked))
    assert counts[0] == counts[1] == (2 * steps - 1 if name == "Heun" else steps)


@pytest.mark.parametrize("steps", [4, 10])
def test_the_deterministic_loops_end_at_the_same_chunk(steps: int) -> None:
    """Euler's, on the straight path to a fixed chunk: the two loops disagree on nothing but how they are written."""
    case = _case(SMALL[1].policy, "cpu")
    target = torch.linspace(-0.9, 0.9, HORIZON * ACTION).view(1, HORIZON, ACTION)
    case.policy.denoiser.forward = lambda x, t, condition: (x - target) / t.view(-1, 1, 1)
    for call in (case.ours("Euler", steps), case.theirs("Euler", steps, fast=True)):
        torch.testing.assert_close(torch.from_numpy(call()), target[:, :EXECUTED], atol=1e-3, rtol=0)  # fmt: skip


STAND_IN = """#!{python}
import sys
sys.path.insert(0, {root!r})
from experiments.measuring.timing import serve
assert sys.argv[1:5] == ["-W", "ignore", "-m", "experiments.measuring.lerobot_policy"], sys.argv
if sys.argv[5] == "versions":
    print("LeRobot 9.9 on torch 1.2")
else:
    widths, steps, device, threads = sys.argv[6:]
    assert (widths, steps, device) == ("32,64", "2,3", "cpu")
    names = [kind + "-" + k for kind in ("DDPM", "DDIM") for k in steps.split(",")]
    calls = dict.fromkeys(names, lambda: sum(range(2000)))
    serve(calls, sys.stdin, sys.stdout)
"""


def executable(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_a_peer_is_measured_in_its_own_python(tmp_path: Path) -> None:
    text = STAND_IN.format(python=sys.executable, root=os.getcwd())
    peer = executable(tmp_path / "python", text)
    (table,) = acting.acting(TINY, peer_python=peer, compared=SMALL)
    theirs = table.column(PEER)
    assert all(isinstance(cell, float) and cell > 0 for cell in theirs[:2])
    assert set(theirs[2:]) == {""}, "it has no MLP"
    ratios = [float(a) / float(b) for a, b in zip(table.column("ours")[:2], theirs[:2], strict=True)]  # fmt: skip
    assert table.column(f"ours / {PEER}")[:2] == pytest.approx(ratios)
    assert "LeRobot 9.9 on torch 1.2" in table.note


def test_a_python_without_lerobot_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This one's, unless somebody has installed it here; one that is not there; one that says nothing."""
    silent = executable(tmp_path / "silent", "#!/bin/sh\nexit 3\n")
    trace = "#!/bin/sh\necho trace >&2\necho 'No module: lerobot' >&2\nexit 1\n"
    broken = executable(tmp_path / "broken", trace)
    for python, said in (
        (tmp_path / "nowhere", "cannot be run: No such file"),
        (silent, "it says nothing"),
        (broken, "(No module: lerobot); install lerobot there"),
    ):
        assert speed.main(["acting", "--peer-python", str(python), "--seconds", "0.01"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_compared_sizes_are_those_of_the_peers() -> None:
    assert [c.policy.horizon for c in COMPARED] == [HORIZON] * 3
    assert COMPARED[0].policy.channels == (512, 1024, 2048)
    assert COMPARED[0].policy.time_features == 128
