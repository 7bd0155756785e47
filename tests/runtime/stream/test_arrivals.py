"""Late pictures and what piled up behind them are stale, whatever frame rate the stream announces."""

from __future__ import annotations

from itertools import pairwise

from edge_anomaly_runtime.stream.arrivals import Arrivals
from edge_anomaly_runtime.stream.backoff import Backoff


def stale(waits: list[float], *, pts_step: float | None = None, late_s: float = 0.5) -> list[bool]:
    arrivals = Arrivals(late_s=late_s)
    return [arrivals.is_stale(wait, None if pts_step is None else n * pts_step) for n, wait in enumerate(waits)]


def test_pictures_at_their_pace_are_fresh() -> None:
    assert not any(stale([0.04] * 50))


def test_a_late_picture_and_the_backlog_behind_it_are_stale() -> None:
    found = stale([0.04] * 20 + [3.0, 0.001, 0.002, 0.015, 0.04, 0.04])

    assert found[20:] == [True, True, True, True, False, False]


def test_what_piled_up_during_the_connection_is_stale() -> None:
    assert stale([0.001, 0.001, 0.001, 0.035, 0.001, 0.04], pts_step=0.04) == [True, True, True, False, False, False]


def test_a_wrong_announced_rate_drops_nothing() -> None:
    assert not any(stale([0.1] * 40, pts_step=0.001))
    assert not any(stale([0.04] * 40, pts_step=1.0)[1:])


def test_a_slow_camera_is_not_late() -> None:
    """One picture every two seconds; the first wait tells nothing yet."""
    assert not any(stale([0.1] * 3 + [0.3] * 3 + [0.49] * 10 + [0.9, 1.5, 0.9]))
    assert not any(stale([2.0] * 20, late_s=0.5)[6:])


def test_a_pause_of_a_common_camera_around_its_key_frames_is_no_fault() -> None:
    assert not any(stale(([0.04] * 24 + [0.45]) * 4))


def test_bunches_never_starve_the_reader() -> None:
    found = stale(([0.4] + [0.0005] * 3) * 30)

    assert sum(found) < len(found) / 2


def test_waits_double_up_to_the_cap_and_begin_anew() -> None:
    backoff = Backoff(0.5, 30.0, seed=1)
    waits = [backoff.next_s() for _ in range(9)]

    for wait, full in zip(waits, [0.5, 1, 2, 4, 8, 16, 30, 30, 30], strict=True):
        assert 0.75 * full <= wait <= full
    assert len({wait / full for wait, full in zip(waits[6:], [30, 30, 30], strict=True)}) == 3
    assert all(first < second for first, second in pairwise(waits[:6]))

    backoff.reset()
    assert backoff.next_s() <= 0.5
