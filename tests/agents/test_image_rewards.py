"""Rewards of images: each against a plain reference, the registry, a person's own functions, and bad ones."""

import io
import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from agents.core.errors import UserError
from agents.generative_models import classifier
from agents.generative_models import rewards as module
from agents.generative_models.classifier import (
    PAIRS,
    ThingCounter,
    load_counter,
    log_likelihood,
    numbers,
    save_counter,
    train_counter,
)
from agents.generative_models.drawings import DrawingSettings, make_drawings
from agents.generative_models.rewards import REWARDS, make_reward, parse_reward
from agents.generative_models.scenes import COLORS, parse_prompt

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NO_PROMPTS = [""] * 5


def drawings(kinds=("single",), pictures=40):
    data = make_drawings(DrawingSettings(pictures=pictures, kinds=kinds))
    return torch.from_numpy(data.images).float() / 255, [data.prompts[i] for i in data.prompt]


# ------------------------------------------------------------------------- against plain references


def plain_brightness(image):
    total = 0.0
    for row in image.permute(1, 2, 0).tolist():
        for red, green, blue in row:
            total += 0.299 * red + 0.587 * green + 0.114 * blue
    return total / image[0].numel()


def plain_symmetry(image):
    width = image.shape[2]
    differences = [
        abs(float(image[c, y, x]) - float(image[c, y, width - 1 - x]))
        for c in range(3)
        for y in range(image.shape[1])
        for x in range(width)
    ]
    return 1 - sum(differences) / len(differences)


def plain_blue(image):
    distances = [
        math.dist(pixel, COLORS["blue"]) / math.sqrt(3)
        for row in image.permute(1, 2, 0).tolist()
        for pixel in row
    ]
    return 1 - sum(distances) / len(distances)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("brightness", plain_brightness), ("symmetry", plain_symmetry), ("color(blue)", plain_blue)],
)
def test_pixel_rewards_are_what_a_loop_says(name, plain):
    values = make_reward(name)(IMAGES, NO_PROMPTS)
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values, torch.tensor([plain(image) for image in IMAGES]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("side", [16, 128])  # without and with threads
def test_kilobytes_are_those_of_the_file(side, tmp_path):
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    images[1] = 0.5
    expected = []
    for index, image in enumerate(images):
        file = tmp_path / f"{index}.jpg"
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, quality=95)
        expected.append(file.stat().st_size / 1000)
    values = make_reward("incompressibility")(images, [""] * 3)
    torch.testing.assert_close(values, torch.tensor(expected))
    assert torch.equal(make_reward("compressibility")(images, [""] * 3), -values)
    assert values[1] < values[0]


def test_threads_keep_the_order(monkeypatch):
    images = torch.stack([torch.rand(3, 32, 32) * k / 8 for k in range(8)])
    alone = module.kilobytes(images)
    monkeypatch.setattr(module, "THREADED_PIXELS", 1)
    assert torch.equal(module.kilobytes(images), alone)


def test_extremes():
    white = torch.ones(1, 3, 8, 8)
    assert make_reward("brightness")(white, [""]).item() == pytest.approx(1)
    assert make_reward("symmetry")(white, [""]).item() == 1
    half = torch.zeros(1, 3, 8, 8)
    half[..., :4] = 1
    assert make_reward("symmetry")(half, [""]).item() == 0
    red = torch.tensor(COLORS["red"])[:, None, None].expand(1, 3, 8, 8)
    assert make_reward("color(red)")(red, [""]).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["brightness", "symmetry", "color(green)"])
def test_gradients_are_those_of_finite_differences(name):
    reward = make_reward(name)
    assert reward.differentiable
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    image.requires_grad_()
    function = reward.function
    (gradient,) = torch.autograd.grad(function(image, [""]).sum(), image)
    for place in ((0, 0, 0, 0), (0, 2, 3, 1)):
        step = torch.zeros_like(image)
        step[place] = 1e-6
        with torch.no_grad():
            slope = (function(image + step, [""]) - function(image - step, [""])) / 2e-6
        assert gradient[place].item() == pytest.approx(slope.item(), abs=1e-6)


def test_a_color_that_is_met_has_a_finite_gradient():
    image = torch.tensor(COLORS["white"])[:, None, None].expand(1, 3, 4, 4).clone().requires_grad_()
    make_reward("color(white)")(image, [""]).sum().backward()
    assert torch.isfinite(image.grad).all()


@pytest.mark.parametrize("name", ["compressibility", "shapes", "glyphs_strict", "drawings"])
def test_rewards_without_a_gradient_say_so(name):
    assert not make_reward(name).differentiable


# ------------------------------------------------------------------------------------- of prompts


def test_drawing_rewards():
    images, prompts = drawings(("single", "relation"))
    assert make_reward("shapes")(images, prompts).tolist() == [1.0] * 40
    assert make_reward("shapes_strict")(images, prompts).tolist() == [1.0] * 40
    shuffled = prompts[7:] + prompts[:7]
    graded = make_reward("shapes")(images, shuffled)
    strict = make_reward("shapes_strict")(images, shuffled)
    assert strict.mean() < 0.1 < graded.mean() < 0.7
    assert torch.equal(graded == 1, strict == 1)
    assert torch.equal(make_reward("drawings")(images, shuffled), graded)


def test_glyph_rewards():
    images, prompts = drawings(("text",))
    assert make_reward("glyphs_strict")(images, prompts).mean() == 1
    assert make_reward("glyphs")(images, prompts[1:] + prompts[:1]).mean() < 0.2


def test_prompts_of_another_kind_name_the_reward_that_fits():
    with pytest.raises(UserError, match="use the reward glyphs"):
        make_reward("shapes")(IMAGES[:1], ['the text "A"'])
    with pytest.raises(UserError, match="use the reward shapes"):
        make_reward("glyphs")(IMAGES[:1], ["a red circle"])
    assert make_reward("drawings")(IMAGES[:2], ['the text "A"', "a red circle"]).shape == (2,)


# --------------------------------------------------------------------------------------- registry


def test_weighted_sums():
    parts = [
        make_reward(name)(IMAGES, NO_PROMPTS) for name in ("brightness", "symmetry", "color(red)")
    ]
    text = "brightness:0.5 + symmetry:-2+color(red):1e+1"
    total = make_reward(text)
    torch.testing.assert_close(
        total(IMAGES, NO_PROMPTS), 0.5 * parts[0] - 2 * parts[1] + 10 * parts[2]
    )
    assert total.differentiable
    assert not make_reward("brightness+compressibility").differentiable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("brightnes", "unknown reward 'brightnes'; did you mean brightness"),
        ("shapes+nonsense", "unknown reward 'nonsense'"),
        ("color(rad)", "unknown color 'rad'; did you mean red"),
        (
            "brightness:much",
            "the weight of 'brightness:much' is no number",
        ),
        ("brightness(3)", "takes nothing in brackets"),
        ("", "is no reward; write NAME"),
        ("shapes+", "is no reward; write NAME"),
        ("classifier(/nowhere)", "holds no classifier"),
        ("clip", "needs the folder of a model|needs the package"),
        ("no_such_module:score", "there is no module 'no_such_module'"),
        ("math:sqroot", "unknown function of math 'sqroot'; did you mean"),
        ("math:pi", "unknown function of math 'pi'"),
    ],
)
def test_mistakes_are_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        make_reward(text)
    assert "\n" not in str(error.value)


def test_every_name_has_a_summary():
    for name, spec in REWARDS.items():
        assert spec.summary, name


@pytest.fixture
def own(monkeypatch):
    """A module of a person's own rewards."""
    mine = types.ModuleType("my_rewards")
    monkeypatch.setitem(sys.modules, "my_rewards", mine)
    return mine


def test_own_functions(own):
    own.red = lambda images, prompts: images[:, 0].mean((1, 2))
    reward = make_reward("my_rewards:red:0.5+brightness")
    expected = 0.5 * IMAGES[:, 0].mean((1, 2)) + make_reward("brightness")(IMAGES, NO_PROMPTS)
    torch.testing.assert_close(reward(IMAGES, NO_PROMPTS), expected)
    assert not make_reward("my_rewards:red").differentiable
    own.red.differentiable = True
    assert make_reward("my_rewards:red").differentiable
    for values in (np.arange(5), [0.0, 1.0, 2.0, 3.0, 4.0], tuple(torch.arange(5))):
        own.lists = lambda images, prompts, values=values: values
        assert make_reward("my_rewards:lists")(IMAGES, NO_PROMPTS).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda images, prompts: images.mean(),
            r"returned a Tensor of shape \(\) for 5 images; return one number for each, \(5,\)",
        ),
        (lambda images, prompts: images.mean((2, 3)), r"returned a Tensor of shape \(5, 3\)"),
        (lambda images, prompts: ["good"] * len(prompts), "returned a list for 5 images"),
        (lambda images, prompts: "good", "returned a str for 5 images"),
        (lambda images, prompts: [[1.0], [1.0, 2.0]], "returned a list for 5 images"),
        (lambda images, prompts: [1.0], r"returned a list of shape \(1,\)"),
        (lambda images, prompts: torch.ones(5) * 1j, "one number for each"),
        (lambda images, prompts: None, "returned nothing"),
        (
            lambda images, prompts: 0 / images[:, 0, 0, 0] / 0,
            "is nan for the prompt .*; mend the reward",
        ),
        (lambda images, prompts: torch.tensor([0, 0, math.inf, 0, 0]), "is inf for the prompt "),
    ],
)
def test_bad_own_functions_are_named(own, function, message):
    own.bad = function
    with pytest.raises(UserError, match=message) as error:
        make_reward("my_rewards:bad")(IMAGES, NO_PROMPTS)
    assert "my_rewards:bad" in str(error.value)


def test_terms_are_the_same_reward_whatever_their_weights():
    (first, red), (one, blue) = (
        parse_reward(t) for t in ("symmetry+color(red):2", "symmetry:3+color(blue)")
    )
    assert first.is_same(one)
    assert (first.weight, one.weight) == (1.0, 3.0)
    assert not red.is_same(blue)
    assert red.is_same(parse_reward("color")[0])
    assert not red.is_same(first)


def test_as_many_prompts_as_images():
    with pytest.raises(UserError, match="5 images and 1 prompts"):
        make_reward("brightness")(IMAGES, [""])


# -------------------------------------------------------------------------------------- classifier


def test_numbers_of_a_scene():
    scene = parse_prompt("a red circle and two blue squares")
    assert {pair: n for pair, n in zip(PAIRS, numbers(scene), strict=True) if n} == {
        ("red", "circle"): 1,
        ("blue", "square"): 2,
    }
    with pytest.raises(UserError, match="use the reward glyphs"):
        numbers(parse_prompt('the text "A"'))


def test_likelihood_is_the_mean_log_probability_of_the_numbers():
    torch.manual_seed(0)
    counter = ThingCounter(8).eval()
    values = log_likelihood(counter, IMAGES[:2], ["a red circle", "two blue squares"])
    for index, prompt in enumerate(["a red circle", "two blue squares"]):
        probability = counter(IMAGES[[index]])[0].softmax(-1)
        asked = numbers(parse_prompt(prompt))
        expected = np.mean([math.log(probability[pair, n]) for pair, n in enumerate(asked)])
        assert values[index].item() == pytest.approx(expected, abs=1e-5)


def test_counters_come_back_bit_for_bit(tmp_path):
    counter = ThingCounter(8).eval()
    save_counter(tmp_path, counter)
    loaded = load_counter(tmp_path)
    assert torch.equal(loaded(IMAGES), counter(IMAGES))
    reward = make_reward(f"classifier({tmp_path})")
    assert reward.differentiable
    image = IMAGES[:1].clone().requires_grad_()
    reward(image, ["a red circle"]).sum().backward()
    assert image.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in loaded.parameters())


@pytest.mark.slow
def test_a_counter_learns_to_tell_prompts_apart(tmp_path):
    """It prefers a picture's own prompt to another; with pictures and prompts shuffled it does not."""
    settings = DrawingSettings(pictures=3000)
    images, prompts = drawings(("single", "mixture", "relation"), pictures=200)
    counter = train_counter(settings, steps=300, batch_size=64, seed=0, folder=tmp_path)
    assert _preference(counter, images, prompts) > 0.75
    assert abs(_preference(counter, images.flip(0), prompts) - 0.5) < 0.15


def _preference(counter, images, prompts):
    with torch.no_grad():
        own = log_likelihood(counter, images, prompts)
        other = log_likelihood(counter, images, prompts[1:] + prompts[:1])
    return ((own > other).float() + 0.5 * (own == other)).mean().item()


def test_jpeg_matches_pillow_in_memory():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(buffer, "JPEG", quality=95)
    value = make_reward("incompressibility")(torch.zeros(1, 3, 16, 16), [""])
    assert value.item() == pytest.approx(len(buffer.getvalue()) / 1000)


def test_without_a_folder_a_counter_is_trained_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(classifier, "STEPS", 2)
    monkeypatch.setattr(classifier, "PICTURES", 50)
    images, prompts = drawings(pictures=3)
    with torch.no_grad():  # as evaluations ask
        first = make_reward("classifier")(images, prompts)
    assert "training the classifier" in capsys.readouterr().out
    assert torch.equal(make_reward("classifier")(images, prompts), first)
    assert not capsys.readouterr().out
    assert make_reward("classifier")(images[:, :, ::2, ::2], prompts).shape == (3,)  # another size
