"""Config dataclasses: their fields' documentation, and a JSON form that is read back exactly."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from agents.core.errors import UserError

T = TypeVar("T")


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring that stands under each field of a dataclass, inherited ones included.

    Example:
        >>> field_docs(Example)["rate"]
        'Step size.'
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def argument_docs(function: Callable[..., Any]) -> dict[str, str]:
    """Return what the Google docstring of a function says of each argument.

    Example:
        >>> argument_docs(from_dict)["values"]
        'by field, as `to_dict` returned them.'
    """
    _, _, behind = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    section = re.split(r"\n\n?(?=\S)", behind)[0]
    entries = re.split(r"(?:^|\n)    (?=\w+:)", section)[1:]
    named = (entry.partition(": ") for entry in entries)
    return {name: " ".join(text.split()) for name, _, text in named}


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as JSON-able values (tuples become lists)."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a config from `to_dict`'s values.

    Args:
        cls: its dataclass.
        values: by field, as `to_dict` returned them.

    Raises:
        UserError: a field is unknown (the run was made by another version).
    """
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise UserError.unknown(f"field of {cls.__name__}", name, names)
    converted = {
        name: tuple(value) if typing.get_origin(hints[name]) is tuple else value
        for name, value in values.items()
    }
    return cls(**converted)


@dataclasses.dataclass(frozen=True)
class Example:
    """A config for this module's doctest."""

    rate: float = 0.1
    """Step size."""
