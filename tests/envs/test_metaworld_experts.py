"""Meta-World's experts act on our states."""

from __future__ import annotations

import warnings
from contextlib import closing

import numpy as np
import pytest

import envs
from envs.metaworld_experts import scripted_expert
from envs.metaworld_tasks import task_names
from wrappers.errors import UserError


def test_an_expert_solves_its_task_where_random_actions_do_not() -> None:
    act = scripted_expert("reach")
    with closing(envs.make("metaworld/reach", observation="state", action_repeat=1)) as env:
        state, _ = env.reset(seed=5)
        env.action_space.seed(0)
        random = []
        for _ in range(150):
            random.append(env.step(env.action_space.sample())[4]["success"])
        state, _ = env.reset(seed=5)
        success = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(150):
                action = act(state)
                assert env.action_space.contains(action)
                state, _, _, _, info = env.step(action)
                success = max(success, info["success"])
    assert success == 1.0
    assert np.max(random) == 0.0


def test_every_task_has_an_expert() -> None:
    for task in task_names():
        assert scripted_expert(task)(np.full(39, 0.1, np.float32)).shape == (4,)
    with pytest.raises(UserError, match="did you mean drawer-open"):
        scripted_expert("drawr-open")
