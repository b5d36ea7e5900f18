"""The sections of a recipe: their keys, what each may hold, and its default."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from storage.places import QUERIES, SOURCES

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SIZE = re.compile(r"([0-9.]+)\s*([KMGT]?i?B)?", re.IGNORECASE)
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)
}


def parse_bytes(value: Any) -> int:
    """Bytes from ``2GiB``, ``500 MB`` or a plain number."""
    match = SIZE.fullmatch(str(value).strip())
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * UNITS[(match[2] or "B").lower()])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"expected a size such as 2GiB, got {value!r}") from None


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("a name is letters, digits, '.', '_' and '-', and starts with a letter or digit")
    return value


Name = Annotated[str, AfterValidator(_name)]
AUTO: Literal["auto"] = "auto"
ROUNDING = 1e-9
"""By which a share may miss what it stands for: 1/49 of 49 is less than 1."""


def _scaling(value: Any) -> str | float:
    if value == "mean":
        return "mean"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < sys.float_info.max:
        return float(value)
    raise ValueError("expected 'mean' or a number above 0")


def _groups(value: Any) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("expected 'auto' or a whole number from 1 on")


def _source(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a source ({SOURCES})")
    return value


Source = Annotated[str, BeforeValidator(_source)]


def spelled_out(value: Any) -> Any:
    """An expert's section, of which a source alone is the short form."""
    return {"source": value} if isinstance(value, str) else value


def _expert(value: Any) -> Any:
    if not isinstance(value, str | dict | ExpertSpec):
        raise ValueError(f"expected a source ({SOURCES})")
    return spelled_out(value)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ExpertSpec(_Section):
    """One expert: its source, or a mapping with its weight in the merge."""

    source: Source
    """Hub id, local folder or object store's URL, of a checkpoint or of a LoRA adapter."""
    revision: str | None = None
    """Of a Hub id: branch, tag or commit; as ``source: id@revision``."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


Groups = Annotated[int | Literal["auto"], PlainValidator(_groups)]


class Rule(_Section):
    """Overrides for tensors whose name matches a glob; the first match wins, and only the keys it names are set."""

    match: str
    policy: Literal["merge", "private", "base"] | None = None
    groups: Groups | None = None


class MergeSection(_Section):
    """What is done to the deltas (paper, section 3.2)."""

    groups: Groups = 2
    """K, the number of groups per channel; ``auto`` chooses it for every channel."""
    budget: float | None = Field(default=None, gt=0, le=1)
    """With ``groups: auto``: entries of the pool, as a share of all experts' entries in merged tensors."""
    granularity: Literal["channel", "layer", "model"] = "channel"
    """What is grouped as one: an output channel, a weight matrix, or all matrices of the model."""
    clustering: Literal["kmeans", "spherical", "sign", "random"] = "kmeans"
    metric: Literal["cosine", "euclidean", "manhattan"] = "cosine"
    sign: Literal["vector", "mass"] = "vector"
    """How ``clustering: sign`` reads a delta: ``vector`` clusters the rows' signs, ``mass`` splits by the sign of their sum."""
    method: Literal["average", "task_arithmetic", "ties", "dare", "dare_ties", "slerp", "byom"] = "dare"
    scaling: Annotated[Literal["mean"] | float, PlainValidator(_scaling)] = "mean"
    """``mean``: sum(w d) / sum(w) over the group; a number: lambda of Eq. 3, lambda * sum(w d)."""
    combine: Literal["sum", "mean"] | None = None
    """With a number as scaling, what it multiplies: the weighted sum (the default) or the weighted mean."""
    density: float = Field(default=0.7, gt=0, le=1)
    """Share of delta entries that TIES and DARE keep."""
    trim_scope: Literal["row", "tensor", "model"] = "tensor"
    """Over what TIES ranks an expert's entries by size."""
    rescale: Literal["density", "l1"] = "density"
    """What DARE multiplies kept entries by: 1 / density, or what restores the tensor's L1 norm."""
    t: float = Field(default=0.5, ge=0, le=1)
    """SLERP: how far from the first expert of a pair, by name, to the second."""
    keep: float = Field(default=0.3, gt=0, le=1)
    """BYOM: share of each row's entries that every expert keeps for itself."""
    residual: Literal["merged", "delta"] = "merged"
    """BYOM: whether the entries kept are those furthest from the merged model, or the largest of the expert's delta."""
    singleton: Literal["keep", "scale"] = "keep"
    """``keep``: an expert alone in its group keeps its exact row; ``scale``: it is pruned and scaled like any group."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    rules: tuple[Rule, ...] = Field(default=(), strict=False)


def _query_source(value: Any) -> Any:
    if not isinstance(value, str | dict | QuerySource):
        raise ValueError(f"expected a source ({QUERIES}) or a mapping with one")
    return spelled_out(value)


def _query_sources(value: Any) -> Any:
    """The sources of an expert, of which one alone is the short form."""
    return value if isinstance(value, list | tuple) else (value,)


def _threshold(value: Any) -> Any:
    values = value.values() if isinstance(value, dict) else [value]
    if value == AUTO:
        return value
    if all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1 for v in values):
        return {name: float(v) for name, v in value.items()} if isinstance(value, dict) else float(value)
    raise ValueError("expected 'auto', a number from 0 to below 1, or one for each expert")


def _number(value: Any) -> Any:
    """A number that YAML takes for text, as 1e-4 is without a point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number)]
Threshold = float | Literal["auto"] | dict[str, float]


class QuerySource(_Section):
    """Queries of one kind: their source, or a mapping with what of it is read."""

    source: Annotated[str, BeforeValidator(_source)]
    """Data set on the Hub (org/name[@revision]), or a file: JSON Lines, Parquet (.parquet) or text (.txt), a query a line."""
    config: str | None = None
    """Of a data set: which of its subsets."""
    split: str = "train"
    """Of a data set."""
    column: str | None = None
    """That holds the query; ``text`` by default."""
    messages: str | None = None
    """Instead of ``column``: that holds a chat, of which the user's first message is the query."""
    group: str | None = None
    """That names the question of which the query is a phrasing; those of one question are trained on, or held out, together."""
    language: str | None = None
    """Of all its queries; by default their script is looked at."""
    limit: int | None = Field(default=None, ge=1)
    """Rows that are read, from the beginning."""

    @model_serializer(mode="wrap")
    def _as_written(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is the default: a file may not name a split, and need not say what it lacks."""
        defaults = type(self).model_fields
        return {key: value for key, value in fields(self).items() if key == "source" or value != defaults[key].default}


QuerySources = Annotated[
    tuple[Annotated[QuerySource, BeforeValidator(_query_source)], ...], BeforeValidator(_query_sources), Field(strict=False)
]
OF_BERT = (
    "encoder", "epochs", "batch", "learning_rate", "warmup", "weight_decay", "max_length", "accumulate", "early_stop",
)  # fmt: skip
"""Keys of a router that only ``kind: bert`` has."""


class RouterSection(_Section):
    """How the expert is picked per query: a classifier of queries by the expert on whose kind of data they are (Eq. 6)."""

    kind: Literal["linear", "bert", "none"] = "none"
    """``linear``: hashed n-grams and a logistic model, trained on CPUs; ``bert``: the paper's fine-tuned encoder."""
    queries: dict[str, QuerySources] = {}
    """Expert -> where its queries come from."""
    outside: QuerySources = ()
    """Queries of no expert's kind; they are never trained on, they show how well such queries are noticed."""
    total: int | None = Field(default=50_000, ge=1)
    """Queries that are used, the same number of every expert as far as there are; null: all."""
    bad_share: float = Field(default=0.01, ge=0, le=1)
    """Rows of one source that may be unreadable, as a share; they are counted and left out."""
    threshold: Annotated[Threshold, PlainValidator(_threshold)] = 0.0
    """Probability below which the fallback is chosen; ``auto``: what keeps 95 % of the right answers of each expert."""
    fallback: str | None = None
    """An expert, or ``base``, the base model, for queries that the router is not sure of; null: always the likeliest expert."""
    encoder: Annotated[str, BeforeValidator(_source)] = "google-bert/bert-base-multilingual-cased"
    """Hub id[@revision] or local folder."""
    epochs: int = Field(default=1, ge=1)
    batch: int = Field(default=128, ge=1)
    """Queries per update."""
    learning_rate: Number = Field(default=1e-4, gt=0, allow_inf_nan=False)
    warmup: Number = Field(default=0.1, ge=0, le=1)
    """Share of the updates over which the learning rate rises."""
    weight_decay: Number = Field(default=0.01, ge=0, allow_inf_nan=False)
    max_length: int = Field(default=512, ge=2)
    """Tokens; what is longer is cut."""
    accumulate: int = Field(default=1, ge=1)
    """Passes that a batch is divided into, where the device has no room for it whole."""
    early_stop: int | None = Field(default=None, ge=1)
    """Looks at the validation loss without an improvement after which training ends; null: never before its end."""

    @model_serializer(mode="wrap")
    def _what_counts(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the keys of the other kind, which a recipe may not name either."""
        return {key: value for key, value in fields(self).items() if self.kind == "bert" or key not in OF_BERT}


class ClusterSection(_Section):
    """Where blocks are computed. ``memory`` is the budget of one task."""

    kind: Literal["local", "none", "cuda"] | None = None
    """Processes of this machine, threads of this process, or one process per GPU of this machine."""
    address: str | None = None
    """A running scheduler, tcp://host:port; its workers see the same folders."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes of a local cluster, threads of kind none; by default one per CPU core, at most eight, or one per GPU."""
    memory: Annotated[int, BeforeValidator(parse_bytes)] = Field(default=2 * 1024**3, ge=1)
    kernel: Literal["fused", "torch-cpu", "cuda"] = "fused"
    """What computes: compiled CPU code, torch on the CPU, or torch on each worker's GPU. With kind cuda that is the default."""

    @model_validator(mode="before")
    @classmethod
    def _kernel_of_kind(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("kind") == "cuda":
            return {"kernel": "cuda", **fields}
        return fields

    @property
    def where(self) -> str:
        """'local', 'none', 'cuda' or a scheduler's address."""
        return self.address or self.kind or "local"


class Recipe(_Section):
    """A whole recipe."""

    name: Name
    base: Source
    """Hub id[@revision], local folder or object store's URL."""
    experts: dict[Name, Annotated[ExpertSpec, BeforeValidator(_expert)]] = Field(min_length=1, max_length=64)
    merge: MergeSection = MergeSection()
    router: RouterSection = RouterSection()
    allow_unrelated: bool = False
    """Whether to go on with an expert that, by its weights, is no fine-tune of the base."""
    deltas: str = "./deltas"
    output: str
    cluster: ClusterSection = ClusterSection()

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Sorted: everything is computed in this order."""
        return tuple(sorted(self.experts))
