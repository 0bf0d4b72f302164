"""A stand-in for servers that caption pictures: OpenAI's chat completions, read strictly, answered at will.

    with Captioner() as server:
        caption(CaptionConfig(url=server.url, model=server.model), ...)
    assert not server.wrong

Every request is compared with what the interface asks for; what does not fit is answered with 400 and noted in `wrong`.
Every picture is decoded. `python -m tests.prepare.captioner 8000` serves until it is interrupted.
"""

import asyncio
import base64
import binascii
import hashlib
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image

from data import shapes

FIELDS = {"model", "messages", "temperature", "max_tokens", "seed"}
LOOP = "a bench and a tree and " * 60


@dataclass(slots=True)
class Asked:
    """One request for a caption: of which picture, how, and when."""

    picture: bytes
    prompt: str
    max_tokens: int
    fields: dict[str, Any]
    at: float = field(default_factory=time.monotonic)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.picture).hexdigest()[:12]


def describe(picture: bytes, prompt: str) -> str:
    """What is on a picture of data/shapes.py, and a number that depends on its every byte and on the prompt."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    things = shapes.read(np.asarray(image)).things if image.width == image.height else ()
    seen = " and ".join(f"a {thing.size} {thing.colour} {thing.shape}" for thing in things) or "A pattern"
    return f"{seen}, number {hashlib.sha256(picture + prompt.encode()).hexdigest()[:12]}."


class Captioner:
    """A server on a free port of this machine, in a thread of its own.

    `misbehave` is asked for each request: None for a proper answer, or one of

        500 503 429 400 404 307     that status (429 with Retry-After: 1)
        garbage html bare           200 with bytes that are no JSON, a page, JSON without choices
        empty loop refusal cut filtered long     200 with a text that is no caption
        hang drop                   no answer; a closed connection

    or any other string, which is then the answer's text. `delay(asked)` is in seconds. After `die_after` requests the
    server is gone, as if killed, until `revive`. Requests with max_tokens of 1 are trials, which `trials` counts.
    """

    def __init__(
        self,
        answer: Callable[[bytes, str], str] = describe,
        *,
        model: str = "tiny-vlm",
        key: str | None = None,
        max_side: int = 768,
        misbehave: Callable[[Asked], str | None] = lambda asked: None,
        delay: Callable[[Asked], float] = lambda asked: 0.0,
        die_after: int | None = None,
        models: Callable[[], web.Response] | None = None,
        extra: dict[str, Any] | None = None,
        strict: bool = True,
        port: int = 0,
    ):
        self.answer, self.model, self.key, self.max_side, self.extra = answer, model, key, max_side, extra or {}
        self.misbehave, self.delay, self.die_after, self.models, self.strict = (
            misbehave,
            delay,
            die_after,
            models,
            strict,
        )
        self.asked: list[Asked] = []
        self.wrong: list[str] = []
        self.trials = self.running = self.peak = self.finished = 0
        self.trial: str | None = None  # how trials are misbehaved at
        self._loop = asyncio.new_event_loop()
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "Captioner":
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._in_loop(self._start(self._socket))
        return self

    def __exit__(self, *_: object) -> None:
        self._in_loop(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def revive(self) -> None:
        """Serve again, at the same port."""
        self.die_after = None
        self._in_loop(self._start(socket.create_server(("127.0.0.1", self.port))))

    def _in_loop(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self, sock: socket.socket) -> None:
        app = web.Application(client_max_size=2**25)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0, handler_cancellation=True)
        await self._runner.setup()
        self._site = web.SockSite(self._runner, sock)
        await self._site.start()

    async def _die(self) -> None:
        """Close the port and all connections, whatever is on them."""
        assert self._runner.server
        await self._site.stop()
        for connection in list(self._runner.server.connections):
            if connection.transport:
                connection.transport.abort()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            given = request.headers.get("Authorization", "nothing")
            return _error(401, f"Invalid API key: {given}")
        if not self.key and "Authorization" in request.headers:
            return self._refuse("a key was sent to a server that wants none")
        if request.path == "/v1/models":
            if request.method != "GET":
                return self._refuse(f"{request.method} of the models")
            return self.models() if self.models else web.json_response({"data": [{"id": self.model}]})
        if request.path != "/v1/chat/completions":
            return _error(404, f"Not Found: {request.path}")
        if request.method != "POST" or request.content_type != "application/json":
            return self._refuse(f"{request.method} of {request.content_type}")
        try:
            asked = self._read(json.loads(await request.read()))
        except ValueError as error:
            return self._refuse(str(error))
        if asked.fields["model"] != self.model:
            return _error(404, f"The model `{asked.fields['model']}` does not exist.")
        if asked.max_tokens == 1:
            self.trials += 1
            return await self._reply(request, asked, self.trial)
        if self.die_after is not None and len(self.asked) >= self.die_after:
            asyncio.ensure_future(self._die())  # noqa: RUF006
            await asyncio.sleep(60)
        self.asked.append(asked)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.delay(asked))
            return await self._reply(request, asked, self.misbehave(asked))
        finally:
            self.running -= 1
            self.finished += 1

    def _refuse(self, why: str) -> web.Response:
        self.wrong.append(why)
        return _error(400, why)

    def _read(self, body: dict[str, Any]) -> Asked:
        """Check a request's body in full; ValueError says what is amiss."""
        _require(set(body) == FIELDS | self.extra.keys(), f"fields {sorted(body)}")
        _require({name: body[name] for name in self.extra} == self.extra, "other values of extra fields")
        _require(isinstance(body["temperature"], float | int) and body["temperature"] >= 0, "temperature")
        _require(type(body["max_tokens"]) is int and body["max_tokens"] > 0, "max_tokens")
        _require(type(body["seed"]) is int, "seed")
        _require(isinstance(body["messages"], list) and len(body["messages"]) == 1, "messages")
        message = body["messages"][0]
        _require(set(message) == {"role", "content"} and message["role"] == "user", "message")
        _require([sorted(part) for part in message["content"]] == [["image_url", "type"], ["text", "type"]], "content")
        image, text = message["content"]
        _require((image["type"], text["type"]) == ("image_url", "text"), "types of content")
        _require(isinstance(text["text"], str) and bool(text["text"].strip()), "text")
        _require(set(image["image_url"]) == {"url"}, "image_url")
        picture = self._picture(image["image_url"]["url"])
        return Asked(picture, text["text"], body["max_tokens"], {key: body[key] for key in body if key != "messages"})

    def _picture(self, url: str) -> bytes:
        head, _, data = url.partition(",")
        _require(
            head in ("data:image/jpeg;base64", "data:image/png;base64"), f"not a picture in the request: {head[:40]}"
        )
        try:
            picture = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise ValueError(f"base64: {error}") from None
        if self.strict:
            with Image.open(io.BytesIO(picture), formats=["JPEG", "PNG"]) as image:
                image.load()
                _require(image.get_format_mimetype() == head[5:-7], f"{image.format} in {head}")
                _require(max(image.size) <= self.max_side and image.mode == "RGB", f"{image.size} {image.mode}")
                _require(not image.getexif(), "EXIF was passed on")
        return picture

    async def _reply(self, request: web.Request, asked: Asked, how: str | None) -> web.StreamResponse:
        match how:
            case "429":
                return _error(429, "Too many requests", {"Retry-After": "1"})
            case "307":
                return _error(307, "elsewhere", {"Location": "/elsewhere"})
            case "400" | "404" | "500" | "503":
                return _error(int(how), f"status {how} for a picture of {len(asked.picture)} bytes")
            case "garbage":
                return web.Response(body=b"\xff\x00{]", content_type="application/json")
            case "html":
                return web.Response(text="<html><body>It works!</body></html>", content_type="text/html")
            case "bare":
                return web.json_response({"object": "error", "message": "no choices"})
            case "hang":
                await asyncio.sleep(600)
            case "drop":
                assert request.transport
                request.transport.abort()
                await asyncio.sleep(1)
        texts = {"empty": " \n", "loop": LOOP, "refusal": "I'm sorry, but I can't help with that.", "filtered": ""}
        texts |= {"cut": "A dog that runs over the", "long": "".join(f" and {n} dogs" for n in range(1000))}
        ends = {"loop": "length", "cut": "length", "filtered": "content_filter"}
        text = self.answer(asked.picture, asked.prompt) if how is None else texts.get(how, how)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": ends.get(how or "", "stop"),
        }
        return web.json_response({"object": "chat.completion", "model": self.model, "choices": [choice]})


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status, headers=headers)


if __name__ == "__main__":
    with Captioner(port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000) as captioner:
        print(f"caption.url={captioner.url} caption.model={captioner.model}", flush=True)
        threading.Event().wait()
