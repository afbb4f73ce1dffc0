"""Keep results of runs, and make the report's tables and figures from them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from config import ModelSettings, resolve
from experiments import figures, report, reproduction, tables
from experiments.definition import definitions
from experiments.figures import draw_figures
from experiments.paper import MASKED
from experiments.reproduction import write_reproduction
from experiments.store import keep, kept_runs
from experiments.tables import paired_bootstrap, student_p, user_metrics, welch_test
from media import draw
from model import FMRLRec, count_parameters
from trainer.evaluation import ranking_metrics
from trainer.runs import save_ranks

USERS = 400


def write_run(folder, flags, *, seed=42, data="d", tested=True, masked=True, val=None):
    """Write the files of a finished run, with metrics of made-up ranks; masked, a rank is one better."""
    config, sources = resolve({"dataset_code": "beauty", "seed": seed, **flags})
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    ranks = {m: random.integers(1, 40, size=USERS).astype(float) for m in config.mrl_hidden_sizes}
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


def keep_run(results, name, flags, **how):
    run = write_run(results.parent / "runs" / name, flags, **how)
    keep(run, results, tests=False)
    return run


def section(name, results):
    return tables.section(definitions()[name], kept_runs(results))


def rows_of(lines):
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
    old, new = kept_runs(results)
    for suffix, masked in (("", ""), ("_history_masked", MASKED)):
        for size, metrics in json.loads((run / f"test_mrl_metrics{suffix}.json").read_text()).items():
            found = old.test.loc[int(size), [name + masked for name in metrics]]
            assert found.to_numpy() == pytest.approx(list(metrics.values()), abs=1e-8)
    assert new.validation.at[8, "NDCG@10"] == 0.25
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
    assert (kept.ranks()[8] == ranks).all() and (kept.ranks(masked=True)[8] == np.maximum(1, ranks - 1)).all()


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
        ("ranks/beauty.npz", "", "damage", r"ranks/beauty.npz cannot be read"),
        ("metrics.csv", "masked,8,", "masked,8,,", r"metrics.csv cannot be read .* line 4"),
    ],
)
def test_a_damaged_line_is_named(results, name, old, new, problem):
    keep_run(results, "a", {"mrl_hidden_sizes": (8, 16)})
    keep_run(results, "b", {"mrl_hidden_sizes": (8, 16), "lru_num_blocks": 1})
    text = (results / name).read_text(errors="replace")
    assert old in text
    (results / name).write_text(text.replace(old, new))
    with pytest.raises(InputError, match=problem):
        [run.ranks() for run in kept_runs(results)]


def test_the_metrics_of_users_average_to_those_of_the_test():
    ranks = np.append(np.random.default_rng(0).integers(2, 120, size=1000) / 2, np.inf)
    expected = ranking_metrics(torch.tensor(ranks), (5, 10, 50))
    for name in ("Recall@10", "NDCG@50", "MRR@5"):
        assert user_metrics(ranks, name).mean() == pytest.approx(expected[name], rel=1e-12)


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
    drawn = np.array([(a - b)[random.integers(0, 300, size=300)].mean() for _ in range(20_000)])
    found = paired_bootstrap(a, b)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    assert found.p == pytest.approx(2 * min(np.mean(drawn <= 0), np.mean(drawn >= 0)), abs=0.03)
    certain = paired_bootstrap(a + 0.1, a)
    assert certain.p < 0.001 and certain.low > 0.09
    assert paired_bootstrap(a, a) == (0, 0, 0, 1)
    monkeypatch.setattr("experiments.tables.AT_ONCE", 777)
    assert paired_bootstrap(a, b) == found


def test_figure_4_comes_out_to_the_digit_and_counts_parameters_as_the_models_hold_them():
    found = {largest: f"{100 * saved:.2f}" for largest, saved, *_ in reproduction.figure4()}
    assert found == {128: "0.00", 256: "25.16", 512: "31.39", 1024: "32.90", 2048: "33.25"}
    model = FMRLRec(3, torch.zeros(3, reproduction.FEATURES), ModelSettings(mrl_hidden_sizes=(4, 12, 20)))
    numbers, projection = (sum(p.numel() for p in of.parameters()) for of in (model, model.items))
    for with_projection, left_out in ((True, 0), (False, projection)):
        assert reproduction.stored(20, projection=with_projection) == numbers - left_out
        assert reproduction.unmasked(model.sizes, projection=with_projection) == count_parameters(model) - left_out


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
    for blocks in (1, 2):
        keep_run(results, f"other-{blocks}", {"lru_num_blocks": blocks}, data="other", masked=False)
    lines = section("depth", results)
    headings = [line.partition(", data ")[2] for line in lines if line.startswith("### depth on beauty, ")]
    assert headings == ["d, lr default", "d, lr 0.001", "other, lr default"]
    assert [row[0] for row in rows_of(lines)].count("2 blocks") == 3  # and none with the history masked


@pytest.mark.parametrize(("wrong", "problem"), [("dept; a", "dept"), ("depth; 3 blocks", "3 blocks")])
def test_an_unknown_field_of_the_reproductions_template_is_named(tmp_path, wrong, problem):
    (tmp_path / "template.md").write_text(f"{{{{beauty; {wrong}; 8; NDCG@10}}}}")
    with pytest.raises(InputError, match=f"unknown .* '{problem}'"):
        write_reproduction([], tmp_path / "template.md")


def test_rows_without_partners_data_or_ranks_in_common_are_shown_only_beside_published_values(results):
    keep_run(results, "one", {"lru_num_blocks": 1}, data="other")
    keep_run(results, "two", {})
    assert all(section(name, results) == [] for name in ("depth", "independent", "loss"))
    run = write_run(results.parent / "same", {"lru_num_blocks": 1})
    for path in run.glob("*.npz"):
        path.unlink()
    keep(run, results)
    assert section("depth", results) and "paired bootstrap" not in "\n".join(section("depth", results))
    rows = rows_of(section("sizes", results))
    assert [(row[1], row[-3]) for row in rows[2:4]] == [("8", "0.0150"), ("16", "0.0180")]


def test_plus_is_drawn_beside_the_faithful_model_and_one_size_models(results, tmp_path, monkeypatch):
    small = LANGUAGE | {"mrl_hidden_sizes": (8, 16, 32, 64, 128, 256), "precision": "bf16"}
    short = {"train_batch_size": 128, "lr": 2e-3, "num_epochs": 12, "early_stopping_patience": 3}
    sampled = {"num_negatives": 1024, "lru_dropout": 0.6, "lru_attn_dropout": 0.6}
    older = small | {"preset": "plus", "history_bias": False, "item_embedding_gate": False}
    keep_run(results, "faithful", small | short | sampled)
    keep_run(results, "plus", older)
    keep_run(results, "plus2", older, seed=5)
    keep_run(results, "alone", older | {"mrl_hidden_sizes": (64,)})
    drawn, true_draw = [], figures.draw_curves
    monkeypatch.setattr(figures, "draw_curves", lambda *given: (drawn.append(given), true_draw(*given)))
    made = draw_figures(kept_runs(results), tmp_path / "media")
    assert [path.name for path in made] == ["parameters_saved.png", "plus.png"]
    panel, _, name, _, separate, levels = drawn[0]
    assert (name, [row.size for row in separate]) == ("Recall@10", [64]) and levels == {"best published": 0.1249}
    labels = sorted(text.get_text() for text in panel.texts)
    assert labels == ["best published", "faithful", "paper", "plus without bias"]
    assert [container.has_yerr for container in panel.containers] == [False, True, False]  # two seeds of plus


def test_the_report_of_other_results_does_not_replace_the_repositorys(results, tmp_path):
    run, before = write_run(tmp_path / "a", LANGUAGE), report.OUT.read_bytes()
    with pytest.raises(InputError, match=r"would replace the report of .*; give --out and --media"):
        report.main(["--keep", str(run), "--results", str(results)])
    assert report.OUT.read_bytes() == before
    elsewhere = [f"--results={results}", f"--out={tmp_path}/RESULTS.md", f"--media={tmp_path}/media"]
    with pytest.raises(InputError, match="has no kept runs; --keep RUN adds one"):
        report.main(elsewhere)
    report.main(["--keep", str(run), *elsewhere])
    assert (tmp_path / "RESULTS.md").read_text().startswith("# Results")


def test_the_figures_of_the_method_are_drawn(tmp_path):
    draw.main(["--out", str(tmp_path)])
    for name in ("architecture.png", "nesting.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800
