"""A report of a run: one HTML file that needs nothing else, neither a network nor a script."""

from __future__ import annotations

import dataclasses
import gc
import html
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from mesh_transformer.api import Model, load
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.config.errors import MeshTransformerError, UserError
from mesh_transformer.data.tokenizer import Tokenizer
from mesh_transformer.files import write_atomically
from mesh_transformer.report import compared_sections, sections
from mesh_transformer.report.compared_sections import Decode
from mesh_transformer.report.facts import Base, Facts, choose_base, read_facts
from mesh_transformer.report.material import gather_material
from mesh_transformer.report.observing import Material, Observation, observe

ROWS = 16
FILE = "report.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """base: the model to compare with; None: chosen. prompts: continued by both; none: beginnings of held-out rows.

    rows: sequences looked at of the training data and of each validation set. dtype: as `api.load` takes it.
    """

    base: str | None = None
    prompts: tuple[str, ...] = ()
    rows: int = ROWS
    dtype: str | None = None


def write_report(
    run: str | Path,
    out: str | Path | None = None,
    options: ReportOptions | None = None,
    note: Callable[[str], None] = print,
) -> Path:
    """Writes the report of a run directory and returns where it is: `out`, or report.html in the run directory.

    What cannot be found out is left out, and its section says why.

    Raises:
        UserError: `run` is no run directory, or a model that was asked for by name cannot be used.
        ConfigError: its config.toml is damaged.
    """
    options = options or ReportOptions()
    facts = read_facts(run)
    if options.base is not None:
        open_weights(options.base)  # a mistake in its name is told before the work begins
    target = Path(out) if out is not None else facts.path / FILE
    parts = [
        sections.beginning(facts),
        sections.configuration(facts),
        sections.curves(facts),
        sections.validation(facts),
        *_compared(facts, options, note),
        sections.evaluation(facts),
    ]
    write_atomically(target, page(facts.run.name, parts).encode("utf-8", "replace"))
    return target


def page(title: str, parts: list[str]) -> str:
    """The whole file. Its policy forbids a browser to fetch anything or to run a script."""
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>\n{style}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _compared(facts: Facts, options: ReportOptions, note: Callable[[str], None]) -> list[str]:
    """The sections for which the models are opened, one after the other; never both at a time."""
    base = choose_base(facts, options.base)
    try:
        note(f"opening {facts.path}")
        model = load(facts.path, dtype=options.dtype)
        material = gather_material(facts, model, list(options.prompts), options.rows)
        note("looking at the model after training")
        after = observe(model, material, seed=facts.run.seed)
    except MeshTransformerError as error:
        if options.prompts or options.base:
            raise  # somebody asked for this very thing
        why = f"Samples, held-out loss, tokens and copies are missing: {first_line(error)}"
        return [sections.section("Before and after", sections.paragraph(why))]
    tokenizer = model.tokenizer
    del model
    gc.collect()
    before, words = _look_at_base(base, material, facts, options, note)
    return _sections(before, after, material, _decoder(tokenizer), words)


def _look_at_base(
    base: Base, material: Material, facts: Facts, options: ReportOptions, note: Callable[[str], None]
) -> tuple[Observation | None, str]:
    """What the base says, and a sentence on what it is or why there is none."""
    if base.path is None:
        return None, f"Nothing to compare with: {base.name}."
    try:
        note(f"looking at the model before it: {base.name}")
        model = load(base.path, step=base.step, dtype=options.dtype)
        _check_alike(model, facts)
        return observe(model, material, seed=facts.run.seed), f"Before: {base.name}. After: the newest checkpoint."
    except MeshTransformerError as error:
        if options.base:
            raise
        return None, f"Nothing to compare with: {base.name}, cannot be used: {first_line(error)}"


def _check_alike(model: Model, facts: Facts) -> None:
    for name in ("n_vocab", "n_ctx"):
        there, here = getattr(model.config, name), getattr(facts.run.model, name)
        if there < here:
            raise UserError(f"its {name} is {there}, that of the run {here}\ngive --base a model of the run's kind")


def _sections(
    before: Observation | None, after: Observation, material: Material, decode: Decode, words: str
) -> list[str]:
    parts = [
        sections.section("Before and after", sections.paragraph(words)),
        compared_sections.losses(before, after),
        compared_sections.samples(before, after, material, decode),
    ]
    if before is not None:
        parts.append(compared_sections.moved(before, after, material, decode))
    else:
        missing = sections.paragraph("None: there is no model to compare with.")
        parts.append(sections.section("Tokens that moved most", missing))
    parts.append(compared_sections.memorised(before, after, material, decode))
    return parts


def _decoder(tokenizer: Tokenizer | None) -> Decode:
    if tokenizer is not None:
        return lambda ids: tokenizer.decode(ids)
    return lambda ids: "".join(f"[{token}]" for token in ids)


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return str(error).partition("\n")[0]
