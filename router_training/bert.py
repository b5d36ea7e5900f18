"""The BERT router: an encoder with a classification head, fine-tuned on the experts' queries (arXiv 2412.15283, section 3.4).

The paper's recipe is the default: AdamW with betas 0.9 and 0.95, learning rate 1e-4, 128 queries per update, one epoch, linear
warm-up. What it leaves open is set here: 10 % of the updates warm up, the rate then falls linearly to 0, weight decay 0.01 but
not on biases and norms, gradients clipped to norm 1, texts cut to 512 tokens, no class weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from router_training.encoders import check_encoder
from router_training.fitting import ENCODER, RECORD, TASK, TRAINED, fit
from router_training.keeping import Kept
from router_training.parts import PreparedQueries
from router_training.processes import run_together
from serving.encoder import EncoderScorer, load_encoder
from storage.atomic import canonical_json, write_atomically
from storage.digests import digest_of
from storage.errors import QueryDataError, RecipeError
from storage.local_store import LocalStore

Tell = Callable[[str], None]
NAMED = 16
"""Digits of its digest that a training's checkpoints are named by."""


class BertSettings(Protocol):
    """The settings of a recipe's router section that a BERT router is trained by."""

    @property
    def encoder(self) -> str:
        """As a loaded recipe names it: an absolute path, a Hub id[@revision] or a URL."""
        ...

    @property
    def epochs(self) -> int: ...

    @property
    def batch(self) -> int:
        """Queries per update, over all devices and passes."""
        ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def warmup(self) -> float:
        """Share of the updates in which the rate rises."""
        ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def max_length(self) -> int:
        """Tokens; an encoder that reads fewer has its own limit."""
        ...

    @property
    def accumulate(self) -> int:
        """Passes that the queries of an update are divided into on each device."""
        ...

    @property
    def early_stop(self) -> int | None:
        """Evaluations in a row without a smaller validation loss after which training stops; ten of them are in an epoch."""
        ...


def train(
    prepared: PreparedQueries,
    settings: BertSettings,
    seed: int,
    work: Path,
    tell: Tell,
    *,
    devices: int | None = None,
    kept: Kept | None = None,
) -> EncoderScorer:
    """A scorer of the experts, as it will be served: with the precision that is stored.

    ``work`` is a folder of this training's own. What was killed goes on there from its last whole checkpoint, when it is called
    with the same queries, settings and seed; anything else starts over. With ``kept`` it also goes on in another folder, on
    another machine. ``devices``: a process for each of so many, by default of the GPUs that this process sees, or for the most
    below that which the queries of an update can be divided among. ``tell`` receives a line of progress now and then.

    CheckpointError when the encoder cannot be used, RecipeError when the settings do not fit the devices, QueryDataError when
    there are no training queries, ClusterError when a process of several died.
    """
    count = _processes(settings, devices)
    if settings.batch % (settings.accumulate * count):
        raise RecipeError(
            f"router.batch: {settings.batch} queries cannot be divided evenly into {settings.accumulate} passes "
            f"(router.accumulate) on {count} device(s). Make it a multiple of {settings.accumulate * count}."
        )
    parts = {which: [str(path.resolve()) for path in prepared.parts(which)] for which in ("train", "validation")}
    for which, paths in parts.items():
        if not paths:
            raise QueryDataError(f"the BERT router has no {which} queries. Give at least 50 different ones per expert.")
    encoder = check_encoder("router.encoder", settings.encoder)
    names = ("epochs", "batch", "learning_rate", "warmup", "weight_decay", "max_length", "accumulate", "early_stop")
    identity = {
        "experts": list(prepared.experts), "settings": {name: getattr(settings, name) for name in names}, "seed": seed,
        "source": encoder.source, "files": encoder.identities(), "card": dict(prepared.card),
        "sizes": {which: [Path(path).stat().st_size for path in paths] for which, paths in parts.items()},
    }  # fmt: skip
    place = None if kept is None else kept.store.under(digest_of(identity)[:NAMED]).place
    _take_up(work, identity, {"parts": parts, "kept": place, "keep_every": None if kept is None else kept.every})
    if not (work / TRAINED / RECORD).exists():
        tell(f"fetches the encoder {encoder.place}")
        encoder.link_into(work / ENCODER)
        if count > 1:
            run_together("router_training.fitting", count, work, tell)
        else:
            fit(work, tell)
    return load_encoder(LocalStore(work / TRAINED), json.loads((work / TRAINED / RECORD).read_bytes()))


def _processes(settings: BertSettings, devices: int | None) -> int:
    """The most up to this many devices that the queries of an update can be divided among."""
    if devices is None:
        import torch

        devices = torch.cuda.device_count()
    fitting = (count for count in range(devices, 1, -1) if not settings.batch % (settings.accumulate * count))
    return next(fitting, 1)


def _take_up(work: Path, identity: Mapping[str, Any], places: Mapping[str, Any]) -> None:
    """Make a folder ready: as it was left when it is of the same training, else empty. ``places`` may be others now."""
    wanted = json.loads(canonical_json(dict(identity)))
    try:
        found = json.loads((work / TASK).read_bytes()).get("identity")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != wanted:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    write_atomically(work / TASK, canonical_json({"identity": wanted, **places}))
