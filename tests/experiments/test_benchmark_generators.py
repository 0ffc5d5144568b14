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
from experiments.generators.grid_page import collect, markdown
from experiments.generators.grid_results import Grid, Job, Result, gain
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
    assert len(commands) == 3, "the archive is enough"
    assert {row["method"]: row for row in rows(tmp_path / "out" / "results.csv")} == found
    other = write_base(tmp_path / "other", seed=1)
    assert main([str(other) if word == str(base) else word for word in given]) == 2
    assert "weights of the base" in capsys.readouterr().err


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


# ------------------------------------------------------------------------------------- the tables


def finished(folder, label, seed, gains, *, last=None, method="flow-grpo", wall=60.0, before=0.25):
    """Write what a finished run leaves, and return it; `gains` are those of prompts, by reward."""
    run = folder / f"{label}-seed{seed}"

    def told(each, step):
        return {
            "rewards": [
                {
                    "name": name,
                    "by_prompt": {
                        "before": [before] * len(values),
                        "after": (before + np.array(values)).tolist(),
                    },
                }
                for name, values in each.items()
            ],
            "diversity": {"distance": [0.3, 0.2 + step / 100], "recall": [0.9, 0.8]},
            "step": None if method in STEERING else step,
            "kl": None if method in STEERING else float(step),
        }

    content = told(gains, 2) | {
        "layout": 2, "prompts": len(next(iter(gains.values()))), "images_per_prompt": 4, "made_of": {"over": None},
        "spent": {"evaluations": 160, "rewards": 80, "wall_seconds": wall},
        "last": None if last is None else told(last, 5),
    }  # fmt: skip
    write_json(run / "report" / "report.json", content)
    write_json(run / "system.json", {"commit": f"commit{seed}"})
    for name in ("report.md", "before.png", "after.png"):
        (run / "report" / name).touch()
    own = {} if method in STEERING else METHODS[method].settings
    config = {"reward": "shapes", "tuning": dict(own)}
    return Job(label, method, seed, run, None, (), config)


ABOUT = Grid("shapes", "classifier", "base", {"evaluations": 200, "rewards": 0})


def told_gains(random, mean, prompts=6):
    names = ("shapes (optimized)", "classifier (not optimized)", "drawings_strict")
    return {name: (mean + 0.2 * random.standard_normal(prompts)).tolist() for name in names}


def test_gains_are_of_seeds_and_prompts_in_them(tmp_path):
    """Against a loop that draws seeds, and of every one of them its prompts."""
    random = np.random.default_rng(0)
    jobs = [
        finished(tmp_path, "a", seed, told_gains(random, 0.1 * seed, 4 + seed))
        for seed in (1, 2, 3)
    ]
    found = [Result(job, job.report) for job in jobs]
    value = gain(found, "drawings_strict")
    gains = [np.subtract(*result.by_prompt("drawings_strict")[::-1]) for result in found]
    means = []
    for _ in range(4000):
        chosen = random.integers(3, size=3)
        means.append(np.mean([random.choice(gains[k], len(gains[k])).mean() for k in chosen]))
    assert value.point == pytest.approx(np.mean([each.mean() for each in gains]))
    assert [value.low, value.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)
    page = markdown(found, jobs, ABOUT)
    assert f"{value.point:.3f} [{value.low:.3f}, {value.high:.3f}]" in page


def cells(page, method, table=0):
    """Return a method's row in one of a page's tables, by its heading."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    heads = [place for place, line in enumerate(lines) if line.startswith("| method")]
    part = lines[heads[table] : heads[table + 1] if table + 1 < len(heads) else None]
    split = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part]
    return next(dict(zip(split[0], row, strict=True)) for row in split if row[0] == method)


@pytest.mark.parametrize(("sign", "said"), [(1, "better than the base"), (-1, "does not clear")])
def test_a_row_that_does_not_clear_the_base_says_so(tmp_path, sign, said):
    gains = {"drawings_strict": [0.1 * sign, 0.2 * sign], "shapes (optimized)": [0.5, 0.5]}
    jobs = [finished(tmp_path, "a", seed, gains) for seed in (1, 2)]
    collect(jobs, tmp_path, ABOUT)
    assert said in cells((tmp_path / "results.md").read_text(), "a")["verdict"]


def test_a_gain_of_the_reward_alone_is_none(tmp_path):
    """The optimized reward has risen, what was not optimized has not; nobody asked for drawings."""
    gains = {"shapes (optimized)": [0.5, 0.5], "classifier (not optimized)": [-0.1, 0.1]}
    job = finished(tmp_path, "a", 1, gains)
    page = markdown([Result(job, job.report)], [job], ABOUT)
    assert "does not clear" in cells(page, "a")["verdict"]


def test_the_last_checkpoint_has_a_table_of_its_own(tmp_path):
    """A run that hacked its reward shows both: what it had, and what it came to."""
    good, bad = {"drawings_strict": [0.2, 0.2]}, {"drawings_strict": [-0.2, -0.2]}
    jobs = [finished(tmp_path, "hacks", 1, good, last=bad), finished(tmp_path, "stays", 1, good)]
    found = [Result(job, job.report) for job in jobs]
    page = markdown(found, jobs, ABOUT)
    best, last = (cells(page, "hacks", table) for table in (0, 1))
    assert (best["drawings_strict: gain"], last["drawings_strict: gain"]) == (
        "0.200 [0.200, 0.200]", "-0.200 [-0.200, -0.200]",
    )  # fmt: skip
    assert (best["KL"], last["KL"]) == ("2", "5")
    assert (best["distance"], last["distance"]) == ("0.22", "0.25")
    assert "does not clear" in last["verdict"]
    assert cells(page, "stays", 0) == cells(page, "stays", 1)


def test_costs_are_of_a_training_or_of_a_steered_image(tmp_path):
    gains = {"drawings_strict": [0.1, 0.2]}
    jobs = [
        finished(tmp_path, "a", 1, gains, wall=60), finished(tmp_path, "a", 2, gains, wall=180),
        finished(tmp_path, "best-of-n", 1, gains, method="best-of-n", wall=16),
        finished(tmp_path, "b", 1, gains),
    ]  # fmt: skip
    found = [Result(job, job.report) for job in jobs]
    page = markdown(found, jobs, ABOUT)
    trained, steered = cells(page, "a"), cells(page, "best-of-n (of seed 1 alone)", 2)
    assert [trained[name] for name in ("evaluations", "rewards", "minutes")] == ["160", "80", "2"]
    images = 2 * 4
    assert [steered[f"{name} per image"] for name in ("evaluations", "rewards", "seconds")] == [
        str(160 // images), str(80 // images), str(16 // images),
    ]  # fmt: skip
    assert "b (of seed 1 alone)" in page
    assert cells(page, "the base's values")["drawings_strict: gain"] == "0.250 [0.250, 0.250]"


def test_a_page_says_what_a_reader_must_know(tmp_path):
    gains = {"drawings_strict": [0.1, 0.2]}
    jobs = [
        finished(tmp_path, "guard", 1, gains, method="grpo-guard"),
        finished(tmp_path, "fk-steering", 1, gains, method="fk-steering", before=0.3),
    ]
    jobs[0].config["tuning"]["step_weight"] = "noise"
    config = {"reward": "shapes", "tuning": METHODS["ddpo"].settings}
    missing = Job("late", "ddpo", 1, tmp_path / "late", None, (), config)
    found = [Result(job, job.report) for job in jobs]
    about = Grid(
        "shapes", "classifier", "/home/a/base", {"evaluations": 100, "rewards": 0}, ["refl"]
    )
    page = markdown(found, [*jobs, missing], about)
    for said in (
        "guard has not all settings of its own: step_weight noise instead of gain.",
        "Over the budget, by their first iteration: guard (seed 1).",
        "Left out, for shapes has no gradient: refl.",
        "Not finished: late (seed 1).",
        "not as its row has it: fk-steering.",
        "Base: base.",
    ):
        assert said in page, said
    assert "has not all settings" not in markdown(found[1:], [missing], about)


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
    del begun["monitor"]["tolerance"]  # of a version that did not have it
    write_json(job.folder / "config.json", begun | {"device": "cuda", "threads": 4})
    check_same(job, known)
    changes = (
        ("--", "--clip", "0.5"), ("--", "--noise", "posterior"), ("--", "--noise-level", "0.5"), ("--", "--steps", "7"),
        ("--max-rewards", "60"),
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
        "--guidance",
        "2",
        "--eval-steps",
        "3",
    )
    jobs = jobs_of(base, tmp_path, *more, methods="alignprop reno")
    climbs, search = (job.config for job in jobs)
    assert climbs["tuning"]["learning_rate"] == 0.01
    assert not climbs["tuning"]["checkpoint_activations"]
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
