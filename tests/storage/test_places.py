from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.places import kind_of, local_path, local_problem, source_problem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe's folder with a checkpoint's folder, another that is named like one on the Hub, and a file."""
    (tmp_path / "math").mkdir()
    (tmp_path / "tiny" / "local").mkdir(parents=True)
    (tmp_path / "math" / "model.safetensors").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("gpt2", "hub"),
        ("tiny/math", "hub"),
        ("tiny/math@refs/pr/1", "hub"),
        ("math", "local"),
        ("tiny/local", "local"),
        ("tiny/local/", "local"),
        ("./nope", "local"),
        ("..", "local"),
        ("~/x", "local"),
        ("/x", "local"),
        ("file:///x", "local"),
        ("FILE:///x", "local"),
        ("File://localhost/x", "local"),
        ("s3://bucket", "objects"),
        ("S3://bucket/x/", "objects"),
        ("abfss://container@host/x", "objects"),
    ],
)
def test_kinds_of_sources(folder: Path, place: str, kind: str) -> None:
    assert kind_of(place, folder) == kind
    assert source_problem(place, folder) is None


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("", "empty source; expected a Hub id, a folder or a URL"),
        ("  ", "empty source"),
        ("tiny/math@", "empty revision; write tiny/math@ with a branch, tag or commit, or tiny/math alone"),
        ("tiny/math@ ", "empty revision"),
        ("s3://", "no bucket; expected s3://bucket/prefix"),
        ("gs:///prefix", "no bucket; expected gs://bucket/prefix"),
        ("s3://key@bucket/x", "a URL is a bucket and a prefix; credentials and options come from the environment"),
        ("s3://key:word@bucket/x", "a URL is a bucket and a prefix"),
        ("s3://bucket/x?a=b", "a URL is a bucket and a prefix"),
        ("s3://bucket/x#b", "a URL is a bucket and a prefix"),
        ("ftp://host/x", "sources are a Hub id, a folder, or a URL of s3, gs or az; got the scheme 'ftp'"),
        ("a b://host/x", "got no scheme that is known"),
        ("https://host/org/name", "got the scheme 'https'"),
        ("https://huggingface.co/org/name", "; write a model on the Hub as org/name"),
        ("HTTPS://www.HuggingFace.co/org/name/", "; write a model on the Hub as org/name"),
        ("https://huggingface.co/org/name/tree/v1.0", "; write a model on the Hub as org/name@v1.0"),
        ("https://huggingface.co/org/name/blob/main/config.json?download=true", "; write a model on the Hub as org/name@main"),
        ("https://huggingface.co/org/name/tree/refs/pr/7", "; write a model on the Hub as org/name@refs/pr/7"),
        ("https://huggingface.co/datasets/org/name", "got the scheme 'https'"),
        ("hf://org/name", "got the scheme 'hf'; write a model on the Hub as org/name"),
        ("hf://org/name@main/config.json", "; write a model on the Hub as org/name@main"),
        ("hf://datasets/org/name", "got the scheme 'hf'"),
        ("huggingface.co/org/name", "there is no folder huggingface.co/org/name; write a model on the Hub as org/name"),
        ("tiny/math/", "there is no folder tiny/math/; write a model on the Hub as tiny/math"),
        ("tiny/math/tree/main", "there is no folder tiny/math/tree/main; write a model on the Hub as tiny/math@main"),
        ("./math/model.safetensors", "/math/model.safetensors is a file; give its folder"),
        ("math/model.safetensors", "/math/model.safetensors is a file; give its folder"),
        ("file://host/x", "a file URL of another host; expected file:///folder, of this machine"),
        ("file://x", "a file URL of another host"),
        ("~nobody-of-this-name/x", "no path of this machine ("),
        ("./a\0b", "no path of this machine ("),
    ],
)  # fmt: skip
def test_how_sources_are_written(folder: Path, place: str, problem: str) -> None:
    found = source_problem(place, folder)
    assert found is not None
    assert problem in found
    assert found.endswith(problem.rpartition(" ")[2]) or not problem.startswith("; write")


def test_a_link_to_a_file_is_a_file(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "math" / "model.safetensors")
    assert source_problem("link", folder) == f"{folder / 'math' / 'model.safetensors'} is a file; give its folder"


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("file:///a%20b/%C3%A9", "/a b/é"),
        ("FILE://LOCALHOST/a", "/a"),
        ("file:///a/../b/", "/b"),
        ("/a%20b", "/a%20b"),
        ("/a/./b", "/a/b"),
    ],
)
def test_local_paths(place: str, path: str, folder: Path) -> None:
    assert local_problem(place, folder) is None
    assert local_path(place, folder) == Path(path)


def test_relative_paths_count_from_the_recipe(folder: Path) -> None:
    assert local_path("math", folder) == local_path("./x/../math", folder) == folder / "math"


@given(st.text(max_size=12) | st.text(alphabet="a/:@.~%#?s3file", max_size=16))
def test_any_text_is_judged(text: str) -> None:
    folder = Path("/nowhere")
    if source_problem(text, folder) is None:
        assert kind_of(text, folder) is not None
