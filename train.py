"""Train with approximate dropout: ``python train.py``, ``python train.py model=lstm dropout.rate=0.7``.

``compare=true`` first trains with conventional dropout, and prints both results side by side.

The options are in ``conf/train.yaml`` and the folders next to it.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate, to_absolute_path
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf, open_dict

from approxdrop_lightning import keep_freed_memory
from approxdrop_lightning.application import config, errors
from approxdrop_lightning.application.checkpoint import is_whole
from approxdrop_lightning.application.comparison import BASELINE, comparison_table
from approxdrop_lightning.application.results import RESULT_FILE, print_table, show, write_json

log = logging.getLogger(__name__)

Metrics = dict[str, float]

config.register()


def train(cfg: DictConfig) -> tuple[Metrics, dict[str, Any]]:
    """Train, evaluate the best checkpoint on the test set, and record the result.

    Args:
        cfg: the composed configuration, ``conf/train.yaml``.

    Returns:
        The metrics (``cfg.task.monitor`` of the best checkpoint, the others of the last epoch and the test), and
        the objects of the run: ``datamodule``, ``model``, ``callbacks``, ``trainer``, and ``result``, the record
        stored in ``result.json`` in ``cfg.run_dir``.

    Raises:
        ValueError: before training, if an option is out of range.
        OSError: before training, if ``cfg.run_dir`` is not writable.
        FileNotFoundError: if ``cfg.ckpt_path`` does not name a checkpoint.
    """
    _check_writable(Path(cfg.run_dir))
    _resolve_paths(cfg)
    ckpt_path = find_checkpoint(cfg.ckpt_path, Path(cfg.run_dir).absolute().parent)
    if cfg.dropout.name == "none" and cfg.dropout.rate != 0:
        log.warning("dropout=none: the rate %s is ignored, nothing is dropped", cfg.dropout.rate)
        cfg.dropout.rate = 0.0
    seed_everything(cfg.seed, workers=True)
    if cfg.keep_freed_memory:
        keep_freed_memory()

    callbacks: dict[str, Callback] = {name: instantiate(part) for name, part in cfg.callbacks.items()}
    if "_target_" in cfg.dropout:
        callbacks["dropout"] = make_dropout(cfg.dropout)
    datamodule: LightningDataModule = instantiate(cfg.datamodule, _convert_="all")
    # Earlier than the Trainer does it, since the model needs the vocabulary size and the loggers the data source.
    datamodule.prepare_data()
    datamodule.setup("fit")
    log.info("data source: %s", datamodule.data_source)
    cfg.data_kind = getattr(datamodule, "data_kind", cfg.data_kind)
    model = make_model(cfg.model, datamodule)
    if cfg.compile:
        model.compile()  # in place: no key of a checkpoint changes
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=list(callbacks.values()),
        logger=[instantiate(part) for part in cfg.logger.values()],
        _convert_="all",
    )
    hparams = OmegaConf.to_container(cfg, resolve=True) | {"data_source": datamodule.data_source}
    for logger in trainer.loggers:
        logger.log_hyperparams(hparams)

    try:
        trainer.fit(model, datamodule, ckpt_path=ckpt_path, weights_only=True)
    except BaseException as error:  # Ctrl-C arrives here as SystemExit
        if not errors.is_expected(error) or isinstance(error, FloatingPointError):  # otherwise nothing was trained
            log.error(
                "stopped at step %d; %s",
                trainer.global_step,
                errors.how_to_go_on(Path(cfg.run_dir), cfg.compare and cfg.dropout.name == BASELINE),
            )
        raise
    metrics = _numbers(trainer)
    # There may be no best checkpoint: no checkpoint callback, no validation, or no epoch left in a resumed run.
    checkpoint = callbacks.get("checkpoint")
    best_path = getattr(checkpoint, "best_model_path", "")
    if (score := getattr(checkpoint, "best_model_score", None)) is not None:
        metrics[cfg.task.monitor] = score.item()
    if cfg.test:
        trainer.test(model, datamodule, ckpt_path=best_path or None, weights_only=True)
        metrics |= _numbers(trainer, "test/")
    objects = {"datamodule": datamodule, "model": model, "callbacks": callbacks, "trainer": trainer}
    objects["result"] = result(cfg, metrics, **objects)
    if trainer.is_global_zero:
        _record(cfg, objects["result"], trainer)
    return metrics, objects


def compare(cfg: DictConfig) -> tuple[Metrics, dict[str, Any]]:
    """Train with conventional dropout, in the subfolder ``standard`` of the run, then as configured.

    Returns:
        The result of :func:`train` for ``cfg``, with the record of the other run in ``objects["baseline"]``.

    Raises:
        ValueError: before training, if there is nothing to compare or ``cfg.ckpt_path`` is set.
    """
    if cfg.dropout.name in (BASELINE, "none"):
        raise ValueError(f"compare=true compares with conventional dropout; dropout={cfg.dropout.name} skips nothing")
    if cfg.ckpt_path is not None:
        raise ValueError(f"compare=true trains both from the beginning, got ckpt_path={cfg.ckpt_path}")
    baseline = cfg.copy()
    with open_dict(baseline):
        baseline.dropout = {"name": BASELINE, "rate": cfg.dropout.rate}
    baseline.run_dir = str(Path(cfg.run_dir) / BASELINE)
    _, others = train(baseline)
    metrics, objects = train(cfg)
    return metrics, objects | {"baseline": others["result"]}


def make_dropout(cfg: DictConfig) -> Callback:
    """Create the dropout callback, which takes the rates from the model's own nn.Dropout layers."""
    arguments = {key: value for key, value in cfg.items() if key not in ("name", "rate")}
    return instantiate(arguments, rate=None, _convert_="all")


def make_model(cfg: DictConfig, datamodule: LightningDataModule) -> LightningModule:
    """Create the model; sizes that are not configured are taken from the data."""
    sizes = ("vocab_size", "in_features", "num_hops", "num_classes", "field_sizes")
    left_open = {name: getattr(datamodule, name) for name in sizes if name in cfg and cfg[name] is None}
    return instantiate(cfg, **left_open, _convert_="all")


def find_checkpoint(ckpt_path: str | None, siblings: Path) -> str | None:
    """Find the checkpoint to resume from.

    Args:
        ckpt_path: None, a checkpoint, a folder (meaning the newest run in or below it), or ``"last"`` (the newest
            run below ``siblings``). Within a run, ``last.ckpt`` is preferred; if it is missing or damaged,
            ``interrupted.ckpt``, then the newest other checkpoint, then those of earlier runs, with a warning.
        siblings: the folder that contains the runs.

    Raises:
        FileNotFoundError: if there is no checkpoint.
    """
    if ckpt_path is None or Path(ckpt_path).is_file():
        return ckpt_path
    folder = siblings if ckpt_path == "last" else Path(ckpt_path)
    written = {path: path.stat().st_mtime for path in folder.rglob("*.ckpt") if path.is_file()}
    newest = {path.parent: 0.0 for path in written}
    for path, time in written.items():
        newest[path.parent] = max(newest[path.parent], time)
    preferred = {"last.ckpt": 2, "interrupted.ckpt": 1}  # a run may be interrupted in the middle of a step

    def rank(path: Path) -> tuple[float, Path, int, float]:
        return newest[path.parent], path.parent, preferred.get(path.name, 0), written[path]

    for path in sorted(written, key=rank, reverse=True):
        if is_whole(path):
            log.info("resuming from %s", path)
            return str(path)
        log.warning("%s is damaged; looking for an older checkpoint", path)
    raise FileNotFoundError(f"ckpt_path={ckpt_path}: no checkpoint that is whole in or below {folder}")


def result(
    cfg: DictConfig,
    metrics: Metrics,
    datamodule: LightningDataModule,
    model: LightningModule,
    callbacks: dict[str, Callback],
    trainer: Trainer,
) -> dict[str, Any]:
    """The record of a run: plain values, with the same keys for every model and dropout.

    The realised rate is ``"nominal"`` where only conventional dropout ran.
    """
    if "dropout" in callbacks:
        realised = callbacks["dropout"].realised_rate or "nominal"
    else:
        realised = 0.0 if cfg.dropout.name == "none" else "nominal"
    speed = callbacks["throughput"].summary if "throughput" in callbacks else {}
    return {
        "model": type(model).__name__,
        "dropout": cfg.dropout.name,
        "compiled": bool(cfg.compile),
        "rate": OmegaConf.to_container(cfg.dropout)["rate"],
        "seed": cfg.seed,
        "epochs": trainer.current_epoch,
        "monitor": cfg.task.monitor,
        "best_validation": metrics.get(cfg.task.monitor),
        "metric": cfg.task.result,
        "test": metrics.get(cfg.task.result),
        "unit": cfg.task.unit,
        "steps": trainer.global_step,
        "per_second": speed.get(f"{cfg.task.unit}_per_sec"),
        "seconds_per_step": speed["seconds"] / speed["steps"] if speed else None,
        "realised_rate": realised,
        "data_source": datamodule.data_source,
        "best_perplexity": getattr(datamodule, "best_perplexity", None),
        "log_dir": str(Path(cfg.run_dir).absolute()),
        "best_checkpoint": getattr(callbacks.get("checkpoint"), "best_model_path", ""),
    }


def _record(cfg: DictConfig, record: dict[str, Any], trainer: Trainer) -> None:
    """Write the result to ``result.json``, ``train.log`` and TensorBoard."""
    write_json(record, Path(cfg.run_dir) / RESULT_FILE)
    measured = {cfg.task.monitor: record["best_validation"], cfg.task.result: record["test"]}
    speed = {f"{record['unit']}_per_second": record["per_second"]}
    numbers = {name.replace("/", "_"): value for name, value in (measured | speed).items() if value is not None}
    log.info("finished: %s", ", ".join(f"{name} {value:.6g}" for name, value in numbers.items()))
    # TensorBoard's HPARAMS tab needs metrics; they have separate tags, or they would be appended to the curves.
    chosen = OmegaConf.to_container(cfg, resolve=True)
    parts = {name: chosen[name] for name in ("model", "dropout", "datamodule", "seed")}
    parts |= {"trainer": {"max_epochs": cfg.trainer.max_epochs}, "data_source": record["data_source"]}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and numbers:
            logger.log_hyperparams(parts, {f"result/{name}": value for name, value in numbers.items()})
            logger.save()


def _resolve_paths(cfg: DictConfig) -> None:
    """Resolve relative paths against the original working directory, even if Hydra changes it for a job."""
    data = cfg.datamodule
    if "data_dir" in data:
        data.data_dir = data.data_dir or os.environ.get("APPROXDROP_DATA") or "data"
    for part, name in ((data, "data_dir"), (data, "text"), (cfg, "ckpt_path")):
        if part.get(name) and part[name] != "last":
            part[name] = to_absolute_path(os.path.expanduser(part[name]))


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the log folder {folder}: {error.strerror}") from error


def _numbers(trainer: Trainer, prefix: str = "") -> Metrics:
    return {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith(prefix)}


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train and print the result table; return the validation metric, for Hydra's sweepers."""
    try:
        metrics, objects = compare(cfg) if cfg.compare else train(cfg)
    except Exception as error:
        if (message := errors.one_line(error)) is None:
            raise
        log.error("%s", message)
        sys.exit(1)
    if objects["trainer"].is_global_zero:
        print_table(objects["result"])
        if "baseline" in objects:
            show(comparison_table([objects["baseline"], objects["result"]]))
    return metrics.get(cfg.task.monitor)


if __name__ == "__main__":
    if (extra := errors.missing_extra(sys.argv[1:])) is not None:
        sys.exit(f"train.py: {extra}")
    main()
