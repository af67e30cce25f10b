"""The keys of a family's config.json: asked for one by one, so that one that nobody asked for is noticed.

A key that is neither read by a family nor known to change nothing is refused by its name: it might change the
arithmetic.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.model import ModelConfig

# Keys that change no logit: names, dropout, which is of training, initialisation, generation, labels, storage.
_IDLE = re.compile(
    r"_name_or_path|architectures|model_type|(torch_)?dtype|transformers(_version|\.js_config)|use_cache|use_bfloat16|"
    r".*_token_id|.*token_ids|.*dropout(_prob)?|.*_pdrop|initializer_.*|summary_.*|tokenizer_class|"
    r"task_specific_params|gradient_checkpointing|return_dict.*|output_.*|torchscript|pruned_heads|is_decoder|"
    r"is_encoder_decoder|chunk_size_feed_forward|keys_to_ignore_at_inference|attn_implementation|"
    r"_attn_implementation.*|pretraining_tp|max_length|min_length|do_sample|early_stopping|num_beam.*|"
    r"diversity_penalty|temperature|top_[kp]|typical_p|.*_penalty|.*no_repeat_ngram_size|bad_words_ids|"
    r"num_return_sequences|finetuning_task|id2label|label2id|num_labels|prefix|problem_type|tf_legacy_loss|"
    r"remove_invalid_values|.*suppress_tokens|reorder_and_upcast_attn|attention_layers|_num_labels|"
    r"is_[a-z]+_config|unsloth_\w+|auto_map|neftune_\w+|max_sequence_length"
)


class Keys:
    """The keys of one config.json; remembers which were asked for."""

    def __init__(self, file: Path, found: Mapping[str, Any]) -> None:
        self.file, self._found = file, found
        self._known: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or what transformers takes where it is left out."""
        self._known.add(key)
        return self._found.get(key, default)

    def size(self, key: str, default: Any = None) -> Any:
        """The value of a key for which 0 would stand for a default of ours; null is left out."""
        value = self.get(key, default)
        if value == 0:
            raise CheckpointError(f"{self.file}: {key} is 0; expected at least 1")
        return value

    def whole(self, key: str, default: Any = None) -> int:
        """The value of a key that must be a whole number."""
        value = self.get(key, default)
        if type(value) is not int:
            raise CheckpointError(f"{self.file}: {key} is {value!r:.80}; expected a whole number")
        return value

    def only(self, key: str, *expected: Any) -> Any:
        """The value of a key that may be one of these; the first where it is left out."""
        value = self.get(key, expected[0])
        if value not in expected:
            raise CheckpointError(
                f"{self.file}: {key} is {value!r:.80}; only {' or '.join(map(repr, expected))} is supported"
            )
        return value

    def refuse(self, key: str, why: str) -> CheckpointError:
        """The error for a key whose value is not supported."""
        return CheckpointError(f"{self.file}: {key} is {self._found.get(key)!r:.80}; {why}")

    def check_all_known(self) -> None:
        """Returns if every other key is one that changes nothing, or is null or false."""
        for key, value in self._found.items():
            if key not in self._known and not _IDLE.fullmatch(key) and value is not None and value is not False:
                raise CheckpointError(
                    f"{self.file}: {key} = {value!r:.80} is not known for this model_type and may change its "
                    "arithmetic; remove it if it does not"
                )


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One family's config.json.

    sizes: our field -> their key, all required but those in `defaults`. d_ff: their key for it, null for 4 d_model.
    options: everything else, read; described: everything else, written.
    """

    sizes: Mapping[str, str]
    d_ff: str
    options: Callable[[Keys], dict[str, Any]]
    described: Callable[[ModelConfig], dict[str, Any]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"norm_eps": 1e-5})

    def read(self, keys: Keys) -> dict[str, Any]:
        """Our fields.

        Raises:
            CheckpointError: a key is missing, unknown, or of a value that is not supported.
        """
        fields = {ours: keys.get(theirs, self.defaults.get(ours)) for ours, theirs in self.sizes.items()}
        missing = [self.sizes[ours] for ours, value in fields.items() if value is None]
        if missing:
            raise CheckpointError(f"{keys.file}: lacks {', '.join(missing)}")
        wide = keys.size(self.d_ff)
        fields |= {} if wide is None else {"d_ff": wide}
        fields |= self.options(keys)
        keys.check_all_known()
        return fields

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """Their keys."""
        own = {theirs: getattr(cfg, ours) for ours, theirs in self.sizes.items()}
        return own | {self.d_ff: cfg.d_ff} | self.described(cfg)
