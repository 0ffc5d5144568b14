"""The run whose policy a fine-tuned one begins with (`train --base RUN`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.core.agent import Agent
from agents.core.errors import UserError
from agents.generative_policies.dppo import DPPO
from agents.generative_policies.fine_tuning import FineTuner
from agents.generative_policies.imitation import ACTING, Imitation
from agents.generative_policies.parts import missing_for
from agents.generative_policies.policy import DenoisingConfig, DenoisingPolicy
from agents.policy import Policy
from agents.registry import AgentSpec, find
from experiments.running.arguments import fill
from experiments.sessions.teachers import networks_digest, weights_digest

OF_THE_TASK = (
    "observation", "size", "frame_stack", "action_repeat", "action_chunk", "camera", "quality", "supersample",
    "episode_length", "end_at_success",
)  # fmt: skip
"""Settings of its task that a base's successor has too, unless flags say otherwise."""
TIMES = ("times", "times_first", "times_second")
"""How the times of losses are drawn."""
NO_WEIGHTS = (*ACTING, *TIMES)
"""Fields of a policy that do not say what its weights are."""


@dataclass(frozen=True)
class Base:
    """A policy that another run learned.

    Attributes:
        policy: its weights, frozen.
        spaces: of its task, as config.json describes them.
        task: settings of its task.
        about: where it is from, for config.json: folder, checkpoint and digest.
    """

    policy: DenoisingPolicy
    spaces: dict[str, Any]
    task: dict[str, Any]
    about: dict[str, str]

    def policy_config(
        self, spec: AgentSpec, given: Mapping[str, Any], action_chunk: int
    ) -> DenoisingConfig:
        """Return what its successor's policy is made of: the same, drawn and learned as flags say.

        Args:
            spec: the agent that goes on; zero-noise evaluation, and what it has no use for, are its own choice.
            given: the flags.
            action_chunk: actions that the task executes at once.

        Raises:
            UserError: a flag would make it another network, or it predicts fewer actions than the task executes.
        """
        own, agent = self.policy.config, spec.configs[1]
        if own.horizon < action_chunk:
            raise UserError(
                f"the base predicts {own.horizon} actions at once, but the task executes chunks of {action_chunk}; "
                "lower --action-chunk, or give a base that was made with a longer --horizon"
            )
        fields = [field.name for field in dataclasses.fields(DenoisingConfig)]
        for name in fields:
            if name in given and name not in NO_WEIGHTS and given[name] != getattr(own, name):
                raise UserError(
                    f"--{name.replace('_', '-')} is {given[name]}, but the base's weights are of "
                    f"{getattr(own, name)}; leave the flag out, or --base"
                )
        config = DenoisingConfig(**{name: getattr(own, name) for name in fields})
        chosen = {name: getattr(agent, name) for name in ("start_noise", *spec.unused)}
        flags = {name: given[name] for name in NO_WEIGHTS if name in given}
        if "times" in flags:  # another distribution's numbers are not the base's
            flags = dict.fromkeys(TIMES[1:]) | flags
        return fill(config, chosen, flags)


def find_base(run: Path, *, checkpoint: str = "latest", device: str = "cpu") -> Base:
    """Return the policy of a run folder.

    Args:
        run: the folder.
        checkpoint: see `Policy.load`.
        device: where the policy is needed.

    Raises:
        UserError: there is none, none that denoises, or one that is two networks in turn.
    """
    loaded = Policy.load(run, checkpoint=checkpoint, device=device)
    agent = loaded.agent
    policy = denoising_policy(agent)
    if policy is None:
        raise UserError(
            f"--base {run} is a run of '{loaded.config['agent']}', whose policy does not denoise; give one of "
            "diffusion-policy or flow-policy, made by python -m experiments.imitate"
        )
    if isinstance(agent, DPPO) and agent.first:
        raise UserError(
            f"--base {run} learned the last {agent.learned} of its {agent.sampler.steps} denoising steps, and leaves "
            "the others to a network of its own; give a run with --fine-tuned-steps 0, or go on with --resume"
        )
    task = loaded.config["env"]
    return Base(
        policy=policy.requires_grad_(False),
        spaces=loaded.config["spaces"],
        task={name: task[name] for name in OF_THE_TASK if name in task},
        about={
            "run": str(run.expanduser().resolve()),
            "checkpoint": loaded.checkpoint,
            "digest": networks_digest({"policy": policy}),
        },
    )


def denoising_policy(agent: Agent) -> DenoisingPolicy | None:
    """Return the policy that an agent acts by, if it is one that denoises."""
    policy: Any = None
    if isinstance(agent, Imitation):
        policy = agent.average.module
    elif isinstance(agent, FineTuner):
        policy = agent.policy
    return policy if isinstance(policy, DenoisingPolicy) else None


def digests(agent: Agent) -> list[str]:
    """Return the digests by which runs know an agent that they began with or act on top of.

    The first is of all by which it acts, the second, of one that denoises, of its policy alone.
    """
    policy = denoising_policy(agent)
    alone = [] if policy is None else [networks_digest({"policy": policy})]
    return [weights_digest(agent), *alone]


def refuse_unused(agent: str, given: Mapping[str, Any]) -> None:
    """Refuse flags of the policy that an agent has no use for.

    Raises:
        UserError: names the first.
    """
    for name in find(agent).unused:
        if name in given:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is {given[name]}, but {agent} has no use for it: it has a way of its own; leave --{flag} out"
            )


def refuse_idle(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse flags of a policy that count only together with others, which it does not have.

    Args:
        config: of the run, of any kind.
        given: the flags.

    Raises:
        UserError: names the first, and what it needs.
    """
    if not isinstance(config, DenoisingConfig):
        return
    for name in given:
        if missing := missing_for(config, name):
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is given, but without {missing} it changes nothing; add that, or leave --{flag} out"
            )


def chunks_of_the_task(
    config: DenoisingConfig, given: Mapping[str, Any], action_chunk: int
) -> DenoisingConfig:
    """Return a policy without a base, which predicts what the task executes unless a flag says otherwise.

    Raises:
        UserError: its noise is to be correlated as demonstrations are, which there are none of.
    """
    if config.noise_correlation:
        raise UserError(
            f"--noise-correlation is {config.noise_correlation}, a share of how demonstrated actions are correlated, "
            "and without --base there are none; leave it out, or give a --base that has it"
        )
    return config if "horizon" in given else dataclasses.replace(config, horizon=action_chunk)


def begin_from_base(agent: Agent, config: Mapping[str, Any], spaces: Mapping[str, Any]) -> None:
    """Give an agent the weights of its config's base.

    Args:
        agent: a new one.
        config: the run's.
        spaces: of its task, as config.json describes them.

    Raises:
        UserError: the base is another one than when the run was made, or of another task; the text says what differs.
    """
    about = config["base"]
    # The one that the config names: the base may have been trained on since.
    base = find_base(Path(about["run"]), checkpoint=about["checkpoint"], device=config["device"])
    if base.about["digest"] != about["digest"]:
        raise UserError(
            f"the base {about['run']} has changed since this run was made from it; begin a new run, or restore it"
        )
    for what, told in (("observation", "observes"), ("action", "acts in")):
        ours, theirs = spaces[what], base.spaces[what]
        if what == "action":  # any chunk that the base's horizon covers
            ours, theirs = _single(ours), _single(theirs)
        if ours != theirs:
            raise UserError(
                f"the base {about['run']} {told} {shapes(theirs)}, this task {shapes(ours)}; give a base of this "
                f"task, or its settings ({', '.join('--' + n.replace('_', '-') for n in FLAGS[what])})"
            )
    assert isinstance(agent, FineTuner)
    agent.start_from(base.policy)


FLAGS = {
    "observation": ("observation", "size", "camera", "frame_stack"),
    "action": ("env",),
}
"""Which flags decide a space."""


def _single(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of one action of a chunk."""
    return {**space, "box": space["box"][-1:]} if "box" in space else dict(space)


def shapes(space: Mapping[str, Any]) -> str:
    """Return a space in words."""
    if "dict" in space:
        parts = space["dict"].items()
        return " and ".join(f"{name} {shapes(part)}" for name, part in parts)
    if "discrete" in space:
        return f"{space['discrete']} choices"
    return f"{space['dtype']} {list(space['box'])}"
