"""What is missing or wrong of a pipeline is said in one line."""

import json
import shutil
import subprocess
import sys

import pytest
import safetensors.torch

from agents.core.errors import UserError
from agents.generative_models.pipeline_generator import PipelineSettings, load_pipeline
from agents.generative_models.pipeline_loading import is_pipeline
from tests.agents.tiny_pipelines import write_pipeline


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_pipeline("sd", tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "sd")
    return tmp_path / "sd"


def refusal(source, **settings):
    with pytest.raises(UserError) as caught:
        load_pipeline(str(source), PipelineSettings(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_are_named_with_their_places(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.bin"
    )
    (folder / "text_encoder" / "model.safetensors").unlink()
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "scheduler")
    said = refusal(folder)
    for name in (
        "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json", "scheduler/scheduler_config.json",
    ):  # fmt: skip
        assert name in said
    assert str(folder) in said
    assert "huggingface-cli download" in said
    assert "vae" not in said


def test_shards_are_looked_for_by_their_index(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    (folder / "unet" / "part-1.safetensors").write_bytes(b"")
    assert "lacks unet/part-2.safetensors;" in refusal(folder)


def test_damage_and_other_kinds_are_named(folder, tmp_path):
    assert "has no model_index.json" in refusal(tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"cannot load the pipeline '{folder}'" in refusal(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "LattePipeline"}))
    said = refusal(folder)
    assert "is a LattePipeline" in said
    assert "FluxPipeline" in said
    (folder / "model_index.json").write_text("{")
    assert "damaged" in refusal(folder)


@pytest.mark.parametrize(
    ("component", "file", "tensor"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "conv_norm_out.weight"),
        ("vae", "diffusion_pytorch_model.safetensors", "decoder.conv_norm_out.weight"),
        ("text_encoder", "model.safetensors", "encoder.layers.0.layer_norm1.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named_with_its_component(folder, component, file, tensor):
    """diffusers leaves it without numbers, transformers draws them at random, and both go on."""
    weights = folder / component / file
    tensors = safetensors.torch.load_file(weights)
    del tensors[tensor]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    assert f"the weights of {component} in '{folder}' lack {tensor};" in refusal(folder)


def test_words_without_merges_are_no_tokenizer(folder):
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    assert "lacks tokenizer/merges.txt;" in refusal(folder)


def test_settings_that_do_not_fit_are_named(whole):
    assert "image_size is 18; this pipeline takes multiples of 4" in refusal(whole, image_size=18)
    said = refusal(whole, lora_targets=("no_such_layer",))
    assert "no layer of the network ends in one of no_such_layer" in said
    for name in ("lora_rank", "lora_alpha", "text_length", "decode_batch"):
        with pytest.raises(UserError, match=f"{name} is 0"):
            PipelineSettings(**{name: 0})
    with pytest.raises(UserError, match="unknown precision 'bf15'; did you mean"):
        PipelineSettings(precision="bf15")


@pytest.mark.parametrize("package", ["diffusers", "transformers", "peft"])
def test_missing_packages_are_named(whole, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(whole)
    assert f"needs the package {package}" in said
    assert "pip install 'sightline[pipelines]'" in said


def test_a_name_on_the_hub_is_one_where_there_is_no_folder(whole, tmp_path, monkeypatch):
    assert is_pipeline(str(whole))
    assert not is_pipeline(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert is_pipeline("stabilityai/stable-diffusion-3.5-medium")
    assert not is_pipeline("runs/generators/flow")
    (tmp_path / "runs" / "flow").mkdir(parents=True)
    assert not is_pipeline("runs/flow")
    assert not is_pipeline("runs/flaw")


def test_offline_a_name_that_was_not_downloaded_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    said = refusal("nobody/nothing")
    assert said.startswith("cannot load the pipeline 'nobody/nothing' (there is no such folder")


def test_nothing_heavy_is_imported_until_a_pipeline_is_opened():
    code = (
        "import sys, agents.generative_models.generator, agents.generative_models.tuners\n"
        "print([n for n in ('diffusers', 'transformers', 'peft', 'accelerate') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
