"""Pretraining: prompts become pictures, shuffled prompts do not, and a checkpoint goes on exactly."""

import numpy as np
import pytest
import torch

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import DivergedError, UserError
from agents.core.logging import Logger
from agents.core.run_loop import Hooks
from agents.core.step_rules import Posterior
from agents.generative_models.contact_sheet import contact_sheet, save_picture
from agents.generative_models.drawings import Drawings
from agents.generative_models.generator import GeneratorConfig, ImageGenerator, load_generator
from agents.generative_models.pretraining import (
    PictureStream,
    Pretrainer,
    PretrainingConfig,
    PretrainingLoop,
    PretrainingSettings,
)
from agents.generative_models.text import Vocabulary
from agents.generative_models.text_to_image import NEAR_NOISE

WORDS = Vocabulary(["red", "blue"], 1)
TINY = {
    "size": 8,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "patch": 2,
    "text_features": 16,
    "text_blocks": 0,
}


def pictures(shuffled=False):
    """Plain red and blue pictures of random brightness."""
    rng = np.random.default_rng(0)
    prompt = np.arange(256) % 2
    images = np.zeros((256, 3, 8, 8), np.uint8)
    images[np.arange(256), np.where(prompt == 0, 0, 2)] = rng.integers(150, 256, (256, 1, 1))
    return Drawings(images, ("red", "blue"), rng.permutation(prompt) if shuffled else prompt)


def learner(path="flow", network="unet", **changes):
    torch.manual_seed(0)
    levels = {"levels": 1} if network == "unet" else {}
    generator = ImageGenerator(GeneratorConfig(path=path, network=network, **TINY, **levels), WORDS)
    settings = {
        "batch_size": 32,
        "learning_rate": 3e-3,
        "warmup": 10,
        "average_decay": 0.9,
        **changes,
    }
    return Pretrainer(generator, PretrainingConfig(**settings), seed=0)


def train(pretrainer, steps, *, shuffled=False):
    data = pictures(shuffled)
    stream = PictureStream(data, WORDS.tokens(data.prompts), seed=0, device="cpu")
    losses = []
    for step in range(steps):
        pretrainer.set_progress(step)
        losses.append(float(pretrainer.update(stream.sample(32))["loss/denoising"]))
    return losses


def redness(generator):
    """How much redder than blue pictures of "red" are, minus the same of "blue"; 2 is perfect."""
    images = generator.generate(
        ["red"] * 16 + ["blue"] * 16, seed=1, steps=8, rule=Posterior(0.0), scale=1.5
    )
    share = (images[:, 0] - images[:, 2]).mean((1, 2))
    return float(share[:16].mean() - share[16:].mean())


@pytest.mark.parametrize(
    ("path", "network"), [("flow", "unet"), ("cosine", "unet"), ("flow", "dit"), ("ddpm", "dit")]
)
def test_prompts_become_their_pictures(path, network):
    pretrainer = learner(path, network)
    losses = train(pretrainer, 120)
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])
    assert redness(pretrainer.average.module) > 1.0


def test_shuffled_prompts_teach_nothing_of_color():
    pretrainer = learner()
    train(pretrainer, 120, shuffled=True)
    assert abs(redness(pretrainer.average.module)) < 0.5


def test_a_flipped_loss_is_no_learning(monkeypatch):
    pretrainer = learner()
    monkeypatch.setattr(
        ImageGenerator,
        "errors",
        lambda self, *args, plain=ImageGenerator.errors: -plain(self, *args),
    )
    train(pretrainer, 40)
    monkeypatch.undo()
    assert redness(pretrainer.average.module) < 0.5


def test_warmup_raises_the_learning_rate():
    pretrainer = learner(warmup=4)
    rates = []
    for step in range(6):
        pretrainer.set_progress(step)
        rates.append(pretrainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.00075, 0.0015, 0.00225, 0.003, 0.003, 0.003])


def test_the_learning_rate_falls_to_nothing_at_the_end_of_the_run():
    config = PretrainingConfig(learning_rate=1.0, warmup=2, decay=0.5)
    pretrainer = Pretrainer(learner().image_generator, config, seed=0, steps=8)
    rates = []
    for step in range(9):
        pretrainer.set_progress(step)
        rates.append(pretrainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_the_first_steps_see_times_near_the_noise_alone(path, monkeypatch):
    pretrainer = learner(path=path, noisy_steps=3, noisy_share=0.25)
    generator, seen = pretrainer.image_generator, []
    errors = generator.errors

    def watched(x0, condition, t, noise):
        seen.append(t / t.new_tensor(generator.path.last))
        return errors(x0, condition, t, noise)

    monkeypatch.setattr(generator, "errors", watched)
    train(pretrainer, 3 + 64)
    first, later = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert first.min() >= NEAR_NOISE - 1e-3
    assert first.max() <= 1
    assert first.float().std() == pytest.approx((1 - NEAR_NOISE) / 12**0.5, abs=0.015)
    # P(logit-normal > .8) is 1 - Phi(log 4).
    natural = 1 - torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(4.0).log()).item()
    expected = 0.25 + 0.75 * natural
    assert (later > NEAR_NOISE).float().mean() == pytest.approx(expected, abs=0.04)


def test_without_times_near_the_noise_nothing_more_is_drawn():
    one, other = learner(), learner(noisy_share=0.5)
    for pretrainer in (one, other):
        pretrainer.set_progress(0)
    data = pictures()
    batch = PictureStream(data, WORDS.tokens(data.prompts), seed=0, device="cpu").first(32)
    one.update(batch), other.update(batch)
    assert not torch.equal(one.generator.get_state(), other.generator.get_state())
    plain = torch.Generator().manual_seed(0)
    torch.rand(32, generator=plain)  # prompts that are dropped
    torch.randn(32, generator=plain)  # times
    torch.randn(32, 3, 8, 8, generator=plain)  # noise
    assert torch.equal(plain.get_state(), one.generator.get_state())


def test_the_average_is_that_of_its_recursion():
    pretrainer = learner(learning_rate=1e-2)
    expected = pretrainer.image_generator.text.position.detach().clone()
    for step in range(5):
        train(pretrainer, 1)
        decay = min(0.9, 1 - (1 + step) ** -0.75)
        position = pretrainer.image_generator.text.position.detach()
        expected = decay * expected + (1 - decay) * position
    torch.testing.assert_close(pretrainer.average.module.text.position, expected)


def test_gradients_are_clipped():
    one, other = learner(gradient_clip=1e-6), learner(gradient_clip=0)
    data = pictures()
    batch = PictureStream(data, WORDS.tokens(data.prompts), seed=0, device="cpu").first(32)
    one.update(batch), other.update(batch)

    def norm(pretrainer):
        gradients = [
            p.grad.norm() for p in pretrainer.image_generator.parameters() if p.grad is not None
        ]
        return float(torch.stack(gradients).norm())

    assert norm(one) == pytest.approx(1e-6, rel=1e-2)
    assert norm(other) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"warmup": -1},
        {"gradient_clip": -1.0},
        {"noisy_steps": -1},
        {"noisy_share": 1.5},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(UserError, match="give"):
        PretrainingConfig(**settings)
    with pytest.raises(UserError, match="give a positive number"):
        PretrainingSettings(eval_prompts=0)


# ------------------------------------------------------------------------------------------- loop


def run(folder, steps, *, resume=False, hooks=None):
    folder.mkdir(exist_ok=True)
    data = pictures()
    stream = PictureStream(data, WORDS.tokens(data.prompts), seed=0, device="cpu")
    settings = PretrainingSettings(steps=steps, log_every=3, eval_every=0, checkpoint_every=100)
    checkpoints = CheckpointStore(folder)
    parts = checkpoints.load() if resume else None
    loop = PretrainingLoop(
        learner(noisy_steps=10, noisy_share=0.3),
        stream,
        settings,
        logger=Logger(folder, resume_from=parts["progress"]["agent_steps"] if parts else None),
        checkpoints=checkpoints,
        hooks=hooks or Hooks(line=lambda text: None),
    )
    if parts:
        loop.resume(parts)
    loop.run()
    loop.logger.close()
    return loop


def test_a_run_in_two_parts_is_the_run(tmp_path):
    run(tmp_path / "whole", 16)
    run(tmp_path / "parts", 7)
    run(tmp_path / "parts", 16, resume=True)
    whole, parts = (CheckpointStore(tmp_path / name).load() for name in ("whole", "parts"))
    for key in ("agent", "pictures", "generator", "unlogged"):
        assert_equal(whole[key], parts[key], key)


def assert_equal(one, other, place):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place


def test_runs_hold_the_averaged_generator(tmp_path):
    loop = run(tmp_path, 4)
    loaded = load_generator(tmp_path)
    average = loop.agent.average.module.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, average[name]), name
    text = loop.agent.image_generator.text.position
    assert not torch.equal(loaded.text.position, text)


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    folder = tmp_path / "run"
    loop = run(folder, 3)
    with torch.no_grad():
        loop.agent.image_generator.text.position.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"not finite|nan"):
        loop.save()
    assert torch.isfinite(load_generator(folder).text.position).all()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_names_what_to_lower(error, tmp_path, monkeypatch):
    def fail(self, batch):
        raise error

    run(tmp_path, 4)
    monkeypatch.setattr(Pretrainer, "update", fail)
    with pytest.raises(UserError, match="out of memory: lower --batch-size first"):
        run(tmp_path, 8, resume=True)
    assert CheckpointStore(tmp_path).load()["progress"]["agent_steps"] == 4


def test_other_errors_pass_as_they_are(tmp_path, monkeypatch):
    def fail(self, batch):
        raise RuntimeError("another")

    monkeypatch.setattr(Pretrainer, "update", fail)
    with pytest.raises(RuntimeError, match="another"):
        run(tmp_path, 4)


# ------------------------------------------------------------------------------------------ sheets


def test_contact_sheets_show_the_pictures_in_order(tmp_path):
    images = torch.rand(5, 3, 8, 8)
    sheet = contact_sheet(images, columns=3, side=16)
    assert sheet.shape == (2 * (16 + 2 + 4), 3 * (16 + 4), 3)
    tile = (images[4] * 255).round().byte().permute(1, 2, 0).numpy()
    top, left = (16 + 2 + 4) + 2, (16 + 4) + 2
    np.testing.assert_array_equal(sheet[top : top + 16 : 2, left : left + 16 : 2], tile)
    captioned = contact_sheet(images, ["a red circle above a blue square"] * 5, columns=3, side=48)
    assert captioned.shape[0] > 2 * (48 + 6)
    assert (captioned[50:] < 100).all(2).any()  # something is written
    save_picture(tmp_path / "sheet.png", captioned)
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_bfloat16_is_near_float32():
    """The same draws, so that the losses differ by rounding alone; parameters and averages stay in float32."""
    losses = {}
    for bf16 in (False, True):
        pretrainer = learner(bf16=bf16)
        losses[bf16] = train(pretrainer, 5)
        assert {p.dtype for p in pretrainer.average.parameters()} == {torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=0.03)
    assert losses[True] != losses[False]
