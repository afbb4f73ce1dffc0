"""Keep results of runs, and make the report's tables and figures from them."""

import dataclasses
import json
import re
import shutil
import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common.errors import InputError
from config import ModelSettings, resolve
from experiments import best, figures, paper, parameters, report, tables
from experiments.definition import Definition, Row, definitions
from experiments.figures import draw_figures
from experiments.reproduction import write_reproduction
from experiments.significance import paired_bootstrap, student_p, user_metrics, welch_test
from experiments.store import keep, kept_runs
from media import draw
from model import FMRLRec, count_parameters
from trainer import plots
from trainer.metrics import ranking_metrics
from trainer.user_ranks import save_ranks

USERS = 400


def write_run(folder, flags, ranks=None, *, seed=42, data="d", times=None, tested=True, masked=True, val=None,
              commit="0123456789abc"):  # fmt: skip
    """Write the files of a finished run, with metrics of made-up ranks {size: [U]}; masked, a rank is one better."""
    config, sources = resolve({"dataset_code": "beauty", "seed": seed, **flags})
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    ranks = ranks or {m: random.integers(1, 40, size=USERS).astype(float) for m in config.mrl_hidden_sizes}
    times = np.zeros(USERS, dtype=int) if times is None else times
    (folder / "config.json").write_text(json.dumps({"settings": vars(config), "sources": sources}))
    environment = {"device": "a CPU", "commit": commit, "uncommitted_changes": False, "data": data,
                   "versions": {"torch": "2.11"}, "command": ["train.py", "--x"], "started": folder.name}  # fmt: skip
    (folder / "env.json").write_text(json.dumps(environment))
    val = val or {str(m): {"NDCG@10": 0.25} for m in config.mrl_hidden_sizes}
    epochs = [{"epoch": e, "best_epoch": 1, "seconds": 60.0 * e, "train_seconds": 50.0, "val": val if e == 1 else {}}
              for e in sorted({1, config.num_epochs})]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in epochs))
    for suffix, better in (("", 0), ("_history_masked", 1))[: tested + (tested and masked)]:
        of_sizes = {m: np.maximum(1, found - better) for m, found in ranks.items()}
        metrics = {str(m): ranking_metrics(torch.tensor(found), (5, 10, 20, 50)) for m, found in of_sizes.items()}
        (folder / f"test_mrl_metrics{suffix}.json").write_text(json.dumps(metrics))
        save_ranks(folder / f"test_ranks{suffix}.npz", of_sizes, 50, times)
    return folder


def keep_run(results, name, flags, ranks=None, **how):
    """Keep a run of `write_run`."""
    run = write_run(results.parent / "runs" / name, flags, ranks, **how)
    keep(run, results, tests=False)
    return run


def section(name_or_definition, results):
    found = name_or_definition
    return tables.section(definitions()[found] if isinstance(found, str) else found, kept_runs(results))


def rows_of(lines):
    """Return the cells of Markdown tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


LANGUAGE = {"use_img_encoder": False}


# --------------------------------------------------------------------------------------------------------------- store


def test_a_run_is_rows_of_one_csv_and_a_line_of_one_jsonl(results):
    run = keep_run(results, "a", LANGUAGE)
    (record,) = map(json.loads, (results / "runs.jsonl").read_text().splitlines())
    assert record["settings"] == json.loads((run / "config.json").read_text())["settings"]
    assert record["environment"] == json.loads((run / "env.json").read_text())
    assert (record["run"], record["best_epoch"], record["seconds"]) == ("beauty-a", 1, 60.0 * record["epochs"])
    new = write_run(results.parent / "b", {"mrl_hidden_sizes": (4, 8)}, seed=1)
    path = new / "test_mrl_metrics.json"  # with a metric that the other lacks
    path.write_text(json.dumps({size: m | {"Coverage@10": 0.5} for size, m in json.loads(path.read_text()).items()}))
    keep(new, results)
    frame = pd.read_csv(results / "metrics.csv").set_index(["run", "split", "protocol", "size"])
    for protocol, suffix in (("kept", ""), ("masked", "_history_masked")):
        for size, metrics in json.loads((run / f"test_mrl_metrics{suffix}.json").read_text()).items():
            found = frame.loc[("beauty-a", "test", protocol, int(size)), list(metrics)]
            assert found.to_numpy() == pytest.approx(list(metrics.values()), abs=1e-8)
    assert frame.loc[("beauty-b", "val", "kept", 8), "NDCG@10"] == 0.25
    old, new = kept_runs(results)
    assert "Coverage@10" not in old.test and (new.test["Coverage@10"] == 0.5).all()


def test_ranks_are_kept_only_for_runs_that_an_experiment_compares(results):
    keep_run(results, "compared", {})
    keep_run(results, "not", {"distill": 0.7})
    compared, other = kept_runs(results)
    ranks = np.random.default_rng(42).integers(1, 40, size=USERS)
    assert (compared.ranks()[8] == ranks).all()
    assert (compared.ranks(masked=True)[8] == np.maximum(1, ranks - 1)).all()
    assert other.ranks() is None and other.complete()


def test_a_run_is_kept_again_only_if_it_has_something_new(results):
    run = keep_run(results, "a", {}, masked=False)
    with pytest.raises(InputError, match=r"beauty-a is kept already in .* nothing new"):
        keep(run, results)
    again = write_run(results.parent / "elsewhere" / "a", {})
    for name in ("test_mrl_metrics_history_masked.json", "test_ranks_history_masked.npz"):
        shutil.copy(again / name, run)
    assert not kept_runs(results)[0].complete()
    keep(run, results)
    (kept,) = kept_runs(results)
    assert kept.complete()


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("env.json", '"started": "a"', '"started": "later"', "another run is kept as beauty-a"),
        ("env.json", '"commit"', '"commiu"', "the record of .* has no 'commit' in environment; train it again"),
        ("log.jsonl", '"epoch": 40', '"epoch": 1', r"is not finished \(epoch 1 of 40\); train.py --resume"),
    ],
)
def test_a_run_that_cannot_be_kept_is_refused(results, name, old, new, problem):
    keep_run(results, "a", {"num_epochs": 40}, masked=False)
    other = write_run(results.parent / "elsewhere" / "a", {"num_epochs": 40})
    text = (other / name).read_text()
    assert old in text
    (other / name).write_text(text.replace(old, new))
    with pytest.raises(InputError, match=problem):
        keep(other, results)


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("runs.jsonl", '{"run": "beauty-b"', '{"run "beauty-b"', r"runs.jsonl:2 is not JSON"),
        ("runs.jsonl", "beauty-b", "beauty-a", r"runs.jsonl:2 repeats run beauty-a"),
        ("runs.jsonl", "beauty-b", "beauty-c", r"runs.jsonl:2: .*metrics.csv has no line of run beauty-c"),
        ("runs.jsonl", '"epochs"', '"epoch"', r"runs.jsonl:1 has no 'epochs'"),
        ("runs.jsonl", '"lr":', '"rate":', r"runs.jsonl:1 \(run beauty-a\): .*unknown settings \['rate'\]"),
        ("metrics.csv", "beauty-a,beauty,test,kept,8,0.", "beauty-a,beauty,test,kept,8,o.", r"metrics.csv:2 .*metric"),
        ("metrics.csv", "test,kept,8,", "test,kept,8.5,", r"metrics.csv:2 has a size"),
        ("metrics.csv", "kept,8,", "kept,8,,", r"metrics.csv:2 has more cells than the header"),
        ("metrics.csv", "beauty,val", "beauty,valid", r"metrics.csv:\d+ has a split other than val and test"),
        ("metrics.csv", "kept,16,", "kept,8,", r"metrics.csv:3 repeats another line"),
        ("ranks/beauty.npz", None, None, r"ranks/beauty.npz cannot be read"),
        ("metrics.csv", "masked,8,", "masked,8,,", r"metrics.csv cannot be read .* line 4"),
    ],
)
def test_a_damaged_line_is_named(results, name, old, new, problem):
    keep_run(results, "a", {"mrl_hidden_sizes": (8, 16)})
    keep_run(results, "b", {"mrl_hidden_sizes": (8, 16), "lru_num_blocks": 1})
    text = (results / name).read_text() if old else ""
    assert not old or old in text
    (results / name).write_text(text.replace(old, new) if old else "")
    with pytest.raises(InputError, match=problem):
        [run.ranks() for run in kept_runs(results)]


# -------------------------------------------------------------------------------------------------------- significance


def test_the_metrics_of_users_average_to_those_of_the_test():
    ranks = np.random.default_rng(0).integers(2, 120, size=1000) / 2
    expected = ranking_metrics(torch.tensor(ranks), (5, 10, 50))
    for name in ("Recall@10", "NDCG@50", "MRR@5"):
        assert user_metrics(ranks, name).mean() == pytest.approx(expected[name], rel=1e-12)
        assert user_metrics(np.array([np.inf]), name).tolist() == [0]


def test_welchs_test_compares_seeds():
    assert student_p(2.776445, 4) == pytest.approx(0.05, abs=1e-6)  # tabulated
    assert student_p(-12.7062, 1) == pytest.approx(0.05, abs=1e-6)
    assert student_p(0, 2.5) == pytest.approx(1)
    found = welch_test([1.0, 2.0, 3.0], [2.0, 4.0])
    assert (found.t, found.freedom) == pytest.approx((-0.866025, 1.684211), rel=1e-5)
    assert welch_test([1.0], [2.0, 4.0]) is welch_test([1.0, 1.0], [2.0, 2.0]) is None


def test_the_bootstrap_resamples_users(monkeypatch):
    random = np.random.default_rng(1)
    a, b = random.integers(0, 3, size=(2, 300)) / 2
    drawn = [(a - b)[random.integers(0, 300, size=300)].mean() for _ in range(20_000)]
    found = paired_bootstrap(a, b)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    side = min(np.mean(np.array(drawn) <= 0), np.mean(np.array(drawn) >= 0))
    assert found.p == pytest.approx(2 * side, abs=0.03)
    certain = paired_bootstrap(a + 0.1, a)
    assert certain.p < 0.001 and certain.low > 0.09
    assert paired_bootstrap(a, a) == (0, 0, 0, 1)
    monkeypatch.setattr("experiments.significance.AT_ONCE", 777)
    assert paired_bootstrap(a, b) == found


# ---------------------------------------------------------------------------------------------------------- parameters


def test_figure_4_comes_out_to_the_digit():
    rows = parameters.figure4()
    assert [f"{100 * saved:.2f}" for _, saved, *_ in rows] == ["0.00", "25.16", "31.39", "32.90", "33.25"]
    assert [largest for largest, *_ in rows] == list(paper.SAVED) == [128, 256, 512, 1024, 2048]


def test_parameters_are_counted_as_the_models_hold_them():
    sizes = (4, 12, 20)
    model = FMRLRec(3, torch.zeros(3, parameters.FEATURES), ModelSettings(mrl_hidden_sizes=sizes))
    projection = sum(p.numel() for p in model.items.parameters())
    numbers = sum(p.numel() for p in model.parameters())
    assert parameters.stored(sizes[-1]) == numbers
    assert parameters.stored(sizes[-1], projection=False) == numbers - projection
    assert parameters.unmasked(sizes) == count_parameters(model)
    assert parameters.unmasked(sizes, projection=False) == count_parameters(model) - projection


# -------------------------------------------------------------------------------------------------------------- tables


def test_seeds_are_averaged_beside_the_published_value(results):
    for seed in (1, 2, 3):
        keep_run(results, f"s{seed}", LANGUAGE, seed=seed)
    keep_run(results, "s2-again", LANGUAGE, seed=2)  # the same settings and seed: counts once
    heads, row = rows_of(section("table3", results))[:3:2]
    values = [run.test.at[1024, "NDCG@10"] for run in kept_runs(results) if "again" not in run.name]
    assert heads[8:11] == ["NDCG@10", "published", "difference"]
    assert row[:2] == ["language", "3"]
    mean = statistics.mean(values)
    assert row[8:11] == [f"{mean:.4f} ± {statistics.stdev(values):.4f}", "0.0449", f"{mean / 0.0449 - 1:+.1%}"]


def test_a_table_compares_runs_that_differ_only_in_the_varied_settings(results):
    for name, flags in {
        "one": {"lru_num_blocks": 1},
        "two": {},
        "one-slow": {"lru_num_blocks": 1, "lr": 1e-3},
        "two-slow": {"lr": 1e-3},
        "two-long": {"num_epochs": 7},  # has no partner
        "sports": {"dataset_code": "sports"},
    }.items():
        keep_run(results, name, flags, masked=False)
    lines = section("depth", results)
    assert [line for line in lines if line.startswith("### ")] == [
        "### depth on beauty, lr default",
        "### depth on beauty, lr 0.001",
    ]
    assert [line for line in lines if line.startswith("- Settings")] == [
        "- Settings: the dataset's presets.",
        "- Settings: lr 0.001.",
    ]
    assert [row[0] for row in rows_of(lines)].count("2 blocks") == 2  # and none with the history masked
    for blocks in (1, 2):
        keep_run(results, f"other-{blocks}", {"lru_num_blocks": blocks}, data="other")
    headings = [line for line in section("depth", results) if line.startswith("### ")]
    assert headings[::2] == ["### depth on beauty, data d, lr default", "### depth on beauty, data other, lr default"]


def test_a_row_without_its_partner_is_shown_only_beside_published_values(results):
    keep_run(results, "a", LANGUAGE)
    assert any("language" in row[0] for row in rows_of(section("table3", results)))
    rows = rows_of(section("sizes", results))
    assert [row[1] for row in rows[2:]] == [str(m) for m in (8, 16, 32, 64, 128, 256, 512, 1024)]
    assert [row[-3] for row in rows[2:4]] == ["0.0150", "0.0180"]
    assert all(section(name, results) == [] for name in ("depth", "independent", "loss"))


def test_a_nested_size_is_compared_with_the_model_trained_alone(results):
    better, worse = np.full(USERS, 3.0), np.full(USERS, 9.0)
    keep_run(results, "nested", {}, dict.fromkeys(resolve({})[0].mrl_hidden_sizes, better))
    keep_run(results, "alone", {"mrl_hidden_sizes": (64,)}, {64: worse})
    rows = rows_of(section("independent", results))
    assert [row[0] for row in rows[2:4]] == ["nested, 64", "alone, 64"]
    expected = 1 / np.log2(4) - 1 / np.log2(10)
    (row,) = (row for row in rows if row[0] == "nested, 64 - alone, 64" and row[1] == "NDCG@10")
    assert row[2].startswith(f"{expected:+.4f}") and row[3] == f"{expected:+.4f} .. {expected:+.4f}"


def test_two_seeds_of_both_rows_are_compared_over_seeds(results):
    for seed in (1, 2):
        for blocks in (1, 2):
            keep_run(results, f"{blocks}-{seed}", {"lru_num_blocks": blocks}, seed=seed * blocks)
    head, row, *_ = (row for row in rows_of(section("depth", results)) if "compared" in row[0] or " - " in row[0])
    assert head[-3:] == ["p over users", "t over seeds", "p over seeds"]
    one, two = (
        [run.test.at[1024, "NDCG@10"] for run in kept_runs(results) if f"-{blocks}-" in run.name] for blocks in (1, 2)
    )
    expected = welch_test(two, one)
    assert row[-2:] == [f"{expected.t:+.2f}", f"{expected.p:.4f}"]


def test_every_dataset_is_compared_with_the_best_published(results):
    plus = LANGUAGE | {"preset": "plus", "mrl_hidden_sizes": (8, 16, 32, 64, 128, 256), "precision": "bf16"}
    keep_run(results, "plus", plus)
    lines = best.section(kept_runs(results))
    headings = [line for line in lines if line.startswith("### ")]
    assert headings == [f"### {name}, history {p}" for name in best.DATASETS for p in ("masked", "kept")]
    assert any(row[0].startswith("TV-Rec") and row[3:5] == ["0.1017", "0.0608"] for row in rows_of(lines))
    masked, kept = (row for row in rows_of(lines) if row[0] == "**plus**, here" and row[3] != "not run")
    test = kept_runs(results)[0].test
    for row, suffix, top in ((masked, " masked", 0.0611), (kept, "", 0.0641)):
        value = test.at[256, f"NDCG@10{suffix}"]
        assert (row[4], row[6]) == (f"{value:.4f}", f"{value / top - 1:+.1%}")


def test_the_report_of_the_reproduction_fills_in_the_fields_of_its_template(results, tmp_path):
    for seed in (1, 2):
        keep_run(results, f"two-{seed}", {}, seed=seed)
    keep_run(results, "one", {"lru_num_blocks": 1})
    values = [run.test.at[64, "NDCG@10"] for run in kept_runs(results) if "two" in run.name]
    fields = {
        "beauty; depth; 2 blocks; 64; NDCG@10": f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}",
        "beauty; table3; language; 64; NDCG@10": "not run",
        "sports; depth; 2 blocks - 1 block; NDCG@10": "not run",
        "beauty; table3; language and image; setting lru_num_blocks": "2",
        "beauty; table3; language and image; 64; NDCG@10; against both": f"{np.mean(values) / 0.0520 - 1:+.1%}",
    }
    template = tmp_path / "template.md"
    template.write_text("# Title\n\n" + "\n\n".join(f"{{{{{field}}}}}" for field in fields))
    assert write_reproduction(kept_runs(results), template) == "\n\n".join(["# Title", *fields.values()]) + "\n"
    template.write_text("{{beauty; depth; 2 blocks - 1 block; NDCG@10}}")
    assert re.fullmatch(
        r"[+-]0\.\d{4} \(.*%\), p over\susers [\d.]+, one seed\n", write_reproduction(kept_runs(results), template)
    )
    for wrong, problem in (
        ("beauty; dept; a; 8; NDCG@10", "dept"),
        ("beauty; depth; 3 blocks; 8; NDCG@10", "3 blocks"),
    ):
        template.write_text(f"{{{{{wrong}}}}}")
        with pytest.raises(InputError, match=f"unknown .* '{problem}'"):
            write_reproduction([], template)


def test_widths_that_were_cut_are_shown_beside_the_nested_sizes(results):
    for name, sizes in (("nested", ModelSettings().mrl_hidden_sizes), ("alone", (1024,))):
        run = write_run(results.parent / name, {"mrl_hidden_sizes": sizes, "dataset_code": "sports"})
        of = {"cut": {"8": {"NDCG@10": 0.1}, "1024": {"NDCG@10": 0.5}}, "nested": {str(sizes[0]): {"NDCG@10": 0.2}}}
        (run / "cut.json").write_text(json.dumps({"kept": of, "masked": of}))
        keep(run, results)
    rows = rows_of(section("nested_or_cut", results))
    start = next(i for i, row in enumerate(rows) if row[0] == "NDCG@10 by width")
    assert rows[start][1:5] == ["nested, cut, history kept", "nested, history kept", "nested, cut, history masked",
                                "nested, history masked"]  # fmt: skip
    assert rows[start + 2] == ["8", *["0.1000", "0.2000"] * 2, *["0.1000", ""] * 2]
    assert rows[start + 3] == ["1024", *["0.5000", ""] * 2, *["0.5000", "0.2000"] * 2]


def test_rows_of_the_same_name_are_numbered_and_described(results):
    keep_run(results, "one", LANGUAGE)
    keep_run(results, "one-43", LANGUAGE, seed=43, masked=False, commit="fedcba98765")
    keep_run(results, "two", LANGUAGE | {"lr": 0.5, "language_encoder": "small"})
    lines = section("baselines", results)
    assert "### baselines on beauty" in lines
    assert {"fMRLRec (1)", "fMRLRec (2)"} <= {row[0] for row in rows_of(lines)}
    assert "\n".join(lines).count("(1 of them)") == 2  # one of two seeds has a masked test
    assert "commit `0123456789`, `fedcba9876`" in "\n".join(lines)
    assert (
        "- fMRLRec (2): seed 42; with language_encoder small, use_img_encoder False, lr 0.5; unlike the paper: items "
        "by text alone, language_encoder small instead of BAAI/bge-large-en-v1.5."
    ) in lines


def test_runs_on_other_data_or_without_ranks_are_not_compared(results):
    keep_run(results, "one", {"lru_num_blocks": 1}, data="other")
    keep_run(results, "two", {})
    assert section("depth", results) == []
    run = write_run(results.parent / "same", {"lru_num_blocks": 1})
    for path in run.glob("*.npz"):
        path.unlink()
    keep(run, results)
    lines = section("depth", results)
    assert lines and "paired bootstrap" not in "\n".join(lines)


def test_users_are_binned_by_how_often_their_target_was_trained_on(results):
    times = np.array([0, 1, 5, 6, 20, 21, 1000, 3])
    ranks = np.array([1.0, 2, 3, 4, 5, 6, 7, 99])
    keep_run(results, "a", {"model_code": "sasrec"}, {64: ranks}, times=times)
    keep_run(results, "b", {"model_code": "sasrec", "num_negatives": 256}, {64: ranks}, times=times)
    rows = rows_of(section("baselines", results))
    assert ["users", *"11332222"] in rows
    heads = next(row for row in rows if row[0] == "by how often the target was in training")
    assert heads[1::2] == [f"NDCG@10, {times}" for times in ("never", "1-5 times", "6-20 times", "21 times and more")]
    assert heads[2] == "Recall@10, never"
    found = next(row for row in rows if row[0] == "SASRec" and len(row) == 9)
    ndcg = [[1 / np.log2(r + 1) for r in some] for some in ([1], [2, 3], [4, 5], [6, 7])]
    means = [sum(some) / n for some, n in zip(ndcg, (1, 3, 2, 2), strict=True)]
    assert found[1::2] == [f"{mean:.4f}" for mean in means]
    assert found[2::2] == ["1.0000", f"{2 / 3:.4f}", "1.0000", "1.0000"]


WHITENING = Definition("mine", "T", "t", ("beauty",),
                       (Row("off", {"whiten_features": False}), Row("on", {"whiten_features": True})))  # fmt: skip


def test_sizes_side_by_side_are_those_of_the_masked_test(results):
    mine = dataclasses.replace(WHITENING, compare=(("on", "off"),), by_size=True)
    for name, flags in (("a", {}), ("b", {"whiten_features": True})):
        keep_run(results, name, {"mrl_hidden_sizes": (8, 16), **flags})
    table = rows_of(section(mine, results))
    heads = ["NDCG@10 by size, history masked", "seeds", "8", "16", "Recall@10, largest, history masked", "s an epoch"]
    assert table[0] == heads
    for row, run in zip(table[2:4], kept_runs(results), strict=True):
        expected = [run.test.at[size, metric] for size, metric in
                    ((8, "NDCG@10 masked"), (16, "NDCG@10 masked"), (16, "Recall@10 masked"))]  # fmt: skip
        assert row[2:5] == [f"{value:.4f}" for value in expected]
    assert [row[0] for row in table[2:4]] == ["off", "on"]


def test_an_experiment_on_validation_shows_validation_only(results):
    mine = dataclasses.replace(WHITENING, validation=True)
    for name, flags, value in (("a", {}, 0.25), ("b", {"whiten_features": True}, 0.5), ("c", {"lr": 0.5}, 0.75)):
        val = {str(m): {"NDCG@10": value * m / 16, "Recall@10": value} for m in (8, 16)}
        keep_run(results, name, {"mrl_hidden_sizes": (8, 16), **flags}, val=val, tested=False)
    assert rows_of(section(mine, results)) == [
        ["validation NDCG@10 by size", "seeds", "8", "16", "Recall@10, largest", "s an epoch"],
        ["---", "---:", "---:", "---:", "---:", "---:"],
        ["off", "1", "0.1250", "0.2500", "0.2500", "60"],
        ["on", "1", "0.2500", "0.5000", "0.5000", "60"],
    ]
    assert section(dataclasses.replace(mine, validation=False), results) == []


# ------------------------------------------------------------------------------------------------------------- figures


def test_a_figure_is_drawn_for_every_dataset_with_runs(results, tmp_path):
    keep_run(results, "a", LANGUAGE)
    without = write_run(tmp_path / "b", LANGUAGE | {"num_epochs": 7})  # other cut-offs: no curve
    path = without / "test_mrl_metrics.json"
    less = {m: {k: v for k, v in of.items() if "@10" not in k} for m, of in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(less))
    keep(without, results)
    keep_run(results, "alone", LANGUAGE | {"mrl_hidden_sizes": (64,)})
    keep_run(results, "tiny", {"dataset_code": "tiny", "mrl_hidden_sizes": (4, 8)})
    for name in ("lexical", "encoders/all-MiniLM-L6-v2"):
        keep_run(results, name[-5:], LANGUAGE | {"language_encoder": name})
    made = draw_figures(kept_runs(results), tmp_path / "media")
    assert [path.name for path in made] == ["parameters_saved.png", "sizes-beauty.png", "encoder_width-beauty.png"]
    for path in made:
        assert_drawn(path)


def assert_drawn(path, width=800):
    with Image.open(path) as picture:
        assert picture.width > width
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize("sizes", [(8, 16), (8,)])
def test_a_run_draws_its_metrics_and_its_training(tmp_path, sizes):
    metrics = {f"{name}@{k}": 0.1 for name in ("Recall", "NDCG", "MRR") for k in (5, 10)}
    curve, training = tmp_path / "test_mrl_metrics.png", tmp_path / "training.png"
    plots.plot_metric_by_size(dict.fromkeys(sizes, metrics), (5, 10), "a run", curve, metrics)
    record = {"best_epoch": 1, "val": {str(m): metrics for m in sizes}}
    plots.plot_training([record | {"epoch": 0, "loss": None}], "NDCG@10", "a run", training)
    assert not training.exists()
    epochs = [record | {"epoch": epoch, "loss": loss} for epoch, loss in enumerate((None, 2.0, 1.0))]
    plots.plot_training(epochs, "NDCG@10", "a run", training)
    draw.main(["--out", str(tmp_path), "--demo_run", str(tmp_path)])
    for name in ("architecture.png", "nesting.png", "demo.png", "training.png"):
        assert_drawn(tmp_path / name)


def test_labels_of_lines_that_end_together_do_not_overlap(tmp_path):
    with plots.figure(tmp_path / "a.png", 1) as [panel]:
        panel.set_ylim(0, 1)
        plots.label_lines(panel, [(0.5, "b", "black"), (0.1, "a", "black"), (0.5, "c", "black")])
        low, *near = [text.get_position()[1] for text in panel.texts]
    assert low == 0.1 and near[1] - near[0] > 0.04 and sum(near) == pytest.approx(1)


def test_plus_is_drawn_beside_the_faithful_model_and_one_size_models(results, tmp_path, monkeypatch):
    small = LANGUAGE | {"mrl_hidden_sizes": (8, 16, 32, 64, 128, 256), "precision": "bf16"}
    short = {"train_batch_size": 128, "lr": 2e-3, "num_epochs": 12, "early_stopping_patience": 3}
    sampled = {"num_negatives": 1024, "lru_dropout": 0.6, "lru_attn_dropout": 0.6}
    keep_run(results, "faithful", small | short | sampled)
    keep_run(results, "plus", small | {"preset": "plus"})
    keep_run(results, "plus2", small | {"preset": "plus"}, seed=5)
    keep_run(results, "exact", LANGUAGE | {"preset": "plus", "num_negatives": 0, "precision": "bf16"})
    keep_run(results, "alone", small | {"preset": "plus", "mrl_hidden_sizes": (64,)})
    keep_run(results, "sasrec", {"model_code": "sasrec"}, seed=5)
    keep_run(results, "lonely", small | {"preset": "plus", "dataset_code": "sports"})
    drawn = []
    true_draw = figures.draw_curves
    monkeypatch.setattr(figures, "draw_curves", lambda *given: (drawn.append(given), true_draw(*given)))
    runs = kept_runs(results)
    made = draw_figures(runs, tmp_path / "media")
    assert [path.name for path in made] == ["parameters_saved.png", "plus.png"]
    (panel, dataset, name, curves, separate, levels), masked, sports, _ = drawn
    assert (dataset, name) == ("beauty", "Recall@10") and sports[1] == "sports"
    exact = "to 1024"  # differs in a setting that only the sampled softmax reads
    assert [text for _, text in curves] == ["faithful", "plus", exact]
    assert [row.size for row in separate] == [64]
    sasrec = {run.name: run for run in runs}["beauty-sasrec"].test
    assert levels == {"SASRec, 64": sasrec.at[64, "Recall@10"], "best published": 0.1249}
    assert masked[5]["best published"] == paper.PUBLISHED["bsarec"]["beauty"]["NDCG@10 masked"]
    labels = [text.get_text() for text in panel.texts]
    assert sorted(labels) == ["SASRec, 64", "best published", "faithful", "paper", "plus", f"{exact} (dashed)"]
    bars = [container.has_yerr for container in panel.containers]
    assert bars == [False, True, False, False]  # two seeds of plus
    text = "\n".join(section("plus", results))
    assert "](../media/plus.png)" in text and "| plus - faithful, sampled softmax | NDCG@10 |" in text


def test_a_deployment_card_is_drawn_and_shown(results, tmp_path):
    row = {"size": 8, "engine": "torch", "quantize": "none", "bytes": 2_000_000, "resident_mb": 500.0, "load_s": 1.0,
           "p50_ms": 1.0, "p95_ms": 2.0, "step_p50_ms": 0.5, "batch256_p50_ms": 30.0, "batch256_p95_ms": 40.0,
           "Recall@10": 0.2, "NDCG@10": 0.1, "same_top10": 1.0, "add_10000_s": None}  # fmt: skip
    onnx = row | {"engine": "onnx", "quantize": "int8", "NDCG@10": 0.099, "same_top10": 0.5, "same_top10_as_torch": 1}
    card = {"dataset": "tiny", "users": 9, "large_catalogue": None, "rows": [row, onnx],
            "environment": {"device": "one core", "commit": None,
                            "versions": {"torch": "2", "onnxruntime": "1"}}}  # fmt: skip
    run = write_run(tmp_path / "a", {"dataset_code": "tiny", "mrl_hidden_sizes": (8,)})
    (run / "deploy.json").write_text(json.dumps(card))
    keep(run, results)
    runs = kept_runs(results)
    text = report.report(runs)
    start = "| 8 | onnx | int8 | 2.00 | 500 | 1.00 | 1.00 | 2.00 | 0.50 | 30 | 40 | 0.2000 | 0.0990 |"
    assert f"{start} 1.00% | 50.00% | 100.00% |" in text
    assert "](../media/deploy-tiny.png)" in text
    assert draw_figures(runs, tmp_path)[-1].name == "deploy-tiny.png"


def test_the_report_of_other_results_does_not_replace_the_repositorys(results, tmp_path):
    run = write_run(tmp_path / "a", LANGUAGE)
    before = report.OUT.read_bytes()
    with pytest.raises(InputError, match=r"would replace the report of .*; give --out and --media"):
        report.main(["--keep", str(run), "--results", str(results)])
    assert report.OUT.read_bytes() == before
    out = tmp_path / "RESULTS.md"
    elsewhere = ["--results", str(results), "--out", str(out), "--media", str(tmp_path / "media")]
    with pytest.raises(InputError, match="has no kept runs; --keep RUN adds one"):
        report.main(elsewhere)
    report.main(["--keep", str(run), *elsewhere])
    assert out.read_text().startswith("# Results")
