"""Captions from a vision-language model: every picture goes to a server, what it says of it goes into NAME.jsonl.

The server is any that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, TGI, or one that is paid for), at
`caption.url`. For each picture and each of `caption.prompts` there is one request

    POST URL/chat/completions   model, temperature, max_tokens, seed, messages: [picture, prompt]

The picture travels in the request, never as a link that the server would fetch: such links were the way into servers
before. It is decoded here under a pixel cap, made small and encoded anew, so that no server meets a file of a stranger.
The picture comes before the prompt, and the prompts of a picture one after another, so that servers that keep prefixes
look at it once.

Answers are cleaned and checked. A picture without any is noted and goes on with the caption it came with.

A part may be hours of work. Each picture's answers are therefore appended to NAME.journal at once, and a step that
was killed asks only for the pictures that were on their way. Failures that may pass (no answer in time, a server that
is overloaded) are not written there: the next run asks again.
"""

import asyncio
import base64
import io
import itertools
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from data.decode import MAX_PIXELS, Undecodable, decode
from prepare.parts import Part, Tally, account, dropped, finished, run_step

if TYPE_CHECKING:
    from PIL.Image import Image

    from prepare.sources import Sample, Source

_OPENING = (
    'Begin with the subject itself, never with words like "The image shows", "This picture", "A photo of" or "We see".'
)
PROMPTS = {
    "long": "Describe this picture in one dense paragraph of 80 to 150 words. Say what the subject is and does, what"
    " surrounds it, where things stand to each other, and then the light, the colours, the materials, the viewpoint and"
    " the style or medium; quote writing that can be read. Keep to what is visible: no guesses, no moods, no lists, no"
    f" headings. {_OPENING}",
    "short": "Describe this picture in one plain sentence of at most 20 words: the main subject, what it does and"
    f" where. Answer with that sentence alone. {_OPENING}",
}
IN_A_ROW = 100  # pictures without a caption after which it is the server, not the pictures
LONGEST_WAIT = 60.0  # seconds between two tries, whatever a server asks for
LARGEST_ANSWER = 2**22  # bytes
SYNC_EVERY = 5.0  # seconds
LONGEST_ALT = 500  # characters of it that go into a prompt


@dataclass(slots=True, kw_only=True)
class CaptionConfig:
    """Whom to ask, what, and how patiently."""

    url: str = "http://127.0.0.1:8000/v1"  # of a server that speaks OpenAI's chat completions
    model: str = ""  # as the server calls it
    key_env: str = ""  # the environment variable that holds the API key; the key itself stands in no file
    prompts: dict[str, str] = field(default_factory=lambda: dict(PROMPTS))  # caption's name: prompt; {alt} is inserted
    # Models cut pictures into patches of some 28 pixels: 768 x 768 are about 750 tokens. More takes longer and captions
    # no better; below 512, small writing and faces are lost.
    max_side: int = 768
    max_pixels: int = MAX_PIXELS  # larger pictures are not decoded
    temperature: float = 0.0  # 0 takes the likeliest words
    max_tokens: int = 512  # of one answer; one that is cut is asked for once more, with twice as many
    seed: int = 0  # sent with every request
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the request; null takes one out
    max_chars: int = 3000  # longer answers are no captions
    required: bool = False  # whether a picture without any caption is dropped
    concurrency: int = 64  # pictures on their way at a time
    timeout: float = 120.0  # seconds for one request
    retries: int = 5  # of one request
    backoff: float = 1.0  # seconds before the first of them; doubled each time
    patience: float = 300.0  # seconds for a server that was there to come back
    max_faults: float = 0.2  # share of pictures that may stay without an answer

    def __post_init__(self):
        if "@" in self.url:  # not repeated here
            raise ValueError("caption.url must not hold a user or password; name their variable in caption.key_env")
        if not re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/[^?#\s]*)?", self.url):
            raise ValueError(
                f"caption.url={self.url} must be the address of a server, such as http://127.0.0.1:8000/v1"
            )
        if not self.prompts:
            raise ValueError("caption.prompts={} asks for nothing; give a name and a prompt for each caption wanted")
        for name, prompt in self.prompts.items():
            if not prompt.strip() or name == "alt":
                raise ValueError(
                    f"caption.prompts.{name}={prompt!r} must be a prompt, under a name other than alt, which is the"
                    " caption that came with the picture; choose for instance long or short"
                )
            for unknown in set(re.findall(r"{(\w+)}", prompt)) - {"alt"}:
                raise ValueError(
                    f"caption.prompts.{name} holds {{{unknown}}}, which is unknown; only {{alt}} is filled in"
                )
        for key, least in {"max_side": 64, "max_pixels": 1, "max_tokens": 1, "max_chars": 1, "concurrency": 1}.items():
            if getattr(self, key) < least:
                raise ValueError(f"caption.{key}={getattr(self, key)} must be at least {least}; {_default(key)}")
        for key in ("temperature", "retries", "backoff", "patience"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(f"caption.{key}={getattr(self, key)} must be at least 0; {_default(key)}")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"caption.timeout={self.timeout} must be more than 0 seconds; {_default('timeout')}")
        if not 0 <= self.max_faults <= 1:
            raise ValueError(f"caption.max_faults={self.max_faults} is a share, from 0 to 1; {_default('max_faults')}")


def _default(key: str) -> str:
    return f"{CaptionConfig.__dataclass_fields__[key].default} is the default"


def caption(
    config: CaptionConfig,
    source: "Source",
    folder: Path,
    *,
    left_out: Path | None = None,
    tick: Callable[[int], None] | None = None,
) -> Tally:
    """Write `folder`/NAME.jsonl for every part of `source`: a line {"key", "captions", "model"} for each picture kept.

    The lines are in the source's order. Rows that the finished step in `left_out` dropped are passed over. Raises
    ValueError if the server is not there or lacks the model, before anything is written; if it goes away for longer
    than `patience`, or fails at all pictures; and for more than `max_faults`. What was captioned stays.
    """
    recipe = {
        "input": source.digest,
        "left_out": finished(left_out)["digest"] if left_out else None,
        **{key: getattr(config, key) for key in ("model", "prompts", "max_side", "max_pixels", "temperature")},
        **{key: getattr(config, key) for key in ("max_tokens", "seed", "extra", "max_chars", "required")},
    }
    if any(account(folder, name) is None for name in source.names):
        asyncio.run(_check_server(config))
    work = partial(_caption_part, config, source, left_out)
    try:
        return run_step(
            folder, source.names, work, recipe=recipe, title="caption", max_faults=config.max_faults, tick=tick
        )
    finally:
        for journal in folder.glob("*.journal"):
            if account(folder, journal.stem) is not None:  # the part is whole
                journal.unlink(missing_ok=True)


# --- a part -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Answers:
    """What came of a picture: captions by name, and [reason, detail] of those that could not be had."""

    key: str
    captions: dict[str, str] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)
    passing: bool = False  # whether another try, later, may do better

    def why(self) -> tuple[str, str]:
        """The first failure's reason, and the details of all."""
        reason = next((reason for reason, _ in self.failed.values()), "")
        return reason, "; ".join(f"{name}: {' '.join(why).strip()}" for name, why in self.failed.items())


class _Journal:
    """Answers of an unfinished part, a line each, that outlive the process."""

    def __init__(self, path: Path):
        self.found: dict[str, _Answers] = {}
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                answers = _Answers(**json.loads(line)) if line.endswith(b"\n") else None
            except (ValueError, TypeError):
                answers = None
            if answers is None:
                break  # half a line: the process, or the machine, stopped there
            self.found[answers.key] = answers
            whole += len(line)
        self._file = open(path, "ab")  # noqa: SIM115  (`close` closes it)
        self._file.truncate(whole)
        self._synced = time.monotonic()

    def add(self, answers: _Answers) -> None:
        line = {"key": answers.key, "captions": answers.captions, "failed": answers.failed}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()  # survives a kill; a power cut may cost the last seconds
        if time.monotonic() - self._synced > SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        self._file.close()


def _caption_part(config: CaptionConfig, source: "Source", left_out: Path | None, part: Part) -> None:
    skipped = dropped(left_out, part.name) if left_out else {}
    samples = (sample for sample in source.read(part.name) if sample.key not in skipped)
    asking = _Asking(config, part)
    try:
        asyncio.run(asking.run(samples))
    except ExceptionGroup as errors:  # what ended one of the tasks, and thereby the others
        raise errors.exceptions[0] from None
    finally:
        asking.journal.close()
    with open(part.path(".jsonl"), "w", encoding="utf-8") as file:
        for key, captions in asking.kept.items():
            if captions is not None:
                line = {"key": key, "captions": captions, "model": config.model}
                file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")


class _Asking:
    """A part of which all pictures are asked about, `concurrency` at a time."""

    def __init__(self, config: CaptionConfig, part: Part):
        self.config, self.part = config, part
        self.journal = _Journal(part.folder / f"{part.name}.journal")
        self.kept: dict[str, dict[str, str] | None] = {}  # captions by key, in the source's order; None: dropped
        self._row: list[_Answers] = []  # pictures without a caption since the last with one
        self._passing: list[_Answers] = []

    async def run(self, samples: "Iterator[Sample]") -> None:
        slots = asyncio.Semaphore(self.config.concurrency)
        async with _Client.open(self.config) as client, asyncio.TaskGroup() as tasks:
            while True:
                await slots.acquire()  # before the next picture is read: memory holds so many, and no more
                sample = await asyncio.to_thread(next, samples, None)
                if sample is None:
                    break
                if sample.key in self.kept:
                    self.part.drop(sample.key, "duplicate_key", fault=True)
                    slots.release()
                    continue
                self.kept[sample.key] = None
                task = tasks.create_task(self._one(client, sample))
                task.add_done_callback(lambda _: slots.release())
        self._check_failures()

    async def _one(self, client: "_Client", sample: "Sample") -> None:
        if sample.image is None:
            self.part.drop(sample.key, sample.problem or "no_image", fault=True)
        elif answers := self.journal.found.pop(sample.key, None):
            self._account(answers)
        else:
            try:
                picture = await asyncio.to_thread(_encoded, sample.image, self.config)
            except Undecodable as error:
                self.part.drop(sample.key, error.reason, error.detail, fault=True)
                return
            answers = await client.describe(sample, picture)
            self._write_down(answers)
            self._account(answers)

    def _account(self, answers: _Answers) -> None:
        if answers.failed and not answers.captions and self.config.required:
            self.part.drop(answers.key, *answers.why(), fault=True)
            return
        self.kept[answers.key] = answers.captions
        if answers.failed:
            self.part.note(answers.key, *answers.why())
        else:
            self.part.keep()

    def _write_down(self, answers: _Answers) -> None:
        """Into the journal; failures wait for the next caption, as without any the server is to blame for them."""
        self._row.append(answers)
        if answers.passing:
            self._passing.append(answers)
        if answers.captions:
            for known in self._row:
                if not known.passing:
                    self.journal.add(known)
            self._row.clear()
        elif len(self._row) == IN_A_ROW:
            self._blame(f"the last {IN_A_ROW} pictures got no caption", answers)

    def _check_failures(self) -> None:
        """A part is not finished with many failures that are the server's: they would be there for good."""
        blamed = self._passing if any(self.kept.values()) else self._row
        if len(blamed) > self.config.max_faults * self.part.tally.given:
            of = f"{len(blamed)} of the {self.part.tally.given} pictures of part {self.part.name}"
            self._blame(
                f"{of} could not be captioned, more than caption.max_faults={self.config.max_faults}", blamed[-1]
            )

    def _blame(self, what: str, last: _Answers) -> None:
        raise ValueError(
            f"caption: {what} (the last: {last.why()[1]}); see what ails {self.config.model} at"
            f" caption.url={self.config.url} and run this again, which keeps the captions there are"
        )


def _encoded(content: bytes, config: CaptionConfig) -> str:
    """A picture file, small and made anew, as a data URL."""
    picture = decode(content, max_pixels=config.max_pixels)
    picture.thumbnail((config.max_side, config.max_side))  # keeps the proportions, and small pictures as they are
    return _data_url(picture)


def _data_url(picture: "Image") -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)  # a tenth of a PNG, and models do not see the difference
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- the server ---------------------------------------------------------------------------------------------


class _Failed(Exception):  # noqa: N818  (an answer that is none, not an error of ours)
    """Why a caption could not be had. `wait`: seconds before it makes sense to try again; None if it does not."""

    def __init__(self, reason: str, detail: str = "", *, passing: bool = False, wait: float | None = None):
        super().__init__(reason, detail)
        self.reason, self.detail, self.passing, self.wait = reason, detail, passing, wait
        self.counts = True  # towards caption.retries


async def _check_server(config: CaptionConfig) -> None:
    """ValueError if the server is not there, or is not one that captions pictures with the model."""
    from PIL import Image

    start = _start(config)
    async with _Client.open(config) as client:
        names = await client.models()
        if not config.model or (names and config.model not in names):
            served = f"has {', '.join(names[:5])}: choose from these" if names else "does not say what it has: name it"
            raise ValueError(
                f"caption.model={config.model} is not a model of caption.url={config.url}, which {served}, or {start}"
            )
        try:
            await client.post(_data_url(Image.new("RGB", (256, 256), "grey")), "What colour is this?", max_tokens=1)
        except _Failed as failed:
            raise ValueError(
                f"caption.model={config.model} at caption.url={config.url} did not take a test picture"
                f" ({failed.reason} {failed.detail}); it must be a model that sees, behind chat completions, so choose"
                f" another or {start}"
            ) from None


def _start(config: CaptionConfig) -> str:
    return f"start one with `vllm serve {config.model or 'MODEL'} --port {urlsplit(config.url).port or 8000}`"


def _key(config: CaptionConfig) -> str:
    key = os.environ.get(config.key_env, "").strip() if config.key_env else ""
    if config.key_env and not (key and key.isascii() and key.isprintable()):
        raise ValueError(
            f"caption.key_env={config.key_env} must name an environment variable that holds the API key, which it does"
            " not; export it, or leave caption.key_env empty for a server that wants none"
        )
    return key


class _Client:
    """Requests to the server at `caption.url`, with patience."""

    def __init__(self, config: CaptionConfig, session: aiohttp.ClientSession, key: str):
        self.config, self._session, self._key = config, session, key
        self._url = config.url.rstrip("/")
        self._lost: float | None = None  # since when the server was not reached by anyone

    @classmethod
    @asynccontextmanager
    async def open(cls, config: CaptionConfig) -> "AsyncIterator[_Client]":
        key = _key(config)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        timeout = aiohttp.ClientTimeout(total=config.timeout, sock_connect=min(10, config.timeout))
        connector = aiohttp.TCPConnector(limit=config.concurrency)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
            yield cls(config, session, key)

    async def models(self) -> list[str]:
        """Names of the models that the server says it has; none if it does not say. ValueError if it is not there."""
        url = self.config.url
        try:
            async with self._session.get(f"{self._url}/models", allow_redirects=False) as response:
                content = await _read(response)
        except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError too
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"caption.url={url} cannot be reached ({why}); {_start(self.config)}") from None
        if response.status in (401, 403):
            raise ValueError(
                f"caption.url={url} wants another API key ({response.status} {self._words(content)}); export it, and"
                f" name its variable in caption.key_env, which is {self.config.key_env or 'empty'}"
            )
        if response.status in (404, 405, 501):  # not all have the list
            return []
        try:
            return [str(model["id"]) for model in json.loads(content)["data"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(
                f"caption.url={url} is not an OpenAI-compatible server that is ready: GET {self._url}/models gave"
                f" {response.status} {self._words(content)}; most addresses end in /v1, or {_start(self.config)}"
            ) from None

    async def describe(self, sample: "Sample", picture: str) -> _Answers:
        """All captions of one picture, given as a data URL."""
        answers = _Answers(sample.key)
        alt = clean(sample.captions.get("alt", "")[: 4 * LONGEST_ALT])[:LONGEST_ALT]
        for name, prompt in self.config.prompts.items():
            try:
                answers.captions[name] = await self._caption(picture, prompt.replace("{alt}", alt))
            except _Failed as failed:
                answers.failed[name] = [failed.reason, failed.detail]
                answers.passing |= failed.passing
        return answers

    async def _caption(self, picture: str, prompt: str) -> str:
        try:
            return check(*await self.post(picture, prompt, self.config.max_tokens), self.config.max_chars)
        except _Failed as failed:
            if failed.reason != "cut":
                raise
        return check(*await self.post(picture, prompt, 2 * self.config.max_tokens), self.config.max_chars)

    async def post(self, picture: str, prompt: str, max_tokens: int) -> tuple[str, str]:
        """The text of an answer, and why it ended; with as many tries as it takes."""
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": prompt}]
        fields = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.config.temperature,
            "max_tokens": max_tokens,
            "seed": self.config.seed,
        } | self.config.extra
        body = json.dumps({key: value for key, value in fields.items() if value is not None}).encode()
        tries = 0
        for attempt in itertools.count():
            try:
                return await self._post(body)
            except _Failed as failed:
                tries += failed.counts
                if failed.wait is None or tries > self.config.retries:
                    raise
                jitter = self.config.backoff * 2 ** min(attempt, 10) * random.uniform(0.5, 1)
                wait = min(LONGEST_WAIT, failed.wait + jitter)
            await asyncio.sleep(wait)
        raise AssertionError

    async def _post(self, body: bytes) -> tuple[str, str]:
        try:
            # no redirects: neither the key nor the pictures go where nobody sent them
            async with self._session.post(
                f"{self._url}/chat/completions", data=body, allow_redirects=False
            ) as response:
                content = await _read(response)
        except aiohttp.ConnectionTimeoutError as error:
            raise self._unreachable(error) from None
        except TimeoutError:
            raise _Failed("timeout", f"after {self.config.timeout:g} s", passing=True, wait=0) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from None
        self._lost = None
        if response.status != 200:
            busy = response.status in (408, 429) or response.status >= 500
            raise _Failed(
                f"http_{response.status}",
                self._words(content),
                passing=response.status not in (400, 413, 415, 422),  # these are about the picture
                wait=_retry_after(response.headers.get("Retry-After", "")) if busy else None,
            )
        try:
            choice = json.loads(content)["choices"][0]
            text, end = choice["message"].get("content") or "", choice.get("finish_reason") or ""
            if choice["message"].get("refusal"):
                end = "content_filter"
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Failed("nonsense", self._words(content), passing=True, wait=0) from None
        return text, end

    def _unreachable(self, error: Exception) -> _Failed:
        """ValueError where that lasts. It counts against a picture only if others were answered in between."""
        now = time.monotonic()
        why = " ".join(str(error).split()) or type(error).__name__
        failed = _Failed("unreachable", why, passing=True, wait=0)
        if self._lost is None:
            self._lost = now
        elif now - self._lost > self.config.patience:
            raise ValueError(
                f"caption.url={self.config.url} could not be reached for caption.patience={self.config.patience:g} s"
                f" ({why}); {_start(self.config)} and run this again, which keeps the captions there are"
            )
        else:
            failed.counts = False
        return failed

    def _words(self, content: bytes) -> str:
        """What a server says about an error, in one line."""
        text = content.decode(errors="replace")
        try:
            error = json.loads(text)
            error = error.get("error", error)
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError, RecursionError):
            pass
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(_CONTROLS.sub("", text).split())[:200]


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > LARGEST_ANSWER:
            response.close()
            break
    return bytes(content[:LARGEST_ANSWER])


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header, which has seconds or a date; 0 if it says nothing."""
    try:
        return max(0.0, float(value)) if value[:1].isdigit() else _seconds_until(value)
    except (ValueError, TypeError):
        return 0.0


def _seconds_until(date: str) -> float:
    return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())


# --- the answer ---------------------------------------------------------------------------------------------

# Characters that control, direct or hide text, and such that are none; whitespace is not among them.
_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u202a-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff0-\uffff]"
)
_TEMPLATE = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>|\[/?INST\]|<(?:start_of_turn|end_of_turn|eos|bos|pad|unk|image)>")
_MARKDOWN = (
    (re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)"), r"\1"),  # links
    (re.compile(r"^[ \t]*(?:#{1,6}|[-*•>]|\d{1,2}[.)])[ \t]+", re.MULTILINE), ""),  # headings, lists, quotations
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", re.DOTALL), r"\2"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])"), r"\1"),
    (re.compile(r"^```\w*[ \t]*$|`", re.MULTILINE), ""),
)
_LABEL = re.compile(
    r"(?:(?:sure|certainly|of course)[,.!]?\s+)?here(?:'s| is| are)\b[^:\n]{0,80}:\s*"
    r"|(?:assistant|caption|description|answer|output)(?:\s*:\s*|\s*\n)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"(?:i'm|i am) (?:\w+ )?(?:sorry|unable|not able|not comfortable)\b|i (?:cannot|can't|won't|apologi[sz]e)\b"
    r"|sorry[,.]|unfortunately,? i\b|as an ai\b|(?:please|could you) (?:provide|upload|share|attach)\b"
    r"|(?:no|there is no) image (?:was |has been |is )?(?:provided|attached|uploaded|visible)\b",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """One line of plain text: without thoughts, marks of a chat template, markdown, labels and control characters."""
    text = _CONTROLS.sub("", text.rpartition("</think>")[2].partition("<think>")[0].replace("\r", "\n"))
    text = next((turn for turn in _TEMPLATE.split(text) if turn.strip()), "").strip()
    for mark, plain in _MARKDOWN:
        text = mark.sub(plain, text).strip()
    while label := _LABEL.match(text.replace("\u2019", "'")):
        text = text[label.end() :]
    text = " ".join(text.split())
    inner = text[1:-1]
    return inner.strip() if text[:1] + text[-1:] in ('""', "“”") and not set(inner) & set('"“”') else text


def check(text: str, end: str, max_chars: int) -> str:
    """The caption in an answer that ended for the reason `end`; raises _Failed if there is none."""
    if len(text) > 10 * max_chars:  # even with thoughts
        raise _Failed("too_long", f"{len(text)} characters")
    text = clean(text)
    if end == "content_filter" or _REFUSAL.match(text.replace("\u2019", "'")):
        raise _Failed("refused", text[:200])
    if repeats(text):  # before `cut`: a loop runs on until it is cut
        raise _Failed("repetitive", text[:200])
    if end == "length":
        raise _Failed("cut", text[:200])
    if not any(map(str.isalnum, text)):
        raise _Failed("empty", text[:200])
    if len(text) > max_chars:
        raise _Failed("too_long", f"{len(text)} characters")
    return text


def repeats(text: str, *, length: int = 16, stretch: int = 120) -> bool:
    """Whether a text says again what it said: each `length` characters in a stretch, or in half of it, stood before.

    Characters and not words, since not all languages have spaces. A loop of any period ends up so, also one of two
    sentences that differ in a word.
    """
    seen: set[str] = set()
    pieces = len(text) - length + 1
    run = 0
    for at in range(pieces):
        piece = text[at : at + length]
        run = run + 1 if piece in seen else 0
        if run >= min(stretch, max(pieces / 2, 8)):
            return True
        seen.add(piece)
    return False
