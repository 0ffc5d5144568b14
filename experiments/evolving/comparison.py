"""What an evolved drift is worth where evolution has not been: other seeds, other tasks, other settings."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agents.core import policy_gradient
from agents.core.drift import LearnedDrift
from agents.core.errors import DivergedError
from experiments.evolving.learners import LearnerConfig, Surrogate, final_return, learn
from experiments.evolving.tasks import TASKS, TRAINED_ON, Task
from experiments.reporting.statistics import stratified_bootstrap
from experiments.running.runs import command_line, describe_system

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import BoundaryNorm

FIRST_SEED = 2**40
"""Of the held-out learners; those of evolution are below 2**32."""
OURS, REFERENCE = "learned drift", "PPO clip 0.2"
LEVELS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the drawn drift, which begins gently."""
ABOVE, BELOW, LIKE = "ends above", "ends below", "cannot be told from"


@dataclass(frozen=True)
class Score:
    """Final returns [seeds] of one surrogate on one condition; places are seeds, the same for every surrogate."""

    condition: str
    surrogate: str
    returns: np.ndarray


def unbounded(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Return the surrogate without any drift: where evolution began."""
    return -policy_gradient.ratio(log_ratio) * advantage


def surrogates(drift: LearnedDrift) -> dict[str, Surrogate]:
    """Return what is compared, by name; PPO with the neighbors of its usual clip, so that no bad one is beaten."""
    return {
        OURS: partial(policy_gradient.learned_drift, drift=drift),
        REFERENCE: partial(policy_gradient.ppo_clip, clip=0.2),
        "PPO clip 0.1": partial(policy_gradient.ppo_clip, clip=0.1),
        "PPO clip 0.3": partial(policy_gradient.ppo_clip, clip=0.3),
        "DPO": policy_gradient.discovered_drift,
        "no drift": unbounded,
    }


def conditions(learner: LearnerConfig) -> dict[str, tuple[Task, LearnerConfig]]:
    """Return what is compared on: the task of evolution first, then what it has never seen."""
    seen = {f"{TRAINED_ON} (evolved on)": (TASKS[TRAINED_ON], learner)}
    small = replace(learner, learning_rate=0.3 * learner.learning_rate, epochs=2 * learner.epochs)
    longer = replace(learner, iterations=2 * learner.iterations)
    others = {name: (task, learner) for name, task in TASKS.items() if name != TRAINED_ON}
    return {
        **seen,
        f"{TRAINED_ON}, 0.3 x step size, 2 x passes": (TASKS[TRAINED_ON], small),
        f"{TRAINED_ON}, 2 x iterations": (TASKS[TRAINED_ON], longer),
        **others,
    }


def compare(drift: LearnedDrift, learner: LearnerConfig, seeds: int) -> list[Score]:
    """Return the final returns of every surrogate on every condition.

    Raises:
        DivergedError: a learner was lost.
    """
    chosen = [FIRST_SEED + i for i in range(seeds)]
    kinds, scores = surrogates(drift), []
    cases = conditions(learner)
    for condition, (task, config) in tqdm(cases.items(), unit="condition", disable=None):
        for name, surrogate in kinds.items():
            returns = final_return(learn(task, surrogate, chosen, config))
            if not returns.isfinite().all():
                raise DivergedError(
                    f"learners with {name} on {condition} are lost: their returns are not finite; give a smaller "
                    "--learning-rate"
                )
            scores.append(Score(condition, name, returns.double().numpy()))
    return scores


def write_report(
    out: Path,
    drift: LearnedDrift,
    scores: Sequence[Score],
    settings: Mapping[str, str],
    began: Mapping[str, Any],
) -> None:
    """Write results.csv, drift.png and README.md into a folder.

    Args:
        out: the folder.
        drift: what evolved.
        scores: from `compare`.
        settings: of the evolution, by name.
        began: system.json of when the evolution began.
    """
    with (out / "results.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("condition", "surrogate", "seed", "final_return"))
        for score in scores:
            for i, value in enumerate(score.returns):
                writer.writerow((score.condition, score.surrogate, FIRST_SEED + i, f"{value:.4f}"))
    draw_drifts(out / "drift.png", drift)
    (out / "README.md").write_text(_page(scores, settings, began))


def _page(scores: Sequence[Score], settings: Mapping[str, str], began: Mapping[str, Any]) -> str:
    hardware = began["hardware"]
    tables, verdicts = _tables(scores)
    lines = [
        "# A learned drift",
        "",
        f"`{began['command']}` at commit {began['commit']}: {hardware['cpu']}, {hardware['cores']} cores, "
        f"torch {began['versions']['torch']}.",
        f"Compared by `{command_line()}` at commit {describe_system()['commit']}.",
        "",
        f"Evolution: {', '.join(f'{key} {value}' for key, value in settings.items())}.",
        "",
        f"Final return: the mean over the last quarter of a learner's iterations. {len(scores[0].returns)} held-out "
        "seeds, the same for every row; differences are paired by seed, with 95 % bootstrap intervals.",
        "",
        *(
            f"- The learned drift {verdict} {REFERENCE} on: {'; '.join(names) or 'nothing'}."
            for verdict, names in verdicts.items()
        ),
        "",
        *tables,
        "## The drift",
        "",
        "![drift](drift.png)",
        "",
        "By how much ratio * advantage is reduced; evolution began where it is 0 everywhere.",
        "",
    ]
    return "\n".join(lines)


def _tables(scores: Sequence[Score]) -> tuple[list[str], dict[str, list[str]]]:
    """Return a table per condition, and the conditions by how our drift does on them."""
    lines: list[str] = []
    verdicts: dict[str, list[str]] = {ABOVE: [], BELOW: [], LIKE: []}
    for condition in dict.fromkeys(score.condition for score in scores):
        here = {s.surrogate: s.returns for s in scores if s.condition == condition}
        lines += [
            f"## {condition}",
            "",
            f"| surrogate | final return, mean ± standard deviation | less {REFERENCE} |",
            "| --- | --- | --- |",
        ]
        for name, returns in here.items():
            value = f"{returns.mean():.2f} ± {returns.std():.2f}"
            gap = stratified_bootstrap([returns - here[REFERENCE]])
            shown = f"{gap.point:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})"
            lines.append(f"| {name} | {value} | {'' if name == REFERENCE else shown} |")
            if name == OURS:
                verdicts[ABOVE if gap.low > 0 else BELOW if gap.high < 0 else LIKE].append(
                    condition
                )
        lines.append("")
    return lines, verdicts


def implied_drift(surrogate: Surrogate, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Return by how much a surrogate's objective is below ratio * advantage."""
    return surrogate(log_ratio, advantage) + policy_gradient.ratio(log_ratio) * advantage


def draw_drifts(file: Path, drift: LearnedDrift) -> None:
    """Draw the drift over ratio and advantage, beside those of PPO and DPO on the same scale."""
    ratios, advantages = torch.linspace(0.1, 2.2, 211), torch.linspace(-2, 2, 121)
    log_ratio, advantage = torch.meshgrid(ratios.log(), advantages, indexing="xy")
    kinds = surrogates(drift)
    shown = {name: kinds[name] for name in (OURS, REFERENCE, "DPO")}
    surfaces = {
        name: implied_drift(kind, log_ratio, advantage).numpy() for name, kind in shown.items()
    }
    norm = BoundaryNorm(LEVELS, 256, extend="max")
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
    for panel, (name, surface) in zip(panels, surfaces.items(), strict=True):
        filled = panel.contourf(
            ratios, advantages, surface, LEVELS, cmap="Greys", norm=norm, extend="max"
        )
        panel.contour(ratios, advantages, surface, LEVELS[1:], colors="black", linewidths=0.4)
        panel.axvline(1, color="black", linewidth=0.6, linestyle=":")
        panel.set(title=name, xlabel="ratio of probabilities, new over old")
    panels[0].set_ylabel("advantage (standard deviations)")
    figure.colorbar(filled, ax=panels, label="drift (units of advantage)")
    figure.savefig(file, dpi=110)
    plt.close(figure)
