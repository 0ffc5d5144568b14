"""Which tasks there are, how each is built, and which settings the literature fixed for them.

An id is `family/task`: `dmc/walker-walk`, `metaworld/drawer-open`, `gym/HalfCheetah-v5`,
`toy/reach`. Nothing here imports a simulator: names are written out, and a test compares them with
the simulators' own lists.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import gymnasium

from wrappers.errors import UserError
from wrappers.view import Part

Adapter = str | Callable[..., gymnasium.Env]
"""What builds an adapter: a class or function, or `module:name` of one, which is imported when it
is needed."""


@dataclass(frozen=True)
class TaskSpec:
    """How to build one task, and what is good to know before it is built."""

    id: str
    adapter: Adapter
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter is called with, beside `episode_length`."""
    action_repeat: int = 1
    """Control steps per agent step where neither the user nor a protocol says otherwise."""
    camera: str | int | None = None
    """None is the adapter's own choice."""
    episode_length: int | None = None
    """Control steps; None is the adapter's own."""
    background: frozenset[Part] | None = None
    """The parts that the default camera shows and a video may replace; None where nobody has
    looked."""
    objects: bool | None = None
    """Whether there is something beside robot and background; None where nobody has looked."""
    furniture: tuple[str, ...] = ()
    """Bodies that no video replaces and that are no foreground either, such as a table: where an agent looks is scored
    against what remains. The adapter takes them under this name."""
    textures: bool | None = None
    """Whether floor, walls or table show a picture; None where nobody has looked."""
    floor_opacity: float = 0.3
    """What the Distracting Control Suite leaves of the floor before its video, in [0, 1]."""
    success: bool = False
    """Whether `info["success"]` tells if the task is solved."""

    @property
    def family(self) -> str:
        """The id's part before the slash."""
        return self.id.partition("/")[0]

    @property
    def domain(self) -> str:
        """The body that a dm_control task moves, such as `walker`; for other families the task."""
        return self.id.partition("/")[2].partition("-")[0]

    @property
    def may_tell_success(self) -> bool:
        """Whether an info may tell if the task is solved: of Gymnasium's own tasks nobody knows before."""
        return self.success or self.family == "gym"

    def build(self, episode_length: int | None = None) -> gymnasium.Env:
        """Return a new adapter, importing its simulator if need be.

        Raises:
            UserError: if the simulator has no such task.
        """
        adapter = self.adapter
        if isinstance(adapter, str):
            module, _, name = adapter.partition(":")
            adapter = getattr(importlib.import_module(module), name)
        arguments = {**self.arguments, "episode_length": episode_length or self.episode_length}
        if self.furniture:
            arguments["furniture"] = self.furniture
        return adapter(**arguments)

    @property
    def foreground(self) -> str:
        """What masks count, in words."""
        background = ("sky", "floor", "walls", *self.furniture)
        return f"all but {', '.join(background[:-1])} and {background[-1]}"


_TASKS: dict[str, TaskSpec] = {}


def register(id: str, adapter: Adapter, **settings: Any) -> TaskSpec:
    """Add a task of your own under `family/task`; `settings` are the fields of `TaskSpec`.

    The adapter is a `gymnasium.Env` that also has `view`, `get_state` and `set_state`, see
    `envs.toy` for a short one. Workers of a vector environment import it by its module and name.
    """
    if id.count("/") != 1 or not all(id.split("/")):
        raise UserError(f"cannot register '{id}'; expected an id of the form 'family/task'")
    if id in _TASKS:
        raise UserError(f"cannot register '{id}' a second time; choose another name")
    _TASKS[id] = TaskSpec(id, adapter, **settings)
    return _TASKS[id]


def list_ids() -> tuple[str, ...]:
    """Return every known id. Any other registered Gymnasium task works too, as `gym/<its id>`."""
    return tuple(sorted(_TASKS))


def get_spec(id: str) -> TaskSpec:
    """Return how to build `id`.

    Raises:
        UserError: if there is no such task; the nearest ids are offered.
    """
    if id in _TASKS:
        return _TASKS[id]
    family, _, task = str(id).partition("/")
    if family == "gym" and (task.partition(":")[2] or task in gymnasium.registry):
        return TaskSpec(id, _GYMNASIUM, {"task": task})
    raise UserError.unknown("task", str(id), _TASKS)


DMC_TASKS: Mapping[str, str] = MappingProxyType({
    "acrobot": "swingup swingup_sparse",
    "ball_in_cup": "catch",
    "cartpole": "balance balance_sparse swingup swingup_sparse two_poles three_poles",
    "cheetah": "run",
    "dog": "stand walk trot run fetch",
    "finger": "spin turn_easy turn_hard",
    "fish": "upright swim",
    "hopper": "stand hop",
    "humanoid": "stand walk run run_pure_state",
    "humanoid_CMU": "stand walk run",
    "lqr": "lqr_2_1 lqr_6_2",
    "manipulator": "bring_ball bring_peg insert_ball insert_peg",
    "pendulum": "swingup",
    "point_mass": "easy hard",
    "quadruped": "walk run escape fetch",
    "reacher": "easy hard",
    "stacker": "stack_2 stack_4",
    "swimmer": "swimmer6 swimmer15",
    "walker": "stand walk run",
})  # fmt: skip
"""dm_control 1.0.49: domain -> tasks."""

DMC_ACTION_REPEAT: Mapping[str, int] = MappingProxyType({
    "ball_in_cup": 4, "cartpole": 8, "cheetah": 4, "finger": 2, "reacher": 4, "walker": 4,
})  # fmt: skip
"""DMC-GB's domains as it repeats their actions; the others get DrQ-v2's 2."""

NO_SKY = frozenset("""
    dog-run dog-stand dog-trot dog-walk fish-swim fish-upright humanoid-run humanoid-run_pure_state
    humanoid-stand humanoid-walk humanoid_CMU-run humanoid_CMU-stand humanoid_CMU-walk
    point_mass-easy point_mass-hard quadruped-escape quadruped-run reacher-easy reacher-hard
    swimmer-swimmer6 InvertedDoublePendulum-v5 Swimmer-v5
""".split())  # fmt: skip
"""Tasks of dm_control and Gymnasium whose usual camera shows no sky: `video_easy` changes no pixel
of them. Like everything about backgrounds here it was rendered, and a test renders it again."""

NO_FLOOR = frozenset({"InvertedPendulum-v5"})
NO_WALLS = frozenset({"hand-insert", "sweep-into"})
"""Likewise: here the body has no floor, and there nothing stands around Meta-World's table."""

WITH_OBJECTS = frozenset({
    "ball_in_cup-catch", "dog-fetch", "finger-spin", "finger-turn_easy", "finger-turn_hard",
    "manipulator-bring_ball", "manipulator-bring_peg", "manipulator-insert_ball",
    "manipulator-insert_peg", "quadruped-fetch", "stacker-stack_2", "stacker-stack_4",
    "Pusher-v5", "Reacher-v5",
})  # fmt: skip
"""Tasks of dm_control and Gymnasium in which something moves beside the robot."""

NO_TEXTURES = frozenset(
    {"InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Pusher-v5", "Reacher-v5"}
)
"""Tasks of which nothing shows a picture that another could take the place of."""

SUITE_FLOOR: Mapping[str, float] = MappingProxyType({"reacher": 0.0, "walker": 1.0, "cheetah": 1.0})
"""dm_control's domain -> what the Distracting Control Suite leaves of the floor, as its authors' code
has it: nothing where the floor is all there is behind the robot, all of it where only the floor tells
how fast the robot runs. Other domains get 0.3."""

METAWORLD_TASKS = """
    assembly basketball bin-picking box-close button-press button-press-topdown
    button-press-topdown-wall button-press-wall coffee-button coffee-pull coffee-push dial-turn
    disassemble door-close door-lock door-open door-unlock drawer-close drawer-open faucet-close
    faucet-open hammer hand-insert handle-press handle-press-side handle-pull handle-pull-side
    lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall
    plate-slide plate-slide-back plate-slide-back-side plate-slide-side push push-back push-wall
    reach reach-wall shelf-place soccer stick-pull stick-push sweep sweep-into window-close
    window-open
""".split()
"""Meta-World 3.0.0."""

TOY_TASKS = ("balance", "catch", "goals", "reach", "recall")

_GYMNASIUM = "envs.gymnasium_tasks:GymnasiumTask"
_SKY_AND_FLOOR: frozenset[Part] = frozenset({"sky", "floor"})
_ROOM: frozenset[Part] = frozenset({"sky", "floor", "walls"})


def _register_own() -> None:
    for domain, tasks in DMC_TASKS.items():
        scene = _ROOM if domain in ("manipulator", "stacker") else _SKY_AND_FLOOR
        for task in tasks.split():
            register(
                f"dmc/{domain}-{task}",
                "envs.dm_control_suite:DMControlTask",
                arguments={"task": f"{domain}-{task}"},
                action_repeat=DMC_ACTION_REPEAT.get(domain, 2),
                episode_length=1000,
                background=_seen(f"{domain}-{task}", scene),
                objects=f"{domain}-{task}" in WITH_OBJECTS,
                textures=True,
                floor_opacity=SUITE_FLOOR.get(domain, 0.3),
            )
    for task in METAWORLD_TASKS:
        register(
            f"metaworld/{task}",
            "envs.metaworld_tasks:MetaWorldTask",
            arguments={"task": task},
            action_repeat=2,
            episode_length=500,
            background=_seen(task, _ROOM),
            objects=True,
            furniture=("table",),
            textures=True,
            success=True,
        )
    for task in TOY_TASKS:
        register(
            f"toy/{task}",
            f"envs.toy:{task.capitalize()}",
            background=_SKY_AND_FLOOR,
            objects=True,
            textures=True,
            success=task in ("goals", "reach"),
        )
    register(
        "toy/reach-drift",  # the floor moves: a background that is no good to remember
        "envs.toy:Reach",
        arguments={"drift": 0.05},
        background=_SKY_AND_FLOOR,
        objects=True,
        textures=True,
        success=True,
    )
    for task in _gymnasium_tasks():
        is_mujoco = "mujoco" in str(gymnasium.spec(task).entry_point)
        register(
            f"gym/{task}",
            _GYMNASIUM,
            arguments={"task": task},
            background=_seen(task, _SKY_AND_FLOOR if is_mujoco else frozenset()),
            objects=task in WITH_OBJECTS,
            textures=is_mujoco and task not in NO_TEXTURES,
        )


def _seen(task: str, scene: frozenset[Part]) -> frozenset[Part]:
    """Return the parts of a scene that the task's usual camera shows."""
    unseen = {"sky": NO_SKY, "floor": NO_FLOOR, "walls": NO_WALLS}
    return frozenset(part for part in scene if task not in unseen[part])


def _gymnasium_tasks() -> list[str]:
    """Return the newest versions of the tasks that Gymnasium itself brings and the pins can run."""
    families = tuple(f"gymnasium.envs.{name}" for name in ("classic_control", "mujoco", "toy_text"))
    newest: dict[str, gymnasium.envs.registration.EnvSpec] = {}
    for spec in gymnasium.registry.values():
        if spec.namespace is None and str(spec.entry_point).startswith(families):
            rival = newest.get(spec.name)
            if rival is None or (spec.version or 0) >= (rival.version or 0):
                newest[spec.name] = spec
    return [spec.id for spec in newest.values()]


@dataclass(frozen=True)
class Protocol:
    """What one line of papers fixed, so that its numbers can be compared with.

    The environment takes action repeat, camera, size and stack from it, the trainer the rest. All
    are for dm_control; a domain that the papers do not use gets their default.

    - `dmc-gb` (Hansen & Wang 2021, github.com/nicklashansen/dmcontrol-generalization-benchmark):
      `arguments.py` has action repeat 4, 84 pixels, batch 128, one update per agent step and the
      11-layer encoder; finger is run at 2 (its author in issue 13) and cartpole at 8 (the scripts
      of its predecessor PAD). SODA, SVEA, SGQN and MaDi follow it. 500k of its steps are 500k
      *agent* steps.
    - `drqv2` (Yarats et al. 2021, github.com/facebookresearch/drqv2): action repeat 2, camera 2 for
      quadruped, batch 256, an update every second agent step, 4-layer encoder. It counts
      environment frames.
    - `planet` (Hafner et al. 2019, github.com/google-research/planet): the action repeats of its
      `tasks.py` (but ball_in_cup at 4, as everyone after it; that file has 6), with the 84 pixels,
      4-layer encoder, one update per agent step and batch of 512 that model-free agents use on it
      (DrQ's `config.yaml`). PlaNet itself learns a model from 64 pixels.
    """

    name: str
    action_repeat: int
    encoder: Literal["dmc-gb", "drqv2"]
    updates_per_step: float
    batch_size: int
    action_repeats: Mapping[str, int] = field(default_factory=dict)
    cameras: Mapping[str, str | int] = field(default_factory=dict)
    size: int = 84
    frame_stack: int = 3

    def action_repeat_of(self, spec: TaskSpec) -> int:
        """Return the control steps per agent step of a task."""
        return self.action_repeats.get(spec.domain, self.action_repeat)

    def camera_of(self, spec: TaskSpec) -> str | int | None:
        """Return the camera of a task, None for the adapter's own."""
        return self.cameras.get(spec.domain, spec.camera)


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({
    "dmc-gb": Protocol(
        "dmc-gb", 4, "dmc-gb", updates_per_step=1.0, batch_size=128,
        action_repeats={"finger": 2, "cartpole": 8},
    ),
    "drqv2": Protocol(
        "drqv2", 2, "drqv2", updates_per_step=0.5, batch_size=256, cameras={"quadruped": 2},
    ),
    "planet": Protocol(
        "planet", 2, "drqv2", updates_per_step=1.0, batch_size=512,
        action_repeats={"cartpole": 8, "reacher": 4, "cheetah": 4, "ball_in_cup": 4},
    ),
})  # fmt: skip


def get_protocol(name: str, spec: TaskSpec) -> Protocol:
    """Return a protocol by its name.

    Raises:
        UserError: if there is none, or if it says nothing about this family of tasks.
    """
    if name not in PROTOCOLS:
        raise UserError.unknown("protocol", name, PROTOCOLS)
    if spec.family != "dmc":
        raise UserError(f"protocol '{name}' is for dmc/ tasks, not for {spec.id}; leave it out")
    return PROTOCOLS[name]


_register_own()
