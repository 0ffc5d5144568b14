"""Config dataclasses become flags, and values come from the right place."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from agents.core.errors import UserError
from experiments.running.arguments import Parser, add_dataclass, fill, run_command
from experiments.running.settings import OF_AN_AGENT, PRESETS, find_preset
from experiments.train import new_config, parser


@dataclass(frozen=True)
class Config:
    """One field of every kind."""

    rate: float = 0.1
    """Step size; 100% of it."""
    count: int = 3
    """How many."""
    name: str = "x"
    """What it is called."""
    fast: bool = True
    """Be quick."""
    widths: tuple[int, ...] = (8, 8)
    """Layers."""
    mode: Literal["a", "b"] = "a"
    """Which."""
    limit: float | None = None
    """At most."""
    camera: str | int | None = None
    """Where from."""
    cameras: str | int | tuple[str | int, ...] | None = None
    """Where from, one or several."""
    hidden_one: int = 0
    """Not a flag."""


def parse(*words: str) -> dict[str, Any]:
    p = Parser(prog="test")
    add_dataclass(p, "things", Config(), skip=("hidden_one",))
    return vars(p.parse_args(words))


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("", {}),
        ("--rate 1e-3", {"rate": 0.001}),
        ("--count -2", {"count": -2}),
        ("--name y", {"name": "y"}),
        ("--no-fast", {"fast": False}),
        ("--fast", {"fast": True}),
        ("--widths 4", {"widths": (4,)}),
        ("--widths 4 5 6", {"widths": (4, 5, 6)}),
        ("--mode b", {"mode": "b"}),
        ("--limit 2", {"limit": 2.0}),
        ("--camera side", {"camera": "side"}),
        ("--camera 2", {"camera": 2}),
        ("--cameras side", {"cameras": "side"}),
        ("--cameras 2", {"cameras": 2}),
        ("--cameras side 2", {"cameras": ("side", 2)}),
    ],
)
def test_every_kind_of_field_is_a_flag_of_its_type(words: str, values: dict[str, Any]) -> None:
    given = parse(*words.split())
    assert given == values, "what is not given must be absent, so that presets can fill it"
    assert {k: type(v) for k, v in given.items()} == {k: type(v) for k, v in values.items()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rate fast", "--rate: invalid float value: 'fast'"),
        ("--mode c", "invalid choice: 'c' (choose from 'a', 'b')"),
        ("--widths", "--widths: expected at least one argument"),
        ("--cameras", "--cameras: expected at least one argument"),
        ("--camera side 2", "unrecognized arguments: 2"),
        ("--wdiths 4", "unknown flag '--wdiths'; did you mean --widths"),
        ("--coun 4", "unknown flag '--coun'; did you mean --count"),
        ("--hidden-one 4", "unknown flag '--hidden-one'"),
    ],
)
def test_mistakes_are_one_line(words: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*words.split())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_help_shows_the_docstring_under_the_field_and_its_default() -> None:
    p = Parser(prog="test")
    add_dataclass(p, "things", Config())
    text = " ".join(p.format_help().split())
    assert "things:" in text
    assert "--rate FLOAT Step size; 100% of it. [0.1]" in text
    assert "--widths INT [INT ...] Layers. [8 8]" in text
    assert "--mode a|b Which. [a]" in text


def test_later_sources_win_and_unknown_names_are_left_out() -> None:
    filled = fill(Config(), {"rate": 1.0, "count": 1}, {"rate": 2.0, "stranger": 0}, {})
    assert filled == Config(rate=2.0, count=1)
    assert fill(Config(), {}) == Config()


def configure(words: str) -> dict[str, Any]:
    return new_config(vars(parser("drqv2").parse_args(f"--agent drqv2 --seed 1 {words}".split())))


def test_flags_win_over_the_protocol_over_the_preset_over_the_defaults() -> None:
    words = "--env dmc/walker-walk --device cpu --preset cpu"
    preset = configure(words)
    agent = preset["configs"]["DDPGConfig"]
    assert agent["noise_clip"] == 0.3, "the default"
    assert (agent["encoder"], agent["batch_size"]) == ("small", 128), "the preset's"
    assert preset["env"]["size"] == 48
    protocol = configure(f"{words} --protocol drqv2")
    agent = protocol["configs"]["DDPGConfig"]
    assert (agent["encoder"], protocol["env"]["size"]) == ("drqv2", 84), "the protocol's"
    assert protocol["env"]["quality"] == "reference"
    assert protocol["train"]["updates_per_step"] == 0.5
    assert agent["hidden"] == [256, 256], "the preset's, where the protocol says nothing"
    flags = configure(f"{words} --protocol drqv2 --n-step 2 --hidden 9")
    agent = flags["configs"]["DDPGConfig"]
    assert (agent["n_step"], agent["hidden"]) == (2, [9])
    assert agent["batch_size"] == 256, "the protocol's, which no flag may change"


@pytest.mark.parametrize(
    ("task", "discount"), [("cartpole-swingup", 0.96), ("walker-walk", 0.98), ("finger-spin", 0.99)]
)
def test_the_cpu_presets_discount_follows_the_action_repeat(task: str, discount: float) -> None:
    config = configure(f"--env dmc/{task} --device cpu --preset cpu")
    assert config["configs"]["DDPGConfig"]["discount"] == discount
    given = configure(f"--env dmc/{task} --device cpu --preset cpu --discount 0.9")
    assert given["configs"]["DDPGConfig"]["discount"] == 0.9


def test_what_a_protocol_fixes_is_not_changed_silently() -> None:
    words = "--env dmc/walker-walk --device cpu --protocol dmc-gb"
    published = configure(words)["configs"]["DDPGConfig"]
    assert published["hidden"] == [1024, 1024], "without a preset nothing is cut to fit the machine"
    for flag in ("--encoder small", "--updates-per-step 2", "--size 48"):
        with pytest.raises(ValueError, match="fixes"):  # either package's UserError
            configure(f"{words} {flag}")


def test_presets_name_only_fields_that_exist_and_auto_follows_the_device() -> None:
    assert find_preset("auto", "cpu") == PRESETS["cpu"]
    assert find_preset("auto", "cuda:0") == PRESETS["gpu"]
    known: set[str] = set()
    for agent in ("sgqn", "drqv2", "fpo"):
        known |= {action.dest for action in parser(agent)._actions}
    for values in PRESETS.values():
        assert values.keys() <= known
    for name, agents in OF_AN_AGENT.items():
        for agent, values in agents.items():
            assert values.keys() <= {action.dest for action in parser(agent)._actions}
            assert find_preset(name, "cpu", agent) == PRESETS[name] | values


def test_a_seed_is_drawn_and_kept_where_none_is_given() -> None:
    given = vars(parser("drq").parse_args(["--agent", "drq", "--env", "toy/reach"]))
    first, second = new_config(given), new_config(given)
    assert first["train"]["seed"] != second["train"]["seed"]
    assert first["env"]["seed"] != first["train"]["seed"], "streams have seeds of their own"


def test_commands_tell_a_users_mistake_from_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        @run_command
        def command(argv: Any = None) -> int:
            raise error

        return command([])

    assert fail(UserError("give another")) == 2
    assert capsys.readouterr().err == "error: give another\n"
    assert fail(KeyboardInterrupt()) == 130
    with pytest.raises(KeyError):
        fail(KeyError("ours"))


def test_a_full_disk_is_one_line_in_every_command_and_other_errors_keep_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @run_command
    def fail(argv: Sequence[str] | None) -> int:
        assert argv is not None
        raise OSError(int(argv[0]), os.strerror(int(argv[0])), "results.json")

    assert fail([str(errno.ENOSPC)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: [Errno 28] No space left on device: 'results.json'"
    ]
    with pytest.raises(OSError, match="Input/output error"):
        fail([str(errno.EIO)])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_in_a_thread_prints_no_traceback_and_other_errors_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @run_command
    def fail(argv: Sequence[str] | None) -> int:
        def raise_it() -> None:
            assert argv is not None
            raise OSError(int(argv[0]), "an error")

        thread = threading.Thread(target=raise_it)
        thread.start()
        thread.join()
        return 0

    before = threading.excepthook
    assert fail([str(errno.EDQUOT)]) == 0
    assert capsys.readouterr().err == ""
    assert fail([str(errno.EIO)]) == 0
    assert "an error" in capsys.readouterr().err
    assert threading.excepthook is before
