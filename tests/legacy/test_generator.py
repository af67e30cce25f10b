"""The generator of v1 checkpoints against facts counted by hand from docs/formats.md; read by zipfile and NumPy."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from legacy import npz
from legacy.generator import NORMS, POSITIONS, Arch, leaves, pieces, write_model_directory, write_v1

GPTJ = Arch(layers=28, d_model=4096, n_heads=16, n_vocab=50400, seq=2048, pe_rotary_dims=64)
ONE = Arch(layers=1)  # 16 parameters


def read_shard(directory: Path) -> list[np.ndarray]:
    """All leaves of a shard; bfloat16 as float32."""
    found = []
    for p in range(16):
        with np.load(directory / f"{p}.npz") as file:
            found += [file[f"arr_{i}"] for i in range(len(file.files))]
    return [npz.from_bfloat16_bits(a.view(np.uint16)) if a.dtype == np.dtype("V2") else a for a in found]


def read_shards(step: Path, shards: int) -> list[np.ndarray]:
    """Leaf by leaf, all shards stacked."""
    assert sorted(p.name for p in step.iterdir()) == sorted(f"shard_{s}" for s in range(shards))
    return [np.stack(of) for of in zip(*(read_shard(step / f"shard_{s}") for s in range(shards)), strict=True)]


def names(arch: Arch) -> list[str]:
    return [f"{leaf.module}/{leaf.name}".removeprefix("causal_transformer_shard/~/") for leaf in leaves(arch)]


def test_counts_and_split_of_gptj() -> None:
    assert len(leaves(GPTJ)) == 286
    assert [len(piece) for piece in pieces(3 * 286 + 3)] == [54] * 13 + [53] * 3
    assert [len(piece) for piece in pieces(287)] == [18] * 15 + [17]
    assert [i for piece in pieces(287) for i in piece] == list(range(287))


@pytest.mark.parametrize("pe, more", [("rotary", 0), ("fixed", 1), ("t5", 1)])
@pytest.mark.parametrize(
    "norm, per_layer, outside",
    [("layernorm", 10, 6), ("layernorm-nobias", 10, 6), ("layernorm-desync", 10, 6)]
    + [("rmsnorm", 9, 5), ("rmsnorm-bias", 10, 6), ("scalenorm", 9, 5), ("scalenorm-bias", 10, 6)],
)
def test_counts_of_every_norm_and_position(norm: str, per_layer: int, outside: int, pe: str, more: int) -> None:
    assert len(leaves(Arch(layers=12, norm=norm, pe=pe))) == 12 * per_layer + outside + more


def test_shapes_of_gptj() -> None:
    shapes = dict(zip(names(GPTJ), (leaf.shard_shape(8) for leaf in leaves(GPTJ)), strict=True))
    assert {name: shapes[name] for name in shapes if not name.startswith("layer_")} == {
        "embedding_shard/~/linear/b": (4096,),
        "embedding_shard/~/linear/w": (6300, 4096),
        "projection_shard/~/linear/b": (6300,),
        "projection_shard/~/linear/w": (4096, 6300),
        "projection_shard/~/replicated_layer_norm/offset": (4096,),
        "projection_shard/~/replicated_layer_norm/scale": (4096,),
    }
    assert {name.removeprefix("layer_27/~/"): shapes[name] for name in shapes if name.startswith("layer_27/")} == {
        "linear/w": (4096, 512),
        "linear_1/w": (4096, 512),
        "linear_2/w": (4096, 512),
        "linear_3/w": (512, 4096),
        "linear_4/b": (2048,),
        "linear_4/w": (4096, 2048),
        "linear_5/b": (4096,),
        "linear_5/w": (2048, 4096),
        "replicated_layer_norm/offset": (4096,),
        "replicated_layer_norm/scale": (4096,),
    }
    # GPT-J's 6,050,882,784 parameters and the embedding bias, which Hugging Face does not have.
    assert sum(math.prod(leaf.shape) for leaf in leaves(GPTJ)) == 6_050_882_784 + 4096


def test_order_is_that_of_strings() -> None:
    modules = list(dict.fromkeys(name.split("/")[0] for name in names(Arch(pe="t5"))))
    assert modules == [
        *("embedding_shard", "layer_0", "layer_1", "layer_10", "layer_11", "layer_2", "layer_3", "layer_4", "layer_5"),
        *("layer_6", "layer_7", "layer_8", "layer_9", "projection_shard", "relative_position_embs"),
    ]
    assert names(Arch(pe="fixed", norm="rmsnorm"))[:4] == [
        *("embedding_shard/pos_embs", "embedding_shard/~/linear/b", "embedding_shard/~/linear/w"),
        "layer_0/~/linear/w",
    ]
    # layer_norm sorts before linear, rms_norm after it.
    assert names(Arch(norm="layernorm-desync"))[2:4] == ["layer_0/~/layer_norm/offset", "layer_0/~/layer_norm/scale"]
    assert names(Arch(norm="rmsnorm-bias"))[10:12] == ["layer_0/~/rms_norm/offset", "layer_0/~/rms_norm/scale"]


def test_q_v_k_in_the_order_of_the_modules() -> None:
    found = {name: leaf.path for name, leaf in zip(names(ONE), leaves(ONE), strict=True)}
    assert found["layer_0/~/linear/w"] == "layers/attn/q"
    assert found["layer_0/~/linear_1/w"] == "layers/attn/v"
    assert found["layer_0/~/linear_2/w"] == "layers/attn/k"


def test_bytes_of_a_slim_file(tmp_path: Path) -> None:
    write_v1(tmp_path / "step_9", Arch(), 8, variant="slim", step=9)
    assert {p.name for p in (tmp_path / "step_9" / "shard_7").iterdir()} == {f"{p}.npz" for p in range(16)}
    with zipfile.ZipFile(tmp_path / "step_9" / "shard_7" / "0.npz") as archive:
        assert archive.testzip() is None
        # 127 leaves: 15 files of 8, then one of 7.
        assert archive.namelist() == [f"arr_{i}.npy" for i in range(8)]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        raw = archive.read("arr_1.npy")
    assert raw.startswith(b"\x93NUMPY\x01\x00\x76\x00{'descr': '<V2', 'fortran_order': False, 'shape': (33, 64), }")
    assert len(raw) == 128 + 2 * 33 * 64 and raw[127:128] == b"\n"
    with zipfile.ZipFile(tmp_path / "step_9" / "shard_7" / "15.npz") as archive:
        assert archive.namelist()[-1] == "arr_6.npy"
        raw = archive.read("arr_6.npy")
    assert b"'descr': '<i4', 'fortran_order': False, 'shape': (), }" in raw and raw[128:] == b"\x09\x00\x00\x00"


def test_long_files_have_members_beyond_ten_in_zip_order(tmp_path: Path) -> None:
    write_v1(tmp_path / "step_1", Arch(layers=12), 1)
    with zipfile.ZipFile(tmp_path / "step_1" / "shard_0" / "0.npz") as archive:
        # 3 * 126 + 3 = 381 leaves: 13 files of 24, then 3 of 23.
        assert archive.namelist() == [f"arr_{i}.npy" for i in range(24)]


def test_fewer_leaves_than_files_leave_an_empty_zip(tmp_path: Path) -> None:
    write_v1(tmp_path / "step_1", Arch(layers=1, norm="rmsnorm"), 1, variant="slim")  # 9 + 5 + 1 leaves
    sizes = [(tmp_path / "step_1" / "shard_0" / f"{p}.npz").stat().st_size for p in range(16)]
    assert sizes[15] == 22 and min(sizes[:15]) > 22
    with np.load(tmp_path / "step_1" / "shard_0" / "15.npz") as file:
        assert file.files == []


@pytest.mark.parametrize(
    "variant, dtype, limit", [("full", "<f4", 0), ("slim", "V2", 2**-8), ("slim_f16", "<f2", 2**-11)]
)
def test_dtypes_and_rounding(tmp_path: Path, variant: str, dtype: str, limit: float) -> None:
    truth = write_v1(tmp_path / "step_1", ONE, 2, variant=variant)
    exact = write_v1(tmp_path / "step_2", ONE, 2).params
    with np.load(tmp_path / "step_1" / "shard_1" / "14.npz") as file:
        assert {file[name].dtype for name in file.files} == {np.dtype(dtype)}
    assert truth.params.keys() == exact.keys()
    for path, values in truth.params.items():
        assert values.dtype == np.float32
        # The smallest float16 have fewer bits: their steps are 2^-24.
        error = np.maximum(np.abs(values - exact[path]) - (2**-25 if variant == "slim_f16" else 0), 0)
        error /= np.abs(exact[path])
        assert error.max() <= limit and (error.max() > limit / 4 or variant == "full"), path
    assert (truth.mu is None) == (truth.nu is None) == (variant != "full")


def test_the_whole_values_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    one = write_v1(tmp_path / "step_1", ONE, 1)
    eight = write_v1(tmp_path / "step_8", ONE, 8)
    for ours, theirs in ((one.params, eight.params), (one.mu, eight.mu), (one.nu, eight.nu)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[path], theirs[path]) for path in ours)


@pytest.mark.parametrize("style", ["trained", "unequal"])
def test_every_leaf_of_a_full_checkpoint_by_hand(tmp_path: Path, style: str) -> None:
    truth = write_v1(tmp_path / "step_5", ONE, 4, style=style, step=5, adam_count=6, schedule_count=7)
    stored = read_shards(tmp_path / "step_5", 4)
    assert len(stored) == 51
    for i, value in ((0, 6), (33, 7), (50, 5)):
        assert stored[i].dtype == np.int32 and stored[i].tolist() == [value] * 4
    assert truth.counters == {"step": 5, "adam": 6, "schedule": 7}
    for tree, of, summed in (
        (truth.mu, stored[1:17], 1),
        (truth.nu, stored[17:33], 1),
        (truth.params, stored[34:50], 4),
    ):
        expected = {
            "embed/bias": of[0].astype(np.float64).sum(0) / (4 / summed),
            "embed/tokens": np.concatenate(of[1], 0),
            "layers/attn/q": np.concatenate(of[2], 1).reshape(1, 64, 8, 8),
            "layers/attn/v": np.concatenate(of[3], 1).reshape(1, 64, 8, 8),
            "layers/attn/k": np.concatenate(of[4], 1).reshape(1, 64, 8, 8),
            "layers/attn/o": np.concatenate(of[5], 0).reshape(1, 8, 8, 64),
            "layers/mlp/b_in": np.concatenate(of[6], 0)[None],
            "layers/mlp/w_in": np.concatenate(of[7], 1)[None],
            "layers/mlp/b_out": of[8].astype(np.float64).sum(0)[None] / (4 / summed),
            "layers/mlp/w_out": np.concatenate(of[9], 0)[None],
            "layers/ln_1/bias": of[10][0][None],
            "layers/ln_1/scale": of[11][0][None],
            "head/b": np.concatenate(of[12], 0),
            "head/w": np.concatenate(of[13], 1),
            "head/ln/bias": of[14][0],
            "head/ln/scale": of[15][0],
        }
        assert tree.keys() == expected.keys()
        for path, values in expected.items():
            assert np.array_equal(tree[path], values.astype(np.float32)), path
    assert (truth.nu["embed/bias"] > 0).all() and (truth.mu["embed/bias"] < 0).any()


def test_copies_of_a_trained_checkpoint_and_of_an_unequal_one(tmp_path: Path) -> None:
    write_v1(tmp_path / "trained", ONE, 4, style="trained", variant="slim")
    write_v1(tmp_path / "unequal", ONE, 4, style="unequal", variant="slim")
    trained, unequal = read_shards(tmp_path / "trained", 4), read_shards(tmp_path / "unequal", 4)
    for i in (0, 8):  # summed biases
        assert trained[i].all() and unequal[i].all()
        assert (trained[i] == trained[i][0]).all()
        assert len({tuple(row) for row in unequal[i].tolist()}) == 4
    for i, initial in ((10, 0), (11, 1), (14, 0), (15, 1)):  # layernorms
        assert (trained[i][1:] == initial).all() and (trained[i][0] != initial).any()
        assert (unequal[i][1:] != initial).any() and not np.array_equal(unequal[i][0], unequal[i][1])


def test_moments_of_copies(tmp_path: Path) -> None:
    write_v1(tmp_path / "step_1", ONE, 4, style="unequal")
    stored = read_shards(tmp_path / "step_1", 4)
    for tree in (1, 17):
        for i in (0, 8):
            assert (stored[tree + i] == stored[tree + i][0]).all() and stored[tree + i].all()
        for i in (10, 11, 14, 15):
            assert stored[tree + i][0].all() and not stored[tree + i][1:].any()


@pytest.mark.parametrize("pe", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_other_norms_and_positions(tmp_path: Path, norm: str, pe: str) -> None:
    arch = Arch(layers=2, norm=norm, pe=pe)
    truth = write_v1(tmp_path / "step_1", arch, 4, style="unequal")
    stored = dict(zip(names(arch), read_shards(tmp_path / "step_1", 4)[-len(leaves(arch)) - 1 : -1], strict=True))
    module = {"rms": "rms_norm", "sca": "rms_norm"}.get(norm[:3], "replicated_layer_norm")
    module = "layer_norm" if norm.endswith("desync") else module
    width = () if norm.startswith("scale") else (64,)
    scale = stored[f"layer_1/~/{module}/scale"]
    assert scale.shape == (4, *width) and truth.params["layers/ln_1/scale"].shape == (2, *width)
    assert np.array_equal(truth.params["layers/ln_1/scale"][1], scale[0])
    assert (scale == scale[0]).all() == (module != "replicated_layer_norm")
    has_bias = norm not in ("rmsnorm", "scalenorm", "layernorm-nobias")
    assert ("head/ln/bias" in truth.params) == ("layers/ln_1/bias" in truth.mu) == has_bias
    assert (f"layer_1/~/{module}/offset" in stored) == (has_bias or norm == "layernorm-nobias")
    assert ("embed/positions" in truth.params) == (pe == "fixed")
    assert ("relative/bias" in truth.params) == (pe == "t5")
    if pe == "fixed":
        assert stored["embedding_shard/pos_embs"].shape == (4, 32, 16)
        expected = np.concatenate(stored["embedding_shard/pos_embs"], 1)
        assert np.array_equal(truth.params["embed/positions"], expected)
    if pe == "t5":
        assert stored["relative_position_embs/rel_embedding"].shape == (4, 2, 32)
        expected = np.concatenate(stored["relative_position_embs/rel_embedding"], 0)
        assert np.array_equal(truth.params["relative/bias"], expected)


def test_unused_offsets_and_unmergeable_norms(tmp_path: Path) -> None:
    arch = Arch(layers=1, norm="layernorm-nobias")
    write_v1(tmp_path / "trained", arch, 2, variant="slim")
    write_v1(tmp_path / "unequal", arch, 2, variant="slim", style="unequal")
    assert not read_shards(tmp_path / "trained", 2)[10].any()
    assert read_shards(tmp_path / "unequal", 2)[10].all()
    arch = dataclasses.replace(arch, norm="layernorm-desync")
    truth = write_v1(tmp_path / "desync", arch, 2, desync_unequal=True)
    assert not any("ln" in path.split("/")[-2] for tree in (truth.params, truth.mu, truth.nu) for path in tree)
    scale = read_shards(tmp_path / "desync", 2)[36 + 1]
    assert scale.shape == (2, 64) and not np.array_equal(scale[0], scale[1])


def test_early_cast_is_bfloat16_with_float32_moments(tmp_path: Path) -> None:
    cast = write_v1(tmp_path / "step_1", ONE, 2, early_cast=True)
    slim = write_v1(tmp_path / "step_2", ONE, 2, variant="slim")
    assert all(np.array_equal(cast.params[path], slim.params[path]) for path in slim.params)
    with np.load(tmp_path / "step_1" / "shard_0" / "0.npz") as file:
        assert [file[name].dtype for name in file.files] == [np.int32] + [np.float32] * 3
    with np.load(tmp_path / "step_1" / "shard_0" / "15.npz") as file:
        assert [file[name].dtype for name in file.files] == [np.dtype("V2"), np.dtype("V2"), np.int32]
    assert ONE.config(2, early_cast=True)["early_cast"] is True and "early_cast" not in ONE.config(2)


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 0.0, 2**-140], np.float32)
    expected = [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -1.0, 0.0, 0.0]
    assert npz.from_bfloat16_bits(npz.bfloat16_bits(values)).tolist()[:6] == expected[:6]
    many = np.random.default_rng(0).standard_normal(10_000, np.float32)
    assert np.array_equal(npz.bfloat16_bits(many), many.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_model_directory(tmp_path: Path) -> None:
    aux = {20: {"used": ["a.tfrecords"], "file_idx": 3}}
    truths = write_model_directory(tmp_path / "model", ONE, 2, [10, 20, 20], aux=aux, config=True)
    text = (tmp_path / "model" / "meta.json").read_text()
    assert json.loads(text) == {
        "step": 20,
        "checkpoints": [10, 20, 20],
        "aux": {"10": {}, "20": {"train_loader": {"used": ["a.tfrecords"], "file_idx": 3}}},
    }
    assert text.count('"20"') == 2
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == ONE.config(2)
    assert list(truths) == [10, 20] and truths[20].counters["step"] == 20
    assert not np.array_equal(truths[10].params["head/w"], truths[20].params["head/w"])
    assert read_shards(tmp_path / "model" / "step_20", 2)[-1].tolist() == [20, 20]
    write_model_directory(tmp_path / "slim", ONE, 2, [10], variant="slim")
    assert [p.name for p in (tmp_path / "slim").iterdir()] == ["step_10"]


def test_equal_calls_write_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_v1(tmp_path / name, ONE, 2, style="unequal")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.npz"))
    assert len(files) == 32
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in files)
