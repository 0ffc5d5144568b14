"""The page of a grid of fine-tuning methods: gains with intervals, verdicts, costs, and what a reader must know."""

import numpy as np
import pytest

from agents.core.settings import to_dict
from agents.generative_models.methods import METHODS
from agents.generative_models.tuning_config import TuningConfig
from experiments.generators import plots
from experiments.generators.grid_page import collect, markdown
from experiments.generators.grid_results import Grid, Job, Result, gain
from experiments.generators.steering import STEERING
from experiments.running.runs import write_json


def finished(
    folder,
    label,
    seed,
    gains,
    *,
    last=None,
    method="flow-grpo",
    wall=60.0,
    before=0.25,
    reward="shapes",
    gold="classifier",
    prompts=None,
    evaluations=3,
):
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
        "history": [{"step": step} for step in range(evaluations)],
        "spent": {"evaluations": 160, "rewards": 80, "wall_seconds": wall},
        "last": None if last is None else told(last, 5),
    }  # fmt: skip
    write_json(run / "report" / "report.json", content)
    write_json(run / "system.json", {"commit": f"commit{seed}", "threads": 1})
    for name in ("report.md", "before.png", "after.png"):
        (run / "report" / name).touch()
    count = len(next(iter(gains.values())))
    return Job(label, method, seed, run, None, (), config_of(method, count, reward, gold, prompts))


def config_of(method, count=2, reward="shapes", gold="classifier", prompts=None):
    """The part of a config that tables take; prompts are `count` of the same for all seeds unless they are given."""
    tuning = METHODS[method].config() if method in METHODS else TuningConfig()
    return {
        "reward": reward, "gold": gold, "tuning": to_dict(tuning), "preset": "demo", "monitored": ["chooses"],
        "held_out": list(prompts or map(str, range(count))),
    }  # fmt: skip


ABOUT = Grid("shapes", "classifier", "base", {"evaluations": 200, "rewards": 0})


def told_gains(random, mean, prompts=6):
    names = ("shapes (optimized)", "classifier (not optimized)", "drawings_strict")
    return {name: (mean + 0.2 * random.standard_normal(prompts)).tolist() for name in names}


def test_gains_are_of_seeds_and_of_prompts_that_they_share(tmp_path):
    """Against a loop that draws seeds, and prompts for all of them; the third seed has prompts of its own, too."""
    random = np.random.default_rng(0)
    asked = {1: "abcdef", 2: "abcdef", 3: "cdefgh"}
    jobs = [
        finished(tmp_path, "a", seed, told_gains(random, 0.1 * seed), prompts=asked[seed])
        for seed in (1, 2, 3)
    ]
    found = [Result(job, job.report) for job in jobs]
    value = gain(found, "drawings_strict")
    gains = [np.subtract(*result.by_prompt("drawings_strict")[::-1]) for result in found]
    means = []
    for _ in range(4000):
        drawn = random.choice(list("abcdefgh"), 8)
        known = [
            [gains[k][asked[k + 1].index(prompt)] for prompt in drawn if prompt in asked[k + 1]]
            for k in random.integers(3, size=3)
        ]
        means.append(np.mean([np.mean(each) for each in known if each]))
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
    missing = Job("late", "ddpo", 1, tmp_path / "late", None, (), config_of("ddpo"))
    found = [Result(job, job.report) for job in jobs]
    about = Grid(
        "shapes", "classifier", "/home/a/base", {"evaluations": 100, "rewards": 0}, ["refl"]
    )
    page = markdown(found, [*jobs, missing], about)
    for said in (
        "step_weight is noise by the preset demo instead of gain: guard.",
        "Over the budget, by a first iteration or one dearer than all before it: guard (seed 1).",
        "Left out, for shapes has no gradient: refl.",
        "Not finished: late (seed 1).",
        "not as its row has it: fk-steering.",
        "Base: base.",
    ):
        assert said in page, said
    assert " instead of " not in markdown(found[1:], [missing], about)


@pytest.mark.parametrize("gold", [-0.1, 0.1])
def test_a_row_whose_gold_fell_says_so(tmp_path, gold):
    gains = {"drawings_strict": [0.2, 0.3], "shapes (optimized)": [0.5, 0.5]}
    gains["classifier (not optimized)"] = [gold, gold]
    job = finished(tmp_path, "a", 1, gains)
    said = cells(markdown([Result(job, job.report)], [job], ABOUT), "a")["verdict"]
    assert said == "better than the base" + (", **but its gold fell**" if gold < 0 else "")


@pytest.mark.parametrize(
    ("reward", "own"),
    [
        ("classifier", "shapes"),
        ("symmetry:0.1+drawings_strict", "classifier"),
        ("shapes", "classifier"),
    ],
)
def test_no_row_is_judged_by_what_it_optimizes(tmp_path, reward, own):
    """What it optimizes has risen, what was not optimized has not; of no drawings there is no strict score."""
    gains = {f"{reward} (optimized)": [0.5, 0.5], f"{own} (not optimized)": [-0.1, 0.1]}
    if "drawings_strict" in reward:
        gains["drawings_strict"] = [0.5, 0.5]
    job = finished(tmp_path, "a", 1, gains, reward=reward, gold=own)
    page = markdown([Result(job, job.report)], [job], ABOUT)
    row = next(line for line in page.splitlines() if line.startswith("| a"))
    assert "does not clear the base" in row


def test_a_variant_of_another_reward_says_what_chose_and_what_judges(tmp_path, monkeypatch):
    """Nothing has chosen its last checkpoint, nor what steers, which stands apart in the picture."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure))
    gains = {"shapes (optimized)": [0.1, 0.2], "classifier (not optimized)": [0.1, 0.2]}
    other = {"classifier (optimized)": [0.1, 0.2], "shapes (not optimized)": [0.1, 0.3]}
    options = {"reward": "classifier", "gold": "shapes"}
    jobs = [
        finished(tmp_path, "best-of-n", 1, gains, method="best-of-n"), finished(tmp_path, "a", 1, gains, evaluations=5),
        finished(tmp_path, "judge", 1, other, **options),
        finished(tmp_path, "reno-judge", 1, other, method="reno", **options),
    ]  # fmt: skip
    collect(jobs, tmp_path, ABOUT)
    page = (tmp_path / "results.md").read_text()
    chosen = cells(page, "judge (optimizes classifier; chosen by shapes)")
    assert chosen["verdict"] == "better than the base by shapes"
    assert cells(page, "judge (optimizes classifier)", 1)["verdict"] == chosen["verdict"]
    assert cells(page, "reno-judge (optimizes classifier)", 2)
    assert "the base's too, 5: a; 3: judge." in page
    (axis,) = figures[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "a", "judge, by shapes", "best-of-n, steered", "reno-judge, by shapes, steered",
    ]  # fmt: skip
    assert 1.5 in [line.get_ydata()[0] for line in axis.lines]


def test_settings_of_a_preset_are_told_of_methods_that_say_nothing_of_them(tmp_path):
    """Flow-GRPO is the defaults: what replaces these is no less a change."""
    gains = {"drawings_strict": [0.1, 0.2]}
    demo = {"window": 3, "step_weight": "noise", "updates": 1, "learning_rate": 5e-4, "prompts": 12}
    jobs = [finished(tmp_path, name, 1, gains, method=name) for name in ("flow-grpo", "ddpo")]
    for job in jobs:
        job.config["tuning"] |= demo
    jobs[1].config["tuning"] |= {"updates": 2}
    page = markdown([Result(job, job.report) for job in jobs], jobs, ABOUT)
    for said in (
        "- window is 3 by the preset demo instead of 0: all that are trained.",
        "- step_weight is noise by the preset demo instead of none: all that are trained.",
        "- updates is 1 by the preset demo instead of 2: flow-grpo.",
        "- updates is 2 by flags instead of 4: ddpo.",
    ):
        assert said in page, page
    assert "learning_rate" not in page
    assert "prompts is" not in page


def test_a_page_says_what_minutes_are_of_and_which_prompts_chose(tmp_path):
    gains = {"drawings_strict": [0.1, 0.2]}
    job = finished(tmp_path, "a", 1, gains, prompts=("one", "two"))
    about = Grid("shapes", "classifier", "base", {"evaluations": 0, "rewards": 0}, jobs=2)
    page = markdown([Result(job, job.report)], [job], about)
    assert "runs with 1 CPU thread, 2 at a time." in page
    assert "have chosen the checkpoints" not in page
    assert "budget" not in page.splitlines()[0]
    job.config["monitored"] = ["one", "three"]
    page = markdown([Result(job, job.report)], [job], ABOUT)
    assert "runs with 1 CPU thread." in page
    assert "Prompts of these tables have chosen the checkpoints, too" in page
    assert page.startswith("# Methods of fine-tuning image generators, within the same budget")


def test_archived_rewards_are_found_without_their_folders(tmp_path):
    job = finished(tmp_path, "a", 1, {"clip(b) (optimized)": [0.1, 0.2]})
    about = Grid("clip(/models/b)", "classifier", "base", {})
    assert (
        cells(markdown([Result(job, job.report)], [job], about), "a (optimizes shapes)")[
            "clip(b): gain"
        ]
        != "-"
    )
