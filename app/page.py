"""The page: fields on the left, the ways to draw and their pictures on the right."""

import secrets
from pathlib import Path

import gradio as gr

from app import view
from app.form import AS_TRAINED, CHOICES, LORA, NOTHING, Form, keys, title
from app.studio import Studio
from app.watch import Glance
from diffusion.sample import ETA, Sampler
from inference.pipeline import HANDOVER

STYLE = Path(__file__).with_name("style.css")
# of sliders; a picture that was drawn with more stretches them
SPANS: dict[str, tuple[float, float]] = {"steps": (1, 150), "guidance": (0, 15), LORA: (-1, 2)}
SMALL = 256  # px: pictures up to here are enlarged with their pixels as they are
PROMPT = "a large purple star in the centre on a white background"
BRUSH = "#e879f9"  # seen on most pictures, and bright: a mask is where it is bright
RESTORED = ("base", "subject", "negative", "seed", "count", "width", "height", "steps", "guidance", "sampler", "grid",
            "rescale", "eta", "negative_scale", "strength", "inpaint_strength", "refine",
            "handover", "aesthetic")  # fmt: skip


def theme() -> gr.themes.Base:
    """Quiet colours, and fonts that machines have: none is fetched."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(primary_hue="indigo", neutral_hue="zinc", font=sans, font_mono=mono, spacing_size="sm").set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_500",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
    )


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio; `launch` takes its theme and style."""
    with gr.Blocks(
        title="Triptych Studio", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
    ) as page:
        gr.HTML(view.header(studio), elem_id="header", padding=False)
        mode, history = gr.State("text"), gr.State([])
        with gr.Row(equal_height=False):
            with gr.Column(scale=0, min_width=390, elem_id="fields"):
                fields, submit, cancel, locked = _settings(studio)
            with gr.Column(min_width=480, elem_id="easel"):
                more, dropped = _modes(studio, mode)
                status = gr.HTML(view.line("Ready."), elem_id="status", padding=False)
                with gr.Column(elem_id="pictures"):
                    live = gr.HTML(elem_id="live", padding=False)
                    gallery = gr.Gallery(
                        label="Pictures of this session", show_label=False, columns=4, fit_columns=False,
                        object_fit="contain", height="max(440px, 100vh - 236px)", format="png", interactive=False,
                        buttons=["download", "fullscreen"], elem_id="gallery",
                        elem_classes="crisp" if studio.pipeline.description.resolution <= SMALL else None,
                    )  # fmt: skip
        fields |= more
        _drawing(studio, fields, mode, locked, history, submit, cancel, (status, live, gallery))
        _restoring(studio, fields, locked, dropped, status)
        empty = [field for field in fields.values() if isinstance(field, gr.Number) and field.value is None]
        if empty:  # gradio's page begins with 0 in their place
            page.load(
                lambda: dict.fromkeys(empty), None, empty, queue=False, show_progress="hidden", api_visibility="private"
            )
    return page


def _settings(studio: Studio):
    """What is asked for and how it is drawn, for every mode: fields, what starts, what stops, the lock of the seed."""
    described = studio.pipeline.description
    config = described.sampler
    fields: dict[str, gr.components.Component] = {"base": gr.State(config)}
    if studio.by_class:
        fields["subject"] = gr.Number(
            0, label="Class", precision=0, minimum=0, maximum=(described.num_classes or 1) - 1, elem_id="subject"
        )
    else:
        fields["subject"] = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=6, elem_id="subject", autofocus=True)
        fields["negative"] = gr.Textbox(
            label="Negative prompt", lines=1, max_lines=4, placeholder="what to stay away from"
        )
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
        cancel = gr.Button("Cancel", scale=1, min_width=90, elem_id="cancel")
    triggers = [draw.click] if studio.by_class else [draw.click, fields["subject"].submit]
    with gr.Row():
        fields["seed"] = gr.Number(0, label="Seed", precision=0, scale=3, min_width=120, elem_id="seed")
        locked = gr.Checkbox(False, label="Keep", scale=0, min_width=110, elem_id="lock")
    with gr.Row():
        trained, unit = described.resolution, studio.unit
        fields["count"] = gr.Number(1, label="Pictures", precision=0, min_width=80, elem_id="count")
        fields["width"] = gr.Number(trained, label="Width", precision=0, step=unit, min_width=80, elem_id="width")
        fields["height"] = gr.Number(trained, label="Height", precision=0, step=unit, min_width=80, elem_id="height")
    fields["steps"] = gr.Slider(*SPANS["steps"], config.steps, step=1, label="Steps", elem_id="steps")
    fields["guidance"] = gr.Slider(*SPANS["guidance"], config.guidance, step=0.1, label="Guidance", elem_id="guidance")
    fields |= _adapted(studio)
    with gr.Accordion("Sampler", open=False, elem_id="sampler"):
        with gr.Row():
            fields["sampler"] = gr.Dropdown(CHOICES["sampler"], value=config.name.name, label="Sampler", min_width=120)
            grid = config.grid.name if config.grid else AS_TRAINED
            fields["grid"] = gr.Dropdown(CHOICES["grid"], value=grid, label="Grid of times", min_width=120)
        fields["rescale"] = gr.Slider(0, 1, config.rescale, step=0.05, label="Guidance rescale")
        with gr.Row():
            fields["eta"] = gr.Number(
                config.eta, label="Eta", placeholder="the sampler's own", min_width=120, interactive=config.name in ETA
            )
            if not studio.by_class:
                fields["negative_scale"] = gr.Number(
                    config.negative_scale, label="Negative scale", placeholder="as guidance", min_width=120
                )
    fields["sampler"].change(
        _own_eta, [fields["sampler"], fields["eta"]], fields["eta"], queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    return fields, triggers, cancel, locked


def _adapted(studio: Studio):
    """The weights of LoRAs, and what the refiner is told, where there are any."""
    fields: dict[str, gr.components.Component] = {}
    for name, lora in studio.loras.items():
        label = LORA + title(name) + f" · say “{lora.trigger}”" * bool(lora.trigger)
        span = _reaching(SPANS[LORA], lora.weight)
        fields[LORA + name] = gr.Slider(*span, lora.weight, step=0.05, label=label, elem_classes="lora")
    if studio.refiner:
        whole, described = studio.refiner.description.objective.range[1] == 1, studio.pipeline.description
        with gr.Row():
            fields["refine"] = gr.Checkbox(True, label="Refiner", scale=0, min_width=110, elem_id="refine")
            fields["handover"] = gr.Number(
                None, label="Hand-over", placeholder=f"{HANDOVER}" if whole else AS_TRAINED, step=0.05, scale=1,
                min_width=100, elem_id="handover",
            )  # fmt: skip
            if studio.refiner.conditioner.reads_score:
                fields["aesthetic"] = gr.Number(
                    described.sampler.aesthetic, label="Aesthetic", step=0.5, scale=1, min_width=100
                )
    return fields


def _reaching(span: tuple[float, float], value: float) -> tuple[float, float]:
    return min(span[0], value), max(span[1], value)


def _own_eta(sampler: str, eta: float | None) -> dict:
    """The field of eta, which only samplers that take fresh noise leave open."""
    takes = Sampler[sampler] in ETA
    return gr.update(value=eta if takes else None, interactive=takes)


def _modes(studio: Studio, mode: gr.State):
    """One tab a way to draw: its own fields, and the file whose settings are restored."""
    fields: dict[str, gr.components.Component] = {}
    picture = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"], "buttons": []}
    with gr.Tabs(elem_id="modes"):
        with gr.Tab("From text", id="text") as text:
            dropped = gr.File(
                label="Drop a picture here to restore its settings", file_types=["image"], height=44, elem_id="restore"
            )
        with gr.Tab("From a picture", id="image") as image, gr.Row():
            fields["picture"] = gr.Image(label="Begin from", height=190, elem_id="picture", **picture)
            with gr.Column():
                fields["strength"] = gr.Slider(0, 1, 0.7, step=0.05, label="Strength")
                gr.Markdown("At 0 the picture stays as it is, at 1 nothing of it is left.", elem_classes="hint")
        with gr.Tab("Inpaint", id="inpaint") as inpaint, gr.Row():
            fields["painting"] = gr.ImageEditor(
                label="Paint over what is to be drawn anew", type="filepath", height=320, transforms=(), layers=False,
                sources=["upload", "clipboard"], brush=gr.Brush(colors=[BRUSH], color_mode="fixed"), format="png",
                buttons=[], scale=2, elem_id="painting",
            )  # fmt: skip
            with gr.Column(scale=1):
                fields["mask"] = gr.Image(label="Or a mask: white is drawn anew", height=190, elem_id="mask", **picture)
                fields["inpaint_strength"] = gr.Slider(0, 1, 1, step=0.05, label="Strength")
        with gr.Tab("X/Y grid", id="grid") as table:
            names = keys(studio.by_class, studio.loras)
            with gr.Row():
                fields["x_key"] = gr.Dropdown(names, value="guidance", label="Across", scale=1)
                fields["x_values"] = gr.Textbox("1, 2, 4", label="Values, separated by commas", scale=3)
            with gr.Row():
                fields["y_key"] = gr.Dropdown(names, value=NOTHING, label="Down", scale=1)
                fields["y_values"] = gr.Textbox(label="Values, separated by commas", scale=3)
            if not studio.by_class:
                gr.Markdown(
                    "Of a prompt's values, the first is looked for in the prompt, and each is put in its place.",
                    elem_classes="hint",
                )
        with gr.Tab("Side by side", id="compare") as compare:
            fields["other"] = gr.Textbox(
                studio.compare or "", label="The other checkpoint", interactive=studio.private, elem_id="other",
                placeholder="a run folder, a checkpoint or an exported pipeline on this machine",
            )  # fmt: skip
            fields["other_subject"] = gr.Textbox(
                label="Its prompt or class", placeholder="the same; a class number where it knows classes only"
            )
        with gr.Tab("About", id="about"):
            gr.HTML(view.about(studio), elem_id="about", padding=False)
    for tab in (text, image, inpaint, table, compare):
        tab.select(lambda name=tab.id: name, None, mode, queue=False, show_progress="hidden", api_visibility="private")
    return fields, dropped


def _drawing(studio, fields, mode, locked, history, submit, cancel, shown):
    """Draw and Cancel."""
    status, live, gallery = shown

    def draw(mode, locked, earlier, *values):
        asked = dict(zip(fields, values, strict=True))
        if not locked:
            asked["seed"] = secrets.randbelow(2**31)
        yield {status: view.line("Starting"), fields["seed"]: asked["seed"]}
        try:
            for news in studio.follow(mode, Form.of(asked)):
                if isinstance(news, Glance):
                    yield {status: view.progress(news), live: view.making(news.previews)}
                elif news is None:
                    yield {status: gr.skip()}  # a moment at which Cancel is heard
                else:
                    kept = [(str(drawn.path), drawn.caption) for drawn in news] + earlier
                    shown = gr.Gallery(kept, selected_index=0 if len(news) == 1 else None)  # one alone is shown large
                    yield {status: view.line("Ready."), live: "", gallery: shown, history: kept}
        except Exception as error:
            yield {status: view.line("Nothing was drawn."), live: ""}
            raise gr.Error(view.sentence(error), print_exception=not isinstance(error, ValueError)) from error

    drawing = gr.on(
        submit, draw, [mode, locked, history, *fields.values()], [status, live, gallery, fields["seed"], history],
        show_progress_on=status, show_progress="minimal", concurrency_limit=1, concurrency_id="drawing",
        api_visibility="private",
    )  # fmt: skip
    cancelling = cancel.click(None, cancels=drawing, queue=False, api_visibility="private")
    cancelling.then(  # not at once: glances that are on their way come first
        lambda: (view.line("Cancelled."), ""), None, [status, live], queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip


def _restoring(studio, fields, locked, dropped, status):
    """A picture that is dropped sets every field that it tells of."""
    names = [name for name in fields if name in RESTORED or name.startswith(LORA)]

    def restore(path):
        try:
            known, note = studio.restored(path)
        except ValueError as error:
            raise gr.Error(view.sentence(error), print_exception=False) from error
        if note:
            gr.Warning(view.escape(f"The settings are restored, but {note}."))
        known |= {LORA + name: weight for name, weight in known.pop("loras").items()}
        for name in known:
            if span := SPANS.get(LORA if name.startswith(LORA) else name):
                low, high = _reaching(span, known[name])
                known[name] = gr.update(value=known[name], minimum=low, maximum=high)
        updates = [known[name] if name in known else gr.skip() for name in names]
        return [None, True, view.line("Settings restored; the seed is kept."), *updates]

    dropped.upload(
        restore, dropped, [dropped, locked, status, *(fields[name] for name in names)], queue=False,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
