"""Compiled and bfloat16 passes of denoisers: what is drawn, learned and saved stays what it was, ratios begin at 1."""

import contextlib
import copy
import warnings

import pytest
import torch
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor_config
from torch.distributions import Normal

from agents.core.errors import UserError
from agents.generative_models import forward_passes
from agents.generative_models.forward_passes import forward_pass
from agents.generative_models.generator import load_generator, save_generator
from agents.generative_models.methods import METHODS, find_method
from agents.generative_models.pipeline_generator import PipelineSettings, load_pipeline
from agents.generative_models.pretraining import PictureBatch, Pretrainer, PretrainingConfig
from agents.generative_models.tuners import make_tuner
from tests.agents.tiny_pipelines import write_pipeline
from tests.agents.toy_generator import PROMPTS, redness, tiny_network

SMALL = {"denoising_steps": 3, "prompts": 4, "group": 2, "batch_size": 4, "guidance": 2.0}
FAST = ("flow-grpo", "alignprop", "diffusion-dpo")
"""Together they have most ways to ask a denoiser; the others take their turn in `make test-all`."""


@pytest.fixture(autouse=True)
def own_programs():
    """Programs of other tests count against the limit of one function's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Spy:
    """A backend that computes what it is given, and notes what it is asked for.

    Args:
        unlike: factor of results of programs that keep nothing for a gradient; generated code rounds them otherwise.
    """

    def __init__(self, unlike=1.0):
        self.unlike, self.compiled, self.calls, self.sizes = unlike, 0, 0, []

    def __call__(self, graph, inputs):
        self.compiled += 1
        factor = 1.0 if torch.is_grad_enabled() else self.unlike

        def run(*given):
            self.calls += 1  # one that only computes activations again may be left half-way
            (result,) = graph(*given)
            self.sizes.append(len(result))
            return (factor * result,)

        return run


def tuner_of(name, model=None, **overrides):
    window = {"window": 1} if METHODS[name].settings.get("window") else {}
    alone = {"group": 1} if METHODS[name].settings.get("group") == 1 else {}
    config = find_method(name).config(**(SMALL | window | alone | overrides))
    return make_tuner(model or tiny_network("dit"), redness, config, seed=3)


def assert_alike(one, other, **tolerance):
    """Compare trees of tensors: the same names, and nearly the same numbers."""
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)  # fmt: skip


# --------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_a_compiled_iteration_is_the_eager_one(name):
    """The same numbers, names and noise; most passes are of sizes that are compiled."""
    eager, compiled, spy, seen = tuner_of(name), tuner_of(name), Spy(), []
    compiled.compile(backend=spy)
    for each in (compiled.model, compiled.reference):
        each.denoiser.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    for _ in range(2):
        said, expected = (tuner.update(PROMPTS) for tuner in (compiled, eager))
        assert_alike(said, expected, rtol=1e-3, atol=1e-5)
    assert_alike(compiled.model.state_dict(), eager.model.state_dict(), rtol=1e-3, atol=1e-5)
    assert spy.calls > 0.6 * len(seen)
    assert compiled.evaluations == eager.evaluations
    assert torch.equal(eager.generator.get_state(), compiled.generator.get_state())


def test_drawing_learning_and_the_reference_share_one_program():
    tuner, spy = tuner_of("flow-grpo", updates=1), Spy(unlike=1.01)
    tuner.compile(backend=spy)
    metrics = tuner.update(PROMPTS)
    assert spy.compiled == 1
    assert set(spy.sizes) == {8}  # passes of 4 images, and guidance
    assert metrics["ratio/largest_deviation"] == 0
    assert metrics["loss/kl"] == 0


def test_programs_of_their_own_for_drawing_would_be_noticed(monkeypatch):
    """The negative of the test before: without gradient, code is generated otherwise."""
    monkeypatch.setattr(forward_passes.torch, "enable_grad", contextlib.nullcontext)
    tuner = tuner_of("flow-grpo", updates=1)
    tuner.compile(backend=Spy(unlike=1.01))
    assert tuner.update(PROMPTS)["ratio/largest_deviation"] > 1e-4


def test_a_reference_gets_no_gradient():
    tuner = tuner_of("flow-grpo")
    tuner.compile(backend=Spy())
    tuner.update(PROMPTS)
    assert all(p.grad is None for p in tuner.reference.parameters())
    assert any(p.grad is not None for p in tuner.model.parameters())


def test_batches_of_unusual_size_run_as_they_are():
    tuner, spy = tuner_of("flow-grpo"), Spy()
    tuner.compile(backend=spy)
    x = torch.randn(5, *tuner.model.shape)
    said = tuner.model.denoiser(x, torch.full((5,), 0.5), tuner.condition([PROMPTS[0]] * 5))
    assert not spy.sizes
    assert said.requires_grad


def test_a_copy_has_its_own_weights_and_is_not_compiled():
    model = tiny_network("dit").compute_in("bf16")
    spy, batch = Spy(), (torch.randn(2, *model.shape), torch.rand(2), model.encode(PROMPTS[:2]))
    forward_pass(model.denoiser).compile({2}, backend=spy)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model.denoiser(*batch)
        for parameter in copied.denoiser.parameters():
            parameter.zero_()
        assert not copied.denoiser(*batch).any()
        assert torch.equal(model.denoiser(*batch), before)
    assert len(spy.sizes) == 2
    assert forward_pass(copied.denoiser).bf16


def test_checkpoints_do_not_know_of_it(tmp_path):
    """What a compiled generator saves is loaded by an eager one, and the other way round."""
    plain, model = tiny_network("dit"), tiny_network("dit", seed=1).compute_in("bf16")
    forward_pass(model.denoiser).compile({2}, backend=Spy())
    save_generator(tmp_path, model)
    assert_alike(load_generator(tmp_path).state_dict(), model.state_dict(), rtol=0, atol=0)
    model.load_state_dict(plain.state_dict())
    assert_alike(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


def failing(graph, inputs):
    raise RuntimeError("No working C++ compiler found\nand a long story")


failing_backward = aot_autograd(fw_compiler=nop, bw_compiler=failing)


@pytest.mark.parametrize("backend", [failing, failing_backward])
def test_a_compiler_that_fails_is_told_in_one_line(backend):
    tuner = tuner_of("flow-grpo")
    tuner.compile(backend=backend)
    with pytest.raises(UserError, match=r"No working C\+\+ compiler found.*--compile off") as told:
        tuner.update(PROMPTS)
    assert "story" not in str(told.value)


@pytest.mark.parametrize("backend", [failing, failing_backward])
def test_who_falls_back_warns_and_goes_on_as_if_nothing_had_been_tried(backend):
    eager, tuner = tuner_of("flow-grpo"), tuner_of("flow-grpo")
    tuner.compile(backend=backend, fall_back=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        said = tuner.update(PROMPTS)
    networks = {str(w.message) for w in seen if "without compiling" in str(w.message)}
    assert len(networks) == 1
    assert_alike(said, eager.update(PROMPTS), rtol=0, atol=0)


def test_what_a_network_itself_refuses_stays_what_it_is():
    model = tiny_network("dit")
    forward_pass(model.denoiser).compile({2}, backend=Spy())
    with pytest.raises(UserError, match="7 x 7 pixels") as told:
        model.denoiser(torch.randn(2, 3, 7, 7), torch.rand(2), model.encode(PROMPTS[:2]))
    assert "--compile" not in str(told.value)


def pretrained(backend=None, *, bf16=False, model=None, batch=4):
    """Return a learner after two steps, and what it said."""
    config = PretrainingConfig(batch_size=4, learning_rate=1e-2, bf16=bf16)
    learner = Pretrainer(model or tiny_network("dit"), config, seed=0)
    if backend is not None:
        learner.compile(backend=backend)
    pictures = torch.randint(256, (batch, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    tokens = learner.image_generator.vocabulary.tokens(PROMPTS)[:batch]
    data = PictureBatch(pictures.to(torch.uint8), tokens)
    said = [learner.update(data) for _ in range(2)]
    return learner, {f"{name} {step}": v for step, m in enumerate(said) for name, v in m.items()}


def test_compiled_pretraining_is_the_eager_one():
    (eager, expected), spy = pretrained(), Spy()
    compiled, said = pretrained(spy)
    assert spy.sizes == [4, 4]
    assert_alike(said, expected, rtol=1e-3, atol=1e-5)
    for one, other in zip(eager.networks().values(), compiled.networks().values(), strict=True):
        assert_alike(one.state_dict(), other.state_dict(), rtol=1e-3, atol=1e-5)


def test_a_pipeline_learns_compiled_as_it_does_without(tmp_path):
    """Its reference is the same network without the LoRA: compiled as well, as a program of its own."""
    write_pipeline("sd", tmp_path)
    settings = PipelineSettings(lora_rank=2, lora_alpha=2, image_size=16)
    eager, compiled = (
        tuner_of("ddpo", load_pipeline(str(tmp_path), settings), kl=0.1, updates=1)
        for _ in range(2)
    )
    spy = Spy()
    compiled.compile(backend=spy)
    said, expected = (tuner.update(PROMPTS) for tuner in (compiled, eager))
    assert spy.compiled >= 2
    assert_alike(said, expected, rtol=1e-3, atol=1e-5)
    assert said["ratio/largest_deviation"] == 0
    assert_alike(compiled.model.state_dict(), eager.model.state_dict(), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("name", ["flow-grpo", "ddpo"])
@pytest.mark.parametrize("network", ["dit", "unet"])
def test_in_bfloat16_a_ratio_is_exactly_one_and_all_around_the_network_is_float32(name, network):
    tuner = tuner_of(name, tiny_network(network).compute_in("bf16"), updates=2)
    sampler, batches = tuner.draw(PROMPTS)
    for batch in batches:
        tensors = [batch.samples, batch.images, *batch.log_prob.values()]
        assert {each.dtype for each in tensors} == {torch.float32}
        for index in sampler.stochastic:
            x, drawn = batch.samples[index], batch.samples[index + 1]
            with torch.no_grad():
                step = sampler.step(tuner.guided(tuner.model), x, index, batch.condition)
            each = Normal(step.mean.double(), step.std)
            expected = each.log_prob(drawn.double()).flatten(1).mean(1)
            torch.testing.assert_close(batch.log_prob[index].double(), expected, rtol=1e-5, atol=1e-5)  # fmt: skip
    metrics = tuner.update(PROMPTS)
    assert metrics["ratio/first_deviation"] == 0
    assert metrics["ratio/largest_deviation"] > 0
    assert {p.dtype for p in tuner.parameters} == {torch.float32}
    assert {p.grad.dtype for p in tuner.parameters if p.grad is not None} == {torch.float32}


def test_a_network_that_learns_in_another_precision_than_it_draws_in_would_be_noticed():
    """The negative of the test before, and that bfloat16 is really there."""
    tuner = tuner_of("flow-grpo", tiny_network("dit").compute_in("bf16"))
    sampler, (batch, *_) = tuner.draw(PROMPTS)
    tuner.model.compute_in("fp32")
    kept, index = torch.ones(len(batch), dtype=torch.bool), sampler.stochastic[0]
    _, metrics = tuner.step_loss(sampler, batch, index, kept.float(), kept)
    assert metrics["ratio/largest_deviation"] > 1e-6


def test_a_reference_computes_in_the_same_precision():
    tuner = tuner_of("flow-grpo", tiny_network("dit").compute_in("bf16"), updates=1)
    assert tuner.update(PROMPTS)["loss/kl"] == 0


# ------------------------------------------------------------------------------- generated code


@pytest.fixture
def generates_code(tmp_path, monkeypatch):
    """Let generated code lie in a folder of the test's own, made in this process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor_config.patch(compile_threads=1):
        yield


def check_generated(device, precision, updates=1):
    """A ratio begins at 1, a KL at 0, and losses and log-probabilities are the eager ones up to rounding."""
    loose = {"fp32": 1e-4, "bf16": 3e-2}[precision]
    eager, compiled = (
        make_tuner(
            tiny_network("dit").compute_in(precision), redness,
            find_method("flow-grpo").config(**SMALL, updates=updates), device=device, seed=3,
        )
        for _ in range(2)
    )  # fmt: skip
    compiled.compile()
    (_, expected), (_, drawn) = eager.draw(PROMPTS), compiled.draw(PROMPTS)
    for one, other in zip(expected, drawn, strict=True):
        torch.testing.assert_close(one.images, other.images, rtol=loose, atol=loose)
        assert_alike(one.log_prob, other.log_prob, rtol=loose, atol=loose)
    said = compiled.update(PROMPTS)
    eager.update(PROMPTS)
    assert said["ratio/first_deviation"] == 0
    assert said["loss/kl"] == 0
    assert_alike(compiled.model.state_dict(), eager.model.state_dict(), rtol=0, atol=3e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("generates_code")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_generated_code_draws_and_learns_what_eager_passes_do(precision):
    check_generated("cpu", precision)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_generated_code_draws_and_learns_what_eager_passes_do(precision):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check_generated("cuda", precision)
