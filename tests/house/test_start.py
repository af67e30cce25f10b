"""What starting costs: nothing heavy is imported before it is needed, and the core needs few packages at all."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

# This project, and the command line's library with all that it imports itself to read a command's options.
LIGHT = {"mesh_transformer", "typer", "click", "annotated_doc", "shellingham", "typing_extensions"}
LIGHT |= {"pydantic", "pydantic_core", "annotated_types", "typing_inspection"}
COMMANDS = [(), ("demo",), ("prepare",), ("train",), ("generate",), ("convert",), ("inspect",), ("bench",)]
COMMANDS += [("serve",), ("bench", "train"), ("launch",), ("evaluate",), ("report",), ("doctor",), ("plan",)]
COMMANDS += [("tpu",), ("tpu", "create"), ("tpu", "status"), ("tpu", "run"), ("tpu", "delete")]

RUN_MAIN = """
import json, sys
from mesh_transformer.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["mesh-transformer", *words]
    try:
        main()
    except SystemExit as ended:
        print(json.dumps([ended.code, sorted({name.split(".")[0] for name in sys.modules})]))
"""

# Of what is installed, only the packages named are there.
BLOCK = """
import json, sys
ALLOWED = {"mesh_transformer", "jax", "jaxlib", "numpy", "optax", "safetensors", *json.loads(sys.argv[1])}
class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        there = top in ALLOWED or top in sys.stdlib_module_names or top.startswith("_")
        return self.finder.find_spec(name, path, target) if there else None
sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def installed_modules() -> frozenset[str]:
    """Top-level modules of all installed packages, but for those that this environment loads at every start."""
    always = python("import sys; print(*{name.split('.')[0] for name in sys.modules})").split()
    return frozenset(importlib.metadata.packages_distributions()) - {*always}


@functools.cache
def helps() -> dict[tuple[str, ...], tuple[list[str], str]]:
    """The help of every command, and what stands behind it; one process shows all, so that modules add up."""
    told = python(RUN_MAIN, json.dumps([[*command, "--help"] for command in COMMANDS])).splitlines()
    ends = [i for i, line in enumerate(told) if line.startswith("[0, [") or line.startswith("[2, [")]
    begins = [0, *(end + 1 for end in ends)]
    assert len(ends) == len(COMMANDS)
    return {c: (told[begin:end], told[end]) for c, begin, end in zip(COMMANDS, begins, ends, strict=False)}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    text, last = helps()[command]
    status, modules = json.loads(last)
    assert status == 0
    assert text[0].startswith(f"Usage: mesh-transformer {' '.join(command)}".rstrip())
    heavy = set(modules) & installed_modules() - LIGHT
    assert not heavy


def test_what_is_heavy_would_be_seen() -> None:
    assert {"jax", "numpy", "rich", "grain", "tokenizers", "orbax"} <= installed_modules() - LIGHT
    *_, last = python("import numpy" + RUN_MAIN, '[["--help"]]').splitlines()
    assert "numpy" in json.loads(last)[1]


def test_every_command_is_looked_at() -> None:
    from mesh_transformer.cli.main import app

    commands = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert commands == {command[0] for command in COMMANDS if command}


def test_the_installed_command_tells_its_version() -> None:
    script = Path(sys.executable).with_name("mesh-transformer")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    for package in ("mesh-transformer", "jax", "jaxlib", "numpy"):
        assert f"{package} {importlib.metadata.version(package)}" in lines
    assert lines[-1].startswith("this jax is ")


def test_the_version_says_whether_this_jax_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh_transformer import compat

    monkeypatch.setattr(compat, "TESTED_JAX", (importlib.metadata.version("jax"), "0.1"))
    assert compat.version_report().endswith("this jax is tested")
    monkeypatch.setattr(compat, "TESTED_JAX", ("0.1", "0.2"))
    assert compat.version_report().endswith("this jax is not tested; tested: 0.1, 0.2")


def test_importing_the_package_is_light() -> None:
    found = python(
        "import sys, mesh_transformer as mt; assert mt.__version__; assert 'load' in dir(mt)\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    assert not set(found.split()) & installed_modules() - {"mesh_transformer"}


def needs_of_jax() -> list[str]:
    """Modules of the packages that jax, optax and safetensors themselves require."""
    names: set[str] = set()
    todo = ["jax", "optax", "safetensors"]
    while todo:
        name = todo.pop()
        for requirement in importlib.metadata.requires(name) or []:
            needed = requirement.split(";")[0].split("[")[0].strip()
            for mark in "<>=!~ (":
                needed = needed.split(mark)[0]
            if "extra ==" not in requirement and needed not in names:
                names.add(needed)
                todo.append(needed)
    modules = importlib.metadata.packages_distributions()
    return [module for module, owners in modules.items() if names & {owner.lower() for owner in owners}]


@pytest.mark.parametrize(
    "statements",
    [
        "import mesh_transformer.model.decoder, mesh_transformer.model.loss",
        "import mesh_transformer.bench.train, mesh_transformer.bench.ours",
        "import mesh_transformer.checkpoint.huggingface, mesh_transformer.checkpoint.digest",
        # Not imported only: the training step is traced.
        "import jax\n"
        "import mesh_transformer.bench.ours\n"
        "from mesh_transformer.config.model import ModelConfig\n"
        "from mesh_transformer.config.run import TrainConfig\n"
        "from mesh_transformer.model.policy import default_policy\n"
        "from mesh_transformer.train.state import initial_state\n"
        "from mesh_transformer.train.step import make_train_step\n"
        "model = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=32, n_ctx=8)\n"
        "train = TrainConfig(steps=2, learning_rate=1e-3, batch_size=2)\n"
        "step = make_train_step(model, train, default_policy())\n"
        "rows = jax.ShapeDtypeStruct((1, 2, 9), 'int32')\n"
        "assert jax.eval_shape(lambda rows: step(initial_state(model, train, 0), rows)[1], rows).loss.shape == ()",
    ],
)
def test_the_core_needs_only_jax_numpy_optax_and_safetensors(statements: str) -> None:
    python(BLOCK + statements, json.dumps(needs_of_jax()))


@pytest.mark.parametrize("name", ["grain", "tokenizers", "typer", "jaxtyping", "orbax.checkpoint", "matplotlib"])
def test_the_block_blocks(name: str) -> None:
    assert name.split(".")[0] not in needs_of_jax()
    code = f"{BLOCK}\ntry:\n    import {name}\nexcept ModuleNotFoundError:\n    print('absent')"
    assert python(code, json.dumps(needs_of_jax())) == "absent\n"
