"""Layers that act with packed weights give the numbers of torch's own, whatever changes the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from agents.core import packed_convolutions
from agents.core.packed_convolutions import Convolution, Doubling, packed
from agents.core.temporal_unet import UNetDenoiser

needs_mkldnn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: Convolution(64, 256, 5, padding=2),
    "one tap": lambda: Convolution(256, 300, 1),
    "shrinking": lambda: Convolution(160, 160, 3, stride=2, padding=1),
    "doubling": lambda: Doubling(192, 96),
}
WAYS: tuple[dict[str, bool], ...] = ({"fused": True}, {"foreach": True}, {"foreach": False})


@pytest.fixture(name="calls")
def _calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Which layers multiplied packed weights."""
    seen: list[nn.Module] = []
    multiply = packed_convolutions._multiply

    def spy(layer: nn.Module, *arguments: Tensor) -> Tensor:
        seen.append(layer)
        return multiply(layer, *arguments)

    monkeypatch.setattr(packed_convolutions, "_multiply", spy)
    return seen


def both(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        plain = layer(x)
        with packed():
            return layer(x), plain


@needs_mkldnn
@pytest.mark.parametrize("steps", [1, 4, 7, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_layers_are_torchs_own(name: str, steps: int, calls: list[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for batch in (1, 3):
        x = torch.randn(batch, next(layer.parameters()).shape[name != "doubling"], steps)
        ours, plain = both(layer, x)
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert calls == [layer, layer]


@needs_mkldnn
@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_change_are_packed_anew(name: str, calls: list[nn.Module]) -> None:
    """By every sort of optimizer, by an average, by loading, and by being replaced."""
    torch.manual_seed(0)
    layer, other = LAYERS[name](), LAYERS[name]()
    x = torch.randn(2, next(layer.parameters()).shape[name != "doubling"], 8)
    before, _ = both(layer, x)
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=0.1),
        *(torch.optim.Adam(layer.parameters(), lr=0.1, **way) for way in WAYS),
    ]

    def step() -> None:
        layer(x).square().sum().backward()
        optimizers.pop().step()

    def average() -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(layer.parameters()), list(other.parameters()), 0.5)

    def replace() -> None:
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))  # type: ignore[arg-type]

    def load() -> None:
        layer.load_state_dict(other.state_dict())

    steps = [step] * len(optimizers)
    for change in (*steps, average, load, replace):
        change()
        now, plain = both(layer, x)
        torch.testing.assert_close(now, plain, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(now, before, rtol=1e-2)
        before = now
    assert len(calls) == 8


@needs_mkldnn
def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Convolution(64, 256, 5, padding=2), torch.randn(1, 64, 16)
    both(layer, x)
    first = packed_convolutions._packed[layer]
    both(layer, x)
    assert packed_convolutions._packed[layer] is first


@needs_mkldnn
def test_a_packed_layer_is_copied_and_saved_as_before_and_forgotten_with_it() -> None:
    layer, x = Convolution(64, 256, 5, padding=2), torch.randn(1, 64, 16)
    ours, _ = both(layer, x)
    assert set(layer.state_dict()) == {"weight", "bias"}
    twin = copy.deepcopy(layer)
    assert twin not in packed_convolutions._packed
    assert torch.equal(both(twin, x)[0], ours)
    before = len(packed_convolutions._packed)
    del layer, twin
    assert len(packed_convolutions._packed) == before - 2


def test_gradients_other_formats_and_large_batches_go_the_layers_own_way(
    calls: list[nn.Module],
) -> None:
    layer, x = Convolution(64, 256, 5, padding=2), torch.randn(1, 64, 16)
    with packed():
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x.expand(100, -1, -1))
            copy.deepcopy(layer).bfloat16()(x.bfloat16())
            Convolution(8, 8, 5)(torch.randn(1, 8, 16))
        with torch.inference_mode():
            Convolution(64, 256, 5, padding=2)(x)
    with torch.no_grad():
        layer(x)
    assert layer.weight.grad is not None
    assert not calls


@needs_mkldnn
@pytest.mark.parametrize("horizon", [5, 16])
def test_a_packed_unet_is_the_same_network(horizon: int, calls: list[nn.Module]) -> None:
    torch.manual_seed(0)
    network = UNetDenoiser(4, 10, widths=(64, 128, 256), time_features=16)
    x, t, condition = torch.randn(2, horizon, 4), torch.rand(2), torch.randn(2, 10)
    with torch.no_grad():
        plain = network(x, t, condition)
        with packed():
            ours = network(x, t, condition)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
    assert len(calls) > 15
