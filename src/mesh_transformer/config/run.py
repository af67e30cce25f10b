"""What one training run is: data, training, mesh and logging beside the architecture.

Plain facts, checked where they are made. Nothing here reads a file or looks at a device.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from mesh_transformer.config import checks
from mesh_transformer.config.dtypes import dtype_name
from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.tuning import EvaluateConfig, LoraConfig

ZLossKind = Literal["legacy", "log_partition"]
Remat = Literal["none", "dots", "full"]
Gather = Literal["per_layer", "per_step"]

MESH_AXES = ("data", "fsdp", "tensor", "pipeline")
# Default of a field that is worked out from its neighbours.
_FROM_OTHERS: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from.

    `train` and each value of `validation` is an index, a .tfrecords file, a glob or a directory, local or an fsspec
    URL. `train` may be several such by name, a mixture: `weights` says in which proportion sequences are taken from
    them, by default in that of their numbers of sequences. `tokenizer` is "gpt2", "bytes" or the path of a
    tokenizer.json; None leaves it to the data's own record. `shuffle = false` reads in file order, as the original
    did. `separate_documents`: no token attends to, or is predicted from, what stands before the end-of-text token
    that precedes its document.

    Raises:
        ConfigError: a value is impossible; the message names the key.
    """

    train: str | Mapping[str, str]
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    validation: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name of the set -> where it is
    tokenizer: str | None = None
    sequence_length: int  # tokens that the model sees at once; a record holds one more
    shuffle: bool = True
    separate_documents: bool = False

    def __post_init__(self) -> None:
        self._check_train()
        if not isinstance(self.validation, Mapping):
            where = self.validation if isinstance(self.validation, str) else "data/pile.val.index"
            checks.check_type("data.validation", self.validation, "table", f"{{ validation = {checks.shown(where)} }}")
        _check_sets("validation", self.validation, "data/pile.val.index")
        for name in ("train", "weights", "validation"):  # copies, so that the caller's dict can change
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(getattr(self, name)))
        for name in ("shuffle", "separate_documents"):
            checks.check_type(f"data.{name}", getattr(self, name), "boolean")
        if self.tokenizer is not None:
            checks.check_text("data.tokenizer", self.tokenizer, "gpt2")
        checks.check_count("data.sequence_length", self.sequence_length, 1)

    def _check_train(self) -> None:
        if not isinstance(self.train, Mapping):
            checks.check_text("data.train", self.train, "data/pile.train.index")
        elif not self.train:
            raise ConfigError('data.train = {} names no data; expected for example "data/pile.train.index"')
        else:
            _check_sets("train", self.train, "data/pile.train.index")
        names = list(self.train) if isinstance(self.train, Mapping) else []
        if not isinstance(self.weights, Mapping):
            checks.check_type("data.weights", self.weights, "table", "{ pile = 0.7, code = 0.3 }")
        if not self.weights:
            return
        if set(self.weights) != set(names):
            given, needed = ", ".join(self.weights), ", ".join(names) or "no names, but one data set"
            raise ConfigError(f"data.weights has {given}, and data.train has {needed}; give one weight to each name")
        for name, weight in self.weights.items():
            checks.check_number(checks.dotted("data", "weights", name), weight)
            if not weight:
                raise ConfigError(
                    f"{checks.dotted('data', 'weights', name)} = 0: nothing would be read from it; "
                    f"leave {name} out of data.train and data.weights, or give it a weight above 0"
                )


def _check_sets(key: str, sets: Mapping[str, str], example: str) -> None:
    for name, where in sets.items():
        checks.check_text(f"a name in data.{key}", name, "pile")
        checks.check_text(checks.dotted("data", key, name), where, example)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One optimisation: length, schedule, loss, precision and cadence.

    The length is `steps`, or `epochs` over the training data, which `with_steps` turns into steps once the data has
    been counted; until then whatever depends on the steps is None. `warmup_fraction` (of the steps) may stand in
    place of `warmup_steps`. Left out, `end_learning_rate` is `learning_rate / 10`, `warmup_steps` is
    `min(3000, steps // 20)` and `anneal_steps` is `steps - warmup_steps`. The rate rises linearly from 0 over
    `warmup_steps` updates, falls along half a cosine over `anneal_steps`, and stays at `end_learning_rate`; 0 steps of
    either means none of it.

    Raises:
        ConfigError: a value is impossible; the message names the key.
    """

    steps: int = _FROM_OTHERS  # optimizer steps
    epochs: float | None = None
    batch_size: int = 8  # sequences per optimizer step, over all devices and accumulation
    gradient_accumulation: int = 1  # parts that a batch is cut into, one after the other
    learning_rate: float
    end_learning_rate: float = _FROM_OTHERS
    warmup_steps: int = _FROM_OTHERS
    warmup_fraction: float | None = None
    anneal_steps: int = _FROM_OTHERS
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 1e-4
    z_loss_kind: ZLossKind = "log_partition"
    compute_dtype: str | None = None  # float32 or bfloat16; None: as suits the platform, decided when the run starts
    param_dtype: str = "float32"
    moment_dtype: str = "float32"
    remat: Remat = "none"
    gather: Gather = "per_layer"  # when parameters that rest in shards (mesh.zero = 3) are brought together
    pipeline_microbatches: int = 0  # parts of a batch that follow one another through the stages; 0: chosen
    pipeline_interleave: int = 1  # parts of a stage's layers, dealt to the stages in turn
    noise_scale_alpha: float = 0.01  # factor of the running averages of the gradient noise scale
    step_timeout: float | None = _FROM_OTHERS  # seconds; 0: for ever; None: 600 among several processes
    validate_every: int = 0  # steps; 0: never
    validation_batches: int = 100
    checkpoint_every: int = 500  # steps
    keep_every: int = 0  # checkpoints of steps divisible by it are kept for good; 0: none
    keep_last: int = 3

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise ConfigError("missing: train.steps (or train.epochs)")
        at_least_one = ("batch_size", "gradient_accumulation", "pipeline_interleave", "checkpoint_every")
        for name in (*at_least_one, "keep_last", *(["steps"] if self.steps is not None else [])):
            checks.check_count(f"train.{name}", getattr(self, name), 1)
        for name in ("validate_every", "validation_batches", "keep_every", "pipeline_microbatches"):
            checks.check_count(f"train.{name}", getattr(self, name), 0)
        for name in ("learning_rate", "weight_decay", "z_loss"):
            checks.check_number(f"train.{name}", getattr(self, name))
        checks.check_number("train.clip_norm", self.clip_norm, positive=True)
        checks.check_number("train.noise_scale_alpha", self.noise_scale_alpha, positive=True)
        if self.noise_scale_alpha > 1:
            raise ConfigError(f"train.noise_scale_alpha = {self.noise_scale_alpha} is too large; expected at most 1")
        self._check_length()
        if self.steps is not None:
            self._fill_in_schedule()
        checks.check_choice("train.z_loss_kind", self.z_loss_kind, get_args(ZLossKind))
        checks.check_choice("train.remat", self.remat, get_args(Remat))
        checks.check_choice("train.gather", self.gather, get_args(Gather))
        if self.step_timeout is not None:
            checks.check_number("train.step_timeout", self.step_timeout)
        self._normalise_dtypes()
        self._check_accumulation()

    def with_steps(self, n_sequences: int) -> TrainConfig:
        """The same with `epochs` over so many sequences as steps, the last one whole; itself where it has no epochs."""
        if self.epochs is None:
            return self
        steps = max(1, math.ceil(self.epochs * n_sequences / self.batch_size))
        return dataclasses.replace(self, steps=steps, epochs=None)

    def _check_length(self) -> None:
        if self.epochs is not None:
            checks.check_number("train.epochs", self.epochs, positive=True)
            if self.steps is not None:
                raise ConfigError(
                    f"train.steps = {self.steps} and train.epochs = {checks.shown(self.epochs)} both say how long to "
                    "train; give one of them"
                )
        if self.warmup_fraction is None:
            return
        checks.check_number("train.warmup_fraction", self.warmup_fraction)
        if self.warmup_fraction > 1:
            raise ConfigError(
                f"train.warmup_fraction = {checks.shown(self.warmup_fraction)} is too large; expected a part of the "
                "steps, at most 1, for example 0.05"
            )
        if self.warmup_steps is not None:
            raise ConfigError(
                f"train.warmup_steps = {checks.shown(self.warmup_steps)} and train.warmup_fraction = "
                f"{checks.shown(self.warmup_fraction)} both say how long the rate rises; give one of them"
            )

    def _fill_in_schedule(self) -> None:
        if self.end_learning_rate is None:
            object.__setattr__(self, "end_learning_rate", self.learning_rate / 10)
        if self.warmup_fraction is not None:
            object.__setattr__(self, "warmup_steps", round(self.warmup_fraction * self.steps))
            object.__setattr__(self, "warmup_fraction", None)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(3000, self.steps // 20))
        checks.check_count("train.warmup_steps", self.warmup_steps, 0)
        if self.anneal_steps is None:
            object.__setattr__(self, "anneal_steps", max(0, self.steps - self.warmup_steps))
        checks.check_count("train.anneal_steps", self.anneal_steps, 0)
        checks.check_number("train.end_learning_rate", self.end_learning_rate)

    def _normalise_dtypes(self) -> None:
        for name in ("compute_dtype", "param_dtype", "moment_dtype"):
            given = getattr(self, name)
            if given is None and name == "compute_dtype":
                continue
            long_name = dtype_name(given, key=f"train.{name}")
            if long_name == "float16":
                raise ConfigError(
                    f"train.{name} = {checks.shown(given)} is not supported in training: its range needs a scaled "
                    "loss, which this version has not; expected float32 or bfloat16"
                )
            object.__setattr__(self, name, long_name)

    def _check_accumulation(self) -> None:
        batch, parts = self.batch_size, self.gradient_accumulation
        if batch % parts:
            below, above = batch // parts * parts, (batch // parts + 1) * parts
            would = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"train.batch_size = {batch} must be divisible by train.gradient_accumulation = {parts}; "
                f"train.batch_size = {would} would do"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are laid out, along four axes; `data = -1` takes what the others leave over.

    The batch lies over data x fsdp, heads, feed-forward and vocabulary over tensor, layers over pipeline. `zero` says
    what `fsdp` shards: 1 the optimizer's moments, 3 the parameters too. `shard_sequence` lays norms and the residual
    stream over `tensor` by their sequence axis. What must divide what is checked when the devices are known.

    Raises:
        ConfigError: a value is impossible.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: int = 1
    shard_sequence: bool = False

    def __post_init__(self) -> None:
        for name in MESH_AXES:
            if name != "data" or self.data != -1:
                checks.check_count(f"mesh.{name}", getattr(self, name), 1)
        checks.check_choice("mesh.zero", self.zero, (1, 3))
        checks.check_type("mesh.shard_sequence", self.shard_sequence, "boolean")


def mesh_from_text(text: str) -> MeshConfig:
    """The mesh that "data=2,tensor=4" means; axes that are not named have one device.

    Raises:
        ConfigError: it is not written so.
    """
    sizes: dict[str, Any] = {"data": 1}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name.strip() not in MESH_AXES or not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", size):
            raise ConfigError(
                f"mesh = {checks.shown(text)}: {checks.shown(part)} is no axis with its size; expected some of "
                f"{', '.join(MESH_AXES)}, for example data=2,tensor=4"
            )
        sizes[name.strip()] = int(size)
    return MeshConfig(**sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where a run is written: `directory` holds run directories, each under its run's name.

    Raises:
        ConfigError: `directory` is a URL.
    """

    directory: str = "runs"
    tensorboard: bool = True  # curves for TensorBoard, under RUN/tensorboard
    wandb_project: str = ""  # of Weights & Biases; empty: off

    def __post_init__(self) -> None:
        checks.check_text("log.directory", self.directory, "runs")
        if "://" in self.directory:
            raise ConfigError(
                f"log.directory = {checks.shown(self.directory)} is a URL, and this version writes runs to a local "
                "disk only; expected a path, for example --set log.directory=runs"
            )
        checks.check_type("log.tensorboard", self.tensorboard, "boolean")
        checks.check_text("log.wandb_project", self.wandb_project, "", empty=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines one training run.

    Raises:
        ConfigError: the parts do not fit each other, or `name` is no directory name, or `seed` is not 32 bits.
    """

    name: str
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        _check_run_name(self.name)
        checks.check_count("seed", self.seed, 0, checks.MAX_SEED)
        if self.data.sequence_length > self.model.n_ctx:
            raise ConfigError(
                f"data.sequence_length = {self.data.sequence_length} is longer than the model's context, "
                f"model.n_ctx = {self.model.n_ctx}; expected at most {self.model.n_ctx}"
            )
        if self.data.separate_documents and self.mesh.pipeline > 1:
            raise ConfigError(
                f"data.separate_documents = true and mesh.pipeline = {self.mesh.pipeline} cannot go together: every "
                "row has a mask of its own, which a pipeline does not pass on; set mesh.pipeline = 1"
            )
        if self.data.validation and self.train.validation_batches == 0:
            raise ConfigError(
                "train.validation_batches = 0 is too small where data.validation names a set; expected at least 1 "
                "(train.validate_every = 0 turns validation off)"
            )

    @property
    def run_directory(self) -> Path:
        """`<log.directory>/<name>`."""
        return Path(self.log.directory) / self.name


def _check_run_name(name: object) -> None:
    checks.check_text("name", name, "my-run")
    assert isinstance(name, str)
    # A bar would make the path of a checkpoint a chain of stores for the library that reads it.
    if name in (".", "..") or re.search(r"[/\\|\x00-\x1f\x7f]", name) or len(name.encode()) > 255:
        mend = re.sub(r"[/\\|\x00-\x1f\x7f]+", "-", name).strip(".-")[:60] or "my-run"
        raise ConfigError(
            f"name = {checks.shown(name)} cannot be the name of a run directory (no slash, no bar, no control "
            f"character, at most 255 bytes); {checks.shown(mend)} would do"
        )
