"""Policies that draw chunks of actions: by denoising, or from a Gaussian."""
