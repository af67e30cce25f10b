"""`bench load`: many streaming clients at once, some of which go away, against the server in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mesh_transformer.bench.load_client import DONE, REFUSED, Address, Answer, ask
from mesh_transformer.bench.load_figures import memory, summary
from mesh_transformer.bench.load_plan import Plan
from mesh_transformer.bench.load_server import SECONDS_BETWEEN_NOTES, ServerProcess, idle, metrics, watched_counters
from mesh_transformer.bench.rounds import ALLOCATOR, spread
from mesh_transformer.config.errors import RunError

# Where the numbers of the requests of each part begin: no part sends another's prompts.
_WARMUP, _ROUND = 10**9, 10**6
_REPEATED = 8  # requests asked again, alone, for the same text
_IDLE_SECONDS = 5.0

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """clients at once, for how many seconds; timeout of one request; of the comparison: rounds, seconds of a turn."""

    clients: int = 64
    seconds: float = 300.0
    timeout: float = 120.0
    rounds: int = 3
    compare_seconds: float = 20.0
    one_by_one: bool = False


@dataclasses.dataclass(frozen=True)
class Contender:
    """A server and how it is asked in the comparison."""

    name: str
    address: Address
    clients: int
    stream: bool


async def drive(
    address: Address,
    plan: Plan,
    *,
    clients: int,
    seconds: float,
    timeout: float,
    stream: bool = True,
    first: int = 0,
    most: int | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Each client asks the plan's next request when it has its answer, until the time is over or `most` were asked.

    What runs then is waited for. A refused client waits as long as it was told and asks the same again; one whose
    request failed waits half a second.
    """
    numbers = iter(range(first, first + most)) if most is not None else itertools.count(first)
    answers: list[Answer] = []
    until = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < until and (number := next(numbers, None)) is not None:
            request = plan.request(number)
            while True:
                answer = await ask(address, request, stream=stream, timeout=timeout)
                answers.append(answer)
                wait = answer.retry_after if answer.kind == REFUSED else 0.5 if answer.failed else 0.0
                if wait:
                    await asyncio.sleep(max(0.0, min(wait, until - time.perf_counter())))
                if answer.kind != REFUSED or time.perf_counter() >= until:
                    break

    async def tell(progress: Progress) -> None:
        begun = time.perf_counter()
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_NOTES)
            figures = summary(answers, begun)
            progress(
                f"{time.perf_counter() - begun:4.0f} s: {figures['done']} done, {figures['vanished']} vanished, "
                f"{figures['refused']} refused, {figures['failed']} failed"
            )

    teller = asyncio.create_task(tell(progress)) if progress is not None else None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
    finally:
        if teller is not None:
            teller.cancel()
    return answers


async def load_run(
    address: Address, plan: Plan, options: LoadOptions, *, server: ServerProcess | None, progress: Progress
) -> dict[str, Any]:
    """The load itself: warm-up, the clients, and what is left when they have gone.

    Raises:
        OSError, EOFError: the server cannot be reached before the load or after it.
    """
    calm = dataclasses.replace(plan, vanish=0.0)
    progress(f"warm-up: {options.clients} requests")
    all_clients = functools.partial(drive, address, clients=options.clients, timeout=options.timeout)
    warm = await all_clients(calm, seconds=options.timeout, first=_WARMUP, most=options.clients)
    before = watched_counters(await metrics(address))
    samples: list[int] = []
    sampler = asyncio.create_task(_sample_memory(server, samples)) if server is not None else None
    progress(f"load: {options.clients} clients for {options.seconds:.0f} s")
    begun, cpu_begun = time.perf_counter(), time.process_time()
    answers = await all_clients(plan, seconds=options.seconds, progress=progress)
    if sampler is not None:
        sampler.cancel()
    result: dict[str, Any] = {
        "warmup_failures": summary(warm, begun)["failures"],
        **summary(answers, begun),
        "client_cpu_seconds": time.process_time() - cpu_begun,  # taken from the machine that is measured
        "memory": memory(samples),
        "seconds_until_idle": await _seconds_until_idle(address),
    }
    after = watched_counters(await metrics(address))
    result["counters"] = {name: after[name] - before.get(name, 0.0) for name in after}
    result["repeated_alone"] = await _repeat(address, plan, answers, options.timeout)
    return result


async def compare(
    contenders: Sequence[Contender], plan: Plan, options: LoadOptions, progress: Progress
) -> dict[str, Any]:
    """Turns of `compare_seconds` each, round by round: a machine whose speed drifts slows all alike.

    In one round everybody gets requests of the same lengths in the same order, with prompts of its own; nobody
    vanishes. `ratios` divide, round by round, the first contender's tokens a second by another's.
    """
    found: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders}
    for i, (salt, contender) in itertools.product(range(-1, options.rounds), enumerate(contenders, 1)):
        progress(f"{contender.name}: " + (f"round {i + 1} of {options.rounds}" if i >= 0 else "warm-up"))
        begun = time.perf_counter()
        answers = await drive(
            contender.address,
            dataclasses.replace(plan, vanish=0.0, salt=salt),
            clients=contender.clients,
            seconds=options.compare_seconds if i >= 0 else options.timeout,
            timeout=options.timeout,
            stream=contender.stream,
            first=_ROUND * (i + 1) if i >= 0 else _WARMUP + _ROUND,
            most=None if i >= 0 else contender.clients,
        )
        if i >= 0:
            found[contender.name].append(summary(answers, begun))
    rates = {name: [turn["tokens_per_second"] for turn in turns] for name, turns in found.items()}
    ours, *others = rates
    return {
        "turns": found,
        "tokens_per_second": {name: spread(each) for name, each in rates.items()},
        "ratios": {
            f"{ours} over {other}": spread([a / b for a, b in zip(rates[ours], rates[other], strict=True) if b])
            for other in others
            if any(rates[other])
        },
    }


async def bench_load(
    address: Address,
    plan: Plan,
    options: LoadOptions,
    *,
    server: ServerProcess | None,
    peers: Sequence[Contender] = (),
    progress: Progress,
) -> dict[str, Any]:
    """The load run, and the comparison if one was asked for; JSON-serialisable."""
    result = await load_run(address, plan, options, server=server, progress=progress)
    contenders = [Contender("ours", address, options.clients, True)]
    if options.one_by_one:
        contenders.append(Contender("ours one by one", address, 1, True))
    contenders += peers
    compared = await compare(contenders, plan, options, progress) if len(contenders) > 1 else None
    return {
        "benchmark": "load",
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "allocator": ALLOCATOR,
        "options": dataclasses.asdict(options),
        "plan": dataclasses.asdict(plan),
        "load": result,
        "comparison": compared,
    }


@contextlib.contextmanager
def hugging_face(model: Sequence[str], clients: int, threads: int, progress: Progress) -> Iterator[list[ServerProcess]]:
    """The model as Hugging Face's, float32, behind two servers: one request at a time, and `clients` in a batch.

    Args:
        model: the arguments of `convert` that say what is converted.

    Raises:
        RunError: the model cannot be converted; the converter's last lines are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="mesh-transformer-bench-") as directory, contextlib.ExitStack() as stack:
        progress("converting the model for Hugging Face")
        target = str(Path(directory) / "model")
        command = [sys.executable, "-m", "mesh_transformer", "convert", *model, target]
        done = subprocess.run(
            [*command, "--to", "huggingface", "--dtype", "float32"], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RunError(f"the model cannot be compared with Hugging Face's:\n{done.stderr.strip()}")
        module = [sys.executable, "-m", "mesh_transformer.bench.hf_server", target, "--max-batch"]
        yield [
            stack.enter_context(ServerProcess(name, [*module, str(batch)], threads=threads))
            for name, batch in (("hf one by one", 1), ("hf in batches", clients))
        ]


async def _sample_memory(server: ServerProcess, samples: list[int]) -> None:
    while True:
        resident = server.resident_bytes()
        if resident is not None:
            samples.append(resident)
        await asyncio.sleep(1.0)


async def _seconds_until_idle(address: Address) -> float | None:
    """How long after the last answer every slot was free; None: not within the time allowed, or it cannot be seen."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < _IDLE_SECONDS:
        state = idle(await metrics(address))
        if state is None:
            return None
        if state:
            return time.perf_counter() - begun
        await asyncio.sleep(0.05)
    return None


async def _repeat(address: Address, plan: Plan, answers: Sequence[Answer], timeout: float) -> dict[str, int]:
    """Some of the requests again, one by one: a completion does not depend on what ran beside it."""
    chosen = sorted((a for a in answers if a.kind == DONE), key=lambda a: a.number)[:_REPEATED]
    alone = [await ask(address, plan.request(a.number), stream=True, timeout=timeout) for a in chosen]
    equal = sum(again.kind == DONE and again.text == a.text for a, again in zip(chosen, alone, strict=True))
    return {"asked": len(chosen), "equal": equal}
