"""What of a MuJoCo model is background, and which of its colors may be repainted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mujoco
import numpy as np

from envs.rendering import texture_data
from wrappers.view import Part

STAR_SKIES = 240
"""In skyboxes darker than this, of 255, white texels are stars (dm_control's), else sky."""


@dataclass(frozen=True)
class Paint:
    """Where one color slot of a scene lies.

    Attributes:
        color: float64 [3] in [0, 1], as the simulator ships it.
        materials: ids of the materials that have it.
        geoms: ids of the geoms that have it without a material.
        texture: id of a texture that mixes this color with others, -1 for none.
    """

    color: np.ndarray
    materials: Sequence[int] = ()
    geoms: Sequence[int] = ()
    texture: int = -1


@dataclass(frozen=True)
class Scenery:
    """What of a model is background, and which of its colors may be changed.

    Attributes:
        geoms: ids of the geoms of every background part; the sky has none.
        paints: the color slots by name.
    """

    geoms: Mapping[Part, Sequence[int]] = field(default_factory=dict)
    paints: Mapping[str, Paint] = field(default_factory=dict)


def find_scenery(model: mujoco.MjModel) -> Scenery:
    """Find sky, floor and the robot's color as dm_control's and Gymnasium's models have them.

    The floor is every level or checkered plane and every terrain that does not move; the wall that
    some dm_control robots move before has the material `background`. The floor's checker colors are
    `grid1` and `grid2`, or `floor` where it has one color or another texture, which is then tinted, as
    are `walls`. `self` is the material of that name, else the most frequent color of what moves;
    `sky` the brighter end of the skybox's gradient.
    """
    geoms = _background_geoms(model)
    floor, walls = geoms.get("floor", []), geoms.get("walls", [])
    paints = {**_sky_paint(model), **_floor_paints(model, floor), **_self_paint(model)}
    if walls:
        paints["walls"] = flat_paint(model, walls)
    return Scenery(geoms, paints)


def flat_paint(model: mujoco.MjModel, geoms: Sequence[int]) -> Paint:
    """Return the paint of geoms of one look; what texture they have is multiplied by its color."""
    material = int(model.geom_matid[geoms[0]])
    if material < 0:
        return Paint(model.geom_rgba[geoms[0], :3].astype(np.float64), geoms=geoms)
    return Paint(model.mat_rgba[material, :3].astype(np.float64), [material])


def _background_geoms(model: mujoco.MjModel) -> dict[Part, list[int]]:
    """Return the visible planes and terrains that are fixed to the world, by part."""
    fixed = model.body_weldid[model.geom_bodyid] == 0
    shown = (model.geom_rgba[:, 3] > 0) & (model.geom_group < 3)
    plane = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    terrain = model.geom_type == mujoco.mjtGeom.mjGEOM_HFIELD
    # A plane's normal is the third column of its rotation, here from a quaternion (w, x, y, z).
    _, x, y, _ = model.geom_quat.T
    level = 1 - 2 * (x**2 + y**2) > 0.9
    floor = terrain | (plane & (level | _has_material(model, "grid")))
    walls = plane & _has_material(model, "background") & ~floor
    found = {"floor": floor, "walls": walls}
    parts = {part: np.flatnonzero(fixed & shown & which).tolist() for part, which in found.items()}
    return {part: geoms for part, geoms in parts.items() if geoms}  # type: ignore[misc]


def _has_material(model: mujoco.MjModel, name: str) -> np.ndarray:
    """Return which geoms have the material of that name, bool [ngeom]."""
    names = [model.material(i).name for i in range(model.nmat)]
    return model.geom_matid == (names.index(name) if name in names else -2)


def _sky_paint(model: mujoco.MjModel) -> dict[str, Paint]:
    skies = np.flatnonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX)
    if not len(skies):
        return {}
    # Millions of texels that change slowly: every eighth tells as much.
    texels = texture_data(model, int(skies[0]))[::8, ::8, :3].reshape(-1, 3)
    dim = texels[texels.min(1) < 255]
    has_stars = len(dim) > 0 and dim.max() < STAR_SKIES
    brightest = (dim if has_stars else texels).max(0)
    return {"sky": Paint(brightest / 255, texture=int(skies[0]))}


def _floor_paints(model: mujoco.MjModel, floor: Sequence[int]) -> dict[str, Paint]:
    if not floor:
        return {}
    material = int(model.geom_matid[floor[0]])
    role = mujoco.mjtTextureRole.mjTEXROLE_RGB
    texture = int(model.mat_texid[material, role]) if material >= 0 else -1
    if texture < 0:
        return {"floor": flat_paint(model, floor)}
    texels = texture_data(model, texture)
    height, width, _ = texels.shape
    # A builtin checker is two by two cells; at most a third color marks their edges.
    first, second = texels[height // 4, width // 4], texels[height // 4, 3 * width // 4]
    checker = ((texels == first) | (texels == second)).all(-1).mean() > 0.9
    if not checker or (first == second).all():
        return {"floor": flat_paint(model, floor)}
    return {
        "grid1": Paint(first / 255, texture=texture),
        "grid2": Paint(second / 255, texture=texture),
    }


def _self_paint(model: mujoco.MjModel) -> dict[str, Paint]:
    names = [model.material(i).name for i in range(model.nmat)]
    if "self" in names:
        material = names.index("self")
        return {"self": Paint(model.mat_rgba[material, :3].astype(np.float64), [material])}
    moving = np.flatnonzero(
        (model.body_weldid[model.geom_bodyid] != 0)
        & (model.geom_rgba[:, 3] > 0)
        & (model.geom_group < 3)
    )
    looks: dict[tuple[int, bytes], list[int]] = {}
    for geom in moving:
        material = int(model.geom_matid[geom])
        color = b"" if material >= 0 else model.geom_rgba[geom, :3].tobytes()
        looks.setdefault((material, color), []).append(int(geom))
    if not looks:
        return {}
    return {"self": flat_paint(model, max(looks.values(), key=len))}
