"""Training by gradient descent: epochs with checkpoints, logged metrics and clean ways to stop.

Everything random in epoch e follows from the seed, e and the number of the process, so a training continued from its
checkpoint equals one that was never interrupted. Started by `torchrun`, every process works on its share of each batch
and gradients are averaged over the processes; `batch_size` is the size of the whole batch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset

from edge_anomaly_runtime.atomic import disk_errors, replace_file
from edge_anomaly_runtime.errors import ArtefactError, MissingRequirementError, UsageError, did_you_mean, missing_extra
from edge_anomaly_runtime.progress import is_interactive, say

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SCHEMA = "edge-anomaly.checkpoint/1"

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Losses = Mapping[str, torch.Tensor]
Record = dict[str, float]
State = dict[str, torch.Tensor]
T = TypeVar("T")

# Independent streams of random numbers within an epoch; process r trains on stream _TRAINING + r.
_ORDER, _MONITOR, _TRAINING = 0, 1, 2

# Without a terminal: about this many lines in a long training, and few within so many seconds.
_LINES, _QUIET_SECONDS = 20, 3.0


@dataclass(frozen=True)
class FitSession:
    """Where and how a training runs; nothing here changes what is trained, rounding apart.

    folder: existing folder for the checkpoint, metrics.jsonl and logs.
    resume: continue from the folder's checkpoint; without it an older checkpoint there is dropped.
    precision: auto is fp32 on a CPU, bf16 on GPUs that have it, else fp16.
    device: auto is a GPU where there is one.
    tensorboard: also write event files, into `folder`/tensorboard.
    """

    folder: Path
    resume: bool = False
    precision: str = "auto"
    device: str = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise did_you_mean("precision", self.precision, list(get_args(Precision)))


class StopTraining(Exception):
    """Raised by a monitor to end the training: the epoch that it judged is logged, its state is not kept."""

    def __init__(self, reason: str, metrics: Mapping[str, float] | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.metrics = dict(metrics or {})


def resolve_device(device: str) -> torch.device:
    """Return the torch device for auto, cpu or cuda.

    Raises:
        UsageError: it is none of the three.
        MissingRequirementError: cuda is asked for and torch sees no GPU.
    """
    if device not in get_args(Device):
        raise did_you_mean("device", device, list(get_args(Device)))
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingRequirementError(
            f"--device cuda: this torch ({torch.__version__}) sees no GPU.",
            "Install a driver and a CUDA build of torch, or choose --device cpu.",
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def fit_epochs(
    model: nn.Module,
    losses: Callable[[nn.Module, Any], Losses],
    images: Dataset[Any],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    session: FitSession,
    *,
    settings: Mapping[str, Any],
    epochs: int,
    batch_size: int,
    seed: int,
    clip_norm: float | None = None,
    monitor: Callable[[nn.Module, int], dict[str, float]] | None = None,
    best: str | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> list[Record]:
    """Train `model` in place and return one record per epoch; afterwards it is on the CPU and in evaluation mode.

    `losses` gets the model in training mode and a batch on its device; it returns scalars, means over the batch, under
    the same names every time, of which "loss" is minimised. Which parameters take a gradient must not change meanwhile.
    `monitor` gets the model in evaluation mode, without gradients, and the epoch, counted from 1. The state with the
    highest metric `best` is restored at the end; without `best` that of the last epoch that no monitor stopped.
    `settings` are JSON values and must be the same on resume. A record holds epoch, the mean losses, lr (lr_1, ... for
    further parameter groups), seconds, images_per_second and the monitor's metrics.

    Raises:
        UsageError: a loss is not finite; on resume, there is no checkpoint or the settings differ.
        ArtefactError: the checkpoint is damaged or does not fit the model.
        MissingRequirementError: there is no GPU, or no TensorBoard.
        OutputError: the disk is full.
    """
    accelerator = _accelerator(session)
    objective, stepper = accelerator.prepare(_Objective(model, losses), optimizer)
    count = len(cast("list[Any]", images))
    training = _Training(
        accelerator=accelerator,
        model=model,
        objective=objective,
        optimizer=optimizer,
        stepper=stepper,
        scheduler=scheduler,
        clip_norm=clip_norm,
        folder=session.folder,
        settings=_as_json({**settings, "number of images": count}),
        kept=_copy(model),
    )
    _begin(training, resume=session.resume)
    with _Log(training, session, epochs, -(-count // batch_size)) as log, _fixed_order_of_sums(accelerator.device):
        for epoch in range(len(training.history) + 1, epochs + 1):
            if training.stopped is not None:
                break
            try:
                shares = _shares(count, batch_size, _derived_seed(seed, epoch, _ORDER), accelerator)
                _seed_torch_numpy_python(_derived_seed(seed, epoch, _TRAINING + accelerator.process_index))
                record = _train_epoch(training, epoch, shares, images, collate, log)
                _seed_torch_numpy_python(_derived_seed(seed, epoch, _MONITOR))
                with log.paused():
                    metrics, training.stopped = _judge(training, epoch, monitor)
                _end_epoch(training, {**record, **metrics}, best)
            except KeyboardInterrupt:
                advice = "continue with --resume" if training.checkpoint.exists() else "there is no checkpoint yet"
                log.say(f"interrupted in epoch {epoch}; {advice}")
                raise
            log.epoch(training)
    model.load_state_dict(training.kept)
    model.cpu().eval()
    return training.history


@dataclass
class _Training:
    """What an epoch works on, and how far the training has come.

    `kept` is the state that the model ends with, of epoch `kept_epoch` (0: as it came), whose metric is `kept_value`.
    """

    accelerator: Accelerator
    model: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    stepper: AcceleratedOptimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    clip_norm: float | None
    folder: Path
    settings: dict[str, Any]
    kept: State
    kept_epoch: int = 0
    kept_value: float = -math.inf
    history: list[Record] = field(default_factory=list)
    stopped: str | None = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT


class _Objective(nn.Module):
    """The losses as a forward pass: what autocast and DDP wrap, while `losses` sees the plain model."""

    def __init__(self, model: nn.Module, losses: Callable[[nn.Module, Any], Losses]) -> None:
        super().__init__()
        self.model = model
        self.losses = losses

    def forward(self, batch: Any) -> tuple[torch.Tensor, State]:
        """Return the loss to minimise, and all losses cut off their graphs, which DDP would wait for otherwise."""
        values = self.losses(self.model, batch)
        return values["loss"], {name: value.detach() for name, value in values.items()}


def _accelerator(session: FitSession) -> Accelerator:
    device, precision = resolve_device(session.device), session.precision
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if device.type == "cpu" else "bf16" if bf16 else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU.", "Choose fp32 or bf16.")
    # Accelerate keeps a process's first device and precision for good; a second training may want others.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        # Parameters that no loss uses would stop DDP otherwise.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _begin(training: _Training, *, resume: bool) -> None:
    """Load the checkpoint, or drop one of an older training; make metrics.jsonl agree with it."""
    if resume:
        _load_checkpoint(training)
    if training.accelerator.is_main_process:
        if resume:
            say(f"continuing after epoch {len(training.history)} of {training.checkpoint}")
        else:
            training.checkpoint.unlink(missing_ok=True)
        replace_file(training.folder / METRICS, "".join(map(_json_line, training.history)).encode())


def _shares(count: int, batch_size: int, seed: int, accelerator: Accelerator) -> list[list[int]]:
    """Return which images of every shuffled batch this process trains on; each process gets as many as the others."""
    process, processes = accelerator.process_index, accelerator.num_processes
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    shares = []
    for start in range(0, count, batch_size):
        batch = order[start : start + batch_size]
        # A batch that cannot be shared evenly begins again with its first images.
        even = -(-len(batch) // processes) * processes
        shares.append(list(itertools.islice(itertools.cycle(batch), process, even, processes)))
    return shares


def _train_epoch(
    training: _Training,
    epoch: int,
    shares: list[list[int]],
    images: Dataset[Any],
    collate: Callable[[list[Any]], Any] | None,
    log: _Log,
) -> Record:
    """Take one optimizer step per batch; return the epoch's record without the monitor's metrics."""
    started, rates = time.perf_counter(), [float(group["lr"]) for group in training.optimizer.param_groups]
    training.model.train()
    steps = (_step(training, batch) for batch in DataLoader(images, batch_sampler=shares, collate_fn=collate))
    sums: Record = {}
    for number, (share, (names, values)) in enumerate(zip(shares, _one_late(steps), strict=True), start=1):
        losses = dict(zip(names, values.tolist(), strict=True))
        for name, value in losses.items():
            if not math.isfinite(value):
                raise _diverged(training, f"The loss {name!r} is {value} in epoch {epoch}, batch {number}")
        sums = {name: sums.get(name, 0.0) + len(share) * value for name, value in losses.items()}
        log.batch(epoch, number, losses)
    _check_weights(training, epoch)
    seen, seconds = sum(map(len, shares)), time.perf_counter() - started
    return {
        "epoch": epoch,
        **{name: total / seen for name, total in sums.items()},
        **{f"lr_{group}" if group else "lr": rate for group, rate in enumerate(rates)},
        "seconds": seconds,
        "images_per_second": seen * training.accelerator.num_processes / seconds,
    }


def _step(training: _Training, batch: Any) -> tuple[list[str], torch.Tensor]:
    """Take one optimizer step; return the names of the losses and their means over the processes, float32 [losses]."""
    accelerator = training.accelerator
    training.stepper.zero_grad()
    loss, losses = training.objective(send_to_device(batch, accelerator.device, non_blocking=True))
    accelerator.backward(loss)
    if training.clip_norm is not None:
        groups = training.optimizer.param_groups
        accelerator.clip_grad_norm_([weight for group in groups for weight in group["params"]], training.clip_norm)
    training.stepper.step()
    # The mean over the processes, so that they agree on what is logged and on when to stop.
    return list(losses), accelerator.reduce(torch.stack([value.float() for value in losses.values()]), "mean")


def _one_late(items: Iterator[T]) -> Iterator[T]:
    """Yield each item after the next one was made: a GPU has work while the values of the last batch are read."""
    previous = next(items)
    for item in items:
        yield previous
        previous = item
    yield previous


def _check_weights(training: _Training, epoch: int) -> None:
    """Stop before weights that the last step of an epoch has spoilt reach the checkpoint."""
    for name, weight in training.model.named_parameters():
        if weight.requires_grad and not weight.isfinite().all():
            raise _diverged(training, f"The weights {name!r} are not finite after epoch {epoch}")


def _diverged(training: _Training, what: str) -> UsageError:
    advice = f"Choose a smaller learning rate (it was {training.optimizer.param_groups[0]['lr']:g})"
    if training.accelerator.mixed_precision != "no":
        advice += f" or --precision fp32 (it was {training.accelerator.mixed_precision})"
    finished = len(training.history)
    saved = f"The checkpoint of epoch {finished} is intact: {training.checkpoint}" if finished else "None is saved yet"
    return UsageError(f"{what}; training stopped.", f"{advice}. {saved}.")


def _judge(
    training: _Training, epoch: int, monitor: Callable[[nn.Module, int], dict[str, float]] | None
) -> tuple[Record, str | None]:
    """Return the monitor's metrics and why it stops the training, if it does; the first process decides for all."""
    training.model.eval()
    _share_buffers(training)
    if monitor is None:
        return {}, None
    reason = None
    try:
        with torch.no_grad():
            metrics = monitor(training.model, epoch)
    except StopTraining as stop:
        metrics, reason = stop.metrics, stop.reason
    # Metrics are often numpy's numbers, which neither JSON nor a checkpoint without code can hold.
    verdict = {name: float(value) for name, value in metrics.items()}, reason
    return cast("tuple[Record, str | None]", broadcast_object_list([verdict])[0])


def _share_buffers(training: _Training) -> None:
    """Give every process the first one's buffers: BatchNorm has seen another share of the images in each."""
    if training.accelerator.num_processes > 1:
        for buffer in training.model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _end_epoch(training: _Training, record: Record, best: str | None) -> None:
    """Keep the state if it is the best, step the scheduler, write checkpoint and metrics."""
    training.history.append(record)
    if training.stopped is None:
        value = record[best] if best else 0.0
        if best is None or training.kept_epoch == 0 or value > training.kept_value:
            training.kept, training.kept_epoch = _copy(training.model), int(record["epoch"])
            training.kept_value = -math.inf if math.isnan(value) else value
    if training.scheduler is not None:
        training.scheduler.step()
    if training.accelerator.is_main_process:
        _save_checkpoint(training)
        with disk_errors(training.folder / METRICS), open(training.folder / METRICS, "a") as file:
            file.write(_json_line(record))


def _save_checkpoint(training: _Training) -> None:
    scheduler, scaler = training.scheduler, training.accelerator.scaler
    content = {
        "schema": SCHEMA,
        "settings": training.settings,
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": scheduler and scheduler.state_dict(),
        "scaler": scaler and scaler.state_dict(),
        "kept": None if training.kept_epoch == len(training.history) else training.kept,
        "kept_epoch": training.kept_epoch,
        "kept_value": training.kept_value,
        "history": training.history,
        "stopped": training.stopped,
    }
    buffer = BytesIO()
    torch.save(content, buffer)
    replace_file(training.checkpoint, buffer.getvalue())


def _load_checkpoint(training: _Training) -> None:
    path = training.checkpoint
    if not path.exists():
        raise UsageError(
            f"--resume: there is no checkpoint {path}.", "Train without --resume; an epoch must have ended."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["schema"] != SCHEMA:
            raise ArtefactError(f"{path} has schema {content['schema']!r}, not {SCHEMA!r}.", "Train without --resume.")
        _check_settings(content["settings"], training.settings)
        training.model.load_state_dict(content["model"])
        training.optimizer.load_state_dict(content["optimizer"])
        if training.scheduler is not None:
            training.scheduler.load_state_dict(content["scheduler"])
        if training.accelerator.scaler is not None and content["scaler"]:
            training.accelerator.scaler.load_state_dict(content["scaler"])
        training.kept = content["kept"] or _copy(training.model)
        training.kept_epoch, training.kept_value = content["kept_epoch"], content["kept_value"]
        training.history, training.stopped = content["history"], content["stopped"]
    except (UsageError, ArtefactError):
        raise
    except Exception as error:  # zip, pickle, key and shape errors share no base
        reason = " ".join(str(error).split())[:300]
        raise ArtefactError(f"{path} does not fit this training: {reason}", "Train without --resume.") from error


def _check_settings(old: dict[str, Any], new: dict[str, Any]) -> None:
    pairs = {name: (old.get(name, "not there"), new.get(name, "not there")) for name in {**old, **new}}
    changed = [f"{name} was {before}, is {now}" for name, (before, now) in pairs.items() if before != now]
    if changed:
        raise UsageError(
            f"--resume with changed settings: {'; '.join(changed)}.",
            "Pass the settings that the checkpoint was made with, or train anew without --resume.",
        )


def _copy(model: nn.Module) -> State:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as they come back from a file: tuples become lists."""
    return cast("dict[str, Any]", json.loads(json.dumps(settings)))


def _json_line(record: Record) -> str:
    """Return one line; JSON has no NaN or infinity, so such a metric becomes null."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()}) + "\n"


def _derived_seed(seed: int, epoch: int, stream: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, stream)).generate_state(1)[0])


def _seed_torch_numpy_python(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def _fixed_order_of_sums(device: torch.device) -> Iterator[None]:
    """Use a GPU's deterministic kernels, where there are any; those of a CPU are."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Log:
    """What the user sees, and TensorBoard; silent in all processes but the first.

    A terminal shows a bar with the time left and the last values, anything else gets a line per epoch now and then.
    """

    def __init__(self, training: _Training, session: FitSession, epochs: int, batches: int) -> None:
        self.epochs, self.batches = epochs, batches
        self.speaks = training.accelerator.is_main_process
        self.bar = _progress_bar() if self.speaks and is_interactive() else None
        done = len(training.history)
        self.writer = _tensorboard(session, done + 1) if self.speaks and session.tensorboard else None
        self.spoke = -math.inf
        self.first = done + 1
        self.last: Record = training.history[-1] if done else {}
        if self.bar is not None:
            self.task = self.bar.add_task("", total=epochs * batches, completed=done * batches, losses="")

    def __enter__(self) -> _Log:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def say(self, text: str) -> None:
        if self.speaks:
            say(text)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar away: a monitor may show one of its own, and two at a time cannot be drawn."""
        if self.bar is not None:
            self.bar.stop()
        yield
        if self.bar is not None:
            self.bar.start()

    def batch(self, epoch: int, number: int, losses: Record) -> None:
        if self.bar is not None:
            self.bar.update(
                self.task,
                description=f"epoch {epoch}/{self.epochs}",
                completed=(epoch - 1) * self.batches + number,
                losses=_listed({**self.last, **losses}),
            )

    def epoch(self, training: _Training) -> None:
        """Tell of the epoch that has just ended."""
        record = self.last = training.history[-1]
        epoch, now = int(record["epoch"]), time.monotonic()
        if self.writer is not None:
            for name in record.keys() - {"epoch"}:
                self.writer.add_scalar(name, record[name], epoch)
            self.writer.flush()
        ends = epoch == self.epochs or training.stopped is not None
        due = epoch % max(1, self.epochs // _LINES) == 0 and now - self.spoke >= _QUIET_SECONDS
        if ends or (self.bar is None and (epoch == self.first or due)):
            self.spoke = now
            self.say(f"epoch {epoch}/{self.epochs}: {_listed(record)}")
        if training.stopped is not None:
            kept = f"epoch {training.kept_epoch}" if training.kept_epoch else "before the training"
            self.say(f"stopped after epoch {epoch}: {training.stopped}; the state of {kept} is kept")


def _listed(record: Record) -> str:
    """Return the losses and metrics of a record in a few words."""
    return ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name not in ("epoch", "seconds"))


def _progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=Console(stderr=True),
        transient=True,
    )


def _tensorboard(session: FitSession, first: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_extra("--tensorboard", "tensorboard", "tensorboard") from None
    return SummaryWriter(str(session.folder / TENSORBOARD), purge_step=first)
