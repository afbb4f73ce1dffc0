"""Items held out of training, added to an export afterwards."""

import json

import numpy as np
import pytest

import train
from common.errors import InputError
from datasets.catalog import load_catalog
from experiments import cold_items, report
from serving import export
from tests.prepared import write_prepared

FLAGS = ["--language_encoder", "lexical", "--no-use_img_encoder", "--lru_num_blocks", "1", "--mrl_hidden_sizes", "4,8",
         "--num_epochs", "1", "--val_batch_size", "8"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(data_root, the whole catalogue, the one without a fifth of its items, held_out.json)."""
    root = tmp_path_factory.mktemp("data")
    write_prepared(root, "whole", users=40, items=150)
    cold_items.main(["make", "--dataset_code", "whole", "--from_root", str(root), "--data_root", str(root),
                     "--share", "0.2"])  # fmt: skip
    held = json.loads((root / "whole-cold/held_out.json").read_text())
    return root, load_catalog(root, "whole"), load_catalog(root, "whole-cold"), held


def histories(catalog):
    return [[catalog.asins[i - 1] for i in catalog.sequences.of(row)] for row in range(len(catalog.sequences))]


def test_the_items_held_out_are_gone_and_the_others_keep_their_order_and_their_metadata(made):
    _, whole, cold, held = made
    out = {record["asin"] for record in held["items"]}
    assert len(out) == 30
    assert cold.asins == [asin for asin in whole.asins if asin not in out]
    assert [record["title"] for record in cold.metadata] == [
        record["title"] for record in whole.metadata if record["asin"] not in out
    ]
    without = [[asin for asin in history if asin not in out] for history in histories(whole)]
    assert histories(cold) == [history for history in without if len(history) >= 3]


def test_the_users_whose_last_item_is_held_out_are_kept_to_test_with(made):
    _, whole, _, held = made
    out = {record["asin"] for record in held["items"]}
    expected = [
        {"history": [asin for asin in history if asin not in out], "target": history[-1]}
        for history in histories(whole)
        if history[-1] in out
    ]
    assert held["users"] == [user for user in expected if user["history"]]
    assert len(held["users"]) >= 3


def test_held_out_items_are_added_to_an_export_and_ranked_among_all(made, tmp_path, monkeypatch):
    root, _, cold, held = made
    monkeypatch.chdir(tmp_path)
    run = train.main(["--dataset_code", "whole-cold", "--data_root", str(root), *FLAGS])
    (folder,) = export.main(["--run", str(run), "--out", str(tmp_path / "cold")])
    found = cold_items.main(["test", str(folder), "--data_root", str(root), "--out", str(run / "cold_items.json")])
    assert found == json.loads((run / "cold_items.json").read_text())
    assert (found["items"], found["held_out"], found["size"]) == (150, 30, 8)
    never, trained, chance = (found["users"][name] for name in ("never trained", "trained", "chance"))
    assert never["count"] == chance["count"] == len(held["users"])
    assert trained["count"] <= len(cold.sequences)
    assert chance["Recall@50"] == 50 / 150
    for result in (never, trained):
        assert 0 <= result["Recall@10"] <= result["Recall@50"] <= result["Recall@100"] <= 1
    elsewhere = ["--results", str(tmp_path / "kept"), "--out", str(tmp_path / "R.md"), "--media", str(tmp_path)]
    report.main(["--keep", str(run), *elsewhere])
    assert f"| never trained | {never['count']} | {never['Recall@10']:.4f} |" in (tmp_path / "R.md").read_text()


@pytest.mark.parametrize(("items", "asked"), [(5000, 100), (60, 60)])
def test_recall_counts_a_target_by_its_place_in_the_answer(items, asked):
    class Answers:
        def __len__(self):
            return items

        def recommend(self, histories, top_k, exclude_history):
            assert top_k == asked and not exclude_history
            return [Answer(place) for (place,) in histories]

    class Answer:
        def __init__(self, place):
            self.numbers = np.arange(asked) + 1000
            self.numbers[place] = 7
            self.ids = [str(number) for number in self.numbers]

    found = cold_items.recalls(Answers(), [([9], 7), ([10], "7"), ([49], 7), ([asked - 1], 8)])
    assert found == {"count": 4, "Recall@10": 0.25, "Recall@50": 0.75, "Recall@100": 0.75}


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "nan", "0.001"])
def test_a_share_that_is_none_or_of_no_item_is_refused(made, share):
    with pytest.raises(InputError, match="--share"):
        cold_items.main(["make", "--dataset_code", "whole", "--from_root", str(made[0]), "--share", share])
