"""`bench load` as the command line asks for it: which server, which plan, and what of the result is a fault."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import os
import platform
import sys
from typing import Any

from mesh_transformer.bench.load import Contender, LoadOptions, Progress, bench_load, hugging_face
from mesh_transformer.bench.load_client import Address
from mesh_transformer.bench.load_plan import Plan, Span
from mesh_transformer.bench.load_server import ServerProcess, stopped_by_sigterm
from mesh_transformer.bench.rounds import require_peer
from mesh_transformer.bench.train import processor
from mesh_transformer.config.errors import RunError, UserError

_KEY = "MESH_TRANSFORMER_API_KEY"
_IDS_OF_ANY_MODEL = 256
_DEFAULT_SPAN = "4-64"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says. of_model, of_server: words passed on to `serve` (and the former to `convert`)."""

    model: str | None
    url: str | None = None
    against: tuple[str, ...] = ()
    vanish: float = 0.1
    seed: int = 0
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    of_model: tuple[str, ...] = ()
    of_server: tuple[str, ...] = ()


def run_load(asked: Asked, options: LoadOptions, progress: Progress) -> dict[str, Any]:
    """The result of `bench_load`, and under `faults` what a server that bears the load does not do.

    Raises:
        UserError: neither or both of a model and a URL are given, a value cannot be used, or a peer is missing.
        RunError: a server does not start, or cannot be reached any more.
    """
    _check(asked)
    plan, facts = _plan(asked)
    threads = os.cpu_count() or 1
    key = os.environ.get(_KEY)
    with stopped_by_sigterm(), contextlib.ExitStack() as stack:
        server, address = None, None
        if asked.url is not None:
            address = Address.of(asked.url, key)
        else:
            command = [sys.executable, "-m", "mesh_transformer", "serve", str(asked.model), *asked.of_model]
            server = stack.enter_context(
                ServerProcess("the server", [*command, *asked.of_server], threads=threads, key=key)
            )
            address = server.address
            progress("starting the server")
            asyncio.run(server.wait_ready(progress=progress))
        peers: list[Contender] = []
        if "hf" in asked.against:
            model = (str(asked.model), *asked.of_model)
            for peer in stack.enter_context(hugging_face(model, options.clients, threads, progress)):
                asyncio.run(peer.wait_ready(progress=progress))
                peers.append(Contender(peer.name, peer.address, 1 if not peers else options.clients, False))
        try:
            result = asyncio.run(bench_load(address, plan, options, server=server, peers=peers, progress=progress))
        except (OSError, EOFError) as error:
            last = f":\n{server.last_lines()}" if server is not None else ""
            raise RunError(f"the server at {address.host}:{address.port} cannot be reached ({error}){last}") from error
        if server is not None:
            result["server_status"] = server.stop()
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    result |= {"machine": machine, "model": facts, "server_options": [*asked.of_model, *asked.of_server]}
    return result | {"faults": faults(result)}


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong in a result, in words. Refusals are none: the server said when to come again."""
    load, repeated = result["load"], result["load"]["repeated_alone"]
    found = [f"{n} x {kind}" for kind, n in {**load["failures"], **load["warmup_failures"]}.items()]
    if load["done"] == 0:
        found.append("no request was answered")
    if load["memory"] is not None and not load["memory"]["flat"]:
        found.append("memory grew from {first_fifth:,.0f} to {last_fifth:,.0f} bytes".format(**load["memory"]))
    if load["seconds_until_idle"] is None and load["counters"]:
        found.append("slots were still in use after the last answer")
    if repeated["equal"] < repeated["asked"]:
        found.append(f"{repeated['asked'] - repeated['equal']} of {repeated['asked']} texts differ when asked alone")
    for name in ("engine_step_failures", "compilations"):
        if load["counters"].get(name, 0) > 0:
            found.append(f"{load['counters'][name]:.0f} {name.replace('_', ' ')}")
    for name, turns in (result["comparison"] or {"turns": {}})["turns"].items():
        found += [f"{n} x {kind} ({name})" for turn in turns for kind, n in turn["failures"].items()]
    if result.get("server_status"):
        found.append(f"the server ended with status {result['server_status']}")
    return found


def _check(asked: Asked) -> None:
    if (asked.model is None) == (asked.url is None):
        raise UserError("bench load needs a MODEL to serve, or --url of a server that runs; give one of them")
    if asked.url is not None and (asked.of_model or asked.of_server or asked.against):
        words = [
            w for w in (*asked.of_model, *asked.of_server, *(["--against"] if asked.against else [])) if w[:2] == "--"
        ]
        raise UserError(
            f"{', '.join(words)}: of no use with --url, whose server runs already; leave it out or give MODEL"
        )
    for peer in asked.against:
        require_peer(peer)
    if asked.model is not None and importlib.util.find_spec("uvicorn") is None:
        raise UserError("bench load needs the server: pip install 'mesh-transformer[serve]'")


def _plan(asked: Asked) -> tuple[Plan, dict[str, Any] | None]:
    """The plan, and the model's architecture where it is known."""
    facts, n_ids, default = None, _IDS_OF_ANY_MODEL, _DEFAULT_SPAN
    if asked.model is not None:
        from mesh_transformer.checkpoint.models import open_weights

        given = dict(zip(asked.of_model[::2], asked.of_model[1::2], strict=True))
        step = given.get("--step")
        weights = open_weights(asked.model, step=int(step) if step else None, config=given.get("--config"))
        facts, n_ids = weights.cfg.to_dict(), weights.cfg.n_vocab
        # Prompt and completion fit the context together: a peer's model has no more positions.
        default = f"{min(4, weights.cfg.n_ctx // 2)}-{weights.cfg.n_ctx // 2}"
    prompt = Span.of(asked.prompt_tokens or default, "--prompt-tokens")
    output = Span.of(asked.output_tokens or asked.prompt_tokens or default, "--output-tokens")
    if facts is not None and prompt.high + output.high > facts["n_ctx"]:
        raise UserError(
            f"--prompt-tokens up to {prompt.high} and --output-tokens up to {output.high} do not fit the model's "
            f"context of {facts['n_ctx']} together; give smaller ones"
        )
    plan = Plan(seed=asked.seed, n_ids=n_ids, prompt_tokens=prompt, output_tokens=output, vanish=asked.vanish)
    return plan, facts
