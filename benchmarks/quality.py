"""What each option keeps of the fine-tuning, on the demo's trained family: python -m benchmarks.quality.

For every row a merge from one delta store is exported and measured on the experts' held-out texts. Printed are the mean and the
worst expert's share of the gain in bits per byte that is kept, and the parameters stored relative to the experts'.
The first rows are the other side of the comparison: the base alone, one model for all, groups drawn at random.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging

from flows.demo import FAMILY, kept
from flows.quality import Quality, measure
from flows.run import read_recipe, run_recipe
from pipeline.engine import Silent
from serving.lookup import export
from storage.artifact import Artifact

ARITHMETIC = {"method": "task_arithmetic"}
ROWS: dict[str, dict[str, Any]] = {
    "one model": {"groups": 1, **ARITHMETIC},
    "one model, embeddings and norms merged too": {"groups": 1, **ARITHMETIC, "rules": [{"match": "*", "policy": "merge"}]},
    "one model, TIES 0.7": {"groups": 1, "method": "ties", "density": 0.7},
    "BYOM, 30 % furthest from the merged model": {"groups": 1, "method": "byom", "keep": 0.3},
    "BYOM, 30 % largest of the delta": {"groups": 1, "method": "byom", "keep": 0.3, "residual": "delta"},
    "K=2, random groups": {"groups": 2, **ARITHMETIC, "clustering": "random"},
    "K=2, one grouping for the model": {"groups": 2, **ARITHMETIC, "granularity": "model"},
    "K=2, one grouping per matrix": {"groups": 2, **ARITHMETIC, "granularity": "layer"},
    "K=2, k-means, cosine (default)": {"groups": 2, **ARITHMETIC},
    "K=2, k-means, euclidean": {"groups": 2, **ARITHMETIC, "metric": "euclidean"},
    "K=2, spherical k-means": {"groups": 2, **ARITHMETIC, "clustering": "spherical"},
    "K=2, k-means, manhattan (medoids)": {"groups": 2, **ARITHMETIC, "metric": "manhattan"},
    "K=2, signs of the row": {"groups": 2, **ARITHMETIC, "clustering": "sign"},
    "K=2, sign of the sum": {"groups": 2, **ARITHMETIC, "clustering": "sign", "sign": "mass"},
    "K=2, k-means, scaling 0.5": {"groups": 2, **ARITHMETIC, "scaling": 0.5},
    "K=2, k-means, DARE 0.7": {"groups": 2, "method": "dare", "density": 0.7},
    "K=2, k-means, DARE 0.7, rescale l1": {"groups": 2, "method": "dare", "density": 0.7, "rescale": "l1"},
    "K=2, k-means, TIES 0.7": {"groups": 2, "method": "ties", "density": 0.7},
    "K=2, k-means, TIES 0.7 per row": {"groups": 2, "method": "ties", "density": 0.7, "trim_scope": "row"},
    "K=2, k-means, TIES 0.7 over the model": {"groups": 2, "method": "ties", "density": 0.7, "trim_scope": "model"},
    "K=2, k-means, DARE-TIES 0.7": {"groups": 2, "method": "dare_ties", "density": 0.7},
    "K=2, k-means, singletons scaled, scaling 0.5": {"groups": 2, **ARITHMETIC, "scaling": 0.5, "singleton": "scale"},
    "K=2, embeddings and norms merged too": {"groups": 2, **ARITHMETIC, "rules": [{"match": "*", "policy": "merge"}]},
    "K per channel, budget 0.5": {"groups": "auto", "budget": 0.5, **ARITHMETIC},
    "K per channel, budget 0.5, euclidean": {"groups": "auto", "budget": 0.5, **ARITHMETIC, "metric": "euclidean"},
    "K per channel, the knee": {"groups": "auto", **ARITHMETIC},
    "K per channel, budget 0.75": {"groups": "auto", "budget": 0.75, **ARITHMETIC},
    "K per channel, budget 0.75, euclidean": {"groups": "auto", "budget": 0.75, **ARITHMETIC, "metric": "euclidean"},
    "K=3, k-means, SLERP": {"groups": 3, "method": "slerp"},
    "K=3, k-means, cosine": {"groups": 3, **ARITHMETIC},
    "K=4=N": {"groups": 4, **ARITHMETIC},
}


def shares(
    folder: Path, merge: dict[str, Any], texts: dict[str, str], ends: dict[str, tuple[Quality, Quality]]
) -> tuple[list[float], float]:
    """Per expert the share of its gain that is kept, and the share of the parameters that is stored."""
    settings = {f"merge.{key}": value for key, value in merge.items()}
    settings |= {"router.kind": "none", "router.queries": {}}
    outcome = run_recipe(
        read_recipe(FAMILY / "recipe.yaml", settings, str(folder / "out"), str(folder / "deltas"), "none"), Silent()
    )
    found = []
    for expert, text in texts.items():
        target = folder / "exports" / outcome.version / expert
        if not target.exists():
            export(Artifact(outcome.path), expert, target)
        base, own = ends[expert]
        found.append(kept(own, base, measure(target, text)))
    return found, outcome.manifest.parameters.ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only rows whose title contains this")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    texts = {path.stem: path.read_text("utf-8") for path in sorted((FAMILY / "texts").glob("*.txt"))}
    ends = {e: (measure(FAMILY / "base", t), measure(FAMILY / "experts" / e, t)) for e, t in texts.items()}
    print("| merge | mean gain kept | worst expert | parameters |\n|---|---|---|---|")
    print("| the base alone | 0.0 % | 0.0 % | - |")
    with tempfile.TemporaryDirectory() as folder:
        for title, merge in ROWS.items():
            if arguments.only in title:
                found, ratio = shares(Path(folder), merge, texts, ends)
                print(
                    f"| {title} | {100 * sum(found) / len(found):.1f} % | {100 * min(found):.1f} % | {100 * ratio:.1f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
