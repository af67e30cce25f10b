"""The original's v1 shards: every value against what the independent generator meant, and the logits they give."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from v1_cases import SMALL, is_truth, refused

from legacy.generator import NORMS, POSITIONS, Arch, Truth, write_config, write_v1
from legacy.npz import Member, write_npz
from mesh_transformer.checkpoint.legacy.finding import open_legacy
from mesh_transformer.checkpoint.legacy.layout import place_of
from mesh_transformer.checkpoint.weights import Kind, Piece, Weights, assemble, nested, pieces
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model import decoder
from mesh_transformer.model.params import count_params, named_specs
from mesh_transformer.model.policy import ComputePolicy

SHARDS = (8, 4, 1)
VARIANTS = ("full", "slim", "slim_f16")
ARCHITECTURES = [(norm, position) for norm in NORMS for position in POSITIONS]
COMBINATIONS = list(itertools.product(SHARDS, VARIANTS))
TOKENS = np.array([[3, 41, 0, 17, 41, 5, 47]], np.int32)


def arch_of(norm: str, position: str) -> Arch:
    return Arch(layers=11, d_model=32, n_vocab=48, seq=16, norm=norm, pe=position)


def made(at: Path, arch: Arch, shards: int, **options: Any) -> tuple[Weights, Truth]:
    """A step directory with its configuration beside it, opened."""
    truth = write_v1(at, arch, shards, **options)
    write_config(at / "config.json", arch.config(shards))
    return open_legacy(at), truth


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The slow model in NumPy."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "model")
    return importlib.import_module("reference")


def compiled(cfg: ModelConfig) -> Any:
    """The float32 program that all variants of an architecture share."""
    return jax.jit(lambda params, rows: decoder.forward(params, rows, cfg, ComputePolicy(dtype="float32")))


def check_logits(step: Path, norm: str, position: str, combinations: list[tuple[int, str]], reference: Any) -> None:
    """Our float32 logits of the stored weights against float64 ones of the truth."""
    arch, forward = arch_of(norm, position), None
    d_rotary = 4 if position == "rotary" else 0
    how = reference.Arithmetic(norm=norm, position=position, d_rotary=d_rotary, eps=1e-5)
    for shards, variant in combinations:
        at = step / f"{shards}-{variant}"
        weights, truth = made(at, arch, shards, variant=variant, style="unequal", seed=shards)
        is_truth(weights, truth)
        forward = forward or compiled(weights.cfg)
        got = np.asarray(forward(assemble(weights, np.float32), TOKENS))[0]
        expected = reference.forward(nested(truth.params), TOKENS[0], how)
        assert expected.std() > 0.5
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4, err_msg=f"{shards} {variant}")


# ------------------------------------------------------------------------------------------------ the whole matrix


# Every norm and every position; all pairs of them in the full count.
MATRIX = [
    pytest.param(i, norm, position, marks=() if i % 3 == i // 3 % 3 else pytest.mark.long)
    for i, (norm, position) in enumerate(ARCHITECTURES)
]


@pytest.mark.parametrize(("n", "norm", "position"), MATRIX)
def test_every_value_is_exact(tmp_path: Path, n: int, norm: str, position: str) -> None:
    for shards, variant in COMBINATIONS:
        style = "trained" if shards == 4 else "unequal"
        weights, truth = made(
            tmp_path / f"{shards}-{variant}", arch_of(norm, position), shards, variant=variant, style=style, seed=shards
        )
        assert (weights.format, weights.cfg.norm, weights.cfg.position) == ("legacy", norm, position)
        assert weights.kinds() == (("params", "mu", "nu") if variant == "full" else ("params",))
        assert not weights.notes
        assert sum(values.size for values in truth.params.values()) == count_params(weights.cfg)
        # Moments on one number of shards for each architecture; on every one in the long count.
        is_truth(weights, truth, moments=shards == SHARDS[n % 3])


@pytest.mark.parametrize(("n", "norm", "position"), [(i, *at) for i, at in enumerate(ARCHITECTURES)])
def test_logits_equal_the_reference(tmp_path: Path, n: int, norm: str, position: str, reference: Any) -> None:
    # One combination of shards and variant for each architecture, and every combination more than once.
    check_logits(tmp_path, norm, position, [COMBINATIONS[n % len(COMBINATIONS)]], reference)


@pytest.mark.long
@pytest.mark.parametrize(("norm", "position"), ARCHITECTURES)
def test_logits_of_the_whole_matrix(tmp_path: Path, norm: str, position: str, reference: Any) -> None:
    check_logits(tmp_path, norm, position, COMBINATIONS, reference)


# ------------------------------------------------------------------------------------------------ how shards combine


@pytest.mark.parametrize("style", ["trained", "unequal"])
@pytest.mark.parametrize("early_cast", [False, True])
def test_by_name_and_not_by_value(tmp_path: Path, style: str, early_cast: bool) -> None:
    weights, truth = made(tmp_path / "step_7", SMALL, 8, style=style, early_cast=early_cast, step=7)
    is_truth(weights, truth)
    assert weights.main_dtype.name == ("bfloat16" if early_cast else "float32")
    # A sum has more digits than its terms.
    assert weights.dtype_of("layers/mlp/b_out").name == weights.dtype_of("embed/bias").name == "float32"


def test_freshly_initialised_shards(tmp_path: Path) -> None:
    """All biases zero and all scales one: by their values they could be anything."""
    arch = SMALL
    step = tmp_path / "step_0"
    made(step, arch, 8, variant="full")
    for file in step.rglob("*.npz"):
        with np.load(file) as found:
            arrays = [found[f"arr_{i}"] for i in range(len(found.files))]
        arrays = [np.zeros_like(a) if a.ndim == 1 else a for a in arrays]
        write_npz(file, [Member(a, a.dtype.str) for a in arrays])
    weights = open_legacy(step)
    for piece in pieces(weights.cfg):
        if piece.path.endswith(("bias", "b_in", "b_out", "/b", "scale")):
            assert not weights.read(piece).any()
        else:
            assert weights.read(piece).any()


def test_a_bias_of_negative_zeros_keeps_its_sign(tmp_path: Path) -> None:
    """A float16 copy of a tiny negative bias is -0.0 on every shard, and so is the sum."""
    step = tmp_path / "step_1"
    weights, _ = made(step, SMALL, 4, variant="slim_f16")
    i = next(i for i, leaf in enumerate(weights._leaves) if leaf.piece == Piece("layers/mlp/b_out", 3))  # type: ignore[attr-defined]
    file, member = place_of(i, len(weights._leaves))  # type: ignore[attr-defined]
    for shard in range(4):
        path = step / f"shard_{shard}" / f"{file}.npz"
        with np.load(path) as found:
            arrays = [found[f"arr_{k}"] for k in range(len(found.files))]
        arrays[member] = np.full_like(arrays[member], -0.0)
        write_npz(path, [Member(a, a.dtype.str) for a in arrays])
    assert np.signbit(open_legacy(step).read(Piece("layers/mlp/b_out", 3))).all()


def test_norms_that_each_shard_has_of_its_own(tmp_path: Path) -> None:
    arch = arch_of("layernorm-desync", "rotary")
    weights, truth = made(tmp_path / "equal", arch, 8)
    is_truth(weights, truth)
    weights, truth = made(tmp_path / "alone", arch, 1, desync_unequal=True)
    is_truth(weights, truth)
    message = refused(
        lambda: made(tmp_path / "unequal", arch, 8, variant="slim", desync_unequal=True),
        *("shard_1/", "layer_norm/", "differs from shard_0's", "layernorm-desync"),
    )
    assert "no one model" in message


def test_an_offset_that_the_original_never_reads_is_not_read(tmp_path: Path) -> None:
    weights, truth = made(tmp_path / "a", arch_of("layernorm-nobias", "rotary"), 4, style="unequal")
    assert "layers/ln_1/bias" not in named_specs(weights.cfg) and "layers/ln_1/bias" not in truth.params
    same, _ = made(tmp_path / "b", arch_of("layernorm", "rotary"), 4, style="unequal")
    assert same.read(Piece("layers/ln_1/bias", 0)).any()
    is_truth(weights, truth)


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", ["params", "mu", "nu"])
def test_one_piece_reads_one_layer(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, truth = made(tmp_path / "step_1", SMALL, 4, style="unequal")
    from mesh_transformer.checkpoint.legacy.npz import NpzFile

    read: list[int] = []
    original = NpzFile.read_into

    def counted(self: NpzFile, i: int, out: np.ndarray) -> None:
        read.append(out.nbytes)
        original(self, i, out)

    monkeypatch.setattr(NpzFile, "read_into", counted)
    for layer in (10, 2):
        read.clear()
        values = weights.read(Piece("layers/attn/v", layer), kind)
        assert values.tobytes() == getattr(truth, kind)["layers/attn/v"][layer].tobytes()
        assert sum(read) == values.nbytes and len(read) == 4


def test_its_order_is_that_of_the_files_and_whole(tmp_path: Path) -> None:
    weights, _ = made(tmp_path / "step_1", SMALL, 4, variant="slim")
    order = weights.order()
    assert sorted(order, key=repr) == sorted(pieces(weights.cfg), key=repr)
    layers = [piece.layer for piece in order if piece.path == "layers/attn/q"]
    assert layers == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]


def test_counters_are_three_of_their_own(tmp_path: Path) -> None:
    weights, truth = made(tmp_path / "s", SMALL, 8, step=0, adam_count=5, schedule_count=123456789)
    assert truth.counters == {"step": 0, "adam": 5, "schedule": 123456789}
    is_truth(weights, truth)
