"""The site of the documents: it builds without a warning or a network, its links lead somewhere, and its configuration
reference says of every key what the dataclasses say."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from configs.schema import SCHEMAS
from prepare.pipeline import PrepareConfig
from scripts import docs
from scripts.configuration import REQUIRED, entries, everything
from training.config import RunConfig

ROOT = Path(__file__).parents[1]
# a build that reached for the network would end in an error
BUILD = "import socket; socket.socket.connect = None; from mkdocs.__main__ import cli; cli()"


class Page(HTMLParser):
    """What a page links to, what it loads, and the ids that may be linked to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loads, self.ids = set[str](), set[str](), set[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        if tag == "a":
            self.links.add(given.get("href") or "")
        elif tag == "link" or "src" in given:
            self.loads.add(given.get("src") or given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("material") is None and not os.environ.get("CI"):
        pytest.skip("mkdocs-material is not installed; pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_of_the_site_lead_somewhere(pages: dict[Path, Page]):
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            there = (path.parent / target).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{path.name} links to {link}"
            assert not anchor or anchor in pages[there].ids, f"{path.name} links to {link}"


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]):
    for path, page in pages.items():
        for load in page.loads - {""}:
            assert not re.match(r"[a-z]+:|//", load), f"{path.name} loads {load}"
            assert (path.parent / load.partition("#")[0]).exists(), f"{path.name} loads {load}"
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", style.read_text()), style.name


def test_every_document_is_a_page(site: Path):
    for document in ROOT.glob("docs/**/*.md"):
        assert (site / document.relative_to(ROOT / "docs").with_suffix(".html")).exists()
    assert "train.batch_size" in (site / "configuration.html").read_text()
    assert "\\|" not in (site / "sampling.html").read_text()


LINKS = [
    ("faq.md", "[the table](../benchmarks/faults.md)", "[the table](benchmarks/faults.md)"),
    ("faq.md", "[resumable](curriculum.md#exactly-resumable)", "[resumable](curriculum.md#exactly-resumable)"),
    ("changelog.md", "[docs](docs/export.md)", "[docs](export.md)"),
    ("assets.md", "[the log](../../docs/LOG.md)", "[the log](LOG.md)"),
    ("benchmarks/faults.md", "[data](../docs/data.md)", "[data](../data.md)"),
    ("data.md", "[data/plan.py](../data/plan.py)", "`data/plan.py`"),
    ("data.md", "[the plan](../data/plan.py)", "the plan (`data/plan.py`)"),
    ("data.md", "`[a](../no.md)` <https://example.com>", "`[a](../no.md)` <https://example.com>"),
    ("data.md", "[a](https://example.com/x#y), [b](#steps)", "[a](https://example.com/x#y), [b](#steps)"),
    ("data.md", "```\n[a](../no.md)\n```", "```\n[a](../no.md)\n```"),
]


def moved(here: str, text: str, repository: str) -> str:
    class Stub:
        file = type("", (), {"src_uri": here})
        extra = {"repository": repository}  # noqa: RUF012

    return docs.on_page_markdown(text, Stub, Stub, None)


@pytest.mark.parametrize(("here", "text", "expected"), LINKS)
def test_links_are_those_of_the_repository(here: str, text: str, expected: str):
    assert moved(here, text, "") == expected


def test_sources_are_linked_where_the_repository_has_an_address(caplog: pytest.LogCaptureFixture):
    here = "https://example.com/triptych/blob/main/"
    assert moved("data.md", "[plan](../data/plan.py)", here) == f"[plan]({here}data/plan.py)"
    moved("data.md", "[gone](../data/gone.py)", here)
    assert "docs/data.md links to ../data/gone.py, which does not exist" in caplog.text


KEYS = [key for found in everything().values() for section in found for key in section.keys]


def real(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of every key that the dataclasses have, `model` as every family has it."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        within = [part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)]
        families = [family for path, family in SCHEMAS.items() if path.startswith(f"{name}/")]
        if name == "init":
            yield from ((f"init.{key}", str, value) for key, value in default.items())
        elif not within or (default in (None, []) and prefix):
            yield name, hint, default
        for part in families or within:
            yield from real(part, f"{name}{'[]' if default == [] else ''}.")


def as_yaml(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    return [as_yaml(part) for part in value] if isinstance(value, list) else value


def test_every_key_is_in_the_reference_with_its_default():
    by_name = {name: default for cls in (RunConfig, PrepareConfig) for name, _, default in real(cls)}
    assert {key.name for key in KEYS} == by_name.keys()
    for key in KEYS:
        if key.name.startswith("model."):
            continue  # families differ: the test below
        default, value = by_name[key.name], yaml.safe_load(key.default)
        if default is dataclasses.MISSING:
            assert key.default == REQUIRED, key
        elif isinstance(default, float):
            assert float(value) == default, key
        elif isinstance(default, dict):
            assert value.keys() == default.keys(), key
        else:
            assert value == as_yaml(default), key


def test_each_family_of_models_has_its_own_defaults():
    sections = {section.title: section for section in everything()["A run"]}
    for path, cls in SCHEMAS.items():
        if path.startswith("model/"):
            shown = {key.name: yaml.safe_load(key.default) for key in sections[path.replace("/", ": ")].keys}
            assert shown == {name: as_yaml(default) for name, _, default in real(cls, "model.")}


def test_choices_are_those_of_the_enumerations():
    kinds = {name: hint for cls in (RunConfig, PrepareConfig) for name, hint, _ in real(cls)}
    for key in KEYS:
        for part in (kinds[key.name], *get_args(kinds[key.name])):
            if isinstance(part, type) and issubclass(part, Enum):
                assert re.findall(r"`(\w+)`", key.type) == [member.name for member in part], key


def test_every_key_is_described():
    """By the comment on its line, or by a word in its class's docstring."""
    assert not {key.name for key in KEYS if not key.description}


def test_a_docstring_explains_by_entries_and_by_sentences():
    doc = """What it is.

    width: how wide. depth, heads: of both; or else many: of each, at most 3. width is per head here.

    Noise: `shift` multiplies it: times rise. Nothing else, `other` least of all.
    """
    assert entries(doc, {"width", "depth", "heads", "many", "shift"}) == {
        "width": "width is per head here.",
        "depth": "of both",
        "heads": "of both",
        "many": "of each, at most 3.",
        "shift": "`shift` multiplies it: times rise.",
    }


def test_the_command_prints_all_or_some_or_says_that_there_is_none():
    command = [sys.executable, str(ROOT / "scripts/configuration.py")]
    done = subprocess.run([*command, "guard."], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("guard.window: int = 128\n    updates that are remembered\n")
    assert "| `train.images` | int | `1000000` |" in subprocess.run(command, capture_output=True, text=True).stdout
    done = subprocess.run([*command, "lernrate"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: no key contains lernrate; python scripts/configuration.py prints all of them\n"
