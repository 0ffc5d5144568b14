"""Changes of a MuJoCo picture: exact where they can be computed, and gone when they are taken back."""

import math

import numpy as np
import pytest

from envs.rendering import choose_backend, resolve_quality

resolve_quality("fast")
choose_backend()

import mujoco  # noqa: E402

import envs  # noqa: E402
from envs.mujoco_changes import rotation  # noqa: E402
from envs.mujoco_view import MujocoView  # noqa: E402
from envs.snapshot import physics_state  # noqa: E402
from tests.envs.test_rendering import SCENE, SIZE, same, simulation, snapshot  # noqa: E402
from wrappers.errors import UserError  # noqa: E402
from wrappers.view import PALETTES, CameraPlace, CameraShift, Lighting, undress  # noqa: E402

FRONT = '<camera name="front" pos="0 -4 1.5" xyaxes="1 0 0 0 .3 1"/>'
AS_IT_IS = Lighting(0.0, 0.0, np.ones(3), 1.0, np.ones(3))


@pytest.fixture(name="view")
def _view():
    """Make views of a simulation and close them after the test."""
    views = []

    def make(sim, quality="fast", camera="front"):
        views.append(
            MujocoView(lambda: sim, height=SIZE, width=SIZE, camera=camera, quality=quality)
        )
        return views[-1]

    yield make
    for view in views:
        view.close()


def almost_equal(left, right):
    """Tell whether pictures agree but for what rounding does to edges."""
    return (np.abs(left.astype(int) - right).max(-1) > 8).mean() < 0.01


# Camera ------------------------------------------------------------------------------------------

SHIFTS = [
    CameraShift(horizontal=0.5),
    CameraShift(vertical=-0.4),
    CameraShift(roll=0.3),
    CameraShift(distance=1.4),
    CameraShift(-0.3, 0.15, -0.5, 0.8),
]


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_displaced_camera_sees_what_one_built_there_sees(view, shift):
    model, data = simulation()
    looking = view((model, data))
    clean = looking.render()
    back = model.cam_mat0[0].reshape(3, 3)[:, 2]
    distance = np.linalg.norm(model.cam_poscom0[0])
    pivot = model.cam_pos[0] - distance * back
    azimuth = math.atan2(back[1], back[0]) + shift.horizontal
    inclination = math.acos(back[2]) + shift.vertical
    level = math.sin(inclination)
    z = np.array((level * math.cos(azimuth), level * math.sin(azimuth), math.cos(inclination)))
    x = np.cross((0, 0, 1), z) / level
    y = np.cross(z, x)
    right = math.cos(shift.roll) * x + math.sin(shift.roll) * y
    up = -math.sin(shift.roll) * x + math.cos(shift.roll) * y
    place = pivot + distance * shift.distance * z
    numbers = [" ".join(map(str, v)) for v in (place, (*right, *up))]
    built = FRONT.replace("0 -4 1.5", numbers[0]).replace("1 0 0 0 .3 1", numbers[1])
    assert FRONT in SCENE
    expected = view(simulation(xml=SCENE.replace(FRONT, built))).render()
    looking.set_camera(shift)
    seen = looking.render()
    assert almost_equal(seen, expected)
    assert not almost_equal(seen, clean)


def test_a_free_camera_moves_by_the_same_angles(view):
    def camera(azimuth, elevation, distance):
        free = mujoco.MjvCamera()
        free.lookat[:], free.distance = (0, 0, 0.7), distance
        free.azimuth, free.elevation = azimuth, elevation
        return free

    sim = simulation()
    looking = view(sim, camera=camera(60, -30, 4))
    assert looking.camera().inclination == pytest.approx(math.radians(60))
    looking.set_camera(CameraShift(math.radians(25), math.radians(12), 0, 1.3))
    assert almost_equal(looking.render(), view(sim, camera=camera(85, -18, 5.2)).render())


def test_a_camera_straight_above_turns_about_its_own_upward_direction(view):
    above = '<camera name="front" pos="0 0 4" xyaxes="1 0 0 0 1 0"/>'
    looking = view(simulation(z=0.5, xml=SCENE.replace(FRONT, above)))
    assert looking.camera() == CameraPlace(math.pi / 2, is_overhead=True)
    clean = looking.foreground()
    sides = []
    for angle in (0.6, -0.6):
        looking.set_camera(CameraShift(horizontal=angle))
        sides.append(looking.foreground())
    assert clean.any()
    assert (sides[0] != sides[1][:, ::-1]).mean() < 0.01, "the block is as wide on both sides"
    assert sides[0].sum() > 1.1 * clean.sum(), "one of its sides is seen"


def test_rotations_are_rotations():
    rng = np.random.default_rng(0)
    for _ in range(20):
        axis, angle = rng.normal(size=3), rng.uniform(-4, 4)
        turn, quaternion, matrix = rotation(axis, angle), np.zeros(4), np.zeros(9)
        mujoco.mju_axisAngle2Quat(quaternion, axis / np.linalg.norm(axis), angle)
        mujoco.mju_quat2Mat(matrix, quaternion)
        np.testing.assert_allclose(turn.ravel(), matrix, atol=1e-12)


# Lights ------------------------------------------------------------------------------------------

LAMP = """
<mujoco>
  <visual><headlight active="0"/></visual>
  <worldbody>
    <light pos="0 0 4" directional="true" diffuse=".9 .9 .9" specular="0 0 0"/>
    <geom type="plane" size="9 9 .1" rgba=".8 .8 .8 1"/>
    <camera name="front" pos="0 0 3" xyaxes="1 0 0 0 1 0"/>
    <body><geom size=".1" pos="8 0 1"/><joint/></body>
  </worldbody>
</mujoco>
"""


@pytest.mark.parametrize("quality", ["fast", "reference"])
@pytest.mark.parametrize("tilt", [0.0, 0.5, 1.0])
def test_a_floor_is_lit_by_the_cosine_of_the_tilt_and_the_color_of_the_lamp(view, tilt, quality):
    looking = view(simulation(xml=LAMP), quality)
    color = np.array((1.0, 0.5, 0.25))
    looking.set_lights(Lighting(tilt, 2.0, color, 1.0, np.ones(3)))
    expected = 255 * 0.8 * 0.9 * math.cos(tilt) * color
    np.testing.assert_allclose(looking.render()[SIZE // 2, SIZE // 2], expected, atol=2)


@pytest.mark.parametrize("quality", ["fast", "reference"])
def test_light_as_it_is_changes_nothing_and_without_any_all_but_the_sky_is_black(view, quality):
    looking = view(simulation(), quality)
    clean = looking.render()
    sky = ~looking.foreground() & (looking.render_layers(frozenset({"sky"})).coverage == 1)
    looking.set_lights(AS_IT_IS)
    assert (looking.render() == clean).all()
    looking.set_lights(Lighting(0.5, 1.0, np.zeros(3), 1.0, np.zeros(3)))
    dark = looking.render()
    assert (dark[sky] == clean[sky]).all()
    lit = looking.render_layers(looking.parts).coverage == 0
    assert dark[lit].max() <= 1
    assert clean[lit].mean() > 30


@pytest.mark.parametrize("quality", ["fast", "reference"])
def test_lights_change_the_floor_of_dm_control(quality):
    with envs.make("dmc/walker-walk", size=40, quality=quality, seed=0) as env:
        env.reset()
        view = env.view
        clean = view.render()
        floor = view.render_layers(frozenset({"floor"})).coverage == 1
        view.set_lights(Lighting(0.5, 1.0, np.full(3, 0.5), 0.6, np.full(3, 0.4)))
        assert floor.any()
        assert np.abs(clean[floor].astype(int) - view.render()[floor]).max(-1).min() > 5


# Objects and textures ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1, 0.5])
def test_objects_are_repainted_alone_and_stay_as_opaque_as_they_are(view, alpha):
    looking = view(simulation(alpha))
    assert {slot: c.round(3).tolist() for slot, c in looking.colors("objects").items()} == {
        "body1": [0.7, 0.5, 0.3]
    }
    clean, body = looking.render(), looking.foreground()
    looking.set_colors({"body1": np.array((0.0, 0.0, 1.0))}, "objects")
    blue = looking.render()
    assert (blue[~body] == clean[~body]).all()
    assert (blue[body][:, 2] > clean[body][:, 2]).mean() > 0.9
    # Highlights are white; what is brighter is the sky that shines through.
    assert (blue[body][:, 0] > 32).any() == (alpha < 1)


MOTOR = '<actuator><motor joint="slide"/></actuator>'


def test_what_a_motor_moves_is_no_object():
    driven = SCENE.replace('type="slide"', 'name="slide" type="slide"')
    driven = driven.replace("</worldbody>", "</worldbody>" + MOTOR)
    looking = MujocoView(lambda: simulation(xml=driven), height=8, width=8, camera="front")
    assert looking.colors("objects") == {}


def test_every_material_can_be_tinted(view):
    looking = view(simulation())
    assert looking.colors("materials").keys() == {"grid", "self"}
    clean = looking.render()
    body = looking.foreground()
    looking.set_colors({"grid": np.array((1.0, 0.0, 1.0))}, "materials")
    tinted = looking.render()
    floor = (tinted != clean).any(-1)
    assert floor.any()
    assert not (floor & body).any()
    assert not tinted[floor][:, 1].any()
    assert (tinted[floor][:, ::2] == clean[floor][:, ::2]).all()


@pytest.mark.parametrize("side", [8, 64, 256])
def test_a_texture_covers_its_surface_alone(view, side):
    looking = view(simulation())
    assert looking.surfaces() == ("floor",)
    clean = looking.render()
    floor = looking.render_layers(frozenset({"floor"})).coverage == 1
    red = np.zeros((side, side, 3), np.uint8)
    red[..., 0] = 255
    looking.set_textures({"floor": red})
    covered = looking.render()
    assert (covered[~floor] == clean[~floor]).all()
    assert not covered[floor][:, 1:].any()
    looking.set_textures({})
    assert (looking.render() == clean).all()


def test_every_surface_of_meta_world_can_be_covered():
    with envs.make("metaworld/peg-insert-side", size=64, quality="fast", seed=0) as env:
        env.reset()
        view = env.view
        clean = view.render().astype(int)
        assert {"floor", "walls", "table"} <= set(view.surfaces())
        assert {"table", "peg"} <= view.colors("objects").keys()
        for slot in view.surfaces():
            view.set_textures({slot: np.full((64, 64, 3), (255, 0, 255), np.uint8)})
            changed = np.abs(view.render() - clean).max(-1) > 20
            assert changed.sum() > 10, slot
            assert changed.mean() < 0.5, slot


# All of it ---------------------------------------------------------------------------------------


def change_everything(view):
    for palette in PALETTES:
        view.set_colors({slot: np.array((0.9, 0.1, 0.4)) for slot in view.colors(palette)}, palette)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    view.set_textures(dict.fromkeys(view.surfaces(), noise))
    view.set_camera(CameraShift(0.3, -0.2, 0.4, 1.2))
    view.set_lights(Lighting(0.6, 1.0, np.array((0.9, 0.5, 0.7)), 0.5, np.full(3, 0.5)))


@pytest.mark.parametrize("quality", ["fast", "reference"])
def test_model_and_clean_picture_are_as_before(view, quality):
    model, data = simulation(z=0.5)
    looking, beside = view((model, data), quality), view((model, data), quality)
    clean, before = looking.render(), snapshot(model)
    pose = physics_state(model, data)["derived"]
    change_everything(looking)
    changed = looking.render()
    assert (changed != clean).any(-1).mean() > 0.8
    assert same(before, snapshot(model))
    assert same(pose, physics_state(model, data)["derived"])
    assert (beside.render() == clean).all(), "views of one simulation change alone"
    looking.close()
    assert (looking.render() == changed).all(), "and keep it when they are opened again"
    undress(looking)
    assert (looking.render() == clean).all()


@pytest.mark.parametrize("id", ["toy/reach", "metaworld/drawer-open", "gym/Swimmer-v5"])
def test_clean_pictures_of_tasks_are_as_before(id):
    with envs.make(id, size=40, quality="fast", seed=0) as env:
        env.reset()
        clean, layers = env.view.render(), env.view.render_layers(env.view.parts)
        change_everything(env.view)
        assert (env.view.render() != clean).any(-1).mean() > 0.5
        undress(env.view)
        assert (env.view.render() == clean).all()
        assert (env.view.render_layers(env.view.parts).coverage == layers.coverage).all()


def test_unknown_slots_offer_the_nearest(view):
    looking = view(simulation())
    with pytest.raises(UserError, match="unknown texture slot 'flor'; did you mean floor"):
        looking.set_textures({"flor": np.zeros((8, 8, 3), np.uint8)})
    with pytest.raises(UserError, match="unknown color slot 'sel'; did you mean self"):
        looking.set_colors({"sel": np.zeros(3)}, "materials")
