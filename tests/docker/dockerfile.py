"""Read a Dockerfile and a .dockerignore as Docker does, as far as ours go; what is unknown raises."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Template

KEYWORDS = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "HEALTHCHECK", "RUN", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction: its keyword in capitals, and what follows on one line."""

    keyword: str
    text: str

    @property
    def words(self) -> list[str]:
        """The text as words: a JSON array's items, else what stands between spaces."""
        return json.loads(self.text) if self.text.startswith("[") else self.text.split()

    @property
    def commands(self) -> list[str]:
        """A RUN's shell commands, split at `&&`."""
        return [command.strip() for command in self.text.split("&&")]


@dataclass(frozen=True)
class Stage:
    """What follows one FROM."""

    base: str
    name: str
    instructions: list[Instruction]


def read_dockerfile(file: Path) -> tuple[dict[str, str], list[Stage]]:
    """Return the arguments before the first FROM with their defaults, and the stages.

    Raises:
        ValueError: an instruction that is none, or stands where it may not.
    """
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in _instructions(file.read_text()):
        if instruction.keyword not in KEYWORDS:
            raise ValueError(f"{instruction.keyword} is not an instruction that we know")
        if instruction.keyword == "FROM":
            base, word, name = instruction.words
            if word.upper() != "AS":
                raise ValueError(f"FROM {instruction.text}: a stage needs a name")
            stages.append(Stage(base, name, []))
        elif stages:
            stages[-1].instructions.append(instruction)
        elif instruction.keyword == "ARG":
            name, _, default = instruction.text.partition("=")
            arguments[name] = default
        else:
            raise ValueError(f"{instruction.keyword} stands before the first FROM")
    return arguments, stages


def _instructions(text: str) -> Iterator[Instruction]:
    """Yield instructions: comment lines go, also between the lines of one instruction."""
    lines = [line.strip() for line in text.splitlines()]
    whole = ""
    for line in lines:
        if not line or line.startswith("#"):
            continue
        whole += line.removesuffix("\\")
        if not line.endswith("\\"):
            keyword, _, rest = whole.partition(" ")
            yield Instruction(keyword.upper(), rest.strip())
            whole = ""
    if whole:
        raise ValueError(f"the last instruction goes on behind the file's end: {whole}")


def chain(arguments: Mapping[str, str], stages: list[Stage]) -> tuple[str, list[Instruction]]:
    """Return the last stage's base image and all instructions from it on, for these build arguments."""
    by_name = {stage.name: stage for stage in stages}
    name, instructions = stages[-1].name, []
    while name in by_name:
        stage = by_name[name]
        instructions = stage.instructions + instructions
        name = Template(stage.base).substitute(arguments)
    return name, instructions


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore's lines keep `path`, relative to the context, from the engine."""
    names = [path, *(str(p) for p in PurePosixPath(path).parents if str(p) != ".")]
    answer = False
    for pattern in patterns:
        if not pattern.strip() or pattern.startswith("#"):
            continue
        expression = _expression(pattern.removeprefix("!").strip("/ "))
        if any(expression.fullmatch(name) for name in names):
            answer = not pattern.startswith("!")
    return answer


def _expression(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))


def copied_files(context: Path, source: str) -> list[Path]:
    """Return the files that COPY takes for one source, sorted: .dockerignore's are not among them."""
    patterns = (context / ".dockerignore").read_text().splitlines()
    start = context / source
    files = [start] if start.is_file() else [p for p in start.rglob("*") if p.is_file()]
    return sorted(p for p in files if not ignored(p.relative_to(context).as_posix(), patterns))
