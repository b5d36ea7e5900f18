"""The documents say what is so: commands exist, blocks run, folders are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.cli import app
from pipeline.recipe import load_recipe
from tests.support.running import command

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_every_command_of_the_readme_exists() -> None:
    verbs = {found.callback.__name__ for found in app.registered_commands if found.callback}
    named = set(re.findall(r"^\$ channel-merge (\w+)", "\n".join(blocks("console")), flags=re.MULTILINE))
    assert named == {"plan", "run", "inspect", "verify", "export", "pull", "clean", "route", "report", "latest"}
    assert named < verbs
    targets = set(re.findall(r"^\$ make (\w+)", "\n".join(blocks("console")), flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_first_recipe_of_the_readme_is_the_demos() -> None:
    shown = blocks("yaml")[0]
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "examples/tiny-mistral/recipe.yaml").read_text())


def test_the_second_is_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[1])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.base == "mistralai/Mistral-7B-v0.1@main"
    assert recipe.experts["code"].source == "uukuguy/speechless-code-mistral-7b-v1.0@main"


def test_the_third_is_its_router(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[1] + blocks("yaml")[2])
    router = load_recipe(tmp_path / "recipe.yaml").router
    assert (router.kind, router.threshold, router.fallback) == ("linear", "auto", "base")
    assert [source.source for source in router.queries["instruct"]] == [
        str(tmp_path / "data" / name) for name in ("instruct.jsonl", "more.parquet")
    ]
    assert router.queries["math"][0].group == "original_question"


def test_the_commands_of_the_readme_run_in_its_order(tmp_path: Path) -> None:
    """With the demo's recipe and an output elsewhere, as a reader would type them."""
    recipe = ROOT / "examples" / "tiny-mistral" / "recipe.yaml"
    place: list[str | Path] = ["--output", tmp_path / "artifacts", "--deltas", tmp_path / "deltas"]
    typed = [line.split("#")[0].split()[2:] for line in "\n".join(blocks("console")).splitlines() if "channel-merge" in line]
    for words in typed:
        text = " ".join(words).replace("recipe.yaml", str(recipe)).replace("s3://bucket/mistral-4x", "artifacts")
        arguments: list[str | Path] = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', text)]
        if arguments[0] in ("run", "clean"):
            arguments.extend(place)
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 0, (arguments, done.stderr)
        if arguments[0] == "route":
            assert done.stdout.strip() == "math"
    assert (tmp_path / "code" / "model.safetensors").is_file()


@pytest.mark.server
def test_the_flow_of_the_readme_runs(tmp_path: Path) -> None:
    (block,) = blocks("python")
    program = block.replace('"examples', f'"{ROOT}/examples').replace('"build', f'"{tmp_path}/build')
    (tmp_path / "program.py").write_text(program)
    settings = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180", "PREFECT_HOME": str(tmp_path / "prefect")}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'new': True" in done.stdout


def test_the_map_of_folders_is_complete() -> None:
    named = set(re.findall(r"^\| `(\w+)/` \|", README, flags=re.MULTILINE))
    assert all((ROOT / folder).is_dir() for folder in named)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")} == named


def test_files_named_in_the_design_exist() -> None:
    design = (ROOT / "DESIGN.md").read_text("utf-8")
    paths = re.findall(r"`((?:tests|pipeline|storage|flows)/[\w/]+\.py)`", design)
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).is_file()] == []
