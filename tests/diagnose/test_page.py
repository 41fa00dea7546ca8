"""The whole command on a small run, and its page: in the numbers, in the files, and in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image
from typer.testing import CliRunner

from fd_scale.cli import app
from fd_scale.diagnose.drawing import DARK, LIGHT
from fd_scale.diagnose.launch import launch, watch
from fd_scale.diagnose.report import write
from fd_scale.diagnose.results import Results
from fd_scale.diagnose.session import Request
from fd_scale.diagnose.subjects import DiagnoseError
from fd_scale.diagnose.teller import SILENT, Teller
from fd_scale.run.world import World
from tests.data.pictures import picture
from tests.diagnose.tiny import ALONE

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FIGURES = {
    "attention-distance",
    "head-similarity",
    "average-maps",
    "attention-patterns",
    "landscape-raw",
    "landscape-linear-head",
    "landscape-surface",
    "layer-similarity",
    "token-similarity",
    "spectrum",
    "token-norms",
    "pictures",
    "drift",
    "training",
}


@pytest.fixture(scope="module")
def out(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of the small run, with everything switched on."""
    folder = tmp_path_factory.mktemp("page")
    picture(3, 50, 70).save(folder / "mine & yours.png")
    words = f"diagnose {run} --out {folder / 'out'} --images 20 --landscape-images 4 --surface"
    words += " --directions 2 --points 5"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "0")
            patch.delenv(name)
        done = CliRunner().invoke(app, [*words.split(), "--image", str(folder / "mine & yours.png")])
    assert done.exit_code == 0, done.output
    assert "student, step 6 against teacher: 20 of 40 images" in done.output
    assert not dist.is_initialized()
    return folder / "out"


@pytest.fixture(scope="module")
def page(out: Path) -> str:
    return (out / "report.html").read_text()


def test_every_figure_lies_beside_the_page_in_four_forms(out: Path) -> None:
    found = {path.stem for path in (out / "figures").iterdir()}
    assert found == FIGURES
    for name in FIGURES:
        with (out / "figures" / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        record = json.loads((out / "figures" / f"{name}.json").read_text())
        assert len(rows) == len(record["rows"]) > 0
        assert Image.open(out / "figures" / f"{name}.png").size[0] > 500
        assert (out / "figures" / f"{name}.svg").read_text().startswith("<?xml")


def test_numbers_agree_wherever_they_stand(out: Path, page: str) -> None:
    record = json.loads((out / "report.json").read_text())
    student = next(network for network in record["networks"] if network["role"] == "after")
    assert student["num_images"] == 20
    distances = student["distance"]["blocks.2.attn"]
    with (out / "figures" / "attention-distance.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == "student, step 6"]
    deepest = [float(row["distance, px"]) for row in rows if row["layer"] == "blocks.2.attn"]
    assert deepest == distances["per_head_px"]
    spread = next(h for h in record["headlines"] if h["name"] == "Spread of heads, deep layers")
    assert spread["after"] == pytest.approx(np.std(deepest))
    assert f'<span class="after">{spread["after"]:.2f}</span>' in page
    middle = [row for row in record["flatness"] if row["quantity"] == "distillation loss"]
    assert middle[0]["at_zero"] == pytest.approx(record["drift"]["loss"][-1], rel=0.3)
    assert len(record["layer_similarity"]) == 3  # two blocks of the teacher and its final map
    assert "the first 20 of 40, centre view" in page
    assert "the first 4 images, 2 directions of 5 points up to 1" in page


class Reader(HTMLParser):
    """Ids, links and things that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "srcset") or (name.endswith("href") and tag not in ("a", "use")):
                self.loaded.append(value or "")
            elif name == "href" and tag == "a":
                self.links.append(value or "")


def test_the_page_stands_alone_and_its_links_lead_somewhere(out: Path, page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert "<script" not in page
    assert all(loaded.startswith("data:") for loaded in reader.loaded)
    assert not re.search(r"@import|url\((?!#)", page)
    twice = [name for name, count in Counter(reader.ids).items() if count > 1]
    assert not twice
    for link in reader.links:
        assert link.removeprefix("#") in reader.ids if link.startswith("#") else (out / link).is_file()
    for used in re.findall(r"url\(#([^)]+)\)|xlink:href=\"#([^\"]+)\"", page):
        assert "".join(used) in reader.ids


def test_every_figure_says_how_to_read_it(page: str) -> None:
    sections = re.findall(r'<section id="([^"]+)">(.*?)</section>', page, re.DOTALL)
    assert {name for name, _ in sections} == FIGURES | {"flatness"}
    for _, body in sections:
        assert "<b>How to read it.</b>" in body
    assert "mine &amp; yours.png" in page


def test_colours_are_the_pages(page: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    for name, colour in LIGHT.items():
        assert colour not in drawn, name
    assert "var(--before)" in drawn
    assert "var(--after)" in drawn
    assert "var(--ink)" in drawn


def browse(page: Path, scratch: Path, *words: str) -> None:
    """Open a page in a browser of its own, with one action."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={scratch / 'profile'}",
        *words,
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=180)


def hexed(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def share_of(picture: np.ndarray[Any, Any], colour: str) -> float:
    """Of pixels, how many have a colour within rounding."""
    return float((np.abs(picture.astype(int) - hexed(colour)).max(axis=-1) <= 2).mean())


@pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: install one of {', '.join(BROWSERS)}")
def test_a_real_browser_shows_it_light_dark_and_on_paper(out: Path, tmp_path: Path) -> None:
    page = out / "report.html"
    seen = {}
    for mode, colours, scheme in (("light", LIGHT, 1), ("dark", DARK, 0)):
        file = tmp_path / f"{mode}.png"
        browse(
            page,
            tmp_path,
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1200,6000",
            f"--screenshot={file}",
        )
        seen[mode] = np.asarray(Image.open(file).convert("RGB"))
        # Sections are cards of the page's paper; lines, titles and text have the mode's own colours.
        assert share_of(seen[mode], colours["paper"]) > 0.3
        for name in ("ink", "muted", "rule", "before", "after"):
            assert share_of(seen[mode], colours[name]) > 1e-5, (mode, name)
    assert seen["light"].mean() > 200 > 70 > seen["dark"].mean()
    browse(page, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page[^s]", printed)) > 3


def test_a_finished_run_is_followed_to_its_end_at_once(
    run: Path, out: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the parts that the command left: nothing is surveyed again."""
    told: list[str] = []
    request = Request(str(run), out=out, images=20, with_landscape=False)
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}

    def written(results: Results, folder: Path, *, live: bool) -> Path:
        assert not live
        return folder / results.title

    monkeypatch.setattr("fd_scale.diagnose.session.write", written)
    watch(request, world, teller=Teller(told.append), every_s=0.01)
    assert told[-1] == f"page: {out / 'From teacher to student, step 6'}"
    assert before == {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}


def test_a_live_page_looks_again_by_itself(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one difference to a page that stands still."""
    assert 'http-equiv="refresh"' not in page
    monkeypatch.setattr("fd_scale.diagnose.report.sections", lambda _: [])
    monkeypatch.setattr("fd_scale.diagnose.summary.headlines", lambda _: [])
    live = write(Results("x", [], {}), tmp_path, live=True).read_text()
    assert '<meta http-equiv="refresh" content="30">' in live
    assert "live: looks again every 30 s" in live


def test_a_running_job_is_followed_from_checkpoint_to_checkpoint(
    run: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = tmp_path / run.name
    shutil.copytree(run, growing)
    held = {step: growing / "checkpoints" / f"step-{step:08d}" for step in (2, 4, 6)}
    for step, path in held.items():
        path.rename(tmp_path / str(step))
    shown: list[tuple[int, bool]] = []
    told: list[str] = []
    looks = iter([2, 4, 6])

    def diagnosed(request: Request, world: World, *, teller: Teller, live: bool) -> None:
        newest = max(step for step, path in held.items() if path.exists())
        shown.append((newest, live))

    def slept(_: float) -> None:
        step = next(looks)
        (tmp_path / str(step)).rename(held[step])

    monkeypatch.setattr("fd_scale.diagnose.launch.diagnose", diagnosed)
    monkeypatch.setattr("fd_scale.diagnose.launch.time.sleep", slept)
    watch(Request(str(growing)), world, teller=Teller(told.append))
    assert shown == [(2, True), (4, True), (6, False)]
    assert told == [f"{growing} has no checkpoint yet; looking again every 30 s"]


def test_following_needs_a_run(run: Path) -> None:
    with pytest.raises(DiagnoseError, match="--live follows a run's newest checkpoint"):
        watch(Request(str(run), step=4), ALONE, teller=SILENT)
    with pytest.raises(DiagnoseError, match="--live follows a run's newest checkpoint"):
        watch(Request("timm:test_vit@random"), ALONE, teller=SILENT)


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fd_scale.diagnose.launch.diagnose", interrupted)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as ended:
        launch(Request("run"), teller=Teller(told.append))
    assert ended.value.code == 130
    assert told == ["stopped: the same command goes on from what is finished"]
    assert not dist.is_initialized()
