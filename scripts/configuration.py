"""Every key of a run and of a preparation: what it is, what it may be, and what it is when nobody says.

    python scripts/configuration.py                    all of them, as the tables of docs/configuration.md
    python scripts/configuration.py train. guard       those whose names contain one of these

The dataclasses are read, not imported: the page takes no library and a fraction of a second. A key's description is
the comment on its line, the comment right above it, its entry `key: ...` in the docstring of its class or of a base,
and what a docstring says of it in a sentence with its name in backticks. Where there is none of these, the docstring
of its enumeration speaks for it.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIRED = "must be given"


@dataclass(slots=True, kw_only=True)
class Key:
    """One key: its dotted name, its type and default in words of YAML, and what it means ("" where nobody says)."""

    name: str
    type: str
    default: str
    description: str


@dataclass(slots=True, kw_only=True)
class Section:
    """The keys of one group: `title` is what is chosen or set, `choices` the files of configs/ that may be chosen."""

    title: str
    summary: str
    choices: list[str]
    keys: list[Key]


class Module:
    """A source file: its classes, its constants, what it imports from where, and the comments by line."""

    def __init__(self, path: Path):
        text = path.read_text()
        body = ast.parse(text).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        named = [node for node in body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
        self.constants = {node.targets[0].id: node.value for node in named}  # type: ignore[union-attr]
        self.origins = {
            alias.asname or alias.name: node.module
            for node in ast.walk(ast.Module(body, []))
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        comments = [token for token in tokens if token.type == tokenize.COMMENT]
        self.comments = {token.start[0]: token.string.lstrip("# ").rstrip() for token in comments}
        self.alone = {token.start[0] for token in comments if token.line.lstrip().startswith("#")}


@cache
def module(name: str) -> Module | None:
    """A module of ours by its dotted name; None for any other."""
    path = ROOT.joinpath(*name.split("."))
    places = (path.with_suffix(".py"), path / "__init__.py")
    return next((Module(place) for place in places if place.is_file()), None)


@dataclass(slots=True)
class Class:
    """A class and where it stands, which is where its names are looked up."""

    node: ast.ClassDef
    home: Module

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def is_enum(self) -> bool:
        return any(ast.unparse(base) == "Enum" for base in self.node.bases)

    def lineage(self) -> list["Class"]:
        """The class, its base, the base's base: those that are ours."""
        bases = [find(ast.unparse(base), self.home) for base in self.node.bases]
        return [self, *(further for base in bases if base for further in base.lineage())]

    def members(self) -> dict[str, str]:
        """Of an enumeration: its names, each with the comment on its line or ""."""
        lines = [node for node in self.node.body if isinstance(node, ast.Assign)]
        return {ast.unparse(node.targets[0]): self.home.comments.get(node.lineno, "") for node in lines}


def find(name: str, home: Module) -> Class | None:
    """The class that `name` is in a module; None if it is none of ours."""
    if name in home.classes:
        return Class(home.classes[name], home)
    there = module(home.origins.get(name, ""))
    return find(name, there) if there else None


def constant(node: ast.expr, home: Module) -> ast.expr:
    """What a name stands for, wherever it was set; anything else as it is."""
    while isinstance(node, ast.Name):
        if node.id in home.constants:
            node = home.constants[node.id]
        elif there := module(home.origins.get(node.id, "")):
            home = there
        else:
            break
    return node


def own_fields(of: Class) -> dict[str, ast.AnnAssign]:
    """The fields that a class's own lines define."""
    lines = [node for node in of.node.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(node.target): node for node in lines if not ast.unparse(node.annotation).startswith("ClassVar")}


def fields(of: Class) -> dict[str, tuple[ast.AnnAssign, Class]]:
    """The fields of a dataclass in its order, each with the class that has the last word on it."""
    found: dict[str, tuple[ast.AnnAssign, Class]] = {}
    for owner in reversed(of.lineage()):
        found |= {name: (node, owner) for name, node in own_fields(owner).items()}
    return found


def entries(doc: str, names: set[str]) -> dict[str, str]:
    """What a docstring says of each name: `name: ...` up to the next, else the sentences with its name in backticks."""
    said: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", doc):
        text = " ".join(paragraph.split())
        starts = [
            found
            for found in re.finditer(r"(?:^|(?<=[.;:] ))(?:or else )?(\w+(?:, \w+)*): ", text)
            if set(found[1].split(", ")) <= names
        ]
        ends = [found.start() for found in starts[1:]] + [len(text)]
        for found, end in zip(starts, ends, strict=False):
            first, *more = re.split(r"(?<=\.) (?=(?:" + "|".join(names) + r") )", text[found.end() : end])
            said |= {name: first.strip(" ;") for name in found[1].split(", ")}
            said |= {sentence.partition(" ")[0]: sentence for sentence in more}
        for sentence in re.split(r"(?<=\.) (?=[A-Z`])", text[: starts[0].start()] if starts else text):
            for name in names & set(re.findall(r"`(\w+)`", sentence)) - said.keys():
                said[name] = re.sub(r"^[A-Z]\w+: (?=`)", "", sentence)
    return said


def comment(node: ast.AnnAssign, home: Module) -> str:
    """The comment on a field's own lines, else the lines of comment right above it."""
    own = [home.comments[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in home.comments]
    above, line = [], node.lineno - 1
    while line in home.alone:
        above.insert(0, home.comments[line])
        line -= 1
    return " ".join(own or above)


def description(name: str, node: ast.AnnAssign, owner: Class, of: Class) -> str:
    """All that is said of a field: docstrings, the base's first, then comments, then choices that have one."""
    names = set(fields(of))
    said = [text for c in reversed(of.lineage()) if (text := entries(c.doc, names).get(name))]
    written = [text for c in of.lineage() if name in (own := own_fields(c)) and (text := comment(own[name], c.home))]
    parts = said + written[:1]
    choices: list[str] = []
    for found in classes_in(node.annotation, owner.home):
        if found.is_enum:
            parts = parts or [found.doc.partition("\n")[0]]
            choices += [f"<br>`{member}`: {text}" for member, text in found.members().items() if text]
    return as_yaml("; ".join(part.rstrip(".") for part in dict.fromkeys(parts)) + "".join(choices))


def as_yaml(text: str) -> str:
    """None, True and False as YAML has them."""
    for ours, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{ours}\b", yaml, text)
    return text


def classes_in(annotation: ast.expr, home: Module) -> list[Class]:
    """The classes of ours that a type is made of."""
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    return [found for name in names if (found := find(name, home))]


def kind(annotation: ast.expr, home: Module) -> str:
    """A type in words; an enumeration by its choices."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return f"{kind(left, home)}, or null"
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return f"list of {kind(inner, home)}"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, inner])):
            return f"{kind(inner, home)} by name".removeprefix("anything ")
        case ast.Name(id="Any"):
            return "anything"
        case ast.Name(id=name) if found := find(name, home):
            return ", ".join(f"`{member}`" for member in found.members()) if found.is_enum else "settings"
    return ast.unparse(annotation)


def default(node: ast.expr | None, home: Module) -> str:
    """A default as YAML would have it."""
    match node:
        case None:
            return REQUIRED
        case ast.Call(func=ast.Name("field") | ast.Attribute(attr="field"), keywords=options):
            made = next(option.value for option in options if option.arg in ("default_factory", "default"))
            if isinstance(made, ast.Lambda):
                return default(made.body, home)
            return {"list": "[]", "dict": "{}"}.get(ast.unparse(made), "")
        case ast.Call(func=ast.Name(id="dict"), args=[inner]):
            return default(inner, home)
        case ast.Attribute(attr=member):
            return member
        case ast.Name():
            return default(constant(node, home), home)
        case ast.BinOp(left=ast.Constant(value=int(base)), op=ast.Pow(), right=ast.Constant(value=int(power))):
            return str(base**power)
        case ast.Constant(value=None | bool()):
            return {None: "null", True: "true", False: "false"}[node.value]
        case ast.Constant(value=str(text)):
            return text or '""'
        case ast.List(elts=elements):
            return f"[{', '.join(default(element, home) for element in elements)}]"
        case ast.Dict(keys=keys, values=values):
            pairs = [(ast.literal_eval(k), default(v, home)) for k, v in zip(keys, values, strict=True) if k]
            items = ", ".join(f"{key}: {value if len(value) < 60 else '...'}" for key, value in pairs)
            return f"{{{items}}}"
    return ast.unparse(node)


def keys(of: Class, prefix: str) -> Iterator[Key]:
    """Every key of a dataclass, those of the dataclasses within it behind the field that holds them."""
    for name, (node, owner) in fields(of).items():
        about = description(name, node, owner, of)
        below = [found for found in classes_in(node.annotation, owner.home) if not found.is_enum]
        plain = default(node.value, owner.home)
        if not below or plain:  # settings that are always there have only keys of their own
            yield Key(name=prefix + name, type=kind(node.annotation, owner.home), default=plain, description=about)
        for found in below:
            yield from keys(found, f"{prefix}{name}{'[]' if plain == '[]' else ''}.")


def by_name(node: ast.AnnAssign, explained: ast.expr, home: Module) -> list[Key]:
    """The keys of a dict that a constant of the module explains, as INIT_KEYS does for `init`."""
    name, made = ast.unparse(node.target), node.value
    lambdas = [part for part in ast.walk(made or node) if isinstance(part, ast.Lambda)]
    values = ast.literal_eval(lambdas[0].body) if lambdas else {}
    rows = ast.literal_eval(explained).items()
    given = {key: default(ast.Constant(value), home) for key, value in values.items()}
    return [
        Key(name=f"{name}.{key}", type="str", default=given.get(key, "null"), description=as_yaml(text))
        for key, text in rows
    ]


def summary(of: Class) -> str:
    return as_yaml(of.doc.partition("\n")[0])


def schemas() -> dict[str, Class]:
    """Group and name of every schema that a YAML may ask for, with its dataclass."""
    home = module("configs.schema")
    assert home
    table = home.constants["SCHEMAS"]
    assert isinstance(table, ast.Dict)
    pairs = [
        (ast.literal_eval(key), ast.unparse(value)) for key, value in zip(table.keys, table.values, strict=True) if key
    ]
    return {name: found for name, value in pairs if (found := find(value, home))}


def choices(group: str, schema: str | None = None) -> list[str]:
    """The files of a config group, those of one schema alone if it is given."""
    files = sorted((ROOT / "configs" / group).glob("*.yaml"))
    return [path.stem for path in files if schema is None or f"schema/{group}/{schema}@" in path.read_text()]


def sections(of: Class, above: str) -> list[Section]:
    """A section for what stands at the top of a config, and one for each dataclass within it."""
    plain: list[Key] = []
    found: list[Section] = []
    known = {key.name: key for key in keys(of, "")}
    for name, (node, owner) in fields(of).items():
        below = [c for c in classes_in(node.annotation, owner.home) if not c.is_enum]
        explained = owner.home.constants.get(f"{name.upper()}_KEYS")
        if explained is not None:
            plain += by_name(node, explained, owner.home)
        elif not below:
            plain.append(known[name])
        families = {path: c for path, c in schemas().items() if path.startswith(f"{name}/")}
        for family, c in families.items() if len(families) > 1 else [(name, below[0])] if below else []:
            schema = family.partition("/")[2] or None
            found.append(
                Section(
                    title=f"{name}: {schema}" if schema else name,
                    summary=summary(c),
                    choices=choices(name, schema),
                    keys=list(keys(c, f"{name}.")),
                )
            )
    return [Section(title=above, summary=summary(of), choices=[], keys=plain), *found]


def everything() -> dict[str, list[Section]]:
    """All sections, of a run and of a preparation."""
    run, prepare = module("training.config"), module("prepare.pipeline")
    assert run and prepare
    of_run, of_preparation = find("RunConfig", run), find("PrepareConfig", prepare)
    assert of_run and of_preparation
    run_sections, preparation = sections(of_run, "general"), sections(of_preparation, "general")
    shared = [part.title for part in run_sections[1:]]
    return {"A run": run_sections, "A preparation": [part for part in preparation if part.title not in shared]}


def cell(text: str) -> str:
    """Text for a cell of a table; code and line breaks stay as they are."""
    parts = re.split(r"(`[^`]*`|<br>)", text)  # every other one is kept
    parts[::2] = [part.replace("<", "&lt;").replace("|", "&#124;") for part in parts[::2]]
    return "".join(parts)


def table(section: Section) -> str:
    """A section as Markdown."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in section.keys:
        value = key.default if key.default == REQUIRED else f"`{key.default}`"
        lines.append(f"| `{key.name}` | {cell(key.type)} | {cell(value)} | {cell(key.description)} |")
    return "\n".join(lines)


def markdown() -> str:
    """The whole reference."""
    parts = []
    for heading, found in everything().items():
        parts.append(f"## {heading}")
        for section in found:
            parts += [f"### {section.title}", cell(section.summary)]
            if section.choices:
                group = section.title.partition(":")[0]
                parts.append(f"Choose with `{group}=`: " + ", ".join(f"`{choice}`" for choice in section.choices))
            parts.append(table(section))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="print only keys whose names contain one of these")
    parts = parser.parse_args().parts
    if not parts:
        print(markdown(), end="")
        return
    every = [key for found in everything().values() for section in found for key in section.keys]
    chosen = [key for key in every if any(part in key.name for part in parts)]
    about = [(key, key.type.replace("`", ""), key.description.replace("<br>", "\n    ")) for key in chosen]
    said = dict.fromkeys(f"{key.name}: {kind} = {key.default}\n    {text}" for key, kind, text in about)
    if not said:
        sys.exit(f"error: no key contains {' or '.join(parts)}; python scripts/configuration.py prints all of them")
    print(*said, sep="\n")  # once, what several models have alike


if __name__ == "__main__":
    main()
