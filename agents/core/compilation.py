"""Gradients in one compiled program: forward and backward passes without Python, and on CUDA in one graph launch.

What is compiled is a function that leaves gradients in parameters (an agent's losses and their backward passes) and
returns tensors; optimizers, averages and counters stay outside. The function is written as if nothing were compiled:

- `make_fx` runs it once on tensors without data and writes down every operation, those of backward passes included.
  Dynamo, which reads Python instead, cannot follow what an update needs: hooks that change a backward rule, a second
  backward pass through the same graph (SGQN's saliency, decision 001), gradients left in `.grad`. What asks for a
  number on the way, such as `.item()`, is refused.
- Random numbers are drawn outside, from the same generators in the same order, and handed in: which calls draw them is
  noted in a pass before, for nothing. So eager and compiled updates see the same noise, and a checkpoint is the same.
- `torch.compile` gets these operations whole (`fullgraph`). On CUDA, Inductor launches them as a CUDA graph.

Parameters, buffers and every other tensor that the function finds somewhere are used where they lie: change them in
place, or hand them in. Numbers that are no tensors are built in; a call with others is compiled anew.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from agents.core.errors import UserError

T = TypeVar("T")
Draw = Callable[[], Tensor]
_HOLE = torch.empty(0)
"""Stands for a tensor in what a function returned while it was traced."""


class Compiler:
    """Calls functions that leave gradients in parameters, compiled where their batch has a usual size.

    Args:
        parameters: all that may get gradients.
        sizes: batches of these sizes are compiled; others, such as the last one of a pass, run as they are. Which ones
            do depends on nothing else, so that a resumed run computes what an uninterrupted one does.
        backend: of `torch.compile`.
        fall_back: go on without compiling, after a warning, where it fails.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        sizes: Iterable[int],
        *,
        backend: str = "inductor",
        fall_back: bool = False,
    ) -> None:
        self.parameters = list(dict.fromkeys(parameters))
        self.sizes = frozenset(sizes)
        self.backend, self.fall_back = backend, fall_back
        self.programs: dict[tuple[Any, str], Program] = {}
        self.failed = False

    def __call__(self, function: Callable[..., T], *inputs: Any) -> T:
        """Return what the function returns; parameters without gradient get theirs.

        Raises:
            UserError: it cannot be compiled here, and there is no falling back.
        """
        tensors: list[Tensor] = []
        described = _replaced(inputs, lambda tensor: _noted(tensors, tensor))
        if self.failed or not tensors or len(tensors[0]) not in self.sizes:
            return function(*inputs)
        key = getattr(function, "__func__", function), str(described)
        if key not in self.programs:
            draws = noted_draws(function, inputs, self.parameters)
            try:
                program = Program(function, inputs, self.parameters, draws)
                program.compile(self.backend, tensors)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever tracers, code generators and C++ compilers raise
                self._give_up(function.__qualname__, error)
                return function(*inputs)
            self.programs[key] = program
        return self.programs[key](tensors)

    def _give_up(self, name: str, error: Exception) -> None:
        why = cannot_compile(name, error)
        if not self.fall_back:
            raise UserError(f"{why}; use --compile off, or auto to go on where it fails") from error
        warnings.warn(f"{why}; training goes on without compiling", stacklevel=3)
        self.failed = True


class Program:
    """A function's operations on tensors of given shapes.

    Args:
        function: leaves gradients in parameters and returns tensors, alone or in tuples, dicts and dataclasses.
        inputs: of a call; only shapes and what is no tensor matter.
        parameters: all that may get gradients.
        draws: give the random numbers that the function draws, in order; see `noted_draws`.

    Attributes:
        graph: the operations, from the inputs' tensors and the random numbers to the result's and the gradients.
        name: of the function.
        moved: the parameters that get gradients.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: tuple[Any, ...],
        parameters: list[nn.Parameter],
        draws: list[Draw],
    ) -> None:
        self.name, self.draws = function.__qualname__, draws
        tensors: list[Tensor] = []
        _replaced(inputs, tensors.append)
        self.is_cuda = tensors[0].is_cuda
        self.moved: list[nn.Parameter] = []
        self.result: Any = None

        def flat(given: list[Tensor], drawn: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            parts = iter(given)
            with _Answers(iter(drawn)):
                result = function(*_replaced(inputs, lambda _: next(parts)))
            returned: list[Tensor] = []
            _replaced(result, returned.append)
            self.result = _replaced(result, lambda _: _HOLE)
            self.moved = [p for p in parameters if p.grad is not None]
            return returned, [p.grad for p in self.moved if p.grad is not None]

        with _without_gradients(parameters):
            trace = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)
            self.graph = trace(tensors, [_sample(draw) for draw in draws])
        _check_known(self.graph)
        self.run: Callable[..., tuple[list[Tensor], list[Tensor]]] = self.graph

    def compile(self, backend: str, tensors: list[Tensor]) -> None:
        """Compile the operations now, by calling them once."""
        options: dict[str, Any] | None = None
        if backend == "inductor":
            keep_between_runs()
            # Shapes were compared before, and parameters never move: there is nothing left to guard.
            options = {
                "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
                "triton.cudagraphs": self.is_cuda,
            }
        self.run = torch.compile(
            self.graph, fullgraph=True, dynamic=False, backend=backend, options=options
        )
        with torch.no_grad():
            self.run(tensors, [_sample(draw) for draw in self.draws])

    def __call__(self, tensors: list[Tensor]) -> Any:
        """Compute the result and leave gradients."""
        drawn = [draw() for draw in self.draws]
        if self.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            returned, gradients = self.run(tensors, drawn)
            if self.is_cuda:
                # A graph's next results lie where these do, and metrics are read many updates later.
                returned = [tensor.clone() for tensor in returned]
            for parameter, gradient in zip(self.moved, gradients, strict=True):
                # Fused optimizers take both in one memory order.
                stays = not self.is_cuda and gradient.stride() == parameter.stride()
                parameter.grad = gradient if stays else torch.empty_like(parameter).copy_(gradient)
        parts = iter(returned)
        return _replaced(self.result, lambda _: next(parts))


def keep_between_runs() -> None:
    """Let Inductor keep compiled code in the user's cache folder instead of a temporary one; what is set stays."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "sightline" / "inductor"))


def noted_draws(
    function: Callable[..., Any], inputs: tuple[Any, ...], parameters: list[nn.Parameter]
) -> list[Draw]:
    """Call a function once for nothing, and return what draws its random numbers, in order.

    What it builds at its first call is there afterwards; generators and gradients are as they were.
    """
    with _without_gradients(parameters), _Notes() as notes:
        function(*inputs)
    notes.rewind()
    return notes.draws


class _Notes(TorchFunctionMode):
    """Notes every call that draws from a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self.before: dict[torch.Generator, Tensor] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            self.before.setdefault(generator, generator.get_state())
            self.draws.append(functools.partial(function, *args, **kwargs))
        return function(*args, **kwargs)

    def rewind(self) -> None:
        """Bring the generators back to where they were."""
        for generator, state in self.before.items():
            generator.set_state(state)


class _Answers(TorchFunctionMode):
    """Answers calls that draw from a generator with tensors that are there already."""

    def __init__(self, answers: Iterator[Tensor]) -> None:
        super().__init__()
        self.answers = answers

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs or kwargs.get("generator") is None:
            return function(*args, **(kwargs or {}))
        if any(isinstance(argument, Tensor) for argument in args):
            raise NotImplementedError(f"{function.__name__} draws by a tensor's values")
        return next(self.answers)


def _sample(draw: Draw) -> Tensor:
    """Return a tensor like those of a draw, and leave the generator where it is."""
    with _Notes() as notes:
        drawn = draw()
    notes.rewind()
    return drawn


@contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let parameters have no gradients in this context, and those of before after it."""
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _check_known(graph: torch.fx.GraphModule) -> None:
    """Refuse operations whose results' numbers or shapes only the data tells: a device would be waited for."""
    for node in graph.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise NotImplementedError(f"{node.target} asks for a tensor's values on the way")


def _noted(tensors: list[Tensor], tensor: Tensor) -> str:
    """Take a tensor into a list, and describe what programs depend on."""
    tensors.append(tensor)
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device} {tensor.requires_grad}"


def _replaced(tree: Any, replace: Callable[[Tensor], Any]) -> Any:
    """Return a tree of tuples, lists, dicts and dataclasses with every tensor replaced, in order."""
    if isinstance(tree, Tensor):
        return replace(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        parts = {name: _replaced(getattr(tree, name), replace) for name in names}
        return dataclasses.replace(tree, **parts)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_replaced(part, replace) for part in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_replaced(part, replace) for part in tree)
    if isinstance(tree, Mapping):
        return {name: _replaced(part, replace) for name, part in tree.items()}
    return tree


def cannot_compile(name: str, error: BaseException) -> str:
    """Return one line on why something is not compiled, without what compilers wrap around an error."""
    while inner := getattr(error, "inner_exception", None) or error.__cause__:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{name} cannot be compiled here ({said})"
