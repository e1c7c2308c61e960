"""CLIP: finding a tokenizer, captions to ids, ids to hidden states."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.text import prompt_weights
from library.text.chunking import CHUNK, WINDOW, SpecialIds, chunk_count, chunk_ids, join, splice

if TYPE_CHECKING:
    from library.models.text_encoders import ClipTextEncoder

logger = logging.getLogger(__name__)


# --- tokenizers ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from: its hub id, its folder in there, its folder in a model, a padding id to force."""

    hub_id: str
    hub_folder: str = ""
    model_folder: str = "tokenizer"
    pad: int | None = None


CLIP_L = TokenizerSource("openai/clip-vit-large-patch14")
CLIP_H = TokenizerSource("stabilityai/stable-diffusion-2", hub_folder="tokenizer", pad=0)
CLIP_G = TokenizerSource("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", model_folder="tokenizer_2", pad=0)


class ClipTokenizer:
    """A CLIP tokenizer with its special ids and the place it came from. Picklable."""

    def __init__(self, tokenizer: Any, *, source: str, pad: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.source = source
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
        if self.tokenizer.add_tokens(token) != 1:
            raise ValueError(f"the tokenizer already knows {token!r}; choose another --token_string.")
        return self.tokenizer.convert_tokens_to_ids(token)

    def check_fits(self, encoder: ClipTextEncoder, model_source: str) -> None:
        """Raises ValueError if an id of this tokenizer has no row in the encoder's token table."""
        rows = encoder.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > rows or max(self.special.start, self.special.end, self.special.pad) >= rows:
            raise ValueError(
                f"The tokenizer from {self.source} has {len(self.tokenizer)} tokens, but the text encoder of "
                f"{model_source} has {rows} rows: they do not fit. Put the model's own tokenizer into a folder "
                "'tokenizer' beside it, or name its folder with --tokenizer_cache_dir."
            )

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files, also `vocab.json` and `merges.txt`, which older libraries need."""
        self.tokenizer.save_pretrained(str(folder))
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
    cached = Path(cache_dir) / source.hub_id.replace("/", "_") if cache_dir else None
    tried: list[str] = []
    for folder in (_folder_of_model(source, model_path), cached):
        if folder is None:
            continue
        if _has_vocabulary(folder):
            return _from_folder(folder, source, name=str(folder))
        tried.append(str(folder))
    for local_only in (True, False) if with_download else (True,):
        try:
            found = _from_folder(_hub_folder(source, local_only=local_only), source, name=source.hub_id)
        except Exception as error:
            place = "the local hub cache" if local_only else "huggingface.co"
            tried.append(f"{place} ({source.hub_id}: {type(error).__name__})")
            continue
        if cached is not None:
            found.save(cached)
        return found
    tokenizer = _from_open_clip()
    if tokenizer is not None:
        return ClipTokenizer(tokenizer, source="the installed open_clip_torch", pad=source.pad)
    raise FileNotFoundError(
        f"No tokenizer found. Looked in: {'; '.join(tried)}; open_clip_torch. Put the tokenizer's files into a folder "
        f"'{source.model_folder}' beside the model, or into --tokenizer_cache_dir."
    )


def _folder_of_model(source: TokenizerSource, model_path: str | Path | None) -> Path | None:
    if model_path is None:
        return None
    path = Path(model_path)
    if path.is_dir():
        return path / source.model_folder
    return path.resolve().parent / source.model_folder if path.is_file() else None


def _has_vocabulary(folder: Path) -> bool:
    """Without these files transformers would silently make a tokenizer that knows nothing."""
    complete_sets = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    return any(all((folder / name).is_file() for name in names) for names in complete_sets)


def _from_folder(folder: Path, source: TokenizerSource, *, name: str) -> ClipTokenizer:
    from transformers import CLIPTokenizer

    return ClipTokenizer(CLIPTokenizer.from_pretrained(str(folder)), source=name, pad=source.pad)


def _hub_folder(source: TokenizerSource, *, local_only: bool) -> Path:
    """The local copy of a hub tokenizer's files; downloaded unless `local_only`. Raises if there is none."""
    from huggingface_hub import snapshot_download

    prefix = f"{source.hub_folder}/" if source.hub_folder else ""
    names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
    root = snapshot_download(
        source.hub_id, allow_patterns=[prefix + name for name in names], local_files_only=local_only
    )
    folder = Path(root) / source.hub_folder
    if not _has_vocabulary(folder):
        raise FileNotFoundError(f"{source.hub_id} has no tokenizer files in {folder}")
    return folder


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


def tokenize_prompts(tokenizer: ClipTokenizer, prompts: Sequence[str], style: PromptStyle) -> tuple[Tensor, Tensor]:
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
    chunks = min(style.max_chunks, needed_chunks)
    return tokenizer.pack(encoded, prompts, chunks)


def encode_prompts(
    encoder: ClipTextEncoder, ids: Tensor, weights: Tensor, *, clip_skip: int | None, emphasis: prompt_weights.Emphasis
) -> Tensor:
    """Windows [B,n,77] of ids and weights -> context [B,77n,d] for generation; windows keep their start and end."""
    hidden = join(encode_windows(encoder, ids, clip_skip=clip_skip), ids.shape[1])
    return prompt_weights.emphasize(hidden, weights.flatten(1).to(hidden.device), emphasis)
