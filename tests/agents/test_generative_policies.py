"""Policies of chunks: losses, chains and their log-probabilities, correlated noise, inpainting, against references."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from agents.core.chain_steps import Limits, reduce_log_prob, standard_normal
from agents.core.demonstrations import Demonstrations
from agents.core.errors import UserError
from agents.core.fields import observation_boxes
from agents.core.step_rules import FlowSDE, LearnedNoise, Posterior
from agents.generative_policies.gaussian import GaussianConfig, GaussianPolicy
from agents.generative_policies.noise import ChunkNoise
from agents.generative_policies.parts import DenoisingConfig
from agents.generative_policies.policy import DenoisingPolicy

H, A = 6, 2
STATE = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
CHUNK = gym.spaces.Box(-1, 1, (4, A), np.float32)
SMALL = DenoisingConfig(
    horizon=H, width=32, blocks=1, time_features=8, encoder="small", feature_dim=8, channels=(8, 16)
)
DIFFUSION: dict[str, Any] = {
    "path": "diffusion", "train_steps": 20, "prediction": "noise", "rule": "posterior", "clip_x0": 1.0,
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(space: gym.Space = STATE, action: gym.Space = CHUNK, **changes: Any) -> DenoisingPolicy:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **changes)
    policy = DenoisingPolicy(observation_boxes(space), action, config)
    with torch.no_grad():  # a transformer begins at 0, where nothing can go wrong
        for parameter in policy.denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(1)))
    return policy


def states(count: int = 5) -> dict[str, Tensor]:
    return {"state": torch.randn(count, 3, generator=generator(3)).clamp(-1, 1)}


def smooth(rows: int = 400) -> Demonstrations:
    """Return demonstrations whose actions change slowly."""
    random = np.random.default_rng(0)
    single = gym.spaces.Box(-1, 1, (A,), np.float32)
    data = Demonstrations(STATE, single, rows=rows, horizon=H, log=lambda _: None)
    for _ in range(rows // 40):
        walk = np.cumsum(0.1 * random.normal(size=(40, A)), axis=0)
        data.add(random.uniform(-2, 6, (40, 3)), walk.clip(-1, 1))
    return data


KINDS: list[dict[str, Any]] = [
    {"rule": "flow_sde", "noise_level": 0.7},
    {"rule": "posterior", "noise_level": 1.0, "min_std": 0.1, "denoiser": "unet"},
    {**DIFFUSION, "noise_level": 1.0, "denoiser": "dit"},
    {**DIFFUSION, "noise_level": 0.5, "clip_x0": 0.0, "noise_correlation": 0.5},
    {"rule": "flow_sde", "noise_level": 0.7, "noise_correlation": 0.7},
]


@pytest.mark.parametrize("changes", KINDS)
def test_a_chains_log_probability_is_found_again_exactly_and_is_the_gaussians(
    changes: dict[str, Any],
) -> None:
    policy = make(**changes)
    policy.prepare(smooth())
    seen = states()
    chain = policy.chain(seen, generator())
    again = policy.log_prob(seen, chain)
    assert torch.equal(again, chain.log_prob), "the ratio begins at exactly 1"
    assert chain.data.abs().max() <= 1
    condition = policy.condition(seen)
    for number, index in enumerate(chain.stochastic):
        step = policy.acting.step(policy.denoise, chain.samples[index], index, condition)
        reference = torch.distributions.Normal(step.mean, step.std)
        torch.testing.assert_close(
            again[number], reference.log_prob(chain.samples[index + 1]), atol=1e-4, rtol=1e-4
        )
    with torch.no_grad():  # and it is the parameters' now, not the old ones'
        next(policy.denoiser.parameters()).add_(0.5)
    assert not torch.allclose(policy.log_prob(seen, chain), chain.log_prob)


def test_learned_noise_gives_a_ratio_of_one_too() -> None:
    policy = make()
    sampler = policy.sampler(LearnedNoise(), steps=4, limits=Limits(sample=1.0))

    def spread(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return (0.1 + 0.1 * torch.sigmoid(condition[:, :1])).unsqueeze(-1)

    seen = states()
    chain = policy.chain(seen, generator(), sampler=sampler, noise_network=spread)
    assert len(chain.stochastic) == 4
    again = policy.log_prob(seen, chain, sampler=sampler, noise_network=spread)
    assert torch.equal(again, chain.log_prob)


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("changes", KINDS[:3])
def test_log_probabilities_are_taken_at_the_times_that_were_sampled_at(
    changes: dict[str, Any], steps: int
) -> None:
    """ReinFlow sampled at linspace(0, 1, K) and took log-probabilities at linspace(0, 1 - 1/K, K)."""
    policy = make(**{**changes, "denoising_steps": steps, "min_std": 0.1})
    asked: list[float] = []
    policy.denoiser.register_forward_pre_hook(lambda _, inputs: asked.append(float(inputs[1][0])))
    chain = policy.chain(states(), generator())
    sampled = list(asked)
    asked.clear()
    policy.log_prob(states(), chain)
    assert asked == [sampled[index] for index in chain.stochastic]
    assert len(set(sampled)) == len(sampled) == steps


@pytest.mark.parametrize("changes", KINDS)
def test_a_batch_of_one_gives_what_a_batch_of_many_gives(changes: dict[str, Any]) -> None:
    policy = make(**changes)
    policy.prepare(smooth())
    seen = states(4)
    many = policy.sample(seen, [generator(i) for i in range(4)])
    for i in range(4):
        one = policy.sample({"state": seen["state"][i : i + 1]}, [generator(i)])
        # Where x0 is not clipped, the first step of a diffusion multiplies rounding by 1 / alpha, here 100.
        torch.testing.assert_close(one[0], many[i], atol=1e-3, rtol=0)


def test_zero_noise_and_deterministic_rules_need_no_generator() -> None:
    policy = make(start_noise=0.0, denoising_steps=3)
    first = policy.sample(states())
    assert torch.equal(first, policy.sample(states()))
    x, condition = torch.zeros(5, H, A), policy.condition(states())
    for i in range(3):  # Euler from zeros, by hand
        t = torch.full((5,), 1 - i / 3)
        x = x - policy.denoiser(x, t, condition) / 3
    torch.testing.assert_close(first, x.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="chains start from noise; give a generator"):
        make().sample(states())


def test_few_steps_are_a_samplers_not_the_policys() -> None:
    policy = make(denoising_steps=10)
    asked: list[float] = []
    policy.denoiser.register_forward_pre_hook(lambda _, inputs: asked.append(float(inputs[1][0])))
    policy.sample(states(), generator(), sampler=policy.sampler(steps=2))
    assert asked == [1.0, 0.5]
    policy.sample(states(), generator(), sampler=policy.sampler(Posterior(1.0), steps=3))
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("path", "prediction"),
    [
        ("flow", "x0"),
        ("flow", "v"),
        ("flow", "velocity"),
        ("diffusion", "noise"),
        ("diffusion", "v"),
    ],
)
def test_the_loss_is_the_mean_squared_error_at_the_drawn_noise_and_time(
    path: str, prediction: str
) -> None:
    policy = make(path=path, prediction=prediction, train_steps=20)
    seen, chunk = states(), torch.rand(5, H, A, generator=generator(5)) * 2 - 1
    mask = torch.arange(H).expand(5, H) < torch.tensor([[6], [3], [1], [6], [2]])
    drawn = generator(7)
    t = (1 - torch.rand(5, generator=drawn)).clamp(1e-5, 1)
    noise = torch.randn(5, H, A, generator=drawn)
    alpha, sigma = 1 - t, t
    if path == "diffusion":  # Nichol & Dhariwal's cosine in 20 steps, as a running product
        t = (t * 20).ceil() / 20
        kept = torch.cos((torch.arange(21) / 20 + 0.008) / 1.008 * torch.pi / 2) ** 2
        product = (1 - (1 - kept[1:] / kept[:-1]).clamp(max=0.999)).cumprod(0)
        alpha = product[(t * 20).round().long() - 1].sqrt()
        sigma = (1 - alpha**2).sqrt()
    loss = policy.loss(seen, chunk, generator(7), mask=mask)
    alpha, sigma = alpha[:, None, None], sigma[:, None, None]
    target = {
        "noise": noise,
        "x0": chunk,
        "v": alpha * noise - sigma * chunk,
        "velocity": noise - chunk,
    }[prediction]
    said = policy.denoiser(alpha * chunk + sigma * noise, t, policy.condition(seen))
    for i in range(5):
        expected = (said[i] - target[i])[mask[i]].square().mean()
        torch.testing.assert_close(loss[i], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        loss, policy.loss_at(policy.condition(seen), chunk, noise, t, mask=mask)
    )


def test_several_draws_share_one_pass_through_the_encoder_and_average() -> None:
    policy = make()
    passes: list[int] = []
    policy.condition.register_forward_hook(lambda *_: passes.append(1))
    seen, chunk = states(2), torch.zeros(2, H, A)
    mask = torch.ones(2, H, dtype=torch.bool)
    mask[1, 2:] = False
    many = policy.loss(seen, chunk, generator(0), mask=mask, draws=4000)
    assert len(passes) == 1
    assert many.shape == (2,)
    single = [policy.loss(seen, chunk, generator(i), mask=mask) for i in range(1, 1500)]
    mean, error = torch.stack(single).mean(0), torch.stack(single).std(0) / 1500**0.5
    assert ((many - mean).abs() < 5 * error).all()


COLUMNS = {
    "front": range(8),
    "language": range(8, 16),
    "state": range(16, 19),
    "wrist": range(19, 27),
}
"""Of the condition in the next test."""


def test_the_network_learns_from_the_loss_and_the_encoder_does() -> None:
    space = gym.spaces.Dict(
        {
            "front": gym.spaces.Box(0, 255, (6, 24, 24), np.uint8),
            "wrist": gym.spaces.Box(0, 255, (3, 24, 24), np.uint8),
            "state": STATE,
            "language": gym.spaces.Box(-np.inf, np.inf, (7,), np.float32),
        }
    )
    policy = make(space)
    seen = {
        "front": torch.randint(0, 256, (4, 6, 24, 24), dtype=torch.uint8, generator=generator()),
        "wrist": torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=generator(1)),
        **states(4),
        "language": torch.randn(4, 7, generator=generator(2)),
    }
    assert policy.condition.out_features == 8 + 8 + 3 + 8
    policy.loss(seen, torch.zeros(4, H, A), generator()).mean().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    base = policy.condition(seen)
    for name, columns in COLUMNS.items():
        other = policy.condition({**seen, name: seen[name].flip(0)})
        moved = (other != base).any(0).nonzero()[:, 0].tolist()
        assert set(moved) <= set(columns), "every part has its own columns"
        assert moved


def test_states_are_brought_to_the_range_that_the_data_had() -> None:
    policy, data = make(), smooth()
    policy.prepare(data)
    seen = policy.condition({"state": data.column("state")})
    assert seen.amin(0).tolist() == pytest.approx([-1] * 3, abs=1e-6)
    assert seen.amax(0).tolist() == pytest.approx([1] * 3, abs=1e-6)
    far = policy.condition({"state": torch.full((1, 3), 1e6)})
    assert far.tolist() == [[5.0] * 3]


# -------------------------------------------------------------------------------- correlated noise


def test_noise_has_the_shrunk_correlation_of_the_chunks() -> None:
    data = smooth()
    chunks = torch.cat([batch.chunk for batch in data.batches(64)])
    noise = ChunkNoise(H, A, 0.5)
    noise.fit(batch.chunk for batch in data.batches(64))
    correlation = np.corrcoef(chunks.flatten(1).numpy().T)
    expected = 0.5 * correlation + 0.5 * np.eye(H * A)
    np.testing.assert_allclose((noise.factor @ noise.factor.T).numpy(), expected, atol=1e-5)
    drawn = noise.color(torch.randn(200_000, H, A, generator=generator()))
    np.testing.assert_allclose(np.cov(drawn.flatten(1).numpy().T), expected, atol=0.02)
    white = torch.randn(8, H, A, generator=generator())
    torch.testing.assert_close(noise.whiten(noise.color(white)), white, atol=1e-5, rtol=1e-5)


def test_an_action_that_never_varies_is_correlated_with_nothing() -> None:
    chunk = torch.randn(500, H, A, generator=generator()).cumsum(1)
    chunk[..., 1] = 0.3
    noise = ChunkNoise(H, A, 0.9)
    noise.fit([chunk])
    assert noise.factor.isfinite().all()
    still = noise.factor.reshape(H, A, H, A)[:, 1]
    assert torch.equal(still.sum(dim=(1, 2)), torch.ones(H))


def test_actions_beyond_an_episodes_end_are_correlated_with_nothing() -> None:
    """Short episodes of white noise: as padded, the last action is there several times, and 1 with itself."""
    random = np.random.default_rng(0)
    single = gym.spaces.Box(-1, 1, (A,), np.float32)
    length, episodes = H + 2, 400
    data = Demonstrations(STATE, single, rows=length * episodes, horizon=H, log=lambda _: None)
    for _ in range(episodes):
        data.add(random.uniform(-2, 6, (length, 3)), random.uniform(-1, 1, (length, A)))
    policy = make(noise_correlation=0.9)
    policy.prepare(data)
    assert policy.noise is not None
    told = policy.noise.factor @ policy.noise.factor.T
    assert (told - torch.eye(H * A)).abs().max() < 0.15, (
        "3 whole chunks an episode are a small sample"
    )
    padded = torch.cat([batch.chunk for batch in data.batches(1024)]).flatten(1)
    assert np.corrcoef(padded.numpy().T)[-1, -1 - A] > 0.5
    short = Demonstrations(STATE, single, rows=H - 1, horizon=H, log=lambda _: None)
    short.add(np.zeros((H - 1, 3)), np.zeros((H - 1, A)))
    with pytest.raises(UserError, match=f"as long as a chunk of {H} actions.*lower --horizon"):
        policy.prepare(short)


def test_a_chain_in_white_coordinates_is_eulers_with_correlated_noise() -> None:
    policy = make(noise_correlation=0.6, denoising_steps=5)
    policy.prepare(smooth())
    assert policy.noise is not None
    seen = states()
    chunks = policy.sample(seen, generator())
    x = policy.noise.color(standard_normal((5, H, A), generator()))
    for i in range(5):
        t = torch.full((5,), 1 - i / 5)
        x = x - policy.denoiser(x, t, policy.condition(seen)) / 5
    torch.testing.assert_close(chunks, x.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_ratios_in_white_coordinates_are_those_of_the_correlated_gaussian() -> None:
    policy = make(rule="flow_sde", noise_level=0.7, noise_correlation=0.6, denoising_steps=3)
    policy.prepare(smooth())
    assert policy.noise is not None
    seen = states()
    chain = policy.chain(seen, generator())
    before = policy.log_prob(seen, chain)
    references = []
    for _ in range(2):
        condition, total = policy.condition(seen), []
        for index in chain.stochastic:
            step = policy.acting.step(policy.denoise, chain.samples[index], index, condition)
            spread = step.std * policy.noise.factor
            normal = torch.distributions.MultivariateNormal(
                policy.noise.color(step.mean).flatten(1), scale_tril=spread
            )
            total.append(normal.log_prob(policy.noise.color(chain.samples[index + 1]).flatten(1)))
        references.append(torch.stack(total))
        with torch.no_grad():
            next(policy.denoiser.parameters()).add_(0.05)
    with torch.no_grad():
        next(policy.denoiser.parameters()).sub_(0.05)
    after = policy.log_prob(seen, chain)
    ours = torch.stack([reduce_log_prob(a - b, "sum") for a, b in zip(after, before, strict=True)])
    torch.testing.assert_close(ours, references[1] - references[0], atol=2e-3, rtol=2e-3)


def test_inpainting_keeps_known_actions_and_moves_the_others_as_the_conditional_gaussian() -> None:
    policy = make(noise_correlation=0.6, inpaint=True, inpaint_until=0.0)
    policy.prepare(smooth())
    assert policy.noise is not None
    previous = torch.rand(5, 2, A, generator=generator(9)) - 0.5
    previous[3] = torch.nan  # an episode begins
    chunks = policy.sample(states(), generator(), previous=previous)
    known = [0, 1, 2, 4]
    torch.testing.assert_close(chunks[known, :2], previous[known], atol=1e-5, rtol=1e-5)
    free = policy.sample(states(), generator())
    torch.testing.assert_close(chunks[3], free[3], atol=1e-5, rtol=1e-5)
    # The correction that the authors add by hand: R_UO R_OO^-1 (what the known part was moved by).
    white = torch.randn(1, H, A, generator=generator())
    moved = white.clone()
    moved[:, :2] += torch.randn(1, 2, A, generator=generator(1))
    before, after = (policy.noise.color(u).flatten() for u in (white, moved))
    correlation = policy.noise.factor @ policy.noise.factor.T
    size = 2 * A
    gain = correlation[size:, :size] @ torch.linalg.inv(correlation[:size, :size])
    torch.testing.assert_close(
        after[size:] - before[size:], gain @ (after - before)[:size], atol=1e-4, rtol=1e-4
    )


def test_soft_inpainting_leaves_the_last_steps_free() -> None:
    hard, soft, never = (
        make(inpaint=True, inpaint_until=until, denoising_steps=10) for until in (0.0, 0.3, 1.0)
    )
    previous = torch.full((5, 2, A), 0.9)
    far = []
    for policy in (hard, soft, never):
        chunks = policy.sample(states(), generator(), previous=previous)
        far.append(float((chunks[:, :2] - 0.9).abs().mean().detach()))
    assert far[0] < 1e-5 < far[1] < far[2]
    assert torch.equal(
        never.sample(states(), generator(), previous=previous), never.sample(states(), generator())
    )


# ------------------------------------------------------------------------------------------ others


def test_a_gaussian_policys_loss_is_its_negative_log_likelihood() -> None:
    torch.manual_seed(0)
    policy = GaussianPolicy(
        observation_boxes(STATE), CHUNK, GaussianConfig(horizon=H, width=16, blocks=1)
    )
    with torch.no_grad():
        policy.log_std.copy_(torch.randn(H, A) - 2)
    seen, chunk = states(), torch.rand(5, H, A) * 2 - 1
    mean, std = policy(seen)
    lowest = torch.tensor(policy.config.smallest_std).log()
    softplus = torch.nn.functional.softplus(policy.log_std - lowest)
    torch.testing.assert_close(std, (lowest + softplus).exp())
    assert std.min() >= policy.config.smallest_std
    reference = -torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(chunk)
    torch.testing.assert_close(policy.loss(seen, chunk, generator()), reference.mean((1, 2)))
    mask = torch.arange(H).expand(5, H) < 4
    torch.testing.assert_close(
        policy.loss(seen, chunk, generator(), mask=mask), reference[:, :4].mean((1, 2))
    )
    drawn = policy.sample({"state": seen["state"][:1].expand(4000, 3)}, generator())
    inside = (mean[0].abs() + 3 * std < 1).flatten()
    spread = drawn.flatten(1).std(0)[inside]
    torch.testing.assert_close(spread, std.flatten()[inside], rtol=0.06, atol=0)
    assert torch.equal(policy.sample(seen), mean.clamp(-1, 1))


@pytest.mark.parametrize("floor", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_floor_of_the_spread_is_refused(floor: float) -> None:
    with pytest.raises(UserError, match="smallest_std"):
        GaussianConfig(smallest_std=floor)


def test_a_gaussians_spread_grows_back_from_its_floor() -> None:
    """Clamped, it would have no gradient there; Adam brings a smooth floor's back to the spread of the data, 0.5."""
    config = GaussianConfig(horizon=H, width=16, blocks=1, smallest_std=0.05)
    policy = GaussianPolicy(observation_boxes(STATE), CHUNK, config)
    with torch.no_grad():
        policy.log_std.fill_(-9.0)
        for parameter in policy.mean.parameters():
            parameter.zero_()
    seen, chunk = states(2000), 0.5 * torch.randn(2000, H, A, generator=generator())
    assert policy(seen)[1].max().item() == pytest.approx(0.05, rel=0.01)
    optimizer = torch.optim.Adam([policy.log_std], lr=0.3)
    for _ in range(120):
        optimizer.zero_grad()
        policy.loss(seen, chunk, generator()).mean().backward()
        optimizer.step()
    torch.testing.assert_close(policy(seen)[1], torch.full((H, A), 0.5), rtol=0.05, atol=0)


def test_a_path_of_one_step_tells_where_a_policy_looks() -> None:
    policy = make(**{**DIFFUSION, "train_steps": 1, "denoising_steps": 1, "clip_x0": 0.0})
    seen = {"state": states()["state"].requires_grad_()}
    policy.likely(seen).abs().sum().backward()
    assert seen["state"].grad is not None
    assert seen["state"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"times": "logit_normal"}, torch.distributions.Normal(0.0, 1.0)),
        ({"times": "logit_normal", "times_first": -1.2}, torch.distributions.Normal(-1.2, 1.0)),
        ({"times": "beta"}, torch.distributions.Beta(1.5, 1.0)),
        ({"times": "beta", "times_second": 3.0}, torch.distributions.Beta(1.5, 3.0)),
        ({"times": "uniform", "times_first": 1.5}, torch.distributions.Uniform(0.0, 1.0)),
    ],
)
def test_every_distribution_of_times_has_its_own_numbers(
    changes: dict[str, Any], expected: torch.distributions.Distribution
) -> None:
    """Of a logit-normal by its logits; quantiles against torch's, from as many draws."""
    policy = make(**changes)
    t = policy.training_times(20_000, generator(), device=torch.device("cpu"))
    told = t.logit() if policy.config.times == "logit_normal" else t
    torch.manual_seed(1)
    reference = expected.sample((20_000,))
    at = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(told.quantile(at), reference.quantile(at), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": (0,)}, "channels is 0; give positive numbers"),
        ({"channels": (8, -1)}, "channels is 8 -1; give positive numbers"),
        ({"channels": ()}, "channels is empty"),
        ({"times": "logit_normal", "times_second": 0.0}, "a spread of 0.0"),
        ({"times": "beta", "times_first": -1.0}, r"Beta\(-1.0, 1.0\)"),
        ({"times": "normal"}, "did you mean logit_normal"),
        ({"horizon": 3}, "horizon is 3, but the task executes chunks of 4"),
        ({"horizon": 4, "inpaint": True}, "nothing is left to inpaint with"),
        ({"noise_level": 0.5}, "rule euler has no noise, but noise_level is 0.5"),
        ({"denoising_steps": 0}, "denoising_steps is 0"),
        ({"noise_correlation": 1.0}, "the noise's correlation is 1.0"),
        ({"noise_correlation": 0.5, "clip_x0": 1.0}, "set one of them to 0"),
        ({**DIFFUSION, "denoising_steps": 30}, "cannot denoise in 30 steps"),
        ({"prediction": "noise"}, "predict x0, v or velocity"),
        ({"inpaint_until": 2.0}, "inpaint_until is 2.0"),
        ({"start_noise": -1.0}, "start_noise is -1.0"),
        ({"start_noise": math.inf}, "start_noise is inf"),
        ({"min_std": math.inf}, "min_std is inf"),
        ({"rule": "posterior", "noise_level": math.nan}, "noise_level is nan"),
        ({"clip_x0": math.inf}, "clip_x0 is inf; give 0 or more"),
        ({"inpaint_until": math.nan}, "inpaint_until is nan"),
        ({"times": "logit_normal", "times_first": math.nan}, "times_first is nan; give a finite"),
        ({"times": "beta", "times_second": math.inf}, "times_second is inf; give a finite"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        make(**changes)
    assert "\n" not in str(error.value)


def test_chains_without_noise_have_no_log_probability() -> None:
    policy = make()
    chain = policy.chain(states(), generator())
    with pytest.raises(UserError, match="no step of the chain draws noise"):
        policy.log_prob(states(), chain)
    assert (
        len(policy.chain(states(), generator(), sampler=policy.sampler(FlowSDE(0.5))).stochastic)
        == 10
    )
