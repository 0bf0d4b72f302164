"""A web server of ill will on this machine: pictures, and everything a server can do to one who asks for them.

    with Hostile({"/a.jpg": picture(64, 48)}) as server:
        server.url("/a.jpg")          the picture
        server.url("/endless/chunked")  10 GB of zeros, if one takes them
    server.requests, server.sent, server.connections, server.most_at_once     what was asked of it, and what it gave

It runs in a thread and speaks HTTP by hand, since no library would say what it has to say.
"""

import asyncio
import io
import itertools
import random
import socket
import ssl
import struct
import tempfile
import threading
import zlib
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from PIL import Image

HUGE = 10_000_000_000
ZEROS = bytes(65536)
# Known to nobody and signed by itself, for localhost and 127.0.0.1. The key is for these tests and keeps no secret.
KEY = """
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgip0p/sGkeap6xpUT744r1ptLwFNW6nO5sROyOYXWXwOhRANCAAR0calmnwFNPhBR3ai4
3bpkl+ZI+22e95bonXXGdBy00oseKRPsalAeCeKyoCGV5C33liVahJ315RFzgp7Jb4V4
"""
CERTIFICATE = """
MIIBmzCCAUGgAwIBAgIUILD36gDrUTbsMINLSGkFI3rHzJkwCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNzA3MzUyNVoY
DzIxMjYxMTAzMDczNTI1WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAR0calmnwFNPhBR3ai43bpkl+ZI+22e
95bonXXGdBy00oseKRPsalAeCeKyoCGV5C33liVahJ315RFzgp7Jb4V4o28wbTAdBgNVHQ4EFgQUMiv9TaX4/Iqx1/aGSP/MjfZWXvMwHwYDVR0jBBgw
FoAUMiv9TaX4/Iqx1/aGSP/MjfZWXvMwDwYDVR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZIzj0EAwIDSAAwRQIh
ALzqIDrwpQbDGFuF9TEyXb5oJOL3YKfswz9Dk3yjkYpeAiBqFZP2QxlmRYpDtbmBASNqr/+kYto0mFov6hNZhD6CMg==
"""


def picture(width: int, height: int, kind: str = "JPEG", seed: int = 0) -> bytes:
    """An encoded picture of noise: JPEG, PNG or WEBP."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@cache
def png_bomb(side: int = 30_000) -> bytes:
    """A true PNG of side x side black pixels, in a thousandth of their bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)  # the filter, then one bit a pixel
    pixels = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@cache
def gzip_bomb(size: int = 50_000_000) -> bytes:
    """`size` zeros in a thousandth of their bytes."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([*(packer.compress(ZEROS) for _ in range(size // len(ZEROS))), packer.flush()])


class Hostile:
    """The server. Each picture comes after a random time below `delay` seconds; what drips, every `drip` seconds.

    `elsewhere` is the host:port that /to/loopback leads to. With `tls` its certificate is one that nobody should trust.
    """

    def __init__(
        self,
        pictures: dict[str, bytes] | None = None,
        *,
        host: str = "127.0.0.1",
        elsewhere: str = "127.0.0.2:9",
        delay: float = 0.0,
        drip: float = 1.0,
        tls: bool = False,
    ):
        self.pictures = {"/picture.jpg": picture(64, 48)} | (pictures or {})
        self.host, self.elsewhere, self.delay, self.drip, self.tls = host, elsewhere, delay, drip, tls
        self.port = 0
        self.requests: list[tuple[str, dict[str, str]]] = []  # path and headers
        self.sent: Counter[str] = Counter()  # bytes of bodies, by path; what is in the socket's buffers included
        self.connections = self.most_at_once = self._at_once = 0

    def url(self, path: str, host: str | None = None) -> str:
        return f"{'https' if self.tls else 'http'}://{host or self.host}:{self.port}{path}"

    def asked(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(known == path for known, _ in self.requests)

    def __enter__(self) -> "Hostile":
        self._loop = asyncio.new_event_loop()
        listener = socket.create_server((self.host, self.port), backlog=256)
        self.port = listener.getsockname()[1]
        self._loop.run_until_complete(asyncio.start_server(self._serve, sock=listener, ssl=self._context()))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _context(self) -> ssl.SSLContext | None:
        if not self.tls:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "both.pem"
            blocks = (("PRIVATE KEY", KEY), ("CERTIFICATE", CERTIFICATE))
            path.write_text("".join(f"-----BEGIN {name}-----{body}-----END {name}-----\n" for name, body in blocks))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(path)
            return context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # they had enough, or we close
        finally:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # to close would wait until they have read it
            else:
                writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is good for another request."""
        request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        path = request.split(" ")[1]
        self.requests.append((path, dict(line.split(": ", 1) for line in lines)))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if (content := self.pictures.get(path)) is not None:
                await asyncio.sleep(random.uniform(0, self.delay) if self.delay else 0)
                await self._send(writer, path, content)
                return True
            await self._harm(writer, path)
            return False
        finally:
            self._at_once -= 1

    async def _send(
        self, writer: asyncio.StreamWriter, path: str, body: bytes = b"", status: str = "200 OK", **headers: str
    ) -> None:
        named = {"Content-Type": "image/jpeg", "Content-Length": str(len(body))}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value)
        writer.write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body)
        self.sent[path] += len(body)
        await writer.drain()

    async def _harm(self, writer: asyncio.StreamWriter, path: str) -> None:
        good = self.pictures["/picture.jpg"]
        again = self.asked(path) > 1
        match path.split("/")[1:]:
            case ["to", where]:
                await self._send(writer, path, status="302 Found", Location=self._location(where))
            case ["hops", number]:  # so many redirects, then the picture
                to = f"/hops/{int(number) - 1}" if int(number) > 1 else "/picture.jpg"
                await self._send(writer, path, status="301 Moved Permanently", Location=to)
            case ["endless", kind]:  # 10 GB: chunked, with their length, or until the connection closes
                await self._endless(writer, path, kind)
            case ["bomb.gzip"]:
                await self._send(writer, path, gzip_bomb(), Content_Encoding="gzip")
            case ["bomb.png"]:
                await self._send(writer, path, png_bomb())
            case ["flaky.jpg"]:
                await self._send(writer, path, good, "200 OK" if again else "500 Internal Server Error")
            case ["down.jpg"]:
                await self._send(writer, path, b"", "503 Service Unavailable")
            case ["busy", seconds]:
                await self._send(writer, path, good, "200 OK" if again else "429 Slow Down", Retry_After=seconds)
            case ["slow.jpg"]:
                await self._send(writer, path, Content_Length=str(len(good)))
                for byte in good:
                    await asyncio.sleep(self.drip)
                    writer.write(bytes([byte]))
                    await writer.drain()
            case ["silent.jpg"]:  # never says a word
                await asyncio.sleep(3600)
            case ["closed.jpg"]:  # hangs up without an answer
                pass
            case ["garbled.jpg"]:
                writer.write(b"220 smtp.example ESMTP\r\n" * 4)
            case ["page.jpg"]:
                await self._send(writer, path, b"<!doctype html><title>Gone</title>" * 9)
            case ["empty.jpg"]:
                await self._send(writer, path)
            case ["flat.png"]:  # 0 pixels high
                head = bytearray(picture(8, 8, "PNG"))
                head[20:24] = bytes(4)
                await self._send(writer, path, bytes(head))
            case ["reset.jpg"]:  # in the middle of the body
                await self._send(writer, path, good[: len(good) // 2], Content_Length=str(len(good)))
                await asyncio.sleep(0.02)
                _reset(writer)
            case ["cut.jpg"]:  # the body is shorter than announced
                await self._send(writer, path, good, Content_Length=str(len(good) + 1000))
            case ["cut-chunk.jpg"]:
                await self._send(writer, path, Content_Length="", Transfer_Encoding="chunked")
                writer.write(b"%x\r\n" % len(good) + good[:100])
            case ["tagged", tag]:
                await self._send(writer, path, good, X_Robots_Tag=unquote(tag))
            case ["typed.jpg"]:  # a true PNG, called something else twice
                await self._send(writer, path, picture(20, 10, "PNG"), Content_Type="text/html")
            case ["long-header.jpg"]:
                await self._send(writer, path, good, X_Long="x" * 1_000_000)
            case ["many-headers.jpg"]:
                await self._send(writer, path, good, **{f"X_{i}": "x" for i in range(20_000)})
            case _:
                await self._send(writer, path, b"not here", "404 Not Found", Content_Type="text/html")

    def _location(self, where: str) -> str:
        return {
            "private": "http://10.0.0.1/",
            "metadata": "http://169.254.169.254/latest/meta-data/",
            "mapped": "http://[::ffff:169.254.169.254]/",
            "decimal": f"http://2130706434:{self.elsewhere.rpartition(':')[2]}/",  # 127.0.0.2
            "loopback": f"http://{self.elsewhere}/",
            "file": "file:///etc/passwd",
            "loop": "/to/loop",
            "garbage": "http://[\xff\xfe",
            "picture": "picture.jpg/../../picture.jpg",
        }[where]

    async def _endless(self, writer: asyncio.StreamWriter, path: str, kind: str) -> None:
        chunked = {"Transfer_Encoding": "chunked"} if kind == "chunked" else {}
        length = str(HUGE) if kind == "length" else ""
        await self._send(writer, path, b"", "200 OK", Content_Length=length, **chunked)
        for _ in itertools.repeat(None, HUGE // len(ZEROS)):
            writer.write(b"10000\r\n" + ZEROS + b"\r\n" if chunked else ZEROS)
            self.sent[path] += len(ZEROS)
            await writer.drain()


def tagged(tag: str) -> str:
    """The path of a picture with this X-Robots-Tag."""
    return "/tagged/" + quote(tag, safe="")


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset (RST) instead of a goodbye (FIN)."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
