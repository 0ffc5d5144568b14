"""Networks that denoise chunks: shapes, what depends on what, and how they begin."""

import math

import pytest
import torch
from torch import nn

from agents.core.denoisers import DiTDenoiser, MLPDenoiser, TimeEmbedding, sinusoids
from agents.core.errors import UserError
from agents.core.temporal_unet import UNetDenoiser

H, A, C = 8, 3, 5
MAKERS = {
    "mlp": lambda condition=C, horizon=H: MLPDenoiser(
        horizon, A, condition, hidden=32, condition_hidden=(16, 8) if condition else ()
    ),
    "unet": lambda condition=C, horizon=H: UNetDenoiser(
        A, condition, widths=(16, 32, 64), time_features=32
    ),
    "unet-shift": lambda condition=C, horizon=H: UNetDenoiser(
        A, condition, widths=(12, 20), kernel=3, time_features=32, scale=False
    ),
    "dit": lambda condition=C, horizon=H: DiTDenoiser(A, condition, features=32, blocks=2, heads=4),
}


def inputs(horizon=H, batch=4, condition=C):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, horizon, A, generator=generator)
    t = torch.rand(batch, generator=generator)
    return x, t, torch.randn(batch, condition, generator=generator) if condition else None


def awake(network):
    """Give layers that start at 0 something to say."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("condition", [0, C])
@pytest.mark.parametrize("horizon", [1, 5, 8])
def test_output_has_the_chunk_s_shape_and_every_parameter_learns(name, condition, horizon):
    network = awake(MAKERS[name](condition, horizon))
    x, t, given = inputs(horizon, condition=condition)
    output = network(x, t, given)
    assert output.shape == x.shape
    output.square().mean().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", MAKERS)
def test_output_depends_on_each_input_of_its_own_sample_only(name):
    network = awake(MAKERS[name]()).double().eval()
    given = [value.double() for value in inputs()]
    before = network(*given)
    for index in range(3):
        changed = [value.clone() for value in given]
        changed[index][1] = 0.5 * changed[index][1] + 0.3
        after = network(*changed)
        moved = (after - before).abs().flatten(1).max(1).values
        assert moved[1] > 1e-6
        assert moved[[0, 2, 3]].max() < 1e-12


@pytest.mark.parametrize("name", MAKERS)
def test_a_network_sees_the_whole_chunk_and_its_order(name):
    network = awake(MAKERS[name]())
    x, t, condition = (value.double() for value in inputs(batch=1))
    network = network.double()
    x.requires_grad_()
    network(x, t, condition)[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()  # the first step's prediction has heard of the last
    turned = network(x.flip(1), t, condition).flip(1)
    assert not torch.allclose(turned, network(x, t, condition), atol=1e-4)


def test_dit_begins_at_zero_with_identity_blocks():
    torch.manual_seed(0)
    network = DiTDenoiser(A, C, features=32, blocks=2, heads=4)
    x, t, condition = inputs()
    assert not network(x, t, condition).any()
    tokens = torch.randn(2, H, 32)
    assert torch.equal(network.blocks[0](tokens, torch.randn(2, 32)), tokens)


def test_dit_block_is_attention_and_mlp_under_modulation():
    torch.manual_seed(0)
    network = awake(DiTDenoiser(A, C, features=32, blocks=1, heads=4))
    block = network.blocks[0]
    tokens, condition = torch.randn(2, H, 32), torch.randn(2, 32)
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(block.queries_keys_values.weight)
        reference.in_proj_bias.copy_(block.queries_keys_values.bias)
        reference.out_proj.weight.copy_(block.project.weight)
        reference.out_proj.bias.copy_(block.project.bias)
        m = block.modulation(torch.nn.functional.silu(condition))[:, None].chunk(6, dim=-1)

        def normal(x):
            return (x - x.mean(-1, keepdim=True)) / (
                x.var(-1, correction=0, keepdim=True) + 1e-6
            ).sqrt()

        inside = normal(tokens) * (1 + m[1]) + m[0]
        expected = tokens + m[2] * reference(inside, inside, inside)[0]
        expected = expected + m[5] * block.mlp(normal(expected) * (1 + m[4]) + m[3])
        torch.testing.assert_close(block(tokens, condition), expected, rtol=1e-5, atol=1e-5)


def test_unet_uses_film_without_batch_statistics():
    network = UNetDenoiser(A, C, widths=(16, 32), time_features=32)
    assert not list(network.buffers())
    block = network.down[0][0]
    x, condition = torch.randn(2, A, H), torch.randn(2, 32 + C)
    with torch.no_grad():
        scale, shift = block.modulation(condition)[..., None].chunk(2, dim=1)
        expected = block.second((1 + scale) * block.first(x) + shift) + block.residual(x)
        torch.testing.assert_close(block(x, condition), expected)


def test_sinusoids_are_vaswani_s():
    positions = torch.tensor([0.0, 1.0, 37.5])
    waves = sinusoids(positions, 6)
    for i, position in enumerate(positions.tolist()):
        rates = [10_000 ** (-k / 2) for k in range(3)]
        expected = [math.sin(position * r) for r in rates]
        expected += [math.cos(position * r) for r in rates]
        assert waves[i].tolist() == pytest.approx(expected, abs=1e-5)


def test_time_embeddings_tell_neighboring_steps_apart():
    torch.manual_seed(0)
    embedding = TimeEmbedding(16, 32, 16)
    codes = embedding(torch.arange(1, 101) / 100)
    gaps = torch.cdist(codes, codes) + torch.eye(100)
    assert gaps.min() > 1e-2


@pytest.mark.parametrize(
    "make",
    [
        lambda: TimeEmbedding(15, 8, 8),
        lambda: DiTDenoiser(A, C, features=30, heads=4),
        lambda: UNetDenoiser(A, C, kernel=4),
        lambda: UNetDenoiser(A, C, widths=()),
    ],
)
def test_impossible_sizes_are_refused(make):
    with pytest.raises(UserError, match=r"give|change"):
        make()
