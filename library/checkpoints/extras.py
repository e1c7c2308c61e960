"""Keys of a model file that belong to no part of the model: left out with one warning, never a reason to refuse it."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
_SHOWN = 5  # keys that a warning names
#: what other programs leave inside the parts of a model: low-rank factors that were merged, averages, tables, counters
_LEFT_OVER = re.compile(
    r"(?:^|[._])(?:lora_(?:up|down|mid|A|B)|hada_w[12]_[ab]|lokr_w[12])\b|^lora_|\.alpha$|\.lora_scale$"
    r"|(?:^|\.)(?:ddim_\w+|embedding_manager|global_step|epoch|iteration|num_updates|decay)(?:\.|$)|^model_ema\."
)


def warn_of_extras(keys: Collection[str], *, source: str) -> None:
    """One warning about all keys of a file that are not used; nothing if there are none."""
    if keys:
        shown = ", ".join(sorted(keys)[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
        logger.warning("%s: %d tensors belong to no part of the model and are not used: %s", source, len(keys), shown)


def is_left_over(key: str) -> bool:
    """Whether a key is known to be left behind by training programs and to change nothing."""
    return bool(_LEFT_OVER.search(key))


def without_left_overs(expected: Collection[str], found: Mapping[str, Shape], *, source: str) -> dict[str, Shape]:
    """The keys of a part without those that nothing expects and that are known to be harmless; warns of them."""
    extra = [key for key in found if key not in expected and is_left_over(key)]
    warn_of_extras(extra, source=source)
    left_out = set(extra)
    return {key: shape for key, shape in found.items() if key not in left_out}
