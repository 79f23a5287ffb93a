"""`--push-to-hub`: upload of an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import httpx

from vlmds.errors import InputError


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload the folder in one commit; returns the commit's URL. A repository that does not exist is
    created as a private one, because the captions and videos behind the model are the team's own.

    Raises:
        InputError: no such user, no permission, no network. The folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by vlmds"))
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"--push-to-hub {repository}: {reason}; the folder is complete: {folder}, "
            "so log in (hf auth login) and run: "
            f"hf upload {repository} {folder}"
        ) from None
