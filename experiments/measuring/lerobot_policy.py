"""LeRobot's diffusion policy, timed in a Python that has it: the other side of `experiments.measuring.acting`.

    PYTHON -m experiments.measuring.lerobot_policy versions
    PYTHON -m experiments.measuring.lerobot_policy serve 512,1024,2048 4,10 cpu THREADS

PYTHON needs LeRobot and what its policy imports; of this project nothing but this file and `timing`. The policy has its
defaults (horizon 16, 8 actions executed, two observations, kernel 5, 100 noise levels) but for the number of
steps; a call is `select_action` on a fresh episode, which draws a whole chunk. Observations come as it takes them,
normalized, so that neither side's normalization is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from experiments.measuring.timing import serve

HORIZON, EXECUTED, ACTION = 16, 8, 4
ROBOT, SURROUNDINGS, LOOKS = 4, 35, 2
"""Numbers of an observation's two parts, and observations that a chunk depends on."""
STATE = LOOKS * (ROBOT + SURROUNDINGS)
TRAIN_STEPS = 100
SAMPLERS = ("DDPM", "DDIM")


def import_policy() -> Any:
    """Return LeRobot's module of the policy."""
    import torch

    try:
        import torchvision  # noqa: F401
    except (
        RuntimeError
    ):  # a wheel for another build of torch: no operator of its own, which nobody needs here
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(operators)
    from lerobot.policies.diffusion import modeling_diffusion

    return modeling_diffusion


_kept: list[Any] = []
"""Operators exist as long as their library does."""


def policy(kind: str, steps: int, widths: tuple[int, ...], device: str) -> Any:
    """Return a policy that draws chunks of actions from states."""
    module = import_policy()
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (ROBOT,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (SURROUNDINGS,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        device=device,
        down_dims=widths,
        noise_scheduler_type=kind,
        num_inference_steps=steps,
    )
    return module.DiffusionPolicy(config).to(device).eval()


def calls(
    widths: tuple[int, ...], steps: tuple[int, ...], device: str
) -> dict[str, Callable[[], Any]]:
    """Return what draws a chunk, by sampler and steps; all with the same weights."""
    import torch

    made: dict[str, Callable[[], Any]] = {}
    first: Any = None
    observation = {
        "observation.state": torch.zeros(1, ROBOT, device=device),
        "observation.environment_state": torch.zeros(1, SURROUNDINGS, device=device),
    }
    for kind in SAMPLERS:
        for count in steps:
            own = policy(kind, count, widths, device)
            first = first or own
            own.diffusion.unet = first.diffusion.unet

            def call(own: Any = own) -> Any:
                own.reset()
                return own.select_action(dict(observation)).cpu().numpy()

            made[f"{kind}-{count}"] = call
    return made


def main() -> None:
    """Say which versions these are, or serve calls until nobody asks."""
    import torch

    if sys.argv[1] == "versions":
        import_policy()
        from importlib.metadata import version

        print(f"LeRobot {version('lerobot')} on torch {torch.__version__}")
        return
    widths, steps = (tuple(map(int, text.split(","))) for text in sys.argv[2:4])
    device, threads = sys.argv[4:]
    torch.set_num_threads(int(threads))
    serve(calls(widths, steps, device), sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
