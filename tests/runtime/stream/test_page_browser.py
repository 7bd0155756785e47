"""The live page in a real browser: what a person sees, on a screen and on a phone, and when things go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.stream.frame import Scored
from edge_anomaly_runtime.stream.page import LiveView
from edge_anomaly_runtime.stream.sink_images import draw_scored

from .browser import Browser, find_browser
from .live_items import Feed, camera_status, give, live, stream_status

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from edge_anomaly_runtime.stream.page_server import PageServer

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium or Chrome on this machine to look at the page with"
)

# A picture is grey when its filter says so; how it is drawn is the browser's affair.
GREY = "getComputedStyle(document.querySelector('.screen img:not([hidden])')).filter.includes('grayscale(1)')"
ALIVE = f"document.querySelector('.screen img:not([hidden])') && !{GREY}"


def text(selector: str) -> str:
    return f"document.querySelector({selector!r})?.innerText"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(str(PROGRAM), tmp_path_factory.mktemp("browser")) as browser:
        yield browser


class Box:
    """A page served on one port, with what its stream says in `cameras`."""

    def __init__(self, browser: Browser) -> None:
        spec = Preprocess(224, 224)

        def draw(item: Scored) -> Image.Image:
            return draw_scored(item, spec, 0.5)

        self.browser, self.view = browser, LiveView(draw)
        self.cameras: list[dict[str, Any]] = [camera_status()]
        self.feeds: list[Feed] = []
        self.server = self.serve(0)

    def serve(self, port: int) -> PageServer:
        return PageServer(self.view, port=port, status=lambda: stream_status(*self.cameras))

    def feed(self, *cameras: str) -> Feed:
        self.feeds.append(Feed(self.view, *cameras))
        return self.feeds[-1]

    def look(self, *, width: int = 1280, height: int = 900, **more: Any) -> Browser:
        self.browser.events.clear()
        self.browser.window(width, height, **more)
        self.browser.go(f"http://127.0.0.1:{self.server.port}/")
        return self.browser

    def close(self) -> None:
        for feed in self.feeds:
            feed.stop()
        self.server.close()
        self.browser.go("about:blank")


@pytest.fixture
def box(browser: Browser) -> Iterator[Box]:
    box = Box(browser)
    yield box
    box.close()


def test_the_picture_is_shown_and_renewed(box: Box) -> None:
    box.feed()
    page = box.look()
    page.wait_for(ALIVE)
    picture = "document.querySelector('.screen img:not([hidden])')"
    assert page.value(f"[{picture}.naturalWidth, {picture}.naturalHeight]") == [160, 120]
    assert page.value(f"{picture}.clientWidth") > 500
    assert page.value(f"{picture}.alt") == "Camera c0, verdict OK, heat map on top"
    first = page.value(f"{picture}.src")
    page.wait_for(f"{picture}.src !== {first!r} && {ALIVE}")
    assert page.value(text(".camera .state")) == "Live"
    assert page.value(text("#link")) == "Connected"
    assert page.complaints() == []


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        ("OK", "within the limits"),
        ("WARN", "above the warn limit"),
        ("NG", "above the fail limit"),
        ("INVALID", "the picture is black"),
    ],
)
def test_the_verdict_is_said_in_words(box: Box, verdict: Any, why: str) -> None:
    box.feed().verdict = verdict
    page = box.look()
    page.wait_for(f"{text('.word')} === {verdict!r}")
    assert page.value(text(".why")) == why
    page.wait_for(f"document.title === '{verdict} – part'")
    score = {"OK": "0.200", "WARN": "0.600", "NG": "0.900", "INVALID": "–"}[verdict]
    assert page.value(text(".score")).split("\n") == [score, "score", "fails above 0.8"]


def test_the_chart_has_curve_limits_and_marks(box: Box) -> None:
    feed = box.feed()
    page = box.look()
    page.wait_for(ALIVE)
    for feed.verdict in ("NG", "WARN", "INVALID", "OK"):
        page.wait_for(f"{text('.word')} === {feed.verdict!r}")
    feed.is_paused = True
    count = """(() => {
        const canvas = document.querySelector("canvas"), style = getComputedStyle(document.documentElement);
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const rows = {};
        for (const name of ["--curve", "--ng", "--warn", "--invalid"]) {
            const wanted = parseInt(style.getPropertyValue(name).trim().slice(1), 16), perRow = {};
            for (let at = 0; at < data.length; at += 4) {
                if ((data[at] << 16 | data[at + 1] << 8 | data[at + 2]) !== wanted || data[at + 3] < 255) continue;
                const row = Math.floor(at / 4 / canvas.width);
                perRow[row] = (perRow[row] ?? 0) + 1;
            }
            rows[name] = perRow;
        }
        return { width: canvas.width, rows };
    })()"""
    drawn = page.value(count)
    widest = {name: max(rows.values(), default=0) / drawn["width"] for name, rows in drawn["rows"].items()}
    row = {name: int(max(rows, key=lambda at: rows[at])) for name, rows in drawn["rows"].items() if rows}
    assert widest["--ng"] > 0.5  # a whole line
    assert 0.3 < widest["--warn"] < 0.6  # dashes
    assert row["--ng"] < row["--warn"]  # fail is the higher one
    assert sum(drawn["rows"]["--curve"].values()) > 100
    assert sum(drawn["rows"]["--invalid"].values()) > 10
    label = page.value("document.querySelector('canvas').getAttribute('aria-label')")
    assert label.startswith("Scores of camera c0. Last ")
    assert label.endswith("fail limit 0.8, warn limit 0.5")
    assert all(f" {verdict}" in label for verdict in ("NG", "WARN", "INVALID"))
    page.command("Input.dispatchMouseEvent", type="mouseMoved", **page.value(
        "(({left, top}) => ({x: left + 80, y: top + 50}))(document.querySelector('canvas').getBoundingClientRect())"
    ))  # fmt: skip
    page.wait_for(f"/ ago: (OK|NG|WARN|INVALID)/.test({text('.chart figcaption')})")


def test_the_last_bad_parts_are_listed_and_open(box: Box) -> None:
    give(box.view, live(1, "NG"), live(2, "OK"), live(3, "NG", score=1.25))
    page = box.look()
    page.wait_for("[...document.querySelectorAll('.ng li img')].filter((img) => img.naturalWidth === 64).length === 2")
    assert page.value("[...document.querySelectorAll('.ng .value')].map((value) => value.innerText)") == [
        "1.25",
        "0.900",
    ]
    assert page.value("document.querySelector('.ng img').alt.startsWith('NG at ')")
    assert page.value("/[0-9]:[0-9]{2}:[0-9]{2}/.test(document.querySelector('.ng .when').innerText)")
    page.value("document.querySelector('.ng button').click()")
    page.wait_for("document.getElementById('zoom').open && document.getElementById('zoom-picture').naturalWidth === 64")
    assert page.value(text("#zoom-caption")).endswith("camera c0, score 1.25")
    give(box.view, live(4, "NG"))
    page.wait_for("document.querySelectorAll('.ng li').length === 3")


def test_numbers_drift_and_outputs(box: Box) -> None:
    advice = "Clean the lens, then calibrate anew."
    drift = {"state": "drifting", "shift_sigma": -3.42, "spread": 1.6, "ks": 0.41, "n": 900, "advice": advice}
    box.cameras = [
        camera_status(drift=drift),
        camera_status("learning", drift={**drift, "state": "learning", "n": 120, "shift_sigma": None, "advice": ""}),
        camera_status("bare", drift=None, fps=None, age_ms={"p50": None, "p95": None}, drops={}, verdict=None),
    ]
    page = box.look()
    page.wait_for("document.querySelectorAll('.camera').length === 3")
    cards = [
        {
            name: page.value(f"document.querySelectorAll('.camera .{name}')[{index}].innerText").split("\n")
            for name in ("rate", "latency", "drops", "drift", "cover")
        }
        for index in range(3)
    ]
    assert cards[0]["rate"] == ["9.9 per second", "1 000 judged of 1 042"]
    assert cards[0]["latency"] == ["41 ms median", "95 % within 88 ms"]
    assert cards[0]["drops"] == ["42 (4 %)", "replaced by newer: 39", "too old: 3"]
    assert cards[0]["drift"] == ["−3.4 σ drifting", "spread\xa0×\xa01.60 · KS\xa00.41", advice]
    assert cards[1]["drift"][0] == "learning (120 frames)"
    assert [cards[2][name][0] for name in ("rate", "latency", "drops", "drift")] == ["–", "–", "none", "not watched"]
    assert cards[2]["cover"] == ["Waiting for a picture"]
    assert page.value(text("#sinks")) == "mqtt://broker: failing, 990 written, 10 dropped"
    assert "Running for 26 h 3 min, since " in page.value(text("#uptime"))
    assert page.complaints() == []


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_shows_it_without_scrolling_sideways(box: Box, tmp_path: Path, width: int) -> None:
    names = ["c0", "a_camera_with_a_long_name_and_no_space_anywhere_in_it", "the third camera, at the oven"]
    long = {"advice": "W" * 90, "state": "drifting", "shift_sigma": 12345.6, "spread": 1.0, "ks": 1.0, "n": 1}
    box.cameras = [camera_status(name, cause="x" * 90, captured=10**12, drift=long) for name in names]
    box.cameras[1] |= {"state": "lost"}
    give(box.view, *(live(seq, "NG", camera=name, score=123456.7) for name in names for seq in range(12)))
    page = box.look(width=width, height=740, phone=True)
    page.wait_for("document.querySelectorAll('.ng li').length === 36")
    assert page.value("innerWidth") == page.value("document.documentElement.scrollWidth") == width
    beyond = f"""[...document.querySelectorAll("body *")].filter((element) => !element.closest(".ng ol, dialog")
        && element.getBoundingClientRect().right > {width}).map((element) => element.outerHTML)"""
    assert page.value(beyond) == []
    assert page.value("document.querySelector('.camera').clientWidth") > width - 40
    strip = "document.querySelector('.ng ol')"
    assert page.value(f"({strip}.scrollLeft = 200, {strip}.scrollLeft)") == 200
    page.screenshot(tmp_path / "phone.png")
    assert Image.open(tmp_path / "phone.png").width == 2 * width


def test_dark_and_light(box: Box, tmp_path: Path) -> None:
    corners = []
    for dark in (False, True):
        page = box.look(dark=dark)
        page.wait_for("document.querySelectorAll('.camera').length === 1")
        page.screenshot(tmp_path / "page.png", whole=False)
        with Image.open(tmp_path / "page.png") as picture:
            corners.append(picture.convert("L").getpixel((4, 4)))
    assert corners == [255, pytest.approx(28, abs=3)]


def test_everything_has_a_name_for_those_who_cannot_see_it(box: Box) -> None:
    box.feed("c0", "c1").verdict = "NG"
    box.cameras.append(camera_status("c1"))
    page = box.look()
    page.wait_for("document.querySelectorAll('.ng li').length > 4")
    page.command("Accessibility.enable")
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]
    named = [
        node for node in nodes if not node["ignored"] and node["role"]["value"] in ("image", "button", "link", "dialog")
    ]
    assert len(named) > 8
    assert [node for node in named if not node.get("name", {}).get("value")] == []


# ---- nothing old may look alive --------------------------------------------------------------------------------------


def is_out(page: Browser, cover: str) -> None:
    # The verdict and the picture are of two frames: one may be too old a moment before the other.
    page.wait_for(f"{GREY} && {text('.cover')}.includes({cover!r}) && {text('.word')} === 'No verdict'")
    assert page.value(f"/This picture is [0-9.]+ s old/.test({text('.cover')})")
    assert page.value(text(".why")).startswith("last was OK, ")
    assert page.value(text(".score")).startswith("–")
    page.wait_for("['No verdict', 'No connection'].includes(document.title.split(' – ')[0])")


def test_a_box_that_does_not_answer_is_shown_as_such_until_it_is_back(box: Box) -> None:
    box.feed()
    page = box.look()
    page.wait_for(ALIVE)
    assert page.value("document.getElementById('alarm').hidden")
    port = box.server.port
    box.server.close()
    is_out(page, "No connection to the box")
    page.wait_for(f"{text('#alarm')} === 'No connection to the box. What you see is old.'")
    assert page.value(text("#link")).startswith("No connection for ")
    assert page.value(text(".camera .state")) == "Not known"
    before = page.value(text(".cover"))
    page.wait_for(f"{text('.cover')} !== {before!r}")
    box.server = box.serve(port)
    page.wait_for(f"{ALIVE} && {text('.word')} === 'OK' && document.getElementById('alarm').hidden")


def test_a_box_that_hangs_is_noticed_too(box: Box) -> None:
    """The connection stands, but no answer comes any more."""
    box.feed()
    page = box.look()
    page.wait_for(ALIVE)
    page.value("(window.fetch = () => new Promise(() => {}), 0)")
    is_out(page, "No connection to the box")


def test_frames_that_stop_are_noticed_though_the_camera_is_up(box: Box) -> None:
    feed = box.feed()
    page = box.look()
    page.wait_for(ALIVE)
    feed.is_paused = True
    is_out(page, "No new picture")
    assert page.value(text("#link")) == "Connected"
    assert page.value(text(".camera .state")) == "No new frames"
    feed.is_paused = False
    page.wait_for(f"{ALIVE} && {text('.word')} === 'OK'")


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ("stalled", "No pictures come"),
        ("lost", "Camera lost: connection refused"),
        ("unauthorised", "Camera refuses access: connection refused"),
        ("ended", "Ended"),
        ("connecting", "Connecting"),
    ],
)
def test_a_camera_that_is_not_up_is_shown_as_such(box: Box, state: str, shown: str) -> None:
    box.feed()
    page = box.look()
    page.wait_for(ALIVE)
    box.cameras = [camera_status(state=state, cause="connection refused")]
    is_out(page, shown)


def test_a_slow_camera_is_not_called_dead_between_two_frames(box: Box) -> None:
    """A frame every 1.5 s, the last one 4 s ago: late, but by less than four of its own gaps."""
    from dataclasses import replace

    for seq in range(10):
        item = live(seq)
        age_ns = int((4 + 1.5 * (9 - seq)) * 1e9)
        give(box.view, replace(item, frame=replace(item.frame, captured_ns=item.frame.captured_ns - age_ns)))
    page = box.look()
    page.wait_for(f"{text('.word')} === 'OK'")
    page.wait_for(f"{text('.word')} === 'No verdict'")
    assert page.value("cameras.get('c0').ages().verdict") == pytest.approx(6.2, abs=0.7)


def test_too_many_pages_are_told_so(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_anomaly_runtime.stream.page_server._VIEWERS", 0)
    page = box.look()
    page.wait_for(f"{text('#alarm')} === 'Too many pages are open on this box: close one.'")


def test_the_token_is_typed_once_and_no_script_can_read_it(box: Box) -> None:
    box.feed()
    box.server.close()
    box.server = PageServer(box.view, port=0, token="s3cret & long", status=stream_status)
    page = box.look()
    page.wait_for("document.querySelector('input[name=token]')")
    assert page.value("document.querySelector('label').innerText") == "Token"
    page.value("(document.querySelector('input').value = 's3cret & long', document.querySelector('button').click())")
    page.wait_for(f"typeof cameras !== 'undefined' && {ALIVE}")
    assert page.value("location.href") == f"http://127.0.0.1:{box.server.port}/"
    assert page.value("document.cookie") == ""
    assert "s3cret" not in page.value("document.documentElement.outerHTML")
    page.go(f"http://127.0.0.1:{box.server.port}/")
    page.wait_for(f"typeof cameras !== 'undefined' && {ALIVE}")


def test_an_updated_box_renews_the_page(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.feed()
    page = box.look()
    page.wait_for(ALIVE)
    page.value("(window.isOldPage = true, 0)")
    port = box.server.port
    box.server.close()
    monkeypatch.setattr("edge_anomaly_runtime.stream.page_server._version", lambda files: "other")
    box.server = box.serve(port)
    page.wait_for(f"window.isOldPage === undefined && {ALIVE}")


def test_nothing_that_a_name_holds_becomes_part_of_the_page(box: Box) -> None:
    name = '<img src=x onerror="window.isTaken=1">'
    box.cameras = [camera_status(name, state="lost", cause=name)]
    give(box.view, live(0, "NG", camera=name))
    page = box.look()
    page.wait_for("document.querySelectorAll('.ng li').length === 1")
    assert page.value(text(".camera .name")) == name
    assert page.value("window.isTaken") is None
