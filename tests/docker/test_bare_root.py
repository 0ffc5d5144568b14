"""The image's steps, run for real in a bare Debian: what comes out trains and draws as its own user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.bare_root import BareRoot, obstacle, remove_root
from tests.docker.dockerfile import chain, read_dockerfile
from tests.experiments.helpers import arguments

ROOT = Path(__file__).resolve().parents[2]

_DRAW = """
import envs
from envs.rendering import choose_backend, gl_renderer
env = envs.make("dmc/cartpole-swingup", seed=1)
observation, _ = env.reset()
assert observation.shape == (9, 84, 84) and observation.std() > 10, observation.std()
print(choose_backend(), gl_renderer())
"""


@pytest.fixture
def image(tmp_path: Path) -> Iterator[BareRoot]:
    """Yield the CPU image's file system, as the Dockerfile's steps make it."""
    base, instructions = chain(*read_dockerfile(ROOT / "docker" / "Dockerfile"))
    suite = base.removeprefix("debian:").partition("-")[0]
    if reason := obstacle(suite):
        pytest.skip(reason)
    # The Makefile's own variable says where else torch is, as it does outside of images.
    values = {k: os.environ[k] for k in ("TORCH_INDEX",) if k in os.environ}
    try:
        root = BareRoot(tmp_path / "root", suite)
        for instruction in instructions:
            root.apply(instruction, ROOT, values)
        yield root
    finally:
        remove_root(tmp_path / "root")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_trains_and_draws_as_its_own_user(image: BareRoot) -> None:
    assert image.run("id", "-un") == "sightline\n"

    trained = image.run(
        *image.entrypoint, "experiments.train", *arguments("sac", "toy/reach", "runs/toy", steps=40)
    )
    assert "finished after 40 agent steps" in trained
    run = image.folder / "home" / "sightline" / "runs" / "toy"
    assert (run / "config.json").stat().st_uid == 1000

    assert image.run("python", "-c", _DRAW).startswith("osmesa ")
    # The GPU image's backend; its steps are the same, and its build finds Mesa's EGL too.
    assert image.run("python", "-c", _DRAW, MUJOCO_GL="egl").startswith("egl ")

    assert "tensorboard" in image.run(*image.entrypoint, "tensorboard.main", "--helpfull")
    with pytest.raises(AssertionError, match="Permission denied"):
        image.run("touch", "/opt/sightline/experiments/train.py")
    image.run(*image.healthcheck)
