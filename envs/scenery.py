"""What of a MuJoCo model is background, and what of it may be repainted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mujoco
import numpy as np

from envs.rendering import texture_data
from wrappers.view import Palette, Part

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
        paints: the color slots of the palette "scene" by name.
        materials: those of the palette "materials".
        objects: those of the palette "objects"; a geom of theirs gets a color of its own.
        surfaces: ids of the textures that others may cover, by slot.
    """

    geoms: Mapping[Part, Sequence[int]] = field(default_factory=dict)
    paints: Mapping[str, Paint] = field(default_factory=dict)
    materials: Mapping[str, Paint] = field(default_factory=dict)
    objects: Mapping[str, Paint] = field(default_factory=dict)
    surfaces: Mapping[str, int] = field(default_factory=dict)

    def palette(self, name: Palette) -> Mapping[str, Paint]:
        """Return the color slots of one palette."""
        return {"scene": self.paints, "materials": self.materials, "objects": self.objects}[name]


def find_scenery(model: mujoco.MjModel) -> Scenery:
    """Find sky, floor and the robot's color as dm_control's and Gymnasium's models have them.

    The floor is every level or checkered plane and every terrain that does not move; the wall that
    some dm_control robots move before has the material `background`. The floor's checker colors are
    `grid1` and `grid2`, or `floor` where it has one color or another texture, which is then tinted, as
    are `walls`. `self` is the material of that name, else the most frequent color of what moves;
    `sky` the brighter end of the skybox's gradient. Objects are what moves and has no motor: a
    ball, a spinner, a brick.
    """
    geoms = _background_geoms(model)
    floor, walls = geoms.get("floor", []), geoms.get("walls", [])
    paints = {**_sky_paint(model), **_floor_paints(model, floor), **_self_paint(model)}
    if walls:
        paints["walls"] = flat_paint(model, walls)
    loose = set(model.body_rootid[model.dof_bodyid].tolist()) - _driven_roots(model)
    objects = object_paints(model, loose)
    surfaces = find_surfaces(model, {**geoms, **{name: o.geoms for name, o in objects.items()}})
    return Scenery(geoms, paints, material_paints(model), objects, surfaces)


def material_paints(model: mujoco.MjModel) -> dict[str, Paint]:
    """Return a paint for every material, and for every color of visible geoms that have none."""
    paints = {}
    for material in range(model.nmat):
        color = model.mat_rgba[material, :3].astype(np.float64)
        paints[model.material(material).name or f"material{material}"] = Paint(color, [material])
    plain: dict[bytes, list[int]] = {}
    for geom in np.flatnonzero(_is_shown(model) & (model.geom_matid < 0)).tolist():
        plain.setdefault(model.geom_rgba[geom, :3].tobytes(), []).append(geom)
    for number, geoms in enumerate(plain.values()):
        paints[f"plain{number}"] = Paint(
            model.geom_rgba[geoms[0], :3].astype(np.float64), (), geoms
        )
    return paints


def object_paints(model: mujoco.MjModel, roots: Collection[int]) -> dict[str, Paint]:
    """Return a paint for every look of the bodies under each of `roots`, named after the root."""
    paints: dict[str, Paint] = {}
    for root in sorted(roots):
        looks: dict[bytes, list[int]] = {}
        shown = _is_shown(model) & (model.body_rootid[model.geom_bodyid] == root)
        for geom in np.flatnonzero(shown).tolist():
            look = (*geom_color(model, geom)[:3].tolist(), int(model.geom_matid[geom]))
            looks.setdefault(repr(look).encode(), []).append(geom)
        name = model.body(root).name or f"body{root}"
        for number, geoms in enumerate(looks.values()):
            color = geom_color(model, geoms[0])[:3].astype(np.float64)
            paints[f"{name}{number or ''}"] = Paint(color, geoms=geoms)
    return paints


def geom_color(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """Return the color that MuJoCo gives a geom, float32 [4]: its own unless that is the default."""
    material, own = int(model.geom_matid[geom]), model.geom_rgba[geom]
    is_default = bool((own == np.array((0.5, 0.5, 0.5, 1), np.float32)).all())
    return model.mat_rgba[material] if material >= 0 and is_default else own


def find_surfaces(model: mujoco.MjModel, slots: Mapping[Any, Sequence[int]]) -> dict[str, int]:
    """Return the textures of the slots' geoms; the first slot that shows one owns it."""
    surfaces: dict[str, int] = {}
    for slot, geoms in slots.items():
        for geom in geoms:
            texture = geom_texture(model, geom)
            if texture >= 0 and texture not in surfaces.values():
                surfaces.setdefault(slot, texture)
    return surfaces


def geom_texture(model: mujoco.MjModel, geom: int) -> int:
    """Return the id of the picture on a geom, -1 for none."""
    material = int(model.geom_matid[geom])
    role = mujoco.mjtTextureRole.mjTEXROLE_RGB
    return int(model.mat_texid[material, role]) if material >= 0 else -1


def _is_shown(model: mujoco.MjModel) -> np.ndarray:
    return (model.geom_rgba[:, 3] > 0) & (model.geom_group < 3)


def _driven_roots(model: mujoco.MjModel) -> set[int]:
    """Return the roots of the bodies that motors move, through joints, sites or tendons."""
    bodies: list[int] = []
    for (first, _), transmission in zip(model.actuator_trnid, model.actuator_trntype, strict=True):
        kind = mujoco.mjtTrn(int(transmission))
        if kind in (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT):
            bodies.append(model.jnt_bodyid[first])
        elif kind in (mujoco.mjtTrn.mjTRN_SITE, mujoco.mjtTrn.mjTRN_SLIDERCRANK):
            bodies.append(model.site_bodyid[first])
        elif kind == mujoco.mjtTrn.mjTRN_BODY:
            bodies.append(first)
        elif kind == mujoco.mjtTrn.mjTRN_TENDON:
            bodies.extend(_tendon_bodies(model, first))
    return {int(model.body_rootid[body]) for body in bodies}


def _tendon_bodies(model: mujoco.MjModel, tendon: int) -> list[int]:
    start = model.tendon_adr[tendon]
    bodies = []
    for wrap in range(start, start + model.tendon_num[tendon]):
        kind, number = mujoco.mjtWrap(int(model.wrap_type[wrap])), model.wrap_objid[wrap]
        if kind == mujoco.mjtWrap.mjWRAP_JOINT:
            bodies.append(model.jnt_bodyid[number])
        elif kind == mujoco.mjtWrap.mjWRAP_SITE:
            bodies.append(model.site_bodyid[number])
    return bodies


def flat_paint(model: mujoco.MjModel, geoms: Sequence[int]) -> Paint:
    """Return the paint of geoms of one look; what texture they have is multiplied by its color."""
    material = int(model.geom_matid[geoms[0]])
    if material < 0:
        return Paint(model.geom_rgba[geoms[0], :3].astype(np.float64), geoms=geoms)
    return Paint(model.mat_rgba[material, :3].astype(np.float64), [material])


def _background_geoms(model: mujoco.MjModel) -> dict[Part, list[int]]:
    """Return the visible planes and terrains that are fixed to the world, by part."""
    fixed = model.body_weldid[model.geom_bodyid] == 0
    shown = _is_shown(model)
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
    texture = geom_texture(model, floor[0])
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
    moving = np.flatnonzero((model.body_weldid[model.geom_bodyid] != 0) & _is_shown(model))
    looks: dict[tuple[int, bytes], list[int]] = {}
    for geom in moving:
        material = int(model.geom_matid[geom])
        color = b"" if material >= 0 else model.geom_rgba[geom, :3].tobytes()
        looks.setdefault((material, color), []).append(int(geom))
    if not looks:
        return {}
    return {"self": flat_paint(model, max(looks.values(), key=len))}
