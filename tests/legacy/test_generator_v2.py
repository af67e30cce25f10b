"""The generator of v2 checkpoints against docs/formats.md, section 8, read back with NumPy alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from legacy import npz
from legacy.generator_v2 import ArchV2, write_v2

NAMES = [
    "/embed/embedding_shard_v2/~/linear/b",
    "/embed/embedding_shard_v2/~/linear/w",
    "/proj/projection/~/layer_norm/offset",
    "/proj/projection/~/layer_norm/scale",
    "/proj/projection/~/linear/b",
    "/proj/projection/~/linear/w",
    "/transformer/transformer_layer_shard_v2/~/layer_norm/offset",
    "/transformer/transformer_layer_shard_v2/~/layer_norm/scale",
    "/transformer/transformer_layer_shard_v2/~/linear/b",
    "/transformer/transformer_layer_shard_v2/~/linear/w",
    "/transformer/transformer_layer_shard_v2/~/linear_1/b",
    "/transformer/transformer_layer_shard_v2/~/linear_1/w",
]
# H * dh = 48 differs from d = 64; 4 groups: loc = 12, f = 64.
ARCH = ArchV2(layers=3, d_model=64, n_heads=8, d_head=6, n_vocab=272, cores_per_replica=4, pe_rotary_dims=4)


def read(path: Path) -> list[np.ndarray]:
    with np.load(path) as file:
        found = [file[f"arr_{i}"] for i in range(len(file.files))]
    return [npz.from_bfloat16_bits(a.view(np.uint16)) if a.dtype == np.dtype("V2") else a for a in found]


def test_files_metadata_and_shapes(tmp_path: Path) -> None:
    write_v2(tmp_path, ARCH, step=7, adam_count=5, schedule_count=6, config=True)
    assert json.loads((tmp_path / "meta.json").read_text()) == {"step": 7, "checkpoints": [7], "aux": {"7": {}}}
    assert json.loads((tmp_path / "step_7" / "meta.json").read_text()) == {
        "total_hosts": 1,
        "step": 7,
        "param_order": NAMES,
        "opt_order": ["", *NAMES, *NAMES, ""],
    }
    params = read(tmp_path / "step_7" / "params" / "shard_0.npz")
    fused = 3 * 48 + 8 * 64
    shapes = [(64,), (272, 64), (64,), (64,), (272,), (64, 272), (3, 64), (3, 64)]
    shapes += [(3, fused), (3, 64, fused), (3, 64), (3, 48 + 256, 64)]
    assert [a.shape for a in params] == shapes and {a.dtype for a in params} == {np.dtype("<f4")}
    state = read(tmp_path / "step_7" / "opt_state" / "shard_0.npz")
    assert [a.shape for a in state] == [(), *shapes, *shapes, ()]
    assert (state[0], state[25]) == (5, 6) and state[0].dtype == state[25].dtype == np.int32
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == ARCH.config() and (config["d_head"], config["cores_per_replica"]) == (6, 4)


def test_a_second_step_joins_the_first(tmp_path: Path) -> None:
    for step in (7, 9):
        write_v2(tmp_path, ARCH, step=step, seed=step)
    assert json.loads((tmp_path / "meta.json").read_text())["checkpoints"] == [7, 9]


def test_columns_and_rows_of_the_fused_matrices_by_hand(tmp_path: Path) -> None:
    truth = write_v2(tmp_path, ARCH, step=1)
    stored = dict(zip(NAMES, read(tmp_path / "step_1" / "params" / "shard_0.npz"), strict=True))
    assert truth.fused.keys() == stored.keys()
    assert all(np.array_equal(truth.fused[name], stored[name]) for name in stored)
    layer = "/transformer/transformer_layer_shard_v2/~"
    w, b, out = stored[f"{layer}/linear/w"], stored[f"{layer}/linear/b"], stored[f"{layer}/linear_1/w"]
    # The third of four groups, each of 3 * 12 + 2 * 64 = 164 columns: q, v, k, linear, gate; 12 + 64 = 76 rows.
    at = 2 * 164
    p = truth.params
    for name, start in (("q", at), ("v", at + 12), ("k", at + 24)):
        assert np.array_equal(p[f"layers/attn/{name}"][:, :, 2], w[:, :, start : start + 12]), name
        assert np.array_equal(p[f"layers/attn/b_{name}"][:, 2], b[:, start : start + 12]), name
    for name, start in (("in", at + 36), ("gate", at + 100)):
        assert np.array_equal(p[f"layers/mlp/w_{name}"][:, :, 128:192], w[:, :, start : start + 64]), name
        assert np.array_equal(p[f"layers/mlp/b_{name}"][:, 128:192], b[:, start : start + 64]), name
    assert np.array_equal(p["layers/attn/o"][:, 2], out[:, 152:164])
    assert np.array_equal(p["layers/mlp/w_out"][:, 128:192], out[:, 164:228])
    assert np.array_equal(p["layers/mlp/b_out"], stored[f"{layer}/linear_1/b"])
    assert np.array_equal(p["layers/ln_1/scale"], stored[f"{layer}/layer_norm/scale"])
    assert np.array_equal(p["head/ln/bias"], stored["/proj/projection/~/layer_norm/offset"])
    assert np.array_equal(p["embed/bias"], stored["/embed/embedding_shard_v2/~/linear/b"])
    assert p["layers/attn/q"].shape == (3, 64, 4, 12) and p["layers/attn/o"].shape == (3, 4, 12, 64)
    assert sum(a.size for a in p.values()) == sum(a.size for a in stored.values())


@pytest.mark.parametrize("moments, dtype", [("float32", "<f4"), ("bfloat16", "V2")])
def test_dtypes(tmp_path: Path, moments: str, dtype: str) -> None:
    truth = write_v2(tmp_path, ARCH, step=1, moments=moments, params_dtype="bfloat16")
    with np.load(tmp_path / "step_1" / "params" / "shard_0.npz") as file:
        assert {file[name].dtype for name in file.files} == {np.dtype("V2")}
    with np.load(tmp_path / "step_1" / "opt_state" / "shard_0.npz") as file:
        assert file["arr_13"].dtype == np.dtype(dtype)
    state = read(tmp_path / "step_1" / "opt_state" / "shard_0.npz")
    for tree, stored in ((truth.fused_mu, state[1:13]), (truth.fused_nu, state[13:25])):
        assert all(np.array_equal(tree[name], a) for name, a in zip(NAMES, stored, strict=True))
    assert (truth.nu["head/w"] > 0).all() and (truth.mu["head/w"] < 0).any()
    assert np.array_equal(truth.mu["layers/mlp/w_gate"][:, :, 64:128], state[10][:, :, 164 + 100 : 2 * 164])


def test_without_moments(tmp_path: Path) -> None:
    truth = write_v2(tmp_path, ARCH, step=1, moments=None)
    assert truth.mu is None and truth.nu is None and truth.counters == {"step": 1}
    assert sorted(p.name for p in (tmp_path / "step_1").iterdir()) == ["meta.json", "params"]


def test_blocks_of_two_hosts_by_hand(tmp_path: Path) -> None:
    # 16 devices, 4 groups: 4 replicas. Host 0 has replicas 0 and 1, so of each group's 4 blocks the first two.
    truth = write_v2(tmp_path, ARCH, step=1, hosts=2)
    hosts = [read(tmp_path / "step_1" / "params" / f"shard_{h}.npz") for h in range(2)]
    assert json.loads((tmp_path / "step_1" / "meta.json").read_text())["total_hosts"] == 2
    positions = [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    axes = {1: 0, 5: 1, 9: 2, 11: 1}
    for i, name in enumerate(NAMES):
        whole = truth.fused[name]
        for h in range(2):
            if i not in axes:
                assert np.array_equal(hosts[h][i], whole), name
                continue
            size = whole.shape[axes[i]] // 16
            own = np.concatenate([np.arange(p * size, (p + 1) * size) for p in positions[h]])
            assert np.array_equal(hosts[h][i], whole.take(own, axis=axes[i])), name
    state = read(tmp_path / "step_1" / "opt_state" / "shard_1.npz")
    assert state[2].shape == (136, 64) and state[0].shape == state[25].shape == ()
