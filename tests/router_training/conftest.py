from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.encoders import domain_texts, write_encoder


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """More threads are no faster with tensors this small, and wait for each other where other work goes on."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without dropout, so that trainings can be compared."""
    folder = write_encoder(tmp_path_factory.mktemp("encoder"), [text for texts in domain_texts(220).values() for text in texts])
    settings = json.loads((folder / "config.json").read_bytes())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
