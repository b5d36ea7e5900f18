"""The BERT router's scorer: an encoder of sequences with a classification head, from the router's folder of an artifact.

Nothing in that folder is code or a pickle: ``router.safetensors`` holds the weights, ``config.json`` and the tokenizer's files
say how they are used, and only model classes that transformers itself has are made from them. Of ``serving`` this module alone
imports torch and transformers; what loads a router imports it when a router is of kind bert.

Weights are stored as float16, half of what they were trained in, and computed with as float32. On 800 queries a MiniLM of
23 million parameters then changed its scores, which spread over 6.0, by at most 0.0015 and no choice; bfloat16, of the same
size, changed them by 0.014. An encoder with values that float16 does not have is stored as float32.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from storage.atomic import canonical_json
from storage.errors import ArtifactError
from storage.local_store import LocalStore
from storage.stores import Store

WEIGHTS = "router.safetensors"
MODEL_CONFIG = "config.json"
TOKENIZER_SUFFIXES = (".json", ".txt", ".model")
"""Of files that a tokenizer is read from. No code is among them."""
CHARACTERS_PER_TOKEN = 32
"""A text is cut to this many characters per token that the encoder reads, before it is tokenised: one of megabytes must not
cost seconds. Real text has two to five."""
BATCH_TOKENS = 8192
"""Padded tokens that pass through the encoder at once."""
CHUNK = 2048
"""Texts that are tokenised at once."""
PASSING_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Of a model's configuration: they say where and by what it was written, which is nothing of the router."""
HALF_LIMIT = 65504.0
"""The largest float16."""


def cut(text: str, max_length: int) -> str:
    """What of a text is tokenised: its beginning, as valid Unicode. Pure."""
    return text[: CHARACTERS_PER_TOKEN * max_length].encode("utf-8", "replace").decode("utf-8")


class EncoderScorer:
    """Scores of experts by an encoder with a classification head."""

    link: Literal["softmax"] = "softmax"

    def __init__(
        self,
        experts: Sequence[str],
        model: Any,
        tokenizer: Any,
        max_length: int,
        *,
        device: str | None = None,
        source: str = "",
    ) -> None:
        """``model`` has one label per expert, in their order; ``device``: cuda where there is one, else cpu."""
        self.experts = tuple(experts)
        self.max_length = max_length
        self.source = source
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self._tokenizing = threading.Lock()  # a tokenizer holds its settings: two threads must not change them at once

    def logits(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(texts, experts) float64, in the order of the texts. Those of similar length pass through the encoder together."""
        found = np.zeros((len(texts), len(self.experts)), np.float64)
        for start in range(0, len(texts), CHUNK):
            chunk = [cut(text, self.max_length) for text in texts[start : start + CHUNK]]
            with self._tokenizing:
                encoded = self.tokenizer(chunk, truncation=True, max_length=self.max_length, padding=False)
            keys = [key for key in encoded if key in self.tokenizer.model_input_names]
            for rows in _batches([len(ids) for ids in encoded["input_ids"]]):
                with self._tokenizing:
                    padded = self.tokenizer.pad({key: [encoded[key][row] for row in rows] for key in keys}, return_tensors="pt")
                with torch.inference_mode():
                    scores = self.model(**padded.to(self.device)).logits
                found[start + np.array(rows)] = scores.double().cpu().numpy()
        return found

    def describe(self) -> dict[str, Any]:
        """What router.json says of the encoder; nothing of this machine."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        described = {"max_length": self.max_length, "type": self.model.config.model_type, "parameters": parameters}
        return described | ({"source": self.source} if self.source else {})


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions in order of length, longest first, in batches of at most ``BATCH_TOKENS`` padded tokens or one text."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        count = max(1, BATCH_TOKENS // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and remarks on what is loaded: errors are raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def stored_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights as they are stored: float16, or float32 where some value is beyond it. Copies, none shares memory."""
    state = model.state_dict()
    floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
    fits = all(bool((tensor.abs() <= HALF_LIMIT).all()) for tensor in floats)
    kind = torch.float16 if fits else torch.float32
    return {
        name: tensor.detach().to("cpu", kind if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in state.items()
    }


def save_encoder(scorer: EncoderScorer, folder: Path) -> None:
    """Write ``router.safetensors``, the model's configuration and the tokenizer's files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = getattr(scorer.tokenizer, "backend_tokenizer", None)
    if backend is not None:  # how texts were last cut and padded would be stored too
        backend.no_truncation()
        backend.no_padding()
    with quiet():
        scorer.tokenizer.save_pretrained(folder)
    _without_places(folder / "tokenizer_config.json")
    config = {key: value for key, value in scorer.model.config.to_dict().items() if key not in PASSING_KEYS}
    (folder / MODEL_CONFIG).write_bytes(canonical_json(config))
    save_file(stored_weights(scorer.model), folder / WEIGHTS)


def _without_places(path: Path) -> None:
    """Take out of a tokenizer's settings where it was read from."""
    if path.exists():
        settings = json.loads(path.read_bytes())
        kept = {key: value for key, value in settings.items() if key not in ("name_or_path", "local_files_only", "is_local")}
        path.write_bytes(canonical_json(kept))


def load_encoder(folder: Store, config: Mapping[str, Any], *, device: str | None = None) -> EncoderScorer:
    """The scorer in a router's folder, whose router.json is ``config``.

    Files of an object store are fetched to a temporary folder first. ArtifactError when they do not make a scorer for the
    experts of router.json; StoreError when the store cannot be reached.
    """
    try:
        if isinstance(folder, LocalStore):
            return _load(folder.path, config, device)
        with TemporaryDirectory() as local:
            for name in folder.sizes():
                if name == WEIGHTS or _is_setting(name):
                    (Path(local) / name).write_bytes(folder.get(name))
            return _load(Path(local), config, device)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{folder.place}: its encoder is damaged ({type(error).__name__}: {reason}). Pull or build the artifact again."
        ) from None


def _is_setting(name: str) -> bool:
    """Whether it is a file at the top level that a configuration or a tokenizer is read from."""
    return Path(name).name == name and name.endswith(TOKENIZER_SUFFIXES)


def _load(folder: Path, config: Mapping[str, Any], device: str | None) -> EncoderScorer:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    experts, described = tuple(config["experts"]), config["encoder"]
    max_length = described["max_length"]
    if not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length: expected a number of tokens, got {max_length!r}")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet():
        settings = AutoConfig.from_pretrained(folder, **local)
        if settings.num_labels != len(experts):
            raise ValueError(f"it has {settings.num_labels} labels for {len(experts)} experts")
        model = AutoModelForSequenceClassification.from_config(settings, trust_remote_code=False).float()
        _fill(model, folder / WEIGHTS)
        if not any(path.name != MODEL_CONFIG and path.name.startswith(("tokenizer.", "vocab")) for path in folder.iterdir()):
            raise ValueError("it has no tokenizer")  # of which transformers would make an empty one
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    return EncoderScorer(experts, model, tokenizer, max_length, device=device, source=described.get("source", ""))


def _fill(model: Any, path: Path) -> None:
    """Copy the stored weights into a model, one at a time. ValueError unless they are exactly its own."""
    state = model.state_dict()
    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        if names != state.keys():
            odd = sorted(names ^ state.keys())
            raise ValueError(f"{path.name}: {len(odd)} tensors too many or too few: {', '.join(odd[:3])}")
        for name, tensor in state.items():
            stored = file.get_tensor(name)
            if stored.shape != tensor.shape:
                raise ValueError(f"{path.name}: {name}: expected {list(tensor.shape)}, got {list(stored.shape)}")
            tensor.copy_(stored)
