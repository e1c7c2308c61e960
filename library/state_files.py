"""The files of a saved state: what must be there, whether it is whole, and which state of a folder is the newest."""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from library.checkpoints.tensors import SafetensorsFile

logger = logging.getLogger(__name__)

POSITION_FILE = "train_state.json"
MODEL_FILE = "model.safetensors"
SCHEDULER_FILE = "scheduler.json"

_RESTS = ("incomplete", "old")  # of `<state>.incomplete`, `<state>.old`


def optimizer_files(folder: Path, number: int) -> tuple[Path, Path]:
    """(tensors, settings) of optimizer `number`."""
    stem = f"optimizer_{number}" if number else "optimizer"
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"


def random_state_files(folder: Path, rank: int) -> tuple[Path, Path]:
    """(tensors, settings) of the generators of process `rank`."""
    return folder / f"random_states_{rank}.safetensors", folder / f"random_states_{rank}.json"


def recover(folder: Path) -> None:
    """Give a state its name back if a kill came between the two renames that replace it."""
    interrupted = Path(f"{folder}.old")
    if not folder.exists() and interrupted.is_dir():
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(interrupted, folder)


def read_json(path: Path) -> Any:
    """The content of a JSON file of a state. Raises FileNotFoundError or ValueError that name file and state."""
    state = f"--resume {path.parent}"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{state}: {path.name} is missing; the state is not complete.") from None
    except ValueError as error:
        what = "is empty" if path.stat().st_size == 0 else f"cannot be read ({error})"
        raise ValueError(f"{state}: {path.name} {what}; the state is damaged. Resume from another state.") from error


def check_files(folder: Path) -> None:
    """Raise FileNotFoundError or ValueError for the first file that is missing, cut or unreadable; nothing is loaded.

    Lengths and headers are read, so this is quick for states of any size.
    """
    _check_tensors(folder / MODEL_FILE)
    schedule = read_json(folder / SCHEDULER_FILE)
    if not isinstance(schedule, dict):
        raise damaged(folder / SCHEDULER_FILE)
    for number in range(1 + len(schedule.get("further_schedulers", []))):
        tensors, settings = optimizer_files(folder, number)
        _check_tensors(tensors)
        _check_table(settings)
    for path in sorted(folder.glob("random_states_*.json")):
        _check_table(path)
        _check_tensors(path.with_suffix(".safetensors"))


def damaged(path: Path) -> ValueError:
    """The error about a file of a state whose content is not what it must be."""
    return ValueError(f"--resume {path.parent}: {path.name} is damaged. Resume from another state.")


def _check_table(path: Path) -> None:
    if not isinstance(read_json(path), dict):
        raise damaged(path)


def _check_tensors(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"--resume {path.parent}: {path.name} is missing; the state is not complete.")
    try:
        SafetensorsFile(path)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"--resume {path.parent}: {path.name} is cut or damaged ({path.stat().st_size} bytes). Resume from another "
            "state."
        ) from error


# --- a folder of states ----------------------------------------------------------------------------------------
def is_state(folder: Path) -> bool:
    """Whether a folder is meant to be a state, whole or not."""
    return (folder / POSITION_FILE).exists() or (folder / MODEL_FILE).exists()


def find_state(folder: Path, output_name: str | None) -> Path:
    """`folder` if it is a state; else the newest whole state of the run `output_name` in it, which is said.

    Raises FileNotFoundError without the folder, and ValueError when there is no whole state of this run in it.
    """
    recover(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--resume {folder}: no such folder. Give the path of a saved state (…-state).")
    if is_state(folder):
        return folder
    names = {_name_of_state(item) for item in folder.iterdir() if item.is_dir()} - {None}
    states = [folder / str(name) for name in sorted(map(str, names))]
    for state in states:
        recover(state)
    own = [state for state in states if _belongs(state.name, output_name)]
    whole = [(when, state) for state in own if (when := _saved_when(state)) is not None]
    if whole:
        newest = max(whole)[1]
        logger.info("--resume %s: its newest whole state is used: %s", folder, newest.name)
        return newest
    if not states:
        raise ValueError(f"--resume {folder}: it is no saved state, and holds none (…-state).")
    if own:
        raise ValueError(f"--resume {folder}: none of its states is whole: {', '.join(s.name for s in own)}.")
    raise ValueError(
        f"--resume {folder}: it holds no state of this run (--output_name {output_name}), only "
        f"{', '.join(state.name for state in states)}. Name the one to go on from."
    )


def _name_of_state(folder: Path) -> str | None:
    """The name of the state that a folder is, was or would have become; None for other folders."""
    stem, _, rest = folder.name.rpartition(".")
    name = stem if rest in _RESTS else folder.name
    return name if name.endswith("-state") else None


def _belongs(name: str, output_name: str | None) -> bool:
    """Whether the state `name` is of the run `output_name` (the names that `SaveNames` gives)."""
    own = [re.escape(output_name)] if output_name else ["epoch", "at", "last"]
    return re.fullmatch(rf"(?:{'|'.join(own)})(?:-\d+|-step\d+)?-state", name) is not None


def _saved_when(state: Path) -> tuple[float, int] | None:
    """(time, step) of a whole state; None, with a warning, for one that is not."""
    path = state / POSITION_FILE
    try:
        if not path.is_file():
            raise FileNotFoundError(f"--resume {state}: {path.name} is missing; the state is not complete.")
        saved = read_json(path)
        if not isinstance(saved, dict):
            raise damaged(path)
        if "format" in saved:
            check_files(state)
        return float(saved.get("saved_at", path.stat().st_mtime)), int(saved.get("current_step", 0))
    except (ValueError, TypeError, OSError) as error:
        logger.warning("%s This state is skipped.", error)
        return None
