"""Named architectures.

`gpt-j-6b` is the published model. `2.7b` to `23b` are the shapes on which the original reported throughput, all with
GPT-J's vocabulary, context and rotary width (the original measured the three smaller ones on 256 byte values). `40b` is
GPT-J enlarged to the size that the original named as its limit on TPU v3, a shape of this project's own.
`gpt-j-77m` and `gpt-j-0.6b` are the models of the CPU benchmarks, `gpt-j-demo` is what `mesh-transformer demo` trains
in minutes on two CPU cores; `gpt-j-tiny` is for tests.
"""

from __future__ import annotations

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig


def _gpt_j(n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    return ModelConfig(
        n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_vocab=50400, n_ctx=2048, position="rotary", d_rotary=64
    )


PRESETS: dict[str, ModelConfig] = {
    "gpt-j-6b": _gpt_j(28, 4096, 16),
    "gpt-j-2.7b": _gpt_j(24, 3072, 24),
    "gpt-j-4.8b": _gpt_j(24, 4096, 32),
    "gpt-j-10b": _gpt_j(32, 5120, 40),
    "gpt-j-13b": _gpt_j(28, 6144, 32),
    "gpt-j-23b": _gpt_j(28, 8192, 32),
    "gpt-j-40b": _gpt_j(64, 7168, 32),
    "gpt-j-77m": ModelConfig(n_layers=8, d_model=512, n_heads=8, n_vocab=50400, n_ctx=256, d_rotary=64),
    "gpt-j-0.6b": _gpt_j(8, 2048, 16),
    "gpt-j-demo": ModelConfig(n_layers=4, d_model=256, n_heads=4, n_vocab=2048, n_ctx=128, d_rotary=32),
    "gpt-j-tiny": ModelConfig(n_layers=2, d_model=64, n_heads=4, n_vocab=512, n_ctx=128, d_rotary=8),
}
# Short names: those by which the original's benchmark page calls its shapes, and one more after their pattern.
ALIASES = {name: f"gpt-j-{name}" for name in ("2.7b", "4.8b", "10b", "13b", "23b", "40b")}


def preset(name: str) -> ModelConfig:
    """The architecture called `name`.

    Raises:
        ConfigError: there is no such preset; the message lists those that exist.
    """
    found = PRESETS.get(ALIASES.get(name, name))
    if found is None:
        raise ConfigError(f"model.preset = {name!r} is not known; expected one of: {', '.join([*PRESETS, *ALIASES])}")
    return found
