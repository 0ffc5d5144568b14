"""Blocks that everything rests on: guided ReLU, initialization, averages, encoders."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn
from torch.nn import functional as F

from agents.core.encoders import ENCODERS, PixelEncoder
from agents.core.errors import UserError
from agents.core.networks import (
    ReLU,
    Trunk,
    doubled_convolution,
    gradient_norm,
    guided_relu,
    mlp,
    polyak_update,
)


def test_guided_relu_drops_negative_gradients_only_inside_the_context():
    x = torch.tensor([1.0, 2.0, -3.0], requires_grad=True)
    weight = torch.tensor([1.0, -1.0, 1.0])
    y = (ReLU()(x) * weight).sum()
    with guided_relu():
        (guided,) = torch.autograd.grad(y, x, retain_graph=True)
    (plain,) = torch.autograd.grad(y, x)
    assert guided.tolist() == [1.0, 0.0, 0.0]
    assert plain.tolist() == [1.0, -1.0, 0.0]


def test_relu_equals_torch_relu_forward_and_backward():
    x = torch.randn(5, 7, requires_grad=True)
    ours = torch.autograd.grad(ReLU()(x).square().sum(), x)[0]
    theirs = torch.autograd.grad(nn.functional.relu(x).square().sum(), x)[0]
    assert torch.equal(ours, theirs)


def test_guided_context_ends_after_an_error():
    with pytest.raises(ZeroDivisionError), guided_relu():
        raise ZeroDivisionError
    x = torch.tensor([1.0], requires_grad=True)
    assert torch.autograd.grad(-ReLU()(x).sum(), x)[0].item() == -1.0


def test_polyak_update_moves_by_the_rate():
    target, online = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = 0.9 * target.weight.detach() + 0.1 * online.weight.detach()
    polyak_update(target, online, 0.1)
    torch.testing.assert_close(target.weight.detach(), expected)


def test_gradient_norm_equals_the_norm_of_all_gradients_in_one_vector():
    net = mlp([4, 8, 2])
    net(torch.randn(3, 4)).sum().backward()
    flat = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(gradient_norm(net), flat.norm())


def test_delta_orthogonal_convolutions_are_orthogonal_at_the_center_and_zero_elsewhere():
    encoder = PixelEncoder(9, (48, 48), "dmc-gb")
    weight = encoder.convs[2].weight.detach()
    center = weight[:, :, 1, 1]
    torch.testing.assert_close(center @ center.T, 2 * torch.eye(32), atol=1e-5, rtol=0)
    assert torch.count_nonzero(weight) == torch.count_nonzero(center)


@pytest.mark.parametrize("name", ["small", "drqv2"])
def test_strided_encoders_see_every_pixel_from_the_start(name):
    """A kernel of one tap behind strides leaves most pixels unseen: thin poles fall through."""
    torch.manual_seed(0)
    encoder = PixelEncoder(9, (48, 48), name)
    pixels = torch.rand(1, 9, 48, 48, requires_grad=True)
    encoder(pixels).square().sum().backward()
    inner = pixels.grad[0, :, 4:40, 4:40]
    assert torch.count_nonzero(inner) == inner.numel()


@pytest.mark.parametrize(("name", "features"), [("dmc-gb", 14112), ("drqv2", 39200)])
def test_published_encoders_have_the_published_number_of_features_at_84_pixels(name, features):
    assert PixelEncoder(9, (84, 84), name).out_features == features


def test_the_nature_encoder_computes_what_stable_baselines3s_does_with_its_weights():
    theirs = NatureCNN(gym.spaces.Box(0, 255, (9, 48, 48), np.uint8))
    ours = PixelEncoder(9, (48, 48), "nature")
    ours.convs.load_state_dict(theirs.cnn.state_dict())
    pixels = torch.randint(0, 256, (2, 9, 48, 48), dtype=torch.uint8)
    maps = theirs.cnn[:-1](pixels.float() / 255)
    expected = maps.permute(0, 2, 3, 1).flatten(1)  # theirs flattens channels first
    torch.testing.assert_close(ours(ours.normalize(pixels)), expected)
    assert ours.out_features == theirs.linear[0].in_features == 256


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_does_not_change_the_features(name, layout):
    torch.manual_seed(0)
    encoder = PixelEncoder(9, (48, 48), name)
    pixels = torch.randint(0, 256, (2, 9, 48, 48), dtype=torch.uint8)
    maps = encoder.convs(pixels.float() / 255 - ENCODERS[name].center)
    expected = maps.permute(0, 2, 3, 1).flatten(1)
    encoder.to(memory_format=layout)
    before = pixels.clone()
    torch.testing.assert_close(encoder(encoder.normalize(pixels)), expected)
    assert torch.equal(pixels, before)


def test_normalize_leaves_float_pixels_of_the_caller_alone():
    encoder = PixelEncoder(9, (24, 24), "small")
    pixels = torch.full((1, 9, 24, 24), 255.0)
    encoder.normalize(pixels)
    assert pixels.unique().tolist() == [255.0]


def test_too_small_pixels_are_the_users_mistake_in_one_line():
    with pytest.raises(UserError, match="too small for encoder 'dmc-gb'"):
        PixelEncoder(9, (16, 16), "dmc-gb")


def test_trunk_passes_the_state_beside_the_projection():
    trunk = Trunk(6, 2, 4)
    features = torch.randn(3, 8)
    out = trunk(features)
    assert out.shape == (3, 6)
    assert torch.equal(out[:, 4:], features[:, 6:])


@pytest.mark.parametrize("bias", [True, False])
def test_doubled_convolution_equals_convolving_the_doubled_picture_with_its_gradients(bias):
    conv = torch.nn.Conv2d(3, 2, 3, padding=1, bias=bias)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    ours = doubled_convolution(x, conv)
    expected = conv(F.interpolate(x, scale_factor=2.0))
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(expected)
    inputs = [x, *conv.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
