"""CLIP, PickScore and the aesthetic score on tiny random models in local folders, where transformers is installed."""

import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from agents.core.errors import UserError
from agents.generative_models.rewards import make_reward
from agents.generative_models.transformers_rewards import STACK

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "a blue square", "a red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of a few thousand random weights, with a tokenizer of whole words and a stack of linear layers."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("clip")
    common = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    words = {
        "<pad>": 0,
        "<unk>": 1,
        "a": 2,
        "red": 3,
        "circle": 4,
        "blue": 5,
        "square": 6,
        "</s>": 7,
    }
    config = transformers.CLIPConfig(
        text_config={
            **common,
            "vocab_size": 8,
            "max_position_embeddings": 8,
            "eos_token_id": 7,
            "pad_token_id": 0,
        },
        vision_config={**common, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(path)
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 7)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(path)
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (path / "preprocessor_config.json").write_text(json.dumps(statistics))
    torch.manual_seed(1)
    stack = torch.nn.ModuleDict({"0": torch.nn.Linear(12, 6), "2": torch.nn.Linear(6, 1)})
    tensors = {f"layers.{name}": value.detach() for name, value in stack.named_parameters()}
    safetensors.torch.save_file(tensors, path / STACK)
    return path


def own_cosine(folder, prompt, image):
    """The package's own forward pass, on pixels that Pillow resized."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pixels = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    array = np.asarray(pixels.resize((16, 16), Image.Resampling.BICUBIC), np.float32) / 255
    normal = (array - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    with torch.no_grad():
        out = model(
            **tokenizer([prompt], return_tensors="pt"),
            pixel_values=torch.from_numpy(normal).float().permute(2, 0, 1)[None],
        )
    return (
        out.logits_per_image.item() / model.logit_scale.exp().item(),
        model.logit_scale.exp().item(),
        out.image_embeds,
    )


def test_clip_is_the_packages_own_cosine(folder):
    values = make_reward(f"clip({folder})")(IMAGES, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        cosine, _, _ = own_cosine(folder, prompt, IMAGES[index])
        assert values[index].item() == pytest.approx(cosine, abs=0.01)  # Pillow rounds to bytes
    assert values.std() > 0.02  # the tolerance tells images apart


def test_pickscore_is_the_cosine_times_the_scale(folder):
    _, scale, _ = own_cosine(folder, PROMPTS[0], IMAGES[0])
    clip = make_reward(f"clip({folder})")(IMAGES, PROMPTS)
    torch.testing.assert_close(make_reward(f"pickscore({folder})")(IMAGES, PROMPTS), scale * clip)


def test_aesthetic_score_is_the_stack_on_the_unit_vector(folder):
    tensors = safetensors.torch.load_file(folder / STACK)
    values = make_reward(f"aesthetic({folder})")(IMAGES, PROMPTS)
    for index in range(3):
        _, _, vector = own_cosine(folder, PROMPTS[0], IMAGES[index])
        hidden = vector @ tensors["layers.0.weight"].T + tensors["layers.0.bias"]
        expected = hidden @ tensors["layers.2.weight"].T + tensors["layers.2.bias"]
        assert values[index].item() == pytest.approx(expected.item(), abs=0.01)


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic"])
def test_gradients_reach_the_images(folder, name):
    reward = make_reward(f"{name}({folder})")
    assert reward.differentiable
    images = IMAGES.clone().requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0


def test_prompts_are_embedded_once(folder, monkeypatch):
    reward = make_reward(f"clip({folder})")
    first = reward(IMAGES, PROMPTS)
    monkeypatch.setattr("transformers.CLIPModel.get_text_features", None)
    assert torch.equal(reward(IMAGES, PROMPTS), first)


def test_missing_files_say_which(folder, tmp_path):
    with pytest.raises(UserError, match=r"config.json is missing\): download one"):
        make_reward(f"clip({tmp_path})")
    for file in folder.iterdir():
        if file.name != STACK:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"needs '.*aesthetic\.safetensors'"):
        make_reward(f"aesthetic({tmp_path})")
    safetensors.torch.save_file(
        {"layers.0.weight": torch.ones(1, 5)} | {"layers.0.bias": torch.ones(1)}, tmp_path / STACK
    )
    with pytest.raises(
        UserError, match="expected a stack from the model's 12 features to 1 number"
    ):
        make_reward(f"aesthetic({tmp_path})")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the reward 'clip'"):
        make_reward(f"clip({tmp_path})")


def refusal(folder, name="clip"):
    with pytest.raises(UserError) as caught:
        make_reward(f"{name}({folder})")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_weights_that_are_not_whole_are_never_filled_in_at_random(copy):
    """The package loads them with a warning, and the reward is noise."""
    weights = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    del tensors["visual_projection.weight"]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    assert "lack visual_projection.weight" in refusal(copy)
    weights.write_bytes(weights.read_bytes()[:2000])
    assert f"cannot load the reward 'clip' from '{copy}'" in refusal(copy)


def test_another_kind_of_model_is_refused(copy):
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"model_type": "bert"}))
    assert "a model of type 'bert', not a clip" in refusal(copy, "pickscore")
    (copy / "config.json").write_text("{")
    assert "config.json' is damaged" in refusal(copy)


def test_without_a_tokenizer_all_prompts_would_be_the_same(copy):
    (copy / "tokenizer.json").unlink()
    assert "(tokenizer.json is missing)" in refusal(copy)
    (copy / "vocab.json").write_text("{}")
    assert "(merges.txt is missing)" in refusal(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"image_mean": [0.5]}', '{"image_std": ["a", 1, 2]}'])
def test_damaged_statistics_of_pixels_are_named(copy, text):
    (copy / "preprocessor_config.json").write_text(text)
    assert "preprocessor_config.json' is damaged" in refusal(copy)


def test_pickles_are_not_read(copy):
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    assert "pickles are not read" in refusal(copy)


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs the package transformers: pip install transformers"):
        make_reward(f"clip({tmp_path})")
