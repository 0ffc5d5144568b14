"""Vines go out from one state, are kept as they happened, and go on exactly after an interruption."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
from agents.core.behaviors import BEHAVIORS, diversity
from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.fields import step_fields
from agents.core.logging import Logger
from agents.core.loops import LoopSettings
from agents.core.rollout import TEACHER_ACTION, Rollout
from agents.core.training import Hooks
from agents.core.vines import VineLoop, VinePlan, Vines
from agents.on_policy.polychromic import PolychromicConfig, PolychromicPPO, set_scores
from experiments.compare import difference
from tests.agents.test_loops import ACTION, BOX, ENVS, Counting

TINY = PolychromicConfig(
    rollout_length=24, minibatch_size=16, epochs=2, hidden=(8,), feature_dim=8, encoder="small", pad=0,
    branches=2, vines=3, vine_length=3, set_size=2, sets=3, window=1, discount=0.9,
)  # fmt: skip


def make_loop(folder: Path, vector=None, config=TINY, steps=24, **settings) -> VineLoop:
    vector = vector or Counting()
    folder.mkdir(exist_ok=True)
    spaces = getattr(vector, "single_observation_space", BOX), vector.single_action_space
    agent = PolychromicPPO(*spaces, config, num_envs=vector.num_envs)
    rollout = Rollout(
        *spaces, length=agent.rollout_length, num_envs=vector.num_envs, extras=agent.extras, jumps=agent.jumps,
        log=lambda _: None,
    )  # fmt: skip
    values = {"steps": steps * vector.num_envs, "log_every": 10**6, "eval_every": 0} | settings
    return VineLoop(
        agent, vector, rollout, LoopSettings(**values), logger=Logger(folder),
        checkpoints=CheckpointStore(folder), action_repeat=4, seed=7, hooks=Hooks(line=lambda _: None),
    )  # fmt: skip


def caught(loop: VineLoop) -> list:
    """Return the rollouts that the agent is given, as copies."""
    seen = []
    real = loop.agent.update

    def update(batch):
        index = torch.arange(batch.kept.numel())[batch.kept.flatten()]
        seen.append({
            "vine": batch.extras["vine"].clone(),
            "before": batch.observation(index),
            "after": batch.next_observation(index),
            "terminated": batch.terminated.clone(), "truncated": batch.truncated.clone(),
            "vines": Vines.of(batch, loop.agent.vines), "kept": batch.kept.clone(),
        })  # fmt: skip
        return real(batch)

    loop.agent.update = update
    return seen


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_places_every_vine_once_and_branches_anywhere(seed):
    plan, random = VinePlan(branches=2, vines=3, length=4), np.random.default_rng(seed)
    found = [plan.labels(30, random) for _ in range(200)]
    for labels in found:
        runs = [(key, len(list(run))) for key, run in itertools.groupby(labels.tolist())]
        assert [run for run in runs if run[0]] == [(number, 4) for number in range(1, 7)]
        assert len(labels) == 30
    assert {int(np.argmax(labels == 1)) for labels in found} == {0, 1, 2}
    with pytest.raises(UserError, match="give at least 26"):
        plan.labels(25, random)


def test_vines_begin_where_their_stretch_stood_and_it_goes_on_from_there(tmp_path):
    loop = make_loop(tmp_path, Counting(length=100), steps=72)
    seen = caught(loop)
    progress = loop.run().progress
    assert (progress.agent_steps, progress.env_frames) == (72 * ENVS, 4 * 72 * ENVS)
    assert len(seen) == 3
    expected = 0
    for rollout in seen:
        labels = rollout["vine"][:, 0].tolist()
        steps = rollout["before"]["state"].view(24, ENVS, 2)[:, :, 1]
        at = 0
        for row, label in enumerate(labels):
            if label == 0:
                assert steps[row].tolist() == [expected] * ENVS, "ordinary steps know of no vine"
                expected += 1
                at = 0
            else:
                at = at if row and label == labels[row - 1] else 0
                assert steps[row].tolist() == [expected + at] * ENVS
                at += 1
        torch.testing.assert_close(
            rollout["after"]["state"], rollout["before"]["state"] + torch.tensor([0.0, 1.0])
        )
        ends = [row for row in range(23) if labels[row] != labels[row + 1] and labels[row] != 0]
        cut = [row for row in range(23) if rollout["truncated"][row].all()]
        assert cut == ends, "what is before a jump ends like at a time limit, and nothing else does"


@pytest.mark.parametrize("terminates", [True, False])
def test_a_vines_episode_is_its_own_and_time_limits_are_no_ends(terminates, tmp_path):
    loop = make_loop(tmp_path, Counting(length=5, terminates=terminates), steps=96)
    seen = caught(loop)
    loop.run()
    short = 0
    for rollout in seen:
        vines, ended = rollout["vines"], rollout["terminated"] | rollout["truncated"]
        assert vines.whole.all()
        for (v, n), last in np.ndenumerate(vines.last):
            first = vines.first[v]
            assert rollout["vine"][first, n] == v + 1
            assert not ended[first:last, n].any()
            assert last == first + 2 or ended[last, n]
            short += last < first + 2
            assert bool(rollout["terminated"][last, n]) <= terminates
            assert vines.start[v, n] == v // 3 * ENVS + n
    assert short > 5


def test_a_vine_that_lost_its_worker_is_in_no_set(tmp_path):
    drops = frozenset({(step, 1) for step in range(1, 25, 5)})
    loop = make_loop(tmp_path, Counting(length=100, drops=drops))
    seen = caught(loop)
    loop.run()
    rollout, vines = seen[0], seen[0]["vines"]
    for (v, n), whole in np.ndenumerate(vines.whole):
        rows = slice(vines.first[v], vines.first[v] + 3)
        assert whole == rollout["kept"][rows, n].all()
    assert vines.whole[:, 0].all()
    assert not vines.whole[:, 1].all()
    members, start = loop.agent._draw_sets(vines)
    assert vines.whole.reshape(-1)[members].all()
    assert all(len(set(vines.start.reshape(-1)[row])) == 1 for row in members)
    assert (vines.start.reshape(-1)[members[:, 0]] == start).all()


@pytest.mark.parametrize("observation", ["pixels", "state"])
def test_real_tasks_are_put_back_exactly_stack_included(observation, tmp_path):
    """What is seen at the begin of every vine, three frames of it, is what its stretch saw."""
    vector = envs.make_vec("toy/catch", 2, size=24, seed=0, observation=observation, frame_stack=3)
    loop = make_loop(tmp_path, vector, steps=72)
    seen = caught(loop)
    loop.run()
    vector.close()
    pairs = 0
    for rollout in seen:
        vines = rollout["vines"]
        before = rollout["before"][observation].unflatten(0, (24, 2))
        for branch in range(2):
            begins = [before[vines.first[3 * branch + v]] for v in range(3)]
            assert all(torch.equal(begins[0], other) for other in begins[1:])
            stacks = begins[0]
            if observation == "pixels":
                pairs += int((stacks[:, :3] != stacks[:, -3:]).any())
    assert observation == "state" or pairs > 2, "branches in the middle of episodes"


def interrupted(folder: Path, at: int, steps: int, **keywords):
    """Train with an interruption after `at` steps, in new objects; return the final loop."""
    first = make_loop(folder, vector=keywords["vector"](), steps=at)
    first.run()
    close(first)
    second = make_loop(folder, vector=keywords["vector"](), steps=steps)
    second.resume(second.checkpoints.load(replay=second.replay))
    second.run()
    return second


def close(loop: VineLoop) -> None:
    getattr(loop.envs, "close", lambda: None)()


@pytest.mark.parametrize("at", [1, 5, 9, 14, 20, 23, 24, 31])
def test_a_run_that_is_interrupted_anywhere_goes_on_bit_for_bit(at, tmp_path):
    def vector():
        return envs.make_vec("toy/goals", 2, size=24, seed=0, observation="state", episode_length=9)

    whole = make_loop(tmp_path / "whole", vector=vector(), steps=60)
    whole.run()
    parts = interrupted(tmp_path / "parts", at, 60, vector=vector)
    ours, theirs = (loop.checkpoints.load(replay=loop.replay) for loop in (whole, parts))
    for tree in (ours, theirs):
        tree["progress"].pop("wall_seconds")
    assert difference(ours, theirs) is None
    for loop in (whole, parts):
        close(loop)


def test_without_the_states_of_environments_a_resumed_run_begins_a_new_rollout(tmp_path):
    first = make_loop(tmp_path, steps=11, exact_resume=False)
    first.run()
    second = make_loop(tmp_path, steps=48, exact_resume=False)
    second.resume(second.checkpoints.load(replay=second.replay))
    assert second.replay.steps == 0
    seen = caught(second)
    second.run()
    assert len(seen) == 1
    assert seen[0]["vines"].whole.all()


def test_a_task_that_cannot_be_put_back_is_refused_in_one_line(tmp_path):
    class Opaque(Counting):
        def get_state(self):
            raise NotImplementedError("nothing to see")

    for exact in (True, False):
        with pytest.raises(UserError, match="choose another agent or task") as refused:
            make_loop(tmp_path, Opaque(), exact_resume=exact).begin()
        assert "\n" not in str(refused.value)


def test_a_task_that_tells_no_behavior_is_refused_where_it_is_needed(tmp_path):
    vector = envs.make_vec("toy/reach", 2, seed=0, observation="state", episode_length=4)
    config = PolychromicConfig(**{**vars(TINY), "behavior": "told"})
    with pytest.raises(UserError, match="--behavior ended"):
        make_loop(tmp_path, vector, config=config).run()
    vector.close()


def test_told_behaviors_are_those_of_the_task_and_the_newest_counts(tmp_path):
    vector = envs.make_vec("toy/goals", 4, seed=0, observation="state")
    changes = {"behavior": "told", "vine_length": 20, "rollout_length": 130}
    config = PolychromicConfig(**{**vars(TINY), **changes})
    loop = make_loop(tmp_path, vector, config=config, steps=130)
    found = []
    real = loop.agent.update

    def update(batch):
        vines = Vines.of(batch, loop.agent.vines)
        behavior = BEHAVIORS["told"](batch, vines, 0.1)
        for (v, n), goal in np.ndenumerate(behavior):
            last = int(vines.last[v, n])
            place = torch.tensor([last * 4 + n])
            x, y = batch.next_observation(place)["state"][0].tolist()
            reached = batch.terminated[last, n]
            assert (goal >= 0) == bool(reached)
            if reached:
                assert goal == (int(x > 0) if abs(x) > abs(y) else 2 + int(y > 0))
        found.append(behavior)
        return real(batch)

    loop.agent.update = update
    loop.run()
    vector.close()
    assert (found[0] >= 0).any()
    assert (found[0] < 0).any()


def test_cells_tell_apart_where_a_trajectory_ended_and_where_it_went(tmp_path):
    class Walks(Counting):
        """The state is where the actions' first parts have led."""

        single_action_space = ACTION

        def step_wait(self):
            result = super().step_wait()
            self.place = getattr(self, "place", np.zeros(ENVS)) + np.sign(self.actions[-1][:, 0])
            state = np.stack([self.place, np.zeros(ENVS)], 1).astype(np.float32)
            return (state, *result[1:])

        def get_state(self):
            return super().get_state() | {"place": getattr(self, "place", np.zeros(ENVS)).copy()}

        def set_state(self, state):
            super().set_state(state)
            self.place = state["place"].copy()

    loop = make_loop(tmp_path, Walks(length=1000))
    found = []
    real = loop.agent.update

    def update(batch):
        vines = Vines.of(batch, loop.agent.vines)
        for name, of in (("ended", lambda way: way[-1]), ("visited", frozenset)):
            behavior = BEHAVIORS[name](batch, vines, 1.0)
            keys = {}
            for (v, n), last in np.ndenumerate(vines.last):
                index = torch.arange(vines.first[v], last + 1) * ENVS + n
                way = batch.observation(index)["state"][:, 0].tolist()
                way.append(batch.next_observation(index[-1:])["state"][0, 0].item())
                assert keys.setdefault(behavior[v, n], of(way)) == of(way)
            assert len(set(keys.values())) == len(keys) > 1
        found.append(True)
        return real(batch)

    loop.agent.update = update
    loop.run()
    assert found


def test_diversity_is_the_share_of_different_behaviors():
    rng = np.random.default_rng(0)
    sets = rng.integers(-1, 3, (200, 4))
    expected = [len({b for b in row if b >= 0}) / 4 for row in sets.tolist()]
    np.testing.assert_allclose(diversity(sets), expected)
    value, members = rng.random(30), rng.integers(0, 30, (50, 4))
    behavior = rng.integers(-1, 3, 30)
    score, spread = set_scores(value, behavior, members)
    for row, one, share in zip(members, score, spread, strict=True):
        assert share == len({b for b in behavior[row] if b >= 0}) / 4
        assert one == pytest.approx(sum(value[i] for i in row) / 4 * share)


@pytest.mark.parametrize("scale_reward", [False, True])
def test_advantages_of_sets_stand_in_the_window_and_ppos_everywhere_else(scale_reward, tmp_path):
    """Against a loop over trajectories, with the sets that the agent drew."""
    vector = envs.make_vec("toy/catch", 3, seed=0, observation="state", episode_length=11)
    changes = {
        "lowest_return": -1.0,
        "highest_return": 3.0,
        "scale_reward": scale_reward,
        "set_weight": 2.0,
    }
    config = PolychromicConfig(**{**vars(TINY), **changes})
    loop = make_loop(tmp_path, vector, config=config, steps=48)
    agent, checked = loop.agent, []
    real, draw = agent.update, agent._draw_sets

    def update(batch):
        drawn = []
        agent._draw_sets = lambda vines: drawn.append(draw(vines)) or drawn[-1]
        vines = Vines.of(batch, agent.vines)
        unit = agent.rewards.spread.item() if scale_reward else 1.0
        found = agent.credit(batch).advantage.view(24, 3)
        plain = super(PolychromicPPO, agent).credit(batch).advantage.view(24, 3)
        (members, starts), expected = drawn[0], plain.clone()
        behavior = BEHAVIORS["ended"](batch, vines, config.cell).reshape(-1)
        value = np.zeros(vines.last.size)
        for (v, n), last in np.ndenumerate(vines.last):
            first, total = vines.first[v], 0.0
            for i, row in enumerate(range(first, last + 1)):
                total += 0.9**i * batch.reward[row, n].item()
            if not batch.terminated[last, n]:
                after = batch.next_observation(torch.tensor([last * 3 + n]))
                following = agent.network(after)[1].item() * unit
                total += 0.9 ** (last + 1 - first) * following
            value[v * 3 + n] = min(max((total + 1) / 4, 0), 1)
        scores = [
            np.mean(value[row]) * len(set(behavior[row].tolist())) / len(row) for row in members
        ]
        credit = {}
        for v, n in np.ndindex(vines.last.shape):
            shares = [
                score - np.mean([s for s, b in zip(scores, starts, strict=True) if b == begin])
                for score, begin, row in zip(scores, starts, members, strict=True)
                if v * 3 + n in row
            ]
            if shares:
                credit[v, n] = np.mean(shares)
        spread = plain.std().item() / np.std([*credit.values()], ddof=1)
        for (v, n), mean in credit.items():
            for row in range(vines.first[v], min(vines.first[v] + 1, vines.last[v, n]) + 1):
                expected[row, n] = 2 * spread * mean
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found != plain).any()
        agent._draw_sets = draw
        checked.append(True)
        return real(batch)

    agent.update = update
    loop.run()
    vector.close()
    assert len(checked) == 2


def test_what_follows_a_vines_own_episode_is_not_learned_from(tmp_path):
    loop = make_loop(tmp_path, Counting(length=5), steps=48)
    seen, real = [], loop.agent.minibatches

    def minibatches(experience):
        parts = list(real(experience))
        seen.append((Vines.of(experience, loop.agent.vines), torch.cat(parts).tolist()))
        return iter(parts)

    loop.agent.minibatches = minibatches
    loop.run()
    left_out = 0
    for vines, steps in seen:
        after = {
            row * ENVS + n
            for (v, n), last in np.ndenumerate(vines.last)
            for row in range(last + 1, vines.first[v] + 3)
        }
        assert sorted(steps) == sorted({*range(24 * ENVS)} - after)
        left_out += len(after)
    assert left_out > 5


def test_the_penalty_is_on_the_divergence_from_the_policy_that_acted():
    config = PolychromicConfig(behavior_kl=0.5)
    log_ratio, advantage = torch.linspace(-0.5, 0.5, 7), torch.linspace(-1, 1, 7)
    plain = PolychromicConfig(behavior_kl=0.0).surrogate_loss()(log_ratio, advantage)
    penalty = config.surrogate_loss()(log_ratio, advantage) - plain
    torch.testing.assert_close(penalty, 0.5 * (log_ratio.exp() - 1 - log_ratio))


def test_the_ratio_is_one_at_the_first_inner_step(tmp_path):
    loop = make_loop(tmp_path, steps=48)
    metrics = []
    real = loop.agent.update
    loop.agent.update = lambda batch: metrics.append(real(batch)) or metrics[-1]
    loop.run()
    for row in metrics:
        assert row["ratio/first_deviation"] < 1e-5
        assert 0 <= row["sets/diversity"] <= 1
        assert row["sets/score"].isfinite()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("branches", 0),
        ("vines", 2),
        ("sets", 1),
        ("set_size", 1),
        ("set_size", 8),
        ("set_size", 9),
        ("window", -1),
        ("cell", 0.0),
        ("behavior", "tld"),
        ("lowest_return", 2.0),
        ("highest_return", math.nan),
        ("behavior_kl", -0.1),
        ("set_weight", -1.0),
        ("memory_size", 8),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UserError, match=field) as refused:
        PolychromicConfig(**{field: value})
    assert "\n" not in str(refused.value)


def test_the_least_that_refusals_recommend_runs_and_its_sets_say_something(tmp_path):
    """Sets of all vines, and a set alone, would turn the method off without a word."""
    with pytest.raises(UserError, match="give at most 2") as refused:
        PolychromicConfig(vines=3, set_size=3)
    assert "more vines" in str(refused.value)
    least = PolychromicConfig(**{**vars(TINY), "vines": 3, "set_size": 2, "sets": 2})
    loop = make_loop(tmp_path, config=least, steps=120)
    agent, differ = loop.agent, []
    real = agent.update

    def update(batch):
        credit = agent.credit(batch).advantage
        differ.append((credit != super(PolychromicPPO, agent).credit(batch).advantage).any().item())
        return real(batch)

    agent.update = update
    loop.run()
    assert len(differ) == 5
    assert any(differ)


def test_a_state_with_no_more_vines_than_a_set_takes_keeps_ppos_advantages(tmp_path):
    """Where workers were lost all sets of a state may be one; their advantage would be 0."""
    drops = frozenset({(step, 1) for step in (3, 14)})
    loop = make_loop(tmp_path, Counting(length=100, drops=drops))
    seen = caught(loop)
    loop.run()
    vines = seen[0]["vines"]
    whole = np.bincount(vines.start[vines.whole], minlength=2 * ENVS)
    assert 2 in whole, "as many as a set takes"
    _, starts = loop.agent._draw_sets(vines)
    assert sorted(set(starts.tolist())) == np.flatnonzero(whole == 3).tolist()


def test_what_a_teacher_remembers_is_put_back_with_the_environments(tmp_path):
    """The agent has no memory here, but who teaches it may have one."""

    class Counts:
        """Counts an episode's steps, and says so."""

        state = None

        def act(self, observation):
            self.state = torch.zeros(ENVS) if self.state is None else self.state + 1
            return np.repeat(self.state.numpy()[:, None], ACTION.shape[0], 1).astype(np.float32)

        def begin(self, begins=None):
            assert begins is None or not begins.any()

    vector = Counting(length=100)
    agent = PolychromicPPO(BOX, ACTION, TINY, num_envs=ENVS)
    fields = {TEACHER_ACTION: step_fields(ACTION)["action"]}
    rollout = Rollout(
        BOX, ACTION, length=24, num_envs=ENVS, extras=agent.extras | fields, jumps=agent.jumps,
        log=lambda _: None,
    )  # fmt: skip
    loop = VineLoop(
        agent, vector, rollout, LoopSettings(steps=72 * ENVS, log_every=10**6, eval_every=0),
        logger=Logger(tmp_path), checkpoints=CheckpointStore(tmp_path), action_repeat=4, seed=7,
        hooks=Hooks(line=lambda _: None),
    )  # fmt: skip
    loop.teacher = Counts()
    told = []
    real = agent.update

    def update(batch):
        everything = torch.arange(24 * ENVS)
        told.append((batch.observation(everything)["state"][:, 1], batch.extras[TEACHER_ACTION]))
        return real(batch)

    agent.update = update
    loop.run()
    assert len(told) == 3
    for steps, advice in told:
        assert advice.flatten(0, 1)[:, 0].tolist() == steps.tolist()
