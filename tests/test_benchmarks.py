"""Run the benchmarks on small inputs, and compare the speed baseline with the model."""

import contextlib
import io
import re
import sys
from types import ModuleType, SimpleNamespace

import torch

from benchmarks import features, pictures, prepare, scaling, speed
from benchmarks.baseline import Baseline, padded
from config import ModelSettings
from dataloader import TrainLoader, eval_batches, eval_rows, train_rows
from datasets.catalog import load_catalog
from model import FMRLRec, matryoshka_cross_entropy
from tests.prepared import write_prepared, write_tiny_bert
from trainer.metrics import target_ranks

CPU = torch.device("cpu")


def in_one_process(benchmark: ModuleType, monkeypatch) -> None:
    """Call a benchmark's main in this process instead of starting processes that import torch anew."""

    def run(command, capture_output=False, **_):
        assert command[:3] == [sys.executable, "-m", benchmark.__name__]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            benchmark.main(command[3:])
        if not capture_output:
            print(printed.getvalue())
        return SimpleNamespace(stdout=printed.getvalue())

    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=run))


def test_the_baseline_has_the_loss_gradients_and_ranks_of_the_model(tmp_path):
    write_prepared(tmp_path, "tiny", users=20, items=12)
    sequences = load_catalog(tmp_path, "tiny").sequences
    torch.manual_seed(0)
    model = FMRLRec(
        12,
        torch.randn(12, 5),
        ModelSettings(mrl_hidden_sizes=(2, 4, 8), lru_dropout=0.0, lru_attn_dropout=0.0, lru_r_max=0.9),
    ).double()
    baseline = Baseline(model)

    batch = next(TrainLoader(train_rows(sequences, 50), 20, 0, CPU).epoch(1))
    table = model.item_table()
    z = model.encode(table[batch.tokens], batch.position, batch.longest)
    loss = matryoshka_cross_entropy(z, table, batch.labels, model.sizes, reduction="mean")
    rows = [sequences.of(u)[:-2].tolist() for u in range(20)]
    plain = baseline.loss(padded([row[:-1] for row in rows]), padded(rows))
    assert abs(loss.item() - plain.item()) < 1e-10
    parameters = list(model.parameters())
    for fast, slow in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters), strict=True):
        assert (fast - slow).abs().max() <= 1e-9 * slow.abs().max()

    test = eval_rows(sequences, 50, "test")
    batch = next(eval_batches(test, 20, CPU))
    with torch.inference_mode():
        table = model.item_table()
        z = model.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]
        ranks = baseline.ranks(padded([sequences.of(u)[:-1].tolist() for u in range(20)]), batch.targets)
        for size, found in zip(model.sizes, ranks, strict=True):
            scores = z[:, :size] @ table[:, :size].T
            scores[:, 0] = -torch.inf
            assert torch.equal(target_ranks(scores, batch.targets), found.double())


def test_the_speed_benchmark_prints_every_case_with_its_ratio(monkeypatch, capsys):
    in_one_process(speed, monkeypatch)
    small = "--users 300 --items 50 --features 8 --sizes 2,4 --blocks 1 --batch 8 --runs 1"
    speed.main(small.split())
    printed = capsys.readouterr().out
    for case in ("baseline", "every slice alone"):
        assert re.search(rf"^  {case} +[\d.]+ +[\d.]+x$", printed, re.MULTILINE)
    for case in ("fp32", "bf16", "bf16-plus", "plus-256", "one pass"):
        assert re.search(rf"^  {case} +[\d.]+ +[\d.]+x +[\d.]+ +[\d.]+$", printed, re.MULTILINE)
    assert printed.count("GB peak resident memory") == 5


def test_the_scaling_benchmark_prints_a_row_for_every_case(monkeypatch, capsys):
    in_one_process(scaling, monkeypatch)
    monkeypatch.setattr(scaling, "SIZES", (4, 8))
    small = "--items 30,60 --lengths 3,5 --batches 1,2 --features 4 --negatives 7 --runs 1"
    scaling.main(small.split())
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in printed.splitlines() if line.startswith("|")]
    rows = [row for row in cells if row[0].isdigit()]
    by_items = [["30", "7 drawn"], ["60", "7 drawn"], ["30", "all"], ["60", "all"]]
    plus = [[items, how] for how in ("compact", "rows", "all") for items in ("30", "60")]
    assert rows == [*by_items, ["3", "32"], ["5", "32"], ["1", "all"], ["2", "all"], *plus]
    assert "ranks of 1,000 users at all sizes among 60 items" in printed
    scaling.main(["--plan", "100000000"])
    assert capsys.readouterr().out.splitlines()[3].startswith("| 8 | 32.3 | 410 | 1.7 | 0.0186 |")


def test_the_pictures_benchmark_downloads_despite_failures(capsys):
    small = "--pictures 14 --side 32 --latency 0 --failures 0.5 --read 0.3 --tries 2 --runs 1"
    pictures.main(small.split())
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("| 14 | 0 | 0 | yes |")
    assert second.endswith("| 8 | 2 | 4 | yes |")


def test_the_prepare_benchmark_makes_raw_files_once_and_prepares_them(tmp_path, capsys):
    small = ["--reviews", "3000", "--products", "100", "--folder", str(tmp_path), "--formats=json,parquet"]
    prepare.main(small)
    raw = tmp_path / "raw-3000-100"
    made = (raw / "reviews.json.gz").stat().st_mtime_ns
    prepare.make_files(raw, ["json"], 3000, 100)
    assert (raw / "reviews.json.gz").stat().st_mtime_ns == made
    out = capsys.readouterr().out
    assert out.count("| yes |") == 2
    assert out.splitlines()[-1].startswith("| 3,000 | 100 | parquet | memory | 0.00 |")
    assert (tmp_path / "made" / "sequential_data.txt").exists()


def test_the_features_benchmark_prints_rates_and_cosines(tmp_path, capsys):
    metadata = write_prepared(tmp_path, "tiny", items=20) / "meta.json.gz"
    bert = write_tiny_bert(tmp_path / "bert", positions=64)
    features.main(["--texts", str(metadata), "--language_encoder", str(bert), "--img_model", "none", "--runs", "1"])
    printed = capsys.readouterr().out
    rates = r"^  {}  bare forward +[\d.]+/s   whole path +[\d.]+/s   [\d.]+%$"
    assert all(re.search(rates.format(precision), printed, flags=re.MULTILINE) for precision in ("fp32", "bf16"))
    assert "cosine of fp32 and bf16: least 0.9" in printed
