"""What the loader refuses and says; the environment variable."""

import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mesh_transformer.kernels import native

ASK = "from mesh_transformer.kernels import native; print(native.available(), native.description(), native.why_not())"


def ask(asked: str, code: str = ASK) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {native.VARIABLE: asked}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)


def needed() -> None:
    if not native.available():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no native extension: {native.why_not()}")


def test_off() -> None:
    reason = f"{native.VARIABLE} = off"
    assert ask("off").stdout == f"False native extension: none ({reason}) {reason}\n"


def test_a_path_is_taken_by_name() -> None:
    needed()
    assert ask("portable").stdout == "True native extension: portable None\n"
    assert re.fullmatch(rf"True native extension: ({'|'.join(native.PATHS)}) None\n", ask("").stdout)


def test_what_is_not_known_or_not_here_is_refused() -> None:
    unknown = ask("avx3")
    assert unknown.returncode and "'avx3' is not known; expected avx512, avx2, neon, portable, off" in unknown.stderr
    needed()
    elsewhere = "avx2" if os.uname().machine == "aarch64" else "neon"
    assert f"{native.VARIABLE} = {elsewhere}: this processor or this build has no such path" in ask(elsewhere).stderr


def test_without_the_library(tmp_path: Any) -> None:
    """A source tree in which nothing was built, and one whose library is damaged."""
    empty = f"from mesh_transformer.kernels import native; native.__path__[:] = [{str(tmp_path)!r}]; "
    assert "False native extension: none (it was not built: install a C++ compiler" in ask("", empty + ASK).stdout
    refused = ask("portable", empty + ASK).stderr
    assert "MESH_TRANSFORMER_NATIVE = portable, but there is no native extension: it was not built" in refused
    called = ask("", empty + "import jax.numpy as jnp; x = jnp.ones((1, 1)); native.matmul(x, x[None], 0)").stderr
    assert "RuntimeError: the native extension cannot be used: it was not built" in called
    (tmp_path / "libmesh_transformer_native.so").write_bytes(b"no library")
    assert "cannot be loaded" in ask("", empty + ASK).stdout


def test_the_version_tells() -> None:
    done = ask("off", "import sys; sys.argv[1:] = ['--version']\nfrom mesh_transformer.cli.main import main; main()")
    assert f"native extension: none ({native.VARIABLE} = off)" in done.stdout.splitlines()


X = jnp.ones((2, 8))
W = {kind: jnp.ones((3, 4 if kind == "int4" else 8, 5), stored) for kind, stored in native.KINDS.items()}


@pytest.mark.parametrize(
    ("x", "w", "scale", "kind", "message"),
    [
        (X.astype(jnp.bfloat16), W["float32"], None, None, r"x is bfloat16 \[2, 8\]; expected float32 \[rows, inner\]"),
        (X[0], W["float32"], None, None, r"x is float32 \[8\]; expected"),
        (X, W["float32"][0], None, None, r"w is \[8, 5\]; expected \[layers, 8, columns\] for x \[2, 8\]"),
        (X, W["int4"][:, :3], None, None, r"w is \[3, 3, 5\]; expected \[layers, 8 / 2, columns\]"),
        (X, W["int8"].astype(jnp.int16), None, None, "weights of int16 are not known; expected float32 in float32"),
        (X, W["int8"], None, "int4", "weights of int8 as int4 are not known"),
        (X, W["bfloat16"], jnp.ones((3, 5)), None, "bfloat16 weights have no scale"),
        (X, W["int8"], None, None, r"the scale of int8 weights is None; expected float32 \[3, 5\]"),
        (X, W["int8"], jnp.ones((3, 1, 5)), None, r"is float32 \[3, 1, 5\]; expected float32 \[3, 5\]"),
        (X, W["int4"], jnp.ones((3, 1, 5)), None, r"expected float16 \[3, 8 / group, 5\], group an even divisor of 8"),
        (X, W["int4"], jnp.ones((3, 8, 5), jnp.float16), None, "group an even divisor of 8"),
        (X, W["int4"], jnp.ones((3, 3, 5), jnp.float16), None, "group an even divisor of 8"),
    ],
)
def test_what_does_not_fit_is_refused(x: Any, w: Any, scale: Any, kind: str | None, message: str) -> None:
    needed()
    with pytest.raises(ValueError, match=message):
        native.matmul(x, w, 0, scale, kind=kind)


def test_a_layer_that_is_not_there() -> None:
    needed()
    for layer in (-1, 3):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"layer {layer} of 3"):
            native.matmul(X, W["float32"], layer)


def test_there_is_no_gradient() -> None:
    needed()
    with pytest.raises(NotImplementedError, match="the native product has no gradient"):
        jax.grad(lambda x: native.matmul(x, W["float32"], 0).sum())(X)
