"""The networks of Stable-Baselines3's policies, rebuilt from the names and shapes of a zip's tensors.

What no tensor tells (activations, strides, whether pixels are divided by 255) is read from the zip's JSON or is
Stable-Baselines3's own; where somebody's code could lie behind a policy, it is refused.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from agents.baseline_files import TRUST, BaselineFile, Normalization
from agents.core.agent import Observation
from agents.core.errors import UserError
from agents.core.networks import ReLU

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "leakyrelu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU,
}  # fmt: skip
"""By the class's name in lower case."""

_MODULES = re.compile(r"stable_baselines3\.(common|sac|td3|ppo|a2c)\.policies")
"""Where Stable-Baselines3's own policies are; another one's forward pass is not known."""

_STRIDES = (4, 2, 1)
"""Of NatureCNN's convolutions (Mnih et al. 2015), which no tensor tells."""


class UnknownFormError(UserError):
    """The zip's policy is none of those that can be rebuilt without its pickles."""

    def __init__(self, file: BaselineFile, why: str) -> None:
        super().__init__(
            f"'{file.path}' holds {why}, and only MlpPolicy and CnnPolicy of PPO and A2C and MlpPolicy of SAC and TD3 "
            f"are known; {TRUST}"
        )


class BaselineNetwork(nn.Module):
    """A policy and, where the zip has one that needs nothing but the observation, its value."""

    def __init__(self) -> None:
        super().__init__()
        self.normalization: Normalization | None = None
        self.divisor = 255.0
        self.actor_cnn: nn.Module | None = None
        self.critic_cnn: nn.Module | None = None
        self.actor: nn.Module = nn.Identity()
        self.critic: nn.Module | None = None
        self.log_std: Tensor | nn.Module | None = None
        """A continuous policy's: a parameter [A], or what gives it from the last hidden layer (SAC)."""
        self.head: nn.Module = nn.Identity()
        self.squashes = False
        """Whether the mean goes through tanh."""

    def prepare(self, observation: Observation) -> Tensor:
        """Return what the first layer takes."""
        if "pixels" in observation:
            return observation["pixels"].float() / self.divisor
        state = observation["state"].float()
        return state if self.normalization is None else self.normalization(state)

    def forward(self, prepared: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return means or logits [B, A], and log standard deviations where the policy has them."""
        hidden = self.actor(prepared if self.actor_cnn is None else self.actor_cnn(prepared))
        log_std = self.log_std
        if isinstance(log_std, nn.Module):
            log_std = log_std(hidden).clamp(-20, 2)  # SAC's bounds
        return self.head(hidden), log_std

    def value(self, prepared: Tensor) -> Tensor | None:
        """Return values [B]."""
        if self.critic is None:
            return None
        return self.critic(prepared if self.critic_cnn is None else self.critic_cnn(prepared))[:, 0]


def build_network(file: BaselineFile, activation: str | None) -> BaselineNetwork:
    """Rebuild the policy from its tensors; every tensor of the zip must have found its place."""
    module = file.text("policy_class", "__module__")
    if not _MODULES.fullmatch(module):
        raise UnknownFormError(file, f"a policy of module '{module or '?'}'")
    extractor = file.class_option("features_extractor_class")
    if extractor not in (None, "FlattenExtractor", "NatureCNN"):
        raise UnknownFormError(file, f"a policy with the features extractor {extractor}")
    for name in ("observation_space", "action_space"):
        if file.class_name(name) not in ("Box", "Discrete"):
            raise UnknownFormError(file, f"a policy whose {name} is {file.class_name(name) or '?'}")
    if file.data.get("use_sde") and file.option("squash_output", False):
        raise UnknownFormError(file, "a squashed policy with state-dependent exploration")
    builder = _Builder(file, _activation(file, activation))
    network = BaselineNetwork()
    network.divisor = 255.0 if file.option("normalize_images", True) else 1.0
    weights = file.weights
    if "action_net.weight" in weights:
        shared = builder.cnn("features_extractor")
        network.actor_cnn = builder.cnn("pi_features_extractor") or shared
        network.critic_cnn = builder.cnn("vf_features_extractor") or shared
        network.actor = builder.layers("mlp_extractor.policy_net", last=True)
        network.critic = nn.Sequential(
            builder.layers("mlp_extractor.value_net", last=True), builder.linear("value_net")
        )
        network.head = builder.linear("action_net")
        if "log_std" in weights:
            log_std = builder.take("log_std")
            # State-dependent exploration draws from a matrix that nobody saved: such a policy acts greedily.
            network.log_std = None if log_std.ndim > 1 else nn.Parameter(log_std)
    elif "actor.log_std.weight" in weights:
        network.actor = builder.layers("actor.latent_pi", last=True)
        network.head, network.log_std = builder.linear("actor.mu"), builder.linear("actor.log_std")
        network.squashes = True
    elif "actor.mu.0.weight" in weights and "actor.log_std" not in weights:
        network.head, network.squashes = builder.layers("actor.mu", last=False), True
    else:
        raise UnknownFormError(file, "a policy of another kind")
    others = ("actor_target.", "critic.", "critic_target.")
    unused = [n for n in weights if n not in builder.taken and not n.startswith(others)]
    if unused:
        raise UnknownFormError(file, f"a policy with '{unused[0]}'")
    return network.requires_grad_(False)


class _Builder:
    """Makes modules of a zip's tensors, and notes which it took."""

    def __init__(self, file: BaselineFile, activation: type[nn.Module]) -> None:
        self.file, self.activation = file, activation
        self.taken: set[str] = set()

    def take(self, name: str) -> Tensor:
        if name not in self.file.weights:
            raise UnknownFormError(self.file, f"a policy without '{name}'")
        self.taken.add(name)
        return self.file.weights[name].clone()

    def linear(self, name: str) -> nn.Linear:
        weight = self.take(f"{name}.weight")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": self.take(f"{name}.bias")})
        return layer

    def layers(self, prefix: str, *, last: bool) -> nn.Sequential:
        """Return linear layers with the activation between, and after the last of them where `last` says so."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.weight")
        found = (pattern.fullmatch(name) for name in self.file.weights)
        numbers = sorted(int(match[1]) for match in found if match)
        if numbers != list(range(0, 2 * len(numbers), 2)):  # layer norms and dropout shift them
            raise UnknownFormError(self.file, f"more than plain layers in '{prefix}'")
        modules: list[nn.Module] = []
        for number in numbers:
            modules += [self.linear(f"{prefix}.{number}"), self.activation()]
        return nn.Sequential(*(modules if last else modules[:-1]))

    def cnn(self, prefix: str) -> nn.Sequential | None:
        """Return a NatureCNN; None where there is none of that name."""
        if f"{prefix}.cnn.0.weight" not in self.file.weights:
            return None
        modules: list[nn.Module] = []
        for number, stride in zip((0, 2, 4), _STRIDES, strict=True):
            name = f"{prefix}.cnn.{number}"
            weight = self.take(f"{name}.weight")
            if weight.ndim != 4:
                raise UnknownFormError(self.file, "another network than NatureCNN")
            size = (int(weight.shape[2]), int(weight.shape[3]))
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], size, stride)
            layer.load_state_dict({"weight": weight, "bias": self.take(f"{name}.bias")})
            modules += [layer, ReLU()]
        return nn.Sequential(*modules, nn.Flatten(), self.linear(f"{prefix}.linear.0"), ReLU())


def _activation(file: BaselineFile, asked: str | None) -> type[nn.Module]:
    if asked is not None and asked not in ACTIVATIONS:
        raise UserError.unknown("activation", asked, ACTIVATIONS)
    own = "tanh" if "action_net.weight" in file.weights else "relu"
    name = asked or (file.class_option("activation_fn") or own).lower()
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"'{file.path}' names the activation {file.option('activation_fn', name)}; give --sb3-activation, "
            f"one of {known}"
        )
    return ACTIVATIONS[name]
