"""The image: what it copies exists, its steps are the Makefile's own, and who runs in it is nobody special."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from envs import rendering
from tests.docker.dockerfile import (
    Instruction,
    chain,
    copied_files,
    ignored,
    read_dockerfile,
)

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker" / "Dockerfile"
PATTERNS = (ROOT / ".dockerignore").read_text().splitlines()

HARDWARE = pytest.mark.parametrize("hardware", ["cpu", "gpu"])


def image(hardware: str) -> list[Instruction]:
    """Return the instructions of one of the two images, from its base on."""
    arguments, stages = read_dockerfile(FILE)
    return chain(arguments | {"HARDWARE": hardware}, stages)[1]


def texts(hardware: str, keyword: str) -> list[str]:
    return [i.text for i in image(hardware) if i.keyword == keyword]


SETUP = 'make setup EXTRAS="$EXTRAS"'


def commands(hardware: str) -> list[str]:
    """Return all shell commands that build an image."""
    return [c for i in image(hardware) if i.keyword == "RUN" for c in i.commands]


def made(*words: str) -> str:
    """Return what make would do, from nothing on."""
    make = shutil.which("make")
    assert make
    command = [make, "--dry-run", "--always-make", "PYTHON=python3", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def debian_packages(text: str) -> set[str]:
    found = re.findall(r"apt-get install((?: -\S+)*)((?: [a-z0-9.+-]+)+)", text)
    return {name for _, names in found for name in names.split()}


def test_an_instruction_that_docker_lacks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM debian AS a\nRUN one \\\n# why\n  && two\nCOPPY a b\n")
    with pytest.raises(ValueError, match="COPPY"):
        read_dockerfile(file)
    file.write_text("ARG X=1\nFROM debian:${X} AS a\nRUN one \\\n# why\n  && two\nFROM a AS b\n")
    base, instructions = chain(*read_dockerfile(file))
    assert base == "debian:1"
    assert [i.commands for i in instructions] == [["one", "two"]]
    file.write_text("FROM debian AS a\nRUN one \\\n")
    with pytest.raises(ValueError, match="behind the file's end"):
        read_dockerfile(file)


def test_dockerignore_is_read_as_docker_reads_it() -> None:
    patterns = ["# all", "*", "!agents", "!docker/a.json", "**/__pycache__", "agents/*.txt"]
    kept = ["agents/core/a.py", "docker/a.json", "agents/core/a.txt"]
    lost = ["docs/a.md", "docker/b.json", "agents/core/__pycache__/a.pyc", "agents/a.txt"]
    assert [name for name in kept + lost if not ignored(name, patterns)] == kept


@HARDWARE
def test_the_base_is_pinned_by_a_dated_tag(hardware: str) -> None:
    arguments, stages = read_dockerfile(FILE)
    base, _ = chain(arguments | {"HARDWARE": hardware}, stages)
    assert re.fullmatch(r"debian:bookworm-\d{8}-slim", base)


def test_without_arguments_it_is_the_cpu_image() -> None:
    assert chain(*read_dockerfile(FILE))[1] == image("cpu")


@HARDWARE
def test_every_copied_path_exists_and_reaches_the_engine(hardware: str) -> None:
    for copy in texts(hardware, "COPY"):
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists(), copy
            assert copied_files(ROOT, source), f"{copy}: .dockerignore keeps it out"


@HARDWARE
def test_all_that_the_installation_reads_is_copied_before_it(hardware: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {pattern.removesuffix("*") for pattern in patterns}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {"pyproject.toml", "constraints.txt", "Makefile"}
    steps = [i.text for i in image(hardware)]
    before = steps[: steps.index(SETUP)]
    assert needed <= {word for text in before for word in text.split()}


@pytest.mark.parametrize("path", ["runs/a/config.json", ".venv/bin/python", ".git/HEAD", "a.mp4"])
def test_runs_and_environments_never_go_to_the_engine(path: str) -> None:
    assert ignored(path, PATTERNS)


@HARDWARE
def test_every_step_is_the_makefiles_own(hardware: str) -> None:
    own = [
        "apt-get update -qq",
        "apt-get install -y -qq --no-install-recommends make",
        "rm -rf /var/lib/apt/lists/*",
        "useradd --create-home --uid 1000 sightline",
        "install --directory --owner=sightline --group=sightline /home/sightline/runs",
    ]
    targets = [c.removeprefix("make ") for c in commands(hardware) if c not in own]
    assert targets == ["packages", "torch", SETUP.removeprefix("make ")]
    for target in ("packages", "torch", "setup"):
        assert " install " in made(target)


def test_the_makefile_installs_what_python_and_each_gl_backend_need() -> None:
    packages = debian_packages(made("packages"))
    assert {"python3", "python3-venv"} <= packages
    assert debian_packages(rendering._NO_GL.replace("'", "\n")) <= packages
    # `gl` is what brings them to a machine that was not made by `packages`.
    assert packages - {"python3", "python3-venv"} == debian_packages(made("gl"))


def test_the_image_has_no_tools_of_developers() -> None:
    assert "--editable '.[dev,data,export]'" in made("setup")
    assert "--editable '.'" in made("setup", "EXTRAS=")
    assert "EXTRAS=" in [i.text for i in image("cpu") if i.keyword == "ARG"], "none by default"
    assert "--editable '.[data,export]'" in made("setup", "EXTRAS=data,export")


def test_the_index_of_torch_is_asked_for_torch_only() -> None:
    lines = made("setup", "TORCH_INDEX=https://index").splitlines()
    asked = [line for line in lines if "--extra-index-url https://index" in line]
    assert [line.split()[-1] for line in asked] == ["torch"]


@HARDWARE
def test_who_runs_is_not_root_and_owns_the_volume(hardware: str) -> None:
    instructions = image(hardware)
    steps = [i.keyword for i in instructions]
    assert texts(hardware, "USER") == ["sightline"]
    assert "RUN" not in steps[steps.index("USER") :]
    assert texts(hardware, "WORKDIR")[-1] == "/home/sightline"
    (volume,) = texts(hardware, "VOLUME")
    assert commands(hardware)[-1].endswith(f"--owner=sightline --group=sightline {volume}")


@HARDWARE
def test_health_is_the_doctors_word_and_the_entry_is_any_command(hardware: str) -> None:
    (health,) = texts(hardware, "HEALTHCHECK")
    assert json.loads(health.partition("CMD ")[2]) == ["python", "-m", "experiments.doctor", "--quick"]  # fmt: skip
    assert json.loads(*texts(hardware, "ENTRYPOINT")) == ["python", "-m"]
    assert json.loads(*texts(hardware, "CMD")) == ["experiments.doctor"]
    assert "PATH=/opt/sightline/.venv/bin:$PATH" in " ".join(texts(hardware, "ENV"))


def test_each_image_draws_with_its_own_backend() -> None:
    assert "MUJOCO_GL=osmesa" in " ".join(texts("cpu", "ENV"))
    gpu = " ".join(texts("gpu", "ENV"))
    assert "MUJOCO_GL=egl" in gpu
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,graphics,utility" in gpu
    vendor = "docker/10_nvidia.json /usr/share/glvnd/egl_vendor.d/"
    assert vendor in texts("gpu", "COPY")
    assert vendor not in texts("cpu", "COPY")
    content = json.loads((ROOT / "docker" / "10_nvidia.json").read_text())
    assert content["ICD"] == {"library_path": "libEGL_nvidia.so.0"}


def test_only_the_cpu_image_takes_torch_from_the_cpu_index() -> None:
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cpu" in texts("cpu", "ARG")
    assert "TORCH_INDEX=" in texts("gpu", "ARG")
