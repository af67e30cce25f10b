"""One sha256 over all parameters of a model: equal for equal weights, however they are stored or sharded."""

from __future__ import annotations

from mesh_transformer.checkpoint.logical import fingerprint
from mesh_transformer.checkpoint.weights import InMemory
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.shapes import Params


def digest(cfg: ModelConfig, params: Params) -> str:
    """sha256 in lower-case hexadecimal over the parameters; optimizer, counters and stored dtype have no part in it.

    Hashed is, for every tensor in the byte order of the names, and with nothing between tensors:

        name    UTF-8
        NUL     one byte 0
        shape   decimal integers joined by ","; nothing for a scalar
        NUL     one byte 0
        values  each as little-endian IEEE float32, C order

    With norm "layernorm" and position "rotary" the tensors are those of Hugging Face's GPT-J and have its names
    ("transformer.h.0.attn.q_proj.weight"), but matrices are (in, out): the transpose of what Hugging Face stores, our
    own layout with heads and head_dim flattened into one axis. "transformer.wte.weight" is (V, d) and has the embedding
    bias added to every row, summed in float64 and rounded once to float32; a bias of zeros changes nothing, not even
    -0.0. The order is of bytes: layer 10 comes before layer 2.

    With any other norm or position, and for the v2 architecture, they are the parameters of the table, whole, under
    their own names ("layers/attn/q", which has axes layers, embed, heads, head_dim).

    Args:
        params: numpy arrays, or jax arrays in any sharding that this process holds whole; float32, bfloat16 or float16.
            One tensor at a time is copied.
    """
    return fingerprint(InMemory(cfg, params)).digest
