"""The original's flat JSON configuration (docs/formats.md, section 13) as the nested dict that `schema` reads.

Every key is either mapped or named in a note: nothing is passed over in silence. A configuration with `d_head` is one
of the original's second version, v2 (docs/formats.md, section 8).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from mesh_transformer.config import checks
from mesh_transformer.config.errors import ConfigError

_MODEL_KEYS = {
    "layers": "model.n_layers",
    "d_model": "model.d_model",
    "n_heads": "model.n_heads",
    "n_vocab": "model.n_vocab",
    "seq": "model.n_ctx",
    "norm": "model.norm",
    "pe": "model.position",
    "pe_rotary_dims": "model.d_rotary",
}
# Keys that only have another name here.
RENAMED = {
    **_MODEL_KEYS,
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "total_steps": "train.steps",
    "lr": "train.learning_rate",
    "end_lr": "train.end_learning_rate",
    "warmup_steps": "train.warmup_steps",
    "anneal_steps": "train.anneal_steps",
    "weight_decay": "train.weight_decay",
    "val_every": "train.validate_every",
    "val_batches": "train.validation_batches",
    "ckpt_every": "train.checkpoint_every",
    "keep_every": "train.keep_every",
    "noise_scale_alpha": "train.noise_scale_alpha",
    "name": "name",
}
# Keys that become something else: the batch size, paths, dtypes, the refusals and the notes below.
_TREATED = (
    "cores_per_replica",
    "per_replica_batch",
    "tpu_size",
    "bucket",
    "model_dir",
    "train_set",
    "val_set",
    "early_cast",
    "bf16_optimizer",
    "early_collect",
    "eval_only",
    "d_head",
    "gen_length",
    "eval_harness_tasks",
    "val_batch_multiplier",
    "wandb_project",
    "comment",
)
KNOWN = (*RENAMED, *_TREATED)
_SIZES = ("layers", "d_model", "n_heads", "n_vocab", "seq")
# By architecture: v2 never looked at norm and pe, and cannot be known without its number of shards.
_REQUIRED_MODEL = {"v1": (*_SIZES, "norm", "pe"), "v2": (*_SIZES, "d_head", "cores_per_replica")}
# What v2 has whatever the keys say.
_FIXED_IN_V2 = {"norm": "layernorm", "pe": "rotary"}
_REQUIRED = (
    *("cores_per_replica", "per_replica_batch", "total_steps", "lr", "end_lr", "warmup_steps", "anneal_steps"),
    *("weight_decay", "train_set", "val_set", "val_batches", "val_every", "ckpt_every", "keep_every", "name"),
)
# What lm-evaluation-harness calls today the tasks whose names have changed since.
_TASKS = {"lambada": "lambada_openai", "lambada_cloze": "lambada_openai_cloze_yaml"}
# Ids of the GPT-2 vocabulary, with which the original prepared all its data.
_GPT2_IDS = 50257


def from_legacy(
    raw: Mapping[str, Any], *, overridden: Collection[str] = (), n_devices: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """The nested configuration that the original's `raw` means, and notes of one line for the user.

    `overridden` names the keys, such as "log.directory", that the user sets beside the file. `n_devices` are those
    that there are: the mesh is made for them, and they stand in for a missing tpu_size. Paths are left relative to the
    working directory, as the original read them.

    Raises:
        ConfigError: a key is unknown, missing or unusable, or asks for what this version does not have.
    """
    _check_keys(raw, dict.fromkeys((*_REQUIRED_MODEL[_architecture(raw)], *_REQUIRED)))
    notes: list[str] = []
    batch_size, batch_note = _batch_size(raw, n_devices)
    mesh, mesh_notes = _mesh(raw, n_devices)
    notes += mesh_notes + _batch_notes(raw, batch_note, "train.batch_size" in overridden)
    _check_run_directory(raw, overridden, notes)
    nested: dict[str, Any] = {
        "model": model_section(raw),
        "data": _data_section(raw),
        "train": {"batch_size": batch_size, "z_loss_kind": "legacy", "remat": "full"},
        "mesh": mesh,
    }
    for key, full_name in RENAMED.items():
        section, _, name = full_name.rpartition(".")
        if key in raw and section != "model":
            (nested[section] if section else nested)[name] = raw[key]
    if _architecture(raw) == "v2":
        nested["train"]["gather"] = "per_step" if raw.get("early_collect", True) else "per_layer"
    nested["train"] |= _dtypes(raw, overridden, notes)
    nested["evaluate"] = _evaluate_section(raw, overridden, notes)
    notes += _unused(raw)
    return nested, notes


def model_section(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The `[model]` section of the original's configuration; its other keys are not looked at.

    A missing pe_rotary_dims is left out, and so becomes d_head, as it was in the original. Of v2, cores_per_replica
    belongs to the architecture; norm and pe do not.

    Raises:
        ConfigError: a key of the architecture is missing or unusable.
    """
    architecture = _architecture(raw)
    _check_missing(raw, _REQUIRED_MODEL[architecture])
    section = {name.removeprefix("model."): raw[key] for key, name in _MODEL_KEYS.items() if key in raw}
    if architecture == "v2":
        for key in ("d_head", "cores_per_replica"):
            checks.check_count(key, raw[key], 1)
        section |= {"architecture": "v2", "d_head": raw["d_head"], "n_shards": raw["cores_per_replica"]}
        section |= {_MODEL_KEYS[key].removeprefix("model."): only for key, only in _FIXED_IN_V2.items()}
    elif raw["pe"] != "rotary":
        section.pop("d_rotary", None)
    if "d_rotary" in section:
        checks.check_count("pe_rotary_dims", section["d_rotary"], 2)
    return section


def _architecture(raw: Mapping[str, Any]) -> str:
    return "v2" if "d_head" in raw else "v1"


def _check_keys(raw: Mapping[str, Any], required: Collection[str]) -> None:
    unknown = [key for key in raw if key not in KNOWN]
    if unknown:
        described = []
        for key in unknown[:4]:
            close = checks.nearest(key, KNOWN)
            described.append(f"{checks.dotted(key)}{f' (did you mean {close}?)' if close else ''}")
        more = f", and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise ConfigError(
            f"unknown {'key' if len(unknown) == 1 else 'keys'} {', '.join(described)}{more}; JSON holds the original's "
            "flat keys, and this version's own are written in TOML"
        )
    _check_missing(raw, required)


def _check_missing(raw: Mapping[str, Any], required: Collection[str]) -> None:
    missing = [key for key in required if key not in raw]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}")


def _batch_size(raw: Mapping[str, Any], n_devices: int) -> tuple[int, str]:
    """Sequences per optimizer step, whatever devices are present, and the product that gives them."""
    for key in ("cores_per_replica", "per_replica_batch"):
        checks.check_count(key, raw[key], 1)
    for key in ("gradient_accumulation_steps", "tpu_size"):
        checks.check_count(key, raw.get(key, 1), 1)
    accumulation, per_replica = raw.get("gradient_accumulation_steps", 1), raw["per_replica_batch"]
    cores = raw["cores_per_replica"]
    if "tpu_size" in raw:
        devices = raw["tpu_size"]
        if devices % cores:
            raise ConfigError(
                f"tpu_size = {devices} must be divisible by cores_per_replica = {cores}; "
                f"{math.ceil(devices / cores) * cores} would do"
            )
    else:
        devices, cores = n_devices, math.gcd(cores, n_devices)
    return accumulation * per_replica * devices // cores, f"{accumulation} x {per_replica} x {devices} / {cores}"


def _mesh(raw: Mapping[str, Any], n_devices: int) -> tuple[dict[str, int], list[str]]:
    """The `[mesh]` section: as many tensor shards as the original had, or the most that divide both."""
    cores = raw["cores_per_replica"]
    tensor = math.gcd(cores, n_devices)
    notes = []
    if _architecture(raw) == "v2":
        notes.append(f"cores_per_replica = {cores}: model.n_shards, the number of v2's attention heads")
        # Its parameters rested divided over all devices (docs/formats.md, section 8).
        mesh = {"tensor": tensor, "data": 1, "fsdp": n_devices // tensor, "zero": 3}
    else:
        if cores > 1 and raw["norm"] == "layernorm-desync":
            raise ConfigError(
                f'norm = "layernorm-desync" with cores_per_replica = {cores} is not supported: each shard normalises '
                "with its own values, and here a model has one; expected cores_per_replica = 1"
            )
        mesh = {"tensor": tensor}
    if tensor != cores:
        devices = "1 device" if n_devices == 1 else f"{n_devices} devices"
        notes.append(f"cores_per_replica = {cores}: mesh.tensor = {tensor}, its largest divisor for {devices}")
    return mesh, notes


def _batch_notes(raw: Mapping[str, Any], product: str, batch_overridden: bool) -> list[str]:
    notes = []
    if batch_overridden:
        if "tpu_size" in raw:
            notes.append(f"tpu_size = {raw['tpu_size']}: not used, as train.batch_size is set beside the file")
    elif "tpu_size" in raw:
        notes.append(f"tpu_size = {raw['tpu_size']}: ignored for devices, it only sets train.batch_size = {product}")
    else:
        notes.append(f"tpu_size is missing: the devices that are present set train.batch_size = {product}")
    return notes


def _check_run_directory(raw: Mapping[str, Any], overridden: Collection[str], notes: list[str]) -> None:
    given = [f"{key} = {checks.shown(raw[key])}" for key in ("bucket", "model_dir") if key in raw]
    if not given:
        return
    if "log.directory" in overridden:
        notes.append(f"{', '.join(given)}: not used, as log.directory is set beside the file")
        return
    raise ConfigError(
        f"{', '.join(given)}: the run would be written to gs://{raw.get('bucket', '')}/{raw.get('model_dir', '')}, and "
        "this version writes runs to a local disk only; choose a directory with --set log.directory=runs"
    )


def _data_section(raw: Mapping[str, Any]) -> dict[str, Any]:
    train, validation = raw["train_set"], raw["val_set"]
    checks.check_text("train_set", train, "pile.train.index")
    if isinstance(validation, str):
        checks.check_text("val_set", validation, "pile.val.index")
        validation = {"validation": validation}
    checks.check_type("val_set", validation, "table", '{"pile": "pile.val.index"}')
    for name, where in validation.items():
        checks.check_text(checks.dotted("val_set", name), where, "pile.val.index")
    section = {
        "train": _under_data(train),
        "validation": {name: _under_data(where) for name, where in validation.items()},
        "sequence_length": raw["seq"],
        "shuffle": False,  # the original read its files in order; they were shuffled when they were made
    }
    n_vocab = raw["n_vocab"]
    if isinstance(n_vocab, int) and n_vocab >= _GPT2_IDS:
        section["tokenizer"] = "gpt2"
    return section


def _evaluate_section(raw: Mapping[str, Any], overridden: Collection[str], notes: list[str]) -> dict[str, Any]:
    """The original ran its tasks with every validation."""
    given = raw.get("eval_harness_tasks", [])
    tasks = tuple(_TASKS.get(name, name) for name in checks.check_texts("eval_harness_tasks", given, '["piqa"]'))
    if not tasks:
        return {}
    if "evaluate.every" not in overridden:
        notes.append(
            f"eval_harness_tasks = {checks.shown(given)}: evaluated every {checks.shown(raw['val_every'])} steps, for "
            "which lm-eval and the tasks' data are needed; --set evaluate.every=0 leaves it out"
        )
    return {"tasks": tasks, "every": raw["val_every"]}


def _under_data(name: str) -> str:
    return name if name.startswith("/") or "://" in name else f"data/{name}"


def _dtypes(raw: Mapping[str, Any], overridden: Collection[str], notes: list[str]) -> dict[str, str]:
    dtypes = {"compute_dtype": "bfloat16"}
    if "train.compute_dtype" not in overridden:
        notes.append(
            'train.compute_dtype = "bfloat16", as the original trained; --set train.compute_dtype=float32 is more exact'
        )
    is_v2 = _architecture(raw) == "v2"
    if is_v2:
        checks.check_type("early_cast", raw.get("early_cast", False), "boolean")
    if raw.get("early_cast", False) if is_v2 else "early_cast" in raw:
        dtypes["param_dtype"] = "bfloat16"
        if "train.param_dtype" not in overridden:
            why = "" if is_v2 else "by its mere presence, as in the original, "
            notes.append(
                f"warning: early_cast = {checks.shown(raw['early_cast'])}: {why}"
                'train.param_dtype = "bfloat16"; remove the key to keep parameters in float32'
            )
    checks.check_type("bf16_optimizer", raw.get("bf16_optimizer", False), "boolean")
    if raw.get("bf16_optimizer", False):
        dtypes["moment_dtype"] = "bfloat16"
    return dtypes


def _unused(raw: Mapping[str, Any]) -> list[str]:
    """Notes on keys without a meaning here; a value that asks for nothing needs no note."""
    meaningless = {
        "wandb_project": "not used; --set log.wandb_project=... logs to Weights & Biases",
        "val_batch_multiplier": "ignored; multiply train.validation_batches instead to validate on more sequences",
        "comment": "ignored, as it was never read",
        "early_collect": "ignored, it belongs to the original's second (v2) architecture",
        "eval_only": "ignored, it belongs to the original's second (v2) architecture",
        "gen_length": "ignored, it belongs to the original's second (v2) architecture",
    }
    idle: dict[str, Any] = {"val_batch_multiplier": 1, "wandb_project": "", "comment": ""}
    if _architecture(raw) == "v2":
        _check_v2_switches(raw)
        meaningless |= {
            "gen_length": "ignored, training does not generate",
        }
        del meaningless["early_collect"]  # train.gather
        idle |= {"eval_only": False}
        meaningless |= {key: f'not looked at, v2 always has "{only}"' for key, only in _FIXED_IN_V2.items()}
        idle |= _FIXED_IN_V2
    notes = [
        f"{key} = {checks.shown(raw[key])}: {reason}"
        for key, reason in meaningless.items()
        if key in raw and not (key in idle and raw[key] == idle[key])
    ]
    if _architecture(raw) == "v1" and "pe_rotary_dims" in raw and raw["pe"] != "rotary":
        notes.append(f'pe_rotary_dims = {checks.shown(raw["pe_rotary_dims"])}: ignored, it needs pe = "rotary"')
    return notes


def _check_v2_switches(raw: Mapping[str, Any]) -> None:
    for key, default in (("early_collect", True), ("eval_only", False)):
        checks.check_type(key, raw.get(key, default), "boolean")
    if raw.get("eval_only", False):
        raise ConfigError(
            "eval_only = true: the original loaded such a model without its optimizer, to evaluate it, and this would "
            "train it; remove the key to train"
        )
