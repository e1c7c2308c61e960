"""Names of the Hugging Face hub's scripts that other programs import; uploading is not supported yet and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from library.options.errors import UserError


def exists_repo(repo_id: str, repo_type: str, revision: str = "main", token: str | None = None) -> bool:
    """Whether the hub has this repository and revision, for the owner of the token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi(token=token).repo_info(repo_id, revision=revision, repo_type=repo_type)
    except HfHubHTTPError:
        return False
    return True


def upload(args: Any, src: str | Path, dest_suffix: str = "", force_sync_upload: bool = False) -> NoReturn:
    """Always raises UserError: nothing would be uploaded."""
    raise UserError(f"{src} is not uploaded: the Hugging Face hub is not supported yet.")
