"""`bench`: measure a bundle, gate on the figures, compare two bundles in turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .errors import GateError, UsageError

if TYPE_CHECKING:
    from .bench.gates import Gate
    from .scoring import Scorer


class _MeasureByDefault(TyperGroup):
    """`bench BUNDLE` means `bench run BUNDLE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        # An option in front of the bundle belongs to `run`, too.
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=_MeasureByDefault,
    help="Measure latency on this machine; keep it within limits; compare two bundles.\n\n"
    "`bench BUNDLE` is short for `bench run BUNDLE`; its options: edge-anomaly bench run --help\n\n"
    "Examples:\n\nedge-anomaly bench part.eab --engine openvino --scenario single --json\n\n"
    "edge-anomaly bench part.eab --repeat 5 --budget p50=8ms --budget p99=25ms\n\n"
    "edge-anomaly bench compare old.eab new.eab",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench_app.command("run")
def run_(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder NAME.eab.")],
    engine: Annotated[
        str, typer.Option(help="auto, tensorrt, openvino, onnxruntime or onnxruntime-tensorrt.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or int8.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Default: the CPUs that the machine or container grants.")] = None,
    scenario: Annotated[
        str, typer.Option(help="single: back to back; paced: a camera; multi: several; offline: throughput.")
    ] = "single",
    rate: Annotated[float | None, typer.Option(metavar="FPS", help="paced: frames a second.")] = None,
    streams: Annotated[int, typer.Option(help="multi: cameras.")] = 1,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Real images in place of the bundle's golden ones. Repeatable."),
    ] = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
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
    from .bench.formats import fact_lines, headline, stage_rows
    from .bench.gates import (
        DEFAULT_RATIOS,
        baseline_gates,
        budget_gates,
        check_runs,
        floor_gates,
        parse_limits,
        read_baseline,
    )
    from .bench.harness import BenchOptions, bench_bundle
    from .progress import say

    options = BenchOptions(scenario, runs, rate, streams, tuple(images or ()), repeat, warm_up)
    budgets, floors = parse_limits(budget or (), "--budget"), parse_limits(floor or (), "--floor")
    ratios = parse_limits(max_ratio or (), "--max-ratio") or DEFAULT_RATIOS
    if max_ratio and baseline is None:
        raise UsageError(f"--max-ratio {max_ratio[0]} has nothing to compare with.", "Add --baseline FILE.")
    before = None if baseline is None else read_baseline(baseline)
    check_runs([*budgets, *(() if before is None else ratios)], runs)
    report = bench_bundle(bundle, options, engine=engine, precision=precision, threads=threads)
    gates = [*budget_gates(report, budgets), *floor_gates(report, floors)]
    if before is not None:
        gates += baseline_gates(report, before, ratios, force=force)
    _write_files(report, gates, gab=gab, junit=junit, markdown=markdown, html=html, plots=plots)
    if as_json:
        report["gates"] = [
            {"name": gate.name, "value": gate.value, "limit": gate.limit, "ok": gate.ok} for gate in gates
        ]
        shown = report if samples else {k: v for k, v in report.items() if k not in ("samples_ms", "started_s")}
        print(json.dumps(shown, ensure_ascii=False, allow_nan=False))
    else:
        say(headline(report))
        rows = stage_rows(report)
        for row in rows:
            print(f"{row[0]:8}" + "".join(f"{text:>9}" for text in row[1:]))
        for line in fact_lines(report):
            print(line)
    for text in report["warnings"]:
        say(f"Warning: {text}.")
    _say_gates(gates)


@bench_app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A bundle, or BUNDLE@ENGINE/PRECISION.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The one that must not be slower.")],
    threads: Annotated[int | None, typer.Option(help="Default: the CPUs that the machine or container grants.")] = None,
    rounds: Annotated[int, typer.Option(help="Blocks of each, in turns.")] = 45,
    max_ratio: Annotated[float, typer.Option(metavar="RATIO", help="B may be so much slower.")] = 1.10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Measure two bundles in turns; end with code 1 if B is slower than A by more than the limit and than noise.

    Example: edge-anomaly bench compare part.eab@openvino/fp32 part.eab@openvino/int8
    """
    from .bench.compare import compare as in_turns
    from .progress import say

    if rounds < 8:
        raise UsageError(f"--rounds {rounds} is too few to tell noise from a difference.", "Give 8 or more.")
    if not max_ratio >= 1:
        raise UsageError(f"--max-ratio {max_ratio:g} is not possible.", "Give 1 or more: how much slower B may be.")
    with _scorer(first, threads) as one, _scorer(second, threads) as other:
        result = in_turns(_calls(one), _calls(other), rounds=rounds, limit=max_ratio)
    if as_json:
        record = {"schema": "edge-anomaly.bench-compare/1", "a": first, "b": second, "is_slower": result.is_slower}
        print(json.dumps({**record, **result.__dict__}))
    else:
        print(f"B / A {result.ratio:.3f} (limit {max_ratio:g}, noise {result.noise:.3f}, p {result.p:.2g})")
        say(f"A {first}: p50 {sorted(result.first)[len(result.first) // 2]:.2f} ms")
        say(f"B {second}: p50 {sorted(result.second)[len(result.second) // 2]:.2f} ms")
    if result.is_slower:
        raise GateError(
            f"{second} takes {result.ratio:.2f} times as long as {first}.", "Raise --max-ratio, or mend it."
        )


def _write_files(report: dict[str, Any], gates: Sequence[Gate], **paths: Path | None) -> None:
    from .atomic import replace_file
    from .bench import formats
    from .bench import plots as drawing

    if paths["gab"] is not None:
        replace_file(paths["gab"], formats.github_action_benchmark(report).encode())
    if paths["junit"] is not None:
        replace_file(paths["junit"], formats.junit(report, gates).encode())
    if paths["html"] is not None:
        replace_file(paths["html"], drawing.page(report, gates).encode())
    if paths["markdown"] is not None:
        # A job's summary is one file that every step adds to.
        with paths["markdown"].open("a") as file:
            file.write(formats.markdown(report, gates) + "\n")
    if paths["plots"] is not None:
        paths["plots"].mkdir(parents=True, exist_ok=True)
        for name, svg in drawing.plots(report).items():
            replace_file(paths["plots"] / f"{name}.svg", svg.encode())


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


def _calls(scorer: Scorer) -> Any:
    """Return a function that scores the bundle's golden images, one at each call: resize, inference and verdict."""
    import io
    import itertools

    import numpy as np
    from PIL import Image

    pictures = []
    for golden in scorer.bundle.manifest.golden:
        with Image.open(io.BytesIO(scorer.bundle.read(golden.file))) as file:
            pictures.append(np.asarray(file.convert("RGB")))
    turn = itertools.cycle(pictures)
    return lambda: scorer.score_image(next(turn))
