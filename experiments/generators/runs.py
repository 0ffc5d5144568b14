"""Run folders of image generators: their config, and how one is begun, gone on with and left."""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.logging import Logger
from agents.core.memory import memory_errors_named
from agents.core.ranks import Ranks
from agents.core.run_loop import RunLoop
from agents.core.seeding import seed_libraries
from agents.core.trees import check_schema
from agents.generative_models.pretraining import Pretrainer
from agents.generative_models.tuner import GeneratorTuner
from experiments.generators.listening import NoLogger, ReadCheckpoints
from experiments.running.runs import (
    abandon_run,
    begin_run,
    lock_run,
    make_run_dir,
    write_json,
)
from experiments.train import stop_on_signal

SCHEMA = 1
"""Version of config.json's layout."""


class GeneratorSession(ABC):
    """A run that is open, as `run_session` drives it: every kind makes its own loop and says what it measures.

    Args:
        run: its folder.
        config: config.json's content.
        resume: go on from the newest checkpoint.
        keep: checkpoints to keep.
        ranks: the processes that train together; only the first one writes.
    """

    loop: RunLoop
    logger: Logger

    def __init__(
        self,
        run: Path,
        config: dict[str, Any],
        resume: bool,
        *,
        keep: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.run, self.config, self.ranks = run, config, ranks or Ranks()
        seed_libraries(config["seeds"]["agent"])
        make_store = CheckpointStore if self.ranks.is_first else ReadCheckpoints
        self.checkpoints = make_store(run, keep=keep, identity={"generator": config["command"]})
        saved = resume and self.checkpoints.latest() is not None
        self.parts = self.checkpoints.load() if saved else None
        """Of the checkpoint that the run goes on from, until `begin`; None where there is none."""
        self._resumes = resume

    def open_logger(self) -> Logger:
        """Open the run's metrics; what was written after the checkpoint is taken back."""
        done = self.parts["progress"]["agent_steps"] if self.parts else 0
        if self.ranks.is_first:
            self.logger = Logger(self.run, resume_from=done if self._resumes else None)
        else:
            self.logger = NoLogger()
        return self.logger

    def begin(self) -> None:
        """Begin the loop, or bring it to where the run was left."""
        if self.parts:
            self.loop.resume(self.parts)
        else:
            self.loop.begin()
        self.parts = None

    def settle(self) -> None:
        """Set the number of CPU threads, once for the whole run."""
        self.config["threads"] = self.config["threads"] or torch.get_num_threads()
        torch.set_num_threads(self.config["threads"])

    @abstractmethod
    def estimate(self) -> str:
        """Return what the rest of the run will take."""

    def close(self) -> None:
        """Close files."""
        self.logger.close()


def add_compile_flag(parser: argparse.ArgumentParser) -> None:
    """Add --compile, which `compile_learner` obeys."""
    parser.add_argument(
        "--compile", choices=("off", "on", "auto"), default=argparse.SUPPRESS,
        help="compile the denoiser; auto: on CUDA devices, and not where that fails [off]",
    )  # fmt: skip


def compile_learner(learner: Pretrainer | GeneratorTuner, config: Mapping[str, Any]) -> None:
    """Compile a learner's denoiser as a run's config says."""
    asked = config.get("compile", "off")  # older runs say nothing
    if asked == "on" or (asked == "auto" and learner.device.type != "cpu"):
        learner.compile(fall_back=asked == "auto")


def free_run_dir(name: str, root: Path = Path("runs/generators")) -> Path:
    """Return a folder that does not exist: the name, numbered when it is taken."""
    folder, number = root / name, 2
    while folder.exists():
        folder, number = root / f"{name}-{number}", number + 1
    return folder


def read_generator_config(run: Path, command: str) -> dict[str, Any]:
    """Return the config.json of a run of `command`.

    Raises:
        UserError: the folder is no such run, or one of another version.
    """
    file = run / "config.json"
    if not file.is_file():
        raise UserError(f"'{run}' is no run folder (it has no config.json); give one of {command}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"'{file}' is damaged ({error}); restore it or train anew") from error
    if not isinstance(config, dict) or config.get("command") != command:
        raise UserError(f"'{run}' is no run of {command}; give a folder that it wrote")
    check_schema(file, config.get("schema"), SCHEMA)
    return config


def refuse_changes(argv: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse flags that would make a resumed run another one.

    Raises:
        UserError: names the flag, and those that may be given.
    """
    flags = sorted({"--resume", *(f"--{name.replace('_', '-')}" for name in allowed)})
    for argument in argv:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in flags:
            raise UserError(
                f"{flag} cannot change with --resume (it would be another run); {', '.join(flags)} can"
            )


def run_session(
    run: Path,
    config: dict[str, Any],
    open_session: Callable[[bool], GeneratorSession],
    *,
    resume: bool,
    less_memory: str,
    ranks: Ranks | None = None,
) -> bool:
    """Train in a run folder until the end, or until a signal asks to save and leave.

    Args:
        run: the folder; it is made for a new run.
        config: written when the run begins and again when everything is settled.
        open_session: opens the run, given whether it goes on.
        resume: go on with it.
        less_memory: what to do where memory does not suffice.
        ranks: the processes that train together; only the first one has the folder.

    Returns:
        Whether there is a run to tell of: False where nothing was left to do.
    """
    ranks = ranks or Ranks()
    begins = ranks.is_first and not resume
    is_new = begins and make_run_dir(run)
    lock = lock_run(run) if ranks.is_first else nullcontext()
    with stop_on_signal() as stopped, lock, memory_errors_named(less_memory):
        if begins:
            begin_run(run, config)
        ranks.each()  # a folder that is taken ends all before they load anything
        print(f"run folder: {run}", flush=True)
        if config["threads"]:  # a session evaluates its base as it opens
            torch.set_num_threads(config["threads"])
        try:
            session = open_session(resume)
        except BaseException:
            if begins:
                abandon_run(run, is_new=is_new)
            raise
        try:
            loop, steps = session.loop, session.loop.settings.steps
            done = loop.state.progress.agent_steps
            if resume and done >= steps:
                print(
                    f"nothing to do: it has {done:,} of {steps:,} {loop.unit}s; give more --steps to go on"
                )
                session.close()
                return False
            session.settle()
            if ranks.is_first:
                write_json(run / "config.json", config)
            print(session.estimate(), flush=True)
            loop.hooks.stop = stopped
            loop.run()
        except BaseException:
            with suppress(UserError):  # a disk that is full says so once
                session.close()
            raise
        session.close()
        print(
            f"{'stopped' if stopped() else 'finished'} after {loop.state.progress.agent_steps:,} {loop.unit}s, "
            f"{loop.state.progress.wall_seconds / 60:.1f} min"
        )
    return True
