"""The Lightning callback that runs whole training steps as CUDA graphs, with or without this package's dropout."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from approxdrop_lightning.conversion import check_replayable, replay_key
from approxdrop_lightning.step_graphs import Capture, CudaCapture, StepGraphs, split_tensors

#: Hooks within the step. They are Python code, which a replay does not run.
_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
_METHODS = (*_HOOKS, "backward", "optimizer_step", "optimizer_zero_grad")
_REPLACED = ("training_step", "backward", "optimizer_step")


class CudaGraphStep(Callback):
    """Run whole training steps (forward, backward, clipping, optimizer) as CUDA graphs, with a single launch each.

    This pays off where the host launches kernels more slowly than the GPU executes them: small networks and batches,
    recurrent layers.
    Each combination of batch shape, ``(dp, keep)`` of :class:`.ApproxDropout` and hyperparameters of the optimizer is
    captured once, after some eager steps. Whatever cannot be captured runs eagerly, as does a smaller last batch in
    the first epochs; :attr:`report` says how many steps did and why. Conventional dropout is captured as well, with
    fresh masks in each replay.

    A replay runs no Python code, so ``training_step`` must not depend on ``batch_idx``, change attributes, or wait
    for the device (``loss.item()``). Values passed to ``self.log`` are logged for each step if they are
    tensors. Gradients are not kept after the step. With :class:`.ApproxDropout` the model must be compiled
    (``torch.compile``, in a mode without CUDA graphs of its own), since eager layers draw patterns in Python.

    Learning rates become tensors on the device if the optimizer can read them there (optimizers with ``capturable``,
    and fused SGD), so a schedule costs nothing; with others, each new value is a new combination. Checkpoints contain
    ordinary numbers.

    Args:
        warmup: Eager steps of a combination before it is captured, >= 1.
        max_graphs: Maximum number of graphs, >= 1. Each holds a batch; all of them share the memory of one step.

    Attributes:
        report: How many steps were captured, and why others were not; None before training.

    Raises:
        MisconfigurationException: An argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CudaGraphStep()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, warmup: int = 3, max_graphs: int = 16) -> None:
        super().__init__()
        for name, value in (("warmup", warmup), ("max_graphs", max_graphs)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MisconfigurationException(f"CudaGraphStep: {name} must be an integer >= 1, got {value!r}")
        self.warmup, self.max_graphs = warmup, max_graphs
        self._graphs: StepGraphs | None = None
        self._why_not: str | None = None
        self._before: dict[str, Any] = {}
        self._groups: list[dict[str, Any]] = []

    @property
    def report(self) -> str | None:
        """How many steps were captured, and why others were not."""
        if self._why_not is not None:
            return f"all steps ran eagerly: {self._why_not}"
        if self._graphs is None:
            return None
        return f"{len(self._graphs)} graphs; {self._graphs.counts}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the training step, if it can be captured."""
        self._why_not = _why_not(trainer, pl_module)
        capture = None if self._why_not else self._capture_for(pl_module, trainer.optimizers[0])
        if self._why_not is None and capture is None:
            self._why_not = f"the model is on {pl_module.device}, and only CUDA has graphs"
        if capture is None:
            rank_zero_warn(f"CudaGraphStep: {self.report}")
            return
        self._graphs = StepGraphs(capture, self.warmup, self.max_graphs)
        if pl_module.device.type == "cuda":
            self._groups = make_capturable(trainer.optimizers[0], pl_module.device)
        step = _WholeStep(trainer, pl_module, self._graphs, capture)
        attributes = vars(pl_module)
        self._before = {name: attributes[name] for name in _REPLACED if name in attributes}
        attributes["training_step"] = step
        attributes["backward"] = _already_done
        attributes["optimizer_step"] = _only_the_closure

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the training step, and print the report."""
        if self._give_back(trainer, pl_module):
            rank_zero_info(f"CudaGraphStep: {self.report}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the training step."""
        self._give_back(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save ordinary numbers instead of tensors, since the run may be resumed without a GPU."""
        if not self._groups:
            return
        for state in checkpoint.get("optimizer_states", ()):
            for group, before in zip(state["param_groups"], self._groups, strict=True):
                group.update(_as_before(group, before))

    def _capture_for(self, pl_module: LightningModule, optimizer: Optimizer) -> Capture | None:
        return CudaCapture() if pl_module.device.type == "cuda" else None

    def _give_back(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        attributes = vars(pl_module)
        if not isinstance(attributes.get("training_step"), _WholeStep):
            return False
        for name in _REPLACED:
            del attributes[name]
        attributes.update(self._before)
        for optimizer in trainer.optimizers:
            for group, before in zip(optimizer.param_groups, self._groups, strict=False):
                group.update(_as_before(group, before))
        self._groups = []
        return True


def _already_done(loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """In place of ``LightningModule.backward``."""


def _only_the_closure(
    epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
) -> None:
    """In place of ``LightningModule.optimizer_step``: the closure's ``training_step`` has done everything."""
    if optimizer_closure is not None:
        optimizer_closure()


class _WholeStep:
    """Replaces ``training_step``, and runs the whole step, from a graph if there is one."""

    def __init__(self, trainer: Trainer, module: LightningModule, graphs: StepGraphs, capture: Capture) -> None:
        self._trainer, self._module, self._graphs, self._capture = trainer, module, graphs, capture
        self._training_step = module.training_step
        self._refused: str | None = None

    def __call__(self, batch: Any, *rest: Any) -> Any:
        try:
            tensors, other, put = split_tensors(batch)
        except TypeError as error:
            self._refused = f"batches contain values that cannot be compared: {error}"
        if self._refused is not None:
            self._graphs.count_eager(self._refused)
            output, logs = self._run(batch, rest)
        else:
            key = (replay_key(self._module), other, _hyperparameters(self._trainer.optimizers[0]))
            output, logs = self._graphs.run(key, tensors, lambda given: self._run(put(given), rest))
        for name, value, args, kwargs in logs:
            self._module.log(name, value.detach().clone() if isinstance(value, Tensor) else value, *args, **kwargs)
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output)

    def _run(self, batch: Any, rest: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Run the step as Lightning's automatic optimization does; return its output and the logged values."""
        trainer, module = self._trainer, self._module
        optimizer = trainer.optimizers[0]
        logs: list[Any] = []

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if self._capture.recording and not isinstance(value, Tensor):
                raise RuntimeError(
                    f"self.log({name!r}) is given {type(value).__name__}, not a tensor: replays would repeat it"
                )
            logs.append((name, value, args, kwargs))

        attributes = vars(module)
        attributes["log"] = log
        try:
            output = self._training_step(batch, *rest)
        finally:
            del attributes["log"]
        try:
            check_replayable(module)
        except RuntimeError as error:
            if self._capture.recording:
                raise
            # Checked before anything is captured: a failed attempt would consume patterns of the sequence.
            self._refused = str(error)
        loss: Tensor | None = output["loss"] if isinstance(output, Mapping) else output
        if loss is None:
            if self._capture.recording:
                raise RuntimeError("training_step returns None")
            return output, logs
        # Lightning's autocast context of the training step is still active, but must not apply here.
        with torch.autocast(module.device.type, enabled=False):
            optimizer.zero_grad()
            loss.backward()
            module.configure_gradient_clipping(
                optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
            optimizer.step()
        return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, output), logs


def _why_not(trainer: Trainer, module: LightningModule) -> str | None:
    """Why no step of this training can be captured; None if it may be possible."""
    strategy = type(trainer.strategy).__name__
    if strategy != "SingleDeviceStrategy":
        return f"{strategy} is not SingleDeviceStrategy"
    if not module.automatic_optimization:
        return "the module optimizes manually"
    if len(trainer.optimizers) != 1:
        return f"there are {len(trainer.optimizers)} optimizers, not one"
    if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        return "LBFGS evaluates the loss several times a step"
    if trainer.accumulate_grad_batches != 1:
        return f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, not 1"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "the gradient scaler of 16-mixed decides on the host; bf16-mixed needs none"
    if getattr(trainer, "_detect_anomaly", False):
        return "detect_anomaly reads values on the host"
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        return "training_step takes dataloader_iter"
    for name in _METHODS:
        if is_overridden(name, module, LightningModule) or name in vars(module):
            return f"{type(module).__name__}.{name} would not run in replays"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name in _HOOKS:
            if is_overridden(name, callback, Callback):
                return f"{type(callback).__name__}.{name} would not run in replays"
    return None


def _hyperparameters(optimizer: Optimizer) -> Hashable:
    """Hyperparameters that are constants in a graph: values of numbers, and identities of tensors."""
    return tuple(
        (name, id(value) if isinstance(value, Tensor) else repr(value))
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params" and name != "initial_lr"
    )


def make_capturable(optimizer: Optimizer, device: torch.device) -> list[dict[str, Any]]:
    """Let an optimizer read learning rates and step counts on the device, if it can.

    Args:
        optimizer: Changed in place: ``capturable`` is set, ``lr`` becomes a tensor, step counts are moved.
        device: The device of the parameters.

    Returns:
        The previous values of each group.
    """
    before: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        before.append({str(name): group[name] for name in ("capturable", "lr") if name in group})
        fused_sgd = isinstance(optimizer, torch.optim.SGD) and group.get("fused")
        if "capturable" in group:
            group["capturable"] = True
        if ("capturable" in group or fused_sgd) and not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
        if "capturable" in group:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(device)
    return before


def _as_before(group: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The previous values of what :func:`make_capturable` changed in a group, with the current learning rate."""
    changed = {name: value for name, value in before.items() if name == "capturable"}
    if isinstance(group["lr"], Tensor) and not isinstance(before["lr"], Tensor):
        changed["lr"] = float(group["lr"])
    return changed
