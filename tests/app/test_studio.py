"""The Studio: its page in a real browser, what its server gives away, and the drawing behind the tabs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="the app extra is not installed")

from gradio.components import Component

from app.form import Form
from app.gradio_app import serve
from app.page import build
from app.studio import Drawn, Studio
from app.watch import Glance, Watch
from data import shapes
from diffusion.sample import Sampler
from diffusion.timesteps import Grid
from inference.description import Description, SamplerConfig
from inference.picture import Settings, read_settings, save_picture
from inference.pipeline import Pipeline
from models.ccdit import CCDiTConfig
from models.pixart import PixArt
from models.unet import UNetConfig
from models.weights import save_denoiser
from tests.inference.test_lora import draw_factors
from tests.inference.test_lora import write as write_lora

ASSETS = "assets/shapes/pipeline"
PROMPT = "a large blue circle at the top left on a white background"
PATIENCE = 120  # seconds; a picture of 160 steps is slow on a busy machine


# --- the drawing behind the tabs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Studio:
    return Studio(ASSETS, folder=tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def form(studio) -> Form:
    base = studio.pipeline.description.sampler
    return Form(subject=PROMPT, sampler="euler", steps=6, guidance=2.0, seed=3, base=base)


def drawn_by(studio: Studio, mode: str, form: Form, watch: Watch | None = None) -> list[Drawn]:
    """In a thread of its own, as the page draws."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(studio.draw, mode, form, watch or Watch()).result()


def pixels(drawn) -> np.ndarray:
    return np.asarray(Image.open(drawn.path))


def test_a_picture_says_what_made_it_and_restores_the_form(studio, form):
    asked = replace(form, count=2, grid="karras", steps=6, negative="red", negative_scale=0.5, width=96, height=64)
    newest, older = drawn_by(studio, "text", asked)
    assert (newest.caption, older.caption) == ("seed 4", "seed 3")
    known = read_settings(newest.path)
    assert (known.prompt, known.negative, known.seed, known.size) == (PROMPT, "red", 4, [64, 96])
    assert known.sampler == asked.config()
    values, note = studio.restored(str(newest.path))
    assert not note
    again = drawn_by(studio, "text", replace(form, **values))
    assert np.abs(pixels(again[0]).astype(int) - pixels(newest)).max() <= 1  # float order within a batch


def test_a_picture_begun_from_another_keeps_more_of_it_the_weaker_it_is_drawn(studio, form, tmp_path):
    given = shapes.render(shapes.scene(1, 2), 128)
    Image.fromarray(given).save(tmp_path / "given.png")
    far = []
    for strength in (0.2, 0.9):
        asked = replace(form, picture=str(tmp_path / "given.png"), strength=strength)
        drawn = drawn_by(studio, "image", asked)[0]
        far.append(np.abs(pixels(drawn).astype(int) - given).mean())
        assert read_settings(drawn.path).strength == strength
        values, note = studio.restored(str(drawn.path))
        assert values["strength"] == strength
        assert note == "it began from a picture, which must be dropped again"
    assert far[0] < far[1]


def test_inpainting_leaves_what_is_not_painted(studio, form, tmp_path):
    given = shapes.render(shapes.scene(1, 2), 128)
    Image.fromarray(given).save(tmp_path / "given.png")
    strokes = np.zeros((64, 64, 4), np.uint8)  # of half the side: a canvas may have another scale than its picture
    strokes[:, 32:] = (232, 121, 249, 255)
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    painting = {"background": str(tmp_path / "given.png"), "layers": [str(tmp_path / "strokes.png")]}
    drawn = pixels(drawn_by(studio, "inpaint", replace(form, painting=painting))[0]).astype(int)
    kept, anew = (np.abs(drawn - given)[:, half].mean() for half in (slice(0, 56), slice(72, 128)))
    assert kept < 3
    assert anew > 3 * kept
    Image.fromarray(np.full((128, 128), 255, np.uint8)).save(tmp_path / "mask.png")
    whole = drawn_by(studio, "inpaint", replace(form, painting=painting, mask=str(tmp_path / "mask.png")))[0]
    assert np.abs(pixels(whole).astype(int) - given)[:, :56].mean() > 3


def test_a_grid_shows_what_its_cells_draw_alone(studio, form):
    form = replace(form, steps=2)
    asked = replace(form, x_key="guidance", x_values="0, 2", y_key="seed", y_values="3, 4")
    watch = Watch()
    sheet = pixels(drawn_by(studio, "grid", asked, watch)[0])
    assert (watch.done, watch.total) == (8, 8)
    side = 256  # each picture is enlarged twice
    for row, seed in enumerate((3, 4)):
        for column, guidance in enumerate((0.0, 2.0)):
            alone = pixels(drawn_by(studio, "text", replace(form, guidance=guidance, seed=seed))[0])
            y, x = sheet.shape[0] - (2 - row) * (side + 8), sheet.shape[1] - (2 - column) * (side + 8)
            assert (sheet[y : y + side : 2, x : x + side : 2] == alone).all()


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory) -> Path:
    """A small checkpoint conditioned on classes, not trained, of half the resolution."""
    folder = tmp_path_factory.mktemp("checkpoints") / "of_classes"
    folder.mkdir()
    torch.manual_seed(0)
    denoiser = CCDiTConfig(in_channels=8, patch_size=2, hidden=32, depth=1, heads=2, num_classes=48).build()
    torch.nn.init.normal_(denoiser.final.linear.weight)
    save_denoiser(denoiser, folder / "denoiser", "ema")
    described = Description.load(Path(ASSETS))
    replace(described, text=None, num_classes=48, resolution=64).save(folder)
    return folder


def test_a_class_is_a_subject(of_classes, form, tmp_path):
    studio = Studio(str(of_classes), folder=tmp_path)
    drawn = drawn_by(studio, "text", replace(form, subject=7, steps=1))[0]
    assert (pixels(drawn).shape, drawn.settings.class_id, drawn.settings.prompt) == ((64, 64, 3), 7, "")
    values, note = studio.restored(str(drawn.path))
    assert (values["subject"], note) == (7, "")
    with pytest.raises(ValueError, match="class 'red' is no number"):
        drawn_by(studio, "text", replace(form, subject="red"))
    labels = {one.label for one in build(studio).blocks.values() if isinstance(one, Component)}
    assert "Class" in labels
    assert not labels & {"Prompt", "Negative prompt", "Negative scale"}


def test_side_by_side_gives_each_checkpoint_its_own_subject_and_size(studio, of_classes, form, tmp_path):
    form = replace(form, steps=2, width=128, height=128)
    asked = replace(form, other=str(of_classes), other_subject="7")
    sheet = pixels(drawn_by(studio, "compare", asked)[0])
    alone = pixels(drawn_by(studio, "text", form)[0])
    other = Studio(str(of_classes), folder=tmp_path)
    theirs = pixels(drawn_by(other, "text", replace(form, subject=7, width=None, height=None))[0])
    assert (sheet[-264:-8:2, -528:-272:2] == alone).all()
    assert (sheet[-264:-8:4, -264:-8:4] == theirs).all()
    note = studio.restored(str(drawn_by(other, "text", replace(form, subject=7))[0].path))[1]
    assert re.match("it shows a class, which this checkpoint does not know; .* another checkpoint, of_classes", note)


# --- LoRAs and a refiner ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(studio, tmp_path_factory) -> dict[str, Path]:
    """Two LoRAs for the network and an encoder, not trained; one tells its trigger."""
    folder, text = tmp_path_factory.mktemp("loras"), studio.pipeline.conditioner.text
    paths = {}
    for seed, name in enumerate(("style.safetensors", "figure.safetensors")):
        tensors = {}
        for part, module in (("denoiser", studio.pipeline.denoiser), ("text_encoder", text.encoders[0])):
            for layer, (a, b) in draw_factors(module, 0.5, seed=seed).items():
                tensors |= {f"{part}.{layer}.lora_A.weight": a, f"{part}.{layer}.lora_B.weight": 0.4 * b}
        told = {"modelspec.trigger_phrase": "a <b>sks</b> thing"} if seed else None
        paths[name] = write_lora(folder / name, tensors, told)
    return paths


@pytest.fixture(scope="module")
def refiners(studio, tmp_path_factory) -> dict[str, str]:
    """Checkpoints of low noise, not trained: of the studio's kind, and a UNet that is told scores."""
    torch.manual_seed(0)
    unet = UNetConfig(in_channels=8, channels=[16], depths=[0], heads=[1], layers=1, groups=16, text_dim=192,
                      vector_dim=128 + 5 * 256).build()  # fmt: skip
    known, folder = studio.pipeline.description, tmp_path_factory.mktemp("refiners")
    described = replace(known, objective=replace(known.objective, range=[0.0, 0.4]))
    for name, denoiser in (("pixart", PixArt(studio.pipeline.denoiser.config)), ("scored", unet)):
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        (folder / name).mkdir()
        save_denoiser(denoiser, folder / name / "denoiser", "ema")
        described.save(folder / name)
    return {name: str(folder / name) for name in ("pixart", "scored")}


def with_weights(paths: dict[str, Path], *weights: float) -> list[tuple[Path, float]]:
    return list(zip(paths.values(), weights, strict=True))


def generated(pipeline: Pipeline, form: Form, **more) -> np.ndarray:
    """The form's picture by the pipeline that scripts/sample.py draws with."""
    return pipeline.generate([PROMPT], seeds=[form.seed], sampler=form.config(), **more)[0]


def test_weights_are_those_of_a_pipeline_that_was_loaded_with_them(studio, files, form, tmp_path):
    """Of one, of two, after the other checkpoint has drawn, and without any bit for bit what there was before."""
    form = replace(form, steps=3, width=128, height=128)
    ours = Studio(ASSETS, ASSETS, folder=tmp_path, loras=with_weights(files, 0.7, -0.5))
    plain = generated(studio.pipeline, form)

    def drawn(*weights: float) -> np.ndarray:
        return pixels(drawn_by(ours, "text", replace(form, loras=dict(zip(files, weights, strict=True))))[0])

    loaded = {
        weights: generated(Pipeline.load(ASSETS, loras=with_weights(files, *weights)), form)
        for weights in ((1.0, 0.0), (0.7, -0.5))
    }
    assert min(np.abs(one.astype(int) - plain).mean() for one in loaded.values()) > 2
    for weights in ((0.7, -0.5), (1.0, 0.0), (0.7, -0.5)):
        assert (drawn(*weights) == loaded[weights]).all()
    assert (drawn(0, 0) == plain).all()

    asked = replace(form, loras=dict(zip(files, (0.7, -0.5), strict=True)))
    sheet = pixels(drawn_by(ours, "compare", asked)[0])
    assert (sheet[-264:-8:2, -528:-272:2] == loaded[0.7, -0.5]).all()
    assert (sheet[-264:-8:2, -264:-8:2] == plain).all()
    assert (drawn(0.7, -0.5) == loaded[0.7, -0.5]).all()

    asked = replace(form, x_key="LoRA style.safetensors", x_values="0, 1", loras={"figure.safetensors": 0})
    sheet = pixels(drawn_by(ours, "grid", asked)[0])
    assert (sheet[-264:-8:2, -528:-272:2] == plain).all()
    assert (sheet[-264:-8:2, -264:-8:2] == loaded[1.0, 0.0]).all()


def test_a_weight_that_stays_reads_no_file(files, form, tmp_path, monkeypatch):
    ours = Studio(ASSETS, folder=tmp_path, loras=with_weights(files, 0.7, 0.5))
    set_again = []
    monkeypatch.setattr(ours.pipeline, "set_loras", set_again.append)
    asked = replace(form, steps=1, loras={"style.safetensors": 0.7, "figure.safetensors": 0.5})
    for guidance in (1.0, 2.0):
        drawn_by(ours, "text", replace(asked, guidance=guidance))
    assert not set_again
    drawn_by(ours, "text", replace(asked, loras={"style.safetensors": 0.7, "figure.safetensors": 0.0}))
    assert set_again == [[(files["style.safetensors"], 0.7)]]


@pytest.mark.parametrize("name", ["pixart", "scored"])
def test_a_refiner_goes_on_as_in_the_pipeline(studio, refiners, form, tmp_path, name):
    ours = Studio(ASSETS, folder=tmp_path, refiner=refiners[name])
    refiner = Pipeline.load(refiners[name])
    form = replace(form, refine=True)
    found = []
    for changes in ({}, {"handover": 0.9}, {"aesthetic": 1.0}):
        asked = replace(form, **changes)
        drawn = drawn_by(ours, "text", asked)[0]
        assert (pixels(drawn) == generated(studio.pipeline, asked, refiner=refiner, handover=asked.handover)).all()
        assert (drawn.settings.refiner, drawn.settings.handover) == (name, asked.handover)
        found.append(pixels(drawn).astype(int))
    assert (np.abs(found[0] - found[2]).max() > 0) == (name == "scored")
    off = drawn_by(ours, "text", replace(form, refine=False))[0]
    assert off.settings.refiner is None
    assert (pixels(off) == generated(studio.pipeline, form)).all()
    assert min(np.abs(pixels(off) - one).max() for one in found) > 0


def test_a_picture_restores_loras_and_refiner_where_they_are_open(studio, files, refiners, form, tmp_path):
    ours = Studio(ASSETS, folder=tmp_path, loras=with_weights(files, 0.0, 0.0), refiner=refiners["scored"])
    asked = replace(
        form, steps=8, loras={"style.safetensors": 0.7, "figure.safetensors": 0.0},
        refine=True, handover=0.9, aesthetic=3.5,
    )  # fmt: skip
    drawn = drawn_by(ours, "text", asked)[0]
    known = read_settings(drawn.path)
    assert (known.loras, known.refiner, known.handover) == ({"style.safetensors": 0.7}, "scored", 0.9)
    assert known.sampler.aesthetic == 3.5
    values, note = ours.restored(str(drawn.path))
    assert not note
    assert (pixels(drawn_by(ours, "text", replace(form, **values))[0]) == pixels(drawn)).all()
    values, note = studio.restored(str(drawn.path))
    assert (values["loras"], values["refine"]) == ({}, False)
    assert note == (
        "it was drawn with the LoRA style.safetensors, which is not open here;"
        " it was drawn with the refiner scored, which is not open here"
    )
    plain = drawn_by(studio, "text", replace(form, steps=1))[0]
    values, note = ours.restored(str(plain.path))
    assert (values["loras"], values["refine"], note) == (dict.fromkeys(files, 0.0), False, "")


def test_the_page_shows_what_was_given_and_no_more(studio, files, refiners, tmp_path):
    def labels(studio: Studio) -> set:
        return {one.label for one in build(studio).blocks.values() if isinstance(one, Component) and one.label}

    told = {"LoRA style", "LoRA figure · say “a <b>sks</b> thing”", "Refiner", "Hand-over", "Aesthetic"}
    every = with_weights(files, 0.7, 0.5)
    assert labels(Studio(ASSETS, folder=tmp_path, loras=every, refiner=refiners["scored"])) >= told
    assert labels(Studio(ASSETS, folder=tmp_path, refiner=refiners["pixart"])) & told == {"Refiner", "Hand-over"}
    assert not labels(studio) & told


def test_what_does_not_go_with_the_checkpoint_is_refused_at_the_start(files, of_classes, refiners, tmp_path):
    def start(**given) -> Studio:
        return Studio(ASSETS, folder=tmp_path, **given)

    with pytest.raises(ValueError, match="absent is not a .safetensors file; give a LoRA in that format"):
        start(loras=[(tmp_path / "absent", 1.0)])
    with pytest.raises(ValueError, match="style.safetensors names tensors .*; a LoRA for it has names of ours"):
        Studio(str(of_classes), folder=tmp_path, loras=with_weights(files, 1.0, 1.0))
    with pytest.raises(ValueError, match="two files of --lora have the same name, by which pictures tell them"):
        start(loras=2 * with_weights(files, 1.0, 1.0))
    other = tmp_path / "other"
    shutil.copytree(refiners["pixart"], other)
    shutil.copytree("assets/shapes/vae", other / "vae")
    described = Description.load(other)
    vae = other / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-4] + bytes(4))
    replace(described, vae=replace(described.vae, path=str(other / "vae"))).save(other)
    with pytest.raises(ValueError, match="the refiner other was trained with the autoencoder .*; a refiner goes on"):
        start(refiner=str(other))


def test_the_command_says_what_is_wrong_in_one_sentence():
    command = [sys.executable, "app/gradio_app.py", "--checkpoint", ASSETS, "--lora", "style.safetensors:much"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --lora style.safetensors:much does not end in a weight")


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("image", {}, "the picture to begin from is missing"),
        ("inpaint", {}, "the picture to paint anew is missing"),
        ("compare", {}, "the other checkpoint is missing; type its folder, or start the page with --compare"),
        ("compare", {"other": "nowhere"}, "nowhere holds no whole checkpoint"),
        ("text", {"width": 100}, "width=100 must be a multiple of 32"),
        ("text", {"eta": 0.5}, "sampler.eta=0.5 adds noise, but sampler.name=euler takes none"),
        ("grid", {"x_key": "seed", "x_values": ",".join(map(str, range(101)))}, "the grid has 101 x 1 pictures"),
        ("grid", {"x_key": "steps", "x_values": "2, 0"}, "sampler.steps=0 must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(studio, form, mode, changes, message):
    with pytest.raises(ValueError, match=message):
        list(studio.follow(mode, replace(form, **changes)))


def test_pictures_that_are_none_are_refused_without_the_server_s_paths(studio, form, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    blank = tmp_path / "blank.png"
    Image.new("RGB", (64, 64)).save(blank)
    with pytest.raises(ValueError, match="^the picture is not a picture") as caught:
        drawn_by(studio, "image", replace(form, picture=str(tmp_path / "text.png")))
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ValueError, match="the picture does not say how it was made"):
        studio.restored(str(blank))
    painting = {"background": str(blank), "layers": []}
    with pytest.raises(ValueError, match="nothing is marked to be drawn anew"):
        drawn_by(studio, "inpaint", replace(form, painting=painting))
    save_picture(blank, np.zeros((64, 64, 3), np.uint8), Settings(seed=2**60))
    with pytest.raises(ValueError, match="has more digits than a browser keeps"):
        studio.restored(str(blank))


def test_a_shared_page_opens_only_what_it_was_started_with(studio, form, tmp_path):
    shared = Studio(ASSETS, folder=tmp_path, private=False)
    with pytest.raises(ValueError, match=f"opens no folder that is typed; start it with --compare {ASSETS}"):
        drawn_by(shared, "compare", replace(form, other=ASSETS))


def test_leaving_ends_the_drawing_within_a_step(studio, form):
    steps = []
    handle = studio.pipeline.denoiser.register_forward_pre_hook(lambda *_: steps.append(time.monotonic()))
    drawing = studio.follow("text", replace(form, steps=400))
    assert isinstance(next(news for news in drawing if news), Glance)
    drawing.close()
    with studio.lock:  # free again once the drawing has ended
        ended, left = len(steps), time.monotonic()
    time.sleep(0.3)
    handle.remove()
    assert len(steps) == ended < 100
    assert sum(step > left for step in steps) == 0


# --- the server -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(files):
    """With two LoRAs, both off, and a refiner that is the checkpoint itself and so changes nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loras = [f"{path}:0" for path in files.values()]
    page, address = serve(ASSETS, loras=loras, refiner=ASSETS, port=port, block=False)
    yield address.rstrip("/")
    page.close()


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        f"{Path(ASSETS).resolve()}/pipeline.json",
        f"{ASSETS}/pipeline.json",
        f"{ASSETS}/denoiser/ema.safetensors",
        "app/gradio_app.py",
        "../../etc/passwd",
        "http://127.0.0.1/",
        "https://example.com/",
    ],
)
def test_no_file_is_served_but_its_own_pictures(address, path):
    status, body = get(f"{address}/gradio_api/file={path}")
    assert status in (403, 404)
    assert b"root:" not in body
    assert b"objective" not in body


def test_a_path_in_the_place_of_an_upload_is_refused(address):
    """Whoever speaks to the server without the page names a file of ours as the one that was dropped."""
    config = json.loads(get(f"{address}/config")[1])
    restore = next(one for one in config["dependencies"] if any("upload" in target for target in one["targets"]))
    secret = {"path": str(Path("README.md").resolve()), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [secret], "fn_index": restore["id"], "session_hash": "stranger"}
    request = urllib.request.Request(
        f"{address}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).read()
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=stranger", timeout=20) as stream:
        for line in stream:
            message = json.loads(line.removeprefix(b"data: ")) if line.strip() else {}
            if message.get("msg") == "process_completed":
                break
    assert not message["success"]
    assert "Triptych" not in json.dumps(message)


def test_it_is_there_for_this_machine_alone(address):
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert json.loads(get(f"{address}/config")[1])["analytics_enabled"] is False


def test_help_needs_no_heavy_import():
    command = "import sys, app.gradio_app; print({'gradio', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_it_offers_no_interface_beside_the_page(address):
    status, body = get(f"{address}/gradio_api/info")
    assert status != 200 or json.loads(body) == {"named_endpoints": {}, "unnamed_endpoints": {}}


# --- the page ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        if os.environ.get("CI"):
            pytest.fail("CI is set, but Chromium is not installed; apt-get install chromium chromium-driver")
        pytest.skip("Chromium and its driver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = selenium.Chrome(options, selenium.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, address):
    """The page, freshly opened: a session of its own."""
    browser.get(address)
    until(lambda: find(browser, "#draw"))
    return browser


def find(page, selector: str):
    return page.find_elements("css selector", selector)


def until(true):
    """What `true` returns as soon as it is something; an element may be replaced while it is looked at."""
    from selenium.common.exceptions import StaleElementReferenceException

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := true():
                return found
        except StaleElementReferenceException:
            pass
        time.sleep(0.05)
    raise AssertionError(f"nothing came within {PATIENCE} s")


def status(page) -> str:
    return find(page, "#status .prose span")[0].text


def write(page, selector: str, text: object) -> None:
    from selenium.webdriver.common.keys import Keys

    field = find(page, selector)[0]
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(text), Keys.TAB)


def value(page, selector: str) -> str:
    return find(page, selector)[0].get_attribute("value")


def gallery(page) -> list[str]:
    """Addresses of the pictures, newest first."""
    return [one.get_attribute("src") for one in find(page, "#gallery .grid-container img")]


def draw(page) -> list[str]:
    """Press Draw and wait for its end: the pictures of the gallery."""
    before = gallery(page)
    find(page, "#draw")[0].click()
    until(lambda: gallery(page)[: -len(before) or None] and status(page) == "Ready.")
    return gallery(page)


def test_a_prompt_becomes_a_picture_in_the_gallery(page):
    write(page, "#subject textarea", PROMPT)
    write(page, "#steps input[type=number]", 12)
    url = draw(page)[0]
    body = get(url)[1]
    scene = next(one for one in (shapes.scene(5, i, two=0) for i in range(9999)) if shapes.prompt(one) == PROMPT)
    assert shapes.score(scene, shapes.read(np.asarray(Image.open(BytesIO(body)))))["all"]
    known = read_settings(body)
    assert (known.prompt, known.seed, known.sampler.steps) == (PROMPT, int(value(page, "#seed input")), 12)
    assert find(page, "#gallery .caption")[0].text == f"seed {known.seed}"

    second = draw(page)
    assert second[1:] == [url]
    assert read_settings(get(second[0])[1]).seed != known.seed  # not locked: another one
    write(page, "#seed input", known.seed)
    find(page, "#lock input")[0].click()
    third = draw(page)
    assert get(third[0])[1] == body
    assert value(page, "#seed input") == str(known.seed)


def test_cancel_stops_the_computation(page, monkeypatch):
    steps, forward = [], PixArt.forward
    monkeypatch.setattr(PixArt, "forward", lambda *given: steps.append(time.monotonic()) or forward(*given))
    write(page, "#steps input[type=number]", 150)
    find(page, "#draw")[0].click()
    until(lambda: re.match(r"Step \d+ of 150 · about .* left", status(page)) and find(page, "#live img"))
    find(page, "#cancel")[0].click()
    until(lambda: status(page) == "Cancelled.")
    assert not find(page, "#live img")
    time.sleep(1)
    seen = len(steps)
    time.sleep(1)
    assert len(steps) == seen < 150
    assert not gallery(page)
    write(page, "#steps input[type=number]", 2)
    assert len(draw(page)) == 1  # and the next one gets its turn


def test_what_is_brushed_over_is_drawn_anew(page, tmp_path):
    from selenium.webdriver import ActionChains

    given = shapes.render(shapes.scene(1, 2), 128)
    Image.fromarray(given).save(tmp_path / "given.png")
    find(page, "#modes button[role=tab]")[2].click()
    until(lambda: find(page, "#painting canvas"))
    find(page, "#painting input[type=file]")[0].send_keys(str(tmp_path / "given.png"))
    until(lambda: find(page, "#painting button[title='Clear canvas']:not([disabled])"))
    find(page, "#painting button[title=Brush]")[0].click()
    canvas = find(page, "#painting canvas")[0]
    ActionChains(page).move_to_element(canvas).click_and_hold().move_by_offset(10, 10).release().perform()
    write(page, "#steps input[type=number]", 4)
    body = get(draw(page)[0])[1]
    changed = (np.asarray(Image.open(BytesIO(body))) != given).any(-1)
    assert changed[56:72, 56:72].mean() > 0.5
    assert not changed[:16].any()
    assert read_settings(body).mask


def test_a_dropped_picture_restores_its_settings(page, tmp_path):
    sampler = SamplerConfig(
        name=Sampler.dpmpp_2m_sde, grid=Grid.karras, steps=160, guidance=17.57, rescale=0.33, eta=0.5,
        negative_scale=1.5, interval=[0.1, 0.9],
    )  # fmt: skip
    settings = Settings(
        prompt="a small red star, <b>bold</b>", negative="blue", seed=1234567890123, size=[96, 160], sampler=sampler
    )
    save_picture(tmp_path / "given.png", np.zeros((96, 160, 3), np.uint8), settings)
    find(page, "#sampler > button")[0].click()
    find(page, "#restore input[type=file]")[0].send_keys(str(tmp_path / "given.png"))
    until(lambda: status(page).startswith("Settings restored"))
    assert value(page, "#subject textarea") == settings.prompt
    assert value(page, "#steps input[type=number]") == "160"
    assert value(page, "#seed input") == "1234567890123"
    drawn = read_settings(get(draw(page)[0])[1])
    assert replace(drawn, model="", model_hash="") == settings


def test_a_weight_is_played_with_and_restored(page, files, tmp_path):
    write(page, "#subject textarea", PROMPT)
    write(page, "#steps input[type=number]", 3)
    write(page, "#seed input", 3)
    find(page, "#lock input")[0].click()
    find(page, "#sampler > button")[0].click()  # what is empty there stays so
    bodies = []
    for weight in (0, 1, 0):
        write(page, ".lora input[type=number]", weight)
        bodies.append(get(draw(page)[0])[1])
    assert bodies[0] == bodies[2]
    known = read_settings(bodies[1])
    assert (known.loras, known.refiner, known.handover) == ({"style.safetensors": 1.0}, "pipeline", None)
    assert known.sampler.negative_scale is None
    pipeline = Pipeline.load(ASSETS, loras=with_weights(files, 1.0, 0.0))
    expected = pipeline.generate([PROMPT], seeds=[3], sampler=known.sampler, refiner=Pipeline.load(ASSETS))[0]
    assert (np.asarray(Image.open(BytesIO(bodies[1]))) == expected).all()
    save_picture(tmp_path / "given.png", expected, replace(known, loras={"figure.safetensors": 2.5}, refiner=None))
    find(page, "#restore input[type=file]")[0].send_keys(str(tmp_path / "given.png"))
    until(lambda: status(page).startswith("Settings restored"))
    until(lambda: [one.get_attribute("value") for one in find(page, ".lora input[type=number]")] == ["0", "2.5"])
    assert not find(page, "#refine input")[0].is_selected()
    assert read_settings(get(draw(page)[0])[1]).loras == {"figure.safetensors": 2.5}


def test_an_error_is_a_sentence_and_the_page_goes_on(page):
    write(page, "#width input", 100)
    find(page, "#draw")[0].click()
    toast = until(lambda: [one.text for one in find(page, ".toast-body") if "multiple of 32" in one.text])
    assert "width=100 must be a multiple of 32, the autoencoder's factor times the patch; choose 96" in toast[0]
    until(lambda: status(page) == "Nothing was drawn.")
    write(page, "#width input", 96)
    write(page, "#steps input[type=number]", 2)
    assert len(draw(page)) == 1


def test_every_tab_opens_and_nothing_is_asked_of_other_machines(page, address):
    page.get_log("performance")
    page.refresh()
    until(lambda: find(page, "#draw"))
    for tab in find(page, "#modes button[role=tab]"):
        tab.click()
        until(lambda tab=tab: tab.get_attribute("aria-selected") == "true")
    assert until(lambda: "128 px" in find(page, "#about")[0].text)
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:"))]
