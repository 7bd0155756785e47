"""`edge-anomaly train MODEL`: one command for each model, with its own options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_anomaly_runtime.errors import UsageError, did_you_mean

from .cli_options import (
    AlphaFail,
    AlphaWarn,
    DataOption,
    DeviceOption,
    EpochsOption,
    ForceOption,
    HoldoutOption,
    JsonOption,
    MixedOption,
    OutOption,
    ResizeOption,
    ResumeOption,
    RoiOption,
    SeedOption,
    SizeOption,
    StrictOption,
    TensorboardOption,
    WeightsOption,
    require,
)

if TYPE_CHECKING:
    from .train import TrainOptions

train_app = typer.Typer(
    help="Learn from images and write a run folder.\n\n"
    "Example: edge-anomaly train padim --data parts/ --out runs/parts",
    no_args_is_help=True,
    rich_markup_mode=None,
)

BackboneOption = Annotated[
    str, typer.Option(help="wide_resnet50_2, resnet18, resnet34, resnet50 or efficientnet_lite0.")
]
SmallBackboneOption = Annotated[
    str, typer.Option(help="resnet18, resnet34, resnet50, wide_resnet50_2 or efficientnet_lite0.")
]
LayersOption = Annotated[str | None, typer.Option(help="Of layer1,layer2,layer3. Default: the model's.")]
RateOption = Annotated[float | None, typer.Option(help="Step size of the optimiser. Default: the model's.")]
BatchOption = Annotated[int | None, typer.Option(help="Images of one step. Default: the model's.")]


@train_app.command()
def padim(
    data: DataOption,
    out: OutOption,
    backbone: BackboneOption = "wide_resnet50_2",
    weights: WeightsOption = "default",
    size: SizeOption = 224,
    resize: ResizeOption = "squash",
    roi: RoiOption = "0,0,1,1",
    layers: LayersOption = None,
    dims: Annotated[int | None, typer.Option(help="Channels kept; 0 for all. Default: 64 or 100 by backbone.")] = None,
    reduction: Annotated[str, typer.Option(help="semi-orthogonal or random.")] = "semi-orthogonal",
    covariance: Annotated[str, typer.Option(help="location (one per place) or tied (one for all).")] = "location",
    shrinkage: Annotated[float, typer.Option(help="0 to 1: pull of the covariance to the identity.")] = 0.0,
    holdout: HoldoutOption = 0.2,
    alpha_fail: AlphaFail = 0.01,
    alpha_warn: AlphaWarn = 0.05,
    seed: SeedOption = 0,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """A Gaussian of normal features at every place: the fastest, for parts that lie still.

    Example: edge-anomaly train padim --data parts/ --backbone efficientnet_lite0 --out runs/parts
    """
    _require_training()
    from .padim import PadimConfig
    from .train import TrainOptions

    _check_backbone(backbone)
    config = PadimConfig(
        backbone=backbone,
        dims=dims,
        reduction=reduction,  # type: ignore[arg-type]  # checked by PadimConfig
        covariance=covariance,  # type: ignore[arg-type]
        shrinkage=shrinkage,
        seed=seed,
        **_given(layers=_parse_layers(layers)),
    )
    _train(
        data,
        out,
        config,
        size,
        resize,
        roi,
        weights,
        TrainOptions(holdout, alpha_warn, alpha_fail, strict, force),
        as_json,
    )


@train_app.command()
def patchcore(
    data: DataOption,
    out: OutOption,
    backbone: BackboneOption = "wide_resnet50_2",
    weights: WeightsOption = "default",
    size: SizeOption = 224,
    resize: ResizeOption = "squash",
    roi: RoiOption = "0,0,1,1",
    layers: LayersOption = None,
    share: Annotated[float | None, typer.Option(help="Share of normal patches in the bank. Default: 0.01.")] = None,
    bank: Annotated[int | None, typer.Option(help="Vectors in the bank, in place of the share.")] = None,
    memory_budget: Annotated[float | None, typer.Option(help="The most megabytes that the bank may take.")] = None,
    max_bank: Annotated[int | None, typer.Option(help="The most vectors of a share. Default: 10000.")] = None,
    pca: Annotated[int | None, typer.Option(help="Principal components to take distances in. Default: all.")] = None,
    score_top: Annotated[int | None, typer.Option(help="Largest map values in the score. Default: 1.")] = None,
    smoothing: Annotated[float | None, typer.Option(help="Blur of the map in cells of its grid. Default: 0.5.")] = None,
    holdout: HoldoutOption = 0.2,
    alpha_fail: AlphaFail = 0.01,
    alpha_warn: AlphaWarn = 0.05,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """The distance of every patch to the nearest normal one: for parts and textures that move.

    Example: edge-anomaly train patchcore --data parts/ --backbone efficientnet_lite0 --bank 2000 --out runs/parts
    """
    _require_training()
    from .patchcore import PatchcoreConfig
    from .train import TrainOptions

    _check_backbone(backbone)
    config = PatchcoreConfig(
        backbone=backbone,
        bank=bank,
        memory_budget=memory_budget,
        pca=pca,
        seed=seed,
        **_given(
            share=share, max_bank=max_bank, smoothing=smoothing, score_top=score_top, layers=_parse_layers(layers)
        ),
    )
    options = TrainOptions(holdout, alpha_warn, alpha_fail, strict, force, device=device)
    _train(data, out, config, size, resize, roi, weights, options, as_json)


@train_app.command(name="vit-knn")
def vit_knn(
    data: DataOption,
    out: OutOption,
    checkpoint: Annotated[
        str, typer.Option(help="A name on the Hugging Face hub, or a folder with config.json and model.safetensors.")
    ] = "google/vit-base-patch16-224",
    weights: WeightsOption = "default",
    size: SizeOption = 224,
    resize: ResizeOption = "squash",
    roi: RoiOption = "0,0,1,1",
    blocks: Annotated[str | None, typer.Option(help="Blocks whose tokens are used, from 0, such as 6,9.")] = None,
    share: Annotated[float | None, typer.Option(help="Share of normal patches in the bank. Default: 0.1.")] = None,
    bank: Annotated[int | None, typer.Option(help="Vectors in the bank, in place of the share.")] = None,
    memory_budget: Annotated[float | None, typer.Option(help="The most megabytes that the bank may take.")] = None,
    holdout: HoldoutOption = 0.2,
    alpha_fail: AlphaFail = 0.01,
    alpha_warn: AlphaWarn = 0.05,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Nearest neighbours of a Vision Transformer's patch tokens.

    Example: edge-anomaly train vit-knn --data parts/ --checkpoint dinov2-small/ --out runs/parts
    """
    _require_training()
    require("vit", "transformers")
    from .train import TrainOptions
    from .vit_knn import VitKnnConfig

    config = VitKnnConfig(
        checkpoint=checkpoint,
        blocks=None if blocks is None else tuple(_parse_numbers("--blocks", blocks)),
        bank=bank,
        seed=seed,
        **_given(share=share, memory_budget=memory_budget),
    )
    options = TrainOptions(holdout, alpha_warn, alpha_fail, strict, force, device=device)
    _train(data, out, config, size, resize, roi, weights, options, as_json)


@train_app.command()
def fastflow(
    data: DataOption,
    out: OutOption,
    backbone: SmallBackboneOption = "resnet18",
    weights: WeightsOption = "default",
    size: SizeOption = 224,
    resize: ResizeOption = "squash",
    roi: RoiOption = "0,0,1,1",
    layers: LayersOption = None,
    steps: Annotated[int | None, typer.Option(help="Coupling steps of each flow. Default: the model's.")] = None,
    finetune: Annotated[str, typer.Option(help="anchored, off or free (may collapse).")] = "anchored",
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    learning_rate: RateOption = None,
    holdout: HoldoutOption = 0.2,
    alpha_fail: AlphaFail = 0.01,
    alpha_warn: AlphaWarn = 0.05,
    device: DeviceOption = "auto",
    mixed: MixedOption = "auto",
    tensorboard: TensorboardOption = False,
    resume: ResumeOption = False,
    seed: SeedOption = 0,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """The likelihood of every patch under a normalising flow, the backbone fine-tuned with it.

    Example: edge-anomaly train fastflow --data parts/ --finetune off --out runs/parts
    """
    _require_training()
    from .fastflow import FastflowConfig
    from .train import TrainOptions

    _check_backbone(backbone)
    config = FastflowConfig(
        backbone=backbone,
        finetune=finetune,  # type: ignore[arg-type]  # checked by FastflowConfig
        seed=seed,
        **_given(
            layers=_parse_layers(layers),
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
        ),
    )
    options = TrainOptions(holdout, alpha_warn, alpha_fail, strict, force, resume, mixed, device, tensorboard)
    _train(data, out, config, size, resize, roi, weights, options, as_json)


@train_app.command()
def stpm(
    data: DataOption,
    out: OutOption,
    backbone: SmallBackboneOption = "resnet18",
    weights: WeightsOption = "default",
    size: SizeOption = 224,
    resize: ResizeOption = "squash",
    roi: RoiOption = "0,0,1,1",
    layers: LayersOption = None,
    shared_layer: Annotated[
        str | None,
        typer.Option(help="The student has the teacher's layers up to this one, or none. Default: the model's."),
    ] = None,
    student_blocks: Annotated[
        str | None,
        typer.Option(
            help="The student has only so many of the blocks that each layer repeats, or all. Default: the model's."
        ),
    ] = None,
    combine: Annotated[str | None, typer.Option(help="product or sum of the layers' maps.")] = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    learning_rate: RateOption = None,
    holdout: HoldoutOption = 0.2,
    alpha_fail: AlphaFail = 0.01,
    alpha_warn: AlphaWarn = 0.05,
    device: DeviceOption = "auto",
    mixed: MixedOption = "auto",
    tensorboard: TensorboardOption = False,
    resume: ResumeOption = False,
    seed: SeedOption = 0,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """A student that repeats a frozen teacher on normal images, and cannot on defects.

    Example: edge-anomaly train stpm --data parts/ --backbone efficientnet_lite0 --out runs/parts
    """
    _require_training()
    from .stpm import StpmConfig
    from .train import TrainOptions

    _check_backbone(backbone)
    student = _given(shared_layer=shared_layer, student_blocks=_parse_blocks(student_blocks))
    # None is a value of these: the student shares nothing, and has all blocks.
    student |= {name: None for name, value in student.items() if value in ("none", "all")}
    config = StpmConfig(
        backbone=backbone,
        seed=seed,
        **student,
        **_given(
            layers=_parse_layers(layers),
            combine=combine,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
        ),
    )
    options = TrainOptions(holdout, alpha_warn, alpha_fail, strict, force, resume, mixed, device, tensorboard)
    _train(data, out, config, size, resize, roi, weights, options, as_json)


@train_app.command()
def autoencoder(
    data: DataOption,
    out: OutOption,
    encoder: Annotated[
        str | None,
        typer.Option(help="resnet18, resnet34, resnet50 or efficientnet_lite0, frozen. Default: none, from scratch."),
    ] = None,
    weights: WeightsOption = "default",
    size: SizeOption = 224,
    resize: ResizeOption = "squash",
    roi: RoiOption = "0,0,1,1",
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    learning_rate: RateOption = None,
    holdout: HoldoutOption = 0.2,
    alpha_fail: AlphaFail = 0.01,
    alpha_warn: AlphaWarn = 0.05,
    device: DeviceOption = "auto",
    mixed: MixedOption = "auto",
    tensorboard: TensorboardOption = False,
    resume: ResumeOption = False,
    seed: SeedOption = 0,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """The error of a reconstruction: of pixels from scratch, or of a frozen encoder's features.

    Example: edge-anomaly train autoencoder --data parts/ --encoder efficientnet_lite0 --out runs/parts
    """
    _require_training()
    from .autoencoder import AutoencoderConfig
    from .train import TrainOptions

    config = AutoencoderConfig(
        encoder=encoder,
        seed=seed,
        **_given(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate),
    )
    options = TrainOptions(holdout, alpha_warn, alpha_fail, strict, force, resume, mixed, device, tensorboard)
    _train(data, out, config, size, resize, roi, weights, options, as_json)


@train_app.command()
def classifier(
    data: Annotated[
        str | None, typer.Option(help="A folder with train/CLASS and test/CLASS, class folders, or cifar10:FOLDER.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder to write.")] = None,
    depth: Annotated[int, typer.Option(help="18, 34, 50, 101 or 152.")] = 18,
    recipe: Annotated[str, typer.Option(help="documented or strong.")] = "documented",
    size: Annotated[int, typer.Option(help="Side of the model's square input in pixels.")] = 32,
    epochs: EpochsOption = None,
    batch_size: Annotated[int, typer.Option(help="Images of one step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Step size at the start.")] = 0.1,
    weight_decay: Annotated[float | None, typer.Option(help="In place of the recipe's.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="In place of the recipe's; 0 for none.")] = None,
    cutout: Annotated[int | None, typer.Option(help="Side of the blanked square in pixels; 0 for none.")] = None,
    padding: Annotated[int | None, typer.Option(help="Pixels that random crops shift by. Default: size / 8.")] = None,
    validation: Annotated[float, typer.Option(help="Share of every class that chooses the best epoch.")] = 0.1,
    features: Annotated[bool, typer.Option("--features", help="The model also returns the pooled features.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch CIFAR-10 into the folder first.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Print the layers and end; needs no data.")] = False,
    classes: Annotated[int, typer.Option(help="With --summary: number of classes.")] = 10,
    device: DeviceOption = "auto",
    mixed: MixedOption = "auto",
    tensorboard: TensorboardOption = False,
    resume: ResumeOption = False,
    seed: SeedOption = 0,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """A ResNet for small pictures such as CIFAR-10, with labels.

    Example: edge-anomaly train classifier --data cifar10-jpeg/ --recipe strong --out runs/cifar
    Example: edge-anomaly train classifier --depth 50 --summary
    """
    _require_training()
    from .classifier import ClassifierConfig
    from .train_classifier import ClassifierOptions, train_classifier

    if summary:
        from .resnet import summary_text

        ClassifierConfig(depth=depth, image_size=size)
        print(summary_text(depth, classes, size))
        return
    if data is None or out is None:
        raise UsageError("Training needs --data and --out.", "Example: train classifier --data photos/ --out runs/c")
    config = ClassifierConfig(
        depth=depth,
        image_size=size,
        recipe=recipe,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        cutout=cutout,
        padding=padding,
        features=features,
        compile=compiled,
        seed=seed,
    )
    options = ClassifierOptions(validation, download, strict, force, resume, mixed, device, tensorboard)
    run = train_classifier(data, out, config=config, options=options)
    if as_json:
        print(json.dumps({"schema": "edge-anomaly.train/1", "run": str(out), "data": run.data, "figures": run.figures}))


def _train(
    data: str,
    out: Path,
    config: Any,
    size: int,
    resize: str,
    roi: str,
    weights: str,
    options: TrainOptions,
    as_json: bool,
) -> None:
    """Train a detector and, if asked, print the run's record."""
    from edge_anomaly_runtime.preprocess import Preprocess

    from .train import train_detector

    preprocess = Preprocess(size, size, resize, _parse_roi(roi))  # type: ignore[arg-type]  # checked there
    trained = train_detector(data, out, config=config, preprocess=preprocess, weights=weights, options=options)
    if as_json:
        limits = trained.thresholds.model_dump()
        record = {"schema": "edge-anomaly.train/1", "run": str(out), "data": trained.data, "thresholds": limits}
        print(json.dumps(record))


def _require_training() -> None:
    require("train", "torch", "torchvision", "timm", "sklearn", "matplotlib", "safetensors", "accelerate")


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given: the others keep the config's own default."""
    return {name: value for name, value in options.items() if value is not None}


def _check_backbone(name: str) -> None:
    from .backbones import BACKBONES

    if name not in BACKBONES:
        raise did_you_mean("backbone", name, list(BACKBONES))


def _parse_blocks(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"--student-blocks {text!r} is not a number.", "Give 1 or more, or all.")
    return int(text)


def _parse_layers(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _parse_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of whole numbers.", f"Example: {option} 6,9") from None


def _parse_roi(text: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--roi {text!r} is not left,top,right,bottom.", "Example: --roi 0.1,0.1,0.9,0.9") from None
    return left, top, right, bottom
