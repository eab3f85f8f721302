"""Random overrides on the command line give a valid run or an error that says what is wrong."""

import warnings

import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException
from support.fuzz import came_of_it, examples, fuzz
from support.runs_of_train import config

from approxdrop_lightning import ApproxDropout
from train import make_dropout, make_model

KEYS = [
    "dropout.rate", "dropout.max_dp", "dropout.keep", "dropout.interleave", "dropout.shuffle", "dropout.block_size",
    "dropout.concentration", "dropout.search", "dropout.scale", "dropout.recurrent", "dropout.tile_size",
    "dropout.min_gain", "dropout.backend", "dropout.seed", "dropout.pattern",
    "datamodule.batch_size", "datamodule.source", "datamodule.val_size", "datamodule.train_limit",
    "datamodule.unroll",
    "datamodule.vocabulary", "datamodule.fraction", "datamodule.num_workers", "model.hidden", "model.hidden_size",
    "model.num_layers", "model.rate", "model.lr", "model.loss", "model.tie_weights", "model.optimizer.lr", "seed",
    "test", "ckpt_path", "data_dir", "log_dir", "callbacks.recent.every_n_train_steps",
    "callbacks.throughput.warmup_steps", "nothing", "dropout.nothing", "trainer.nothing",
]  # fmt: skip
VALUES = st.one_of(
    st.integers(-2, 100).map(str),
    st.floats(-1, 2).map(str),
    st.sampled_from(["null", "true", "false", "nan", "inf", "''", "[]", "[1,2]", "[.2,.6]", "{a:1}", "${seed}"]),
    st.sampled_from(
        ["row", "any", "one", "sgd", "maxent", "dp", "rate", "reference", "triton", "files", "mean", "../"]
    ),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=6),
)
GROUPS = st.sampled_from([
    "model=mlp", "model=lstm", "dropout=row", "dropout=paper", "dropout=tile", "dropout=dropconnect",
    "dropout=standard", "dropout=none", "experiment=ptb_quick", "experiment=mnist_1024", "debug=fast",
    "debug=overfit", "logger=csv",
    "dropout=nothing", "nothing=row", "model=../mlp", "~callbacks.recent", "~dropout.rate", "+trainer.nothing=1",
])  # fmt: skip
REFUSALS = (HydraException, OmegaConfBaseException, ValueError, MisconfigurationException)


class Data:
    """Replaces the data, which takes long to read."""

    vocab_size = 50


@pytest.mark.filterwarnings("ignore")
@examples(4, 500)
def test_any_overrides(number, tmp_path):
    def make(groups, pairs):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cfg = config(tmp_path / "run", *groups, *(f"{key}={value}" for key, value in pairs))
                with torch.device("meta"):
                    make_model(cfg.model, Data())
                instantiate(cfg.datamodule, _convert_="all")
                callbacks = [instantiate(part) for part in cfg.callbacks.values()]
                if "_target_" in cfg.dropout:
                    callbacks.append(make_dropout(cfg.dropout))
                    assert isinstance(callbacks[-1], ApproxDropout)
                instantiate(cfg.trainer, callbacks=callbacks, logger=False, _convert_="all")
        except REFUSALS as error:
            assert str(error)
            came_of_it(f"refused by {type(error).__name__}")
            return
        came_of_it("made")

    fuzz(
        number, make, groups=st.lists(GROUPS, max_size=2),
        pairs=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=2),
    )  # fmt: skip
