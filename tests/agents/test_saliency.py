"""Saliency against captum, masks against torch.quantile."""

import copy

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agents.core.encoders import PixelEncoder
from agents.core.networks import ReLU, mlp
from agents.core.pictures import panels
from agents.core.saliency import (
    frame_saliency,
    input_gradient,
    mask_channels,
    quantile_mask,
    score_saliency,
)
from tests.agents.helpers import observation, small_agent


class Value(nn.Module):
    """An encoder and a head with our ReLU."""

    def __init__(self):
        super().__init__()
        self.encoder = PixelEncoder(9, (24, 24), "drqv2")
        self.head = mlp([self.encoder.out_features, 16, 16, 1])

    def forward(self, x):
        return self.head(self.encoder(x))


def with_torch_relu(net):
    """Return a copy whose activations are torch's, which is what captum hooks."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ReLU):
                setattr(module, name, nn.ReLU())
    return net


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = Value()
    for parameter in net.parameters():  # orthogonal kernels hide mistakes in what borders see
        nn.init.normal_(parameter, std=0.1)
    return net, torch.randn(4, 9, 24, 24)


@pytest.mark.parametrize(
    ("rule", "method"),
    [("guided", captum.attr.GuidedBackprop), ("gradient", captum.attr.Saliency)],
)
def test_input_gradients_equal_captums(case, rule, method):
    net, x = case
    inputs = x.clone().requires_grad_()
    ours = input_gradient(net(inputs)[:, 0], inputs, rule)
    reference = method(with_torch_relu(net))
    if rule == "guided":
        theirs = reference.attribute(x.clone().requires_grad_(), target=0)
        assert not torch.allclose(ours, input_gradient(net(inputs)[:, 0], inputs, "gradient"))
    else:
        theirs = reference.attribute(x.clone().requires_grad_(), target=0, abs=False)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs)


def test_saliency_on_a_kept_graph_leaves_the_losses_gradient_as_it_was(case):
    net, x = case
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    inputs = x.clone().requires_grad_()
    value = net(inputs)
    input_gradient(value[:, 0], inputs, "guided", retain_graph=True)
    value.square().sum().backward(inputs=list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert inputs.grad is None


def test_frame_saliency_is_the_largest_magnitude_over_rgb_of_each_frame():
    gradient = torch.randn(2, 9, 5, 5)
    expected = gradient.abs().view(2, 3, 3, 5, 5).amax(2)
    assert torch.equal(frame_saliency(gradient), expected)


@settings(max_examples=60, deadline=None)
@given(
    quantile=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.93, 0.95, 0.98, 0.999]),
    size=st.integers(2, 13),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_quantile_mask_equals_torch_quantile_ties_included(quantile, size, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.randint(0, levels, (2, 3, size, size), generator=generator).double()
    threshold = torch.quantile(saliency.flatten(-2), quantile, dim=-1)[..., None, None]
    # A quantile between two equal neighbors may round below them; both sides agree on the order.
    expected = saliency >= threshold - 1e-9
    assert torch.equal(quantile_mask(saliency, quantile), expected)


def test_quantile_mask_keeps_the_stated_share():
    saliency = torch.rand(4, 3, 48, 48)
    share = quantile_mask(saliency, 0.95).float().mean((2, 3))
    torch.testing.assert_close(share, torch.full((4, 3), 0.05), atol=5e-4, rtol=0)


def test_mask_channels_repeats_over_rgb():
    mask = torch.rand(2, 3, 4, 4) > 0.5
    repeated = mask_channels(mask)
    for channel in range(9):
        assert torch.equal(repeated[:, channel], mask[:, channel // 3])


def test_scores_equal_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    saliency, foreground = rng.random((6, 9, 7)), rng.random((6, 9, 7)) < 0.3
    scores = score_saliency(saliency, foreground)
    for i in range(6):
        pairs = sorted(zip(saliency[i].ravel(), foreground[i].ravel(), strict=True), reverse=True)
        body = int(foreground[i].sum())
        on_body = sum(heat for heat, is_body in pairs if is_body)
        assert scores.energy[i] == pytest.approx(on_body / sum(heat for heat, _ in pairs))
        assert scores.pointing[i] == float(pairs[0][1])
        both = sum(is_body for _, is_body in pairs[:body])
        assert scores.iou[i] == pytest.approx(both / (2 * body - both))
        assert scores.area[i] == pytest.approx(body / 63)


def test_scores_of_perfect_blind_and_empty_looks():
    foreground = np.zeros((4, 8, 8), bool)
    foreground[:3, 2:4, 2:6] = True
    saliency = np.stack(
        [foreground[0] * 5.0, ~foreground[0] * 1.0, np.zeros((8, 8)), np.ones((8, 8))]
    )
    scores = score_saliency(saliency, foreground)
    for values in (scores.energy, scores.pointing, scores.iou):
        assert values[:3].tolist() == [1, 0, 0]
        assert np.isnan(values[3]), "nothing is to be looked at"
    assert scores.area.tolist() == [1 / 8, 1 / 8, 1 / 8, 0]


def test_equal_strengths_score_what_chance_gives_them():
    top = np.zeros((1, 20, 20), bool)
    top[:, :5] = True
    for foreground in (top, top[:, ::-1]):
        flat = score_saliency(np.ones((1, 20, 20)), foreground)
        assert flat.pointing == pytest.approx(0.25)
        assert flat.iou == pytest.approx(0.25 / 1.75)


def test_a_picture_that_is_all_foreground_tells_nothing():
    scores = score_saliency(np.ones((1, 4, 4)), np.ones((1, 4, 4), bool))
    assert np.isnan([scores.energy, scores.pointing, scores.iou]).all()
    assert scores.area == 1


def test_a_look_at_random_scores_the_area():
    rng = np.random.default_rng(1)
    foreground = np.zeros((400, 20, 20), bool)
    foreground[:, 5:15, 5:15] = True
    scores = score_saliency(rng.random((400, 20, 20)), foreground)
    assert scores.energy.mean() == pytest.approx(0.25, abs=0.01)
    assert scores.pointing.mean() == pytest.approx(0.25, abs=0.08)
    assert scores.iou.mean() == pytest.approx(0.25 / 1.75, abs=0.01)


@pytest.mark.parametrize("name", ["drq", "rad", "drqv2-sgqn"])
def test_agents_tell_where_they_look_at_the_pictures_size(name):
    """A border that RAD crops away has no influence on its value, so that nothing is looked at there."""
    agent, seen = small_agent(name), observation()
    action = torch.zeros(8, 2)
    saliency = agent.saliency(seen, action)
    pixels = seen["pixels"]
    assert saliency.shape == (8, pixels.shape[1] // 3, *pixels.shape[-2:])
    assert (saliency >= 0).all()
    assert saliency.sum() > 0
    changed = {**seen, "pixels": pixels.clone()}
    nowhere = (saliency == 0).all(dim=1, keepdim=True).expand_as(pixels)
    if name == "rad":
        assert nowhere.any()
        changed["pixels"][nowhere] = 255 - changed["pixels"][nowhere]
        assert agent.act(changed, explore=False)[0] == pytest.approx(
            agent.act(seen, explore=False)[0]
        )


def test_a_state_cannot_be_looked_at():
    from tests.agents.helpers import STATE

    agent = small_agent("sac", STATE)
    assert agent.saliency(observation(STATE), torch.zeros(8, 2)) is None


def test_panels_show_the_frame_the_saliency_and_both():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 10, 10, 3), dtype=np.uint8)
    saliency = np.zeros((2, 10, 10))
    saliency[0, 2, 3] = saliency[0, 2, 4] = 5.0
    saliency[0, 7, 7] = 1.0
    drawn = panels(frames, saliency)
    assert drawn.shape == (2, 10, 30, 3)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[:, :, :10], frames)
    middle, right = drawn[:, :, 10:20], drawn[:, :, 20:]
    assert middle[0, 2, 3].tolist() == middle[0, 2, 4].tolist() == [255, 255, 255]
    assert middle[0, 7, 7].tolist() == [51, 51, 51], "a fifth of the strongest"
    assert right[0, 2, 3].tolist() == [255, 153, 0]
    calm = saliency == 0
    assert not middle[calm].any()
    gray = 0.45 * frames.mean(-1, keepdims=True).repeat(3, -1)
    np.testing.assert_allclose(right[calm], gray[calm], atol=0.51)
