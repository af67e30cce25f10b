"""A server of completions that behaves as it is told, well or badly, on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

# What a request gets, by the number of those before it and its body.
Behave = Callable[[int, dict[str, Any]], str]


class FakeServer:
    """A context manager; `port` is a free one. What happened is in `bodies`, `paths`, `heads` and `left`."""

    def __init__(self, behave: Behave = lambda number, body: "whole", *, seconds_a_token: float = 0.0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.left = threading.Semaphore(0)  # released once for every client that went away before its end
        self.running = 0
        self.most_running = 0
        self._behave = behave
        self._seconds_a_token = seconds_a_token
        self._loop = asyncio.new_event_loop()
        self._started: threading.Event = threading.Event()
        self._stop = asyncio.Event()
        self._go_on = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),))

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()

    def go_on(self) -> None:
        """The stream that is "held" after its first piece goes on."""
        self._loop.call_soon_threadsafe(self._go_on.set)

    async def _main(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            length = re.search(r"^content-length: *(\d+)", head, re.IGNORECASE | re.MULTILINE)
            body = await reader.readexactly(int(length[1]) if length else 0)
            if head.startswith("POST"):
                self.running += 1
                self.most_running = max(self.most_running, self.running)
                try:
                    await self._answer(reader, writer, json.loads(body))
                finally:
                    self.running -= 1
            elif head.split(" ")[1] == "/metrics":
                await self._plain(writer, 200, self._metrics())
            else:
                await self._plain(writer, 200, '{"status": "ok"}')
        except (ConnectionError, EOFError):
            self.left.release()
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        number = len(self.bodies)
        self.bodies.append(body)
        how = self._behave(number, body)
        if how == "hang":
            await reader.read()  # until the client goes
            raise ConnectionResetError
        if how[:3].isdecimal():
            retry = "Retry-After: 1\r\n" if how == "429" else ""
            await self._plain(writer, int(how[:3]), '{"error": {"message": "no"}}', retry)
        elif not body["stream"]:
            choice = {"text": text_of(body), "finish_reason": "length"}
            await self._plain(writer, 200, json.dumps({"choices": [choice], "usage": usage(body)}))
        else:
            await self._stream(reader, writer, body, how)

    async def _stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any], how: str
    ) -> None:
        kind = "text/html" if how == "html" else "text/event-stream; charset=utf-8"
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        gone = asyncio.ensure_future(reader.read())
        try:
            for i, block in enumerate(_blocks(body, how)):
                if how == "cut" and i == 2:
                    writer.write(b"40\r\ndata: {")
                    return
                writer.write(b"%x\r\n%s\r\n" % (len(block), block))
                await writer.drain()
                if how == "held" and i == 0:
                    await self._go_on.wait()
                    self._go_on.clear()
                await asyncio.sleep(self._seconds_a_token)
                if gone.done():
                    raise ConnectionResetError
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            gone.cancel()

    async def _plain(self, writer: asyncio.StreamWriter, status: int, text: str, headers: str = "") -> None:
        writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: {len(text.encode())}\r\n{headers}\r\n{text}".encode())
        await writer.drain()

    def _metrics(self) -> str:
        return (
            f"# HELP mesh_transformer_slots_used x\nmesh_transformer_slots_used {float(self.running)}\n"
            f"mesh_transformer_queue_length 0.0\nmesh_transformer_streams {self.running}\n"
            f"mesh_transformer_engine_step_failures_total 0.0\n"
            f'mesh_transformer_requests_total{{endpoint="a b",status="200"}} {len(self.bodies)}\n'
        )


def text_of(body: dict[str, Any]) -> str:
    """What the server writes: a function of the request alone."""
    return "".join(pieces(body))


def pieces(body: dict[str, Any]) -> list[str]:
    """A token a piece, one of them not ASCII."""
    return [f"{body['seed'] % 97}.{i} é" for i in range(body["max_tokens"])]


def usage(body: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI counts."""
    details = {"cached_tokens": 1}
    n_prompt, n_output = len(body["prompt"]), body["max_tokens"]
    return {"prompt_tokens": n_prompt, "completion_tokens": n_output, "prompt_tokens_details": details}


def _blocks(body: dict[str, Any], how: str) -> list[bytes]:
    """The chunks of a stream."""
    written = pieces(body)
    events: list[Any] = [{"choices": [{"text": text, "finish_reason": None}]} for text in written]
    if how == "error":
        return _encoded([*events[:1], {"error": {"type": "server_error", "message": "failed"}}])
    events.append({"choices": [{"text": "", "finish_reason": "stop" if how == "stop" else "length"}]})
    counted = usage(body)
    if how == "short":
        counted["completion_tokens"] -= 1
    if how != "no usage":
        events.append({"choices": [], "usage": counted})
    blocks = _encoded(events)
    if how != "no done":
        blocks.append(b"data: [DONE]\n\n")
    if how == "more":
        blocks.append(blocks[0])
    if how == "torn":
        blocks[-1] = blocks[-1][:-1]
    if how == "split":  # chunks know nothing of events
        whole = b"".join(blocks).replace(b"\n", b"\r\n")
        blocks = [whole[i : i + 7] for i in range(0, len(whole), 7)]
    return blocks


def _encoded(events: list[Any]) -> list[bytes]:
    return [f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in events]
