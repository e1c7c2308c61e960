"""CLIP: finding a tokenizer, captions to ids, ids to hidden states."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.models.text_encoders import ClipTextEncoder, first_end_positions
from library.text import prompt_weights
from library.text.chunking import CHUNK, WINDOW, SpecialIds, chunk_count, chunk_ids, join, splice
from library.text.tokenizer_files import TokenizerSource, find_tokenizer, not_found_message

logger = logging.getLogger(__name__)


# --- tokenizers ------------------------------------------------------------------------------------------------
CLIP_L = TokenizerSource("openai/clip-vit-large-patch14")
CLIP_H = TokenizerSource("stabilityai/stable-diffusion-2", hub_folder="tokenizer", pad=0)
CLIP_G = TokenizerSource(
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", model_folder="tokenizer_2", pad=0, pad_is_word=True
)


class ClipTokenizer:
    """A CLIP tokenizer with its special ids and the place it came from. Picklable."""

    def __init__(self, tokenizer: Any, *, source: str, pad: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.added_count = 0  # words that `add_token` has added
        self.special = SpecialIds(
            tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id if pad is None else pad
        )

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without start and end."""
        return self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    def windows(self, captions: Sequence[str], max_token_length: int | None = None) -> Tensor:
        """Captions -> int64 [B,n,77]."""
        chunks = chunk_count(max_token_length)
        rows = [chunk_ids(self.text_ids(caption), self.special, chunks) for caption in captions]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(captions), chunks, WINDOW)

    def weighted_windows(
        self, captions: Sequence[str], max_token_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Captions with prompt weights -> ids int64 [B,n,77] and weights float32 [B,n,77]."""
        chunks = chunk_count(max_token_length)
        encoded = [prompt_weights.weighted_ids(prompt_weights.parse_weights(c), self.text_ids) for c in captions]
        return self.pack(encoded, captions, chunks)

    def pack(
        self, encoded: Sequence[tuple[list[int], list[float]]], captions: Sequence[str], chunks: int
    ) -> tuple[Tensor, Tensor]:
        """Token ids with weights per caption -> windows [B,n,77] of both; too long ones are cut with a warning."""
        for (ids, _), caption in zip(encoded, captions, strict=True):
            if len(ids) > chunks * CHUNK:
                logger.warning("%d tokens are cut to %d: %s", len(ids), chunks * CHUNK, caption)
        rows = [chunk_ids(ids, self.special, chunks) for ids, _ in encoded]
        weights = [prompt_weights.chunk_weights(values, chunks) for _, values in encoded]
        windows = torch.tensor(rows, dtype=torch.int64).reshape(len(captions), chunks, WINDOW)
        return windows, prompt_weights.weight_tensor(weights)

    def add_token(self, token: str) -> int:
        """Adds one token and returns its id. Raises ValueError if the vocabulary has it already."""
        if token in self.tokenizer.get_vocab() or self.tokenizer.add_tokens(token) != 1:
            raise ValueError(f"the tokenizer from {self.source} already knows {token!r}; choose another word.")
        self.added_count += 1
        return self.tokenizer.convert_tokens_to_ids(token)

    def check_fits(self, encoder: ClipTextEncoder, model_source: str) -> None:
        """Raises ValueError if an id of this tokenizer, added words aside, has no row in the encoder's token table."""
        rows = encoder.get_input_embeddings().weight.shape[0]
        highest = max(self.special.start, self.special.end, self.special.pad)
        if len(self.tokenizer) - self.added_count > rows or highest >= rows:
            raise ValueError(
                f"The tokenizer from {self.source} has {len(self.tokenizer)} tokens, but the text encoder of "
                f"{model_source} has {rows} rows: they do not fit. Put the model's own tokenizer into a folder "
                "'tokenizer' beside it, or name its folder with --tokenizer_cache_dir."
            )

    def save(self, folder: Path, *, pads_as_used: bool = False) -> None:
        """Writes the tokenizer's files, also `vocab.json` and `merges.txt`, which older libraries need.

        With `pads_as_used` its settings name the padding token that this program uses; other pipelines go by them.
        """
        tokenizer = self.tokenizer
        if pads_as_used:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.special.pad)
        tokenizer.save_pretrained(str(folder))
        model = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        merges = [item if isinstance(item, str) else " ".join(item) for item in model["merges"]]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def load_tokenizer(
    source: TokenizerSource,
    *,
    model_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    with_download: bool = True,
) -> ClipTokenizer:
    """The tokenizer of a model.

    Looked for in: `tokenizer/` in the model folder or beside the checkpoint; `cache_dir/<hub id with / as _>`; the
    local hub cache; the hub (then saved to `cache_dir`), unless without download; the vocabulary inside an installed
    open_clip_torch. Raises FileNotFoundError that lists the places.
    """
    found, tried = find_tokenizer(
        source, partial(_from_folder, source=source), model_path=model_path, cache_dir=cache_dir,
        with_download=with_download,
    )  # fmt: skip
    if found is not None:
        return found
    tokenizer = _from_open_clip()
    if tokenizer is not None:
        return ClipTokenizer(tokenizer, source="the installed open_clip_torch", pad=source.pad)
    raise FileNotFoundError(not_found_message(source, [*tried, "open_clip_torch"]))


def _from_folder(folder: Path, name: str, *, source: TokenizerSource) -> ClipTokenizer:
    from transformers import CLIPTokenizer

    # folders of pipelines name the word as padding token, and then it is cut out of texts and loses its word end
    changes = {"pad_token": "<|endoftext|>"} if source.pad_is_word else {}
    return ClipTokenizer(CLIPTokenizer.from_pretrained(str(folder), **changes), source=name, pad=source.pad)


def _from_open_clip() -> Any | None:
    """A tokenizer from open_clip's word list (the one of every published CLIP), or None if it is not installed."""
    import gzip
    import importlib.util

    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    if not path.is_file():
        return None
    from transformers import CLIPTokenizer

    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    return CLIPTokenizer(vocab=vocabulary_of(merges), merges=[tuple(line.split()) for line in merges])


def vocabulary_of(merges: Sequence[str]) -> dict[str, int]:
    """CLIP's vocabulary for its merge list: 256 bytes, the same as word ends, one entry per merge, two specials."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    entries = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(line.split()) for line in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return {entry: index for index, entry in enumerate(entries)}


# --- encoding --------------------------------------------------------------------------------------------------
def encode_windows(encoder: ClipTextEncoder, input_ids: Tensor, *, clip_skip: int | None = None) -> Tensor:
    """Ids [B,n,77] -> hidden states [B*n,77,d] after the final norm.

    `clip_skip` k takes the k-th layer output from the end (1 = the last, as without it). Differentiable.
    """
    ids = input_ids.reshape(-1, input_ids.shape[-1]).to(encoder.device)
    if clip_skip is None or clip_skip <= 1:
        return encoder(ids).last_hidden_state
    states = encoder(ids, output_hidden_states=True).hidden_states
    if clip_skip >= len(states):
        raise ValueError(f"--clip_skip {clip_skip}: the text encoder has only {len(states) - 1} layers.")
    return encoder.text_model.final_layer_norm(states[-clip_skip])


def encode_inner(
    encoder: ClipTextEncoder, input_ids: Tensor, *, clip_skip: int | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ids [B,n,77] -> (states of an inner layer [B*n,77,d] without the final norm, last layer's with it [B*n,77,d]).

    For models that were trained on the penultimate layer as it is. `clip_skip` k takes the k-th layer from the end
    (default 2); `mask` [B,n,77] is 1 where attention may look. Differentiable.
    """
    ids = input_ids.reshape(-1, input_ids.shape[-1]).to(encoder.device)
    mask = None if mask is None else mask.reshape(ids.shape).to(encoder.device)
    output = encoder(ids, attention_mask=mask, output_hidden_states=True)
    layer = clip_skip or 2
    if layer >= len(output.hidden_states):
        raise ValueError(f"--clip_skip {layer}: the text encoder has only {len(output.hidden_states) - 1} layers.")
    return output.hidden_states[-layer], output.last_hidden_state


def pooled_text(encoder: ClipTextEncoder, last: Tensor, input_ids: Tensor, end_id: int) -> Tensor:
    """Last states [B*n,77,d] and ids [B,n,77] -> [B,p]: those at the first end token of the first window, projected.

    Without a projection the states themselves. The first end token, not the highest id: added words have higher ones.
    """
    first = input_ids[:, 0].to(last.device)
    states = last.unflatten(0, input_ids.shape[:2])[:, 0]
    pooled = states[torch.arange(len(states), device=last.device), first_end_positions(first, end_id)]
    return pooled if encoder.text_projection is None else encoder.text_projection(pooled).to(pooled.dtype)


def encode_captions(
    encoder: ClipTextEncoder, input_ids: Tensor, *, clip_skip: int | None = None, weights: Tensor | None = None
) -> Tensor:
    """Ids [B,n,77] (and caption weights [B,n,77]) -> context [B,S,d] for training; S = 77, or 75n+2 for n > 1."""
    chunks = input_ids.shape[1]
    hidden = splice(encode_windows(encoder, input_ids, clip_skip=clip_skip), chunks)
    return hidden if weights is None else prompt_weights.multiply(hidden, splice(weights, chunks))


@dataclass(frozen=True)
class PromptStyle:
    """How prompts are read for generation. `max_chunks` windows of 75 tokens at most."""

    max_chunks: int = 3
    emphasis: prompt_weights.Emphasis = "original"
    with_breaks: bool = False


def tokenize_prompts(
    tokenizer: ClipTokenizer, prompts: Sequence[str], style: PromptStyle, *, least_chunks: int = 1
) -> tuple[Tensor, Tensor]:
    """Prompts -> ids int64 [B,n,77] and weights float32 [B,n,77] with the smallest n that holds the longest prompt."""
    encoded = []
    for prompt in prompts:
        runs = prompt_weights.parse_weights(prompt)
        if style.with_breaks:
            runs = prompt_weights.split_breaks(runs)
        pad = tokenizer.special.pad if style.with_breaks else None
        encoded.append(prompt_weights.weighted_ids(runs, tokenizer.text_ids, pad=pad))
    needed = max((len(ids) for ids, _ in encoded), default=0)
    needed_chunks = max(1, -(-needed // CHUNK))
    if style.with_breaks and needed_chunks > style.max_chunks:
        logger.warning(
            "The longest prompt needs --max_embeddings_multiples %d, it is %d: the end of the prompt is cut off.",
            needed_chunks, style.max_chunks,
        )  # fmt: skip
    chunks = min(style.max_chunks, max(needed_chunks, least_chunks))
    return tokenizer.pack(encoded, prompts, chunks)


def encode_prompts(
    encoder: ClipTextEncoder, ids: Tensor, weights: Tensor, *, clip_skip: int | None, emphasis: prompt_weights.Emphasis
) -> Tensor:
    """Windows [B,n,77] of ids and weights -> context [B,77n,d] for generation; windows keep their start and end."""
    hidden = join(encode_windows(encoder, ids, clip_skip=clip_skip), ids.shape[1])
    return prompt_weights.emphasize(hidden, weights.flatten(1).to(hidden.device), emphasis)
