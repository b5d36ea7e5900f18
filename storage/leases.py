"""Locks of object stores: a small object that its holder renews, and that another may take over once it stays the same.

No clock is compared with another's: who waits measures by its own how long it has seen one state. What is written under a lease
must be harmless when it is written twice, as a holder that was cut off from the store for a while works on beside the next one.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from storage.errors import StoreError

LEASE = ".lease"
"""The end of the names of leases; listings of a store leave them out."""
LEASE_BEAT_S = 15.0
"""Seconds between renewals."""
LEASE_TTL_S = 60.0
"""Seconds without a renewal after which a lease is free; several beats, so that one that fails is no loss."""
LEASE_POLL_S = 3.0
"""Seconds between two looks of one who waits."""


class Leased(Protocol):
    """What of a store is needed; see ``storage.stores.Store``."""

    def tagged(self, key: str) -> tuple[bytes, str] | None: ...

    def swap(self, key: str, data: bytes, tag: str | None) -> bool: ...

    def delete(self, keys: list[str]) -> None: ...


@dataclass
class _Lease:
    store: Leased
    key: str
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0

    def content(self, *, is_released: bool = False) -> bytes:
        """Unlike any before, so that a write whose answer was lost can be told from another's."""
        self.beat += 1
        return json.dumps({"owner": self.owner, "beat": self.beat, "released": is_released}, sort_keys=True).encode()

    def acquire(self, waiting: Callable[[], None]) -> None:
        """Write the lease when there is none, or when there is one without a sign of life. StoreError as ``swap`` has it."""
        if self.store.swap(self.key, self.content(), None):
            return
        seen: str | None = None
        since = time.monotonic()
        while True:
            found = self.store.tagged(self.key)
            tag = None if found is None else found[1]
            if tag != seen:
                seen, since = tag, time.monotonic()
            is_free = found is None or _is_released(found[0]) or time.monotonic() - since >= LEASE_TTL_S
            if is_free and self.store.swap(self.key, self.content(), tag):
                return
            waiting()
            time.sleep(LEASE_POLL_S)

    def renew(self, *, is_released: bool = False) -> bool:
        """Whether it was still ours."""
        found = self.store.tagged(self.key)
        if found is None or _owner(found[0]) != self.owner:
            return False
        return self.store.swap(self.key, self.content(is_released=is_released), found[1])

    def keep(self, ended: threading.Event) -> None:
        """Renew until the end, or until it is lost."""
        is_ours = True
        while is_ours and not ended.wait(LEASE_BEAT_S):
            with suppress(StoreError):  # the next beat may get through
                is_ours = self.renew()

    def release(self) -> None:
        """Free it, when it is still ours; it lapses by itself where that cannot be written."""
        with suppress(StoreError):
            # once this is written nobody finds the lease silent, and nobody but us deletes it
            if self.renew(is_released=True):
                self.store.delete([self.key])


@contextmanager
def held(store: Leased, key: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lease of this key, renewed by a thread; ``waiting`` is called while another holds it and may raise.

    StoreError when it cannot be acquired. Its loss is no error.
    """
    lease = _Lease(store, key)
    lease.acquire(waiting)
    ended = threading.Event()
    keeper = threading.Thread(target=lease.keep, args=(ended,), name=f"lease {key}", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join(LEASE_TTL_S)
        lease.release()


def _told(data: bytes) -> dict[str, object]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _owner(data: bytes) -> object:
    return _told(data).get("owner")


def _is_released(data: bytes) -> bool:
    return _told(data).get("released") is True
