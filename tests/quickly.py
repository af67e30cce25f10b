"""Compiling in a third of the time, for tests that ask nothing of the compiled programs themselves.

Half of that is JAX's own switch. The rest is XLA's older way to write the loops of fused operations on CPU, whose code
is shorter; measured with jaxlib 0.10.2 on the two programs of a small training: 3.2 s of processor time become 1.3.
"""

from __future__ import annotations

import functools
from typing import Any

_OPTION = "xla_cpu_use_fusion_emitters"
_SWITCH = "jax_disable_most_optimizations"


def variables(xla_flags: str = "") -> dict[str, str]:
    """Environment variables of a process that is to compile so; `xla_flags`: what else is to be in XLA_FLAGS."""
    flags = [xla_flags, f"--{_OPTION}=false" if _is_known() else ""]
    return {_SWITCH.upper(): "1", "XLA_FLAGS": " ".join(filter(None, flags))}


def compile_quickly(quickly: bool) -> None:
    """From now on this process compiles so, or as users have it; what was compiled the other way is forgotten."""
    import jax

    _add_option_once()
    if jax.config.read(_SWITCH) != quickly:
        jax.config.update(_SWITCH, quickly)
        jax.clear_caches()


@functools.cache
def _is_known() -> bool:
    """Whether this jaxlib has the option; one that XLA does not know would end a process."""
    import jax

    try:
        jax.jit(lambda x: x, compiler_options={_OPTION: False}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.cache
def _add_option_once() -> None:
    """Private to JAX, which has no setting for options of all programs: where it is another, compiling takes longer."""
    import jax
    from jax._src import compiler

    make = getattr(compiler, "get_compile_options", None)
    if make is None or not _is_known():
        return

    def with_option(*arguments: Any, env_options_overrides: Any = None, **more: Any) -> Any:
        options = dict(env_options_overrides or {})
        if jax.config.read(_SWITCH):
            options.setdefault(_OPTION, False)
        return make(*arguments, env_options_overrides=options, **more)

    compiler.get_compile_options = with_option
