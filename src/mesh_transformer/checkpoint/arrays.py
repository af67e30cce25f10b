"""A pytree of arrays as a directory: the only module that knows Orbax.

On disk the tree is a nested dict of strings whatever containers held it, so that a checkpoint can be read without the
classes that wrote it, and in parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.files import fsync_tree

# Orbax gives up on a save after this time; a slow disk is no reason to.
_TIMEOUT = 24 * 3600  # seconds
_LARGE_ROW = 2**20  # bytes
_PART = "ocdbt.process_"  # Orbax's name for the directory of one process


def check(tree: Any) -> None:
    """Returns if every leaf can be written: a jax.Array or np.ndarray of numbers, with at least one value.

    Raises:
        TypeError: a leaf is no array, or a typed random key (save `jax.random.key_data` of it).
        ValueError: an array is empty.
    """
    for path, leaf in _paths_and_leaves(tree):
        if not isinstance(leaf, jax.Array | np.ndarray) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(f"{'/'.join(path)} is {kind}; expected an array of numbers")
        if leaf.size == 0:
            raise ValueError(f"{'/'.join(path)} has shape {leaf.shape}; expected at least one value")


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """ "params/layers/attn/q" -> {"shape": [...], "dtype": "float32"} for every leaf; JSON-serialisable."""
    return {
        "/".join(path): {"shape": list(leaf.shape), "dtype": jax.numpy.dtype(leaf.dtype).name}
        for path, leaf in _paths_and_leaves(tree)
    }


def start_write(directory: Path, tree: Any) -> Callable[[], None]:
    """Copies the arrays to the host and begins to write them under `directory`, which holds nothing yet.

    When this returns the caller may change, delete or donate the arrays. The function returned waits until everything
    that this process has to write is on the disk, and raises what went wrong; `merge` then makes it whole.

    In a run of several processes all call this with the same arguments, and each writes a part of its own: of every
    value one copy, in chunks that no other process touches. The processes do not wait for each other here.

    Args:
        tree: as `check` wants it; sharded arrays are written in shards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handler = _handler()
    try:
        item = _nested(tree)
        args = _orbax().args.PyTreeSave(item, save_args=jax.tree.map(_in_rows, item))
        # In a thread of its own, since the caller may be inside an event loop, a notebook's for example.
        with ThreadPoolExecutor(1) as pool:
            copied = handler.async_save(_orbax_path(directory), args=args)
            writes = pool.submit(asyncio.run, copied).result() or []
    except BaseException:
        handler.close()
        raise

    def finish() -> None:
        try:
            for write in writes:
                write.result(timeout=_TIMEOUT)
            fsync_tree(directory / f"{_PART}{jax.process_index()}")
        finally:
            handler.close()

    return finish


def merge(directory: Path) -> None:
    """Makes one tree of arrays of the parts that the processes wrote under `directory`; to be called by process 0.

    Until then there is nothing to read. The parts stay, and hold the values.
    """
    with contextlib.closing(_handler()) as handler:
        handler.finalize(_orbax_path(directory))


def read(directory: Path, abstract: Any) -> Any:
    """The arrays that `abstract` names, and no others, in its structure, dtypes and shardings.

    Args:
        abstract: a pytree of jax.ShapeDtypeStruct, the whole tree that was written or a part of it; a leaf without a
            sharding goes to the first local device.

    Raises:
        CheckpointError: the directory cannot be read as such.
    """
    ocp = _orbax()
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or default), abstract)
    item = _nested(placed)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    try:
        # Not through Orbax's Checkpointer, whose processes wait for each other in a device program: one whose files
        # cannot be read would leave the others waiting.
        with contextlib.closing(_handler()) as handler:
            args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
            found = handler.restore(_orbax_path(directory), args=args)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0][:300]  # it may quote the file
        raise CheckpointError(f"{directory}: the arrays cannot be read: {reason}") from error
    leaves = [functools.reduce(lambda node, key: node[key], path, found) for path, _ in _paths_and_leaves(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _in_rows(leaf: Any) -> Any:
    """An array of large rows, such as layers, is stored row by row, so that one can be read without the rest."""
    row_bytes = leaf.nbytes // leaf.shape[0] if leaf.ndim else 0
    if row_bytes < _LARGE_ROW:
        return _orbax().SaveArgs()
    return _orbax().SaveArgs(chunk_byte_size=row_bytes, shard_axes=(0,))


def _handler() -> Any:
    # Compression would gain about a tenth on trained weights and cost more time than the writing itself.
    return _orbax().PyTreeCheckpointHandler(use_compression=False)


def _orbax_path(directory: Path) -> Any:
    from etils import epath  # the paths that Orbax wants

    return epath.Path(directory.absolute())


def _paths_and_leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in pairs]


def _nested(tree: Any) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, leaf in _paths_and_leaves(tree):
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return root


@functools.cache
def _orbax() -> Any:
    import orbax.checkpoint as ocp

    # Orbax logs every error with its whole stack, several times, and then raises it; the raised one is enough.
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    otherwise = sys.unraisablehook

    # When one write fails, those still under way wake an event loop that Orbax has closed: noise on standard error.
    def hook(unraisable: Any) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            otherwise(unraisable)

    sys.unraisablehook = hook
    return ocp
