"""`bench decode` and `bench serve` beside peers: all compute the same model, and write all that was asked for."""

import json
from pathlib import Path

import pytest

from mesh_transformer.bench.decode import bench_decode
from mesh_transformer.bench.export import exported
from mesh_transformer.bench.serve import bench_serve
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset

pytestmark = pytest.mark.peers
TINY = preset("gpt-j-tiny")


def test_decode_against_everybody() -> None:
    """In float32 all write the same tokens from the same weights; 8 bits may leave them later."""
    result = bench_decode(
        TINY,
        batch=2,
        prompt=5,
        tokens=6,
        precisions=["float32"],
        against=["hf", "ctranslate2", "torch"],
        rounds=1,
        warmup=1,
        progress=lambda line: None,
        bandwidth={"rows": 64, "columns": 512},
    )
    json.dumps(result, allow_nan=False)
    contenders = result["contenders"]
    expected = {"hf float32", "hf bfloat16", "ctranslate2 float32", "ctranslate2 int8", "torch int8"}
    assert expected <= set(contenders)
    for name, figures in contenders.items():
        least = 2 * 6 if figures["precision"] == "float32" else 1
        assert figures["same_tokens"] >= least, name
    described = contenders["hf float32"]["described"]["settings"]
    assert "torch.compile" in described and "growing cache" in described
    assert "intra_threads = cores" in contenders["ctranslate2 int8"]["described"]["settings"]
    assert "ours float32 without native kernels over ctranslate2 int8" in result["ratios"]
    assert result["best"]["peers"] in expected


@pytest.mark.long
def test_serve_against_everybody() -> None:
    """`bench_serve` itself refuses a contender that writes less than was asked for."""
    result = bench_serve(
        TINY,
        texts=6,
        prompt_tokens=(3, 9),
        output_tokens=(1, 8),
        max_batch=4,
        precisions=["float32"],
        against=["hf", "ctranslate2"],
        rounds=1,
        warmup=1,
        progress=lambda line: None,
    )
    json.dumps(result, allow_nan=False)
    assert {"hf float32", "hf bfloat16", "ctranslate2 float32", "ctranslate2 int8"} < set(result["contenders"])


def test_a_model_on_disk_is_exported_and_removed(tmp_path: Path) -> None:
    import mesh_transformer as mt

    with exported(TINY, ctranslate2=False, progress=lambda line: None) as found:
        mt.load(found.huggingface).save(tmp_path / "model")
    with exported(str(tmp_path / "model"), ctranslate2=True, progress=lambda line: None) as found:
        assert found.cfg == TINY and found.ctranslate2 is not None
        assert (found.huggingface / "model.safetensors").is_file() and (found.ctranslate2 / "model.bin").is_file()
    assert not found.huggingface.exists()


def test_what_a_peer_cannot_hold_is_the_users_error() -> None:
    fixed = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_vocab=32, n_ctx=8, position="fixed")
    with pytest.raises(UserError, match="fixed"), exported(fixed, ctranslate2=False, progress=lambda line: None):
        pass
