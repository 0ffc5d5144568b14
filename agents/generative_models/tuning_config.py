"""Settings of fine-tuning: what every method in `methods` is made of.

They fall into groups, each a decision that papers differ in: the objective, the sampler, the group of images that are
compared, the credit, the rule of ratios, the regularizer, and the optimizer. A method is a choice of these; each can be
overridden alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

from agents.core.advantages import Spread
from agents.core.errors import UserError
from agents.generative_models.ratio_rules import Reduction, StepWeight
from agents.on_policy.config import Ranges, at_least_one, not_negative, positive

Objective = Literal[
    "policy_gradient", "step_preference", "preference", "imitation", "truncated_chain", "one_step"
]
Noise = Literal["auto", "flow_sde", "dance_sde", "posterior", "cps"]
Surrogate = Literal[
    "ppo_clip", "reinforce", "dual_clip", "masked", "divergence", "spo", "asymmetric"
]
Credit = Literal["group", "leave_one_out", "history", "value"]
WindowMoves = Literal["progressive", "random"]
Preference = Literal["dpo", "ipo"]

NOISE_LEVELS: dict[Noise, float] = {"flow_sde": 0.7, "dance_sde": 0.3, "posterior": 1.0, "cps": 0.8}
"""See `TuningConfig.noise_level`."""

OF_ALL = (
    "objective denoising_steps shift guidance prompts group batch_size learning_rate weight_decay epochs updates "
    "max_gradient_norm average_decay"
)
"""Settings of every objective."""
OF_NOISE = "noise noise_level window window_moves window_every shared_noise"
"""Those of objectives that draw chains with noise."""
OF_OBJECTIVE: dict[Objective, str] = {
    "policy_gradient": "credit advantage_limit surrogate clip log_prob ratio_norm step_weight step_share kl",
    "step_preference": "preference beta log_prob",
    "preference": "preference beta draws",
    "imitation": "best draws",
    "truncated_chain": "gradient_steps checkpoint_activations reward_ceiling",
    "one_step": "reward_ceiling",
}
OF_CREDIT: dict[Credit, str] = {
    "group": "spread",
    "leave_one_out": "",
    "history": "history history_least",
    "value": "value_updates value_learning_rate",
}
"""Those of policy gradients by what a reward is compared with."""


@dataclass(frozen=True)
class TuningConfig:
    """How a generator is fine-tuned; defaults are Flow-GRPO's unless a field says otherwise."""

    objective: Objective = "policy_gradient"
    """Loss: policy_gradient (of denoising steps), step_preference (pairs of steps), preference (pairs of noised
    images), imitation (of the best images), truncated_chain or one_step (gradient of the reward)."""
    # ------------------------------------------------------------------------------------ sampler
    denoising_steps: int = 10
    """Steps of a chain in training (Flow-GRPO 10, DanceGRPO 16, DDPO 50)."""
    noise: Noise = "auto"
    """Rule of the stochastic steps: auto is flow_sde on flows, and posterior on diffusions, to which flow_sde tends as
    steps shrink, but whose first step there leaves many times the noise that the network expects. The last step of a
    chain draws nothing: papers leave it out of what is learned."""
    noise_level: float | None = None
    """a of the flow SDE (.7), eta of the others (Dance .3, DDPO's posterior 1, CPS .8); these where none is given."""
    shift: float = 1.0
    """Time shift of flows: above 1, more steps near the noise (3 for 1024 px; 1 where d is small)."""
    window: int = 0
    """Stochastic steps of a chain, one after the other, the rest deterministic (MixGRPO 4); 0 for all."""
    window_moves: WindowMoves = "progressive"
    """From noise to data every `window_every` iterations, then again; or anew at random in each one."""
    window_every: int = 25
    """Iterations between two moves of a progressive window (MixGRPO 25)."""
    guidance: float = 3.0
    """Scale of classifier-free guidance, in sampling and in the loss; 1 is none (Flow-GRPO 4.5, DDPO 5)."""
    # -------------------------------------------------------------------------------------- group
    prompts: int = 8
    """Prompts of an iteration (Flow-GRPO 48)."""
    group: int = 8
    """Images of each prompt, which are compared (Flow-GRPO 24, DanceGRPO 12)."""
    shared_noise: bool = False
    """Images of a prompt begin with the same noise (DanceGRPO, D3PO)."""
    batch_size: int = 32
    """Images in a pass of the network, at most; a group may be cut."""
    # ------------------------------------------------------------------------------------- credit
    credit: Credit = "group"
    """What a reward is compared with: its group's mean, the mean of the others there, the prompt's last rewards
    (DDPO), or a learned value (DPOK)."""
    spread: Spread = "batch"
    """What `group` divides by: spread of the whole batch (Flow-GRPO), of the group, or nothing."""
    advantage_limit: float = 5.0
    """Largest magnitude of an advantage."""
    history: int = 32
    """Rewards of a prompt that `history` remembers (DDPO 32)."""
    history_least: int = 8
    """Rewards of a prompt from which its history counts; before, the batch does (DDPO 16; 8 is one group of ours, and
    with some hundred prompts a short run sees each of them once or twice)."""
    value_updates: int = 5
    """Gradient steps of the value in an iteration (DPOK 5)."""
    value_learning_rate: float = 1e-4
    """Adam step size of the value (DPOK 1e-4)."""
    # ------------------------------------------------------------------------------- ratio rule
    surrogate: Surrogate = "ppo_clip"
    """Of `agents.core.policy_gradient`; `divergence` is `masked` by the step's KL (Flow-DPPO)."""
    clip: float = 0.0256
    """Largest |ratio - 1| of the mean's ratio, times sqrt(d) (see `ratio_rules`); of `divergence`, the largest
    KL per number times d (.66 = 1e-5 * 65,536)."""
    log_prob: Reduction = "mean"
    """Log-probabilities are means or sums over an image's numbers; the clip is converted."""
    ratio_norm: bool = False
    """GRPO-Guard's normalized log-ratios, sample by sample."""
    step_weight: StepWeight = "none"
    """Of the steps' losses: none, gain (GRPO-Guard), noise (TempFlow-GRPO)."""
    step_share: float = 1.0
    """Share of a chain's stochastic steps that are learned from, drawn at random (DanceGRPO .6)."""
    # -------------------------------------------------------------------------------- regularizer
    kl: float = 0.04
    """Weight of each step's KL to the reference, per number (Flow-GRPO .04 or .01; 0 for none)."""
    # ---------------------------------------------------------------------------- other objectives
    preference: Preference = "dpo"
    """Loss of a pair, the best and the worst image of a prompt."""
    beta: float = 0.3
    """Of that loss, for log-ratios that are sums (Diffusion-DPO: 5000 / 16,384)."""
    best: int = 1
    """Images of a group that imitation keeps (RAFT 1)."""
    draws: int = 2
    """Times and noises at which an image is noised in a pass, by imitation and preferences (ours; 1 elsewhere)."""
    gradient_steps: int = 2
    """Last steps of a chain that a reward's gradient goes through (AlignProp 1 to 8 of 50)."""
    checkpoint_activations: bool = True
    """Compute a step's activations again instead of keeping them while the gradient goes through a chain."""
    reward_ceiling: float = math.inf
    """Above this reward an image gives no gradient (ReFL's relu(2 - r); none by default)."""
    # ---------------------------------------------------------------------------------- optimizer
    learning_rate: float = 1e-4
    """AdamW step size (DDPO and Flow-GRPO 3e-4 for LoRA; full networks 1e-5 to 1e-4)."""
    weight_decay: float = 1e-4
    """AdamW's (DDPO, Flow-GRPO 1e-4)."""
    epochs: int = 1
    """Passes over an iteration's images (DDPO, Flow-GRPO 1)."""
    updates: int = 2
    """Gradient steps in a pass (Flow-GRPO 2, DDPO 4)."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    average_decay: float = 0.0
    """Of an average of the parameters over gradient steps, which is evaluated, saved and reported in their place;
    images to learn from are drawn without it. 0 for none (Flow-GRPO .9, taken every 8 gradient steps)."""

    RANGES: ClassVar[Ranges] = (
        ("denoising_steps prompts group batch_size epochs updates best draws history history_least window_every "
         "value_updates", at_least_one, "a positive number"),
        ("window gradient_steps kl weight_decay", not_negative, "0 or more"),
        ("noise_level", lambda value: value is None or not_negative(value), "0 or more"),
        ("shift beta clip advantage_limit max_gradient_norm", positive, "a positive number"),
        ("learning_rate value_learning_rate", lambda value: 0 < value < math.inf, "a positive number"),
        ("average_decay", lambda value: 0 <= value < 1, "a share below 1, or 0 for no average"),
        ("step_share", lambda value: 0 < value <= 1, "a share above 0, up to 1"),
        ("reward_ceiling", lambda value: not math.isnan(value), "a number"),
        ("guidance", not_negative, "0 or more"),
        *((name, get_args(kind).__contains__, f"one of {', '.join(get_args(kind))}") for name, kind in (
            ("objective", Objective), ("noise", Noise), ("surrogate", Surrogate), ("credit", Credit),
            ("spread", Spread), ("log_prob", Reduction), ("step_weight", StepWeight), ("preference", Preference),
            ("window_moves", WindowMoves))),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Reject values that nothing can be trained with."""
        for names, fits, wanted in self.RANGES:
            for name in names.split():
                if not fits(getattr(self, name)):
                    raise UserError(f"{name} is {getattr(self, name)}; give {wanted}")
        compares = self.objective in ("preference", "step_preference", "imitation") or (
            self.objective == "policy_gradient" and self.credit in ("group", "leave_one_out")
        )
        if compares and self.group < 2:
            raise UserError(
                "group is 1, but images of a prompt are compared; give at least 2, or --credit history or value"
            )
        if self.history_least > self.history:
            raise UserError(
                f"history_least is {self.history_least} of a history of {self.history}; give as many at most"
            )
        if self.objective == "imitation" and self.best >= self.group:
            raise UserError(f"best is {self.best} of a group of {self.group}; give fewer than all")
        if self.window >= self.denoising_steps:
            raise UserError(
                f"window is {self.window} of {self.denoising_steps} steps; give fewer, or 0 for all"
            )

    def on_path(self, *, is_flow: bool) -> TuningConfig:
        """Return the same settings with the noise that fits a generator's path, where none is given."""
        noise: Noise = self.noise
        if noise == "auto":
            noise = "flow_sde" if is_flow else "posterior"
        level = NOISE_LEVELS[noise] if self.noise_level is None else self.noise_level
        return replace(self, noise=noise, noise_level=level)

    def fields_read(self) -> list[str]:
        """Return the settings that this objective reads, in their order; others change nothing."""
        read = {*OF_ALL.split(), *OF_OBJECTIVE[self.objective].split()}
        if self.objective not in ("truncated_chain", "one_step"):
            read |= set(OF_NOISE.split())
        if not self.window:
            read -= {"window_moves", "window_every"}
        elif self.window_moves == "random":
            read.remove("window_every")
        if self.objective == "policy_gradient":
            read |= set(OF_CREDIT[self.credit].split())
            if self.surrogate == "reinforce":
                read.remove("clip")
        return [field.name for field in fields(self) if field.name in read]
