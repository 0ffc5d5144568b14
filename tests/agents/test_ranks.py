"""Exchanges of several processes against loops, and that they end together; threads stand in for the processes."""

import pytest
import torch
from torch import nn

from agents.core.errors import DivergedError, UserError
from agents.core.processes import joined_ranks
from agents.core.ranks import LostRankError, Ranks
from agents.core.seeding import rank_seed
from tests.agents.thread_ranks import in_threads

CPU = torch.device("cpu")


def parameters(count=3):
    return [nn.Parameter(torch.arange(2.0) + place) for place in range(count)]


def test_one_process_gets_everything_as_it_was_given(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    values, metrics, weights = torch.randn(3), {"loss": torch.tensor(0.1)}, parameters(2)
    weights[0].grad = torch.ones(2)
    with joined_ranks() as ranks, ranks.one_fate():
        assert ranks.gathered(values) is values
        assert ranks.combined(metrics, CPU) == metrics
        assert (ranks.each(4), ranks.total(4), ranks.told("a")) == ([4], 4, "a")
        assert ranks.span(7, "prompts") == slice(0, 7)
        assert ranks.device("cuda:3") == "cuda:3"
        ranks.add_gradients(weights)
        ranks.check_alike(torch.tensor([torch.nan]))
    assert torch.equal(weights[0].grad, torch.ones(2))
    assert weights[1].grad is None
    assert rank_seed(12, 0) == 12


def test_what_is_exchanged_is_in_the_order_of_ranks():
    def work(ranks):
        own = torch.arange(2.0) + 10 * ranks.rank
        config = {"seed": ranks.rank, "clip": 0.1, "limit": float("inf"), "name": "é"}
        return (
            ranks.gathered(own).tolist(), ranks.each(ranks.rank), ranks.total(5), ranks.told(config),
            ranks.span(6, "prompts"),
        )  # fmt: skip

    results = in_threads(3, work)
    told = {"seed": 0, "clip": 0.1, "limit": float("inf"), "name": "é"}
    for rank, result in enumerate(results):
        span = slice(2 * rank, 2 * rank + 2)
        assert result == ([0, 1, 10, 11, 20, 21], [0, 1, 2], 15, told, span)


def test_metrics_are_means_over_the_ranks_that_have_them_or_the_largest():
    own = [{"a": 1.0, "most": 3.0}, {}, {"a": 2.0, "b": -5.0, "most": -1.0}]

    def work(ranks):
        metrics = {name: torch.tensor(value) for name, value in own[ranks.rank].items()}
        return ranks.combined(metrics, CPU, ["most"])

    for result in in_threads(3, work):
        assert {n: float(v) for n, v in result.items()} == {"a": 1.5, "b": -5.0, "most": 3.0}
    assert in_threads(2, lambda ranks: ranks.combined({}, CPU)) == [{}, {}]


def test_a_metric_that_is_not_finite_is_so_everywhere():
    value = [0.0, float("nan")]
    for result in in_threads(2, lambda r: r.combined({"a": torch.tensor(value[r.rank])}, CPU)):
        assert result["a"].isnan()


def test_gradients_are_added_up_and_missing_ones_count_as_nothing():
    def work(ranks):
        weights = parameters()
        weights[0].grad = torch.ones(2) * (1 + ranks.rank)
        if ranks.rank == 1:
            weights[2].grad = torch.tensor([0.5, 7.0])
        ranks.add_gradients(weights)
        return [p.grad for p in weights]

    for first, second, third in in_threads(2, work):
        assert first.tolist() == [3, 3]
        assert second is None
        assert third.tolist() == [0.5, 7]
    nothing = in_threads(2, lambda ranks: ranks.add_gradients(parameters()))
    assert nothing == [None, None]


def test_what_cannot_be_shared_out_evenly_is_refused():
    said = in_threads(3, lambda ranks: ranks.span(8, "prompts"))
    assert [str(each) for each in said] == [
        "8 prompts cannot be shared out evenly over 3 processes; give --prompts a multiple of 3"
    ] * 3


def test_ranks_that_hold_other_weights_are_refused():
    assert in_threads(2, lambda r: r.check_alike(torch.tensor([1.0, 2.0]))) == [None, None]
    for error in in_threads(2, lambda r: r.check_alike(torch.tensor([1.0, 2.0 + r.rank]))):
        assert "do not hold the same weights" in str(error)


def test_every_process_draws_its_own_numbers():
    seeds = [rank_seed(5, rank) for rank in range(4)]
    assert len(set(seeds)) == 4
    assert seeds == [rank_seed(5, rank) for rank in range(4)]
    assert rank_seed(6, 1) != seeds[1]


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (UserError("the reward is nan"), UserError),
        (DivergedError("loss is nan", "lower it"), DivergedError),
        (KeyError("defect"), LostRankError),
    ],
)
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_an_error_of_one_ends_all_wherever_the_others_are(error, heard, place):
    """In an exchange of another kind than the failed rank was about to make."""

    def work(ranks):
        with ranks.one_fate():
            fails = ranks.rank == 1
            if fails and place == "before":
                raise error
            ranks.gathered(torch.ones(2))
            if fails and place == "between":
                raise error
            ranks.add_gradients(parameters())
            if fails:
                raise error
        return "went on"

    first, failed, third = in_threads(3, work)
    assert failed is error
    for other in (first, third):
        assert type(other) is heard
        assert "rank 1 of 3" in str(other)
        assert getattr(other, "exit_code", 1) == getattr(error, "exit_code", 1)
    if heard is DivergedError:
        assert first.remedy == "lower it"


def test_after_an_error_that_all_know_they_still_work_together():
    """Such as the loop's last checkpoint: it is not told again at the end."""

    def work(ranks):
        with ranks.one_fate():
            try:
                with ranks.one_fate():
                    if ranks.rank:
                        raise UserError("no more")
            except UserError:
                assert ranks.total(1) == 2
                raise

    first, second = in_threads(2, work)
    assert str(first) == "no more (rank 1 of 2)"
    assert str(second) == "no more"


def test_all_may_fail_at_once():
    def work(ranks):
        with ranks.one_fate():
            raise UserError(f"wrong flag at {ranks.rank}")

    assert [str(each) for each in in_threads(2, work)] == ["wrong flag at 0", "wrong flag at 1"]


def test_a_rank_that_is_gone_is_noticed():
    def work(ranks):
        if ranks.rank:
            raise KeyError("killed without a word")
        with ranks.one_fate():
            ranks.each()

    first, _ = in_threads(2, work)
    assert type(first) is LostRankError


def test_processes_that_cannot_be_reached_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="start all of them with torchrun"), joined_ranks():
        pass


def test_ranks_of_one_process_are_the_default():
    assert (Ranks().rank, Ranks().size, Ranks().is_first) == (0, 1, True)
