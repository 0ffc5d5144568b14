"""Run by test_rendering in a process of its own per backend: everything draws beside everything else.

Prints one `name ok` or `name FAILED` per line; whatever else lands on stderr is noise that users would see.
"""

import gc
import multiprocessing
import threading

from envs.rendering import choose_backend

choose_backend()

import gymnasium  # noqa: E402
import metaworld.env_dict  # noqa: E402
import numpy as np  # noqa: E402
from absl import logging  # noqa: E402
from dm_control import suite  # noqa: E402

from envs.mujoco_view import MujocoView  # noqa: E402
from wrappers.errors import UserError  # noqa: E402

SIZE = 64


def check(name, passed):
    print(name, "ok" if passed else "FAILED", flush=True)


def main():
    logging.set_verbosity(logging.ERROR)  # MuJoCo on dm_control's models
    walker = suite.load("walker", "walk", task_kwargs={"random": 1})
    walker.reset()
    cheetah = gymnasium.make(
        "HalfCheetah-v5", render_mode="rgb_array", width=SIZE, height=SIZE, camera_id=0
    )
    cheetah.reset(seed=1)
    drawer = metaworld.env_dict.ALL_V3_ENVIRONMENTS["drawer-open-v3"](
        render_mode="rgb_array", camera_name="corner", width=SIZE, height=SIZE
    )
    drawer._set_task_called = True
    drawer._freeze_rand_vec = False
    drawer.reset(seed=1)

    size = {"height": SIZE, "width": SIZE}
    views = {
        "dm_control": MujocoView(
            lambda: (walker.physics.model.ptr, walker.physics.data.ptr), camera=0, **size
        ),
        "gymnasium": MujocoView(
            lambda: (cheetah.unwrapped.model, cheetah.unwrapped.data), camera=0, **size
        ),
        "metaworld": MujocoView(lambda: (drawer.model, drawer.data), camera="corner", **size),
    }
    shipped = {
        "dm_control": lambda: walker.physics.render(SIZE, SIZE, camera_id=0),
        "gymnasium": cheetah.render,
        "metaworld": drawer.render,
    }
    first = {}
    for name, view in views.items():
        # Ours is drawn before, between and after the simulator's own, which must not notice.
        ours = view.render()
        theirs = shipped[name]().copy()
        first[name] = ours
        check(f"{name} reference-is-shipped", np.array_equal(ours, theirs))
        check(f"{name} still-equal", np.array_equal(view.render(), ours))
        passing = MujocoView(view._simulation, camera=view._camera_name, quality="fast", **size)
        passing.render()
        passing.close()
        check(f"{name} shipped-unharmed", np.array_equal(shipped[name](), theirs))

    fast = {
        name: MujocoView(view._simulation, camera=view._camera_name, quality="fast", **size)
        for name, view in views.items()
    }
    first_fast = {name: view.render() for name, view in fast.items()}
    views.pop("gymnasium").close()
    fast.pop("dm_control")
    gc.collect()
    check(
        "closing-one",
        all(np.array_equal(view.render(), first[name]) for name, view in views.items()),
    )
    check(
        "closing-one-fast",
        all(np.array_equal(view.render(), first_fast[name]) for name, view in fast.items()),
    )
    cheetah.close()  # deletes GL objects by number in whatever context is current
    check(
        "after-theirs-closed",
        all(np.array_equal(view.render(), first[name]) for name, view in views.items()),
    )

    pictures = []
    thread = threading.Thread(target=lambda: pictures.append(views["dm_control"].render()))
    thread.start()
    thread.join()
    check("other-thread", len(pictures) == 1 and np.array_equal(pictures[0], first["dm_control"]))

    child = multiprocessing.get_context("fork").Process(target=forked, args=(views["dm_control"],))
    child.start()
    child.join(60)
    check("fork-is-refused", child.exitcode == 7)
    check("parent-after-fork", np.array_equal(views["dm_control"].render(), first["dm_control"]))


def forked(view):
    try:
        view.render()
    except UserError as error:
        raise SystemExit(7 if "forkserver" in str(error) else 8) from None


if __name__ == "__main__":
    main()
