"""What a drawn picture shows, and the sentence that asks for it.

A `Scene` is one of

- `single`: a number of like things, with size and place or without ("two small red circles on the left"),
- `mixture`: two groups of different color ("a red circle and two blue squares"),
- `relation`: two things and where the first one is, seen from the second ("a red circle above a blue square"),
- `text`: characters ('the text "B7"').

Sentences and scenes are the same information: `parse_prompt` reads what `Scene.prompt` wrote. Combinations are split
into those for training and those held out by a hash of what a scene *means*: "a red circle left of a blue square" and
"a blue square right of a red circle" are one combination.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from agents.core.errors import UserError
from agents.generative_models.font import CHARACTERS

Kind = Literal["single", "mixture", "relation", "text"]
KINDS: tuple[Kind, ...] = ("single", "mixture", "relation", "text")

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.16, 0.16),
    "green": (0.16, 0.80, 0.24),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.72, 0.22, 0.86),
    "white": (0.95, 0.95, 0.95),
}
"""RGB in [0, 1]. All are bright, so that a dark background and a color's shade cannot be confused."""
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
"""How each is said."""
RELATIONS = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
"""Side of the second thing on which the first one is; how each is said."""
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
NUMBERS = ("a", "two", "three", "four")


@dataclass(frozen=True)
class Group:
    """A number of like things."""

    count: int
    """1 to 4."""
    color: str
    shape: str
    size: str | None = None
    """None leaves it open."""
    place: str | None = None
    """Likewise."""

    @property
    def words(self) -> str:
        """The group as a part of a sentence."""
        number, size = NUMBERS[self.count - 1], f"{self.size} " if self.size else ""
        place = f" {PLACES[self.place]}" if self.place else ""
        return f"{number} {size}{self.color} {self.shape}{'s' * (self.count > 1)}{place}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: groups of things, or text."""

    groups: tuple[Group, ...] = ()
    relation: str | None = None
    """Where the first group is, seen from the second."""
    text: str | None = None

    @property
    def kind(self) -> Kind:
        """See the module."""
        if self.text is not None:
            return "text"
        if len(self.groups) == 1:
            return "single"
        return "relation" if self.relation else "mixture"

    @property
    def prompt(self) -> str:
        """The sentence that asks for it."""
        if self.text is not None:
            return f'the text "{self.text}"'
        joint = RELATIONS[self.relation] if self.relation else "and"
        return f" {joint} ".join(group.words for group in self.groups)

    @property
    def count(self) -> int:
        """Things in the picture."""
        return sum(group.count for group in self.groups)

    @property
    def meaning(self) -> str:
        """The prompt of the first, in alphabetical order, of all scenes that say the same."""
        if len(self.groups) < 2:
            return self.prompt
        turned = OPPOSITE[self.relation] if self.relation else None
        return min(self.prompt, Scene(self.groups[::-1], turned).prompt)


def scenes(kind: Kind, *, longest_text: int = 2) -> Iterator[Scene]:
    """Yield every scene of a kind, in a fixed order.

    Four large things do not fit, nor do many in one place: such combinations are left out.

    Args:
        kind: see the module.
        longest_text: characters of the longest text.
    """
    things = list(itertools.product(COLORS, SHAPES))
    if kind == "single":
        for count, (color, shape) in itertools.product(range(1, 5), things):
            for size, place in itertools.product((None, *SIZES), (None, *PLACES)):
                if _fits(count, size, place):
                    yield Scene((Group(count, color, shape, size, place),))
    elif kind == "text":
        for length in range(1, longest_text + 1):
            for characters in itertools.product(CHARACTERS, repeat=length):
                yield Scene(text="".join(characters))
    else:
        counts = itertools.product((1, 2), repeat=2) if kind == "mixture" else [(1, 1)]
        relations = (None,) if kind == "mixture" else tuple(RELATIONS)
        for numbers, relation, (one, other) in itertools.product(
            list(counts), relations, itertools.product(things, repeat=2)
        ):
            if one[0] != other[0]:
                groups = Group(numbers[0], *one), Group(numbers[1], *other)
                yield Scene(groups, relation)


def _fits(count: int, size: str | None, place: str | None) -> bool:
    if count > 2:
        return size != "large" and place is None
    return count == 1 or place != "center"


@lru_cache(maxsize=16)
def split_scenes(
    kind: Kind, *, held_out: bool, share: float = 0.15, longest_text: int = 2
) -> tuple[Scene, ...]:
    """Return the scenes of a kind that are held out, or the others.

    Single characters are never held out: each must have been seen to be drawn.

    Args:
        kind: see the module.
        held_out: which side.
        share: about this share of the combinations is held out.
        longest_text: see `scenes`.
    """
    return tuple(
        scene
        for scene in scenes(kind, longest_text=longest_text)
        if (_is_held_out(scene, share)) is held_out
    )


def _is_held_out(scene: Scene, share: float) -> bool:
    if scene.text is not None and len(scene.text) == 1:
        return False
    digest = hashlib.sha256(scene.meaning.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def draw_scenes(
    kinds: Sequence[Kind],
    count: int,
    rng: np.random.Generator,
    *,
    held_out: bool,
    share: float = 0.15,
    longest_text: int = 2,
) -> list[Scene]:
    """Return random scenes of one side of the split: kinds equally often, and within `single` numbers equally often.

    Args:
        kinds: which.
        count: how many.
        rng: of the choice.
        held_out: which side.
        share: see `split_scenes`.
        longest_text: see `scenes`.

    Raises:
        UserError: an unknown kind, or nothing is held out.
    """
    pools = []
    for kind in kinds:
        if kind not in KINDS:
            raise UserError.unknown("kind of drawing", kind, KINDS)
        pool = split_scenes(kind, held_out=held_out, share=share, longest_text=longest_text)
        strata: dict[int, list[Scene]] = {}
        for scene in pool:
            strata.setdefault(scene.count if kind == "single" else 0, []).append(scene)
        if not pool:
            raise UserError(f"no drawings of kind '{kind}' on this side; hold out another share")
        pools.append(list(strata.values()))
    chosen = []
    for _ in range(count):
        strata_of_kind = pools[rng.integers(len(pools))]
        stratum = strata_of_kind[rng.integers(len(strata_of_kind))]
        chosen.append(stratum[rng.integers(len(stratum))])
    return chosen


# ------------------------------------------------------------------------------------- reading

_GROUP = (
    rf"({'|'.join(NUMBERS)}) (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s?"
    rf"(?: ({'|'.join(PLACES.values())}))?"
)
_JOINTS = {"and": None} | {said: name for name, said in RELATIONS.items()}
_SENTENCE = re.compile(rf"{_GROUP}(?: ({'|'.join(_JOINTS)}) {_GROUP})?")
_TEXT = re.compile(r'the text "([^"]+)"')
_PLACE_OF = {said: name for name, said in PLACES.items()}


@lru_cache(maxsize=65536)
def parse_prompt(prompt: str) -> Scene:
    """Return the scene that a prompt asks for.

    Raises:
        UserError: it is not a sentence of this grammar.
    """
    if match := _TEXT.fullmatch(prompt):
        return Scene(text=match[1])
    if match := _SENTENCE.fullmatch(prompt):
        parts = match.groups()
        groups = [_group(parts[:5])]
        if parts[5] is not None:
            groups.append(_group(parts[6:]))
        scene = Scene(tuple(groups), _JOINTS[parts[5]] if parts[5] else None)
        if scene.prompt == prompt:  # "two red circle" is no sentence
            return scene
    raise UserError(
        f"'{prompt}' is no prompt for a drawing; write one like 'two small red circles on the left', "
        "'a red circle and two blue squares', 'a red circle above a blue square' or 'the text \"B7\"'"
    )


def _group(parts: Sequence[str | None]) -> Group:
    number, size, color, shape, place = parts
    assert number is not None
    assert color is not None
    assert shape is not None
    return Group(NUMBERS.index(number) + 1, color, shape, size, _PLACE_OF[place] if place else None)
