"""Products of a few rows with narrow weights on CPU: a shared library in C++, called by XLA (docs/native.md).

The library is optional. It is there if a C++ compiler was when the package was installed; `available()` says whether it
is and `why_not()` why it is not. MESH_TRANSFORMER_NATIVE=off leaves it unused, and the name of a path
(`avx512`, `avx2`, `neon`, `portable`) takes that path instead of the best one for the processor.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh_transformer.config.errors import UserError

if TYPE_CHECKING:
    import jax

PATHS = ("avx512", "avx2", "neon", "portable")
VARIABLE = "MESH_TRANSFORMER_NATIVE"
# The type in which weights of each kind are stored.
KINDS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "int8": "int8", "int4": "uint8"}

_LIBRARY = "libmesh_transformer_native.so"
_TARGET = "mesh_transformer_matmul"


def available() -> bool:
    """Whether `matmul` can be called in this process. Decided at the first call.

    Raises:
        UserError: the variable MESH_TRANSFORMER_NATIVE asks for what is not known or not here.
    """
    return _chosen()[1] is not None


def why_not() -> str | None:
    """Why the library is not used, in a few words; None if it is."""
    name_or_reason, library = _chosen()
    return None if library else name_or_reason


def description() -> str:
    """One line for people: the path that runs, or why none does."""
    name_or_reason, library = _chosen()
    return f"native extension: {name_or_reason}" if library else f"native extension: none ({name_or_reason})"


def matmul(
    x: jax.Array, w: jax.Array, layer: jax.Array | int, scale: jax.Array | None = None, *, kind: str | None = None
) -> jax.Array:
    """x @ w[layer] in float32, the weights read where they lie and as narrow as they are stored.

    Every element of the result is summed in one order, whatever the number of rows and of threads, so that a row is
    equal to the bit alone and beside others. There is no gradient. Under `vmap` it is computed once for every element
    of the batch. On a mesh, x and w must be whole on every device.

    Args:
        x: float32 [rows, inner], any number of rows; the fewer, the better this compares with other products.
        w: [layers, inner, columns] of the kind's type; for int4 uint8 [layers, inner / 2, columns], rows 2j and 2j + 1
            of the matrix in the low and the high halves of row j.
        layer: int32, a scalar; a program that runs with one that is not in w fails.
        scale: int8: float32 [layers, columns], and the result is (x @ values) * scale. int4: float16
            [layers, inner / group, columns]: weight (k, n) is (half - 8) * scale[k // group, n]. Others: None.
        kind: one of KINDS; None: what w's type says.

    Returns:
        float32 [rows, columns].

    Raises:
        ValueError: shapes, types or kind do not fit together.
        NotImplementedError: it was differentiated.
        RuntimeError: the library is not available.
    """
    import jax.numpy as jnp

    if not available():
        raise RuntimeError(f"the native extension cannot be used: {why_not()}. Ask available() first.")
    _check(x, w, scale, kind)
    arrays = [x, w, jnp.asarray(layer, jnp.int32)]
    return _product()(*arrays, *([] if scale is None else [scale]))


def _check(x: Any, w: Any, scale: Any, kind: str | None) -> None:
    by_type = {stored: name for name, stored in KINDS.items()}
    if kind is None:
        kind = by_type.get(str(w.dtype))
    if kind not in KINDS or KINDS[kind] != str(w.dtype):
        given = f"weights of {w.dtype}" + (f" as {kind}" if kind else "")
        raise ValueError(f"{given} are not known; expected {', '.join(f'{k} in {t}' for k, t in KINDS.items())}")
    if str(x.dtype) != "float32" or x.ndim != 2:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; expected float32 [rows, inner]: cast and reshape it")
    stored = 2 if kind == "int4" else 1
    if w.ndim != 3 or w.shape[1] * stored != x.shape[1]:
        inner = f"{x.shape[1]} / 2" if kind == "int4" else str(x.shape[1])
        raise ValueError(f"w is {list(w.shape)}; expected [layers, {inner}, columns] for x {list(x.shape)}")
    _check_scale(w, scale, kind)


def _check_scale(w: Any, scale: Any, kind: str) -> None:
    layers, rows, columns = w.shape
    if kind not in ("int8", "int4"):
        if scale is not None:
            raise ValueError(f"{kind} weights have no scale; expected None")
        return
    if kind == "int8":
        expected, fits = f"float32 [{layers}, {columns}]", ("float32", (layers, columns))
        right = scale is not None and (str(scale.dtype), scale.shape) == fits
    else:
        expected = f"float16 [{layers}, {2 * rows} / group, {columns}], group an even divisor of {2 * rows}"
        right = scale is not None and str(scale.dtype) == "float16" and scale.ndim == 3
        right = right and (scale.shape[0], scale.shape[2]) == (layers, columns)
        # An even group holds whole bytes, so that the groups divide the stored rows.
        right = right and (rows == 0 or (scale.shape[1] > 0 and rows % scale.shape[1] == 0))
    if not right:
        given = "None" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"the scale of {kind} weights is {given}; expected {expected}")


@functools.cache
def _product() -> Callable[..., jax.Array]:
    """The custom call as a function of arrays, registered with XLA once a process."""
    import jax
    import jax.numpy as jnp

    library = _chosen()[1]
    assert library is not None
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.mesh_transformer_matmul), platform="cpu")

    @jax.custom_jvp
    def product(x: jax.Array, w: jax.Array, layer: jax.Array, *scale: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), jnp.float32)
        called = jax.ffi.ffi_call(_TARGET, result, vmap_method="sequential")
        return called(x, w, layer, *scale)

    @product.defjvp
    def differentiated(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "the native product has no gradient: it is for inference. "
            "Differentiate jnp.matmul with wide weights instead."
        )

    return product


@functools.cache
def _chosen() -> tuple[str, ctypes.CDLL | None]:
    """(name of the path, library), or (reason, None)."""
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "off", *PATHS):
        raise UserError(f"{VARIABLE} = {asked!r} is not known; expected {', '.join(PATHS)}, off, or nothing: the best")
    if asked == "off":
        return f"{VARIABLE} = off", None
    found = [path for directory in __path__ if (path := Path(directory) / _LIBRARY).exists()]
    reason = None
    if not found:
        reason = "it was not built: install a C++ compiler, then the package again"
    else:
        try:
            library = ctypes.CDLL(str(found[0]))
        except OSError as error:
            reason = f"{found[0]} cannot be loaded: {error}"
    if reason:
        if asked:
            raise UserError(f"{VARIABLE} = {asked}, but there is no native extension: {reason}")
        return reason, None
    library.mesh_transformer_choose.restype = ctypes.c_char_p
    library.mesh_transformer_choose.argtypes = [ctypes.c_char_p]
    name = library.mesh_transformer_choose(asked.encode() or None)
    if name is None:
        raise UserError(
            f"{VARIABLE} = {asked}: this processor or this build has no such path; leave it unset: the best"
        )
    return name.decode(), library
