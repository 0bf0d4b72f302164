"""What MkDocs is told besides mkdocs.yml: pages from elsewhere in the repository, and links that leave docs/.

MkDocs calls the functions by their names. Links in the documents are those of the repository, so that they work where
it is read as files; a link to a page of the site becomes one to the page, any other one to the file in
`extra.repository` of mkdocs.yml, such as https://HOST/OWNER/NAME/blob/main. Where that is empty there is nowhere to
lead to, and the file's name stands in place of the link.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from scripts.configuration import markdown as configuration

ROOT = Path(__file__).parents[1]
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "assets.md": "assets/shapes/README.md"}
PAGES |= {f"benchmarks/{path.name}": f"benchmarks/{path.name}" for path in sorted(ROOT.glob("benchmarks/*.md"))}
FENCE = r"^ *```.*?^ *```"
LINK = r"\[(?P<text>(?:`[^`]*`|[^\[\]`])*)\]\((?P<target>[^)\s]+)\)"
log = logging.getLogger("mkdocs.hooks")  # a warning here ends a strict build


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for page, path in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead every link to where its target is on the site, and print the configuration behind its introduction."""
    here = page.file.src_uri
    text = re.sub(
        rf"(?P<kept>{FENCE}|(?<!`)`[^`\n]+`)|{LINK}",
        lambda found: found[0] if found["kept"] else link(found["text"], found["target"], here, config.extra),
        markdown,
        flags=re.MULTILINE | re.DOTALL,
    )
    text = re.sub(r"^\|.*", lambda row: bare_pipes(row[0]), text, flags=re.MULTILINE)
    return f"{text}\n{configuration()}" if here == "configuration.md" else text


def bare_pipes(row: str) -> str:
    """A row of a table without the backslashes that GitHub wants before a | in code, and MkDocs would show."""
    return re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row)


def link(text: str, target: str, here: str, extra: dict[str, str]) -> str:
    """The link of a page as Markdown for the site."""
    path, hash_, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return f"[{text}]({target})"
    source = PAGES.get(here, f"docs/{here}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / path).exists():
        log.warning("%s links to %s, which does not exist", source, target)
    pages = {source: page for page, source in PAGES.items()}
    page = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if page is not None:
        there = posixpath.relpath(page, posixpath.dirname(here) or ".")
        return f"[{text}]({there}{hash_}{anchor})"
    if extra.get("repository"):
        return f"[{text}]({extra['repository'].rstrip('/')}/{path}{hash_}{anchor})"
    return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"
