"""Run folders read into memory for a report.

Only a folder that is no run stops a report; whatever is missing inside one becomes a sentence in
the run's `notes`.
"""

from __future__ import annotations

import csv
import glob
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from agents.core.errors import UserError
from agents.core.trees import check_schema
from agents.policy import SCHEMA
from experiments.running.runs import file_stem

VIDEO_SUFFIXES = (".mp4", ".gif")

Axis = Literal["agent_steps", "env_frames", "gradient_updates", "wall_minutes"]
"""What a run has spent when it logs a value."""
AXES: tuple[Axis, ...] = get_args(Axis)

ZERO_NOISE = {"start_noise": 0}
"""How an evaluation says that it began chains from zeros instead of noise, whatever the run usually does."""

SALIENCY = ("iou", "energy", "pointing", "area")
"""How saliency lies on the foreground: overlap with it, share inside it, how often its peak does; and
the foreground's share of the picture, which is what a random look would score."""

FOREGROUND = "all but sky, floor and walls"
"""What evaluations scored that do not say."""


@dataclass(frozen=True)
class Series:
    """A logged value beside what was spent until then; arrays are float64 [P], in log order."""

    agent_steps: np.ndarray
    env_frames: np.ndarray
    gradient_updates: np.ndarray
    wall_minutes: np.ndarray
    values: np.ndarray
    """Finite."""

    def along(self, axis: Axis) -> np.ndarray:
        """Return what was spent, on one of the axes."""
        return getattr(self, axis)


@dataclass(frozen=True)
class Result:
    """Episodes under one distraction."""

    returns: np.ndarray
    """float64 [episodes], finite."""
    success: float | None
    """Share of successful episodes in [0, 1], where the simulator knows success."""
    saliency: Mapping[str, float] = field(default_factory=dict)
    """Where the agent looks, mean over episodes in [0, 1]: `SALIENCY`; empty if not measured."""
    successes: np.ndarray = field(default_factory=lambda: np.empty(0))
    """float64 [episodes], what `success` is the mean of; empty without."""


@dataclass(frozen=True)
class Evaluation:
    """The newest evaluation of a run, by distraction; files of the same checkpoint are merged."""

    agent_steps: int
    checkpoint: str
    split: str
    backgrounds: str
    """Where the videos behind the agent came from: `procedural` or a folder."""
    foreground: str
    """What saliency was scored against, in words."""
    system: Mapping[str, Any] = field(default_factory=dict)
    """Commit, renderer and hardware that it was made with; empty where its file is older than their record."""
    results: dict[str, Result] = field(default_factory=dict)
    videos: dict[str, Path] = field(default_factory=dict)
    saliency: dict[str, Path] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    """Digests of the policy, as runs that begin with it keep them; older evaluations have none."""


@dataclass
class Run:
    """One training run, i.e. one seed of one agent on one task."""

    path: Path
    agent: str
    env_id: str
    seed: int | None
    config: dict[str, Any]
    system: dict[str, Any]
    command: str
    counters: dict[str, float] = field(default_factory=dict)
    """Last agent_steps, env_frames, gradient_updates and wall_seconds; empty without metrics."""
    series: dict[str, Series] = field(default_factory=dict)
    """By tag."""
    evaluation: Evaluation | None = None
    zero_noise: Evaluation | None = None
    """The newest of the same checkpoint from zero noise (`evaluate --acting start_noise=0`)."""
    random_returns: list[tuple[float, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def renderers(self) -> list[str]:
        """What drew the pictures that it learned from, and those that it was evaluated on, as far as recorded."""
        systems = [self.system, self.evaluation.system if self.evaluation else {}]
        return list(dict.fromkeys(s["gl_renderer"] for s in systems if s.get("gl_renderer")))

    @property
    def label(self) -> str:
        """Name this run as tables do."""
        return f"{self.agent}, {self.env_id}, seed {'?' if self.seed is None else self.seed}"


def find_runs(arguments: Iterable[Path]) -> list[Path]:
    """Return the run folders that paths, folders of runs and glob patterns name, each once.

    Raises:
        UserError: an argument that names no run.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        paths = [argument]
        if not argument.exists() and glob.has_magic(str(argument)):
            paths = [Path(name) for name in sorted(glob.glob(str(argument)))]
        runs = [run for path in paths for run in _runs_below(path, depth=3)]
        if not runs:
            raise UserError(
                f"'{argument}' is not a run folder and holds none (a run has a config.json); "
                "give folders that `python -m experiments.train` wrote"
            )
        found.update({run.resolve(): run for run in runs if run.resolve() not in found})
    return list(found.values())


def _runs_below(path: Path, depth: int) -> Iterator[Path]:
    if (path / "config.json").is_file():
        yield path
    elif depth and path.is_dir():
        for child in sorted(path.iterdir()):
            yield from _runs_below(child, depth - 1)


def read_run(path: Path) -> Run:
    """Read one run folder.

    Raises:
        UserError: its config.json is broken, incomplete or of another schema.
    """
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_text())
        agent, env_id = str(config.get("label", config["agent"])), str(config["env"]["id"])
        seed, schema = config.get("train", {}).get("seed"), config.get("schema", SCHEMA)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{config_path}' is not a run's configuration ({type(error).__name__}: {error}); "
            "leave this folder out or restore the file"
        ) from error
    check_schema(config_path, schema, SCHEMA)
    run = Run(path, agent, env_id, seed, config, {}, "")
    try:
        run.command = (path / "command.txt").read_text().strip()
    except OSError:
        run.notes.append("command.txt is missing, so the command is unknown")
    run.system = _read_json(path / "system.json", run.notes)
    _read_metrics(run)
    _read_evaluations(run)
    return run


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        reason = (
            "is missing" if isinstance(error, FileNotFoundError) else f"is unreadable ({error})"
        )
        notes.append(f"{path.name} {reason}")
        return {}
    return content


def _read_metrics(run: Run) -> None:
    """Fill `series` and `counters`; a run that was killed may end in half a line."""
    counters = ("agent_steps", "env_frames", "gradient_updates", "wall_seconds")
    rows: list[tuple[list[float], str]] = []
    broken = 0
    try:
        with (run.path / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                try:
                    rows.append(([float(row[c]) for c in (*counters, "value")], row["tag"]))
                except (KeyError, TypeError, ValueError):
                    broken += 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        run.notes.append(f"metrics.csv cannot be read ({error}), so there are no learning curves")
        return
    if broken:
        run.notes.append(f"metrics.csv has {broken} unreadable line(s), left out")
    if not rows:
        run.notes.append("metrics.csv is empty, so there are no learning curves")
        return
    numbers = np.array([values for values, _ in rows])
    steps = numbers[:, 0]
    # A resumed run goes back to its checkpoint and logs from there again. What the killed process
    # logged after that checkpoint is an abandoned future: a smaller step stands further down.
    kept = steps <= np.minimum.accumulate(steps[::-1])[::-1]
    finite = np.isfinite(numbers).all(axis=1)
    if (kept & ~finite).any():
        run.notes.append(f"{(kept & ~finite).sum()} logged value(s) are not finite, left out")
    run.counters = dict(zip(counters, numbers[kept][-1, :4].tolist(), strict=True))
    tags = np.array([tag for _, tag in rows])
    for tag in np.unique(tags[kept & finite]):
        chosen = kept & finite & (tags == tag)
        decisions, frames, updates, seconds, values = numbers[chosen].T
        run.series[str(tag)] = Series(decisions, frames, updates, seconds / 60.0, values)


def _read_evaluations(run: Run) -> None:
    """Merge the files of the newest evaluated checkpoint; a newer file wins per distraction."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in sorted((run.path / "evaluations").glob("*.json")):
        content = _read_json(path, run.notes)
        if _is_evaluation(content):
            found.append((path, content))
        elif content:
            run.notes.append(f"evaluations/{path.name} is not an evaluation, left out")
    zero_noise = [item for item in found if item[1].get("acting") == ZERO_NOISE]
    others = [path for path, content in found if content.get("acting")]
    found = [item for item in found if not item[1].get("acting")]
    for _, content in found:
        random = content.get("random_policy")
        returns = _finite(random.get("returns") if isinstance(random, dict) else None)
        if len(returns):
            run.random_returns.append(tuple(returns.tolist()))
    run.evaluation = _newest(run, found)
    if run.evaluation:
        compared = [
            item
            for item in zero_noise
            if item[1].get("checkpoint", "") == run.evaluation.checkpoint
        ]
        run.zero_noise = _newest(run, compared)
        others = [path for path in others if path not in [used for used, _ in compared]]
    if others:
        names = ", ".join(path.name for path in others)
        run.notes.append(f"{names}: acted otherwise than in training, left out")
    if run.evaluation is None:
        run.notes.append("it was not evaluated, so it is missing from the generalization table")


def _newest(run: Run, found: list[tuple[Path, dict[str, Any]]]) -> Evaluation | None:
    """Return the newest of some evaluations, with what others of the same protocol add; None without any."""
    # The test split is what is reported; a validation split may have chosen the checkpoint.
    found = [item for item in found if item[1].get("split", "test") == "test"] or found
    if not found:
        return None
    _, newest = max(found, key=lambda item: (item[1]["agent_steps"], item[0].name))
    system = newest.get("system")
    evaluation = Evaluation(
        newest["agent_steps"],
        str(newest.get("checkpoint", "")),
        str(newest.get("split", "test")),
        str(newest.get("videos", "procedural")),
        str(newest.get("foreground", FOREGROUND)),
        system if isinstance(system, dict) else {},
        weights=tuple(map(str, newest.get("weights") or ())),
    )
    protocol = ("agent_steps", "checkpoint", "split", "videos")  # of files that may be merged
    for path, content in found:
        if all(content.get(key) == newest.get(key) for key in protocol):
            _merge(run, evaluation, path, content)
    return evaluation


def _merge(run: Run, evaluation: Evaluation, path: Path, content: dict[str, Any]) -> None:
    """Add one file's results, and the media in the folder of its name, to one of the run's evaluations."""
    is_scored_alike = content.get("foreground", FOREGROUND) == evaluation.foreground
    for name, result in content["results"].items():
        returns, success = _finite(result["returns"]), _finite(result.get("success"))
        if len(returns) < max(1, len(result["returns"])):
            run.notes.append(f"{name}: some returns are missing or not finite, left out")
        if not len(returns):
            continue
        evaluation.results[name] = Result(
            returns,
            float(success.mean()) if len(success) else None,
            _read_saliency(run, name, result.get("saliency")) if is_scored_alike else {},
            success,
        )
        media = path.with_suffix("")
        stem = file_stem(name)
        for video in (media / f"{stem}{suffix}" for suffix in VIDEO_SUFFIXES):
            if video.is_file():
                evaluation.videos[name] = video
        if (media / f"{stem}_saliency.png").is_file():
            evaluation.saliency[name] = media / f"{stem}_saliency.png"


def _read_saliency(run: Run, name: str, content: Any) -> dict[str, float]:
    """Return the mean over episodes of every known measure; a broken one becomes a note."""
    if content is None:
        return {}
    known = content if isinstance(content, dict) else {}
    lists = {key: known[key] for key in SALIENCY if isinstance(known.get(key), list)}
    means = {key: _finite(values) for key, values in lists.items()}
    if not lists or any(len(means[key]) < max(1, len(lists[key])) for key in lists):
        run.notes.append(f"{name}: some saliency scores are missing or not finite, left out")
    return {key: float(values.mean()) for key, values in means.items() if len(values)}


def _is_evaluation(content: Mapping[str, Any]) -> bool:
    results = content.get("results")
    return (
        isinstance(content.get("agent_steps"), int)
        and isinstance(results, dict)
        and all(
            isinstance(r, dict) and isinstance(r.get("returns"), list) for r in results.values()
        )
    )


def _finite(values: Any) -> np.ndarray:
    """Return the finite numbers of a JSON list (or of nothing), float64 [N]."""
    numbers = [v for v in values or [] if isinstance(v, (int, float)) and math.isfinite(v)]
    return np.array(numbers, dtype=np.float64)
