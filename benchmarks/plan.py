"""Time and memory of ``channel-merge plan`` for four experts of Mistral-7B's shapes on a Hub on loopback.

The other side, in the same run: fetching one of the five checkpoints through huggingface-hub, which is what has to be
waited for where checkpoints are judged after their download. The files are holes of the right sizes, sent over loopback: no
network is as fast.

    python -m benchmarks.plan --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.processes import Measured, measure
from tests.support.hub_server import HubServer, hub_environment

HIDDEN, INTERMEDIATE, LAYERS, KEYS = 4096, 14336, 32, 1024
CONFIG = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
EXPERTS = {"instruct": 32_002, "math": 32_001, "code": 32_000, "chinese": 63_872}
"""Rows of the vocabularies of the paper's experts; its base has 32,000."""
SHARDS = 3
DOWNLOAD = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1]))"


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Mistral-7B."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        found |= {
            f"{stem}.input_layernorm.weight": (HIDDEN,),
            f"{stem}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{stem}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{stem}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{stem}.post_attention_layernorm.weight": (HIDDEN,),
            f"{stem}.self_attn.k_proj.weight": (KEYS, HIDDEN),
            f"{stem}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{stem}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{stem}.self_attn.v_proj.weight": (KEYS, HIDDEN),
        }
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


def write_hollow(folder: Path, vocabulary: int) -> None:
    """A checkpoint of these shapes whose weights are holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocabulary}))
    tensors = list(shapes(vocabulary).items())
    step = -(-len(tensors) // SHARDS)
    placed: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, offset = {}, 0
        for tensor, shape in tensors[shard * step : (shard + 1) * step]:
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
            placed[tensor] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def write_family(folder: Path) -> Path:
    """Base and experts, and a recipe that finds them on the Hub."""
    write_hollow(folder / "repos" / "paper" / "base", 32_000)
    for name, vocabulary in EXPERTS.items():
        write_hollow(folder / "repos" / "paper" / name, vocabulary)
    recipe = folder / "recipe.yaml"
    experts = {name: f"paper/{name}" for name in EXPERTS}
    recipe.write_text(yaml.safe_dump({"name": "mistral-4x", "base": "paper/base@main", "experts": experts, "output": "./out"}))
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-download", action="store_true", help="leave the other side out: it writes 15 GB")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    program = [str(Path(sys.executable).parent / "channel-merge"), "plan"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = write_family(folder)
        with HubServer(folder / "repos", hash_content=False) as hub:
            environment = hub_environment(hub.url, folder / "hf")
            runs: list[Measured] = []
            for _ in range(options.repeats):
                hub.forget()
                runs.append(measure([*program, recipe, "--json"], environment, folder))
            requests, sent = len(hub.requests), sum(request.sent for request in hub.requests)
            told = json.loads(runs[-1].output)
            download = None
            if not options.no_download:
                download = measure([sys.executable, "-c", DOWNLOAD, "paper/base"], environment, folder)
    found = {
        "tensors": len(told["tensors"]),
        "seconds": [round(run.seconds, 2) for run in runs],
        "median_seconds": round(statistics.median(run.seconds for run in runs), 2),
        "peak_bytes": max(run.resident for run in runs),
        "requests": requests,
        "sent_bytes": sent,
        "to_fetch_bytes": told["totals"]["fetch"],
        "download_one_seconds": None if download is None else round(download.seconds, 1),
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"plan: {found['median_seconds']} s (median of {options.repeats}: {found['seconds']}), the whole process")
    print(f"  {found['peak_bytes'] / 2**20:.0f} MiB at its peak, {requests} requests, {sent / 1e6:.2f} MB fetched")
    print(f"  judged: 5 checkpoints, {told['totals']['fetch'] / 1e9:.1f} GB to fetch for a run")
    if download is not None:
        ratio = 5 * download.seconds / statistics.median(run.seconds for run in runs)
        print(f"downloading one of the five over loopback: {download.seconds:.1f} s; all five: {ratio:.0f} times the plan")


if __name__ == "__main__":
    main()
