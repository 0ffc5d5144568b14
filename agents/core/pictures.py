"""Pictures for the log: what an agent sees, and where it looks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def overlay_grid(pixels: Tensor, saliency: Tensor, samples: int = 4) -> np.ndarray:
    """Draw the newest frame, the saliency, and both together, one row per sample, uint8 [n*H, 3*W, 3]."""
    frames = pixels[:samples, -3:].float().cpu().numpy().transpose(0, 2, 3, 1)
    rows = panels(frames, saliency[:samples, -1].detach().float().cpu().numpy())
    return rows.reshape(-1, *rows.shape[2:])


def newest_frames(pixels: Tensor, samples: int = 4) -> np.ndarray:
    """Return the newest frame of the first samples side by side, uint8 [H, n*W, 3]."""
    frames = pixels[:samples, -3:].clamp(0, 255).to(torch.uint8).cpu().numpy()
    return np.concatenate(list(frames.transpose(0, 2, 3, 1)), axis=1)


def panels(frames: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """Draw frames, saliency, and both together side by side.

    Saliency is scaled by its 99th percentile per picture, so that one hot pixel does not hide the rest.

    Args:
        frames: [N, H, W, 3] in [0, 255].
        saliency: float [N, H, W], not negative.

    Returns:
        uint8 [N, H, 3*W, 3].
    """
    colors = frames.astype(np.float32) / 255
    scale = np.quantile(saliency, 0.99, axis=(1, 2), keepdims=True) + 1e-12
    heat = np.clip(saliency / scale, 0, 1)[..., None]
    gray = colors.mean(-1, keepdims=True)
    hot = np.concatenate([heat, heat * heat * 0.6, np.zeros_like(heat)], axis=-1)
    both = np.clip(0.45 * gray * (1 - heat) + hot, 0, 1)
    rows = np.concatenate([colors, np.repeat(heat, 3, -1), both], axis=2)
    return (rows * 255).round().astype(np.uint8)
