"""Methods of fine-tuning image generators, each a choice of `tuning_config` settings.

| method | settings | source |
| --- | --- | --- |
| `ddpo` | posterior eta 1; credit of the prompt's history; ppo_clip .0128 | Black et al. 2023, arXiv:2305.13301 |
| `ddpo-sf` | the same, surrogate `reinforce`, one gradient step | the same (DDPO-SF) |
| `dpok` | posterior eta 1; learned value; ppo_clip .0128; KL .01 | Fan et al. 2023, arXiv:2305.16381 |
| `flow-grpo` | flow SDE .7; group mean, batch spread; ppo_clip .0256; KL .04 | Liu et al. 2025, arXiv:2505.05470 |
| `dance-grpo` | Dance SDE .3; shared noise; 60 % of steps; ppo_clip .036; no KL | Xue et al. 2025, arXiv:2505.07818 |
| `grpo-guard` | flow-grpo; normalized ratios, weight by gain, clip .001, no KL | Wang et al. 2025, arXiv:2510.22319 |
| `mix-grpo` | flow SDE in a window of 4 that moves, deterministic elsewhere; no KL | Li et al. 2025, arXiv:2507.21802 |
| `raft` | imitation of the best of each group | Dong et al. 2023, arXiv:2304.06767 |
| `diffusion-dpo` | best against worst of a group, noised; DPO | Wallace et al. 2023, arXiv:2311.12908 |
| `ipo` | the same; IPO | Azar et al. 2023, arXiv:2310.12036 |
| `d3po` | best against worst chain of a group from one noise, step by step; DPO | Yang et al. 2023, arXiv:2311.13231 |
| `alignprop` | gradient of the reward through the chain's last steps | Prabhudesai et al. 2023, arXiv:2310.03739 |
| `refl` | gradient of the reward through one late step's x0 | Xu et al. 2023, arXiv:2304.05977 |

At inference, without training (see `steering`): `fk-steering`, `reno`, `best-of-n`.

**Differences from the papers**, of all: clips are free of an image's size (`ratio_rules`); of the small generators the
whole denoiser learns instead of a LoRA (pipelines have one); the step to the data draws no noise; KL terms are exact
Gaussian ones per number, of the chain's own steps. DDPO: 10 steps instead of 50. DPOK: `ppo_clip`, a clip with a
minimum, where its code clamps the ratio alone and a step that left the band is never led back; its KL is of the steps,
not |eps - eps_ref|^2; advantages are brought to mean 0 and spread 1 instead of multiplied by 10 to 1000. D3PO: its code
clamps the ratio inside the logarithm, which stops the gradient on both sides; here log-ratios are whole. Its beta of .1
is on means over 16,384 numbers, 6e-6 on sums, which holds nothing at the reference; here .1 is on sums, as DPO has it.
Diffusion-DPO: pairs are made on the fly and judged by the reward. Flow-GRPO, GRPO-Guard and MixGRPO: on diffusions, the
posterior of eta 1 is the noise, to which the flow SDE of sqrt(2) tends. MixGRPO: the window wraps. ReFL: without the
pretraining loss, and with no ceiling unless one is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from agents.core.errors import UserError
from agents.generative_models.tuning_config import TuningConfig


@dataclass(frozen=True)
class Method:
    """A named choice of settings."""

    summary: str
    """One line for the help."""
    settings: dict[str, Any]
    """Fields of `TuningConfig` that differ from its defaults."""

    def config(self, **overrides: Any) -> TuningConfig:
        """Return the method's settings, with some of them overridden."""
        return replace(TuningConfig(), **(self.settings | overrides))


_DDPO = {
    "noise": "posterior", "noise_level": 1.0, "credit": "history", "clip": 0.0128, "kl": 0.0, "updates": 4,
}  # fmt: skip
_PAIRS = {"objective": "preference", "kl": 0.0, "updates": 4}
_GRADIENT = {"kl": 0.0, "group": 1, "prompts": 32, "updates": 1}

METHODS: dict[str, Method] = {
    "ddpo": Method("importance-sampled policy gradient of denoising steps (DDPO-IS)", _DDPO),
    "ddpo-sf": Method(
        "score-function policy gradient (DDPO-SF)",
        _DDPO | {"surrogate": "reinforce", "updates": 1},
    ),
    "dpok": Method(
        "policy gradient with a learned value and KL (DPOK)",
        _DDPO | {"credit": "value", "kl": 0.01},
    ),
    "flow-grpo": Method("group-relative policy gradient on a flow's SDE (Flow-GRPO)", {}),
    "dance-grpo": Method(
        "groups from one noise, part of the steps (DanceGRPO)",
        {"noise": "dance_sde", "noise_level": 0.3, "shared_noise": True, "spread": "group",
         "step_share": 0.6, "clip": 0.036, "kl": 0.0},
    ),
    "grpo-guard": Method(
        "Flow-GRPO with normalized ratios and balanced steps (GRPO-Guard)",
        {"ratio_norm": True, "step_weight": "gain", "clip": 0.001, "kl": 0.0},
    ),
    "mix-grpo": Method(
        "noise in a moving window of steps (MixGRPO)",
        {"window": 4, "window_every": 25, "spread": "group", "clip": 0.036, "kl": 0.0},
    ),
    "raft": Method(
        "imitation of the best image of each group (RAFT)",
        # What is imitated is drawn without noise, which few stochastic steps leave in a picture.
        {"objective": "imitation", "kl": 0.0, "updates": 1, "noise_level": 0.0},
    ),
    "diffusion-dpo": Method("best against worst image (Diffusion-DPO)", _PAIRS),
    "ipo": Method("the same, with a margin to regress to (IPO)", _PAIRS | {"preference": "ipo", "beta": 0.1}),
    "d3po": Method(
        "best against worst chain, step by step (D3PO)",
        {"objective": "step_preference", "noise": "posterior", "noise_level": 1.0, "shared_noise": True,
         "log_prob": "sum", "beta": 0.1, "kl": 0.0, "updates": 4},
    ),
    "alignprop": Method(
        "gradient of the reward through the last steps (AlignProp)",
        _GRADIENT | {"objective": "truncated_chain"},
    ),
    "refl": Method(
        "gradient of the reward through one late step (ReFL)", _GRADIENT | {"objective": "one_step"}
    ),
}  # fmt: skip
"""By name; see the module."""


def find_method(name: str) -> Method:
    """Return a method.

    Raises:
        UserError: there is none of that name; the nearest ones are named.
    """
    if name not in METHODS:
        raise UserError.unknown("method", name, METHODS)
    return METHODS[name]
