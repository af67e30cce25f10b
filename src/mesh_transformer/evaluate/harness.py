"""lm-evaluation-harness' model class. Importing this registers it there as "mesh_transformer".

lm_eval.simple_evaluate("mesh_transformer", model_args="pretrained=runs/notes", tasks=["lambada_openai"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from mesh_transformer.evaluate.installed import require_harness

require_harness()

import jax  # noqa: E402
import lm_eval.models  # noqa: E402, F401 - the harness' own names, which it looks up only where there are none yet
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402

from mesh_transformer.api import Model, load  # noqa: E402
from mesh_transformer.config.errors import UserError  # noqa: E402
from mesh_transformer.config.model import ModelConfig  # noqa: E402
from mesh_transformer.data.tokenizer import Tokenizer  # noqa: E402
from mesh_transformer.engine.packing import Pair  # noqa: E402
from mesh_transformer.engine.scoring import Progress, Scorer  # noqa: E402
from mesh_transformer.evaluate.encoding import clean, encode_legacy, encode_pairs, end_of_text, start_of_text  # noqa: E402
from mesh_transformer.evaluate.generation import sampling_options  # noqa: E402
from mesh_transformer.evaluate.perplexity import rolling_windows  # noqa: E402
from mesh_transformer.evaluate.together import Computing  # noqa: E402
from mesh_transformer.model.params import count_params  # noqa: E402
from mesh_transformer.model.policy import ComputePolicy  # noqa: E402
from mesh_transformer.processes import ONE, Processes  # noqa: E402
from mesh_transformer.shapes import Params  # noqa: E402
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout  # noqa: E402

Answer = TypeVar("Answer")
_NOTHING: Progress = lambda stage, done, total: None  # noqa: E731


class HarnessModel(LM):
    """A model as lm-evaluation-harness sees it: one process, whatever the mesh.

    Tokens, cuts and windows are those of the harness' own `hf` model. What was computed: `scorer.counts`, and
    `n_written` tokens of texts.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        policy: ComputePolicy,
        tokenizer: Tokenizer | None,
        layout: Layout = ONE_DEVICE_LAYOUT,
        *,
        legacy_prompts: bool = False,
        shared: bool = True,
        seed: int = 1234,
        batch_size: int | None = None,
        progress: Progress = _NOTHING,
        processes: Processes = ONE,
    ) -> None:
        """
        Args:
            legacy_prompts: contexts and continuations as the original's adaptor made them (`encoding.encode_legacy`).
            shared: compute what texts begin with in common once.
            seed: of sampled texts; the completions of one prompt are numbered.
            batch_size: texts that are scored at one time; by default as many as fit, by their lengths.
            progress: called with a stage, what is done and what there is to do.
            processes: that the layout spans; the harness runs in the first one, within `computing.together`.

        Raises:
            UserError: there is no tokenizer, or the layout has a pipeline.
        """
        super().__init__()
        if tokenizer is None:
            raise UserError(f"this model has no tokenizer (n_vocab = {cfg.n_vocab}), and tasks are text; give one")
        self.cfg, self._texts, self.n_written = cfg, tokenizer, 0
        how: dict[str, Any] = {"processes": processes, "batch_size": batch_size}
        self.computing = Computing(cfg, params, policy, tokenizer, layout, **how)
        self.legacy_prompts, self.shared, self.seed, self.progress = legacy_prompts, shared, seed, progress

    @classmethod
    def of(cls, model: Model, **how: Any) -> HarnessModel:
        """The harness' view of an open model; `how` as `__init__`."""
        return cls(model.config, model.params, model.policy, model.tokenizer, model.layout, **how)

    def with_params(self, params: Params) -> HarnessModel:
        """Itself, now with these parameters of the same shapes; nothing is compiled again."""
        self.computing.use(params)
        return self

    @property
    def scorer(self) -> Scorer:
        """What scores, and counts what it did."""
        return self.computing.scorer

    # What the harness asks of a model, under its names.

    @property
    def eot_token_id(self) -> int:
        """The end-of-text id."""
        return end_of_text(self._texts)

    @property
    def max_length(self) -> int:
        """Tokens that the context holds."""
        return self.cfg.n_ctx

    @property
    def tokenizer_name(self) -> str:
        """Names what requests are cached by."""
        return self._texts.name

    def get_model_info(self) -> dict[str, Any]:
        """What is recorded beside the results."""
        return {"model_num_parameters": count_params(self.cfg), "n_ctx": self.cfg.n_ctx, "tokenizer": self._texts.name}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises UserError: tasks are asked in plain text."""
        raise UserError("tasks are asked in plain text, without a chat template; leave --apply_chat_template out")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-likelihood in nats, and whether greedy decoding would write it."""
        texts = [request.args for request in requests]
        if self.legacy_prompts:
            pairs = [encode_legacy(self._texts, text[0], text[1], self.cfg.n_ctx) for text in texts]
        else:
            pairs = encode_pairs(self._texts, [(text[0], text[1]) for text in texts])
        found = self._score(pairs)
        self._remember("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each text: its log-likelihood in nats, in windows that score every token once."""
        texts = [clean(*request.args) if self.legacy_prompts else request.args[0] for request in requests]
        ids = self._texts.encode_prompts(texts, allow_special=True)
        start = end_of_text(self._texts) if self.legacy_prompts else start_of_text(self._texts)
        windows = [list(rolling_windows(each, start, self.cfg.n_ctx)) for each in ids]
        scores = iter(self._score([window for of_text in windows for window in of_text]))
        found = [float(sum(next(scores)[0] for _ in of_text)) for of_text in windows]
        self._remember("loglikelihood_rolling", requests, found)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A completion of each (context, options), up to and without the first stop string."""
        prompts, options, seen = [], [], dict[str, int]()
        contexts = [clean(request.args[0]) if self.legacy_prompts else request.args[0] for request in requests]
        encoded = self._texts.encode_prompts(contexts, allow_special=True)
        for request, ids in zip(requests, encoded, strict=True):
            context, how = request.args
            number = seen[context] = seen.get(context, -1) + 1  # of several completions of one prompt
            wanted = sampling_options(how, self._texts, self.cfg.n_ctx, seed=self.seed, sample=number)
            prompts.append(ids[-(self.cfg.n_ctx - wanted.max_tokens) :])
            options.append(wanted)
        found, done = [""] * len(prompts), 0
        for piece in self.computing.stream(prompts, options):
            if piece.completion is not None:
                found[piece.row], done = piece.completion.text, done + 1
                self.n_written += len(piece.completion.tokens)
                self.progress("writing", done, len(prompts))
        self._remember("generate_until", requests, found)
        return found

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        return self.computing.score(pairs, shared=self.shared, progress=self.progress)

    def _remember(self, kind: str, requests: list[Instance], answers: Sequence[Any]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)


@register_model("mesh_transformer")
class LoadedHarnessModel(HarnessModel):
    """The same, opened by the harness: `--model mesh_transformer --model_args pretrained=MODEL,dtype=float32`."""

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str | None = None,
        tokenizer: str | None = None,
        step: int | None = None,
        config: str | None = None,
        mesh: str | None = None,
        quantize: str | None = None,
        legacy_prompts: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """
        Args:
            pretrained: MODEL, as every command takes it. dtype to quantize: as `api.load`; `mesh` with ":" or "+" for
                the commas that the harness takes for its own.
            legacy_prompts: as `HarnessModel`.
            batch_size: as `HarnessModel`; "auto" and 1, which the harness' command says unasked, are its default.
            max_batch_size: not taken.
            device: where it is not "cuda:0", which the harness says unasked, that of JAX.

        Raises:
            UserError: `device`, `batch_size` or `max_batch_size` is another, or as `HarnessModel`; and what `api.load`
                raises.
        """
        kind = {"cuda": "gpu"}.get(str(device).partition(":")[0], str(device).partition(":")[0])
        if device not in (None, "cuda:0") and kind != jax.default_backend():
            raise UserError(f"device = {device!r}: JAX chooses it; set JAX_PLATFORMS=cpu, cuda or tpu instead")
        if max_batch_size is not None:
            raise UserError(
                f"max_batch_size = {max_batch_size} is not taken: batch_size says how many rows there are at the most"
            )
        laid = mesh.replace(":", ",").replace("+", ",") if mesh else None
        opened = load(
            str(pretrained), dtype=dtype, tokenizer=tokenizer, step=step, config=config, mesh=laid, quantize=quantize
        )
        how: dict[str, Any] = {"legacy_prompts": legacy_prompts, "batch_size": _batch_size(batch_size)}
        super().__init__(opened.config, opened.params, opened.policy, opened.tokenizer, opened.layout, **how)


def _batch_size(given: int | str | None) -> int | None:
    """Rows at the most; None: by their lengths. lm-eval's command gives 1 where its user gave nothing."""
    text = str(given)
    if given is None or text == "1" or text.partition(":")[0] == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"batch_size = {given!r}: expected auto or a whole number of at least 1")
    return int(text)
