"""The device's commands; every body imports what it needs, so that `--help` is fast."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .cli_bench import bench_app
from .cli_options import BundleArg, EngineOption, JsonOption, PrecisionOption, ThreadsOption
from .cli_stream import stream
from .errors import EdgeAnomalyError, GateError, UsageError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .bundle import Threshold
    from .scoring import Result, Scorer
    from .store import Gate, Version
    from .tensorrt_cache import EngineRecord

app = typer.Typer(
    name="edge-anomaly",
    help="Train, quantise, export and run visual anomaly detectors.\n\nData goes to standard output, all else to "
    "standard error. Exit codes: 0 ok, 1 gate not met, 2 usage, 3 missing package, 4 artefact refused, "
    "5 source unavailable, 70 internal error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"auto_envvar_prefix": "EDGE_ANOMALY", "help_option_names": ["-h", "--help"]},
)
bundle_app = typer.Typer(
    help="Look at a bundle, check and sign it; keep the bundles of a device.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bundle_app, name="bundle")
engine_app = typer.Typer(
    help="Build TensorRT engines for this device, look at them, remove them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(engine_app, name="engine")
app.add_typer(bench_app, name="bench")

StoreOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder with this device's bundles.")]
TrustOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of public keys, *.pem. A store has its own: DIR/trust.")
]
PolicyOption = Annotated[
    str, typer.Option(help="Signatures: require, if-present, off; auto requires one as soon as a key is trusted.")
]
DowngradeOption = Annotated[
    bool, typer.Option("--allow-downgrade", help="Accept a seq below one that was in use before.")
]

_FAIL_ON = {"ng": ("NG", "INVALID"), "warn": ("WARN", "NG", "INVALID")}


def _print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(importlib.metadata.version("edge-anomaly"))
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and end.",
            callback=_print_version,
            is_eager=True,
            allow_from_autoenv=False,  # EDGE_ANOMALY_VERSION is what a Dockerfile would call it
        ),
    ] = False,
) -> None:
    # `--debug` is taken out of the arguments by `run`, which prints the errors.
    pass


@app.command()
def score(
    bundle: BundleArg,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files, folders or quoted globs.")],
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    overlay: Annotated[Path | None, typer.Option(help="Write a picture with heat map and outline per image.")] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="ng or warn: end with code 1 if an image is that bad, or cannot be judged.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable file (code 2).")] = False,
) -> None:
    """Score images: one JSON object per line and image.

    Example: edge-anomaly score part.eab photos/ --overlay out/ --fail-on ng
    """
    from .images import list_images
    from .progress import say, track
    from .scoring import open_scorer

    if fail_on is not None and fail_on not in _FAIL_ON:
        raise did_you_mean("--fail-on", fail_on, list(_FAIL_ON))
    paths = list_images(images)
    names = _overlay_names(paths, overlay)
    counts = Counter({"OK": 0, "WARN": 0, "NG": 0, "INVALID": 0})
    labels: Counter[str] = Counter()
    stop = _stop_on_sigterm()
    with open_scorer(bundle, engine=engine, precision=precision, threads=threads) as scorer:
        say(f"{scorer.engine} {scorer.precision}, {scorer.session.info.threads} threads ({'; '.join(scorer.reasons)})")
        if scorer.classes and overlay is not None:
            raise UsageError("--overlay needs a map, and a classifier has none.", "Leave it out.")
        for path in track(paths, "scoring", len(paths)):
            if stop():
                break
            result = scorer.score_file(path)
            if strict and result.verdict == "INVALID":
                raise UsageError(f"Cannot judge {path}: {result.reason}.", "Leave out --strict to skip such files.")
            counts[result.verdict] += 1
            labels[result.label] += 1
            print(json.dumps(_row(result, classifier=bool(scorer.classes))), flush=True)
            if overlay is not None and result.anomaly_map is not None:
                _write_overlay(path, names[path], result.anomaly_map, scorer)
    shown = Counter({**{name: labels[name] for name in scorer.classes}, "INVALID": counts["INVALID"]})
    say(", ".join(f"{count} {name}" for name, count in (shown if scorer.classes else counts).items()))
    if counts["INVALID"] == len(paths):
        raise UsageError(f"None of the {len(paths)} images could be judged.", "The reason of each is in its line.")
    if fail_on and any(counts[verdict] for verdict in _FAIL_ON[fail_on]):
        raise typer.Exit(1)


app.command()(stream)


@app.command()
def selftest(
    bundle: BundleArg,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the bundle's golden images; end with code 1 if one does not give its stored result.

    Example: edge-anomaly selftest part.eab --engine openvino
    """
    from dataclasses import asdict

    from .progress import say
    from .scoring import open_scorer
    from .selftest import golden_tolerance, run_selftest

    with open_scorer(bundle, engine=engine, precision=precision, threads=threads) as scorer:
        checks = run_selftest(scorer)
        what = f"{scorer.engine} {scorer.precision}"
        tolerance = golden_tolerance(scorer)
    bad = [check for check in checks if not check.ok]
    if as_json:
        rows = [asdict(check) for check in checks]
        _print_json({"schema": "edge-anomaly.selftest/1", "ok": not bad, "tolerance": tolerance, "images": rows})
    for check in checks:
        say(
            f"{'ok  ' if check.ok else 'FAIL'} {check.file}  score {check.score} expected {check.expected:.6g} "
            f"({_shown(check.score_difference)}), map {_shown(check.map_difference)}, {check.verdict}"
        )
    if bad:
        raise GateError(
            f"{len(bad)} of {len(checks)} golden images differ by more than {tolerance:g} on {what}.",
            "Do not use this bundle here. Compare engine versions with `edge-anomaly doctor`, or export it again.",
        )
    say(f"selftest passed: {len(checks)} golden images on {what}, tolerance {tolerance:g}")


@app.command()
def drift(
    recordings: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="JSON lines of `stream` (rotated files too) or `score`.")
    ],
    bundle: Annotated[Path, typer.Option(metavar="BUNDLE", help="The bundle that made the scores.")],
    engine: Annotated[str, typer.Option(help="auto: whose limits the records carry.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto: whose limits the records carry.")] = "auto",
    camera: Annotated[str | None, typer.Option(metavar="NAME", help="This camera only.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Scores per window, 50 or more; some 30 parts should fit. Default: up to 1000.")
    ] = None,
    as_json: JsonOption = False,
    fail_on_drift: Annotated[
        bool, typer.Option("--fail-on-drift", help="End with code 1 if the scores of a camera have drifted.")
    ] = False,
) -> None:
    """Compare recorded scores with the normal ones that the bundle's limits were set from.

    Example: edge-anomaly drift out.jsonl --bundle part.eab
    """
    from .bundle import read_bundle
    from .progress import say
    from .stream.drift_report import drift_json, drift_table, recorded_drift

    made_with = read_bundle(bundle)
    cameras, left_out = recorded_drift(
        recordings, made_with, engine=engine, precision=precision, camera=camera, window=window
    )
    for reason, count in left_out.items():
        say(f"left out: {count} {reason}")
    if as_json:
        _print_json(drift_json(made_with, cameras, left_out))
    else:
        print("\n\n".join(drift_table(one) for one in cameras))
    drifted = [repr(one.camera) for one in cameras if one.has_drifted]
    if fail_on_drift and drifted:
        raise GateError(
            f"The scores of {len(drifted)} of {len(cameras)} cameras have drifted: {', '.join(drifted)}.",
            "The report says when, how far, and what to check.",
        )


@bundle_app.command("info")
def bundle_info(bundle: BundleArg, as_json: JsonOption = False) -> None:
    """Show what a bundle holds: model, input, thresholds, parity.

    Example: edge-anomaly bundle info part.eab
    """
    from .bundle import manifest_bytes, read_bundle

    manifest = read_bundle(bundle).manifest
    if as_json:
        print(manifest_bytes(manifest).decode(), end="")
        return
    print(
        f"{manifest.name}  {manifest.schema_}  {manifest.precision}  made {manifest.created_utc}  seed {manifest.seed}"
    )
    print(f"model   {manifest.model.kind} {json.dumps(manifest.model.parameters)}")
    print(f"input   {manifest.input.shape} {manifest.input.preprocess}")
    for key, limits in manifest.thresholds.items():
        print(f"{key:18} {describe_threshold('fail', limits.fail)}; {describe_threshold('warn', limits.warn)}")
    for row in manifest.parity:
        print(f"parity  {row.backend:24} score {row.score_difference:.1e}  flips {row.flips}/{row.images}  {row.limit}")
    size = sum(entry.size for entry in manifest.files.values())
    print(f"files   {len(manifest.files)}, {size / 1e6:.1f} MB")


@bundle_app.command("verify")
def bundle_verify(
    bundle: BundleArg,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Public key that must have signed it.")] = None,
    trust: TrustOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a bundle against its manifest, and its signature; end with code 4 if one is wrong.

    With --key or --trust a good signature is required; without, none is looked at.

    Example: edge-anomaly bundle verify part.eab --key site.pem
    """
    from .bundle import read_bundle
    from .progress import say
    from .signing import check_signature, read_public_key, read_trust

    verified = read_bundle(bundle)
    count = len(verified.manifest.files)
    signer = None
    if key is not None or trust is not None:
        keys = {**read_trust(trust), **(dict([read_public_key(key)]) if key is not None else {})}
        signer = check_signature(verified, keys, policy="require")
    if as_json:
        _print_json({"schema": "edge-anomaly.verify/1", "ok": True, "files": count, "signed_by": signer})
    say(f"{bundle}: {count} files match the manifest" + (f", signed by {signer}" if signer else ""))


@bundle_app.command("sign")
def bundle_sign(
    bundle: BundleArg,
    key: Annotated[Path, typer.Option(metavar="FILE", help="Ed25519 private key, PEM.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a signature.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sign a bundle: write manifest.sig over the very bytes of its manifest.

    Make a key with `openssl genpkey -algorithm ed25519 -out site.key`, and its public part with
    `openssl pkey -in site.key -pubout -out site.pem`. The password of an encrypted key comes from the environment
    variable EDGE_ANOMALY_SIGN_PASSWORD.

    Example: edge-anomaly bundle sign part.eab --key site.key
    """
    from .progress import say
    from .signing import sign_bundle

    key_id = sign_bundle(bundle, key, force=force)
    if as_json:
        _print_json({"schema": "edge-anomaly.sign/1", "signed_by": key_id})
    say(f"{bundle}: signed by {key_id}")


@bundle_app.command("install")
def bundle_install(
    bundle: BundleArg,
    store: StoreOption,
    activate: Annotated[bool, typer.Option("--activate", help="Bring it into use as well.")] = False,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    policy: PolicyOption = "auto",
    trust: TrustOption = None,
    allow_downgrade: DowngradeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a bundle into a device's store, check hashes and signature, and score its golden images.

    The self-test runs in a process of its own with limits of time and memory. What is in use stays in use, unless
    --activate is given. A kill at any moment leaves the store as it was before or after.

    Example: edge-anomaly bundle install part.eab --store bundles/ --activate
    """
    from .progress import say
    from .store import activate_bundle, install_bundle

    gate = _gate(engine, precision, threads, policy, trust)
    version = install_bundle(store, bundle, gate=gate)
    if activate:
        activate_bundle(store, version.id, gate=gate, allow_downgrade=allow_downgrade)
    if as_json:
        _print_json({"schema": "edge-anomaly.store/1", "active": activate, **version.model_dump(mode="json")})
    say(f"{'active' if activate else 'installed'}: {version.id}")


@bundle_app.command("activate")
def bundle_activate(
    version: Annotated[str, typer.Argument(metavar="ID", help="From `bundle list`; its beginning is enough.")],
    store: StoreOption,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    policy: PolicyOption = "auto",
    trust: TrustOption = None,
    allow_downgrade: DowngradeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring an installed bundle into use; a stream that serves the store changes over while it runs.

    Checked again before that: hashes, signature, golden images, and that its `seq` is not below one used before.

    Example: edge-anomaly bundle activate part-1764 --store bundles/
    """
    from .store import activate_bundle

    gate = _gate(engine, precision, threads, policy, trust)
    active = activate_bundle(store, version, gate=gate, allow_downgrade=allow_downgrade)
    _tell_active(active, as_json)


@bundle_app.command("rollback")
def bundle_rollback(store: StoreOption, as_json: JsonOption = False) -> None:
    """Bring the bundle that was in use before back into use.

    Example: edge-anomaly bundle rollback --store bundles/
    """
    from .store import roll_back

    _tell_active(roll_back(store), as_json)


@bundle_app.command("list")
def bundle_list(store: StoreOption, as_json: JsonOption = False) -> None:
    """List the bundles of a store: which one is in use, which one was before.

    Example: edge-anomaly bundle list --store bundles/
    """
    from .progress import say
    from .store import read_state

    state = read_state(store)
    if as_json:
        _print_json(state.model_dump(mode="json", by_alias=True))
        return
    marks = {state.previous: "previous", state.current: "active" if state.probation is None else "active, on probation"}
    for version in state.versions:
        print(
            f"{version.id}  {version.precision}  {version.key_id or 'not signed'}  {marks.get(version.id, '')}".rstrip()
        )
    say(f"{len(state.versions)} bundles in {store}, highest seq in use so far: {state.seq}")


def _gate(engine: str, precision: str, threads: int | None, policy: str, trust: Path | None) -> Gate:
    from .signing import POLICIES
    from .store import Gate

    for known in POLICIES:
        if known == policy:
            return Gate(engine, precision, threads, known, trust)
    raise did_you_mean("--policy", policy, list(POLICIES))


@engine_app.command("build")
def engine_build(
    bundle: BundleArg,
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or int8. auto: the bundle's own.")] = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Normal images for the thresholds, instead of those packed in the bundle."),
    ] = None,
    workspace_mib: Annotated[
        int | None, typer.Option(help="Scratch memory of the builder. Default: a quarter of what is free, up to 1024.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again although a fitting engine is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a TensorRT engine on this device, check it with the golden images and set its thresholds.

    Takes seconds to many minutes. The engine is kept in the cache of this device (EDGE_ANOMALY_CACHE) and never leaves
    it; `--engine tensorrt` and `--engine auto` find it there. Ends with code 1 if the engine does not give the golden
    images their stored scores.

    Example: edge-anomaly engine build part.eab --precision int8
    """
    from .progress import say
    from .tensorrt_build import build_engine

    built = build_engine(bundle, precision=precision, calibration=calibration, workspace_mib=workspace_mib, force=force)
    if as_json:
        record = built.record.model_dump(mode="json", by_alias=True)
        _print_json({**record, "folder": str(built.folder), "new": built.new, "notes": list(built.notes)})
    else:
        _print_engine(built.record)
    for note in built.notes:
        say(f"note: {note}")
    say(f"built {built.folder}" if built.new else f"is there already: {built.folder} (--force builds it again)")


@engine_app.command("info")
def engine_info(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Show this bundle's engines; without it, the device.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the device as TensorRT sees it, or the engines of a bundle on it.

    Example: edge-anomaly engine info part.eab --json
    """
    from .tensorrt_report import bundle_report, device_report

    report = device_report() if bundle is None else bundle_report(bundle)
    if as_json:
        _print_json(report)
        return
    for key, value in report.items():
        if key != "engines":
            print(f"{key:16} {value}")
    for row in report.get("engines", []):
        print(f"{row['precision']:16} {row['state']}  {row['detail']}")


@engine_app.command("list")
def engine_list(as_json: JsonOption = False) -> None:
    """List the engines in this device's cache.

    Example: edge-anomaly engine list
    """
    from .progress import say
    from .tensorrt_cache import cache_folder
    from .tensorrt_report import cached_engines

    rows = cached_engines()
    if as_json:
        _print_json({"schema": "edge-anomaly.engines/1", "folder": str(cache_folder()), "engines": rows})
        return
    for row in rows:
        name, precision = row["bundle"] or "?", row["precision"] or "?"
        print(f"{row['key'][:12]}  {name:20} {precision:5} {row['mb']:8.1f} MB  {row['detail']}")
    say(f"{len(rows)} engines in {cache_folder()}")


@engine_app.command("clean")
def engine_clean(
    everything: Annotated[
        bool, typer.Option("--all", help="Remove every engine, timing cache and leftover; needs no GPU.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove engines that are damaged or were built for another TensorRT or device.

    Example: edge-anomaly engine clean --all
    """
    from .progress import say
    from .tensorrt_cache import clean_engines
    from .tensorrt_report import machine_here

    removed = clean_engines(None if everything else machine_here())
    if as_json:
        _print_json({"schema": "edge-anomaly.engines/1", "removed": [path.name for path in removed]})
    for path in removed:
        say(f"removed {path.name}")
    say(f"{len(removed)} removed")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what works on this machine, and why the rest does not.

    Example: edge-anomaly doctor --json
    """
    from .doctor import examine

    report = examine()
    if as_json:
        _print_json(report)
        return
    for key in ("edge_anomaly", "python", "system", "cpu", "usable_cpus", "int8_instructions"):
        print(f"{key:18} {report[key]}")
    for name, found in report["packages"].items():
        print(f"{name:18} {found or '-'}")
    tensorrt = report["tensorrt"]
    print(f"{'nvidia driver':18} {tensorrt['driver']}")
    print(f"{'cuda runtime':18} {tensorrt['cuda_runtime']}")
    print(f"{'tensorrt package':18} {tensorrt['package']}")
    if tensorrt["l4t"]:
        print(f"{'jetson':18} L4T {tensorrt['l4t']}, power mode {tensorrt['power_mode'] or 'unknown'}")
    for name, state in report["stream"].items():
        print(f"{name:18} {state}")
    for line in report["advice"]:
        print(line)


def describe_threshold(name: str, threshold: Threshold) -> str:
    """Say a threshold in counts, for people who stop lines and not for statisticians."""
    import math

    return (
        f"{name} > {threshold.value:.4g}: about {threshold.alpha * 1000:g} of 1000 good parts "
        f"(95 % bound {math.ceil(threshold.upper95 * 1000)}; {threshold.method}, n = {threshold.n})"
    )


def _print_engine(record: EngineRecord) -> None:
    parts, parity = record.parts, record.parity
    print(f"{record.bundle}  {parts.precision}  TensorRT {parts.tensorrt}  {parts.device} (SM {parts.sm})")
    print(f"built   {record.created_utc} in {record.build_seconds:g} s, {record.engine_bytes / 1e6:.1f} MB")
    print(f"layers  {', '.join(f'{count} {kind}' for kind, count in record.layers.items())}")
    print(
        f"parity  {parity.images} golden images, score {parity.score_difference:.1e}, map {parity.map_difference:.1e}, "
        f"tolerance {parity.tolerance:g}"
    )
    if record.thresholds is not None:
        for name, limit in (("fail", record.thresholds.fail), ("warn", record.thresholds.warn)):
            print(f"limit   {describe_threshold(name, limit)}")
        print(f"from    {record.threshold_images}")


def run(typer_app: typer.Typer) -> NoReturn:
    """Run the app and end the process with the exit code of design section 7; one line per error, two with the hint."""
    debug = "--debug" in sys.argv or bool(os.environ.get("EDGE_ANOMALY_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        typer_app()
    except EdgeAnomalyError as error:
        _report(error.what, error.hint, debug)
        code = error.exit_code
    except SystemExit as ending:
        if not isinstance(ending.__context__, BrokenPipeError):
            raise
        # The reader of a pipe has seen enough; Typer's code for that is 1, which here would mean a missed gate.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        _report(f"Internal error: {type(error).__name__}: {error}", "Run again with --debug for the traceback.", debug)
        code = 70
    sys.exit(code)


def _report(what: str, hint: str, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"Error: {what}", file=sys.stderr)
    if hint:
        print(hint, file=sys.stderr)


def _shown(difference: float | None) -> str:
    return "n/a" if difference is None else f"{difference:.1e}"


def _tell_active(version: Version, as_json: bool) -> None:
    from .progress import say

    if as_json:
        _print_json({"schema": "edge-anomaly.store/1", "active": True, **version.model_dump(mode="json")})
    say(f"active: {version.id}")


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _row(result: Result, *, classifier: bool) -> dict[str, Any]:
    if classifier:
        classified = {
            "schema": "edge-anomaly.classify/1",
            "path": result.path,
            "label": result.label or None,
            "probability": result.probability,
            "ms": result.ms,
        }
        return {**classified, "reason": result.reason} if result.reason else classified
    row: dict[str, Any] = {
        "schema": "edge-anomaly.score/1",
        "path": result.path,
        "score": result.score,
        "verdict": result.verdict,
        "threshold": result.threshold,
        "warn": result.warn,
        "ms": result.ms,
    }
    return {**row, "reason": result.reason} if result.reason else row


def _overlay_names(paths: list[Path], folder: Path | None) -> dict[Path, Path]:
    """Give each image a file name of its own; two images of the same name must not share a picture."""
    if folder is None:
        return {}
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    for path in dict.fromkeys(paths):
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        names[path] = folder / f"{name}.png"
    return names


def _write_overlay(path: Path, target: Path, anomaly_map: npt.NDArray[np.float32], scorer: Scorer) -> None:
    import io

    from .atomic import replace_file
    from .images import load_image
    from .overlay import draw_overlay

    spec = scorer.bundle.manifest.input.preprocess
    picture = draw_overlay(load_image(path), anomaly_map, spec, scorer.thresholds.pixel.value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    replace_file(target, buffer.getvalue())


def _stop_on_sigterm() -> Callable[[], bool]:
    """Finish the image in hand and end with code 0 when the service manager says stop."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    return lambda: bool(stopped)
