"""Saving and opening, and an open model whose folder changes."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from serving import Recommender, recommender
from tests.exported import write_export
from tests.made_up import random_model
from tests.recommender.shop import ENGINES, IDS, KINDS, N, assert_same_answer, everything

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_added_items_is_the_same_after_saving_and_opening(shop, engine, kind, tmp_path):
    r = shop.first(engine, kind, 16)
    r.add_items(IDS[16:], shop.features[16:], [f"Title {i}" for i in range(4)])
    if (engine, kind) == ("torch", "int8"):
        with pytest.raises(InputError, match="dequantized this int8 export; save it from engine='onnx'"):
            r.save_pretrained(tmp_path / "saved")
        assert not list(tmp_path.iterdir())
        return
    r.save_pretrained(tmp_path / "saved")
    for name in ENGINES:
        opened = Recommender.from_pretrained(tmp_path / "saved", name, threads=1)
        assert (len(opened), opened.config["num_items"], opened.config["quantize"]) == (N, N, kind)
        for history in ([], [3, 17, 20], opened.start([3, 17, 20])):
            given = r.start(history.items) if isinstance(history, recommender.State) else history
            expected, answer = everything(r, given), everything(opened, history)
            assert_same_answer(answer, expected, 1e-5 if name == engine else 0.05 if kind == "int8" else 1e-5)
            assert dict(zip(answer.ids, answer.titles, strict=True)) == dict(
                zip(expected.ids, expected.titles, strict=True)
            )
        stored = opened.items.table.rows() if (name, kind) != ("torch", "int8") else r.items.table.rows()
        np.testing.assert_array_equal(stored, r.items.table.rows())


def test_saving_replaces_a_folder_only_with_overwrite(shop, r, tmp_path):
    r.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        r.save_pretrained(tmp_path / "saved")
    r.save_pretrained(tmp_path / "saved", overwrite=True)


def test_an_export_without_graphs_is_saved_without(shop, tmp_path):
    r = Recommender.from_pretrained(shop.export("none", format="torch"))
    r.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.onnx"))
    assert everything(Recommender.from_pretrained(tmp_path / "saved"), [3]) == everything(r, [3])


# -------------------------------------------------------------------------------------- a folder that changes


@pytest.fixture
def replaced(shop, engine, tmp_path):
    """(a recommender, its folder, a function that replaces the folder by another model of the same shape)."""
    folder, seeds = tmp_path / "export", iter(range(1, 10))

    def replace():
        model = random_model((4, 12), features=shop.features, num_items=N, seed=next(seeds))
        write_export(folder, model, overwrite=True)

    replace()
    return Recommender.from_pretrained(folder, engine, threads=1), folder, replace


def test_an_open_model_does_not_need_its_folder(replaced):
    r, folder, replace = replaced
    expected = Recommender.from_pretrained(folder, "torch")
    replace()  # before any graph has run
    assert_same_answer(everything(r, [3]), everything(expected, [3]))
    before, stepped = everything(r, [3]), r.recommend([r.start([3])])
    shutil.rmtree(folder)
    assert (everything(r, [3]), r.recommend([r.start([3])])) == (before, stepped)


def test_an_open_model_does_not_notice_that_its_weights_are_overwritten(replaced, tmp_path):
    r, folder, _ = replaced
    before = everything(r, r.start([3]))
    other = write_export(tmp_path / "other", random_model((4, 12), num_items=N, seed=20))
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert everything(r, r.start([3])) == before


def test_a_folder_that_is_replaced_while_it_is_being_opened_is_refused(replaced, engine, monkeypatch):
    _, folder, replace = replaced

    def slowly(*arguments, open_engine=recommender.open_engine):
        replace()
        return open_engine(*arguments)

    monkeypatch.setattr(recommender, "open_engine", slowly)
    with pytest.raises(InputError, match="export was replaced while it was being opened; open it again"):
        Recommender.from_pretrained(folder, engine)


@pytest.mark.parametrize("gone", [False, True])
def test_a_model_whose_folder_was_replaced_or_removed_cannot_be_saved(replaced, tmp_path, gone):
    r, folder, replace = replaced
    shutil.rmtree(folder) if gone else replace()
    with pytest.raises(InputError, match="cannot write" if gone else "changed since it was opened; open it again"):
        r.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_may_be_saved_over_the_folder_it_came_from(shop, replaced):
    r, folder, _ = replaced
    r.add_items(["NEW"], shop.features[:1])
    r.save_pretrained(folder, overwrite=True)
    opened = Recommender.from_pretrained(folder)
    assert len(opened) == N + 1
    assert_same_answer(everything(opened, ["NEW"]), everything(r, ["NEW"]))
    r.step(r.start(), "NEW")


# -------------------------------------------------------------------------------------------------------------- light


def test_serving_an_onnx_export_imports_nothing_of_the_training(shop):
    """tests/test_export_package.py does the rest without torch."""
    serve = (
        "import sys, serving\n"
        "serving.Recommender.from_pretrained(sys.argv[1]).recommend([[3]])\n"
        "heavy = ('torch', 'transformers', 'pandas', 'onnx', 'PIL', 'config', 'model', 'datasets', 'trainer')\n"
        "sys.exit(str([name for name in heavy if name in sys.modules] or ''))"
    )
    command = [sys.executable, "-c", serve, str(shop.export("float16"))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == ""
