"""The manifest: what an artifact holds, where it came from, and how to find any changed byte.

Its file is written in one canonical form and carries a digest of itself, so that a changed byte in it is found too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.atomic import canonical_json
from storage.digests import digest_of
from storage.errors import ArtifactError
from storage.layout import ARTIFACT_FORMAT, MANIFEST

VERSION_LENGTH = 16
READ_FORMATS = (3, ARTIFACT_FORMAT)
"""Format 3 is the same without ``parent``."""
_LONGEST_NAME = 255


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """One file of the artifact."""

    bytes: int
    sha256: str


class Span(_Record):
    """Consecutive pool rows used by the same experts, in order of their channel."""

    experts: tuple[str, ...]
    start: int
    rows: int
    sha256: str
    """Of the span's raw bytes."""


class TensorRecord(_Record):
    """One tensor of the pool."""

    policy: str
    shape: tuple[int, ...]
    """Shape in the base, or in the first expert that has it. An expert's own may have more rows."""
    dtype: str
    channel_axis: int
    groups: int | Literal["auto"]
    """K asked for; 0 where nothing is merged."""
    rows: int
    """Rows in the pool."""
    spans: tuple[Span, ...]


class Health(_Record):
    """How far an expert is from its base, before anything is merged."""

    delta_ratio: float | None
    """||expert - base|| / ||base|| over the merged tensors; about the square root of 2 for two models that are no kin."""
    unchanged: float
    """Share of their entries that are the base's."""
    layers: dict[str, float | None]
    """The same ratio, layer by layer."""


class ExpertRecord(_Record):
    """One expert: its source, and what became of it."""

    source: str
    id: str
    weight: float
    files: dict[str, str]
    """sha256 of each file that was used."""
    renamed: dict[str, str]
    """Tensor -> its name in the expert's own checkpoint and in its export, where that is another."""
    health: Health
    tied: dict[str, str]
    """Tensors that are copies of another by the expert's own config: they are stored, and exported, once."""
    parameters: int
    """Entries of the original checkpoint."""
    reconstruction_error: float | None
    """||rebuilt - expert|| / ||expert - base|| over the merged tensors; None when that norm is 0."""
    trimmed_to: float | None
    """Share of the delta's entries that TIES' thresholds kept, equal values included; None where there are none."""


class ParameterCounts(_Record):
    """What is stored, against what would be without merging."""

    pool: int
    """Entries of the row pool."""
    residue: int
    """Entries that experts keep beside it."""
    experts: int
    """Entries of all experts' checkpoints together."""
    ratio: float
    """(pool + residue) / experts"""


class Manifest(_Record):
    """``manifest.json``."""

    format: int
    name: str
    version: str
    inputs: str
    created: str
    recipe: dict[str, Any]
    base: dict[str, Any]
    experts: dict[str, ExpertRecord]
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    parameters: ParameterCounts
    router: dict[str, Any] | None
    seed: int
    kernel: str
    packages: dict[str, str]
    seconds: dict[str, float]
    """Wall time per stage."""
    moved: dict[str, int]
    """Bytes read and written per stage."""
    notes: tuple[str, ...]
    """What a user should know: casts, private rows, how K was chosen."""
    parent: str | None = None
    """The version that this one, of a single expert, was pulled from."""

    def to_bytes(self) -> bytes:
        """The file's content: canonical JSON with a digest over all other fields."""
        fields = self.model_dump(mode="json", exclude={"parent"} if self.format < ARTIFACT_FORMAT else None)
        return canonical_json({**fields, "digest": digest_of(fields)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a manifest. ArtifactError when it is damaged, of another format, or names files outside of its folder."""
        try:
            fields = json.loads(data)
            digest = fields.pop("digest", None)
            found = fields.get("format")
        except (ValueError, AttributeError) as error:
            raise ArtifactError(f"{where} is damaged: {error}. Pull or build the artifact again.") from None
        if found not in READ_FORMATS:
            known = " or ".join(map(str, READ_FORMATS))
            raise ArtifactError(f"{where}: expected artifact format {known}, got {found}. Use a matching release.")
        try:
            manifest = cls.model_validate(fields)
        except ValidationError as error:
            raise ArtifactError(f"{where} is damaged: {error}. Pull or build the artifact again.") from None
        if digest != digest_of(fields) or canonical_json({**fields, "digest": digest}) != data:
            raise ArtifactError(f"{where} was changed after it was written. Pull or build the artifact again.")
        if problems := list(_name_problems(manifest)):
            raise ArtifactError.listing(f"{where} names what no artifact holds. Use an artifact you trust", problems)
        return manifest


def _name_problems(manifest: Manifest) -> Iterator[str]:
    """Names become files below the artifact's folder, here and where it is pulled to: none may lead out of it."""
    for name in manifest.files:
        if not _is_inside(name) or name == MANIFEST:
            yield f"file {name!a}: expected a relative path inside the artifact"
        elif any(str(parent) in manifest.files for parent in [*PurePosixPath(name).parents][:-1]):
            yield f"file {name!a}: it lies below another file"
    yield from (f"expert {name!a}: expected a folder's name" for name in manifest.experts if not _is_inside(name, depth=1))
    if not _is_inside(manifest.version, depth=1):
        yield f"version {manifest.version!a}: expected a folder's name"


def _is_inside(name: str, depth: int = 0) -> bool:
    """Whether a name is a plain relative path, of so many parts if any are said."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and len(part.encode()) <= _LONGEST_NAME for part in parts)
    return plain and depth in (0, len(parts)) and not set("\\\0") & set(name)


def version_of(files: dict[str, FileRecord]) -> str:
    """The version: a digest over names and contents of pool, rows, experts and router."""
    counted = {name: record.sha256 for name, record in files.items() if name.startswith(("pool", "experts/", "router/"))}
    return digest_of(counted)[:VERSION_LENGTH]
