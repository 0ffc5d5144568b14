"""Scripts that know how a task is done, by the task's id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from wrappers.errors import UserError

Expert = Callable[[np.ndarray], Any]
"""From a task's state observation to an action of its space; without a memory."""


def scripted_expert(id: str) -> Expert:
    """Return the script of a task: those of metaworld/, and some of toy/.

    Args:
        id: of the task.

    Raises:
        UserError: nobody has written one, or there is no such task.
    """
    family, _, task = id.partition("/")
    if family == "toy":
        from envs import toy_experts

        return toy_experts.scripted_expert(task)
    if family == "metaworld":
        from envs import metaworld_experts  # imports the simulator

        return metaworld_experts.scripted_expert(task)
    raise UserError(
        f"{id} has no script that knows how it is done; tasks of metaworld/ and toy/ have"
    )
