"""The peers of the benchmarks are the architecture that is measured, whichever family's it is."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh_transformer.bench import export
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.model.params import count_params

pytestmark = pytest.mark.peers

TIED = ModelConfig(
    n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, n_vocab=256, n_ctx=64, d_ff=96, norm="rms", residual="serial",
    rotary_layout="half", feed_forward="glu_silu", biases=(), tied_head=True,
)  # fmt: skip


@pytest.mark.parametrize("cfg", [TIED, preset("gpt-j-tiny")], ids=["tied", "gpt-j"])
def test_the_peer_trains_the_same_architecture(cfg: ModelConfig) -> None:
    from mesh_transformer.bench import hf

    model = cfg.to_dict() | {"n_vocab": 256}
    told = {"model": model, "batch_size": 2, "sequence_length": 32, "threads": 2, "dtype": "float32"}
    contender = hf.make(told)
    # Theirs has no bias beside GPT-J's token table.
    expected = count_params(ModelConfig(**model)) - cfg.d_model * ("embed" in cfg.biases)
    assert sum(p.numel() for p in contender._model.parameters()) == expected
    losses = [contender.step()["loss"] for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(256), abs=0.3) and losses[2] < losses[0]


def test_a_tied_model_is_decoded_alike_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh_transformer.bench import hf_decode, ours_decode

    directory = tmp_path / "huggingface"
    monkeypatch.setattr(sys, "argv", ["export", json.dumps(TIED.to_dict()), str(directory)])
    export.main()
    # Without a compiler the peer compiles nothing.
    monkeypatch.setattr(hf_decode, "cpp_compiler", lambda: None)
    told: dict[str, Any] = {"kind": "decode", "n_vocab": 256, "threads": 2, "batch": 2, "prompt": 5, "tokens": 8}
    told |= {"directory": str(directory), "precision": "float32"}
    written = [module.make(told).step()["tokens"] for module in (ours_decode, hf_decode)]
    assert written[0] == written[1]
