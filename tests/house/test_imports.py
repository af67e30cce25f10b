"""The rooms import in one direction. All imports count, those hidden in functions and under TYPE_CHECKING too."""

import ast
from pathlib import Path

import mesh_transformer

PACKAGE = Path(mesh_transformer.__file__).parent
# Each may import those on earlier lines, itself, and nothing else; rooms on one line do not know each other.
ORDER = [
    ["compat", "shapes", "files", "config", "processes"],
    ["kernels"],
    ["sharding"],
    ["model"],
    ["checkpoint", "data"],
    ["train", "sample"],
    ["engine"],
    ["api"],
    ["evaluate"],
    ["bench", "demo", "cluster", "serve", "report", "plan", "doctor"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# One file each: an outsider that is slow to import or may be absent.
ONLY_IN = {
    "torch": {"bench/hf.py", "bench/hf_decode.py", "bench/hf_server.py"},
    "transformers": {"bench/hf.py", "bench/hf_decode.py", "bench/hf_server.py"},
    "ctranslate2": {"bench/ct2.py"},
    "grain": {"data/loader.py", "data/source.py"},
    "orbax": {"checkpoint/arrays.py"},
    "tensorstore": {"checkpoint/slices.py"},
    "zstandard": {"checkpoint/legacy/archive.py", "data/archives.py"},
    "ftfy": {"data/normalize.py"},
    "pyarrow": {"data/documents.py"},
    "huggingface_hub": {"checkpoint/models.py", "evaluate/tasks.py"},
    "lm_eval": {f"evaluate/{name}.py" for name in ("harness", "in_loop", "installed", "running", "tasks")},
    "datasets": {"evaluate/tasks.py"},
    "safetensors": {"checkpoint/huggingface/reader.py", "checkpoint/peft.py"},
    "matplotlib": {"train/plot.py"},
    "tensorboardX": {"train/tensorboard.py"},
    "wandb": {"train/wandb.py"},
    "tokenizers": {"data/tokenizer.py"},
    "jinja2": {"data/chat.py"},
    "ray": {"cluster/launch.py"},
    "fastapi": {"serve/app.py", "serve/openapi.py"},
    "uvicorn": {"serve/run.py"},
    "prometheus_client": {"serve/app.py", "serve/metrics.py"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def wrong_arrows(path: Path, imports: list[tuple[int, str]]) -> list[str]:
    room = room_of(path)
    wrong = []
    for line, name in imports:
        parts = name.split(".")
        if parts[0] != "mesh_transformer" or len(parts) == 1 or room in ("__init__", "__main__"):
            continue
        target = parts[1]
        if target in ("__version__", room):
            continue
        known = target in LEVEL and room in LEVEL
        lowest = known and LEVEL[target] == LEVEL[room] == 0
        if not lowest and not (known and LEVEL[target] < LEVEL[room]):
            wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {room} -> {target}")
    return wrong


def test_imports_point_one_way() -> None:
    wrong = [arrow for path in sorted(PACKAGE.rglob("*.py")) for arrow in wrong_arrows(path, imports_of(path))]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_arrow_is_seen() -> None:
    path = PACKAGE / "model" / "layers.py"
    assert wrong_arrows(path, [(1, "mesh_transformer.train.loop")])
    assert wrong_arrows(PACKAGE / "train" / "loop.py", [(1, "mesh_transformer.sample.text")])
    assert not wrong_arrows(path, [(1, "mesh_transformer.config.model")])


def test_heavy_outsiders_stay_in_one_file() -> None:
    for path in PACKAGE.rglob("*.py"):
        for line, name in imports_of(path):
            allowed = ONLY_IN.get(name.split(".")[0])
            here = path.relative_to(PACKAGE).as_posix()
            assert allowed is None or here in allowed, f"{here}:{line} imports {name}"


def test_files_are_short() -> None:
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 420}
    assert not long
