"""`python -m mesh_transformer.evaluate.lm_eval ...`: lm-evaluation-harness' own command, where this project's models
are known: `--model mesh_transformer --model_args pretrained=MODEL,...`. The installed package is as it was.
"""

from __future__ import annotations

import sys

from mesh_transformer import compat
from mesh_transformer.config.errors import MeshTransformerError


def main() -> None:
    """Runs it with the arguments of this process."""
    compat.prepare_process()
    compat.use_compile_cache()
    try:
        from mesh_transformer.evaluate import harness  # noqa: F401  (registers)
        from mesh_transformer.evaluate.installed import command, in_this_process

        with in_this_process():
            command()
    except MeshTransformerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
