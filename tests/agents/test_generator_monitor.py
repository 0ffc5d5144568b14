"""The monitor's measures against loops and closed forms, its frontier, and the loop that it stops."""

import dataclasses
import math

import pytest
import torch

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import DivergedError, UserError
from agents.core.logging import Logger
from agents.core.run_loop import Hooks
from agents.core.step_rules import Posterior
from agents.generative_models.generator import ImageGenerator, load_generator
from agents.generative_models.methods import METHODS
from agents.generative_models.monitor import (
    Measurement,
    Monitor,
    MonitorSettings,
    chain_kl,
    coverage,
    features,
    group_distance,
    on_frontier,
)
from agents.generative_models.tuners import make_tuner
from agents.generative_models.tuning_loop import (
    PromptStream,
    TuningLoop,
    TuningSettings,
    named_memory_errors,
)
from tests.agents.toy_generator import PROMPTS, redness, tiny_network, toy_generator

SETTINGS = MonitorSettings(eval_prompts=4, eval_images=3, eval_steps=4, kl_images=8, patience=2)
NEVER_STOPS = dataclasses.replace(SETTINGS, patience=0)


def blueness(images, prompts):
    return images[:, 2].mean((1, 2)) - images[:, :2].mean((1, 2, 3))


def monitor_of(settings=SETTINGS, proxy=redness, gold=blueness):
    return Monitor(PROMPTS, {"proxy": proxy, "gold": gold}, settings, guidance=1.0, seed=3)


def vectors(count, seed=0, shift=0.0):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) + shift


def test_distances_of_a_prompt_are_those_of_a_loop():
    x = vectors(12)
    expected = []
    for first in range(0, 12, 4):
        for i in range(4):
            for j in range(4):
                if i != j:
                    expected.append((x[first + i] - x[first + j]).square().mean().sqrt())
    torch.testing.assert_close(group_distance(x, 4), torch.stack(expected).mean())
    assert group_distance(x[:1].expand(4, -1), 4) == 0


def test_coverage_is_that_of_a_loop():
    x, y = vectors(30), vectors(25, 1, 0.5)
    count = 0
    for a in x:
        inside = False
        for place, b in enumerate(y):
            others = sorted(float((b - c).norm()) for j, c in enumerate(y) if j != place)
            inside |= float((a - b).norm()) <= others[2]
        count += inside
    assert float(coverage(x, y)) == pytest.approx(count / 30)


def test_recall_falls_when_images_collapse_and_precision_when_they_leave():
    base = vectors(60)
    assert float(coverage(base, base)) == 1
    collapsed = base[:1] + 0.05 * vectors(60, 1)
    assert float(coverage(base, collapsed)) < 0.1
    assert float(coverage(base + 10, base)) == 0


def test_the_kl_of_chains_is_that_of_the_gaussians_they_are_made_of():
    """A toy whose mean moved: the data's KL is |shift|^2 / (2 v), and the chain's is at least that and close to it."""
    model, reference = toy_generator(), toy_generator()
    with torch.no_grad():
        model.denoiser.mean.bias += 0.05
    condition = model.encode(PROMPTS)
    options = {"guidance": 1.0, "seed": 0}
    assert float(chain_kl(model, model, condition, steps=6, **options)) == 0
    said = float(chain_kl(model, reference, condition, steps=200, **options))
    # The last step has no noise: what it adds is left out.
    assert said == pytest.approx(48 * 0.05**2 / (2 * 0.4**2), rel=0.1)


def test_the_kl_of_one_step_is_torch_s():
    model, reference = tiny_network(seed=0), tiny_network(seed=1)
    condition = model.encode(PROMPTS[:2])
    said = chain_kl(model, reference, condition, steps=2, guidance=2.0, seed=0)
    sampler = model.sampler(2, Posterior(1.0))
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = sampler.step(model.guided(2.0), x, 0, condition)
        theirs = sampler.step(reference.guided(2.0), x, 0, condition)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(ours.mean, ours.std),
        torch.distributions.Normal(theirs.mean, theirs.std),
    )
    torch.testing.assert_close(said, expected.flatten(1).sum(1).mean(), rtol=1e-4, atol=1e-3)


def measured(gold, kl, spread=0.0, step=0):
    by_prompt = [gold - spread, gold + spread, gold, gold]
    return Measurement(step, {"gold": gold, "kl": kl, "recall": 1.0}, by_prompt)


def test_the_frontier_is_more_gold_at_no_more_kl():
    history = [
        measured(0.1, 0.0), measured(0.3, 1.0), measured(0.2, 2.0), measured(0.25, 0.5),
        measured(0.3, 1.5), measured(0.31, 9.0),
    ]  # fmt: skip
    assert on_frontier(history, 1.0) == [True, True, False, True, True, True]


def test_a_difference_within_its_error_is_none():
    before = Measurement(0, {"gold": 0.5, "kl": 1.0}, [0.9, 0.1, 0.6, 0.4])
    now = Measurement(1, {"gold": 0.45, "kl": 2.0}, [0.1, 0.9, 0.2, 0.6])
    assert on_frontier([before, now], 1.0) == [True, True]
    assert on_frontier([before, now], 0.0) == [True, False]


def test_a_run_stops_when_it_only_pays():
    watch = monitor_of()
    watch.history = [measured(0.5, 0.0), measured(0.6, 1.0), measured(0.4, 2.0)]
    assert watch.why_stop() is None
    watch.history.append(measured(0.3, 3.0))
    assert "hacked" in watch.why_stop()
    watch.history.append(measured(0.7, 4.0))
    assert watch.why_stop() is None


def test_budgets_stop_a_run_too():
    history = [measured(0.5, 0.0), measured(0.6, 30.0)]
    for settings, match in (
        ({"most_kl": 20.0}, "--most-kl 20"), ({"least_recall": 1.1}, "--least-recall"), ({"patience": 0}, None),
    ):  # fmt: skip
        watch = monitor_of(MonitorSettings(**settings))
        watch.history = history
        said = watch.why_stop()
        assert said is None if match is None else match in said


def test_recall_is_against_the_base_s_images_from_other_noise(monkeypatch):
    """From the same noise the base would cover itself, and so would a model that lost all that these do not show."""
    drawn, generate = [], ImageGenerator.generate

    def noted(model, *given, seed, **options):
        drawn.append((seed, features(generate(model, *given, seed=seed, **options))))
        return generate(model, *given, seed=seed, **options)

    monkeypatch.setattr(ImageGenerator, "generate", noted)
    watch, model = monitor_of(), toy_generator()
    said = watch.measure(0, model, model).values
    images = dict(drawn)
    assert sorted(images) == [watch.seed, watch.seed + 1]
    ours, base = images[watch.seed], images[watch.seed + 1]
    assert said["recall"] == float(coverage(base, ours)) < 1
    assert said["precision"] == float(coverage(ours, base))


def test_evaluations_are_of_the_same_noise_and_leave_the_run_alone():
    tuner = make_tuner(tiny_network(), redness, METHODS["flow-grpo"].config(guidance=1.0), seed=0)
    watch, again = monitor_of(), monitor_of()
    before = tuner.generator.get_state()
    first = watch.measure(0, tuner.model, tuner.reference)
    assert torch.equal(before, tuner.generator.get_state())
    assert first == again.measure(0, tuner.model, tuner.reference)
    assert first.values["kl"] == 0
    assert first.values["proxy"] == pytest.approx(float(redness(watch.images, None).mean()))


# ------------------------------------------------------------------------------------------- loop


def loop_of(folder, *, steps=4, model=None, settings=NEVER_STOPS, reward=redness, gold=blueness,
            resume=False, budget=(0, 0), **overrides):  # fmt: skip
    config = METHODS["flow-grpo"].config(
        **{
            "denoising_steps": 3,
            "prompts": 2,
            "group": 3,
            "guidance": 1.0,
            "batch_size": 4,
            **overrides,
        }
    )
    tuner = make_tuner(model or tiny_network(), reward, config, seed=1)
    watch = monitor_of(settings, gold=gold)
    checkpoints = CheckpointStore(folder)
    parts = checkpoints.load() if resume else None
    done = parts["progress"]["agent_steps"] if parts else None
    folder.mkdir(exist_ok=True)
    lines = []

    def evaluate(progress):
        values = watch.measure(progress.agent_steps, tuner.model, tuner.reference).values
        return {f"eval/{name}": value for name, value in values.items()}

    loop = TuningLoop(
        tuner, PromptStream(PROMPTS, 2), watch,
        TuningSettings(
            steps=steps, eval_every=2, checkpoint_every=2, max_evaluations=budget[0], max_rewards=budget[1],
        ),
        logger=Logger(folder, resume_from=done), checkpoints=checkpoints,
        hooks=Hooks(evaluate=evaluate, line=lines.append),
    )  # fmt: skip
    if parts:
        loop.resume(parts)
    return loop, lines


def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(tmp_path):
    whole, _ = loop_of(tmp_path / "whole")
    whole.run()
    half, _ = loop_of(tmp_path / "half", steps=2)
    half.run()
    half.logger.close()
    rest, _ = loop_of(tmp_path / "half", model=tiny_network(seed=7), resume=True)
    rest.run()
    for key, value in whole.agent.model.state_dict().items():
        assert torch.equal(value, rest.agent.model.state_dict()[key]), key
    assert whole.monitor.history == rest.monitor.history
    assert [each.step for each in rest.monitor.history] == [0, 2, 4]
    found = load_generator(tmp_path / "half")
    for key, value in whole.agent.model.state_dict().items():
        assert torch.equal(value, found.state_dict()[key])


def test_the_monitor_stops_the_loop_and_the_best_is_kept(tmp_path):
    """Gold is minus the proxy: all that training does is to pay."""
    loop, _ = loop_of(
        tmp_path, steps=60, settings=SETTINGS, model=toy_generator(), learning_rate=0.05, kl=0.0, group=8,
        gold=lambda images, prompts: -redness(images, prompts),
    )  # fmt: skip
    state = loop.run()
    assert state.progress.agent_steps < 20
    assert "hacked" in loop.stopped
    best = CheckpointStore(tmp_path).load("best")
    assert best["progress"]["agent_steps"] == 0
    loop.logger.close()
    options = {
        "model": toy_generator(),
        "learning_rate": 0.05,
        "kl": 0.0,
        "group": 8,
        "resume": True,
    }
    again, lines = loop_of(tmp_path, steps=60, settings=SETTINGS, **options)
    assert again.run().progress.agent_steps == state.progress.agent_steps
    assert "(--patience)" in lines[0]
    further, _ = loop_of(tmp_path, steps=state.progress.agent_steps + 1, **options)
    assert further.run().progress.agent_steps == state.progress.agent_steps + 1


def test_a_diverged_run_names_what_is_not_finite_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    loop, _ = loop_of(tmp_path, steps=6)
    update = loop.agent.update

    def spoiled(prompts):
        metrics = update(prompts)
        return metrics | (
            {"loss/policy": torch.tensor(math.nan)} if loop.agent.iterations > 3 else {}
        )

    monkeypatch.setattr(loop.agent, "update", spoiled)
    with pytest.raises(DivergedError, match=r"loss/policy is nan .* raise --kl"):
        loop.run()
    assert CheckpointStore(tmp_path).latest().name == "step-000000002"


def test_a_reward_that_breaks_loses_nothing(tmp_path):
    calls = []  # two in an iteration, one for each pass: it breaks in the middle of the sixth

    def breaks(images, prompts):
        calls.append(1)
        return redness(images, prompts) if len(calls) < 12 else torch.zeros(3, 2)

    loop, _ = loop_of(tmp_path, steps=8, reward=breaks)
    loop.monitor.rewards["proxy"] = redness
    with pytest.raises(UserError, match="one number for each"):
        loop.run()
    loop.logger.close()
    assert CheckpointStore(tmp_path).latest().name == "step-000000005"
    rest, _ = loop_of(tmp_path, steps=8, model=tiny_network(seed=7), resume=True)
    rest.run()
    whole, _ = loop_of(tmp_path / "whole", steps=8)
    whole.run()
    assert rest.agent.extra_state() == whole.agent.extra_state()
    for key, value in whole.agent.model.state_dict().items():
        assert torch.equal(value, rest.agent.model.state_dict()[key]), key


def test_the_budget_is_training_s_alone_and_the_same_after_a_resume(tmp_path):
    """Evaluations draw images and a resume draws the base's again: none of that is what learning costs."""
    whole, _ = loop_of(tmp_path / "whole")
    whole.run()
    # 4 iterations of 6 images: 3 steps of drawing, and 2 of learning with the reference beside.
    assert whole.agent.evaluations == 4 * 6 * (3 + 2 * 2)
    half, _ = loop_of(tmp_path / "half", steps=2)
    half.run()
    half.logger.close()
    rest, _ = loop_of(tmp_path / "half", resume=True)
    rest.run()
    assert rest.agent.evaluations == whole.agent.evaluations


PER_ITERATION = 6 * (3 + 2 * 2)


@pytest.mark.parametrize(
    "budget", [(3 * PER_ITERATION, 0), (4 * PER_ITERATION - 1, 0), (0, 18), (0, 23)]
)
def test_a_budget_ends_the_run_before_it_is_overspent_and_more_goes_on(tmp_path, budget):
    loop, lines = loop_of(tmp_path / "one", steps=9, budget=budget)
    loop.run()
    loop.logger.close()
    assert loop.agent.iterations == 3
    assert sum("the budget ends the run" in line for line in lines) == 1
    assert loop.monitor.history[-1].step == 3  # the end is evaluated
    assert CheckpointStore(tmp_path / "one").latest().name == "step-000000003"
    assert loop.why_over().startswith(("126 are spent of --max-eval", "18 are spent of --max-rew"))
    same, _ = loop_of(tmp_path / "one", steps=9, budget=budget, resume=True)
    assert same.run().progress.agent_steps == 3
    same.logger.close()
    more, _ = loop_of(tmp_path / "one", steps=5, budget=tuple(9 * b for b in budget), resume=True)
    more.run()
    whole, _ = loop_of(tmp_path / "whole", steps=5)
    whole.run()
    assert more.agent.extra_state() == whole.agent.extra_state()
    for key, value in whole.agent.model.state_dict().items():
        assert torch.equal(more.agent.model.state_dict()[key], value), key


def test_an_iteration_is_forecast_to_cost_as_much_as_the_dearest_and_a_resumed_run_knows(tmp_path):
    """Where groups say nothing their passes are skipped: an iteration after a cheap one may be dear."""

    def uneven(budget, steps, *, resume):
        loop, _ = loop_of(tmp_path / "run", steps=steps, budget=budget, resume=resume)
        update = loop.agent.update

        def dearer(batch):
            metrics = update(batch)
            loop.agent.evaluations += (0, 100, 0, 0, 0)[loop.agent.iterations - 1]
            return metrics

        loop.agent.update = dearer
        loop.run()
        loop.logger.close()
        return loop.agent

    room = 4 * PER_ITERATION + 2 * 100  # for another one like the second
    assert uneven((room - 1, 0), 5, resume=False).iterations == 3
    assert uneven((room - 1, 0), 5, resume=True).iterations == 3
    agent = uneven((room, 0), 5, resume=True)
    assert agent.iterations == 4
    assert agent.evaluations == 4 * PER_ITERATION + 100


@pytest.mark.parametrize(("name", "value"), [("most_kl", 1e-9), ("least_recall", 1.1)])
def test_a_run_that_a_bound_has_stopped_goes_on_with_another(tmp_path, name, value):
    bounded = dataclasses.replace(NEVER_STOPS, **{name: value})
    loop, lines = loop_of(tmp_path, steps=4, settings=bounded, learning_rate=0.01)
    steps = loop.run().progress.agent_steps
    loop.logger.close()
    assert steps < 4
    flag = f"--{name.replace('_', '-')}"
    assert flag in lines[-1]
    again, lines = loop_of(tmp_path, steps=4, settings=bounded, resume=True, learning_rate=0.01)
    assert again.run().progress.agent_steps == steps
    again.logger.close()
    assert flag in lines[0]
    assert "--patience" not in lines[0]
    rest, _ = loop_of(tmp_path, steps=4, resume=True, learning_rate=0.01)
    assert rest.run().progress.agent_steps == 4


def test_what_is_learned_is_kept_when_an_evaluation_breaks(tmp_path):
    calls = []

    def gold(images, prompts):
        calls.append(1)
        return blueness(images, prompts) * (math.nan if len(calls) > 2 else 1)

    loop, _ = loop_of(tmp_path, steps=4, gold=gold)
    loop.settings = dataclasses.replace(loop.settings, checkpoint_every=100)
    with pytest.raises(UserError, match="is nan"):
        loop.run()
    saved = CheckpointStore(tmp_path).latest().name
    assert saved == "step-000000004"


def test_only_methods_with_a_kl_are_told_to_raise_it(tmp_path):
    loop, _ = loop_of(tmp_path / "policy")
    assert loop.remedy.endswith("raise --kl")
    other, _ = loop_of(tmp_path / "pairs", objective="preference")
    assert other.remedy == "lower --learning-rate"


def test_missing_memory_says_which_settings_to_lower():
    with pytest.raises(UserError, match="--batch-size"), named_memory_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match="--batch-size"), named_memory_errors():
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="another"), named_memory_errors():
        raise RuntimeError("another thing")


def test_prompts_come_all_before_any_comes_again():
    stream, other = PromptStream(PROMPTS, 0), PromptStream(PROMPTS, 1)
    taken = [stream.take(3) for _ in range(4)]
    flat = [prompt for some in taken for prompt in some]
    assert all(sorted(flat[i : i + 4]) == sorted(PROMPTS) for i in (0, 4, 8))
    other.set_state(stream.get_state())
    assert other.take(5) == stream.take(5)
    with pytest.raises(UserError, match="no prompts"):
        PromptStream([], 0)


def test_settings_that_measure_nothing_are_refused():
    for bad in (
        {"eval_images": 1},
        {"eval_prompts": 0},
        {"eval_prompts": 1, "eval_images": 2},
        {"most_kl": 0.0},
        {"tolerance": math.nan},
        {"least_recall": math.nan},
    ):
        with pytest.raises(UserError):
            MonitorSettings(**bad)
    with pytest.raises(UserError, match="held-out"):
        Monitor([], {}, SETTINGS, guidance=1.0, seed=0)
    with pytest.raises(UserError, match="eval_every is 0"):
        TuningSettings(eval_every=0)
