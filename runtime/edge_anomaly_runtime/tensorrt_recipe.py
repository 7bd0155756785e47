"""What a bundle tells the device about building its TensorRT engines: `tensorrt/recipe.json`."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .bundle import Bundle
from .errors import ArtefactError, UsageError

RECIPE = "tensorrt/recipe.json"
RECIPE_SCHEMA = "edge-anomaly.tensorrt/1"


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class BuildFiles(_Model):
    """The ONNX files of one precision.

    `weak`: for TensorRT up to 10, whose builder chooses FP16 and INT8 by flags. `strong`: for TensorRT from 11 on,
    where every tensor has the type that the graph gives it.
    """

    weak: str
    strong: str


class TensorrtRecipe(_Model):
    """How to build, and how to know that the result is right.

    `float_prefix`: nodes whose name starts so compute in FP32 at any precision, without TF32. `score_tolerance`: by
    precision, the largest |score - expected| / |expected| on golden images. `normal_images`: model inputs as PNG files
    of held-out normal images, from which the engine's own thresholds are set at the rates `alpha_warn`, `alpha_fail`.
    """

    schema_: str = Field(alias="schema", default=RECIPE_SCHEMA)
    opset: int
    graphs: dict[str, BuildFiles] = Field(description="By precision: fp32, fp16, int8.")
    float_prefix: str = "head/"
    workspace_mib: int = Field(default=1024, ge=1)
    optimization_level: int = Field(default=3, ge=0, le=5)
    score_tolerance: dict[str, float]
    normal_images: tuple[str, ...]
    alpha_warn: float
    alpha_fail: float
    device: Literal["gpu"] = "gpu"


def recipe_bytes(recipe: TensorrtRecipe) -> bytes:
    """Return the recipe as it is written to disk, UTF-8 JSON."""
    return recipe.model_dump_json(by_alias=True, indent=1).encode() + b"\n"


def parse_recipe(data: bytes) -> TensorrtRecipe:
    """Read a recipe.

    Raises:
        ArtefactError: it is no JSON, of an unknown schema, or a field is missing or wrong.
    """
    try:
        raw = json.loads(data)
        schema = raw.get("schema") if isinstance(raw, dict) else None
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{RECIPE} is not valid JSON: {error}.", _AGAIN) from None
    if schema != RECIPE_SCHEMA:
        raise ArtefactError(
            f"{RECIPE} has schema {schema!r}; this version of edge-anomaly reads {RECIPE_SCHEMA!r}.",
            "Install the edge-anomaly version that wrote the bundle, or export it again.",
        )
    try:
        return TensorrtRecipe.model_validate(raw)
    except ValidationError as error:
        raise ArtefactError(f"{RECIPE} is not valid: {error}", _AGAIN) from None


def read_recipe(bundle: Bundle) -> TensorrtRecipe:
    """Read the recipe of a verified bundle.

    Raises:
        UsageError: the bundle was not exported for TensorRT.
        ArtefactError: the recipe cannot be read, or names a file that the bundle does not hold.
    """
    if RECIPE not in bundle.manifest.files:
        raise UsageError(f"Bundle {bundle.path} was not exported for TensorRT: it has no {RECIPE}.", _AGAIN)
    recipe = parse_recipe(bundle.read(RECIPE))
    graphs = [name for files in recipe.graphs.values() for name in (files.weak, files.strong)]
    for name in (*graphs, *recipe.normal_images):
        if name not in bundle.manifest.files:
            raise ArtefactError(f"{RECIPE} names {name!r}, which is not in bundle {bundle.path}.", _AGAIN)
    return recipe


def build_files(recipe: TensorrtRecipe, precision: str) -> BuildFiles:
    """Return the ONNX files of a precision.

    Raises:
        UsageError: the bundle was exported without that precision.
    """
    if precision not in recipe.graphs:
        raise UsageError(
            f"The bundle has no TensorRT graph of precision {precision}; it has {', '.join(recipe.graphs)}.",
            f"Choose one of these, or export it again with --target tensorrt --precision {precision}.",
        )
    return recipe.graphs[precision]


def score_tolerance(recipe: TensorrtRecipe, precision: str) -> float:
    """Return how far a golden image's score may be off, relative to the expected value.

    Raises:
        ArtefactError: the recipe names none for this precision.
    """
    if precision not in recipe.score_tolerance:
        raise ArtefactError(f"{RECIPE} has no score_tolerance for {precision}.", _AGAIN)
    return recipe.score_tolerance[precision]


_AGAIN = "Export the bundle again with --target tensorrt."
