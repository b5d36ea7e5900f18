"""What reading from and writing to object stores have in common: places, connections, retries, and errors a user can act on.

Credentials come from the environment of the process that asks, and lie in obstore's store object alone: no place, message or
pickle holds them. What a store says in its errors may hold signed URLs, so only its status and error codes are passed on.
obstore's threads do not survive a fork: workers are started anew (spawned), not forked.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from storage.errors import ChannelMergingError
from storage.places import OBJECT_STORES

if TYPE_CHECKING:
    from obstore import ListResult, ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

RESUMES = 3
"""How often what was cut goes on, or is asked again, where obstore gives up or does not retry by itself."""
PAUSE_S = 0.5
"""Seconds before the first of these; twice as many before each further one, shortened by chance so that workers spread."""
RETRIES: RetryConfig = {
    "max_retries": 8,
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=15), "base": 2},
    "retry_timeout": timedelta(minutes=2),
}
READ_SILENCE = timedelta(seconds=60)
WRITE_SILENCE = timedelta(minutes=5)
"""How long nothing may come back; sending a part and waiting for a server-side copy are part of this time."""

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTAINER_AT_HOST = re.compile(r"([a-z0-9][a-z0-9-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*")
_REMEDIES = {
    "s3": (
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL where they are "
        "needed; profiles in ~/.aws are not read), or AWS_SKIP_SIGNATURE=true for a public bucket"
    ),
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": (
        "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true "
        "for a public container"
    ),
}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_TRANSPORT = re.compile(r"HTTP error: ([A-Za-z ]{1,60})")
_EXHAUSTED = re.compile(r"after (\d+) retries, max_retries: \1,")
_NO_CREDENTIALS = ("token request", "latest/api/token", "security-credentials")
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_OTHER_REGION = ("incorrectly configured region", "AuthorizationHeaderMalformed", "PermanentRedirect")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Use:
    """What a bucket is used for: which errors its troubles are, and what a user is told to correct."""

    refused: type[ChannelMergingError]
    """When access is refused, settings are missing, or the place does not exist."""
    unreachable: type[ChannelMergingError]
    """When there is no answer, after retries."""
    correction: str
    """Of a place that is none."""
    move_away: str
    """From a prefix with names that are no paths."""


def place_of(url: str, use: Use) -> str:
    """The URL without a trailing slash. What is refused is not repeated: it may be a secret."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in OBJECT_STORES:
        raise use.refused(f"expected a URL of {', '.join(OBJECT_STORES)}, got another. {use.correction}.")
    remedy = "Give scheme, bucket and prefix alone; credentials come from the environment"
    if "?" in rest or "#" in rest:
        raise use.refused(f"a {scheme}:// URL with a query or a fragment is refused. {remedy}.")
    host, _, path = rest.partition("/")
    if not (_CONTAINER_AT_HOST if scheme in ("abfs", "abfss") else _HOST).fullmatch(host) or urlsplit(url).password:
        raise use.refused(f"a {scheme}:// URL whose bucket is empty, or that holds a user, is refused. {remedy}.")
    return f"{scheme}://{host}/{path}".rstrip("/")


def family(place: str) -> str:
    """Whose protocol a place speaks: s3, gs or az."""
    scheme = place.partition("://")[0]
    return "s3" if scheme in ("s3", "s3a") else "gs" if scheme == "gs" else "az"


def connected(place: str, use: Use, silence: timedelta = READ_SILENCE) -> ObjectStore:
    """This process's connections to a place; ``use.refused`` when the settings in the environment make none."""
    try:
        return _connection(place, os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or "", silence)
    except (BaseError, ValueError):
        raise use.refused(
            f"{place}: the store's settings in the environment are incomplete or wrong. {_REMEDIES[family(place)]}."
        ) from None


@lru_cache(maxsize=64)
def _connection(place: str, endpoint: str, silence: timedelta) -> ObjectStore:
    """A process's one connection pool per place; the endpoint is part of the key as it is read from the environment here."""
    options: ClientConfig = {"timeout": timedelta(minutes=10), "read_timeout": silence}
    if family(place) == "s3" and endpoint.startswith("http://"):
        options["allow_http"] = True  # asked for by name, as other clients of S3 take it
    return from_url(place, client_options=options, retry_config=RETRIES)


def forget_connections() -> None:
    """Make the next request read the environment again."""
    _connection.cache_clear()


def directly_under(connection: ObjectStore, prefix: str | None, place: str, use: Use) -> ListResult[Sequence[ObjectMeta]]:
    """Objects and common prefixes one level below a prefix."""
    return _listed(lambda: obstore.list_with_delimiter(connection, prefix), place, use)


def all_under(connection: ObjectStore, prefix: str | None, place: str, use: Use) -> list[ObjectMeta]:
    """The objects at any depth below a prefix."""
    return _listed(lambda: [entry for page in obstore.list(connection, prefix) for entry in page], place, use)


def _listed(ask: Callable[[], Answer], place: str, use: Use) -> Answer:
    try:
        return persist(ask, place, use)
    except InvalidPathError:
        raise use.refused(f"{place}: objects under it have names that are no paths (//, . or ..). {use.move_away}.") from None
    except FileNotFoundError:
        raise no_bucket(place, use) from None


def no_bucket(place: str, use: Use) -> ChannelMergingError:
    return use.refused(f"{place}: there is no such bucket or container. {use.correction}.")


def persist(ask: Callable[[], Answer], place: str, use: Use) -> Answer:
    """What a request that may be repeated answers, where obstore does not retry by itself.

    What is said of the object alone (missing, there already, another state, a name that is no path) is passed on; all other
    errors become ``use``'s.
    """
    for trial in range(1 + RESUMES):
        try:
            return ask()
        except (PreconditionError, AlreadyExistsError, InvalidPathError):
            raise
        except (BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError) and code_of(error) not in _NO_BUCKET:
                raise
            if trial == RESUMES or not may_pass(error):
                raise failure(place, error, use) from None
        pause(trial)
    raise AssertionError  # the last trial returns or raises


def pause(trial: int) -> None:
    """Wait before the next trial."""
    time.sleep(PAUSE_S * 2**trial * random.uniform(0.5, 1.0))  # noqa: S311 - no secret


def fill(view: memoryview, pieces: Callable[[int], Iterable[bytes]], place: str, use: Use) -> None:
    """Fill the view from ``pieces(done)``, its bytes from ``done`` on, going on from the byte where a body was cut.

    PreconditionError and FileNotFoundError are passed on.
    """
    done = 0
    lost: Exception | None = None
    for trial in range(1 + RESUMES):
        before = done
        try:
            for piece in pieces(done):
                fits = piece[: len(view) - done]
                view[done : done + len(fits)] = fits
                done += len(fits)
        except (PreconditionError, FileNotFoundError):
            raise
        except (BaseError, OSError) as error:
            lost = error
        if done == len(view):
            return
        if done == before and lost is not None:
            if not may_pass(lost):
                break
            pause(trial)
    if lost is not None:
        raise failure(place, lost, use)
    raise use.unreachable(f"{place}: {done} of {len(view)} bytes came, then no more. Run again.")


def quoted(etag: str) -> str:
    """As a header has it; Azure lists ETags without their quotes."""
    return etag if etag.endswith('"') else f'"{etag}"'


def _matched(pattern: re.Pattern[str], error: Exception) -> str:
    found = pattern.search(str(error))
    return found[1] if found else ""


def status_of(error: Exception) -> str:
    """The HTTP status an error of obstore tells of, or ''."""
    return _matched(_STATUS, error)


def code_of(error: Exception) -> str:
    """The store's code for an error, or ''."""
    return _matched(_CODE, error)


def may_pass(error: Exception) -> bool:
    """Whether an error tells of a lost connection that obstore has not retried as often as it may."""
    text = str(error)
    return (
        not status_of(error)
        and not _EXHAUSTED.search(text)
        and not any(hint in text for hint in (*_NO_CREDENTIALS, *_OTHER_REGION))
    )


def failure(place: str, error: Exception, use: Use) -> ChannelMergingError:
    """The error a user can act on, from what obstore says."""
    text = str(error)
    status, code = status_of(error), code_of(error)
    said = ", ".join(part for part in (status and f"HTTP {status}", code) if part)
    remedy = _REMEDIES[family(place)]
    if code in _NO_BUCKET or (status == "404" and code != "NoSuchUpload"):
        return no_bucket(place, use)
    if any(hint in text for hint in _OTHER_REGION):
        return use.refused(f"{place}: the bucket lies in another region. Set AWS_REGION to it.")
    if any(hint in text for hint in _NO_CREDENTIALS) and not status.startswith("5"):
        return use.refused(f"{place}: no credentials for it were found. {remedy}.")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or status in ("401", "403") or code in _EXPIRED:
        return use.refused(f"{place}: access is refused ({said}). {remedy}.")
    reason = said or _matched(_TRANSPORT, error).strip() or "no answer that can be read"
    return use.unreachable(f"{place}: the store cannot be reached, after retries ({reason}). Run again when it answers.")
