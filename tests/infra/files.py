"""What lies in infra/, as the programs that read it see it: compose's model, kustomize's documents, the templates' JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
UID = 10001
"""Who processes are in a container."""
WRITABLE = {"/scratch", "/tmp"}
"""Where they may write."""
POOLS = ("process", "docker", "kubernetes")
OVERLAYS = ("base", "gpu")
STACKS = ("cpu", "gpu")
FILLED = {
    "POSTGRES_PASSWORD": "word1",
    "STORE_ACCESS_KEY": "key2",
    "STORE_SECRET_KEY": "secret3",
    "PREFECT_AUTH_STRING": "me:word4",
}
"""What a user must fill in."""


def program(name: str) -> str:
    """A program that a development package brings along."""
    return str(Path(sys.executable).parent / name)


def project() -> Any:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def version() -> str:
    """The project's version, which images carry as their tag."""
    return str(project()["project"]["version"])


def pins() -> dict[str, str]:
    """Package -> version, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return {re.sub(r"[-_.]+", "-", name).lower(): pin for name, _, pin in (line.partition("==") for line in lines)}


@cache
def example() -> dict[str, str]:
    """The settings of .env.example, those that are commented out too."""
    text = (INFRA / ".env.example").read_text("utf-8")
    return dict(re.findall(r"^(?:# )?([A-Z][A-Z0-9_]+)=(.*)$", text, flags=re.MULTILINE))


def composed(kind: str, settings: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """What docker-compose makes of the files, with these settings alone."""
    files = ["--file", "compose.yaml", *(["--file", "compose.gpu.yaml"] if kind == "gpu" else [])]
    line = [program("docker-compose"), *files, "--env-file", "/dev/null", "config", *options]
    return subprocess.run(
        line, cwd=INFRA, env={**settings, "HOME": "/nonexistent"}, capture_output=True, text=True, check=False
    )


@cache
def compose(kind: str = "cpu") -> Any:
    """The stack as docker-compose resolves it, filled in."""
    done = composed(kind, FILLED, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return json.loads(done.stdout)


def service(name: str, kind: str = "cpu") -> Any:
    """One service of the stack."""
    return compose(kind)["services"][name]


@cache
def rendered(overlay: str = "base") -> tuple[Any, ...]:
    """The documents that kustomize makes of an overlay."""
    line = [program("kubectl"), "kustomize", str(INFRA / "kubernetes" / overlay)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return tuple(yaml.safe_load_all(done.stdout))


def document(kind: str, name: str, overlay: str = "base") -> Any:
    """One document of an overlay."""
    (found,) = (one for one in rendered(overlay) if one["kind"] == kind and one["metadata"]["name"] == name)
    return found


def pods(overlay: str = "base") -> dict[str, Any]:
    """Pod specifications of an overlay, by what makes them."""
    found = {}
    for one in rendered(overlay):
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] in ("Deployment", "Job"):
            found[name] = one["spec"]["template"]["spec"]
        elif one["kind"] == "DaskCluster":
            found |= {f"{name}/{role}": one["spec"][role]["spec"] for role in ("scheduler", "worker")}
    return found


def template(pool: str) -> Any:
    """The base job template of a kind of work pool."""
    return json.loads((INFRA / "work-pools" / f"{pool}.json").read_text())


def deployments() -> Any:
    """What prefect.yaml deploys."""
    return yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))["deployments"]


def dockerfile() -> list[str]:
    """The instructions of the Dockerfile, each on one line."""
    lines = [line for line in (INFRA / "Dockerfile").read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def image_settings() -> dict[str, str]:
    """What the image sets in the environment."""
    last = [line for line in dockerfile() if line.startswith("ENV ")][-1]
    return dict(word.split("=", 1) for word in last.removeprefix("ENV ").split())
