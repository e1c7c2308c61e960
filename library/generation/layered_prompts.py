"""Drawing with embeddings per layer: every cross-attention reads the prompt with its own words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from library.checkpoints.embeddings import LAYER_KEYS
from library.families.base import Conditioning, ModelFamily, SizeConditioning
from library.text.new_words import LayerWords

if TYPE_CHECKING:
    from library.generation.engine import Predict
    from library.generation.request import ImageRequest
    from library.text.clip import PromptStyle


class LayeredPrompts:
    """What predicts for images whose prompts hold words with embeddings per layer.

    The denoiser must have got `library.models.layer_contexts.give_own_contexts`. Each image is a batch of its own.
    """

    def __init__(self, family: ModelFamily, words: LayerWords, style: PromptStyle | None = None) -> None:
        self.family = family
        self.words = words
        self.style = style

    def predict_for(self, request: ImageRequest) -> Predict:
        """`DrawSettings.predict_for`: the rows of guidance in the engine's order, each with a context per layer."""
        texts = [request.prompt]
        if request.uses_guidance:
            texts = [request.negative_prompt, request.prompt]
            texts += [] if request.negative_scale is None else [""]
        variants = [variant for text in texts for variant in self.words.variants(text)]
        encoded, _ = self.family.encode_prompts(variants, [], clip_skip=request.clip_skip, style=self.style)
        contexts = Conditioning({name: by_layer(tensor) for name, tensor in encoded.tensors.items()})

        def predict(x_t: Tensor, timesteps: Tensor, _shared: Conditioning, sizes: SizeConditioning) -> Tensor:
            if len(x_t) != len(texts):
                raise ValueError("embeddings per layer: draw one image at a time (--batch_size 1).")
            return self.family.predict(x_t, timesteps, contexts.to(x_t.device), sizes)

        return predict


def by_layer(tensor: Tensor) -> Tensor:
    """Rows of the layers one after another, [B*L,...] -> [B,L,...]."""
    return tensor.unflatten(0, (-1, len(LAYER_KEYS)))
