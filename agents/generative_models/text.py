"""Prompts as tokens: whole words of a known vocabulary, and a small transformer over them.

A generator that is pretrained on captions of a fixed grammar needs no sub-word units: a word that it never saw means
nothing to it, so an unknown word is an error that names the nearest known ones. Text in double quotes is spelled, one
token a character with the quotes ('the text "B7"' is `the`, `text`, `"B"`, `"7"`).

**Differences from CLIP's text encoder**, which Stable Diffusion uses: words instead of byte pairs, attention in both
directions, and it is trained together with the generator. As there, prompts are padded to one length, padding is
attended to, and the empty prompt stands for "no prompt" in guidance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from agents.core.errors import UserError

PADDING = 0
"""Token behind a prompt's end."""
_PIECES = re.compile(r'"([^"]*)"|([a-z]+)|([^\s,.])')


def split_prompt(prompt: str) -> list[str]:
    """Return the words of a prompt, lower case, and the characters of quoted text, each in quotes.

    Commas and full stops are left out; any other sign is a word by itself (and so, mostly, an unknown one).

    Example:
        >>> split_prompt('A red circle, and the text "B7".')
        ['a', 'red', 'circle', 'and', 'the', 'text', '"B"', '"7"']
    """
    words: list[str] = []
    for quoted, word, sign in (match.groups() for match in _PIECES.finditer(_lowered(prompt))):
        words += [f'"{c}"' for c in quoted] if quoted else [word or sign] * bool(word or sign)
    return words


def _lowered(prompt: str) -> str:
    """Lower the case of everything but quoted text."""
    parts = prompt.split('"')
    return '"'.join(part if index % 2 else part.lower() for index, part in enumerate(parts))


class Vocabulary:
    """Words and their tokens; token 0 is padding.

    Args:
        words: without repetitions, token 1 first.
        length: L, tokens of every padded prompt.

    Raises:
        UserError: no words, a word twice, or no room for one.
    """

    def __init__(self, words: Iterable[str], length: int) -> None:
        self.words, self.length = tuple(words), length
        self._tokens = {word: token for token, word in enumerate(self.words, 1)}
        if not self.words or len(self._tokens) < len(self.words) or length < 1:
            raise UserError(
                f"a vocabulary of {len(self.words)} words, {len(self._tokens)} of them different, and prompts of "
                f"{length}; give different words and at least one a prompt"
            )

    @classmethod
    def of(cls, prompts: Iterable[str]) -> Vocabulary:
        """Return the vocabulary of some prompts, in alphabetical order, as long as the longest of them."""
        split = [split_prompt(prompt) for prompt in prompts]
        words = sorted({word for prompt in split for word in prompt})
        return cls(words, max(map(len, split), default=0))

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return padded tokens, int64 [B, L].

        Raises:
            UserError: a word is unknown, or a prompt is too long.
        """
        rows = []
        for prompt in prompts:
            words = split_prompt(prompt)
            for word in words:
                if word not in self._tokens:
                    unknown = UserError.unknown("word", word, self.words)
                    raise UserError(f"prompt '{prompt}' has an {unknown}")
            if len(words) > self.length:
                raise UserError(
                    f"prompt '{prompt}' has {len(words)} words; the generator reads {self.length}: shorten it"
                )
            row = [self._tokens[word] for word in words]
            rows.append(row + [PADDING] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)


class TextEncoder(nn.Module):
    """Maps tokens [B, L] to features [B, L, F].

    Args:
        words: W, size of the vocabulary without padding.
        length: L.
        features: F.
        blocks: of a transformer; 0 for embeddings alone.
        heads: of its attention.

    Raises:
        UserError: the heads do not divide F.
    """

    def __init__(
        self, words: int, length: int, *, features: int = 128, blocks: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        if features % heads:
            raise UserError(
                f"text features of width {features} do not split into {heads} heads; take a multiple of {heads}"
            )
        self.embedding = nn.Embedding(words + 1, features)
        self.position = nn.Parameter(torch.empty(length, features))
        for weight in (self.embedding.weight, self.position):
            nn.init.normal_(weight, std=0.5)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                features, heads, 4 * features, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(features)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return features [B, L, F]."""
        features = self.embedding(tokens) + self.position
        for block in self.blocks:
            features = block(features)
        return self.norm(features)
