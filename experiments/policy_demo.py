"""Imitation and fine-tuning, in one command: a diffusion or flow policy before and after DPPO, from pixels.

    python -m experiments.policy_demo
    python -m experiments.policy_demo --env metaworld/button-press --fine-tuning-steps 20000 --run-dir runs/button

A script shows the task, clean, with other colors and before videos; a flow policy imitates it; DPPO goes on with that
policy; both meet colors and videos that neither has seen, on the same episodes. Success before and after, with 95 %
intervals, is printed and written beside a report with films of both. Stopped at any moment, the same command goes on
where it was.

Where the task tells of success, an episode ends with it, and DPPO is paid for it alone: Meta-World's own reward pays
for staying near what is to be done, for as long as an episode lasts (`results/fine-tuning`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from agents.core.errors import UserError
from agents.core.imports import import_modules
from agents.policy import read_config
from envs.registry import get_spec
from envs.settings import Settings
from experiments import collect, imitate, train
from experiments.benchmark import STOPPED
from experiments.demo import RESULT, steps_left
from experiments.evaluate import evaluate_run
from experiments.report import build_report
from experiments.reporting.blocks import Cell, Table, limits, number
from experiments.reporting.statistics import Interval, stratified_bootstrap
from experiments.reporting.text import render_markdown
from experiments.running.arguments import (
    Parser,
    add_dataclass,
    fill,
    run_command,
    terminate_as_interrupt,
)
from experiments.running.imports import add_import_flag
from experiments.running.runs import write_json
from experiments.running.settings import VectorSettings

SHOWN = ("clean", "color_hard", "video_hard")
"""What is demonstrated (of the train split), and what both policies are evaluated under (of the test split)."""
BASE, TUNED, DATA, SETTINGS = "flow-policy", "dppo", "data", "policy-demo.json"
TABLE = "before-after.md"
TASK = {"size": 48, "supersample": 4, "frame-stack": 1}
"""Of the CPU preset; one picture, because the one before lies a whole chunk back."""


@dataclass(frozen=True)
class DemoSettings:
    """What the whole way is made of; the defaults take about ten minutes of one core's time."""

    env: str = "metaworld/coffee-button"
    """The task; one that has a script (metaworld/, toy/)."""
    seed: int = 1
    """Of everything."""
    preset: str = "cpu"
    """Preset of both trainings."""
    demonstrations: int = 12
    """Episodes that the script shows."""
    episode_length: int = 64
    """Control steps of an episode (Meta-World 500; its scripts need 30 to 120, this task's 30 to 38)."""
    action_chunk: int = 8
    """Actions between two looks."""
    imitation_steps: int = 200
    """Gradient steps of imitation: few, so that something is left to learn."""
    fine_tuning_steps: int = 10_000
    """Chunks of actions that DPPO takes."""
    episodes: int = 60
    """Episodes of each evaluation."""
    workers: int = 2
    """Worker processes of fine-tuning and evaluations; results do not depend on them."""

    def __post_init__(self) -> None:
        """Reject what cannot be run."""
        for name in ("demonstrations", "imitation_steps", "fine_tuning_steps", "episodes"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1"
                )


IMITATION: dict[str, dict[str, float]] = {
    "cpu": {
        "--batch-size": 64, "--ema-decay": 0.99, "--warmup": 100, "--denoising-steps": 5,
        # White noise of a chunk's actions averages out on the way: a policy that explores so presses the same spot.
        "--noise-correlation": 0.5,
    },
}  # fmt: skip
"""Beside the preset of `experiments.imitate`: what is learned in few steps, and drawn in five."""
FINE_TUNING: dict[str, dict[str, float]] = {
    "cpu": {
        "--num-envs": 8, "--rollout-length": 32, "--minibatch-size": 128, "--critic-warmup": 1,
        "--critic-learning-rate": 5e-4, "--discount": 0.99, "--exploration-std": 0.15, "--log-prob-std": 0.15,
    },
    "debug": {"--num-envs": 2, "--rollout-length": 8, "--minibatch-size": 16},
}  # fmt: skip
"""Beside the preset of `experiments.train`: updates of 256 chunks, the first of the critic alone."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.policy_demo", description=__doc__)
    p.add_argument(
        "--run-dir", type=Path, default=Path("runs/policy-demo"),
        help="folder of data, runs and report [runs/policy-demo]",
    )  # fmt: skip
    add_import_flag(p)
    add_dataclass(p, "what is shown and learned", DemoSettings())
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = vars(parser().parse_args(argv))
    folder, imports = given["run_dir"], given["imports"]
    import_modules(imports)
    settings = read_settings(folder, given)
    flags = [f"--import={name}" for name in imports]
    if code := demonstrate(folder, settings, flags):
        return code
    for name in (BASE, TUNED):
        if code := learn(folder, name, settings, flags):
            return code
    terminate_as_interrupt()
    before, after = (evaluated(folder / name, settings, imports) for name in (BASE, TUNED))
    table = comparison(before, after, settings.env)
    text = render_markdown([table])
    (folder / TABLE).write_text(text)
    page = build_report([folder / BASE, folder / TUNED], folder / "report", overwrite=True)
    print(f"\n{text}\nwritten to {folder / TABLE}; report, with films: {page.resolve()}")
    return 0


def read_settings(folder: Path, given: dict[str, Any]) -> DemoSettings:
    """Return the settings of a folder, which are written when it is new.

    Raises:
        UserError: a flag would make it another demonstration, or nobody can show the task.
    """
    file, own = folder / SETTINGS, DemoSettings()
    if file.is_file():
        own = DemoSettings(**json.loads(file.read_text()))
        for field in fields(own):
            if field.name in given and given[field.name] != getattr(own, field.name):
                raise UserError(
                    f"--{field.name.replace('_', '-')} is {given[field.name]}, but what is in '{folder}' has "
                    f"{getattr(own, field.name)}; give another --run-dir, or remove that one"
                )
        return own
    settings = fill(own, given)
    # All that the parts refuse, now: they would only when those before them are done.
    Settings(
        settings.env, action_chunk=settings.action_chunk, episode_length=settings.episode_length
    ).resolved()
    VectorSettings(workers=settings.workers)
    imitate.find_preset(settings.preset, "cpu")
    if settings.env.partition("/")[0] not in ("metaworld", "toy"):
        raise UserError(
            f"nobody shows how {settings.env} is done; give a task of metaworld/ or toy/, which have scripts"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(settings))
    return settings


def datasets() -> list[str]:
    """Return the ids of the data sets, one of each kind that is shown."""
    return [f"demo/{name.replace('_', '-')}-v0" for name in SHOWN]


def demonstrate(folder: Path, settings: DemoSettings, flags: Sequence[str]) -> int:
    """Collect the script's episodes, and draw them anew under the distractions; return the exit code.

    A data set that is there is kept; one appears when it is whole.
    """
    root = folder / DATA
    clean, *others = datasets()
    seen = [word for name, value in TASK.items() for word in (f"--{name}", str(value))]
    words = [
        clean, "--expert", "--env", settings.env, "--episodes", str(settings.demonstrations),
        "--seed", str(settings.seed), "--episode-length", str(settings.episode_length), *seen,
        *(["--end-at-success"] if get_spec(settings.env).success else []),
    ]  # fmt: skip
    todo = [words]
    for name, dataset in zip(SHOWN[1:], others, strict=True):
        todo.append([dataset, "--rerender", clean, "--distraction", name, "--split", "train"])
    for words in todo:
        if (root / words[0]).exists():
            continue
        print(f"\ndemonstrations: {words[0]}", flush=True)
        if code := collect.main([*words, "--root", str(root), *flags]):
            return code
    return 0


def learn(folder: Path, name: str, settings: DemoSettings, flags: Sequence[str]) -> int:
    """Imitate or fine-tune, from the beginning or where it was stopped; return the exit code."""
    run = folder / name
    command = imitate if name == BASE else train
    if not (run / "config.json").exists():
        print(f"\n{'imitation' if name == BASE else 'fine-tuning'}: {run}", flush=True)
        own = _imitation(folder, settings) if name == BASE else _fine_tuning(folder, settings)
        words = [
            "--agent", name, "--run-dir", str(run), "--seed", str(settings.seed),
            "--preset", settings.preset, "--eval-every", "0", *own,
        ]  # fmt: skip
        code = command.main([*words, *flags])
    elif steps_left(run):
        print(f"\ngoing on with {run}", flush=True)
        code = command.main(["--resume", str(run), *flags])
    else:
        print(f"\n{run} is trained already")
        return 0
    if code == 0 and steps_left(run):
        print("stopped; the same command goes on")
        return STOPPED
    return code


def _imitation(folder: Path, settings: DemoSettings) -> list[str]:
    """Return the flags of imitation."""
    return [
        "--root", str(folder / DATA), "--dataset", *datasets(), "--steps", str(settings.imitation_steps),
        "--action-chunk", str(settings.action_chunk), "--checkpoint-every", "500",
        *_words(IMITATION.get(settings.preset, {})),
    ]  # fmt: skip


def _fine_tuning(folder: Path, settings: DemoSettings) -> list[str]:
    """Return the flags of fine-tuning: under the colors of the train split, so that these are not forgotten."""
    return [
        "--env", settings.env, "--base", str(folder / BASE), "--steps", str(settings.fine_tuning_steps),
        "--distraction", SHOWN[1], "--checkpoint-every", "1000", "--workers", str(settings.workers),
        "--reward", "success" if get_spec(settings.env).success else "task",
        *_words(FINE_TUNING.get(settings.preset, {})),
    ]  # fmt: skip


def _words(flags: dict[str, float]) -> list[str]:
    return [word for name, value in flags.items() for word in (name, str(value))]


def evaluated(run: Path, settings: DemoSettings, imports: Sequence[str]) -> dict[str, Any]:
    """Return a run's result under all that was shown; it is evaluated where that is missing."""
    file = run / "evaluations" / f"{RESULT}.json"
    if file.is_file():
        found = json.loads(file.read_text())
        if found["agent_steps"] >= read_config(run)["train"]["steps"]:
            return dict(found)
    print(f"\nevaluation: {run}", flush=True)
    evaluate_run(
        run, distractions=SHOWN, episodes=settings.episodes, num_envs=10, workers=settings.workers,
        name=RESULT, overwrite=True, imports=imports,
    )  # fmt: skip
    return dict(json.loads(file.read_text()))


def comparison(before: dict[str, Any], after: dict[str, Any], env: str) -> Table:
    """Return what fine-tuning changed, by distraction; both were evaluated on the same episodes.

    Args:
        before: the base's result.
        after: the fine-tuned policy's.
        env: the task.
    """
    rows = []
    for name in SHOWN:
        first, then = before["results"][name], after["results"][name]
        measure = "success" if first["success"] else "returns"
        scale = 100.0 if measure == "success" else 1.0
        a, b = (scale * np.asarray(row[measure], float) for row in (first, then))
        change = stratified_bootstrap([b - a])  # episode by episode: each pair begins alike
        told = "better" if change.low > 0 else "worse" if change.high < 0 else "not told apart"
        intervals = stratified_bootstrap([a]), stratified_bootstrap([b]), change
        rows.append([Cell(name), *map(_cell, intervals), Cell(told)])
    caption = (
        f"{env}: {'success in percent' if scale == 100.0 else 'return'} in {len(a)} episodes of the test split before "
        "and after DPPO, means with 95 % bootstrap intervals over episodes; the change is that of the same episodes. "
        "It is one training run: another seed may end otherwise."
    )
    return Table("before-after", caption, ["", "before", "after", "change", "verdict"], rows)


def _cell(value: Interval) -> Cell:
    scale = max(abs(float(value.point)), 10.0)
    return Cell(number(float(value.point), scale), limits(value.low, value.high, scale))


if __name__ == "__main__":
    raise SystemExit(main())
