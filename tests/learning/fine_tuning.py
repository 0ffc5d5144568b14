"""Fine-tune a denoising policy on a small task in seconds, whole or broken on purpose."""

import dataclasses

import numpy as np
import torch

import envs
from agents.core.agent import as_observation
from agents.core.fields import step_fields
from agents.core.rollout import TEACHER_ACTION, Rollout
from agents.generative_policies.policy import DenoisingConfig
from agents.registry import AGENTS

CPU = torch.device("cpu")
NETWORK = {"width": 64, "blocks": 1, "time_features": 16}
SMALL = {
    "rollout_length": 32, "minibatch_size": 64, "discount": 0.9, "hidden": (64, 64),
    "critic_learning_rate": 3e-3,
}  # fmt: skip


def make(name, vector, *, chunk=2, num_envs=8, seed=0, policy=None, **changes):
    """Return a small agent by its name, for a vector environment's spaces."""
    config, drawing = AGENTS[name].configs
    config = dataclasses.replace(config, **(SMALL | changes))
    drawing = dataclasses.replace(drawing, **({"horizon": chunk} | NETWORK | (policy or {})))
    assert isinstance(drawing, DenoisingConfig)
    return AGENTS[name].build(
        vector.single_observation_space, vector.single_action_space, config, drawing,
        num_envs=num_envs, seed=seed,
    )  # fmt: skip


def weak_base(name, *, chunk=2, steps=200, seed=0, policy=None, way=0.3, spread=0.3):
    """Return a policy for toy/reach, made as agent `name` wants it, that imitates somebody who goes a third of the way.

    Args:
        name: of the agent.
        chunk: actions of a step.
        steps: of imitation.
        seed: of weights and data.
        policy: fields of its config.
        way: how far it goes from the middle to the target.
        spread: of where it goes.
    """
    vector = envs.make_vec("toy/reach", 1, observation="state", action_chunk=chunk)
    base = make(name, vector, chunk=chunk, seed=seed, policy=policy).policy
    vector.close()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(base.parameters(), lr=3e-3)
    for _ in range(steps):
        state = 1.7 * torch.rand(256, 4, generator=generator) - 0.85
        chunks = torch.randn(256, chunk, 2, generator=generator)
        chunks = (way * state[:, None, 2:] + spread * chunks).clamp(-1, 1)
        loss = base.loss({"state": state}, chunks, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return base


def train(
    name, task, *, steps, seed=0, num_envs=8, chunk=2, base=None, wrong_sign=False,
    shuffled_credit=False, episode_length=None, teacher=None, **changes,
):  # fmt: skip
    """Train an agent for `steps` chunks of all environments together; returns agent and metrics of each update.

    Args:
        name: of the agent.
        task: an id.
        steps: in all.
        seed: of everything.
        num_envs: environments.
        chunk: actions of a step.
        base: a policy to begin with.
        wrong_sign: learn to be worse.
        shuffled_credit: learn from the advantages of other decisions.
        episode_length: control steps until a time limit; None is the task's own.
        teacher: from observations to what a teacher would do.
        **changes: fields of the config; `policy` of that of the policy.
    """
    vector = envs.make_vec(
        task, num_envs, seed=seed, observation="state", action_chunk=chunk,
        episode_length=episode_length,
    )  # fmt: skip
    agent = make(name, vector, chunk=chunk, num_envs=num_envs, seed=seed, **changes)
    if base is not None:
        agent.start_from(base)
    random, right = np.random.default_rng(seed), agent.credit

    def wrong(experience):
        advantage, target = right(experience)
        if shuffled_credit:
            advantage = advantage[torch.from_numpy(random.permutation(len(advantage)))]
        return -advantage if wrong_sign else advantage, target

    if wrong_sign or shuffled_credit:
        agent.credit = wrong
    rollout = Rollout(
        vector.single_observation_space, vector.single_action_space,
        length=agent.rollout_length, num_envs=num_envs, log=lambda _: None,
        extras=agent.extras
        | ({TEACHER_ACTION: step_fields(vector.single_action_space)["action"]} if teacher else {}),
    )  # fmt: skip
    seen, _ = vector.reset(seed=seed)
    rollout.start(seen)
    metrics, state = [], None
    for step in range(steps // num_envs):
        agent.set_progress(step * num_envs)
        action, state, extras = agent.act(as_observation(seen, CPU), state, explore=True)
        if teacher is not None:
            advice = teacher(seen)
            action, state = agent.follow(action, state, advice, extras)
            extras[TEACHER_ACTION] = advice
        seen, reward, terminated, truncated, info = vector.step(action)
        state = agent.reset_state(state, terminated | truncated)
        rollout.add(
            action, reward, terminated, truncated, seen, info.get("final_obs"), extras=extras
        )
        if rollout.is_full:
            metrics.append({k: v.item() for k, v in agent.update(rollout.experience()).items()})
            rollout.clear()
    vector.close()
    return agent, metrics


def score(agent, task, *, chunk=2, episodes=30, seed=1234):
    """Return the mean return of episodes from fixed states, nothing explored."""
    return float(returns(agent, task, chunk=chunk, episodes=episodes, seed=seed).mean())


def returns(agent, task, *, chunk=2, episodes=30, seed=1234):
    """Return the returns of episodes from fixed states, nothing explored."""
    vector = envs.make_vec(task, episodes, observation="state", action_chunk=chunk)
    agent.seed_actions(seed)
    seen, _ = vector.reset(seed=seed)
    total, running = np.zeros(episodes), np.ones(episodes, bool)
    while running.any():
        action = agent.act(as_observation(seen, CPU), explore=False)[0]
        seen, reward, terminated, truncated, _ = vector.step(action)
        total += reward * running
        running &= ~(terminated | truncated)
    vector.close()
    return total
