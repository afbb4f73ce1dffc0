"""Keep results of runs, and make the report's tables and figures from them."""

import dataclasses
import json
import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common.errors import InputError
from config import ModelSettings, resolve
from experiments import figures, paper, report, reproduction, tables
from experiments.definition import Definition, Row, definitions
from experiments.figures import draw_figures
from experiments.reproduction import write_reproduction
from experiments.store import keep, kept_runs
from experiments.tables import paired_bootstrap, student_p, user_metrics, welch_test
from media import draw
from model import FMRLRec, count_parameters
from trainer import plots
from trainer.evaluation import ranking_metrics
from trainer.runs import save_ranks

USERS = 400


def write_run(folder, flags, ranks=None, *, seed=42, data="d", tested=True, masked=True, val=None):
    """Write the files of a finished run, with metrics of made-up ranks {size: [U]}; masked, a rank is one better."""
    config, sources = resolve({"dataset_code": "beauty", "seed": seed, **flags})
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    ranks = ranks or {m: random.integers(1, 40, size=USERS).astype(float) for m in config.mrl_hidden_sizes}
    (folder / "config.json").write_text(json.dumps({"settings": vars(config), "sources": sources}))
    environment = {"device": "a CPU", "commit": "0123456789abc", "uncommitted_changes": False, "data": data,
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
        save_ranks(folder / f"test_ranks{suffix}.npz", of_sizes, 50, np.zeros(USERS, dtype=int))
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


def test_a_run_is_kept_again_only_if_it_has_something_new(results):
    run = keep_run(results, "a", {}, masked=False)
    with pytest.raises(InputError, match=r"beauty-a is kept already in .* nothing new"):
        keep(run, results)
    assert not kept_runs(results)[0].complete()
    keep(write_run(results.parent / "elsewhere" / "a", {}), results)
    keep_run(results, "compared by no experiment", {"distill": 0.7})
    kept, other = kept_runs(results)
    assert kept.complete() and other.complete() and other.ranks() is None
    ranks = np.random.default_rng(42).integers(1, 40, size=USERS)
    assert (kept.ranks()[8] == ranks).all()
    assert (kept.ranks(masked=True)[8] == np.maximum(1, ranks - 1)).all()


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("env.json", '"started": "a"', '"started": "later"', "another run is kept as beauty-a"),
        ("env.json", '"commit"', '"commiu"', "the record of .* has no 'commit' in environment; train it again"),
        ("log.jsonl", '"epoch": 40', '"epoch": 1', r"is not finished \(epoch 1 of 40\); train.py --resume"),
        ("log.jsonl", '"best_epoch": 1', '"best_epoch": 77', "log.jsonl has no line of the run's best epoch"),
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
        ("runs.jsonl", "beauty-b", "beauty-c", r"runs.jsonl:2: .*metrics.csv has no line of run beauty-c"),
        ("runs.jsonl", '"epochs"', '"epoch"', r"runs.jsonl:1 has no 'epochs'"),
        ("runs.jsonl", '"lr":', '"rate":', r"runs.jsonl:1 \(run beauty-a\): .*unknown settings \['rate'\]"),
        ("metrics.csv", "beauty-a,beauty,test,kept,8,0.", "beauty-a,beauty,test,kept,8,o.", r"metrics.csv:2 .*metric"),
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
    monkeypatch.setattr("experiments.tables.AT_ONCE", 777)
    assert paired_bootstrap(a, b) == found


def test_figure_4_comes_out_to_the_digit():
    rows = reproduction.figure4()
    assert [f"{100 * saved:.2f}" for _, saved, *_ in rows] == ["0.00", "25.16", "31.39", "32.90", "33.25"]
    assert [largest for largest, *_ in rows] == list(paper.SAVED) == [128, 256, 512, 1024, 2048]


@pytest.mark.parametrize("projection", [True, False])
def test_parameters_are_counted_as_the_models_hold_them(projection):
    sizes = (4, 12, 20)
    model = FMRLRec(3, torch.zeros(3, reproduction.FEATURES), ModelSettings(mrl_hidden_sizes=sizes))
    left_out = 0 if projection else sum(p.numel() for p in model.items.parameters())
    numbers = sum(p.numel() for p in model.parameters())
    assert reproduction.stored(sizes[-1], projection=projection) == numbers - left_out
    assert reproduction.unmasked(sizes, projection=projection) == count_parameters(model) - left_out


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


def test_the_report_of_the_reproduction_fills_in_the_fields_of_its_template(results, tmp_path):
    keep_run(results, "two", {})
    (run,) = kept_runs(results)
    fields = {
        "beauty; depth; 2 blocks; 64; NDCG@10": f"{run.test.at[64, 'NDCG@10']:.4f}",
        "beauty; table3; language; 64; NDCG@10": "not run",
    }
    template = tmp_path / "template.md"
    template.write_text("\n\n".join(f"{{{{{field}}}}}" for field in fields))
    assert write_reproduction([run], template) == "\n\n".join(fields.values()) + "\n"
    for wrong, problem in (("dept; a", "dept"), ("depth; 3 blocks", "3 blocks")):
        template.write_text(f"{{{{beauty; {wrong}; 8; NDCG@10}}}}")
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


def test_runs_on_other_data_or_without_ranks_are_not_compared(results):
    keep_run(results, "one", {"lru_num_blocks": 1}, data="other")
    keep_run(results, "two", {})
    assert section("depth", results) == []
    run = write_run(results.parent / "same", {"lru_num_blocks": 1})
    for path in run.glob("*.npz"):
        path.unlink()
    keep(run, results)
    assert section("depth", results) and "paired bootstrap" not in "\n".join(section("depth", results))


WHITENING = Definition("mine", "T", "t", ("beauty",),
                       (Row("off", {"whiten_features": False}), Row("on", {"whiten_features": True})))  # fmt: skip


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
    older = {"preset": "plus", "history_bias": False, "item_embedding_gate": False}
    keep_run(results, "plus", small | older)
    keep_run(results, "plus2", small | older, seed=5)
    keep_run(results, "exact", LANGUAGE | older | {"num_negatives": 0, "precision": "bf16"})
    keep_run(results, "alone", small | older | {"mrl_hidden_sizes": (64,)})
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
    assert [text for _, text in curves] == ["faithful", "plus without bias", exact]
    assert [row.size for row in separate] == [64]
    sasrec = {run.name: run for run in runs}["beauty-sasrec"].test
    assert levels == {"SASRec, 64": sasrec.at[64, "Recall@10"], "best published": 0.1249}
    assert masked[5]["best published"] == paper.PUBLISHED["bsarec"]["beauty"]["NDCG@10 masked"]
    labels = [text.get_text() for text in panel.texts]
    assert sorted(labels) == [
        "SASRec, 64",
        "best published",
        "faithful",
        "paper",
        "plus without bias",
        f"{exact} (dashed)",
    ]
    bars = [container.has_yerr for container in panel.containers]
    assert bars == [False, True, False, False]  # two seeds of plus
    text = "\n".join(section("plus", results))
    assert "](../media/plus.png)" in text and "| plus without bias - faithful, sampled softmax | NDCG@10 |" in text


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
