from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from storage.safetensors_file import Slot, allocate, header, shard_name, shards, weight_index, write_at


def test_layout_is_that_of_safetensors_itself(tmp_path: Path) -> None:
    """Byte for byte what safetensors writes, for mixed types, although written in pieces and out of order."""
    tensors = {
        "b.weight": torch.randn(3, 4).bfloat16(),
        "a.weight": torch.randn(2, 5).bfloat16(),
        "c.bias": torch.randn(7),
        "i": torch.arange(6, dtype=torch.int64),
    }
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
    path = tmp_path / "x.safetensors"
    places = allocate(path, [Slot(n, names[t.dtype], tuple(t.shape)) for n, t in tensors.items()])
    for name in reversed(list(tensors)):
        raw = tensors[name].view(torch.uint8).reshape(-1).numpy()
        half = len(raw) // 2
        write_at(path, places[name] + half, raw[half:])
        write_at(path, places[name], raw[:half])
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])


def test_a_header_is_aligned() -> None:
    for length in range(1, 20):
        prefix, places = header([Slot("n" * length, "F32", (2, 3))])
        assert len(prefix) % 8 == 0
        assert places["n" * length] == len(prefix)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 200))
def test_shards_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    slots = [Slot(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    dealt = shards(slots, limit)
    assert [slot for group in dealt for slot in group] == slots
    for group in dealt:
        assert group
        assert len(group) == 1 or sum(slot.nbytes for slot in group) <= limit


def test_index_names_every_tensor() -> None:
    slots = [Slot("a", "U8", (4,)), Slot("b", "U8", (4,))]
    dealt = shards(slots, 4)
    files = {shard_name("pool", i, len(dealt)): group for i, group in enumerate(dealt, 1)}
    index = weight_index(files)
    assert index == {
        "metadata": {"total_size": 8},
        "weight_map": {"a": "pool-00001-of-00002.safetensors", "b": "pool-00002-of-00002.safetensors"},
    }
