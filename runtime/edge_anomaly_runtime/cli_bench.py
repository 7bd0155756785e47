"""`bench`: measure a bundle, gate on the figures, compare two bundles in turns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .cli_options import BundleArg, EngineOption, JsonOption, PrecisionOption, ThreadsOption
from .errors import GateError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .bench.gates import Gate
    from .scoring import Scorer

ImagesOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="Real images in place of the bundle's golden ones. Repeatable."),
]


class _MeasureByDefault(TyperGroup):
    """`bench BUNDLE` means `bench run BUNDLE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=_MeasureByDefault,
    help="Measure latency on this machine; keep it within limits; compare two bundles.\n\n"
    "`bench BUNDLE` is short for `bench run BUNDLE`; its options: edge-anomaly bench run --help\n\n"
    "Examples:\n\nedge-anomaly bench part.eab --engine openvino --scenario single --json\n\n"
    "edge-anomaly bench part.eab --repeat 5 --budget p50=8ms --budget p99=25ms\n\n"
    "edge-anomaly bench compare old.eab new.eab\n\n"
    "edge-anomaly bench sweep part.eab --plot pace.svg",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench_app.command("run")
def run_(
    bundle: BundleArg,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    scenario: Annotated[
        str, typer.Option(help="single: back to back; paced: a camera; multi: several; offline: throughput.")
    ] = "single",
    rate: Annotated[float | None, typer.Option(metavar="FPS", help="paced: frames a second.")] = None,
    streams: Annotated[int, typer.Option(help="multi: cameras.")] = 1,
    images: ImagesOption = None,
    runs: Annotated[int, typer.Option(help="Images (multi: rounds); p99 needs 662, p99.9 needs 6636.")] = 700,
    warm_up: Annotated[
        bool, typer.Option(help="Call until times no longer fall, for 1 to 10 s, before it counts.")
    ] = True,
    repeat: Annotated[int, typer.Option(help="Fresh processes; the medians of their figures count.")] = 1,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MS", help="Limit, e.g. p99=25ms, infer.p50=3, peak_rss_mb=200. Repeatable."),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Least accuracy at export, e.g. auroc=0.95. Repeatable."),
    ] = None,
    baseline: Annotated[Path | None, typer.Option(metavar="FILE", help="What `bench --json` printed before.")] = None,
    max_ratio: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RATIO", help="Against the baseline; default min=1.10 and p50=1.15."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare with a baseline of another machine.")] = False,
    as_json: JsonOption = False,
    samples: Annotated[bool, typer.Option("--samples", help="Put the time of every image into the JSON.")] = False,
    gab: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON for github-action-benchmark.")] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JUnit XML, a test case for every limit.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a summary, e.g. to $GITHUB_STEP_SUMMARY.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with figures and plots.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the plots as SVG files.")] = None,
) -> None:
    """Measure one bundle; end with code 1 if a limit is not kept.

    Example: edge-anomaly bench run part.eab --repeat 5 --budget p99=25ms --baseline main.json --junit bench.xml
    """
    from .atomic import make_folder
    from .bench.gates import (
        DEFAULT_RATIOS,
        baseline_gates,
        budget_gates,
        check_names,
        floor_gates,
        parse_limits,
        read_baseline,
    )
    from .bench.harness import BenchOptions, bench_bundle

    options = BenchOptions(scenario, runs, rate, streams, tuple(images or ()), repeat, warm_up)
    budgets, floors = parse_limits(budget or (), "--budget"), parse_limits(floor or (), "--floor")
    ratios = parse_limits(max_ratio or (), "--max-ratio") or DEFAULT_RATIOS
    if max_ratio and baseline is None:
        raise UsageError(f"--max-ratio {max_ratio[0]} has nothing to compare with.", "Add --baseline FILE.")
    before = None if baseline is None else read_baseline(baseline)
    check_names([*budgets, *floors, *(() if before is None else ratios)], runs)
    files = {"gab": gab, "junit": junit, "markdown": markdown, "html": html}
    for path in (*files.values(), None if plots is None else plots / "plot.svg"):
        if path is not None:
            make_folder(path.parent)
    if samples and not as_json:
        raise UsageError("--samples has nowhere to go.", "Add --json.")
    report = bench_bundle(bundle, options, engine=engine, precision=precision, threads=threads)
    gates = [*budget_gates(report, budgets), *floor_gates(report, floors)]
    if before is not None:
        gates += baseline_gates(report, before, ratios, force=force)
    _print_report(report, gates, as_json=as_json, samples=samples)
    _write_files(report, gates, plots, **files)
    _say_gates(gates)


@bench_app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A bundle, or BUNDLE@ENGINE/PRECISION.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The one that must not be slower.")],
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(help="Blocks of each, in turns.")] = 45,
    max_ratio: Annotated[float, typer.Option(metavar="RATIO", help="B may be so much slower.")] = 1.10,
    as_json: JsonOption = False,
) -> None:
    """Measure two bundles in turns; end with code 1 if B is slower than A by more than the limit and than noise.

    Example: edge-anomaly bench compare part.eab@openvino/fp32 part.eab@openvino/int8
    """
    import numpy as np

    from .bench.compare import compare as in_turns
    from .bench.harness import golden_pictures
    from .images import load_image
    from .progress import say, track

    if rounds < 8:
        raise UsageError(f"--rounds {rounds} is too few to tell noise from a difference.", "Give 8 or more.")
    if not max_ratio >= 1:
        raise UsageError(f"--max-ratio {max_ratio:g} is not possible.", "Give 1 or more: how much slower B may be.")
    with _scorer(first, threads) as one, _scorer(second, threads) as other:
        # The same pictures for both: else the verdict might be about them.
        images = [np.asarray(load_image(path)) for path in golden_pictures(one.bundle)]
        calls = [_calls(scorer, images) for scorer in (one, other)]
        result = in_turns(*calls, rounds=rounds, limit=max_ratio, progress=partial(track, what="rounds", total=rounds))
    if as_json:
        record = {"schema": "edge-anomaly.bench-compare/1", "a": first, "b": second, "is_slower": result.is_slower}
        print(json.dumps({**record, **result.__dict__}))
    else:
        print(f"B / A {result.ratio:.3f} (limit {max_ratio:g}, noise {result.noise:.3f}, p {result.p:.2g})")
        say(f"A {first}: p50 {median(result.first):.2f} ms")
        say(f"B {second}: p50 {median(result.second):.2f} ms")
    if result.is_slower:
        raise GateError(
            f"{second} takes {result.ratio:.2f} times as long as {first}.", "Raise --max-ratio, or mend it."
        )


@bench_app.command()
def sweep(
    bundle: BundleArg,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(metavar="FPS", help="Frames a second; without it, 10 to 115 % of what is possible. Repeatable."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each rate.")] = 10.0,
    images: ImagesOption = None,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write pace against latency as SVG.")] = None,
) -> None:
    """Measure a camera's latency at several rates, and find the highest one that misses no frame.

    Example: edge-anomaly bench sweep part.eab --images photos/ --plot pace.svg
    """
    from .atomic import make_folder, replace_file
    from .bench.plots import pace_curve
    from .bench.sweep import sweep as measured_at
    from .progress import say, track
    from .scoring import open_scorer

    if plot is not None:
        make_folder(plot.parent)
    with open_scorer(bundle, engine=engine, precision=precision, threads=threads) as scorer:
        report = measured_at(
            scorer,
            rates=rate or (),
            seconds=seconds,
            images=images or (),
            progress=lambda options: track(options, "rates", len(options)),
        )
    highest = report["highest_rate"]
    if as_json:
        print(json.dumps(report))
    elif highest is None:
        print(f"frames were missed even at {report['rates'][0]['rate']:g} a second")
    else:
        print(f"{highest:g} frames a second without missing one")
        say("Half of that leaves room for other work and for heat.")
    for text in report["warnings"]:
        say(f"Warning: {text}.")
    if plot is not None:
        replace_file(plot, pace_curve(report["rates"]).encode())


def _print_report(report: dict[str, Any], gates: Sequence[Gate], *, as_json: bool, samples: bool) -> None:
    from .bench.formats import fact_lines, headline, stage_rows
    from .progress import say

    if as_json:
        report["gates"] = [
            {"name": gate.name, "value": gate.value, "limit": gate.limit, "ok": gate.ok} for gate in gates
        ]
        shown = report if samples else {k: v for k, v in report.items() if k not in ("samples_ms", "started_s")}
        print(json.dumps(shown, allow_nan=False))
    else:
        say(headline(report))
        for row in stage_rows(report):
            print(f"{row[0]:8}" + "".join(f"{text:>9}" for text in row[1:]))
        for line in fact_lines(report):
            print(line)
    for text in report["warnings"]:
        say(f"Warning: {text}.")


def _write_files(report: dict[str, Any], gates: Sequence[Gate], plots: Path | None, **files: Path | None) -> None:
    from .atomic import replace_file
    from .bench import formats
    from .bench import plots as drawing

    if (path := files["gab"]) is not None:
        replace_file(path, formats.github_action_benchmark(report).encode())
    if (path := files["junit"]) is not None:
        replace_file(path, formats.junit(report, gates).encode())
    if (path := files["html"]) is not None:
        replace_file(path, drawing.page(report, gates).encode())
    if (summary := files["markdown"]) is not None:
        # A job's summary is one file that every step adds to.
        try:
            with summary.open("a", encoding="utf-8") as file:
                file.write(formats.markdown(report, gates) + "\n")
        except OSError as error:
            raise UsageError(f"Cannot write {summary}: {error.strerror}.", "Choose another file.") from None
    if plots is not None:
        for name, svg in drawing.plots(report).items():
            replace_file(plots / f"{name}.svg", svg.encode())


def _say_gates(gates: Sequence[Gate]) -> None:
    from .progress import say

    for gate in gates:
        say(str(gate))
    failed = [gate.name for gate in gates if not gate.ok]
    if failed:
        raise GateError(
            f"{len(failed)} of {len(gates)} limits are not kept: {', '.join(failed)}.",
            "See the lines above; on a shared machine, gate on min and p50, and repeat with --repeat 5.",
        )


def _scorer(text: str, threads: int | None) -> Scorer:
    """Open BUNDLE or BUNDLE@ENGINE/PRECISION."""
    from .scoring import open_scorer

    path, _, key = text.rpartition("@") if "@" in text and not Path(text).exists() else (text, "", "auto/auto")
    engine, slash, precision = key.partition("/")
    if not slash:
        raise UsageError(f"{text} cannot be read.", "Write BUNDLE or BUNDLE@ENGINE/PRECISION.")
    return open_scorer(Path(path), engine=engine, precision=precision, threads=threads)


def _calls(scorer: Scorer, images: Sequence[npt.NDArray[np.uint8]]) -> Callable[[], object]:
    """Return a function that scores one of the images at each call: resize, inference and verdict."""
    from .bench.harness import judged

    turn = itertools.cycle(images)
    return lambda: judged(scorer, next(turn), scorer.bundle.path)
