"""The compose file: its services train and serve TensorBoard from the image's own volume, on this machine only."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import envs
from experiments.train import parser
from tests.docker.dockerfile import chain, read_dockerfile

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker" / "compose.yaml"
COMPOSE = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
_VARIABLE = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")


def interpolated(text: str, **variables: str) -> list[str]:
    """Return a command's words as compose gives them to the entry point."""
    plain = _VARIABLE.sub(lambda match: variables.get(match[1]) or match[2], text)
    assert "$" not in plain
    return shlex.split(plain)


def test_the_services_are_a_learner_for_each_hardware_and_tensorboard() -> None:
    assert set(SERVICES) == {"train", "train-gpu", "tensorboard"}
    assert [name for name in SERVICES if "profiles" in SERVICES[name]] == ["train-gpu"]


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_builds_from_exists(name: str) -> None:
    build = SERVICES[name]["build"]
    context = (FILE.parent / build["context"]).resolve()
    assert context == ROOT
    arguments, stages = read_dockerfile(context / build["dockerfile"])
    assert set(build["args"]) <= set(arguments)
    chain(arguments | build["args"], stages)
    assert build["args"]["HARDWARE"] == ("gpu" if name == "train-gpu" else "cpu")


def test_no_two_services_export_an_image_under_one_name() -> None:
    names = [service["image"] for service in SERVICES.values()]
    assert sorted(names) == ["sightline:cpu", "sightline:gpu", "sightline:tensorboard"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_shares_the_images_volume(name: str) -> None:
    _, instructions = chain(*read_dockerfile(ROOT / "docker" / "Dockerfile"))
    (volume,) = [i.text for i in instructions if i.keyword == "VOLUME"]
    source, target, *mode = SERVICES[name]["volumes"][0].split(":")
    assert (source, target) == ("runs", volume)
    assert source in COMPOSE["volumes"]
    assert mode == (["ro"] if name == "tensorboard" else [])


@pytest.mark.parametrize(("name", "preset"), [("train", "cpu"), ("train-gpu", "gpu")])
def test_training_takes_its_flags_from_the_environment(name: str, preset: str) -> None:
    command = SERVICES[name]["command"]
    module, *flags = interpolated(command)
    assert module == "experiments.train"
    given = parser("sgqn").parse_args(flags)
    assert (given.agent, given.env, given.preset, given.seed) == (
        "sgqn", "dmc/cartpole-swingup", preset, 1,
    )  # fmt: skip
    assert given.env in envs.list_ids()
    _, *flags = interpolated(
        command, AGENT="svea", TASK="toy/reach", SEED="7", ARGUMENTS="--steps 500 --batch-size 8"
    )
    given = parser("svea").parse_args(flags)
    assert (given.agent, given.env, given.seed) == ("svea", "toy/reach", 7)
    assert (given.steps, given.batch_size) == (500, 8)


def test_the_gpu_service_gets_a_gpu_and_uses_it() -> None:
    service = SERVICES["train-gpu"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert parser("sgqn").parse_args(interpolated(service["command"])[1:]).device == "cuda"
    assert "deploy" not in SERVICES["train"]


def test_tensorboard_reads_the_runs_and_is_reached_from_this_machine_only() -> None:
    service = SERVICES["tensorboard"]
    module, *flags = shlex.split(service["command"])
    assert importlib.util.find_spec(module)
    assert dict(zip(flags[::2], flags[1::2], strict=True)) == {
        "--logdir": "runs",
        "--host": "0.0.0.0",
        "--port": "6006",
    }
    assert service["ports"] == ["127.0.0.1:${TENSORBOARD_PORT:-6006}:6006"]
    # The image's health check is the doctor's, who says nothing of a server.
    assert service["healthcheck"]["test"][:3] == ["CMD", "python", "-c"]
    compile(service["healthcheck"]["test"][3], "healthcheck", "exec")


def test_the_readme_names_every_variable() -> None:
    names = {name for name, _ in _VARIABLE.findall(FILE.read_text())}
    page = (FILE.parent / "README.md").read_text()
    assert names == {name for name in names if f"`{name}`" in page}
    assert names >= {"AGENT", "TASK", "PRESET", "SEED", "ARGUMENTS", "TENSORBOARD_PORT"}
