"""Which frames are scored, and what a row of verdicts amounts to."""

from __future__ import annotations

import numpy as np
import pytest

from edge_anomaly_runtime.errors import UsageError
from edge_anomaly_runtime.scoring import Result, Verdict
from edge_anomaly_runtime.stream.policy import Debouncer, FrameGate, FramePolicy, parse_confirm, parse_policy

from .scored_items import frame_of

WARN, FAIL = 10.0, 20.0


def judged(score: float | None) -> Result:
    if score is None:
        return Result("INVALID", None, FAIL, WARN, reason="frozen")
    verdict: Verdict = "NG" if score > FAIL else "WARN" if score > WARN else "OK"
    return Result(verdict, score, FAIL, WARN)


def verdicts(scores: list[float | None], **rules: object) -> str:
    """Return the first letters of the verdicts of a row of scores."""
    debouncer = Debouncer(**rules)  # type: ignore[arg-type]
    return "".join(debouncer.update(judged(score))[0] for score in scores)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("latest", FramePolicy("latest")),
        ("all", FramePolicy("all")),
        ("every:10", FramePolicy("every", 10)),
        ("fps:0.5", FramePolicy("fps", 0.5)),
        ("trigger", FramePolicy("trigger")),
    ],
)
def test_policies_are_read(text: str, policy: FramePolicy) -> None:
    assert parse_policy(text) == policy


@pytest.mark.parametrize(
    "text", ["", "newest", "every", "every:0", "every:1.5", "every:x", "fps:0", "fps:nan", "all:2"]
)
def test_other_policies_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_policy(text)
    assert "every:N" in caught.value.hint


def test_every_third_frame_is_due() -> None:
    gate = FrameGate(parse_policy("every:3"))
    assert [gate.is_due(frame_of(seq)) for seq in range(7)] == [True, False, False, True, False, False, True]


def test_frames_are_thinned_to_a_rate() -> None:
    """25 frames a second to 10: 40 ms apart, so every second or third."""
    gate = FrameGate(parse_policy("fps:10"))
    due = [seq for seq in range(250) if gate.is_due(frame_of(seq))]
    assert len(due) == pytest.approx(100, abs=2)
    assert set(np.diff(due)) <= {2, 3}


def test_a_pause_is_not_made_up_for_by_a_burst() -> None:
    gate = FrameGate(parse_policy("fps:10"))
    late = [frame_of(seq) for seq in (*range(25), *range(250, 275))]
    due = [frame.seq for frame in late if gate.is_due(frame)]
    assert sum(seq >= 250 for seq in due) <= 11


def test_a_trigger_takes_the_next_frame_captured_after_it_and_only_that() -> None:
    gate = FrameGate(parse_policy("trigger"))
    assert not gate.is_due(frame_of(0))
    gate.trigger(frame_of(2).captured_ns - 1)
    assert [gate.is_due(frame_of(seq)) for seq in (1, 2, 3)] == [False, True, False]


@pytest.mark.parametrize("text", ["0/1", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_other_confirmations_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="confirm"):
        parse_confirm(text)


def test_without_rules_every_frame_has_its_own_verdict() -> None:
    assert verdicts([1, 30, 1, 15, None, 1]) == "ONOWIO"


def test_two_of_three_frames_make_an_alarm_and_end_it() -> None:
    assert verdicts([1, 30, 1, 1, 30, 30, 1, 30, 1, 1], confirm=(2, 3)) == "OOOOONNNOO"
    assert verdicts([30, 30], confirm=(2, 3)) == "ON"


def test_what_is_ng_counts_as_warn_as_well() -> None:
    assert verdicts([15, 30, 15], confirm=(2, 3)) == "OWW"


def test_an_invalid_frame_is_told_at_once_and_neither_raises_nor_ends_an_alarm() -> None:
    assert verdicts([30, None, None, None, 30, 30], confirm=(2, 3)) == "OIIINN"
    assert verdicts([30, 30, None, None, None, 1], confirm=(2, 3)) == "ONIIIN"


def test_with_hysteresis_a_score_at_the_limit_does_not_flicker() -> None:
    scores: list[float | None] = [19.0, 20.5, 19.5, 20.5, 18.0, 16.0, 14.9, 9.5, 4.0]
    assert verdicts(scores) == "WNWNWWWOO"
    assert verdicts(scores, hysteresis=0.5) == "WNNNNNWWO"


def test_an_alarm_needs_the_full_limit_whatever_the_hysteresis() -> None:
    assert verdicts([19.9, 19.9], hysteresis=1.0) == "WW"
    assert set(verdicts([9.9] * 3, hysteresis=1.0)) == {"O"}


def test_a_classifier_has_its_own_verdict() -> None:
    debouncer = Debouncer()
    assert [debouncer.update(Result("OK", 3.0, None, None)) for _ in range(2)] == ["OK", "OK"]


def test_the_alarm_rate_of_independent_false_alarms_falls_as_the_binomial_says() -> None:
    """2 of 3 at 5 % a frame: 3 p^2 (1 - p) + p^3 = 0.725 %."""
    generator = np.random.default_rng(0)
    scores = generator.uniform(0, 1, 200_000)
    debouncer = Debouncer((2, 3))
    alarms = sum(debouncer.update(judged(30.0 if score < 0.05 else 1.0)) == "NG" for score in scores)
    assert alarms / len(scores) == pytest.approx(0.00725, rel=0.08)
