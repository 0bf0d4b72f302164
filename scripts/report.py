"""Turn the run folders of a curriculum into one page, one picture and one JSON file.

    python scripts/report.py outputs/demo              when all three stages are done
    python scripts/report.py outputs/demo --partial    at any time; what is missing is left out

reads outputs/demo/{stage1,stage2,stage3}/ (config.yaml, metrics.jsonl, samples/*.png, evaluation.json) and, if it is
there, outputs/demo/commands.json, a list of {"name", "command", "seconds", "peak_rss_mb"} in the order they ran. Writes

    report.html   everything, self-contained: pictures and charts are inside, nothing is fetched
    samples.png   the last pictures of every stage with their prompts
    report.json   the numbers

The charts are SVG drawn here, so that the report needs nothing but Pillow and opens anywhere, years from now.
"""

import argparse
import base64
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image, ImageDraw, ImageFont

STAGES = {
    "stage1": ("Stage 1", "colour and shape from a class number"),
    "stage2": ("Stage 2", "pictures from text"),
    "stage3": ("Stage 3", "pictures from text, as a straight flow"),
}
PREDICTIONS = {"eps": "eps-prediction", "v": "v-prediction", "x0": "x0-prediction", "flow": "flow matching"}
PERCENT = "\N{NARROW NO-BREAK SPACE}%"
TEMPLATE = Path(__file__).with_suffix(".html")


# --- what a run left behind -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """One run folder, read: the records of metrics.jsonl by kind, and the exam's result."""

    name: str
    folder: Path
    config: DictConfig | ListConfig
    train: list[dict]
    samples: list[dict]
    evaluation: dict
    command: str | None

    @property
    def title(self) -> str:
        return STAGES[self.name][0]

    @property
    def recipe(self) -> str:
        """The objective and resolution in words, as far as the run's config tells them."""
        prediction = OmegaConf.select(self.config, "objective.prediction")
        resolution = OmegaConf.select(self.config, "data.resolution")
        words = [PREDICTIONS.get(str(prediction), str(prediction))] if prediction else []
        words += ["zero terminal SNR"] if OmegaConf.select(self.config, "objective.zero_terminal") else []
        words += [f"{resolution} px"] if resolution else []
        return ", ".join(words)

    def values(self, key: str) -> np.ndarray:
        """One field of the training records, (n,) float64; NaN where a record lacks it."""
        return np.array([record.get(key, math.nan) for record in self.train], np.float64)

    def summary(self) -> dict:
        """The exam's result and, under `train`, what training took."""
        late = self.train[-max(1, len(self.train) // 10) :]  # a single record's loss is mostly noise
        bins = [[r["loss_bins"][k] for r in late if r.get("loss_bins")] for k in range(10)]
        last = self.train[-1]
        train = {
            "images": last["images"],
            "seconds": last["seconds"],
            "images_per_s": float(np.nanmedian(self.values("images_per_s"))),
            "peak_rss_mb": float(np.nanmax(self.values("rss_mb"))),
            "loss": mean(record["loss"] for record in late),
            "loss_unweighted": mean(record["loss_unweighted"] for record in late),
            "loss_bins": [mean(values) for values in bins],
        }
        return {key: value for key, value in self.evaluation.items() if key != "kind"} | {"train": train}


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None if none is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def read_stage(folder: Path, commands: list[dict]) -> Stage | None:
    """The stage in a run folder, or None while it has no training record."""
    records = read_metrics(folder / "metrics.jsonl")
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "sample", "eval")}
    if not kinds["train"]:
        return None
    config = folder / "config.yaml"
    made = [c["command"] for c in commands if c["name"] == folder.name or f"train_{folder.name}.py" in c["command"]]
    return Stage(
        name=folder.name,
        folder=folder,
        config=OmegaConf.load(config) if config.exists() else OmegaConf.create(),
        train=kinds["train"],
        samples=[r for r in kinds["sample"] if (folder / r["path"]).exists()],
        evaluation=read_json(folder / "evaluation.json", kinds["eval"][-1] if kinds["eval"] else {}),
        command=made[-1] if made else None,
    )


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics file; a last line that is still being written is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_json(path: Path, default):
    """A JSON file's content, or `default` if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else default


def tiles(stage: Stage, record: dict) -> list[Image.Image]:
    """The pictures of a sample grid, one for each prompt."""
    with Image.open(stage.folder / record["path"]) as grid:
        grid = grid.convert("RGB")
    columns = record["columns"]
    side = grid.width // columns
    corners = [(side * (i % columns), side * (i // columns)) for i in range(len(record["prompts"]))]
    return [grid.crop((x, y, x + side, y + side)) for x, y in corners]


def accuracies(stage: Stage) -> list[tuple[str, float]]:
    """The stage's headline figures: what was right, and how often."""
    exam, two = stage.evaluation, stage.evaluation.get("two_objects", {})
    found = [
        ("class", exam.get("class_accuracy")),
        ("one object", exam.get("prompt_accuracy")),
        ("two objects", two.get("prompt_accuracy")),
    ]
    return [(label, value) for label, value in found if value is not None]


# --- words and numbers ------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 4 min 05 s, 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def megabytes(value: float) -> str:
    return f"{value:,.0f} MB"


def percent(share: float) -> str:
    """A share as a percentage; never 100 % unless it is all of them."""
    return f"{min(100 * share, 99.9):.1f}{PERCENT}" if share < 1 else f"100{PERCENT}"


def compact(number: float) -> str:
    """An axis label: 0.05, 2, 500, 20k, 1.5M."""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:g}{suffix}"
    return f"{number:.3g}"


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` trials (Wilson 1927); unlike p +- z s it stays in [0, 1]."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


# --- charts -----------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 270, 46, 14, 8, 42  # in units of the viewBox


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], some `count` of them, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; plain ticks if that leaves fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    if len(found) > 7:
        found = [tick for tick in found if math.isclose(math.log10(tick) % 1, 0, abs_tol=1e-9)]
    return found if len(found) >= 3 else ticks(low, high, 4)


def smoothed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y (n,) under a Gaussian window of 2 % of the axis, in logarithms as it is drawn."""
    width = 0.02 * max(float(np.ptp(x)), 1e-9)
    weights = np.exp(-0.5 * ((x[:, None] - x) / width) ** 2)
    return np.exp(weights @ np.log(y) / weights.sum(1))


def svg(label: str, *parts: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def axes(x_ticks: dict[str, float], y_ticks: dict[str, float], x_name: str) -> str:
    """Horizontal rules, labels and the base line; ticks map labels to places in the viewBox."""
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = [
        f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        for label, y in y_ticks.items()
    ]
    lines += [
        f'<path class="axis" d="M{x:.1f} {base}v4"/>'
        f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{label}</text>'
        for label, x in x_ticks.items()
    ]
    middle = (LEFT + right) / 2
    return "".join(lines) + (
        f'<path class="axis" d="M{LEFT} {base}H{right}"/>'
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'
    )


def loss_chart(stage: Stage) -> str:
    """Weighted and unweighted loss over images on a logarithmic axis: raw faint, smoothed strong."""
    images, lines = stage.values("images"), []
    names = {"loss": ("first", "as weighted"), "loss_unweighted": ("second", "unweighted")}
    if np.allclose(stage.values("loss"), stage.values("loss_unweighted"), rtol=1e-3, equal_nan=True):
        names = {"loss_unweighted": ("second", "unweighted, which is all: every weight is 1")}
    for key, (colour, name) in names.items():
        y = stage.values(key)
        known = np.isfinite(y) & (y > 0)
        pieces = np.array_split(np.flatnonzero(known), min(600, known.sum()) or 1)  # at most 600 points are drawn
        if known.any():
            x, y = (np.array([values[piece].mean() for piece in pieces]) for values in (images, y))
            lines.append((colour, name, x, y))
    if not lines:
        return ""
    every = np.concatenate([y for *_, y in lines])
    low, high, last = every.min() / 1.05, every.max() * 1.05, max(images[-1], 1)

    def across(x):
        return LEFT + (WIDTH - LEFT - RIGHT) * x / last

    def down(y):
        return TOP + (HEIGHT - TOP - BOTTOM) * np.log(high / y) / math.log(high / low)

    def line(x, y, style):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across(x), down(y), strict=True))
        return f'<polyline class="{style}" points="{points}"/>'

    raw = [line(x, y, f"raw {colour}") for colour, _, x, y in lines]
    smooth = [line(x, smoothed(x, y), colour) for colour, _, x, y in lines]
    frame = axes(
        {compact(tick): across(tick) for tick in ticks(0, last)},
        {compact(tick): down(tick) for tick in log_ticks(low, high)},
        "images seen",
    )
    keys = [
        f'<span><svg viewBox="0 0 20 8"><path class="{colour}" d="M0 4H20"/></svg>{name}</span>'
        for colour, name, *_ in lines
    ]
    return (
        f'<figure><h3>Loss</h3><div class="legend">{"".join(keys)}</div>'
        f"{svg('Loss over images seen', frame, *raw, *smooth)}"
        "<figcaption>Logarithmic. Faint: as logged; strong: smoothed.</figcaption></figure>"
    )


def bins_chart(bins: list[float | None]) -> str:
    """Bars of the final unweighted loss by tenths of the noise time t."""
    if not any(bins):
        return ""
    high = 1.05 * max(value for value in bins if value is not None)
    base, pitch = HEIGHT - BOTTOM, (WIDTH - LEFT - RIGHT) / len(bins)

    def down(value):
        return base - (base - TOP) * value / high

    bars = [
        f'<rect x="{LEFT + k * pitch + 3:.1f}" y="{down(value):.1f}" width="{pitch - 6:.1f}"'
        f' height="{base - down(value):.1f}" rx="1.5">'
        f"<title>t from {k / 10:g} to {(k + 1) / 10:g}: {value:.4g}</title></rect>"
        for k, value in enumerate(bins)
        if value is not None
    ]
    edges = {f"{k / 10:g}": LEFT + k * pitch for k in range(0, 11, 2)}
    frame = axes(edges, {compact(tick): down(tick) for tick in ticks(0, high, 4)}, "noise time t (0 clean, 1 noise)")
    return (
        '<figure><h3>Loss by noise</h3><div class="legend">unweighted, over the last tenth of training</div>'
        f"{svg('Unweighted loss by noise time', frame, *bars)}</figure>"
    )


# --- the page ---------------------------------------------------------------------------------------------


def image(picture: Image.Image, alt: str, style: str = "") -> str:
    """An <img> that carries its own bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{style}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def facts(pairs: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in pairs.items())}</dl>"


def command_box(command: str) -> str:
    """A command that one click copies; without scripts a click still selects all of it."""
    copy = "navigator.clipboard.writeText(this.previousElementSibling.textContent);this.textContent='Copied'"
    return (
        f'<div class="command"><code>{escape(command)}</code><button type="button" onclick="{copy}">Copy</button></div>'
    )


def bar_table(name: str, exam: dict) -> str:
    """One row a kind of attribute; a thin dark line spans the 95 % interval where the number of pictures is known."""
    whole = exam.get("prompt_accuracy", exam.get("class_accuracy"))
    rows = {"whole prompt" if "prompt_accuracy" in exam else "class": whole} | exam.get("attributes", {})
    count, cells = exam.get("count"), []
    for kind, share in rows.items():
        if share is None:  # nothing was asked of this kind
            continue
        low, high = wilson(share, count) if count else (share, share)
        interval = f'<u style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></u>' if count else ""
        cells.append(
            f'<tr class="{"whole" if share is whole and not cells else ""}"><th scope="row">{escape(kind)}</th>'
            f'<td><div class="bar"><i style="width:{100 * share:.1f}%"></i>{interval}</div></td>'
            f'<td class="number">{percent(share)}</td></tr>'
        )
    pictures = f"{count:,} pictures; the thin line is the 95{PERCENT} interval" if count else ""
    return f'<table class="bars"><caption><b>{escape(name)}</b>{pictures}</caption>{"".join(cells)}</table>'


def exam_tables(exam: dict) -> str:
    """Accuracy by attribute: the exam itself and every part of it that has an accuracy of its own."""
    if "class_accuracy" in exam:
        tables = [bar_table("Exam", exam)]
    elif "prompt_accuracy" in exam:
        parts = {"one object": exam} | {k: v for k, v in exam.items() if isinstance(v, dict) and "prompt_accuracy" in v}
        tables = [bar_table(name.replace("_", " ").capitalize(), part) for name, part in parts.items()]
    else:
        return ""
    return f'<div class="columns">{"".join(tables)}</div>'


def sample_cards(stage: Stage) -> str:
    """A card a prompt: the last picture large, the first and the middle one small beside it."""
    if not stage.samples:
        return ""
    last = stage.samples[-1]
    same = [record for record in stage.samples if record["prompts"] == last["prompts"]]
    early = [same[k] for k in sorted({0, (len(same) - 1) // 2} - {len(same) - 1})]
    rows = [tiles(stage, record) for record in (*early, last)]
    cards = []
    for prompt, *pictures in zip(last["prompts"], *rows, strict=True):
        small = [image(p, f"{prompt}, after {r['images']:,} images") for p, r in zip(pictures[:-1], early, strict=True)]
        cards.append(
            f'<figure class="sample{"" if early else " alone"}">{"".join(small)}{image(pictures[-1], prompt, "last")}'
            f"<figcaption>{escape(prompt)}</figcaption></figure>"
        )
    when = f"Large: after {last['images']:,} images."
    if early:
        when += " Small: after " + " and ".join(f"{record['images']:,}" for record in early) + "."
    return f'<h3>Samples</h3><p class="muted">{when}</p><div class="samples">{"".join(cards)}</div>'


def panel(stage: Stage) -> str:
    """One wing of the triptych at the head of the page."""
    figures = [
        f'<span><span class="figure">{percent(value)}</span><span class="muted">{label}</span></span>'
        for label, value in accuracies(stage)
    ]
    pictures = ""
    if stage.samples:
        last = stage.samples[-1]
        shown = zip(tiles(stage, last), last["prompts"], strict=True)
        pictures = "".join(image(picture, prompt) for picture, prompt in spread(list(shown), 6))
    return (
        f'<a class="panel" href="#{stage.name}"><h3>{stage.title}</h3><div class="figures">{"".join(figures)}</div>'
        f'<div class="tiles">{pictures}</div></a>'
    )


def spread(items: list, count: int) -> list:
    """`count` of the items, evenly spaced, first and last among them; all if there are no more."""
    if len(items) <= count:
        return items
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def section(stage: Stage) -> str:
    """Everything about one stage."""
    train = stage.summary()["train"]
    loss = train["loss_unweighted"]
    numbers = {
        "images seen": f"{train['images']:,}",
        "training time": duration(train["seconds"]),
        "images per second": f"{train['images_per_s']:,.0f}",
        "peak memory": megabytes(train["peak_rss_mb"]),
        "final loss, unweighted": "not finite" if loss is None else f"{loss:.4g}",
    }
    heading = f"{stage.title}: {STAGES[stage.name][1]}"
    return (
        f'<section id="{stage.name}"><h2>{heading}</h2><p class="muted">{escape(stage.recipe)}</p>{facts(numbers)}'
        f"{command_box(stage.command) if stage.command else ''}"
        f'<div class="columns">{loss_chart(stage)}{bins_chart(train["loss_bins"])}</div>'
        f"{exam_tables(stage.evaluation)}{sample_cards(stage)}</section>"
    )


def command_table(commands: list[dict]) -> str:
    """Every command in order, with what it took."""
    if not commands:
        return ""
    longest = max(command["seconds"] for command in commands) or 1
    rows = [
        f"<tr><td>{escape(c['name'])}{command_box(c['command'])}"
        f'<div class="bar"><i style="width:{100 * c["seconds"] / longest:.1f}%"></i></div></td>'
        f'<td class="number">{duration(c["seconds"])}</td><td class="number">{megabytes(c["peak_rss_mb"])}</td></tr>'
        for c in commands
    ]
    return (
        f'<section><h2>Every command</h2><p class="muted">In order, {duration(sum(c["seconds"] for c in commands))}'
        ' end to end.</p><table class="commands"><thead><tr><th>command</th>'
        f'<th class="number">time</th><th class="number">peak memory</th></tr></thead>{"".join(rows)}</table></section>'
    )


def page(run: Path, stages: list[Stage], commands: list[dict], numbers: dict, partial: bool) -> str:
    """The whole page; while training goes on it reloads itself."""
    missing = [STAGES[name][0] for name in STAGES if name not in numbers["stages"]]
    time = duration(numbers["train_seconds"])
    lead = f"Three stages of one text-to-image model, trained in {time}."
    if partial:
        ahead = f"; {', '.join(missing)} still to come" if missing else ""
        lead = f"In progress: {time} of training so far{ahead}."
    exam = (
        '<p class="muted note">An accuracy is the share of generated pictures in which a reader made of classical image'
        " analysis, with no network in it, finds what was asked for. A prompt counts as right only if every attribute"
        " is, and nothing else is on the picture.</p>"
    )
    triptych = f'<div class="triptych">{"".join(map(panel, stages))}</div>' if stages else ""
    body = [triptych, exam if any(map(accuracies, stages)) else "", *map(section, stages), command_table(commands)]
    return Template(TEMPLATE.read_text()).substitute(
        title=escape(f"Triptych: {run.resolve().name}"),
        refresh='<meta http-equiv="refresh" content="20">\n' if partial else "",
        lead=escape(lead),
        body="\n".join(body),
    )


# --- the picture ------------------------------------------------------------------------------------------

PAPER, INK, MUTED, RULE = "#faf9f6", "#1e1c19", "#6b665e", "#dcd7cc"
TILE, GAP, MARGIN, COLUMNS = 256, 26, 66, 6  # pixels; the README shows the picture at about half its size


def samples_picture(stages: list[Stage]) -> Image.Image | None:
    """The last pictures of every stage in a panel each, prompts below the tiles; None if there are none."""
    panels = [picture_panel(stage) for stage in stages if stage.samples]
    if not panels:
        return None
    height = sum(panel.height for panel in panels) + MARGIN * (len(panels) + 1)
    whole = Image.new("RGB", (panels[0].width + 2 * MARGIN, height), PAPER)
    draw, y = ImageDraw.Draw(whole), MARGIN
    for number, panel in enumerate(panels):
        if number:
            draw.line((MARGIN, y - MARGIN // 2, whole.width - MARGIN, y - MARGIN // 2), RULE, 2)
        whole.paste(panel, (MARGIN, y))
        y += panel.height + MARGIN
    whole.putalpha(rounded(whole.size, 28))  # so that it sits well on a dark page too
    return whole


def picture_panel(stage: Stage) -> Image.Image:
    """One stage: its title, its accuracy and a row of tiles."""
    title, text, record = ImageFont.load_default(44), ImageFont.load_default(25), stage.samples[-1]
    shown = spread(list(zip(tiles(stage, record), record["prompts"], strict=True)), COLUMNS)
    captions = [wrapped(prompt, text, TILE) for _, prompt in shown]
    head, leading = 82, 32
    width = COLUMNS * TILE + (COLUMNS - 1) * GAP
    panel = Image.new("RGB", (width, head + TILE + 18 + leading * max(map(len, captions))), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((0, 44), stage.title, INK, title, anchor="ls")
    draw.text((title.getlength(stage.title) + 24, 44), stage.recipe, MUTED, text, anchor="ls")
    right = [f"{label} {percent(value).replace(PERCENT, ' %')}" for label, value in accuracies(stage)]
    draw.text((width, 44), f"right: {', '.join(right)}" if right else "", INK, text, anchor="rs")
    mask = rounded((TILE, TILE), 8)
    for column, ((picture, _), lines) in enumerate(zip(shown, captions, strict=True)):
        x = column * (TILE + GAP)
        panel.paste(picture.resize((TILE, TILE), Image.Resampling.BICUBIC), (x, head), mask)
        draw.rounded_rectangle((x, head, x + TILE - 1, head + TILE - 1), 8, outline=RULE)
        for row, line in enumerate(lines):
            draw.text((x, head + TILE + 36 + row * leading), line, INK, text, anchor="ls")
    return panel


def rounded(size: tuple[int, int], radius: int) -> Image.Image:
    """A mask with smooth round corners."""
    large = Image.new("L", (4 * size[0], 4 * size[1]))
    ImageDraw.Draw(large).rounded_rectangle((0, 0, large.width - 1, large.height - 1), 4 * radius, fill=255)
    return large.resize(size, Image.Resampling.LANCZOS)


def wrapped(text: str, font, width: float) -> list[str]:
    """Words in lines no longer than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# --- all of it --------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Write so that a reader sees the old file or the new one, never half of one."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def report(run: Path, partial: bool = False) -> dict:
    """Write report.html, samples.png and report.json into a run folder; returns what report.json says.

    Raises ValueError if the folder is missing or, without `partial`, if a stage has not been trained.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder; give the folder that holds stage1, stage2 and stage3")
    commands = read_json(run / "commands.json", [])
    found = {name: read_stage(run / name, commands) for name in STAGES}
    stages = [stage for stage in found.values() if stage]
    if not partial and len(stages) < len(STAGES):
        missing = ", ".join(name for name, stage in found.items() if not stage)
        raise ValueError(f"{run} has no training record of {missing}; train it, or pass --partial to leave it out")
    summaries = {stage.name: stage.summary() for stage in stages}
    peaks = [summary["train"]["peak_rss_mb"] for summary in summaries.values()] + [c["peak_rss_mb"] for c in commands]
    numbers = {
        "stages": summaries,
        "train_seconds": sum(summary["train"]["seconds"] for summary in summaries.values()),
        "peak_rss_mb": max(peaks, default=None),
        "commands": commands,
    }
    if picture := samples_picture(stages):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        write(run / "samples.png", buffer.getvalue())
    write(run / "report.html", page(run, stages, commands, numbers, partial).encode())
    write(run / "report.json", json.dumps(numbers, indent=2).encode())
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write report.html, samples.png and report.json for a curriculum's run."
    )
    parser.add_argument("run", type=Path, help="folder that holds stage1, stage2 and stage3, e.g. outputs/demo")
    parser.add_argument("--partial", action="store_true", help="leave out what is not there yet")
    arguments = parser.parse_args()
    try:
        report(arguments.run, arguments.partial)
    except ValueError as error:
        raise SystemExit(f"report.py: {error}") from None
    print(f"wrote {arguments.run / 'report.html'}")


if __name__ == "__main__":
    main()
