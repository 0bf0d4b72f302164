"""A page to draw with a checkpoint of any stage, on this machine alone unless `--share` is given.

pip install -e ".[app]"
python app/gradio_app.py --checkpoint assets/shapes/pipeline
python app/gradio_app.py --checkpoint outputs/stage3 --compare outputs/stage1
python app/gradio_app.py --checkpoint outputs/stage3 --lora style.safetensors:0.7 --lora outputs/figure:0.5
"""

import argparse
import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence


def main() -> None:
    """Parse, open the checkpoints, serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint or exported pipeline")
    parser.add_argument("--compare", metavar="CHECKPOINT", help="another one, to draw side by side with")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE:WEIGHT", help="may be repeated")
    parser.add_argument("--refiner", metavar="CHECKPOINT", help="one that draws the last steps")
    parser.add_argument("--share", action="store_true", help="also make a public link, which anyone who has it may use")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # by the way that clears the temporary folder
    try:
        given = {"loras": options.lora, "refiner": options.refiner}
        serve(options.checkpoint, options.compare, **given, port=options.port, share=options.share)
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[app]"')
    except (ValueError, OSError) as error:  # gradio's word for a port that is taken is an OSError
        sys.exit(f"error: {error}")


def serve(
    checkpoint: str, compare: str | None = None, *, loras: Sequence[str] = (), refiner: str | None = None,
    port: int = 7860, share: bool = False, block: bool = True,
):  # fmt: skip
    """Open the checkpoints and serve their page; returns (page, address), at once unless `block`."""
    folder = tempfile.mkdtemp(prefix="triptych-studio-")  # readable by us alone, unlike gradio's own choice
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}  # before gradio is imported
    from app.page import STYLE, build, theme
    from app.studio import Studio
    from inference.lora import parse_lora

    files = [parse_lora(text) for text in loras]
    studio = Studio(checkpoint, compare, folder=folder, private=not share, loras=files, refiner=refiner)
    page = build(studio).queue(api_open=False, max_size=32)
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port, share=share, prevent_thread_lock=not block,
        theme=theme(), css_paths=STYLE, footer_links=[], run_history=False, mcp_server=False, ssr_mode=False,
        enable_monitoring=False, allowed_paths=[], max_file_size="64mb", app_kwargs={"middleware": sealed()},
    )  # fmt: skip
    return page, address


def sealed() -> list:
    """Middleware that lets the page's browser, and the server on a visitor's behalf, speak to nobody else."""
    from starlette.middleware import Middleware

    return [Middleware(Sealed)]


class Sealed:
    """Forbid the browser all origins but ours, and refuse gradio's way to have the server fetch an address."""

    POLICY = (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
        " style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
    )

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def sending(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY.encode())]
            await send(message)

        if scope["type"] == "http" and "/file=http" in scope["path"]:
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("not fetched", status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, sending)


if __name__ == "__main__":
    main()
