"""Test a trained run at every size, and check that each size's slice is the same model on its own.

python eval.py                                    # the newest run
python eval.py --dataset_code=beauty              # the newest run that fits the given flags
python eval.py --run experiments/runs/beauty/... --mask_history
python eval.py --run experiments/runs/beauty/... --on_newer_data    # new products and events since the training
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import processes
from common.cli import add_switch, parse_args, run_cli
from common.errors import InputError
from common.files import write_json
from config import SECTIONS, Config

DESCRIPTION = """Test a trained run at every size, and check that each size's slice is the same model on its own.
Settings of what was trained select the newest run that has these values; defaults do not count. Settings of how to run
(device, data_root, test_batch_size, metric_ks, ...) may differ from the run's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="FOLDER", help="the run to test (default: the newest that fits)")
    add_switch(parser, "mask_history", "exclude history items from the candidates (default: include them)")
    add_switch(parser, "alone", "test every slice as a model of its own (default: all sizes in one pass)")
    add_switch(parser, "validation", "rank the validation targets instead, also by how often they occur in training")
    add_switch(parser, "on_newer_data", "test on data that changed since; writes to newer_data/ (default: refuse)")
    add_switch(parser, "list_metrics", "also measure the recommended lists: coverage, popularity, novelty, diversity")


def main(argv: Sequence[str] | None = None) -> dict[int, dict[str, float]]:
    """Test (or validate) every size of a run and return size -> metrics."""
    settings = [name for name in Config.__dataclass_fields__ if name != "test"]
    flags, arguments = parse_args(argv, DESCRIPTION, SECTIONS, add_arguments, settings)

    # Heavy imports wait until the flags are known to be good, so that --help and errors come at once.
    from trainer.runs import describe_run, find_trained, newer_data_folder, read_config

    runs_root = Path(flags.get("runs_root", Config.runs_root))
    run = processes.on_main_process(lambda: find_trained(arguments.run, runs_root, flags))
    trained, _ = processes.on_main_process(lambda: read_config(run))
    if arguments.alone and trained.model_code != "fmrlrec":
        raise InputError(f"--alone tests slices of fmrlrec; {run} is a run of {trained.model_code}: leave --alone out")
    if arguments.validation and (arguments.alone or arguments.list_metrics):
        raise InputError("--validation prints the ranking metrics alone; leave --alone and --list_metrics out")
    if processes.rank() == 0:
        print(describe_run(run), flush=True)
    from trainer.load_run import load_run
    from trainer.testing import test_every_size, validate_every_size

    config, catalog, model = load_run(run, flags, arguments.on_newer_data)
    if arguments.validation:
        return validate_every_size(model, catalog.sequences, config, arguments.mask_history)
    digest = catalog.digest()
    out = processes.on_main_process(lambda: newer_data_folder(run, digest))
    if out != run:
        processes.on_main_process(lambda: write_json(out / "data.json", {"data": digest, "items": catalog.num_items}))
    return test_every_size(
        model,
        catalog.sequences,
        config,
        run,
        mask_history=arguments.mask_history,
        alone=arguments.alone,
        list_metrics=arguments.list_metrics,
        out=out,
    )


if __name__ == "__main__":
    run_cli(main)
