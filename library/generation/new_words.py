"""Words that embedding files bring into prompts (`--textual_inversion_embeddings`, `--XTI_embeddings`).

The word is the file's name without its extension; a file with n vectors brings word, word1, ... word(n-1), and in
prompts the first one stands for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.checkpoints.embeddings import LAYER_KEYS, read_embeddings, read_layer_embeddings
from library.families.base import ModelFamily
from library.generation.layered_prompts import LayeredPrompts
from library.generation.request import ImageRequest
from library.models.layer_contexts import give_own_contexts
from library.text.new_words import LayerWords, layered_words, vector_words, with_all_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from library.generation.engine import Predict
    from library.options.generation_features import TextualInversionOptions
    from library.text.clip import PromptStyle


@dataclass(frozen=True)
class NewWord:
    """One embedding file: the words of its vectors, and the rows [k,d] of each text encoder by name.

    With `is_layered` there are rows for every layer, layer by layer.
    """

    path: Path
    words: tuple[str, ...]
    rows: Mapping[str, Tensor]
    is_layered: bool = False

    def add_to(self, family: ModelFamily) -> None:
        """Teach a loaded model the word. Raises ValueError that names the file."""
        added = layered_words(self.words) if self.is_layered else self.words
        for table in family.embedding_tables():
            try:
                first, *_ = table.add_words(added)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error} The word is the file's name: rename the file.") from error
            try:
                table.set_rows(first, self.rows[table.name])
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from error


@dataclass(frozen=True)
class NewWords:
    """The words of all embedding files of a run."""

    all_words: tuple[NewWord, ...] = ()

    @classmethod
    def read(cls, options: TextualInversionOptions, family: ModelFamily) -> NewWords:
        """Reads the files; the model need not be loaded. Raises ValueError/FileNotFoundError that names the file."""
        plain, layered = options.textual_inversion_embeddings or (), options.XTI_embeddings or ()
        if not plain and not layered:
            return cls()
        names = [table.name for table in family.embedding_tables()]
        return cls((*(_plain(Path(path), names) for path in plain), *(_layered(Path(path), names) for path in layered)))

    def add_to(self, family: ModelFamily) -> None:
        """Teach a loaded model all words."""
        for word in self.all_words:
            word.add_to(family)
        if self._words_of_layers:
            give_own_contexts(family.blocks(), LAYER_KEYS)

    @property
    def _words_of_layers(self) -> list[str]:
        return [text for word in self.all_words if word.is_layered for text in word.words]

    def written_out(self, request: ImageRequest) -> ImageRequest:
        """The request with all words of a file where its name stands."""
        prompt, negative = request.prompt, request.negative_prompt
        for word in self.all_words:
            prompt, negative = with_all_words(prompt, word.words), with_all_words(negative, word.words)
        return replace(request, prompt=prompt, negative_prompt=negative)

    def predict_for(self, family: ModelFamily, style: PromptStyle) -> Callable[[ImageRequest], Predict | None] | None:
        """`DrawSettings.predict_for` where words have embeddings per layer, else None."""
        words = self._words_of_layers
        return LayeredPrompts(family, LayerWords(words), style).predict_for if words else None

    def batch_size(self, wanted: int) -> int:
        """How many images can be drawn together."""
        return 1 if self._words_of_layers else wanted


def _plain(path: Path, encoders: list[str]) -> NewWord:
    rows = read_embeddings(path, encoders)
    counts = {name: len(vectors) for name, vectors in rows.items()}
    if len(set(counts.values())) != 1 or counts.keys() != set(encoders):
        raise ValueError(
            f"{path}: this model needs as many vectors for {' as for '.join(encoders)}, the file has "
            f"{', '.join(f'{count} for {name}' for name, count in counts.items())}."
        )
    return NewWord(path, tuple(vector_words(path.stem, len(rows[encoders[0]]))), rows)


def _layered(path: Path, encoders: list[str]) -> NewWord:
    layers = read_layer_embeddings(path)
    words = vector_words(path.stem, len(layers[LAYER_KEYS[0]]))
    rows = torch.cat(list(layers.values()))
    return NewWord(path, tuple(words), dict.fromkeys(encoders, rows), is_layered=True)
