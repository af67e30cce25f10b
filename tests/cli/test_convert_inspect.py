"""`convert` and `inspect` as a user types them: every format, what stands where, and how they end."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from legacy.generator import Arch, Truth, write_model_directory
from legacy.generator_v2 import ArchV2, write_v2

ARCH = Arch(layers=2, d_model=32, n_heads=8, n_vocab=264, seq=16)
LOADER = {"used": ["a.tfrecords"], "file_idx": 3}
HEXADECIMAL = re.compile(r"[0-9a-f]{64}")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """full, slim and v2 model directories of the original's; to be read only."""
    path = tmp_path_factory.mktemp("originals")
    truth = write_model_directory(path / "full", ARCH, 4, [7, 1201], aux={1201: LOADER}, config=True, step=0)[1201]
    write_model_directory(path / "slim", ARCH, 8, [1201], variant="slim", config=True)
    arch = ArchV2(layers=2, d_head=6, n_vocab=272, cores_per_replica=4)
    write_v2(path / "v2", arch)
    (path / "v2" / "config.json").write_text(json.dumps(arch.config()))
    return path, truth


@pytest.fixture(scope="module")
def converted(command: Any, originals: tuple[Path, Truth], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """format -> how `convert` of the full checkpoint ended; the model is at "path" / format."""
    path = tmp_path_factory.mktemp("converted")
    found: dict[str, Any] = {"path": path}
    for to in ("native", "huggingface", "legacy"):
        options = ["--with-optimizer"] if to == "native" else []
        found[to] = command.call("convert", originals[0] / "full", path / to, "--to", to, *options)
    return found


def test_a_model_in_8_or_4_bits(command: Any, originals: tuple[Path, Truth], tmp_path: Path) -> None:
    source = originals[0] / "slim"
    for name in ("int8", "int4"):
        ended = command.call("convert", source, tmp_path / name, "--to", "native", "--quantize", name)
        assert ended.status == 0 and ended.out.strip() == digest_of(command, tmp_path / name), ended.err
        assert "quantized\n" in ended.err and "tensors were rounded; the largest error is" in ended.err
        facts = json.loads(command.call("inspect", tmp_path / name, "--json").out)
        assert (facts["format"], facts["quantize"], facts["step"]) == ("quantized", name, 1201)
        assert facts["made_of"]["path"] == str(source / "step_1201") and facts["tensors"]["head/w"]["dtype"] == name
        how = ["--prompt", "ab", "--max-tokens", 2, "--temperature", 0, "--tokenizer", "bytes", "--json"]
        assert command.call("generate", tmp_path / name, *how).status == 0
    for wrong, told in (
        (["--to", "legacy", "--quantize", "int8"], "--quantize int8 is for --to native"),
        (["--to", "native", "--quantize", "int2"], "expected int8, int4 or int4-128"),
        (["--to", "peft", "--quantize", "int8"], "--quantize is not for --to peft"),
    ):
        ended = command.call("convert", source, tmp_path / "not", *wrong)
        assert ended.status == 2 and told in ended.err
    ended = command.call("convert", tmp_path / "int4", tmp_path / "not", "--to", "native")
    assert ended.status == 2 and "say --dtype float32" in ended.err


def digest_of(command: Any, path: Path) -> str:
    ended = command.call("inspect", path, "--digest")
    assert ended.status == 0, ended.err
    return str(ended.out.strip())


# ------------------------------------------------------------------------------------------------ convert


def test_standard_output_is_the_digest(command: Any, originals: tuple[Path, Truth], converted: dict[str, Any]) -> None:
    digest = digest_of(command, originals[0] / "full")
    assert HEXADECIMAL.fullmatch(digest)
    for to in ("native", "huggingface", "legacy"):
        ended = converted[to]
        assert (ended.status, ended.out) == (0, digest + "\n"), ended.err
        assert str(converted["path"] / to) in ended.err and "no value was changed" in ended.err
        assert digest_of(command, converted["path"] / to) == digest


def test_the_way_back(command: Any, originals: tuple[Path, Truth], converted: dict[str, Any], tmp_path: Path) -> None:
    source = converted["path"] / "native"
    ended = command.call(*("convert", source, tmp_path / "out", "--to", "legacy", "--shards", 4, "--with-optimizer"))
    assert ended.status == 0, ended.err
    step = tmp_path / "out" / "step_1201"
    for file in sorted(step.rglob("*.npz")):
        original = originals[0] / "full" / "step_1201" / file.relative_to(step)
        with np.load(file) as a, np.load(original) as b:
            assert a.files == b.files
            for name in a.files:
                assert (a[name].dtype, a[name].tobytes()) == (b[name].dtype, b[name].tobytes()), file
    assert len(list(step.rglob("*.npz"))) == 64
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["aux"] == {"1201": {"train_loader": LOADER}}


def test_slim(command: Any, originals: tuple[Path, Truth], tmp_path: Path) -> None:
    """As the original slims: the arrays that it would have written, in as many shards."""
    ended = command.call("convert", originals[0] / "full", tmp_path / "step_1201", "--to", "legacy", "--slim")
    assert ended.status == 0, ended.err
    assert "tensors were rounded; the largest error is" in ended.err
    write_model_directory(tmp_path / "expected", ARCH, 4, [7, 1201], variant="slim")
    names = {file.relative_to(tmp_path / "step_1201") for file in (tmp_path / "step_1201").rglob("*.npz")}
    assert len(names) == 64
    for name in names:
        with np.load(tmp_path / "step_1201" / name) as a, np.load(tmp_path / "expected" / "step_1201" / name) as b:
            assert a.files == b.files
            assert [a[k].tobytes() for k in a.files] == [b[k].tobytes() for k in b.files], name
    again = command.call("convert", tmp_path / "step_1201", tmp_path / "hf", "--to", "huggingface")
    assert again.status == 0, again.err


def test_dtype_step_and_overwrite(command: Any, originals: tuple[Path, Truth], tmp_path: Path) -> None:
    line = ["convert", originals[0] / "full", tmp_path / "out", "--to", "native"]
    assert command.call(*line, "--step", 7).status == 0
    ended = command.call(*line)
    assert (ended.status, ended.out) == (2, "") and "exists already" in ended.err
    ended = command.call(*line, "--dtype", "f16", "--overwrite")
    assert ended.status == 0, ended.err
    facts = json.loads(command.call("inspect", tmp_path / "out", "--json").out)
    assert facts["step"] == 1201 and {entry["dtype"] for entry in facts["tensors"].values()} == {"float16"}


def test_help(command: Any) -> None:
    ended = command.call("convert", "--help")
    assert ended.status == 0
    options = ["--to", "--dtype", "--shards", "--with-optimizer", "--slim", "--overwrite", "--step", "--config"]
    for part in [*options, "--tokenizer", "native", "huggingface", "legacy-v2", "conversion.json", "bounded memory"]:
        assert part in ended.out, part


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["{in}/full", "{out}"], ["--to"]),
        (["{in}/full", "{out}", "--to", "onnx"], ["'onnx'", "native, huggingface, legacy, legacy-v2"]),
        (["{in}/full", "{out}", "--to", "native", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["{in}/full", "{out}", "--to", "legacy", "--shards", "3"], ["3 shards", "n_heads = 8", "1, 2, 4, 8"]),
        (["{in}/full", "{out}", "--to", "native", "--shards", "2"], ["--shards 2", "--to legacy"]),
        (["{in}/full", "{out}", "--to", "legacy", "--slim", "--with-optimizer"], ["--slim", "--with-optimizer"]),
        (["{in}/full", "{out}", "--to", "huggingface", "--with-optimizer"], ["no optimizer state", "native or legacy"]),
        (["{in}/slim", "{out}", "--to", "native", "--with-optimizer"], ["no optimizer state", "{in}/slim"]),
        (["{in}/full", "{out}", "--to", "native", "--step", "9"], ["step_9", "7, 1201"]),
        (["{in}/none", "{out}", "--to", "native"], ["{in}/none", "no such file"]),
        (["{in}", "{out}", "--to", "native"], ["{in}", "holds no model"]),
        (["{in}/full", "{in}", "--to", "native", "--overwrite"], ["{in}", "holds the source"]),
        (["{in}/v2", "{out}", "--to", "huggingface"], ["model.architecture = 'v2'"]),
        (["{in}/v2", "{out}", "--to", "legacy"], ["model.architecture", "'v2'"]),
        (["{in}/full", "{out}", "--to", "legacy-v2"], ["model.architecture = 'v1'", "--to legacy"]),
        (["{in}/full", "{out}", "--to", "native", "--config", "{in}/none.json"], ["{in}/none.json"]),
        (["{in}/full", "{out}", "--to", "native", "--tokenizer", "gpt2"], ["50257", "264"]),
    ],
)
def test_what_is_refused(
    command: Any, originals: tuple[Path, Truth], tmp_path: Path, arguments: list[str], names: list[str]
) -> None:
    def filled(text: str) -> str:
        return text.format_map({"in": originals[0], "out": tmp_path / "out"})

    before = {path: path.stat().st_mtime_ns for path in originals[0].rglob("*")}
    ended = command.call("convert", *map(filled, arguments))
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.count("\n") <= 2 and "Traceback" not in ended.err, ended.err
    for name in names:
        assert filled(name) in ended.err, ended.err
    assert not list(tmp_path.iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in originals[0].rglob("*")}


# ------------------------------------------------------------------------------------------------ inspect


@pytest.mark.parametrize("kind", ["full", "slim", "v2", "native", "huggingface", "legacy"])
def test_inspect_every_format(
    command: Any, originals: tuple[Path, Truth], converted: dict[str, Any], kind: str
) -> None:
    path = converted["path"] / kind if kind in converted else originals[0] / kind
    ended = command.call("inspect", path, "--json", "--digest")
    assert ended.status == 0, ended.err
    facts = json.loads(ended.out)
    formats = {"full": "legacy", "slim": "legacy", "v2": "legacy-v2"}
    assert facts["format"] == formats.get(kind, kind)
    assert facts["step"] == (None if kind == "huggingface" else 1201)
    assert facts["model"]["architecture"] == ("v2" if kind == "v2" else "v1")
    assert HEXADECIMAL.fullmatch(facts["digest"])
    if kind in ("full", "native", "v2"):
        counts = {"adam_count": 901, "schedule_count": 301}
        assert facts["optimizer"] == counts | {"bytes": 2 * 4 * facts["parameters"]}
    else:
        assert "optimizer" not in facts
    if kind in ("full", "native"):
        assert facts["recorded"] == {"train_loader": LOADER}
    if kind != "v2":
        assert facts["parameters"] == sum(values.size for values in originals[1].params.values())
        assert facts["model"]["n_heads"] == 8 and facts["tensors"]["layers/attn/v"]["shape"] == [2, 32, 8, 4]
        assert facts["tensors"]["embed/tokens"]["dtype"] == ("bfloat16" if kind == "slim" else "float32")
    text = command.call("inspect", path)
    assert text.status == 0 and ("cores_per_replica" in text.err if kind == "v2" else not text.err), text.err
    lines = text.out.splitlines()
    assert f"format: {facts['format']}" in lines and f"parameters: {facts['parameters']:,}" in lines
    assert any(line.strip() == f"n_vocab = {facts['model']['n_vocab']}" for line in lines)
    assert any(line.split()[:2] == ["embed/tokens", facts["tensors"]["embed/tokens"]["dtype"]] for line in lines)


def test_inspect_an_archive(command: Any, originals: tuple[Path, Truth], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "step_slim.tar.gz", "w:gz") as tar:
        tar.add(originals[0] / "slim" / "step_1201", "step_1201")
    shutil.copy(originals[0] / "slim" / "config.json", tmp_path / "config.json")
    assert digest_of(command, tmp_path / "step_slim.tar.gz") == digest_of(command, originals[0] / "slim")
    (tmp_path / "config.json").unlink()
    ended = command.call("inspect", tmp_path / "step_slim.tar.gz")
    assert ended.status == 2 and "n_heads and pe_rotary_dims" in ended.err and "--config FILE" in ended.err
    given = originals[0] / "slim" / "config.json"
    assert command.call("inspect", tmp_path / "step_slim.tar.gz", "--config", given).status == 0


def test_equal_models(command: Any, originals: tuple[Path, Truth], converted: dict[str, Any]) -> None:
    ended = command.call("inspect", originals[0] / "full", converted["path"] / "huggingface")
    assert (ended.status, ended.out) == (0, "all tensors are equal\n"), ended.err
    ended = command.call("inspect", originals[0] / "full", converted["path"] / "native", "--json")
    assert json.loads(ended.out) == {"equal": True, "model": {}, "tensors": []}


def test_models_that_differ(command: Any, originals: tuple[Path, Truth]) -> None:
    line = ["inspect", originals[0] / "full", originals[0] / "slim"]
    ended = command.call(*line)
    assert ended.status == 0, ended.err
    head = next(line for line in ended.out.splitlines() if line.startswith("lm_head.weight: "))
    match = re.fullmatch(r"lm_head\.weight: ([0-9,]+) of 8,448 values, by ([0-9.e-]+) at the most", head)
    assert match, head
    found = json.loads(command.call(*line, "--json").out)
    assert found["equal"] is False and found["model"] == {}
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    entry = tensors["lm_head.weight"]
    assert (entry["shape_a"], entry["n_values"]) == ([32, 264], 8448)
    assert f"{entry['n_different']:,}" == match[1] and f"{entry['largest']:.3g}" == match[2]


def test_models_of_other_shapes(command: Any, originals: tuple[Path, Truth]) -> None:
    ended = command.call("inspect", originals[0] / "full", originals[0] / "v2")
    assert ended.status == 0, ended.err
    assert "model.architecture: v1 and v2" in ended.out and "model.n_vocab: 264 and 272" in ended.out
    assert "lm_head.weight: (32, 264) and absent" in ended.out


def test_a_digest_of_two(command: Any, originals: tuple[Path, Truth]) -> None:
    ended = command.call("inspect", originals[0] / "full", originals[0] / "slim", "--digest")
    assert (ended.status, ended.out) == (2, "") and "--digest" in ended.err


def test_a_process_of_its_own(command: Any, originals: tuple[Path, Truth], tmp_path: Path) -> None:
    """Relative paths, and nothing on standard output but the digest."""
    ended = command.start("convert", "slim", tmp_path / "out", "--to", "huggingface", cwd=originals[0])
    assert ended.status == 0, ended.err
    assert HEXADECIMAL.fullmatch(ended.out.removesuffix("\n"))
    (tmp_path / "out" / "model.safetensors").write_bytes(b"cut")
    ended = command.start("inspect", "out", cwd=tmp_path)
    assert (ended.status, ended.out) == (2, "") and "out/model.safetensors" in ended.err
