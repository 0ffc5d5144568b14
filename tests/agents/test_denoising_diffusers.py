"""Step by step against diffusers' schedulers, on the same predictions and the same noise."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from agents.core.chain_steps import Limits
from agents.core.noise_paths import DiscreteVP, RectifiedFlow
from agents.core.sampling import Sampler
from agents.core.step_rules import Euler, Heun, Posterior

SHAPE = (4, 8, 3)
KINDS = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
SCHEDULES = [
    (DiscreteVP(100), {"beta_schedule": "squaredcos_cap_v2"}),
    (DiscreteVP(1000, "linear"), {"beta_schedule": "linear"}),
    (
        DiscreteVP(1000, "scaled_linear", 0.00085, 0.012),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
]


def scheduler_of(scheduler, path, options, kind, clip, spacing):
    made = scheduler(
        num_train_timesteps=path.train_steps,
        prediction_type=KINDS[kind],
        clip_sample=clip,
        timestep_spacing=spacing,
        **options,
    )
    return made


def network(x, t, condition):
    """Something smooth whose predictions are of a size that keeps a chain bounded."""
    wave = torch.sin(3 * x + 5 * t.to(x.dtype).reshape(-1, 1, 1)) + 0.3 * x
    return wave.to(x.dtype)


def paths(values):
    return [pytest.param(path, options, id=path.schedule) for path, options in values]


@pytest.mark.parametrize(("path", "options"), paths(SCHEDULES))
def test_discrete_paths_are_diffusers_tables(path, options):
    scheduler = DDPMScheduler(num_train_timesteps=path.train_steps, **options)
    t = torch.arange(1, path.train_steps + 1, dtype=torch.float64) / path.train_steps
    c = path.coefficients(t)
    kept = scheduler.alphas_cumprod.double()  # products in single precision
    torch.testing.assert_close(c.alpha**2, kept, rtol=2e-4, atol=1e-9)
    torch.testing.assert_close(1 - c.alpha**2, 1 - kept, rtol=1e-3, atol=1e-6)
    x0, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([0, 10, 30, 60, path.train_steps - 1])
    t = (k + 1) / path.train_steps
    torch.testing.assert_close(path.index(t), k)
    torch.testing.assert_close(path.mix(x0, noise, t), scheduler.add_noise(x0, noise, k))
    torch.testing.assert_close(
        path.target("v", x0, noise, t), scheduler.get_velocity(x0, noise, k), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize(("path", "options"), paths(SCHEDULES))
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("steps", "spacing", "eta"),
    [
        (100, "leading", 0.5),  # every training step of the cosine path
        (10, "trailing", 0.0),
        (10, "trailing", 0.5),
        (10, "trailing", 1.0),
        (20, "leading", 1.0),
    ],
)
@pytest.mark.parametrize("clip", [False, True])
def test_ddim(path, options, kind, steps, spacing, eta, clip):
    scheduler = scheduler_of(DDIMScheduler, path, options, kind, clip, spacing)
    scheduler.set_timesteps(steps)
    sampler = Sampler(
        path, kind, Posterior(eta), path.times(steps, spacing), Limits(x0=1.0 if clip else None)
    )
    follow(sampler, scheduler, path, eta=eta, use_clipped_model_output=True)


@pytest.mark.parametrize(("path", "options"), paths(SCHEDULES))
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("steps", "spacing"), [(100, "leading"), (10, "trailing"), (20, "leading"), (7, "linspace")]
)
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm(path, options, kind, steps, spacing, clip):
    scheduler = scheduler_of(DDPMScheduler, path, options, kind, clip, spacing)
    scheduler.set_timesteps(steps)
    sampler = Sampler(
        path, kind, Posterior(1.0), path.times(steps, spacing), Limits(x0=1.0 if clip else None)
    )
    follow(sampler, scheduler, path)


def follow(sampler, scheduler, path, **options):
    """Walk diffusers' chain in double precision, and take each of its steps here too, with the noise that it drew.

    Its table is replaced by the same in double precision: the two tables are compared by themselves above, and where
    little of the data is left, a prediction of noise magnifies their rounding.
    """
    knots = torch.arange(1, path.train_steps + 1, dtype=torch.float64) / path.train_steps
    scheduler.alphas_cumprod = path.coefficients(knots).alpha ** 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    times = path.times(sampler.steps, scheduler.config.timestep_spacing)
    assert scheduler.timesteps.tolist() == path.index(times[:-1]).tolist()
    for index, timestep in enumerate(scheduler.timesteps):
        t = torch.full((len(x),), sampler.points[index].t)
        prediction = network(x, t, None)
        state = generator.get_state()
        expected = scheduler.step(prediction, timestep, x, generator=generator, **options)
        drawn = torch.Generator()
        drawn.set_state(state)
        noise = torch.randn(SHAPE, generator=drawn, dtype=torch.float64)
        step = sampler.step(network, x, index)
        torch.testing.assert_close(
            step.mean + step.std * noise, expected.prev_sample, rtol=1e-9, atol=1e-9
        )
        x = expected.prev_sample


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 10, 28])
def test_flow_euler(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    # As pipelines call it; by itself set_timesteps shifts a range that was already shifted.
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    follow_flow(Euler(), scheduler, RectifiedFlow().times(steps, shift=shift), steps)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler])
def test_flow_times_of_set_timesteps_are_linspace(scheduler):
    made = scheduler()
    made.set_timesteps(10)
    torch.testing.assert_close(made.sigmas, RectifiedFlow().times(10, "linspace").float())


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_flow_heun(steps):
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    follow_flow(Heun(), scheduler, RectifiedFlow().times(steps, "linspace"), 2 * steps - 1)


def follow_flow(rule, scheduler, times, evaluations):
    """Walk diffusers' chain, whose Heun takes two calls a step, and compare where both end."""
    assert len(scheduler.timesteps) == evaluations
    x = start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        prediction = network(x, (timestep / 1000).expand(len(x)), None)
        x = scheduler.step(prediction, timestep, x).prev_sample
    sampler = Sampler(RectifiedFlow(), "velocity", rule, times)
    torch.testing.assert_close(sampler.sample(network, start), x, rtol=1e-4, atol=5e-5)
    asked = []
    sampler.sample(lambda *inputs: asked.append(1) or network(*inputs), start)
    assert len(asked) == evaluations
