"""Train Stable-Baselines3's PPO on our tasks, as a peer for tables: the same hyperparameters, evaluations and report.

    python -m experiments.baseline --agent sb3-ppo --env gym/CartPole-v1 --observation state --seed 1
    python -m experiments.benchmark --agents ppo sb3-ppo --envs gym/CartPole-v1 -- --observation state

Their algorithm is unmodified: it has the networks, the optimizer and the loop that its package gives it, and those
settings of our PPO that it has too. It is evaluated as ours is: the same episodes at the same agent steps. The run
folder is one for experiments.evaluate, benchmark and report. A run that is stopped begins again, there is no --resume.

Differences that remain: from pixels it sees through NatureCNN; a rollout that minibatches do not divide ends in a
smaller one; normalization (--normalize-observation, --scale-reward) is VecNormalize's, whose statistics change with
every step.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import envs
from agents.baseline_files import normalization_json
from agents.baselines import BASELINE, MODEL, NORMALIZATION, PROGRESS
from agents.core.errors import UserError
from agents.core.imports import import_modules, recorded_imports
from agents.core.logging import Logger
from agents.core.loops import LoopSettings
from agents.core.seeding import spawn_seeds
from agents.core.settings import argument_docs, from_dict
from agents.on_policy.ppo import PPOConfig
from agents.policy import read_config, space_to_json
from envs.settings import Settings
from experiments import train
from experiments.evaluating.rollouts import evaluation_scalars, run_episodes
from experiments.running.arguments import Parser, add_dataclass, run_command
from experiments.running.imports import add_import_flag
from experiments.running.runs import (
    LOCK,
    abandon_run,
    begin_run,
    default_run_dir,
    lock_run,
    make_run_dir,
    write_json,
)
from experiments.running.settings import PRESETS, VectorSettings, control_steps, read_loop

BASELINES = ("sb3-ppo",)
"""The agents that this command trains; each is a peer of ours of the name behind `sb3-`."""

SHARED = (
    "rollout_length", "minibatch_size", "epochs", "discount", "gae_lambda", "learning_rate", "clip",
    "value_coefficient", "entropy_coefficient", "max_gradient_norm", "normalize_advantage",
    "normalize_observation", "scale_reward", "hidden", "initial_log_std",
)  # fmt: skip
"""Settings of our PPO that theirs has too."""

LACKING = tuple(f.name for f in dataclasses.fields(PPOConfig) if f.name not in SHARED)
"""The others: theirs lacks them, or means otherwise (it measures target_kl at every minibatch)."""

_NO_CHECKPOINTS = ("checkpoint_every", "keep_checkpoints", "exact_resume")


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog="python -m experiments.baseline", description=__doc__)
    p.add_argument("--agent", default=BASELINES[0], metavar="NAME", help=f"{', '.join(BASELINES)}")
    p.add_argument("--env", default="gym/CartPole-v1", metavar="ID", help="task id")
    add_import_flag(p)
    p.add_argument("--preset", default="auto", metavar="|".join(["auto", *PRESETS]),
                   help="values that fit a machine, as in experiments.train [auto]")  # fmt: skip
    p.add_argument("--seed", type=int, help="of everything; none draws one")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads [torch's own]")
    p.add_argument("--run-dir", type=Path, metavar="DIR",
                   help="where the run is kept [runs/<task>/<agent>-seed<seed>]")  # fmt: skip
    add_dataclass(
        p,
        "task",
        Settings(""),
        skip=("id", "seed", "foreground_mask", "side_by_side"),
        docs=argument_docs(envs.make),
    )
    add_dataclass(p, "parallel environments", VectorSettings())
    add_dataclass(p, "loop", LoopSettings(), skip=_NO_CHECKPOINTS)
    add_dataclass(p, "PPOConfig", PPOConfig(), skip=LACKING)
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = vars(parser().parse_args(argv))
    import_modules(given["imports"])
    config = new_config(given)
    run = given["run_dir"] or default_run_dir(
        config["agent"], given["env"], config["train"]["seed"]
    )
    train_baseline(run, config)
    print(f"finished\nnext: python -m experiments.evaluate {run}")
    return 0


def check_name(name: str) -> None:
    """Raise UserError unless a baseline has this name."""
    if name not in BASELINES:
        raise UserError.unknown("agent", name, BASELINES)


def new_config(given: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's content for parsed flags: that of a run of ours, less what theirs lacks."""
    check_name(given["agent"])
    if given["threads"] is not None and given["threads"] < 1:
        raise UserError(f"--threads is {given['threads']}; give a positive number")
    ours = {"agent": given["agent"].removeprefix(BASELINE), "replay_storage": "auto"}
    config = train.new_config(given | ours)
    for name in _NO_CHECKPOINTS:
        del config["train"][name]
    for name in LACKING:
        del config["configs"]["PPOConfig"][name]
    del config["replay_storage"]
    return config | {"agent": given["agent"]}


def is_finished(run: Path) -> bool:
    """Whether a baseline's run folder holds what was trained."""
    return (run / MODEL).is_file()


def train_baseline(run: Path, config: dict[str, Any]) -> None:
    """Train as `config` says, in the folder `run`; what a run that was stopped has left there begins again.

    Raises:
        UserError: the package is missing, the folder is taken, or the task gives what their policies do not see.
    """
    try:
        import stable_baselines3  # noqa: F401  # told before anything is written
    except ImportError as error:
        raise UserError(
            f"{config['agent']} needs Stable-Baselines3: pip install stable-baselines3"
        ) from error
    _clear_unfinished(run)
    is_new = make_run_dir(run)
    with lock_run(run):
        config["baseline"] = {"stable_baselines3": version("stable-baselines3")}
        begin_run(run, config)
        try:
            _train(run, config)
        except UserError:
            abandon_run(run, is_new=is_new)
            raise


def _train(run: Path, config: dict[str, Any]) -> None:
    from experiments.sessions.baseline import Protocol, make_model

    if config["threads"] is not None:
        torch.set_num_threads(config["threads"])
    seeds = spawn_seeds(config["train"]["seed"])[1]
    settings = read_loop(config)
    hyperparameters = from_dict(PPOConfig, config["configs"]["PPOConfig"])
    imports, episodes = recorded_imports(config), settings.eval_episodes
    with ExitStack() as stack:
        vector = envs.make_vec(**config["vector"], imports=imports, **config["env"])
        stack.callback(vector.close)
        model, normalizer = make_model(
            vector, hyperparameters, seeds=seeds, device=config["device"]
        )
        config["spaces"] = {
            "observation": space_to_json(vector.single_observation_space),
            "action": space_to_json(vector.single_action_space),
        }
        write_json(run / "config.json", config)
        logger = Logger(run)
        stack.callback(logger.close)
        evaluation = envs.make_vec(
            num_envs=episodes,
            workers=min(config["vector"]["workers"], episodes),
            timeout=config["vector"]["timeout"],
            imports=imports,
            **{**config["env"], "seed": seeds["evaluation"]},
        )
        stack.callback(evaluation.close)

        def act(observation: Any) -> np.ndarray:
            if normalizer is not None:
                observation = normalizer.normalize_obs(observation)
            return model.predict(observation, deterministic=True)[0]

        def evaluate() -> dict[str, float]:
            seen = run_episodes(act, evaluation, episodes, seed=seeds["evaluation"])
            return evaluation_scalars(seen, config["env"]["distraction"])

        protocol = Protocol(settings, logger, evaluate, action_repeat=control_steps(config["env"]))
        model.learn(settings.steps, callback=protocol)
        if normalizer is not None:
            write_json(run / NORMALIZATION, normalization_json(normalizer))
        write_json(run / PROGRESS, vars(protocol.progress))
        unfinished = run / f"{MODEL}.tmp"
        model.save(unfinished)
        unfinished.replace(run / MODEL)


def _clear_unfinished(run: Path) -> None:
    """Empty the folder of a baseline that was stopped; any other folder is left as it is."""
    if not (run / "config.json").is_file() or is_finished(run):
        return
    if not read_config(run)["agent"].startswith(BASELINE):
        return
    with lock_run(run):
        for part in run.iterdir():
            if part.is_dir():
                shutil.rmtree(part)
            elif part.name != LOCK:
                part.unlink()


if __name__ == "__main__":
    raise SystemExit(main())
