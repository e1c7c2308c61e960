"""Options for uploading to and resuming from the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class HubOptions:
    huggingface_repo_id: str | None = option("repository to upload to, e.g. `me/my-lora`")
    huggingface_repo_type: str | None = option("kind of repository: model, dataset or space")
    huggingface_path_in_repo: str | None = option("folder inside the repository")
    huggingface_token: str | None = option("access token (better: log in once with `hf auth login`)")
    huggingface_repo_visibility: str | None = option("`public` or `private` for a new repository")
    save_state_to_huggingface: bool = flag("upload training states too")
    resume_from_huggingface: bool = flag("--resume names a state on the hub: user/repo/path[:revision[:type]]")
    async_upload: bool = flag("upload in the background")
