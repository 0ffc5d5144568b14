"""Batched augmentations against one-sample-at-a-time references."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from agents.core.augmentations import (
    center_crop,
    overlay,
    random_convolution,
    random_crop,
    random_shift,
    zero_border,
)
from agents.core.errors import UserError
from agents.core.fields import count_views
from agents.core.overlays import OverlayImages, procedural_textures


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (16, 9, 20, 20), dtype=torch.uint8, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_random_shift_equals_padding_and_cropping_each_sample(pixels):
    shifted = random_shift(pixels, seeded(), pad=4)
    offsets = torch.randint(-4, 5, (2, 16, 1), generator=seeded())[:, :, 0]
    for i, (down, right) in enumerate(offsets.T.tolist()):
        padded = F.pad(pixels[i : i + 1].float(), (4, 4, 4, 4), mode="replicate")
        expected = padded[0, :, 4 + down : 24 + down, 4 + right : 24 + right]
        assert torch.equal(shifted[i].float(), expected)


def test_random_shift_equals_drqv2s_bilinear_sampling(pixels):
    """DrQ-v2 samples a padded picture bilinearly at whole-pixel offsets."""
    pad, h = 4, 20
    x = F.pad(pixels.float(), (pad,) * 4, mode="replicate")
    eps = 1.0 / (h + 2 * pad)
    axis = torch.linspace(-1.0 + eps, 1.0 - eps, h + 2 * pad)[:h]
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None].repeat(16, 1, 1, 1)
    offsets = torch.randint(-pad, pad + 1, (2, 16, 1), generator=seeded())[:, :, 0]
    shift = (torch.stack([offsets[1], offsets[0]], -1) + pad)[:, None, None, :]
    sampled = F.grid_sample(
        x, grid + shift * 2.0 / (h + 2 * pad), padding_mode="zeros", align_corners=False
    )
    torch.testing.assert_close(
        random_shift(pixels, seeded(), pad).float(), sampled, atol=0.05, rtol=0
    )


def test_random_crop_draws_every_offset_the_last_included():
    ramp = torch.arange(6, dtype=torch.uint8).expand(400, 3, 6, 6).contiguous()
    corners = random_crop(ramp, seeded(), 4)[:, 0, 0, 0]
    assert sorted(corners.unique().tolist()) == [0, 1, 2]


def test_center_crop_is_the_middle(pixels):
    assert torch.equal(center_crop(pixels, 16), pixels[:, :, 2:18, 2:18])


def test_random_convolution_equals_a_loop_over_samples_and_frames(pixels):
    strong = random_convolution(pixels, seeded())
    weights = torch.randn(48, 3, 3, 3, generator=seeded()).view(16, 3, 3, 3, 3)
    for i in range(16):
        for frame in range(3):
            x = pixels[i : i + 1, 3 * frame : 3 * frame + 3].float() / 255
            y = torch.sigmoid(F.conv2d(F.pad(x, (1,) * 4, mode="replicate"), weights[i])) * 255
            torch.testing.assert_close(strong[i : i + 1, 3 * frame : 3 * frame + 3], y)


def test_overlay_blends_one_image_with_all_frames_of_a_sample(pixels):
    images = OverlayImages(None, size=24, seed=0, count=8)
    blended = overlay(pixels, seeded(), images, alpha=0.5)
    drawn = images.sample(16, (20, 20), seeded(), torch.device("cpu"))
    expected = 0.5 * pixels.float() + 0.5 * drawn.float().repeat(1, 3, 1, 1)
    torch.testing.assert_close(blended, expected)


def test_overlay_images_are_crops_of_the_bank_mirrored_or_not():
    images = OverlayImages(None, size=6, seed=0, count=2)
    drawn = images.sample(40, (6, 6), seeded(), torch.device("cpu"))
    bank = {tuple(x.flatten().tolist()) for x in (*images.images, *images.images.flip(-1))}
    assert {tuple(x.flatten().tolist()) for x in drawn} == bank


def test_procedural_textures_repeat_with_the_seed_and_vary_within_it():
    first, again = (procedural_textures(12, 16, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)
    assert len(np.unique(first.reshape(12, -1), axis=0)) == 12
    assert first.reshape(12, -1).std(axis=1).min() > 1


def test_overlay_folder_is_read_and_its_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        OverlayImages(str(tmp_path / "none"), size=8, seed=0)
    with pytest.raises(UserError, match="holds no image"):
        OverlayImages(str(tmp_path), size=8, seed=0)
    Image.new("RGB", (30, 20), (10, 20, 30)).save(tmp_path / "a.png")
    images = OverlayImages(str(tmp_path), size=8, seed=0).images
    assert images.shape == (1, 3, 8, 8)
    assert images[0, :, 0, 0].tolist() == [10, 20, 30]
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b\.png"):
        OverlayImages(str(tmp_path), size=8, seed=0)


@pytest.mark.parametrize(
    ("shape", "views"),
    [
        ((9, 24, 24), 1),
        ((9, 24, 48), 2),
        ((5, 3, 24, 72), 3),
        ((9, 24, 36), 1),
        ((9, 48, 24), 1),
    ],
)
def test_the_width_tells_how_many_views_there_are(shape, views):
    assert count_views(shape) == views


@pytest.fixture
def wide():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 6, 20, 60), dtype=torch.uint8, generator=generator)


def test_every_view_is_shifted_by_itself(wide):
    shifted = random_shift(wide, seeded(), pad=4)
    offsets = torch.randint(-4, 5, (2, 5 * 3, 1), generator=seeded())[:, :, 0]
    for number, (down, right) in enumerate(offsets.T.tolist()):
        sample, left = number // 3, number % 3 * 20
        view = wide[sample : sample + 1, :, :, left : left + 20].float()
        padded = F.pad(view, (4, 4, 4, 4), mode="replicate")
        expected = padded[0, :, 4 + down : 24 + down, 4 + right : 24 + right]
        assert torch.equal(shifted[sample, :, :, left : left + 20].float(), expected)
    assert len(offsets.T.unique(dim=0)) > 5


def test_every_view_is_cropped_by_itself(wide):
    cropped = random_crop(wide, seeded(), 16)
    middle = center_crop(wide, 16)
    assert cropped.shape == middle.shape == (5, 6, 16, 48)
    top, left = (torch.randint(0, 5, (15, 1), generator=g) for g in [seeded()] for _ in range(2))
    for number, (down, right) in enumerate(torch.cat([top, left], 1).tolist()):
        sample, view = number // 3, number % 3
        one = wide[sample, :, :, view * 20 : view * 20 + 20]
        place = slice(view * 16, view * 16 + 16)
        expected = one[:, down : down + 16, right : right + 16]
        assert torch.equal(cropped[sample, :, :, place], expected)
        assert torch.equal(middle[sample, :, :, place], one[:, 2:18, 2:18])


def test_a_border_of_zeros_undoes_the_central_crop(wide):
    inside = torch.zeros(20, 60, dtype=torch.bool)
    for view in range(3):
        inside[2:18, view * 20 + 2 : view * 20 + 18] = True
    assert torch.equal(zero_border(center_crop(wide, 16), 20), wide * inside)
    odd = torch.ones(1, 1, 7, 7)  # of 10: one more column on the right
    assert torch.equal(center_crop(zero_border(odd, 10), 7), odd)


@pytest.mark.parametrize("strong", ["convolution", "overlay"])
def test_views_are_strongly_augmented_by_themselves(wide, strong):
    bank = OverlayImages(None, size=25, seed=0, count=8)

    def augment(pixels, generator):
        if strong == "convolution":
            return random_convolution(pixels, generator)
        return overlay(pixels, generator, bank)

    apart = wide.unflatten(3, (3, 20)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    expected = augment(apart, seeded()).unflatten(0, (5, 3))
    got = augment(wide, seeded()).unflatten(3, (3, 20))
    for view in range(3):
        assert torch.equal(got[:, :, :, view], expected[:, view])


@pytest.mark.parametrize("augment", [random_shift, lambda p, g: random_crop(p, g, 16)])
def test_no_pixel_of_a_view_gets_into_its_neighbor(augment):
    values = torch.tensor([10, 90, 200], dtype=torch.uint8)
    flat = values.repeat_interleave(20).expand(30, 3, 20, 60).contiguous()
    seen = augment(flat, seeded())
    assert torch.equal(seen, values.repeat_interleave(seen.shape[3] // 3).expand_as(seen))
