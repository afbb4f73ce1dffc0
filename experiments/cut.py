"""Cut a run's item table afterwards, and test every table width with every encoder size.

python -m experiments.cut experiments/runs/beauty/...      # the run's cut.json; experiments.report --keep adds it

A PCA weighted by the users' vectors (serving/weights.py), fitted on validation users, cuts the item table to 8,
16, ... dimensions. The largest encoder with a narrow table is compared with the size that was trained nested, whose
encoder is smaller too. Runs of fmrlrec also get the plane of both choices: metrics, bytes of the table and time of the
encoder.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser, run_cli
from common.errors import InputError
from common.files import sha256, write_json
from config import Config

if TYPE_CHECKING:
    from datasets.catalog import Catalog
    from model import FMRLRec
    from model.base import SequenceModel

KS = (10, 20, 50)
SHOWN = ("NDCG@10", "Recall@10")  # metrics of the plane
PROTOCOLS = ("kept", "masked")
TIMED = 200  # users whose encoding is timed

Tested = dict[str, dict[str, dict[str, float]]]  # protocol -> width -> metrics


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Cut and test a run, write its cut.json and cut.png, and return what was written."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, nested or of one size")
    parser.add_argument("--data_root", metavar="FOLDER", help="location of the data (default: the run's)")
    arguments = parser.parse_args(argv)
    from model import FMRLRec
    from model.base import SequenceModel
    from trainer.load_run import load_run
    from trainer.runs import CUT, CUT_PICTURE, WEIGHTS

    flags = {"data_root": arguments.data_root} if arguments.data_root else {}
    config, catalog, model = load_run(arguments.run, flags)
    if not isinstance(model, SequenceModel):
        raise InputError(f"{arguments.run} is a run of {config.model_code}, which has no item table to cut")
    nested, cut = cut_and_test(model, config, catalog)
    largest = cut[model.sizes[-1]]
    found: dict[str, Any] = {
        protocol: {"cut": largest[protocol], "nested": nested[protocol]} for protocol in PROTOCOLS
    } | {"weights": sha256(arguments.run / WEIGHTS)}
    for protocol in PROTOCOLS:
        print(f"{protocol:6}  width  NDCG@10 cut  nested   Recall@10 cut  nested")
        for width, row in largest[protocol].items():
            values = [
                f"{of.get(name, float('nan')):.4f}" for name in SHOWN for of in (row, nested[protocol].get(width, {}))
            ]
            print(f"{width:>13}  {values[0]:>11}  {values[1]:>6}  {values[2]:>13}  {values[3]:>6}")
    if isinstance(model, FMRLRec):
        times = encoder_times(model, config, catalog, arguments.run)
        found["plane"] = plane(cut, catalog.num_items, times)
        print_plane(found["plane"])
        plot_plane(found["plane"], config.dataset_code, arguments.run / CUT_PICTURE)
    write_json(arguments.run / CUT, found)
    print(f"written: {arguments.run / CUT}")
    return found


def cut_and_test(model: SequenceModel, config: Config, catalog: Catalog) -> tuple[Tested, dict[int, Tested]]:
    """Return the test metrics of the sizes, and size -> those of its table cut to every smaller width and whole."""
    from dataloader import eval_rows
    from model import FMRLRec, slice_model
    from trainer.evaluation import GROUP, evaluate

    validation, test = (eval_rows(catalog.sequences, config.lru_max_len, split) for split in ("val", "test"))

    def tested(of: SequenceModel) -> Tested:
        found = {
            protocol: evaluate(of, test, sizes=of.sizes, batch_size=GROUP, ks=KS, mask_history=protocol == "masked")
            for protocol in PROTOCOLS
        }
        return {protocol: {str(m): metrics for m, metrics in by_size.items()} for protocol, by_size in found.items()}

    nested, cut = tested(model), {}
    for m in model.sizes:
        of = slice_model(model, m) if isinstance(model, FMRLRec) and m < model.sizes[-1] else model
        widths = tuple(w for w in Config.mrl_hidden_sizes if w < m)
        narrow: Tested = (
            tested(cut_model(of, validation, widths)) if widths else {protocol: {} for protocol in PROTOCOLS}
        )
        cut[m] = {protocol: narrow[protocol] | {str(m): nested[protocol][str(m)]} for protocol in PROTOCOLS}
    return nested, cut


def cut_model(model: SequenceModel, validation: Any, widths: tuple[int, ...]) -> SequenceModel:
    """Return a model whose first w dimensions score as the cut to w, for every w in widths.

    validation: rows of the users that fit the cut. The item table of the model that is returned holds the cut table
    beside the original one, which the encoder reads.
    """
    import numpy as np
    import torch
    from torch import Tensor, nn

    from dataloader import eval_batches
    from model.base import SequenceModel
    from serving.weights import user_weighted_pca
    from trainer.evaluation import GROUP, encode_last

    weight = next(model.parameters())
    with torch.inference_mode():
        table = model.item_table()
        z = [encode_last(model, batch, table).cpu().numpy() for batch in eval_batches(validation, GROUP, weight.device)]
    cuts = user_weighted_pca(np.concatenate(z), table[1:].cpu().numpy())
    for_users, for_items = (torch.from_numpy(matrix).to(weight)[:, : widths[-1]] for matrix in cuts)

    class CutItems(nn.Module):
        spread = False

        def forward(self, tokens: Tensor) -> Tensor:
            rows = model.items(tokens)
            return torch.cat([rows @ for_items, rows], dim=1)

    class CutModel(SequenceModel):
        def __init__(self) -> None:
            super().__init__()
            self.num_items, self.sizes, self.full = model.num_items, widths, model
            self.items = CutItems()  # type: ignore[assignment]

        def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
            return self.full.encode(x[:, widths[-1] :], position, longest, at) @ for_users

        def ranking_bias(self) -> list[float] | None:
            bias = model.ranking_bias()
            return bias and [bias[-1]] * len(widths)

    return CutModel().eval()


def encoder_times(model: FMRLRec, config: Config, catalog: Catalog, run: Path) -> dict[int, float]:
    """Return size -> the median milliseconds of CPU time that onnxruntime needs to encode one test user."""
    from serving import Recommender
    from serving.export import export_size

    users = range(min(TIMED, len(catalog.sequences)))
    histories = [[catalog.asins[item - 1] for item in catalog.sequences.of(user)[:-1]] for user in users]
    model, times = model.cpu(), {}
    for m in model.sizes:
        with tempfile.TemporaryDirectory() as folder:
            export = Path(folder, "export")
            export_size(model, m, export, config=config, catalog=catalog, run=run, format="onnx", quantize="none")
            recommender = Recommender.from_pretrained(export, "onnx", threads=1)
        milliseconds = []
        for history in (histories[0], *histories):
            started = time.thread_time()  # other processes do not count
            recommender.user_vectors([history])
            milliseconds.append((time.thread_time() - started) * 1e3)
        times[m] = statistics.median(milliseconds[1:])  # the first call is a warm-up
    return times


def plane(cut: dict[int, Tested], num_items: int, times: dict[int, float]) -> list[dict[str, Any]]:
    """Return a cell for each encoder size and table width. table_bytes: in memory, in float32."""
    return [
        {
            "size": m,
            "width": int(w),
            "table_bytes": 4 * (num_items + 1) * int(w),
            "encoder_ms": times[m],
            **{protocol: {name: tested[protocol][w][name] for name in SHOWN} for protocol in PROTOCOLS},
        }
        for m, tested in cut.items()
        for w in tested["kept"]
    ]


def print_plane(cells: list[dict[str, Any]]) -> None:
    """Print NDCG@10, with the history kept, of every encoder size (rows) and table width (columns)."""
    ndcg = {(cell["size"], cell["width"]): f"{cell['kept']['NDCG@10']:.4f}" for cell in cells}
    times = {cell["size"]: cell["encoder_ms"] for cell in cells}
    megabytes = {cell["width"]: cell["table_bytes"] / 1e6 for cell in cells}
    print("\nNDCG@10, kept  table width " + "".join(f"{w:>8}" for w in sorted(megabytes)))
    print("encoder     ms       MB     " + "".join(f"{megabytes[w]:>8.2f}" for w in sorted(megabytes)))
    for m, milliseconds in times.items():
        print(f"{m:>7}  {milliseconds:>5.2f}{'':13}" + "".join(f"{ndcg.get((m, w), ''):>8}" for w in sorted(megabytes)))


def plot_plane(cells: list[dict[str, Any]], dataset: str, path: Path) -> None:
    """Draw NDCG@10 against the table's bytes, a line per encoder size, and against the encoder's time, per width."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from trainer.plots import figure, label_lines, shades

    with figure(path, 2, f"{dataset}: two widths, history kept") as panels:
        for panel, line, x, scale, unit in (
            (panels[0], "size", "table_bytes", 1e6, "MB of the item table in memory"),
            (panels[1], "width", "encoder_ms", 1, "ms to encode one history"),
        ):
            values, ends = sorted({cell[line] for cell in cells}), []
            for value, colour in zip(values, shades(len(values)), strict=True):
                of = [cell for cell in cells if cell[line] == value]
                ndcg = [cell["kept"]["NDCG@10"] for cell in of]
                panel.plot([cell[x] / scale for cell in of], ndcg, "o-", color=colour)
                ends.append((ndcg[-1], str(value), colour))
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_ylim(bottom=0)
            panel.set_xlabel(unit)
            panel.set_title(f"NDCG@10 by {'encoder size' if line == 'size' else 'table width'}", loc="left")
            label_lines(panel, ends)


if __name__ == "__main__":
    run_cli(main)
