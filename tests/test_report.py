"""The report: tables, comparisons and figures from kept files alone."""

import dataclasses
import json
import statistics

import numpy as np
import pytest
import torch

from common.errors import InputError
from config import ModelSettings, resolve
from experiments import figures, lines, paper, parameters, report, tables
from experiments.definition import Definition, Row, definitions
from experiments.figures import draw_figures
from experiments.kept import kept_runs
from experiments.significance import paired_bootstrap, user_metrics
from model import FMRLRec, count_parameters
from trainer.metrics import ranking_metrics
from trainer.user_ranks import save_ranks

USERS = 400


def keep_run(results, name, flags, ranks=None, seed=42, data="d", times=None, masked=True):
    """The kept files of a run, with metrics of made-up ranks {size: [U]}; masked, a user's rank is one better."""
    config, sources = resolve({"dataset_code": "beauty", "seed": seed, **flags})
    folder = results / f"{config.dataset_code}-{name}"
    folder.mkdir(parents=True)
    if ranks is None:
        random = np.random.default_rng(seed)
        ranks = {m: random.integers(1, 40, size=USERS).astype(float) for m in config.mrl_hidden_sizes}
    times = np.zeros(USERS, dtype=int) if times is None else times
    (folder / "config.json").write_text(json.dumps({"settings": vars(config), "sources": sources}))
    environment = {"device": "a CPU", "commit": "0123456789abc", "uncommitted_changes": False, "data": data,
                   "versions": {"torch": "2.11"}, "command": ["train.py", "--x"]}  # fmt: skip
    (folder / "env.json").write_text(json.dumps(environment))
    epochs = [{"epoch": e, "best_epoch": 1, "seconds": 60.0 * e, "train_seconds": 50.0} for e in (1, 2, 3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in epochs))
    for suffix, better in (("", 0), ("_history_masked", 1))[: 1 + masked]:
        of_sizes = {m: np.maximum(1, found - better) for m, found in ranks.items()}
        metrics = {str(m): ranking_metrics(torch.tensor(found), (5, 10, 20, 50)) for m, found in of_sizes.items()}
        (folder / f"test_mrl_metrics{suffix}.json").write_text(json.dumps(metrics))
        (folder / f"test_metrics{suffix}.json").write_text(json.dumps(metrics[max(metrics, key=int)]))
        save_ranks(folder / f"test_ranks{suffix}.npz", of_sizes, 50, times)
    return folder


def rows_of(lines):
    """Markdown tables -> lists of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


DEPTH = {"num_epochs": 9}
LANGUAGE = {"use_img_encoder": False}


# -------------------------------------------------------------------------------------------------------- significance


@pytest.mark.parametrize("name", ["Recall@10", "NDCG@10", "MRR@5", "NDCG@50"])
def test_the_metrics_of_users_average_to_those_of_the_test(name):
    ranks = np.random.default_rng(0).integers(2, 120, size=1000) / 2
    expected = ranking_metrics(torch.tensor(ranks), (5, 10, 50))[name]
    assert user_metrics(ranks, name).mean() == pytest.approx(expected, rel=1e-12)
    assert user_metrics(np.array([np.inf]), name).tolist() == [0]


def test_the_bootstrap_is_that_of_users_drawn_one_by_one():
    random = np.random.default_rng(1)
    a, b = random.integers(0, 3, size=(2, 300)) / 2
    drawn = [(a - b)[random.integers(0, 300, size=300)].mean() for _ in range(20_000)]
    found = paired_bootstrap(a, b)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    side = min(np.mean(np.array(drawn) <= 0), np.mean(np.array(drawn) >= 0))
    assert found.p == pytest.approx(2 * side, abs=0.03)


def test_a_difference_of_every_user_is_certain_and_none_is_not():
    values = np.random.default_rng(2).random(200)
    better = paired_bootstrap(values + 0.1, values)
    assert better.p < 0.001
    assert better.low > 0.09
    assert paired_bootstrap(values, values) == (0, 0, 0, 1)


def test_how_many_draws_are_held_at_once_changes_nothing(monkeypatch):
    a, b = np.random.default_rng(5).random((2, 100))
    expected = paired_bootstrap(a, b, draws=1000)
    monkeypatch.setattr("experiments.significance.AT_ONCE", 7)
    assert paired_bootstrap(a, b, draws=1000) == expected


def test_pairs_show_what_two_means_hide():
    ranks = np.random.default_rng(3).random(2000)
    a, b = ranks + 0.01 * (np.arange(2000) % 3 != 0), ranks
    assert paired_bootstrap(a, b).p < 0.001
    assert paired_bootstrap(a, np.random.default_rng(4).permutation(b)).p > 0.05


# ---------------------------------------------------------------------------------------------------------- parameters


def test_figure_4_comes_out_to_the_digit():
    assert [f"{100 * saved:.2f}" for _, saved, *_ in parameters.figure4()] == [
        "0.00",
        "25.16",
        "31.39",
        "32.90",
        "33.25",
    ]
    assert [largest for largest, *_ in parameters.figure4()] == list(paper.SAVED) == [128, 256, 512, 1024, 2048]


@pytest.mark.parametrize("sizes", [(8,), (8, 16, 32), (4, 12, 20)])
def test_what_models_here_hold_is_what_is_counted(sizes):
    model = FMRLRec(3, torch.zeros(3, parameters.FEATURES), ModelSettings(mrl_hidden_sizes=sizes))
    projection = sum(p.numel() for p in model.items.parameters())
    numbers = sum(p.numel() for p in model.parameters())
    assert parameters.stored(sizes[-1]) == numbers
    assert parameters.stored(sizes[-1], projection=False) == numbers - projection
    assert parameters.unmasked(sizes) == count_parameters(model)
    assert parameters.unmasked(sizes, projection=False) == count_parameters(model) - projection


# -------------------------------------------------------------------------------------------------------------- tables


def test_seeds_are_averaged_and_held_against_the_published_value(tmp_path):
    for seed in (1, 2, 3):
        keep_run(tmp_path, f"s{seed}", LANGUAGE, seed=seed)
    keep_run(tmp_path, "s2-again", LANGUAGE, seed=2)  # in nothing different: counts once
    heads, row = rows_of(tables.section(definitions()["table3"], kept_runs(tmp_path)))[:3:2]
    values = [run.metrics()[1024]["NDCG@10"] for run in kept_runs(tmp_path) if "again" not in run.folder.name]
    assert heads[8:11] == ["NDCG@10", "published", "difference"]
    assert row[:2] == ["language", "3"]
    mean = statistics.mean(values)
    assert row[8:11] == [f"{mean:.4f} ± {statistics.stdev(values):.4f}", "0.0449", f"{mean / 0.0449 - 1:+.1%}"]


def test_only_runs_that_differ_in_what_is_varied_alone_stand_in_one_table(tmp_path):
    for name, flags in {
        "one": {"lru_num_blocks": 1},
        "two": {},
        "one-slow": {"lru_num_blocks": 1, "lr": 1e-3},
        "two-slow": {"lr": 1e-3},
        "two-long": {"num_epochs": 7},  # nothing to compare with
        "sports": {"dataset_code": "sports"},
        "sum": {"mrl_loss": "sum"},
    }.items():
        keep_run(tmp_path, name, flags)
    section = tables.section(definitions()["depth"], kept_runs(tmp_path))
    assert [line for line in section if line.startswith("### ")] == [
        "### beauty: the dataset's settings",
        "### beauty: lr 0.001",
    ]
    assert [row[0] for row in rows_of(section)].count("2 blocks") == 2 * 2


def test_a_table_of_the_published_shows_its_rows_alone_and_others_wait_for_their_partner(tmp_path):
    keep_run(tmp_path, "a", LANGUAGE)
    assert any("language" in row[0] for row in rows_of(tables.section(definitions()["table3"], kept_runs(tmp_path))))
    for name in ("depth", "independent", "loss"):
        assert tables.section(definitions()[name], kept_runs(tmp_path)) == []


def test_a_nested_size_is_compared_with_the_model_trained_alone_and_the_rest_is_left_out(tmp_path):
    better, worse = np.full(USERS, 3.0), np.full(USERS, 9.0)
    nested = dict.fromkeys(resolve({})[0].mrl_hidden_sizes, better)
    keep_run(tmp_path, "nested", {}, nested)
    keep_run(tmp_path, "alone", {"mrl_hidden_sizes": (64,)}, {64: worse})
    rows = rows_of(tables.section(definitions()["independent"], kept_runs(tmp_path)))
    assert {row[0] for row in rows if "64" in row[0]} >= {"nested, 64", "alone, 64", "nested, 64 - alone, 64"}
    assert not any("128" in row[0] for row in rows)
    (row,) = [row for row in rows if row[0] == "nested, 64 - alone, 64" and row[1] == "NDCG@10"]
    expected = 1 / np.log2(4) - 1 / np.log2(10)
    assert row[2].startswith(f"{expected:+.4f} (")
    assert row[4] == "0.0002"


def test_seeds_on_other_data_are_no_seeds_of_the_same_row(tmp_path):
    keep_run(tmp_path, "one", {})
    keep_run(
        tmp_path, "two", {}, {m: np.ones(USERS - 1) for m in resolve({})[0].mrl_hidden_sizes}, seed=2, data="other"
    )
    found = lines.lines(definitions()["table2"], "beauty", kept_runs(tmp_path))
    assert [len(line.runs) for line in found] == [1, 1]
    assert len(lines.comparable(definitions()["table2"], found)) == 2


def test_a_row_says_which_seeds_it_has_no_value_of_and_names_every_commit(tmp_path):
    keep_run(tmp_path, "one", LANGUAGE)
    two = keep_run(tmp_path, "two", LANGUAGE, seed=43, masked=False)
    environment = json.loads((two / "env.json").read_text())
    (two / "env.json").write_text(json.dumps(environment | {"commit": "fedcba98765"}))
    text = "\n".join(tables.section(definitions()["table3"], kept_runs(tmp_path)))
    assert text.count("(1 of them)") == 2
    assert "commit `0123456789` and `fedcba9876`" in text


def test_rows_of_one_name_are_numbered_and_a_branch_that_is_missing_is_said(tmp_path):
    keep_run(tmp_path, "one", LANGUAGE)
    keep_run(tmp_path, "two", LANGUAGE | {"lr": 0.5})
    text = "\n".join(tables.section(definitions()["baselines"], kept_runs(tmp_path)))
    assert "### beauty: every model with settings of its own" in text
    assert "- fMRLRec (1): `beauty-one`" in text
    assert "- fMRLRec (2): `beauty-two`" in text
    assert "| fMRLRec (2) |" in text
    assert text.count("unlike the paper: items by text alone") == 2


def test_users_ranks_are_not_used_beyond_the_cutoff_they_were_kept_to(tmp_path):
    for name, flags in {"one": {"lru_num_blocks": 1}, "two": {}}.items():
        folder = keep_run(tmp_path, name, flags, masked=False)
        metrics = json.loads((folder / "test_mrl_metrics.json").read_text())
        less = {size: {key: v for key, v in of.items() if key.endswith("@5")} for size, of in metrics.items()}
        (folder / "test_mrl_metrics.json").write_text(json.dumps(less))
    assert "paired bootstrap" not in "\n".join(tables.section(definitions()["depth"], kept_runs(tmp_path)))


def test_a_seed_without_ranks_leaves_the_row_out_of_the_table_by_popularity(tmp_path):
    keep_run(tmp_path, "one", {"model_code": "sasrec"})
    (keep_run(tmp_path, "two", {"model_code": "sasrec"}, seed=2) / "test_ranks.npz").unlink()
    assert "times in training" not in "\n".join(tables.section(definitions()["baselines"], kept_runs(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("log.jsonl", "", "log.jsonl is missing or empty"),
        ("env.json", "{}", "env.json lacks 'command'"),
        ("test_ranks.npz", "", "test_ranks.npz cannot be read"),
    ],
)
def test_damaged_files_of_a_kept_run_are_named(tmp_path, name, content, problem):
    folder = keep_run(tmp_path, "one", {"model_code": "sasrec"})
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=problem):
        report.report(tmp_path)


def test_runs_on_other_data_or_without_ranks_are_not_compared_by_users(tmp_path):
    keep_run(tmp_path, "one", {"lru_num_blocks": 1}, data="other")
    two = keep_run(tmp_path, "two", {})
    assert "paired bootstrap" not in "\n".join(tables.section(definitions()["depth"], kept_runs(tmp_path)))
    keep_run(tmp_path, "one-same", {"lru_num_blocks": 1, "seed": 1})
    for path in two.glob("*.npz"):
        path.unlink()
    assert "paired bootstrap" not in "\n".join(tables.section(definitions()["depth"], kept_runs(tmp_path)))


def test_users_are_told_apart_by_how_often_their_item_was_trained_on(tmp_path):
    times = np.array([0, 1, 5, 6, 20, 21, 1000, 3])
    ranks = np.array([1.0, 2, 3, 4, 5, 6, 7, 99])
    keep_run(tmp_path, "a", {"model_code": "sasrec"}, {64: ranks}, times=times)
    keep_run(tmp_path, "b", {"model_code": "sasrec", "num_negatives": 256}, {64: ranks}, times=times)
    rows = rows_of(tables.section(definitions()["baselines"], kept_runs(tmp_path)))
    assert ["users", *"11332222"] in rows
    heads = next(row for row in rows if row[0] == "by how often the target was in training")
    assert heads[1::2] == [f"NDCG@10, {times}" for times in ("never", "1-5 times", "6-20 times", "21 times and more")]
    assert heads[2] == "Recall@10, never"
    found = next(row for row in rows if row[0] == "SASRec" and len(row) == 9)
    ndcg = [[1 / np.log2(r + 1) for r in some] for some in ([1], [2, 3], [4, 5], [6, 7])]
    means = [sum(some) / n for some, n in zip(ndcg, (1, 3, 2, 2), strict=True)]
    assert found[1::2] == [f"{mean:.4f}" for mean in means]
    assert found[2::2] == ["1.0000", f"{2 / 3:.4f}", "1.0000", "1.0000"]


def test_every_size_stands_beside_the_papers_figure(tmp_path):
    keep_run(tmp_path, "a", LANGUAGE)
    rows = rows_of(tables.section(definitions()["sizes"], kept_runs(tmp_path)))
    assert [row[1] for row in rows[2:]] == [str(m) for m in (8, 16, 32, 64, 128, 256, 512, 1024)]
    assert [row[-3] for row in rows[2:4]] == ["0.0150", "0.0180"]


def test_a_run_without_the_test_of_the_masked_history_is_reported_without_it(tmp_path):
    keep_run(tmp_path, "one", {"lru_num_blocks": 1}, masked=False)
    keep_run(tmp_path, "two", {}, masked=False)
    assert "masked" not in "\n".join(tables.section(definitions()["depth"], kept_runs(tmp_path)))
    assert "| 1024 |" in report.report(tmp_path)


def test_how_a_row_was_made_and_what_it_could_not_use_stands_below(tmp_path):
    keep_run(tmp_path, "a", LANGUAGE | {"language_encoder": "small"})
    text = "\n".join(tables.section(definitions()["table3"], kept_runs(tmp_path)))
    assert "- language: `beauty-a`; 3 epochs; best 1; 3 minutes; a CPU; torch 2.11; commit `0123456789`" in text
    assert "unlike the paper: language_encoder small instead of BAAI/bge-large-en-v1.5." in text


def test_a_definition_without_runs_has_no_section(tmp_path):
    mine = Definition("mine", "T", "t", ("beauty",), (Row("a", {"lr": 0.5}),))
    keep_run(tmp_path, "a", {})
    assert tables.section(mine, kept_runs(tmp_path)) == []
    assert dataclasses.replace(mine, rows=()).varied() == set()


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_are_drawn_of_what_was_run(tmp_path):
    keep_run(tmp_path / "kept", "a", LANGUAGE)
    keep_run(tmp_path / "kept", "alone", LANGUAGE | {"mrl_hidden_sizes": (64,)})
    keep_run(tmp_path / "kept", "tiny", {"dataset_code": "tiny", "mrl_hidden_sizes": (4, 8)})
    made = draw_figures(kept_runs(tmp_path / "kept"), tmp_path / "media")
    assert [path.name for path in made] == ["parameters_saved.png", "sizes-beauty.png"]
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


SHORT = {"train_batch_size": 128, "lr": 2e-3, "precision": "bf16", "num_epochs": 12, "early_stopping_patience": 3}
PLUS = {"precision": "bf16", "preset": "plus"}


def test_plus_is_drawn_beside_the_faithful_model_and_models_of_one_size(tmp_path, monkeypatch):
    small = LANGUAGE | {"mrl_hidden_sizes": (8, 16, 32, 64, 128, 256)}
    sampled = {"num_negatives": 1024, "lru_dropout": 0.6, "lru_attn_dropout": 0.6}
    keep_run(tmp_path / "kept", "faithful", small | SHORT | sampled)
    keep_run(tmp_path / "kept", "plus", small | PLUS)
    keep_run(tmp_path / "kept", "alone", small | PLUS | {"mrl_hidden_sizes": (64,)})
    keep_run(tmp_path / "kept", "sasrec", {"model_code": "sasrec"}, seed=5)
    keep_run(tmp_path / "kept", "lrurec", {"model_code": "lrurec"}, seed=6)
    drawn = []
    true_draw = figures.draw_plus
    monkeypatch.setattr(figures, "draw_plus", lambda *given: (drawn.append(given), true_draw(*given)))
    made = draw_figures(kept_runs(tmp_path / "kept"), tmp_path / "media")
    assert [path.name for path in made] == ["parameters_saved.png", "plus-beauty.png"]
    assert made[-1].read_bytes().startswith(b"\x89PNG")
    ((dataset, curves, separate, levels, _),) = drawn
    assert dataset == "beauty"
    assert sorted((line.row.name, line.size) for line in curves) == [
        ("faithful, sampled softmax", 256),
        ("plus", 256),
    ]
    assert [line.size for line in separate] == [64]
    runs = {run.folder.name: run for run in kept_runs(tmp_path / "kept")}
    assert levels["SASRec, 64"]["Recall@10"] == runs["beauty-sasrec"].metrics()[64]["Recall@10"]
    assert levels["LRURec, 64"]["NDCG@10 masked"] == runs["beauty-lrurec"].metrics(masked=True)[64]["NDCG@10"]
    assert levels["BSARec, published"] == paper.PUBLISHED["bsarec"]["beauty"]
    text = "\n".join(tables.section(definitions()["plus"], kept_runs(tmp_path / "kept")))
    assert "](../media/plus-beauty.png)" in text and "| plus - faithful, sampled softmax | NDCG@10 |" in text


def test_sizes_side_by_side_are_those_of_the_test_with_the_history_masked(tmp_path):
    rows = (Row("off", {"whiten_features": False}), Row("on", {"whiten_features": True}))
    mine = Definition("mine", "T", "t", ("beauty",), rows, compare=(("on", "off"),), by_size=True)
    for name, flags in (("a", {}), ("b", {"whiten_features": True})):
        keep_run(tmp_path, name, {"mrl_hidden_sizes": (8, 16), **flags})
    runs = kept_runs(tmp_path)
    table = rows_of(tables.section(mine, runs))
    heads = ["NDCG@10 by size, history masked", "seeds", "8", "16", "Recall@10, largest, history masked", "s an epoch"]
    assert table[0] == heads
    for row, run in zip(table[2:4], runs, strict=True):
        of_sizes = run.metrics(masked=True)
        expected = [of_sizes[8]["NDCG@10"], of_sizes[16]["NDCG@10"], of_sizes[16]["Recall@10"]]
        assert row[2:5] == [f"{value:.4f}" for value in expected]
    assert [row[0] for row in table[2:4]] == ["off", "on"]


def test_a_run_whose_cut_offs_lack_10_leaves_its_curve_out(tmp_path):
    keep_run(tmp_path / "results", "a", LANGUAGE)
    other = keep_run(tmp_path / "results", "b", LANGUAGE | {"num_epochs": 7})
    path = other / "test_mrl_metrics.json"
    without = {m: {k: v for k, v in of.items() if "@10" not in k} for m, of in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(without))
    assert tmp_path / "sizes-beauty.png" in draw_figures(kept_runs(tmp_path / "results"), tmp_path)


def test_the_report_of_other_results_does_not_replace_the_repositorys(tmp_path, capsys):
    keep_run(tmp_path / "results", "a", LANGUAGE)
    before = report.OUT.read_bytes()
    with pytest.raises(InputError, match=r"would replace the report of .*; give --out and --media"):
        report.main(["--results", str(tmp_path / "results")])
    assert report.OUT.read_bytes() == before
    out = tmp_path / "RESULTS.md"
    report.main(["--results", str(tmp_path / "results"), "--out", str(out), "--media", str(tmp_path / "media")])
    assert out.read_text().startswith("# Results")


def test_what_settings_are_chosen_by_is_validation_alone(tmp_path):
    rows = (Row("off", {"whiten_features": False}), Row("on", {"whiten_features": True}))
    mine = Definition("mine", "T", "t", ("beauty",), rows, validation=True)
    for name, flags, value in (("a", {}, 0.25), ("b", {"whiten_features": True}, 0.5), ("c", {"lr": 0.5}, 0.75)):
        folder = keep_run(tmp_path, name, {"mrl_hidden_sizes": (8, 16), **flags})
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for record in log:  # the best epoch is the first of three
            record["val"] = {str(m): {"NDCG@10": value * m / 16 / record["epoch"], "Recall@10": value} for m in (8, 16)}
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        for path in folder.glob("test_*"):
            path.unlink()
    lines = tables.section(mine, kept_runs(tmp_path))
    assert rows_of(lines) == [
        ["validation NDCG@10 by size", "seeds", "8", "16", "Recall@10, largest", "s an epoch"],
        ["---", "---:", "---:", "---:", "---:", "---:"],
        ["off", "1", "0.1250", "0.2500", "0.2500", "60"],
        ["on", "1", "0.2500", "0.5000", "0.5000", "60"],
    ]
    assert tables.section(dataclasses.replace(mine, validation=False), kept_runs(tmp_path)) == []
    assert "beauty-c" not in report.report(tmp_path)
