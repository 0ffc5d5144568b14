"""The tables of generators: what is compared draws the same images, and the interval is the sign test's."""

import math

import numpy as np
import pytest
import torch

from experiments.measuring import generators
from experiments.measuring.generators import LOOPS, Ours, Theirs, alternating, median_interval
from tests.experiments.test_speed import TINY, check_whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    generators.write_pipeline(place)
    return str(place)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name[:12])
def test_every_loop_draws_our_images_with_our_log_probabilities(folder, loop):
    images, log_prob = Ours(folder, "cpu").draw()
    expected, theirs = Theirs(folder, "cpu").draw(loop)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_prob, theirs, atol=1e-4, rtol=1e-4)
    assert images.shape == (8, 3, 16, 16)
    assert log_prob.shape == (9, 8)


def test_passes_of_the_network_are_those_that_the_rows_name(folder):
    ours, theirs = Ours(folder, "cpu"), Theirs(folder, "cpu")
    seen = []
    for each in (ours.generator.pipe, theirs.pipe):
        each.unet.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    ours.draw()
    assert seen == [16] * 10
    for loop, expected in zip(LOOPS, ([16] * 19, [8] * 38, [16] * 10), strict=True):
        seen.clear()
        theirs.draw(loop)
        assert seen == expected


def test_the_tables_are_whole():
    speed, parts = generators.generators(TINY, loops=LOOPS[2:], pairs=2)
    check_whole(speed, [LOOPS[2].name])
    check_whole(parts, ["ours", LOOPS[2].name])
    for low, ratio, high in zip(*(speed.column(n) for n in ("low", "ours / loop", "high")), strict=True):  # fmt: skip
        assert low <= ratio <= high
    assert parts.column("text encoder")[0] == 0  # encoded once, before
    assert all(cell > 0 for cell in parts.column("network"))


def test_turns_alternate():
    order = []
    calls = [lambda: order.append(0), lambda: order.append(1)]
    assert len(alternating(calls, 0, 4, lambda: None)) == 4
    assert order == [0, 1, 0, 1, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("count", [6, 9, 11, 30])
def test_the_interval_covers_the_median(count):
    """By counting: it misses where fewer values than its place lie on one side of the median."""
    low, high = median_interval(np.random.default_rng(0).permutation(count).tolist())
    below = sum(math.comb(count, k) for k in range(int(low) + 1)) / 2**count
    wider = sum(math.comb(count, k) for k in range(int(low) + 2)) / 2**count
    assert high == count - 1 - low
    assert 2 * below <= 0.05 < 2 * wider


def test_few_values_are_all_the_interval():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
