"""An image's stand-in where no engine is at hand: a bare Debian root in which a Dockerfile's steps run.

Each step runs in mount and process namespaces of its own: what it mounts and leaves behind is gone with it, so
that the root can be removed like any folder.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from string import Template

from tests.docker.dockerfile import Instruction, copied_files

MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_ENTER = """
set -e
root=$1; user=$2; folder=$3; shift 3
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for shared in $SHARED; do
  mkdir -p "$root$shared"
  mount --bind "$shared" "$root$shared"
  mount -o remount,bind,ro "$root$shared"
done
unset SHARED
exec chroot --userspec="$user:$user" "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
"""


def obstacle(suite: str) -> str | None:
    """Return why this machine cannot make a bare Debian, or None if it can."""
    if os.getuid() != 0:
        return "only root can make and enter a bare Debian"
    if not shutil.which("debootstrap"):
        return "debootstrap is not installed"
    if not KEYRING.exists():
        return f"Debian's keyring, {KEYRING}, is not installed"
    if _isolated(["true"], dict(os.environ)).returncode:
        return "this machine allows no mount namespaces"
    try:
        with urllib.request.urlopen(f"{MIRROR}/dists/{suite}/Release", timeout=20):
            return None
    except OSError as error:
        return f"{MIRROR} cannot be reached: {error}"


def _isolated(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    unshare = "unshare --mount --pid --fork --kill-child --propagation private".split()
    return subprocess.run(
        [*unshare, *command], env=environment, capture_output=True, text=True, check=False
    )


class BareRoot:
    """A root file system, and the state that a Dockerfile's instructions leave: environment, folder, user.

    Attributes:
        folder: where the root lies.
        environment: variables of every step.
        entrypoint, healthcheck: the words of these instructions, once applied.
    """

    def __init__(self, folder: Path, suite: str) -> None:
        """Make a minimal Debian in `folder`, which must not exist."""
        self.folder = folder
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.entrypoint: list[str] = []
        self.healthcheck: list[str] = []
        self._workdir, self._user = "/", "root"
        done = _isolated(
            [
                "debootstrap",
                "--variant=minbase",
                f"--keyring={KEYRING}",
                suite,
                str(folder),
                MIRROR,
            ],
            dict(os.environ),
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        self._host, self._shared = self._host_settings()

    def apply(self, instruction: Instruction, context: Path, arguments: dict[str, str]) -> None:
        """Do what the engine would do for one instruction.

        Args:
            instruction: one of the Dockerfile.
            context: folder that COPY copies from.
            arguments: build arguments by name; ARG adds its default where a name is absent.
        """
        text = instruction.text
        match instruction.keyword:
            case "ARG":
                name, _, default = text.partition("=")
                arguments.setdefault(name, default)
            case "ENV":
                known = arguments | self.environment
                pairs = (word.split("=", 1) for word in instruction.words)
                self.environment |= {k: Template(v).substitute(known) for k, v in pairs}
            case "WORKDIR":
                self._workdir = text
                self._inside(text).mkdir(parents=True, exist_ok=True)
            case "USER":
                self._user = text
            case "COPY":
                self._copy(context, instruction.words)
            case "RUN":
                self.run("/bin/sh", "-c", text)
            case "ENTRYPOINT":
                self.entrypoint = instruction.words
            case "HEALTHCHECK":
                command = text[text.index("CMD ") :].removeprefix("CMD ")
                self.healthcheck = Instruction("CMD", command).words

    def run(self, *command: str, **environment: str) -> str:
        """Run a command as the present user in the present folder, and return what it printed.

        Raises:
            AssertionError: it failed; with the end of its output.
        """
        home = {"HOME": "/root" if self._user == "root" else f"/home/{self._user}"}
        variables = home | self._host | self.environment | environment
        place = [str(self.folder), self._user, self._workdir]
        done = _isolated(
            ["/bin/sh", "-c", _ENTER, "enter", *place, *command],
            variables | {"SHARED": " ".join(self._shared)},
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"{command} exits with {done.returncode}: {output[-3000:]}"
        return output

    def _inside(self, path: str) -> Path:
        return self.folder / path.lstrip("/")

    def _copy(self, context: Path, words: list[str]) -> None:
        *sources, destination = words
        target = self._inside(str(Path(self._workdir) / destination))
        for source in sources:
            origin = context / source
            # Of a folder the content is copied; a file goes into a folder, which ends with a slash.
            assert origin.is_dir() or destination.endswith("/"), destination
            base = origin if origin.is_dir() else origin.parent
            for file in copied_files(context, source):
                copy = target / file.relative_to(base)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)

    def _host_settings(self) -> tuple[dict[str, str], list[str]]:
        """Return how this machine reaches packages: pip's settings as variables, and folders that they name."""
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        )  # fmt: skip
        variables = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
        # An index that this machine cannot reach is asked for every package: once is enough.
        variables["PIP_RETRIES"] = "1"
        shared: set[str] = set()
        for line in listed.stdout.splitlines():
            key, _, quoted = line.partition("=")
            value = ast.literal_eval(quoted)
            name = key.rpartition(".")[2].upper().replace("-", "_")
            for word in value.split():
                path = Path(word.removeprefix("file://"))
                if path.is_absolute() and path.is_dir():
                    # An index's pages link to files beside it.
                    shared.add(str(path.parent if path.name == "simple" else path))
                elif path.is_absolute() and path.is_file():
                    shutil.copy2(path, self._inside(path.name))
                    value = value.replace(word, f"/{path.name}")
            variables[f"PIP_{name}"] = value
        return variables, sorted(shared)


def remove_root(folder: Path) -> None:
    """Remove a root, also one that was not finished.

    Raises:
        AssertionError: something is mounted in it, which removing would destroy.
    """
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    places = [Path(line.split()[4]) for line in mounts]
    assert not [place for place in places if place.is_relative_to(folder)]
    if folder.exists():
        shutil.rmtree(folder)
