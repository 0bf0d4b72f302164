"""A page to draw with a checkpoint of any stage. Local unless `--share` is given.

pip install -e ".[app]"
python app/gradio_app.py --checkpoint assets/shapes/pipeline
"""

import argparse
import sys
from dataclasses import replace


def build(checkpoint: str):
    """The page: a prompt (or a class), the sampler's settings, a gallery that fills as pictures come."""
    import gradio as gr

    from diffusion.sample import Sampler
    from inference.pipeline import Pipeline

    pipeline = Pipeline.load(checkpoint)
    settings, by_class = pipeline.description.sampler, pipeline.conditioner.text is None

    def draw(subject, count, seed, steps, guidance, sampler, progress=gr.Progress()):  # noqa: B008 - gradio's way
        chosen = replace(settings, steps=int(steps), guidance=guidance, name=Sampler[sampler])
        pictures = pipeline.generate(
            None if by_class else [subject] * int(count),
            class_ids=[int(subject)] * int(count) if by_class else None,
            seeds=[int(seed) + i for i in range(int(count))],
            sampler=chosen,
            progress=lambda step, z, x0: progress((step + 1, int(steps))),
        )
        return [(picture, f"seed {int(seed) + i}") for i, picture in enumerate(pictures)]

    with gr.Blocks(title="Triptych") as page:
        gr.Markdown(f"## Triptych\n`{checkpoint}` · {pipeline.description.objective.prediction.name} prediction")
        with gr.Row():
            with gr.Column():
                if by_class:
                    subject = gr.Number(
                        0, label="Class", precision=0, maximum=(pipeline.conditioner.num_classes or 1) - 1
                    )
                else:
                    subject = gr.Textbox(
                        "a small red circle above a large blue star on a white background", label="Prompt"
                    )
                count = gr.Slider(1, 16, 4, step=1, label="Pictures")
                seed = gr.Number(0, label="Seed", precision=0)
                steps = gr.Slider(1, 100, settings.steps, step=1, label="Steps")
                guidance = gr.Slider(0, 15, settings.guidance, step=0.5, label="Guidance (1: none)")
                sampler = gr.Dropdown(list(Sampler.__members__), value=settings.name.name, label="Sampler")
                button = gr.Button("Draw", variant="primary")
            gallery = gr.Gallery(label="Pictures", columns=2, object_fit="contain", format="png")
        inputs = [subject, count, seed, steps, guidance, sampler]
        gr.on([button.click, subject.submit], draw, inputs, gallery)
    return page


def main() -> None:
    """Parse, build, serve on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint or exported pipeline")
    parser.add_argument("--share", action="store_true", help="also make a public link")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    try:
        build(options.checkpoint).launch(server_name="127.0.0.1", server_port=options.port, share=options.share)
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[app]"')
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
