"""Which class has which objective."""

from __future__ import annotations

import torch

from agents.core.ranks import Ranks
from agents.generative_models.credit import RewardFunction
from agents.generative_models.policy_tuning import PolicyTuner
from agents.generative_models.preference_tuning import (
    ImitationTuner,
    NoisedPairTuner,
    StepPairTuner,
)
from agents.generative_models.reward_gradients import OneStepTuner, TruncatedChainTuner
from agents.generative_models.text_to_image import TextToImage
from agents.generative_models.tuner import GeneratorTuner
from agents.generative_models.tuning_config import Objective, TuningConfig

OBJECTIVES: dict[Objective, type[GeneratorTuner]] = {
    "policy_gradient": PolicyTuner,
    "step_preference": StepPairTuner,
    "preference": NoisedPairTuner,
    "imitation": ImitationTuner,
    "truncated_chain": TruncatedChainTuner,
    "one_step": OneStepTuner,
}


def make_tuner(
    model: TextToImage,
    reward: RewardFunction,
    config: TuningConfig,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    ranks: Ranks | None = None,
) -> GeneratorTuner:
    """Return what fine-tunes a generator as `config` says; see `GeneratorTuner` for the arguments."""
    return OBJECTIVES[config.objective](
        model, reward, config, device=device, seed=seed, ranks=ranks
    )
