"""The documents are tested: links resolve, paths and make targets exist, commands name files and choices there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("assets/**/*.md")])
EVERY = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
MADE = ("outputs/", "datasets/", "multirun/", ".venv/")  # not in the repository: runs and set-up make them

FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def commands(text: str) -> list[str]:
    """Lines of the code blocks and the inline code spans, continued lines joined."""
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    return [*blocks.splitlines(), *SPAN.findall(prose(text))]


def anchors(document: Path) -> set[str]:
    """The ids that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ +(.*)$", prose(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def exists(token: str, document: Path) -> bool:
    """A path (or pattern) from the root, from the document's folder, or, for a bare file name, anywhere in the tree."""
    token = token.removeprefix("./").rstrip("/")
    places = [ROOT, document.parent, *([] if "/" in token else [path for path in ROOT.iterdir() if path.is_dir()])]
    return any(any(place.glob(token)) for place in places) or any(ROOT.glob(f"[a-z]*/**/{token}"))


def is_path(span: str) -> bool:
    """Whether an inline code span names a file or folder of ours; not an identifier, formula, URL or hub name."""
    if not re.fullmatch(r"[\w.*/\-]+", span) or span.startswith(("/", *MADE)) or set(span) <= set("./*"):
        return False
    ours = (ROOT / span.partition("/")[0]).exists() and "/" in span
    return ours or span.endswith((".py", ".md", ".sh", ".toml", ".lock"))


@EVERY
def test_links_resolve(document: Path):
    text = re.sub(SPAN, "", prose(document.read_text()))
    links = re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text) + re.findall(r'(?:src|href|srcset)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{document.name} links to {link}"


@EVERY
def test_paths_exist(document: Path):
    spans = SPAN.findall(prose(document.read_text()))
    assert not [span for span in spans if is_path(span) and not exists(span, document)]


@EVERY
def test_commands_exist(document: Path):
    """`make` targets, scripts handed to python, torchrun, bash or sbatch, and Hydra choices `group=name`."""
    groups = {path.name: path for path in (ROOT / "configs").glob("*/")}
    for command in commands(document.read_text()):
        if (made := re.match(r"\s*(?:\$ )?make((?: [\w=.*<>]+)*)", command)) and command.strip() != "make":
            assert {word for word in made[1].split() if "=" not in word and "<" not in word} <= TARGETS, command
        if not re.search(r"\b(python3?|torchrun|bash|sbatch|srun)\b", command):
            continue
        for script in re.findall(r"(?<![\w/=.])([\w./\-]+\.(?:py|sh|sbatch))\b", command):
            assert (ROOT / script).exists(), command
        for group, choices in re.findall(r"(?<![\w.+/])(?:\+?)(\w+)=([\w,\-/]+)(?=\s|$)", command):
            if group in groups and re.search(r"train_|reparam", command):
                assert all((groups[group] / f"{name}.yaml").exists() for name in choices.split(",")), command
