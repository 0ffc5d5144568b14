"""Train an agent on a task, from pixels or a state.

    python -m experiments.train --agent sgqn --env dmc/cartpole-swingup
    python -m experiments.train --agent drqv2 --env dmc/walker-walk --protocol drqv2 --device cuda
    python -m experiments.train --resume runs/dmc-cartpole-swingup/sgqn-seed1 --steps 60000
    python -m experiments.train --agent ppo --env dmc/walker-walk --teacher runs/dmc-walker-walk/drqv2-seed1
    python -m experiments.train --agent dppo --env metaworld/drawer-open --base runs/drawer/flow-policy-seed1
    python -m experiments.train --agent reinflow --base RUN --teacher OTHER --guidance 1 --guidance-decay 20000
    python -m experiments.train --agent dppo --env metaworld/drawer-open --teacher expert --guidance 0.5
    python -m experiments.train --agent resfit --env metaworld/drawer-open --base RUN --dataset drawer/expert-v0
    python -m experiments.train --import mypackage --agent mine --env mine/task

Every field of the agent's config is a flag; `--help` shows those of the agent that `--agent` names. Values come from
the dataclasses' defaults, then --preset, then --protocol, then the flags given. A run folder holds everything: config,
command, metrics.csv, TensorBoard events, checkpoints, replay. `--resume` goes on exactly where the run was saved.
`--import` runs what a module of yours registers (`envs.register`, `agents.register`); a run remembers it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import envs
from agents import AGENTS
from agents.core.errors import UserError
from agents.core.imports import import_modules, recorded_imports
from agents.core.seeding import spawn_seeds
from agents.core.settings import argument_docs, to_dict
from agents.policy import SCHEMA, read_config
from agents.registry import find
from envs.settings import Settings
from experiments.running.arguments import Parser, add_dataclass, as_words, fill, run_command
from experiments.running.imports import add_import_flag, import_for_run
from experiments.running.runs import (
    abandon_run,
    begin_run,
    check_label,
    default_run_dir,
    lock_run,
    make_run_dir,
    write_json,
)
from experiments.running.settings import (
    PRESETS,
    VectorSettings,
    check_device,
    control_steps,
    find_preset,
    loop_settings,
    paper_values,
    preset_discount,
    protocol_values,
    read_loop,
)
from experiments.sessions.bases import chunks_of_the_task, find_base, refuse_idle, refuse_unused
from experiments.sessions.demonstrations import add_dataset_flags, new_demonstrations
from experiments.sessions.frozen_bases import find_frozen_base
from experiments.sessions.imitation import ImitationSession
from experiments.sessions.residual import ResidualSession
from experiments.sessions.teachers import new_teacher
from experiments.sessions.training import Session

DEFAULT_AGENT, DEFAULT_ENV = "sgqn", "dmc/cartpole-swingup"
RESUMABLE = (
    "steps",
    "log_every",
    "eval_every",
    "eval_episodes",
    "checkpoint_every",
    "keep_checkpoints",
    "exact_resume",
)
"""What --resume may change; everything else would make the run another one."""


def parser(agent: str) -> Parser:
    """Return the command's parser, with the flags of one agent."""
    spec = find(agent)
    p = Parser(prog="python -m experiments.train", description=__doc__)
    p.add_argument("--agent", default=DEFAULT_AGENT, metavar="NAME",
                   help="; ".join(f"{name}: {s.summary}" for name, s in AGENTS.items()))  # fmt: skip
    p.add_argument("--env", default=DEFAULT_ENV, metavar="ID",
                   help=f"task id, see --list [{DEFAULT_ENV}]")  # fmt: skip
    add_import_flag(p)
    p.add_argument("--list", action="store_true", help="list all task ids and leave")
    p.add_argument("--preset", default="auto", metavar="|".join(["auto", *PRESETS]),
                   help="values that fit a machine; auto is gpu on CUDA devices, else cpu [auto]")  # fmt: skip
    p.add_argument("--seed", type=int, help="of everything; none draws one and says which")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    p.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of the learner [torch's own or 1, whichever is faster when the run starts]",
    )
    p.add_argument("--compile", choices=("off", "on", "auto"), default=argparse.SUPPRESS,
                   help="compile gradients; auto: on CUDA devices, and not where that fails [off]")  # fmt: skip
    p.add_argument("--reward", choices=("task", "success"), default="task",
                   help="what is learned from, in demonstrations too: the task's own reward, or 1 in steps in which it "
                        "is solved and 0 in others; logged returns are always the task's [task]")  # fmt: skip
    p.add_argument("--run-dir", type=Path, metavar="DIR",
                   help="where the run is kept [runs/<task>/<agent>-seed<seed>]")  # fmt: skip
    p.add_argument("--label", metavar="NAME",
                   help="what reports call this method, such as a variant of an agent [the agent's name]")  # fmt: skip
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run; may raise --steps")
    p.add_argument("--teacher", type=Path, metavar="RUN|ZIP|expert",
                   help="learn from what this run's policy, a zip of Stable-Baselines3, or the task's own script "
                        "(expert: metaworld/ and toy/) would do, too")  # fmt: skip
    p.add_argument("--replay-storage", default="auto", choices=("auto", "device", "ram", "mmap"),
                   help="where the replay lies; auto: device, else RAM, else a file [auto]")  # fmt: skip
    if spec.fine_tunes:
        p.add_argument("--base", type=Path, metavar="RUN",
                       help="begin with this run's policy and its task's settings [random weights]")  # fmt: skip
    if spec.needs_base:
        p.add_argument("--base", type=Path, metavar="RUN",
                       help="act on top of this run's policy, with its task's settings")  # fmt: skip
        add_dataset_flags(p, "what to learn from beside the rewards, see collect [none]")
    add_dataclass(
        p,
        "task",
        Settings(DEFAULT_ENV),
        skip=("id", "seed", "foreground_mask", "side_by_side"),
        docs=argument_docs(envs.make),
    )
    add_dataclass(p, "parallel environments", VectorSettings())
    add_dataclass(p, "loop", loop_settings(agent))
    for config in spec.configs:
        add_dataclass(p, f"{type(config).__name__} ({agent})", config)
    return p


@run_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return launch(argv, DEFAULT_AGENT, parser, new_config)


def launch(
    argv: Sequence[str] | None,
    default: str,
    make_parser: Callable[[str], Parser],
    make_config: Callable[[dict[str, Any]], dict[str, Any]],
    check: Callable[[str], None] = lambda agent: None,
) -> int:
    """Train a new run, or go on with one, as a command line says; return the exit code.

    Args:
        argv: the arguments; None for the process's own.
        default: the agent where none is named.
        make_parser: from an agent to the parser with its flags.
        make_config: from parsed flags to the content of a new run's config.json.
        check: refuses agents that the command does not train.
    """
    first = Parser(add_help=False)
    first.add_argument("--agent", default=default)
    first.add_argument("--resume", type=Path)
    add_import_flag(first)
    known, _ = first.parse_known_args(argv)
    agent = known.agent
    if known.resume:
        config = read_config(known.resume)
        agent = config["agent"]
        import_for_run(config, known.imports, folder=known.resume)
    else:
        import_modules(known.imports)
    check(agent)
    given = vars(make_parser(agent).parse_args(argv))
    if given.get("list"):
        print("\n".join(envs.list_ids()))
        return 0
    if given["threads"] is not None and given["threads"] < 1:
        raise UserError(f"--threads is {given['threads']}; give a positive number")
    if given["resume"]:
        run, config = resumed_config(given, sys.argv[1:] if argv is None else list(argv))
    else:
        config = make_config(given)
        run = given["run_dir"] or default_run_dir(
            given.get("label") or agent, config["env"]["id"], config["train"]["seed"]
        )
    train(run, config, resume=bool(given["resume"]))
    return 0


def new_config(given: dict[str, Any]) -> dict[str, Any]:
    """Return config.json's content for parsed flags: everything resolved, nothing left to defaults."""
    if find(given["agent"]).offline:
        raise UserError(
            f"agent '{given['agent']}' learns from demonstrations: use python -m experiments.imitate"
        )
    device = check_device(given["device"])
    protocol = protocol_values(given.get("protocol"), given["env"])
    refuse_what_a_protocol_fixes(given, protocol)
    if given.get("split") == "test":
        raise UserError(
            "--split test is what evaluations are made of; train on the train split, choose on validation"
        )
    quality = given.get("quality", protocol.get("quality"))
    if protocol and quality != protocol["quality"]:
        warnings.warn(
            f"quality {quality} draws other pixels than those behind the numbers of protocol "
            f"'{given['protocol']}', which has {protocol['quality']}: do not compare with them",
            stacklevel=2,
        )
    # A protocol's numbers are published ones: nothing is cut to fit a small machine unless asked for.
    auto = "gpu" if protocol else "auto"
    name = auto if given["preset"] == "auto" else given["preset"]
    preset = find_preset(name, device, given["agent"])
    spec, base, frozen = find(given["agent"]), None, None
    if spec.needs_base:
        if given.get("action_chunk", 1) != 1:
            raise UserError(
                f"--action-chunk is {given['action_chunk']}, but agent '{given['agent']}' corrects every action; leave "
                "the flag out: a base of chunks hands them out one by one"
            )
        frozen = find_frozen_base(given["base"], given["agent"], given["imports"])
    elif given.get("base"):
        base = find_base(given["base"])
    inherited = base or frozen
    of_task = (preset, inherited.task if inherited else {}, protocol, given)
    seed, seeds = spawn_seeds(given["seed"])
    task = fill(
        Settings(given["env"]), *({k: v for k, v in s.items() if k != "seed"} for s in of_task)
    )
    task = fill(task, {"seed": seeds["environment"], "side_by_side": True}).resolved()
    assert task.action_repeat is not None
    sources = (
        preset | preset_discount(name, device, control_steps(task.as_dict())),
        protocol,
        paper_values(given.get("protocol"), given["agent"], given["env"]),
        given,
    )
    loop = fill(loop_settings(given["agent"]), *sources)
    vector = fill(VectorSettings(), *sources)
    configs = [fill(config, *sources) for config in spec.configs]
    if spec.fine_tunes:
        refuse_unused(given["agent"], given)
        configs[1] = (
            chunks_of_the_task(configs[1], given, task.action_chunk)
            if base is None
            else base.policy_config(spec, given, task.action_chunk)
        )
        refuse_idle(configs[1], given)
    return {
        "schema": SCHEMA,
        "agent": given["agent"],
        **({"label": check_label(given["label"])} if given.get("label") else {}),
        "imports": list(dict.fromkeys([*(frozen.imports if frozen else []), *given["imports"]])),
        **({"base": inherited.about} if inherited else {}),
        **(new_demonstrations(given, task.as_dict()) if frozen else {}),
        "env": task.as_dict(),
        "vector": to_dict(vector),
        "train": {**to_dict(loop), "num_envs": vector.num_envs, "seed": seed},
        "configs": {type(config).__name__: to_dict(config) for config in configs},
        **new_teacher(given),
        "device": device,
        "threads": given["threads"],
        "compile": given.get("compile", "off"),
        "reward": check_reward(given.get("reward", "task"), task.id),
        "replay_storage": given["replay_storage"],
        "preset": given["preset"],
    }


def check_reward(reward: str, task: str) -> str:
    """Return what a run learns from, if the task may tell it.

    Raises:
        UserError: success of a task that does not tell.
    """
    if reward == "success" and not envs.get_spec(task).may_tell_success:
        raise UserError(
            f"--reward success: {task} does not tell whether it is solved; leave the flag out"
        )
    return reward


def refuse_what_a_protocol_fixes(given: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Raise UserError that names every flag whose value is not the protocol's; quality is only warned of."""
    own = "the task's own"
    told = [
        f"{name} is {as_words(given[name])}, but protocol '{given['protocol']}' fixes "
        f"{own if value is None else as_words(value)}"
        for name, value in protocol.items()
        if name != "quality" and name in given and given[name] != value
    ]
    if told:
        raise UserError(
            f"{'; '.join(told)} for {given['env']}; leave these flags out, or the protocol"
        )


def resumed_config(given: dict[str, Any], argv: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Return the run folder and its config with what --resume may change.

    Raises:
        UserError: a flag is given that would make it another run.
    """
    run = given["resume"]
    config = read_config(run)
    allowed = {
        "--resume",
        "--import",
        "--device",
        "--threads",
        "--compile",
        "--no-exact-resume",
    } | {f"--{n.replace('_', '-')}" for n in RESUMABLE}
    # What may have been moved; that it is still the same is checked.
    if "teacher" in config:
        allowed |= {"--teacher"}
    if "demonstrations" in config:
        allowed |= {"--root"}
    for argument in argv:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in allowed:
            raise UserError(
                f"{flag} cannot change with --resume (it would be another run); "
                f"{', '.join(sorted(allowed))} can"
            )
    config["device"] = check_device(
        config["device"] if given["device"] == "auto" else given["device"]
    )
    config["threads"] = given["threads"] or config.get("threads")
    config["compile"] = given.get("compile", config.get("compile", "off"))
    if given.get("teacher"):
        if "script" in config["teacher"]:
            raise UserError("the teacher of this run is its task's script; leave --teacher out")
        config["teacher"]["path"] = str(given["teacher"].resolve())
    if given.get("root"):
        config["demonstrations"]["root"] = str(given["root"].expanduser().resolve())
    config["train"] |= {name: given[name] for name in RESUMABLE if name in given}
    config["imports"] = list(dict.fromkeys([*recorded_imports(config), *given["imports"]]))
    return run, config


def train(run: Path, config: dict[str, Any], *, resume: bool = False) -> None:
    """Train as `config` says, in the folder `run`."""
    read_loop(config)  # reject bad values before anything is written
    is_new = not resume and make_run_dir(run)
    with stop_on_signal() as stopped, lock_run(run):
        _train(run, config, stopped, resume=resume, is_new=is_new)


def _train(
    run: Path,
    config: dict[str, Any],
    stopped: Callable[[], bool],
    *,
    resume: bool,
    is_new: bool,
) -> None:
    """Train in a folder that no other process trains in."""
    if not resume:
        begin_run(run, config)
    spec = find(config["agent"])
    make_session = ImitationSession if spec.offline else Session
    if spec.needs_base:
        make_session = ResidualSession
    try:
        session = make_session(run, config, resume=resume)
    except BaseException:
        if not resume:
            abandon_run(run, is_new=is_new)
        raise
    with session:
        state = session.loop.state
        print(f"run folder: {run}")
        if resume and state.progress.agent_steps >= session.settings.steps:
            print(
                f"nothing to do: it has {state.progress.agent_steps:,} of "
                f"{session.settings.steps:,} {session.loop.unit}s; give more --steps to go on"
            )
            return
        if not stopped():
            session.settle_threads()
            write_json(run / "config.json", config)  # before training: it holds after a kill too
            print(session.estimate())
        session.train(stopped)
    print(
        f"{'stopped' if stopped() else 'finished'} after {session.account()}\n"
        f"next: python -m experiments.evaluate {run}"
    )


class stop_on_signal:
    """Context in which SIGTERM or Ctrl-C asks the loop to save and leave; enters as a function that tells.

    A second Ctrl-C leaves at once.
    """

    def __enter__(self) -> Callable[[], bool]:
        self._asked = False
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return lambda: self._asked

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        self._asked = True
        signal.signal(number, self._before[signal.Signals(number)])
        print("saving, then leaving", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
