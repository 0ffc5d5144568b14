"""Pipelines of diffusers on our samplers and trainers, against diffusers itself, on tiny random weights."""

import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from agents.core.checkpoints import load_tree, save_tree
from agents.core.errors import UserError
from agents.core.step_rules import Posterior
from agents.generative_models.chains import STILL
from agents.generative_models.generator import generator_of
from agents.generative_models.methods import METHODS, find_method
from agents.generative_models.monitor import chain_kl
from agents.generative_models.pipeline_generator import (
    PipelineGenerator,
    PipelineSettings,
    latent_statistics,
    load_pipeline,
)
from agents.generative_models.tuners import make_tuner
from tests.agents.thread_ranks import in_threads
from tests.agents.tiny_pipelines import KINDS, write_pipeline
from tests.agents.toy_generator import redness

PROMPTS = ["a red circle", "two blue squares"]
SMALL = {"denoising_steps": 4, "prompts": 2, "group": 2, "batch_size": 3, "guidance": 2.0}
SIZE = 16
SOME = ["sd", "sd3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "flux"))]
"""Kinds where two of them show most of it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny pipeline of every kind, and FLUX without an embedding of guidance."""
    root = tmp_path_factory.mktemp("pipelines")
    found = {kind: write_pipeline(kind, root / kind) for kind in KINDS}
    return found | {"schnell": write_pipeline("flux", root / "schnell", guided=False)}


def open_tiny(folder, **settings):
    defaults = {"image_size": SIZE, "text_length": 12, "lora_rank": 2, "lora_alpha": 6}
    return load_pipeline(str(folder), PipelineSettings(**(defaults | settings)))


def disturb(generator, size=0.2):
    """Give the LoRA some effect: at first it has none."""
    draws = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in generator.learned():
            parameter += size * torch.randn(parameter.shape, generator=draws)


def start_of(generator, count=2):
    return torch.randn(count, *generator.shape, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def ours(generator, start, scale, steps=4):
    sampler = generator.sampler(steps, STILL)
    x = sampler.sample(generator.guided(scale), start, generator.encode(PROMPTS))
    return generator.decode(x)


def diffusers_own(folder, start, scale, steps=4, lora=None):
    """What the pipeline itself draws from the same noise, by its own loop."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    options = {"num_inference_steps": steps, "output_type": "pt", "height": SIZE, "width": SIZE,
               "guidance_scale": scale}  # fmt: skip
    if hasattr(pipe, "unet"):
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, set_alpha_to_one=True, clip_sample=False
        )
        return pipe(PROMPTS, latents=start, **options).images
    options["max_sequence_length"] = 12
    if type(pipe).__name__ == "FluxPipeline":
        packed = pipe._pack_latents(start, *start.shape)
        return pipe(PROMPTS, latents=packed, **options).images
    sigmas = np.linspace(1, 1 / steps, steps).tolist()
    return pipe(PROMPTS, latents=start, sigmas=sigmas, **options).images


# -------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("kind", [*KINDS, "schnell"])
def test_images_are_those_of_the_pipeline(folders, kind):
    generator = open_tiny(folders[kind])
    start, scale = start_of(generator), 1.0 if kind == "schnell" else 3.0
    expected = diffusers_own(folders[kind], start, scale)
    drawn = ours(generator, start, scale)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    assert (drawn - ours(generator, start, scale + 1)).abs().max() > 1e-3  # guidance is there
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_lora_is_read_by_diffusers(folders, kind, tmp_path):
    """Its scale too, which is 3 here."""
    generator = open_tiny(folders[kind])
    start = start_of(generator)
    without = ours(generator, start, 3.0)
    disturb(generator)
    file = generator.save_lora(tmp_path / "lora")
    assert [each.name for each in (tmp_path / "lora").iterdir()] == [file.name]
    drawn = ours(generator, start, 3.0)
    expected = diffusers_own(folders[kind], start, 3.0, lora=tmp_path / "lora")
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    assert (drawn - without).abs().max() > 1e-2


def test_latents_are_scaled_as_the_vae_says(folders):
    """With a shift, as in SD3, and with statistics of each channel, as SDXL's pipeline reads them."""
    generator = open_tiny(folders["sd3"])
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    vae = generator.vae
    with torch.no_grad():
        mode = vae.encode(2 * images - 1).latent_dist.mode()
    torch.testing.assert_close(generator.from_images(images), (mode - 0.06) * 0.5)
    as_bytes = (255 * images).round().to(torch.uint8)
    torch.testing.assert_close(
        generator.from_images(as_bytes), generator.from_images(as_bytes / 255)
    )
    vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0])
    scale, shift = latent_statistics(vae, mode)
    x = start_of(generator)
    mean, std = (torch.tensor(vae.config[n]).view(1, 4, 1, 1) for n in ("latents_mean", "latents_std"))  # fmt: skip
    torch.testing.assert_close(x / scale + shift, x * std / 0.5 + mean)


# ----------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_encoded_once(folders, kind):
    generator = open_tiny(folders[kind])
    seen = []
    for name, module in generator.pipe.components.items():
        if name.startswith("text_encoder"):
            module.register_forward_pre_hook(lambda m, a, k: seen.append(1), with_kwargs=True)
    generator.check_prompts([*PROMPTS, *PROMPTS])
    once = len(seen)
    assert once > 0
    both = generator.encode(PROMPTS)
    generator.guided(3.0)
    generator.generate(PROMPTS * 2, seed=0, steps=2, rule=STILL, scale=3.0)
    assert len(seen) == once
    alone = open_tiny(folders[kind]).encode(PROMPTS[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    assert generator.unconditional(3).shape == (3, *both.shape[1:])
    assert bool(generator.unconditional(1).any()) == (kind != "sdxl")  # XL's is zeros


@pytest.mark.parametrize("kind", SOME)
def test_an_image_does_not_depend_on_its_batch(folders, kind):
    generator = open_tiny(folders[kind])
    disturb(generator)
    options = {"seed": 3, "steps": 3, "rule": Posterior(1.0), "scale": 2.0}
    many = generator.generate([*PROMPTS, "blue"], **options)
    single = generator.generate([*PROMPTS, "blue"], batch=1, **options)
    torch.testing.assert_close(many, single, atol=1e-5, rtol=0)
    assert many.shape == (3, 3, SIZE, SIZE)
    assert many.dtype == torch.float32
    assert 0 <= many.min() <= many.max() <= 1


# ---------------------------------------------------------------------------------------- learning


def tuner_of(name, generator, **overrides):
    window = {"window": 2} if METHODS[name].settings.get("window") else {}
    config = find_method(name).config(**(SMALL | window | overrides))
    return make_tuner(generator, redness, config, seed=3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", SOME)
def test_a_ratio_is_exactly_one_at_the_first_inner_step(folders, kind, precision):
    """In half precision, too, where nothing but the network's insides may be rounded."""
    name = "ddpo" if kind.startswith("sd") and kind != "sd3" else "flow-grpo"
    generator = open_tiny(folders[kind], precision=precision)
    disturb(generator)
    tuner = tuner_of(name, generator, updates=3, kl=0.1)
    before = [parameter.clone() for parameter in tuner.parameters]
    sampler, batches = tuner.draw(PROMPTS)
    for batch in batches:
        tensors = [batch.samples, batch.images, *batch.log_prob.values()]
        assert {each.dtype for each in tensors} == {torch.float32}
        index = sampler.stochastic[0]
        step = sampler.step(tuner.guided(tuner.model), batch.samples[index], index, batch.condition)
        assert step.mean.dtype == torch.float32
    metrics = tuner.update(PROMPTS)
    assert metrics["ratio/first_deviation"] == 0
    assert metrics["ratio/largest_deviation"] > 0
    assert {parameter.dtype for parameter in tuner.parameters} == {torch.float32}
    assert {parameter.grad.dtype for parameter in tuner.parameters} == {torch.float32}
    assert all(torch.isfinite(parameter).all() for parameter in tuner.parameters)
    assert any(not torch.equal(a, b) for a, b in zip(before, tuner.parameters, strict=True))


def test_latents_in_half_precision_would_be_noticed(folders):
    """The negative of the test before: with a network that rounds what it hands on, the ratio is not 1."""
    generator = open_tiny(folders["sd"], precision="bf16")
    tuner = tuner_of("ddpo", generator)
    sampler, batches = tuner.draw(PROMPTS)
    rounded = [each.samples.bfloat16().float() for each in batches]
    index = sampler.stochastic[0]
    step = sampler.step(tuner.guided(tuner.model), rounded[0][index], index, batches[0].condition)
    new = step.log_prob(rounded[0][index + 1]).flatten(1).mean(1)
    assert (new - batches[0].log_prob[index]).abs().max() > 0


@pytest.mark.parametrize("kind", SOME)
def test_two_processes_learn_one_lora(folders, kind):
    """Each of its own prompt; threads stand in for processes."""
    alone = threading.Lock()

    def work(ranks):
        with alone:  # of the library's global generator there is one for all threads
            generator = open_tiny(folders[kind], lora_rank=2)
            disturb(generator)
            config = find_method("flow-grpo").config(**SMALL)
            tuner = make_tuner(generator, redness, config, seed=3, ranks=ranks)
        before = [parameter.clone() for parameter in tuner.parameters]
        return tuner, tuner.update(PROMPTS), before

    (first, metrics, before), (second, _, _) = in_threads(2, work)
    assert metrics["ratio/first_deviation"] == 0
    assert all(map(torch.equal, first.parameters, second.parameters))
    assert not all(map(torch.equal, before, first.parameters))
    assert not torch.equal(first.generator.get_state(), second.generator.get_state())


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("dpok", "mix-grpo", "diffusion-dpo", "refl", "raft")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(METHODS)
    ],
)
def test_every_method_learns_the_lora_alone(folders, name):
    generator = open_tiny(folders["sd3" if name.endswith("grpo") else "sd"])
    others = {
        n: value.clone()
        for n, value in generator.denoiser.network.state_dict().items()
        if ".lora_" not in n
    }
    tuner = tuner_of(name, generator)
    before = {n: value.clone() for n, value in generator.state_dict().items()}
    metrics = tuner.update(PROMPTS)
    assert all(torch.isfinite(value) for value in metrics.values())
    after = generator.state_dict()
    assert set(after) == set(before)
    assert any(not torch.equal(before[n], after[n]) for n in after)
    now = generator.denoiser.network.state_dict()
    assert all(torch.equal(value, now[n]) for n, value in others.items())
    assert not any(p.requires_grad for p in generator.vae.parameters())


@pytest.mark.parametrize("kind", SOME)
def test_the_reference_is_the_pipeline_as_it_was(folders, kind):
    """It takes no memory, and asking it leaves the gradient as it is."""
    generator = open_tiny(folders[kind])
    start = start_of(generator)
    original = ours(generator, start, 2.0)
    tuner = tuner_of("flow-grpo", generator, noise="posterior", noise_level=1.0)
    condition = generator.encode(PROMPTS)
    options = {"steps": 3, "guidance": 2.0, "seed": 0}
    assert chain_kl(tuner.model, tuner.reference, condition, **options) == 0
    disturb(generator)
    assert torch.equal(ours(tuner.reference, start, 2.0), original)
    assert (ours(generator, start, 2.0) - original).abs().max() > 1e-2
    assert chain_kl(tuner.model, tuner.reference, condition, **options) > 0
    own = {id(p) for p in tuner.model.parameters()}
    assert all(id(p) in own for p in tuner.reference.parameters())
    assert tuner.reference.learned() == []

    def gradient(ask_between):
        sampler = tuner.sampler()
        loss = sampler.step(tuner.guided(tuner.model), start, 1, condition).mean.square().sum()
        if ask_between:
            with torch.no_grad():
                sampler.step(tuner.guided(tuner.reference), start, 1, condition)
        return torch.autograd.grad(loss, tuner.parameters)

    for plain, between in zip(gradient(False), gradient(True), strict=True):
        assert torch.equal(plain, between)


@pytest.mark.parametrize("kind", SOME)
def test_recomputed_activations_give_the_same_gradient(folders, kind):
    gradients = []
    for recompute in (False, True):
        generator = open_tiny(folders[kind], gradient_checkpointing=recompute)
        disturb(generator)
        tuner = tuner_of("alignprop", generator, gradient_steps=2)
        calls = []
        if recompute:
            for module in generator.denoiser.network.modules():
                if hasattr(module, "lora_A"):
                    module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = generator.sampler(2, STILL).sample(
            tuner.guided(generator), start_of(generator), generator.encode(PROMPTS)
        )
        forward = len(calls)
        gradients.append(torch.autograd.grad(generator.decode(x).mean(), tuner.parameters))
        assert len(calls) == 2 * forward  # every layer again
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_gradients_in_half_precision_do_not_vanish(folders, monkeypatch):
    """Of a loss as small as that of one latent of many: scaled they are float32's, unscaled they are lost."""
    found = {}
    for name, precision, scale in (
        ("exact", "fp32", None),
        ("scaled", "fp16", 4096.0),
        ("lost", "fp16", 1.0),
    ):
        if scale is not None:
            for module in ("pipeline_networks", "pipeline_generator"):
                monkeypatch.setattr(f"agents.generative_models.{module}.HALF_SCALE", scale)
        generator = open_tiny(folders["sd"], precision=precision)
        disturb(generator)
        x = start_of(generator).requires_grad_()
        said = generator.denoiser(x, torch.full((2,), 0.5), generator.encode(PROMPTS))
        gradients = torch.autograd.grad(1e-7 * said.sum(), [x, *generator.learned()])
        found[name] = torch.cat([each.flatten() for each in gradients]) / 1e-7
    error = {n: float((found[n] - found["exact"]).norm() / found["exact"].norm()) for n in found}
    assert error["scaled"] < 0.02
    assert error["lost"] > 0.2


def test_a_lora_learns_and_a_flipped_reward_unlearns(folders):
    """AlignProp on brightness through network and VAE: up with the reward, down with its negative."""
    gains = {}
    for sign in (1, -1):
        layers = ("proj_out", "to_v", "to_out.0", "linear_2")
        generator = open_tiny(folders["sd3"], lora_rank=4, lora_alpha=16, lora_targets=layers)
        config = find_method("alignprop").config(
            denoising_steps=2, prompts=2, learning_rate=0.05, guidance=1.0
        )
        tuner = make_tuner(
            generator, lambda images, _, s=sign: s * images.mean((1, 2, 3)), config, seed=0
        )
        options = {"seed": 5, "steps": 2, "rule": STILL, "scale": 1.0}
        before = generator.generate(PROMPTS * 4, **options).mean()
        for _ in range(8):
            tuner.update(PROMPTS)
        gains[sign] = float(generator.generate(PROMPTS * 4, **options).mean() - before)
    assert gains[1] > 0.03
    assert gains[-1] < -0.03


@pytest.mark.parametrize("kind", ["sd", "flux", "schnell"])
def test_evaluations_are_counted_and_told_guidance_costs_one_pass(folders, kind):
    tuner = tuner_of("flow-grpo", open_tiny(folders[kind]), kl=0.1, updates=1)
    sampler, batches = tuner.draw(PROMPTS)
    cost = 1 if kind == "flux" else 2
    assert tuner.evaluations == cost * 4 * 4  # of 4 images in 4 steps
    kept = torch.ones(len(batches[0]), dtype=torch.bool)
    tuner.step_loss(sampler, batches[0], 0, kept.float(), kept)
    assert tuner.evaluations == cost * (4 * 4 + 2 * len(kept))  # a pass, and its reference's


# ------------------------------------------------------------------------------------------ states


def test_a_checkpoint_holds_the_lora_alone_and_goes_on_exactly(folders, tmp_path):
    tuners = [tuner_of("ddpo", open_tiny(folders["sd"])) for _ in range(2)]
    tuners[0].update(PROMPTS)
    tree = tuners[0].state_dict()
    saved = sum(v.numel() for v in tree["networks"]["model"].values())
    assert saved == sum(p.numel() for p in tuners[0].parameters)
    assert tree["networks"]["reference"] == {}
    save_tree(tmp_path, "agent", tree)
    tuners[1].load_state_dict(load_tree(tmp_path, "agent"))
    for tuner in tuners:
        tuner.update(PROMPTS)
    first, second = (tuner.model.state_dict() for tuner in tuners)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_generator_is_built_again_from_its_tree(folders, tmp_path):
    generator = open_tiny(write_pipeline("sd", tmp_path / "sd"))
    disturb(generator)
    tree = generator.to_tree()
    again = generator_of(tree)
    assert isinstance(again, PipelineGenerator)
    start = start_of(generator)
    assert torch.equal(ours(generator, start, 2.0), ours(again, start, 2.0))
    with pytest.raises(UserError, match="do not fit"):
        open_tiny(folders["sd"], lora_rank=3).load_state_dict(tree["weights"])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "sd")
    with torch.no_grad():
        pipe.unet.conv_in.weight += 0.01
    pipe.unet.save_pretrained(tmp_path / "sd" / "unet")
    with pytest.raises(UserError, match="not those that were fine-tuned"):
        generator_of(tree)


def test_a_seed_gives_a_lora_and_leaves_other_numbers_alone(folders):
    settings = PipelineSettings(image_size=SIZE)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    loras = [load_pipeline(str(folders["sd"]), settings, seed=s).state_dict() for s in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    name = next(n for n in loras[0] if ".lora_A." in n)
    assert torch.equal(loras[0][name], loras[1][name])
    assert not torch.equal(loras[0][name], loras[2][name])
