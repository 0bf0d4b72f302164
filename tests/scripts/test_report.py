"""The report says what the run folders say, in one page that needs nothing else."""

import html
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import shapes

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "report.py"
spec = importlib.util.spec_from_file_location("report", SCRIPT)
assert spec
assert spec.loader
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report  # dataclasses look their module up
spec.loader.exec_module(report)

PREDICTIONS = {"stage1": "eps", "stage2": "v", "stage3": "flow"}
NAUGHTY = 'a <b>red</b> circle & "two" stars'


def fake_samples(folder: Path, rng, resolution: int, images: int, progress: float, captioned) -> dict:
    """A grid of pictures that come out of noise as `progress` goes from 0 to 1, and its record."""
    rows = []
    for scene, _ in captioned:
        clean = shapes.render(scene, resolution).astype(float)
        coarse = rng.normal(128, 70, (8, 8, 3)).repeat(resolution // 8, 0).repeat(resolution // 8, 1)
        rows.append(progress * clean + (1 - progress) * coarse + rng.normal(0, 8 * (1.1 - progress), clean.shape))
    grid = np.concatenate([np.concatenate(rows[i : i + 4], 1) for i in range(0, len(rows), 4)], 0)
    path = f"samples/{images:09d}.png"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.clip(0, 255).astype(np.uint8)).save(folder / path)
    prompts = [prompt for _, prompt in captioned]
    return {"kind": "sample", "images": images, "path": path, "prompts": prompts, "columns": 4, "tile": resolution}


def fake_stage(
    run: Path, name: str, *, images: int = 25_600, records: int = 120, last_prompt: str | None = None
) -> Path:
    """A run folder as training leaves it."""
    rng, folder = np.random.default_rng(len(name) + images), run / name
    (folder / "samples").mkdir(parents=True)
    resolution, prediction = (64 if name == "stage1" else 128), PREDICTIONS[name]
    (folder / "config.yaml").write_text(
        f"name: demo/{name}\nobjective: {{prediction: {prediction}, zero_terminal: {str(prediction == 'v').lower()}}}\n"
        f"data: {{resolution: {resolution}}}\n"
    )
    scenes = [shapes.scene(7, i, two=0 if name == "stage1" else i % 2) for i in range(8)]
    plain = [f"{s.things[0].colour} {s.things[0].shape}" if name == "stage1" else shapes.prompt(s) for s in scenes]
    captioned = list(zip(scenes, [*plain[:-1], last_prompt or plain[-1]], strict=True))
    slope = {"eps": [0.6, 0.3, 0.15, 0.09, 0.06, 0.04, 0.025, 0.015, 0.01, 0.006]}.get(
        prediction, [0.34, 0.25, 0.18, 0.14, 0.11, 0.1, 0.1, 0.12, 0.16, 0.22]
    )
    lines = []
    for step in range(1, records + 1):
        seen = images * step // records
        loss = (0.09 + 0.9 * np.exp(-9 * step / records)) * np.exp(rng.normal(0, 0.12))
        bins = [None if rng.random() < 0.1 else float(b * np.exp(rng.normal(0, 0.2))) for b in slope]
        weighted = loss if prediction == "flow" else loss * 0.4 * np.exp(rng.normal(0, 0.05))
        speed = 92 + rng.normal(0, 3)
        lines.append(
            {
                "kind": "train",
                "images": seen,
                "step": step,
                "loss": weighted,
                "loss_unweighted": loss,
                "loss_bins": bins,
            }
            | {"grad_norm": 0.4, "lr": 1e-3, "images_per_s": speed, "seconds": seen / 92, "rss_mb": 900 + step}
        )
        if step % (records // 6) == 0:
            lines.append(fake_samples(folder, rng, resolution, seen, min(1.0, (step / records) ** 0.5), captioned))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = {"colour": 0.994, "shape": 0.961, "size": 0.937, "background": 1.0}
    if name == "stage1":
        exam = {"class_accuracy": 0.969, "count": 384, "seconds": 9.1}
    else:
        two = {"prompt_accuracy": 0.703, "attributes": kinds | {"size": 0.82, "relation": 0.97}, "count": 256}
        exam = {"prompt_accuracy": 0.898, "attributes": kinds | {"place": 0.969}, "two_objects": two, "count": 256}
    (folder / "evaluation.json").write_text(json.dumps(exam))
    return folder


def fake_run(run: Path, **options) -> Path:
    for name in PREDICTIONS:
        fake_stage(run, name, **options)
    commands = [
        ("shards", "python scripts/prepare.py shapes path=data/shapes", 48.0, 700.0),
        ("stage1", "python train_stage1.py name=demo/stage1 experiment=demo", 301.5, 1100.0),
        ("reparameterize", "python reparameterize.py outputs/demo/stage1 outputs/demo/stage1-v", 4.2, 400.0),
        ("stage2", 'python train_stage2.py name=demo/stage2 "init.from=outputs/demo/stage1-v" && true', 322.0, 1300.5),
        ("stage3", "python train_stage3.py name=demo/stage3 init.from=outputs/demo/stage2", 320.0, 1250.0),
    ]
    keys = ("name", "command", "seconds", "peak_rss_mb")
    (run / "commands.json").write_text(json.dumps([dict(zip(keys, c, strict=True)) for c in commands]))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = fake_run(tmp_path_factory.mktemp("outputs") / "demo", last_prompt=NAUGHTY)
    report.report(folder)
    return folder


def test_json_holds_the_exams_the_time_and_the_memory(run):
    numbers = json.loads((run / "report.json").read_text())
    stages = numbers["stages"]
    assert stages["stage1"]["class_accuracy"] == 0.969
    assert stages["stage2"]["prompt_accuracy"] == 0.898
    assert stages["stage3"]["two_objects"]["attributes"]["relation"] == 0.97
    assert stages["stage2"]["train"]["images"] == 25_600
    assert numbers["train_seconds"] == pytest.approx(3 * 25_600 / 92)
    assert numbers["peak_rss_mb"] == 1300.5  # of a command: more than any metrics record says
    assert [command["name"] for command in numbers["commands"]][2] == "reparameterize"


def test_final_loss_is_the_mean_of_the_last_tenth(run):
    records = [json.loads(line) for line in (run / "stage2" / "metrics.jsonl").read_text().splitlines()]
    late = [record for record in records if record["kind"] == "train"][-12:]
    train = json.loads((run / "report.json").read_text())["stages"]["stage2"]["train"]
    assert train["loss"] == pytest.approx(np.mean([record["loss"] for record in late]))
    known = [record["loss_bins"][3] for record in late if record["loss_bins"][3] is not None]
    assert train["loss_bins"][3] == pytest.approx(np.mean(known))


def test_page_is_self_contained(run):
    page = (run / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|<link|<script|@import|url\(", re.sub(r"base64,[\w+/=]*", "", page))
    sources = re.findall(r'src="([^"]{0,40})', page)
    assert len(sources) == 3 * (6 + 3 * 8)  # a wing's tiles; and the first, middle and last of every prompt
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_page_says_every_prompt_and_command_escaped(run):
    page = (run / "report.html").read_text()
    assert "<b>red</b>" not in page
    for name in PREDICTIONS:
        records = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        for prompt in next(record for record in records if record["kind"] == "sample")["prompts"]:
            assert f"<figcaption>{html.escape(prompt)}</figcaption>" in page
    for command in json.loads((run / "commands.json").read_text()):
        assert html.escape(command["command"]) in page


def test_page_is_well_formed(run):
    from html.parser import HTMLParser

    class Balance(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed((run / "report.html").read_text())
    assert parser.open == []


def test_one_curve_when_every_weight_is_one(run):
    page = (run / "report.html").read_text()
    assert page.count("polyline class") == 2 * (2 + 2 + 1)  # raw and smoothed; flow's weights are 1
    assert page.count("every weight is 1") == 1


def test_picture_shows_the_stages_last_samples(run):
    picture = Image.open(run / "samples.png")
    assert picture.mode == "RGBA"
    assert picture.getchannel("A").getpixel((0, 0)) == 0
    first = report.tiles(report.read_stage(run / "stage1", []), json.loads(last_sample(run / "stage1")))[0]
    corner = (report.MARGIN, report.MARGIN + 82)
    shown = picture.convert("RGB").crop((*corner, corner[0] + report.TILE, corner[1] + report.TILE)).resize(first.size)
    assert np.abs(np.asarray(shown, float) - np.asarray(first, float)).mean() < 4


def last_sample(folder: Path) -> str:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"sample"' in line][-1]


def test_partial_leaves_out_what_is_missing(tmp_path):
    folder = fake_stage(tmp_path, "stage1", records=12)
    (folder / "evaluation.json").unlink()
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "train", "images": 30000, "lo')  # a line that is being written
    with pytest.raises(ValueError, match=r"no training record of stage2, stage3; .*--partial"):
        report.report(tmp_path)
    numbers = report.report(tmp_path, partial=True)
    assert list(numbers["stages"]) == ["stage1"]
    assert numbers["stages"]["stage1"]["train"]["images"] == 25_600
    assert "Stage 2, Stage 3 still to come" in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "report.html",
        "report.json",
        "samples.png",
    ]


def test_partial_before_anything_is_there(tmp_path):
    assert report.report(tmp_path, partial=True)["stages"] == {}
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "samples.png").exists()


def test_a_run_that_diverged_is_still_reported(tmp_path):
    folder = fake_stage(tmp_path, "stage1", records=12)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"(loss\w*)": (0[.\d]*|\[.*?\])', r'"\1": NaN', text))
    (folder / "metrics.jsonl").write_text(
        (folder / "metrics.jsonl")
        .read_text()
        .replace('"loss_bins": NaN', '"loss_bins": [' + ", ".join(["NaN"] * 10) + "]")
    )
    numbers = report.report(tmp_path, partial=True)
    assert numbers["stages"]["stage1"]["train"]["loss"] is None
    assert "not finite" in (tmp_path / "report.html").read_text()


def test_missing_folder_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "nowhere"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"report.py: .*nowhere is not a folder; give the folder .*\n", done.stderr)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 25_600, [0, 10_000, 20_000]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.31, 0.34, [0.31, 0.32, 0.33, 0.34])],
)
def test_ticks_are_round(low, high, expected):
    assert report.ticks(low, high) == pytest.approx(expected)


def test_log_ticks():
    assert report.log_ticks(0.08, 1.2) == pytest.approx([0.1, 0.2, 0.5, 1])
    assert report.log_ticks(1e-4, 10) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10])
    assert len(report.log_ticks(0.31, 0.34)) >= 3


@pytest.mark.parametrize(("share", "count"), [(0.5, 100), (0.9, 256), (0.0, 20), (1.0, 20)])
def test_interval_ends_where_the_share_seen_is_z_deviations_away(share, count):
    for end in report.wilson(share, count):  # Wilson's definition: |share - p| = z sqrt(p (1 - p) / n)
        assert -1e-12 <= end <= 1 + 1e-12
        assert (share - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / count, abs=1e-12)


def test_percent_rounds_to_hundred_only_if_all_are_right():
    assert [report.percent(x).split("\u202f")[0] for x in (1, 0.99999, 0.969, 0.7031, 0)] == [
        "100",
        "99.9",
        "96.9",
        "70.3",
        "0.0",
    ]
