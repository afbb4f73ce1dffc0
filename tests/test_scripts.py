"""Train and evaluate runs with train.py and eval.py on a tiny prepared dataset."""

import copy
import gzip
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch
from safetensors.torch import load_file

import config
import eval as eval_script
import train
from common.errors import InputError
from common.files import sha256
from common.settings import format_value
from dataloader import batches
from datasets.catalog import load_catalog
from experiments import nightly, report, tables
from tests.prepared import contents, cut_off_after, write_maps, write_prepared
from trainer import evaluation, runs, testing
from trainer import trainer as trainer_module
from trainer.checkpoint import load_state
from trainer.trainer import Trainer

TINY = (
    "--dataset_code tiny --language_encoder lexical --no-use_img_encoder --mrl_hidden_sizes 2,4,8 --num_epochs 2 "
    "--lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --device cpu"
)


def run_train(flags=""):
    return train.main(shlex.split(f"{TINY} {flags}"))


def run_eval(flags=""):
    return eval_script.main(shlex.split(flags))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return a folder with data/tiny and one finished run."""
    folder = tmp_path_factory.mktemp("template")
    write_prepared(folder / "data", "tiny", users=20, items=12, pictures=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_train()
    return folder


@pytest.fixture
def run(template, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "copy"))
    (run,) = Path("experiments/runs/tiny").iterdir()
    return run


def metrics_in(run):
    return {int(size): metrics for size, metrics in read_json(run / "test_mrl_metrics.json").items()}


def read_json(path):
    return json.loads(path.read_text())


def test_a_run_folder_holds_settings_environment_log_weights_and_metrics(workplace, capsys):
    run = run_train("--num_heads 2 --use_img_encoder --img_encoder pixel --lru_dropout 0.1")
    assert run.parent == Path("experiments/runs/tiny")
    files = "config.json env.json log.jsonl best.safetensors last.pt test_metrics.json test_mrl_metrics.json"
    files += " items.json.gz table.safetensors test_mrl_metrics.png training.png test_ranks.npz"
    assert {p.name for p in run.iterdir()} == set(files.split())
    saved, environment = read_json(run / "config.json"), read_json(run / "env.json")
    assert saved["settings"]["mrl_hidden_sizes"] == [2, 4, 8]
    assert (saved["sources"]["lr"], saved["sources"]["seed"]) == ("flag", "default")
    assert environment["features"] and environment["versions"]["torch"]
    assert all(Path("data/features/tiny", name).is_file() for name in environment["features"])
    metrics = metrics_in(run)
    assert list(metrics) == [2, 4, 8] and read_json(run / "test_metrics.json") == metrics[8]
    assert set(metrics[2]) == {f"{name}@{k}" for name in ("Recall", "NDCG", "MRR") for k in (5, 10, 20, 50)}
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed and "epoch   2/2" in printed and "the pictures or" not in printed
    assert re.findall(r"^ *(\w+) .*\(flag; without effect", printed, re.MULTILINE) == ["num_heads"]
    os.utime(next((workplace / "data/photos/tiny").iterdir()), (0, 0))
    run_eval(f"--run {run}")
    assert "the pictures or their encoder's weights are not those that the run was trained" in capsys.readouterr().out


def test_eval_repeats_the_test_of_train_in_one_pass_or_by_every_slice_alone_and_masks_the_history(run, monkeypatch):
    tested, true, trained = [], evaluation.rank_targets, metrics_in(run)

    def watched(model, rows, *, sizes, **how):
        tested.extend([(model.sizes[-1], sizes)] * (sizes != (1,)))  # of popularity, for the figure
        return true(model, rows, sizes=sizes, **how)

    for module in (evaluation, testing):
        monkeypatch.setattr(module, "rank_targets", watched)
    for protocol in ("", " --mask_history"):
        together, alone = run_eval(f"--run {run}{protocol}"), run_eval(f"--run {run} --alone{protocol}")
        assert alone == {size: pytest.approx(metrics) for size, metrics in together.items()}
        assert (together == trained) == (not protocol)
    assert tested == 2 * [(8, (2, 4, 8)), (2, (2,)), (4, (4,)), (8, (8,))]
    assert read_json(run / "test_mrl_metrics_history_masked.json")["8"] == alone[8]
    assert alone[8]["Recall@10"] > trained[8]["Recall@10"]  # 12 items, several of them in the history
    assert {"NDCG@7", "NDCG@10"} <= run_eval(f"--run {run} --metric_ks 7,100,200")[8].keys()


def test_eval_finds_the_newest_run_that_fits_the_flags(workplace, capsys):
    def assert_found(run, flags=""):
        run_eval(flags)
        assert f"run {run}\n" in capsys.readouterr().out

    with pytest.raises(InputError, match=r"no run below \S+/experiments/runs; train one: python train.py"):
        run_eval("")
    with pytest.raises(InputError, match=r"nowhere/config.json does not exist; give a run's folder"):
        run_eval("--run nowhere")
    flags = (f"--{name}={format_value(value)}" for name, value in config.NAMED_PRESETS["plus"].items())
    first = run_train(f"--run_name first --seed 1 --num_epochs 1 {' '.join(flags)}")
    second = run_train("--run_name second --seed 2 --num_epochs 1")
    assert_found(second)
    assert_found(second, "--preset paper")
    assert_found(first, "--dataset_code tiny --seed 1")
    assert_found(first, "--preset plus")
    with pytest.raises(InputError, match=r"no run .* matches --seed 3(.|\n)*second: seed 2(.|\n)*first: seed 1"):
        run_eval("--seed 3")
    with pytest.raises(InputError, match=r"--preset plus differs from .*, which has whiten_features False"):
        run_eval(f"--preset plus --run {second}")
    os.utime(first / "config.json", (2**32, 2**32))
    first = first.rename(first.with_name("renamed"))  # the age is that of its files
    assert_found(first)
    (first / "best.safetensors").unlink()
    assert_found(second)


def test_bad_input_is_refused_before_a_run_is_made(workplace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, message in (
        ("--device cuda", "--device cuda: torch finds no GPU here; give --device cpu"),
        ("--dataset_code tny", r"dataset 'tny' is not at data/tny \(prepared there: tiny\); did you mean tiny\?"),
        ("--language_encoder lexcal", "'lexcal' is neither a folder nor of the form ORGANISATION/MODEL; 'lexical'"),
    ):
        with pytest.raises(InputError, match=message):
            run_train(flags)
        assert not Path("experiments").exists()


def test_the_test_set_is_read_once_after_training_or_by_eval_which_tests_the_best_epoch(workplace, monkeypatch):
    parts, true_rows = [], batches.eval_rows
    for module in (trainer_module, testing):
        monkeypatch.setattr(module, "eval_rows", lambda s, n, part: parts.append(part) or true_rows(s, n, part))
    fit, validate, values = Trainer.fit, Trainer.validate, iter([0.9, 0.1, 0.1, 0.1, 0.1, 0.2])
    monkeypatch.setattr(Trainer, "fit", lambda self: (parts.append("fit"), fit(self))[1])
    monkeypatch.setattr(Trainer, "validate", lambda self: validate(self) | {8: {"NDCG@10": next(values)}})
    tested = run_train("--num_epochs 4")
    assert parts == ["val", "fit", "test"]
    assert load_state(tested / "last.pt")["progress"]["best_epoch"] == 1
    expected = metrics_in(tested)
    assert run_eval(f"--run {tested}") == expected

    parts.clear()
    run = run_train("--no-test")
    assert parts == ["val", "fit"] and not list(run.glob("test_*"))
    with pytest.raises(InputError, match="is finished"):
        train.main(["--resume", "latest"])
    run_eval(f"--run {run}")
    assert parts == ["val", "fit", "test"] and (run / "test_mrl_metrics.json").exists()


def write_newer_data():
    """Give data/tiny two more items, and all items other numbers; return the ids in order."""
    folder = write_prepared(Path("data"), "tiny", users=20, items=14, pictures=True, seed=7)
    ids = list(read_json(folder / "datamaps.json")["item2id"])[::-1]
    write_maps(folder, {item: str(number) for number, item in enumerate(ids, start=1)}, users=20)
    return ids


@pytest.mark.parametrize(
    ("flags", "name", "zero"),
    [
        (f"{TINY} --preset plus --item_embedding 8 --num_negatives 0", "items.V", True),
        ("--dataset_code tiny --model_code sasrec --mrl_hidden_sizes 8 --num_epochs 1 --lr 1", "items.table", False),
    ],
)
def test_a_warm_start_on_newer_data_keeps_what_was_learned_of_items(workplace, monkeypatch, flags, name, zero):
    origin = train.main(shlex.split(flags))
    known, ids = list(read_json(Path("data/tiny/datamaps.json"))["item2id"]), write_newer_data()
    started, fit = {}, Trainer.fit

    def watched(self):
        started.update(copy.deepcopy(self.model.state_dict()))
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", watched)
    run = train.main(["--init_from", str(origin), "--num_epochs", "1"])

    before = load_file(origin / "best.safetensors")
    assert all(torch.equal(before[key], started[key]) for key in before if key not in (name, "items.gate.trained"))
    for number, item in enumerate(ids, start=1):
        if item in known:
            assert torch.equal(started[name][number], before[name][known.index(item) + 1])
        else:
            assert bool(started[name][number].any()) != zero
    saved = read_json(run / "config.json")
    assert (saved["settings"]["init_from"], saved["sources"]["lr"]) == (str(origin), "init_from")
    recorded = {"run": origin.name, "weights": sha256(origin / "best.safetensors")}
    assert read_json(run / "env.json")["init_from"] == recorded


def test_a_run_learns_from_teachers_and_refuses_those_that_changed_or_know_other_items(workplace):
    teacher = train.main(shlex.split(f"{TINY} --num_epochs 1"))
    taught = f"{TINY} --preset plus --teachers {teacher},{teacher} --num_epochs 1"
    run, alone = train.main(shlex.split(taught)), train.main(shlex.split(f"{TINY} --preset plus --num_epochs 1"))
    assert [entry["run"] for entry in read_json(run / "env.json")["teachers"]] == 2 * [teacher.name]
    weights, without = (load_file(folder / "best.safetensors") for folder in (run, alone))
    assert not torch.equal(weights["items.V"], without["items.V"])
    train.main(["--resume", str(run)])

    best = (teacher / "best.safetensors").read_bytes()
    (teacher / "best.safetensors").write_bytes((alone / "best.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"changed since .* start another run with --teachers"):
        train.main(["--resume", str(run)])
    (teacher / "best.safetensors").write_bytes(best)
    counting = train.main(shlex.split("--dataset_code tiny --model_code popularity"))
    with pytest.raises(InputError, match="which only counts; leave it out"):
        train.main(shlex.split(f"{TINY} --distill 0.5 --teachers {counting}"))
    write_newer_data()
    with pytest.raises(InputError, match=r"was trained on another dataset .* give runs of this one"):
        train.main(shlex.split(taught))


def test_a_warm_start_with_another_architecture_is_refused_by_name(run):
    for flags, message in (
        ("--mrl_hidden_sizes 2,4", r"--mrl_hidden_sizes 2,4 does not fit .* which has mrl_hidden_sizes 2,4,8"),
        ("--language_encoder other/encoder", "--language_encoder other/encoder does not fit"),
        ("--item_embedding 4", "--item_embedding 4 does not fit"),
    ):
        with pytest.raises(InputError, match=message):
            train.main(["--init_from", str(run), *shlex.split(flags)])


def test_eval_tests_a_run_on_newer_data_when_asked_to_and_apart_from_its_results(run):
    before = contents(run)
    write_newer_data()
    with pytest.raises(InputError, match=r"is not the one that .*eval.py --run .* --on_newer_data, .* --init_from"):
        run_eval(f"--run {run}")
    found = run_eval(f"--run {run} --on_newer_data")
    assert contents(run).items() >= before.items()
    (folder,) = (run / "newer_data").iterdir()
    assert read_json(folder / "test_mrl_metrics.json")["8"] == found[8]
    assert read_json(folder / "data.json")["data"].startswith(folder.name)


def test_nightly_updates_are_compared_with_no_update_and_with_training_anew(workplace, monkeypatch):
    monkeypatch.setattr(nightly, "NIGHTS", 1)
    flags = TINY.replace("--dataset_code tiny", "")
    first, last = nightly.main(["--dataset_code", "tiny", "--out", "out", "--full", flags, "--anew", "1"])
    assert first["no_update"] == first["updated"] and {"updated", "seconds", "anew", "anew_seconds"} <= last.keys()
    [update] = Path("out/tiny").glob("*-update-1")
    assert last["no_update"] == runs.read_log(update)[0]["val"]["8"]["NDCG@10"]
    catalog = load_catalog("data", "tiny")
    for share in (0.5, 1.0):
        nightly.write_night(catalog, nightly.event_times(catalog), share, 0, Path())
        night = load_catalog("data-0", "tiny")
        assert (night.digest() == catalog.digest()) == (share == 1)
        assert len(night.sequences.items) <= 1.2 * share * len(catalog.sequences.items)


def test_a_run_on_other_texts_is_refused(run):
    before, path = contents(run), Path("data/tiny/meta.json.gz")
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"'title': '", b"'title': 'other ")))
    for main, flag in ((eval_script.main, "--run"), (train.main, "--resume")):
        with pytest.raises(InputError, match=r"the items' texts, or .*, are not those that the run was trained on"):
            main([flag, str(run)])
    assert contents(run) == before
    assert len(list(Path("data/features/tiny").glob("*.npy"))) == 1


def test_a_run_is_tested_and_resumed_by_its_own_settings_even_from_the_start_but_not_without_its_weights(run):
    def refused(problem, main, *flags):
        with pytest.raises(InputError, match=problem):
            main([*flags])

    test, resume = (eval_script.main, "--run", str(run)), (train.main, "--resume", str(run))
    refused("mrl_hidden_sizes 2,4 differs from .*, which has mrl_hidden_sizes 2,4,8", *test, "--mrl_hidden_sizes=2,4")
    refused("--lr 0.5 differs from .*, which has lr 0.01; leave the flag out", *resume, "--lr", "0.5")
    before = (run / "best.safetensors").read_bytes()
    (run / "best.safetensors").write_bytes(before[:100])
    refused(r"is damaged .*; remove it, last.pt and log.jsonl, .* train.py --resume", *test)
    for name in ("best.safetensors", "last.pt"):
        (run / name).unlink()
    kept = contents(run)
    refused("has no last.pt to continue from, only results; train another run", *resume)
    refused("best.safetensors does not exist: .* only its results were kept", *test)
    assert contents(run) == kept
    (run / "log.jsonl").unlink()
    train.main(["--resume", str(run), "--test_batch_size", "3"])  # runtime flags may differ
    assert (run / "best.safetensors").read_bytes() == before


def test_an_unfinished_run_is_reported_not_kept_as_a_result_and_resumed_to_the_same_weights(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runs, "commit", lambda: "fedcba9876543210")
    with cut_off_after(1):
        run_train("--run_name cut")
    (cut,) = Path("experiments/runs/tiny").glob("*-cut")
    began = read_json(cut / "env.json")
    assert f"continue with: python train.py --resume {cut}" in capsys.readouterr().err
    run_eval(f"--run {cut}")
    assert f"run {cut}, unfinished: epoch 1 of 2" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"is not finished \(epoch 1 of 2\); train.py --resume"):
        report.main([f"--keep={cut}", f"--results={tmp_path}/kept", f"--out={tmp_path}/R.md", f"--media={tmp_path}"])
    leftover, foreign = cut / ".last.pt.abc.tmp", cut / ".test_metrics.json.abc.tmp"  # eval.py may be writing that
    for path in (leftover, foreign):
        path.touch()
        os.utime(path, (0, 0))  # long ago

    monkeypatch.setattr(runs, "commit", lambda: "0123456789abcdef")
    assert train.main(["--resume", "latest"]) == cut
    assert not leftover.exists() and foreign.exists()
    for name in ("best.safetensors", "test_mrl_metrics.json"):
        assert (cut / name).read_bytes() == (run / name).read_bytes()
    saved = read_json(cut / "env.json")
    (resumed,) = saved.pop("resumed")
    assert (saved, resumed["commit"], resumed["device"]) == (began, "0123456789abcdef", began["device"])
    assert "`fedcba9876`, `0123456789`" in tables.where_made([saved, resumed])


def test_a_log_line_of_an_epoch_without_checkpoint_is_dropped_on_resuming_and_a_damaged_one_named(run):
    lines = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(lines + lines.splitlines()[-1].replace('"epoch": 2', '"epoch": 3') + "\n")
    state = load_state(run / "last.pt")
    state["progress"] |= {"epoch": 1, "step": 1}
    torch.save(state, run / "last.pt")
    train.main(["--resume", str(run)])
    assert [line["epoch"] for line in runs.read_log(run)] == [1, 2]
    for text in ('{"epoch": 1', "[]", '{"epoch": 2, "seconds": 1, "train_seconds": 1}'):
        (run / "log.jsonl").write_text(f"{lines.splitlines()[0]}\n{text}\n")
        with pytest.raises(InputError, match=r"log\.jsonl:2.*; remove"):
            train.main(["--resume", str(run)])


@pytest.mark.parametrize(
    ("key", "reached", "modes"),
    [(None, True, ["offline"]), ("secret", True, ["online"]), ("secret", False, ["online", "offline"])],
)
def test_wandb_logs_every_epoch_and_the_test_online_if_it_can(workplace, monkeypatch, key, reached, modes):
    started, fake = MagicMock(), MagicMock(Error=OSError)
    fake.api.api_key = key
    fake.init.side_effect = [*[OSError("no network")] * (not reached), started]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("trainer.training_run.find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = run_train("--use_wandb")
    tried = [(each.kwargs["mode"], each.kwargs["config"]["lr"]) for each in fake.init.call_args_list]
    assert tried == [(mode, 0.01) for mode in modes]
    assert [each.kwargs["step"] for each in started.log.call_args_list] == [1, 2]
    (summary,) = started.summary.update.call_args.args
    assert summary["test/8/NDCG@10"] == read_json(run / "test_metrics.json")["NDCG@10"]
    assert started.mock_calls[-1] == call.finish()


def test_tensorboard_has_the_numbers_of_the_log_and_of_the_test(workplace, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with cut_off_after(1):
        run_train("--use_tensorboard")
    run = train.main(["--resume", "latest"])
    events, log = accumulator.EventAccumulator(str(run / "tensorboard")).Reload(), runs.read_log(run)
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(record["epoch"], pytest.approx(record["loss"])) for record in log]
    found = [events.Scalars(f"{part}/8/NDCG@10")[-1].value for part in ("val", "test")]
    assert found == pytest.approx([log[-1]["val"]["8"]["NDCG@10"], metrics_in(run)[8]["NDCG@10"]])
    monkeypatch.setattr("trainer.training_run.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(InputError, match=f"--use_{name} needs the package {name}: pip install"):
            run_train(f"--use_{name}")
