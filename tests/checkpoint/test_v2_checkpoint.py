"""The original's v2 checkpoints, read and written: every value against what the independent generator meant."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from checkpoint.v2_cases import ARCH, BFLOAT16, DTYPES, INTO, OUT_OF, STEP, Whole, edit_json, opened, rewrite, stored
from legacy.generator_v2 import LEAVES, TruthV2, write_v2
from mesh_transformer.checkpoint.legacy import v2, v2_files
from mesh_transformer.checkpoint.legacy.v2 import LegacyV2Weights, config_document
from mesh_transformer.checkpoint.weights import (
    Counters,
    InMemory,
    Piece,
    Weights,
    assemble,
    leaf_at,
    pieces,
    stored_bytes,
)
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.load import model_config_from_legacy
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model import decoder
from mesh_transformer.model.params import abstract_params, named_specs
from mesh_transformer.model.policy import ComputePolicy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TruthV2]:
    """A checkpoint that no test changes."""
    path = tmp_path_factory.mktemp("v2")
    return path, write_v2(path, ARCH)


@pytest.fixture
def model(made: tuple[Path, TruthV2], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made[0], tmp_path / "model"))


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("shards", [1, 4, 8])
def test_every_value_is_exact(tmp_path: Path, shards: int, hosts: int, dtype: str) -> None:
    arch = dataclasses.replace(ARCH, cores_per_replica=shards)
    truth = write_v2(tmp_path, arch, hosts=hosts, params_dtype=dtype, moments=dtype, seed=shards)
    weights = opened(tmp_path, arch)
    assert weights.cfg == model_config_from_legacy(arch.config())
    assert (weights.format, weights.step) == ("legacy-v2", 1201)
    assert weights.counters == Counters(adam=901, schedule=301)
    assert weights.kinds() == ("params", "mu", "nu")
    for kind in weights.kinds():
        expected, tree = getattr(truth, kind), assemble(weights, kind=kind)
        assert expected.keys() == named_specs(weights.cfg).keys()
        for path, values in expected.items():
            leaf = leaf_at(tree, path)
            assert weights.dtype_of(path, kind) == DTYPES[dtype] and leaf.dtype == DTYPES[dtype]
            np.testing.assert_array_equal(leaf.astype(np.float32), values, err_msg=f"{kind} {path}")


def test_logits_equal_the_reference_over_the_fused_arrays(
    made: tuple[Path, TruthV2], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "model")
    reference = importlib.import_module("reference_v2")
    names = ["embed.b", "embed.w", "final.offset", "final.scale", "head.b", "head.w"]
    names += ["norm.offset", "norm.scale", "in.b", "in.w", "out.b", "out.w"]
    arrays = dict(zip(names, made[1].fused.values(), strict=True))
    at = reference.Sizes(layers=3, d=64, heads=8, d_head=6, vocab=272, shards=4, rotary=4)
    rows = np.random.default_rng(1).integers(0, 272, (2, 9)).astype(np.int32)
    expected = np.stack([reference.forward(arrays, row, at) for row in rows])
    weights = opened(made[0])
    forward = jax.jit(
        lambda params, tokens: decoder.forward(params, tokens, weights.cfg, ComputePolicy(dtype="float32"))
    )
    got = forward(assemble(weights), rows)
    assert expected.std() > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_leaves_are_found_by_name_wherever_they_stand(model: Path, made: tuple[Path, TruthV2]) -> None:
    step, order = model / STEP, np.random.default_rng(5).permutation(12)
    names = [LEAVES[i].name for i in order]
    rewrite(step / "params/shard_0.npz", lambda a: [a[i] for i in order])
    rewrite(step / "opt_state/shard_0.npz", lambda a: [a[0], *(a[1 + i] for i in order), *a[13:]])
    opt_order = ["", *names, *(leaf.name for leaf in LEAVES), ""]
    edit_json(step / "meta.json", param_order=names, opt_order=opt_order)
    weights = opened(model)
    for kind in weights.kinds():
        tree = assemble(weights, kind=kind)
        for path, values in getattr(made[1], kind).items():
            np.testing.assert_array_equal(leaf_at(tree, path), values)


def test_without_optimizer_state(tmp_path: Path, made: tuple[Path, TruthV2]) -> None:
    write_v2(tmp_path, ARCH, moments=None)
    weights = opened(tmp_path)
    assert weights.counters is None and weights.kinds() == ("params",) and not weights.moment_dtypes
    weights = opened(made[0], eval_only=True)
    assert weights.counters is None and weights.kinds() == ("params",)


def test_dtypes_may_differ_from_leaf_to_leaf(model: Path, made: tuple[Path, TruthV2]) -> None:
    rewrite(model / STEP / "params/shard_0.npz", lambda a: [*a[:9], a[9].astype(np.float16), *a[10:]])
    weights = opened(model)
    assert weights.dtypes["layers/attn/k"] == np.float16 and weights.dtypes["layers/attn/o"] == np.float32
    expected = made[1].params["layers/attn/k"][2].astype(np.float16)
    np.testing.assert_array_equal(weights.read(Piece("layers/attn/k", 2)), expected)


def test_notes_tell_what_was_assumed(made: tuple[Path, TruthV2]) -> None:
    weights = opened(made[0])
    assert [note.split(" says")[0] for note in weights.notes] == ["cores_per_replica = 4 in config.json"]
    weights = opened(made[0], norm="rmsnorm", pe="fixed")
    assert weights.notes[1:] == (
        'norm = "rmsnorm" in config.json: not looked at, v2 always has "layernorm"',
        'pe = "fixed" in config.json: not looked at, v2 always has "rotary"',
    )
    loader = {"train_loader": {"used": [], "file_idx": 3}}
    weights = LegacyV2Weights(made[0] / STEP, ARCH.config(), "config.json", loader)
    assert weights.extras == loader and weights.where == made[0] / STEP


# ------------------------------------------------------------------------------------------------ memory


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every read of values."""
    sizes: list[int] = []
    preadv = v2_files.os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        sizes.append(preadv(descriptor, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(v2_files.os, "preadv", counted)
    return sizes


@pytest.mark.parametrize("hosts", [1, 2])
def test_one_piece_reads_one_layer(tmp_path: Path, bytes_read: list[int], hosts: int) -> None:
    truth = write_v2(tmp_path, ARCH, moments=None, hosts=hosts)
    one_layer = truth.fused[INTO][0].nbytes
    weights = opened(tmp_path)
    assert not bytes_read  # nothing at opening
    weights.read(Piece("layers/mlp/w_gate", 1))
    assert bytes_read == [one_layer // hosts] * hosts
    for path in ("attn/q", "attn/v", "attn/k", "mlp/w_in"):
        weights.read(Piece(f"layers/{path}", 1))
    assert sum(bytes_read) == one_layer  # the rest came out of the same one
    weights.read(Piece("layers/mlp/w_gate", 2))
    assert sum(bytes_read) == 2 * one_layer


def test_in_its_order_and_in_the_common_one_all_is_read_once(made: tuple[Path, TruthV2], bytes_read: list[int]) -> None:
    weights = opened(made[0])
    assert sorted(map(str, weights.order())) == sorted(map(str, pieces(weights.cfg)))
    for kind, order in (("mu", weights.order()), ("nu", pieces(weights.cfg))):
        bytes_read.clear()
        for piece in order:
            weights.read(piece, kind)
        kept = [weights._last[name].row for name in (INTO, OUT_OF)]
        assert [row.shape for row in kept] == [(64, 656), (304, 64)]  # one layer of each
        assert sum(bytes_read) == stored_bytes(weights, [kind])


def test_checksums_are_compared_once_also_from_many_threads(
    made: tuple[Path, TruthV2], monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[int] = []
    verify = v2_files.NpzFile.verify
    wanted = [Piece(path, i) for i in range(3) for path in ("layers/attn/q", "layers/attn/o", "layers/mlp/w_in")]
    weights = opened(made[0])
    monkeypatch.setattr(v2_files.NpzFile, "verify", lambda self, i: (verified.append(i), verify(self, i)))
    with ThreadPoolExecutor(8) as pool:
        for piece, values in zip(wanted * 4, pool.map(weights.read, wanted * 4), strict=True):
            np.testing.assert_array_equal(values, made[1].params[piece.path][piece.layer])
    assert sorted(verified) == [9, 11]


def test_what_is_read_is_the_callers_own(made: tuple[Path, TruthV2]) -> None:
    for arch in (ARCH, dataclasses.replace(ARCH, cores_per_replica=1)):
        weights = opened(made[0], arch)
        for path in ("layers/attn/q", "layers/attn/o", "layers/mlp/b_in", "layers/ln_1/scale"):
            first = weights.read(Piece(path, 0))
            kept = first.copy()
            first[...] = 0
            np.testing.assert_array_equal(weights.read(Piece(path, 0)), kept)


# ------------------------------------------------------------------------------------------------ writing


def written(target: Path, weights: Weights, **options: Any) -> tuple[Path, int]:
    """Writes the step directory that `opened` finds under `target`, and how many bytes it was told of."""
    told: list[int] = []
    (target / STEP).mkdir(parents=True)
    chosen = {"dtype": None, "with_optimizer": weights.counters is not None} | options
    v2.write_v2(target / STEP, weights, progress=told.append, **chosen)
    return target / STEP, sum(told)


@pytest.mark.parametrize("moments", ["float32", "bfloat16", None])
@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_round_trip_gives_identical_arrays(
    tmp_path: Path, params_dtype: str, moments: str | None, in_memory: bool
) -> None:
    write_v2(tmp_path / "a", ARCH, params_dtype=params_dtype, moments=moments)
    weights = opened(tmp_path / "a")
    step, n_bytes = written(tmp_path / "b", Whole(weights) if in_memory else weights)
    assert n_bytes == stored_bytes(weights, weights.kinds())
    old = tmp_path / "a" / STEP
    assert json.loads((step / "meta.json").read_text()) == json.loads((old / "meta.json").read_text())
    files = sorted(path.relative_to(old) for path in old.rglob("*.*"))
    assert files == sorted(path.relative_to(step) for path in step.rglob("*.*"))
    for file in files:
        if file.suffix == ".npz":
            for a, b in zip(stored(old / file), stored(step / file), strict=True):
                assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def test_two_hosts_become_one(tmp_path: Path, made: tuple[Path, TruthV2]) -> None:
    write_v2(tmp_path / "a", ARCH, hosts=2)
    weights = opened(tmp_path / "a")
    step, _ = written(tmp_path / "b", weights)
    for name in ("params/shard_0.npz", "opt_state/shard_0.npz"):
        for a, b in zip(stored(made[0] / STEP / name), stored(step / name), strict=True):
            np.testing.assert_array_equal(a, b)


def test_other_dtypes_are_rounded_once(tmp_path: Path, made: tuple[Path, TruthV2]) -> None:
    weights = opened(made[0])
    options = {"dtype": BFLOAT16, "moment_dtype": BFLOAT16}
    written(tmp_path, weights, **options)
    weights = opened(tmp_path)
    for kind in weights.kinds():
        tree = assemble(weights, kind=kind)
        for path, values in getattr(made[1], kind).items():
            leaf = leaf_at(tree, path)
            assert leaf.dtype == BFLOAT16
            np.testing.assert_array_equal(leaf, values.astype(BFLOAT16))


def test_parts_of_different_dtypes_share_the_widest(tmp_path: Path, made: tuple[Path, TruthV2]) -> None:
    weights = opened(made[0])
    params = assemble(weights, BFLOAT16)
    params["layers"]["attn"]["k"] = params["layers"]["attn"]["k"].astype(np.float32) + np.float32(1e-7)
    written(tmp_path, InMemory(weights.cfg, params))
    again = opened(tmp_path)
    assert again.step == 0 and again.counters is None and not (tmp_path / STEP / "opt_state").exists()
    fused = {path: dtype for path, dtype in again.dtypes.items() if dtype == np.float32}
    assert sorted(fused) == [f"layers/attn/{name}" for name in "kqv"] + ["layers/mlp/w_gate", "layers/mlp/w_in"]
    tree = assemble(again)
    for path in named_specs(again.cfg):
        values = leaf_at(tree, path)
        np.testing.assert_array_equal(values.astype(np.float32), leaf_at(params, path).astype(np.float32))


V2 = {"n_layers": 1, "d_model": 64, "n_heads": 8, "n_vocab": 24, "n_ctx": 8, "architecture": "v2", "n_shards": 4}


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"architecture": "v1", "n_shards": 0}, "model.architecture = 'v1'"),
        ({"d_ff": 128}, "model.d_ff = 128"),
        ({"norm_eps": 1e-6}, "model.norm_eps = 1e-06"),
    ],
)
def test_what_v2_cannot_hold_is_refused(tmp_path: Path, fields: dict[str, Any], wrong: str) -> None:
    cfg = ModelConfig(**V2 | fields)
    params = zeros(cfg)
    with pytest.raises(ConfigError, match=f"^{wrong} cannot be written as a v2 checkpoint"):
        v2.write_v2(tmp_path, InMemory(cfg, params), dtype=None, with_optimizer=False)
    with pytest.raises(ConfigError, match=f"^{wrong}"):
        config_document(cfg)
    assert not list(tmp_path.iterdir())


def zeros(cfg: ModelConfig, dtype: Any = np.float32) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), abstract_params(cfg))


def test_what_cannot_be_written_is_refused(tmp_path: Path, made: tuple[Path, TruthV2]) -> None:
    cfg = ModelConfig(**V2)
    bare = InMemory(cfg, zeros(cfg))
    with pytest.raises(ConfigError, match="holds no optimizer state"):
        v2.write_v2(tmp_path, bare, dtype=None, with_optimizer=True)
    with pytest.raises(ConfigError, match=r"params cannot be written in float64 .*float32, bfloat16, float16"):
        v2.write_v2(tmp_path, InMemory(cfg, zeros(cfg, np.float64)), dtype=None, with_optimizer=False)
    weights = opened(made[0])
    with pytest.raises(ConfigError, match="moments cannot be written in float16"):
        v2.write_v2(tmp_path, weights, dtype=None, with_optimizer=True, moment_dtype=np.dtype(np.float16))
    assert not list(tmp_path.iterdir())
    bare._params["head"]["w"][3, 3] = 1e5
    with pytest.raises(ConfigError, match="linear/w: a value is too large for float16"):
        v2.write_v2(tmp_path, bare, dtype=np.dtype(np.float16), with_optimizer=False)


@pytest.mark.parametrize("fields", [{}, {"d_head": 6, "d_rotary": 4}, {"n_shards": 1, "d_rotary": 16}])
def test_configuration_document_gives_the_same_architecture(fields: dict[str, Any]) -> None:
    cfg = ModelConfig(**V2 | fields)
    document = json.loads(json.dumps(config_document(cfg)))
    assert model_config_from_legacy(document) == cfg
    assert (document["d_head"], document["cores_per_replica"]) == (cfg.d_head, cfg.n_shards)
