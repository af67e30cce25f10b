"""From any format into any other and back: the same bits, where nothing had to be rounded, and else a true account."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from v1_cases import BFLOAT16, LOADER, SMALL, TINY, is_truth, refused, stored

from legacy.generator import Arch, Truth, write_model_directory
from legacy.generator_v2 import ArchV2, write_v2
from mesh_transformer.checkpoint import native_weights, opening
from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.logical import fingerprint
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.slices import ArrayWriter
from mesh_transformer.checkpoint.weights import InMemory, Piece, assemble, leaf_at, nested
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.model.params import abstract_params


def step_of(source: Path, target: Path, to: Any, **options: Any) -> dict[str, Any]:
    """One conversion."""
    overwrite = options.pop("overwrite", False)
    return convert(open_weights(source), target, Conversion(to=to, **options), overwrite=overwrite)


def original(path: Path, arch: Arch = TINY, shards: int = 8, step: int = 1201, **options: Any) -> Truth:
    """A model directory of the original's with its configuration and its place in the data."""
    aux = {step: LOADER}
    return write_model_directory(path, arch, shards, [step], aux=aux, config=True, **options)[step]


# ------------------------------------------------------------------------------------------------ float32


@pytest.mark.parametrize("style", ["trained", "unequal"])
def test_one_digest_along_the_whole_way(tmp_path: Path, style: str) -> None:
    truth = original(tmp_path / "0", SMALL if style == "trained" else TINY, style=style)
    way: list[tuple[str, dict[str, Any]]] = [
        ("native", {}),
        ("legacy", {"n_shards": 4}),
        ("huggingface", {}),
        ("legacy", {"n_shards": 8}),
        ("native", {}),
    ]
    digests, changed = [fingerprint(open_weights(tmp_path / "0")).digest], []
    for i, (to, options) in enumerate(way):
        facts = step_of(tmp_path / str(i), tmp_path / str(i + 1), to, **options)
        digests += [facts["source"]["digest"], facts["target"]["digest"]]
        changed += facts["changed"]
        assert facts["casts"] == []
    assert len(set(digests)) == 1 and not changed
    # Hugging Face has no embedding bias: it is in the table now. All else is as it was.
    last = assemble(open_weights(tmp_path / "5"))
    folded = truth.params["embed/tokens"].astype(np.float64) + truth.params["embed/bias"]
    assert leaf_at(last, "embed/tokens").tobytes() == folded.astype(np.float32).tobytes()
    assert not leaf_at(last, "embed/bias").any()
    for path, values in truth.params.items():
        if not path.startswith("embed/"):
            assert leaf_at(last, path).tobytes() == values.tobytes(), path


@pytest.mark.parametrize(
    ("norm", "position"), [("rmsnorm", "t5"), ("scalenorm-bias", "fixed"), ("layernorm-nobias", "rotary")]
)
def test_other_norms_and_positions(tmp_path: Path, norm: str, position: str) -> None:
    arch = dataclasses.replace(TINY, norm=norm, pe=position)
    truth = original(tmp_path / "0", arch)
    step_of(tmp_path / "0", tmp_path / "1", "native", with_optimizer=True)
    step_of(tmp_path / "1", tmp_path / "2", "legacy", n_shards=8, with_optimizer=True)
    is_truth(open_weights(tmp_path / "1"), truth)
    assert stored(tmp_path / "2" / "step_1201") == stored(tmp_path / "0" / "step_1201")


@pytest.mark.parametrize("variant", ["full", "slim", "slim_f16"])
def test_back_to_the_original_every_array_is_the_same(tmp_path: Path, variant: str) -> None:
    optimizer = variant == "full"
    truth = original(tmp_path / "a", SMALL, variant=variant, meta=True)
    step_of(tmp_path / "a", tmp_path / "native", "native", with_optimizer=optimizer)
    is_truth(open_weights(tmp_path / "native"), truth)
    step_of(tmp_path / "native", tmp_path / "b", "legacy", n_shards=8, with_optimizer=optimizer)
    before = stored(tmp_path / "a" / "step_1201")
    assert len(before) == 8 * 16
    assert stored(tmp_path / "b" / "step_1201") == before
    if optimizer:
        return
    # And straight from the one to the other, as many shards as the source has.
    step_of(tmp_path / "a", tmp_path / "c" / "step_1201", "legacy")
    assert stored(tmp_path / "c" / "step_1201") == before


def test_unequal_addends_are_summed_and_split_evenly(tmp_path: Path) -> None:
    truth = original(tmp_path / "a", style="unequal")
    step_of(tmp_path / "a", tmp_path / "b", "legacy", with_optimizer=True)
    is_truth(open_weights(tmp_path / "b"), truth)


@pytest.mark.parametrize("style", ["trained", "unequal"])
def test_three_shards(tmp_path: Path, style: str) -> None:
    """A third of a float32 is none, and yet the sum must be the bias to the last bit."""
    arch = Arch(layers=2, d_model=48, n_heads=6, n_vocab=48, seq=16)
    truth = original(tmp_path / "a", arch, shards=2, style=style)
    step_of(tmp_path / "a", tmp_path / "b", "legacy", n_shards=3, with_optimizer=True)
    is_truth(open_weights(tmp_path / "b"), truth)
    step_of(tmp_path / "b", tmp_path / "c", "legacy", n_shards=2, with_optimizer=True)
    is_truth(open_weights(tmp_path / "c"), truth)
    if style == "trained":
        assert stored(tmp_path / "c" / "step_1201") == stored(tmp_path / "a" / "step_1201")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_that_are_hard_to_split(tmp_path: Path, dtype: str) -> None:
    """Subnormal numbers, which have no eighth, beside -0.0 and what rounds to neither."""
    original(tmp_path / "a", variant="slim")
    weights = open_weights(tmp_path / "a")
    kept = jnp.dtype(dtype)
    params = jax.tree.map(lambda a: np.array(a).astype(kept), assemble(weights))
    tiny = float(jnp.finfo(kept).smallest_subnormal)
    hard = np.array([-0.0, 0.0, 3 * tiny, -tiny, 1 / 3, -0.0, 5 * tiny, 1.0] * 4, np.float32).astype(kept)
    params["embed"]["bias"][:] = hard
    params["layers"]["mlp"]["b_out"][:] = hard
    params["layers"]["ln_1"]["bias"][:] = hard
    before = InMemory(weights.cfg, params)
    for n_shards in (1, 8):
        convert(before, tmp_path / str(n_shards), Conversion(to="legacy", n_shards=n_shards))
        after = open_weights(tmp_path / str(n_shards))
        for path in ("embed/bias", "layers/mlp/b_out", "layers/ln_1/bias"):
            piece = Piece(path, 1 if path.startswith("layers") else None)
            assert after.read(piece).astype(np.float32).tobytes() == hard.astype(np.float32).tobytes(), path


# ------------------------------------------------------------------------------------------------ v2


@pytest.mark.parametrize("moments", ["float32", "bfloat16", None])
def test_v2_through_native(tmp_path: Path, moments: str | None) -> None:
    arch = ArchV2(layers=2, d_head=6, n_vocab=272, cores_per_replica=4)
    write_v2(tmp_path / "a", arch, moments=moments)
    (tmp_path / "a" / "config.json").write_text(json.dumps(arch.config()))
    optimizer = moments is not None
    first = step_of(tmp_path / "a", tmp_path / "native", "native", with_optimizer=optimizer)
    second = step_of(tmp_path / "native", tmp_path / "b", "legacy-v2", with_optimizer=optimizer)
    assert first["source"]["digest"] == first["target"]["digest"] == second["target"]["digest"]
    before = stored(tmp_path / "a" / "step_1201")
    assert before and stored(tmp_path / "b" / "step_1201") == before
    refused(lambda: step_of(tmp_path / "native", tmp_path / "c", "legacy"), "model.architecture", error=ConfigError)
    assert not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize("to", ["native", "huggingface", "legacy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_a_cast_changed_is_told(tmp_path: Path, dtype: str, to: str) -> None:
    truth = original(tmp_path / "a", style="unequal")
    kept = jnp.dtype(dtype)
    facts = step_of(tmp_path / "a", tmp_path / "b", to, dtype=kept)
    written = open_weights(tmp_path / "b")
    assert facts["target"]["digest"] == fingerprint(written).digest != facts["source"]["digest"]
    casts = {(cast["parameter"], cast["from"], cast["to"]) for cast in facts["casts"]}
    assert casts == {(path, "float32", dtype) for path in truth.params}
    # By hand: every tensor of Hugging Face's, rounded once.
    params = truth.params
    table = (params["embed/tokens"].astype(np.float64) + params["embed/bias"]).astype(np.float32)
    if to == "huggingface":
        rounded_table = table.astype(kept).astype(np.float32)
    else:
        stored_table, stored_bias = (
            params[f"embed/{name}"].astype(kept).astype(np.float64) for name in ("tokens", "bias")
        )
        rounded_table = (stored_table + stored_bias).astype(np.float32)
    expected = {"transformer.wte.weight": (table, rounded_table)}
    q, b_out, head = params["layers/attn/q"], params["layers/mlp/b_out"], params["head/w"]
    for i in range(2):
        expected[f"transformer.h.{i}.attn.q_proj.weight"] = (q[i], q[i].astype(kept).astype(np.float32))
        expected[f"transformer.h.{i}.mlp.fc_out.bias"] = (b_out[i], b_out[i].astype(kept).astype(np.float32))
    expected["lm_head.weight"] = (head, head.astype(kept).astype(np.float32))
    told = {entry["name"]: entry for entry in facts["changed"]}
    for name, (before, after) in expected.items():
        error = np.abs(before.astype(np.float64) - after)
        assert told[name]["values"] == before.size
        assert told[name]["values_changed"] == np.count_nonzero(error) > 0
        assert told[name]["largest_error"] == error.max()
    assert len(told) <= len(facts["tensors"])


def test_a_cast_that_changes_nothing(tmp_path: Path) -> None:
    original(tmp_path / "a", variant="slim")
    facts = step_of(tmp_path / "a", tmp_path / "b", "native", dtype=np.dtype(np.float32))
    assert len(facts["casts"]) > 10 and facts["changed"] == []
    # The summed biases have more digits than a bfloat16.
    original(tmp_path / "c", variant="slim", style="unequal")
    facts = step_of(tmp_path / "c", tmp_path / "d", "legacy")
    assert [cast["parameter"] for cast in facts["casts"]] == ["embed/bias", "layers/mlp/b_out"]
    assert {entry["name"] for entry in facts["changed"]} >= {f"transformer.h.{i}.mlp.fc_out.bias" for i in range(2)}


@pytest.mark.parametrize("to", ["native", "huggingface", "legacy"])
def test_values_too_large_for_half_precision_are_refused(
    tmp_path: Path, to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowDisk(ArrayWriter):
        """Is still at the piece before when the next one turns out to be too large."""

        def write(self, name: str, row: int | None, values: np.ndarray) -> Callable[[], None]:
            write = super().write

            def later() -> None:
                time.sleep(0.02)
                write(name, row, values)()

            threads.append(threading.Thread(target=later))
            threads[-1].start()
            return threads[-1].join

    threads: list[threading.Thread] = []
    monkeypatch.setattr(native_weights, "ArrayWriter", SlowDisk)
    original(tmp_path / "a")
    weights = open_weights(tmp_path / "a")
    params = assemble(weights)
    params["head"]["w"][0, 0] = 1e5
    too_large = InMemory(weights.cfg, params)
    half = Conversion(to=to, dtype=np.dtype(np.float16))
    refused(
        lambda: convert(too_large, tmp_path / "b", half), str(tmp_path / "b"), "65504", "bfloat16", error=ConfigError
    )
    for thread in threads:
        thread.join()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]
    convert(too_large, tmp_path / "b", Conversion(to=to, dtype=BFLOAT16))


# ------------------------------------------------------------------------------------------------ what comes along


def test_extras_and_counters_survive(tmp_path: Path) -> None:
    truth = original(tmp_path / "a", step=30)
    step_of(tmp_path / "a", tmp_path / "native", "native", with_optimizer=True)
    native = open_weights(tmp_path / "native")
    assert native.extras == {"train_loader": LOADER}
    is_truth(native, truth)
    step_of(tmp_path / "native", tmp_path / "b", "legacy")
    meta = json.loads((tmp_path / "b" / "meta.json").read_text())
    assert meta == {"step": 30, "checkpoints": [30], "aux": {"30": {"train_loader": LOADER}}}
    back = open_weights(tmp_path / "b")
    assert back.extras == {"train_loader": LOADER} and back.counters is None
    step_of(tmp_path / "a", tmp_path / "c", "native")
    assert open_weights(tmp_path / "c").counters is None and open_weights(tmp_path / "c").step == 30


def test_the_configuration_comes_along(tmp_path: Path) -> None:
    original(tmp_path / "a")
    cfg = open_weights(tmp_path / "a").cfg
    step_of(tmp_path / "a", tmp_path / "b", "legacy", n_shards=2, tokenizer={"tokenizer.json": b"{}"})
    document = json.loads((tmp_path / "b" / "config.json").read_text())
    assert document == {key: value for key, value in TINY.config(2).items() if key in document}
    assert document["cores_per_replica"] == 2
    assert open_weights(tmp_path / "b" / "step_1201").cfg == open_weights(tmp_path / "b").cfg == cfg
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == b"{}"


def test_orbax_reads_what_was_written(tmp_path: Path) -> None:
    truth = original(tmp_path / "a", SMALL)
    step_of(tmp_path / "a", tmp_path / "b", "native", with_optimizer=True)
    directory, metadata = opening.open_native(tmp_path / "b")
    model = opening.stored_model(metadata, directory)
    params = opening.restore_params(directory, abstract_params(model, jnp.float32), model=model)
    expected = nested(truth.params)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b, strict=True), params, expected)
    whole = opening.restore_state(
        directory,
        nested(
            {
                name: jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))
                for name, entry in metadata["arrays"].items()
            }
        ),
    )
    assert int(whole["step"]) == 1201 and int(whole["opt_state"]["2"]["count"]) == 901
    assert truth.nu is not None
    np.testing.assert_array_equal(whole["opt_state"]["2"]["nu"]["layers"]["attn"]["q"], truth.nu["layers/attn/q"])


def test_jax_arrays_convert_as_numpy_ones(tmp_path: Path) -> None:
    original(tmp_path / "a")
    weights = open_weights(tmp_path / "a")
    params = assemble(weights)
    for name, tree in (("jax", jax.tree.map(jnp.asarray, params)), ("numpy", params)):
        convert(InMemory(weights.cfg, tree, step=1201), tmp_path / name, Conversion(to="legacy", n_shards=4))
    assert stored(tmp_path / "jax" / "step_1201") == stored(tmp_path / "numpy" / "step_1201")
