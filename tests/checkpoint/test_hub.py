"""Hub ids: what is asked of the Hub, and what is said where it gives nothing. No test here uses the network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from checkpoint import hf_cases
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.weights import assemble
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import abstract_params

CFG = ModelConfig(n_layers=1, d_model=8, n_heads=2, n_vocab=16, n_ctx=8)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Hub that has one repository; what is fetched of it lies in `tmp_path / "cache"`."""
    import jax

    params = jax.tree.map(lambda a: np.ones(a.shape, np.float32), abstract_params(CFG))
    params["embed"]["bias"][:] = 0
    hf_cases.write(tmp_path / "repository", CFG, params, {}, None)
    (tmp_path / "repository" / "pickled.py").write_text("nobody asked for this")
    calls: list[tuple[Any, ...]] = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repository, revision))
        if repository != "someone/gpt-j":
            raise LocalEntryNotFoundError("an error that\nhas several lines")
        there = tmp_path / "cache"
        there.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in (tmp_path / "repository").glob(pattern):
                shutil.copy(file, there)
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(("name", "revision"), [("someone/gpt-j", None), ("someone/gpt-j@float16", "float16")])
def test_a_hub_id(asked: list[Any], tmp_path: Path, name: str, revision: str | None) -> None:
    weights = open_weights(name)
    assert weights.cfg == CFG and set(asked) == {("someone/gpt-j", revision)}
    assert assemble(weights)["head"]["w"].all()
    assert not (tmp_path / "cache" / "pickled.py").exists()


def test_torch_files_are_fetched_only_where_there_are_no_others(asked: list[Any], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "pytorch_model.bin").write_bytes(b"large")
    open_weights("someone/gpt-j")
    assert not (tmp_path / "cache" / "pytorch_model.bin").exists()
    shutil.rmtree(tmp_path / "cache")
    (repository / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):  # it is fetched, and it is no model
        open_weights("someone/gpt-j")


def test_a_directory_comes_before_the_hub(asked: list[Any], tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "repository", tmp_path / "someone" / "gpt-j")
    assert open_weights("someone/gpt-j").where == Path("someone/gpt-j") and not asked


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing@main"])
def test_what_the_hub_does_not_have(asked: list[Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: there is no such file .* Hub does not give it") as raised:
        open_weights(name)
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../x", "/tmp/none/here", "a b/c", "a/b@"])
def test_what_is_no_hub_id_is_not_asked_for(asked: list[Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=r"there is no such file or directory$"):
        open_weights(name)
    assert not asked
