"""Look at a run: a map of its items by category, an item's neighbours, and what the order of the item ids gives away.

python -m experiments.look experiments/runs/demo/...                     # writes embeddings.png into the run's folder
python -m experiments.look experiments/runs/demo/... --item "Warm Lamp"  # also lists the items most like this one
python -m experiments.look experiments/runs/demo/... --id_order          # also ranks later ids higher, on validation
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import Parser, run_cli
from common.errors import InputError
from datasets.items import flat_text

if TYPE_CHECKING:
    from datasets.catalog import Catalog
    from model.base import SequenceModel

PICTURE = "embeddings.png"
CATEGORIES = 6  # that have a colour; the others are grey
HEAD_STARTS = (0.0, 0.5, 1.0, 2.0, 3.0)  # of --id_order


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the map, and print the neighbours of --item and the table of --id_order."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--item", metavar="ID_OR_TITLE", help="list the nearest neighbours of this item")
    parser.add_argument("--neighbours", type=int, default=10, metavar="N", help="length of the list (default: 10)")
    parser.add_argument("--size", type=int, metavar="M", help="model size (default: the largest)")
    parser.add_argument(
        "--id_order",
        action="store_true",
        help="print what validation gains if items whose id sorts after that of the last item get a head start",
    )
    arguments = parser.parse_args(argv)
    import torch

    from model.base import SequenceModel
    from trainer.load_run import load_run

    config, catalog, model = load_run(arguments.run, {"device": "cpu"})
    if not isinstance(model, SequenceModel):
        raise InputError(f"{arguments.run} is a run of {config.model_code}, which has no embeddings; give another run")
    size = arguments.size or model.sizes[-1]
    if size not in model.sizes:
        raise InputError(f"--size {size} is not a size of {arguments.run}; its sizes are {model.sizes}")
    with torch.inference_mode():
        table = model.item_table()[1:, :size].float().numpy()  # [N, m]
    titles = [
        flat_text(record.get("title")) or item for item, record in zip(catalog.asins, catalog.metadata, strict=True)
    ]
    if arguments.item is not None:
        chosen = find_item(arguments.item, catalog.asins, titles)
        print(f"most like {catalog.asins[chosen]}  {titles[chosen]}, size {size}")
        for i, cosine in neighbours(table, chosen, arguments.neighbours):
            print(f"  {cosine:.3f}  {catalog.asins[i]}  {titles[i]}")
    if arguments.id_order:
        print_id_order(catalog, model, size, config.lru_max_len)
    path = arguments.run / PICTURE
    draw_map(table, categories(catalog.metadata), f"{config.dataset_code}: item embeddings of size {size}", path)
    print(f"written: {path}")


def find_item(text: str, ids: list[str], titles: list[str]) -> int:
    """Return the place of the item with this id, or whose title alone contains the text; InputError otherwise."""
    if text in ids:
        return ids.index(text)
    found = [i for i, title in enumerate(titles) if text.lower() in title.lower()]
    exact = [i for i in found if titles[i].lower() == text.lower()]
    if len(exact or found) == 1:
        return (exact or found)[0]
    some = "; ".join(f"{ids[i]} ({titles[i]})" for i in (found or range(len(ids)))[:5])
    raise InputError(f"--item {text!r} fits {len(found)} titles; give an id or more of one title, such as {some}")


def neighbours(table: np.ndarray, item: int, count: int) -> list[tuple[int, float]]:
    """Return the items with the largest cosine to one, and the cosines. table: [N, m]."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-12)
    cosines = unit @ unit[item]
    cosines[item] = -np.inf
    nearest = np.argsort(-cosines, kind="stable")[: min(count, len(table) - 1)]
    return [(int(i), float(cosines[i])) for i in nearest]


def print_id_order(catalog: Catalog, model: SequenceModel, size: int, max_len: int) -> None:
    """Print how often the next item's id sorts after the last one's, and the metrics if the ranking knows.

    A ranking that knows adds a head start to the scaled score of every such item. Events of one moment in the order of
    their ids, as in an export sorted by both, make the head start pay; it says nothing of what users want.
    """
    import torch

    from dataloader import eval_batches, eval_rows, train_items
    from trainer.evaluation import candidates, encode_last, ranking_metrics, target_ranks

    place = np.zeros(catalog.num_items + 1, dtype=np.int64)  # of each token among the sorted ids
    place[1 + np.argsort(np.array(catalog.asins), kind="stable")] = np.arange(1, catalog.num_items + 1)
    users, items = train_items(catalog.sequences)
    later = (np.diff(place[items]) > 0)[users[1:] == users[:-1]]
    print(f"{later.mean():.1%} of the next items in training have an id that sorts after the last item's")
    places, log_scale = torch.from_numpy(place), getattr(model, "log_scale", None)
    ranks: dict[float, list[torch.Tensor]] = {start: [] for start in HEAD_STARTS}
    with torch.inference_mode():
        scale = 1.0 if log_scale is None else float(log_scale[model.sizes.index(size)].exp())
        table = model.eval().item_table()
        for batch in eval_batches(eval_rows(catalog.sequences, max_len, "val"), 256, torch.device("cpu")):
            z = encode_last(model, batch, table)[:, :size]
            scores = scale * (z @ table[:, :size].T) + candidates(batch, 0, len(table), mask_history=True)
            after = places > places[batch.tokens[batch.last], None]  # [B, N+1]
            for start in HEAD_STARTS:
                ranks[start].append(target_ranks(scores + start * after, batch.targets))
    print("head start  NDCG@10  Recall@10  (validation, history masked)")
    for start, parts in ranks.items():
        found = ranking_metrics(torch.cat(parts), (10,))
        print(f"{start:10.1f} {found['NDCG@10']:8.4f} {found['Recall@10']:10.4f}")


def categories(metadata: list[dict[str, Any]]) -> list[str]:
    """Return a category for every item: its first one at the level that best tells the items apart.

    Amazon's categories are paths, such as [["Beauty", "Hair Care", "Shampoos"]]; level 0 is the shop itself.
    """
    paths = [flat_path(record.get("categories")) for record in metadata]
    at_level = [[path[min(level, len(path) - 1)] if path else "none" for path in paths] for level in range(3)]
    return next((names for names in at_level if len(set(names) - {"none"}) > 1), at_level[0])


def flat_path(value: Any) -> list[str]:
    """Return the first path of an item's categories; a text is a path of one name."""
    while isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    return [str(name) for name in value] if isinstance(value, list) else [str(value)] if value else []


def draw_map(table: np.ndarray, names: list[str], title: str, path: Path) -> None:
    """Draw the items' first two principal components, coloured by category, as PNG. table: [N, m]."""
    from trainer.plots import COLOURS, INK, figure

    centred = table - table.mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    places = np.pad(centred @ directions[:2].T, ((0, 0), (0, 2 - min(2, len(directions)))))
    share = values[:2] ** 2 / max(float((values**2).sum()), 1e-12)
    common = [name for name, _ in Counter(names).most_common(CATEGORIES)]
    with figure(path, 1, title, height=4.6) as [panel]:
        others = np.array([name not in common for name in names])
        panel.scatter(*places[others].T, s=6, color="#d0d4d9", linewidths=0)
        for name, colour in zip(common, [*COLOURS.values()], strict=False):
            chosen = np.array([other == name for other in names])
            panel.scatter(*places[chosen].T, s=9, color=colour, alpha=0.6, linewidths=0)
            middle = np.median(places[chosen], axis=0)
            panel.text(*middle, name[:24], color=colour, ha="center", va="center", weight="bold", fontsize=9,
                       bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
        panel.set_xlabel(f"first principal component ({share[0]:.0%} of the variance)", color=INK)
        panel.set_ylabel("second component", color=INK)


if __name__ == "__main__":
    run_cli(main)
