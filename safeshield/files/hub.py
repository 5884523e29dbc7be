"""Files of the Hugging Face Hub, from the extra `hub`.

A file of the Hub is data, as a file from any stranger is: it is downloaded and then read by the
same functions, with the same checks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHIELD_FILE = "shield.safetensors"
"""Name of a shield's file in a repository of the Hub."""
_OF_NETWORK = {"ConnectionError", "RequestError", "RequestException"}


def hub() -> Any:  # noqa: ANN401 - the module
    """Return the module `huggingface_hub`.

    Raises:
        ImportError: The extra `hub` is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            "the Hugging Face Hub needs the package huggingface_hub: run pip install "
            '"safeshield[hub]"'
        ) from error
    return huggingface_hub


def downloaded(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Return the path of a shield's file in the Hub's cache, after a download where it is needed.

    Args:
        repo_id: Repository, as "user/name".
        revision: Branch, tag or commit; None for the newest of the main branch.
        token: The Hub's token; None for the stored one.

    Raises:
        ImportError: The extra `hub` is not installed.
        FileNotFoundError: There is no such repository, revision or file, or no access to it.
        ConnectionError: The Hub cannot be reached, and the file is not in the cache.
        ValueError: `repo_id` is not the name of a repository.
    """
    module = hub()
    with explained(module, repo_id, revision):
        path = module.hf_hub_download(repo_id, SHIELD_FILE, revision=revision, token=token)
    return Path(path)


@contextlib.contextmanager
def explained(module: Any, repo_id: str, revision: str | None = None) -> Iterator[None]:  # noqa: ANN401
    """Raise the Hub's errors as those of Python, with what to do.

    Args:
        module: The module `huggingface_hub`.
        repo_id: Repository, for messages.
        revision: Its revision, for messages.
    """
    errors = module.errors
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(
            f"repo_id must be the name of a repository of the Hub, 'user/name', got '{repo_id}'; "
            "for a file on this machine use Shield.load(path)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(_unreachable(repo_id)) from error
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
    ) as error:
        at = "" if revision is None else f" at revision '{revision}'"
        raise FileNotFoundError(
            f"the Hub has no {SHIELD_FILE} in '{repo_id}'{at}, or it is private: check the name, "
            "and pass token= or log in with `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"the Hub refused the request for '{repo_id}': {error}") from error
    except Exception as error:
        # The Hub's library has changed its HTTP client before, so its errors are known by name.
        if not _OF_NETWORK & {kind.__name__ for kind in type(error).__mro__}:
            raise
        raise ConnectionError(_unreachable(repo_id)) from error


def _unreachable(repo_id: str) -> str:
    return (
        f"the Hub cannot be reached for '{repo_id}': check the network, or copy the file here by "
        "other means and use Shield.load(path)"
    )
