"""argparse from config dataclasses: every field is a flag, grouped, with its default and its source."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

from agents.core.errors import UserError, is_full_disk
from agents.core.settings import field_docs

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports mistakes as one line."""

    def __init__(self, **keywords: Any) -> None:
        keywords.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        if message.startswith("unrecognized arguments: "):
            given = message.removeprefix("unrecognized arguments: ").split()
            flags = [flag for action in self._actions for flag in action.option_strings]
            for argument in given:
                if argument.startswith("--"):
                    raise UserError.unknown("flag", argument.split("=")[0], flags)
        raise UserError(f"{message} (see --help)")


def add_dataclass(
    parser: argparse.ArgumentParser,
    title: str,
    defaults: Any,
    skip: Sequence[str] = (),
    docs: Mapping[str, str] | None = None,
) -> None:
    """Add a group with one flag per field of `defaults`, a dataclass instance.

    Flags that are not given are absent from the namespace, so that presets and saved configs can fill them.

    Args:
        parser: gets the group.
        title: its heading.
        defaults: the values that the help shows.
        skip: fields without a flag.
        docs: by field, where they do not stand under the fields themselves.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(type(defaults))
    docs = field_docs(defaults.__class__) if docs is None else docs
    for field in dataclasses.fields(defaults):
        if field.name in skip:
            continue
        value = getattr(defaults, field.name)
        plain = docs.get(field.name, "").replace("`", "").replace("%", "%%")
        text = plain if value is None else f"{plain} [{as_words(value)}]"
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(
            flag, dest=field.name, default=argparse.SUPPRESS, help=text, **_flag(hints[field.name])
        )


def as_words(value: Any) -> str:
    """Return a value as it follows its flag: several ones without brackets and commas."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def fill(defaults: T, *sources: Mapping[str, Any]) -> T:
    """Return `defaults` with every field that a source names replaced; later sources win."""
    names = {field.name for field in dataclasses.fields(defaults)}  # type: ignore[arg-type]
    changes = {key: value for source in sources for key, value in source.items() if key in names}
    return dataclasses.replace(defaults, **changes)  # type: ignore[type-var]


def add_out_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--out FILE.md` and `--overwrite`; see `check_out`."""
    parser.add_argument("--out", type=Path, metavar="FILE.md", help=f"write {what} there too")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")


def check_out(out: Path | None, *, overwrite: bool) -> None:
    """Refuse a file that could not be written after all the work, or that would be lost by it.

    Raises:
        UserError: it is a folder, in a folder that is missing, or there already.
    """
    if out is None:
        return
    if out.is_dir() or not out.parent.is_dir():
        why = "is a folder" if out.is_dir() else f"folder '{out.parent}' does not exist"
        raise UserError(f"--out {out}: {why}; give a file in a folder that exists")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists; add --overwrite or give another file")


def make_folder(folder: Path, flag: str) -> None:
    """Make the folder that a flag names, before the work whose results it is for.

    Raises:
        UserError: it cannot be made or written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot create this folder ({error.strerror}); give another one"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {folder}: cannot write into this folder; give another one")


def split_variant(label: str, words: str) -> tuple[str, list[str]]:
    """Return the method and the flags of a --variant.

    Raises:
        UserError: a quote in it is left open.

    Example:
        >>> split_variant("wide", "ppo --clip 0.4")
        ('ppo', ['--clip', '0.4'])
    """
    try:
        method, *own = shlex.split(words) or [""]
    except ValueError as error:
        raise UserError(
            f"--variant {label}: cannot split '{words}' into flags ({error}); close its quotes"
        ) from error
    return method, own


def _flag(hint: Any) -> dict[str, Any]:
    """Return argparse keywords for a field's type."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        if {str, int} <= set(parts):
            flag: dict[str, Any] = {"type": _name_or_number, "metavar": "NAME|NUMBER"}
            several = {"nargs": "+", "action": _OneOrSeveral}
            return flag | several if len(parts) > 2 else flag
        return _flag(parts[0])
    if origin is Literal:
        return {"choices": typing.get_args(hint), "metavar": "|".join(typing.get_args(hint))}
    if origin is tuple:
        first = typing.get_args(hint)[0]
        return {"nargs": "+", "type": first, "action": _Tuple, "metavar": first.__name__.upper()}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _name_or_number(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


class _OneOrSeveral(argparse.Action):
    """Stores one value as itself and several as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


class _Tuple(argparse.Action):
    """Stores a list of values as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def run_command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Wrap a command: a user's mistake prints one line and exits with 2, ours keeps its traceback.

    Errors that a person can mend are exceptions with `exit_code`, whichever package raised them, and a full disk.
    """

    def wrapped(argv: Sequence[str] | None = None) -> int:
        sigterm = signal.getsignal(signal.SIGTERM)
        python_format, warnings.formatwarning = warnings.formatwarning, _format_warning
        python_hook, threading.excepthook = threading.excepthook, _tell_thread
        try:
            return main(argv) or 0
        except KeyboardInterrupt as stop:
            print(str(stop) or "interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            code = UserError.exit_code if is_full_disk(error) else getattr(error, "exit_code", None)
            if code is None:
                raise
            print(f"error: {error}", file=sys.stderr)
            return code
        finally:
            warnings.formatwarning, threading.excepthook = python_format, python_hook
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, sigterm)

    wrapped.__doc__ = main.__doc__
    return wrapped


def terminate_as_interrupt() -> None:
    """Let SIGTERM do what Ctrl-C does until the command ends; another thread than the main one cannot ask for it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _format_warning(message: Any, category: type[Warning], *place: Any, **line: Any) -> str:
    """Our warnings are for users, who need no place in the code; others keep it."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _python_format(message, category, *place, **line)


def _tell_thread(failure: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, but no full disk: TensorBoard hands that on to the thread that writes to it."""
    if failure.exc_value is None or not is_full_disk(failure.exc_value):
        threading.__excepthook__(failure)


_python_format = warnings.formatwarning
