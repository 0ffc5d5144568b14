"""Parts of fine-tuning against loops, closed forms and each other: ratios, clips, credit, KL, selection, gradients."""

import ast
import dataclasses
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

from agents.core.advantages import ConditionStatistics
from agents.core.errors import UserError
from agents.core.policy_gradient import ppo_clip
from agents.core.sampling import Sampler
from agents.core.step_rules import CPS, DanceSDE, FlowSDE, Posterior
from agents.generative_models import chains, credit, preference_tuning, ratio_rules
from agents.generative_models.credit import image_advantage
from agents.generative_models.methods import METHODS, find_method
from agents.generative_models.reward_gradients import truncated_chain
from agents.generative_models.tuner import parts
from agents.generative_models.tuners import make_tuner
from agents.generative_models.tuning_config import TuningConfig
from tests.agents.toy_generator import PROMPTS, redness, tiny_network, toy_generator

POLICY = [name for name, m in METHODS.items() if m.config().objective == "policy_gradient"]
SMALL = {"denoising_steps": 5, "prompts": 2, "group": 4, "batch_size": 3, "guidance": 2.0}


def settings(name, **overrides):
    window = {"window": 2} if METHODS[name].settings.get("window") else {}
    return find_method(name).config(**(SMALL | window | overrides))


def tuner_of(name, model=None, reward=redness, **overrides):
    return make_tuner(model or tiny_network(), reward, settings(name, **overrides), seed=3)


def disturbed(tuner, size=0.02):
    """Move the model's weights a little, as a gradient step would."""
    draws = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in tuner.model.denoiser.parameters():
            parameter += size * torch.randn(parameter.shape, generator=draws)


# ------------------------------------------------------------------------------------------ ratios


@pytest.mark.parametrize("network", ["unet", "dit"])
@pytest.mark.parametrize("path", ["flow", "cosine"])
@pytest.mark.parametrize("name", ["flow-grpo", "ddpo", "dance-grpo", "grpo-guard", "mix-grpo"])
def test_a_ratio_is_exactly_one_at_the_first_inner_step(name, path, network):
    """Of a real network, with guidance, in passes of unequal size."""
    tuner = tuner_of(name, tiny_network(network, path))
    metrics = tuner.update(PROMPTS[:2])
    assert metrics["ratio/first_deviation"] == 0
    if tuner.config.updates > 1:
        assert metrics["ratio/largest_deviation"] > 0


def test_the_first_deviation_notices_another_policy():
    tuner = tuner_of("flow-grpo")
    sampler, batches = tuner.draw(PROMPTS[:2])
    disturbed(tuner)
    kept = torch.ones(len(batches[0]), dtype=torch.bool)
    index = sampler.stochastic[0]
    _, metrics = tuner.step_loss(sampler, batches[0], index, kept.float(), kept)
    assert metrics["ratio/largest_deviation"] > 0


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_log_probabilities_are_torch_s(how):
    tuner = tuner_of("flow-grpo", log_prob=how)
    sampler, batches = tuner.draw(PROMPTS[:2])
    for batch in batches:
        for index in sampler.stochastic:
            with torch.no_grad():
                step = sampler.step(
                    tuner.guided(tuner.model), batch.samples[index], index, batch.condition
                )
            each = Normal(step.mean, step.std).log_prob(batch.samples[index + 1]).flatten(1)
            expected = each.sum(1) if how == "sum" else each.mean(1)
            torch.testing.assert_close(batch.log_prob[index], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dimension", [2, 48, 3072, 16_384])
def test_a_clip_means_the_same_for_means_and_sums(dimension):
    log_ratio = torch.linspace(-3, 3, 41, dtype=torch.float64) * 0.0128 / math.sqrt(dimension)
    mean = ratio_rules.clip_bounds(0.0128, dimension, "mean")
    total = ratio_rules.clip_bounds(0.0128, dimension, "sum")
    for advantage in (1.0, -1.0):
        clipped = []
        for scale, bounds in ((1, mean), (dimension, total)):
            x = (scale * log_ratio).float().requires_grad_()
            loss = ppo_clip(
                x, torch.full_like(x, advantage), clip=bounds.low, clip_high=bounds.high
            )
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            clipped.append(gradient == 0)
        assert torch.equal(*clipped)
        assert 10 < int(clipped[0].sum()) < 16


@pytest.mark.parametrize("width", [20.0, 60.0, math.inf])
def test_a_wide_clip_bounds_nothing_above(width):
    """Its bound as a sum's leaves the floats; below, no ratio is under 0."""
    bounds = ratio_rules.clip_bounds(width, 3072, "sum")
    assert bounds.low == 1
    assert bounds.high == math.inf
    x = torch.tensor([-3.0, 0.0, 3.0, 200.0], requires_grad=True)
    loss = ppo_clip(x, torch.ones(4), clip=bounds.low, clip_high=bounds.high)
    assert (torch.autograd.grad(loss.sum(), x)[0] < 0).all()


def test_published_clips_come_out_where_they_were_tuned():
    assert ratio_rules.clip_bounds(METHODS["ddpo"].config().clip, 16_384, "mean").low == (
        pytest.approx(1e-4)
    )
    assert ratio_rules.clip_bounds(TuningConfig().clip, 65_536, "mean").high == pytest.approx(1e-4)
    assert ratio_rules.clip_bounds(METHODS["grpo-guard"].config().clip, 65_536, "mean").low == (
        pytest.approx(4e-6, rel=0.03)
    )
    assert ratio_rules.clip_bounds(METHODS["mix-grpo"].config().clip, 129_600, "mean").low == (
        pytest.approx(1e-4)
    )


def test_log_ratios_of_means_shrink_with_the_root_of_the_size():
    """The reason for clips free of size: a shift of .1 spreads of every number, in 64 and in 4096 of them."""
    draws, sizes = torch.Generator().manual_seed(0), {}
    for dimension in (64, 4096):
        noise = torch.randn(400, dimension, generator=draws)
        log_ratio = (0.1 * noise - 0.005).mean(1)
        sizes[dimension] = float(log_ratio.std())
    assert sizes[64] / sizes[4096] == pytest.approx(8, rel=0.15)


def chain_of_shifts(rule, count=256):
    """Return for each stochastic step of a chain of the toy its log-ratio, plain and normalized, after a shift."""
    tuner = tuner_of(
        "flow-grpo", toy_generator(), batch_size=count, group=count, updates=1, guidance=1.0
    )
    tuner.needs_mean = True
    sampler = Sampler(tuner.model.path, tuner.model.kind, [*[rule] * 4, Posterior(0.0)],
                      tuner.model.path.times(5))  # fmt: skip
    tuner._samplers[0] = sampler
    _, (batch,) = tuner.draw(PROMPTS[:1])
    with torch.no_grad():
        tuner.model.denoiser.mean.bias += 1.0
    plain, normalized = {}, {}
    for index in sampler.stochastic:
        with torch.no_grad():
            step = sampler.step(tuner.model.denoiser, batch.samples[index], index, batch.condition)
        log_ratio = (
            step.log_prob(batch.samples[index + 1]).flatten(1).mean(1) - batch.log_prob[index]
        )
        plain[index] = log_ratio
        normalized[index] = ratio_rules.normalized_log_ratio(
            log_ratio, step, batch.mean[index], "mean"
        )
        noise = (batch.samples[index + 1] - batch.mean[index]) / step.std
        expected = (noise * (step.mean - batch.mean[index])).flatten(1).mean(1)
        torch.testing.assert_close(normalized[index], expected, atol=2e-6, rtol=1e-3)
    return plain, normalized


@pytest.mark.parametrize("rule", [FlowSDE(0.7), DanceSDE(0.3), Posterior(1.0), CPS(0.8, True)])
def test_normalized_ratios_have_no_bias_and_belong_to_their_sample(rule):
    """mean(noise * shift), sample by sample, whose mean over samples is 0; a plain one's is below."""
    plain, normalized = chain_of_shifts(rule)
    for index in plain:
        assert normalized[index].shape == (256,)
        error = float(normalized[index].std()) / 16
        assert abs(float(normalized[index].mean())) < 3.5 * error
        assert float(plain[index].mean()) < -2 * float(plain[index].std()) / 16


def gradient_norms(name, **overrides):
    """Return the norm of each step's gradient to the mean of the toy, with advantages of either sign."""
    tuner = tuner_of(
        name, toy_generator(), batch_size=64, group=64, prompts=1, guidance=1.0, noise="flow_sde", kl=0.0,
        denoising_steps=8, updates=1, **overrides,
    )  # fmt: skip
    sampler, (batch,) = tuner.draw(PROMPTS[:1])
    weights = ratio_rules.step_weights(tuner.config.step_weight, sampler)
    advantage, norms = redness(batch.images, None), []
    advantage = (advantage - advantage.mean()) / advantage.std()
    kept = torch.ones(64, dtype=torch.bool)
    for index in sampler.stochastic:
        tuner.model.denoiser.zero_grad()
        loss, _ = tuner.step_loss(sampler, batch, index, advantage, kept)
        (weights[index] * loss).backward()
        norms.append(float(tuner.model.denoiser.mean.bias.grad.norm()))
    return norms


def test_guard_makes_gradients_of_all_steps_alike():
    """Of predictions: what the Gaussian's own mean does to these differs between times, with either."""
    without, with_it = gradient_norms("flow-grpo"), gradient_norms("grpo-guard")
    assert max(with_it) / min(with_it) < 0.6 * max(without) / min(without)


def test_weights_of_steps_have_mean_one_and_the_orders_they_should():
    path = toy_generator().path
    sampler = Sampler(
        path, "velocity", [*[FlowSDE(0.7)] * 4, Posterior(0.0)], path.times(5, shift=3)
    )
    t = [point.t for point in sampler.points]
    for how in ("none", "gain", "noise"):
        weights = ratio_rules.step_weights(how, sampler)
        assert list(weights) == [0, 1, 2, 3]
        assert sum(weights.values()) / 4 == pytest.approx(1)
    gains = ratio_rules.prediction_gains(sampler)
    for index, (now, then) in enumerate(pairwise(t[:5])):
        # d mean / d v = (1 + sigma^2 (1 - t) / (2 t)) dt, of sigma^2 = .49 t / (1 - t); at t = 1 by the next time
        expected = (now - then) * (1 + (0.245 if now < 1 else 0.0))
        assert gains[index] == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------------- clips and the KL


@pytest.mark.parametrize("name", [n for n in POLICY if METHODS[n].config().surrogate == "ppo_clip"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_clips_stop_at_the_wish_and_lead_back_from_the_other_side(name, advantage, side):
    """A ratio beyond its bound has a gradient exactly if the advantage wants it back (DPOK's code has none)."""
    tuner = tuner_of(name, kl=0.0)
    sampler, batches = tuner.draw(PROMPTS[:2])
    batch, index = batches[0], sampler.stochastic[0]
    moved = {index: batch.log_prob[index] - side * 0.5}
    if tuner.config.ratio_norm:  # moved in units of the normalized ratio
        moved = {index: batch.log_prob[index] - side * 5.0}
    batch = dataclasses.replace(batch, log_prob=batch.log_prob | moved)
    kept = torch.ones(len(batch), dtype=torch.bool)
    loss, _ = tuner.step_loss(sampler, batch, index, advantage * kept.float(), kept)
    loss.backward()
    moves = any(
        p.grad is not None and bool(p.grad.any()) for p in tuner.model.denoiser.parameters()
    )
    assert moves == (advantage * side < 0)


def test_the_kl_is_torch_s_and_has_a_gradient():
    tuner = tuner_of("flow-grpo", kl=1.0)
    sampler, batches = tuner.draw(PROMPTS[:2])
    disturbed(tuner)
    batch, index = batches[0], sampler.stochastic[1]
    kept = torch.ones(len(batch), dtype=torch.bool)
    loss, metrics = tuner.step_loss(sampler, batch, index, 0 * kept.float(), kept)
    x = batch.samples[index]
    with torch.no_grad():
        new = sampler.step(tuner.guided(tuner.model), x, index, batch.condition)
        old = sampler.step(tuner.guided(tuner.reference), x, index, batch.condition)
    expected = torch.distributions.kl_divergence(
        Normal(new.mean, new.std), Normal(old.mean, old.std)
    ).mean()
    torch.testing.assert_close(metrics["loss/kl"], expected)
    loss.backward()
    assert any(float(p.grad.norm()) > 0 for p in tuner.model.denoiser.parameters())


def test_the_kl_holds_the_model_at_its_reference():
    """The method's own term: without it, the same steps lead further away."""
    distances = []
    for kl in (0.0, 20.0):
        tuner = tuner_of("flow-grpo", toy_generator(), kl=kl, learning_rate=0.02, guidance=1.0)
        for _ in range(12):
            tuner.update(PROMPTS[:2])
        distances.append(float(tuner.model.denoiser.mean.bias.detach().norm()))
    assert distances[1] < 0.6 * distances[0]


CLIPS_ALLOWED = {
    "agents/core/policy_gradient.py": "the surrogates",
}
"""Files that may bound a ratio of probabilities, and why."""


def test_no_ratio_is_clipped_anywhere_else():
    """No file of agents and experiments but those bounds a ratio, or a name that was made of one."""
    root, found = Path(credit.__file__).parents[2], []
    for folder in ("agents", "experiments"):
        for file in sorted((root / folder).rglob("*.py")):
            name, text = file.relative_to(root).as_posix(), file.read_text()
            if name not in CLIPS_ALLOWED:
                lines = text.splitlines()
                found += [f"{name}:{n}: {lines[n - 1].strip()}" for n in clipped_ratios(text)]
    assert found == []
    for name in CLIPS_ALLOWED:
        assert len(clipped_ratios((root / name).read_text())) >= 3  # the scan sees those there are


@pytest.mark.parametrize(
    "text",
    [
        "ratio.clamp(0.8, 1.2)",
        "torch.clip(r * torch.exp(log_ratio), 1)",
        "log_ratio.exp().clamp(max=1)",
        "r = torch.exp(new_log_prob - log_prob)\nloss = r.clamp(0.8, 1.2)",
        "r = (log_prob - old).exp()\nq = 2 * r\nloss = torch.minimum(q, one)",
        "np.clip(ratio, 0.8, 1.2)",
        "torch.where(ratio > 1.2, 1.2, ratio)",
        "torch.maximum(ratio, low)",
        "F.hardtanh(ratio, 0.8, 1.2)",
        "r = torch.exp(new - old)\nr.clamp(0.8, 1.2)",
        "(x.log_density - old).exp().clamp(0.8, 1.2)",
        "def f(a):\n if a:\n  if a > 1:\n   r = (new - old).exp()\n return r.clamp(0.8, 1.2)",
    ],
)
def test_that_scan_would_find_a_clip(text):
    assert clipped_ratios(text)


@pytest.mark.parametrize(
    "text",
    [
        "x.clamp(0, 1)",
        "ratios_of_sides = 2",
        "w = torch.exp(-x)\nw.clamp(max=1)",
        "torch.where(a > b, a, b)",
    ],
)
def test_that_scan_finds_no_other_bounds(text):
    assert not clipped_ratios(text)


def clipped_ratios(text):
    """Return the lines of calls that bound a ratio: what is named so, or made of one or of a difference's power."""
    tree, lines = ast.parse(text), set()
    for scope in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]:
        nodes = [node for node in ast.walk(scope) if hasattr(node, "lineno")]
        made = set()
        for node in sorted(
            nodes, key=lambda n: (n.lineno, n.col_offset)
        ):  # nested ones in their place
            for name, value in _assigned(node):
                if _is_ratio(value, made):
                    made.add(name)
            if isinstance(node, ast.Call) and any(_is_ratio(b, made) for b in _bounded(node)):
                lines.add(node.lineno)
    return sorted(lines)


RATIO = re.compile(r"(^|[^a-z_])(log_)?ratios?([^a-z_]|$)")
BOUNDS = {
    "clamp", "clip", "clamp_", "clip_", "clamp_min", "clamp_max", "minimum", "maximum", "fmin", "fmax", "hardtanh",
    "hardtanh_", "where", "where_", "masked_fill",
}  # fmt: skip
MODULES = {"torch", "np", "numpy", "F", "functional", "nn.functional", "torch.nn.functional"}


def _is_ratio(value, made):
    """Whether an expression is named a ratio, made of one, or has the power of a difference in it."""
    for node in ast.walk(value):
        if isinstance(node, ast.Name) and node.id in made:
            return True
        if isinstance(node, ast.Call) and _called(node) in ("exp", "expm1"):
            inside = node.args or [node.func.value]
            if any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub) for n in inside):
                return True
    return RATIO.search(ast.unparse(value)) is not None


def _assigned(node):
    """Yield the names that a statement assigns, and the expression behind each."""
    if isinstance(node, ast.Assign):
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Name):
            yield target.id, value
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                yield ast.unparse(one), its
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield ast.unparse(node.target), node.value


def _called(call):
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _bounded(call):
    """Return what a call bounds: `x` of `x.clamp(...)`, all arguments of `torch.clamp(x, ...)`."""
    if _called(call) not in BOUNDS:
        return []
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if owner is None or ast.unparse(owner) in MODULES:
        return call.args
    return [owner, *call.args] if _called(call) in ("minimum", "maximum", "where") else [owner]


# --------------------------------------------------------------------------------- passes and credit


@pytest.mark.parametrize("name", ["flow-grpo", "grpo-guard"])
def test_a_batch_of_one_equals_a_batch_of_many(name):
    """The loss of a pass is the sum of those of its images alone: nothing is averaged or flattened across."""
    tuner = tuner_of(name, batch_size=6, group=3, updates=1, kl=0.5)
    sampler, batches = tuner.draw(PROMPTS[:2])
    disturbed(tuner)
    batch, index = batches[0], sampler.stochastic[1]
    advantage, kept = torch.linspace(-1, 2, 6), torch.ones(6, dtype=torch.bool)
    together, _ = tuner.step_loss(sampler, batch, index, advantage, kept)
    alone = []
    for place in range(6):
        some = slice(place, place + 1)
        one = dataclasses.replace(
            batch,
            prompts=batch.prompts[some],
            condition=batch.condition[some],
            samples=batch.samples[:, some],
            log_prob={i: values[some] for i, values in batch.log_prob.items()},
            mean={i: values[some] for i, values in batch.mean.items()},
        )
        alone.append(tuner.step_loss(sampler, one, index, advantage[some], kept[some])[0])
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "batch_size", "updates"), [(8, 3, 2), (8, 32, 4), (5, 2, 3), (3, 4, 8)]
)
def test_gradient_steps_share_out_images_and_never_a_chain_s_steps(
    monkeypatch, images, batch_size, updates
):
    """Every image is in one gradient step, with all its steps, and these are as many as there can be."""
    tuner = tuner_of("flow-grpo", group=images, batch_size=batch_size, updates=updates)
    steps, backward = [], tuner._backward
    monkeypatch.setattr(
        tuner,
        "_backward",
        lambda s, pairs, *given: steps.append(pairs) or backward(s, pairs, *given),
    )
    sampler, _ = tuner.draw(PROMPTS[:1])
    tuner.update(PROMPTS[:1])
    learned = []
    for pairs in steps:
        passes = {id(each.batch): each.batch for each, _ in pairs}
        for number, batch in passes.items():
            assert len(batch) <= batch_size
            assert sorted(i for each, i in pairs if id(each.batch) == number) == list(
                sampler.stochastic
            )
        learned += list(passes)
    assert len(steps) == min(images, updates)
    assert len(set(learned)) == len(learned)
    sizes = {id(each.batch): len(each.batch) for pairs in steps for each, _ in pairs}
    assert sum(sizes.values()) == images


def test_a_prompt_is_compared_with_its_own_rewards_from_its_first_group_on():
    """At DDPO's threshold of 16, groups of 8 and prompts that hardly come again are compared with each other."""
    reward = torch.tensor([0.0] * 4 + [1.0] * 4 + [10.0] * 4 + [11.0] * 4)
    prompts, group = ["a"] * 8 + ["b"] * 8, torch.arange(2).repeat_interleave(8)

    def advantages(**overrides):
        config = find_method("ddpo").config(**overrides)
        history = ConditionStatistics(config.history, config.history_least)
        return image_advantage(reward, group, prompts, config, history).advantage

    own = torch.tensor(([-1.0] * 4 + [1.0] * 4) * 2)
    torch.testing.assert_close(advantages(), own, atol=1e-4, rtol=0)
    assert float(advantages(history_least=16)[:8].max()) < -0.5
    assert tuner_of("ddpo", history_least=3).history.at_least == 3


def test_images_of_groups_that_are_all_alike_do_not_count():
    tuner = tuner_of("flow-grpo", reward=lambda images, prompts: torch.ones(len(prompts)))
    before = [p.clone() for p in tuner.model.denoiser.parameters()]
    metrics = tuner.update(PROMPTS[:2])
    assert metrics["reward/kept"] == 0
    assert "loss/policy" not in metrics
    for old, new in zip(before, tuner.model.denoiser.parameters(), strict=True):
        assert torch.equal(old, new)


def test_prompts_are_encoded_once_and_guidance_is_one_pass(monkeypatch):
    tuner = tuner_of("flow-grpo", kl=0.0, step_share=1.0, updates=1)
    asked, sizes, encode = [], [], tuner.model.encode
    monkeypatch.setattr(tuner.model, "encode", lambda p: asked.extend(p) or encode(p))
    tuner.model.denoiser.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    for _ in range(2):
        tuner.update([PROMPTS[0], PROMPTS[1]])
    assert sorted(asked) == sorted(["", *PROMPTS[:2]])
    # 8 images in passes of 3, 3, 2 of twice the size: 5 steps of drawing and 4 of learning, and nothing beside.
    assert sorted(sizes) == sorted([6, 6, 4] * 9 * 2)
    assert tuner.evaluations == sum(sizes)
    assert tuner.scored == 16


def test_windows_move_and_are_where_the_noise_is():
    config = settings("mix-grpo", denoising_steps=6, window=2, window_every=3).on_path(is_flow=True)
    draws = torch.Generator()
    starts = [chains.window_start(config, iteration, draws) for iteration in range(16)]
    assert starts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0, 1]
    for start in range(chains.window_starts(config)):
        rules = chains.step_rules(config, start)
        sampler = toy_generator().sampler(6, rules)
        assert sampler.stochastic == (start, start + 1)
    random = dataclasses.replace(config, window_moves="random")
    seen = {chains.window_start(random, 0, draws) for _ in range(60)}
    assert seen == set(range(chains.window_starts(config)))


def test_groups_share_their_noise_where_asked():
    tuner = tuner_of("dance-grpo", batch_size=8, updates=1)
    _, (batch,) = tuner.draw(PROMPTS[:2])
    start = batch.samples[0]
    assert torch.equal(start[0], start[3])
    assert not torch.equal(start[0], start[4])
    assert not torch.equal(batch.images[0], batch.images[3])


def test_shares_of_steps_are_learned_from():
    tuner = tuner_of("dance-grpo", denoising_steps=6)
    chosen = [tuner._chosen_steps(tuner.sampler()) for _ in range(20)]
    assert {len(steps) for steps in chosen} == {3}  # .6 of 5
    assert {step for steps in chosen for step in steps} == {0, 1, 2, 3, 4}


def test_best_and_worst_are_those_of_a_loop():
    draws = torch.Generator().manual_seed(1)
    reward = torch.randint(0, 4, (60,), generator=draws).float()
    group = torch.arange(60) % 7
    reward[group == 2] = 1.0
    best, worst = credit.best_and_worst(reward, group)
    expected = []
    for number in range(7):
        places = [i for i in range(60) if group[i] == number]
        if number != 2:
            expected.append(
                (max(places, key=lambda i: reward[i]), min(places, key=lambda i: reward[i]))
            )
    assert list(zip(best.tolist(), worst.tolist(), strict=True)) == expected
    kept = credit.best_of_group(reward, group, 2)
    assert len(kept) == 12
    assert set(best.tolist()) <= set(kept.tolist())


def test_values_are_learned_and_taken_off():
    """DPOK: with a reward that depends on the prompt alone, nothing is left to be learned of images."""
    reward = {prompt: float(place) for place, prompt in enumerate(PROMPTS)}
    tuner = tuner_of(
        "dpok", toy_generator(), lambda images, prompts: torch.tensor([reward[p] for p in prompts]),
        value_updates=60, value_learning_rate=3e-3, learning_rate=1e-12, guidance=1.0,
    )  # fmt: skip
    for _ in range(4):
        error = tuner.update(PROMPTS)["loss/value"]
    assert error < 0.3  # the rewards' variance is 1.25


# --------------------------------------------------------------------------- gradients of the reward


def test_a_truncated_chain_s_gradient_is_that_of_detached_predictions():
    """As in the paper: early predictions are constants, whatever x depends on."""
    model = toy_generator()
    with torch.no_grad():
        model.denoiser.mean.bias += 0.1
    model.denoiser.requires_grad_(True)
    sampler = model.sampler(5, Posterior(0.0))
    start = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(2))
    condition = model.encode(PROMPTS[:3]).detach()
    weight = model.denoiser.mean.bias
    for count in (1, 3, 5):
        values = []
        for recompute in (False, True):
            x = truncated_chain(
                sampler, model.denoiser, start, condition, count, recompute=recompute
            )
            values.append(torch.autograd.grad((x**2).sum(), weight)[0])
        torch.testing.assert_close(*values)
        x = start
        for index in range(5):
            detach = index < 5 - count

            def denoiser(x, t, c, detach=detach):
                said = model.denoiser(x, t, c)
                return said.detach() if detach else said

            x = sampler.step(denoiser, x, index, condition).mean
        torch.testing.assert_close(values[0], torch.autograd.grad((x**2).sum(), weight)[0])


def test_the_whole_chain_s_gradient_is_a_finite_difference():
    model = toy_generator().double()
    model.denoiser.requires_grad_(True)
    sampler = model.sampler(4, Posterior(0.0))
    start = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(2)).double()
    condition = model.encode(PROMPTS[:2]).detach()

    def value():
        x = truncated_chain(sampler, model.denoiser, start, condition, 4, recompute=True)
        return redness(model.decode(0.1 * x), None).sum()

    (gradient,) = torch.autograd.grad(value(), model.denoiser.mean.bias)
    with torch.no_grad():
        ends = []
        for side in (1e-4, -1e-4):
            model.denoiser.mean.bias[5] += side
            ends.append(value())
            model.denoiser.mean.bias[5] -= side
    torch.testing.assert_close(gradient[5], (ends[0] - ends[1]) / 2e-4, rtol=1e-4, atol=1e-9)


def test_rewards_without_a_gradient_are_refused():
    with pytest.raises(UserError, match="gradient"):
        tuner_of("alignprop", reward=lambda images, p: redness(images, p).detach()).update(PROMPTS)

    def declared(images, prompts):
        return redness(images, prompts)

    declared.differentiable = False
    with pytest.raises(UserError, match="flow-grpo"):
        tuner_of("refl", reward=declared)


# -------------------------------------------------------------------------------- state and mistakes


def test_the_average_is_lent_in_the_parameters_place_and_draws_nothing():
    tuner, plain = (tuner_of("flow-grpo", average_decay=decay, updates=1) for decay in (0.75, 0.0))
    expected = [p.detach().clone() for p in tuner.model.denoiser.parameters()]
    for _ in range(3):
        metrics, same = tuner.update(PROMPTS[:2]), plain.update(PROMPTS[:2])
        assert (
            metrics["reward/mean"] == same["reward/mean"]
        )  # images of training are the model's own
        assert metrics["ratio/first_deviation"] == 0
        now = [p.detach().clone() for p in tuner.model.denoiser.parameters()]
        expected = [0.75 * old + 0.25 * new for old, new in zip(expected, now, strict=True)]
    with tuner.averaged() as model:
        lent = [p.detach().clone() for p in model.denoiser.parameters()]
        state = model.denoiser.state_dict()
    torch.testing.assert_close(lent, expected)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), lent, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(lent, now, strict=True))
    for before, after in zip(now, tuner.model.denoiser.parameters(), strict=True):
        assert torch.equal(before, after)
    with plain.averaged() as model:
        assert model is plain.model


@pytest.mark.parametrize("name", [*METHODS, "averaged"])
def test_state_that_is_restored_goes_on_exactly(name):
    options = {"average_decay": 0.9} if name == "averaged" else {}
    name = "flow-grpo" if name == "averaged" else name
    options |= {"group": 1} if METHODS[name].settings.get("group") == 1 else {}
    straight = tuner_of(name, **options)
    for _ in range(3):
        straight.update(PROMPTS[:2])
    first = tuner_of(name, **options)
    first.update(PROMPTS[:2])
    tree = first.state_dict()
    second = tuner_of(name, tiny_network(seed=5), **options)
    second.load_state_dict(tree)
    for _ in range(2):
        second.update(PROMPTS[:2])
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    if options.get("average_decay"):
        for one, other in zip(
            straight.average.parameters(), second.average.parameters(), strict=True
        ):
            assert torch.equal(one, other)
    assert straight.extra_state() == second.extra_state()


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        (lambda images, prompts: images.mean((1, 2)), "returned a Tensor of shape"),
        (lambda images, prompts: ["a"] * len(prompts), "returned a list for"),
        (lambda images, prompts: torch.tensor(1.0), "one number for each"),
        (lambda images, prompts: torch.full((len(prompts),), math.nan), "is nan for the prompt 'a"),
    ],
)
def test_bad_rewards_are_named(reward, match):
    with pytest.raises(UserError, match=match):
        tuner_of("flow-grpo", reward=reward).update(PROMPTS[:2])


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"group": 1}, "at least 2"),
        ({"window": 5}, "window is 5 of 5"),
        ({"denoising_steps": 1, "window": 0}, "draw no noise"),
        ({"noise_level": 0.0}, "draw no noise"),
        ({"step_share": 0.0}, "share above 0"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"surrogate": "ppo"}, "surrogate is ppo"),
        ({"log_prob": "median"}, "log_prob is median"),
        ({"spread": "all"}, "spread is all"),
        ({"step_weight": "gains"}, "step_weight is gains"),
        ({"preference": "kto"}, "preference is kto"),
        ({"window_moves": "back"}, "window_moves is back"),
        ({"reward_ceiling": math.nan}, "reward_ceiling is nan"),
        ({"objective": "imitation", "best": 4}, "fewer than all"),
        ({"noise_level": -0.1}, "noise_level is -0.1"),
    ],
)
def test_impossible_settings_are_refused(overrides, match):
    with pytest.raises(UserError, match=match):
        tuner_of("flow-grpo", **overrides)


OTHER_VALUES = {
    "noise": "cps", "noise_level": 0.5, "window": 2, "window_moves": "random", "window_every": 1, "shared_noise": True,
    "credit": "leave_one_out", "spread": "none", "advantage_limit": 0.1, "history": 3, "history_least": 2,
    "value_updates": 1, "value_learning_rate": 0.3, "surrogate": "spo", "clip": 1e-6, "log_prob": "sum",
    "ratio_norm": True, "step_weight": "noise", "step_share": 0.3, "kl": 0.7, "preference": "ipo", "beta": 7.0,
    "best": 2, "draws": 3, "gradient_steps": 3, "checkpoint_activations": False, "reward_ceiling": -9.0,
}  # fmt: skip


@pytest.mark.parametrize("name", [*METHODS, "windowed"])
def test_what_an_objective_does_not_read_changes_nothing(name):
    """And what it reads it does read: `fields_read` is the truth, by which flags are refused."""
    overrides = {"window": 2, "window_moves": "random"} if name == "windowed" else {}
    name = "flow-grpo" if name == "windowed" else name
    overrides |= {"group": 1} if METHODS[name].settings.get("group") == 1 else {}
    config, asked = settings(name, **overrides), set()
    read = config.fields_read()
    unread = {f.name for f in dataclasses.fields(config)} - set(read)
    assert unread <= set(OTHER_VALUES)
    other = dataclasses.replace(config, **{name: OTHER_VALUES[name] for name in unread})
    assert other != config

    class Asked(TuningConfig):
        def __getattribute__(self, attribute):
            asked.add(attribute)
            return super().__getattribute__(attribute)

    results = []
    for each in (config, other):
        tuner = make_tuner(toy_generator(), redness, each, seed=3)
        listening = Asked(**dataclasses.asdict(tuner.config))
        asked.clear()
        tuner.config = listening
        for _ in range(2):
            tuner.update(PROMPTS[:2])
        results.append(list(tuner.model.denoiser.parameters()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    at_once = {
        "objective", "noise", "noise_level", "denoising_steps", "clip", "learning_rate", "weight_decay",
        "average_decay", "history", "history_least", "value_learning_rate", "shift", "max_gradient_norm", "prompts",
    }  # fmt: skip
    assert set(read) <= asked | at_once  # those are read when a tuner is made, or by the loop


@pytest.mark.parametrize(("path", "rule"), [("flow", FlowSDE(0.7)), ("cosine", Posterior(1.0))])
def test_noise_that_nobody_chose_fits_the_path(path, rule):
    """On a diffusion the flow SDE's first step leaves 4.7 times the noise that the network expects, and more."""
    tuner = tuner_of("flow-grpo", tiny_network(path=path))
    assert tuner.sampler().rules[:-1] == [rule] * 4
    assert (tuner.config.noise, tuner.config.noise_level) != ("auto", None)
    assert chains.largest_excess(tuner.sampler()) < 1.5
    for given in ({"noise": "flow_sde"}, {"noise": "flow_sde", "noise_level": 0.7}):
        asked = tuner_of("flow-grpo", tiny_network(path="cosine"), denoising_steps=10, **given)
        assert chains.largest_excess(asked.sampler()) == pytest.approx(4.685, abs=0.001)


def test_a_reward_sees_no_more_images_at_once_than_a_pass_has():
    seen = []

    def reward(images, prompts):
        seen.append(len(prompts))
        return redness(images, prompts)

    tuner = tuner_of("flow-grpo", reward=reward)
    _, batches = tuner.draw(PROMPTS[:2])
    values = tuner.score_batches(batches)
    images = torch.cat([batch.images for batch in batches])
    torch.testing.assert_close(values, redness(images, None))
    assert seen == [len(batch) for batch in batches]
    assert max(seen) <= tuner.config.batch_size < len(images)
    seen.clear()
    again = credit.rewards_in_batches(reward, images, PROMPTS[:1] * len(images), batch=3)
    assert torch.equal(again, values.cpu())
    assert seen == [3, 3, 2]


@pytest.mark.parametrize("recompute", [True, False])
def test_activations_that_are_computed_again_are_no_evaluations(recompute):
    tuner = tuner_of(
        "alignprop",
        group=1,
        prompts=4,
        batch_size=4,
        guidance=2.0,
        checkpoint_activations=recompute,
    )
    for _ in range(3):
        tuner.update(PROMPTS)
    assert tuner.evaluations == 3 * 4 * 5 * 2  # iterations, images, steps, both halves of guidance


def test_a_gradient_step_of_d3po_is_of_all_stochastic_steps():
    """Its gradient is that of the mean over steps of their losses."""
    tuner = tuner_of("d3po", updates=1, batch_size=8)
    sampler, batches = tuner.draw(PROMPTS[:2])
    disturbed(tuner)
    drawn = preference_tuning._Drawn(batches, tuner.score_batches(batches))
    places = tuner.select(drawn)
    tuner._backward(sampler, drawn, places)
    weight = next(tuner.model.denoiser.parameters())
    found = weight.grad.clone()
    assert len(sampler.stochastic) == 4
    x, condition = drawn.samples, drawn.condition
    losses = []
    for index in sampler.stochastic:
        margin = []
        for row in places:
            step = sampler.step(tuner.guided(tuner.model), x[index, row], index, condition[row])
            old = sampler.step(tuner.guided(tuner.reference), x[index, row], index, condition[row])
            now, then = (
                Normal(s.mean, s.std).log_prob(x[index + 1, row]).flatten(1).sum(1)
                for s in (step, old)
            )
            margin.append(now - then)
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (margin[0] - margin[1])).mean())
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_unknown_methods_get_the_nearest_names_and_no_prompt_is_refused():
    with pytest.raises(UserError, match="flow-grpo"):
        find_method("flow-gpro")
    with pytest.raises(UserError, match="no prompt"):
        tuner_of("flow-grpo").update([])


def test_parts_cover_all_and_differ_by_one():
    for count in (1, 2, 3, 5, 9):
        pieces = list(parts(list(range(7)), count))
        assert [item for piece in pieces for item in piece] == list(range(7))
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
