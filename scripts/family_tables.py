"""Writes the tables about families of models that follow from the code, between the marks of three pages.

    python scripts/family_tables.py

docs/families.md: what each family fixes, and the presets with their numbers of parameters. docs/add-a-family.md: lines
of code by family. docs/zero-shot-table.md: the published rows. Nothing is computed but sums of shapes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mesh_transformer.checkpoint import families as names
from mesh_transformer.checkpoint.families import FAMILIES, Family, family_of
from mesh_transformer.checkpoint.huggingface import spellings
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.evaluate.tasks import TABLE
from mesh_transformer.evaluate.zero_shot import COLUMNS, PUBLISHED
from mesh_transformer.model.params import count_params

DOCS = Path(__file__).parents[1] / "docs"
# What a family may fix, as it is called in the table; what it does not name is as GPT-2's relatives have it.
_FIELDS = ("norm", "position", "rotary_layout", "residual", "feed_forward")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _code(values: Sequence[object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _allowed(family: Family, field: str) -> str:
    values = {**names._PLAIN, **family.fields}[field]
    if field == "rotary_layout" and family.fields.get("position") == ("fixed",):
        return ""
    return _code([str(value) for value in values])


def _rest(family: Family) -> str:
    """What else tells it from the others, in words."""
    fields = {**names._PLAIN, **family.fields}
    said = []
    if family.shares_heads:
        said.append("shared key and value heads")
    if isinstance(fields["window"], names._Any):
        said.append("a window in every other layer" if "windowed_layers" in family.fields else "a window")
    if fields["qk_norm"] == (True,):
        said.append("norms of queries and keys")
    if False in fields["scale_scores"]:
        said.append("scores may be left unscaled" if True in fields["scale_scores"] else "scores left unscaled")
    return ", ".join(said)


def fields() -> str:
    """What each family has."""
    rows = []
    for family in FAMILIES.values():
        biases = "; ".join(_code(choice) or "none" for choice in family.biases)
        columns = [_allowed(family, field) for field in _FIELDS]
        rows.append([f"`{family.model_type}`", *columns, biases, _rest(family)])
    return _table(["model_type", *(f"`{field}`" for field in _FIELDS), "`biases`, one of", "and"], rows)


def layouts() -> str:
    """How each family's files differ from the table's axes."""
    fused = {None: "apart", "side_by_side": "one tensor: all q, all k, all v", "by_head": "one tensor, head by head"}
    rows = [
        [f"`{family.model_type}`", f"`{family.class_name}`", f"`{family.prefix}`", fused[family.fused],
         "(in, out)" if family.inputs_first else "(out, in)"]
        for family in FAMILIES.values()
    ]  # fmt: skip
    return _table(["model_type", "class", "prefix of names", "q, k and v", "matrices of a layer"], rows)


def presets() -> str:
    """The architectures that have a name, but for GPT-J's own."""
    rows = []
    for name, cfg in PRESETS.items():
        family = family_of(cfg)
        assert family is not None, name
        if family.model_type != "gptj":
            heads = f"{cfg.n_heads}" if cfg.n_kv_heads == cfg.n_heads else f"{cfg.n_heads}, sharing {cfg.n_kv_heads}"
            sizes = [f"{size:,}" for size in (cfg.n_layers, cfg.d_model, cfg.n_vocab, cfg.n_ctx)]
            rows.append(
                [f"`{name}`", f"`{family.model_type}`", *sizes[:2], heads, *sizes[2:], f"{count_params(cfg):,}"]
            )
    return _table(["preset", "family", "layers", "width", "heads", "vocabulary", "context", "parameters"], rows)


def _functions(tree: ast.Module) -> dict[str, int]:
    """Name -> lines of every function of a file."""
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: _lines(node) for node in found}


def _lines(node: Any) -> int:
    return int(node.end_lineno - node.lineno + 1)


def _rows_of(tree: ast.Module, key: Callable[[ast.Call], str | None]) -> dict[str, int]:
    """model_type -> lines of the call that makes its row."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {name: _lines(call) for call in calls if (name := key(call)) in FAMILIES}


def _named(call: ast.Call) -> str | None:
    """The model_type that a call of `Family` or `_llama` gives."""
    given = [word.value for word in call.keywords if word.arg == "model_type"]
    function = call.func.id if isinstance(call.func, ast.Name) else ""
    first = given or (call.args[:1] if function.startswith("_") else [])
    return str(first[0].value) if first and isinstance(first[0], ast.Constant) else None


def lines() -> str:
    """Lines of code that stand for one family alone, and those that several share."""
    maps, spelled = (ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")) for module in (names, spellings))
    rows, functions = _rows_of(maps, _named), _functions(spelled)
    made = [
        [f"`{name}`", rows[name], functions[f"_read_{name}"] + functions[f"_write_{name}"] + 1] for name in FAMILIES
    ]
    alone = [sum(int(row[column]) for row in made) for column in (1, 2)]
    whole = [len(Path(str(module.__file__)).read_text(encoding="utf-8").splitlines()) for module in (names, spellings)]
    made.append(["shared by several, and all else", *(total - own for total, own in zip(whole, alone, strict=True))])
    made.append(["the whole file", *whole])
    return _table(["family", "`checkpoint/families.py`", "`checkpoint/huggingface/spellings.py`"], made)


def zero_shot() -> str:
    """The published table, in its own order."""
    rows = []
    for row in PUBLISHED:
        again = [f"`evaluate {row.hub} --tasks {TABLE}`", "not here"] if row.hub else ["", ""]
        rows.append([row.model, "yes" if row.weights else "no", row.flops, *row.cells, row.gigabytes, *again])
    titles = [column.title for column in COLUMNS]
    return _table(["Model", "Weights", "Training FLOPs", *titles, "Dataset Size (GB)", "command", "reproduced"], rows)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "families.md": {"fields": fields, "layouts": layouts, "presets": presets},
    "add-a-family.md": {"lines": lines},
    "zero-shot-table.md": {"published": zero_shot},
}


def made(page: str, text: str) -> str:
    """The page's text with its tables made anew. Raises AssertionError where a mark is missing or stands twice."""
    for name, make in TABLES[page].items():
        pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        table = make()
        text, n = pattern.subn(lambda match, table=table: match[1] + table + match[2], text)  # type: ignore[misc]
        assert n == 1, f"{page}: {n} tables called {name}"
    return text


def main() -> None:
    for page in TABLES:
        before = (DOCS / page).read_text(encoding="utf-8")
        (DOCS / page).write_text(made(page, before), encoding="utf-8")


if __name__ == "__main__":
    main()
