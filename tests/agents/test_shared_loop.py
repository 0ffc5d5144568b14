"""The loop of several processes stops, saves, resumes and fails as one; threads stand in for them."""

import threading
from itertools import count

import pytest
import torch

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import DivergedError, UserError
from agents.core.logging import Logger
from agents.core.ranks import Ranks
from agents.core.run_loop import Hooks
from agents.generative_models.methods import METHODS
from agents.generative_models.monitor import Monitor, MonitorSettings
from agents.generative_models.tuners import make_tuner
from agents.generative_models.tuning_loop import PromptStream, TuningLoop, TuningSettings
from experiments.generators.listening import NoLogger, ReadCheckpoints
from tests.agents.thread_ranks import in_threads
from tests.agents.toy_generator import PROMPTS, redness, tiny_network

SMALL = {"denoising_steps": 3, "prompts": 2, "group": 3, "guidance": 1.0, "batch_size": 4}
WATCHED = MonitorSettings(eval_prompts=2, eval_images=2, eval_steps=2, kl_images=2, patience=0)
ONE_AT_A_TIME = threading.Lock()


def loop_of(ranks, folder, *, steps=4, reward=redness, stop=lambda: False):
    folder.mkdir(exist_ok=True)
    with ONE_AT_A_TIME:
        config = METHODS["flow-grpo"].config(**SMALL)
        tuner = make_tuner(tiny_network(), reward, config, seed=1, ranks=ranks)
    watch = Monitor(PROMPTS[:2], {"proxy": redness, "gold": redness}, WATCHED, guidance=1.0, seed=3)
    checkpoints = (CheckpointStore if ranks.is_first else ReadCheckpoints)(folder)
    goes_on = checkpoints.latest() is not None
    parts = checkpoints.load() if goes_on else None

    def evaluate(progress):
        if not ranks.is_first:
            return ranks.told({})
        said = watch.measure(progress.agent_steps, tuner.model, tuner.reference)
        return ranks.told({f"eval/{name}": value for name, value in said.values.items()})

    loop = TuningLoop(
        tuner, PromptStream(PROMPTS, 2), watch,
        TuningSettings(steps=steps, eval_every=2, checkpoint_every=2),
        logger=Logger(folder) if ranks.is_first else NoLogger(), checkpoints=checkpoints,
        hooks=Hooks(evaluate=evaluate, stop=stop, line=lambda text: None),
    )  # fmt: skip
    if parts:
        loop.resume(parts)
    return loop


def run_of(ranks, folder, **options):
    """Run a loop to its end, and return it."""
    with ranks.one_fate():
        loop = loop_of(ranks, folder, **options)
        loop.run()
    return loop


def steps_of(loop):
    return loop.state.progress.agent_steps


def assert_same(loops):
    first, *others = (loop.agent.state_dict()["networks"]["model"] for loop in loops)
    for other in others:
        for key, value in first.items():
            assert torch.equal(value, other[key]), key


def test_one_that_is_asked_to_stop_stops_all_and_the_run_goes_on_exactly(tmp_path):
    whole = in_threads(2, lambda ranks: run_of(ranks, tmp_path / "whole"))

    def asked(ranks):
        calls = count(1)
        stop = (lambda: next(calls) > 3) if ranks.rank else lambda: False
        return run_of(ranks, tmp_path / "half", stop=stop)

    half = in_threads(2, asked)
    assert [steps_of(loop) for loop in half] == [3, 3]
    assert CheckpointStore(tmp_path / "half").latest().name == "step-000000003"
    rest = in_threads(2, lambda ranks: run_of(ranks, tmp_path / "half"))
    assert_same([*whole, *rest])
    assert whole[0].monitor.history == rest[0].monitor.history
    assert [loop.agent.extra_state() for loop in rest] == [whole[0].agent.extra_state()] * 2
    # 4 iterations of 6 images: 3 steps of drawing, and 2 of learning with the reference beside.
    assert whole[0].agent.evaluations == 4 * 6 * (3 + 2 * 2)
    assert whole[0].agent.scored == 24


def test_the_first_one_s_monitor_stops_all(tmp_path, monkeypatch):
    def why_stop(self):
        return "enough" if self.history and self.history[-1].step == 2 else None

    monkeypatch.setattr(Monitor, "why_stop", why_stop)
    loops = in_threads(2, lambda ranks: run_of(ranks, tmp_path, steps=9))
    assert [(steps_of(loop), loop.stopped) for loop in loops] == [(2, "enough")] * 2
    assert loops[1].monitor.history == []


@pytest.mark.parametrize("broken", [torch.OutOfMemoryError("CUDA out of memory"), None])
def test_what_breaks_in_one_is_taken_back_in_all(tmp_path, broken):
    """Memory that one does not have, or a reward of another shape."""

    def work(ranks):
        calls = count(1)

        def reward(images, prompts):
            if ranks.rank == 1 and next(calls) == 7:  # two passes in an iteration
                if broken is None:
                    return torch.zeros(3, 2)
                raise broken
            return redness(images, prompts)

        return run_of(ranks, tmp_path / "run", reward=reward)

    match = "--batch-size" if broken else "one number for each"
    for error in in_threads(2, work):
        assert isinstance(error, UserError)
        assert match in str(error)
    assert CheckpointStore(tmp_path / "run").latest().name == "step-000000003"
    rest = in_threads(2, lambda ranks: run_of(ranks, tmp_path / "run"))
    whole = in_threads(2, lambda ranks: run_of(ranks, tmp_path / "whole"))
    assert_same([*whole, *rest])


def test_a_number_that_is_not_finite_in_one_ends_all(tmp_path):
    def work(ranks):
        with ranks.one_fate():
            loop = loop_of(ranks, tmp_path)
            descend = loop.agent.descend

            def spoiled(backward):
                metrics = descend(backward)
                late = ranks.rank == 1 and loop.agent.iterations == 4
                return metrics | ({"loss/policy": torch.tensor(torch.nan)} if late else {})

            loop.agent.descend = spoiled
            loop.run()

    for error in in_threads(2, work):
        assert isinstance(error, DivergedError)
        assert "loss/policy is nan" in str(error)
        assert "raise --kl" in str(error)
    assert CheckpointStore(tmp_path).latest().name == "step-000000002"


def test_an_evaluation_that_fails_in_the_first_one_ends_all(tmp_path, monkeypatch):
    def measure(self, step, model, reference):
        raise UserError("the gold reward is nan")

    monkeypatch.setattr(Monitor, "measure", measure)
    first, second = in_threads(2, lambda ranks: run_of(ranks, tmp_path))
    assert (str(first), second.exit_code) == ("the gold reward is nan", 2)


def test_weights_that_differ_are_noticed_before_the_first_step(tmp_path):
    def work(ranks):
        with ranks.one_fate():
            loop = loop_of(ranks, tmp_path)
            loop.agent.parameters[0].data += ranks.rank
            loop.run()

    for error in in_threads(2, work):
        assert "do not hold the same weights" in str(error)


def test_as_many_processes_as_before_are_asked_for(tmp_path):
    in_threads(2, lambda ranks: run_of(ranks, tmp_path / "two", steps=1))
    with pytest.raises(UserError, match=r"one of 2 processes, and here are 1; .*-node 2"):
        loop_of(Ranks(), tmp_path / "two")
    run_of(Ranks(), tmp_path / "one", steps=1)
    for error in in_threads(2, lambda ranks: run_of(ranks, tmp_path / "one", steps=2)):
        assert "one of 1 process" in str(error)
        assert "without torchrun" in str(error)
