"""Any configuration that is written as TOML reads back equal."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_transformer.config.load import load_run_config, to_toml
from mesh_transformer.config.model import Norm
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.config.run import DataConfig, LogConfig, MeshConfig, RunConfig, TrainConfig

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
AWKWARD = st.sampled_from(['"', "\\", "\x7f", "\x01\x1f\b\t\n\f\r\r\n", "é\u2028\ufeff😀\U0010ffff", "'''", "#=[]{}."])
STRING = TEXT | AWKWARD | st.builds("".join, st.lists(TEXT | AWKWARD, min_size=1, max_size=3))
PATH = STRING.map("/".__add__)
FORBIDDEN = {*map(chr, range(32)), "/", "|", "\\", "\x7f"}  # in the name of a run
RATE = st.floats(0, allow_infinity=False, allow_nan=False)
COUNT = st.integers(1, 2**31 - 1)


@st.composite
def run_configs(draw) -> RunConfig:
    base = draw(st.sampled_from(list(PRESETS.values())))
    norm = draw(st.sampled_from(Norm.__args__))
    # What only rotary positions have, and shared heads, which t5 has not, stay with the presets that have them.
    turns = base.rotary_layout != "interleaved" or base.n_kv_heads != base.n_heads
    position = "rotary" if turns else draw(st.sampled_from(["rotary", "fixed", "t5"]))
    eps = draw(st.floats(0, allow_infinity=False, exclude_min=True))
    model = dataclasses.replace(base, norm=norm, position=position, norm_eps=eps, d_ff=draw(COUNT))
    tokenizer = draw(st.sampled_from([None, "gpt2", "bytes"]) | PATH)
    validation = draw(st.dictionaries(STRING, PATH, max_size=3))
    length = draw(st.integers(1, model.n_ctx))
    accumulation = draw(st.integers(1, 1000))
    dtype = st.sampled_from(["float32", "bfloat16"])
    return RunConfig(
        name=draw(STRING.filter(lambda text: not set(text) & FORBIDDEN and text not in "..")),
        seed=draw(st.integers(0, 2**32 - 1)),
        model=model,
        data=DataConfig(train=draw(PATH), validation=validation, tokenizer=tokenizer, sequence_length=length),
        train=TrainConfig(
            steps=draw(COUNT),
            batch_size=accumulation * draw(st.integers(1, 1000)),
            gradient_accumulation=accumulation,
            learning_rate=draw(RATE),
            end_learning_rate=draw(RATE),
            warmup_steps=draw(COUNT | st.just(0)),
            anneal_steps=draw(COUNT | st.just(0)),
            weight_decay=draw(RATE),
            clip_norm=draw(RATE.filter(bool)),
            z_loss=draw(RATE),
            z_loss_kind=draw(st.sampled_from(["legacy", "log_partition"])),
            compute_dtype=draw(st.none() | dtype),
            param_dtype=draw(dtype),
            moment_dtype=draw(dtype),
            remat=draw(st.sampled_from(["none", "dots", "full"])),
            validate_every=draw(COUNT | st.just(0)),
            validation_batches=draw(COUNT),
            checkpoint_every=draw(COUNT),
            keep_every=draw(COUNT | st.just(0)),
            keep_last=draw(COUNT),
        ),
        mesh=MeshConfig(data=draw(st.sampled_from([-1, 1]))),
        log=LogConfig(directory=draw(PATH.filter(lambda path: "://" not in path))),
    )


@pytest.fixture(scope="module")
def scratch_file(tmp_path_factory):
    return tmp_path_factory.mktemp("round_trip") / "config.toml"


@settings(max_examples=150, derandomize=True, deadline=None)
@given(config=run_configs())
def test_toml_round_trip(scratch_file, config):
    scratch_file.write_bytes(to_toml(config).encode())
    read, notes = load_run_config(scratch_file)
    assert read == config and notes == []
    assert to_toml(read) == to_toml(config)
