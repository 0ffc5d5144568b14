"""experiments.finetune_generator from base to report, its resume, steering, and the mistakes that it names."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from agents.core.checkpoints import CheckpointStore
from agents.core.errors import UserError
from agents.core.settings import from_dict
from agents.core.step_rules import Posterior
from agents.generative_models import forward_passes
from agents.generative_models.chains import window_starts
from agents.generative_models.generator import load_generator
from agents.generative_models.methods import METHODS
from agents.generative_models.monitor import Monitor
from agents.generative_models.rewards import REWARDS
from agents.generative_models.tuning_config import TuningConfig
from experiments.finetune_generator import main, parser
from experiments.generators import finetuning, steering
from experiments.generators.finetuning import FineTuningSession, split_held_out
from experiments.generators.finetuning_configs import (
    PRESETS,
    default_gold,
    new_config,
    own_precision,
)
from tests.experiments.generator_base import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def words(base, run, *more):
    return [
        "--base", str(base), "--run-dir", str(run), "--preset", "debug", "--seed", "1", "--threads", "1",
        "--device", "cpu", "--gold", "brightness", "--reward", "symmetry", *map(str, more),
    ]  # fmt: skip


def test_from_base_to_report(base, tmp_path):
    run = tmp_path / "run"
    assert main(words(base, run, "--learning-rate", "0.01", "--patience", "0")) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    assert [row["name"] for row in report["rewards"]] == [
        "symmetry (optimized)", "brightness (not optimized)", "drawings_strict",
    ]  # fmt: skip
    for row in report["rewards"]:
        (before, low, high), (after, *_), (gain, *_) = row["before"], row["after"], row["gain"]
        assert low <= before <= high
        assert after - before == pytest.approx(gain, abs=1e-6)
    assert [each["step"] for each in report["history"]] == [0, 1, 2]
    assert report["history"][0]["values"]["kl"] == 0
    assert report["history"][-1]["values"]["kl"] > 0
    for name in ("report.md", "before.png", "after.png", "monitor.png"):
        assert (run / "report" / name).stat().st_size > 200
    assert [file.name for file in sorted((run / "samples").iterdir())] == [
        f"step-{step:06d}.png" for step in range(3)
    ]
    tags = (run / "metrics.csv").read_text()
    for tag in ("eval/gold", "eval/recall", "ratio/first_deviation", "budget/reward_calls"):
        assert tag in tags
    again = load_generator(run)
    saved = CheckpointStore(run).load()["agent"]["networks"]["model"]
    assert all(torch.equal(value, saved[key]) for key, value in again.state_dict().items())


def test_a_report_shows_the_last_checkpoint_beside_the_one_of_the_most_gold(base, tmp_path):
    run, gold = tmp_path / "run", "tests.experiments.generator_base:fading"
    assert main(words(base, run, "--learning-rate", "0.01", "--patience", "0", "--gold", gold)) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    last, kl = report["last"], [each["values"]["kl"] for each in report["history"]]
    assert (report["step"], report["kl"]) == (0, 0)
    assert (last["step"], last["kl"]) == (2, kl[2])
    first, end = report["rewards"][0]["by_prompt"], last["rewards"][0]["by_prompt"]
    assert first["after"] == first["before"] == end["before"], "the base itself"
    assert end["after"] != end["before"]
    for row in last["rewards"]:
        assert row["after"][0] == pytest.approx(sum(row["by_prompt"]["after"]) / report["prompts"])
    assert report["spent"]["rewards"] == 2 * 2 * 3
    assert report["spent"]["wall_seconds"] > 0
    assert "## The last checkpoint, iteration 2" in (run / "report" / "report.md").read_text()


def test_a_resumed_run_is_the_one_that_was_not_stopped(base, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    common = ("--learning-rate", "0.01", "--patience", "0")
    assert main(words(base, whole, "--steps", 4, *common)) == 0
    assert main(words(base, half, *common)) == 0
    assert main(["--resume", str(half), "--steps", "4"]) == 0
    first, second = (CheckpointStore(run).load() for run in (whole, half))
    assert first["monitor"] == second["monitor"]
    for key, value in first["agent"]["networks"]["model"].items():
        assert torch.equal(value, second["agent"]["networks"]["model"][key])
    reports = [
        json.loads((run / "report" / "report.json").read_text())["rewards"] for run in (whole, half)
    ]
    assert reports[0] == reports[1]


def test_a_compiled_run_in_bfloat16_goes_on_exactly(base, tmp_path, monkeypatch):
    """With operations as they are: generated code is looked at in tests/agents."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    monkeypatch.setattr(forward_passes, "BACKEND", backend)
    torch._dynamo.reset()
    whole, half, plain = (tmp_path / name for name in ("whole", "half", "plain"))
    common = ("--learning-rate", "0.01", "--patience", "0", "--precision", "bf16")
    assert main(words(base, whole, "--steps", 2, "--compile", "on", *common)) == 0
    assert main(words(base, half, "--steps", 1, "--compile", "on", *common)) == 0
    assert main(["--resume", str(half), "--steps", "2"]) == 0
    assert seen
    torch._dynamo.reset()
    seen.clear()
    assert main(words(base, plain, "--steps", 2, "--compile", "auto", *common)) == 0
    assert not seen, "auto compiles on CUDA devices alone"
    first, second, third = (CheckpointStore(run).load() for run in (whole, half, plain))
    assert first["monitor"] == second["monitor"]
    assert first["monitor"]["history"][0]["values"]["kl"] == 0
    for key, value in first["agent"]["networks"]["model"].items():
        assert torch.equal(value, second["agent"]["networks"]["model"][key])
        torch.testing.assert_close(value, third["agent"]["networks"]["model"][key])
    assert main(["--resume", str(plain), "--steps", "3", "--compile", "on"]) == 0
    assert seen
    assert json.loads((plain / "config.json").read_text())["compile"] == "on"


def test_what_our_generators_compute_in(base, tmp_path, monkeypatch):
    assert config_of(base, tmp_path)["precision"] == "fp32"
    assert config_of(base, tmp_path, "--precision", "bf16")["precision"] == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert own_precision({}, "cuda:1") == "bf16"
    assert own_precision({"precision": "fp32"}, "cuda") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert own_precision({"precision": "auto"}, "cuda") == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_s_precision_reaches_its_networks_and_those_of_a_resumed_one(
    base, tmp_path, precision
):
    run = tmp_path / "run"
    assert main(words(base, run, "--steps", 1, "--precision", precision)) == 0
    session = FineTuningSession(run, json.loads((run / "config.json").read_text()), resume=True)
    for model in (session.tuner.model, session.tuner.reference):
        assert forward_passes.forward_pass(model.denoiser).bf16 == (precision == "bf16")
    session.close()


def test_a_report_that_is_up_to_date_is_not_drawn_again(base, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert (
        main(words(base, run, "--steps", 1, "--most-kl", "1e-12", "--learning-rate", "0.01")) == 0
    )
    said = capsys.readouterr().out
    assert said.index("run folder:") < said.index("evaluation:")
    page = run / "report" / "report.md"
    assert "What ended the run: the KL" in page.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "draw", None)
        assert main(["--resume", str(run)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    (run / "report" / "after.png").unlink()
    assert main(["--resume", str(run), "--steps", "1"]) == 0
    assert (run / "report" / "after.png").is_file()
    before = page.read_text()
    assert main(["--resume", str(run), "--steps", "2", "--most-kl", "9e9"]) == 0
    assert page.read_text() != before
    assert "What ended" not in page.read_text()


@pytest.mark.parametrize("method", ["flow-grpo", "best-of-n"])
def test_missing_memory_of_a_report_is_one_line(base, tmp_path, monkeypatch, capsys, method):
    def fail(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = tmp_path / "run"
    for module in (finetuning, steering):
        monkeypatch.setattr(module, "draw", fail)
    assert main(words(base, run, "--method", method)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: out of memory: lower --batch-size")
    assert ("--candidates" in said) == (method == "best-of-n")
    assert CheckpointStore(run).latest() if method == "flow-grpo" else not run.exists()


def test_the_average_is_what_is_measured_kept_and_reported(base, tmp_path):
    run = tmp_path / "run"
    more = ("--learning-rate", "0.01", "--patience", "0", "--average-decay")
    assert main(words(base, run, *more, 0.5)) == 0
    assert main(words(base, tmp_path / "plain", *more, 0)) == 0
    networks = CheckpointStore(run).load()["agent"]["networks"]
    kept = list(load_generator(run).denoiser.parameters())
    average = [networks["average"][f"module.{place}"] for place in range(len(kept))]
    assert all(torch.equal(a, b) for a, b in zip(kept, average, strict=True))
    last = networks["model"]
    assert not torch.equal(
        kept[0], last[next(name for name in last if name.startswith("denoiser."))]
    )
    histories = [
        json.loads((folder / "report" / "report.json").read_text())["history"]
        for folder in (run, tmp_path / "plain")
    ]
    assert histories[0][0] == histories[1][0]
    assert 0 < histories[0][-1]["values"]["kl"] < histories[1][-1]["values"]["kl"]
    config = json.loads((run / "config.json").read_text())
    session = FineTuningSession(run, config, resume=True)
    best = CheckpointStore(run).load("best")["agent"]["networks"]["average"]
    with session.at_best() as (model, _):
        for place, parameter in enumerate(model.denoiser.parameters()):
            assert torch.equal(parameter, best[f"module.{place}"])
    session.close()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_taken(base, tmp_path, preset):
    flags = [
        "--base",
        str(base),
        "--preset",
        preset,
        "--run-dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    config = new_config("flow-grpo", vars(parser("flow-grpo").parse_args(flags)))
    parts = [config["tuning"], config["loop"], config["monitor"]]
    known = {name: part[name] for part in parts for name in PRESETS[preset] if name in part}
    assert known
    assert known == {name: PRESETS[preset][name] for name in known}


@pytest.mark.parametrize("method", METHODS)
def test_presets_leave_what_makes_a_method_itself_and_debug_takes_all_but_single_images(
    base, tmp_path, method
):
    own = METHODS[method].settings
    for preset in PRESETS:
        tuning = config_of(base, tmp_path, "--preset", preset, method=method)["tuning"]
        if preset != "debug":
            assert {name: tuning[name] for name in own} == own
        assert tuning["group"] == own.get("group", tuning["group"])
        if method == "mix-grpo" and preset != "debug":
            assert window_starts(from_dict(TuningConfig, tuning)) > 1
            assert tuning["window_every"] == 25
    assert tuning["prompts"] == PRESETS["debug"]["prompts"]


def test_a_run_goes_on_without_its_base(base, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "base"
    shutil.copytree(base, moved)
    assert main(words(moved, run, "--steps", 1)) == 0
    shutil.rmtree(moved)
    assert main(["--resume", str(run), "--steps", "2"]) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    assert [each["step"] for each in report["history"]] == [0, 1, 2]


def test_bases_that_say_nothing_of_prompts_or_are_damaged_are_named(base, tmp_path, capsys):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "config.json").write_text("{")
    assert main(words(folder, tmp_path / "run")) == 2
    assert "damaged" in capsys.readouterr().err
    (folder / "config.json").unlink()
    assert main(words(folder, tmp_path / "run")) == 2
    assert "--prompt-file FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method",
    [
        name if name in ("alignprop", "d3po") else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
        if name != "flow-grpo"
    ],
)
def test_every_method_runs(base, tmp_path, method):
    assert main(words(base, tmp_path / "run", "--method", method, "--steps", 1)) == 0
    assert (tmp_path / "run" / "report" / "report.md").is_file()


@pytest.mark.parametrize("method", ["fk-steering", "best-of-n", "reno"])
def test_steering_is_reported_and_no_worse(base, tmp_path, method):
    run = tmp_path / "run"
    assert main(words(base, run, "--method", method)) == 0
    rows = json.loads((run / "report" / "report.json").read_text())["rewards"]
    assert rows[0]["name"] == "symmetry (optimized)"
    assert rows[0]["gain"][0] > 0
    assert not (run / "checkpoints").exists()
    # 2 prompts of 2 images in 2 steps, both halves of guidance; the search goes 2 times and 1 to begin with.
    evaluations, rewards = {
        "fk-steering": (4 * 4 * 4, 4 * 4), "best-of-n": (4 * 8 * 4, 4 * 8), "reno": (4 * 3 * 4, 4 * 3),
    }[method]  # fmt: skip
    page = (run / "report" / "report.md").read_text()
    said = f"Budget: {evaluations} denoiser evaluations and {rewards} rewards for 4 images; without steering, 16"
    assert said in page


@pytest.mark.parametrize(("method", "eta"), [("fk-steering", 1.0), ("best-of-n", 0.0)])
def test_images_without_steering_come_from_the_rule_that_is_steered(
    base, tmp_path, monkeypatch, method, eta
):
    rules, draw = [], steering.draw
    monkeypatch.setattr(steering, "draw", lambda *a, **k: rules.append(k["rule"]) or draw(*a, **k))
    assert main(words(base, tmp_path / "run", "--method", method)) == 0
    assert rules == [Posterior(eta)] * 2


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--method", "flow-gpro"), "did you mean flow-grpo"),
        (("--reward", "brightnes"), "did you mean brightness"),
        (("--gold", "nothing_of_ours"), "unknown reward"),
        (("--method", "alignprop", "--reward", "shapes"), "has no gradient"),
        (("--method", "reno", "--reward", "shapes"), "has no gradient"),
        (("--cliip", "1"), "did you mean --clip"),
        (("--method", "alignprop", "--kl", "0.5"), "--kl says nothing to alignprop"),
        (("--method", "raft", "--clip", "9"), "--learning-rate"),
        (("--method", "ddpo", "--spread", "group"), "--history, --history-least"),
        (("--method", "refl", "--window", "2"), "--reward-ceiling"),
        (("--beta", "2"), "--beta says nothing to flow-grpo"),
        (("--max-evaluations", "-1"), "max_evaluations is -1"),
        (("--group", "1"), "at least 2"),
        (("--noise-level", "0"), "draw no noise"),
        (("--threads", "0"), "--threads is 0"),
        (("--preset", "debgu"), "debug"),
        (("--prompt-count", "0"), "prompt_count is 0"),
        (("--gold", "symmetry"), "symmetry is optimized"),
        (("--gold", "symmetry:1.0"), "symmetry is optimized"),
        (
            ("--gold", "brightness+symmetry:2", "--reward", "color+symmetry"),
            "symmetry is optimized",
        ),
        (
            ("--reward", "classifier+brightness", "--gold", "classifier(FOLDER)"),
            "classifier is opt",
        ),
        (("--method", "reno", "--iterations", "-1"), "iterations is -1"),
        (("--method", "best-of-n", "--compile", "on"), "--compile"),
        (("--precision", "fp16"), "takes auto, fp32 or bf16"),
        (("--compile", "yes"), "--compile"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(base, tmp_path, capsys, more, match):
    run = tmp_path / "run"
    code = main(words(base, run, *more))
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert match in said
    assert not run.exists()


def test_the_docs_draw_images_of_a_run(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words(base, tmp_path / "RUN", "--steps", 1)) == 0
    page = (Path(__file__).resolve().parents[2] / "docs" / "pipelines.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.S) if '"RUN")' in c]
    exec(code, {})
    assert (tmp_path / "images.png").stat().st_size > 200


def test_prompts_come_from_files(base, tmp_path, capsys):
    empty, unknown, good = (tmp_path / name for name in ("empty.txt", "unknown.txt", "good.txt"))
    empty.write_text("\n \n")
    unknown.write_text("a red cirlce\n")
    good.write_text("a red circle\n\na red circle\na blue square\n")
    run = tmp_path / "run"
    for file, match in (
        (empty, "holds no prompts"),
        (unknown, "circle"),
        (tmp_path / "none", "cannot read"),
    ):
        assert main(words(base, run, "--prompt-file", file)) == 2
        assert match in capsys.readouterr().err
        assert not run.exists()
    assert main(words(base, run, "--prompt-file", good, "--steps", 1)) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["prompts"] == ["a red circle", "a blue square"]
    everything = config["prompts"] + config["monitored"] + config["held_out"]
    assert len(everything) == len(set(everything)) == 6


def test_the_monitor_s_prompts_are_not_the_report_s():
    """The monitor chooses the checkpoint: reported on its own prompts, it would flatter."""
    prompts = [f"prompt {number}" for number in range(20)]
    assert split_held_out(prompts, 6) == (prompts[:6], prompts[6:])
    assert split_held_out(prompts, 16) == (prompts[:10], prompts[10:])
    assert split_held_out(prompts[:3], 2) == (prompts[:3], prompts[:3])
    assert split_held_out(prompts, 16, 4) == (
        prompts[:16],
        prompts[16:],
    )  # as many as were asked for
    assert split_held_out(prompts, 12, 2) == (prompts[:12], prompts[12:14])
    assert split_held_out(prompts[:9], 8, 4) == (prompts[:4], prompts[4:9])


def test_prompts_that_are_trained_on_are_not_held_out(base, tmp_path, capsys):
    file, other = tmp_path / "all.txt", tmp_path / "other.txt"
    about = config_of(base, tmp_path)
    file.write_text("\n".join([*about["prompts"], *about["held_out"]]))
    other.write_text("\n".join(about["held_out"]))
    run = tmp_path / "run"
    assert main(words(base, run, "--prompt-file", file, "--held-out", other)) == 2
    assert f"remove '{about['held_out'][0]}'" in capsys.readouterr().err
    again = config_of(base, tmp_path, "--prompt-file", str(file))
    assert not set(again["prompts"]) & {*again["held_out"], *again["monitored"]}


def test_steering_keeps_its_own_step_size_with_every_preset(base, tmp_path):
    """The GPU preset's is that of a network."""
    config = config_of(base, tmp_path, "--preset", "gpu", method="reno")
    assert config["steering"]["learning_rate"] == 5.0
    assert config["tuning"]["batch_size"] == 128
    given = config_of(base, tmp_path, "--learning-rate", "2", method="reno")
    assert given["steering"]["learning_rate"] == 2.0


def test_one_steered_prompt_of_few_images_is_reported(base, tmp_path):
    """Too few for recall, which has no third neighbor then."""
    file, run = tmp_path / "one.txt", tmp_path / "run"
    file.write_text("a red circle\n")
    assert main(words(base, run, "--method", "best-of-n", "--held-out", file)) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["diversity"]["recall"] == [None, None]


@pytest.mark.parametrize(
    ("reward", "gold"),
    [
        ("shapes+brightness", "classifier"),
        ("drawings", "classifier"),
        ("brightness", "drawings_strict"),
        ("classifier:2", "drawings_strict"),
        ("my_shapes:score", "drawings_strict"),
    ],
)
def test_the_gold_reward_is_not_the_optimized_one(reward, gold):
    assert default_gold(reward) == gold


def test_text_has_no_second_judge_and_needs_a_gold_reward():
    for reward in ("glyphs", "brightness+glyphs:2", "shapes+classifier"):
        with pytest.raises(UserError, match="--gold"):
            default_gold(reward)


def test_the_help_says_what_every_reward_is():
    said = " ".join(parser("flow-grpo").format_help().split())
    for name, spec in REWARDS.items():
        assert (
            f"{name}({spec.argument}): {spec.summary}" in said or f"{name}: {spec.summary}" in said
        )


def test_a_fine_tuned_run_is_a_base_that_knows_its_prompts(base, tmp_path):
    run = tmp_path / "run"
    assert main(words(base, run, "--steps", 1)) == 0
    again, first = (config_of(each, tmp_path) for each in (run, base))
    for side in ("prompts", "monitored", "held_out"):
        assert again[side] == first[side]


def test_the_base_is_evaluated_on_the_threads_that_are_asked_for(base, tmp_path, monkeypatch):
    threads, measure = [], Monitor.measure
    monkeypatch.setattr(
        Monitor,
        "measure",
        lambda *given: threads.append(torch.get_num_threads()) or measure(*given),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(words(base, tmp_path / "run", "--steps", 1)) == 0
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1]


def config_of(base, tmp_path, *more, method="flow-grpo"):
    given = words(base, tmp_path / "none", "--method", method, *more)
    return new_config(method, vars(parser(method).parse_args(given)))


def test_missing_bases_and_changed_runs_are_refused(base, tmp_path, capsys):
    assert main(["--preset", "debug"]) == 2
    assert "--base" in capsys.readouterr().err
    assert main(words(tmp_path / "nowhere", tmp_path / "run")) == 2
    assert "pretrain_generator" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err
    run = tmp_path / "run"
    assert main(words(base, run, "--steps", 1)) == 0
    assert main(["--resume", str(run), "--clip", "0.1"]) == 2
    assert "--clip cannot change" in capsys.readouterr().err
