"""`--acting NAME=VALUE`: settings that a policy was not trained with, and that only say how it acts."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from agents.core.errors import UserError
from agents.registry import find


def read_acting(agent: str, given: Sequence[str]) -> dict[str, Any]:
    """Return settings by name, in the types that the agent's configs have.

    Args:
        agent: a name of the registry.
        given: NAME=VALUE each.

    Raises:
        UserError: the agent has no such setting, or it takes no such value.

    Example:
        >>> read_acting("flow-policy", ["start_noise=0", "denoising_steps=4"])
        {'start_noise': 0.0, 'denoising_steps': 4}
    """
    if not given:
        return {}
    spec = find(agent)
    if not spec.acting:
        raise UserError(
            f"agent '{agent}' has no settings that only say how it acts; leave out --acting"
        )
    hints = {
        k: hint
        for config in spec.configs
        for k, hint in typing.get_type_hints(type(config)).items()
    }
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise UserError(f"--acting {text}: give NAME=VALUE, such as {spec.acting[0]}=VALUE")
        if name not in spec.acting:
            raise UserError.unknown("setting of acting", name, spec.acting)
        values[name] = _parsed(name, hints[name], value)
    return values


def _parsed(name: str, hint: Any, text: str) -> Any:
    """Return a value of a field's type."""
    if isinstance(hint, types.GenericAlias):
        raise TypeError(f"{name} is a {hint}, which --acting does not read")
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    if hint is bool:
        choices = ("true", "false")
    if choices:
        if text not in choices:
            raise UserError(f"--acting {name}={text}: give one of {', '.join(choices)}")
        return text == "true" if hint is bool else text
    try:
        return hint(text)
    except ValueError:
        raise UserError(f"--acting {name}={text}: give a number") from None
