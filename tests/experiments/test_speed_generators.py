"""The tables of generators: what is compared draws the same images, and the interval is the sign test's."""

import math

import numpy as np
import pytest
import torch

from agents.generative_models import forward_passes
from agents.generative_models.generator import GeneratorConfig
from agents.generative_models.pipeline_generator import PipelineSettings
from experiments.measuring import generators, large_generators
from experiments.measuring.generators import LOOPS, Ours, Theirs, alternating, median_interval
from tests.experiments.test_speed import TINY, check_whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    generators.write_pipeline(place)
    return str(place)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name[:12])
def test_every_loop_draws_our_images_with_our_log_probabilities(folder, loop):
    images, log_prob = Ours(folder, "cpu").draw()
    expected, theirs = Theirs(folder, "cpu").draw(loop)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_prob, theirs, atol=1e-4, rtol=1e-4)
    assert images.shape == (8, 3, 16, 16)
    assert log_prob.shape == (9, 8)


def test_passes_of_the_network_are_those_that_the_rows_name(folder):
    ours, theirs = Ours(folder, "cpu"), Theirs(folder, "cpu")
    seen = []
    for each in (ours.generator.pipe, theirs.pipe):
        each.unet.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    ours.draw()
    assert seen == [16] * 10
    for loop, expected in zip(LOOPS, ([16] * 19, [8] * 38, [16] * 10), strict=True):
        seen.clear()
        theirs.draw(loop)
        assert seen == expected


def test_the_tables_are_whole():
    speed, parts = generators.generators(TINY, loops=LOOPS[2:], pairs=2)
    check_whole(speed, [LOOPS[2].name])
    check_whole(parts, ["ours", LOOPS[2].name])
    for low, ratio, high in zip(*(speed.column(n) for n in ("low", "ours / loop", "high")), strict=True):  # fmt: skip
        assert low <= ratio <= high
    assert parts.column("text encoder")[0] == 0  # encoded once, before
    assert all(cell > 0 for cell in parts.column("network"))


def test_turns_alternate():
    order = []
    calls = [lambda: order.append(0), lambda: order.append(1)]
    assert len(alternating(calls, 0, 4, lambda: None)) == 4
    assert order == [0, 1, 0, 1, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("count", [6, 9, 11, 30])
def test_the_interval_covers_the_median(count):
    """By counting: it misses where fewer values than its place lie on one side of the median."""
    low, high = median_interval(np.random.default_rng(0).permutation(count).tolist())
    below = sum(math.comb(count, k) for k in range(int(low) + 1)) / 2**count
    wider = sum(math.comb(count, k) for k in range(int(low) + 2)) / 2**count
    assert high == count - 1 - low
    assert 2 * below <= 0.05 < 2 * wider


def test_few_values_are_all_the_interval():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


TINY_CASE = large_generators.Case(
    generator=GeneratorConfig(
        network="dit", size=16, width=16, depth=1, heads=2, patch=4, text_features=16, text_blocks=0
    ),
    pictures=2,
    pipeline=generators.SMALL_PIPELINE,
    lora=PipelineSettings(lora_rank=2, lora_alpha=2, precision="fp32"),
    tuning={"prompts": 2, "group": 2, "batch_size": 4, "denoising_steps": 2},
    lora_tuning={"prompts": 1, "group": 2, "batch_size": 2, "denoising_steps": 2},
)


@pytest.mark.parametrize("part", ["dit", pytest.param("lora", marks=pytest.mark.slow)])
def test_large_generators_are_measured_eager_and_compiled(part, monkeypatch):
    """In small, on a CPU: whole tables, and the columns are what they say."""
    monkeypatch.setattr(forward_passes, "BACKEND", "eager")
    seen = []
    compiled = forward_passes.ForwardPass.compile
    monkeypatch.setattr(
        forward_passes.ForwardPass, "compile", lambda *a, **k: (seen.append(1), compiled(*a, **k))
    )
    if part == "dit":
        table = large_generators.dit_table(0, "cpu", TINY_CASE, ["flow-grpo", "alignprop"], "fp32")
        check_whole(table, ["pretraining", "flow-grpo", "alignprop"])
        assert len(seen) == 1 + 2 + 2  # one of pretraining, model and reference of each method
    else:
        table = large_generators.lora_table(0, "cpu", TINY_CASE)
        check_whole(table, ["ddpo", "ddpo, gradient checkpointing"])
        assert len(seen) == 2 * 2
    eager, fast, ratio = (
        table.column(name) for name in ("eager, images/s", "compiled, images/s", "compiled / eager")
    )
    assert [b / a for a, b in zip(eager, fast, strict=True)] == pytest.approx(ratio)
    assert set(table.column("eager, GiB")) == {"unknown"}


def test_without_a_gpu_large_generators_are_left_out_in_a_line():
    (table,) = large_generators.large_generators(4.0, "cpu")
    assert table.rows == []
    assert "Left out on cpu" in table.markdown()


def test_images_without_comparison_are_as_many_as_of_groups():
    about = large_generators.LARGE.tuning
    for method in ("flow-grpo", "alignprop"):
        _, images = large_generators.fine_tuning(method, lambda: None, about, "cpu")
        assert images == 128


def test_the_stable_diffusion_is_as_large_as_the_published_one():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**large_generators.STABLE_DIFFUSION.unet_settings())
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_the_dit_has_the_size_that_was_asked_for():
    """Counted by hand: 18 w^2 a block, of attention 4, its MLP 8 and modulation 6, with the biases of 15 w."""
    about = large_generators.LARGE.generator
    vocabulary = large_generators.vocabulary_of(large_generators.DrawingSettings(size=about.size))
    generator = large_generators._without_weights(about, vocabulary)
    blocks = sum(p.numel() for p in generator.denoiser.network.blocks.blocks.parameters())
    assert blocks == 12 * (18 * 768**2 + 15 * 768)
    total = sum(p.numel() for p in generator.parameters())
    assert total == 133_740_336
    assert 50e6 < total < 150e6
    assert (about.size, about.network) == (64, "dit")
