"""Data sets on the Hugging Face Hub: a revision pinned to its commit, and what errors of their streams mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, errors, get_session
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id  # type: ignore[attr-defined]  # loaded lazily, by name

from storage.errors import ChannelMergingError, CheckpointError, QueryDataError
from storage.hub import endpoint_of, persistently, request_options
from storage.hub_errors import LOST, answer, is_passing, one_line


@dataclass(frozen=True)
class HubDataset:
    """A data set at a commit."""

    name: str
    commit: str
    endpoint: str

    @property
    def repo(self) -> str:
        """As its page is addressed."""
        return f"datasets/{self.name}"

    @property
    def place(self) -> str:
        return f"{self.name}@{self.commit}"


def open_dataset(label: str, name: str, revision: str | None) -> HubDataset:
    """A data set at the commit that a revision (branch, tag, commit) names now; None is ``main``. One request.

    QueryDataError when there is no such data set or revision, it may not be read or the client is offline; SourceError when
    the Hub cannot be reached after retries.
    """
    subject = f"{label}: data set {name}" if revision is None else f"{label}: data set {name}@{revision}"
    if constants.is_offline_mode():
        raise QueryDataError(
            f"{subject}: HF_HUB_OFFLINE is set, and data sets are streamed from the Hub. Unset it, or name local files."
        )
    try:
        asked = HubDataset(name, revision or constants.DEFAULT_REVISION, endpoint_of(label))
        answer(subject, asked, lambda: validate_repo_id(name))
        return HubDataset(name, answer(subject, asked, lambda: _commit(asked)), asked.endpoint)
    except CheckpointError as error:
        problem = str(error)
    raise QueryDataError(problem)


def _commit(asked: HubDataset) -> str:
    def request() -> Any:
        url = f"{asked.endpoint}/api/datasets/{asked.name}/revision/{quote(asked.commit, safe='')}"
        response = get_session().get(url, follow_redirects=True, **request_options())
        hf_raise_for_status(response)
        return response.json()

    found = persistently(request)
    if not isinstance(found, dict) or not isinstance(found.get("sha"), str):
        raise ValueError("no commit in its answer")
    return str(found["sha"])


def stream_problem(error: BaseException) -> tuple[str, bool]:
    """What an error says that a stream of a data set ended with, and whether it may be gone the next time.

    One line, without queries of addresses: they may be signatures.
    """
    passing = isinstance(error, (*LOST, TimeoutError, ConnectionError)) or (
        isinstance(error, (errors.HfHubHTTPError, RuntimeError)) and is_passing(error)
    )
    while isinstance(error, Exception) and error.__cause__ is not None and not str(error).strip():
        error = error.__cause__
    told = isinstance(error, ChannelMergingError) or not isinstance(error, (httpx2.LocalProtocolError, UnicodeEncodeError))
    return (one_line(error, 300) if told else "a request could not be written. Does HF_TOKEN hold a token?"), passing
