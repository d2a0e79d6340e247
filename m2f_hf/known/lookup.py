"""Look a checkpoint up, with one question to the Hub and errors of one line, before anything is loaded from it."""

import os
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import first_line


CONFIG = "config.json"
# `huggingface_hub` passes on the errors of httpx, or of httpx2 in later versions; its own are derived from them.
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
_TIMEOUT = 10  # seconds


def find_config(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the `config.json` of a folder or of a model on the Hub, downloaded if it is not in the cache.

    Args:
        model: folder, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub; default: main.
        subfolder: where in the folder or repository it is.
        token, cache_dir: as in `from_pretrained`.
        local_files_only: whether to look into folders and the cache alone.

    Raises:
        FileNotFoundError: there is no such folder, model, branch or file.
        PermissionError: the model's owner has to consent first.
        ConnectionError: the Hub cannot be reached, or refuses.
    """
    folder, model, name = Path(model), os.fspath(model), f"{subfolder}/{CONFIG}" if subfolder else CONFIG
    if folder.is_file():
        raise FileNotFoundError(f"{model} is a file; give the folder that save_pretrained wrote")
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"the folder {model} has no {name}; give one that save_pretrained wrote")
        return folder / name
    try:
        cached = try_to_load_from_cache(model, name, cache_dir=cache_dir, revision=revision)
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no folder {model}, and a model on the Hub is named owner/name") from error
    if isinstance(cached, str):
        return Path(cached)
    if local_files_only:
        raise FileNotFoundError(f"there is no folder {model}, and no such model in the cache")
    try:
        # One question before the download, which would ask six times over half a minute.
        HfApi(token=token).model_info(model, revision=revision, timeout=_TIMEOUT)
        return Path(hf_hub_download(model, name, revision=revision, cache_dir=cache_dir, token=token))
    except GatedRepoError as error:  # a RepositoryNotFoundError, as that is a HfHubHTTPError and a network error
        raise PermissionError(f"{model} needs its owner's consent: ask on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {model} and no such model on the Hub; check the spelling (a private one needs "
            "`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{model} on the Hub has no branch, tag or commit {revision}; see its page") from error
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{model} on the Hub has no {name} on {revision or 'main'}: it is not a transformers model, or is on "
            "another branch, which `revision` (--revision) names"
        ) from error
    except HfHubHTTPError as error:
        raise ConnectionError(f"the Hub does not give {model} ({first_line(error)}); try again later") from error
    except NETWORK_ERRORS as error:
        raise ConnectionError(
            f"there is no folder {model}, and the Hub cannot be reached ({first_line(error)}); check the spelling and "
            "the connection, or give a folder"
        ) from error
