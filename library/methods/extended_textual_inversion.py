"""Extended Textual Inversion (XTI, Voynov et al. 2023): a new word has embeddings of its own in every cross-attention.

The U-Net needs 16 cross-attentions. In forward order (encoder, middle, decoder) they are called IN01 IN02 IN04 IN05
IN07 IN08 MID OUT03 ... OUT11, and the words of layer IN01 are `word_IN01`, `word1_IN01`, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints.embeddings import LAYER_KEYS, read_layer_embeddings, write_layer_embeddings
from library.data.records import Batch
from library.families.base import Conditioning, Tokenize
from library.generation.layered_prompts import LayeredPrompts, by_layer
from library.methods.base import ParameterGroup, Placement
from library.methods.textual_inversion import TextualInversion
from library.models.layer_contexts import give_own_contexts
from library.text.new_words import LayerWords, layered_words

if TYPE_CHECKING:
    from library.generation.engine import Predict
    from library.generation.request import ImageRequest


class LayerTokenize:
    """Captions -> the family's token tensors with a second dimension for the layers, [B,L,...]; picklable."""

    def __init__(self, tokenize: Tokenize, words: LayerWords) -> None:
        self.tokenize = tokenize
        self.words = words

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        tokens = self.tokenize([variant for caption in captions for variant in self.words.variants(caption)])
        return {name: by_layer(ids) for name, ids in tokens.items()}


class ExtendedTextualInversion(TextualInversion):
    """Trains one set of embeddings per cross-attention."""

    @property
    def layer_words(self) -> LayerWords:
        """How texts are varied."""
        return LayerWords(self.words)

    @property
    def trained_words(self) -> list[str]:
        """Layer by layer, the words of all vectors."""
        return layered_words(self.words)

    @property
    def tokenize(self) -> Tokenize:
        """Captions -> token tensors [B,L,...]."""
        return LayerTokenize(self.family.tokenize, self.layer_words)

    def attach(self, placement: Placement) -> list[ParameterGroup]:
        """As ever, and every cross-attention gets its own context. Raises ValueError for another number of them."""
        give_own_contexts(self.family.blocks(), LAYER_KEYS)
        return super().attach(placement)

    def starting_rows(self, path: str, encoders: Sequence[str]) -> dict[str, Tensor]:
        """Rows [L*n,d] of a file with one key per layer."""
        layers = read_layer_embeddings(path)
        counts = {len(rows) for rows in layers.values()}
        if counts != {len(self.words)}:
            raise ValueError(
                f"--weights {path} has {counts.pop()} vectors per layer, --num_vectors_per_token asks for "
                f"{len(self.words)}: the numbers must be equal."
            )
        return {name: torch.cat(list(layers.values())) for name in encoders}

    def conditioning(self, batch: Batch) -> Conditioning:
        """Contexts [B,L,S,d], all encoded at once."""
        tokens = {name: ids.flatten(0, 1) for name, ids in (batch.tokens or {}).items()}
        encoded = self.family.encode_text(tokens)
        return Conditioning({name: by_layer(tensor) for name, tensor in encoded.tensors.items()})

    def predict_for(self, request: ImageRequest) -> Predict:
        """Predicts with the contexts of this one image's prompts, a set per layer."""
        return LayeredPrompts(self.family, self.layer_words).predict_for(request)

    def save(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int] = (0, 0)
    ) -> None:
        """One key [n,d] per layer."""
        [rows] = self.tables
        write_layer_embeddings(path, rows.values.unflatten(0, (len(LAYER_KEYS), -1)), dtype=dtype, metadata=metadata)

    def metadata(self) -> dict[str, Any]:
        """These files carry none."""
        return {"model_type": None}
