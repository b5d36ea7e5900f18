"""What is written beside an artifact for people, from its manifest alone: the model card and the report."""

from __future__ import annotations

import hashlib
from importlib.resources import files

import jinja2

from serving.report import report_html
from storage.layout import CARD, REPORT
from storage.manifest import FileRecord, Manifest
from storage.stores import Store


def card(manifest: Manifest) -> str:
    """The model card, Markdown."""
    policies: dict[str, int] = {}
    for tensor in manifest.tensors.values():
        policies[tensor.policy] = policies.get(tensor.policy, 0) + 1
    template = files("serving").joinpath("card.md.j2").read_text("utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 - Markdown, not HTML
    return environment.from_string(template).render(m=manifest, policies=policies)


def with_documents(staged: Store, manifest: Manifest) -> Manifest:
    """Write card and report beside what is staged. Returns the manifest that names them."""
    records = dict(manifest.files)
    for name, text in ((CARD, card(manifest)), (REPORT, report_html(manifest))):
        content = text.encode()
        staged.put(name, content)
        records[name] = FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return manifest.model_copy(update={"files": records})
