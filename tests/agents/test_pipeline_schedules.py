"""Paths, times and conditions of pipelines, against diffusers' schedulers and by hand."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from agents.core.errors import UserError
from agents.generative_models.pipeline_networks import pack, scaled_gradient, unpack
from agents.generative_models.pipeline_schedules import schedule_of
from tests.agents.tiny_pipelines import SD_SCHEDULE


@pytest.mark.parametrize("steps", [1, 4, 7, 50, 999])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_offset": 0},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    ],
)
def test_a_diffusion_visits_the_steps_of_its_scheduler(options, steps):
    scheduler = DDIMScheduler(**(SD_SCHEDULE | options))
    scheduler.set_timesteps(steps)
    schedule = schedule_of(scheduler.config, tokens=64)
    times = schedule.times(steps)
    assert times[-1] == 0
    assert schedule.path.index(times[:-1]).tolist() == scheduler.timesteps.tolist()
    alphas = schedule.path.coefficients(times[:-1]).alpha.square()
    expected = scheduler.alphas_cumprod[scheduler.timesteps].double()
    torch.testing.assert_close(alphas, expected, rtol=1e-4, atol=1e-6)
    assert schedule.kind == ("v" if "prediction_type" in options else "noise")


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "base_shift": 0.4, "max_image_seq_len": 8192},
    ],
)
def test_a_flow_visits_the_noise_levels_of_its_scheduler(options, tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    about = scheduler.config
    mu = calculate_shift(
        tokens, about.base_image_seq_len, about.max_image_seq_len, about.base_shift, about.max_shift
    )
    dynamic = {"mu": mu} if about.use_dynamic_shifting else {}
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8).tolist(), **dynamic)
    schedule = schedule_of(about, tokens)
    torch.testing.assert_close(schedule.times(8).float(), scheduler.sigmas, rtol=1e-5, atol=1e-6)
    # A shift on top of one is one by their product.
    t = schedule.times(8)
    torch.testing.assert_close(schedule.times(8, 2.0), 2 * t / (1 + t))


def test_schedulers_that_are_not_known_are_refused():
    for options, words in (
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule of the pipeline's scheduler 'sigmoid'"),
        ({"prediction_type": "other"}, "unknown prediction_type"),
        ({"trained_betas": [0.1]}, "betas of its own"),
        ({"rescale_betas_zero_snr": True}, "betas of its own"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            schedule_of(SD_SCHEDULE | options, tokens=64)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_a_condition_is_words_and_vector(vector, features, batch):
    words = torch.arange(batch * 2 * features, dtype=torch.float32).view(batch, 2, features)
    whole = -1.0 - torch.arange(batch * vector, dtype=torch.float32).view(batch, vector)
    first, second = unpack(pack(words, whole), vector)
    assert torch.equal(first, words)
    assert torch.equal(second, whole)
    assert pack(words, None) is words


def test_a_gradient_is_scaled_and_its_value_is_not():
    x = torch.randn(3, requires_grad=True)
    result = scaled_gradient(x, 5.0)
    assert torch.equal(result, x)
    (gradient,) = torch.autograd.grad((2 * result).sum(), x)
    assert torch.equal(gradient, torch.full((3,), 10.0))
