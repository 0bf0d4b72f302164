"""Downloading: where it will not go, what it will not take, and that the tar is the same however answers come."""

import asyncio
import hashlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from prepare import fetch
from prepare.download import DownloadConfig, download
from prepare.fetch import Client, FetchError, is_public, is_unwanted
from prepare.parts import Part, dropped, run_step
from tests.prepare.hostile import HUGE, Hostile, gzip_bomb, picture, png_bomb, tagged

ROOT = Path(__file__).parents[2]
CAP = 1_000_000
BUFFERS = 16_000_000  # what the two sockets may hold besides what was read


def config(**changes) -> DownloadConfig:
    """Quick, and allowed to talk to this machine."""
    plain = {"timeout": 1.0, "backoff": 0.01, "max_bytes": CAP, "allow_hosts": ["127.0.0.1"], "max_faults": 1.0}
    return DownloadConfig(**plain | changes)


def table(folder: Path, **parts: list[dict]) -> Path:
    """A finished step with the given rows, keyed as ours are: parts are given as p00000=..., the p is cut off."""
    rows = {name[1:]: rows for name, rows in parts.items()}
    run_step(folder, list(rows), partial(_write, rows), recipe={})
    return folder


def _write(rows: dict[str, list[dict]], part: Part) -> None:
    keyed = [{"key": f"{part.name}{i:04d}"} | row for i, row in enumerate(rows[part.name])]
    pq.write_table(pa.Table.from_pylist(keyed), part.path(".parquet"))
    for _ in keyed:
        part.keep()


def urls(folder: Path, *addresses: str) -> Path:
    return table(folder, p00000=[{"url": address, "caption_alt": f"at {address}"} for address in addresses])


def get(url: str, settings: DownloadConfig) -> bytes:
    async def once() -> bytes:
        async with Client(settings) as client:
            return bytes(await client.get(url))

    return asyncio.run(once())


def refused(url: str, settings: DownloadConfig) -> tuple[str, str]:
    with pytest.raises(FetchError) as caught:
        get(url, settings)
    return caught.value.reason, caught.value.detail


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def server():
    assert len(png_bomb()) + len(gzip_bomb()) < CAP  # made before anyone waits for them; true, but too many pixels
    with Hostile({"/good.png": picture(40, 30, "PNG"), "/good.webp": picture(40, 30, "WEBP")}, drip=0.2) as server:
        yield server


# -- what comes of it --


CAPTIONS = {"caption_alt": "a bee, ünïcode 蜂", "caption_long": "a bee on a flower"}
ROWS = [
    {"url": "/a.jpg", "punsafe": 0.125, "sha256": "0" * 64, "width": 9} | CAPTIONS,
    {"url": "/missing.jpg"} | CAPTIONS,
    {"url": "/b.webp", "caption_alt": None, "caption_long": "only long"},
    {"url": "/page.jpg"},
    {"url": "/typed.jpg", "caption_alt": "a true PNG"},
]
PICTURES = {"/a.jpg": picture(64, 48), "/b.webp": picture(50, 20, "WEBP")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("made")
    with Hostile(PICTURES) as server:
        before = table(base / "filter", p00000=[row | {"url": server.url(row["url"])} for row in ROWS])
        tally = download(config(), before, base / "images")
    assert (tally.given, tally.kept, tally.faults) == (5, 3, 2)
    return base / "images"


def test_the_tar_reads_in_webdataset(made: Path):
    samples = list(webdataset.WebDataset(str(made / "00000.tar"), shardshuffle=False))  # type: ignore
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000002", "000000004"]
    assert [sorted(key for key in sample if key[0] != "_") for sample in samples] == [
        ["jpg", "json", "txt"],
        ["json", "txt", "webp"],
        ["json", "png", "txt"],  # by what it is: its name ends in .jpg, its type was text/html
    ]
    assert samples[0]["jpg"] == PICTURES["/a.jpg"]
    assert samples[1]["webp"] == PICTURES["/b.webp"]
    assert [sample["txt"].decode() for sample in samples] == [CAPTIONS["caption_alt"], "only long", "a true PNG"]


def test_json_beside_a_picture_is_that_of_img2dataset(made: Path):
    with tarfile.open(made / "00000.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".json")}  # type: ignore[union-attr]
        assert {(member.mtime, member.uid, member.uname) for member in tar.getmembers()} == {(0, 0, "")}
    first, second = json.loads(files["000000000.json"]), json.loads(files["000000002.json"])
    assert first.pop("url").endswith("/a.jpg")
    assert first == {
        "caption": CAPTIONS["caption_alt"],
        "key": "000000000",
        "status": "success",
        "error_message": None,
        "width": 64,
        "height": 48,
        "original_width": 64,
        "original_height": 48,
        "exif": "{}",
        "sha256": hashlib.sha256(PICTURES["/a.jpg"]).hexdigest(),
        "captions": {"alt": CAPTIONS["caption_alt"], "long": CAPTIONS["caption_long"]},
        "punsafe": 0.125,
    }
    assert second["caption"] == "only long"
    assert not second.keys() & {"captions", "punsafe"}


def test_every_row_is_in_the_table_and_the_statistics(made: Path):
    rows = pq.read_table(made / "00000.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"00000{i:04d}" for i in range(5)]
    assert [(row["status"], row["error_message"]) for row in rows] == [
        ("success", None),
        ("failed_to_download", "http_404"),
        ("success", None),
        ("failed_to_resize", "not_an_image"),
        ("success", None),
    ]
    assert (rows[0]["width"], rows[1]["width"], rows[4]["height"]) == (64, None, 10)  # the true ones
    assert (rows[0]["caption_long"], rows[0]["punsafe"]) == (CAPTIONS["caption_long"], 0.125)
    assert json.loads((made / "00000_stats.json").read_bytes()) == {
        "count": 5,
        "successes": 3,
        "failed_to_download": 1,
        "failed_to_resize": 1,
        "status_dict": {"success": 3, "http_404": 1, "not_an_image": 1},
    }
    assert dropped(made, "00000") == {"000000001": "http_404", "000000003": "not_an_image"}


# -- where it ends, and why --


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/good.png", None),
        ("/to/picture", None),
        ("/hops/5", None),
        ("/hops/6", "too_many_redirects"),
        ("/to/loop", "too_many_redirects"),
        ("/to/private", "refused_address"),
        ("/to/metadata", "refused_address"),
        ("/to/mapped", "refused_address"),
        ("/to/decimal", "refused_address"),
        ("/to/loopback", "refused_address"),
        ("/to/file", "refused_scheme"),
        ("/to/garbage", "bad_url"),
        ("/missing.jpg", "http_404"),
        ("/flaky.jpg", None),
        ("/busy/0", None),
        ("/down.jpg", "http_503"),
        ("/slow.jpg", "timeout"),
        ("/silent.jpg", "timeout"),
        ("/closed.jpg", "connection"),
        ("/garbled.jpg", "connection"),
        ("/long-header.jpg", "connection"),
        ("/many-headers.jpg", "connection"),
        ("/reset.jpg", "body_cut"),
        ("/cut.jpg", "body_cut"),
        ("/cut-chunk.jpg", "body_cut"),
        ("/endless/chunked", "too_many_bytes"),
        ("/endless/length", "too_many_bytes"),
        ("/endless/close", "too_many_bytes"),
        ("/bomb.gzip", "not_an_image"),  # never unpacked
        ("/bomb.png", "too_many_pixels"),
        ("/page.jpg", "not_an_image"),
        ("/empty.jpg", "zero_size"),
        ("/flat.png", "zero_size"),
        (tagged("noai"), "robots"),
    ],
)
def test_everything_a_server_can_do_has_its_reason(outcomes: dict[str, str | None], path: str, reason: str | None):
    assert outcomes[path] == reason


@pytest.fixture(scope="module")
def outcomes(server: Hostile, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What became of each path of the test above: all are asked for at once."""
    (mark,) = test_everything_a_server_can_do_has_its_reason.pytestmark  # type: ignore[attr-defined]
    paths = [path for path, _ in mark.args[1]]
    base = tmp_path_factory.mktemp("outcomes")
    before = urls(base / "filter", *map(server.url, paths))
    begin = time.monotonic()
    tally = download(config(per_host=64, timeout=2.0), before, base / "images")
    assert time.monotonic() - begin < 20
    assert tally.faults == tally.given - tally.kept - tally.dropped["robots"]  # which was asked for
    reasons = dropped(base / "images", "00000")
    return {path: reasons.get(f"00000{i:04d}") for i, path in enumerate(paths)}


@pytest.mark.parametrize("kind", ["chunked", "length", "close"])
def test_ten_gigabytes_are_not_read(server: Hostile, kind: str):
    sent = server.sent[path := f"/endless/{kind}"]
    assert refused(server.url(path), config())[0] == "too_many_bytes"
    assert server.sent[path] - sent < CAP + BUFFERS < HUGE / 100


def test_a_drip_does_not_hold_us(server: Hostile):
    """Each byte comes in time; all together do not."""
    begin = time.monotonic()
    assert refused(server.url("/slow.jpg"), config(timeout=0.7))[0] == "timeout"
    assert 0.6 < time.monotonic() - begin < 2


def test_one_deadline_for_all_redirects(monkeypatch: pytest.MonkeyPatch):
    with Hostile() as server:
        monkeypatch.setattr(server, "_harm", _late(server._harm, 0.3))
        assert refused(server.url("/hops/5"), config(timeout=0.8))[0] == "timeout"


def _late(act, seconds: float):
    async def wait(*arguments):
        await asyncio.sleep(seconds)
        return await act(*arguments)

    return wait


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "bad_url"),
        ("not a url", "bad_url"),
        ("http:///x.jpg", "bad_url"),
        ("http://[::1", "bad_url"),
        ("http://a:99999/", "bad_url"),
        ("http://good.example\\@127.0.0.2/", "bad_url"),
        ("ftp://127.0.0.1/x.jpg", "refused_scheme"),
        ("file:///etc/passwd", "refused_scheme"),
        ("data:image/png;base64,iVBORw0KGgo=", "refused_scheme"),
        ("http://no-such-name.invalid/", "dns"),
        (f"http://{'a' * 70}.example/", "dns"),
        ("http://127.0.0.1:1/x.jpg", "connection"),
    ],
)
def test_urls_that_lead_nowhere(url: str, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "getaddrinfo", _no_such_name)
    assert refused(url, config())[0] == reason


def _no_such_name(host: str, *_: object, **__: object):
    host.encode("idna")
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_row_without_url_and_one_of_nonsense_are_not_fatal(tmp_path: Path, server: Hostile):
    rows = [{"url": None}, {"url": "http://\x00\x7f/\ud7ff"}, {"url": f"  {server.url('/good.png')}\n"}]
    tally = download(config(), table(tmp_path / "filter", p00000=rows), tmp_path / "images")
    assert (tally.kept, sum(tally.dropped.values())) == (1, 2)


# -- addresses --


OWN = """
    0.0.0.0 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.9.9.9 168.63.129.16 169.254.169.254 172.16.0.1
    172.31.255.255 192.0.0.192 192.0.2.1 192.168.1.1 198.18.0.1 203.0.113.7 224.0.0.1 240.0.0.1 255.255.255.255
    :: ::1 fe80::1 fe80::1%eth0 2606:4700::1111%eth0 fc00::1 fd00:ec2::254 fec0::1 ff02::1 2001:db8::1 2001::1 3fff::1
    ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 2002:7f00:1:: 2002:a9fe:a9fe::1
    64:ff9b::127.0.0.1 64:ff9b::169.254.169.254 64:ff9b:1::1 100::1 5f00::1
"""


@pytest.mark.parametrize("address", OWN.split())
def test_addresses_that_are_not_public(address: str):
    assert not is_public(ipaddress.ip_address(address))
    literal = f"[{address.replace('%', '%25')}]" if ":" in address else address
    assert refused(f"http://{literal}/x.jpg", config(allow_hosts=[]))[0] == "refused_address"


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "100.63.255.255",
        "172.32.0.1",
        "2606:4700::1111",
        "::ffff:1.1.1.1",
        "2002:101:101::",
        "64:ff9b::8.8.8.8",
    ],
)
def test_addresses_that_are(address: str):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        "2130706434",
        "0x7f000002",
        "017700000002",
        "127.2",
        "0x7f.0.0.2",
        "0177.0.0.2",
        "127.0.0.2.",
        "0",
        "".join(chr(ord(char) + 0xFEE0) for char in "127.0.0.2"),
    ],
)
def test_addresses_in_disguise(host: str, loopback: Hostile):
    """All of these are 127.0.0.2 (or 0.0.0.0) to the system's resolver."""
    assert refused(f"http://{host}:{loopback.port}/picture.jpg", config())[0] == "refused_address"
    assert not loopback.connections


@pytest.fixture
def loopback():
    """A server that nobody may reach."""
    with Hostile(host="127.0.0.2") as server:
        yield server


def test_no_connection_is_made_to_a_refused_address(loopback: Hostile):
    inner = f"127.0.0.2:{loopback.port}"
    with Hostile(elsewhere=inner) as server:
        for url in (loopback.url("/picture.jpg"), server.url("/to/loopback"), server.url("/to/decimal")):
            assert refused(url, config())[0] == "refused_address"
        assert not loopback.connections
        allowed = config(allow_hosts=["127.0.0.1", inner])
        assert refused(server.url("/to/loopback"), allowed)[0] == "http_404"  # it was there all along
        assert loopback.connections


@pytest.mark.parametrize(
    ("allowed", "reason"), [(["127.0.0.1"], None), (["127.0.0.1:{port}"], None), (["127.0.0.1:1"], "refused_address")]
)
def test_a_host_is_allowed_with_or_without_its_port(server: Hostile, allowed: list[str], reason: str | None):
    hosts = config(allow_hosts=[host.format(port=server.port) for host in allowed])
    if reason:
        assert refused(server.url("/good.png"), hosts)[0] == reason
    else:
        assert get(server.url("/good.png"), hosts) == server.pictures["/good.png"]


class Names:
    """A resolver of names: the answers for a host in their order, the last for ever."""

    def __init__(self, **answers: list[list[str]]):
        self.answers, self.asked = answers, []

    def __call__(self, host: str, port: int, *_: object, **__: object):
        host = host.removesuffix(".example")
        self.asked.append(host)
        answers = self.answers[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (kind, socket.SOCK_STREAM, 6, "", (address, port)) for kind, address in zip(kinds, addresses, strict=True)
        ]


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch):
    """127.0.0.1 passes for an address of the open internet; 127.0.0.2 does not."""
    known = fetch.is_public
    monkeypatch.setattr(fetch, "is_public", lambda address: str(address) == "127.0.0.1" or known(address))


@pytest.mark.usefixtures("public")
def test_a_name_that_changes_its_address_gains_nothing(loopback: Hostile, monkeypatch: pytest.MonkeyPatch):
    """DNS rebinding: a public address when it is checked, a private one when it is connected to."""
    names = Names(rebind=[["127.0.0.1"], ["127.0.0.2"]])
    monkeypatch.setattr(socket, "getaddrinfo", names)
    with Hostile(elsewhere=f"rebind.example:{loopback.port}") as server:
        settings = config(allow_hosts=[])
        assert get(server.url("/picture.jpg", "rebind.example"), settings) == server.pictures["/picture.jpg"]
        assert names.asked == ["rebind"]
        assert server.requests[0][1]["Host"] == f"rebind.example:{server.port}"
        names.answers["rebind"] = [["127.0.0.1"], ["127.0.0.2"]]
        reason, detail = refused(server.url("/to/loopback", "rebind.example"), settings)  # another port: asked anew
        assert (reason, detail) == ("refused_address", "rebind.example is 127.0.0.2")
    assert not loopback.connections


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("private", ["127.0.0.2", "::ffff:127.0.0.2", "64:ff9b::10.0.0.1", "fe80::1"])
def test_one_private_address_condemns_the_name(server: Hostile, monkeypatch: pytest.MonkeyPatch, private: str):
    monkeypatch.setattr(socket, "getaddrinfo", Names(mixed=[["127.0.0.1", private]]))
    connections = server.connections
    assert refused(server.url("/good.png", "mixed.example"), config(allow_hosts=[]))[0] == "refused_address"
    assert server.connections == connections


def test_a_resolver_that_is_busy_is_asked_again(server: Hostile, monkeypatch: pytest.MonkeyPatch):
    names, tries = Names(late=[["127.0.0.1"]]), []

    def busy_once(*arguments, **options):
        tries.append(1)
        if len(tries) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return names(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", busy_once)
    assert get(server.url("/good.png", "late.example"), config(allow_hosts=["late.example"]))


def test_certificates_are_verified():
    with Hostile(tls=True) as server:
        reason, detail = refused(server.url("/picture.jpg"), config())
        assert (reason, server.requests) == ("tls", [])
        assert "CERTIFICATE_VERIFY_FAILED" in detail


# -- manners --


@pytest.mark.parametrize(
    ("tags", "unwanted"),
    [
        (["noai"], True),
        (["nofollow, NoImageAI"], True),
        (["noindex"], True),
        (["noimageindex"], True),
        (["none"], True),
        (["nofollow", "noai"], True),
        (["triptych: noai"], True),
        (["Triptych: nofollow, noai"], True),
        (["otherbot: noindex, triptych: noai"], True),
        (["*: noai"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True),
        (["max-image-preview: large, noindex"], True),
        ([], False),
        (["all"], False),
        (["googlebot: noindex"], False),
        (["otherbot: nofollow, noai"], False),
        (["max-snippet: 0, nofollow"], False),
    ],
)
def test_x_robots_tag(tags: list[str], unwanted: bool):
    assert is_unwanted(tags) is unwanted


def test_the_tag_can_be_ignored(server: Hostile):
    assert refused(server.url(tagged("noai")), config()) == ("robots", "X-Robots-Tag: noai")
    assert get(server.url(tagged("noai")), config(respect_robots=False)) == server.pictures["/picture.jpg"]


def test_what_we_say_of_ourselves(monkeypatch: pytest.MonkeyPatch):
    """Our name; no password, cookie or proxy, and no wish for a compressed body."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.2:9/")
    with Hostile() as server:
        get(server.url("/hops/2", "me:secret@127.0.0.1"), config(user_agent="Triptych (mail@lab.example)"))
        assert len(server.requests) == 3
        for _, headers in server.requests:
            assert headers["User-Agent"] == "Triptych (mail@lab.example)"
            assert headers["Accept-Encoding"] == "identity"
            assert not headers.keys() & {"Authorization", "Cookie", "Referer", "Proxy-Authorization"}


def test_retries_are_counted_and_wait_as_they_were_told():
    with Hostile() as server:
        begin = time.monotonic()
        get(server.url("/busy/1"), config(backoff=0.0))
        assert time.monotonic() - begin >= 1
        assert refused(server.url("/busy/3600"), config())[0] == "http_429"  # we do not wait so long, nor come earlier
        assert server.asked("/busy/3600") == 1
        assert refused(server.url("/down.jpg"), config(retries=3, backoff=0.0))[0] == "http_503"
        assert server.asked("/down.jpg") == 4
        assert refused(server.url("/missing.jpg"), config())[0] == "http_404"
        assert server.asked("/missing.jpg") == 1


def test_the_back_off_doubles(server: Hostile, monkeypatch: pytest.MonkeyPatch):
    waits, sleep = [], asyncio.sleep

    async def note(seconds: float, *arguments):
        if seconds and seconds != server.drip:
            waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(fetch.asyncio, "sleep", note)
    assert refused(server.url("/down.jpg"), config(retries=4, backoff=1.0))[0] == "http_503"
    assert all(2**i * 0.5 <= wait <= 2**i * 1.5 for i, wait in enumerate(waits))
    assert len(waits) == 4


@pytest.mark.parametrize(("settings", "most"), [({"per_host": 3}, 3), ({"concurrency": 2}, 2)])
def test_connections_at_once(tmp_path: Path, settings: dict[str, int], most: int):
    pictures = {f"/{i}.jpg": picture(8, 8, seed=i) for i in range(30)}
    with Hostile(pictures, delay=0.05) as server:
        tally = download(config(**settings), urls(tmp_path / "filter", *map(server.url, pictures)), tmp_path / "images")
        assert tally.kept == 30
        assert server.most_at_once == most


def test_a_busy_host_does_not_keep_others_waiting(tmp_path: Path, server: Hostile, monkeypatch: pytest.MonkeyPatch):
    """Rows of one slow host come first; with as many connections in all as it may have, they would block the rest."""
    with Hostile({f"/{i}.jpg": picture(8, 8) for i in range(8)}, host="127.0.0.2") as slow:
        monkeypatch.setattr(slow, "_send", _late(slow._send, 0.1))
        before = urls(tmp_path / "filter", *map(slow.url, slow.pictures), server.url("/good.png"))
        order = []
        settings = config(concurrency=2, per_host=1, allow_hosts=["127.0.0.1", "127.0.0.2"], timeout=5.0)
        done = server.asked("/good.png")
        download(settings, before, tmp_path / "images", tick=lambda _: order.append(server.asked("/good.png") > done))
    assert order[1]  # when the second answer was in, the last row had been asked for


# -- what is taken --


def test_thresholds_are_for_what_came(tmp_path: Path, server: Hostile):
    """The table's width is not believed."""
    row = {"url": server.url("/good.png"), "width": 4000, "height": 4000}
    before = table(tmp_path / "filter", p00000=[row])
    assert download(config(min_side=30), before, tmp_path / "a").kept == 1
    small = download(config(min_side=31), before, tmp_path / "b")
    assert (small.dropped["too_small"], small.faults) == (1, 0)
    large = download(config(max_pixels=1199), before, tmp_path / "c")
    assert (large.dropped["too_many_pixels"], large.faults) == (1, 1)


def test_hashes_are_compared_when_asked(tmp_path: Path, server: Hostile):
    digest = hashlib.sha256(server.pictures["/good.png"]).hexdigest()
    rows = [{"url": server.url("/good.png"), "sha256": known} for known in (digest.upper(), "0" * 64, None)]
    before = table(tmp_path / "filter", p00000=rows)
    assert download(config(), before, tmp_path / "a").kept == 3
    assert download(config(verify_hash=True), before, tmp_path / "b").dropped == {"hash_differs": 1}
    assert dropped(tmp_path / "b", "00000") == {"000000001": "hash_differs"}


def test_a_jpeg_with_others_behind_it_is_a_jpeg(tmp_path: Path):
    from PIL import Image

    two = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue")]
    two[0].save(tmp_path / "two.mpo", save_all=True, append_images=two[1:])
    with Hostile({"/two": (tmp_path / "two.mpo").read_bytes()}) as server:
        download(config(), urls(tmp_path / "filter", server.url("/two")), tmp_path / "images")
    with tarfile.open(tmp_path / "images/00000.tar") as tar:
        assert "000000000.jpg" in tar.getnames()


# -- the same bytes, whatever happens --


def test_order_of_answers_and_of_rows_leaves_no_trace(tmp_path: Path):
    pictures = {f"/{i}.jpg": picture(16, 16, seed=i) for i in range(40)}
    with Hostile(pictures) as server:
        rows = [{"url": server.url(path)} for path in [*pictures, "/missing.jpg", "/cut.jpg", "/page.jpg"]]
        before = table(tmp_path / "filter", p00000=rows[:20], p00001=rows[20:])
        download(config(concurrency=1), before, tmp_path / "one")
        server.delay = 0.05
        download(config(), before, tmp_path / "many")
        download(config(), before, tmp_path / "processes", processes=2)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "many") == contents(tmp_path / "processes")
    assert not [name for name in one if name.endswith(".tmp")]


def test_killed_and_begun_again(tmp_path: Path):
    pictures = {f"/{i}.jpg": picture(32, 32, seed=i) for i in range(60)}
    with Hostile(pictures, delay=0.1) as server:
        rows = [{"url": server.url(path)} for path in pictures]
        before = table(tmp_path / "filter", p00000=rows[:10], p00001=rows[10:])
        settings = config(per_host=2)
        code = (
            f"from pathlib import Path; from prepare.download import *; download({settings!r}, Path({str(before)!r}),"
        )
        code += f" Path({str(tmp_path / 'killed')!r}))"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        while not server.asked("/30.jpg"):  # in the second part
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        names = set(contents(tmp_path / "killed"))
        assert "00000.json" in names
        assert "00001.json" not in names
        asked = server.asked("/0.jpg")
        server.delay = 0
        download(config(), before, tmp_path / "killed")
        assert server.asked("/0.jpg") == asked  # the first part stands
        download(config(), before, tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_memory_holds_the_pictures_under_way_alone(tmp_path: Path):
    """A part of 150 MB goes through a few pictures' worth."""
    with Hostile({"/large.png": picture(1024, 1000, "PNG")}) as server:
        before = urls(tmp_path / "filter", *[server.url("/large.png")] * 50)
        settings = config(max_bytes=10_000_000, concurrency=2, timeout=30.0)
        code = (
            "import resource; from pathlib import Path; from prepare.download import *\n"
            "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "import PIL.Image, pyarrow.parquet; begin = most()\n"
            f"download({settings!r}, Path({str(before)!r}), Path({str(tmp_path / 'images')!r}))\n"
            "print((most() - begin) // 1024)"
        )
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "images/00000.tar").stat().st_size > 150_000_000
    shutil.rmtree(tmp_path / "images")
    assert int(out) < 60


# -- what the user is told --


def test_when_nearly_all_fails(tmp_path: Path):
    before = urls(tmp_path / "filter", *["http://127.0.0.1:1/x.jpg"] * 20)
    with pytest.raises(ValueError, match=r"20 of 20 rows failed \(connection 20\), more than download.max_faults=0.9"):
        download(config(max_faults=0.9, retries=0), before, tmp_path / "images")


def test_another_recipe_needs_another_folder(tmp_path: Path, server: Hostile):
    before = urls(tmp_path / "filter", server.url("/good.png"))
    download(config(), before, tmp_path / "images")
    download(
        config(timeout=9.0, retries=0, max_faults=0.5), before, tmp_path / "images"
    )  # how to ask is not what to make
    with pytest.raises(ValueError, match="download.min_side=0, not 7"):
        download(config(min_side=7), before, tmp_path / "images")
    with pytest.raises(ValueError, match="the step nothing was not run"):
        download(config(), tmp_path / "nothing", tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timeout": 0}, "download.timeout=0 must be above 0; the default is 10.0"),
        ({"timeout": float("nan")}, "download.timeout=nan must be above 0"),
        ({"backoff": -1.0}, "download.backoff=-1.0 must be at least 0"),
        ({"concurrency": 0}, "download.concurrency=0 must be at least 1; the default is 64"),
        ({"per_host": 0}, "download.per_host=0 must be at least 1"),
        ({"max_bytes": 0}, "download.max_bytes=0 must be at least 1"),
        ({"retries": 11}, "download.retries=11 is outside 0 to 10"),
        (
            {"user_agent": "Mozilla/5.0"},
            "download.user_agent='Mozilla/5.0' must be a line of ASCII that names Triptych",
        ),
        ({"user_agent": "Triptych\r\nX: y"}, "must be a line of ASCII"),
        ({"allow_hosts": ["http://a/"]}, "download.allow_hosts has 'http://a/', which must be a \"host\" or"),
        ({"max_pixels": 10**9}, "download.max_pixels=1000000000 is outside 1 to 178956970"),
        ({"min_side": -1}, "download.min_side=-1 must not be negative"),
        ({"max_faults": 90}, "download.max_faults=90 is a share"),
    ],
)
def test_settings_that_cannot_be(change: dict, message: str):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        DownloadConfig(**change)
