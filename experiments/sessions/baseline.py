"""Stable-Baselines3's PPO, unmodified, on our environments and by our protocol of evaluation.

Needs the package `stable-baselines3`, which nothing else here imports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger as TheirLogger
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from agents.core.errors import UserError
from agents.core.fields import is_image
from agents.core.logging import Logger, Progress
from agents.core.loops import LoopSettings
from agents.on_policy.ppo import PPOConfig

FIELDS = {
    "rollout_length": "n_steps",
    "minibatch_size": "batch_size",
    "epochs": "n_epochs",
    "discount": "gamma",
    "gae_lambda": "gae_lambda",
    "learning_rate": "learning_rate",
    "clip": "clip_range",
    "value_coefficient": "vf_coef",
    "entropy_coefficient": "ent_coef",
    "max_gradient_norm": "max_grad_norm",
    "normalize_advantage": "normalize_advantage",
}
"""Our name of a hyperparameter -> theirs; more go into the policy's and `VecNormalize`'s arguments."""


class SB3VectorEnv(VecEnv):
    """A vector environment of ours as Stable-Baselines3 takes one.

    Args:
        envs: same-step autoreset.
        seed: of the first reset; later ones go on.
    """

    def __init__(self, envs: VectorEnv, seed: int) -> None:
        self.envs, self._seed = envs, seed
        self._seen: Any = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Begin an episode in every environment."""
        self._seen, _ = self.envs.reset(seed=self._seed)
        return self._seen

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions."""
        self.envs.step_async(actions)  # type: ignore[attr-defined]

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Return observations, rewards, ends, and what Stable-Baselines3 asks of each end.

        A step that was lost with its worker ends an episode in the state before it, without reward: their rollout
        cannot leave it out.
        """
        seen, reward, terminated, truncated, info = self.envs.step_wait()  # type: ignore[attr-defined]
        dropped = info.get("dropped", np.zeros(self.num_envs, bool))
        taken = info.get("final_info", {}).get("control_steps")
        ended = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(ended | dropped):
            infos[i]["TimeLimit.truncated"] = bool(dropped[i] or not terminated[i])
            infos[i]["terminal_observation"] = self._seen[i] if dropped[i] else info["final_obs"][i]
            if ended[i]:
                episode = info["episode"]
                infos[i]["episode"] = {"r": float(episode["r"][i]), "l": int(episode["l"][i])}
                if taken is not None:
                    infos[i]["control_steps"] = int(taken[i])
        self._seen = seen
        return seen, reward.astype(np.float32), ended | dropped, infos

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of some environments."""
        values = self.envs.call(attr_name)  # type: ignore[attr-defined]
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuse: what environments are is in the run's config."""
        raise NotImplementedError("environments of a run are not changed; give other flags")

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of every environment."""
        values = self.envs.call(method_name, *method_args)  # type: ignore[attr-defined]
        return [values[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """Return that none is: wrappers of ours are none of theirs."""
        return [False for _ in self._get_indices(indices)]


class Protocol(BaseCallback):
    """Logs and evaluates at the agent steps at which our own loop does, and stops where it does.

    Stable-Baselines3 asks its callbacks before the last step of a rollout is learned from, our loop evaluates after:
    what is due at such a step waits for the update.

    Args:
        settings: how long and how often.
        logger: where numbers go.
        evaluate: returns scalars by tag.
        action_repeat: control steps per agent step, to count frames; `infos["control_steps"]` corrects the last one of
            an episode.
        line: prints a line for a person.
    """

    def __init__(
        self,
        settings: LoopSettings,
        logger: Logger,
        evaluate: Callable[[], Mapping[str, float]],
        *,
        action_repeat: int,
        line: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.settings, self.log, self.evaluate = settings, logger, evaluate
        self.action_repeat, self.line = action_repeat, line
        self.progress = Progress()
        self._returns: list[float] = []
        self._lengths: list[float] = []
        self._left_out = 0  # control steps that ends of episodes kept from being taken
        self._waiting = False

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()
        self._mark = (self._started, 0)

    def _on_rollout_start(self) -> None:
        self._settle()

    def _on_training_end(self) -> None:
        self._settle()

    def _on_step(self) -> bool:
        episodes = [info["episode"] for info in self.locals["infos"] if "episode" in info]
        self._returns += [episode["r"] for episode in episodes]
        self._lengths += [episode["l"] for episode in episodes]
        taken = [info["control_steps"] for info in self.locals["infos"] if "control_steps" in info]
        self._left_out += sum(self.action_repeat - steps for steps in taken)
        self._waiting = True
        if self.locals["n_steps"] + 1 == self.locals["n_rollout_steps"]:
            return True
        self._settle()
        return self.num_timesteps < self.settings.steps

    def _settle(self) -> None:
        """Do what is due at this step, if it was not done."""
        if not self._waiting:
            return
        self._waiting = False
        progress, settings = self.progress, self.settings
        progress.agent_steps = self.num_timesteps
        progress.env_frames = self.num_timesteps * self.action_repeat - self._left_out
        progress.gradient_updates = self._gradient_updates()
        progress.wall_seconds = time.perf_counter() - self._started
        if self._due(settings.log_every) or self.num_timesteps >= settings.steps:
            self._log()
        if settings.eval_every and self._due(settings.eval_every):
            clock = time.perf_counter()
            values = self.evaluate()
            self.log.scalars(values, progress)
            shown = "  ".join(f"{k.removeprefix('eval/')} {v:.1f}" for k, v in values.items())
            self.line(f"step {progress.agent_steps:>8,}  evaluation: {shown}")
            # Training speed is reported without the time that evaluation took.
            self._mark = (self._mark[0] + time.perf_counter() - clock, self._mark[1])

    def _due(self, every: int) -> bool:
        """Whether this step passed a multiple of `every`."""
        before = self.num_timesteps - self.training_env.num_envs
        return self.num_timesteps // every > before // every

    def _gradient_updates(self) -> int:
        model: Any = self.model  # which counts passes, of so many minibatches each
        minibatches = -(-model.n_steps * model.n_envs // model.batch_size)
        return model._n_updates * minibatches

    def _log(self) -> None:
        clock, steps = time.perf_counter(), self.num_timesteps - self._mark[1]
        speed = steps / max(clock - self._mark[0], 1e-9)
        values = {"time/steps_per_second": speed, "time/fps": speed * self.action_repeat}
        if self._returns:
            values["train/episode_return"] = float(np.mean(self._returns))
            values["train/episode_length"] = float(np.mean(self._lengths))
        self.log.scalars(values, self.progress)
        self.log.flush()
        self._returns, self._lengths = [], []
        self._mark = (clock, self.num_timesteps)


def make_model(
    envs: VectorEnv, config: PPOConfig, *, seeds: Mapping[str, int], device: str = "cpu"
) -> tuple[PPO, VecNormalize | None]:
    """Return their PPO on our environments with our hyperparameters, and what normalizes, if anything does.

    From pixels NatureCNN takes the place of our encoder and projection; `hidden` lies behind it, as behind ours.

    Raises:
        UserError: observations that only policies of other forms take.
    """
    space = envs.single_observation_space
    if isinstance(space, gym.spaces.Dict):
        raise UserError(
            "Stable-Baselines3's PPO sees pixels or a state here, not both; give --observation state or pixels"
        )
    pixels = is_image(space)
    if pixels and min(space.shape[1:]) < 36:  # type: ignore[index]
        raise UserError(
            f"Stable-Baselines3's NatureCNN sees 36 x 36 pixels at least, not {space.shape}; give --size 36 or more"
        )
    environment: VecEnv = SB3VectorEnv(envs, seeds["exploration"])
    normalizer = None
    observes = config.normalize_observation and not pixels
    if observes or config.scale_reward:
        environment = normalizer = VecNormalize(
            environment, norm_obs=observes, norm_reward=config.scale_reward, gamma=config.discount
        )
    seed = seeds["agent"] % 2**32
    model = model_on(environment, config, seed=seed, device=device)
    return model, normalizer if observes else None


def model_on(environment: VecEnv, config: PPOConfig, *, seed: int, device: str = "cpu") -> PPO:
    """Return their PPO on an environment of theirs with our hyperparameters; it does not normalize."""
    layers = list(config.hidden)
    policy: dict[str, Any] = {"net_arch": {"pi": layers, "vf": layers}}
    if isinstance(environment.action_space, gym.spaces.Box):
        policy["log_std_init"] = config.initial_log_std
    model = PPO(
        "CnnPolicy" if is_image(environment.observation_space) else "MlpPolicy",
        environment,
        policy_kwargs=policy,
        seed=seed,
        device=device,
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
    )
    model.set_logger(
        TheirLogger(folder=None, output_formats=[])
    )  # its own would leave a folder in /tmp
    return model
