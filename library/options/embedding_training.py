"""Options for Textual Inversion: training the embeddings of new words."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class EmbeddingTrainingOptions:
    token_string: str | None = option("the new word, as it stands in captions; not yet known to the tokenizer")
    num_vectors_per_token: int = option("embedding vectors of the new word", 1, type="int")
    init_word: str | None = option("known words whose embeddings the new ones start from")
    weights: str | None = option("embedding file to start from")
    use_object_template: bool = flag("use ready-made captions for a thing instead of the images' own")
    use_style_template: bool = flag("use ready-made captions for a style instead of the images' own")
