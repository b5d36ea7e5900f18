from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils import murmurhash3_32

from serving.router import CONFIG, FeatureSpec, LinearRouter, features, load_router
from storage.errors import ArtifactError

SPEC = FeatureSpec(size=512)


@given(st.text())
def test_features_are_a_unit_vector_or_nothing(text: str) -> None:
    indices, values = features(text, SPEC)
    assert (np.diff(indices) > 0).all()
    assert ((indices >= 0) & (indices < SPEC.size)).all()
    norm = np.linalg.norm(values)
    assert norm == pytest.approx(1) or norm == 0


def test_features_are_the_same_on_every_machine() -> None:
    """Signed buckets of MurmurHash3 over UTF-8, as scikit-learn's own implementation gives them."""
    indices, values = features("aé", FeatureSpec(size=1 << 15, shortest=2, longest=2))
    hashes = [murmurhash3_32(gram, seed=0) for gram in (" a", "aé", "é ", "\x00aé")]
    expected = {abs(int(hashed)) % (1 << 15): 0.5 if hashed >= 0 else -0.5 for hashed in hashes}
    assert dict(zip(indices.tolist(), values.tolist(), strict=True)) == pytest.approx(expected)


def test_broken_unicode_and_megabytes_are_read() -> None:
    assert len(features("\ud800 abc", SPEC)[0])
    long, short = features("ab " * 4_000_000, SPEC), features("ab " * 2000, SPEC)
    np.testing.assert_array_equal(long[0], short[0])


def test_probabilities_are_normalised_sigmoids() -> None:
    weights = np.zeros((3, SPEC.size), np.float32)
    router = LinearRouter(("a", "b", "c"), SPEC, weights, np.array([0.0, 2.0, -2.0], np.float32))
    expected = 1 / (1 + np.exp([-0.0, -2.0, 2.0]))
    found = router.route("anything")
    assert list(found) == ["a", "b", "c"]
    np.testing.assert_allclose(list(found.values()), expected / expected.sum())


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"format": 9, "kind": "linear"}))
    with pytest.raises(ArtifactError, match=r"expected a linear router of format 1, got kind 'linear' of format 9"):
        load_router(tmp_path)
