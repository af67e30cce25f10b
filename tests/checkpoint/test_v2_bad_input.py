"""v2 checkpoints that are damaged, incomplete or of another model: what is wrong is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.v2_cases import ARCH, INTO, OUT_OF, STEP, edit_json, opened, rewrite, stored
from legacy.generator_v2 import LEAVES, TruthV2, write_v2
from mesh_transformer.checkpoint.legacy.v2 import LegacyV2Weights
from mesh_transformer.checkpoint.weights import Piece
from mesh_transformer.config.errors import CheckpointError, ConfigError, UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TruthV2]:
    """A checkpoint that no test changes."""
    path = tmp_path_factory.mktemp("v2")
    return path, write_v2(path, ARCH)


@pytest.fixture
def model(made: tuple[Path, TruthV2], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made[0], tmp_path / "model"))


PARAMS, OPT = "params/shard_0.npz", "opt_state/shard_0.npz"


def refused(path: Path, expected: str, error: type[UserError] = CheckpointError, **config: Any) -> None:
    with pytest.raises(error, match=expected) as caught:
        opened(path, **config)
    assert str(caught.value).count("\n") < 2


@pytest.mark.parametrize("file", [PARAMS, OPT, "meta.json"])
def test_a_missing_file_is_named(model: Path, file: str) -> None:
    (model / STEP / file).unlink()
    refused(model, f"{file}: missing")


@pytest.mark.parametrize("file", [PARAMS, OPT])
@pytest.mark.parametrize("left", [0, 0.5, 0.999])
def test_a_file_cut_short_is_named(model: Path, file: str, left: float) -> None:
    whole = (model / STEP / file).read_bytes()
    (model / STEP / file).write_bytes(whole[: int(len(whole) * left)])
    refused(model, f"{file}: damaged")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"total_hosts": true, "step": 1}', '{"total_hosts": 0}'])
def test_metadata_that_is_none(model: Path, text: str) -> None:
    (model / STEP / "meta.json").write_text(text)
    refused(model, "meta.json: (damaged|holds no keys|total_hosts is)")


def test_a_step_that_is_none(model: Path) -> None:
    edit_json(model / STEP / "meta.json", step="1201")
    refused(model, 'meta.json: step is "1201"; expected an integer of at least 0')


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("n_vocab", 264, r"params.*has shape \(272, 64\); expected \(264, 64\), because of n_vocab = 264 in conf"),
        ("d_model", 32, r"has shape \(64,\); expected \(32,\), because of d_model = 32 in config.json"),
        ("layers", 4, r"has shape \(3, 64\); expected \(4, 64\), because of layers = 4 in config.json"),
        ("d_head", 8, r"linear/b\) has shape \(3, 656\); .* because of n_heads \* d_head = 8 \* 8 "),
        ("n_heads", 4, r"linear/b\) has shape \(3, 656\); .* because of n_heads \* d_head = 4 \* 6 "),
    ],
)
def test_a_wrong_configuration_key_is_named(made: tuple[Path, TruthV2], key: str, value: int, expected: str) -> None:
    refused(made[0], expected, **{key: value})


def test_an_unusable_configuration_is_named(made: tuple[Path, TruthV2]) -> None:
    refused(made[0], "^config.json: layers = |^config.json: model.n_layers", ConfigError, layers="three")
    refused(made[0], r"^config.json: model.n_shards = 5 \(the original's cores", ConfigError, cores_per_replica=5)
    for key in ("d_head", "cores_per_replica", "n_vocab"):
        raw = {name: value for name, value in ARCH.config().items() if name != key}
        with pytest.raises(ConfigError, match=f"^config.json: missing: {key}"):
            LegacyV2Weights(made[0] / STEP, raw, "config.json")


def test_pickled_objects_are_refused(model: Path) -> None:
    arrays: list[Any] = stored(model / STEP / PARAMS)
    arrays[3] = np.array([{"a": 1}], object)
    np.savez(model / STEP / PARAMS, *arrays)
    refused(model, f"{PARAMS}: arr_3: holds Python objects")


def test_compressed_members_are_refused(model: Path) -> None:
    np.savez_compressed(model / STEP / PARAMS, *stored(model / STEP / PARAMS))
    refused(model, f"{PARAMS}: arr_0 is compressed")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda names: [*names[:-1], "/other/linear/w"], 'param_order names "/other/linear/w", which is no leaf'),
        (lambda names: [*names[:-1], names[0]], "param_order names /embed/.*/b twice"),
        (lambda names: names[:-1], "param_order lacks /transformer/.*/linear_1/w"),
        (lambda names: [*names[:-1], ["list"]], r"param_order names \['list'\], which is no leaf"),
        (lambda names: None, "param_order is null; expected the list of the 12 names"),
    ],
)
def test_wrong_names_in_param_order(model: Path, change: Callable[[list[str]], Any], expected: str) -> None:
    edit_json(model / STEP / "meta.json", param_order=change([leaf.name for leaf in LEAVES]))
    refused(model, expected)


@pytest.mark.parametrize("order", [None, [], ["", ""], ["x"] * 26])
def test_wrong_opt_order(model: Path, order: Any) -> None:
    edit_json(model / STEP / "meta.json", opt_order=order)
    refused(model, 'meta.json: opt_order is not "", the 12 names')
    shutil.rmtree(model / STEP / "opt_state")
    opened(model)  # not looked at where there is nothing in that order


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        (PARAMS, lambda a: a[:-1], "holds 11 arrays, and param_order in meta.json names 12"),
        (PARAMS, lambda a: [a[0].astype(np.int32), *a[1:]], r"arr_0 \(/embed/.*\) is int32; expected one of: float32"),
        (PARAMS, lambda a: [a[0][None], *a[1:]], r"has shape \(1, 64\); expected \(64,\)"),
        (OPT, lambda a: a[1:], "holds 25 arrays, and opt_order in meta.json names 26"),
        (
            OPT,
            lambda a: [a[0][None], *a[1:]],
            r"arr_0, Adam's counter, is int32 of shape \(1,\); expected int32 of \(\)",
        ),
        (OPT, lambda a: [*a[:-1], np.float32(3)[()] + a[0] * 0.0], "arr_25, the schedule's counter, is float"),
        (OPT, lambda a: [-a[0], *a[1:]], "Adam's counter, is -901"),
        (OPT, lambda a: [a[0], a[1].astype(np.float16), *a[2:]], r"is float16; expected one of: float32, bfloat16"),
        (OPT, lambda a: [a[0], a[1][:-1], *a[2:]], r"has shape \(63,\); expected \(64,\)"),
        (OPT, lambda a: [a[0], a[1].view("V2")[::2], *a[2:]], "is bfloat16 in mu and float32 in nu"),
    ],
)
def test_arrays_that_do_not_fit(
    model: Path, file: str, change: Callable[[list[np.ndarray]], list[np.ndarray]], expected: str
) -> None:
    rewrite(
        model / STEP / file, lambda arrays: [np.asarray(a, "<f4") if a.dtype == "f8" else a for a in change(arrays)]
    )
    refused(model, expected)


def flip(file: Path, values: np.ndarray) -> None:
    """Changes one bit in the file where `values` lie."""
    data = bytearray(file.read_bytes())
    at = data.index(values.tobytes())
    data[at + values.nbytes // 2] ^= 1
    file.write_bytes(bytes(data))


def test_one_changed_bit_is_found_in_whatever_layer(model: Path, made: tuple[Path, TruthV2]) -> None:
    flip(model / STEP / PARAMS, made[1].fused[INTO][2])
    weights = opened(model)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{PARAMS}: damaged.*CRC"):
            weights.read(Piece("layers/attn/q", 0))
    weights.read(Piece("layers/attn/o", 0))  # another array is whole
    weights.read(Piece("layers/attn/q", 0), "mu")


def test_a_file_written_again_meanwhile_is_not_mixed_with_the_old_one(model: Path) -> None:
    weights = opened(model)
    weights.read(Piece("layers/attn/q", 0))
    rewrite(model / STEP / PARAMS, lambda arrays: arrays)
    for path in ("layers/attn/q", "layers/attn/o"):  # verified before, and not
        with pytest.raises(CheckpointError, match=f"{PARAMS}: changed while it was being read"):
            weights.read(Piece(path, 1))


def test_damaged_optimizer_state_is_named(model: Path, made: tuple[Path, TruthV2]) -> None:
    flip(model / STEP / OPT, made[1].fused_nu[OUT_OF][1])
    weights = opened(model)
    weights.read(Piece("layers/mlp/w_out", 1), "mu")
    with pytest.raises(CheckpointError, match=f"{OPT}: damaged"):
        weights.read(Piece("layers/mlp/w_out", 1), "nu")
    (model / STEP / OPT).write_bytes(b"PK")
    refused(model, f"{OPT}: damaged")
    (model / STEP / OPT).unlink()
    (model / STEP / OPT).mkdir()
    refused(model, f"{OPT}: cannot be read")


# ------------------------------------------------------------------------------------------------ several hosts


@pytest.fixture
def two(tmp_path: Path) -> Path:
    write_v2(tmp_path / "two", ARCH, hosts=2)
    return tmp_path / "two"


@pytest.mark.parametrize("file", ["params/shard_1.npz", "opt_state/shard_1.npz"])
def test_the_file_of_a_host_is_missing(two: Path, file: str) -> None:
    (two / STEP / file).unlink()
    refused(two, f"{file}: missing")


def test_a_file_of_another_number_of_hosts(two: Path, made: tuple[Path, TruthV2]) -> None:
    shutil.copy(made[0] / STEP / PARAMS, two / STEP / "params/shard_1.npz")
    refused(
        two,
        r"params/shard_1.npz: arr_1 .* has shape \(272, 64\); expected \(272, 64\), of which one of 2 hosts holds "
        r"\(136, 64\), because of n_vocab = 272",
    )


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("params/shard_1.npz", lambda a: [a[0][:-1], *a[1:]], r"params/shard_1.npz: arr_0 .* has shape \(63,\)"),
        ("params/shard_1.npz", lambda a: [a[0].astype("<f2"), *a[1:]], "is float16, and float32 in the file of host 0"),
        ("opt_state/shard_1.npz", lambda a: [a[0] + 1, *a[1:]], "has counted 902 and 301 updates, and host 0 901 and"),
    ],
)
def test_files_of_different_saves(
    two: Path, file: str, change: Callable[[list[np.ndarray]], list[np.ndarray]], expected: str
) -> None:
    rewrite(two / STEP / file, change)
    refused(two, expected)


def test_hosts_that_cannot_be(two: Path, made: tuple[Path, TruthV2]) -> None:
    refused(
        two,
        "total_hosts = 2 means 16 devices, and cores_per_replica = 6 in config.json",
        cores_per_replica=6,
        d_model=96,
    )
    refused(two, "means 16 devices, and they do not divide the 264 entries of .*n_vocab = 264 in", n_vocab=264)
    edit_json(two / STEP / "meta.json", total_hosts=1)
    refused(two, r"has shape \(136, 64\); expected \(272, 64\), because of n_vocab")
