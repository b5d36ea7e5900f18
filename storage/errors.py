"""Every error a user can meet. Each message says which expert and tensor, expected, got, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self


class ChannelMergingError(Exception):
    """Root of all errors raised on purpose. One formatted message is the only argument, so that it pickles."""

    problems: tuple[str, ...] = ()
    headline = ""
    """What ``problems`` are listed under."""
    exit_code = 3

    @classmethod
    def listing(cls, headline: str, problems: Iterable[str]) -> Self:
        """One error for several problems; they are also kept apart in ``problems``."""
        found = tuple(problems)
        if len(found) == 1:
            error = cls(f"{headline}: {found[0]}")
        else:
            error = cls(f"{headline}: {len(found)} problems\n" + "\n".join(f"  - {problem}" for problem in found))
        error.problems, error.headline = found, headline
        return error


class RecipeError(ChannelMergingError, ValueError):
    """The recipe is wrong."""

    exit_code = 2


class CheckpointError(ChannelMergingError, ValueError):
    """A checkpoint of the base or of an expert cannot be read, or holds values that cannot be merged."""

    exit_code = 2


class ChangedError(CheckpointError):
    """A checkpoint became another one while it was read: nothing is wrong with it, and the next run reads that."""

    exit_code = 3


class SourceError(ChannelMergingError):
    """The place a checkpoint lies at cannot be reached, after retries."""


class PlanError(ChannelMergingError, ValueError):
    """Base and experts do not fit together, or the work does not fit the memory budget."""

    exit_code = 2


class QueryDataError(ChannelMergingError, ValueError):
    """The router's queries cannot be read or cannot train a router."""

    exit_code = 2


class QueriesChangedError(QueryDataError):
    """A file of queries became another one while it was read; the next run reads that."""

    exit_code = 3


class OutputExistsError(ChannelMergingError, FileExistsError):
    """A place to write to holds something that is not ours."""

    exit_code = 2


class ArtifactError(ChannelMergingError, ValueError):
    """What was given as an artifact is not one, or lacks what was asked of it."""

    exit_code = 2


class IncompleteStoreError(ChannelMergingError):
    """A delta group or a table lost a chunk, or a chunk fails its checksum."""

    damaged: tuple[str, str] | None = None
    """Place of the group and key of the chunk, where that is what is wrong."""


class StoreError(ChannelMergingError):
    """A store cannot be written or reached, after retries: no room, no permission, no answer."""


class StoreBusyError(ChannelMergingError):
    """Another run is working in the same place."""


class ClusterError(ChannelMergingError):
    """The cluster lost what it was computing."""


def together(errors: Sequence[ChannelMergingError]) -> ChannelMergingError:
    """One error for all of them, each problem once; under their own headline where they share it."""
    errors = list({(type(error), str(error)): error for error in errors}.values())
    if len(errors) == 1:
        return errors[0]
    problems = dict.fromkeys(problem for error in errors for problem in error.problems or (str(error),))
    if len(shared := {(type(error), error.headline) for error in errors}) == 1 and errors[0].headline:
        ((kind, headline),) = shared
        return kind.listing(headline, problems)
    wrong = any(error.exit_code == PlanError.exit_code for error in errors)
    kind = PlanError if wrong else type(errors[0])  # where no server answers, nothing is wrong with the recipe
    return kind.listing("the recipe cannot be run", problems)
