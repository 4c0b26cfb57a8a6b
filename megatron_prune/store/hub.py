"""Upload a finished directory to the Hugging Face hub, or to what HF_ENDPOINT names.

What can be known to fail is refused before any work. An upload that fails leaves the directory as
it is, so it can be tried again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prune.errors import ConfigError, StorageError


def check_hub(repo_id: str, *, private: bool) -> None:
    """Refuse an upload that cannot succeed; asks the hub who the token belongs to.

    Raises:
        ConfigError: offline, no token or a wrong one, the hub does not answer, or ``private`` and
            the repository is there and public.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    flag = f"--push-to-hub {repo_id}"
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{flag}: HF_HUB_OFFLINE is set; unset it, or leave the flag out")
    if get_token() is None:
        raise ConfigError(f"{flag}: no token; set HF_TOKEN or run 'hf auth login'")
    api = HfApi()
    try:
        api.whoami()
        is_public = api.model_info(repo_id).private is False
    except RepositoryNotFoundError:
        is_public = False
    except Exception as error:  # whatever the hub, its library and the network raise
        raise ConfigError(
            f"{flag}: {api.endpoint} did not take the token ({_said(error)}); check HF_TOKEN and "
            "the network, or leave the flag out"
        ) from error
    if private and is_public:
        raise ConfigError(
            f"{flag} --private: is there and public; make it private on the hub, or choose another"
        )


def push(directory: Path, repo_id: str, *, private: bool) -> str:
    """Upload every file of a directory as one commit; returns its address.

    Raises:
        StorageError: it failed; the directory is as it was.
    """
    from huggingface_hub import HfApi

    try:
        api: Any = HfApi()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory).commit_url)
    except Exception as error:  # whatever the hub, its library and the network raise
        raise StorageError(
            f"--push-to-hub {repo_id}: {_said(error)}; {directory} is whole, try again with "
            f"'hf upload {repo_id} {directory}'"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
