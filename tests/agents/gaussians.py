"""Denoisers of normally distributed data, for which everything is known in closed form."""

import torch


def exact_denoiser(path, kind, mean=0.0, variance=1.0):
    """Return the best possible network for data N(mean, variance), written without `denoising`'s weights.

    E[noise | x_t] = sigma * (x_t - alpha * mean) / (alpha^2 * variance + sigma^2).
    """

    def denoiser(x, t, condition):
        # To float64 and to the discrete path's knots: a time in float32 is 1e-8 off.
        c = path.coefficients(t.double()).beside(x)
        scaled = (x - c.alpha * mean) / (c.alpha**2 * variance + c.sigma**2)
        x0, noise = mean + c.alpha * variance * scaled, c.sigma * scaled
        return path.target(kind, x0, noise, t)

    return denoiser


def variance_after(sampler, denoiser, start):
    """Return the variance that a chain of a linear denoiser ends with, by the recursion v <- gain^2 * v + std^2.

    Exact: a step's mean is affine in x, so two evaluations give its gain.
    """
    variance = start
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for index in range(sampler.steps):
        step = sampler.step(denoiser, ends, index)
        gain = float(step.mean[1] - step.mean[0])
        variance = gain**2 * variance + float(step.std) ** 2
    return variance


def marginal_variance(path, t, variance):
    """Return the variance of x_t for data of a variance."""
    c = path.coefficients(torch.as_tensor(t, dtype=torch.float64))
    return float(c.alpha**2 * variance + c.sigma**2)
