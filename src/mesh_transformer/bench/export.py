"""One set of weights for all contenders: a Hugging Face directory, and CTranslate2's form of it.

    python -m mesh_transformer.bench.export CONFIG DIRECTORY

writes random weights of the architecture CONFIG (JSON). In a process of its own, whose memory then is free again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mesh_transformer.config.errors import RunError, UserError
from mesh_transformer.config.model import ModelConfig

_MODULE = "mesh_transformer.bench"


@dataclasses.dataclass(frozen=True)
class Exported:
    """The weights, float32. ctranslate2: None unless asked for."""

    cfg: ModelConfig
    huggingface: Path
    ctranslate2: Path | None


@contextlib.contextmanager
def exported(
    model: ModelConfig | str, *, ctranslate2: bool, progress: Callable[[str], None], options: Sequence[str] = ()
) -> Iterator[Exported]:
    """Writes the weights into a temporary directory, which is removed afterwards.

    Args:
        model: an architecture, whose weights are random then, or where a model lies.
        options: of `convert`: which of a path's models is meant.

    Raises:
        UserError: Hugging Face's GPT-J cannot hold the model, or there is none.
        RunError: a converter failed; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="mesh-transformer-bench-") as temporary:
        target, converted = Path(temporary) / "huggingface", Path(temporary) / "ctranslate2"
        progress("writing the weights for all contenders")
        if isinstance(model, ModelConfig):
            cfg = model
            _run(["-m", f"{_MODULE}.export", json.dumps(model.to_dict()), str(target)])
        else:
            from mesh_transformer.checkpoint.models import open_weights

            given = dict(zip(options[::2], options[1::2], strict=True))
            step = given.get("--step")
            cfg = open_weights(model, step=int(step) if step else None, config=given.get("--config")).cfg
            words = ["-m", "mesh_transformer", "convert", model, str(target), "--to", "huggingface"]
            _run([*words, "--dtype", "float32", *options])
        if ctranslate2:
            progress("converting the weights for CTranslate2")
            _run(["-m", f"{_MODULE}.ct2", str(target), str(converted)])
        yield Exported(cfg, target, converted if ctranslate2 else None)


def _run(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        kind = UserError if done.returncode == 2 else RunError
        raise kind(f"the model cannot be written for the contenders:\n{last}")


def main() -> None:
    """Writes random weights."""
    import jax
    import numpy as np

    from mesh_transformer.checkpoint.convert import Conversion, convert
    from mesh_transformer.checkpoint.weights import InMemory
    from mesh_transformer.model.params import init_params

    cfg = ModelConfig(**json.loads(sys.argv[1]))
    conversion = Conversion(to="huggingface", dtype=np.dtype(np.float32))
    try:
        convert(InMemory(cfg, init_params(cfg, jax.random.key(0))), Path(sys.argv[2]), conversion, certify=False)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
