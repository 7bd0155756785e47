"""Pictures within a byte budget: what is kept, what goes first, what is never touched."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_anomaly_runtime.preprocess import Preprocess
from edge_anomaly_runtime.stream import sink_images
from edge_anomaly_runtime.stream.frame import Scored
from edge_anomaly_runtime.stream.sink import ItemLost, SinkThread
from edge_anomaly_runtime.stream.sink_images import ImagesSink, draw_scored, file_part

from .scored_items import scored


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def keep(sink: ImagesSink, *items: Scored) -> None:
    sink.open()
    for item in items:
        if sink.wants(item):
            sink.write(item)
    sink.close()


def test_bad_parts_are_kept_with_time_camera_and_verdict_in_their_names(tmp_path: Path) -> None:
    keep(ImagesSink(tmp_path / "ng"), *(scored(seq, "NG" if seq == 3 else "OK") for seq in range(6)))
    assert names(tmp_path / "ng") == ["00000001-20261121T101502114Z-c0-NG.jpg"]
    assert Image.open(next((tmp_path / "ng").iterdir())).size == (64, 48)


def test_every_nth_frame_is_kept_besides(tmp_path: Path) -> None:
    keep(ImagesSink(tmp_path, every=4), *(scored(seq, "NG" if seq == 1 else "OK") for seq in range(9)))
    assert [name.split("-")[-1] for name in names(tmp_path)] == ["NG.jpg", "OK.jpg", "OK.jpg"]


def test_the_plain_picture_is_kept_without_loss(tmp_path: Path) -> None:
    item = scored(5, "NG")
    keep(ImagesSink(tmp_path, kind="both", draw=lambda item: draw_scored(item, Preprocess(16, 16), 0.5)), item)
    overlay, plain = sorted(tmp_path.iterdir())
    assert np.array_equal(np.asarray(Image.open(plain)), item.frame.pixels)
    assert not np.array_equal(np.asarray(Image.open(overlay)), item.frame.pixels)


def test_a_frame_without_a_map_is_drawn_plain() -> None:
    item = scored(0, "INVALID")
    result = type(item.result)("INVALID", None, None, None)
    plain = draw_scored(Scored(item.frame, result, item.record), Preprocess(16, 16), 0.5)
    assert np.array_equal(np.asarray(plain), item.frame.pixels)


def test_the_oldest_go_first_and_the_budget_holds_across_restarts(tmp_path: Path) -> None:
    keep(ImagesSink(tmp_path), scored(0, "NG"))
    size = next(tmp_path.iterdir()).stat().st_size
    budget = int(size * 4.5)
    for start in (1, 11):
        keep(ImagesSink(tmp_path, budget_bytes=budget), *(scored(seq, "NG") for seq in range(start, start + 10)))
        total = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert total <= budget
    assert [name[:8] for name in names(tmp_path)] == ["00000018", "00000019", "00000020", "00000021"]
    ImagesSink(tmp_path, budget_bytes=size + 1).open()
    assert [name[:8] for name in names(tmp_path)] == ["00000021"]


def test_other_files_in_the_folder_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    others = ["holiday.jpg", "00000001.jpg", "0000001-20261121T101502114Z-c0-NG.jpg.bak", ".tmp-mine"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(100_000))
    leftover = tmp_path / ".tmp-00000009-20261121T101502114Z-c0-NG.jpg-77-0011aabb"
    leftover.write_bytes(b"half")
    keep(ImagesSink(tmp_path, budget_bytes=5000), *(scored(seq, "NG") for seq in range(30)))
    assert set(others) < set(names(tmp_path))
    assert not leftover.exists()


def test_a_file_that_somebody_removed_is_no_error(tmp_path: Path) -> None:
    sink = ImagesSink(tmp_path, budget_bytes=3000)
    sink.open()
    for seq in range(20):
        sink.write(scored(seq, "NG"))
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("camera", "part"),
    [
        ("../../etc/cron", "______etc_cron"),
        ("", "_"),
        (".hidden", "_hidden"),
        ("a\0b\nc", "a_b_c"),
        ("x" * 300, "x" * 64),
    ],
)
def test_camera_names_cannot_leave_the_folder(tmp_path: Path, camera: str, part: str) -> None:
    assert file_part(camera) == part
    keep(ImagesSink(tmp_path / "ng"), scored(0, "NG", camera=camera))
    assert names(tmp_path) == ["ng"]
    assert names(tmp_path / "ng") == [f"00000001-20261121T101502114Z-{part}-NG.jpg"]


def test_a_picture_beyond_the_budget_is_lost_and_nothing_else_is(tmp_path: Path) -> None:
    sink = ImagesSink(tmp_path, budget_bytes=2000)
    keep(sink, scored(0, "NG"))
    kept = names(tmp_path)
    noise = scored(1, "NG")
    noise.frame.pixels[:] = np.random.default_rng(0).integers(0, 255, noise.frame.pixels.shape)
    with pytest.raises(ItemLost, match="more than the budget"):
        sink.write(noise)
    assert names(tmp_path) == kept


def test_a_full_disk_gives_up_the_oldest_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = ImagesSink(tmp_path)
    keep(sink, *(scored(seq, "NG") for seq in range(5)))
    real = os.fsync

    def full(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode) and len(list(tmp_path.glob("0*"))) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    told: list[str] = []
    thread = SinkThread(sink, warn=told.append)
    thread.put(scored(5, "NG"))
    assert thread.close(5.0)
    assert told == []
    assert [name[:8] for name in names(tmp_path)] == ["00000003", "00000004", "00000005", "00000006"]


def test_the_draw_function_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    keep(ImagesSink(tmp_path, draw=lambda _: red), scored(0, "NG"))
    assert Image.open(next(tmp_path.iterdir())).size == (8, 8)
    assert sink_images.plain_picture(scored()).size == (64, 48)
