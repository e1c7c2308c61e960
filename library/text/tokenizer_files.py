"""Finding a tokenizer's files: in or beside the model, in a cache folder, in the local hub cache, on the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

#: files that settings of a tokenizer stand in, beside those that make it complete
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from: its hub id, its folder in there, its folder in a model, a padding id to force.

    A folder holds the tokenizer if it has all files of one of the `complete_sets`; without them transformers would
    silently make a tokenizer that knows nothing.
    """

    hub_id: str
    hub_folder: str = ""
    model_folder: str = "tokenizer"
    pad: int | None = None
    pad_is_word: bool = False  # whether the padding token, where it stands in texts, is read as an ordinary word
    complete_sets: tuple[tuple[str, ...], ...] = (("tokenizer.json",), ("vocab.json", "merges.txt"))

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` holds such a tokenizer."""
        return any(all((folder / name).is_file() for name in names) for names in self.complete_sets)


class _CanBeSaved(Protocol):
    def save(self, folder: Path) -> None: ...


T = TypeVar("T", bound=_CanBeSaved)


def find_tokenizer(
    source: TokenizerSource,
    load: Callable[[Path, str], T],
    *,
    model_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    with_download: bool = True,
) -> tuple[T | None, list[str]]:
    """(the tokenizer that `load(folder, name of the place)` makes of the first place that has it, places tried).

    Places: the source's folder in the model folder or beside the checkpoint; `cache_dir/<hub id with / as _>`; the
    local hub cache; the hub (then saved to `cache_dir`), unless without download. A place where `load` raises
    ValueError is passed over.
    """
    cached = Path(cache_dir) / source.hub_id.replace("/", "_") if cache_dir else None
    tried: list[str] = []
    for folder in (_folder_of_model(source, model_path), cached):
        if folder is None:
            continue
        try:
            if source.is_in(folder):
                return load(folder, str(folder)), tried
            tried.append(str(folder))
        except ValueError as error:
            tried.append(str(error))
    for local_only in (True, False) if with_download else (True,):
        try:
            found = load(_hub_folder(source, local_only=local_only), source.hub_id)
        except Exception as error:
            place = "the local hub cache" if local_only else "huggingface.co"
            tried.append(f"{place} ({source.hub_id}: {type(error).__name__})")
            continue
        if cached is not None:
            found.save(cached)
        return found, tried
    return None, tried


def not_found_message(source: TokenizerSource, tried: list[str]) -> str:
    """What a user is told when no place has the tokenizer."""
    return (
        f"No tokenizer found. Looked in: {'; '.join(tried)}. Put the files of {source.hub_id} into a folder "
        f"'{source.model_folder}' beside the model, or into --tokenizer_cache_dir."
    )


def _folder_of_model(source: TokenizerSource, model_path: str | Path | None) -> Path | None:
    if model_path is None:
        return None
    path = Path(model_path)
    if path.is_dir():
        return path / source.model_folder
    return path.resolve().parent / source.model_folder if path.is_file() else None


def _hub_folder(source: TokenizerSource, *, local_only: bool) -> Path:
    """The local copy of a hub tokenizer's files; downloaded unless `local_only`. Raises if there is none."""
    from huggingface_hub import snapshot_download

    prefix = f"{source.hub_folder}/" if source.hub_folder else ""
    names = {*_SETTINGS, *(name for names in source.complete_sets for name in names)}
    root = snapshot_download(
        source.hub_id, allow_patterns=[prefix + name for name in sorted(names)], local_files_only=local_only
    )
    folder = Path(root) / source.hub_folder
    if not source.is_in(folder):
        raise FileNotFoundError(f"{source.hub_id} has no tokenizer files in {folder}")
    return folder
