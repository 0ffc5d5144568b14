"""Compiled gradients are the eager ones, and an update waits for no number on its way."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from torch._inductor import config as inductor_config
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from agents.core import saliency
from agents.core.compilation import Compiler, Program
from agents.core.errors import UserError
from tests.agents import fine_tuning, on_policy, test_on_policy_agents
from tests.agents.helpers import BOTH, PIXELS, pixel_agents, small_agent, transitions

ON_POLICY = test_on_policy_agents.NAMES
FINE_TUNING = fine_tuning.NAMES
OFF_POLICY = [name for name in pixel_agents() if name != "resfit"]
EVERY = [*OFF_POLICY, *ON_POLICY, *FINE_TUNING]
"""Agents whose gradients are compiled; polychromic and resfit refuse, imitation has a command of its own."""


def make(name, space=None, **changes):
    if name in ON_POLICY:
        changes = {"minibatch_size": on_policy.ENVS * on_policy.STEPS // 2, **changes}
        return test_on_policy_agents.build(name, space or on_policy.BOTH, **changes)
    if name in FINE_TUNING:
        if name == "dppo":
            changes = {"bc_coefficient": 0.1, **changes}
        return fine_tuning.make(name, space or fine_tuning.BOTH, **changes)
    return small_agent(name, space or BOTH, **changes)


def collect(agent, name, seed, space=None):
    """Return a rollout of noise."""
    if name in ON_POLICY:
        rollout = on_policy.collect(agent, space or on_policy.BOTH, on_policy.CONTINUOUS, seed)
    else:
        rollout = fine_tuning.collect(agent, space or fine_tuning.BOTH, seed=seed)
    return rollout.experience()


def update(agent, name, seed, space=None):
    """Learn from random experience; exploration follows the schedule."""
    agent.set_progress(20_000 * seed)
    if name in ON_POLICY or name in FINE_TUNING:
        return agent.update(collect(agent, name, seed, space))
    return agent.update(on(agent.device, transitions(space or BOTH, seed=seed)))


def on(device, batch):
    """Return a batch on a device."""
    moved = {
        name: {key: part.to(device) for key, part in value.items()}
        if isinstance(value, dict)
        else value.to(device)
        for name, value in vars(batch).items()
        if name != "ids"
    }
    return dataclasses.replace(batch, **moved)


def weights(agent):
    return {
        f"{name}.{key}": value.clone()
        for name, network in agent.networks().items()
        for key, value in network.state_dict().items()
    }


def learn_both(name, backend, updates=3, space=None, **changes):
    """Train two equal agents, the second one compiled, and return the metrics and weights of each."""
    eager, compiled = (make(name, space, **changes) for _ in range(2))
    compiled.compile(backend=backend)
    results = []
    for agent in (eager, compiled):
        metrics = [update(agent, name, seed, space) for seed in range(updates)]
        results.append((metrics, weights(agent)))
    assert compiled.compiler.programs, "something must have been compiled"
    assert torch.equal(eager.generator.get_state(), compiled.generator.get_state())
    return results


FAST = ("drqv2-sgqn", "sac", "ppo")
"""Together they have most ways to compute gradients; the others take their turn in `make test-all`."""


def with_slow(names):
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture
def traced_only(monkeypatch):
    """Call the operations as they were written down: no code is generated."""
    monkeypatch.setattr(Program, "compile", lambda *_: None)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("name", with_slow(EVERY))
def test_a_traced_update_is_the_eager_one_bit_for_bit(name):
    """Every agent's operations can be written down whole: no number is asked for, nothing is drawn inside."""
    (metrics, ours), (theirs_metrics, theirs) = learn_both(name, "eager")
    assert metrics == theirs_metrics
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize(
    ("name", "space"),
    [("ppo", on_policy.STATE), pytest.param("drqv2-sgqn", PIXELS, marks=pytest.mark.slow)],
)
def test_what_was_traced_compiles_in_one_piece(name, space):
    """Through Dynamo, functionalization and decompositions, but without generated code."""
    check_close(*learn_both(name, "aot_eager", updates=2, space=space), tolerance=1e-5)


@pytest.fixture
def generates_code(tmp_path, monkeypatch):
    """Let generated code lie in a folder of the test's own, made in this process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor_config.patch(compile_threads=1):
        yield


def check_close(left, right, tolerance):
    """Compare weights with the size of what each tensor has learned: equal but for rounding."""
    for key, value in left[1].items():
        size = value.float().abs().max().clamp(min=1e-3)
        assert (value - right[1][key]).abs().max() <= tolerance * size, key
    for one, two in zip(left[0], right[0], strict=True):
        assert one.keys() == two.keys()


@pytest.mark.slow
@pytest.mark.usefixtures("generates_code")
@pytest.mark.parametrize("name", ["sac", "svea", "drqv2-sgqn", "ppo", "vmpo", "trpo", "dppo"])
def test_generated_code_learns_what_the_eager_update_does(name):
    """Adam's first steps move every weight by its step size, however small the gradient: signs must agree, too."""
    check_close(*learn_both(name, "inductor"), tolerance=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY)
def test_on_a_gpu_a_captured_update_learns_what_the_eager_one_does(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check_close(*learn_both(name, "inductor", device="cuda", updates=4), tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("generates_code")
def test_in_bfloat16_generated_code_is_as_close_to_float32_as_the_eager_update():
    def gradient(precision, backend):
        agent = make("drqv2", PIXELS, precision=precision)
        if backend:
            agent.compile(backend=backend)
        agent.differentiate(agent.critic_gradients, transitions(PIXELS))
        return torch.cat([p.grad.flatten() for p in agent.critic.parameters()])

    exact = gradient("fp32", None)
    eager, generated = (
        (gradient("bf16", backend) - exact).norm() / exact.norm() for backend in (None, "inductor")
    )
    assert eager > 1e-4, "bfloat16 must differ"
    assert generated < 1.5 * eager


class Sums(torch.nn.Module):
    """Two parameters, and what losses of them look like."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
        self.other = torch.nn.Parameter(torch.tensor(3.0))
        self.scale = torch.tensor(1.0)
        self.generator = torch.Generator().manual_seed(0)
        self.calls = 0

    def gradients(self, batch, factor=1.0):
        self.calls += 1
        noise = torch.randn(batch.shape, generator=self.generator)
        loss = factor * self.scale * ((batch + noise) * self.weight).sum()
        loss.backward()
        return {"loss": loss.detach(), "noise": (noise,)}


def compiled(module, **keywords):
    keywords = {"backend": "eager", **keywords}
    return Compiler(module.parameters(), {4}, **keywords)


@pytest.mark.usefixtures("traced_only")
def test_random_numbers_come_from_the_same_stream_and_go_on_in_it():
    eager, traced = Sums(), Sums()
    call = compiled(traced)
    for number in range(3):
        batch = torch.full((4, 2), float(number))
        eager.weight.grad = traced.weight.grad = None
        expected, given = eager.gradients(batch), call(traced.gradients, batch)
        assert torch.equal(given["noise"][0], expected["noise"][0])
        assert given["loss"] == expected["loss"]
        assert torch.equal(traced.weight.grad, eager.weight.grad)
    assert traced.calls == 2, "once to see what is drawn, once to write down"
    assert torch.equal(eager.generator.get_state(), traced.generator.get_state())


@pytest.mark.usefixtures("traced_only")
def test_parameters_without_a_gradient_keep_what_they_have():
    module = Sums()
    module.other.grad = torch.tensor(5.0)
    compiled(module)(module.gradients, torch.ones(4, 2))
    assert module.other.grad == 5.0


@pytest.mark.usefixtures("traced_only")
def test_tensors_are_read_where_they_lie_and_other_numbers_are_compiled_anew():
    module, batch = Sums(), torch.ones(4, 2)
    call = compiled(module)

    def gradient(factor):
        module.generator.manual_seed(0)
        module.weight.grad = None
        call(module.gradients, batch, factor)
        return module.weight.grad

    once = gradient(1.0)
    module.scale.fill_(3.0)
    torch.testing.assert_close(gradient(1.0), 3 * once)
    torch.testing.assert_close(gradient(2.0), 6 * once)
    assert len(call.programs) == 2
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.0, 7.0]))
    given = call(module.gradients, batch)
    expected = 3.0 * ((batch + given["noise"][0]) * torch.tensor([0.0, 7.0])).sum()
    torch.testing.assert_close(given["loss"], expected)


@pytest.mark.usefixtures("traced_only")
def test_batches_of_unusual_size_run_as_they_are():
    module = Sums()
    call = compiled(module)
    call(module.gradients, torch.ones(3, 2))
    assert not call.programs
    assert module.calls == 1


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x * x.sum().item(),
        lambda x: x * float(x[0, 0]),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0].sum(),
        lambda x: x.nonzero(),
        lambda x: torch.multinomial(x, 1, generator=torch.Generator()),
    ],
)
def test_a_function_that_asks_for_numbers_is_refused_in_one_line(asks):
    with pytest.raises(UserError, match="--compile off") as told:
        compiled(Sums())(asks, torch.ones(4, 2))
    assert "\n" not in str(told.value)


def test_what_a_function_itself_raises_stays_what_it_is(tmp_path):
    agent = small_agent("svea", overlay_folder=str(tmp_path / "missing"))
    agent.compile()
    with pytest.raises(UserError, match="overlay folder") as told:
        agent.update(transitions())
    assert "--compile" not in str(told.value)


def test_a_compiler_that_fails_is_told_in_one_line():
    module = Sums()
    with pytest.raises(UserError, match=r"no-such-backend.*--compile off") as told:
        compiled(module, backend="no-such-backend")(module.gradients, torch.ones(4, 2))
    assert "\n" not in str(told.value)


def test_who_falls_back_warns_once_and_goes_on_as_if_nothing_had_been_tried():
    eager, module = Sums(), Sums()
    call = compiled(module, backend="no-such-backend", fall_back=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            given, expected = (
                function(*inputs)
                for function, inputs in (
                    (call, (module.gradients, torch.ones(4, 2))),
                    (eager.gradients, (torch.ones(4, 2),)),
                )
            )
            assert given["loss"] == expected["loss"]
    assert len([w for w in seen if "without compiling" in str(w.message)]) == 1
    assert torch.equal(module.weight.grad, eager.weight.grad)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [("ppo", {"memory_size": 4}, "memory_size"), ("polychromic", {}, "polychromic")],
)
def test_agents_that_cannot_be_compiled_say_why(name, changes, why):
    agent = test_on_policy_agents.build(name, on_policy.STATE, **changes)
    with pytest.raises(UserError, match=why) as told:
        agent.compile()
    assert "\n" not in str(told.value)


class Waits(TorchFunctionMode):
    """Counts calls for which Python needs a tensor's values: on a GPU, each waits until all work is done."""

    PYTHON = frozenset({"item", "tolist", "cpu", "__bool__", "__float__", "__int__", "__index__"})
    OPERATORS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal.default",
    )

    def __init__(self):
        super().__init__()
        self.seen, self.pauses = [], []
        self.inner = _Operators(self)

    def __enter__(self):
        # Where they are not fused, optimizers count their steps on the CPU.
        self.hooks = [
            register_optimizer_step_pre_hook(lambda *_: self.pauses.append(len(self.seen))),
            register_optimizer_step_post_hook(lambda *_: self.go_on()),
        ]
        self.inner.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.inner.__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def go_on(self):
        del self.seen[self.pauses.pop() :]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        # Tensors of Python's numbers are copied to the device, which it waits for as well.
        if name in self.PYTHON or name in ("tensor", "new_tensor"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = (
            "aten.index" in name
            and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] or ())
            if name.startswith(("aten.index.", "aten.index_put"))
            else False
        )
        if by_mask or any(part in name for part in self.waits.OPERATORS):
            self.waits.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("look", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0]), lambda x: x[x > 0],
    lambda x: x.cpu(), lambda x: torch.tensor(1.0), lambda x: x.nonzero(), lambda x: x.tolist(),
])  # fmt: skip
def test_waits_are_noticed(look):
    with Waits() as waits:
        look(torch.ones(3))
    assert waits.seen


ONCE = {
    # Its line search waits for every attempt, by design; a `target_kl` has every pass wait.
    "trpo": {"attempts": 1},
    "vmpo": {},
    "rebel": {},
}


def on_a_device(flat, index):
    """Select as GPUs do, without NumPy."""
    return flat.topk(flat.shape[-1] - index, dim=-1, sorted=False).values.amin(-1)


@pytest.mark.parametrize("name", OFF_POLICY)
def test_an_off_policy_update_waits_for_nothing(name, monkeypatch):
    monkeypatch.setattr(saliency, "_order_statistic", on_a_device)
    agent = make(name)
    for seed in range(2):  # builds what is built once
        update(agent, name, seed)
    batch = transitions(BOTH, seed=1)
    with Waits() as waits:
        for _ in range(2):
            agent.update(batch)
    assert waits.seen == []


@pytest.mark.parametrize("name", [*ON_POLICY, *FINE_TUNING])
def test_an_on_policy_update_waits_as_often_whatever_the_number_of_gradient_steps(name):
    counts = {}
    for epochs in (1, 3):
        agent = make(name, epochs=epochs, **ONCE.get(name, {"target_kl": math.inf}))
        experience = collect(agent, name, 0)
        before = agent.gradient_updates
        with Waits() as waits:
            agent.update(experience)
        counts[epochs] = waits.seen, agent.gradient_updates - before
    assert counts[1][1] < counts[3][1]
    assert counts[1][0] == counts[3][0]
