"""Phase 1: train each model on each data set for each seed; checkpoint; predictions of the test split."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
import torch

from config import Config
from datasets import SPLITS, BatchLoader, FaceDataset, load_dataset
from evaluation import predict
from execution import quiet
from models import build_model, checkpoint_matches, load_checkpoint, save_checkpoint
from phases import cross_evaluate, deploy
from phases.measure import measure
from phases.tables import write_tables
from plan import Cell, plan
from runner import CellResult, Compute, Report, run_cells
from sections.training import Training
from store import Store, StoreError, seed_for
from training import train


def run(config: Config, store: Store, report: Report, device: str = "cpu") -> pd.DataFrame:
    """Train what is not trained yet; returns the rows of the phase."""
    cells = plan(config)["baseline"]
    # a checkpoint has no hash in its name: one that a later config overwrote is trained again
    stale = [c for c in cells if store.is_done(c.id) and not checkpoint_matches(_checkpoint(store, c), c.id)]
    store.clear([cell.id for cell in (report.chosen(stale) if report.chosen else stale)])
    data = DatasetCache(config)
    _check_fingerprints(cells, store, data, report)
    cross_evaluate.check_data(cells, config, store, data, report)

    def is_complete(cell: Cell) -> bool:
        return deploy.is_complete(cell, config, store) and cross_evaluate.is_complete(cell, config, store)

    run_cells(
        "baseline", cells, prepare, config, store, report, is_complete, device=device, data=data, keep=deploy.keep
    )
    write_tables(config, store)
    return store.read_table("baseline")


def prepare(config: Config, store: Store, device: str, data: DatasetCache | None = None) -> Compute:
    """What computes a cell, in this process or a worker's: see runner.run_cells."""
    data = data or DatasetCache(config)
    context = functools.partial(compute, config=config, store=store, device=device, data=data)
    return deploy.keeping_results(context, config, store)


def compute(cell: Cell, report: Any, *, config: Config, store: Store, device: str, data: DatasetCache) -> CellResult:
    """One baseline: initialise, train, save the best epoch, predict the test split, deploy where that is wanted."""
    dataset = data.load(cell.dataset, report)
    names = names_of(dataset)

    def evaluate_abroad(model: torch.nn.Module, predictions: Any) -> dict[str, Any]:
        return cross_evaluate.evaluate(model, cell, predictions, names, config, store, data, device, report)

    if store.is_done(cell.id):  # it only lacks a deployment, or other data sets
        model = load_baseline(cell, dataset, config, store, device)
        saved = store.predictions(cell.id)
        deploy.check_same_model(model, test_loader(dataset, config, device), saved, device)
        abroad = evaluate_abroad(model, saved)
        if deploy.is_complete(cell, config, store):
            return deploy.kept(cell, abroad, store)
        deployed = _deploy(model, cell, dataset, saved, config, store, device, report)
        measured = measure(cell, saved, names, config, None)
        measured.extra |= abroad
        return deploy.deploy_again(cell, deployed, measured, config, store)
    settings = config.training.for_model(cell.model)
    seed_names = (cell.seed, cell.dataset, cell.model)
    model = build_model(
        cell.model,
        len(dataset.class_names),
        dataset.image_size,
        pretrained=config.models.pretrained,
        weights=config.models.weights.get(cell.model),
        options=config.models.options.get(cell.model),
        seed=seed_for(*seed_names, "initialisation"),
    ).to(device=device, memory_format=torch.channels_last)
    train_loader = training_loader(dataset, settings, device, seed_names)
    validation_loader = BatchLoader(
        dataset.splits["validation"], config.run.evaluation_batch_size, device=device, recycle=True
    )

    def tell(epoch: dict) -> None:
        report.detail(
            f"epoch {epoch['epoch']}/{settings.epochs}: training loss {epoch['train_loss']:.4f}, "
            f"validation accuracy {100 * epoch['validation_accuracy']:.1f} %, {epoch['seconds']:.0f} s"
        )

    result = train(model, train_loader, validation_loader, settings, progress=report.progress, on_epoch=tell)
    predictions = predict(model, test_loader(dataset, config, device), device)
    description = {
        "cell": cell.id,
        "model": cell.model,
        "dataset": cell.dataset,
        "n_classes": len(dataset.class_names),
        "class_names": list(dataset.class_names),
        "image_size": dataset.image_size,
        "options": config.models.options.get(cell.model, {}),
        "fingerprint": dataset.fingerprint,
        "best_epoch": result.best_epoch,
        "precision": result.precision,
    }
    save_checkpoint(_checkpoint(store, cell), model, description)
    store.write_predictions(cell.id, predictions)
    measured = measure(cell, predictions, names, config, None)
    measured.extra |= evaluate_abroad(model, predictions)
    deployed = _deploy(model, cell, dataset, predictions, config, store, device, report)
    measured.columns |= deployed.columns
    measured.columns |= {"compression": 1.0, "training_seconds": result.seconds}
    measured.extra["training_log"] = [{"precision": result.precision, **epoch} for epoch in result.log]
    measured.extra["fingerprint"] = dataset.fingerprint
    measured.extra |= deployed.extra
    return measured


def _deploy(model, cell: Cell, dataset: FaceDataset, predictions, config: Config, store: Store, device: str, report):
    loader = test_loader(dataset, config, device)
    return deploy.deploy(model.eval(), cell, dataset, predictions, names_of(dataset), loader, config, store, report)


def load_baseline(cell: Cell, dataset: FaceDataset, config: Config, store: Store, device: str) -> torch.nn.Module:
    """The trained model of a baseline cell, in eval mode; CheckpointError where the checkpoint is not its."""
    n_classes = len(dataset.class_names)
    model = build_model(cell.model, n_classes, dataset.image_size, options=config.models.options.get(cell.model))
    expected = {"model": cell.model, "n_classes": n_classes, "cell": cell.id}
    load_checkpoint(store.checkpoint_path(cell.dataset, cell.model, cell.seed), model, expected)
    return model.to(device=device, memory_format=torch.channels_last).eval()


def training_loader(dataset: FaceDataset, settings: Training, device: str, names: tuple) -> BatchLoader:
    """Shuffled, augmented batches of the training split; `names` seed their order."""
    train_split = dataset.splits["train"]
    if settings.max_train is not None and settings.max_train < len(train_split):
        chosen = np.random.default_rng(seed_for(dataset.name, "max_train")).permutation(len(train_split))
        train_split = train_split.subset(np.sort(chosen[: settings.max_train]))
    return BatchLoader(
        train_split,
        settings.batch_size,
        device=device,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed_for(*names, "batches")),
        flip=settings.flip,
        shift=settings.shift,
        brightness=settings.brightness,
        drop_last=len(train_split) >= settings.batch_size,
        channels_last=True,
    )


def _check_fingerprints(cells: list[Cell], store: Store, data: DatasetCache, report: Report) -> None:
    """Refuse data that are not those that the finished baselines were trained on: `root` is not part of a cell's id."""
    for cell in cells:
        if store.is_done(cell.id):
            dataset = data.load(cell.dataset, report)
            if store.record(cell.id)["extra"]["fingerprint"] != dataset.fingerprint:
                raise StoreError(
                    f"{store.record_path(cell.id)}: computed on other data than {cell.dataset} has now (labels, splits "
                    "or images changed); put the data back, use another results_dir, or start again with --fresh"
                )


class DatasetCache:
    """Each data set of the config, opened once."""

    def __init__(self, config: Config):
        self.config = config
        self.opened: dict[tuple, FaceDataset] = {}

    def load(self, name: str, report: Any) -> FaceDataset:
        return self._open(name, self.config, report)

    def load_abroad(self, name: str, image_size: int, report: Any) -> FaceDataset:
        """The test split of a data set for models that are trained on another one, whose image size it gets."""
        section = self.config.dataset(name).model_copy(update={"image_size": image_size})
        config = self.config.model_copy(update={"data": self.config.data.model_copy(update={name: section})})
        return self._open(name, config, report, only=("test",))

    def _open(self, name: str, config: Config, report: Any, only: tuple[str, ...] = SPLITS) -> FaceDataset:
        key = (name, config.dataset(name).image_size, only)
        if key not in self.opened:

            def decoding(what: str, done: int, total: int) -> None:
                report.progress(f"{what} {done}/{total}", 0.0)
                quiet.sign_of_life()

            with quiet.off_the_clock():  # all cells share it, and one of them happens to decode it
                dataset = load_dataset(config, name, decoding, only)
            for problem in dataset.problems:
                report.line(f"  {name}: {problem}")
            self.opened[key] = dataset
        return self.opened[key]


def names_of(dataset: FaceDataset) -> dict[str, Any]:
    sensitive = {name: list(values) for name, values in dataset.sensitive_names.items()}
    return {"classes": list(dataset.class_names), "sensitive": sensitive}


def test_loader(dataset: FaceDataset, config: Config, device: str) -> BatchLoader:
    size = config.run.evaluation_batch_size
    return BatchLoader(dataset.splits["test"], size, device=device, channels_last=True, recycle=True)


def _checkpoint(store: Store, cell: Cell):
    return store.checkpoint_path(cell.dataset, cell.model, cell.seed)
