"""The callback in a real Trainer: converts, draws, logs, resumes, restores."""

import copy
import warnings

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from approxdrop_lightning import ApproxDropout
from approxdrop_lightning.application.models import LSTMLanguageModel, MLPClassifier
from approxdrop_lightning.layers.converted import Converted
from datamodules.loader import ResumableLoader


def loader(n=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.randn(n, 1, 4, 5, generator=generator), torch.randint(3, (n,), generator=generator))
    return DataLoader(data, batch_size=16, shuffle=True)


def text(steps=6, batches=5):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, (batches, 2, steps, 4), generator=generator)
    return DataLoader([tuple(batch) for batch in words], batch_size=None)


def mlp():
    return MLPClassifier(in_features=20, hidden=(64, 64), num_classes=3, rate=0.5)


def lstm():
    return LSTMLanguageModel(vocab_size=20, hidden_size=64, rate=0.5)


def trainer(*callbacks, tmp_path=None, **options):
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": checkpointing} | options
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        **options,
    )


class Record(Callback):
    """Records patterns and classes at every step."""

    def __init__(self, callback):
        self.callback, self.patterns, self.classes = callback, [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.patterns.append([p for site in self.callback.report.sites for p in site.last_patterns])
        self.classes.append({type(m).__name__ for m in module.modules()})


@pytest.mark.parametrize(("make", "data", "sites"), [(mlp, loader, 2), (lstm, text, 3)])
def test_fit_converts_draws_logs_and_restores(make, data, sites, tmp_path):
    seed_everything(0)
    callback = ApproxDropout(min_gain=0)
    record = Record(callback)
    model = make()
    before = [type(m) for m in model.modules()]
    run = trainer(callback, record, tmp_path=tmp_path)
    run.fit(model, data())
    assert all({"ApproxDropoutSite", "ApproxLinear"} <= names for names in record.classes)
    assert [type(m) for m in model.modules()] == before
    assert all(len(patterns) == sites for patterns in record.patterns)
    assert len(set(map(tuple, record.patterns))) == len(record.patterns)  # a different one for each batch
    assert callback.realised_rate == pytest.approx(0.5, abs=0.05)
    assert run.callback_metrics["dropout/realised_rate"].item() == pytest.approx(0.5, abs=0.05)
    assert all("consumers' columns" in row.skipped for row in callback.report)


def test_the_logged_rate_is_that_of_the_epoch(tmp_path):
    """At .7 the dropped share differs from step to step, so a mean of running means would not be it."""
    callback = ApproxDropout(min_gain=0, rate=0.7, seed=0)
    record = Record(callback)
    run = trainer(callback, record, tmp_path=tmp_path)
    run.fit(mlp(), loader())
    shares = [sum(1 - p.share for p in patterns) / len(patterns) for patterns in record.patterns]
    assert len(set(shares)) > 1
    last_epoch = shares[len(shares) // 2 :]
    assert run.callback_metrics["dropout/realised_rate"].item() == pytest.approx(sum(last_epoch) / len(last_epoch))
    assert callback.realised_rate == pytest.approx(sum(shares) / len(shares))


def test_validation_and_test_are_those_of_the_stock_model(tmp_path):
    seed_everything(0)
    model = mlp()

    class Compare(Callback):
        seen = 0

        def on_validation_batch_end(self, trainer, module, outputs, batch, *_):
            stock = mlp()
            stock.load_state_dict(module.state_dict())
            assert torch.equal(module(batch[0]), stock.eval()(batch[0]))
            self.seen += 1

    compare = Compare()
    run = trainer(ApproxDropout(min_gain=0), compare, tmp_path=tmp_path, max_epochs=1)
    run.fit(model, loader(), loader(seed=1))
    run.test(model, loader(seed=1), verbose=False)
    assert compare.seen > 6


def test_data_order_initial_weights_and_global_generator_are_as_without(tmp_path):
    class Batches(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.seen.append((batch[0].clone(), module.net[1].weight.clone() if not self.seen else None))

    runs = []
    for callbacks in ([], [ApproxDropout(min_gain=0)]):
        seed_everything(7)
        batches = Batches()
        model = MLPClassifier(in_features=20, hidden=(64,), num_classes=3, rate=0.5)
        trainer(batches, *callbacks, tmp_path=tmp_path, max_epochs=1).fit(model, loader())
        runs.append(batches.seen)
    for (x, weight), (y, other) in zip(*runs, strict=True):
        assert torch.equal(x, y)
        assert weight is None or torch.equal(weight, other)


def test_seed_everything_reproduces_training_and_another_seed_does_not(tmp_path):
    def weights(seed, **options):
        seed_everything(0)
        model = mlp()
        trainer(ApproxDropout(min_gain=0, seed=seed, **options), tmp_path=tmp_path).fit(model, loader())
        return torch.cat([p.detach().view(-1) for p in model.parameters()])

    assert torch.equal(weights(None), weights(None))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("pattern", ["tile", "dropconnect"])
@pytest.mark.parametrize(("make", "data", "sites"), [(mlp, loader, 2), (lstm, text, 3)])
def test_fit_with_weights_dropped(make, data, sites, pattern, tmp_path):
    seed_everything(0)
    callback = ApproxDropout(min_gain=0, pattern=pattern)
    record = Record(callback)
    model = make()
    before = [type(m) for m in model.modules()]
    run = trainer(callback, record, tmp_path=tmp_path)
    run.fit(model, data())
    assert all({"ApproxDropoutSite", "TileLinear"} <= names for names in record.classes)
    assert [type(m) for m in model.modules()] == before
    assert all(len(patterns) == sites for patterns in record.patterns)
    assert len(set(map(tuple, record.patterns))) > 2  # there are only as many tile patterns as offsets
    assert callback.realised_rate == pytest.approx(0.5, abs=0.05)
    assert all(("consumers' tiles" in row.skipped) == (pattern == "tile") for row in callback.report)


def resumable(data):
    return ResumableLoader(data.dataset, batch_size=data.batch_size)


@pytest.mark.parametrize("options", [{"recurrent": True}, {"pattern": "tile"}, {"pattern": "dropconnect"}])
@pytest.mark.parametrize(("make", "data"), [(mlp, loader), (lstm, text)])
@pytest.mark.parametrize("every_n_steps", [4, 5])  # within the first epoch; the first step of the second (of 5)
def test_resume_is_bit_identical_to_an_uninterrupted_run(make, data, every_n_steps, options, tmp_path):
    def run(max_steps, ckpt_path=None):
        seed_everything(3)
        model = make()
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=every_n_steps, save_top_k=-1)
        callback = ApproxDropout(min_gain=0, rate=0.7, **options)
        run = trainer(callback, checkpoint, tmp_path=tmp_path, max_epochs=3, max_steps=max_steps)
        run.fit(model, resumable(data()), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
        return model, callback, run.callback_metrics.get("dropout/realised_rate")

    whole, callback, logged = run(12)
    run(every_n_steps + 1)
    torch.manual_seed(99)
    resumed, resumed_callback, again = run(12, tmp_path / f"step={every_n_steps}.ckpt")
    assert again == logged
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed_callback.realised_rate == callback.realised_rate


def test_fit_twice_goes_on_with_the_sequence(tmp_path):
    seed_everything(0)
    callback, model = ApproxDropout(min_gain=0, seed=1), mlp()
    first, second = Record(callback), Record(callback)
    trainer(callback, first, tmp_path=tmp_path, max_epochs=1).fit(model, loader())
    trainer(callback, second, tmp_path=tmp_path, max_epochs=1).fit(model, loader())
    longer = Record(other := ApproxDropout(min_gain=0, seed=1))
    trainer(other, longer, tmp_path=tmp_path, max_epochs=2).fit(mlp(), loader())
    assert first.patterns + second.patterns == longer.patterns


@pytest.mark.parametrize(
    "other",
    [
        lambda: MLPClassifier(in_features=20, hidden=(64, 64), num_classes=3, rate=0.3),
        lambda: MLPClassifier(in_features=20, hidden=(64,), num_classes=3, rate=0.5),
        lambda: MLPClassifier(in_features=20, hidden=(64, 64, 64), num_classes=3, rate=[0.5, 0.3, 0.5]),
    ],
    ids=["another rate", "fewer sites", "more rates"],
)
def test_one_callback_serves_the_fits_of_several_models(other, tmp_path):
    """As in cross-validation: a model with other sites begins as with a new callback."""
    callback = ApproxDropout(min_gain=0, seed=1)
    trainer(callback, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    found, expected = Record(callback), Record(fresh := ApproxDropout(min_gain=0, seed=1))
    trainer(callback, found, tmp_path=tmp_path).fit(other(), loader())
    trainer(fresh, expected, tmp_path=tmp_path).fit(other(), loader())
    assert found.patterns == expected.patterns
    assert callback.realised_rate == fresh.realised_rate
    assert callback.report.saved > 0
    assert callback._steps == fresh._steps == 12


def test_the_folds_of_one_model_do_not_repeat_their_patterns(tmp_path):
    callback = ApproxDropout(min_gain=0, seed=1)
    folds = [Record(callback) for _ in range(3)]
    for fold in folds:
        trainer(callback, fold, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    patterns = [tuple(step) for fold in folds for step in fold.patterns]
    assert len(set(patterns)) == len(patterns) == 18


def test_a_checkpoint_that_was_refused_leaves_nothing_behind(tmp_path):
    """Only half of it fits: the rates are the same, but the epoch's counters are missing."""
    path = edited(tmp_path, lambda state: state.pop("steps"))
    callback = ApproxDropout(min_gain=0, seed=1)
    with pytest.raises(MisconfigurationException, match="'steps' is missing"):
        trainer(callback, tmp_path=tmp_path).fit(mlp(), loader(), ckpt_path=path)
    found, expected = Record(callback), Record(fresh := ApproxDropout(min_gain=0, seed=1))
    trainer(callback, found, tmp_path=tmp_path).fit(mlp(), loader())
    trainer(fresh, expected, tmp_path=tmp_path).fit(mlp(), loader())
    assert found.patterns == expected.patterns


def test_a_checkpoint_counts_for_more_than_an_earlier_fit(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "x", save_top_k=-1)
    trainer(first := ApproxDropout(min_gain=0, seed=1), checkpoint, tmp_path=tmp_path, max_epochs=1).fit(
        mlp(), loader()
    )
    callback = ApproxDropout(min_gain=0, seed=2)
    trainer(callback, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    straight, resumed = Record(first), Record(callback)
    trainer(first, straight, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    trainer(callback, resumed, tmp_path=tmp_path, max_epochs=2).fit(
        mlp(), loader(), ckpt_path=checkpoint.best_model_path
    )
    assert resumed.patterns == straight.patterns
    with pytest.raises(MisconfigurationException, match="do not fit this run"):  # rather than silently restarted
        trainer(callback, tmp_path=tmp_path).fit(
            MLPClassifier(in_features=20, hidden=(64, 64), num_classes=3, rate=0.3),
            loader(),
            ckpt_path=checkpoint.best_model_path,
        )


def test_checkpoint_loads_without_the_callback_and_back(tmp_path):
    seed_everything(0)
    checkpoint = ModelCheckpoint(tmp_path, "with", save_last=False)
    trainer(ApproxDropout(min_gain=0), checkpoint, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    path = checkpoint.best_model_path
    assert list(torch.load(path, weights_only=True)["state_dict"]) == list(mlp().state_dict())
    MLPClassifier.load_from_checkpoint(path)
    plain = ModelCheckpoint(tmp_path, "without")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning says that a callback's state was left unused
        trainer(plain, tmp_path=tmp_path, max_epochs=2).fit(mlp(), loader(), ckpt_path=path)
    callback = ApproxDropout(min_gain=0)
    trainer(callback, tmp_path=tmp_path, max_epochs=3).fit(mlp(), loader(), ckpt_path=plain.best_model_path)
    assert callback.realised_rate is not None


class Groups(MLPClassifier):
    """Everything that an optimizer's state can hold: two parameter groups, moments, and a schedule."""

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.dim() > 1]
        vectors = [p for p in self.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.003}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


@pytest.mark.parametrize("first", [True, False])
def test_optimizer_state_goes_from_a_run_with_the_callback_to_one_without_and_back(first, tmp_path):
    seed_everything(0)
    state = {}

    class Look(Callback):
        def on_train_start(self, trainer, module):
            state["found"] = copy.deepcopy(trainer.optimizers[0].state_dict())

    def run(with_callback, epochs, ckpt_path=None):
        model = Groups(in_features=20, hidden=(64, 64), num_classes=3, rate=0.5)
        checkpoint = ModelCheckpoint(tmp_path, f"{epochs}")
        callbacks = [ApproxDropout(min_gain=0)] if with_callback else []
        run = trainer(*callbacks, checkpoint, Look(), tmp_path=tmp_path, max_epochs=epochs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning says that a callback's state was left unused
            run.fit(model, loader(), ckpt_path=ckpt_path)
        return checkpoint.best_model_path, run.optimizers[0].state_dict()

    path, left = run(first, 1)
    run(not first, 2, path)
    assert len(left["param_groups"]) == 2
    assert left["state"]
    torch.testing.assert_close(state["found"], left, rtol=0, atol=0)


def test_a_checkpoint_of_other_patterns_is_refused_before_training(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "x")
    trainer(ApproxDropout(min_gain=0), checkpoint, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    with pytest.raises(MisconfigurationException, match="do not fit this run"):
        trainer(ApproxDropout(min_gain=0, rate=0.7), tmp_path=tmp_path).fit(
            mlp(), loader(), ckpt_path=checkpoint.best_model_path
        )


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        ({}, {"max_dp": 12}, "max_dp was 10, now it is 12"),  # though every pair of the old support is in the new one
        ({}, {"shuffle": False}, "shuffle was True, now it is False"),
        ({}, {"concentration": 0.0}, "concentration was 1000.0, now it is 0.0"),
        ({"pattern": "tile"}, {"pattern": "tile", "tile_size": 8}, "tile_size was 32, now it is 8"),
    ],
)
def test_a_sequence_does_not_go_on_under_other_options(saved, now, message, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "x")
    trainer(ApproxDropout(min_gain=0, **saved), checkpoint, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    with pytest.raises(MisconfigurationException, match=f"do not fit this run: {message}"):
        trainer(ApproxDropout(min_gain=0, **now), tmp_path=tmp_path).fit(
            mlp(), loader(), ckpt_path=checkpoint.best_model_path
        )


@pytest.mark.parametrize("option", [{"backend": "reference"}, {"min_gain": 1}, {"pattern_everywhere": True}])
def test_what_does_not_change_the_patterns_may_be_changed(option, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "x")
    first = ApproxDropout(min_gain=0)
    trainer(first, checkpoint, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    second = ApproxDropout(**{"min_gain": 0} | option)
    trainer(second, tmp_path=tmp_path, max_epochs=2).fit(mlp(), loader(), ckpt_path=checkpoint.best_model_path)
    assert second._steps == 2 * first._steps


def edited(tmp_path, edit):
    """A checkpoint with an edited callback state."""
    checkpoint = ModelCheckpoint(tmp_path, "x")
    trainer(ApproxDropout(min_gain=0), checkpoint, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    content = torch.load(checkpoint.best_model_path, weights_only=True)
    edit(next(state for key, state in content["callbacks"].items() if key.startswith("ApproxDropout")))
    torch.save(content, tmp_path / "edited.ckpt")
    return tmp_path / "edited.ckpt"


def test_a_checkpoint_of_the_first_format_is_refused_and_its_weights_load(tmp_path):
    """At that time a sampler had one generator, and there were fewer options."""

    def first_format(state):
        (sampler,) = state["samplers"].values()
        sampler["generator"] = sampler.pop("steps")
        del sampler["patterns"], state["before"], state["options"]["tile_size"], state["options"]["recurrent"]

    path = edited(tmp_path, first_format)
    with pytest.raises(MisconfigurationException, match="'steps' is missing: another version wrote it"):
        trainer(ApproxDropout(min_gain=0), tmp_path=tmp_path, max_epochs=2).fit(mlp(), loader(), ckpt_path=path)
    trainer(ApproxDropout(min_gain=0), tmp_path=tmp_path, max_epochs=1).fit(
        MLPClassifier.load_from_checkpoint(path), loader()
    )


def test_a_checkpoint_of_the_last_format_goes_on(tmp_path):
    """It lacked the start of the epoch's mean rate, and the newest options."""

    def last_format(state):
        del state["before"], state["options"]["tile_size"], state["options"]["recurrent"]

    callback = ApproxDropout(min_gain=0)
    path = edited(tmp_path, last_format)
    trainer(callback, tmp_path=tmp_path, max_epochs=2).fit(mlp(), loader(), ckpt_path=path)
    assert callback._steps == 12


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state.pop("samplers"),
        lambda state: state.pop("options"),
        lambda state: state.pop("dropped"),
        lambda state: state.update(samplers={}),
        lambda state: next(iter(state["samplers"].values())).update(dp=7, keep=9),
        lambda state: next(iter(state["samplers"].values())).update(steps=torch.zeros(3, dtype=torch.uint8)),
        lambda state: next(iter(state["samplers"].values())).update(steps=torch.zeros(5000)),
        lambda state: next(iter(state["samplers"].values())).update(steps="x"),
        lambda state: state.update(samplers=[1]),
        lambda state: state.update(options=None),
        lambda state: state.update(steps=None),
    ],
)
def test_a_damaged_state_is_refused_before_training(edit, tmp_path):
    path = edited(tmp_path, edit)
    model = mlp()
    with pytest.raises(MisconfigurationException, match="ApproxDropout: the checkpoint's patterns do not fit"):
        trainer(ApproxDropout(min_gain=0), tmp_path=tmp_path, max_epochs=2).fit(model, loader(), ckpt_path=path)
    assert all("Approx" not in type(m).__name__ for m in model.modules())


def test_an_exception_or_interrupt_leaves_the_stock_model(tmp_path):
    class Fails(Callback):
        def __init__(self, error):
            self.error = error

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise self.error

    for error, raised in (
        (ValueError("x"), ValueError),
        (KeyboardInterrupt(), (KeyboardInterrupt, SystemExit)),
    ):
        model = mlp()
        with pytest.raises(raised):
            trainer(ApproxDropout(min_gain=0), Fails(error), tmp_path=tmp_path).fit(model, loader())
        assert all("Approx" not in type(m).__name__ for m in model.modules())


def test_layers_built_in_configure_model_are_found(tmp_path):
    class Late(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.5), nn.Linear(64, 3))

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = ApproxDropout(min_gain=0)
    trainer(callback, tmp_path=tmp_path, max_epochs=1).fit(Late(), loader())
    assert callback.report["net.1"].producer == "net.0"


def vendor_lstm_has_bfloat16():
    """On CPUs without AVX-512 the stock nn.LSTM itself fails under bfloat16 autocast."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(4, 4)(torch.randn(2, 1, 4))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(("make", "data"), [(mlp, loader), (lstm, text)])
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"limit_train_batches": 3, "limit_val_batches": 1},
        {"limit_train_batches": 0.5, "val_check_interval": 0.5},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_trainer_options(options, make, data, tmp_path):
    if options.get("precision") and make is lstm and not vendor_lstm_has_bfloat16():
        pytest.skip("nn.LSTM has no bfloat16 on this CPU")
    callback = ApproxDropout(min_gain=0, rate=0.5)
    record = Record(callback)
    run = trainer(callback, record, tmp_path=tmp_path, **options)
    run.fit(make(), data(), data())
    assert run.global_step > 0
    assert len(record.patterns) == run.fit_loop.epoch_loop.total_batch_idx + 1
    assert all(record.patterns)
    assert callback.realised_rate == pytest.approx(0.5, abs=0.05)  # dp = 9 keeps 4 or 5


def test_the_papers_setting():
    options = ApproxDropout.paper(max_dp=12).options
    assert (options.interleave, options.shuffle, options.keep, options.concentration) == (
        False,
        False,
        "one",
        0.0,
    )
    assert options.max_dp == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, r"ApproxDropout: dropout rate must be a number in \[0, 1\), got 1.0"),
        ({"rate": 0.95}, "smallest max_dp that serves is 20"),
        ({"pattern": "stripes"}, "pattern must be one of 'row', 'tile', 'dropconnect', got 'stripes'"),
        ({"backend": "fpga"}, "backend must be one of 'auto', 'reference', 'compact', 'triton', got 'fpga'"),
        ({"search": "guess"}, "search method must be 'maxent' or 'sgd', got 'guess'"),
        ({"seed": 1.5}, "seed must be an integer or None, got 1.5"),
        ({"seed": 1.0}, "seed must be an integer or None, got 1.0"),
        ({"seed": "3"}, "seed must be an integer or None, got '3'"),
        ({"seed": True}, "seed must be an integer or None, got True"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        ApproxDropout(**arguments)


def test_a_rate_of_the_model_that_is_not_feasible_is_refused_before_training(tmp_path):
    model = MLPClassifier(in_features=20, hidden=(64,), num_classes=3, rate=0.95)
    with pytest.raises(MisconfigurationException, match="smallest max_dp that serves is 20"):
        trainer(ApproxDropout(min_gain=0), tmp_path=tmp_path).fit(model, loader())


def test_two_callbacks_are_refused(tmp_path):
    # The same pattern family: Lightning refuses, since their states would have one key.
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ApproxDropout`"):
        trainer(ApproxDropout(min_gain=0), ApproxDropout(min_gain=0, rate=0.3), tmp_path=tmp_path).fit(
            mlp(), loader()
        )


def test_the_callback_can_be_copied_before_and_after_fit(tmp_path):
    callback = ApproxDropout(min_gain=0, seed=1)
    copy.deepcopy(callback)
    trainer(callback, tmp_path=tmp_path, max_epochs=1).fit(mlp(), loader())
    assert copy.deepcopy(callback).realised_rate == callback.realised_rate


class Change(Callback):
    """Changes the model in the given hooks."""

    def __init__(self, **changes):
        for hook, change in changes.items():
            setattr(self, hook, lambda trainer, pl_module, *_, change=change, **__: change(pl_module))


def wide():
    return MLPClassifier(in_features=20, hidden=(64, 64), num_classes=3, rate=0.5)


def fail(module):
    raise ArithmeticError("of the training's own")


def spectral(module):
    torch.nn.utils.parametrizations.spectral_norm(module.net[4])


@pytest.mark.parametrize("where", ["setup", "on_train_start", "on_train_epoch_end"])
def test_a_layer_that_another_callback_parametrizes_is_trained_and_restored(where, tmp_path):
    callback, model = ApproxDropout(min_gain=0), wide()
    once = lambda module: spectral(module) if not hasattr(module.net[4], "parametrizations") else None  # noqa: E731
    trainer(callback, Change(**{where: once}), tmp_path=tmp_path).fit(model, loader())
    assert callback.report.saved > 0
    assert type(model.net[4]).__bases__ == (nn.Linear,)
    assert not any(isinstance(m, Converted) for m in model.modules())
    trainer(callback, tmp_path=tmp_path).fit(model, loader())


def take_away(module):
    """What the layers learn with, and the class."""
    del module.net[1].__dict__["read_whole_too"]
    module.net[4].__class__ = nn.Identity


@pytest.mark.parametrize("change", [spectral, take_away])
@pytest.mark.filterwarnings("error::approxdrop_lightning.conversion.NotRestoredWarning")
def test_restoring_hides_no_exception_and_leaves_nothing_half_converted(change, tmp_path):
    callback, model = ApproxDropout(min_gain=0), wide()
    with pytest.raises(ArithmeticError, match="of the training's own"):
        trainer(
            callback, Change(on_train_batch_end=lambda module: (change(module), fail(module))), tmp_path=tmp_path
        ).fit(model, loader())
    assert not any(isinstance(m, Converted) for m in model.modules())
    model = wide()
    trainer(callback, tmp_path=tmp_path).fit(model, loader())
    assert callback.report.saved > 0


def test_another_callback_that_fails_in_its_own_end_does_not_leave_the_model_converted_for_good(tmp_path):
    callback, model = ApproxDropout(min_gain=0), wide()
    first = Change(on_train_batch_end=fail, on_exception=fail)  # then Lightning asks no further callback
    with pytest.raises(ArithmeticError):
        trainer(first, callback, tmp_path=tmp_path).fit(model, loader())
    assert any(isinstance(m, Converted) for m in model.modules())
    trainer(callback, tmp_path=tmp_path).fit(other := wide(), loader())
    for module in (model, other):
        assert not any(isinstance(m, Converted) for m in module.modules())
    trainer(callback, tmp_path=tmp_path).fit(model, loader())


def test_copies_made_in_training_are_stock_and_can_be_trained(tmp_path):
    """Such as a moving average of the weights, a teacher, or the best epoch so far."""
    copies = []
    keep = Change(on_train_batch_end=lambda module: copies.append(copy.deepcopy(module.net)))
    average = Change(on_train_start=lambda module: copies.append(torch.optim.swa_utils.AveragedModel(module.net)))
    trainer(ApproxDropout(min_gain=0), keep, average, tmp_path=tmp_path).fit(wide(), loader())
    assert len(copies) == 13
    stock = {type(m) for m in wide().net.modules()}
    assert all({type(m) for m in net.modules()} <= {*stock, type(copies[0])} for net in copies)
    for net in (copies[0], copies[-1]):
        net(torch.randn(4, 1, 4, 5)).sum().backward()
        model = wide()
        model.net = net
        callback = ApproxDropout(min_gain=0)
        trainer(callback, tmp_path=tmp_path).fit(model, loader())
        assert callback.report.saved > 0
