"""Definitions of experiments, and which runs are the same."""

import dataclasses

import pytest

from common.errors import InputError
from config import NAMED_PRESETS, Config, resolve
from experiments.definition import definitions, identity, read_definition, unusual
from trainer.runs import ineffective_settings


def test_every_definition_can_be_read():
    found = definitions()
    assert {"table2", "table3", "sizes", "independent", "depth", "loss", "first_label", "released"} <= set(found)
    for definition in found.values():
        assert set(definition.datasets) <= {"beauty", "clothing", "sports", "toys"}


def test_table3_trains_each_branch_at_the_papers_settings():
    rows = {row.name: resolve(row.settings | {"dataset_code": "beauty"})[0] for row in definitions()["table3"].rows}
    assert [config.branch for config in rows.values()] == ["both", "language", "image", "id"]
    usual, _ = resolve({"dataset_code": "beauty"})
    assert rows["language and image"] == usual


def written(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


HEAD = 'title = "T"\ntext = "t"\ndatasets = ["beauty"]\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEAD + "[rows]\na = { lru_blocks = 2 }", r"unknown settings \['lru_blocks'\]"),
        (HEAD + '[rows]\na = { lru_num_blocks = "2" }', "lru_num_blocks '2', which must be of type int"),
        (HEAD + "[rows]\na = { lru_num_blocks = 0 }", "--lru_num_blocks 0 must be at least 1"),
        (HEAD + 'compare = [["a", "c"]]\n[rows]\na = { }', r"compares unknown rows \['c'\]; its rows are \['a'\]"),
        (HEAD + "colour = 1\n[rows]\na = { }", "colour"),
        (HEAD + "[rows]\na = { size = 7 }", "size 7; its sizes are 8,16"),
        (HEAD + '[rows]\na = { published = "sasrek" }', "published 'sasrek'; known are .*sasrec"),
        (HEAD, "it lacks 'rows'"),
        ("title = ", "is not a valid experiment"),
    ],
)
def test_an_invalid_definition_is_named_with_its_file(tmp_path, text, problem):
    with pytest.raises(InputError, match=rf"mine\.toml.*{problem}"):
        read_definition(written(tmp_path, text))


def test_varied_settings_are_those_in_which_rows_differ(tmp_path):
    rows = "[settings]\nlr = 1e-3\n[rows]\na = { seed = 1, lru_num_blocks = 1 }\nb = { seed = 1, lru_num_blocks = 2 }\n"
    definition = read_definition(written(tmp_path, HEAD + rows + "c = { seed = 1, num_epochs = 3 }"))
    assert definition.varied() == {"lru_num_blocks", "num_epochs"}
    assert [row.settings["lr"] for row in definition.rows] == [1e-3] * 3


def test_warm_up_varies_with_the_schedule(tmp_path):
    rows = "[settings]\nenable_lr_schedule = true\n[rows]\na = { }\nb = { enable_lr_schedule = false }\n"
    assert read_definition(written(tmp_path, HEAD + rows)).varied() == {"enable_lr_schedule", "warmup_steps"}


def test_a_preset_in_a_definition_stands_for_the_settings_it_names(tmp_path):
    text = HEAD + '[rows]\na = { preset = "plus", distill = 0.25 }\nb = { preset = "paper" }\nc = { preset = "plus" }'
    a, b, c = read_definition(written(tmp_path, text)).rows
    assert a.settings == NAMED_PRESETS["plus"] | {"distill": 0.25}
    assert (b.settings, c.settings) == ({}, NAMED_PRESETS["plus"])
    by_name, by_flags = resolve({"preset": "plus"})[0], resolve(c.settings)[0]
    definition = read_definition(tmp_path / "mine.toml")
    assert definition.fits(c, by_name) and definition.fits(c, by_flags)
    assert not definition.fits(a, by_name) and not definition.fits(b, by_name)


def test_different_models_may_differ_in_every_setting():
    assert definitions()["baselines"].varied() == set(Config.__dataclass_fields__)


def test_a_row_fits_no_run_with_extensions_that_it_does_not_name():
    (row,) = (row for row in definitions()["depth"].rows if row.name == "2 blocks")
    beauty = {"dataset_code": "beauty"}
    assert definitions()["depth"].fits(row, resolve(beauty)[0])
    for flags in ({"whiten_features": True}, {"item_embedding": 64}, {"distill": 0.1}, {"preset": "plus"}):
        assert not definitions()["depth"].fits(row, resolve(beauty | flags)[0])


# ---------------------------------------------------------------------------------------------------------- same runs


def test_ineffective_settings_do_not_tell_runs_apart():
    text = resolve({"use_img_encoder": False})[0]
    for name, value in {"img_encoder": "other", "device": "cpu", "val_batch_size": 3, "run_name": "x"}.items():
        assert identity(dataclasses.replace(text, **{name: value})) == identity(text)
    ids = dataclasses.replace(text, use_language_encoder=False)
    for name, value in {"language_encoder": "x", "item_attributes": ("brand",), "encoder_precision": "fp32"}.items():
        assert identity(dataclasses.replace(ids, **{name: value})) == identity(ids)
        assert identity(dataclasses.replace(text, **{name: value})) != identity(text)
    assert identity(dataclasses.replace(text, seed=1)) != identity(text)
    for model, idle in {
        "fmrlrec": ["num_heads"],
        "sasrec": ["lru_r_max", "lru_use_bias"],
        "lrurec": ["num_heads"],
    }.items():
        own, _ = resolve({"model_code": model})
        for name in {"num_heads", "lru_r_max", "lru_use_bias"}:
            value = {"num_heads": 2, "lru_r_max": 0.995, "lru_use_bias": False}[name]
            same = identity(dataclasses.replace(own, **{name: value})) == identity(own)
            assert same == (name in idle), (model, name)


def test_counting_models_ignore_the_settings_of_training():
    counting, _ = resolve({"model_code": "popularity"})
    assert "lr" in ineffective_settings(counting) and not ineffective_settings(counting) & {
        "run_name",
        "best_metric",
        "val_mask_history",
    }


def test_unusual_settings_differ_from_defaults_and_presets():
    beauty, _ = resolve({"dataset_code": "beauty", "lr": 0.5, "lru_dropout": 0.6, "seed": 7})
    assert unusual(beauty, {"seed"}) == {"lr": 0.5}
