"""The command line ``channel-merge``. It imports no Prefect, and heavy packages only where a command needs them.

Exit codes: 0 done; 1 the answer is no (verify found a mismatch); 2 the input is wrong; 3 the run failed; 130 interrupted;
143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.output import counted, listed, say, say_json, say_lines, say_table, told
from storage.errors import ChannelMergingError, together

app = typer.Typer(
    help="Keep N fine-tuned experts at the memory of K (Channel Merging, arXiv 2412.15283).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED, TERMINATED = 130, 143
REPEATED_S = 10.0
"""A second SIGTERM within so many seconds is the same one: some are sent to a process and to its whole group."""

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, a YAML file.")]
ArtifactPlace = Annotated[
    str,
    typer.Argument(metavar="ARTIFACT", help="A version's folder, an output (its latest), or OUTPUT@VERSION: paths or URLs."),
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: merge.groups=3.")]
Output = Annotated[str | None, typer.Option(help="Where to publish instead of the recipe's output.")]
Deltas = Annotated[str | None, typer.Option(help="The delta store instead of the recipe's.")]
Cluster = Annotated[str | None, typer.Option(help="local, none (in this process), cuda or tcp://scheduler:8786.")]
Unrelated = Annotated[bool, typer.Option("--allow-unrelated", help="Merge experts of another base too.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@contextmanager
def _failure_as_json(wanted: bool, document: Callable[[ChannelMergingError], Any]) -> Iterator[None]:
    """Print a failure as the command's JSON document too, before it goes its way."""
    try:
        yield
    except ChannelMergingError as error:
        if wanted:
            say_json(document(error))
        raise


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which supervisors end a process, as an exception: what runs is closed as after Ctrl-C."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise Terminated in the main thread on SIGTERM."""
    last = -REPEATED_S

    def end(number: int, frame: Any) -> None:
        nonlocal last
        now, before = time.monotonic(), last
        if now - before >= REPEATED_S:
            last = now
            raise Terminated

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _recipe(
    path: Path, assignments: list[str] | None, output: str | None, deltas: str | None, cluster: str | None, unrelated: bool
) -> Any:
    from flows.run import read_recipe
    from pipeline.recipe import parse_assignment

    settings = dict(parse_assignment(text) for text in assignments or ())
    return read_recipe(path, settings | ({"allow_unrelated": True} if unrelated else {}), output, deltas, cluster)


@app.command()
def plan(
    recipe: RecipePath,
    set_: Settings = None,
    output: Output = None,
    deltas: Deltas = None,
    cluster: Cluster = None,
    allow_unrelated: Unrelated = False,
    every: Annotated[bool, typer.Option("--tensors", help="A line per tensor instead of one for all layers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what every tensor becomes and what a run would cost, from configs and safetensors headers alone."""
    from flows import planning

    resolved = None
    with _failure_as_json(as_json, lambda error: planning.refusal(resolved, error)):
        resolved = _recipe(recipe, set_, output, deltas, cluster, allow_unrelated)
        found = planning.judge(resolved)
    if as_json:
        say_json(planning.document(found))
    else:
        say_lines("sources", planning.source_lines(found))
        say_table("tensors", *planning.tensor_table(found, every=every), planning.SPARE)
        for line in (*planning.totals(found), *(f"note: {note}" for note in found.notes)):
            say(line)
    if found.errors:
        raise together(found.errors)


@app.command()
def run(
    recipe: RecipePath,
    set_: Settings = None,
    output: Output = None,
    deltas: Deltas = None,
    cluster: Cluster = None,
    allow_unrelated: Unrelated = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: ingest, cluster, merge, pack, train the router, publish."""
    from flows.progress import open_reporter
    from flows.run import run_recipe

    with _failure_as_json(as_json, lambda error: {"error": str(error), "problems": list(listed(error))}), _terminable():
        resolved = _recipe(recipe, set_, output, deltas, cluster, allow_unrelated)
        try:
            with open_reporter() as reporter:
                result = run_recipe(resolved, reporter)
        except KeyboardInterrupt as end:
            what, code = ("terminated", TERMINATED) if isinstance(end, Terminated) else ("interrupted", INTERRUPTED)
            kept = f"finished work is kept in {resolved.deltas} and {resolved.output}, and the next run goes on from there"
            typer.echo(f"{what}: {kept}", err=True)
            raise typer.Exit(code) from None
    manifest = result.manifest
    if as_json:
        say_json(
            {
                "version": result.version, "path": result.place, "new": result.new,
                "parameters": manifest.parameters.model_dump(), "seconds": manifest.seconds,
            }
        )  # fmt: skip
        return
    if not result.new:
        say(f"nothing changed: version {result.version} is already at {result.place}")
        return
    say(f"published version {result.version} at {result.place}")
    say(_size_line(manifest))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size_line(manifest: Any) -> str:
    numbers = manifest.parameters
    count = counted(len(manifest.experts), "expert")
    stored = numbers.pool + numbers.residue
    return f"{stored:,} parameters stored for {count} of {numbers.experts:,} together ({100 * numbers.ratio:.1f} %)"


@app.command()
def inspect(artifact: ArtifactPlace, as_json: AsJson = False) -> None:
    """Say what an artifact holds."""
    from storage.artifact import Artifact

    found = Artifact(artifact)
    manifest = found.manifest
    if as_json:
        say_json(manifest.model_dump(mode="json"))
        return
    say(f"{manifest.name} version {manifest.version}, created {manifest.created}")
    if manifest.parent:
        say(f"pulled from version {manifest.parent}")
    say(_size_line(manifest))
    merge = {key: value for key, value in manifest.recipe["merge"].items() if value not in (None, [])}
    say("merging: " + ", ".join(f"{key} {value}" for key, value in merge.items()))
    if manifest.router:
        router = manifest.router
        say(f"router: {router['kind']}, {100 * router['accuracy']:.2f} % right on {router['queries']} held-out queries")
    rows = [
        [
            name, f"{e.parameters:,}", _number(e.health.delta_ratio), f"{100 * e.health.unchanged:.1f} %",
            _number(e.reconstruction_error), e.source,
        ]
        for name, e in manifest.experts.items()
    ]  # fmt: skip
    say_table("experts", ["expert", "parameters", "|δ| / |base|", "unchanged", "reconstruction error", "source"], rows)
    kinds: dict[tuple[str, str], list[int]] = {}
    for record in manifest.tensors.values():
        entry = kinds.setdefault((record.policy, str(record.groups or "-")), [0, 0])
        entry[0] += 1
        entry[1] += record.rows
    rows = [[policy, k, str(n), f"{r:,}"] for (policy, k), (n, r) in sorted(kinds.items())]
    say_table("tensors", ["policy", "groups", "tensors", "pool rows"], rows)
    for note in manifest.notes:
        say(f"note: {note}")


@app.command()
def verify(artifact: ArtifactPlace) -> None:
    """Compare every byte of an artifact with its manifest."""
    from storage.artifact import Artifact

    found = Artifact(artifact)
    problems = found.verify()
    if problems:
        for problem in problems:
            typer.echo(f"mismatch: {problem}", err=True)
        raise typer.Exit(1)
    size = sum(record.bytes for record in found.manifest.files.values())
    say(f"ok: {counted(len(found.manifest.files), 'file')}, {counted(size, 'byte')}, version {found.manifest.version}")


@app.command()
def report(
    artifact: ArtifactPlace,
    dest: Annotated[Path, typer.Argument(help="The page to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Write an artifact's report, one HTML page: sizes, errors, which experts share rows where, the router, timings."""
    from serving.report import analysis, report_html
    from storage.artifact import Artifact
    from storage.local_store import LocalStore

    manifest = Artifact(artifact).manifest
    if as_json:
        say_json(analysis(manifest))
        return
    target = dest.absolute()
    LocalStore(target.parent).put(target.name, report_html(manifest).encode())
    say(f"the report of {manifest.name} version {manifest.version} is at {dest}")


@app.command()
def latest(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Where versions are published: a folder or a URL.")],
    set_: Annotated[str | None, typer.Option("--set", metavar="VERSION", help="Let this version be the latest.")] = None,
) -> None:
    """Say which version of an output is the latest, or let an earlier one be it again."""
    from storage import publishing
    from storage.artifact import Artifact
    from storage.artifact import latest as read_latest
    from storage.errors import ArtifactError
    from storage.stores import open_store

    store = open_store(output)
    if set_ is not None:
        found = Artifact(store.under(set_))
        if problems := found.misfits():
            raise ArtifactError.listing(f"{found.place} is not whole. Choose another version", problems)
        publishing.make_latest(store, set_, lambda: typer.echo("waiting for a run that publishes", err=True))
    say(read_latest(store)["version"])


@contextmanager
def _byte_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on a terminal; nothing when standard error is piped."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda here, total: bar.update(task, completed=here, total=total)


@app.command()
def pull(
    artifact: ArtifactPlace,
    dest: Path,
    expert: Annotated[str | None, typer.Option(help="Only this expert, as an artifact of its own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring an artifact, or one expert of it, into a local folder. A pull that was killed goes on where it was."""
    from storage.pull import pull as bring

    failure = _failure_as_json(as_json, lambda error: {"error": str(error), "problems": list(listed(error))})
    with failure, _byte_bar("pull") as progress:
        manifest = bring(artifact, dest, expert, progress)
    size = sum(record.bytes for record in manifest.files.values())
    if as_json:
        found = {"version": manifest.version, "parent": manifest.parent, "experts": [*manifest.experts]}
        say_json({**found, "path": str(dest.resolve()), "files": len(manifest.files), "bytes": size})
        return
    say(f"version {manifest.version} is at {dest}: {counted(len(manifest.files), 'file')}, {counted(size, 'byte')}")


@app.command()
def export(artifact: ArtifactPlace, expert: str, dest: Path) -> None:
    """Write one expert as a plain Hugging Face checkpoint."""
    from serving.lookup import export as write
    from storage.artifact import Artifact

    found = Artifact(artifact)
    files = write(found, expert, dest)
    say(f"exported {expert} to {dest}: {', '.join(path.name for path in files)}")


@app.command()
def route(
    artifact: ArtifactPlace,
    query: Annotated[str | None, typer.Argument(metavar="[QUERY]", help="Or several, by --batch.")] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file with a query per line; - is standard input.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, metavar="K", help="Name the K likeliest experts too.")] = 0,
    loaded: Annotated[str | None, typer.Option(metavar="NAME", help="The expert that is loaded now, or base.")] = None,
    margin: Annotated[float, typer.Option(min=0, max=1, help="Stay with it when another's gain is below this.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Say which expert should answer a query, or each query of a file, in which what was chosen counts as loaded next."""
    from flows.routing import route_queries

    route_queries(artifact, query, batch, top, loaded, margin, as_json=as_json)


@app.command()
def clean(
    recipe: RecipePath,
    set_: Settings = None,
    output: Output = None,
    deltas: Deltas = None,
    days: Annotated[float, typer.Option(min=0, max=36500, help="Keep what runs have used that began since.")] = 7,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what no artifact or recent run needs in a recipe's delta store and output; remove it with --delete."""
    from flows import clean as cleaning
    from pipeline.recipe import parse_assignment

    with _failure_as_json(as_json, lambda error: {"error": str(error), "problems": list(listed(error))}):
        settings = dict(parse_assignment(text) for text in set_ or ())
        tell = partial(typer.echo, err=True)
        found = cleaning.clean_up(recipe, settings, output, deltas, days, delete=delete, tell=tell)
    if as_json:
        say_json(cleaning.document(found))
        return
    if found.leftovers:
        say_table("leftovers", cleaning.HEADINGS, cleaning.table(found))
    for line in cleaning.totals(found):
        say(line)


@app.command()
def demo(dest: Annotated[Path, typer.Argument(help="Where to write.")] = Path("demo-output")) -> None:
    """Run the main job on the family in examples/ and measure what it keeps."""
    from flows.demo import run_demo

    run_demo(dest)


def main() -> None:
    """Entry point: every error is one message; a traceback is shown when ``CHANNEL_MERGING_TRACEBACK`` is set."""
    try:
        app()
    except KeyboardInterrupt as end:  # a second one, while the first is still cleaning up
        sys.exit(TERMINATED if isinstance(end, Terminated) else INTERRUPTED)
    except Exception as error:
        if os.environ.get("CHANNEL_MERGING_TRACEBACK"):
            traceback.print_exc()
        if isinstance(error, ChannelMergingError):
            typer.echo(f"error: {told(error)}", err=True)
            sys.exit(error.exit_code)
        what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        typer.echo(f"error: the run failed: {what} (set CHANNEL_MERGING_TRACEBACK=1 to see where)", err=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
