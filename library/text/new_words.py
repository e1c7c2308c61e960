"""How new words stand in texts: one word per vector, and with embeddings per layer one text per layer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from library.checkpoints.embeddings import LAYER_KEYS


def vector_words(word: str, count: int) -> list[str]:
    """The words of `count` vectors: word, word1, word2, ..."""
    return [word, *(f"{word}{index}" for index in range(1, count))]


def with_all_words(text: str, words: Sequence[str]) -> str:
    """`text` with all words wherever the first one stands (also inside other words)."""
    return text.replace(words[0], " ".join(words))


class LayerWords:
    """Texts as each layer reads them: every new word with the layer's name behind it. Picklable."""

    def __init__(self, words: Sequence[str]) -> None:
        longest_first = sorted(words, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(word) for word in longest_first))

    def variants(self, text: str) -> list[str]:
        """One text per layer, in the order of `LAYER_KEYS`."""
        return [self._pattern.sub(rf"\g<0>_{key}", text) for key in LAYER_KEYS]


def layered_words(words: Sequence[str]) -> list[str]:
    """The words of all layers, layer by layer: word_IN01, word1_IN01, ..., word_IN02, ..."""
    return [f"{word}_{key}" for key in LAYER_KEYS for word in words]
