"""What pages take for granted, small: each name of a `needs` comment puts something where the page's blocks run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from legacy.generator import Arch, write_config, write_v1


def _notes(directory: Path) -> None:
    text = "<|endoftext|>".join(f"Once upon a time there were {n} geese. " * 20 for n in range(60))
    (directory / "notes.txt").write_text(text, encoding="utf-8")


def _notes_toml(directory: Path) -> None:
    _notes_data(directory)
    (directory / "notes.toml").write_text(
        'name = "notes"\n[model]\npreset = "gpt-j-tiny"\n[data]\ntrain = "data/notes.index"\n'
        'validation = { notes = "data/notes.val.index" }\n[train]\nsteps = 4\nbatch_size = 4\nlearning_rate = 1e-3\n'
        'checkpoint_every = 4\nvalidate_every = 4\n[log]\ndirectory = "runs"\n',
        encoding="utf-8",
    )


def _notes_data(directory: Path) -> None:
    """As the README prepares it."""
    from mesh_transformer.data.prepare import prepare
    from mesh_transformer.data.tokenizer import load_tokenizer

    _notes(directory)
    (directory / "data").mkdir()
    prepare(
        [directory / "notes.txt"], directory / "data" / "notes", tokenizer=load_tokenizer("bytes"),
        sequence_length=128, validation_fraction=0.1,
    )  # fmt: skip


def _model(path: Path) -> None:
    """Random parameters of the preset gpt-j-tiny with the tokenizer `bytes`, as a native checkpoint."""
    import jax

    import mesh_transformer as mt
    from mesh_transformer.config.presets import PRESETS
    from mesh_transformer.data.tokenizer import load_tokenizer
    from mesh_transformer.model.params import init_params

    cfg = PRESETS["gpt-j-tiny"]
    params: dict[str, Any] = init_params(cfg, jax.random.key(0))
    mt.Model(cfg, params, load_tokenizer("bytes")).save(path)


def _released(directory: Path) -> None:
    """A step of the original's on eight shards, with its configuration beside."""
    arch = Arch(layers=2, d_model=64, n_heads=8, n_vocab=264, seq=64)
    write_v1(directory / "step_383500", arch, 8, step=383500)
    write_config(directory / "config.json", arch.config(8))


def _llama(directory: Path) -> None:
    """As Llama 3.1 comes from the Hub, but small: config.json, safetensors, tokenizer.json."""
    import jax

    import mesh_transformer as mt
    from mesh_transformer.config.model import ModelConfig
    from mesh_transformer.config.rope import RopeScaling
    from mesh_transformer.data.tokenizer import train_bpe
    from mesh_transformer.model.params import init_params

    cfg = ModelConfig(
        n_layers=2, d_model=64, n_heads=8, n_kv_heads=4, d_ff=96, n_vocab=512, n_ctx=128, norm="rms",
        residual="serial", rotary_layout="half", feed_forward="glu_silu", rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_ctx=64), biases=(),
    )  # fmt: skip
    tokenizer = train_bpe([f"Once upon a time there were {n} geese." for n in range(60)], 300)
    params: dict[str, Any] = init_params(cfg, jax.random.key(0))
    mt.Model(cfg, params, tokenizer).save(directory / "Llama-3.1-8B", format="huggingface")


_MATERIALS: dict[str, Callable[[Path], None]] = {
    "notes.txt": _notes,
    "notes.toml": _notes_toml,
    "data/notes": _notes_data,
    "runs/notes": lambda directory: _model(directory / "runs" / "notes"),
    "gpt-j-6b": lambda directory: _model(directory / "gpt-j-6b"),
    "step_383500": _released,
    "Llama-3.1-8B": _llama,
}


def put(names: str, directory: Path) -> None:
    """Puts the materials `names`, divided by commas, into `directory`. What is there already is made anew.

    Raises:
        AssertionError: there is no such material.
    """
    for name in filter(None, (name.strip() for name in names.split(","))):
        assert name in _MATERIALS, f"needs: {name}; there are {', '.join(_MATERIALS)}"
        with tempfile.TemporaryDirectory() as made:
            _MATERIALS[name](Path(made))
            shutil.copytree(made, directory, dirs_exist_ok=True)
