"""The Dockerfile: what the linter says, what gets into an image, and as whom its processes run."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from docker.utils.build import exclude_paths  # type: ignore[import-untyped]
from packaging.requirements import Requirement

from tests.infra.files import INFRA, ROOT, UID, dockerfile, image_settings, pins, program, project, version


@pytest.fixture(scope="module")
def sent() -> set[str]:
    """The files that a build is sent, by Docker's own rules."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    return {path for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file()} - {
        ".dockerignore"
    }  # for the builder


def test_the_linter_finds_nothing() -> None:
    done = subprocess.run(
        [program("hadolint"), "--no-color", str(INFRA / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "hadolint ignore" not in (INFRA / "Dockerfile").read_text("utf-8")


def test_a_build_is_sent_all_that_runs_need_and_nothing_else(sent: set[str]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    folders = {package.split(".")[0] for package in project()["tool"]["setuptools"]["packages"]}
    code = {path for path in tracked if path.split("/")[0] in folders | {"examples"} and (ROOT / path).is_file()}
    assert code <= sent
    single = {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "prefect.yaml", "infra/register.sh"}
    assert single | {f"infra/work-pools/{pool}.json" for pool in ("process", "docker", "kubernetes")} <= sent
    assert {path.split("/")[0] for path in sent} == folders | {"examples", "infra"} | {s for s in single if "/" not in s}
    strange = re.compile(r"(^|/)\.|__pycache__|\.egg-info|^infra/(kubernetes|compose|Dockerfile)|artifacts/|deltas/")
    assert [path for path in sorted(sent) if strange.search(path)] == []


def test_files_with_passwords_are_never_sent() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert patterns.index("infra/.env*") > patterns.index("!infra")
    assert subprocess.run(["git", "check-ignore", "-q", "infra/.env"], cwd=ROOT, check=False).returncode == 0


def test_what_is_copied_by_name_is_sent(sent: set[str]) -> None:
    named = [line.split()[1:-1] for line in dockerfile() if line.startswith("COPY ") and "--from" not in line]
    assert named == [["constraints.txt", "pyproject.toml"], ["."]]
    assert set(named[0]) <= sent


def test_base_and_packages_are_pinned() -> None:
    assert (base := re.fullmatch(r"ARG PYTHON_IMAGE=python:(3\.11\.\d+)-slim-\w+", dockerfile()[0]))
    assert f"FROM {base[0].split('=')[1]}" not in "\n".join(dockerfile())  # both stages take the argument, a digest too
    assert [line.split(" AS ")[0] for line in dockerfile() if line.startswith("FROM")] == ["FROM ${PYTHON_IMAGE}"] * 2
    wanted = [*project()["project"]["dependencies"], *project()["project"]["optional-dependencies"]["deploy"]]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins()[re.sub(r"[-_.]+", "-", requirement.name).lower()]), requirement


def test_the_last_stage_has_no_build_tools_and_no_root() -> None:
    start = max(number for number, line in enumerate(dockerfile()) if line.startswith("FROM"))
    last = dockerfile()[start:]
    assert f"USER {UID}:{UID}" in last
    assert not any(word in line for line in last for word in ("apt-get", "pip install", "gcc"))
    assert any("pip uninstall --yes setuptools pip" in line for line in dockerfile()[:start])
    # without an entry point the arguments of a Job are its whole command
    assert not any(line.startswith("ENTRYPOINT") for line in dockerfile())


def test_all_that_is_written_goes_where_a_volume_is() -> None:
    settings = image_settings()
    for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "HF_HOME", "PREFECT_HOME", "PREFECT_SERVER_UI_STATIC_DIRECTORY"):
        assert settings[name].split("/")[1] == "scratch", name
    assert settings["DO_NOT_TRACK"] == "1"
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_the_version_of_images_is_the_projects() -> None:
    found = set()
    for path in [*INFRA.rglob("*.yaml"), *INFRA.rglob("*.json"), INFRA / ".env.example", INFRA / "Dockerfile"]:
        found |= set(re.findall(r"channel-merging(?:-cuda)?:(\d[\w.]*)", path.read_text("utf-8")))
    assert found == {version()}
    for overlay in ("base", "gpu"):
        described = yaml.safe_load((INFRA / "kubernetes" / overlay / "kustomization.yaml").read_text())
        assert {image["newTag"] for image in described["images"]} == {version()}
