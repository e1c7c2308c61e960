"""Caption files beside images: finding them, reading them, and what stands in when there is none."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from library.config_schema import SubsetConfig
from library.data.threads import map_files

logger = logging.getLogger(__name__)

_SHOWN = 5  # file names in a warning


def find_caption_file(image_path: str, extension: str) -> str | None:
    """The caption file of an image: the same name, or the name without the `_cx_cy_w_h` of a face crop."""
    base = os.path.splitext(image_path)[0]
    if os.path.isfile(base + extension):
        return base + extension
    folder, stem = os.path.split(base)
    pieces = stem.split("_")
    path = os.path.join(folder, "_".join(pieces[:-4]) + extension) if len(pieces) >= 5 else ""
    return path if os.path.isfile(path) else None


def read_caption_file(path: str, *, enable_wildcard: bool) -> str:
    """The stored caption: the first line, or with `enable_wildcard` all non-blank lines; each stripped.

    Raises ValueError naming the file when it has zero bytes or is not UTF-8.
    """
    with open(path, "rb") as file:
        content = file.read()
    if not content:
        raise ValueError(f"{path}: the caption file is empty (0 bytes); write a caption, or remove the file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the caption file is not UTF-8 text ({error}); save it as UTF-8") from error
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return "\n".join(line for line in lines if line) if enable_wildcard else lines[0]


def read_captions(subset: SubsetConfig, image_paths: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(image path -> stored caption, caption path -> line about a file that is unreadable).

    Images without a caption file get the class tokens, or an empty caption, and a warning says so.
    """

    def read(image_path: str) -> tuple[str | None, str, str]:
        """(caption file, caption, what is wrong with the file)."""
        path = find_caption_file(image_path, subset.caption_extension)
        if path is None:
            return None, subset.class_tokens or "", ""
        try:
            return path, read_caption_file(path, enable_wildcard=subset.enable_wildcard), ""
        except (ValueError, OSError) as error:
            return path, "", str(error)

    captions: dict[str, str] = {}
    bad: dict[str, str] = {}
    missing: list[str] = []
    found = map_files(read, image_paths, "reading captions")
    for image_path, (path, caption, problem) in zip(image_paths, found, strict=True):
        if path is None:
            missing.append(image_path)
        if path is not None and problem:
            bad[path] = problem
        else:
            captions[image_path] = caption
    if missing:
        _report_missing(subset, missing, total=len(image_paths))
    return captions, bad


def _report_missing(subset: SubsetConfig, missing: Sequence[str], *, total: int) -> None:
    examples = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    count = f"{subset.location}: {len(missing)} of {total} images have no {subset.caption_extension} file"
    if subset.class_tokens:
        logger.info("%s; their caption is the class tokens %r", count, subset.class_tokens)
    else:
        logger.warning("%s and no class tokens; their caption is empty: %s", count, examples)
    with_text = [path for path in missing if os.path.isfile(os.path.splitext(path)[0] + ".txt")]
    if with_text and len(missing) == total and subset.caption_extension != ".txt":
        logger.warning(
            "%s: %d images have a .txt file beside them; to use these as captions, set caption_extension = \".txt\"",
            subset.location,
            len(with_text),
        )
    elsewhere = [path for path in missing if _caption_of_older_versions(path, subset.caption_extension)]
    if elsewhere:
        logger.info(
            "%s: captions of face crops are looked for by the file name only; %d images that older versions gave "
            "the caption of another directory have none now",
            subset.location,
            len(elsewhere),
        )


def _caption_of_older_versions(image_path: str, extension: str) -> bool:
    """Whether cutting four pieces off the whole path, not off the file name, leads to a caption file."""
    pieces = os.path.splitext(image_path)[0].split("_")
    return len(pieces) >= 5 and os.path.isfile("_".join(pieces[:-4]) + extension)
