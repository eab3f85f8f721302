"""Summary of a Hydra sweep: ``summary.csv``, ``summary.png`` and ``curves.png`` in the sweep's folder."""

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from approxdrop_lightning.application.comparison import Record, comparison_table
from approxdrop_lightning.application.results import RESULT_FILE, curve, show, write_json
from approxdrop_lightning.application.sweep_plots import plot_curves, plot_summary

log = logging.getLogger(__name__)

JOB_FILE = "job.json"  # the job's result as seen by the sweep; written for failed jobs as well
FIRST_COLUMNS = ["job", "status", "line", "model", "dropout", "rate", "seed", "data_source"]
NOT_A_LINE = {"dropout", "dropout.rate", "seed"}  # the line's name, the x axis, and the averaged dimension


class SweepSummary(Callback):
    """Collect the results of all jobs of a sweep, whichever launcher runs them.

    The summary is rewritten after each job, so an interrupted sweep, or one with a failed job (for which Hydra
    does not call ``on_multirun_end``), still has a summary of the finished jobs. Failed jobs are listed in the
    CSV with the error as their status.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Record the job and update the summary. Does nothing outside of sweeps."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        job = Path(config.hydra.runtime.output_dir)
        rate = config.dropout.rate
        record: Record = {
            "dropout": config.dropout.name,
            "rate": OmegaConf.to_container(rate) if OmegaConf.is_config(rate) else rate,
            "seed": config.seed,
        }
        try:
            _ = job_return.return_value  # re-raises the job's exception
            record |= json.loads((job / RESULT_FILE).read_text(encoding="utf-8"))
            status = "completed"
        except Exception as error:
            status = " ".join(f"failed: {type(error).__name__}: {error}".split())
        overrides = list(config.hydra.overrides.task)
        write_json(record | {"job": job.name, "status": status, "overrides": overrides}, job / JOB_FILE)
        summarise(job.parent)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print a comparison of the jobs and the path of the summary."""
        records = _read(Path(config.hydra.sweep.dir))
        if finished := [record for record in records if record.get("test") is not None]:
            show(comparison_table(finished))
        log.info("summary of the sweep: %s", Path(config.hydra.sweep.dir).absolute() / "summary.csv")


def summarise(folder: Path) -> None:
    """Write ``summary.csv``, ``summary.png`` and ``curves.png`` from the ``*/job.json`` in ``folder``.

    Parallel jobs (joblib) may finish at the same time. A job that finds new results after writing writes again, so
    the last summary written is complete, without any lock.
    """
    read: list[Path] = []
    while read != (found := sorted(folder.glob(f"*/{JOB_FILE}"))):
        read = found
        records = _read(folder)
        _write_csv(records, folder / "summary.csv")
        plot_summary([record for record in records if record.get("test") is not None], folder / "summary.png")
        curves = [record | {"curve": curve(folder / record["job"], record.get("monitor", ""))} for record in records]
        plot_curves([record for record in curves if record["curve"]], folder / "curves.png")


def _read(folder: Path) -> list[Record]:
    """The records of all jobs in a sweep's folder, in job order, each with its line."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"*/{JOB_FILE}")]
    _name_lines(records)
    return sorted(records, key=lambda record: (len(record["job"]), record["job"]))


def _name_lines(records: list[Record]) -> None:
    """Name the line of the plot that each job belongs to, after its dropout and any other override that varies."""
    common = set.intersection(*(set(record["overrides"]) for record in records)) if records else set()
    for record in records:
        overrides = [text for text in record.pop("overrides") if text not in common]
        record["others"] = [text for text in overrides if text.split("=")[0] not in NOT_A_LINE]
        record["line"] = " ".join([record["dropout"], *record["others"]])


def _write_csv(records: list[Record], path: Path) -> None:
    columns = dict.fromkeys([*FIRST_COLUMNS, *(key for record in records for key in record if key != "others")])
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
    temporary.replace(path)
