"""Is a picture what its prompt asks for, whatever kind of drawing that is: ShapesEval for shapes, reading for text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from agents.generative_models.glyphs import edit_distance, read_text
from agents.generative_models.scenes import parse_prompt
from agents.generative_models.shapes_eval import Verdict, evaluate


def evaluate_drawings(images: Tensor, prompts: Sequence[str]) -> list[Verdict]:
    """Return a verdict for every picture.

    Args:
        images: float [B, 3, S, S] in [0, 1].
        prompts: B of them, of any kind of drawing.

    Raises:
        UserError: a prompt is of no kind.
    """
    scenes = [parse_prompt(prompt) for prompt in prompts]
    of_text = [index for index, scene in enumerate(scenes) if scene.text is not None]
    of_shapes = [index for index, scene in enumerate(scenes) if scene.text is None]
    images = images.detach().float()
    verdicts: dict[int, Verdict] = {}
    if of_shapes:
        pixels = images[of_shapes].cpu().numpy()
        judged = evaluate(pixels, [prompts[index] for index in of_shapes])
        verdicts |= dict(zip(of_shapes, judged, strict=True))
    if of_text:
        for index, written in zip(of_text, read_text(images[of_text]), strict=True):
            verdicts[index] = text_verdict(scenes[index].text or "", written)
    return [verdicts[index] for index in range(len(scenes))]


def text_verdict(asked: str, written: str) -> Verdict:
    """Return the verdict on a text: the share of characters that are right, by edit distance."""
    wrong = edit_distance(asked, written) / max(len(asked), len(written))
    return Verdict({"text": 1 - wrong})
