"""The grid runs what is missing and collects what was measured."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from agents.core.errors import UserError
from experiments import benchmark
from experiments.benchmark import main
from experiments.evaluate import DISTRACTIONS
from experiments.evaluate import main as evaluate_main
from experiments.reporting.runs import read_run
from experiments.running.runs import write_json
from experiments.train import new_config, parser
from tests.experiments.helpers import train


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as handle:
        return list(csv.DictReader(handle))


@pytest.mark.slow
def test_a_grid_is_run_collected_and_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--agents", "drq", "drqv2", "--envs", "toy/reach", "--seeds", "1", "2"]
    words += ["--preset", "debug", "--episodes", "2", "--threads", "1"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    words += ["--archive", str(tmp_path / "kept")]
    assert main([*words, "--", "--steps", "120", "--eval-every", "0"]) == 0
    found = rows(tmp_path / "out" / "results.csv")
    assert len(found) == 2 * 2 * 5, "agents, seeds, four distractions and the random policy"
    assert {row["agent_steps"] for row in found} == {"120"}
    page = (tmp_path / "out" / "results.md").read_text()
    clean = [
        float(r["return_mean"]) for r in found if (r["agent"], r["distraction"]) == ("drq", "clean")
    ]
    assert f"| {sum(clean) / 2:.0f} ± " in page
    assert all(0 < float(r["saliency_energy"]) < 1 for r in found if r["distraction"] == "clean")
    log = tmp_path / "runs" / "toy-reach" / "drq-seed1" / "metrics.csv"
    before = log.read_bytes()
    assert main([*words, "--", "--steps", "120", "--eval-every", "0"]) == 0
    assert log.read_bytes() == before

    shutil.rmtree(tmp_path / "runs")
    assert main([*words, "--", "--steps", "120", "--eval-every", "0"]) == 0
    assert rows(tmp_path / "out" / "results.csv") == found, "the archive is enough"
    assert not list((tmp_path / "runs").rglob("config.json"))
    run = read_run(tmp_path / "kept" / "toy-reach" / "drq-seed1")
    assert run.evaluation is not None
    assert set(run.evaluation.results) == set(DISTRACTIONS)
    assert "train/episode_return" in run.series


def test_nothing_to_collect_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--agents", "sac", "--seeds", "1", "--collect", "--runs", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "no run of this grid was evaluated" in capsys.readouterr().err


def test_a_run_with_other_settings_is_not_taken_for_this_grids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "toy-reach" / "drq-seed1"
    words = ["--agent", "drq", "--env", "toy/reach", "--seed", "1", "--preset", "debug"]
    config = new_config(vars(parser("drq").parse_args(words)))
    write_json(folder / "config.json", config)
    job = benchmark.Job("drq", "drq", "toy/reach", 1, folder)
    benchmark.check_same(job, ["--preset", "debug"], 10, ["clean"])
    write_json(folder / "config.json", config | {"reward": "success"})
    with pytest.raises(UserError, match=r"other settings than these.*reward: 'success' and 'task'"):
        benchmark.check_same(job, ["--preset", "debug"], 10, ["clean"])
    write_json(folder / "config.json", {k: v for k, v in config.items() if k != "reward"})
    benchmark.check_same(job, ["--preset", "debug"], 10, ["clean"])
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match=r"other settings than these.*train/steps"):
        benchmark.check_same(job, ["--preset", "debug", "--steps", "4000"], 10, ["clean"])
    older = json.loads(json.dumps(config))  # of a version that did not have these
    del older["env"]["action_chunk"], older["configs"]["SACConfig"]["reward_scale"]
    write_json(folder / "config.json", older)
    benchmark.check_same(job, ["--preset", "debug"], 10, ["clean"])
    with pytest.raises(UserError, match=r"other settings.*action_chunk"):
        benchmark.check_same(job, ["--preset", "debug", "--action-chunk", "2"], 10, ["clean"])
    kept = tmp_path / "kept"
    write_json(kept / "config.json", config)
    result = {"episodes_per_distraction": 2, "results": {"clean": {}}}
    write_json(kept / "evaluations" / "benchmark.json", result)
    job = benchmark.Job("drq", "drq", "toy/reach", 1, folder, kept)
    benchmark.check_same(job, ["--preset", "debug"], 2, ["clean"])
    with pytest.raises(UserError, match="evaluated in 2 episodes each of clean"):
        benchmark.check_same(job, ["--preset", "debug"], 2, ["clean", "video_hard"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--agents drq drq", "--agents names one of"),
        ("--agents drq --seeds 1 1", "--seeds names one of"),
        ("--agents drq --seeds 1", "also holds sac on toy/reach, seed 1"),
    ],
)
def test_numbers_of_another_grid_are_neither_doubled_nor_replaced(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.csv").write_text("env,agent,seed\ntoy/reach,sac,1\n")
    paths = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert main([*words.split(), "--envs", "toy/reach", *paths]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text().endswith("sac,1\n")


def test_a_variant_is_an_agent_with_flags_and_a_name_of_its_own(tmp_path: Path) -> None:
    words = ["--agents", "a2c", "--variant", "ppo-wide", "ppo --clip 0.4", "--envs", "toy/reach"]
    words += ["--seeds", "1", "--preset", "debug", "--episodes", "1", "--distractions", "clean"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    tiny = ["--steps", "24", "--rollout-length", "12", "--epochs", "1", "--eval-every", "0"]
    assert main([*words, "--archive", str(tmp_path / "kept"), "--", *tiny]) == 0
    assert {row["agent"] for row in rows(tmp_path / "out" / "results.csv")} == {"a2c", "ppo-wide"}
    folder = tmp_path / "kept" / "toy-reach" / "ppo-wide-seed1"
    config = json.loads((folder / "config.json").read_text())
    assert config["agent"] == "ppo"
    assert config["configs"]["PPOConfig"]["clip"] == 0.4
    assert read_run(folder).agent == "ppo-wide"
    words[4] = "ppo --clip 0.3"
    with pytest.raises(UserError, match=r"other settings than these.*clip"):
        run_again(words, tmp_path, tiny)


def run_again(words: list[str], folder: Path, flags: list[str]) -> None:
    arguments = benchmark.parser().parse_args(
        [*words, "--archive", str(folder / "kept"), "--", *flags]
    )
    benchmark.run_grid(benchmark.grid(arguments), arguments)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --agents, or a --variant"),
        (["--agents", "ppo", "--variant", "ppo", "ppo --clip 0.4"], "two methods are called 'ppo'"),
        (["--variant", "a/b", "ppo"], "cannot be called 'a/b'"),
        (["--variant", "wide", "pppo --clip 0.4"], "did you mean ppo"),
        (["--variant", "wide", "ppo --clip '0.4"], "close its quotes"),
    ],
)
def test_bad_variants_are_said_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_unknown_agents_and_tasks_are_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--agents", "sgqm"]) == 2
    assert "did you mean sgqn" in capsys.readouterr().err
    assert main(["--agents", "sgqn", "--envs", "dmc/walker-wak"]) == 2
    assert "dmc/walker-walk" in capsys.readouterr().err


def test_a_run_that_was_stopped_is_not_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(benchmark, "run_logged", lambda command, log: asked.append(command[2]) or 0)
    monkeypatch.setattr(benchmark, "steps_left", lambda run: 5)
    job = benchmark.Job("drq", "drq", "toy/reach", 1, tmp_path / "run")
    assert benchmark.run_job(job, [], [], 1, ["clean"]) == benchmark.STOPPED
    assert asked == ["experiments.train"]


def test_an_evaluation_that_is_there_is_kept_until_another_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("drq", "toy/reach", tmp_path / "runs" / "drq-seed1", steps=12, episode_length=6)
    asked: list[str] = []

    def evaluate(command: list[str], log: Path) -> int:
        asked.append(command[2])
        return evaluate_main(command[3:])

    monkeypatch.setattr(benchmark, "run_logged", evaluate)
    job = benchmark.Job("drq", "drq", "toy/reach", 1, run, tmp_path / "kept" / "drq-seed1")
    job.archive.parent.mkdir()
    assert benchmark.run_job(job, [], [], 2, ["clean"]) == 0
    assert asked == ["experiments.evaluate"]
    size = sum(file.stat().st_size for file in job.archive.rglob("*") if file.is_file())
    assert f"archived, {size / 1e3:,.0f} KB" in capsys.readouterr().out
    overlays = sorted(file.name for file in (job.archive / "evaluations" / "benchmark").iterdir())
    assert overlays == ["clean_saliency.png"], "the pictures of where it looks, and no films"
    found = read_run(job.archive).evaluation
    assert found is not None
    assert set(found.saliency) == {"clean"}

    again = benchmark.Job("drq", "drq", "toy/reach", 1, run)
    assert benchmark.run_job(again, [], [], 2, ["clean"]) == 0
    assert asked == ["experiments.evaluate"], "nothing is left to do"
    for episodes, distractions in ((3, ["clean"]), (3, ["clean", "color_hard"])):
        asked.clear()
        assert benchmark.run_job(again, [], [], episodes, distractions) == 0
        assert asked == ["experiments.evaluate"]
    file = run / "evaluations" / "benchmark.json"
    for name, value in (("checkpoint", "step-000000008"), ("split", "train"), ("videos", "/old")):
        asked.clear()
        write_json(file, json.loads(file.read_text()) | {name: value})
        assert benchmark.run_job(again, [], [], 3, ["clean", "color_hard"]) == 0
        assert asked == ["experiments.evaluate"], name
