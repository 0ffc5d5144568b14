"""Speed of pictures and environments, against the simulators as they are shipped."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

import envs
from envs.rendering import Quality, choose_backend, gl_renderer, resolve_quality
from experiments.measuring.timing import Elsewhere, Table, interleave, rates, serve

SIZE = 84
RENDERED = (
    "dmc/walker-walk",
    "dmc/cartpole-swingup",
    "dmc/cheetah-run",
    "dmc/humanoid-walk",
    "dmc/quadruped-walk",
    "metaworld/drawer-open",
    "gym/HalfCheetah-v5",
)
DISTRACTIONS = (
    "clean", "color_hard", "video_easy", "video_hard", "camera_hard", "light_hard", "noise_hard",
    "textures", "dcs_hard", "randomized",
)  # fmt: skip
STEPPED = ("dmc/walker-walk", "toy/reach")
NUM_ENVS = 2


@dataclass(frozen=True)
class Scene:
    """A simulation that stands still, and what its own library draws of it."""

    model: Any
    data: Any
    camera: int
    shipped: Callable[[], np.ndarray]
    close: Callable[[], None]


def rendering(seconds: float, tasks: Sequence[str] = RENDERED) -> list[Table]:
    """Compare frames per second as shipped, in both qualities, and of MuJoCo's drawing calls alone."""
    resolve_quality("fast")  # before a simulator is imported
    table = Table(
        f"Rendering: frames/s at {SIZE} x {SIZE}",
        [
            "task",
            "as shipped",
            "reference",
            "fast",
            "bare",
            "reference / shipped",
            "fast / shipped",
            "both in one process",
        ],
        f"Drawn by {gl_renderer()}. As shipped: `physics.render`, Meta-World's and Gymnasium's `env.render`, in a "
        "process of their own with llvmpipe's threads on, as their users get them; so is reference. Fast has them off "
        "(LP_NUM_THREADS=0), which is a matter of the process; the last column is fast / shipped with all of it in the "
        "shipped renderer's. Processes take turns, one draws at a time. Bare is the floor of fast: mjr_render and "
        "mjr_readPixels on a scene that is already there.",
    )
    for task in tasks:
        with ExitStack() as stack:
            peer = Elsewhere(__spec__.name, task, without=["LP_NUM_THREADS"])
            stack.enter_context(closing(peer))
            calls = _drawing_calls(task, stack)
            fps = rates(
                {
                    "shipped": peer.calls["shipped"],
                    "reference": peer.calls["reference"],
                    "fast": calls["fast"],
                    "bare": calls["bare"],
                    "fast there": peer.calls["fast"],
                },
                seconds,
            )
        fast_there, shipped = fps.pop("fast there"), fps["shipped"]
        ratios = [fps["reference"] / shipped, fps["fast"] / shipped, fast_there / shipped]
        table.rows.append([task, *fps.values(), *ratios])
    families = dict.fromkeys(task.partition("/")[0] for task in tasks)
    for family in families:
        rows = [row for row in table.rows if str(row[0]).startswith(family + "/")]
        means = np.exp(np.log(np.array([row[1:] for row in rows], float)).mean(0)).tolist()
        table.rows.append([f"geometric mean of {family}", *means])
    return [table]


def _drawing_calls(task: str, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """Return every way to draw one scene; the stack closes them."""
    import mujoco

    from envs.mujoco_view import MujocoView
    from envs.rendering import Renderer

    scene = stack.enter_context(closing(_SCENES[task.partition("/")[0]](task)))
    camera = mujoco.MjvCamera()
    camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED.value, scene.camera
    calls: dict[str, Callable[[], object]] = {"shipped": scene.shipped}
    for quality in get_args(Quality):
        view = MujocoView(
            lambda: (scene.model, scene.data),
            height=SIZE,
            width=SIZE,
            camera=scene.camera,
            quality=quality,
        )
        calls[quality] = stack.enter_context(closing(view)).render
    bare = stack.enter_context(closing(Renderer(scene.model, SIZE, SIZE, quality="fast")))
    bare.update(scene.data, camera)
    return calls | {"bare": bare.draw}


def _serve_drawing(task: str) -> None:
    """Draw a task's scene when asked to on standard input; see `Elsewhere`."""
    answers, sys.stdout = sys.stdout, sys.stderr  # simulators may print
    with ExitStack() as stack:
        serve(_drawing_calls(task, stack), sys.stdin, answers)


def _dm_control(task: str) -> Scene:
    choose_backend()
    from absl import logging
    from dm_control import suite

    logging.set_verbosity(logging.ERROR)  # MuJoCo on dm_control's own models
    domain, _, name = task.partition("/")[2].partition("-")
    env = suite.load(domain, name, task_kwargs={"random": 0})
    env.reset()
    for _ in range(5):
        env.step(env.action_spec().generate_value())
    physics = env.physics
    camera = 2 if domain == "quadruped" else 0

    def shipped() -> np.ndarray:
        return physics.render(SIZE, SIZE, camera_id=camera)

    return Scene(physics.model.ptr, physics.data.ptr, camera, shipped, env.close)


def _metaworld(task: str) -> Scene:
    choose_backend()
    import metaworld

    name = f"{task.partition('/')[2]}-v3"
    benchmark = metaworld.MT1(name, seed=0)
    env: Any = benchmark.train_classes[name](
        render_mode="rgb_array", camera_name="corner2", width=SIZE, height=SIZE
    )
    env.set_task(benchmark.train_tasks[0])
    env.reset()
    return Scene(env.model, env.data, env.model.camera("corner2").id, env.render, env.close)


def _gymnasium(task: str) -> Scene:
    choose_backend()
    import gymnasium

    name = task.partition("/")[2]
    env: Any = gymnasium.make(name, render_mode="rgb_array", width=SIZE, height=SIZE, camera_id=0)
    env.reset(seed=0)
    return Scene(env.unwrapped.model, env.unwrapped.data, 0, env.render, env.close)


_SCENES = {"dmc": _dm_control, "metaworld": _metaworld, "gym": _gymnasium}


def distractions(seconds: float, task: str = "dmc/walker-walk") -> list[Table]:
    """Compare what a picture costs under each distraction."""
    table = Table(
        f"Distractions: {task}, fast, {SIZE} x {SIZE}",
        ["distraction", "ms per picture", "more than clean"],
        "One picture of one agent step: the distraction goes on by a step, and its picture is drawn.",
    )
    with ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        settings: dict[str, dict[str, Any]] = {name: {"distraction": name} for name in DISTRACTIONS}
        settings["clean, supersample 4"] = {"supersample": 4}
        for name, own in settings.items():
            env = envs.make(task, quality="fast", size=SIZE, seed=0, **own)
            stack.enter_context(closing(env)).reset()
            calls[name] = _picture(env)
        measured = interleave(calls, seconds)
    for name, time in measured.items():
        table.rows.append([name, 1000 * time, 1000 * (time - measured["clean"])])
    return [table]


def _picture(env: envs.Environment) -> Callable[[], object]:
    def picture() -> None:
        assert env.distraction is not None
        env.distraction.advance(env.view)
        env.distraction.frame(env.view)

    return picture if env.distraction is not None else env.view.render


def environments(seconds: float, tasks: Sequence[str] = STEPPED) -> list[Table]:
    """Compare agent steps per second of a vector environment with and without worker processes."""
    table = Table(
        f"Environments: agent steps/s of {NUM_ENVS} together, with pictures",
        ["task", "in process", "1 worker", "2 workers", "2 workers / in process", "states alone"],
        "dm_control at 84 pixels, action repeat 4, fast; toy at 24 pixels. States alone, in process, is the floor: "
        "the simulator without pictures. With workers the learner's process is free meanwhile.",
    )
    for task in tasks:
        is_toy = task.startswith("toy/")
        own: dict[str, Any] = {"size": 24} if is_toy else {"size": SIZE, "action_repeat": 4}
        with ExitStack() as stack:
            calls = {}
            for name, workers, observation in (
                ("in process", 0, "pixels"),
                ("1 worker", 1, "pixels"),
                ("2 workers", 2, "pixels"),
                ("states alone", 0, "state"),
            ):
                vector = envs.make_vec(
                    task, NUM_ENVS, workers=workers, observation=observation, seed=0, **own
                )
                calls[name] = _step(stack.enter_context(closing(vector)))
            measured = rates(calls, seconds, per_call=NUM_ENVS)
        alone = measured.pop("states alone")
        ratio = measured["2 workers"] / measured["in process"]
        table.rows.append([task, *measured.values(), ratio, alone])
    return [table]


def _step(vector: Any) -> Callable[[], object]:
    vector.reset(seed=0)
    vector.action_space.seed(0)
    actions = itertools.cycle([vector.action_space.sample() for _ in range(64)])
    return lambda: vector.step(next(actions))


if __name__ == "__main__":
    _serve_drawing(sys.argv[1])
