import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

import envs
from envs import rendering
from envs.rendering import choose_backend, resolve_quality
from wrappers.errors import UserError

resolve_quality("fast")
choose_backend()

import mujoco  # noqa: E402

from envs.mujoco_view import MujocoView  # noqa: E402
from envs.scenery import Paint, Scenery  # noqa: E402

ROOT = Path(__file__).parents[2]
SIZE = 48
SKY, FLOOR = frozenset({"sky"}), frozenset({"floor"})

SCENE = """
<mujoco>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1=".4 .6 .8" rgb2="0 0 0"
      width="256" height="256" mark="random" markrgb="1 1 1"/>
    <texture name="grid" type="2d" builtin="checker" rgb1=".1 .2 .3" rgb2=".2 .3 .4"
      width="64" height="64"/>
    <material name="grid" texture="grid" texrepeat="1 1" texuniform="true" reflectance=".2"/>
    <material name="self" rgba=".7 .5 .3 1"/>
  </asset>
  <worldbody>
    <light pos="0 0 4"/>
    <geom name="floor" type="plane" size="3 3 .1" material="grid"/>
    <camera name="front" pos="0 -4 1.5" xyaxes="1 0 0 0 .3 1"/>
    <camera name="rolled" pos="0 -4 1.5" xyaxes="-1 0 0 0 -.3 -1"/>
    <body pos="0 0 {z}">
      <joint type="slide" axis="1 0 0"/>
      <geom type="box" size=".4 .4 .5" material="self" rgba="1 1 1 {alpha}"/>
    </body>
  </worldbody>
</mujoco>
"""


def simulation(alpha=1, z=1, xml=SCENE):
    xml = xml.format(alpha=alpha, z=z).replace('material="self" rgba="1 1 1 1"', 'material="self"')
    if alpha != 1:
        xml = xml.replace('material="self" rgba="1 1 1', 'rgba=".7 .5 .3')
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


@pytest.fixture(name="view")
def _view():
    """Make views of a simulation and close them after the test."""
    views = []

    def make(sim, quality="fast", camera="front", **settings):
        look = sim if callable(sim) else lambda: sim
        views.append(
            MujocoView(look, height=SIZE, width=SIZE, camera=camera, quality=quality, **settings)
        )
        return views[-1]

    yield make
    for view in views:
        view.close()


def snapshot(model):
    """Copy every array of a model, and what a renderer changes beside them."""
    arrays = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    copies = {name: a.copy() for name, a in arrays.items() if isinstance(a, np.ndarray)}
    visual = (model.vis.quality, model.vis.global_)
    fields = [f for f in ("offsamples", "shadowsize", "numslices", "offwidth", "offheight")]
    copies["visual"] = np.array([getattr(v, f, 0) for v, f in itertools.product(visual, fields)])
    return copies


def same(left, right):
    return all(np.array_equal(left[name], right[name], equal_nan=True) for name in left)


def middle(mask):
    """Return the row and column in the middle of what a mask covers."""
    rows, columns = np.nonzero(mask)
    return round(rows.mean()), round(columns.mean())


# Side by side ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_simulators_draw_side_by_side_exactly_as_shipped_and_exit_silently(backend, monkeypatch):
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)  # bound to this process's own backend
    monkeypatch.delenv(rendering._RENDERER_VARIABLE, raising=False)
    if rendering._probe.__wrapped__(backend) is None:
        pytest.skip(f"{backend} is not installed here")
    environment = {**os.environ, "MUJOCO_GL": backend, "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("side_by_side.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) >= 14
    assert [line for line in lines if not line.endswith(" ok")] == []


DRAWN = """
import hashlib, test_rendering
for quality in ("reference", "fast"):
    view = test_rendering.MujocoView(test_rendering.simulation, height=84, width=84, quality=quality)
    print(hashlib.sha256(view.render()).hexdigest())
"""


def test_pixels_do_not_depend_on_how_many_threads_software_gl_has():
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    drawn = [
        subprocess.run(
            [sys.executable, "-c", DRAWN],
            env={**os.environ, "PYTHONPATH": paths, "LP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for threads in ("0", "4")
    ]
    assert drawn[0].count("\n") == 2
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("quality", ["fast", "reference"])
def test_a_closed_view_leaves_the_others_pixels_and_draws_again_itself(view, quality):
    kept, closed = view(simulation(), quality), view(simulation(z=1.5), quality)
    before, own = kept.render(), closed.render()
    assert not np.array_equal(before, own)
    closed.close()
    closed.close()
    assert np.array_equal(kept.render(), before)
    assert np.array_equal(closed.render(), own)


def test_a_renderer_of_another_quality_in_between_changes_nothing(view):
    sim = simulation()
    reference, fast = view(sim, "reference"), view(sim, "fast")
    first = reference.render(), fast.render()
    for _ in range(2):
        assert np.array_equal(fast.render(), first[1])
        assert np.array_equal(reference.render(), first[0])


def test_views_that_are_dropped_unclosed_in_another_thread_harm_nobody(view):
    kept = view(simulation())
    before = kept.render()

    def drop():
        for _ in range(3):
            MujocoView(simulation, height=SIZE, width=SIZE).render()
        gc.collect()

    thread = threading.Thread(target=drop)
    thread.start()
    for _ in range(20):
        assert np.array_equal(kept.render(), before)
    thread.join()
    assert np.array_equal(kept.render(), before)


def grown_memory(cycles, quality):
    sim = simulation()
    process = psutil.Process()
    for cycle in range(cycles + 20):
        if cycle == 20:
            gc.collect()
            before = process.memory_info().rss
        view = MujocoView(lambda: sim, height=SIZE, width=SIZE, quality=quality)
        view.render()
        if cycle % 2:
            view.close()
    gc.collect()
    return (process.memory_info().rss - before) / 2**20


def test_hundreds_of_views_leave_no_memory_behind():
    # One view holds about 2 MB: 150 that leaked would take 300.
    assert grown_memory(150, "fast") < 60


@pytest.mark.slow
@pytest.mark.parametrize(("quality", "cycles"), [("fast", 4000), ("reference", 400)])
def test_thousands_of_views_leave_no_memory_behind(quality, cycles):
    assert grown_memory(cycles, quality) < 100


# Pictures ----------------------------------------------------------------------------------------


def test_reference_is_what_mujocos_own_renderer_draws(view):
    model, data = simulation()
    ours = view((model, data), "reference").render()
    with rendering._context():
        own = mujoco.Renderer(model, SIZE, SIZE)
        own.update_scene(data, "front")
        theirs = own.render()
        # In this order, with its own context current: its `close` would delete our objects.
        own._gl_context.make_current()
        own._mjr_context.free()
        own._mjr_context = None
        own.close()
    assert np.array_equal(ours, theirs)


def test_fast_shows_the_same_scene(view):
    sim = simulation()
    reference, fast = view(sim, "reference"), view(sim, "fast")
    masks = reference.foreground(), fast.foreground()
    assert (masks[0] & masks[1]).sum() > 0.95 * (masks[0] | masks[1]).sum()
    body = masks[0] & masks[1]
    difference = np.abs(reference.render().astype(int) - fast.render())
    assert difference[body].mean() < 12
    assert difference.mean() < 20


def test_a_picture_is_fresh_upright_and_follows_the_simulation(view):
    model, data = simulation()
    looking = view((model, data))
    first = looking.render()
    kept = first.copy()
    assert first.dtype == np.uint8
    assert first.shape == (SIZE, SIZE, 3)
    assert first.flags.c_contiguous
    sky, floor = first[2].mean(), first[-3].mean()
    assert sky > floor, "the sky is brighter than the floor and must be on top"
    data.qpos[0] = 0.5
    mujoco.mj_forward(model, data)
    second = looking.render()
    assert np.array_equal(first, kept)
    columns = [np.flatnonzero(looking.foreground().any(0)).mean(), SIZE / 2]
    assert columns[0] > columns[1] + 2, "moving along +x is moving right"
    assert not np.array_equal(first, second)


def test_a_camera_that_hangs_upside_down_is_turned(view):
    sim = simulation()
    upright, turned = view(sim), view(sim, camera="rolled", upside_down=True)
    assert np.abs(upright.render().astype(int) - turned.render()).mean() < 1
    for layers in (view(sim).render_layers(SKY), turned.render_layers(SKY)):
        assert layers.coverage[:3].all()
        assert not layers.coverage[-3:].any()


def test_a_rebuilt_model_is_drawn_anew_and_keeps_its_paint(view):
    sims = [simulation(), simulation(z=1.4)]
    current = [0]
    moving = view(lambda: sims[current[0]])
    moving.set_colors({"self": np.array([0, 1, 0])})
    moving.render()
    current[0] = 1
    fresh = view(sims[1])
    fresh.set_colors({"self": np.array([0, 1, 0])})
    assert np.array_equal(moving.render(), fresh.render())


def test_a_terrain_that_changes_is_drawn_as_it_is_now(view):
    terrain = SCENE.replace(
        "</asset>", '<hfield name="hills" nrow="8" ncol="8" size="2 2 1 .1"/></asset>'
    ).replace('type="plane" size="3 3 .1"', 'type="hfield" hfield="hills"')
    model, data = simulation(z=3, xml=terrain)
    looking = view((model, data))
    flat = looking.render()
    model.hfield_data[:] = np.linspace(0, 1, 64)
    hills = looking.render()
    assert not np.array_equal(flat, hills)
    assert np.array_equal(hills, view((model, data)).render())
    assert "floor" in looking.parts


# Layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [1, 0.2], ids=["above", "sunken"])
@pytest.mark.parametrize("hidden", [SKY, SKY | FLOOR], ids=["sky", "sky-floor"])
def test_fast_layers_hide_exactly_the_background(view, hidden, z):
    looking = view(simulation(z=z))
    clean, layers = looking.render(), looking.render_layers(hidden)
    assert set(np.unique(layers.coverage)) == {0, 1}
    kept = layers.coverage == 0
    assert np.array_equal(layers.rgb[kept], clean[kept])
    if hidden == SKY | FLOOR:
        assert np.array_equal(kept, looking.foreground())
    else:
        assert kept.sum() > looking.foreground().sum()
    assert np.array_equal(looking.render(), clean), "what was hidden is back"


def test_a_hidden_floor_uncovers_nothing_in_the_reference_either(view):
    looking = view(simulation(z=0.2), "reference")
    coverage = looking.render_layers(SKY | FLOOR).coverage
    assert coverage[~looking.foreground()].min() >= 0.5
    assert ((coverage > 0) & (coverage < 1)).sum() > 10, "silhouettes stay soft"


@pytest.mark.parametrize("task", ["gym/Reacher-v5", "dmc/dog-fetch"])
def test_what_lies_below_the_floor_shows_the_video_too(task):
    with contextlib.closing(envs.make(task, seed=0, quality="fast")) as env:
        env.reset()
        layers = env.view.render_layers(SKY | FLOOR)
        assert np.array_equal(layers.coverage == 0, env.view.foreground())


def test_a_floor_can_be_hidden_under_the_sky(view):
    looking = view(simulation())
    clean, layers = looking.render(), looking.render_layers(FLOOR)
    sky = looking.render_layers(SKY).coverage == 1
    foreground = looking.foreground()
    assert np.array_equal(layers.coverage == 1, ~sky & ~foreground)
    assert np.array_equal(layers.rgb[sky | foreground], clean[sky | foreground])


def test_reference_layers_put_back_before_their_own_sky_give_the_clean_picture(view):
    sim = simulation()
    looking = view(sim, "reference")
    clean, layers = looking.render(), looking.render_layers(SKY)
    empty = mujoco.MjModel.from_xml_string(
        SCENE.format(alpha=1, z=1).replace('<geom name="floor"', '<geom rgba="0 0 0 0"')
        .replace('<geom type="box"', '<geom type="box" group="5"')
    )  # fmt: skip
    data = mujoco.MjData(empty)
    mujoco.mj_forward(empty, data)
    sky = view((empty, data), "reference").render()
    mixed = (layers.coverage > 0) & (layers.coverage < 1)
    assert mixed.sum() > 10, "multisampled silhouettes"
    share = layers.coverage[..., None]
    composed = layers.rgb * (1 - share) + sky * share
    assert np.abs(composed - clean).max() <= 4
    assert np.array_equal(layers.rgb[layers.coverage == 0], clean[layers.coverage == 0])


@pytest.mark.parametrize("quality", ["fast", "reference"])
def test_what_is_transparent_lets_the_new_background_shine_through(view, quality):
    looking = view(simulation(alpha=0.25), quality)
    layers = looking.render_layers(SKY | FLOOR)
    # Its front and its back let three quarters through each.
    assert 0.5 < layers.coverage[middle(looking.foreground())] < 0.6


def test_visible_parts_are_those_with_a_pixel(view):
    sim = simulation()
    assert view(sim).visible_parts() == {"sky", "floor"}
    above = mujoco.MjvCamera()
    above.distance, above.elevation = 4, -90
    top = view(sim, camera=above)
    assert top.visible_parts() == {"floor"}
    assert top.parts == {"sky", "floor"}


# Colors ------------------------------------------------------------------------------------------


def test_colors_are_the_models_own(view):
    colors = view(simulation()).colors()
    expected = {
        "sky": [0.4, 0.6, 0.8],
        "grid1": [0.1, 0.2, 0.3],
        "grid2": [0.2, 0.3, 0.4],
        "self": [0.7, 0.5, 0.3],
    }
    assert colors.keys() == expected.keys()
    for slot, color in expected.items():
        np.testing.assert_allclose(colors[slot], color, atol=0.005)


@pytest.mark.parametrize("quality", ["fast", "reference"])
@pytest.mark.parametrize("slot", ["sky", "grid1", "grid2", "self"])
def test_repainting_changes_that_slot_alone_and_is_undone(view, slot, quality):
    sim = simulation()
    before = snapshot(sim[0])
    looking, other = view(sim, quality), view(sim, quality)
    clean = looking.render()
    regions = {
        "self": looking.foreground(),
        "sky": looking.render_layers(SKY).coverage == 1,
    }
    regions["grid1"] = regions["grid2"] = looking.render_layers(SKY | FLOOR).coverage == 1
    looking.set_colors({slot: np.array([0.9, 0.1, 0.1])})
    painted = looking.render().astype(int)
    redder = (painted - clean)[..., 0] - (painted - clean)[..., 2]
    assert redder[regions[slot]].mean() > 10
    if quality == "fast":  # in the reference, the floor mirrors the others
        changed = (painted != clean).any(-1)
        assert not changed[~regions[slot]].any()
    assert np.array_equal(other.render(), clean), "views of one model are painted apart"
    looking.set_colors({})
    assert np.array_equal(looking.render(), clean)
    assert same(before, snapshot(sim[0])), "a view leaves the model as it was"


def test_stars_stay_white_in_a_repainted_sky(view):
    looking = view(simulation(), "reference")
    texels = rendering.texture_data(looking._model, 0)
    looking.set_colors({"sky": np.array([1, 0, 0])})
    looking.render()
    repainted = looking._changes._repaint(texels, {"sky": np.array([1, 0, 0])})
    stars = (texels == 255).all(-1)
    assert stars.any()
    assert (repainted[stars] == 255).all()
    assert not repainted[~stars][..., 1:].any()


def test_scenery_of_ones_own(view):
    def scenery(model):
        return Scenery({"walls": [1]}, {"block": Paint(np.array([0.7, 0.5, 0.3]), materials=[1])})

    looking = view(simulation(), scenery=scenery)
    assert looking.parts == {"sky", "walls"}
    assert looking.colors().keys() == {"block"}
    clean = looking.render()
    looking.set_colors({"block": np.zeros(3)})
    assert looking.render().mean() < clean.mean()
    assert looking.foreground()[-1].all()
    assert not looking.foreground()[middle(view(simulation()).foreground())]


# Mistakes ----------------------------------------------------------------------------------------


def test_unknown_names_offer_the_nearest(view):
    with pytest.raises(UserError, match="camera 'fron'; did you mean front"):
        view(simulation(), camera="fron")
    with pytest.raises(UserError, match="camera '7'"):
        view(simulation(), camera=7)
    with pytest.raises(UserError, match="color slot 'grid3'; did you mean grid"):
        view(simulation()).set_colors({"grid3": np.zeros(3)})
    with pytest.raises(UserError, match="quality 'fats'; did you mean fast"):
        resolve_quality("fats")


def test_a_closed_renderer_says_so():
    model, _ = simulation()
    renderer = rendering.Renderer(model, SIZE, SIZE)
    renderer.close()
    with pytest.raises(RuntimeError, match="closed"):
        renderer.draw()


@pytest.fixture(name="without_gl")
def _without_gl(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delenv(rendering._RENDERER_VARIABLE, raising=False)
    monkeypatch.setattr(rendering, "_probe", lambda backend: None)
    yield
    monkeypatch.delenv("MUJOCO_GL")


@pytest.mark.usefixtures("without_gl")
def test_without_gl_simulators_still_import_and_drawing_names_the_packages(capsys):
    assert choose_backend() == "disable"
    with pytest.raises(UserError, match=r"libegl1.*libosmesa6"):
        rendering._Context()
    with pytest.raises(UserError, match="libegl1"):
        resolve_quality("auto")
    assert resolve_quality("reference") == "reference"
    assert rendering.main() == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "libosmesa6" in captured.err


def test_osmesa_is_chosen_where_egl_cannot_draw(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv(rendering._RENDERER_VARIABLE, "")
    monkeypatch.setattr(rendering, "_probe", lambda backend: "x" if backend == "osmesa" else None)
    assert choose_backend() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert choose_backend() == "egl", "the user's own choice is kept"


@pytest.mark.parametrize(
    ("renderer", "quality"),
    [("llvmpipe (LLVM 15)", "fast"), ("softpipe", "fast"), ("NVIDIA H200/PCIe", "reference")],
)
def test_auto_quality_is_fast_only_in_software(monkeypatch, renderer, quality):
    monkeypatch.setenv("LP_NUM_THREADS", os.environ.get("LP_NUM_THREADS", "0"))
    monkeypatch.setenv(rendering._RENDERER_VARIABLE, renderer)
    assert resolve_quality("auto") == quality
    assert resolve_quality("reference") == "reference"
    assert resolve_quality("fast") == "fast"
