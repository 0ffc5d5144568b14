"""The image generator: prompts reach the picture, guidance is one pass, batches do not matter, files are exact."""

import json

import pytest
import torch

from agents.core.errors import UserError
from agents.core.step_rules import Euler, FlowSDE, Posterior
from agents.generative_models.generator import (
    GeneratorConfig,
    ImageGenerator,
    load_generator,
    save_generator,
)
from agents.generative_models.networks import grid_positions
from agents.generative_models.text import Vocabulary, split_prompt

WORDS = Vocabulary.of(["a red circle", "a blue square", 'the text "B7"'])
PROMPTS = ["a red circle", "a blue square", "a blue circle", ""]
UNET = {"width": 32, "depth": 1, "heads": 2, "patch": 2, "levels": 3, "text_features": 16}
DIT = {"network": "dit", "width": 32, "depth": 2, "heads": 2, "patch": 4, "text_features": 16}
NETWORKS = pytest.mark.parametrize("network", [UNET, DIT], ids=["unet", "dit"])


def make(seed=0, size=16, **settings):
    """A generator whose output layers, which start at 0, have weights as well."""
    torch.manual_seed(seed)
    generator = ImageGenerator(GeneratorConfig(size=size, **settings), WORDS)
    with torch.no_grad():
        for parameter in generator.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return generator


def noise(count, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@NETWORKS
@pytest.mark.parametrize("path", ["flow", "cosine", "linear", "ddpm"])
def test_generates_images_on_every_path(network, path):
    generator = make(path=path, **network)
    images = generator.generate(PROMPTS, seed=1, steps=3, rule=Posterior(0.5), scale=2.0)
    assert images.shape == (4, 3, 16, 16)
    assert 0 <= images.min() < images.max() <= 1
    again = generator.generate(PROMPTS, seed=1, steps=3, rule=Posterior(0.5), scale=2.0)
    assert torch.equal(images, again)


@NETWORKS
def test_prompts_change_the_prediction(network):
    generator = make(**network)
    x, t = noise(1).expand(4, -1, -1, -1), torch.full((4,), 0.5)
    with torch.no_grad():
        out = generator.denoiser(x, t, generator.encode(PROMPTS))
    for one in range(4):
        for other in range(one):
            assert (out[one] - out[other]).abs().max() > 1e-4


@NETWORKS
def test_both_ways_of_the_text_matter(network):
    """Neither the mean of the text (modulation) nor its tokens (attention) is dead: each alone changes the output."""
    generator = make(**network)
    x, t = noise(1), torch.full((1,), 0.5)
    condition = generator.encode(PROMPTS[:1]).detach()
    with torch.no_grad():
        out = generator.denoiser(x, t, condition)
        swapped = generator.denoiser(x, t, 2 * condition.mean(1, keepdim=True) - condition)
    assert (out - swapped).abs().max() > 1e-5  # the same mean, other tokens
    shifted = condition + 1.0
    silenced = [m for m in generator.denoiser.modules() if hasattr(m, "queries_keys_values")]
    with torch.no_grad():
        for block in silenced:
            block.project.weight.zero_()
        moved = generator.denoiser(x, t, shifted) - generator.denoiser(x, t, condition)
    assert moved.abs().max() > 1e-5  # without attention only the mean is left


@NETWORKS
def test_word_order_matters(network):
    words = Vocabulary.of(["a red circle above blue square"])
    torch.manual_seed(0)
    generator = ImageGenerator(GeneratorConfig(size=16, **network), words)
    one, other = generator.encode(["red circle above blue square", "blue circle above red square"])
    assert (one.mean(0) - other.mean(0)).abs().max() > 1e-3


@NETWORKS
def test_guidance_in_one_pass_equals_two(network):
    generator = make(**network)
    x, t = noise(3), torch.tensor([0.9, 0.5, 0.1])
    condition = generator.encode(PROMPTS[:3])
    calls = []
    generator.denoiser.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    with torch.no_grad():
        guided = generator.guided(3.0)(x, t, condition)
        assert calls == [6]
        on = generator.denoiser(x, t, condition)
        off = generator.denoiser(x, t, generator.unconditional(3))
    torch.testing.assert_close(guided, off + 3 * (on - off), atol=1e-5, rtol=1e-4)
    assert generator.guided(1.0) is generator.denoiser


@NETWORKS
def test_batch_of_one_equals_batch_of_many(network):
    generator = make(**network)
    settings = {"seed": 5, "steps": 4, "rule": FlowSDE(0.7), "scale": 3.0}
    many = generator.generate(PROMPTS, batch=64, **settings)
    singly = generator.generate(PROMPTS, batch=1, **settings)
    torch.testing.assert_close(many, singly, atol=2e-5, rtol=1e-4)
    others = generator.generate([PROMPTS[1], *PROMPTS[1:]], batch=64, **settings)
    torch.testing.assert_close(many[1:], others[1:], atol=2e-5, rtol=1e-4)


def test_seeds_and_places_draw_different_noise():
    generator = make(**UNET)
    settings = {"steps": 2, "rule": Euler(), "scale": 1.0}
    one = generator.generate(["a red circle"] * 2, seed=5, **settings)
    assert (one[0] - one[1]).abs().max() > 0.1
    assert (one - generator.generate(["a red circle"] * 2, seed=6, **settings)).abs().max() > 0.1


def test_repeated_prompts_are_encoded_once():
    generator = make(**UNET)
    sizes = []
    generator.text.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
    condition = generator.encode(["a red circle", "", "a red circle"])
    assert sizes == [1, 1]
    assert torch.equal(condition[0], condition[2])
    # To the last bit: whoever goes on with a run encodes them beside others.
    assert torch.equal(condition[1:2], generator.unconditional(1))


def test_decoding_inverts_encoding_and_has_a_gradient():
    generator = make(**UNET)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    decoded = generator.decode(generator.from_images(pixels))
    torch.testing.assert_close(decoded, pixels / 255)
    x = generator.from_images(pixels / 255 * 0.8 + 0.1).requires_grad_()
    generator.decode(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.5))


def test_loss_is_the_mean_squared_error_of_the_target():
    """On the flow the target is noise - x0; computed here by hand."""
    generator = make(**UNET)
    x0, eps, t = noise(2), noise(2).flip(0), torch.tensor([0.3, 0.8])
    condition = generator.encode(PROMPTS[:2])
    mixed = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
    out = generator.denoiser(mixed, t, condition)
    expected = torch.stack([((out[i] - (eps[i] - x0[i])) ** 2).mean() for i in range(2)])
    torch.testing.assert_close(generator.errors(x0, condition, t, eps), expected)


def test_loss_drops_conditions_at_the_given_rate():
    seen = {}
    for rate in (0.0, 0.25):
        generator = make(condition_dropout=rate, **UNET)
        null = generator.unconditional(1)
        generator.denoiser.register_forward_hook(
            lambda module, inputs, out, rate=rate, null=null: seen.update(
                {rate: (inputs[2] == null).all(2).all(1).float().mean().item()}
            )
        )
        with torch.no_grad():
            generator.loss(
                noise(1).expand(800, -1, -1, -1),
                generator.encode(["a red circle"] * 800),
                torch.Generator().manual_seed(0),
            )
    assert seen[0.0] == 0
    assert 0.2 < seen[0.25] < 0.3


def test_loss_draws_times_nearer_the_noise_where_they_are_shifted():
    seen = {}
    for shift in (1.0, 9.0):
        generator = make(times_shift=shift, **UNET)
        generator.denoiser.register_forward_hook(
            lambda module, inputs, out, shift=shift: seen.update({shift: inputs[1].median().item()})
        )
        with torch.no_grad():
            generator.loss(
                noise(1).expand(800, -1, -1, -1),
                generator.encode(["a red circle"] * 800),
                torch.Generator().manual_seed(0),
            )
    assert 0.45 < seen[1.0] < 0.55
    assert 0.88 < seen[9.0] < 0.92  # 9 * .5 / (1 + 8 * .5)


def test_loss_repeats_with_the_generator():
    generator = make(**UNET)
    condition = generator.encode(PROMPTS[:2])
    draws = [
        generator.loss(noise(2), condition, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("prediction", ["velocity", "v", "noise", "x0"])
@pytest.mark.parametrize("path", ["flow", "cosine"])
def test_the_guess_beside_a_network_is_the_regression_of_its_target(path, prediction):
    """Of a new network, whose own output is 0: a fit of a line to a hundred thousand draws."""
    about = {"size": 16, "path": path, "prediction": prediction, **UNET}
    generator = ImageGenerator(GeneratorConfig(data_mean=-0.7, data_spread=0.4, **about), WORDS)
    draws = torch.Generator().manual_seed(0)
    x0 = -0.7 + 0.4 * torch.randn(64, *generator.shape, generator=draws)
    noise = torch.randn(x0.shape, generator=draws)
    condition = generator.encode([PROMPTS[0]] * len(x0))
    for t in (0.15, 0.6):
        times = torch.full((len(x0),), t)
        x = generator.path.mix(x0, noise, times)
        target = generator.path.target(generator.kind, x0, noise, times)
        columns = torch.stack([x.flatten(), torch.ones(x.numel())], 1)
        line = torch.linalg.lstsq(columns, target.flatten()[:, None]).solution
        with torch.no_grad():
            said = generator.denoiser(x, times, condition)
        torch.testing.assert_close(said.flatten(), (columns @ line)[:, 0], atol=0.03, rtol=0)
    plain = ImageGenerator(GeneratorConfig(**about), WORDS)
    with torch.no_grad():
        assert not plain.denoiser(x, times, condition).any()


@pytest.mark.parametrize("extra", [{}, {"data_mean": -0.8, "data_spread": 0.4}])
@NETWORKS
def test_saved_generators_come_back_bit_for_bit(network, extra, tmp_path):
    generator = make(path="cosine", **network, **extra)
    save_generator(tmp_path, generator)
    loaded = load_generator(tmp_path)
    assert loaded.config == generator.config
    assert loaded.vocabulary.words == generator.vocabulary.words
    for (name, one), other in zip(
        generator.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    settings = {"seed": 0, "steps": 2, "rule": Euler(), "scale": 2.0}
    assert torch.equal(
        generator.generate(PROMPTS, **settings), loaded.generate(PROMPTS, **settings)
    )


def test_missing_and_damaged_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no image generator"):
        load_generator(tmp_path)
    save_generator(tmp_path, make(**UNET))
    file = tmp_path / "generator.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    with pytest.raises(UserError, match="damaged"):
        load_generator(tmp_path)
    file.write_bytes(data)
    head = json.loads((tmp_path / "generator.json").read_text())
    head["tree"]["config"]["width"] = 64
    (tmp_path / "generator.json").write_text(json.dumps(head))
    with pytest.raises(UserError, match="do not fit its config"):
        load_generator(tmp_path)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"size": 20}, "divisible by 8"),
        ({"network": "dit", "patch": 5}, "divisible by 5"),
        ({"width": 36}, "multiple of 8"),
        ({"condition_dropout": 1.0}, "share in"),
        ({"heads": 0}, "positive number"),
        ({"data_spread": -1.0}, "0 or more"),
        ({"depth": -1}, "0 or more"),
        ({"times_shift": 0.0}, "positive number"),
    ],
)
def test_bad_settings_say_what_to_give(settings, text):
    with pytest.raises(UserError, match=text):
        GeneratorConfig(**{"levels": 3, **settings})


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(UserError, match="multiple of 20"):
        make(**{**DIT, "heads": 5, "text_features": 20})
    with pytest.raises(UserError, match="multiple of 5"):
        make(**{**DIT, "heads": 5})


def test_networks_refuse_images_that_do_not_divide():
    generator = make(**UNET)
    with pytest.raises(UserError, match="divisible by 8"):
        generator.denoiser(noise(1, 12), torch.ones(1), generator.unconditional(1))


@NETWORKS
def test_other_sizes(network):
    images = make(size=24, **network).generate(
        ["a red circle"], seed=0, steps=2, rule=Euler(), scale=1.0
    )
    assert images.shape == (1, 3, 24, 24)


def test_grid_positions_tell_rows_from_columns():
    positions = grid_positions(2, 3, 8, torch.device("cpu"))
    assert positions.shape == (6, 8)
    assert len({tuple(row) for row in positions.tolist()}) == 6
    assert torch.equal(positions[0, :4], positions[1, :4])  # the same row
    assert torch.equal(positions[0, 4:], positions[3, 4:])  # the same column


# ------------------------------------------------------------------------------------------ text


def test_prompts_are_split_into_words_and_quoted_characters():
    assert split_prompt('The text "aB 7", red') == [
        "the",
        "text",
        '"a"',
        '"B"',
        '" "',
        '"7"',
        "red",
    ]
    assert split_prompt("") == []
    assert split_prompt("2 cats!") == ["2", "cats", "!"]


def test_tokens_are_padded_places_in_the_vocabulary():
    words = Vocabulary(["red", "circle"], 3)
    assert words.tokens(["Red circle", "", "circle red circle"]).tolist() == [
        [1, 2, 0],
        [0, 0, 0],
        [2, 1, 2],
    ]
    assert words.tokens([]).shape == (0, 3)


def test_unknown_words_name_the_nearest():
    with pytest.raises(
        UserError, match="prompt 'a rad circle' has an unknown word 'rad'; did you mean red"
    ):
        WORDS.tokens(["a rad circle"])


def test_long_prompts_are_refused():
    with pytest.raises(UserError, match="6 words; the generator reads 4"):
        WORDS.tokens(["a red circle a red circle"])


@pytest.mark.parametrize(("words", "length"), [([], 3), (["a", "a"], 3), (["a"], 0)])
def test_vocabularies_must_make_sense(words, length):
    with pytest.raises(UserError, match="vocabulary"):
        Vocabulary(words, length)
