"""`convert`: what its certificate says, and what it refuses."""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from v1_cases import TINY, is_truth, refused, snapshot

import mesh_transformer as mt
from legacy.generator import Truth, write_model_directory
from mesh_transformer.checkpoint.certificate import CERTIFICATE
from mesh_transformer.checkpoint.convert import TARGETS, Conversion, convert
from mesh_transformer.checkpoint.logical import fingerprint
from mesh_transformer.checkpoint.manifest import MANIFEST
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.config.errors import UserError

V1_TARGETS = [to for to in TARGETS if to != "legacy-v2"]
Made = tuple[Path, Truth]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A full model directory of the original's; never changed."""
    path = tmp_path_factory.mktemp("source") / "model"
    return path, write_model_directory(path, TINY, 4, [1201], config=True)[1201]


@pytest.fixture(scope="module")
def converted(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same in every format that can hold it; to be copied."""
    path = tmp_path_factory.mktemp("converted")
    for to in V1_TARGETS:
        convert(open_weights(made[0]), path / to, Conversion(to=to))
    convert(open_weights(made[0]), path / "step_1201", Conversion(to="legacy"))
    return {to: path / to for to in [*V1_TARGETS, "step_1201"]}


def entries(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


# ------------------------------------------------------------------------------------------------ the certificate


def by_hand(truth: Truth) -> dict[str, np.ndarray]:
    """Hugging Face's tensors of the truth, matrices (in, out), written from docs/formats.md, 2."""
    p, d = truth.params, TINY.d_model
    found = {
        "transformer.wte.weight": (p["embed/tokens"].astype(np.float64) + p["embed/bias"]).astype(np.float32),
        "transformer.ln_f.weight": p["head/ln/scale"],
        "transformer.ln_f.bias": p["head/ln/bias"],
        "lm_head.weight": p["head/w"],
        "lm_head.bias": p["head/b"],
    }
    for i in range(TINY.layers):
        at = f"transformer.h.{i}"
        found |= {f"{at}.attn.{x}_proj.weight": p[f"layers/attn/{x}"][i].reshape(d, d) for x in "qkv"}
        found |= {
            f"{at}.attn.out_proj.weight": p["layers/attn/o"][i].reshape(d, d),
            f"{at}.mlp.fc_in.weight": p["layers/mlp/w_in"][i],
            f"{at}.mlp.fc_in.bias": p["layers/mlp/b_in"][i],
            f"{at}.mlp.fc_out.weight": p["layers/mlp/w_out"][i],
            f"{at}.mlp.fc_out.bias": p["layers/mlp/b_out"][i],
            f"{at}.ln_1.weight": p["layers/ln_1/scale"][i],
            f"{at}.ln_1.bias": p["layers/ln_1/bias"][i],
        }
    return dict(sorted(found.items(), key=lambda item: item[0].encode()))


@pytest.mark.parametrize("to", [*V1_TARGETS, "step_1201"])
def test_the_certificate(made: Made, converted: dict[str, Path], to: str) -> None:
    target = converted[to]
    certificate = json.loads((target / CERTIFICATE).read_bytes())
    tensors = by_hand(made[1])
    whole = hashlib.sha256()
    for name, values in tensors.items():
        whole.update(name.encode() + b"\0" + ",".join(map(str, values.shape)).encode() + b"\0")
        whole.update(values.astype("<f4").tobytes())
    assert certificate["tensors"] == [
        {
            "name": name,
            "shape": list(values.shape),
            "sha256": hashlib.sha256(values.astype("<f4").tobytes()).hexdigest(),
        }
        for name, values in tensors.items()
    ]
    assert certificate["source"] == {
        "path": str(made[0] / "step_1201"),
        "format": "legacy",
        "step": 1201,
        "digest": whole.hexdigest(),
    }
    kind = "legacy" if to == "step_1201" else to
    step = None if to == "huggingface" else 1201
    assert certificate["target"] == {"format": kind, "step": step, "digest": whole.hexdigest()}
    assert (certificate["casts"], certificate["changed"], certificate["with_optimizer"]) == ([], [], False)
    assert certificate["parameters"] == sum(values.size for values in made[1].params.values())
    assert certificate["project_version"]
    own = certificate.pop("sha256")
    assert own == hashlib.sha256(json.dumps(certificate, sort_keys=True).encode()).hexdigest()
    files = {entry["path"]: (entry["sha256"], entry["size"]) for entry in certificate["files"]}
    there = {
        str(file.relative_to(target)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size)
        for file in target.rglob("*")
        if file.is_file() and file.name != CERTIFICATE
    }
    # A native checkpoint has its manifest, which lists the certificate too.
    assert files == ({} if to == "native" else there)
    if to == "native":
        assert CERTIFICATE in (target / MANIFEST).read_text()


def test_tensors_without_foreign_names(tmp_path: Path) -> None:
    import dataclasses

    arch = dataclasses.replace(TINY, norm="rmsnorm", pe="fixed")
    truth = write_model_directory(tmp_path / "a", arch, 4, [5], config=True)[5]
    facts = convert(open_weights(tmp_path / "a"), tmp_path / "b", Conversion(to="native"))
    assert {tensor["name"]: tensor["sha256"] for tensor in facts["tensors"]} == {
        path: hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() for path, values in truth.params.items()
    }
    refused(
        lambda: convert(open_weights(tmp_path / "a"), tmp_path / "c", Conversion(to="huggingface")),
        *("model.norm = 'rmsnorm'", "layernorm"),
        error=UserError,
    )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("to", [*V1_TARGETS, "step_1201"])
def test_a_flipped_bit_in_any_file_is_refused(converted: dict[str, Path], tmp_path: Path, to: str) -> None:
    model = Path(shutil.copytree(converted[to], tmp_path / to))
    is_native = to == "native"
    files = sorted(file for file in model.rglob("*") if file.is_file() and file.stat().st_size)
    assert len(files) > 2
    for n, file in enumerate(files):
        good = file.read_bytes()
        bad = bytearray(good)
        bad[(n * 7919) % len(good)] ^= 1 << n % 8
        file.write_bytes(bad)
        refused(lambda: open_weights(model), str(file.relative_to(model) if is_native else file))
        file.write_bytes(good[:-1])
        refused(lambda: open_weights(model), file.name)
        file.write_bytes(good)
    assert open_weights(model).cfg.n_layers == 2
    victim = next(file for file in files if file.suffix in (".npz", ".safetensors") or file.parent.name == "state")
    victim.unlink()
    refused(lambda: open_weights(model), victim.name)


def test_a_step_within_a_certified_model_is_checked_too(converted: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(converted["legacy"], tmp_path / "model"))
    file = model / "step_1201" / "shard_2" / "9.npz"
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    refused(lambda: open_weights(model / "step_1201"), str(file), "copy it again")
    (model / CERTIFICATE).unlink()
    refused(lambda: fingerprint(open_weights(model / "step_1201")), "shard_2/9.npz")  # the zip has sums of its own


# ------------------------------------------------------------------------------------------------ the target


def test_a_target_that_exists(made: Made, tmp_path: Path) -> None:
    weights = open_weights(made[0])
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    for name in ("file", "link", "empty"):
        call = functools.partial(convert, weights, tmp_path / name, Conversion(to="native"))
        refused(call, name, "exists already", "--overwrite")
    assert snapshot(tmp_path) == before


def test_overwrite(made: Made, converted: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(made[0], tmp_path / "source"))
    weights = open_weights(source)
    for name in converted:
        target = Path(shutil.copytree(converted[name], tmp_path / "out" / name))
        (target / "notes.txt").write_text("left from before")
        to: Any = "huggingface" if name == "native" else "native"
        convert(weights, target, Conversion(to=to), overwrite=True)
        assert open_weights(target).format == to and not (target / "notes.txt").exists()
    assert entries(tmp_path / "out") == sorted(converted)
    (tmp_path / "out" / "empty").mkdir()
    convert(weights, tmp_path / "out" / "empty", Conversion(to="native"), overwrite=True)
    convert(weights, tmp_path / "out" / "new", Conversion(to="native"), overwrite=True)


def test_overwrite_refuses(made: Made, tmp_path: Path) -> None:
    source = Path(shutil.copytree(made[0], tmp_path / "source"))
    weights = open_weights(source)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "alias").symlink_to(source)
    before = snapshot(tmp_path)
    for target, why in {
        tmp_path / "thesis": "is no model",
        tmp_path / "file": "is no model",
        tmp_path: "holds the source",
        source: "holds the source",
        source / "step_1201": "holds the source",
        tmp_path / "thesis" / ".." / "source": "holds the source",
        tmp_path / "alias": "holds the source",
    }.items():
        refused(lambda: convert(weights, target, Conversion(to="native"), overwrite=True), str(target), why)  # noqa: B023
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"to": "legacy", "n_shards": 3}, ["3 shards do not divide", "n_heads = 8", "1, 2, 4, 8 would do"]),
        ({"to": "legacy", "n_shards": 16}, ["16 shards do not divide"]),
        ({"to": "native", "n_shards": 2}, ["--shards 2", "--to legacy"]),
        ({"to": "huggingface", "with_optimizer": True}, ["no optimizer state"]),
        ({"to": "legacy-v2"}, ["model.architecture = 'v1'", "--to legacy"]),
        ({"to": "onnx"}, ["'onnx'", "native, huggingface, legacy, legacy-v2"]),
    ],
)
def test_what_a_format_cannot_hold(made: Made, tmp_path: Path, options: dict[str, Any], names: list[str]) -> None:
    target = tmp_path / "not" / "made"
    refused(lambda: convert(open_weights(made[0]), target, Conversion(**options)), *names, error=UserError)
    assert not entries(tmp_path)


def test_moments_that_are_not_there(converted: dict[str, Path], tmp_path: Path) -> None:
    weights = open_weights(converted["huggingface"])
    conversion = Conversion(to="native", with_optimizer=True)
    refused(
        lambda: convert(weights, tmp_path / "a", conversion), "no optimizer state", "--with-optimizer", error=UserError
    )
    assert not entries(tmp_path)


def test_the_target_is_all_that_is_made(made: Made, tmp_path: Path) -> None:
    before = snapshot(made[0])
    convert(open_weights(made[0]), tmp_path / "deep" / "er" / "out", Conversion(to="native"))
    assert entries(tmp_path / "deep" / "er") == ["out"]
    assert snapshot(made[0]) == before


def test_progress_reaches_its_total(made: Made, tmp_path: Path) -> None:
    for to in V1_TARGETS:
        told: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
        conversion = Conversion(to=to, with_optimizer=to != "huggingface")
        convert(
            open_weights(made[0]),
            tmp_path / to,
            conversion,
            progress=lambda stage, done, total: told[stage].append((done, total)),  # noqa: B023
        )
        assert list(told) == ["writing", "hashing the source", "reading back"]
        for stage, steps in told.items():
            assert steps == sorted(steps) and len({total for _, total in steps}) == 1, stage
            assert steps[-1][0] >= 0.99 * steps[-1][1], f"{to} {stage}"


# ------------------------------------------------------------------------------------------------ the Python surface


@pytest.mark.parametrize("to", V1_TARGETS)
def test_load_and_save(made: Made, tmp_path: Path, to: str, caplog: pytest.LogCaptureFixture) -> None:
    model = mt.load(made[0])
    assert (model.source.format, model.source.step) == ("legacy", 1201)  # type: ignore[union-attr]
    model.save(tmp_path / "out", format=to)
    again = open_weights(tmp_path / "out")
    assert fingerprint(again).digest == fingerprint(open_weights(made[0])).digest
    assert not (tmp_path / "out" / CERTIFICATE).exists()
    if to != "huggingface":
        assert again.step == 1201
        is_truth(again, Truth(params=made[1].params, mu=None, nu=None, counters={"step": 1201}))
    refused(lambda: model.save(tmp_path / "out", format=to), "exists already")
    refused(lambda: model.save(tmp_path / "b", format="onnx"), "'onnx'", error=UserError)
    bad: Callable[[], Any] = lambda: mt.load(made[0], step=5)  # noqa: E731
    refused(bad, "step_5", "1201")
