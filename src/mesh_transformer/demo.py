"""The main job on an embedded default: corpus, tokenizer, training, baselines, samples."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.api import Model, load
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import DataConfig, LogConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.data.corpus import Corpus, Document, build_corpus
from mesh_transformer.data.ngram import NgramBaseline
from mesh_transformer.data.prepare import prepare
from mesh_transformer.data.source import open_source
from mesh_transformer.data.tokenizer import train_bpe
from mesh_transformer.files import write_atomically
from mesh_transformer.train.loop import Observer
from mesh_transformer.train.metrics import read_metrics
from mesh_transformer.train.plot import plot_loss
from mesh_transformer.train.run import train

STEPS = 1000
VALIDATION = "held out"
PROMPTS = ('import os\n\n\ndef read(path):\n    """', "The for statement", "class Queue:\n")
_SAMPLE_TOKENS = 120


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """How the demo ended; `text` is the summary for the terminal, empty if a signal stopped it."""

    step: int
    stopped_by: int | None
    text: str


def run_demo(out: Path, *, steps: int | None, seed: int, observer: Observer) -> DemoResult:
    """Trains in run directory `out`, going on if it was begun before, then compares and writes.

    Raises:
        UserError: `steps` is not positive, or `out` cannot be used.
    """
    steps = STEPS if steps is None else steps
    if steps < 1:
        raise UserError(f"--steps {steps} must be at least 1")
    begun = time.monotonic()
    model = preset("gpt-j-demo")
    data = out.absolute() / "data"
    bytes_per_token = _prepare_data(data, model.n_vocab, model.n_ctx, observer)
    run = RunConfig(
        name=out.absolute().name,
        seed=seed,
        model=model,
        data=DataConfig(
            train=str(data / "train.index"),
            validation={VALIDATION: str(data / "held_out.index")},
            sequence_length=model.n_ctx,
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=8,
            learning_rate=2e-3,
            warmup_steps=steps // 20,
            anneal_steps=steps - steps // 20,
            validate_every=max(1, steps // 5),
            validation_batches=10_000,
            checkpoint_every=max(1, steps // 5),
        ),
        mesh=MeshConfig(data=1),
        log=LogConfig(directory=str(out.absolute().parent)),
    )
    result = train(run, observer)
    if result.stopped_by is not None:
        return DemoResult(result.step, result.stopped_by, "")
    observer.note("unigram and bigram baselines on the same split")
    baselines = _baselines(run)
    opened = load(out)
    samples = _samples(opened, seed)
    directory = RunDirectory(out)
    write_atomically(directory.samples, samples.encode())
    records = read_metrics(directory.metrics)
    plot_loss(records, directory.loss_plot, f"{run.name}: GPT-J on Python's own text", baselines)
    text = _summary(out, records, baselines, bytes_per_token, samples, time.monotonic() - begun)
    return DemoResult(result.step, None, text)


def _prepare_data(data: Path, n_vocab: int, sequence_length: int, observer: Observer) -> float:
    """Writes the corpus as records once; returns bytes of held-out text per held-out token."""
    facts = data / "facts.json"
    if not facts.exists():
        observer.note("building a corpus from this Python's documentation topics and standard library")
        corpus = build_corpus()
        data.mkdir(parents=True, exist_ok=True)
        observer.note(f"training a tokenizer of {n_vocab} tokens")
        tokenizer = train_bpe([d.text for d in corpus.train_documents], n_vocab)
        reports = {}
        for name, documents in _parts(corpus).items():
            text = data / f"{name}.jsonl"
            lines = (json.dumps({"text": d.text, "name": d.name}) for d in documents)
            write_atomically(text, "\n".join(lines).encode())
            reports[name] = prepare(
                [text], data / name, tokenizer=tokenizer, sequence_length=sequence_length, overwrite=True
            )
        n_bytes = sum(len(d.text.encode()) for d in corpus.validation_documents)
        held_out, training = reports["held_out"], reports["train"]
        write_atomically(
            facts,
            json.dumps(
                {
                    "bytes_per_token": n_bytes / held_out.tokens,
                    "training_tokens": training.tokens,
                    "held_out_tokens": held_out.tokens,
                }
            ).encode(),
        )
    found = json.loads(facts.read_text())
    observer.note(f"{found['training_tokens']:,} tokens to train on, {found['held_out_tokens']:,} held out")
    return float(found["bytes_per_token"])


def _parts(corpus: Corpus) -> dict[str, list[Document]]:
    return {"train": corpus.train_documents, "held_out": corpus.validation_documents}


def _baselines(run: RunConfig) -> dict[str, float]:
    """Nats a token of the unigram and the interpolated bigram, on the sequences that the model is validated on."""

    def rows(spec: str) -> np.ndarray:
        source = open_source(spec, sequence_length=run.data.sequence_length, n_vocab=run.model.n_vocab)
        return np.stack([source[i] for i in range(len(source))])

    held_out = rows(run.data.validation[VALIDATION])
    held_out = held_out[: len(held_out) // run.train.batch_size * run.train.batch_size]
    assert isinstance(run.data.train, str)
    ngram = NgramBaseline.fit(rows(run.data.train), run.model.n_vocab)
    return {"unigram": ngram.unigram_loss(held_out), "bigram": ngram.bigram_loss(held_out)}


def _samples(model: Model, seed: int) -> str:
    texts = []
    for i, prompt in enumerate(PROMPTS):
        # A seed each: under one seed, different prompts draw the same random numbers at the same positions.
        completion = model.generate(prompt, max_tokens=_SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=seed + i)[0]
        texts.append("-" * 80 + f"\n{prompt}{completion.text}\n")
    return "".join(texts)


def _summary(
    out: Path,
    records: list[dict[str, Any]],
    baselines: dict[str, float],
    bytes_per_token: float,
    samples: str,
    seconds: float,
) -> str:
    loss = [r["loss"] for r in records if r.get("validation") == VALIDATION][-1]
    rates = [r["tokens_per_second"] for r in records if "validation" not in r]
    lines = [samples, f"{'held-out text':16} nats a token   bits a byte"]
    for name, value in {"this model": loss, **baselines}.items():
        lines.append(f"{name:16} {value:12.4f} {value / math.log(2) / bytes_per_token:13.4f}")
    lines += [
        f"\n{np.median(rates):,.0f} tokens a second in training; {seconds / 60:.1f} minutes in all",
        f"loss curve: {out / 'loss.png'}   samples: {out / 'samples.txt'}   every step: {out / 'metrics.jsonl'}\n",
        "next:",
        f"  mesh-transformer generate {out} --prompt 'def main' --max-tokens 100 --temperature 0.7",
        f"  mesh-transformer inspect {out}",
        f"  mesh-transformer demo --out {out} --steps {2 * STEPS}   # goes on from the checkpoint",
        "  mesh-transformer prepare YOUR_TEXT.txt --out data/mine --tokenizer gpt2 --validation-fraction 0.05",
    ]
    return "\n".join(lines)
