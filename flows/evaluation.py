"""What a consumer checks of a version before using it: every byte, and what each expert still can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.quality import Quality, measure
from serving.lookup import export
from storage.artifact import Artifact
from storage.errors import ArtifactError, QueryDataError


@dataclass(frozen=True)
class Evaluated:
    """One expert of a version, measured on its own text."""

    expert: str
    base: Quality | None
    """None where the source is not a folder of this machine."""
    own: Quality | None
    """Of the expert before it was merged."""
    rebuilt: Quality

    @property
    def kept(self) -> float | None:
        """Share of the fine-tuning gain in loss that is left; None where it is not known, or there was none."""
        if self.base is None or self.own is None or self.base.loss == self.own.loss:
            return None
        return (self.base.loss - self.rebuilt.loss) / (self.base.loss - self.own.loss)


def check_bytes(artifact: Artifact) -> int:
    """How many files there are, all as the manifest says; ArtifactError for those that are not."""
    problems = artifact.verify()
    if problems:
        raise ArtifactError.listing(
            f"{artifact.place} fails verification. Run its recipe again: what is damaged is made anew", problems
        )
    return len(artifact.manifest.files)


def texts_of(artifact: Artifact, folder: Path) -> dict[str, str]:
    """Expert -> held-out text, from ``<folder>/<expert>.txt``. QueryDataError lists those that cannot be read."""
    found, problems = {}, []
    for expert in artifact.manifest.experts:
        try:
            found[expert] = (folder / f"{expert}.txt").read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"expert {expert}: {folder / f'{expert}.txt'}: {error}")
    if problems:
        raise QueryDataError.listing(f"{folder}: expected a text in UTF-8 for every expert", problems)
    return found


def measure_experts(artifact: Artifact, folder: Path, tell: Callable[[str], None]) -> list[Evaluated]:
    """Loss and accuracy of base, expert and rebuilt expert on each expert's text; ``tell`` hears of each that is done."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    texts = texts_of(artifact, folder)
    results = []
    with TemporaryDirectory() as exports:
        for expert, text in texts.items():
            target = Path(exports) / expert
            export(artifact, expert, target)
            base = _measured(str(artifact.manifest.base["source"]), text)
            own = _measured(artifact.manifest.experts[expert].source, text)
            results.append(Evaluated(expert, base, own, measure(target, text)))
            tell(expert)
    return results


def _measured(source: str, text: str) -> Quality | None:
    """Of a whole checkpoint on this machine; an adapter alone is no model."""
    return measure(Path(source), text) if (Path(source) / "config.json").is_file() else None
