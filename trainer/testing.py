"""The test: every size of a trained model on every user's last item, and that each slice equals the model's prefix."""

from pathlib import Path

import numpy as np
import torch

from common import processes
from common.files import write_json
from config import METRICS, Config
from dataloader import EvalBatch, eval_batches, eval_rows, times_trained
from datasets.catalog import Sequences
from model import FMRLRec, slice_model
from model.baselines.counting import Popularity
from trainer.evaluation import ITEMS, Model, encode_last, evaluate, rank_targets, rank_targets_alone
from trainer.list_metrics import list_metrics_of_sizes
from trainer.metrics import ranking_metrics
from trainer.plots import plot_metric_by_size
from trainer.runs import EVERY_SIZE, LARGEST, LIST_METRICS, USER_RANKS, describe_model, read_config, result_file
from trainer.user_ranks import BINS, save_ranks

PARITY = 1e-5  # how far a slice's scores may lie from the full model's prefix, relative to the largest score


def test_every_size(
    model: Model,
    sequences: Sequences,
    config: Config,
    folder: Path,
    *,
    mask_history: bool = False,
    alone: bool = False,
    list_metrics: bool = False,
    out: Path | None = None,
) -> dict[int, dict[str, float]]:
    """Test every size, print the table, write the run's files, and return size -> metrics.

    mask_history: exclude history items from the candidates. alone: rank with each slice as a stand-alone model, instead
    of all sizes in one pass. list_metrics: also measure the recommended lists. out: write the files there (default: the
    run's folder). Raises RuntimeError, after all is
    written, if a slice does not score as the model's prefix does.
    """
    rows = eval_rows(sequences, config.lru_max_len, "test")
    trained_ks = processes.on_main_process(lambda: read_config(folder)[0].metric_ks)
    out = out or folder
    ks = tuple(sorted({*config.metric_ks, *trained_ks}))  # the run's files never lose a cut-off
    batch_size, sizes = config.test_batch_size, model.sizes
    if alone and isinstance(model, FMRLRec):  # eval.py refuses a baseline
        ranks = rank_targets_alone(model, rows, sizes=sizes, batch_size=batch_size, mask_history=mask_history)
    else:
        ranks = rank_targets(model, rows, sizes=sizes, batch_size=batch_size, mask_history=mask_history)
    results = {m: ranking_metrics(of_size, ks) for m, of_size in ranks.items()}
    counts = times_trained(sequences, model.num_items)
    popularity = Popularity(model.num_items)
    popularity.counts = torch.from_numpy(counts).float()
    of_popularity = evaluate(popularity, rows, sizes=(1,), batch_size=batch_size, ks=ks, mask_history=mask_history)[1]
    if processes.rank() == 0:
        by_time = "" if sequences.cuts is None else f", split by {sequences.split}"
        protocol = "masked" if mask_history else "kept"
        title = f"{config.dataset_code}{by_time}, {describe_model(config)}: test, history {protocol}"
        of_users = {m: of_size.numpy() for m, of_size in ranks.items()}
        save_ranks(out / result_file(USER_RANKS, mask_history), of_users, max(ks), counts[rows.targets])
        print_table(results, [f"{metric}@{k}" for k in config.metric_ks[:2] for metric in METRICS])
        write_json(out / result_file(LARGEST, mask_history), results[max(results)])
        path = out / result_file(EVERY_SIZE, mask_history)
        write_json(path, {str(m): metrics for m, metrics in results.items()})
        plot_metric_by_size(results, ks, title, path.with_suffix(".png"), of_popularity)
        print(f"written: {path} and {path.with_suffix('.png').name}", flush=True)
        if list_metrics:
            found = list_metrics_of_sizes(model, rows, torch.from_numpy(counts), config.metric_ks[:2], mask_history)
            print_table(found, list(found[model.sizes[-1]]))
            write_json(out / result_file(LIST_METRICS, mask_history), {str(m): found[m] for m in found})
    if isinstance(model, FMRLRec):  # a baseline has nothing to slice
        batch = next(eval_batches(rows, config.test_batch_size, next(model.parameters()).device))
        for m in model.sizes:
            check_slice(model, slice_model(model, m), batch)
    return results


def validate_every_size(
    model: Model, sequences: Sequences, config: Config, mask_history: bool = False
) -> dict[int, dict[str, float]]:
    """Rank the validation targets, and return size -> metrics.

    Prints the metrics, and the largest size's by how often a target occurs in training. Writes nothing and never reads
    the test set.
    """
    rows = eval_rows(sequences, config.lru_max_len, "val")
    batch_size = config.val_batch_size
    ranks = rank_targets(model, rows, sizes=model.sizes, batch_size=batch_size, mask_history=mask_history)
    results = {m: ranking_metrics(of_size, config.metric_ks) for m, of_size in ranks.items()}
    bins = np.digitize(times_trained(sequences, model.num_items)[rows.targets], list(BINS.values())[1:])
    if processes.rank() == 0:
        shown = [f"{metric}@{k}" for k in config.metric_ks for metric in ("Recall", "NDCG")]
        print_table(results, shown)
        print(f"validation targets of size {model.sizes[-1]} by how often they occur in training:")
        for number, name in enumerate(BINS):
            if len(found := ranks[model.sizes[-1]][torch.from_numpy(bins == number)]):
                metrics = ranking_metrics(found, config.metric_ks)
                values = "  ".join(f"{metric} {metrics[metric]:.4f}" for metric in shown)
                print(f"{name:17} {len(found):6,} users  {values}", flush=True)
    return results


def print_table(results: dict[int, dict[str, float]], names: list[str]) -> None:
    """Print a row for every size, with the metrics `names`."""
    widths = [max(9, len(name)) for name in names]
    print("  size  " + "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    for size, metrics in results.items():
        values = (f"{metrics[name]:{width}.4f}" for name, width in zip(names, widths, strict=True))
        print(f"{size:6d}  " + "  ".join(values))


@torch.inference_mode()
def check_slice(model: FMRLRec, small: FMRLRec, batch: EvalBatch) -> None:
    """Raise RuntimeError unless a slice scores a batch as the model's prefix does, to PARITY."""
    size, scores = small.sizes[-1], []
    some = torch.arange(min(ITEMS, model.num_items + 1), device=batch.tokens.device)  # items enough, memory bounded
    for recommender in (model, small):
        recommender.eval()
        scores.append(encode_last(recommender, batch, None)[:, :size] @ recommender.items(some)[:, :size].T)
    difference = ((scores[0] - scores[1]).abs().max() / scores[0].abs().max().clamp_min(1e-30)).item()
    if not difference <= PARITY:
        raise RuntimeError(f"the slice of size {size} differs from the full model's scores by {difference:.1e}")
