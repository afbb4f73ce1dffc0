"""Slice a trained run into a stand-alone model of every size, and test each.

python eval.py                                    # the newest run
python eval.py --dataset_code=beauty              # the newest run that fits the given flags
python eval.py --run experiments/runs/beauty/... --mask_history
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from config import parse_args, run_cli
from train import build_model, load_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="FOLDER", help="the run to test; else the newest that fits the given flags")
    parser.add_argument(
        "--mask_history", action="store_true", help="rank without the items already in a user's history"
    )


def main(argv: Sequence[str] | None = None) -> dict[int, dict[str, float]]:
    """Test every size of a run and return size -> metrics."""
    given, sources, arguments = parse_args(argv, __doc__.splitlines()[0], add_arguments)
    from dataloader import eval_rows
    from trainer.checkpoint import load_weights
    from trainer.device import resolve_device
    from trainer.evaluation import test_every_size
    from trainer.runs import find_run, read_config, with_runtime_flags

    flags = {name: getattr(given, name) for name, source in sources.items() if source == "flag"}
    run = Path(arguments.run) if arguments.run else find_run(Path(given.runs_root), flags, "best.safetensors")
    config = with_runtime_flags(read_config(run)[0], flags, run)
    print(f"run {run}", flush=True)
    device = resolve_device(config.device)
    catalog, features = load_data(config, device)
    model = build_model(config, catalog.num_items, features).to(device)
    load_weights(model, run / "best.safetensors")
    return test_every_size(
        model,
        eval_rows(catalog.sequences, config.lru_max_len, "test"),
        run,
        batch_size=config.test_batch_size,
        ks=config.metric_ks,
        mask_history=arguments.mask_history,
        title=f"{config.dataset_code}, {config.branch}: test",
    )


if __name__ == "__main__":
    run_cli(main)
