"""Models stored in 8 or 4 bits: what is written, how it is opened, what is refused, and what damage is found."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mesh_transformer as mt
from mesh_transformer.api import Model, conversion
from mesh_transformer.checkpoint import quantized_weights
from mesh_transformer.checkpoint.aligned_file import open_mapped
from mesh_transformer.checkpoint.compare import differences
from mesh_transformer.checkpoint.convert import Conversion, convert
from mesh_transformer.checkpoint.digest import digest
from mesh_transformer.checkpoint.logical import fingerprint
from mesh_transformer.checkpoint.manifest import write_manifest
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.quantized import assemble_as
from mesh_transformer.checkpoint.quantized_weights import QuantizedWeights, looks_quantized
from mesh_transformer.checkpoint.weights import InMemory
from mesh_transformer.config.errors import CheckpointError, ConfigError, UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import load_tokenizer
from mesh_transformer.evaluate.describe import describe
from mesh_transformer.model.params import ParamSpec, is_multiplied, map_table, named_specs, shape
from mesh_transformer.model.quantize import QUANTIZATIONS, Quantized
from mesh_transformer.train.init_from import InitFrom, open_model

CFG = ModelConfig(n_layers=3, d_model=64, n_heads=4, n_vocab=272, n_ctx=32, d_rotary=8)
V2 = dataclasses.replace(CFG, architecture="v2", n_shards=4, feed_forward="glu_gelu_tanh")


def params_of(cfg: ModelConfig, dtype: str = "float32") -> Any:
    numbers = np.random.default_rng(1)

    def one(spec: ParamSpec) -> np.ndarray:
        drawn = spec.fill if spec.std is None else 2 * spec.std * numbers.normal(size=shape(spec, cfg))
        return np.broadcast_to(drawn, shape(spec, cfg)).astype(jnp.dtype(dtype))

    return map_table(one, cfg)


def stored(cfg: ModelConfig, path: Path, name: str, dtype: str = "float32", **how: Any) -> Path:
    weights = InMemory(cfg, params_of(cfg, dtype), step=7)
    convert(weights, path, conversion("native", load_tokenizer("bytes"), quantize=name, **how))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In int4; to be copied."""
    return stored(CFG, tmp_path_factory.mktemp("quantized") / "model", "int4")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


# ------------------------------------------------------------------------------------------------ what is written


def cases() -> list[Any]:
    """Every quantisation, once for each architecture: one of the two only among the full counts."""
    found = []
    for i, name in enumerate(QUANTIZATIONS):
        for cfg, dtype, version in ((CFG, "float32", 0), (V2, "bfloat16", 1)):
            marks = [pytest.mark.long] if i % 2 == version else []
            found.append(pytest.param(cfg, dtype, name, marks=marks, id=f"{cfg.architecture}-{dtype}-{name}"))
    return found


@pytest.mark.parametrize(("cfg", "dtype", "name"), cases())
def test_opened_it_is_what_quantising_while_loading_makes(
    cfg: ModelConfig, dtype: str, name: str, tmp_path: Path
) -> None:
    path = stored(cfg, tmp_path / "model", name, dtype)
    opened = open_weights(path)
    assert isinstance(opened, QuantizedWeights) and (opened.quantize, opened.step, opened.cfg) == (name, 7, cfg)
    expected = assemble_as(InMemory(cfg, params_of(cfg, dtype)), name)
    for chosen in (None, name):
        jax.tree.map(np.testing.assert_array_equal, assemble_as(opened, chosen), expected)
    dtypes = jax.tree.map(lambda a: a.dtype, expected)
    assert jax.tree.map(lambda a: a.dtype, assemble_as(opened, None)) == dtypes
    wider = assemble_as(opened, None, np.dtype(np.float32))
    assert wider["embed"]["tokens"].dtype == np.float32
    np.testing.assert_array_equal(wider["embed"]["tokens"], expected["embed"]["tokens"].astype(np.float32))


def test_the_commands_open_it(whole: Path) -> None:
    model = mt.load(whole)
    assert model.source is not None and (model.source.format, model.source.step) == ("quantized", 7)
    assert model.tokenizer is not None and model.tokenizer.encode("a") == [97]
    beside = Model(CFG, jax.tree.map(jnp.asarray, assemble_as(InMemory(CFG, params_of(CFG)), "int4")), None)
    np.testing.assert_array_equal(model.logits([[1, 2, 3]]), beside.logits([[1, 2, 3]]))
    facts = describe(open_weights(whole))
    assert facts["quantize"] == "int4" and facts["tensors"]["layers/attn/q"]["dtype"] == "int4"
    assert facts["tensors"]["head/b"]["dtype"] == "float32" and facts["made_of"]["format"] == "memory"
    assert facts["bytes"] == sum(a.nbytes for a in jax.tree.leaves(model.params))
    json.dumps(facts)


def test_arrays_are_used_where_they_lie_in_the_file(whole: Path) -> None:
    mapped = open_weights(whole)
    assert isinstance(mapped, QuantizedWeights)
    model = mt.load(whole)
    regions = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(whole) in line
    ]
    for array in jax.tree.leaves(model.params):
        at = array.unsafe_buffer_pointer()
        assert at % 64 == 0 and any(int(first, 16) <= at < int(end, 16) for first, end in regions)
    for path in named_specs(CFG):
        assert not any(a.flags.writeable for a in jax.tree.leaves(mapped.stored(path)))


def test_the_safetensors_library_reads_the_files(whole: Path) -> None:
    opened = open_weights(whole)
    assert isinstance(opened, QuantizedWeights)
    for path, spec in named_specs(CFG).items():
        name, leaf = path.replace("/", "."), opened.stored(path)
        found = load_file(whole / "weights" / f"{name}.safetensors")
        expected = {f"{name}.values": leaf.values, f"{name}.scale": leaf.scale} if is_multiplied(spec) else {name: leaf}
        assert found.keys() == expected.keys()
        for array, values in expected.items():
            assert found[array].dtype == values.dtype
            np.testing.assert_array_equal(found[array], values)


def test_the_certificate_and_the_digest(whole: Path) -> None:
    """The digest is that of the weights which the model computes with."""
    facts = json.loads((whole / "conversion.json").read_bytes())
    opened = assemble_as(open_weights(whole), None)
    widened = jax.tree.map(
        lambda w: w.widen(np.float32) if isinstance(w, Quantized) else w,
        opened,
        is_leaf=lambda w: isinstance(w, Quantized),
    )
    assert facts["target"]["format"] == "quantized"
    assert facts["target"]["digest"] == fingerprint(open_weights(whole)).digest == digest(CFG, widened)
    assert facts["source"]["digest"] == digest(CFG, params_of(CFG))
    assert {cast["to"] for cast in facts["casts"]} == {"int4"}
    assert {cast["parameter"] for cast in facts["casts"]} == {
        p for p, s in named_specs(CFG).items() if is_multiplied(s)
    }
    assert 0 < max(entry["largest_error"] for entry in facts["changed"]) < 0.2


def test_other_parameters_in_another_dtype(tmp_path: Path) -> None:
    path = stored(CFG, tmp_path / "model", "int8", dtype="bfloat16")
    opened = assemble_as(open_weights(path), None)
    assert opened["embed"]["tokens"].dtype == jnp.bfloat16 and opened["layers"]["attn"]["q"].values.dtype == np.int8
    with pytest.raises(ConfigError, match="too large for float16"):
        params = params_of(CFG)
        params["embed"]["tokens"][0, 0] = 1e6
        assemble_as(InMemory(CFG, params), "int8", np.dtype(np.float16))


def test_converting_holds_a_few_layers(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, n_layers=12, d_model=96, n_vocab=64)
    weights = InMemory(cfg, params_of(cfg))
    weights.readers = 1
    how = conversion("native", None, quantize="int8")
    convert(weights, tmp_path / "first", how, certify=False)  # whatever is imported or cached on the way
    tracemalloc.start()
    try:
        convert(weights, tmp_path / "second", how, certify=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result = sum(a.nbytes for a in jax.tree.leaves(assemble_as(open_weights(tmp_path / "second"), None)))
    # What is read ahead is in 8 bits already: at the most all of it.
    assert peak < result + 4 * 4 * 4 * cfg.d_model**2


# ------------------------------------------------------------------------------------------------ what is refused


def test_another_quantisation_than_the_stored_one(whole: Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, mt.load(whole, quantize="int4").params, mt.load(whole).params)
    for name in ("int8", "int4-128"):
        with pytest.raises(UserError, match=f"rounded to int4 when it was converted, and cannot become {name}; leave"):
            mt.load(whole, quantize=name)


def test_a_copy_that_would_pass_for_the_original(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rounded to 8 or 4 bits"):
        mt.load(whole).save(tmp_path / "copy")
    weights = open_weights(whole)
    with pytest.raises(UserError, match=r"rounded to int4, .*say --dtype float32"):
        convert(weights, tmp_path / "copy", Conversion(to="huggingface"))
    with pytest.raises(UserError, match="rounded to int4 already, and rounding it to int8 would round twice"):
        convert(weights, tmp_path / "copy", Conversion(to="native", quantize="int8"))
    assert not (tmp_path / "copy").exists()
    for to in ("native", "huggingface"):
        convert(weights, tmp_path / to, Conversion(to=to, dtype=np.dtype(np.float32)))  # type: ignore[arg-type]
        assert differences(weights, open_weights(tmp_path / to)) == []


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"to": "huggingface", "quantize": "int8"}, "--quantize int8 is for --to native; huggingface has no such"),
        ({"to": "native", "quantize": "int8", "with_optimizer": True}, "leave --with-optimizer out"),
        ({"to": "native", "quantize": "int9"}, "quantize = .int9. is not known; expected int8, int4 or int4-128"),
    ],
)
def test_conversions_that_make_no_sense(how: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        convert(InMemory(CFG, params_of(CFG)), tmp_path / "model", Conversion(**how))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path) -> None:
    params = params_of(CFG)
    params["layers"]["mlp"]["w_out"][2, 3, 4] = np.nan
    with pytest.raises(CheckpointError, match="layers/mlp/w_out of layer 2 holds NaN or infinity, which int8 cannot"):
        convert(InMemory(CFG, params), tmp_path / "model", Conversion(to="native", quantize="int8"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_model_is_replaced_only_when_told(copy: Path) -> None:
    how = Conversion(to="native", quantize="int8")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(InMemory(CFG, params_of(CFG)), copy, how)
    still = mt.load(copy)
    before = jax.tree.map(np.array, still.params)
    convert(InMemory(CFG, params_of(CFG)), copy, how, overwrite=True)
    opened = open_weights(copy)
    assert isinstance(opened, QuantizedWeights) and opened.quantize == "int8"
    # Who had it open goes on with it.
    jax.tree.map(np.testing.assert_array_equal, still.params, before)


def test_training_from_rounded_weights_is_refused(whole: Path) -> None:
    told = r"matrices are rounded to int4, for computing and not for training\ngive --init-from the model that it was"
    with pytest.raises(CheckpointError, match=told):
        open_model(cast(Any, None), InitFrom(model=str(whole)), print)


def test_steps_and_configurations(whole: Path) -> None:
    assert open_weights(whole, step=7).step == 7
    with pytest.raises(CheckpointError, match="holds step 7, not 8"):
        open_weights(whole, step=8)
    with pytest.raises(CheckpointError, match="a quantised model holds its own configuration"):
        open_weights(whole, config="c.json")


# ------------------------------------------------------------------------------------------------ damage


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(data)


BIG = "weights/layers.mlp.w_in.safetensors"


@pytest.mark.parametrize("at", [3, 20, -1], ids=["length", "header", "values"])
def test_a_flipped_bit_in_a_small_file_is_found_at_opening(at: int, copy: Path) -> None:
    flip(copy / BIG, at)
    with pytest.raises(CheckpointError, match=r"layers\.mlp\.w_in\.safetensors: damaged, its sha256 differs"):
        open_weights(copy)


def test_a_flipped_bit_in_a_large_file_is_found_when_it_is_read_through(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weights, "_SUMMED_AT_OPENING", 0)
    intact = fingerprint(open_weights(copy)).digest
    flip(copy / BIG, -1)
    damaged = open_weights(copy)
    assemble_as(damaged, None)  # a map of it, in which nothing is read
    with pytest.raises(CheckpointError, match=r"layers\.mlp\.w_in\.safetensors: damaged, its sha256 differs"):
        fingerprint(damaged)
    flip(copy / BIG, -1)
    assert fingerprint(open_weights(copy)).digest == intact


@pytest.mark.parametrize("at", [3, 20], ids=["length", "header"])
def test_a_damaged_header_of_a_large_file(at: int, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_weights, "_SUMMED_AT_OPENING", 0)
    flip(copy / BIG, at)
    with pytest.raises(CheckpointError, match=r"layers\.mlp\.w_in\.safetensors: (damaged|holds)"):
        open_weights(copy)


def cut(model: Path) -> None:
    with (model / BIG).open("r+b") as file:
        file.truncate(1000)


def remove(model: Path) -> None:
    (model / BIG).unlink()


def rewrite(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def one(model: Path) -> None:
        document = json.loads((model / "quantized.json").read_bytes())
        change(document)
        (model / "quantized.json").write_text(json.dumps(document))
        (model / "manifest.json").unlink()
        write_manifest(model)

    return one


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, r"w_in\.safetensors: 1000 bytes, but manifest.json says"),
        (remove, r"w_in\.safetensors: missing, though manifest.json lists it"),
        (lambda model: (model / "quantized.json").unlink(), r"quantized\.json: missing"),
        (lambda model: (model / "manifest.json").unlink(), r"manifest\.json: missing"),
        (rewrite(lambda d: d.update(version=2)), "format version 2, written by .*reads version 1"),
        (rewrite(lambda d: d.update(format="x")), "not a quantised model of this project"),
        (rewrite(lambda d: d.update(quantize="int8")), r"holds .*uint8 .*, but quantized\.json makes it .*int8"),
        (rewrite(lambda d: d.update(quantize=["int4"])), "its quantize or its step is not"),
        (rewrite(lambda d: d.update(step=-1)), "its quantize or its step is not"),
        (rewrite(lambda d: d["model"].update(n_layers=2)), r"holds .*, but quantized\.json makes it"),
        (rewrite(lambda d: d.pop("model")), "its model cannot be understood"),
    ],
    ids=["cut", "gone", "no-json", "no-manifest", "version", "format", "kind", "list", "step", "layers", "no-model"],
)
def test_damage_is_named(damage: Callable[[Path], None], told: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=told):
        open_weights(copy)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [99], "data_offsets": [0, 99]}}',
        b'{"a": {"dtype": "U8", "shape": [-1, -1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": ["1"], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}',
        b"not json",
    ],
)
def test_hostile_headers(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: damaged, its header"):
        open_mapped(file)


@pytest.mark.parametrize("data", [b"", b"123", b"\xff" * 16])
def test_files_too_short_for_a_header(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: damaged, its header"):
        open_mapped(tmp_path / "x.safetensors")
    assert not looks_quantized(tmp_path)
