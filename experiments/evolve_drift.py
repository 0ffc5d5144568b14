"""Evolve the drift of Learnt Policy Optimisation, and compare it with PPO's clip where evolution has not been.

    python -m experiments.evolve_drift --out runs/drift

Evolution strategies over the weights of a drift network (`agents.core.drift`); a member's fitness is the final return
of a small PPO learner that uses it on a toy pendulum, and all members learn at once, from the same seed. Minutes on
two idle cores. Stopped in between, the same command goes on where it was, to the same weights.

Writes drift.safetensors (`--agent lpo --drift-file` takes it), generations.csv, results.csv (returns on held-out seeds,
tasks and settings), drift.png (the drift beside those of PPO and DPO) and a README.md.

Differences from Lu et al. 2022 (arXiv:2210.05639) and the authors' code: a toy instead of Brax's Ant, 80
generations instead of 1,025, 16 hidden units instead of 128, ranks instead of standardized fitness, and a first mean
whose hidden weights are random: with zeros everywhere, twins are one and the same function and nothing is learned.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agents.core.checkpoints import CheckpointStore
from agents.core.drift import INPUTS, LearnedDrift, save_drift, unflatten
from agents.core.errors import UserError
from agents.core.policy_gradient import learned_drift
from experiments.evolving.comparison import compare, write_report
from experiments.evolving.learners import LearnerConfig, final_return, learn
from experiments.evolving.strategy import EvolutionStrategy
from experiments.evolving.tasks import TASKS, TRAINED_ON
from experiments.running.arguments import Parser, add_dataclass, fill, run_command
from experiments.running.runs import command_line, describe_system, lock_run, write_json

WEIGHTS, RECORD = "drift.safetensors", "generations.csv"
LINE_EVERY = 10
"""Generations."""
COLUMNS = ("generation", "fitness_mean", "fitness_std", "fitness_best", "fitness_worst")


@dataclass(frozen=True)
class EvolutionConfig:
    """How the drift evolves."""

    seed: int = 1
    """Of the first mean, of all generations and of all learners."""
    generations: int = 80
    """Steps of the mean (the authors' code: 1,025)."""
    population: int = 32
    """Members of a generation, twins on both sides of the mean (the authors' code)."""
    spread: float = 0.1
    """Standard deviation of the members around the mean (evosax's OpenES: 0.04)."""
    step_size: float = 0.03
    """Adam step size of the mean."""
    units: int = 16
    """Hidden units of the drift (the authors' code: 128)."""

    def __post_init__(self) -> None:
        """Reject values that nothing can evolve with."""
        for name in ("generations", "units"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("spread", "step_size"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; give a positive number")
        if self.population < 2 or self.population % 2:
            raise UserError(f"population is {self.population}; twins need an even number")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; give 0 or more")


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.evolve_drift", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    p.add_argument("--held-out-seeds", type=int, default=24,
                   help="learners of each surrogate on each held-out condition [24]")  # fmt: skip
    p.add_argument("--threads", type=int, default=2, help="threads of torch [2]")
    add_dataclass(p, "evolution", EvolutionConfig())
    add_dataclass(p, "learners", LearnerConfig())
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if arguments.held_out_seeds < 2:
        raise UserError(
            f"--held-out-seeds is {arguments.held_out_seeds}; give at least 2, for an interval"
        )
    if arguments.threads < 1:
        raise UserError(f"--threads is {arguments.threads}; give 1 or more")
    config = fill(EvolutionConfig(), vars(arguments))
    learner = fill(LearnerConfig(), vars(arguments))
    out = arguments.out
    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not (out / "system.json").exists()
    ):
        raise UserError(f"'{out}' holds something else; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    with lock_run(out):
        if not (out / "system.json").exists():
            system = describe_system() | {"command": command_line()}
            write_json(out / "system.json", system)
        drift = evolve(config, learner, out)
        results = compare(drift, learner, arguments.held_out_seeds)
        began = json.loads((out / "system.json").read_text())
        write_report(out, drift, results, settings(config, learner), began)
    print(f"weights: {out / WEIGHTS}\ncomparison: {out / 'README.md'}")
    return 0


def evolve(config: EvolutionConfig, learner: LearnerConfig, out: Path) -> LearnedDrift:
    """Return the last generation's mean, going on from the newest checkpoint in `out`.

    Raises:
        UserError: `out` holds an evolution with other settings, or one of more generations.
    """
    strategy = EvolutionStrategy(
        first_mean(config), population=config.population, spread=config.spread,
        learning_rate=config.step_size, seed=config.seed,
    )  # fmt: skip
    store = CheckpointStore(out, identity=settings(config, learner))
    rows: list[list[float]] = []
    if store.latest() is not None:
        saved = store.load()["evolution"]
        strategy.load_state_dict(saved["strategy"])
        rows = saved["rows"]
    if strategy.generation > config.generations:
        raise UserError(
            f"'{out}' has evolved for {strategy.generation} generations; give --generations "
            f"{strategy.generation} or more, or another --out"
        )
    bar = tqdm(
        total=config.generations, initial=strategy.generation, unit="generation", disable=None
    )
    while strategy.generation < config.generations:
        fitness = evaluate(strategy.ask(), strategy.generation, config, learner)
        rows.append([strategy.generation, *_statistics(fitness)])
        strategy.tell(fitness)
        store.save(
            strategy.generation, {"evolution": {"strategy": strategy.state_dict(), "rows": rows}}
        )
        bar.update()
        if strategy.generation % LINE_EVERY == 0:
            tqdm.write(f"generation {strategy.generation}: mean return {fitness.mean():.1f}")
    bar.close()
    with (out / RECORD).open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        writer.writerows([int(row[0]), *(round(x, 4) for x in row[1:])] for row in rows)
    drift = unflatten(strategy.mean)
    made = settings(config, learner) | {"generations": str(config.generations)}
    save_drift(out / WEIGHTS, drift, made)
    return drift


def first_mean(config: EvolutionConfig) -> Tensor:
    """Return weights [9 * units] whose drift is 0 everywhere: random hidden ones, and zeros."""
    generator = torch.Generator().manual_seed(config.seed)
    hidden = torch.randn(INPUTS * config.units, generator=generator)
    return torch.cat([hidden, torch.zeros(config.units)])


def evaluate(
    members: Tensor, generation: int, config: EvolutionConfig, learner: LearnerConfig
) -> Tensor:
    """Return the fitness [P] of members [P, D]: their learners' final return, from one seed.

    One seed for all, and another in each generation: what is compared differs in nothing but the drift, and no drift
    can adapt to a seed.
    """
    sequence = np.random.SeedSequence(config.seed, spawn_key=(generation, 0))
    seed = int(sequence.generate_state(1)[0])
    surrogate = partial(learned_drift, drift=unflatten(members))
    return final_return(learn(TASKS[TRAINED_ON], surrogate, [seed] * len(members), learner))


def settings(config: EvolutionConfig, learner: LearnerConfig) -> dict[str, str]:
    """Return all that decides about the weights but the number of generations, as text."""
    evolution: dict[str, Any] = dataclasses.asdict(config)
    del evolution["generations"]
    learners = {f"learner_{key}": value for key, value in dataclasses.asdict(learner).items()}
    return {key: str(value) for key, value in {**evolution, **learners, "task": TRAINED_ON}.items()}


def _statistics(fitness: Tensor) -> list[float]:
    return [x.item() for x in (fitness.mean(), fitness.std(), fitness.max(), fitness.min())]


if __name__ == "__main__":
    raise SystemExit(main())
