"""What Hugging Face's model families call the parameters of the table: one map a family.

A map's keys are modules of ours: the path of a parameter without what tells its weight from its bias
("layers/attn/o" for `o` and `b_o`, "layers/ln_1" for its `scale` and `bias`). Its values are modules of theirs, {i}
being the layer, to which ".weight" and ".bias" are added. "layers/attn/qkv" stands for q, k and v in one tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mesh_transformer.config.model import GPTJ_BIASES, Bias, ModelConfig
from mesh_transformer.model.params import named_specs

FUSED = ("q", "k", "v")
# How a tensor holds q, k and v: one after another, or for every head in turn its own three.
Fused = Literal["side_by_side", "by_head"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models in Hugging Face's names.

    Attributes:
        model_type, class_name: as config.json has them. title: what people call it, where that is another word.
        prefix: of all names but the head's, which some files leave out.
        names: our module -> theirs.
        fields: what this family fixes among the fields of `ModelConfig`; several values are alternatives.
        biases: the choices of biases that it has.
        fused: how q, k and v lie in one tensor; None where they have their own.
        inputs_first: whether matrices are stored (in, out), as GPT-2's, and not (out, in); the head never is.
        shares_heads: whether keys and values may have fewer heads, and heads any width.
        divides_width: whether transformers asks that n_heads divides d_model all the same.
    """

    model_type: str
    class_name: str
    prefix: str
    names: Mapping[str, str]
    fields: Mapping[str, tuple[Any, ...]]
    biases: tuple[tuple[Bias, ...], ...]
    fused: Fused | None = None
    inputs_first: bool = False
    shares_heads: bool = False
    divides_width: bool = False
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.model_type)

    def name(self, path: str) -> str | None:
        """Their name of a parameter, {i} for the layer; None where they have none (GPT-J's embedding bias)."""
        module, kind = module_of(path)
        if self.fused and module in _PARTS:
            module = "layers/attn/qkv"
        theirs = self.names.get(module)
        if theirs is None:
            return None
        return f"{'' if module == 'head' else self.prefix}{theirs}.{kind}"

    def holds(self, cfg: ModelConfig) -> bool:
        """Whether this family is that architecture."""
        allowed = {**_PLAIN, **self.fields}
        return (
            all(getattr(cfg, field) in values for field, values in allowed.items())
            and cfg.biases in self.biases
            and (self.shares_heads or cfg.n_kv_heads == cfg.n_heads)
            and bool(cfg.window) >= (cfg.windowed_layers == "odd")
        )


_PARTS = tuple(f"layers/attn/{name}" for name in FUSED)
# What a family has unless it says otherwise.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "architecture": ("v1",),
    "norm": ("layernorm",),
    "position": ("rotary",),
    "residual": ("serial",),
    "rotary_layout": ("interleaved",),
    "feed_forward": ("gelu_tanh",),
    "windowed_layers": ("all",),
    "scale_scores": (True,),
    "qk_norm": (False,),
    "window": (0,),
}


class _Any:
    """Stands for every value."""

    def __contains__(self, value: object) -> bool:
        return True


_ANY: Any = _Any()


def module_of(path: str) -> tuple[str, Literal["weight", "bias"]]:
    """The module that a parameter belongs to, and which part of it it is."""
    *parents, last = path.split("/")
    kind: Literal["weight", "bias"] = "bias" if last in ("bias", "b") or last.startswith("b_") else "weight"
    own = last.removeprefix("b_").removeprefix("w_")
    return "/".join(parents if own in ("scale", "bias", "w", "b") else [*parents, own]), kind


_GPT2_NAMES = {
    "embed/tokens": "wte",
    "embed/positions": "wpe",
    "layers/ln_1": "h.{i}.ln_1",
    "layers/ln_2": "h.{i}.ln_2",
    "head/ln": "ln_f",
    "head": "lm_head",
}
_LLAMA_NAMES = {
    "embed/tokens": "embed_tokens",
    "layers/ln_1": "layers.{i}.input_layernorm",
    "layers/ln_2": "layers.{i}.post_attention_layernorm",
    "layers/attn/q": "layers.{i}.self_attn.q_proj",
    "layers/attn/k": "layers.{i}.self_attn.k_proj",
    "layers/attn/v": "layers.{i}.self_attn.v_proj",
    "layers/attn/o": "layers.{i}.self_attn.o_proj",
    "layers/attn/q_norm": "layers.{i}.self_attn.q_norm",
    "layers/attn/k_norm": "layers.{i}.self_attn.k_norm",
    "layers/mlp/gate": "layers.{i}.mlp.gate_proj",
    "layers/mlp/in": "layers.{i}.mlp.up_proj",
    "layers/mlp/out": "layers.{i}.mlp.down_proj",
    "head/ln": "norm",
    "head": "lm_head",
}
_GPT2_FEED_FORWARD = ("gelu_tanh", "gelu")
_LLAMA_FIELDS: dict[str, tuple[Any, ...]] = {
    "norm": ("rms",),
    "rotary_layout": ("half",),
    "feed_forward": ("glu_silu",),
}


def _llama(
    model_type: str, class_name: str, biases: tuple[tuple[Bias, ...], ...], *, divides: bool = False, **fields: Any
) -> Family:
    return Family(
        model_type=model_type,
        class_name=class_name,
        prefix="model.",
        names=_LLAMA_NAMES,
        fields=_LLAMA_FIELDS | fields,
        biases=biases,
        shares_heads=True,
        divides_width=divides,
    )


# In the order in which an architecture that several can hold is looked for.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="gptj",
            class_name="GPTJForCausalLM",
            title="GPT-J",
            prefix="transformer.",
            names={
                "embed/tokens": "wte",
                "layers/ln_1": "h.{i}.ln_1",
                "layers/attn/q": "h.{i}.attn.q_proj",
                "layers/attn/k": "h.{i}.attn.k_proj",
                "layers/attn/v": "h.{i}.attn.v_proj",
                "layers/attn/o": "h.{i}.attn.out_proj",
                "layers/mlp/in": "h.{i}.mlp.fc_in",
                "layers/mlp/out": "h.{i}.mlp.fc_out",
                "head/ln": "ln_f",
                "head": "lm_head",
            },
            fields={
                "residual": ("parallel",),
                "rope_theta": (10000.0,),
                "rope_scaling": (None,),
                "tied_head": (False,),
            },
            biases=(GPTJ_BIASES,),
        ),
        Family(
            model_type="gpt2",
            class_name="GPT2LMHeadModel",
            prefix="transformer.",
            names=_GPT2_NAMES
            | {
                "layers/attn/qkv": "h.{i}.attn.c_attn",
                "layers/attn/o": "h.{i}.attn.c_proj",
                "layers/mlp/in": "h.{i}.mlp.c_fc",
                "layers/mlp/out": "h.{i}.mlp.c_proj",
            },
            fields={"position": ("fixed",), "feed_forward": _GPT2_FEED_FORWARD, "scale_scores": (True, False)},
            biases=(("qkv", "out", "mlp"),),
            fused="side_by_side",
            inputs_first=True,
        ),
        Family(
            model_type="gpt_neo",
            class_name="GPTNeoForCausalLM",
            prefix="transformer.",
            names=_GPT2_NAMES
            | {
                "layers/attn/q": "h.{i}.attn.attention.q_proj",
                "layers/attn/k": "h.{i}.attn.attention.k_proj",
                "layers/attn/v": "h.{i}.attn.attention.v_proj",
                "layers/attn/o": "h.{i}.attn.attention.out_proj",
                "layers/mlp/in": "h.{i}.mlp.c_fc",
                "layers/mlp/out": "h.{i}.mlp.c_proj",
            },
            fields={
                "position": ("fixed",),
                "feed_forward": _GPT2_FEED_FORWARD,
                "scale_scores": (False,),
                "window": _ANY,
                "windowed_layers": _ANY,
            },
            biases=(("out", "mlp"),),
        ),
        Family(
            model_type="gpt_neox",
            class_name="GPTNeoXForCausalLM",
            prefix="gpt_neox.",
            names={
                "embed/tokens": "embed_in",
                "layers/ln_1": "layers.{i}.input_layernorm",
                "layers/ln_2": "layers.{i}.post_attention_layernorm",
                "layers/attn/qkv": "layers.{i}.attention.query_key_value",
                "layers/attn/o": "layers.{i}.attention.dense",
                "layers/mlp/in": "layers.{i}.mlp.dense_h_to_4h",
                "layers/mlp/out": "layers.{i}.mlp.dense_4h_to_h",
                "head/ln": "final_layer_norm",
                "head": "embed_out",
            },
            fields={
                "residual": ("parallel-two-norms", "serial"),
                "rotary_layout": ("half",),
                "feed_forward": ("gelu", "gelu_tanh"),
            },
            biases=(("qkv", "out", "mlp"), ("mlp",)),
            fused="by_head",
        ),
        _llama("llama", "LlamaForCausalLM", ((), ("qkv", "out"), ("mlp",), ("qkv", "out", "mlp")), divides=True),
        _llama("mistral", "MistralForCausalLM", ((),), window=_ANY),
        _llama("qwen2", "Qwen2ForCausalLM", (("qkv",),), window=_ANY),
        _llama("qwen3", "Qwen3ForCausalLM", ((), ("qkv", "out")), window=_ANY, qk_norm=(True,)),
    )
}


def family_of(cfg: ModelConfig) -> Family | None:
    """The first family that is this architecture; None where Hugging Face has none of those known here."""
    return next((family for family in FAMILIES.values() if family.holds(cfg)), None)


def nameless(cfg: ModelConfig, family: Family) -> list[str]:
    """Parameters that the family has no name for."""
    return [path for path in named_specs(cfg) if family.name(path) is None]
