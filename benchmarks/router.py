"""The linear router beside BERT routers on real text of eight kinds, two more held out: python -m benchmarks.router.

Every seed draws files and pieces anew (``benchmarks.corpora``), keeps a fifth of the files of each kind for the test, and gives
the rest to the very preparation that a recipe's router gets; routers of one seed are trained on the same parts and tested with
the same pieces. Temperatures come from validation, all figures from the test. ``--pretrained FOLDER`` adds an encoder that lies
there, as transformers saves one, fine-tuned by the paper's recipe in the number of epochs given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.corpora import Piece, distinct, experts, outside
from pipeline.sections import RouterSection
from router_training import bert, linear, measures
from router_training.data import Prepared, prepare
from router_training.parts import each_part
from router_training.simulation import sessions, simulate
from router_training.training import finish
from serving.choice import log_shares
from serving.router import Router, Scorer, load_router

TEST_SHARE = 0.2
"""Of the files of a kind."""
TRACE, STICKINESS = 4000, 0.9
"""Queries of the simulated trace, and the chance that one is of the kind of the one before."""
MARGINS = (0.0, 0.1, 0.3, 0.5, 0.9)
SCRATCH = {"epochs": 6, "batch": 32, "learning_rate": 1e-3, "max_length": 96}
"""Of the BERT without pretraining, which needs more than the paper's single epoch."""
FINE_TUNED = {"epochs": 1, "batch": 32, "learning_rate": 1e-4, "max_length": 96}
"""The paper's recipe, with smaller batches: its 128 would be 40 updates of these few queries."""
WORDS, WIDTH, LAYERS = 8000, 128, 2
"""Vocabulary, hidden size and layers of the BERT without pretraining."""


@dataclass(frozen=True)
class Data:
    """One seed's queries."""

    prepared: Prepared
    test: tuple[tuple[str, int], ...]
    outside: Mapping[str, tuple[str, ...]]


def is_tested(seed: int, file: str) -> bool:
    """Whether a file's pieces are for the test alone."""
    digest = hashlib.sha256(f"{seed} {file}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def _write(path: Path, pieces: Sequence[Piece]) -> None:
    lines = [json.dumps({"text": piece.text, "file": piece.file}, ensure_ascii=False) for piece in pieces]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def data_of(seed: int, most: int, folder: Path) -> Data:
    """At most so many pieces of each kind: prepared for training, and held back for the test."""
    held = outside(seed)
    pieces = distinct({**experts(seed), **held}, most, seed)
    kinds = sorted(pieces.keys() - held.keys())
    queries, test = {}, []
    for label, kind in enumerate(kinds):
        path = folder / f"{kind}.jsonl"
        _write(path, [piece for piece in pieces[kind] if not is_tested(seed, piece.file)])
        queries[kind] = {"source": str(path), "group": "file"}
        test += [(piece.text, label) for piece in pieces[kind] if is_tested(seed, piece.file)]
    section = RouterSection.model_validate({"kind": "linear", "queries": queries, "total": None})
    beyond = {kind: tuple(piece.text for piece in pieces[kind]) for kind in held}
    return Data(prepare(section, seed, folder / "prepared"), tuple(test), beyond)


def make_encoder(texts: Sequence[str], seed: int, folder: Path) -> None:
    """A small BERT with random weights and a WordPiece vocabulary of these texts."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import WordPieceTrainer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = Tokenizer(WordPiece(unk_token=special["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    names = list(special.values())
    tokenizer.train_from_iterator(texts, WordPieceTrainer(vocab_size=WORDS, special_tokens=names, show_progress=False))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=WIDTH // 64,
        intermediate_size=4 * WIDTH, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def tested(router: Router, data: Data, seed: int) -> dict[str, Any]:
    """What the test says of a router."""
    labels = np.array([label for _, label in data.test])
    started = time.perf_counter()
    logits = router.scorer.logits([text for text, _ in data.test])
    seconds = time.perf_counter() - started

    def shares_of(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
        return np.exp(log_shares(scores, router.scorer.link, temperature))

    shares = shares_of(logits, router.temperature)
    counts = measures.confusion(labels, shares.argmax(axis=1), len(router.experts))
    beyond = {
        kind: shares_of(router.scorer.logits(texts), router.temperature).max(axis=1) for kind, texts in data.outside.items()
    }
    trace = sessions(labels, TRACE, STICKINESS, seed)
    return {
        "accuracy": measures.accuracy(counts),
        "macro F1": measures.macro_f1(counts),
        "calibration error before": measures.calibration_error(shares_of(logits, 1.0), labels),
        "calibration error after": measures.calibration_error(shares, labels),
        **{f"AUROC, {kind}": measures.auroc(shares.max(axis=1), found) for kind, found in beyond.items()},
        "batched, queries/s": len(labels) / seconds,
        "right per kind": {name: counts[row, row] / max(1, counts[row].sum()) for row, name in enumerate(router.experts)},
        "confusion": counts.tolist(),
        "trace": simulate(shares[trace], labels[trace], MARGINS),
    }


def one(kind: str, data: Data, seed: int, folder: Path, encoder: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train, calibrate, save, load and test one router."""
    section = RouterSection.model_validate({"kind": kind, **({"encoder": str(encoder), **settings} if encoder else {})})
    started = time.perf_counter()
    scorer: Scorer
    if kind == "linear":
        scorer = linear.train(data.prepared, seed)
    else:
        scorer = bert.train(data.prepared, section, seed, folder / "work", tell=lambda _: None)
    seconds = time.perf_counter() - started
    record = finish(scorer, data.prepared, section, folder / "router")
    del scorer
    return {
        **tested(load_router(folder / "router"), data, seed),
        "p50, µs": record["latency"]["p50_us"],
        "p99, µs": record["latency"]["p99_us"],
        "training, s": seconds,
        "size, MB": record["bytes"] / 1e6,
        "temperature": record["temperature"],
    }


def run(seed: int, most: int, rivals: Mapping[str, Path | None]) -> tuple[Data, dict[str, dict[str, Any]]]:
    """All routers of one seed, linear first; ``rivals``: BERT routers by name, from an encoder, or None from scratch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = data_of(seed, most, folder)
        found = {"linear": one("linear", data, seed, folder / "linear", None, {})}
        for rival, encoder in rivals.items():
            if encoder is None:
                made = folder / "encoder"
                make_encoder([text for rows in each_part(data.prepared.parts("train")) for text in rows.texts], seed, made)
                found[rival] = one("bert", data, seed, folder / rival, made, SCRATCH)
            else:
                found[rival] = one("bert", data, seed, folder / rival, encoder, FINE_TUNED)
        return data, found


def _spread(values: Sequence[float], places: int) -> str:
    mean = f"{statistics.mean(values):,.{places}f}"
    return f"{mean} ± {statistics.stdev(values):,.{places}f}" if len(values) > 1 else mean


FIGURES = {
    "accuracy": (100, 2, "accuracy, %"), "macro F1": (100, 2, "macro F1, %"),
    "calibration error before": (100, 2, "calibration error before, %"),
    "calibration error after": (100, 2, "calibration error after, %"),
    "AUROC, python's reference": (1, 3, "AUROC, python's reference"), "AUROC, cmake": (1, 3, "AUROC, cmake"),
    "p50, µs": (1, 0, "one query at a time, p50, µs"), "p99, µs": (1, 0, "p99, µs"),
    "batched, queries/s": (1, 0, "as a batch, queries/s"), "training, s": (1, 1, "training, s"), "size, MB": (1, 2, "size, MB"),
}  # fmt: skip
"""Factor, decimals and heading."""


def table(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Mean ± standard deviation over the seeds, a column per router, and differences to the linear one seed by seed."""
    names = list(dict.fromkeys(name for found in runs for name in found))
    of = {name: [found[name] for found in runs if name in found] for name in names}
    heads = [f"{name}, {len(of[name])} seed{'s' if len(of[name]) > 1 else ''}" for name in names]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(names)]
    for key, (factor, places, heading) in FIGURES.items():
        lines.append(f"| {heading} | " + " | ".join(_spread([factor * r[key] for r in of[n]], places) for n in names) + " |")
    for kind in runs[0]["linear"]["right per kind"]:
        values = [_spread([100 * record["right per kind"][kind] for record in of[name]], 1) for name in names]
        lines.append(f"| right of {kind}, % | " + " | ".join(values) + " |")
    for place, step in enumerate(runs[0]["linear"]["trace"]):
        where = step["choice"] if step["margin"] in (None, 0.0) else f"margin {step['margin']:g}"
        cells = []
        for name in names:
            right = statistics.mean(100 * record["trace"][place]["accuracy"] for record in of[name])
            cells.append(f"{right:.1f} / {statistics.mean(r['trace'][place]['switches_per_1000'] for r in of[name]):.0f}")
        lines.append(f"| trace, {where}: right, % / switches per 1000 | " + " | ".join(cells) + " |")
    for name in names[1:]:
        pairs = [100 * (found[name]["accuracy"] - found["linear"]["accuracy"]) for found in runs if name in found]
        ahead = sum(pair > 0 for pair in pairs)
        told = f"{_spread(pairs, 2)} points, above 0 in {ahead} of {len(pairs)}"
        lines += ["", f"Accuracy of {name} less that of linear, seed by seed: {told}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--pieces", type=int, default=800, help="most pieces of a kind")
    parser.add_argument("--quick", action="store_true", help="two seeds, 200 pieces of a kind")
    parser.add_argument("--pretrained", type=Path, help="an encoder's folder")
    parser.add_argument("--pretrained-seeds", type=int, help="of how many seeds it is trained on; by default all")
    parser.add_argument("--no-scratch", action="store_true", help="without the BERT of random weights")
    parser.add_argument("--threads", type=int, help="of torch; by default one per core, which is slow beside other work")
    parser.add_argument("--json", type=Path, help="where every seed's figures are written")
    arguments = parser.parse_args()
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    seeds, most = (2, 200) if arguments.quick else (arguments.seeds, arguments.pieces)
    runs = []
    for number in range(seeds):
        rivals: dict[str, Path | None] = {} if arguments.no_scratch else {"bert from scratch": None}
        if arguments.pretrained and (arguments.pretrained_seeds is None or number < arguments.pretrained_seeds):
            rivals["bert fine-tuned"] = arguments.pretrained.resolve()
        data, found = run(arguments.first + number, most, rivals)
        runs.append(found)
        counts = data.prepared.card["counts"]
        print(f"seed {arguments.first + number}: {len(data.test)} test queries; prepared {counts}", flush=True)
        print({name: {key: round(record[key], 4) for key in FIGURES} for name, record in found.items()}, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(runs, indent=1), "utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
