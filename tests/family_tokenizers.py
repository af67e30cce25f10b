"""Small tokenizers built as those of the families are, and directories that hold them with their chat templates."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

_TEXTS = [
    "The geese waited for the café, and the geese ate.",
    "Seven proofs of one theorem; nobody counted the others.",
    "user assistant system: tell me what the geese ate in the café",
] * 4

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if loop.first and message.role != 'system' %}\n"
    "        {{- '<|im_start|>system\\nYou are a goose.<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if tools %}\n"
    "    {{- '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}\n"
    "{%- endif %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endif %}\n"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{- bos_token }}\n"
    "{%- set ns = namespace(first=true) %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "    {%- if message.role == 'assistant' %}{% generation %}{{ message['content'] | trim }}{% endgeneration %}\n"
    "    {%- else %}{{ message['content'] | trim }}{% endif %}{{- '<|eot_id|>' }}\n"
    "    {%- set ns.first = false %}\n"
    "    {%- if ns.first %}{% break %}{% endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}\n"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def _byte_level(specials: list[str], *, split: bool = False) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    words = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s?\p{L}+|[^\s\p{L}\p{N}]+|\s+"), behavior="isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence([words, letters]) if split else letters
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(_TEXTS, trainer)
    # Special tokens after the others, as Qwen and Llama 3 have them.
    found.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return found


def _sentencepiece(specials: list[str], *, metaspace: bool) -> tokenizers.Tokenizer:
    """As Llama 2's and Mistral's: a visible space, and bytes for the letters that the vocabulary lacks."""
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(_TEXTS, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # é is left to its bytes.
    others = [token for token in model["vocab"] if "é" not in token]
    merges = [tuple(pair) for pair in model["merges"] if "é" not in "".join(pair)]
    vocabulary = {token: i for i, token in enumerate([*first, *others])}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    found = tokenizers.Tokenizer(bpe)
    if metaspace:
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    marked = ["<unk>", "<s>", "</s>", *specials]
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in marked])
    found.post_processor = _begun("<s>", 1)
    return found


def _begun(token: str, number: int) -> Any:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


@functools.cache
def built(name: str) -> tuple[str, dict[str, Any]]:
    """tokenizer.json of a kind of tokenizer, and what stands in its tokenizer_config.json."""
    if name == "qwen":
        found = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        return found.to_str(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    if name == "llama-3":
        marks = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        found = _byte_level(marks, split=True)
        number = found.token_to_id(marks[0])
        found.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), _begun(marks[0], number)])
        return found.to_str(), {"bos_token": marks[0], "eos_token": "<|eot_id|>", "chat_template": LLAMA_3}
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name == "llama-2":
        return _sentencepiece([], metaspace=False).to_str(), own | {"chat_template": LLAMA_2}
    assert name == "mistral", name
    return _sentencepiece(["[INST]", "[/INST]"], metaspace=True).to_str(), own | {"chat_template": MISTRAL}


NAMES = ("qwen", "llama-2", "llama-3", "mistral")
# The names of the tokens by which an answer ends.
ENDS = {
    "qwen": ["<|im_end|>", "<|endoftext|>"],
    "llama-3": ["<|end_of_text|>", "<|eot_id|>"],
    "llama-2": ["</s>"],
    "mistral": ["</s>"],
}


def write(directory: Path, name: str, *, apart: bool = False) -> Path:
    """The files of one of NAMES in `directory`; `apart`: its template in a file of its own, as transformers 5 does."""
    text, config = built(name)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    template = config["chat_template"]
    if apart:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        del config["chat_template"]
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    vocabulary = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    ends = [vocabulary[token] for token in ENDS[name]]
    said = {"eos_token_id": ends if len(ends) > 1 else ends[0], "temperature": 0.6, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(said), encoding="utf-8")
    return directory
