"""A small network learns two modes by denoising, and does not when its prediction is taken for another."""

import pytest
import torch

from agents.core.chain_steps import Limits, standard_normal
from agents.core.denoisers import MLPDenoiser
from agents.core.denoising import corrupt, draw_times, squared_error
from agents.core.noise_paths import DiscreteVP, RectifiedFlow
from agents.core.sampling import Sampler
from agents.core.step_rules import CPS, Euler, Heun, Posterior

MODES = torch.tensor([[0.6, 0.4], [-0.6, -0.4]])
SPREAD = 0.08


def learned(path, kind, *, sign=1.0):
    """Train on the mixture for a few seconds."""
    torch.manual_seed(0)
    network = MLPDenoiser(1, 2, 0, hidden=64, blocks=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(800):
        modes = MODES[torch.randint(2, (256,), generator=generator)]
        x0 = (modes + SPREAD * torch.randn(256, 2, generator=generator))[:, None]
        noise = torch.randn(256, 1, 2, generator=generator)
        t = draw_times(path, 256, generator)
        x, target = corrupt(path, kind, x0, noise, t)
        loss = sign * squared_error(network(x, t), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def quality(data):
    """Return the smaller mode's share of samples, among those that lie in one, and the share of these."""
    distance = (data[:, 0, None] - MODES).norm(dim=-1)
    inside = distance.min(dim=1).values < 4 * SPREAD
    share = (
        (distance.argmin(dim=1)[inside] == 0).float().mean()
        if inside.any()
        else inside.new_zeros(())
    )
    return float(torch.minimum(share, 1 - share.float())), float(inside.float().mean())


def drawn(network, path, kind, rule, steps):
    sampler = Sampler(path, kind, rule, path.times(steps), Limits(x0=1.0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return sampler.sample(
            network, standard_normal((1000, 1, 2), generator), generator=generator
        )


@pytest.mark.parametrize(
    ("path", "kind", "rules"),
    [
        (RectifiedFlow(), "velocity", [Euler(), Heun(), Posterior(0.5), CPS(0.4)]),
        (DiscreteVP(20), "noise", [Posterior(1.0), Posterior(0.0)]),
    ],
    ids=["flow", "diffusion"],
)
def test_a_network_learns_two_modes(path, kind, rules):
    network = learned(path, kind)
    for rule in rules:
        smaller, inside = quality(drawn(network, path, kind, rule, 20))
        assert smaller > 0.4, rule
        assert inside > 0.9, rule
        _, inside = quality(drawn(network, path, "x0", rule, 20))
        assert inside < 0.1, rule


def test_a_loss_of_the_wrong_sign_learns_nothing():
    network = learned(RectifiedFlow(), "velocity", sign=-1.0)
    _, inside = quality(drawn(network, RectifiedFlow(), "velocity", Euler(), 20))
    assert inside < 0.1
