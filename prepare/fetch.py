"""Fetch URLs from a table that nobody vetted, without being led where we should not go or being held there.

    where to     http and https alone; a name is resolved once, all its addresses must be public, and the connection
                 goes to just those; every redirect, followed by hand, is looked at in the same way. Neither proxies,
                 cookies nor passwords of the environment are used, and a password in a URL is not sent.
    how long     one deadline for a whole try: its redirects, answers and bodies, however slowly they drip.
    how much     bytes are counted as they come, whatever was announced. Nothing is decompressed: a compressed body,
                 which was not asked for, is not a picture.
    manners      so many connections in all and so many a host; X-Robots-Tag is heeded; who is busy is asked again
                 later, and not before the time it named.

Everything that can go wrong on the way is one exception, `FetchError`, with a short reason.
"""

import asyncio
import ipaddress
import itertools
import random
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

MAX_REDIRECTS = 5
LONGEST_WAIT = 30.0  # s; who asks for more time with Retry-After is not asked again
IDLE = 1.0  # s that a connection is kept for the next URL of its host: longer, and idle ones use up the file handles
ROBOT = "triptych"  # our name in X-Robots-Tag
UNWANTED = {"noai", "noimageai", "noindex", "noimageindex", "none"}
VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}  # their colon names no robot

# IANA's special-purpose registries, listed here because what `is_global` says of them depends on Python's version.
SPECIAL_V4 = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
    192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
    168.63.129.16/32
"""  # the last is public, but within Azure it is the machine's own host
SPECIAL_V6 = "2001::/23 2001:db8::/32 3fff::/20"
REFUSED = [ipaddress.ip_network(block) for block in f"{SPECIAL_V4} {SPECIAL_V6}".split()]
UNICAST_V6 = ipaddress.IPv6Network("2000::/3")  # nothing outside of it is public
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)


@dataclass(slots=True, kw_only=True)
class FetchConfig:
    """How far to trust the servers of others, and how to behave towards them. Errors call the keys `download.key`."""

    timeout: float = 10.0  # s for one try of a URL, all in all; waiting for our own turn is not counted
    retries: int = 2  # after failed connections, cut bodies, 429 and 5xx
    backoff: float = 0.5  # s before the first retry, doubled with each, give or take half
    concurrency: int = 64  # connections in all, a process
    per_host: int = 8  # connections to one host, a process
    max_bytes: int = 20_000_000  # of a body; longer ones are cut off and left out
    respect_robots: bool = True  # leave out what is served with X-Robots-Tag: noai, noimageai, noindex, noimageindex
    user_agent: str = "Triptych (collects images of a dataset)"  # what we call ourselves; has to name Triptych
    allow_hosts: list[str] = field(default_factory=list)  # "host" or "host:port" that may have any address

    def __post_init__(self):
        for key, lowest in (("timeout", 0), ("backoff", 0), ("concurrency", 1), ("per_host", 1), ("max_bytes", 1)):
            value = getattr(self, key)
            if not value >= lowest or (key == "timeout" and not value):
                raise ValueError(
                    f"download.{key}={value} must be {'above' if key == 'timeout' else 'at least'} {lowest};"
                    f" the default is {type(self).__dataclass_fields__[key].default}"
                )
        if not 0 <= self.retries <= 10:
            raise ValueError(f"download.retries={self.retries} is outside 0 to 10; choose 0 to ask each URL once")
        if ROBOT not in self.user_agent.lower() or not self.user_agent.isprintable() or not self.user_agent.isascii():
            raise ValueError(
                f"download.user_agent={self.user_agent!r} must be a line of ASCII that names Triptych, so that sites"
                " can have rules for it; add how to reach you behind the name"
            )
        for host in self.allow_hosts:
            if not host or re.search(r"[/@\s*]", host):
                raise ValueError(
                    f'download.allow_hosts has {host!r}, which must be a "host" or "host:port" without scheme, path'
                    " or pattern; write for instance images.example:8080"
                )


class FetchError(Exception):
    """Why a URL gave no picture: a short fixed `reason`, and a `detail` for people.

    `again` says that a later try may fare better, `wait` after how many seconds the server wants it.
    """

    def __init__(self, reason: str, detail: str = "", *, again: bool = False, wait: float | None = None):
        super().__init__(reason, detail)
        self.reason, self.again, self.wait = reason, again, wait
        self.detail = detail[:300].encode(errors="replace").decode()  # a header may hold what is not Unicode


class Client:
    """`async with Client(config) as client`: then `await client.get(url)`, as many at once as one likes."""

    def __init__(self, config: FetchConfig):
        self.config = config
        self._turns = asyncio.Semaphore(config.concurrency)
        self._host_turns = defaultdict(lambda: asyncio.Semaphore(config.per_host))

    async def __aenter__(self) -> "Client":
        # names are resolved in threads, of which asyncio has few by default
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(self.config.concurrency))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=Resolver(self.config.allow_hosts), ttl_dns_cache=600, limit=0, keepalive_timeout=IDLE
            ),
            headers={"User-Agent": self.config.user_agent, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None),  # _follow has the deadline
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, url: str) -> bytearray:
        """The body of what `url` leads to, of `max_bytes` at most. Raises FetchError, whatever servers do.

        Memory: `concurrency` bodies, if the caller is done with one before it awaits anything else.
        """
        for retry in itertools.count():
            try:
                return await self._follow(url)
            except FetchError as failure:
                wait = max(failure.wait or 0, self.config.backoff * 2**retry * random.uniform(0.5, 1.5))
                if not failure.again or retry == self.config.retries or not wait <= LONGEST_WAIT:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError

    async def _follow(self, text: str) -> bytearray:
        """One try, through all redirects. Turns are taken anew for each host, never two at once: no deadlock."""
        url, left = _url(text), self.config.timeout
        for _ in range(MAX_REDIRECTS + 1):
            async with self._host_turns[url.raw_host or ""], self._turns:
                begin = time.monotonic()
                try:
                    async with asyncio.timeout(left):
                        answer = await self._exchange(url)
                except TimeoutError:
                    raise FetchError("timeout", f"{url} took more than {self.config.timeout:g} s") from None
                left -= time.monotonic() - begin
            if isinstance(answer, bytearray):
                return answer
            url = answer
        raise FetchError("too_many_redirects", f"more than {MAX_REDIRECTS}, the next to {url}")

    async def _exchange(self, url: URL) -> bytearray | URL:
        """One request: the body, or where else to look."""
        _check_literal(url, self.config.allow_hosts)
        try:
            async with self._session.get(url, allow_redirects=False) as answer:
                if answer.status in (301, 302, 303, 307, 308) and (location := answer.headers.get("Location")):
                    return _url(location, url)
                if answer.status != 200:
                    again = answer.status == 429 or answer.status >= 500
                    wait = _retry_after(answer.headers.get("Retry-After"))
                    raise FetchError(f"http_{answer.status}", str(url), again=again, wait=wait)
                if self.config.respect_robots and is_unwanted(tags := answer.headers.getall("X-Robots-Tag", [])):
                    raise FetchError("robots", f"X-Robots-Tag: {', '.join(tags)}")
                return await self._body(answer)
        except aiohttp.ClientSSLError as error:
            raise FetchError("tls", f"{url}: {getattr(error.os_error, 'reason', None) or error.os_error}") from error
        except aiohttp.ClientResponseError as error:  # what answered does not speak HTTP, or has no measure
            raise FetchError("connection", f"{url}: not HTTP as it should be") from error
        except (aiohttp.InvalidURL, ValueError) as error:
            raise FetchError("bad_url", str(url)) from error
        except (aiohttp.ClientError, OSError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise FetchError("connection", f"{url}: {why}", again=True) from error

    async def _body(self, answer: aiohttp.ClientResponse) -> bytearray:
        most = self.config.max_bytes
        if (answer.content_length or 0) > most:
            raise FetchError("too_many_bytes", f"{answer.content_length:,} bytes are announced, more than {most:,}")
        body = bytearray()
        try:
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > most:
                    raise FetchError("too_many_bytes", f"more than {most:,} bytes")
        except (aiohttp.ClientError, OSError) as error:
            raise FetchError("body_cut", f"{answer.url} ended too early", again=True) from error
        return body


class Resolver(AbstractResolver):
    """Names to addresses, all of them public. What is returned here is what is connected to, with no second look-up."""

    def __init__(self, allow_hosts: list[str]):
        self._allow_hosts = allow_hosts

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            again = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            raise FetchError(
                "dns", f"{host}: {getattr(error, 'strerror', None) or 'not a name'}", again=again
            ) from error
        results = []
        for kind, _, protocol, _, address in found:
            # One address that is not public condemns the name: which of them is connected to would be up to its owner.
            _check_address(host, port, str(address[0]), self._allow_hosts)
            results.append(
                ResolveResult(
                    hostname=host,
                    host=str(address[0]),
                    port=port,
                    family=kind,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        return results

    async def close(self) -> None:
        pass


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of the open internet: not of this machine, its network, its cloud or of no one.

    IPv6 addresses that stand for one of IPv4 are judged by it: mapped (RFC 4291), 6to4 (RFC 3056), NAT64 (RFC 6052).
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(inner)
        if address.scope_id or address not in UNICAST_V6:
            return False
    return not any(address in block for block in REFUSED)


def is_unwanted(tags: Iterable[str]) -> bool:
    """Whether X-Robots-Tag headers forbid such use, to all or to us: `noai`, `otherbot: noindex, triptych: noai`."""
    for tag in tags:
        robot = "*"  # a name holds for the rules behind it, up to the next name
        for rule in tag.lower().split(","):
            name, colon, rest = (part.strip() for part in rule.partition(":"))
            if colon and name not in VALUED and re.fullmatch(r"\*|[a-z][a-z0-9_-]*", name):
                robot, rule = name, rest
            if robot in ("*", ROBOT) and rule.strip() in UNWANTED:
                return True
    return False


def _url(text: str, base: URL | None = None) -> URL:
    """The URL, relative to `base`, without user and password. aiohttp goes by the same object: there is one reading."""
    try:
        url = URL(text.strip())
        url = base.join(url) if base else url
        if url.scheme and url.scheme not in ("http", "https"):
            raise FetchError("refused_scheme", str(url))
        return url.with_user(None)
    except (ValueError, TypeError) as error:
        raise FetchError("bad_url", text) from error


def _check_literal(url: URL, allow_hosts: list[str]) -> None:
    """Refuse an address in the place of a name: aiohttp asks no resolver about it."""
    host = url.raw_host or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # 2130706433, 0x7f.1, 127.1: no name ends in a number, but the system's resolver reads addresses into them
        if NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
            raise FetchError("refused_address", f"{host} is an address in disguise") from None
    else:
        _check_address(host, url.port or 0, host, allow_hosts)


def _check_address(host: str, port: int, address: str, allow_hosts: list[str]) -> None:
    names = {host, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"}
    if names.isdisjoint(name.lower() for name in allow_hosts) and not is_public(ipaddress.ip_address(address)):
        raise FetchError("refused_address", address if host == address else f"{host} is {address}")


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks us to wait: it says a number or a date (RFC 9110, 10.2.3)."""
    try:
        return float(value) if value else None
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(value or "").timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
