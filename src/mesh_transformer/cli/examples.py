"""Examples for every command's --help. Each line is checked by the tests against the command's options."""

from __future__ import annotations

import typer

# Words of the command -> lines that can be typed as they stand, once the names in them are the user's own.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "mesh-transformer demo",
        "mesh-transformer train notes.toml --set train.steps=1000",
        "mesh-transformer generate runs/notes --prompt 'Once upon a time'",
    ),
    "demo": ("mesh-transformer demo", "mesh-transformer demo --out /tmp/demo --steps 200 --seed 1"),
    "prepare": (
        "mesh-transformer prepare notes.txt --out data/notes",
        "mesh-transformer prepare corpus/ --out data/corpus --tokenizer gpt2 --sequence-length 2048 "
        "--validation-fraction 0.01",
    ),
    "train": (
        "mesh-transformer train notes.toml",
        "mesh-transformer train notes.toml --set train.steps=1000 --set mesh.tensor=4",
        "mesh-transformer train tune.toml --init-from models/gpt-j-6b --fresh-optimizer",
        "mesh-transformer train notes.toml --new --yes",
    ),
    "launch": (
        "mesh-transformer launch notes.toml --workers 2",
        "mesh-transformer launch notes.toml --workers 4 --address 10.0.0.1:6379",
    ),
    "generate": (
        "mesh-transformer generate runs/notes --prompt 'Once upon a time' --max-tokens 100",
        "mesh-transformer generate runs/notes --prompt-file story.txt --temperature 0.8 --top-p 0.9 --stream",
        "mesh-transformer generate models/gpt-j-6b --quantize int8",
    ),
    "serve": (
        "mesh-transformer serve runs/notes",
        "MESH_TRANSFORMER_API_KEY=secret mesh-transformer serve models/gpt-j-6b --host 0.0.0.0 --port 8080",
    ),
    "evaluate": (
        "mesh-transformer evaluate runs/notes --text held-out.txt",
        "mesh-transformer evaluate models/gpt-j-6b --tasks lambada_openai,piqa --limit 100 --output results.json",
    ),
    "convert": (
        "mesh-transformer convert runs/notes notes-hf --to huggingface",
        "mesh-transformer convert step_383500 gpt-j-6b --to native --with-optimizer",
    ),
    "inspect": (
        "mesh-transformer inspect runs/notes",
        "mesh-transformer inspect runs/notes --digest",
        "mesh-transformer inspect runs/notes notes-hf",
    ),
    "report": (
        "mesh-transformer report runs/notes",
        "mesh-transformer report runs/tuned --base models/gpt-j-6b --out tuned.html --prompt 'Once upon a time'",
    ),
    "doctor": (
        "mesh-transformer doctor",
        "mesh-transformer doctor notes.toml --set train.batch_size=16",
        "mesh-transformer doctor tune.toml --init-from models/gpt-j-6b --port 8000 --storage gs://bucket/runs",
        "mesh-transformer doctor notes.toml --json",
    ),
    "plan": (
        "mesh-transformer plan notes.toml",
        "mesh-transformer plan notes.toml --device h100 --devices 8 --json",
    ),
    "bench": ("mesh-transformer bench train", "mesh-transformer bench decode runs/notes --tokens 64"),
    "bench train": (
        "mesh-transformer bench train",
        "mesh-transformer bench train --dtypes float32,bfloat16 --against hf --json",
    ),
    "bench decode": (
        "mesh-transformer bench decode",
        "mesh-transformer bench decode runs/notes --batch 8 --precisions bfloat16,int8 --against ctranslate2",
    ),
    "bench serve": ("mesh-transformer bench serve --texts 64 --max-batch 16",),
    "bench load": (
        "mesh-transformer bench load runs/notes --clients 16 --seconds 60",
        "mesh-transformer bench load --url http://127.0.0.1:8000 --clients 64",
    ),
    "tpu": ("mesh-transformer tpu status pod --zone us-central2-b",),
    "tpu create": ("mesh-transformer tpu create pod --zone us-central2-b --type v4-8 --version tpu-ubuntu2204-base",),
    "tpu status": ("mesh-transformer tpu status pod --zone us-central2-b",),
    "tpu run": (
        "mesh-transformer tpu run pod gs://bucket/notes.toml --zone us-central2-b --type v4-8 "
        "--version tpu-ubuntu2204-base --spot",
        "mesh-transformer tpu run pod notes.toml --set train.steps=1000 --dry-run",
    ),
    "tpu delete": ("mesh-transformer tpu delete pod --zone us-central2-b --yes",),
}


def epilog(command: str) -> str:
    """What stands under the options of a command, such as "bench train"; empty where it has no examples."""
    lines = EXAMPLES.get(command, ())
    # \b keeps the lines as they are.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)]) if lines else ""


def add_to(app: typer.Typer, before: str = "") -> None:
    """Gives every command of `app`, and of the groups in it, its examples; the last of all registrations."""
    app.info.epilog = epilog(before)
    for command in app.registered_commands:
        command.epilog = epilog(f"{before} {command.name}".strip())
    for group in app.registered_groups:
        name = f"{before} {group.name}".strip()
        group.epilog = epilog(name)
        assert group.typer_instance is not None
        add_to(group.typer_instance, name)
