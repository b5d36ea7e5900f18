from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engine import Silent, open_engine
from pipeline.recipe import ClusterSection
from storage.errors import ClusterError
from tests.pipeline.test_invariants import router_of
from tests.support.running import command
from tests.support.tiny_experts import Family, read_checkpoint


def test_the_verbs_of_a_newcomer(family: Family, tmp_path: Path) -> None:
    """run, run again, inspect, verify, export, route, by the installed command in processes of their own."""
    recipe = family.recipe(router=router_of(family), cluster={"kind": "local", "workers": 2})
    planned = command("plan", recipe, "--json")
    assert planned.returncode == 0, planned.stderr
    tensors = json.loads(planned.stdout)["tensors"]
    assert {t["tensor"]: t["policy"] for t in tensors}["model.layers.0.mlp.up_proj.weight"] == "merge"
    done = command("run", recipe, "--set", "merge.groups=3")
    assert done.returncode == 0, done.stderr
    assert "published version" in done.stdout
    lines = [line.split(": ")[0] for line in done.stderr.splitlines()]
    assert lines.count("note") == 4  # rows of two extended vocabularies
    stages = [line for line in lines if line != "note"]
    assert (stages[0], stages[-1]) == ("resolve", "router")
    assert sorted(stages[1:-1]) == ["cluster", "ingest", "merge", "pack", "queries", "similarity"]  # they overlap
    again = command("run", recipe, "--set", "merge.groups=3", "--json")
    assert json.loads(again.stdout)["new"] is False
    output = tmp_path / "output"
    shown = command("inspect", output)
    assert "4 experts" in shown.stdout
    assert "groups 3" in shown.stdout
    assert json.loads(command("inspect", output, "--json").stdout)["version"] == json.loads(again.stdout)["version"]
    assert command("verify", output).stdout.startswith("ok: ")
    assert command("export", output, "chinese", tmp_path / "exported").returncode == 0
    assert read_checkpoint(tmp_path / "exported").keys() == family.experts["chinese"].keys()
    routed = command("route", output, "code question number 400 about edoc", "--json")
    answer = json.loads(routed.stdout)
    assert answer["expert"] == "code"
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert command("route", output, "math question").stdout.split()[0] == "math"


def test_verify_says_no_with_exit_code_1(family: Family, tmp_path: Path) -> None:
    assert command("run", family.recipe()).returncode == 0
    (pool,) = (tmp_path / "output").glob("*/pool-*.safetensors")
    raw = bytearray(pool.read_bytes())
    raw[-5] ^= 1
    pool.write_bytes(raw)
    found = command("verify", tmp_path / "output")
    assert found.returncode == 1
    assert "mismatch: pool-00001-of-00001.safetensors: expected sha256" in found.stderr


Breakage = Callable[[Family], Path]


def edit_tensors(family: Family, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = family.expert(name) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def unknown_key(family: Family) -> Path:
    return family.recipe(**{"merge.goups": 2})


def missing_directory(family: Family) -> Path:
    shutil.rmtree(family.expert("math"))
    return family.recipe()


def another_architecture(family: Family) -> Path:
    path = family.expert("math") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llama"}))
    return family.recipe()


def another_shape(family: Family) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(25, 16, dtype=torch.bfloat16)

    edit_tensors(family, "instruct", change)
    return family.recipe()


def missing_tensor(family: Family) -> Path:
    edit_tensors(family, "math", lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight"))
    return family.recipe()


def not_a_number(family: Family) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_proj.weight"][3, 5] = torch.nan
        tensors["model.norm.weight"][0] = torch.inf

    edit_tensors(family, "math", change)
    edit_tensors(family, "instruct", lambda tensors: tensors["lm_head.weight"].fill_(torch.nan))
    return family.recipe(cluster={"kind": "local", "workers": 2})


def torn_file(family: Family) -> Path:
    path = family.expert("chinese") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return family.recipe()


def pickle_checkpoint(family: Family) -> Path:
    (family.expert("chinese") / "model.safetensors").rename(family.expert("chinese") / "pytorch_model.bin")
    return family.recipe()


def strange_output(family: Family) -> Path:
    (family.folder.parent / "output").mkdir()
    (family.folder.parent / "output" / "notes.txt").write_text("mine")
    return family.recipe()


def too_many_groups(family: Family) -> Path:
    return family.recipe(**{"merge.groups": 5})


def missing_queries(family: Family) -> Path:
    router = router_of(family)
    (family.folder / "code.jsonl").unlink()
    return family.recipe(router=router)


def bad_queries(family: Family) -> Path:
    router = router_of(family)
    path = family.folder / "code.jsonl"
    path.write_text(path.read_text() + '\n{"txt": "x"}\nnot json\n')
    return family.recipe(router=router)


def several_at_once(family: Family) -> Path:
    shutil.rmtree(family.expert("math"))
    torn_file(family)
    return strange_output(family)


@pytest.mark.parametrize(
    ("breakage", "messages"),
    [
        (unknown_key, ["merge.goups: unknown key; did you mean 'groups'?"]),
        (missing_directory, ["expert math: there is no directory", "Correct the path"]),
        (another_architecture, ["expert math: config.json: model_type: expected 'mistral' as in the base, got 'llama'"]),
        (
            another_shape,
            ["expert instruct: tensor model.layers.1.mlp.up_proj.weight: expected shape [24, 16] as in the base, got [25, 16]"],
        ),
        (missing_tensor, ["expert math: tensor model.layers.0.self_attn.k_proj.weight is missing: expected shape [8, 16]"]),
        (
            not_a_number,
            [
                "3 problems",
                "expert math: tensor model.layers.0.self_attn.k_proj.weight: 1 of 128 values are NaN or infinite",
                "expert math: tensor model.norm.weight: 1 of 16 values are NaN or infinite",
                "expert instruct: tensor lm_head.weight: 320 of 320 values are NaN or infinite; expected none",
            ],
        ),
        (torn_file, ["expert chinese: ", "must be saved or downloaded again: its tensors need"]),
        (pickle_checkpoint, ["expert chinese: ", "only pickles (pytorch_model.bin), which are never opened"]),
        (strange_output, ["output ", "is not a folder of artifacts", "notes.txt", "Choose another output"]),
        (too_many_groups, ["merge.groups: expected at most 4, the number of experts, got 5"]),
        (missing_queries, ["expert code: ", "code.jsonl"]),
        (bad_queries, ["2 problems", "code.jsonl line 81: expected", "code.jsonl line 82: expected"]),
        (several_at_once, ["notes.txt", "expert math: there is no directory", "expert chinese: ", "(is it torn?"]),
    ],
)
def test_bad_input_is_one_clear_error(family: Family, breakage: Breakage, messages: list[str]) -> None:
    """Exit code 2, one message without a traceback, and nothing that can be read as an artifact."""
    done = command("run", breakage(family))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    for message in messages:
        assert message in done.stderr
    output = family.folder.parent / "output"
    left = [p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()] if output.exists() else []
    assert [name for name in left if not name.startswith(".work/") and name != "notes.txt"] == []
    assert [name for name in left if name.endswith((".safetensors", ".json"))] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "there is no artifact at nowhere"),
        (["verify", "."], "is not an artifact"),
        (["export", "output", "poetry", "x"], "has no expert 'poetry'; it has chinese, code, instruct, math"),
        (["export", "output", "math", "family"], "exists and is not an empty folder"),
        (["route", "output", "hello"], "has no router. Build it with router.kind: linear"),
        (["run", "family/recipe.yaml", "--set", "merge.groups=["], "--set merge.groups=[: the value '[' is no YAML"),
        (
            ["run", "family/recipe.yaml", "--cluster", "gpu"],
            "--cluster: expected local, none, cuda or tcp://host:port, got 'gpu'",
        ),
    ],
)
def test_bad_arguments_are_one_clear_error(family: Family, arguments: list[str], message: str) -> None:
    assert command("run", family.recipe()).returncode == 0
    done = command(*arguments, cwd=family.folder.parent)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_after_bad_weights_are_mended_the_run_goes_through(family: Family) -> None:
    original = {n: (family.expert(n) / "model.safetensors").read_bytes() for n in ("math", "instruct")}
    recipe = not_a_number(family)
    assert command("run", recipe).returncode == 2
    for name, raw in original.items():
        (family.expert(name) / "model.safetensors").write_bytes(raw)
    assert command("run", recipe).returncode == 0


def test_an_unexpected_failure_is_exit_code_3(family: Family, tmp_path: Path) -> None:
    """Not 1, which means that the answer is no; the traceback is there for who asks."""
    assert command("run", family.recipe()).returncode == 0
    (tmp_path / "file").write_text("")
    done = command("export", tmp_path / "output", "math", tmp_path / "file" / "x")
    assert done.returncode == 3
    assert done.stderr.startswith("error: the run failed: [Errno 17] File exists")
    assert "Traceback" not in done.stderr


def test_a_worker_that_dies_again_and_again_is_explained(tmp_path: Path) -> None:
    message = r"merge: layer 7: every worker that tried this block died, 4 of them"
    with open_engine(ClusterSection(kind="local", workers=1), Silent()) as engine, pytest.raises(ClusterError, match=message):
        engine.run("merge", die, [None], ["layer 7"])


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.dask_cluster.CONNECT_S", 1)
    with socket.socket() as closed:  # bound, not listening: nothing answers there
        closed.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
        message = rf"no Dask scheduler answers at {address} .* Start one there, or use --cluster local"
        with pytest.raises(ClusterError, match=message), open_engine(ClusterSection(address=address), Silent()):
            pass


def die(task: None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_output_folders_may_have_any_name(family: Family, tmp_path: Path) -> None:
    place = tmp_path / "out #2: [draft]"
    done = command("run", family.recipe(), "--output", place)
    assert done.returncode == 0, done.stderr
    assert command("verify", place).returncode == 0
    here = make_folder(tmp_path / "here")
    identity = here.stat().st_ino
    assert command("export", place, "math", ".", cwd=here).returncode == 0
    assert sorted(path.name for path in here.iterdir()) == ["config.json", "model.safetensors", "tokenizer_config.json"]
    assert here.stat().st_ino == identity  # the shell that stands here keeps standing here


def test_sources_are_shown_as_they_are(family: Family, tmp_path: Path) -> None:
    moved = tmp_path / "[a] [bold]"
    shutil.move(family.folder, moved)
    recipe = Family(moved, family.base, family.experts).recipe(output=str(tmp_path / "output"))
    assert command("run", recipe).returncode == 0
    assert "[a] [bold]/math" in command("inspect", tmp_path / "output").stdout


def test_an_expert_in_short_form_takes_a_weight(family: Family) -> None:
    assert command("run", family.recipe(), "--set", "experts.math.weight=2").returncode == 0
    found = command("inspect", family.folder.parent / "output", "--json")
    assert json.loads(found.stdout)["experts"]["math"]["weight"] == 2.0


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


HEAVY = {"torch", "dask", "distributed", "sklearn", "transformers", "prefect", "dask_ml"}


@pytest.mark.parametrize("verb", ["plan", "inspect", "verify", "pull", "export", "route", "clean"])
def test_light_verbs_import_no_heavy_packages(family: Family, tmp_path: Path, verb: str) -> None:
    recipe = family.recipe(router=router_of(family))
    assert command("run", recipe).returncode == 0
    output = str(tmp_path / "output")
    arguments = {
        "plan": [str(recipe)],
        "inspect": [output],
        "verify": [output],
        "pull": [output, str(tmp_path / "pulled"), "--expert", "math"],
        "export": [output, "math", str(tmp_path / "x")],
        "route": [output, "hello"],
        "clean": [str(recipe), "--days", "0", "--delete"],
    }[verb]
    program = (
        "import sys\nsys.argv = ['channel-merge', *sys.argv[1:]]\nfrom flows.cli import app\n"
        f"app(standalone_mode=False)\nprint('HEAVY', sorted(set(sys.modules) & set({sorted(HEAVY)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program, verb, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_command_line_knows_no_prefect() -> None:
    program = "import flows.cli, flows.run, pipeline.engine, sys; print('prefect' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare", "dare_ties", "slerp"])
def test_a_run_on_the_fused_path_needs_no_torch(family: Family, method: str) -> None:
    """Importing it takes longer than many a merge."""
    recipe = family.recipe(**{"merge.method": method, "merge.trim_scope": "row", "merge.groups": 3})
    program = (
        "import sys\nfrom pathlib import Path\nfrom flows.run import read_recipe, run_recipe\n"
        "from pipeline.engine import Silent\n"
        "run_recipe(read_recipe(Path(sys.argv[1])), Silent())\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(recipe)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("breakage", "code"), [(Family.recipe, 0), (another_shape, 2)])
def test_a_reader_that_leaves_changes_no_answer(family: Family, breakage: Breakage, code: int) -> None:
    """As ``channel-merge plan … | head -1`` does, which must not look like exit code 1, no."""
    line = [str(Path(sys.executable).parent / "channel-merge"), "plan", str(breakage(family))]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # long before it prints
        told = process.stderr.read()
    assert process.returncode == code
    assert "Broken pipe" not in told
    assert "Exception" not in told
    assert told.count("error: ") == (code != 0)


def test_an_interrupted_run_says_what_it_keeps_and_goes_on_from_there(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe()
    program = (  # the command, with a stage that waits to be interrupted after the experts are ingested
        "import signal, sys, time\nfrom flows import cli\nfrom pipeline.stages import waves\n"
        "def group(self):\n    while 'ingest written' not in self.moved:\n        time.sleep(0.1)\n"
        "    print('waiting', flush=True)\n"
        "    self.engine.run('wait', time.sleep, [0.1] * 1000, ['short'] * 1000)\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in the background of a shell it is ignored
        "    waves.Waves.group = group\n    sys.argv = ['channel-merge', 'run', sys.argv[1]]\n    cli.main()"
    )
    line = [sys.executable, "-c", program, str(recipe)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        told = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert [line for line in told if line.startswith("interrupted")] == [
        (
            f"interrupted: finished work is kept in {tmp_path / 'deltas'} and {tmp_path / 'output'}, "
            "and the next run goes on from there"
        )
    ]
    assert "Traceback" not in "".join(told)
    again = command("run", recipe)
    assert again.returncode == 0
    assert [line for line in again.stderr.splitlines() if line.startswith("ingest")] == ["ingest: nothing to do"]


def test_one_expert_is_one(family: Family, tmp_path: Path) -> None:
    done = command("run", family.recipe(experts={"math": "./math"}, **{"merge.groups": 1}))
    assert done.returncode == 0, done.stderr
    assert "stored for 1 expert of" in done.stdout
