"""experiments.finetune_generator with a diffusers pipeline as its base: from folder to report, LoRA and resume."""

import json

import pytest
import torch

from agents.core.checkpoints import CheckpointStore
from experiments.finetune_generator import main
from tests.agents.tiny_pipelines import write_pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline, and two files of prompts."""
    folder = tmp_path_factory.mktemp("place")
    write_pipeline("sd", folder / "sd")
    (folder / "train.txt").write_text("a red circle\na blue square\n")
    (folder / "held.txt").write_text("a red square\na blue circle\na cat\na dog\n")
    return folder


def words(place, run, *more):
    return [
        "--base", str(place / "sd"), "--run-dir", str(run), "--preset", "debug", "--seed", "1", "--threads", "1",
        "--device", "cpu", "--gold", "brightness", "--reward", "symmetry", "--prompt-file", str(place / "train.txt"),
        "--held-out", str(place / "held.txt"), "--lora-rank", "2", "--lora-alpha", "4", "--image-size", "16",
        *map(str, more),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["ddpo", pytest.param("fk-steering", marks=pytest.mark.slow)])
def test_from_pipeline_to_report(place, tmp_path, method):
    from diffusers import DiffusionPipeline

    run = tmp_path / "run"
    more = ("--learning-rate", "0.05", "--patience", "0") if method == "ddpo" else ()
    assert main(words(place, run, "--method", method, *more)) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    assert [row["name"] for row in report["rewards"]] == [
        "symmetry (optimized)", "brightness (not optimized)",
    ]  # fmt: skip
    if method != "ddpo":
        return
    assert report["history"][0]["values"]["kl"] == 0
    assert report["history"][-1]["values"]["kl"] > 0
    config = json.loads((run / "config.json").read_text())
    assert config["pipeline"]["precision"] == "fp32"
    assert config["pipeline"]["lora_rank"] == 2
    largest = max(f.stat().st_size for f in (run / "checkpoints").rglob("*.safetensors"))
    weights = place / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    assert largest < 0.3 * weights.stat().st_size
    pipe = DiffusionPipeline.from_pretrained(place / "sd")
    pipe.load_lora_weights(run / "lora")
    assert any(".lora_A." in name for name, _ in pipe.unet.named_parameters())


def test_a_resumed_run_is_the_one_that_was_not_stopped(place, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    common = ("--method", "ddpo", "--learning-rate", "0.05", "--patience", "0")
    assert main(words(place, whole, "--steps", 2, *common)) == 0
    assert main(words(place, half, "--steps", 1, *common)) == 0
    assert main(["--resume", str(half), "--steps", "2"]) == 0
    first, second = (CheckpointStore(run).load() for run in (whole, half))
    assert first["monitor"] == second["monitor"]
    for key, value in first["agent"]["networks"]["model"].items():
        assert torch.equal(value, second["agent"]["networks"]["model"][key])


def test_mistakes_are_named(place, tmp_path, capsys):
    def refusal(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return said

    base = words(place, tmp_path / "run")
    without = base[: base.index("--gold")] + base[base.index("--gold") + 2 :]
    assert "give --gold" in refusal(*without)
    without = base[: base.index("--prompt-file")] + base[base.index("--prompt-file") + 2 :]
    assert "give --prompt-file FILE" in refusal(*without)
    assert "image_size is 17" in refusal(*base, "--image-size", 17)
    (tmp_path / "base").mkdir()
    assert "--lora-rank is of diffusers pipelines" in refusal(*base, "--base", tmp_path / "base")
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "config.json").write_text(json.dumps({"pipeline": {}}))
    plain = [a for a in base if a not in ("--lora-rank", "--lora-alpha", "--image-size", "4", "16")]
    plain = [a for i, a in enumerate(plain) if not (a == "2" and plain[i - 1] != "--steps")]
    said = refusal(*plain, "--base", tmp_path / "run2")
    assert "go on with it by --resume" in said
