"""The average of parameters against a loop and diffusers, and through a checkpoint."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from agents.core.errors import UserError
from agents.core.parameter_averages import ParameterAverage


def steps(network, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        yield network


@pytest.mark.parametrize(("decay", "power"), [(0.9, 0.75), (0.5, 0.75), (0.995, 0.0)])
def test_average_equals_a_loop(decay, power):
    network = nn.Linear(3, 2)
    average = ParameterAverage(network, decay=decay, power=power)
    expected = network.weight.detach().clone()
    for n, moved in enumerate(steps(network, 30, 0)):
        kept = min(decay, 1 - (1 + n) ** -power) if power else decay
        assert average.current_decay == pytest.approx(kept)
        expected = kept * expected + (1 - kept) * moved.weight.detach()
        average.update(moved)
    torch.testing.assert_close(average.module.weight, expected)
    assert int(average.updates) == 30


def test_the_warm_up_copies_first_and_has_diffusion_policy_s_rate():
    network = nn.Linear(3, 2)
    average = ParameterAverage(network)
    for moved in steps(network, 1, 0):
        average.update(moved)
    assert torch.equal(average.module.weight, network.weight)
    average.updates.fill_(10_000)
    average.load_state_dict(average.state_dict())
    assert average.current_decay == pytest.approx(0.999, abs=1e-5)


def test_average_is_that_of_diffusers():
    network = nn.Linear(3, 2)
    average = ParameterAverage(network, decay=0.9)
    reference = EMAModel(network.parameters(), decay=0.9, use_ema_warmup=True, power=0.75)
    for moved in steps(network, 40, 0):
        average.update(moved)
        reference.step(moved.parameters())
    for ours, theirs in zip(average.module.parameters(), reference.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_average_goes_on_from_its_state():
    network = nn.Linear(3, 2)
    whole = ParameterAverage(network)
    for moved in steps(network, 5, 0):
        whole.update(moved)
    resumed = ParameterAverage(nn.Linear(3, 2))
    assert resumed.current_decay == 0.0
    resumed.load_state_dict(whole.state_dict())
    assert resumed.current_decay == whole.current_decay > 0
    for moved in steps(network, 5, 1):
        whole.update(moved)
        resumed.update(moved)
    assert torch.equal(whole.module.weight, resumed.module.weight)


def test_the_average_is_apart_from_the_network_and_never_trains():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout())
    average = ParameterAverage(network)
    network(torch.randn(16, 3))
    before = average.module[0].weight.clone()
    with torch.no_grad():
        network[0].weight += 1
    assert torch.equal(average.module[0].weight, before)
    average.update(network)
    torch.testing.assert_close(average.module[1].running_mean, network[1].running_mean)
    average.train()
    assert not average.module.training
    assert not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"power": -1.0}])
def test_impossible_averages_are_refused(options):
    with pytest.raises(UserError, match="give a decay"):
        ParameterAverage(nn.Linear(1, 1), **options)
