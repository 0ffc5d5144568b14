"""A grid of fine-tuning methods: what it runs, refuses and goes on with, at what budget, and what its tables say."""

import csv
import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from agents.core.errors import UserError
from agents.generative_models.methods import METHODS
from experiments import benchmark_generators, finetune_generator
from experiments.benchmark_generators import (
    choose_methods,
    grid,
    main,
    parser,
    run_job,
)
from experiments.generators import runs
from experiments.generators.grid_archive import in_few_colors, without_folders
from experiments.generators.grid_checks import check_same, try_out
from experiments.generators.steering import STEERING
from experiments.running.jobs import STOPPED
from experiments.running.runs import write_json
from tests.experiments.generator_base import write_base

IMAGES = 2 * 3
"""Of an iteration of the preset debug."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("of-this-machine") / "base")


@pytest.fixture
def commands(monkeypatch):
    """Run in this process what else would be processes, and return their command lines."""
    ran = []

    def run(command, log):
        ran.append(command)
        return finetune_generator.main(command[3:])

    def one_by_one(jobs, run_one, workers):
        return [job for job in jobs if run_one(job)]

    monkeypatch.setattr(benchmark_generators, "run_logged", run)
    monkeypatch.setattr(benchmark_generators, "run_jobs", one_by_one)
    return ran


def words(base, folder, *more, methods="flow-grpo best-of-n", seeds="1"):
    return [
        "--base", str(base), "--methods", *methods.split(), "--seeds", *seeds.split(), "--preset", "debug",
        "--reward", "symmetry", "--gold", "brightness", "--threads", "1", "--runs", str(folder / "runs"),
        "--out", str(folder / "out"), *map(str, more),
    ]  # fmt: skip


def jobs_of(base, folder, *more, **options):
    arguments = parser().parse_args(words(base, folder, *more, **options))
    return grid(arguments, choose_methods(arguments)[0])


def rows(file):
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_a_grid_is_run_within_its_budget_archived_and_not_run_again(
    base, tmp_path, commands, capsys
):
    given = words(base, tmp_path, "--archive", tmp_path / "kept", "--max-rewards", 2 * IMAGES + 1)
    given += ["--variant", "wide", "flow-grpo --noise-level 0.9"]
    given += ["--", "--learning-rate", "0.01", "--patience", "0"]
    assert main(given) == 0
    assert "archived" in capsys.readouterr().out
    assert len(commands) == 3
    found = {row["method"]: row for row in rows(tmp_path / "out" / "results.csv")}
    assert list(found) == ["flow-grpo", "best-of-n", "wide"]
    for name in ("flow-grpo", "wide"):
        assert int(found[name]["rewards"]) == 2 * IMAGES
        assert float(found[name]["kl"]) >= 0
        assert float(found[name]["last_kl"]) > 0
    assert int(found["best-of-n"]["rewards"]) == int(found["best-of-n"]["images"]) * 8
    configs = [
        json.loads((tmp_path / "kept" / f"{name}-seed1" / "config.json").read_text())
        for name in found
    ]
    for name in ("prompts", "monitored", "held_out", "seeds"):
        assert configs[0][name] == configs[1][name] == configs[2][name]
    before = {
        name: [row["by_prompt"]["before"] for row in report_of(tmp_path, name)["rewards"]]
        for name in found
    }
    assert before["flow-grpo"] == before["wide"] == before["best-of-n"]
    page = (tmp_path / "out" / "results.md").read_text()
    for said in (
        "## The last checkpoint", "## Steering at inference", "| the base's values |", f"{2 * IMAGES + 1} rewards",
        "Command: `", "Runs' commits: ",
    ):  # fmt: skip
        assert said in page
    assert (tmp_path / "out" / "gains.png").stat().st_size > 1000
    for file in (tmp_path / "kept").rglob("*.json"):
        assert "of-this-machine" not in file.read_text(), file
        assert str(tmp_path) not in file.read_text(), file
    kept = sorted(file.name for file in (tmp_path / "kept" / "wide-seed1").rglob("*.*"))
    assert kept == [
        "after.png", "before.png", "config.json", "metrics.csv", "monitor.png", "report.json", "system.json",
    ]  # fmt: skip

    shutil.rmtree(tmp_path / "runs")
    assert main(given) == 0
    assert main([*given[: given.index("--")], "--collect", *given[given.index("--") :]]) == 0
    assert len(commands) == 3, "the archive is enough"
    assert {row["method"]: row for row in rows(tmp_path / "out" / "results.csv")} == found
    other = write_base(tmp_path / "other", seed=1)
    assert main([str(other) if word == str(base) else word for word in given]) == 2
    assert "weights of the base" in capsys.readouterr().err
    for more in ([], ["--collect"]):
        changed = [*given[: given.index("--")], *more, "--", "--learning-rate", "0.02"]
        assert main(changed) == 2, "collecting, too, takes no run for another one"
        assert "made with other settings than these" in capsys.readouterr().err
    assert len(commands) == 3


@pytest.mark.slow
def test_runs_are_processes_of_their_own(base, tmp_path):
    more = ("--jobs", "2", "--max-evaluations", "100")
    assert main(words(base, tmp_path, *more, methods="raft best-of-n")) == 0
    found = {row["method"]: row for row in rows(tmp_path / "out" / "results.csv")}
    assert list(found) == ["raft", "best-of-n"]
    assert 0 < int(found["raft"]["evaluations"]) <= 100
    assert "--max-evaluations" in found["raft"]["ended_by"]
    for name in found:
        assert "report:" in (tmp_path / "runs" / f"{name}-seed1.log").read_text()


def report_of(folder, name):
    return json.loads((folder / "kept" / f"{name}-seed1" / "report" / "report.json").read_text())


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--methods", "flow-gpro"), "did you mean flow-grpo"),
        (("--methods", "raft", "raft"), "--methods names one of"),
        (("--methods",), "nothing to run: give names"),
        (("--seeds", "1", "1"), "--seeds names one of"),
        (("--variant", "a/b", "raft"), "cannot be called 'a/b'"),
        (("--variant", "raft", "ddpo"), "two methods are called 'raft'"),
        (("--variant", "wide", "ddpo --spread group"), "wide: --spread says nothing to ddpo"),
        (("--variant", "wide", "ddpo --seed 3"), "--seed is the grid's"),
        (("--variant", "wide", "ddpo --clip '1"), "close its quotes"),
        (("--variant", "up", "ddpo --objective one_step --reward shapes"), "up: reward 'shapes' has no gradient"),
        (("--variant", "half", "raft --precision bf16"), "half would not compare with raft: 'precision' differs"),
        (("--max-rewards", "60", "--variant", "short", "raft --steps 1"), "short: --steps would end runs before"),
        (("--max-rewards", "60", "--", "--steps=7"), "--steps would end runs before the budget"),
        (("--", "--reward", "shapes"), "--reward is the grid's"),
        (("--", "--gold=shapes"), "--gold is the grid's"),
        (("--variant", "few", "raft --report-prompts 1"), "would not compare with raft: 'held_out' differs"),
        (("--max-rewards", "5"), "raft: an iteration draws 6 images, which is over --max-rewards 5"),
        (("--gold", "symmetry"), "symmetry is optimized"),
        (("--variant", "climb", "refl --reward shapes"), "climb: reward 'shapes' has no gradient"),
        (("--jobs", "0"), "--jobs and --threads"),
        (("--", "--cliip", "1"), "did you mean --clip"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_runs(base, tmp_path, capsys, commands, more, match):
    assert main(words(base, tmp_path, *more, methods="raft")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert match in said
    assert not commands
    assert not (tmp_path / "runs").exists()


def test_without_a_list_all_methods_run_that_can_climb_the_reward(base, capsys):
    flags = ["--base", str(base), "--reward"]
    every, left_out = choose_methods(parser().parse_args([*flags, "symmetry"]))
    assert list(every) == [*METHODS, *STEERING]
    assert not left_out
    some, left_out = choose_methods(parser().parse_args([*flags, "shapes"]))
    assert left_out == ["alignprop", "refl", "reno"]
    assert set(some) == set(every) - set(left_out)
    assert "left out, for shapes has no gradient: alignprop, refl, reno" in capsys.readouterr().out


def test_runs_of_other_settings_and_results_of_other_grids_are_refused(base, tmp_path, capsys):
    (job,) = jobs_of(base, tmp_path, methods="flow-grpo")
    known = try_out([job])
    write_json(job.folder / "config.json", job.config)
    check_same(job, known)
    begun = json.loads(json.dumps(job.config))  # a run that has begun says which noise auto is
    begun["tuning"] |= {"noise": "flow_sde", "noise_level": 0.7}
    del begun["monitor"]["tolerance"], begun["precision"]  # of a version that did not have them
    write_json(job.folder / "config.json", begun | {"device": "cuda", "threads": 4})
    check_same(job, known)
    changes = (
        ("--", "--clip", "0.5"), ("--", "--noise", "posterior"), ("--", "--noise-level", "0.5"), ("--", "--steps", "7"),
        ("--max-rewards", "60"), ("--", "--precision", "bf16"),
    )  # fmt: skip
    for more in changes:
        (other,) = jobs_of(base, tmp_path, *more, methods="flow-grpo")
        with pytest.raises(UserError, match="made with other settings than these"):
            check_same(other, known)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("method,seed\nraft,1\n")
    assert main(words(base, tmp_path, methods="flow-grpo")) == 2
    assert "also holds raft, seed 1" in capsys.readouterr().err


def test_flags_of_training_are_not_steering_s(base, tmp_path):
    """Reno has a step size of its own."""
    more = (
        "--",
        "--learning-rate",
        "0.01",
        "--no-checkpoint-activations",
        "--compile",
        "on",
        "--guidance",
        "2",
        "--eval-steps",
        "3",
    )
    jobs = jobs_of(base, tmp_path, *more, methods="alignprop reno")
    climbs, search = (job.config for job in jobs)
    assert climbs["tuning"]["learning_rate"] == 0.01
    assert not climbs["tuning"]["checkpoint_activations"]
    assert climbs["compile"] == "on"
    assert search["steering"]["learning_rate"] == 5.0
    assert search["tuning"]["guidance"] == climbs["tuning"]["guidance"] == 2
    assert search["monitor"]["eval_steps"] == 3


@pytest.mark.parametrize("method", [*METHODS, *STEERING])
def test_all_methods_have_prompts_and_noise_of_a_seed_in_common(base, tmp_path, method):
    jobs = jobs_of(
        base, tmp_path, methods=f"raft {method}" if method != "raft" else "raft ddpo", seeds="1 2"
    )
    assert [job.seed for job in jobs] == [1, 1, 2, 2], "whole seeds first"
    for first, second in (jobs[:2], jobs[2:]):
        for name in ("prompts", "monitored", "held_out", "seeds", "drawings"):
            assert first.config[name] == second.config[name]
    assert jobs[0].config["seeds"]["evaluation"] != jobs[2].config["seeds"]["evaluation"]


# ---------------------------------------------------------------------------------- going on


def test_a_run_that_was_stopped_goes_on(base, tmp_path, commands, monkeypatch):
    (job,) = jobs_of(base, tmp_path, "--max-rewards", 3 * IMAGES, methods="flow-grpo")

    @contextmanager
    def after_one():
        asked = iter([False, True, True])
        yield lambda: next(asked)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "stop_on_signal", after_one)
        job.folder.parent.mkdir()
        assert run_job(job, ["--threads", "1"], []) == STOPPED
    assert job.report is None
    assert run_job(job, ["--threads", "1"], []) == 0
    assert commands[1][3:5] == ["--resume", str(job.folder)]
    assert job.report["spent"]["rewards"] == 3 * IMAGES
    assert run_job(job, ["--threads", "1"], []) == 0
    assert len(commands) == 2


def test_an_archive_that_cannot_be_read_is_said_before_anything_runs(
    base, tmp_path, commands, capsys
):
    """Empty, damaged, of an older version, of other prompts; steering of a version with fewer settings is taken."""
    given = words(base, tmp_path, "--archive", tmp_path / "kept", methods="raft best-of-n")
    jobs = jobs_of(base, tmp_path, "--archive", tmp_path / "kept", methods="best-of-n")
    assert main(given) == 0
    steered = tmp_path / "kept" / "best-of-n-seed1"
    config = json.loads((steered / "config.json").read_text())
    write_json(steered / "config.json", config | {"steering": {}})
    check_same(jobs[0], try_out(jobs))
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    broken, count = steered / "report" / "report.json", len(commands)
    whole = json.loads(broken.read_text())
    fewer = json.loads(json.dumps(whole))
    fewer["rewards"][0]["by_prompt"]["after"].pop()
    for text, match in (
        (json.dumps(whole)[:100], "report.json is missing or damaged"),
        (json.dumps(whole | {"layout": 1}), "of another version"),
        (json.dumps({"layout": 2}), "not a value of each of its prompts"),
        (json.dumps(fewer), "not a value of each of its prompts"),
    ):
        broken.write_text(text)
        assert main(given) == 2
        said = capsys.readouterr().err
        assert match in said
        assert said.count("\n") == 1
    shutil.rmtree(steered)
    steered.mkdir()
    assert main([*given, "--collect"]) == 2
    assert "config.json is missing" in capsys.readouterr().err
    assert len(commands) == count


@pytest.mark.parametrize(("more", "every"), [((), 12), (("--", "--eval-every", "5"), 5)])
def test_a_budget_says_how_often_the_monitor_evaluates(base, tmp_path, more, every):
    """An eighth of the iterations that 100 times the images of one allow."""
    jobs = jobs_of(base, tmp_path, "--max-rewards", 100 * IMAGES, *more, methods="raft best-of-n")
    assert jobs[0].config["loop"]["eval_every"] == every


def test_steering_that_was_killed_starts_anew(base, tmp_path, commands):
    (job,) = jobs_of(base, tmp_path, methods="best-of-n")
    write_json(job.folder / "config.json", job.config)
    assert run_job(job, ["--threads", "1"], []) == 0
    assert "--resume" not in commands[0]
    assert job.report is not None


def test_archived_pictures_keep_red_and_purple_apart():
    """Few pixels of each among dark ones: median cut, the usual way, makes one color of both."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 30, (96, 96, 3), dtype=np.uint8)
    pixels[:3, :3], pixels[-3:, -3:] = (220, 40, 40), (150, 60, 200)
    picture = Image.fromarray(pixels)
    usual = picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    ours, theirs = (
        np.abs(np.asarray(small.convert("RGB")).astype(int) - pixels).max()
        for small in (in_few_colors(picture), usual)
    )
    assert ours <= 10 < 50 < theirs


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/a/runs/base", "base"),
        ("aesthetic(/models/b):2+clip(/models/c)", "aesthetic(b):2+clip(c)"),
        ("a 1/2 of a circle", "a 1/2 of a circle"),
        ("`pipe.load_lora_weights('/tmp/run/lora')` in", "`pipe.load_lora_weights('lora')` in"),
        ("runs/base", "runs/base"),
    ],
)
def test_archives_name_no_folder_of_this_machine(text, kept):
    assert without_folders({"a": [text, 1, None]}) == {"a": [kept, 1, None]}
