"""Tells a Prefect server of the automations of this folder, or of the files given; names of blocks and deployments become ids.

It may run again at any time, after the deployments have been made: an automation of the same name is updated. A file whose ids
are filled in by hand is as good for `prefect automation create --from-file`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound


def is_name(found: object) -> bool:
    """Whether it is the name of something, not its id."""
    try:
        UUID(str(found))
    except ValueError:
        return True
    return False


def with_ids(client: SyncPrefectClient, action: dict[str, Any]) -> dict[str, Any]:
    """The action with ids for ``<flow>/<deployment>`` and ``<block type>/<block>``. LookupError for what is not there."""
    found, name = dict(action), ""
    try:
        if "deployment_id" in action and is_name(name := action["deployment_id"]):
            found["deployment_id"] = client.read_deployment_by_name(name).id
        if "block_document_id" in action and is_name(name := action["block_document_id"]):
            kind, _, block = name.partition("/")
            found["block_document_id"] = client.read_block_document_by_name(block, kind).id
    except ObjectNotFound:
        raise LookupError(name) from None
    return found


def create(client: SyncPrefectClient, path: Path) -> str:
    """Create or update the automation of a file; say which."""
    document = yaml.safe_load(path.read_text("utf-8"))
    document["actions"] = [with_ids(client, action) for action in document["actions"]]
    automation = AutomationCore.model_validate(document)
    known = client.read_automations_by_name(automation.name)
    for one in known:
        client.update_automation(one.id, automation)
    if not known:
        client.create_automation(automation)
    return f"{automation.name}: {'updated' if known else 'created'}"


def main(files: list[str]) -> int:
    """0 when all are there now; what is missing is said."""
    paths = [Path(file) for file in files] or sorted(Path(__file__).parent.glob("*.yaml"))
    failed = 0
    with get_client(sync_client=True) as client:
        for path in paths:
            try:
                print(create(client, path))
            except LookupError as error:
                print(f"{path.name}: {error} is not there: make that block or deployment first", file=sys.stderr)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
