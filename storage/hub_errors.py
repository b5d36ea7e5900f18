"""What goes wrong with requests to the Hugging Face Hub, in words that hold neither tokens nor signed addresses."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol, TypeVar

import httpx2
from huggingface_hub import errors
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # it is loaded lazily, by name

from storage.errors import ChannelMergingError, CheckpointError, SourceError

RETRIES = 5
"""How often a request is made again that brought nothing: 429, 5xx, no connection."""
RETRIED = (408, 429, 500, 502, 503, 504)
LOST = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
NOT_CONNECTED = (httpx2.ConnectError, httpx2.ConnectTimeout)

_QUERY = re.compile(r"\?\S*=\S*")

_T = TypeVar("_T")


class Asked(Protocol):
    """A file or a folder on the Hub."""

    @property
    def repo(self) -> str: ...

    @property
    def commit(self) -> str: ...

    @property
    def endpoint(self) -> str: ...


def _without_query(record: logging.LogRecord) -> bool:
    """A filter of the client's log that takes queries out of addresses: where the Hub redirects to, they are signatures."""
    if isinstance(record.args, tuple):
        record.args = tuple(arg.copy_with(query=None) if isinstance(arg, httpx2.URL) else arg for arg in record.args)
    return True


for _name in ("httpx2", "huggingface_hub.utils._http"):
    logging.getLogger(_name).addFilter(_without_query)


def is_passing(error: Exception) -> bool:
    """Whether a request that ended so may go well the next time."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in RETRIED
    # the client closes its session, which all threads share, when one of them finds no connection
    return isinstance(error, LOST) or "has been closed" in str(error)


def is_refusal(error: Exception) -> bool:
    """Whether a new address may help. Stores say 400, 401, 403, 404 or 410 of one that is too old."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.is_client_error and not is_passing(error)
    return isinstance(error, NOT_CONNECTED)


def asked_wait(error: Exception) -> int | None:
    """Seconds that the server asks to wait, and one more."""
    headers = error.response.headers if isinstance(error, errors.HfHubHTTPError) else {}
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1
    asked = headers.get("Retry-After", "")
    return int(asked) + 1 if asked.isdigit() else None


def answer(subject: str, asked: Asked, request: Callable[[], _T]) -> _T:
    """What a request for ``asked`` returns; ``subject`` is what errors begin with.

    CheckpointError when it cannot be read as asked for, SourceError when the Hub cannot be reached after retries.
    """
    try:
        return request()
    except (OSError, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        if isinstance(error, ChannelMergingError):
            raise
        problem = _problem(subject, asked, error)
    raise problem  # outside of ``except``: the client's error holds the request, with its token


def one_line(text: object, limit: int = 200) -> str:
    """A text of the client's or of a server's as one line, without queries of addresses."""
    return _QUERY.sub("", " ".join(str(text).split()))[:limit]


def _problem(subject: str, asked: Asked, error: BaseException) -> ChannelMergingError:
    """The error to show: one line, without addresses that requests were redirected to, which are signed."""
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(subject, asked, error)
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(
            f"{subject}: expected a repository's name (org/name), got {asked.repo}. Correct it in the recipe."
        )
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _problem(subject, asked, error.__cause__)
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return CheckpointError(
            f"{subject}: HF_HUB_OFFLINE is set and the cache has no {asked.repo} at {asked.commit}. Unset it, or before "
            f"download it: hf download {asked.repo} --revision {asked.commit}"
        )
    if isinstance(error, (httpx2.LocalProtocolError, UnicodeError)):  # their texts quote the header: the token
        return CheckpointError(f"{subject}: a request could not be written. Does HF_TOKEN hold something that is no token?")
    if isinstance(error, LOST):
        reason = f"no connection to {asked.endpoint} in {RETRIES + 1} attempts ({type(error).__name__}: {one_line(error)})"
        return SourceError(f"{subject}: {reason}. Check the network and run again.")
    if isinstance(error, ValueError):
        return CheckpointError(
            f"{subject}: {asked.endpoint} does not answer as a Hub does ({one_line(error)}). Is HF_ENDPOINT right?"
        )
    return SourceError(f"{subject}: {type(error).__name__}: {one_line(error)}. Run again when that is mended.")


def _refusal(subject: str, asked: Asked, error: errors.HfHubHTTPError) -> ChannelMergingError:
    """What an answer of 4xx or 5xx means."""
    status = error.response.status_code
    said = error.server_message or error.response.reason_phrase
    said = error.response.reason_phrase if "<" in said else one_line(said)  # a store's XML quotes signatures
    if status in RETRIED:
        return SourceError(f"{subject}: {asked.endpoint} answered {status} ({said}) {RETRIES + 1} times. Run again later.")
    if isinstance(error, errors.GatedRepoError):
        problem = f"it is gated: accept its terms at {asked.endpoint}/{asked.repo} and set HF_TOKEN to a token of that account."
    elif isinstance(error, errors.DisabledRepoError):
        problem = f"{asked.endpoint} has disabled this repository. Name another source."
    elif status == HTTPStatus.UNAUTHORIZED and "credentials" in said:
        problem = f"{asked.endpoint} does not know the token ({said}). Set HF_TOKEN to a valid one, or run hf auth login."
    elif isinstance(error, errors.RepositoryNotFoundError) or status == HTTPStatus.UNAUTHORIZED:
        problem = (
            "there is no such repository, nor a folder of that name beside the recipe, or it is private: check the name, or "
            "set HF_TOKEN to a token that may read it."
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        problem = f"{asked.repo} has no revision {asked.commit}. Name a branch, a tag or a commit of it."
    elif isinstance(error, errors.RemoteEntryNotFoundError):
        problem = f"{asked.endpoint} lists this file and has none. Is it a faulty mirror?"
    elif status == HTTPStatus.FORBIDDEN:
        problem = f"access was refused ({status}: {said}). Set HF_TOKEN to a token whose permissions include this repository."
    else:
        problem = f"{asked.endpoint} answered {status} ({said}). Is HF_ENDPOINT the address of a Hub?"
    return CheckpointError(f"{subject}: {problem}")
