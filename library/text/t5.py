"""T5: finding its tokenizer, captions to ids and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from library.text.tokenizer_files import TokenizerSource, find_tokenizer, not_found_message

if TYPE_CHECKING:
    from library.models.t5 import T5TextEncoder

PAD, END = 0, 1

T5_XXL = TokenizerSource(
    "google/t5-v1_1-xxl", model_folder="tokenizer_2", complete_sets=(("tokenizer.json",), ("spiece.model",))
)
T5_XXL_AS_THIRD = replace(T5_XXL, model_folder="tokenizer_3")  # of models with two CLIP encoders before it


class T5Tokenizer:
    """A T5 tokenizer (SentencePiece, padding 0, end 1, no start) with the place it came from. Picklable."""

    def __init__(self, tokenizer: Any, *, source: str) -> None:
        if (tokenizer.pad_token_id, tokenizer.eos_token_id) != (PAD, END):
            raise ValueError(
                f"{source} holds no T5 tokenizer: it pads with {tokenizer.pad_token_id} and ends with "
                f"{tokenizer.eos_token_id}, T5 with {PAD} and {END}"
            )
        self.tokenizer = tokenizer
        self.source = source

    def ids_and_mask(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Captions -> ids int64 [B,length], cut or padded, and masks int64 [B,length]: 1 for text and end."""
        encoded = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return encoded.input_ids, encoded.attention_mask

    def check_fits(self, encoder: T5TextEncoder, model_source: str) -> None:
        """Raises ValueError if an id of this tokenizer has no row in the encoder's token table."""
        rows = encoder.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > rows:
            raise ValueError(
                f"The T5 tokenizer from {self.source} has {len(self.tokenizer)} tokens, but {model_source} has {rows} "
                "rows: they do not fit. Name the folder of the model's own tokenizer with --tokenizer_cache_dir."
            )

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files."""
        self.tokenizer.save_pretrained(str(folder))


def load_tokenizer(
    source: TokenizerSource = T5_XXL,
    *,
    model_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    with_download: bool = True,
) -> T5Tokenizer:
    """The T5 tokenizer of a model; the places are those of `find_tokenizer`.

    Raises FileNotFoundError that lists the places.
    """
    found, tried = find_tokenizer(
        source, _from_folder, model_path=model_path, cache_dir=cache_dir, with_download=with_download
    )
    if found is None:
        raise FileNotFoundError(not_found_message(source, tried))
    return found


def _from_folder(folder: Path, name: str) -> T5Tokenizer:
    from transformers import T5TokenizerFast

    return T5Tokenizer(T5TokenizerFast.from_pretrained(str(folder)), source=name)
