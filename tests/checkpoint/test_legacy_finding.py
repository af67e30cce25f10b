"""Where a checkpoint of the original's is looked for, and what its shapes say where no configuration lies beside it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from v1_cases import LOADER, TINY, is_truth, refused

import mesh_transformer as mt
from legacy.generator import NORMS, POSITIONS, Arch, Truth, write_config, write_meta, write_model_directory, write_v1
from mesh_transformer.checkpoint.legacy.files import ShardFiles
from mesh_transformer.checkpoint.legacy.finding import looks_legacy
from mesh_transformer.checkpoint.legacy.layout import N_FILES, count_in_file, leaves
from mesh_transformer.checkpoint.legacy.npz import Member, NpzFile
from mesh_transformer.checkpoint.legacy.v1 import LegacyWeights
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.load import model_config_from_legacy
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.model.params import count_params

REST = {"n_heads": 8, "pe_rotary_dims": 4, "norm": "layernorm", "seq": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """A bare slim step directory, to be copied."""
    path = tmp_path_factory.mktemp("bare")
    return path / "step_1201", write_v1(path / "step_1201", TINY, 4, variant="slim")


@pytest.fixture
def step(made: tuple[Path, Truth], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "model" / "step_1201"))


def told(step: Path, **options: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return open_weights(step, report=notes.append, **options), notes


# ------------------------------------------------------------------------------------------------ directories


def test_a_bare_step_directory(step: Path, made: tuple[Path, Truth]) -> None:
    write_config(step.parent / "config.json", TINY.config(4))
    assert looks_legacy(step)
    weights, notes = told(step)
    assert weights.where == step and weights.n_shards == 4 and not notes and not weights.extras
    is_truth(weights, made[1])
    assert open_weights(step, step=1201).step == 1201
    refused(lambda: open_weights(step, step=7), str(step), "holds step 1201, not 7")


def test_a_model_directory(tmp_path: Path) -> None:
    model = tmp_path / "model"
    # 30 was saved after 100: fine-tuning counts from the start. Saved twice, it is listed twice.
    truths = write_model_directory(model, TINY, 4, [20, 100, 30, 30], aux={30: LOADER}, config=True)
    assert looks_legacy(model)
    latest = open_weights(model)
    assert latest.where == model / "step_30" and latest.extras == {"train_loader": LOADER}
    is_truth(latest, truths[30])
    for step in (20, 100):
        weights = open_weights(model, step=step)
        is_truth(weights, truths[step])
        assert not weights.extras
    refused(lambda: open_weights(model, step=21), str(model / "step_21"), "missing; steps there: 20, 30, 100")
    shutil.rmtree(model / "step_30")
    refused(lambda: open_weights(model), str(model / "step_30"), "missing; steps there: 20, 100")


def test_a_slim_model_directory_has_no_meta(tmp_path: Path) -> None:
    truths = write_model_directory(tmp_path / "a", TINY, 4, [9, 100, 20], variant="slim", config=True)
    assert not (tmp_path / "a" / "meta.json").exists()
    weights = open_weights(tmp_path / "a")
    is_truth(weights, truths[100])
    is_truth(open_weights(tmp_path / "a", step=9), truths[9])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"checkpoints": 5}', '{"checkpoints": ["5"]}', '{"checkpoints": [true]}', "\xff"]
)
def test_a_damaged_meta_is_named(step: Path, text: str) -> None:
    write_config(step.parent / "config.json", TINY.config(4))
    meta = step.parent / "meta.json"
    meta.write_bytes(text.encode("latin-1"))
    refused(lambda: open_weights(step.parent), str(meta), "give the step directory itself")
    assert open_weights(step).step == 1201


def test_a_meta_that_lists_nothing(tmp_path: Path) -> None:
    tmp_path.joinpath("model").mkdir()
    write_meta(tmp_path / "model" / "meta.json", [])
    refused(lambda: open_weights(tmp_path / "model"), str(tmp_path / "model" / "meta.json"), "lists no checkpoint")


@pytest.mark.parametrize("aux", ["5", '{"1201": 5}', "{}"])
def test_extras_that_are_none(step: Path, aux: str) -> None:
    write_config(step.parent / "config.json", TINY.config(4))
    (step.parent / "meta.json").write_text(f'{{"step": 1201, "checkpoints": [1201], "aux": {aux}}}')
    assert not open_weights(step.parent).extras


# ------------------------------------------------------------------------------------------------ configurations


def put(directory: Path, arch: Arch = TINY, name: str = "config.json") -> str:
    write_config(directory / name, arch.config(4))
    return str(directory / name)


OTHER = dataclasses.replace(TINY, n_heads=4)


def test_the_nearest_configuration_is_taken(step: Path) -> None:
    put(step.parent, name="6B_roto_256.json")
    assert open_weights(step).cfg.n_heads == 8
    # What is no configuration of the original's does not count.
    (step.parent / "other.json").write_text('{"layers": 5}')
    (step.parent / "broken.json").write_text("{")
    (step.parent / "list.json").write_text("[1]")
    assert open_weights(step).cfg.n_heads == 8
    put(step, OTHER)
    assert open_weights(step).cfg.n_heads == 4


def test_several_configurations(step: Path) -> None:
    put(step.parent, name="a.json")
    given = put(step.parent, OTHER, name="b.json")
    refused(lambda: open_weights(step), str(step.parent), "a.json, b.json", "--config")
    assert open_weights(step, config=given).cfg.n_heads == 4
    put(step.parent)  # config.json is the one that this project writes
    assert open_weights(step).cfg.n_heads == 8


@pytest.mark.parametrize("whole", [True, False])
def test_a_json_that_is_given(step: Path, tmp_path: Path, whole: bool, made: tuple[Path, Truth]) -> None:
    put(step.parent, OTHER)
    given = tmp_path / "given.json"
    given.write_text(json.dumps(TINY.config(4) if whole else REST))
    weights, notes = told(step, config=str(given))
    assert weights.cfg == model_config_from_legacy(TINY.config(4)) and not notes
    is_truth(weights, made[1])


def test_a_toml_that_is_given(step: Path, tmp_path: Path, made: tuple[Path, Truth]) -> None:
    given = tmp_path / "given.toml"
    fields = "n_layers = 2\nd_model = 32\nn_heads = 8\nn_vocab = 48\nn_ctx = 16\nd_rotary = 4\n"
    given.write_text(f"[model]\n{fields}")
    weights = open_weights(step, config=str(given))
    assert weights.cfg == model_config_from_legacy(TINY.config(4))
    is_truth(weights, made[1])
    given.write_text("[train]\nsteps = 5\n")
    refused(lambda: open_weights(step, config=str(given)), str(given), "[model]", error=ConfigError)
    given.write_text(f"[model]\n{fields}".replace("n_layers = 2", "n_layers = 3"))
    refused(lambda: open_weights(step, config=str(given)), str(given), "layers = 3", "2")


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "{"), ("a.json", "[]"), ("a.toml", "[model"), ("none.json", None)]
)
def test_a_given_file_that_is_no_configuration(step: Path, tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(lambda: open_weights(step, config=str(tmp_path / name)), name, error=ConfigError)


def test_a_damaged_config_beside_is_named(step: Path) -> None:
    (step.parent / "config.json").write_text('{"layers": 2,')
    refused(lambda: open_weights(step), str(step.parent / "config.json"), "damaged", "--config")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("layers", 3, "2"),
        ("d_model", 64, "32"),
        ("n_vocab", 264, "48"),
        ("pe", "fixed", "'rotary'"),
        ("norm", "rmsnorm", "layernorm"),
        ("norm", "layernorm-desync", "layernorm"),
        ("cores_per_replica", 8, "4 shards"),
    ],
)
def test_a_key_that_the_shapes_contradict(step: Path, key: str, value: Any, expected: str) -> None:
    write_config(step.parent / "config.json", TINY.config(4) | {key: value})
    refused(lambda: open_weights(step), str(step.parent / "config.json"), f"{key} = {value!r}", expected)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"n_heads": 6}, ["n_heads"]),
        ({"n_heads": 2}, ["4 shards do not divide", "n_heads = 2"]),
        ({"n_heads": "8"}, ["n_heads"]),
        ({"n_heads": 0}, ["n_heads"]),
        ({"pe_rotary_dims": 5}, ["rotary"]),
        ({"pe_rotary_dims": 8}, ["rotary"]),
        ({"norm": "batchnorm"}, ["norm = 'batchnorm'"]),
        ({"seq": -1}, ["seq"]),
        ({"layers": [2]}, ["layers"]),
        ({"d_head": 8}, ["d_head", "v2"]),
    ],
)
def test_a_configuration_that_cannot_be(step: Path, keys: dict[str, Any], names: list[str]) -> None:
    write_config(step.parent / "config.json", TINY.config(4) | keys)
    refused(lambda: open_weights(step), str(step.parent / "config.json"), *names)


def test_a_context_that_the_positions_contradict(tmp_path: Path) -> None:
    arch = dataclasses.replace(TINY, pe="fixed")
    write_v1(tmp_path / "step_1", arch, 4, variant="slim")
    write_config(tmp_path / "step_1" / "config.json", arch.config(4) | {"seq": 2048})
    refused(lambda: open_weights(tmp_path / "step_1"), "config.json", "seq = 2048", "16")


def test_heads_that_the_relative_positions_contradict(tmp_path: Path) -> None:
    arch = dataclasses.replace(TINY, pe="t5")
    write_v1(tmp_path / "step_1", arch, 4, variant="slim")
    write_config(tmp_path / "step_1" / "config.json", arch.config(4) | {"n_heads": 4})
    refused(lambda: open_weights(tmp_path / "step_1"), "config.json", "n_heads = 4", "8")


# ------------------------------------------------------------------------------------------------ shapes alone


class Described(ShardFiles):
    """Headers without data: every counter is 383500, and everything else zero."""

    def __init__(self, cfg: ModelConfig, n_shards: int, *, with_optimizer: bool, dtype: str = "float32") -> None:
        self.n_shards = n_shards
        in_order = leaves(cfg, with_optimizer=with_optimizer)
        every = [
            Member(leaf.shard_shape(n_shards), np.dtype(np.int32 if leaf.param is None else dtype)) for leaf in in_order
        ]
        files, at = [], 0
        for file in range(N_FILES):
            n = count_in_file(file, len(every))
            files.append(every[at : at + n])
            at += n
        self.members = [files] * n_shards

    def open(self, shard: int, file: int) -> NpzFile:
        described = self.members[shard][file]

        class Zeros:
            def read(self, i: int) -> np.ndarray:
                is_counter = described[i].dtype == np.int32
                return np.full(described[i].shape, 383500 if is_counter else 0, described[i].dtype)

        return Zeros()  # type: ignore[return-value]

    def name(self, shard: int, file: int) -> str:
        return f"shard_{shard}/{file}.npz"


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_the_shapes_of_gpt_j_are_enough(with_optimizer: bool) -> None:
    files = Described(preset("gpt-j-6b"), 8, with_optimizer=with_optimizer)
    counts = [len(file) for file in files.members[0]]
    assert counts == ([54] * 13 + [53] * 3 if with_optimizer else [18] * 15 + [17])
    weights = LegacyWeights(Path("step_383500"), files, {})
    assert weights.cfg == preset("gpt-j-6b") and weights.n_shards == 8 and weights.step == 383500
    assert count_params(weights.cfg) == 6_050_882_784 + 4096  # the embedding bias, which Hugging Face has not
    (note,) = weights.notes
    for part in ("GPT-J-6B", "n_heads = 16", "pe_rotary_dims = 64", "seq = 2048", "norm = layernorm", "--config"):
        assert part in note
    told = LegacyWeights(Path("s"), files, {"n_heads": 32, "pe_rotary_dims": 32, "seq": 1024}, "given.json")
    assert (told.cfg.n_heads, told.cfg.d_rotary, told.cfg.n_ctx) == (32, 32, 1024)


@pytest.mark.parametrize("n_shards", [1, 4])
def test_the_shapes_of_gpt_j_on_other_numbers_of_shards(n_shards: int) -> None:
    weights = LegacyWeights(Path("step_1"), Described(preset("gpt-j-6b"), n_shards, with_optimizer=False), {})
    assert weights.cfg == preset("gpt-j-6b")


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_what_shapes_tell(norm: str, position: str) -> None:
    arch = Arch(layers=12, d_model=64, n_heads=8, n_vocab=264, seq=40, norm=norm, pe=position)
    cfg = model_config_from_legacy(arch.config(4))
    # Nothing tells these apart; the original's default is taken.
    same_shapes = {"layernorm-nobias": "layernorm", "rmsnorm-bias": "layernorm"}
    for n_shards in (8, 4, 2, 1):
        for with_optimizer in (True, False):
            files = Described(cfg, n_shards, with_optimizer=with_optimizer)
            found = LegacyWeights(Path("step_1"), files, {"norm": norm, "n_heads": 8, "pe_rotary_dims": 4, "seq": 40})
            assert found.cfg == cfg and (found.counters is not None) == with_optimizer
            partly = LegacyWeights(Path("step_1"), files, {"n_heads": 8, "pe_rotary_dims": 4})
            assert partly.cfg.norm == same_shapes.get(norm, norm) or norm == "rmsnorm-bias"
            assert partly.cfg.n_ctx == (40 if position == "fixed" else 2048)
            assert (partly.cfg.n_layers, partly.cfg.d_model, partly.cfg.n_vocab) == (12, 64, 264)


def test_otherwise_the_missing_keys_are_asked_for(step: Path) -> None:
    message = refused(lambda: open_weights(step), str(step), "n_heads and pe_rotary_dims", "--config FILE")
    for known in ("layers = 2", "d_model = 32", "n_vocab = 48", "pe = rotary"):
        assert known in message


def test_what_was_assumed_is_told(step: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    given.write_text('{"n_heads": 8}')
    weights, (note,) = told(step, config=str(given))
    assert weights.cfg.n_ctx == 2048 and weights.cfg.d_rotary == 4
    assert str(step) in note and "seq = 2048" in note and "norm = layernorm" in note


def test_shapes_that_no_architecture_has() -> None:
    cfg = model_config_from_legacy(TINY.config(4))

    def changed(change: Callable[[list[Member]], Any]) -> NoReturn:
        files = Described(cfg, 4, with_optimizer=False)
        shard = [list(file) for file in files.members[0]]
        files.members = [shard] * 4
        change([*shard])  # type: ignore[list-item]
        LegacyWeights(Path("step_1"), files, REST)
        raise AssertionError

    refused(lambda: changed(lambda shard: shard[3].clear()), "step_1", "no architecture of the original")  # type: ignore[attr-defined]
    float32 = np.dtype(np.float32)
    refused(
        lambda: changed(lambda shard: shard[0].__setitem__(1, Member((5, 7, 9), float32))),  # type: ignore[attr-defined]
        *("step_1", "no architecture of the original"),
    )


# ------------------------------------------------------------------------------------------------ the tokenizer


@pytest.mark.parametrize("beside", [True, False])
def test_a_tokenizer_beside_the_model(tmp_path: Path, beside: bool) -> None:
    arch = dataclasses.replace(TINY, n_vocab=264)
    step = tmp_path / "model" / "step_3"
    write_v1(step, arch, 2, variant="slim", step=3)
    write_config(step.parent / "config.json", arch.config(2))
    assert open_weights(step).tokenizer() is None
    stored = load_tokenizer("bytes").to_bytes()
    ((step.parent if beside else step) / "tokenizer.json").write_bytes(stored)
    assert open_weights(step).tokenizer() == open_weights(step.parent).tokenizer() == stored
    model = mt.load(step)
    assert model.tokenizer is not None and model.tokenizer.encode("hi") == [104, 105]
