"""The prompt grammar: what is to be encoded at each step, in a table; and that nothing typed is an error."""

import math
import random
import re
from itertools import pairwise

import pytest

from inference.prompt import DEEPEST, LARGEST, parse

UP, DOWN = 1.1, round(1 / 1.1, 6)


def at(prompt, step=0, steps=20):
    """The segments of a prompt without AND."""
    (part,) = parse(prompt)
    assert part.weight == 1
    return [list(segment) for segment in part.at(step, steps)]


def words(prompt, step=0, steps=20):
    """The same without weights and white space at the ends."""
    return " ".join("".join(text for text, _ in segment).strip() for segment in at(prompt, step, steps))


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("a red cat", [("a red cat", 1)]),
        ("  two  spaces, and a tab\t", [("  two  spaces, and a tab\t", 1)]),
        ("", [("", 1)]),
        ("(a)", [("a", UP)]),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("a", DOWN)]),
        ("[[a]]", [("a", round(1 / 1.21, 6))]),
        ("[(a)]", [("a", 1)]),
        ("(a:1.5)", [("a", 1.5)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:2)", [("a", 2)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:0)", [("a", 0)]),
        ("a (b) c", [("a ", 1), ("b", UP), (" c", 1)]),
        ("(a (b:2):1.5)", [("a ", 1.5), ("b", 3)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3), (" c", 1.5)]),
        ("[a (b)]", [("a ", DOWN), ("b", 1)]),
        # equal neighbours are one, and white space takes their weight
        ("a (b:1.0) c", [("a b c", 1)]),
        ("(a)(b:1.1)", [("ab", UP)]),
        ("(a) (b)", [("a b", UP)]),
        (" (a)", [(" a", UP)]),
        ("a( )b", [("a b", 1)]),
        # a colon that ends in no number, or does not end a pair
        ("(a:b)", [("a:b", UP)]),
        ("(a:)", [("a:", UP)]),
        ("(a:1.2.3)", [("a:1.2.3", UP)]),
        ("(a:1e3)", [("a:1e3", UP)]),
        ("(a:nan)", [("a:nan", UP)]),
        ("(a:1.5 b)", [("a:1.5 b", UP)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("(:1.5)", [("", 1)]),
        ("()", [("", 1)]),
        ("[]", [("", 1)]),
        ("a picture of 16:9", [("a picture of 16:9", 1)]),
        ("this | that: 3", [("this | that: 3", 1)]),
        ("(a|b)", [("a|b", UP)]),
        ("(a:0.5|b)", [("a:0.5|b", UP)]),
        # escapes
        (r"a \(b\)", [("a (b)", 1)]),
        (r"(a \(b\):1.5)", [("a (b)", 1.5)]),
        (r"(a\:1.5)", [("a:1.5", UP)]),
        (r"(a:1.5\))", [("a:1.5)", UP)]),
        (r"\[a:b:0.5\]", [("[a:b:0.5]", 1)]),
        (r"[a\|b]", [("a|b", DOWN)]),
        (r"[a\:b:0]", [("a:b", 1)]),
        (r"a\\(b)", [("a\\", 1), ("b", UP)]),
        ("C:\\paintings\\", [("C:\\paintings\\", 1)]),
        # unbalanced: text
        ("(a", [("(a", 1)]),
        ("a)", [("a)", 1)]),
        ("a :) b", [("a :) b", 1)]),
        ("((a)", [("(", 1), ("a", UP)]),
        ("(a))", [("a", UP), (")", 1)]),
        ("(a]", [("(a]", 1)]),
        ("(a [b) c]", [("a [b", UP), (" c]", 1)]),
        ("[a (b] c", [("a (b", DOWN), (" c", 1)]),
        ("(a:1.5", [("(a:1.5", 1)]),
        ("[a:b:0.5", [("[a:b:0.5", 1)]),
        # brackets that are no schedule take weight away
        ("[a:b]", [("a:b", DOWN)]),
        ("[a:b:c]", [("a:b:c", DOWN)]),
        ("[a:b:(0.5)]", [("a:b:", DOWN), ("0.5", 1)]),
        ("[a:b:c:0.5]", [("a:b:c:0.5", DOWN)]),
        ("[0.5]", [("0.5", DOWN)]),
        # words in capitals are signs only as words, and where they may stand
        ("BREAKFAST, SANDALS", [("BREAKFAST, SANDALS", 1)]),
        ("break and and", [("break and and", 1)]),
        ("(salt AND pepper)", [("salt AND pepper", UP)]),
    ],
)
def test_fragments(prompt, fragments):
    assert at(prompt) == [fragments]
    assert at(prompt, 19) == [fragments]


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("a\nBREAK\nb BREAK c", [[("a", 1)], [("b", 1)], [("c", 1)]]),
        ("(a BREAK b:1.5) c", [[("a", 1.5)], [("b", 1.5), (" c", 1)]]),
        ("BREAK a BREAK BREAK b BREAK", [[("a", 1)], [("b", 1)]]),
        ("a BREAK [b:0.5]", [[("a", 1)]]),
        ("BREAK", [[("", 1)]]),
    ],
)
def test_break_starts_a_segment_that_has_words(prompt, segments):
    assert at(prompt) == segments


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("[a:b:0.25]", "aabbbbbb"),
        ("[a:b:.25]", "aabbbbbb"),
        ("[a:b: 0.25 ]", "aabbbbbb"),
        ("[a:b:2]", "aabbbbbb"),
        ("[a:b:1]", "abbbbbbb"),  # a step; and with a point all of them
        ("[a:b:1.0]", "aaaaaaaa"),
        ("[a:b:0]", "bbbbbbbb"),
        ("[a:b:-3]", "bbbbbbbb"),
        ("[a:b:100]", "aaaaaaaa"),
        ("[a:b:0.3]", "aabbbbbb"),  # 2.4 steps are 2
        ("[a:0.5]", "----aaaa"),
        ("[:a:0.5]", "----aaaa"),
        ("[a::0.5]", "aaaa----"),
        ("[::0.5]", "--------"),
        ("[a|b]", "abababab"),
        ("[a|b|c]", "abcabcab"),
        ("[a|]", "a-a-a-a-"),
        ("[[a:b:0.25]:c:0.5]", "aabbcccc"),
        ("[a:[b:c:0.5]:0.25]", "aabbcccc"),
        ("[[a:b:0.25]:[c:d:6]:0.5]", "aabbccdd"),
        ("[[a|b]:c:0.5]", "ababcccc"),
        ("[[a:b:0.5]|c]", "acacbcbc"),
        ("[(a):[b]:0.5]", "aaaabbbb"),
        ("[a:b:0.5", "[a:b:0.5" * 8),
    ],
)
def test_schedules(prompt, shown):
    assert "".join(words(prompt, step, 8) or "-" for step in range(8)) == shown


def test_a_share_is_of_all_the_steps():
    for steps in (1, 7, 20, 100):
        for hundredths in range(101):
            found = [words(f"[a:b:{hundredths / 100:.2f}]", step, steps) for step in range(steps)]
            assert found.count("a") == hundredths * steps // 100
            assert found == sorted(found)


def test_weights_reach_into_schedules_and_out_of_them():
    assert at("(x [a:(b:2):0.5]:1.5) y", 0) == [[("x a", 1.5), (" y", 1)]]
    assert at("(x [a:(b:2):0.5]:1.5) y", 10) == [[("x ", 1.5), ("b", 3), (" y", 1)]]
    assert at("[a:[b BREAK c]:0.5]", 10) == [[("b", DOWN)], [("c", DOWN)]]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat AND a dog", [(1, "a cat"), (1, "a dog")]),
        ("a cat:1.2 AND a dog :0.8", [(1.2, "a cat"), (0.8, "a dog ")]),
        ("a\nAND\nb: -1 AND c", [(1, "a"), (-1, "b"), (1, "c")]),
        ("16:9", [(1, "16:9")]),  # one part is not composed, so it has no weight
        ("16:9 AND b", [(9, "16"), (1, "b")]),
        (r"16\:9 AND b", [(1, "16:9"), (1, "b")]),
        ("a AND", [(1, "a")]),
        ("AND", [(1, "")]),
        ("(a AND b", [(1, "(a"), (1, "b")]),
        ("(a AND b):2 AND c", [(2, "a AND b"), (1, "c")]),
        ("[a AND b|c] AND d", [(1, "a AND b"), (1, "d")]),
        ("a AND b:1.2.3", [(1, "a"), (1, "b:1.2.3")]),
    ],
)
def test_and_composes(prompt, parts):
    found = [(part.weight, "".join(text for text, _ in part.at(0, 20)[0])) for part in parse(prompt)]
    assert found == parts


def test_parts_at_equal_steps_are_equal_and_hashable():
    (part,) = parse("a [(b:1.2):c:0.5] BREAK d")
    assert len({part.at(step, 20) for step in range(20)}) == 2
    assert parse("a (b)") == parse("a (b:1.1)") != parse("a (b:1.2)")


SIGNS = [
    "(",
    ")",
    "[",
    "]",
    ":",
    "|",
    "\\",
    " AND ",
    " BREAK ",
    ":1.5",
    ":0.5]",
    ":7]",
    "a",
    "bc",
    " ",
    "-",
    ".",
    "é\n",
]


def test_nothing_typed_raises():
    draw = random.Random(0)
    for _ in range(3000):
        prompt = "".join(draw.choices(SIGNS, k=draw.randrange(25)))
        parts = parse(prompt)
        assert parts
        for step in (0, 3, 19):
            for part in parts:
                assert math.isfinite(part.weight)
                segments = part.at(step, 20)
                assert segments
                for segment in segments:
                    assert segment
                    for text, weight in segment:
                        assert isinstance(text, str)
                        assert math.isfinite(weight)


@pytest.mark.parametrize("opened", ["(", "([", "[|", "[a:", " ", "BREAK  ", " AND"])
def test_deep_and_long_prompts_end(opened):
    closed = {"(": ")", "[": "]"}
    pairs = "".join(closed.get(sign, "") for sign in reversed(opened))
    number = ":0.5" if ":" in opened else ""
    for prompt in (opened * 20_000, opened * 20_000 + "x" + (number + pairs) * 20_000, (opened + pairs) * 20_000):
        for part in parse(prompt):
            assert part.at(0, 20)
    assert at("(" * 50 + "x" + ")" * 50) == [[("x", round(1.1**50, 6))]]
    assert at("(" * 102 + "x" + ")" * 102) == [[("((x))", LARGEST)]]
    assert DEEPEST == 100


def test_weights_stay_finite():
    assert at("(((a:1000):1000):1000)") == [[("a", LARGEST)]]
    assert at("(a:-999999999)") == [[("a", -LARGEST)]]
    assert at(f"(a:{'9' * 400})") == [[(f"a:{'9' * 400}", UP)]]  # no number of ours
    assert words(f"[a:b:{'9' * 9}]", 19) == "a"
    assert parse("a:99999 AND b")[0].weight == LARGEST


def test_text_without_signs_is_unchanged():
    draw = random.Random(1)
    for _ in range(300):
        prompt = "".join(draw.choices("abc ABC,.;-_!?'\"<>{}#0123456789éß猫\t\n", k=draw.randrange(1, 60)))
        assert at(prompt) == [[(prompt, 1)]]


def test_weights_alone_keep_the_words():
    draw = random.Random(2)

    def phrase(depth):
        body = " ".join(phrase(depth - 1) if depth and draw.random() < 0.5 else "word" for _ in range(3))
        return draw.choice([f"({body})", f"[{body}]", f"({body}:{draw.uniform(0.2, 2):.2f})", body])

    for _ in range(200):
        prompt = phrase(3)
        (segment,) = at(prompt)
        assert "".join(text for text, _ in segment) == re.sub(r"(:\d\.\d\d\))|[()\[\]]", "", prompt)
        assert all(one[1] != two[1] for one, two in pairwise(segment))
