"""The commands of docs/protocols.md: DMC-GB's protocol from training to the report, and generators on a GPU."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from agents.generative_models.rewards import make_reward
from envs import PROTOCOLS
from experiments import benchmark, finetune_generator, pretrain_generator, report, speed
from experiments.generators import finetuning_configs
from experiments.measuring import large_generators
from experiments.reporting.published import compare
from experiments.reporting.runs import find_runs, read_run
from experiments.reporting.scores import summarize
from experiments.train import new_config, parser

PAGE = Path(__file__).parents[2] / "docs" / "protocols.md"
WALKER = "dmc/walker-walk"
TINY = {
    "--seeds": ["1"], "--episodes": ["1"], "--distractions": ["color_hard"],
    "--steps": ["4"],
}  # fmt: skip
"""What is cut of the grid."""
ADDED = ["--random-steps", "2", "--replay-capacity", "300", "--eval-every", "0", "--device", "cpu"]


def commands(block: int = 0, modules: tuple[str, ...] = ("benchmark", "report")) -> list[list[str]]:
    """Return the commands of one of the page's blocks, as words without `python -m MODULE`."""
    text = PAGE.read_text().split("```\n")[2 * block + 1].replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.strip().splitlines()]
    assert [line[:3] for line in lines] == [
        ["python", "-m", f"experiments.{name}"] for name in modules
    ]
    return [line[3:] for line in lines]


def cut(words: list[str], replaced: dict[str, list[str]]) -> list[str]:
    """Return a command line with the values of some flags replaced; every one of them must be there."""
    assert set(replaced) <= set(words)
    kept: list[str] = []
    flag = ""
    for word in words:
        flag = word if word.startswith("--") else flag
        if word in replaced:
            kept += [word, *replaced[word]]
        elif word == flag or flag not in replaced:
            kept.append(word)
    return kept


def test_the_pages_flags_are_the_published_protocol_in_full() -> None:
    given = benchmark.parser().parse_args(commands()[0])
    assert (given.agents, given.envs, len(given.seeds)) == (["sgqn", "svea"], [WALKER], 5)
    for agent in given.agents:
        flags = [word for word in given.train_flags if word != "/data/davis"]
        flags.remove("--videos")
        words = ["--agent", agent, "--env", WALKER, "--preset", given.preset, "--device", "cpu"]
        config = new_config(vars(parser(agent).parse_args([*words, *flags])))
        assert (config["env"]["protocol"], config["env"]["quality"]) == ("dmc-gb", "reference")
        assert (config["train"]["steps"], config["configs"]["SACConfig"]["batch_size"]) == (
            500_000,
            128,
        )
        assert config["configs"]["SACConfig"]["hidden"] == [1024, 1024]


@pytest.mark.parametrize(
    ("words", "quantile"),
    [
        ("--env dmc/walker-walk --protocol dmc-gb", 0.95),
        ("--env dmc/cartpole-swingup --protocol dmc-gb", 0.98),
        ("--env dmc/ball_in_cup-catch --protocol dmc-gb", 0.98),
        ("--env dmc/cartpole-swingup --protocol dmc-gb --quantile 0.9", 0.9),
        ("--env dmc/cartpole-swingup", 0.95),
    ],
)
def test_sgqn_masks_as_much_as_its_paper_does_on_each_task(words: str, quantile: float) -> None:
    given = parser("sgqn").parse_args(["--agent", "sgqn", "--device", "cpu", *words.split()])
    assert new_config(vars(given))["configs"]["SGQNConfig"]["quantile"] == quantile


def test_the_page_lists_every_protocol() -> None:
    rows = PAGE.read_text().splitlines()
    for name, protocol in PROTOCOLS.items():
        [row] = [row for row in rows if row.startswith(f"| `{name}` |")]
        assert f"| {protocol.size} | `{protocol.encoder}`, " in row
        assert f"| {protocol.batch_size} | {protocol.updates_per_step:g} |" in row


@pytest.mark.slow
def test_the_pages_commands_run_from_training_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    for split in ("train", "validation", "test"):
        (videos / split / "one").mkdir(parents=True)
        iio.imwrite(videos / split / "one" / "0.png", np.full((96, 96, 3), 99, np.uint8))
    grid, shown = commands()
    monkeypatch.chdir(tmp_path)
    words = cut(grid, TINY | {"--videos": [str(videos)]})
    assert benchmark.main([*words, *ADDED]) == 0
    assert report.main(shown) == 0
    found = summarize([read_run(run) for run in find_runs([tmp_path / "kept" / "dmc-gb"])])
    assert [group.agent for group in found.groups] == ["sgqn", "svea"]
    ours = [c for c in compare(found, WALKER) if c.row.protocol == "dmc-gb"]
    assert {c.row.distraction for c in ours} == {"color_hard"}
    # All that sets these runs apart from the published ones is what this test has cut.
    assert {text for c in ours for text in c.differences} == {
        "random steps 2, not 1000", "replay capacity 300, not 500000",
    }  # fmt: skip
    assert {c.budget for c in ours} == {"4"}
    assert "other protocol, renderer or budget" in (tmp_path / "kept/report/report.md").read_text()


# ------------------------------------------------------------------------- generators on a GPU

GENERATORS = ("pretrain_generator", *["finetune_generator"] * 3, "speed")
SMALL_NETWORK = [
    "--width", "48", "--depth", "1", "--text-features", "24", "--text-blocks", "0", "--pictures", "20",
    "--batch-size", "2", "--eval-prompts", "2", "--eval-steps", "2", "--steps", "1", "--threads", "1",
]  # fmt: skip
SMALL_ITERATION = [
    "--denoising-steps", "2", "--prompts", "2", "--batch-size", "2", "--steps", "1",
    "--eval-prompts", "2", "--eval-images", "2", "--eval-steps", "2", "--kl-images", "2", "--report-prompts", "2",
    "--prompt-count", "4", "--threads", "1",
]  # fmt: skip


def test_the_pages_generators_are_fine_tuned_with_three_methods_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line is taken, and those that belong together name the same run."""
    pretrain, *tune, measure = commands(1, GENERATORS)
    base = pretrain[pretrain.index("--run-dir") + 1]
    words = cut(pretrain, {"--device": ["cpu"]})
    config = pretrain_generator.new_config(vars(pretrain_generator.parser().parse_args(words)))
    assert (config["preset"], config["compile"], config["learning"]["bf16"]) == ("gpu-64", "auto", True)  # fmt: skip
    folder = tmp_path / base
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    for line, method in zip(tune, large_generators.SHOWN, strict=True):
        assert line[line.index("--base") + 1] == base
        given = finetune_generator.parser(method).parse_args(cut(line, {"--device": ["cpu"]}))
        run = finetuning_configs.new_config(method, vars(given))
        assert (run["method"], run["preset"], run["compile"]) == (method, "gpu-64", "auto")
        assert {"batch_size": 64, "learning_rate": 1e-5}.items() <= run["tuning"].items()
        images = run["tuning"]["prompts"], run["tuning"]["group"]
        assert images == ((32, 1) if method == "alignprop" else (48, 24))
        reward = make_reward(run["reward"])
        assert reward.differentiable or method != "alignprop"
    given = speed.parser().parse_args(measure)
    assert (given.parts, given.device) == (["generators"], "cuda")


def test_the_pages_generator_commands_run_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 64 pixels with a network of 12 heads, up to the estimate and beyond; --compile auto is eager on a CPU."""
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pretrain, grpo, *_ = commands(1, GENERATORS)
    assert (
        pretrain_generator.main(
            [*cut(pretrain, {"--device": ["cpu"]}), *SMALL_NETWORK, "--no-bf16"]
        )
        == 0
    )
    words = [*cut(grpo, {"--device": ["cpu"]}), *SMALL_ITERATION, "--group", "2"]
    assert finetune_generator.main([*words, "--gold", "brightness"]) == 0
    assert (tmp_path / "runs/generators/flow-grpo-shapes-seed0/report/report.md").is_file()
