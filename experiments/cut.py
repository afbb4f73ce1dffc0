"""Cut a trained run to smaller widths afterwards, and test it beside the sizes that were trained nested.

python -m experiments.cut experiments/runs/beauty/...      # the run's cut.json; experiments.report --keep adds it

The encoder stays whole; a PCA weighted by the users' vectors (trainer/widths.py), fitted on validation users, cuts the
item table to 8, 16, ... dimensions. A nested size also has a smaller encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser, run_cli
from common.errors import InputError
from common.files import write_json
from config import Config

if TYPE_CHECKING:
    from datasets.catalog import Catalog
    from model.base import SequenceModel

CUT = "cut.json"
KS = (10, 20, 50)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Cut and test a run, write its cut.json, and return what was written."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, nested or of one size")
    parser.add_argument("--data_root", metavar="FOLDER", help="location of the data (default: the run's)")
    arguments = parser.parse_args(argv)
    from model.base import SequenceModel
    from trainer.load_run import load_run

    flags = {"data_root": arguments.data_root} if arguments.data_root else {}
    config, catalog, model = load_run(arguments.run, flags)
    if not isinstance(model, SequenceModel):
        raise InputError(f"{arguments.run} is a run of {config.model_code}, which has no item table to cut")
    found = cut_and_test(model, config, catalog)
    for protocol, rows in found.items():
        print(f"{protocol:6}  width  NDCG@10 cut  nested   Recall@10 cut  nested")
        for width, row in rows["cut"].items():
            nested = rows["nested"].get(width, {})
            values = [f"{of.get(name, float('nan')):.4f}" for name in ("NDCG@10", "Recall@10") for of in (row, nested)]
            print(f"{width:>13}  {values[0]:>11}  {values[1]:>6}  {values[2]:>13}  {values[3]:>6}")
    write_json(arguments.run / CUT, found)
    print(f"written: {arguments.run / CUT}")
    return found


def cut_and_test(model: SequenceModel, config: Config, catalog: Catalog) -> dict[str, Any]:
    """Return protocol -> cut, nested -> width -> test metrics, with the history kept and masked."""
    import numpy as np
    import torch

    from dataloader import eval_batches, eval_rows
    from trainer.evaluation import GROUP, encode_last, evaluate

    device, sizes = next(model.parameters()).device, model.sizes
    widths = (*(m for m in Config.mrl_hidden_sizes if m < sizes[-1]), sizes[-1])
    validation, test = (eval_rows(catalog.sequences, config.lru_max_len, split) for split in ("val", "test"))
    with torch.inference_mode():
        table = model.item_table()
        z = [encode_last(model, batch, table).cpu().numpy() for batch in eval_batches(validation, GROUP, device)]
    cut = cut_model(model, np.concatenate(z), table[1:].cpu().numpy(), widths)
    return {
        protocol: {
            name: {str(m): metrics for m, metrics in evaluate(of, test, sizes=of.sizes, batch_size=GROUP, ks=KS,
                                                              mask_history=protocol == "masked").items()}
            for name, of in (("cut", cut), ("nested", model))
        }
        for protocol in ("kept", "masked")
    }  # fmt: skip


def cut_model(model: SequenceModel, users: Any, items: Any, widths: tuple[int, ...]) -> SequenceModel:
    """Return a model whose first w dimensions score as the cut to w, for every w in widths.

    users [U, D] and items [N, D] fit the cut. Its item table holds the cut table beside the original one, which the
    encoder reads.
    """
    import torch
    from torch import Tensor, nn

    from model.base import SequenceModel
    from trainer.widths import user_weighted_pca

    weight = next(model.parameters())
    for_users, for_items = (torch.from_numpy(m).to(weight) for m in user_weighted_pca(users, items))

    class CutItems(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            rows = model.items(tokens)
            return torch.cat([rows @ for_items, rows], dim=1)

    class CutModel(SequenceModel):
        def __init__(self) -> None:
            super().__init__()
            self.num_items, self.sizes, self.full = model.num_items, widths, model
            self.items = CutItems()  # type: ignore[assignment]

        def encode(self, x: Tensor, position: Tensor, longest: int, at: Tensor | None = None) -> Tensor:
            return self.full.encode(x[:, len(for_users) :], position, longest, at) @ for_users

        def ranking_bias(self) -> list[float] | None:
            bias = model.ranking_bias()
            return bias and [bias[-1]] * len(widths)

    return CutModel().eval()


if __name__ == "__main__":
    run_cli(main)
