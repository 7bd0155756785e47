"""ViT k-NN: the cosine distance of every patch token to the nearest of a bank of normal ones.

Patch tokens and the mean of the highest distances as image score follow AnomalyDINO (Damm et al. 2025), the bank is
the greedy k-centre coreset of PatchCore (Roth et al. 2022). The transformer is written out here, so that a finished
run depends on no version of transformers, which only reads checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from edge_anomaly_runtime.errors import MissingRequirementError, UsageError, missing_extra
from edge_anomaly_runtime.progress import is_interactive, say

from .backbones import DEFAULT_WEIGHTS, IMAGENET, RANDOM_WEIGHTS
from .features import embeddings_of, mean_of_largest
from .image_set import ImageSet, too_few_images
from .patchcore import (
    ADVISED_IMAGES,
    MAX_PATCHES,
    MIN_IMAGES,
    check_memory,
    chosen_patches,
    sample_patches,
    vectors_to_keep,
)
from .training import FitSession, resolve_device

Embeddings = npt.NDArray[np.float32]

DEFAULT_CHECKPOINT = "google/vit-base-patch16-224"
# The commit that is downloaded, so that the same name always means the same weights.
_REVISIONS = {DEFAULT_CHECKPOINT: "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"}

# Channels that the coreset works on, before and after the mean is taken off (`k_centre`).
_PROJECTED = 2 * 128
_BYTES = 4
_HUB_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Architecture:
    """Sizes of a vision transformer, as in its config.json.

    layers: blocks of the whole checkpoint. image_size: side in pixels that its position embeddings are for.
    epsilon: of its LayerNorms. mean, std: three numbers each, of pixels from 0 to 1.
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    patch: int
    image_size: int
    epsilon: float
    mean: list[float]
    std: list[float]


VIT_BASE = Architecture(768, 12, 12, 3072, 16, 224, 1e-12, [0.5] * 3, [0.5] * 3)


@dataclass(frozen=True)
class VitKnnConfig:
    """Everything that decides a ViT k-NN model apart from its images.

    checkpoint: name on the Hugging Face hub, a folder with config.json and model.safetensors, or a .safetensors file
        beside its config.json; of type vit or dinov2.
    blocks: transformer blocks whose patch tokens are compared, counted from 0; None is one past the middle and one
        near the end, 6 and 9 of 12.
    share: share of all normal patches that the bank keeps, above 0 to 1.
    max_bank: the most vectors that the bank keeps.
    memory_budget: the most megabytes (1e6 bytes) that the bank takes in the exported graph; None is no limit of its
        own beside `max_bank`.
    bank: number of vectors, in place of the three above; None leaves it to them, and `fit` sets it to the true number.
    score_share: the score is the mean of this share of the highest patch distances, rounded up to whole patches.
    architecture: fields of `Architecture`, set by `build`; with them a run is read back without the checkpoint.
    """

    checkpoint: str = DEFAULT_CHECKPOINT
    blocks: tuple[int, ...] | None = None
    share: float = 0.1
    max_bank: int = 10_000
    memory_budget: float | None = None
    bank: int | None = None
    score_share: float = 0.01
    seed: int = 0
    architecture: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"A bank share of {self.share:g} is not possible.", "Choose above 0, up to 1.")
        smallest = self.max_bank if self.bank is None else min(self.bank, self.max_bank)
        if smallest < 1:
            raise UsageError(f"A bank of {smallest} vectors is not possible.", "Choose 1 or more.")
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise UsageError(f"A memory budget of {self.memory_budget:g} MB is not possible.", "Choose above 0.")
        if not 0 < self.score_share <= 1:
            raise UsageError(f"A score share of {self.score_share:g} is not possible.", "Choose above 0, up to 1.")
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) < len(self.blocks)):
            raise UsageError(f"The blocks {self.blocks} are not possible.", "Name one or more, each once.")

    @property
    def vit(self) -> Architecture:
        """The transformer's sizes: those that `build` has set, else those that the checkpoint is known to have.

        Raises:
            UsageError: the checkpoint has not been read yet.
        """
        if self.architecture is not None:
            return Architecture(**self.architecture)
        if self.checkpoint == DEFAULT_CHECKPOINT:
            return VIT_BASE
        raise UsageError(
            f"The sizes of {self.checkpoint} are not known before it is read.",
            f"For random weights take --checkpoint {DEFAULT_CHECKPOINT}.",
        )

    @property
    def used_blocks(self) -> tuple[int, ...]:
        """The blocks whose tokens are used, ascending and counted from 0."""
        layers = self.vit.layers
        if self.blocks is None:
            # Not the last: of its output a classifier was trained through the class token alone. FastFlow (Yu et al.
            # 2021) takes a DeiT after 7 of its 12 blocks too.
            return tuple(sorted({max(0, layers * twelfths // 12 - 1) for twelfths in (7, 10)}))
        if not all(0 <= block < layers for block in self.blocks):
            raise UsageError(
                f"The blocks {', '.join(map(str, self.blocks))} are not all there.",
                f"{self.checkpoint} has {layers}: choose from 0 to {layers - 1}.",
            )
        return tuple(sorted(self.blocks))

    @property
    def dims(self) -> int:
        """Number of channels of an embedding: those of all used blocks."""
        return self.vit.hidden * len(self.used_blocks)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of patches for an input of this size.

        Raises:
            UsageError: the size is not a multiple of the patch.
        """
        patch = self.vit.patch
        if height % patch or width % patch:
            near = [max(1, round(side / patch)) * patch for side in (height, width)]
            raise UsageError(
                f"{height}x{width} pixels do not divide into patches of {patch}.",
                f"Choose multiples of {patch}, {near[0]}x{near[1]} for instance.",
            )
        return height // patch, width // patch

    def bank_size(self, patches: int) -> int:
        """Return how many of so many normal patches the bank keeps.

        Raises:
            UsageError: `bank` is more than there are to choose from, or `memory_budget` holds not one vector.
        """
        vector = self.dims * _BYTES
        if self.bank is None and self.memory_budget is not None and self.memory_budget * 1e6 < vector:
            raise UsageError(
                f"A memory budget of {self.memory_budget:g} MB holds not one vector of {vector} bytes.",
                "Choose a larger one, or fewer --blocks.",
            )
        return vectors_to_keep(
            patches,
            vector,
            bank=self.bank,
            share=self.share,
            max_bank=self.max_bank,
            memory_budget=self.memory_budget,
        )

    def parameters(self, height: int, width: int) -> int:
        """Return the number of the backbone's weights, blocks after the last used one not counted."""
        vit, (rows, columns) = self.vit, self.grid(height, width)
        embedding = (3 * vit.patch**2 + 1) * vit.hidden + (rows * columns + 1) * vit.hidden
        block = (4 * vit.hidden + 8) * vit.hidden + (2 * vit.hidden + 1) * vit.mlp + vit.hidden
        return embedding + (self.used_blocks[-1] + 1) * block + 2 * vit.hidden


class Attention(nn.Module):
    """Multi-head self-attention of tokens [N, T, hidden]."""

    def __init__(self, vit: Architecture) -> None:
        super().__init__()
        self.heads = vit.heads
        self.scale = (vit.hidden // vit.heads) ** -0.5
        self.query, self.key, self.value, self.output = (nn.Linear(vit.hidden, vit.hidden) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, T, hidden]."""
        # Written out: the exporter turns torch's fused attention into a third more nodes.
        split = (*x.shape[:2], self.heads, -1)
        query = self.query(x).reshape(split).permute(0, 2, 1, 3)
        key = self.key(x).reshape(split).permute(0, 2, 3, 1)
        value = self.value(x).reshape(split).permute(0, 2, 1, 3)
        mixed = ((query * self.scale) @ key).softmax(dim=3) @ value
        return self.output(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One transformer block with the norms first."""

    def __init__(self, vit: Architecture) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(vit.hidden, eps=vit.epsilon)
        self.attention = Attention(vit)
        self.norm2 = nn.LayerNorm(vit.hidden, eps=vit.epsilon)
        self.mlp = nn.Sequential(nn.Linear(vit.hidden, vit.mlp), nn.GELU(), nn.Linear(vit.mlp, vit.hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, T, hidden]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class VitBackbone(nn.Module):
    """Patch tokens of chosen blocks from camera bytes; frozen, and cut after the last of these blocks.

    Input uint8 [N, H, W, 3] RGB; output one float32 [N, h*w, hidden] per block, row by row, through the checkpoint's
    last LayerNorm. `prefix` is the class token with its position; `positions` are those of the patches at this size.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, vit: Architecture, taps: tuple[int, ...], grid: tuple[int, int]) -> None:
        super().__init__()
        self.taps = taps
        self.patches = nn.Conv2d(3, vit.hidden, vit.patch, stride=vit.patch)
        self.prefix = nn.Parameter(torch.empty(1, 1, vit.hidden))
        self.positions = nn.Parameter(torch.empty(1, grid[0] * grid[1], vit.hidden))
        self.blocks = nn.ModuleList(Block(vit) for _ in range(taps[-1] + 1))
        self.norm = nn.LayerNorm(vit.hidden, eps=vit.epsilon)
        # Bytes are normalised in one step: (x / 255 - mean) / std = (x - 255 mean) / (255 std).
        self.register_buffer("mean", torch.tensor(vit.mean).reshape(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("scale", 1 / (torch.tensor(vit.std).reshape(1, 3, 1, 1) * 255), persistent=False)
        self.requires_grad_(False)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return the tokens of each tapped block."""
        x = self.patches((image.permute(0, 3, 1, 2).float() - self.mean) * self.scale)
        x = x.flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                outputs.append(self.norm(x[:, 1:]))
        return outputs


class VitKnnHead(nn.Module):
    """From tokens to `score` [N] and `anomaly_map` [N, h, w], all in float; `bank` is float32 [dims, vectors]."""

    bank: torch.Tensor
    chosen: torch.Tensor

    def __init__(self, config: VitKnnConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.columns = grid
        self.highest = math.ceil(config.score_share * self.rows * self.columns - 1e-9)
        self.register_buffer("bank", torch.zeros(config.dims, config.bank or 1))
        self.register_buffer("chosen", torch.zeros(config.bank or 1, dtype=torch.int64))

    def embed(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        """Return unit vectors float32 [N, h*w, dims], whose product is the mean of the blocks' cosines."""
        units = [token / torch.linalg.vector_norm(token, dim=2, keepdim=True).clamp(min=1e-12) for token in tokens]
        return torch.cat(units, dim=2) * (1 / math.sqrt(len(units)))

    def judge(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return score [N], the mean of the highest distances, and the map [N, h, w] of 1 - cosine, 0 to 2."""
        # Rounding can lift a cosine above 1.
        distances = (1 - (embedding @ self.bank).amax(dim=2)).clamp(min=0)
        anomaly_map = distances.reshape(-1, self.rows, self.columns)
        return mean_of_largest(distances, self.highest), anomaly_map

    def forward(self, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score, anomaly map, and the embedding that the bank is chosen from."""
        embedding = self.embed(tokens)
        score, anomaly_map = self.judge(embedding)
        return score, anomaly_map, embedding


class VitKnn(nn.Module):
    """The detector: frozen transformer, float head. Input uint8 [N, H, W, 3]."""

    def __init__(self, config: VitKnnConfig, backbone: VitBackbone, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = VitKnnHead(config, grid)
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return score float32 [N], anomaly map float32 [N, h, w] and embedding float32 [N, h*w, dims]."""
        return self.head(self.backbone(image))  # type: ignore[no-any-return]


def build(config: VitKnnConfig, height: int, width: int, *, weights: str = DEFAULT_WEIGHTS) -> VitKnn:
    """Return the detector with its transformer's weights and no bank yet; `architecture` and `blocks` become values.

    `weights`: `default` reads the config's checkpoint, a path reads that folder or .safetensors file in its place,
    `random` reads nothing (seeded; for timing, tests and runs whose weights are loaded afterwards).

    Raises:
        UsageError: the size, the blocks or the checkpoint cannot be used.
        MissingRequirementError: the checkpoint cannot be downloaded, or transformers is not installed.
    """
    state = None
    if weights != RANDOM_WEIGHTS:
        vit, state = read_checkpoint(_checkpoint_path(config.checkpoint, weights))
        config = replace(config, architecture=asdict(vit))
    config = replace(config, architecture=asdict(config.vit), blocks=config.used_blocks)
    grid = config.grid(height, width)
    backbone = VitBackbone(config.vit, config.used_blocks, grid)
    if state is None:
        _randomize(backbone, config.seed)
    else:
        backbone.load_state_dict(_backbone_state(state, len(backbone.blocks), grid))
    return VitKnn(config, backbone, grid)


def announce(config: VitKnnConfig, height: int, width: int, images: int) -> list[str]:
    """Return what to tell the user before the fit: patches, parameters, size of the bank, memory for choosing it."""
    if config.architecture is None and config.checkpoint != DEFAULT_CHECKPOINT:
        return [f"{config.checkpoint}: its sizes are known when it has been read"]
    rows, columns = config.grid(height, width)
    parameters, patches = config.parameters(height, width), images * rows * columns
    size = config.bank_size(patches)
    lines = [
        f"{config.checkpoint}, blocks {', '.join(map(str, config.used_blocks))} of 0 to {config.vit.layers - 1}: "
        f"{parameters / 1e6:.1f} M parameters ({parameters * _BYTES / 1e6:.0f} MB), "
        f"{rows}x{columns} patches of {config.vit.patch} px, {config.dims} channels",
        f"bank of {size:,} of {patches:,} patches, {size * config.dims * _BYTES / 1e6:.1f} MB, "
        f"{size * config.dims * rows * columns / 1e9:.2f} GMAC an image; choosing it takes up to "
        f"{fit_bytes(config, patches) / 1e9:.1f} GB of memory",
    ]
    if patches > MAX_PATCHES:
        lines.append(f"Note: the bank is chosen from a random {MAX_PATCHES:,} of these patches.")
    if MIN_IMAGES <= images < ADVISED_IMAGES:
        lines.append(
            f"Warning: {images} images are few; {ADVISED_IMAGES} or more are advisable, and with few of them all of "
            "their patches (--share 1)."
        )
    return lines


def fit_bytes(config: VitKnnConfig, patches: int) -> int:
    """Return the memory in bytes that choosing a bank from so many patches takes at its peak."""
    pool = min(patches, MAX_PATCHES)
    return _BYTES * (pool * (config.dims + _PROJECTED) + 2 * config.bank_size(patches) * config.dims)


def fit(model: VitKnn, images: ImageSet, session: FitSession) -> None:
    """Choose the bank from the tokens of all images, in one pass on the session's device.

    Raises:
        UsageError: there are fewer images than MIN_IMAGES or fewer patches than the bank is to have, a token is not
            finite, or the work does not fit into memory.
    """
    if len(images) < MIN_IMAGES:
        raise too_few_images(len(images), MIN_IMAGES, ADVISED_IMAGES)
    grid = (model.head.rows, model.head.columns)
    patches = len(images) * grid[0] * grid[1]
    config = replace(model.config, bank=model.config.bank_size(patches))
    needed = fit_bytes(config, patches)
    check_memory(
        needed,
        f"Choosing the bank needs {needed / 1e9:.1f} GB of memory",
        "Choose a smaller --bank or --share, fewer --blocks, or fewer images.",
    )
    embeddings = embeddings_of(model, images, resolve_device(session.device), model.head.embed)
    bank, chosen = _fitted(config, embeddings, None)
    model.config, model.head = config, VitKnnHead(config, grid).eval()
    model.head.bank.copy_(torch.from_numpy(bank))
    model.head.chosen.copy_(torch.from_numpy(chosen))


def refit(
    config: VitKnnConfig, embeddings: Iterable[Embeddings], *, chosen: torch.Tensor | None = None
) -> dict[str, Embeddings]:
    """Return the head's bank by name, from embeddings float32 [N, h*w, dims] of whichever graph made them.

    chosen: int64 [bank], the head's own, keeps the patches that `fit` has chosen from the same images; without it they
    are chosen anew.

    Raises:
        UsageError: there are fewer patches than the bank is to have, or one is not finite.
    """
    return {"bank": _fitted(config, embeddings, None if chosen is None else chosen.numpy())[0]}


def _fitted(
    config: VitKnnConfig, embeddings: Iterable[Embeddings], chosen: npt.NDArray[np.int64] | None
) -> tuple[Embeddings, npt.NDArray[np.int64]]:
    """Return the bank [dims, size], and which patches of the sample are in it."""
    as_maps = (batch.transpose(0, 2, 1)[..., np.newaxis] for batch in embeddings)
    patches, seen = sample_patches(as_maps, config.dims, MAX_PATCHES, config.seed)
    # Unit vectors: |a - b|^2 = 2 (1 - cosine), so the farthest by distance is the farthest by cosine.
    chosen = chosen_patches(patches, config.bank_size(seen), config.seed, chosen)
    return np.ascontiguousarray(patches[chosen].T), chosen


def _randomize(backbone: VitBackbone, seed: int) -> None:
    """Fill in the usual start values of a ViT: truncated normal 0.02, biases 0, norms 1."""
    torch.manual_seed(seed)
    for name, value in backbone.named_parameters():
        if "norm" in name:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            value.fill_(0.0)
        else:
            nn.init.trunc_normal_(value, std=0.02)


def _checkpoint_path(checkpoint: str, weights: str) -> Path:
    """Return the local folder or file with the weights, after a download where need be."""
    chosen = Path(checkpoint if weights == DEFAULT_WEIGHTS else weights)
    if chosen.exists():
        return chosen
    if weights != DEFAULT_WEIGHTS or chosen.is_absolute() or chosen.suffix == ".safetensors":
        raise UsageError(
            f"There is no checkpoint {chosen}.",
            "Give a folder with config.json and model.safetensors, or a .safetensors file beside its config.json.",
        )
    return _hub_folder(checkpoint)


def _hub_folder(checkpoint: str) -> Path:
    """Return the folder of the hub's cache that holds the checkpoint; the hub is asked only for what is not there."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise missing_extra("train vit-knn", "transformers", "vit") from None
    revision = _REVISIONS.get(checkpoint)
    try:
        names = ("config.json", "model.safetensors")
        cached = [hub.try_to_load_from_cache(checkpoint, name, revision=revision) for name in names]
        if all(isinstance(path, str) for path in cached):
            path = Path(str(cached[1]))
        else:
            # A single request first: the download itself tries five times more, half a minute, where there is no hub.
            hub.get_hf_file_metadata(
                hub.hf_hub_url(checkpoint, names[0], revision=revision), timeout=_HUB_TIMEOUT_SECONDS
            )
            say(f"downloading {checkpoint} from the Hugging Face hub")
            path = _download(checkpoint, revision)
    except Exception as error:  # the errors of the hub and of the HTTP client below it share no base
        raise _unreachable(checkpoint, error) from error
    # The hub names the stored file after the SHA-256 of what it should hold.
    digest = path.resolve().name
    if len(digest) == 64 and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise MissingRequirementError(
            f"{path.resolve()} is damaged: its SHA-256 is not its name.", "Delete the file, then try again."
        )
    return path.parent


def _download(checkpoint: str, revision: str | None) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.redirect_stdout(sys.stderr), _bars_on_a_terminal_only():
        hub.hf_hub_download(checkpoint, "config.json", revision=revision)
        with contextlib.suppress(EntryNotFoundError):  # some checkpoints have none
            hub.hf_hub_download(checkpoint, "preprocessor_config.json", revision=revision)
        return Path(hub.hf_hub_download(checkpoint, "model.safetensors", revision=revision))


@contextlib.contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if is_interactive() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _unreachable(checkpoint: str, error: Exception) -> MissingRequirementError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MissingRequirementError(
        f"Cannot get {checkpoint}: there is no such folder, and the Hugging Face hub failed: {reason.rstrip('.')}.",
        "Two ways out: --weights PATH with a copy of its folder (config.json and model.safetensors), or a detector "
        "whose weights come with pip: edge-anomaly train patchcore --backbone efficientnet_lite0.",
    )


def read_checkpoint(path: Path) -> tuple[Architecture, dict[str, torch.Tensor]]:
    """Read a folder with config.json and model.safetensors, or a .safetensors file beside its config.json.

    Return the sizes and the float32 state dict as transformers names it: safetensors only, no code of the checkpoint's.

    Raises:
        UsageError: it is no vision transformer of a known type, or not whole.
        MissingRequirementError: transformers is not installed.
    """
    folder, file = (path, None) if path.is_dir() else (path.parent, path)
    if file is not None and file.suffix != ".safetensors":
        raise UsageError(
            f"{file} is not a .safetensors file.", "Save the model with save_pretrained, and give its folder."
        )
    kind = _json(folder / "config.json").get("model_type")
    if kind not in ("vit", "dinov2"):
        raise UsageError(f"{folder} holds a model of type {kind!r}.", "Give a checkpoint of type vit or dinov2.")
    try:
        from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel
    except ImportError:
        raise missing_extra("train vit-knn", "transformers", "vit") from None
    settings_type, model_type = (ViTConfig, ViTModel) if kind == "vit" else (Dinov2Config, Dinov2Model)
    try:
        with _quiet_transformers():
            settings = settings_type.from_pretrained(folder, local_files_only=True)
            load: Any = model_type.from_pretrained  # its annotation forgets the loading info
            network, report = load(
                None if file else folder,
                config=settings,
                state_dict=_safetensors(file) if file else None,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # JSON, safetensors, OS, shape and validation errors share no base
        raise UsageError(
            f"Cannot read a ViT from {path}: {str(error).strip().splitlines()[0]}",
            "Give a folder as written by save_pretrained.",
        ) from error
    missing = [name for name in report["missing_keys"] if not name.startswith("pooler")]
    if missing:
        raise UsageError(
            f"{path} lacks {len(missing)} tensors of its architecture, first {min(missing)}.",
            "Give the weights that belong to its config.json.",
        )
    state = {_plain_name(name): value.float() for name, value in network.state_dict().items()}
    return _architecture(settings, folder), state


def _safetensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot read {path}: {error}.", "Give a folder as written by save_pretrained.") from error
    return record if isinstance(record, dict) else {}


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep standard output for data, and leave out the progress bar and the report on unused classifier weights."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # has no annotations
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _architecture(settings: Any, folder: Path) -> Architecture:
    """Return the sizes of a ViTConfig or a Dinov2Config; what the transformer here cannot do is refused."""
    refused = {
        "num_channels": (settings.num_channels, 3),
        "hidden_act": (settings.hidden_act, "gelu"),
        "use_swiglu_ffn": (getattr(settings, "use_swiglu_ffn", False), False),
    }
    for name, (value, wanted) in refused.items():
        if value != wanted:
            raise UsageError(f"{folder} has {name} {value!r}.", f"Only {name} {wanted!r} is supported.")
    file = folder / "preprocessor_config.json"
    pixels = _json(file) if file.is_file() else {}
    mean, std = ((0.5,) * 3, (0.5,) * 3) if settings.model_type == "vit" else IMAGENET
    return Architecture(
        hidden=settings.hidden_size,
        layers=settings.num_hidden_layers,
        heads=settings.num_attention_heads,
        mlp=getattr(settings, "intermediate_size", 0) or settings.hidden_size * settings.mlp_ratio,
        patch=_side(settings.patch_size, folder),
        image_size=_side(settings.image_size, folder),
        epsilon=settings.layer_norm_eps,
        mean=list(pixels.get("image_mean", mean)),
        std=list(pixels.get("image_std", std)),
    )


def _side(size: Any, folder: Path) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UsageError(f"{folder} is for {size} pixels.", "Give a checkpoint of square images and patches.")
    return int(sides.pop())


# Names of transformers 4 and of the files on the hub, and what transformers 5 calls the same.
_RENAMED = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}


def _plain_name(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _backbone_state(given: dict[str, torch.Tensor], depth: int, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return the state of `VitBackbone` with `depth` blocks from that of a checkpoint.

    The LayerScale of DINOv2 becomes part of the layer before it.
    """
    prefix, positions = _positions_for_grid(given["embeddings.position_embeddings"], grid)
    state = {
        "patches.weight": given["embeddings.patch_embeddings.projection.weight"],
        "patches.bias": given["embeddings.patch_embeddings.projection.bias"],
        "prefix": given["embeddings.cls_token"] + prefix,
        "positions": positions,
        "norm.weight": given["layernorm.weight"],
        "norm.bias": given["layernorm.bias"],
    }
    for index in range(depth):
        old, new = f"layers.{index}", f"blocks.{index}"
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                state[f"{new}.{norm}.{part}"] = given[f"{old}.{norm}.{part}"]
        layers = {
            "attention.query": _linear(given, f"{old}.attention.q_proj"),
            "attention.key": _linear(given, f"{old}.attention.k_proj"),
            "attention.value": _linear(given, f"{old}.attention.v_proj"),
            "attention.output": _linear(given, f"{old}.attention.o_proj", f"{old}.layer_scale1.lambda1"),
            "mlp.0": _linear(given, f"{old}.mlp.fc1"),
            "mlp.2": _linear(given, f"{old}.mlp.fc2", f"{old}.layer_scale2.lambda1"),
        }
        for name, (weight, bias) in layers.items():
            state[f"{new}.{name}.weight"], state[f"{new}.{name}.bias"] = weight, bias
    return state


def _linear(given: dict[str, torch.Tensor], name: str, scale: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a layer, scaled by output where there is such a scale; no bias is a bias of 0."""
    weight = given[f"{name}.weight"]
    bias = given.get(f"{name}.bias", torch.zeros(len(weight)))
    factor = given.get(scale, torch.ones(len(weight)))
    return weight * factor[:, None], bias * factor


def _positions_for_grid(embeddings: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the position of the class token [1, 1, hidden] and of the patches [1, h*w, hidden] of another grid.

    `embeddings` [1, 1 + side^2, hidden] are resized bicubically, as transformers does for its interpolation option.
    """
    prefix, patches = embeddings[:, :1], embeddings[:, 1:]
    side = math.isqrt(patches.shape[1])
    if (side, side) == grid:
        return prefix, patches
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return prefix, resized.flatten(2).transpose(1, 2)
