"""Hugging Face's model of the same architecture on PyTorch as a contender at training."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import transformers

from mesh_transformer.bench.ours import batch
from mesh_transformer.checkpoint.huggingface.config import config_document
from mesh_transformer.config.model import ModelConfig


class TrainContender:
    """float32, or float32 parameters under bfloat16 autocast. Fused AdamW, clipping at 1; eager mode unless
    `spec["compiled"]`, where torch.compile has model and loss as one graph.

    Matrices are decayed and vectors are not, as in ours.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(spec["threads"])
        cfg = ModelConfig(**spec["model"])
        document = config_document(cfg, np.dtype(np.float32), None) | {"use_cache": False}
        config = transformers.AutoConfig.for_model(**document)
        self._model = transformers.AutoModelForCausalLM.from_config(config).float().train()
        matrices = [p for p in self._model.parameters() if p.ndim > 1]
        vectors = [p for p in self._model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self._autocast = spec["dtype"] == "bfloat16"
        self._compiled = spec.get("compiled", False)
        self._loss = torch.compile(self._eager_loss) if self._compiled else self._eager_loss
        rows = torch.from_numpy(batch(cfg.n_vocab, spec["batch_size"], spec["sequence_length"])).long()
        self._inputs, self._targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step(self) -> dict[str, Any]:
        context = torch.autocast("cpu", torch.bfloat16) if self._autocast else contextlib.nullcontext()
        with context:
            loss = self._loss(self._inputs, self._targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss.detach())}

    def _eager_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self._model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def describe(self) -> dict[str, Any]:
        attention = getattr(self._model.config, "_attn_implementation", "?")
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "settings": f"{'torch.compile' if self._compiled else 'eager mode'}, attention {attention}, fused AdamW"
            + (", bfloat16 autocast" if self._autocast else ""),
        }


def make(spec: dict[str, Any]) -> TrainContender:
    """The one contender that this module has."""
    return TrainContender(spec)
