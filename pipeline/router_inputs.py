"""What a router is made from, identified: its queries, and the encoder that it is trained from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline.sections import QuerySource, RouterSection
from storage.errors import ChangedError, ChannelMergingError, together
from storage.files import Folder
from storage.layout import ROUTER_FORMAT
from storage.queries import NOTHING, Identities, identify, pinned_place, placed
from storage.sources import open_folder

READ_OF_ENCODER = (".json", ".txt", ".model", ".safetensors")
"""Files of these names decide what an encoder is."""
ENCODER = "router.encoder"


@dataclass(frozen=True)
class EncoderFiles:
    """The encoder that a router is trained from."""

    folder: Folder
    files: Mapping[str, str]
    stamps: Mapping[str, Any]

    @property
    def id(self) -> Any:
        """What its content is known by: a commit, or the digests of its files."""
        return self.folder.id or dict(self.files)


@dataclass(frozen=True)
class RouterInputs:
    """A router's section with its sources pinned, and what they are known by. Small, and it pickles."""

    section: RouterSection
    queries: Identities = NOTHING
    encoder: EncoderFiles | None = None

    @property
    def covered(self) -> dict[str, Any]:
        """All that determines the router, as a JSON value: no paths."""
        if self.section.kind == "none":
            return {"kind": "none", "queries": {}}
        settings = self.section.model_dump(mode="json", exclude={"queries", "outside", "encoder"})
        package = version("transformers").partition(".")[0]  # it trains an encoder
        encoder = {} if self.encoder is None else {"encoder": self.encoder.id, "transformers": package}
        return {"format": ROUTER_FORMAT, **settings, **self.queries.covered, **encoder}

    def check(self) -> None:
        """QueryDataError or CheckpointError when a file is no longer what was identified."""
        self.queries.check()
        if self.encoder is not None:
            changed = self.encoder.folder.changed(self.encoder.stamps, self.encoder.files)
            if changed:
                names = f"{self.encoder.folder.place}: {', '.join(changed)}"
                raise ChangedError(f"{ENCODER}: {names} changed while the run read it. Run again.")


def pinned(section: RouterSection) -> RouterSection:
    """The section with data sets' revisions as commits; each data set is asked for once.

    QueryDataError lists those that there are not, SourceError when the Hub cannot be reached.
    """
    commits: dict[str, str] = {}
    errors: list[ChannelMergingError] = []
    for one in placed(section):
        try:
            if one.spec.source not in commits:
                commits[one.spec.source] = pinned_place(one.label, one.spec.source)
        except ChannelMergingError as error:
            errors.append(error)
    if errors:
        raise together(errors)

    def at_commits(sources: tuple[QuerySource, ...]) -> tuple[QuerySource, ...]:
        return tuple(spec.model_copy(update={"source": commits[spec.source]}) for spec in sources)

    queries = {name: at_commits(sources) for name, sources in section.queries.items()}
    return section.model_copy(update={"queries": queries, "outside": at_commits(section.outside)})


def identify_router(section: RouterSection) -> RouterInputs:
    """The inputs of a loaded recipe's router.

    QueryDataError or CheckpointError for sources that there are not, SourceError for those that cannot be reached.
    """
    if section.kind == "none":
        return RouterInputs(section)
    section = pinned(section)
    encoder = None
    if section.kind == "bert":
        folder = open_folder(ENCODER, section.encoder)
        names = sorted(name for name in folder.names if name.endswith(READ_OF_ENCODER))
        known = folder.id is not None  # by its commit, in the Hub's cache too
        encoder = EncoderFiles(folder, {} if known else folder.identities(names), {} if known else folder.stamps(names))
        section = section.model_copy(update={"encoder": folder.place})
    return RouterInputs(section, identify(section), encoder)
