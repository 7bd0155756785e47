"""Limits that a measurement has to keep; a figure that is missing has not kept its limit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_anomaly_runtime.errors import ArtefactError, UsageError

from .environment import differences
from .harness import SCHEMA, Report
from .scenarios import TOTAL
from .statistics import PERCENTS, samples_needed

# Of a busy machine's statistics these two vary least from run to run.
DEFAULT_RATIOS = {"min": 1.10, "p50": 1.15}
_STATISTICS = ("min", *(f"p{percent:g}" for percent in PERCENTS), "max", "mean")
_FIGURES = ("cpu_ms_per_image", "peak_rss_mb", "images_per_second", "missed")
_ACCURACIES = ("auroc", "accuracy")
_LIMIT = re.compile(r"(?P<name>[a-z][a-z0-9_.]*)=(?P<value>\d+(\.\d+)?)(ms)?")
_LARGER_IS_BETTER = ("images_per_second", *_ACCURACIES)


@dataclass(frozen=True)
class Gate:
    """One limit and what was measured; value None: it is missing, which is a failure."""

    name: str
    value: float | None
    limit: float
    is_floor: bool = False
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the limit is kept."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.is_floor else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.is_floor else "<="
        shown = "missing" if self.value is None else f"{self.value:g}"
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}: {shown} (limit {sign} {self.limit:g}{self.note})"


def parse_limits(texts: Sequence[str], option: str) -> dict[str, float]:
    """Return figures by name from texts such as `p99=25ms`, `infer.p50=3` or `auroc=0.95`.

    Raises:
        UsageError: a text is not of that form.
    """
    limits = {}
    for text in texts:
        found = _LIMIT.fullmatch(text.strip())
        if found is None:
            raise UsageError(
                f"{option} {text} cannot be read.", f"Write NAME=VALUE, for instance {option} p50=25ms or p99=40."
            )
        limits[found["name"]] = float(found["value"])
    return limits


def check_names(names: Sequence[str], runs: int) -> None:
    """Refuse, before anything is measured, figures that do not exist and percentiles that so few runs cannot show.

    Raises:
        UsageError: with what is known, or with the number of runs that it needs.
    """
    for name in names:
        if name in (*_FIGURES, *_ACCURACIES):
            continue
        statistic = _split(name)[1]
        if statistic not in _STATISTICS:
            raise _unknown(name, ())
        if statistic.startswith("p") and runs < samples_needed(float(statistic[1:])):
            raise _too_few(name, statistic, runs)


def figure_of(report: Report, name: str) -> float | None:
    """Return a figure by name: `p99` of the whole image, `infer.p50` of a stage, or one of the report's own.

    Raises:
        UsageError: there is no such figure, or it needs more samples; the message says how many.
    """
    if name in _FIGURES:
        return None if report[name] is None else float(report[name])
    if name in _ACCURACIES:
        accuracy = report["accuracy"].get(name)
        return None if accuracy is None else float(accuracy)
    stage, statistic = _split(name)
    stages = report["latency_ms"]
    if stage not in stages or statistic not in _STATISTICS:
        raise _unknown(name, stages)
    value = stages[stage][statistic]
    if value is None:
        raise _too_few(name, statistic, int(stages[stage]["n"]))
    return float(value)


def budget_gates(report: Report, budgets: Mapping[str, float]) -> list[Gate]:
    """Return a gate for every absolute limit: at most, of throughput and accuracies at least."""
    return [
        Gate(name, _or_missing(report, name), limit, is_floor=name in _LARGER_IS_BETTER)
        for name, limit in budgets.items()
    ]


def floor_gates(report: Report, floors: Mapping[str, float]) -> list[Gate]:
    """Return a gate for every accuracy that the export must have measured at least; a missing one fails."""
    return [Gate(name, report["accuracy"].get(name), limit, is_floor=True) for name, limit in floors.items()]


def baseline_gates(report: Report, baseline: Report, ratios: Mapping[str, float], *, force: bool = False) -> list[Gate]:
    """Return a gate for every figure whose ratio to the baseline's is limited.

    Raises:
        ArtefactError: the baseline was measured on another machine, or of something else, and `force` is not set.
        UsageError: a figure that the baseline cannot show.
    """
    unlike = differences(baseline, report)
    unlike += [
        f"{key}: {baseline[key]} and {report[key]}" for key in ("name", "scenario") if baseline[key] != report[key]
    ]
    if unlike and not force:
        raise ArtefactError(
            f"The baseline cannot be compared with this measurement: {'; '.join(unlike)}.",
            "Measure a new baseline here, or add --force to compare all the same.",
        )
    gates = []
    for name, ratio in ratios.items():
        try:
            base = figure_of(baseline, name)
        except UsageError as error:
            raise UsageError(
                f"In the baseline, {error.what}", "Measure the baseline again, with as many runs."
            ) from None
        if base is None:
            raise UsageError(f"The baseline has no {name}.", "Measure it again, or limit another figure.")
        is_floor = name in _LARGER_IS_BETTER
        note = f" = {base:g} of the baseline {'/' if is_floor else 'x'} {ratio:g}"
        limit = base / ratio if is_floor else base * ratio
        gates.append(Gate(name, _or_missing(report, name), limit, is_floor, note))
    # A stage that is gone is not a stage that has become fast.
    gone = [stage for stage in baseline["latency_ms"] if stage not in report["latency_ms"]]
    return [*gates, *(Gate(f"{stage}.p50", None, float(baseline["latency_ms"][stage]["p50"] or 0)) for stage in gone)]


def read_baseline(path: Path) -> Report:
    """Read what `bench --json` printed.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it is not a report of this schema.
    """
    try:
        report: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"The baseline {path} cannot be read: {error.strerror}.", "Give what `bench --json` printed."
        ) from None
    except ValueError:
        report = None
    needed = {"name", "scenario", "latency_ms", "environment", "accuracy", *_FIGURES}
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or not needed <= report.keys():
        found = report.get("schema") if isinstance(report, dict) else "no JSON object"
        raise ArtefactError(f"{path} is not a measurement: {found!r}, not {SCHEMA!r}.", "Measure the baseline again.")
    return report


def _too_few(name: str, statistic: str, count: int) -> UsageError:
    needed = samples_needed(float(statistic[1:]))
    return UsageError(f"{name} cannot be shown from {count} samples; it needs {needed}.", f"Add --runs {needed}.")


def _unknown(name: str, stages: Iterable[str]) -> UsageError:
    known = [*_STATISTICS, *(f"{stage}.p50" for stage in stages or ("infer",)), *_FIGURES, *_ACCURACIES]
    return UsageError(f"There is no figure {name!r} in a measurement.", f"Known: {', '.join(known)}.")


def _or_missing(report: Report, name: str) -> float | None:
    """Return a figure, or None where this measurement has none: a stage that is gone, or samples lost to a stall."""
    is_own = name in (*_FIGURES, *_ACCURACIES)
    if not is_own and _split(name)[0] not in report["latency_ms"]:
        return None
    try:
        return figure_of(report, name)
    except UsageError:
        if report["missed"]:
            return None
        raise


def _split(name: str) -> tuple[str, str]:
    """Return stage and statistic of `infer.p99.9` or, of the whole image, `p99.9`."""
    if name in _STATISTICS:
        return TOTAL, name
    stage, _, statistic = name.partition(".")
    return stage, statistic
