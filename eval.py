"""Test a trained run at every size, and check that each size's slice is the same model on its own.

python eval.py                                    # the newest run
python eval.py --dataset_code=beauty              # the newest run that fits the given flags
python eval.py --run experiments/runs/beauty/... --mask_history
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config, InputError, parse_args, run_cli
from datasets import ranks

if TYPE_CHECKING:
    import numpy as np
    import torch

    from datasets.catalog import Catalog
    from model.baselines.counting import Popularity
    from trainer.step import Trained

    Model = Trained | Popularity


DESCRIPTION = """Test a trained run at every size, and check that each size's slice is the same model on its own.
Settings that say what was trained find the newest run that has these values; defaults do not count. Those that say
how to run (device, data_root, test_batch_size, metric_ks, ...) may differ from the run's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="FOLDER", help="the run to test; else the newest that fits the given flags")
    parser.add_argument(
        "--mask_history", action="store_true", help="rank without the items already in a user's history"
    )
    parser.add_argument(
        "--alone", action="store_true", help="test every slice as a model of its own, not all sizes in one pass"
    )


def main(argv: Sequence[str] | None = None) -> dict[int, dict[str, float]]:
    """Test every size of a run and return size -> metrics."""
    settings = [name for name in Config.__dataclass_fields__ if name != "test"]
    flags, arguments = parse_args(argv, DESCRIPTION, add_arguments, settings)
    from trainer.runs import find_trained, read_config, unfinished

    runs_root = Path(flags.get("runs_root", Config.runs_root))
    run = ranks.on_first(lambda: find_trained(arguments.run, runs_root, flags))
    trained, _ = ranks.on_first(lambda: read_config(run))
    if arguments.alone and trained.model_code != "fmrlrec":
        raise InputError(f"--alone tests slices of fmrlrec; {run} is of {trained.model_code}: leave --alone out")
    config, catalog, model = load_run(run, flags)
    progress = unfinished(run)
    ranks.say(f"run {run}{f', unfinished: {progress}' if progress else ''}")
    return test_run(config, catalog, model, run, mask_history=arguments.mask_history, alone=arguments.alone)


def load_run(run: str | Path, flags: dict | None = None) -> tuple[Config, Catalog, Model]:
    """A trained run: its settings, its catalogue, and its model with the weights of the best epoch.

    flags: settings that say how to run (device, batch sizes, data_root, ...) to use instead of the run's. Raises
    InputError where the folder is no run, a flag contradicts it, or the dataset is not the one it was trained on.
    """
    from datasets.device import resolve_device
    from trainer.checkpoint import load_weights
    from trainer.runs import read_config, with_runtime_flags

    run = Path(run)
    saved, _ = read_config(run)
    config = with_runtime_flags(saved, flags or {}, run)
    device = resolve_device(config.device)
    catalog, features = load_data(config, device, run)
    model = build_model(config, catalog.num_items, features).to(device)
    load_weights(model, run / "best.safetensors")
    return config, catalog, model.eval()


def load_data(config: Config, device: torch.device, run: Path | None = None) -> tuple[Catalog, list[np.ndarray]]:
    """The catalogue and its items' features, [N, F] of each encoder, mapped from their files; the demo is made where it
    is missing. Raises InputError, before anything is encoded, where it is not the catalogue that `run` was trained on.
    """
    from datasets.catalog import describe, load_catalog
    from datasets.features import feature_files
    from trainer.runs import check_data

    if config.dataset_code == "demo" and Path(config.data_root).resolve() == Path(Config.data_root).resolve():
        catalog = load_demo()
    else:
        catalog = load_catalog(config.data_root, config.dataset_code)
    for line in (describe(catalog), *catalog.notes):
        ranks.say(line)
    if run:
        ranks.on_first(lambda: check_data(run, catalog.digest()))
    features = feature_files(
        catalog,
        language=config.language_encoder if config.use_language_encoder else None,
        image=config.img_encoder if config.use_img_encoder else None,
        attributes=config.item_attributes,
        device=device,
        batch_size=config.encoder_batch_size,
        precision=config.encoder_precision,
        workers=config.encoder_workers,
    )
    return catalog, features


def load_demo() -> Catalog:
    """The built-in catalogue, made at first use."""
    from datasets.catalog import load_catalog
    from datasets.demo import prepare_demo

    root = ranks.on_first(prepare_demo)
    try:
        return load_catalog(root, "demo")
    except InputError as error:
        raise InputError(f"{error}. Remove {root / 'demo'}: it is made again") from None


def build_model(config: Config, num_items: int, features: list[np.ndarray]) -> Model:
    """The model that the settings describe, freshly initialised."""
    import torch

    from model import FMRLRec
    from model.baselines.counting import ItemKNN, Popularity
    from model.baselines.lrurec import LRURec
    from model.baselines.sasrec import SASRec
    from model.whitening import Whitening

    if config.model_code == "popularity":
        return Popularity(num_items)
    if config.model_code == "itemknn":
        return ItemKNN(num_items)
    dropouts = {"dropout": config.lru_dropout, "attn_dropout": config.lru_attn_dropout}
    if config.model_code == "sasrec":
        return SASRec(
            num_items,
            config.mrl_hidden_sizes[-1],
            config.lru_max_len,
            num_blocks=config.lru_num_blocks,
            num_heads=config.num_heads,
            **dropouts,
        )
    if config.model_code == "lrurec":
        return LRURec(
            num_items,
            config.mrl_hidden_sizes[-1],
            num_blocks=config.lru_num_blocks,
            use_bias=config.lru_use_bias,
            r_min=config.lru_r_min,
            r_max=config.lru_r_max,
            **dropouts,
        )
    parts = [torch.from_numpy(part) for part in features]
    whitening = Whitening(parts) if config.whiten_features else None
    return FMRLRec(
        num_items,
        (whitening.features() if whitening else parts) or None,
        config.mrl_hidden_sizes,
        num_blocks=config.lru_num_blocks,
        dropout=config.lru_dropout,
        attn_dropout=config.lru_attn_dropout,
        use_bias=config.lru_use_bias,
        r_min=config.lru_r_min,
        r_max=config.lru_r_max,
        item_embedding=config.item_embedding,
        item_embedding_dropout=config.item_embedding_dropout,
        logit_scale=config.logit_scale,
        whitening=whitening,
    )


def test_run(
    config: Config, catalog: Catalog, model: Model, run: Path, mask_history: bool, alone: bool = False
) -> dict[int, dict[str, float]]:
    """Test a model at every size and write what was found into the run's folder."""
    from dataloader import eval_rows, times_trained
    from trainer.evaluation import test_every_size
    from trainer.runs import read_config

    trained, _ = read_config(run)
    rows = eval_rows(catalog.sequences, config.lru_max_len, "test")
    return test_every_size(
        model,
        rows,
        run,
        batch_size=config.test_batch_size,
        ks=tuple(sorted({*config.metric_ks, *trained.metric_ks})),  # the run's files never lose a cut-off
        mask_history=mask_history,
        times_trained=times_trained(catalog.sequences, catalog.num_items)[rows.targets],
        title=f"{config.dataset_code}, {config.title}: test",
        alone=alone,
    )


if __name__ == "__main__":
    run_cli(main)
