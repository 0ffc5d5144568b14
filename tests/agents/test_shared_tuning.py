"""Fine-tuning by several processes: a step is one process's step on the images of all; threads stand in for them."""

import dataclasses
import math
import threading

import pytest
import torch

from agents.core.errors import UserError
from agents.core.ranks import Ranks
from agents.generative_models import reward_gradients
from agents.generative_models.methods import METHODS, find_method
from agents.generative_models.tuners import make_tuner
from tests.agents.thread_ranks import ThreadRanks, in_threads
from tests.agents.toy_generator import PROMPTS, redness, tiny_network

SMALL = {
    "denoising_steps": 5, "prompts": 4, "group": 4, "batch_size": 8, "guidance": 2.0, "updates": 1,
    "max_gradient_norm": math.inf, "value_updates": 1, "value_learning_rate": 1e-12, "gradient_steps": 1,
    "history_least": 2,
}  # fmt: skip
ONE_AT_A_TIME = threading.Lock()
"""Weights begin with the library's global generator, of which processes have one each, but not threads."""
OF_ONE = {
    "dance-grpo": {"step_share": 1.0},
}


def settings(name, **overrides):
    own = {"window": 2} if METHODS[name].settings.get("window") else {}
    own |= {"group": 1} if METHODS[name].settings.get("group") == 1 else {}
    return find_method(name).config(**(SMALL | own | OF_ONE.get(name, {}) | overrides))


def tuner_of(name, reward=redness, ranks=None, seed=3, **overrides):
    config = settings(name, **overrides)
    with ONE_AT_A_TIME:
        return make_tuner(tiny_network(), reward, config, seed=seed, ranks=ranks)


def of_two_prompts(images, prompts):
    """A reward that tells images of the first two prompts apart, and of a third one: the last says nothing."""
    told = torch.tensor([prompt != PROMPTS[3] for prompt in prompts])
    return torch.where(told, redness(images, prompts), 0.0)


def of_the_first_rank(images, prompts):
    """A reward of which the second process learns nothing."""
    told = torch.tensor([prompt in PROMPTS[:2] for prompt in prompts])
    return torch.where(told, redness(images, prompts), 0.0)


REWARDS = {"all": redness, "some": of_two_prompts, "first": of_the_first_rank}


def still_noise(tuner):
    """Let losses of noised images draw nothing, so that they do not depend on who computes them."""
    x = torch.randn(tuner.model.shape, generator=torch.Generator().manual_seed(8))

    def noised(count):
        return torch.full((count,), 0.4), x.expand(count, *x.shape)

    def loss(x0, condition, generator):
        return tuner.model.errors(x0, condition, *noised(len(x0)))

    tuner.noised, tuner.model.loss = noised, loss


def union(all_batches):
    """Return the images of several processes as one pass, groups numbered through."""
    batches, groups = [], 0
    for own in all_batches:
        batches += [dataclasses.replace(each, group=each.group + groups) for each in own]
        groups = 1 + int(batches[-1].group.max())

    def join(name, dim=0):
        return torch.cat([getattr(each, name) for each in batches], dim)

    def join_steps(name):
        steps = getattr(batches[0], name)
        return {i: torch.cat([getattr(each, name)[i] for each in batches]) for i in steps}

    return dataclasses.replace(
        batches[0], prompts=sum((each.prompts for each in batches), ()), condition=join("condition"),
        group=join("group"), samples=join("samples", 1), log_prob=join_steps("log_prob"),
        mean=join_steps("mean"), images=join("images"),
    )  # fmt: skip


def steps_of_two_and_of_one(name, reward, monkeypatch, **overrides):
    """Return two processes' tuners after an iteration and its metrics, and those of one with all their images."""
    starts = {}
    draw_noise = reward_gradients.standard_normal

    def recorded(shape, generator, *, device):
        starts[id(generator)] = draw_noise(shape, generator, device=device)
        return starts[id(generator)]

    monkeypatch.setattr(reward_gradients, "standard_normal", recorded)

    def work(ranks):
        tuner = tuner_of(name, reward, ranks, **overrides)
        still_noise(tuner)
        drawn, draw = [], tuner.draw
        tuner.draw = lambda prompts: drawn.append(draw(prompts)) or drawn[-1]
        return tuner, drawn, tuner.update(PROMPTS)

    first, second = in_threads(2, work)
    one = tuner_of(name, reward, batch_size=64, **overrides)
    still_noise(one)
    if first[1]:
        batch = union([drawn[0][1] for _, drawn, _ in (first, second)])
        one.draw = lambda prompts: (one.sampler(), [batch])
    else:
        noise = torch.cat([starts[id(tuner.generator)] for tuner, _, _ in (first, second)])
        monkeypatch.setattr(reward_gradients, "standard_normal", lambda *_, **__: noise)
    return (first[0], second[0], one), (first[2], second[2], one.update(PROMPTS))


def gradients(tuner):
    own = [p.grad for p in tuner.parameters]
    if getattr(tuner, "value", None) is not None:
        own += [p.grad for p in tuner.value.parameters()]
    return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in own])


def assert_alike(tuners):
    """Two processes hold the same bits, and their gradient is that of one."""
    first, second, one = (gradients(tuner) for tuner in tuners)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, one, rtol=2e-4, atol=2e-5 * float(one.abs().max()))
    assert float(one.abs().max()) > 0
    for a, b in zip(*(tuner.model.parameters() for tuner in tuners[:2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "who"),
    [(name, "all") for name in METHODS]
    + [(name, who) for name in ("flow-grpo", "diffusion-dpo", "raft") for who in ("some", "first")],
)
def test_the_gradient_of_two_is_that_of_one_with_all_their_images(name, who, monkeypatch):
    """Where all prompts, some, or only those of one process say something."""
    tuners, metrics = steps_of_two_and_of_one(name, REWARDS[who], monkeypatch)
    assert_alike(tuners)
    assert metrics[0].keys() == metrics[1].keys() == metrics[2].keys()
    for key, value in metrics[0].items():
        assert torch.equal(value, metrics[1][key])
        if key.startswith("reward/"):
            torch.testing.assert_close(value, metrics[2][key])
        if who == "all":
            torch.testing.assert_close(value, metrics[2][key], rtol=1e-3, atol=1e-5)
    assert [tuner.scored for tuner in tuners] == [len(PROMPTS) * tuners[0].config.group] * 3


def test_credit_is_of_all_images_whatever_it_is(monkeypatch):
    for credit, spread in (("leave_one_out", "group"), ("group", "group"), ("group", "none")):
        tuners, _ = steps_of_two_and_of_one(
            "flow-grpo", redness, monkeypatch, credit=credit, spread=spread
        )
        assert_alike(tuners)


def test_histories_hold_the_rewards_of_all(monkeypatch):
    tuners, _ = steps_of_two_and_of_one("ddpo", redness, monkeypatch)
    first, second, one = (tuner.history.state_dict()["rewards"] for tuner in tuners)
    assert list(first) == list(PROMPTS)
    assert first == second
    for prompt in PROMPTS:
        assert first[prompt] == pytest.approx(one[prompt], abs=1e-6)


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("add_gradients", lambda self, parameters: None),
        ("total", lambda self, number: number),
        ("gathered", lambda self, values: torch.cat([values, values])),
    ],
)
def test_the_comparison_notices_what_is_not_shared(method, broken, monkeypatch):
    """Gradients of own images alone, losses divided by their number, or credit of them."""
    monkeypatch.setattr(ThreadRanks, method, broken)
    tuners, _ = steps_of_two_and_of_one("flow-grpo", of_two_prompts, monkeypatch)
    with pytest.raises(AssertionError):
        assert_alike(tuners)


@pytest.mark.parametrize("name", METHODS)
def test_two_stay_the_same_and_draw_different_images(name):
    """Over several steps of unequal parts, with the clip of the gradient's norm and an average."""

    def work(ranks):
        tuner = tuner_of(
            name, of_two_prompts if settings(name).group > 1 else redness, ranks, updates=3, epochs=2,
            batch_size=3, max_gradient_norm=0.01, learning_rate=0.01, average_decay=0.5, prompts=2,
        )  # fmt: skip
        for prompts in (PROMPTS[:2], PROMPTS[2:], PROMPTS[1:3]):
            metrics = tuner.update(prompts)
        return tuner, metrics

    (first, said), (second, said_too) = in_threads(2, work)
    assert first.gradient_updates == second.gradient_updates > 0
    for key, value in first.state_dict()["networks"].items():
        for part, numbers in value.items():
            assert torch.equal(numbers, second.state_dict()["networks"][key][part]), part
    assert first.extra_state() == second.extra_state()
    assert said.keys() == said_too.keys()
    assert all(torch.equal(value, said_too[key]) for key, value in said.items())
    assert not torch.equal(first.generator.get_state(), second.generator.get_state())


def test_a_window_that_moves_at_random_is_one_for_all():
    def work(ranks):
        tuner = tuner_of("mix-grpo", ranks=ranks, window_moves="random")
        return [tuner.draw(PROMPTS)[0].stochastic for _ in range(6)]

    first, second = in_threads(2, work)
    assert first == second
    assert len({tuple(each) for each in first}) > 1


class Alone(Ranks):
    """One process that has nobody to exchange with."""

    def _gather(self, own):
        raise AssertionError("there is nobody")

    _add = _gather


@pytest.mark.parametrize("name", ["flow-grpo", "dpok", "diffusion-dpo", "refl"])
def test_one_alone_exchanges_nothing(name):
    """Its numbers are drawn from the run's own seed, as ever."""
    tuner = tuner_of(name, ranks=Alone())
    assert tuner.generator.initial_seed() == 3
    assert "reward/mean" in tuner.update(PROMPTS)
    assert tuner.scored == len(PROMPTS) * tuner.config.group


def test_prompts_that_cannot_be_shared_out_are_refused():
    for error in in_threads(3, lambda ranks: tuner_of("flow-grpo", ranks=ranks)):
        assert isinstance(error, UserError)
        assert "give --prompts a multiple of 3" in str(error)
