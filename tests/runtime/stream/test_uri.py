"""What a user may write as a source, and that no spelling of a password survives in any text."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.stream.uri import parse_source, redact, unique_names

CANARY = "Kan4rie-7"
# What a user, a camera's manual or another program may write; each one holds the canary.
SECRET_FORMS = [
    f"rtsp://admin:{CANARY}@10.0.0.5:554/live",
    f"rtsp://user.name:{CANARY}@10.0.0.5/live",
    f"rtsp://us%40er:{CANARY}@10.0.0.5/live",
    f"rtsp://:{CANARY}@10.0.0.5/live",
    f"rtsp://{CANARY}@10.0.0.5/live",
    f"rtsp://admin:p@{CANARY}@10.0.0.5/live",
    f"rtsp://admin:{CANARY}%40%2F@10.0.0.5/live",
    f"rtsp://admin:{CANARY}@[fe80::1]:554/live",
    f"rtsps://admin:{CANARY}@camera.local:322/live?channel=1",
    f"http://10.0.0.5/video.mjpg?user=admin&password={CANARY}",
    f"https://10.0.0.5/video?access_token={CANARY}&size=2",
    f"http://10.0.0.5/video?usr=a&pwd={CANARY}",
]
# What can only be found in texts, not opened.
TEXT_FORMS = [
    f"admin:{CANARY}@10.0.0.5",
    f"proxy rtsp%3A%2F%2Fadmin%3A{CANARY}%4010.0.0.5%2Flive",
    f"rtsp://admin:p/{CANARY}@10.0.0.5/live",
    f"rtsp://10.0.0.5/user=admin_password={CANARY}_channel=1",
    f"Authorization: Basic {CANARY}",
    f"Bearer {CANARY}.abc",
]


@pytest.mark.parametrize("text", SECRET_FORMS + TEXT_FORMS)
@pytest.mark.parametrize("around", ["{}", "[Errno 111] Connection refused: '{}'", '{{"url": "{}", "n": 1}}', "a {}, b"])
def test_no_form_of_a_password_survives_in_any_text(text: str, around: str) -> None:
    assert CANARY not in redact(around.format(text))


@pytest.mark.parametrize("piece", ["x", "a:", "a@", ":@", ",:", "a://", "pass", "password=", "%3A%2F%2F"])
def test_a_long_line_without_a_secret_takes_no_time(piece: str) -> None:
    start = time.perf_counter()
    redact(piece * (20_000 // len(piece)))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("text", SECRET_FORMS)
def test_a_parsed_source_shows_its_password_nowhere_but_in_its_location(text: str) -> None:
    source = parse_source(text)

    assert CANARY in source.location
    assert CANARY not in source.shown + source.camera + repr(source) + str(source)


@pytest.mark.parametrize("spelled", ["Kan4@rie", "Kan4%40rie", "YWRtaW46S2FuNEByaWU="])
@pytest.mark.parametrize("text", ["rtsp://admin:Kan4@rie@cam/live", "rtsp://admin:Kan4%40rie@cam/live"])
def test_a_source_knows_the_spellings_of_its_own_password(text: str, spelled: str) -> None:
    """Also without a URI around it: plain, percent-encoded, and as the header of a request."""
    assert parse_source(text).redact(f"the server said: bad key {spelled}") == "the server said: bad key ***"


def test_what_holds_no_secret_stays_readable() -> None:
    for text in ("rtsp://10.0.0.5:554/live?channel=1", "at 10:15:02 camera c0 is up", "rtsp://[::1]:554/x: refused"):
        assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "kind", "camera", "live"),
    [
        ("rtsp://10.0.0.5/live", "rtsp", "10.0.0.5", True),
        ("RTSP://Cam.local:8554/live", "rtsp", "cam.local-8554", True),
        ("rtsps://cam/live", "rtsp", "cam", True),
        ("http://cam:8080/video.mjpg", "http", "cam-8080", True),
        ("rtsp://[fe80::1]/live", "rtsp", "fe80-1", True),
        ("0", "v4l2", "video0", True),
        ("/dev/video2", "v4l2", "video2", True),
        ("v4l2:///dev/video0?size=640x480", "v4l2", "video0", True),
        ("csi://1", "csi", "csi1", True),
        ("test://moving?seed=1", "test", "test-moving", True),
        ("test://moving?fps=0", "test", "test-moving", False),
    ],
)
def test_kind_and_name_of_a_camera(text: str, kind: str, camera: str, live: bool) -> None:
    source = parse_source(text)

    assert (source.kind, source.camera, source.live) == (kind, camera, live)


def test_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "line 1.mp4").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")

    video = parse_source(str(tmp_path / "line 1.mp4"))
    assert (video.kind, video.camera, video.live) == ("video", "line-1", False)
    assert parse_source(f"file://{tmp_path}/line%201.mp4").location == video.location
    assert parse_source(str(tmp_path / "a.png")).kind == "images"
    assert parse_source(str(tmp_path)).kind == "images"
    assert parse_source(f"{tmp_path}/*.png").kind == "images"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty"),
        ("rstp://cam/live", "Did you mean 'rtsp'"),
        ("ftp://cam/live", "Unknown source scheme"),
        ("rtsp://", "names no valid host"),
        ("rtsp://cam:port/live", "names no valid host"),
        ("rtsp://[fe80::1/live", "names no valid host"),
        ("csi://front", "names no CSI camera"),
        ("v4l2://video0", "names no video device"),
        ("/nowhere/at/all.mp4", "no file or folder"),
        ("/nowhere/*.png", "No file matches"),
        ("rtsp://${NO_SUCH_VARIABLE}@cam/live", "NO_SUCH_VARIABLE, which is not set"),
    ],
)
def test_what_cannot_be_a_source_is_refused_with_a_next_step(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as refused:
        parse_source(text, environ={})

    assert refused.value.hint


def test_a_refused_source_does_not_show_its_password() -> None:
    for text in (f"rtsp://admin:{CANARY}@cam:port/x", f"rtsp://admin:{CANARY}@[::1/x", f"rtps://a:{CANARY}@cam/x"):
        with pytest.raises(UsageError) as refused:
            parse_source(text)
        assert CANARY not in str(refused.value)


def test_credentials_come_from_the_environment_and_are_quoted() -> None:
    environ = {"USER_1": "us@er", "PW": "p/w?#@ %"}

    source = parse_source("rtsp://${USER_1}:${PW}@10.0.0.5/live", environ=environ)

    assert source.location == "rtsp://us%40er:p%2Fw%3F%23%40%20%25@10.0.0.5/live"
    assert not source.clear_password
    assert source.address == ("10.0.0.5", 554)
    assert "p/w" not in source.redact("wrong password p/w?#@ %")


def test_a_token_from_the_environment_is_hidden_under_any_name() -> None:
    source = parse_source("http://cam/video?x=${TOKEN}", environ={"TOKEN": CANARY})

    assert source.location.endswith(CANARY)
    assert CANARY not in source.redact(f"GET {source.location}")
    assert CANARY not in repr(source)
    assert source.shown == "http://cam/video?x=${TOKEN}"


def test_a_password_spelled_out_is_known_as_such() -> None:
    assert parse_source("rtsp://admin:secret@cam/live").clear_password
    assert not parse_source("rtsp://cam/live").clear_password


def test_names_are_made_unique() -> None:
    sources = [parse_source(text) for text in ("rtsp://cam/1", "rtsp://cam/2", "rtsp://cam/3", "0")]

    assert unique_names(sources) == ["cam", "cam-2", "cam-3", "video0"]
    assert parse_source("0", camera="left door").camera == "left-door"
