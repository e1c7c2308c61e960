"""Names of the Hugging Face hub that other programs import; it is not supported yet, which both functions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from library.options.errors import UserError


def exists_repo(repo_id: str, repo_type: str, revision: str = "main", token: str | None = None) -> NoReturn:
    """Always raises UserError: the hub is not asked."""
    raise UserError(f"{repo_id} is not looked up: the Hugging Face hub is not supported yet.")


def upload(args: Any, src: str | Path, dest_suffix: str = "", force_sync_upload: bool = False) -> NoReturn:
    """Always raises UserError: nothing would be uploaded."""
    raise UserError(f"{src} is not uploaded: the Hugging Face hub is not supported yet.")
