"""The command that pretrains image generators: end to end, resumed exactly, and one line for every mistake."""

import csv
import json

import pytest
import torch
from PIL import Image

from agents.core.checkpoints import CheckpointStore
from agents.core.settings import from_dict
from agents.generative_models import forward_passes
from agents.generative_models.generator import GeneratorConfig, ImageGenerator, load_generator
from agents.generative_models.text import Vocabulary
from experiments.pretrain_generator import PRESETS, main, new_config, parser


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def command(run, *flags, steps=12):
    return main(
        ["--preset", "debug", "--seed", "3", "--run-dir", str(run), "--steps", str(steps), "--threads", "1",
         "--log-every", "4", "--eval-every", "6", "--checkpoint-every", "6", "--depth", "0", *flags]
    )  # fmt: skip


def metrics(run):
    with (run / "metrics.csv").open() as file:
        return {
            (row["agent_steps"], row["tag"]): row["value"]
            for row in csv.DictReader(file)
            if not row["tag"].startswith("time/")
        }


def test_a_run_tells_everything_and_goes_on_exactly(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(whole) == 0
    out = capsys.readouterr().out
    assert "drawings" in out and "estimate:" in out  # noqa: PT018
    assert f"next: python -m experiments.finetune_generator --base {whole}" in out
    assert command(parts, steps=8) == 0
    assert main(["--resume", str(parts), "--steps", "12"]) == 0
    assert metrics(whole) == metrics(parts)  # the first part ends where a line is written anyway
    one, other = load_generator(whole), load_generator(parts)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    states = [CheckpointStore(run).load()["agent"]["generator"] for run in (whole, parts)]
    assert torch.equal(*states)

    tags = {tag for _, tag in metrics(whole)}
    assert {
        "eval/seen_strict",
        "eval/held_out_strict",
        "eval/held_out_graded",
        "loss/denoising",
    } <= tags
    assert Image.open(whole / "samples.png").size[0] > 200
    config = json.loads((whole / "config.json").read_text())
    assert (config["seed"], config["threads"], config["generator"]["size"]) == (3, 1, 16)
    assert {"system.json", "command.txt", "tensorboard"} <= {file.name for file in whole.iterdir()}

    capsys.readouterr()
    assert main(["--resume", str(parts)]) == 0
    assert "nothing to do: it has 12 of 12 gradient steps" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_taken_and_give_way_to_flags(preset):
    def config(*flags):
        return new_config(
            vars(parser().parse_args(["--preset", preset, "--device", "cpu", *flags]))
        )

    own = config()
    parts = [own["generator"], own["drawings"], own["learning"], own["loop"]]
    for name, value in PRESETS[preset].items():
        said = next(p[name] for p in parts if name in p)
        assert said == (list(value) if isinstance(value, tuple) else value), name
    ImageGenerator(from_dict(GeneratorConfig, own["generator"]), Vocabulary.of(["a red circle"]))
    assert config("--bf16")["learning"]["bf16"]
    assert not config("--no-bf16")["learning"]["bf16"]


def test_a_compiled_run_goes_on_exactly_and_resuming_may_change_it(tmp_path, monkeypatch):
    """With operations as they are: generated code is looked at in tests/agents."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    monkeypatch.setattr(forward_passes, "BACKEND", backend)
    torch._dynamo.reset()
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    assert command(whole, "--compile", "on", "--eval-every", "0", steps=6) == 0
    assert command(parts, "--compile", "on", "--eval-every", "0", steps=4) == 0
    assert main(["--resume", str(parts), "--steps", "6"]) == 0
    assert seen
    for name, value in load_generator(whole).state_dict().items():
        assert torch.equal(value, load_generator(parts).state_dict()[name]), name

    torch._dynamo.reset()
    seen.clear()
    assert command(plain, "--compile", "auto", "--eval-every", "0", steps=4) == 0
    assert main(["--resume", str(plain), "--steps", "6", "--compile", "off"]) == 0
    assert not seen, "auto compiles on CUDA devices alone"
    assert json.loads((plain / "config.json").read_text())["compile"] == "off"
    for name, value in load_generator(whole).state_dict().items():
        torch.testing.assert_close(value, load_generator(plain).state_dict()[name])
    assert main(["--resume", str(plain), "--steps", "8", "--compile", "on"]) == 0
    assert seen


def test_a_compiler_that_is_missing_stops_a_run_in_one_line(tmp_path, capsys, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nand a long story")

    monkeypatch.setattr(forward_passes, "BACKEND", backend)
    torch._dynamo.reset()
    assert command(tmp_path / "run", "--compile", "on") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ImageUNet cannot be compiled here (RuntimeError: No working C++")
    assert "--compile off" in told


def test_other_networks_paths_and_drawings(tmp_path):
    flags = ("--network", "dit", "--path", "cosine", "--kinds", "text", "single")
    assert command(tmp_path / "run", *flags, steps=6) == 0
    generator = load_generator(tmp_path / "run")
    assert generator.kind == "v"
    assert generator.encode(['the text "B"', "a red circle"]).shape[0] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "debgu"], "unknown preset 'debgu'; did you mean debug"),
        (["--size", "30"], "divisible by"),
        (["--kinds", "singles"], "unknown kind of drawing 'singles'; did you mean single"),
        (["--netwrok", "dit"], "unknown flag '--netwrok'; did you mean --network"),
        (["--path", "flows"], "invalid choice"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--steps", "0"], "steps is 0; give a positive number"),
        (["--threads", "0"], "--threads is 0"),
        (["--device", "tpu"], "device 'tpu' is not available here"),
        (["--seed", "-1"], "seed is -1"),
        (["--resume", "nowhere"], "'nowhere' is no run folder"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--preset", "debug", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_run_cannot_become_another_one(tmp_path, capsys):
    run = tmp_path / "run"
    assert command(run, steps=6) == 0
    capsys.readouterr()
    assert main(["--resume", str(run), "--width", "64"]) == 2
    assert "--width cannot change with --resume" in capsys.readouterr().err
    assert command(run) == 2
    assert "exists; choose another --run-dir" in capsys.readouterr().err
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "command": "experiments.other"}))
    assert main(["--resume", str(run)]) == 2
    assert "is no run of experiments.pretrain_generator" in capsys.readouterr().err


def test_help_names_every_group(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for group in ("drawings:", "generator:", "learning:", "loop:"):
        assert group in text
