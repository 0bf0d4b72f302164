"""What a prompt says of its own words: weights, changes on the way, compositions; the grammar of the A1111 web UI.

    (x)  (x:1.5)        the weight of x times 1.1, or times 1.5        [x]             divided by 1.1
    [a:b:0.25]          a for a quarter of the steps, then b           [a:b:7]         a for 7 steps, then b
    [a:0.5]  [a::0.5]   nothing, then a;  a, then nothing              [a|b|c]         another one every step
    BREAK               what follows starts a new chunk of CLIP        a AND b:0.5     both, b with half the guidance
    \\( \\) \\[ \\] \\\\ \\: \\|   the sign itself

    prompt = part (AND part)*         part = body [: number]
    body   = (text | BREAK | ( body [: number] ) | [ body ] | [ [body :] body : number ] | [ body (| body)+ ])*

All nest, and weights multiply. A number with a point is a share of the steps, one without counts them.

Nothing is an error. A bracket without its other half is text, and so is AND within a pair, or a colon without the
number that would give it a meaning: `[a:b:c]` is `a:b:c` divided by 1.1, and `16:9` weighs nothing where no AND is. A
prompt that says none of this comes out as it went in.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which imports torch, and pictures are also drawn where there is none
    from models.text import Fragment

STRONGER = 1.1
LARGEST = 1000.0  # of a weight: any number may be typed, and the states must stay finite
DEEPEST = 100  # pairs within pairs, beyond which brackets are text: recursion must end

# white space is taken from its start only: tried from each place in it, a long run would take quadratic time
_SIGNS = re.compile(r"(\\[\\()\[\]:|]|[()\[\]:|]|(?:(?<!\s)\s+)?\b(?:BREAK|AND)\b\s*)")
_NUMBER = re.compile(r"\s*[+-]?([0-9]{1,9}(\.[0-9]*)?|\.[0-9]+)\s*")  # nine digits: float must not overflow
_OPENS = {")": "(", "]": "["}


@dataclass(frozen=True, slots=True)
class Scaled:
    """A body whose weight is multiplied."""

    body: "Body"
    by: float


@dataclass(frozen=True, slots=True)
class Switch:
    """One body for the first steps, another for the rest."""

    before: "Body"
    after: "Body"
    until: float
    share: bool  # `until` is a share of all steps, not a count of them

    def now(self, step: int, steps: int) -> "Body":
        """The body at a step, counted from 0."""
        until = int(self.until * steps + 1e-9) if self.share else self.until  # 0.29 of 100 is 28.999...
        return self.before if step < until else self.after


@dataclass(frozen=True, slots=True)
class Turns:
    """Bodies that take turns, one a step."""

    options: tuple["Body", ...]

    def now(self, step: int, steps: int) -> "Body":
        """The body at a step, counted from 0."""
        return self.options[step % len(self.options)]


Body = tuple[str | Scaled | Switch | Turns | None, ...]  # None is a BREAK


@dataclass(frozen=True, slots=True)
class Part:
    """What stands between two ANDs, and the weight of its guidance."""

    weight: float
    body: Body

    def at(self, step: int, steps: int) -> "tuple[tuple[Fragment, ...], ...]":
        """What to encode at `step` of `steps`, counted from 0: between BREAKs, texts and their weights.

        Neighbours of equal weight are one fragment. Segments without a word are left out, but there is always one.
        """
        segments: list[list[Fragment]] = [[]]
        for text, weight in _flat(self.body, 1.0, step, steps):
            if text is None:
                segments.append([])
            else:
                _append(segments[-1], text, round(weight, 6))
        worded = tuple(tuple(segment) for segment in segments if any(text.strip() for text, _ in segment))
        return worded or (tuple(segments[0]) or (("", 1.0),),)


def parse(prompt: str) -> list[Part]:
    """The parts of a prompt, at least one; never an error."""
    parser = _Parser(prompt)
    spans = parser.split("AND", 0, len(parser.tokens))
    parts = [parser.part(*span) if len(spans) > 1 else Part(1.0, parser.body(*span)) for span in spans]
    return [part for part in parts if part.body] or [Part(1.0, ())]


class _Parser:
    """Recursive descent over tokens [start, end), each a sign, "" for text, and how it was written."""

    def __init__(self, prompt: str):
        self.tokens = [_token(written) for written in _SIGNS.split(prompt) if written]
        self.pairs = _pairs([sign for sign, _ in self.tokens])

    def part(self, start: int, end: int) -> Part:
        number = self.number(start, end)
        if number is None:
            return Part(1.0, self.body(start, end))
        return Part(_kept(float(number)), self.body(start, end - 2))

    def body(self, start: int, end: int, depth: int = 0) -> Body:
        nodes, i = [], start
        while i < end:
            sign, written = self.tokens[i]
            if i in self.pairs and depth < DEEPEST:
                bracket = self.round if sign == "(" else self.square
                nodes.append(bracket(i + 1, self.pairs[i], depth + 1))
                i = self.pairs[i]
            else:
                nodes.append(None if sign == "BREAK" else written)
            i += 1
        return tuple(nodes)

    def round(self, start: int, end: int, depth: int) -> Scaled:
        number = self.number(start, end)
        if number is None:
            return Scaled(self.body(start, end, depth), STRONGER)
        return Scaled(self.body(start, end - 2, depth), float(number))

    def square(self, start: int, end: int, depth: int) -> Scaled | Switch | Turns:
        options = self.split("|", start, end)
        if len(options) > 1:
            return Turns(tuple(self.body(*option, depth) for option in options))
        bodies, number = self.split(":", start, end)[:-1], self.number(start, end)
        if number is None or len(bodies) > 2:
            return Scaled(self.body(start, end, depth), 1 / STRONGER)
        before = self.body(*bodies[0], depth) if len(bodies) == 2 else ()
        return Switch(before, self.body(*bodies[-1], depth), float(number), share="." in number)

    def number(self, start: int, end: int) -> str | None:
        """The number that ends these tokens behind a colon."""
        if end - start < 2 or self.tokens[end - 2][0] != ":":
            return None
        sign, written = self.tokens[end - 1]
        return written if sign == "" and _NUMBER.fullmatch(written) else None

    def split(self, sign: str, start: int, end: int) -> list[tuple[int, int]]:
        """The spans between the tokens `sign` that lie in no pair."""
        spans, i = [], start
        while i < end:
            if self.tokens[i][0] == sign:
                spans.append((start, i))
                start = i + 1
            i = self.pairs.get(i, i) + 1
        return [*spans, (start, end)]


def _token(written: str) -> tuple[str, str]:
    if _SIGNS.fullmatch(written):
        return ("", written[1:]) if written[0] == "\\" else (written.strip(), written)
    return "", written


def _pairs(signs: list[str]) -> dict[int, int]:
    """Where each bracket that has one closes; one that closes leaves those opened within it without."""
    pairs, opened = {}, {"(": [], "[": []}
    for i, sign in enumerate(signs):
        if sign in opened:
            opened[sign].append(i)
        elif sign in _OPENS and opened[_OPENS[sign]]:
            start = opened[_OPENS[sign]].pop()
            pairs[start] = i
            for waiting in opened.values():
                while waiting and waiting[-1] > start:
                    waiting.pop()
    return pairs


def _flat(body: Body, weight: float, step: int, steps: int) -> Iterator[tuple[str | None, float]]:
    """Texts and BREAKs of a body at a step, in order, with their weights."""
    for node in body:
        if isinstance(node, Scaled):
            yield from _flat(node.body, _kept(weight * node.by), step, steps)
        elif isinstance(node, Switch | Turns):
            yield from _flat(node.now(step, steps), weight, step, steps)
        else:
            yield node, weight


def _append(segment: "list[Fragment]", text: str, weight: float) -> None:
    """Add a fragment, or lengthen the last one; white space takes the weight of its neighbour."""
    if segment:
        last, last_weight = segment[-1]
        if weight == last_weight or not last.strip() or not text.strip():
            segment[-1] = last + text, last_weight if last.strip() else weight
            return
    segment.append((text, weight))


def _kept(weight: float) -> float:
    return max(-LARGEST, min(LARGEST, weight))
