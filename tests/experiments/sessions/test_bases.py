"""`train --base RUN`: a policy that imitates goes on by reinforcement learning; what is kept, and what refused."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import Policy
from agents.core.errors import UserError
from agents.policy import read_config
from agents.registry import AGENTS
from experiments import benchmark, collect, imitate
from experiments.evaluate import evaluate_run
from experiments.report import build_report
from experiments.sessions.bases import begin_from_base, find_base
from experiments.train import main
from tests.experiments.helpers import (
    arguments,
    as_arguments,
    assert_same_run,
    refused_by,
    resume,
    train,
)

pytest.importorskip("minari")
NAMES = sorted(name for name, spec in AGENTS.items() if spec.fine_tunes)
TASK = {"observation": "state", "episode_length": 12}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that imitate an expert in toy/reach: by a flow, by a diffusion, by a Gaussian."""
    folder = tmp_path_factory.mktemp("bases")
    words = {
        "--expert": True, "--env": "toy/reach", "--size": 24, "--observation": "both", "--frame-stack": 1,
        "--episode-length": 12, "--episodes": 3, "--root": folder / "data",
    }  # fmt: skip
    assert collect.main(["reach/expert-v0", *as_arguments(words)]) == 0
    for agent in ("flow-policy", "diffusion-policy", "bc"):
        flags = {
            "--agent": agent, "--dataset": "reach/expert-v0", "--root": folder / "data", "--run-dir": folder / agent,
            "--preset": "debug", "--device": "cpu", "--threads": 1, "--seed": 3, "--steps": 8, "--log-every": 4,
            "--eval-every": 0, "--checkpoint-every": 4, "--action-chunk": 3, "--horizon": 4, "--observation": "state",
        }  # fmt: skip
        assert imitate.main(as_arguments(flags)) == 0
    return folder


refused = partial(refused_by, main)


@pytest.mark.parametrize("name", NAMES)
def test_from_scratch_a_run_that_is_interrupted_goes_on_exactly(name: str, tmp_path: Path) -> None:
    """In mid-episode and mid-rollout; its policy predicts as many actions as the task executes."""
    flags: dict[str, Any] = TASK | {"num_envs": 2, "action_chunk": 3}
    whole = train(name, "toy/reach", tmp_path / "whole", steps=40, **flags)
    parts = train(name, "toy/reach", tmp_path / "parts", steps=26, **flags)
    resume(parts, steps=40)
    assert_same_run(whole, parts)
    assert read_config(whole)["configs"]["DenoisingConfig"]["horizon"] == 3


@pytest.mark.parametrize("base", ["flow-policy", "diffusion-policy"])
@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_from_its_base(name: str, base: str, runs: Path, tmp_path: Path) -> None:
    """The task's settings and the network are the base's; resumed, the base may be gone."""
    copied = tmp_path / "base"
    shutil.copytree(runs / base, copied)
    flags: dict[str, Any] = {"num_envs": 2, "base": copied}
    begun = train(name, "toy/reach", tmp_path / "begun", steps=2, **flags)
    config = read_config(begun)
    assert config["env"]["action_chunk"] == 3
    assert config["env"]["observation"] == "state"
    assert config["configs"]["DenoisingConfig"]["horizon"] == 4
    assert config["base"]["run"] == str(copied)
    assert len(config["base"]["digest"]) == 64
    ours, theirs = Policy.load(begun).agent, Policy.load(copied).agent
    learned, weights = ours.policy.state_dict(), theirs.average.module.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(value, learned[key]) for key, value in weights.items()), (
        "before an update"
    )
    whole = train(name, "toy/reach", tmp_path / "whole", steps=40, **flags)
    parts = train(name, "toy/reach", tmp_path / "parts", steps=26, **flags)
    shutil.rmtree(copied)
    resume(parts, steps=40)
    assert_same_run(whole, parts)
    learned = Policy.load(whole).agent.policy.state_dict()  # type: ignore[attr-defined]
    assert any(not torch.equal(value, learned[key]) for key, value in weights.items())
    file = evaluate_run(whole, distractions=["clean"], episodes=2, workers=0, media=False)
    assert len(json.loads(file.read_text())["results"]["clean"]["returns"]) == 2


def test_a_fine_tuned_run_is_a_base_too(runs: Path, tmp_path: Path) -> None:
    first = train("reinflow", "toy/reach", tmp_path / "a", steps=26, base=runs / "flow-policy")
    second = train("dppo", "toy/reach", tmp_path / "b", steps=2, base=first, denoising_steps=5)
    config = read_config(second)["configs"]["DenoisingConfig"]
    assert config["denoising_steps"] == 5, "how it draws may be changed"
    assert config["path"] == "flow"


def test_half_a_chain_is_no_base(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first steps are its own base's: alone, the fine-tuned network is not the policy that was learned."""
    flags = {"base": runs / "flow-policy", "denoising_steps": 2, "fine_tuned_steps": 1}
    half = train("dppo", "toy/reach", tmp_path / "half", steps=2, **flags)
    words = arguments("dppo", "toy/reach", tmp_path / "on", steps=2, base=half)
    assert "learned the last 1 of its 2 denoising steps" in refused(capsys, words)
    assert not (tmp_path / "on").exists()


def asked(policy: Policy) -> dict[str, list[float]]:
    """Return the times at which a DPPO policy asks its base and its fine-tuned network for one action."""
    times: dict[str, list[float]] = {"base": [], "policy": []}
    for name, seen in times.items():
        network = getattr(policy.agent, name).denoiser
        network.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(float(x[1][0])))
    assert policy.act(np.zeros(4, np.float32)).shape == (3, 2)
    return {name: [round(t, 3) for t in seen] for name, seen in times.items()}


def test_a_chain_of_other_steps_hands_over_at_the_noise_level_that_was_learned(
    runs: Path, tmp_path: Path
) -> None:
    """The last 2 of 4 steps learned, from t = .5 on; of 10 steps these are the last 5, of 3 the last."""
    flags = {"base": runs / "flow-policy", "denoising_steps": 4, "fine_tuned_steps": 2}
    run = train("dppo", "toy/reach", tmp_path / "run", steps=2, **flags)
    assert asked(Policy.load(run)) == {"base": [1.0, 0.75], "policy": [0.5, 0.25]}
    for steps in (10, 3, 2):
        told = asked(Policy.load(run, acting={"denoising_steps": steps, "start_noise": 0.0}))
        times = [round(1 - i / steps, 3) for i in range(steps)]
        assert told == {
            "base": [t for t in times if t > 0.5],
            "policy": [t for t in times if t <= 0.5],
        }
    with pytest.raises(
        UserError, match="none of these steps is at a noise level that was fine-tuned"
    ):
        Policy.load(run, acting={"denoising_steps": 1})
    whole = train(
        "dppo", "toy/reach", tmp_path / "whole", steps=2, **(flags | {"fine_tuned_steps": 0})
    )
    assert asked(Policy.load(whole, acting={"denoising_steps": 2})) == {
        "base": [],
        "policy": [1.0, 0.5],
    }
    file = evaluate_run(
        run,
        acting=["denoising_steps=2"],
        distractions=["clean"],
        episodes=1,
        workers=0,
        media=False,
    )
    assert json.loads(file.read_text())["acting"] == {"denoising_steps": 2}


def test_how_losses_draw_their_times_is_the_successors_choice(runs: Path, tmp_path: Path) -> None:
    """No weight of the base depends on it; numbers of the base's own distribution are not another's."""
    base = runs / "flow-policy"
    run = train("fpo", "toy/reach", tmp_path / "run", steps=2, base=base, times="logit_normal")
    config = read_config(run)["configs"]["DenoisingConfig"]
    assert (config["times"], config["times_first"], config["times_second"]) == (
        "logit_normal",
        None,
        None,
    )
    flags = {"times": "beta", "times_first": 2.0}
    run = train("fpo", "toy/reach", tmp_path / "beta", steps=2, base=base, **flags)
    config = read_config(run)["configs"]["DenoisingConfig"]
    assert (config["times"], config["times_first"], config["times_second"]) == ("beta", 2.0, None)


@pytest.mark.parametrize(
    ("agent", "flags", "said"),
    [
        ("reinflow", {"rule": "heun"}, "--rule is heun, but reinflow has no use for it"),
        ("reinflow", {"noise_level": 0.5}, "--noise-level is 0.5, but reinflow has no use for it"),
        ("reinflow", {"min_std": 0.1}, "--min-std is 0.1, but reinflow has no use for it"),
        ("fpo", {"inpaint_until": 0.5}, "--inpaint-until is 0.5, but fpo has no use for it"),
        ("gaussian-ppo", {"rule": "heun"}, "--rule is heun, but gaussian-ppo has no use for it"),
        ("gaussian-ppo", {"noise_level": 0.5}, "--noise-level is 0.5, but gaussian-ppo has no"),
        ("gaussian-ppo", {"min_std": 0.1}, "--min-std is 0.1, but gaussian-ppo has no use for it"),
        ("gaussian-ppo", {"start_noise": 1.0}, "--start-noise is 1.0, but gaussian-ppo has no use"),
        ("gaussian-ppo", {"inpaint_until": 0.5}, "--inpaint-until is 0.5, but gaussian-ppo has no"),
    ],
)
def test_flags_that_an_agent_has_no_use_for_are_refused(
    agent: str, flags: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(
        capsys, arguments(agent, "toy/reach", tmp_path / "run", steps=2, **flags)
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"train_steps": 30}, "--train-steps is given, but without --path diffusion it changes"),
        ({"times_first": 2.0}, "--times-first is given, but without other --times than uniform"),
        ({"denoiser": "unet", "width": 16}, "--width is given, but without --denoiser mlp or dit"),
        ({"channels": (8, 8)}, "--channels is given, but without --denoiser unet it changes"),
        ({"heads": 2}, "--heads is given, but without --denoiser dit"),
        ({"denoiser": "dit", "time_features": 8}, "without --denoiser mlp or unet it changes"),
    ],
)
def test_flags_that_count_only_with_others_are_refused_without_them(
    flags: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments("fpo", "toy/reach", tmp_path / "run", steps=2, **flags)
    assert said in refused(capsys, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [{"action_chunk": 26}, {"action_chunk": 14, "action_repeat": 2}])
def test_chunks_longer_than_an_episode_are_refused(
    flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task's own limit counts, too: 25 control steps."""
    flags = {"action_repeat": 1} | flags
    words = arguments("dppo", "toy/reach", tmp_path / "run", steps=2, **flags)
    assert "but an episode of toy/reach ends after" in refused(capsys, words)
    assert not (tmp_path / "run").exists()


def test_reinflow_takes_euler_steps_whatever_its_base_took(runs: Path, tmp_path: Path) -> None:
    base = runs / "diffusion-policy"
    assert read_config(base)["configs"]["DenoisingImitationConfig"]["rule"] == "posterior"
    run = train("reinflow", "toy/reach", tmp_path / "run", steps=2, base=base)
    assert read_config(run)["configs"]["DenoisingConfig"]["rule"] == "euler"


def test_gaussian_ppos_config_tells_of_no_noise_whatever_its_base_had(
    runs: Path, tmp_path: Path
) -> None:
    base = runs / "diffusion-policy"
    assert read_config(base)["configs"]["DenoisingImitationConfig"]["start_noise"] == 1.0
    run = train("gaussian-ppo", "toy/reach", tmp_path / "run", steps=2, base=base)
    config = read_config(run)["configs"]["DenoisingConfig"]
    assert [config[name] for name in ("rule", "noise_level", "min_std", "start_noise")] == [
        "euler", 0.0, 0.0, 0.0,
    ]  # fmt: skip


def test_correlated_noise_needs_demonstrations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments("fpo", "toy/reach", tmp_path / "run", steps=2, noise_correlation=0.5)
    assert "without --base there are none" in refused(capsys, words)
    assert not (tmp_path / "run").exists()


def test_zero_noise_evaluation_is_the_agents_choice(runs: Path, tmp_path: Path) -> None:
    run = train("fpo++", "toy/reach", tmp_path / "run", steps=2, base=runs / "flow-policy")
    policy, seen = Policy.load(run), np.zeros(4, np.float32)
    np.testing.assert_array_equal(policy.act(seen), policy.act(seen))


@pytest.mark.parametrize(
    ("base", "env", "flags", "said"),
    [
        ("bc", "toy/reach", {}, "'bc', whose policy does not denoise"),
        ("data", "toy/reach", {}, "is no run folder"),
        ("flow-policy", "toy/balance", {}, "observes float32 [4], this task float32 [2]"),
        ("flow-policy", "toy/reach", {"observation": "pixels"}, "this task uint8 [9, 24, 24]"),
        ("flow-policy", "toy/reach", {"action_chunk": 5}, "predicts 4 actions at once, but the task executes chunks of "
         "5; lower --action-chunk, or give a base"),
        ("flow-policy", "toy/reach", {"width": 48}, "--width is 48, but the base's weights are of 32"),
        ("flow-policy", "toy/reach", {"horizon": 8}, "--horizon is 8, but the base's weights are of 4"),
    ],
)  # fmt: skip
def test_a_base_that_does_not_fit_is_one_line(
    base: str, env: str, flags: dict[str, Any], said: str, runs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = {"frame_stack": 3, "base": runs / base} | flags
    assert said in refused(capsys, arguments("dppo", env, tmp_path / "run", steps=20, **flags))
    assert not (tmp_path / "run").exists()


def test_other_actions_and_a_base_that_has_changed_are_one_line(runs: Path, tmp_path: Path) -> None:
    run = train("fpo", "toy/reach", tmp_path / "run", steps=2, base=runs / "flow-policy")
    config, agent = read_config(run), Policy.load(run).agent
    begin_from_base(agent, config, config["spaces"])
    other = config["spaces"] | {"action": config["spaces"]["action"] | {"box": [3, 7]}}
    with pytest.raises(UserError, match=r"acts in float32 \[2\], this task float32 \[7\]"):
        begin_from_base(agent, config, other)
    chunks = config["spaces"] | {"action": config["spaces"]["action"] | {"box": [4, 2]}}
    begin_from_base(agent, config, chunks)
    config["base"]["digest"] = "0" * 64
    with pytest.raises(UserError, match="has changed since"):
        begin_from_base(agent, config, config["spaces"])


def test_a_base_that_was_trained_on_since_is_begun_with_as_it_was(
    runs: Path, tmp_path: Path
) -> None:
    """The checkpoint that the config names is loaded, not the newest one."""
    base = tmp_path / "base"
    shutil.copytree(runs / "flow-policy", base)
    later = base / "checkpoints" / "step-000000008"
    shutil.move(later, tmp_path / "later")
    run = train("fpo", "toy/reach", tmp_path / "run", steps=2, base=base)
    config, agent = read_config(run), Policy.load(run).agent
    assert config["base"]["checkpoint"] == "step-000000004"
    shutil.move(tmp_path / "later", later)
    begin_from_base(agent, config, config["spaces"])
    named = find_base(base, checkpoint="step-000000004").policy.state_dict()
    newest = find_base(base).policy.state_dict()
    ours = agent.policy.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(ours[name], value) for name, value in named.items())
    assert any(not torch.equal(ours[name], value) for name, value in newest.items())


def test_an_agent_without_a_denoising_policy_has_no_base(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments("ppo", "toy/reach", tmp_path / "run", base=runs / "flow-policy")
    assert "--base" in refused(capsys, words)


def grid_words(runs: Path, tmp_path: Path, *more: object) -> list[str]:
    places = {"runs": tmp_path / "runs", "out": tmp_path / "out", "archive": tmp_path / "kept"}
    words = ["--base", runs / "flow-policy", "--agents", "gaussian-ppo", "dppo", "--seeds", 1]
    words += [word for name, place in places.items() for word in (f"--{name}", place)]
    words += ["--preset", "debug", "--episodes", 2, "--distractions", "clean", "--threads", 1]
    return [str(word) for word in (*words, *more)]


@pytest.mark.parametrize(
    ("methods", "wanted"),
    [
        (["--agents", "dppo", "fpo"], False),
        (["--agents", "dppo", "fpo++"], True),
        (["--variant", "quiet", "fpo --start-noise 0"], True),
        (["--agents", "fpo++", "--", "--start-noise", "1"], False),
        (["--agents", "resfit"], False),
    ],
)
def test_a_base_is_evaluated_from_zero_noise_where_an_agent_is(
    methods: list[str], wanted: bool, runs: Path
) -> None:
    given = benchmark.parser().parse_args(["--base", str(runs / "flow-policy"), *methods])
    base = benchmark.base_job(given)
    given.envs = [base.env]
    assert benchmark.grid(given, base)[0].zero_noise is wanted
    if wanted:
        assert set(replace(base, zero_noise=True).evaluations) == {
            "benchmark",
            "benchmark-zero-noise",
        }
        assert not benchmark.draws_from_noise(replace(base, agent="bc", folder=runs / "bc"))


def test_a_grid_begins_with_the_base_and_gives_it_to_all_others(runs: Path, tmp_path: Path) -> None:
    given = benchmark.parser().parse_args(grid_words(runs, tmp_path))
    base = benchmark.base_job(given)
    assert (base.label, base.env, base.seed) == ("flow-policy", "toy/reach", 3)
    given.envs = [base.env]
    first, *others = benchmark.grid(given, base)
    assert first == replace(base, zero_noise=True), "gaussian-ppo acts so"
    assert [job.label for job in others] == ["gaussian-ppo", "dppo"]
    assert {job.flags for job in others} == {("--base", str(runs / "flow-policy"))}
    assert base.archive == tmp_path / "kept" / "toy-reach" / "flow-policy"
    benchmark.check_same(base, [], 2, ["clean"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--envs", "toy/goals"], "is of toy/reach; leave out --envs"),
        (["--variant", "flow-policy", "dppo"], "the base is called 'flow-policy'"),
        (["--base", "nowhere"], "'nowhere' is no run folder"),
    ],
)
def test_a_grid_whose_base_does_not_fit_is_one_line(
    more: list[str], said: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(grid_words(runs, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_base_that_is_not_trained_is_told(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    shutil.copytree(runs / "flow-policy", half)
    shutil.rmtree(half / "checkpoints" / "step-000000008")
    assert benchmark.main(grid_words(runs, tmp_path, "--base", half)) == 2
    assert "lacks 4 of its steps" in capsys.readouterr().err


@pytest.mark.slow
def test_a_grid_from_a_base_is_run_archived_and_reported(runs: Path, tmp_path: Path) -> None:
    flags = ["--", "--steps", "40", "--eval-every", "0", "--num-envs", "2", "--rollout-length", "8"]
    words = grid_words(runs, tmp_path, *flags)
    assert benchmark.main(words) == 0
    kept = tmp_path / "kept" / "toy-reach"
    names = ["dppo-seed1", "flow-policy", "gaussian-ppo-seed1"]
    assert sorted(folder.name for folder in kept.iterdir()) == names
    with (tmp_path / "out" / "results.csv").open() as handle:
        agents = {row["agent"] for row in csv.DictReader(handle)}
    assert agents == {"flow-policy", "flow-policy (zero noise)", "dppo", "gaussian-ppo"}
    before = (kept / "flow-policy" / "evaluations" / "benchmark.json").read_bytes()
    shutil.rmtree(tmp_path / "runs")
    assert benchmark.main(words) == 0, "the archive is enough"
    assert (kept / "flow-policy" / "evaluations" / "benchmark.json").read_bytes() == before
    report = build_report([tmp_path / "kept"], tmp_path / "report")
    assert "flow-policy (base)" in report.read_text()
    with (tmp_path / "report" / "fine_tuning.csv").open() as handle:
        told = {row["policy"]: row["base"] for row in csv.DictReader(handle)}
    without = "flow-policy (base, zero noise)"
    assert told == {
        "flow-policy (base)": "", without: "", "dppo": "flow-policy (base)", "gaussian-ppo": without,
    }  # fmt: skip
    result = json.loads((kept / "flow-policy" / "evaluations" / "benchmark.json").read_text())
    digest = read_config(kept / "dppo-seed1")["base"]["digest"]
    assert digest in result["weights"], "by which the report knows the base"
    missing = kept / "flow-policy" / "evaluations" / "benchmark-zero-noise.json"
    missing.unlink()  # as an older grid kept it
    assert benchmark.main(words) == 0
    assert json.loads(missing.read_text())["acting"] == {"start_noise": 0.0}
