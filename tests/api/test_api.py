"""The Python surface against arithmetic done here by hand, in NumPy."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mesh_transformer as mt
from mesh_transformer.checkpoint.digest import digest
from mesh_transformer.config.errors import CheckpointError, ConfigError, DataError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.data.tokenizer import load_tokenizer, train_bpe
from mesh_transformer.model.params import abstract_params
from mesh_transformer.model.policy import ComputePolicy

CFG = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_vocab=264, n_ctx=64, d_rotary=4)
END = 256
# Layers in a loop: this is quicker to compile than what is chosen on a CPU.
LOOPED = ComputePolicy(dtype="float32")


def random_params(cfg: ModelConfig = CFG, dtype: Any = jnp.float32) -> dict:
    """Large weights, no bias zero."""
    random = np.random.default_rng(5)
    spreads = {"q": 0.3, "k": 0.3, "v": 0.2, "o": 0.2, "w_in": 0.2, "w_out": 0.1, "tokens": 1.0, "w": 0.5}

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        return jnp.asarray((name == "scale") + spreads.get(name, 0.2) * random.normal(size=leaf.shape), dtype)

    return jax.tree_util.tree_map_with_path(one, abstract_params(cfg))


@pytest.fixture(scope="module")
def model() -> mt.Model:
    return mt.Model(CFG, random_params(), load_tokenizer("bytes"), LOOPED)


@pytest.fixture(scope="module")
def native(model: mt.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "model"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def without_tokenizer() -> mt.Model:
    cfg = ModelConfig(n_layers=1, d_model=8, n_heads=2, n_vocab=32, n_ctx=16)
    return mt.Model(cfg, random_params(cfg), None, LOOPED)


def rows(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 256, (batch, length))


def head(model: mt.Model, x: np.ndarray) -> np.ndarray:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params["head"])
    return x.astype(np.float64) @ p["w"] + p["b"]


def final_norm(model: mt.Model, x: np.ndarray) -> np.ndarray:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params["head"]["ln"])
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_padding_on_the_right_changes_nothing(model: mt.Model) -> None:
    tokens = rows(2, 23)
    plain = model.logits(tokens)
    assert plain.shape == (2, 23, 264) and plain.dtype == np.float32 and plain.std() > 1
    for fill in (0, 263):
        for width in (24, 32, 64):
            padded = np.full((2, width), fill)
            padded[:, :23] = tokens
            found = model.logits(padded)
            assert found.shape == (2, width, 264)
            np.testing.assert_allclose(found[:, :23], plain, rtol=0, atol=1e-5)
    # Rows do not see each other.
    np.testing.assert_allclose(model.logits(tokens[1:]), plain[1:], rtol=0, atol=1e-5)


def test_tokens_may_be_lists_and_small_types(model: mt.Model) -> None:
    expected = model.logits(rows(1, 5))
    np.testing.assert_array_equal(model.logits(rows(1, 5).tolist()), expected)
    np.testing.assert_array_equal(model.logits(rows(1, 5).astype(np.uint8)), expected)
    np.testing.assert_array_equal(model.logits(jnp.asarray(rows(1, 5))), expected)


def test_features_are_what_the_head_reads(model: mt.Model) -> None:
    tokens = rows(2, 23)
    streams = [model.features(tokens, layer) for layer in range(3)]
    assert all(x.shape == (2, 23, 32) and x.dtype == np.float32 for x in streams)
    params = model.params
    embedding = np.asarray(params["embed"]["tokens"])[tokens] + np.asarray(params["embed"]["bias"])
    np.testing.assert_allclose(streams[0], embedding, rtol=0, atol=1e-6)
    np.testing.assert_allclose(head(model, streams[2]), model.logits(tokens), rtol=0, atol=1e-4)
    # The last block alone, between the stream before it and the final norm of the stream after it.
    last = jax.tree.map(lambda a: a[1:], params["layers"])
    n = tokens.size
    one = mt.Model(
        ModelConfig(**{**CFG.to_dict(), "n_layers": 1, "n_vocab": n}),
        {**params, "embed": {"tokens": streams[1].reshape(n, 32), "bias": np.zeros(32, np.float32)}, "layers": last,
         "head": {**params["head"], "w": params["head"]["w"][:, :n], "b": params["head"]["b"][:n]}},
        None,
        LOOPED,
    )  # fmt: skip
    np.testing.assert_allclose(one.features(np.arange(n).reshape(2, 23)), streams[2], rtol=0, atol=1e-4)
    for layer in (-1, -2, -3):
        np.testing.assert_array_equal(model.features(tokens, layer), streams[layer])
    np.testing.assert_array_equal(model.features(tokens), streams[2])


def test_the_final_norm_is_in_the_last_features_only() -> None:
    cfg = ModelConfig(**{**CFG.to_dict(), "n_layers": 1})
    params = random_params(cfg)
    # A block that adds nothing: its stream is the embedding.
    for branch, name in (("attn", "o"), ("mlp", "w_out"), ("mlp", "b_out")):
        params["layers"][branch][name] = jnp.zeros_like(params["layers"][branch][name])
    model = mt.Model(cfg, params, None, LOOPED)
    tokens = rows(1, 7)
    np.testing.assert_allclose(model.features(tokens), final_norm(model, model.features(tokens, 0)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("Once upon a", " time"), ("Once", "x"), ("a ", "b"), ("", "hello"), ("  ", "hello"), ("h\u00e9", "\u00e9\u20ac")],
)
def test_log_likelihood_is_the_sum_over_the_continuation(model: mt.Model, context: str, continuation: str) -> None:
    whole = list((context + continuation).encode())
    first = len(context.rstrip().encode())
    if not first:  # nothing but spaces before it: end-of-text stands there
        whole, first = [END, *whole], 1
    scores = log_softmax(model.logits([whole])[0])
    targets = whole[first:]
    expected = sum(scores[first - 1 + i, token] for i, token in enumerate(targets))
    greedy = all(np.argmax(scores[first - 1 + i]) == token for i, token in enumerate(targets))
    found = model.log_likelihood(context, continuation)
    assert found == (pytest.approx(expected, abs=1e-3), greedy)
    assert expected < -3 and not greedy


def test_what_greedy_decoding_writes_is_greedy(model: mt.Model) -> None:
    # A head that leans to letters, so that what is written is text that reads back as the same ids.
    lean = jnp.zeros(264).at[jnp.arange(97, 110)].set(50.0)
    ascii_only = copy.copy(model)
    ascii_only.params = model.params | {"head": model.params["head"] | {"b": model.params["head"]["b"] + lean}}
    ids = list(b"The")
    for i in range(2, 10):
        padded = np.zeros((2, 23), int)
        padded[:, : i + 1] = ids
        ids.append(int(np.argmax(ascii_only.logits(padded)[0, i])))
    text = bytes(ids[3:]).decode("ascii")
    value, greedy = ascii_only.log_likelihood("The", text)
    assert greedy and value < 0
    other = text[:-1] + ("a" if text[-1] != "a" else "b")
    assert ascii_only.log_likelihood("The", other)[1] is False
    assert ascii_only.log_likelihood("The", other)[0] < value


def test_text_longer_than_the_context_is_cut_on_the_left(model: mt.Model) -> None:
    context = "x" * 100
    # 65 tokens are used: 64 inputs and the last target.
    text = list(("x" * 63 + "yz").encode())
    scores = log_softmax(model.logits([text[:-1]])[0])
    expected = scores[62, text[63]] + scores[63, text[64]]
    assert model.log_likelihood(context, "yz")[0] == pytest.approx(expected, abs=1e-3)


def test_generation_through_the_surface(model: mt.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0.9, "seed": 3, "ignore_eos": True}
    several = model.generate(["ab", [1, 2, 3]], samples=2, **options)
    assert [len(c.tokens) for c in several] == [6] * 4
    # As many rows as before, so that nothing more is compiled.
    assert model.generate("ab", samples=4, **options)[:2] == several[:2]
    assert model.generate([1, 2, 3], samples=4, **options)[:2] == several[2:]
    assert model.generate(np.array([1, 2, 3]), samples=4, **options)[:2] == several[2:]
    assert several[0] != several[1]
    assert model.generate([], **options) == []


def test_native_round_trip(model: mt.Model, native: Path) -> None:
    opened = mt.load(native)
    assert opened.config == CFG
    assert opened.tokenizer is not None and opened.tokenizer.name == "bytes"
    assert digest(CFG, opened.params) == digest(CFG, model.params)
    np.testing.assert_allclose(opened.logits(rows(2, 23)), model.logits(rows(2, 23)), rtol=0, atol=1e-5)
    assert opened.source is not None and (opened.source.format, opened.source.step) == ("native", 0)
    assert "n_layers=2" in repr(opened)


def test_hugging_face_round_trip(model: mt.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "hf", format="huggingface")
    opened = mt.load(str(tmp_path / "hf"))
    assert opened.config == CFG
    assert digest(CFG, opened.params) == digest(CFG, model.params)
    assert opened.tokenizer is not None and opened.tokenizer.name == "bytes"
    assert opened.source is not None and (opened.source.format, opened.source.step) == ("huggingface", None)
    np.testing.assert_allclose(opened.logits(rows(2, 23)), model.logits(rows(2, 23)), rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == END
    with pytest.raises(CheckpointError, match="has no steps; leave step = 3 out"):
        mt.load(tmp_path / "hf", step=3)


def test_a_tokenizer_of_its_own_goes_with_the_model(tmp_path: Path) -> None:
    tokenizer = train_bpe(["low lower lowest newer newest widest " * 20], 264)
    model = mt.Model(CFG, random_params(), tokenizer)
    for kind in ("native", "huggingface"):
        model.save(tmp_path / kind, format=kind)
        opened = mt.load(tmp_path / kind)
        assert opened.tokenizer is not None and opened.tokenizer.sha256 == tokenizer.sha256
        assert opened.encode("lowest") == tokenizer.encode("lowest")
    assert mt.load(tmp_path / "native", tokenizer="bytes").encode("low") == [108, 111, 119]


def test_load_in_bfloat16(model: mt.Model, native: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "hf", format="huggingface")
    expected = model.logits(rows(2, 23))
    for path in (native, tmp_path / "hf"):
        opened = mt.load(path, dtype="bf16")
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(opened.params)} == {"bfloat16"}
        assert opened.policy.dtype == "bfloat16"
        found = opened.logits(rows(2, 23))
        error = np.abs(found - expected)
        assert found.dtype == np.float32
        assert error.max() > 1e-3 and error.mean() < 0.05 * expected.std(), "rounded, but the same model"
    assert len(opened.generate("ab", max_tokens=2, ignore_eos=True)[0].tokens) == 2


def test_weights_stay_as_stored(tmp_path: Path) -> None:
    mt.Model(CFG, random_params(dtype=jnp.bfloat16), None).save(tmp_path / "half")
    opened = mt.load(tmp_path / "half")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(opened.params)} == {"bfloat16"}
    assert opened.policy.dtype == "float32"
    wide = mt.load(tmp_path / "half", dtype="float32")
    np.testing.assert_allclose(wide.logits(rows(1, 8)), opened.logits(rows(1, 8)), rtol=0, atol=1e-5)
    opened.save(tmp_path / "hf", format="huggingface")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("method", ["logits", "features"])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], r"int64 \(3,\); expected whole numbers \[batch, length\]"),
        ([[1.0, 2.0]], r"float64 \(1, 2\); expected whole numbers"),
        ([[]], r"\(1, 0\); expected"),
        ([[1, 2], [3]], "different lengths; pad the shorter ones on the right"),
        ([[1, 264]], "token id 264 is outside the model's vocabulary of 264"),
        ([[-1, 2]], "token id -1 is outside"),
        ([[1] * 65], "65 tokens but the model's context holds 64"),
    ],
)
def test_wrong_tokens(model: mt.Model, method: str, tokens: Any, message: str) -> None:
    with pytest.raises(mt.UserError, match=message):
        getattr(model, method)(tokens)


def test_wrong_requests(model: mt.Model, without_tokenizer: mt.Model, tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: model.features([[1]], layer=3), r"layer = 3 is out of range: 0 .* to 2"),
        (lambda: model.features([[1]], layer=-4), r"layer = -4 is out of range"),
        (lambda: model.generate("a", samples=0), "samples = 0 must be at least 1"),
        (lambda: model.generate("a", temperature=-1.0), r"temperature = -1\.0 is out of range"),
        (lambda: model.log_likelihood("a", ""), "at least one token of context and one of continuation"),
        (lambda: model.log_likelihood("", ""), "at least one token of context and one of continuation"),
        (lambda: model.log_likelihood("a", "b" * 65), "continuation has 65 tokens .* holds 64; split it"),
        (lambda: without_tokenizer.generate("text"), r"no tokenizer \(n_vocab = 32\); .*token ids"),
        (lambda: without_tokenizer.log_likelihood("a", "b"), "no tokenizer"),
        (lambda: without_tokenizer.encode("a"), "no tokenizer"),
        (lambda: model.save(tmp_path / "x", format="gguf"), "format = 'gguf' is not known; expected one of native"),
    ]
    for call, message in cases:
        with pytest.raises(mt.UserError, match=message):
            call()
    assert not list(tmp_path.iterdir())
    assert without_tokenizer.logits([[1, 2]]).shape == (1, 2, 32)
    assert len(without_tokenizer.generate([[1, 2]], max_tokens=3)[0].tokens) == 3


@pytest.mark.parametrize("kind", ["native", "huggingface"])
def test_a_target_that_cannot_be_written(model: mt.Model, tmp_path: Path, kind: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="there: exists already"):
        model.save(tmp_path / "there", format=kind)
    with pytest.raises(CheckpointError, match=r"file/below: cannot be written \("):
        model.save(tmp_path / "file" / "below", format=kind)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "there"]


def test_wrong_sources(native: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    damaged = tmp_path / "damaged"
    shutil.copytree(native, damaged)
    part = max((p for p in (damaged / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (tmp_path / "nowhere", {}, CheckpointError, "nowhere: there is no such file"),
        (tmp_path / "empty", {}, CheckpointError, "empty: holds no model"),
        (tmp_path / "file", {}, CheckpointError, "file: holds no model"),
        (damaged, {}, CheckpointError, f"{part.name}: damaged, its sha256 differs"),
        (native, {"step": 7}, CheckpointError, "holds step 0, not 7"),
        (native, {"dtype": "int8"}, ConfigError, "int8"),
        (native, {"tokenizer": "gpt2"}, DataError, "gpt2 has 50257 ids but model.n_vocab is 264"),
        (native, {"tokenizer": str(tmp_path / "file")}, DataError, "file: not JSON"),
        (native, {"tokenizer": str(tmp_path / "none.json")}, DataError, r"none\.json"),
    ]
    for path, options, kind, message in cases:
        with pytest.raises(kind, match=message) as raised:
            mt.load(path, **options)
        assert isinstance(raised.value, mt.UserError) and len(str(raised.value).splitlines()) <= 2


def test_a_damaged_tokenizer_in_a_hugging_face_directory_is_named(model: mt.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "hf", format="huggingface")
    (tmp_path / "hf" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=f"{tmp_path / 'hf' / 'tokenizer.json'}: not a tokenizer"):
        mt.load(tmp_path / "hf")
    assert mt.load(tmp_path / "hf", tokenizer="bytes").encode("a") == [97]


def test_the_public_names() -> None:
    assert {"load", "Model", "UserError", "MeshTransformerError", "Completion", "__version__"} == set(dir(mt))
    for name in dir(mt):
        assert getattr(mt, name)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = mt.lode


def test_a_value_too_large_for_the_dtype_asked_for(model: mt.Model, tmp_path: Path) -> None:
    large = jax.tree.map(lambda a: a, model.params)
    large["head"]["b"] = large["head"]["b"].at[3].set(70_000.0)
    mt.Model(model.config, large, model.tokenizer).save(tmp_path / "large")
    with pytest.raises(ConfigError, match=r"head/b has a value that is too large for float16.*bfloat16"):
        mt.load(tmp_path / "large", dtype="float16")
    assert np.isfinite(np.asarray(mt.load(tmp_path / "large", dtype="bfloat16").params["head"]["b"], np.float32)).all()
