"""train.py, eval.py and the other commands on runs of the baselines, on a tiny prepared dataset."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_script
import train
from benchmarks import deploy
from common.errors import InputError
from config import MODEL_PRESETS
from datasets.catalog import load_catalog
from experiments import cold_items
from model.baselines.counting import ItemKNN, Popularity
from model.baselines.lrurec import LRURec
from model.baselines.sasrec import SASRec
from serving import export
from tests.cut_off import cut_off_after
from trainer import testing
from trainer.checkpoint import load_state
from trainer.load_run import load_run
from trainer.runs import read_config, read_log, unfinished

TINY = "--dataset_code tiny --device cpu --lr 0.01 --warmup_steps 1 --train_batch_size 8 --lru_num_blocks 1"
TRAINED = {"sasrec": SASRec, "lrurec": LRURec}
COUNTED = {"popularity": Popularity, "itemknn": ItemKNN}


def run_train(model, flags=""):
    epochs = "" if model in COUNTED else "--num_epochs 2 --mrl_hidden_sizes 8"
    return train.main(shlex.split(f"--model_code {model} {TINY} {epochs} {flags}"))


def metrics_in(run, suffix=""):
    found = json.loads((run / f"test_mrl_metrics{suffix}.json").read_text())
    return {int(size): metrics for size, metrics in found.items()}


@pytest.mark.parametrize("model", MODEL_PRESETS)
def test_a_baseline_makes_a_run_folder_like_any_other(workplace, model):
    run = run_train(model)
    config, sources = read_config(run)
    size = config.mrl_hidden_sizes[-1]
    assert run.name.endswith(f"-{model}-{size}")
    assert (config.branch, sources["use_img_encoder"]) == ("id", "preset")
    assert {p.name for p in run.iterdir()} - {"last.pt"} == {
        "config.json",
        "env.json",
        "log.jsonl",
        "best.safetensors",
        "test_metrics.json",
        "test_mrl_metrics.json",
        "test_mrl_metrics.png",
        "test_ranks.npz",
    }
    assert unfinished(run) == ""
    assert read_log(run)[-1]["val"].keys() == {str(size)}
    assert metrics_in(run) == {size: json.loads((run / "test_metrics.json").read_text())}


@pytest.mark.parametrize("model", MODEL_PRESETS)
def test_eval_repeats_what_was_found_and_masks_the_history_on_demand(workplace, model):
    run = run_train(model)
    tested = metrics_in(run)
    (run / "test_mrl_metrics.json").unlink()
    assert eval_script.main(["--model_code", model]) == tested == metrics_in(run)
    masked = eval_script.main(["--run", str(run), "--mask_history", "--test_batch_size", "3"])
    assert metrics_in(run, "_history_masked") == masked
    (size,) = masked
    assert masked[size]["NDCG@10"] > tested[size]["NDCG@10"]  # 12 items, several of them in the history


@pytest.mark.parametrize("model", TRAINED)
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(workplace, model):
    whole = run_train(model)
    with cut_off_after(1):
        run_train(model, "--run_name cut")
    assert train.main(["--resume", "latest"]).name.endswith("cut")
    (cut,) = Path("experiments/runs/tiny").glob("*-cut")
    assert (cut / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()
    torch.testing.assert_close(
        load_state(cut / "last.pt")["model"], load_state(whole / "last.pt")["model"], rtol=0, atol=0
    )


@pytest.mark.parametrize("model", COUNTED)
@pytest.mark.parametrize("cut_at", ["count", "test_run"])
def test_what_was_cut_off_is_counted_again_and_tested(workplace, monkeypatch, model, cut_at):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    whole = run_train(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((COUNTED[model], "count") if cut_at == "count" else (testing, "test_every_size")), stop)
        run_train(model, "--run_name cut")
    cut = train.main(["--resume", "latest"])
    assert cut.name.endswith("cut") and [line["epoch"] for line in read_log(cut)] == [1]
    assert metrics_in(cut) == metrics_in(whole)
    with pytest.raises(InputError, match="is finished"):
        train.main(["--resume", "latest"])


def test_only_what_is_before_validation_and_test_is_counted_also_what_is_older_than_a_model_reads(workplace):
    run = run_train("popularity", "--lru_max_len 1")
    sequences = load_catalog("data", "tiny").sequences
    counts = np.bincount(np.concatenate([sequences.of(u)[:-2] for u in range(20)]), minlength=13)
    _, _, model = load_run(run)
    assert model.counts.tolist() == counts.tolist()


@pytest.mark.parametrize("model", TRAINED)
def test_a_sampled_softmax_trains_a_baseline_too(workplace, model):
    losses = [line["loss"] for line in read_log(run_train(model, "--num_negatives 5 --num_epochs 12"))]
    assert losses[-1] < losses[0]


def test_settings_reach_sasrec(workplace):
    run = run_train(
        "sasrec", "--num_heads 4 --lru_num_blocks 3 --lru_max_len 7 --lru_dropout 0.1 --lru_attn_dropout 0.2"
    )
    _, _, model = load_run(run)
    block = model.blocks[-1]
    assert (len(model.blocks), block.attention.num_heads, len(model.positions), model.sizes) == (3, 4, 7, (8,))
    assert (model.dropout.p, block.dropout.p, block.attn_dropout.p) == (0.1, 0.1, 0.2)


def test_settings_reach_lrurec(workplace):
    run = run_train(
        "lrurec",
        "--lru_num_blocks 3 --lru_dropout 0.1 --lru_attn_dropout 0.2 --no-lru_use_bias --lru_r_min 0.6 "
        "--lru_r_max 0.61 --num_epochs 1 --lr 1e-6",
    )
    _, _, model = load_run(run)
    block = model.blocks[-1]
    assert (len(model.blocks), block.lru.B_bias_re, model.sizes) == (3, None, (8,))
    assert (model.dropout.p, block.dropout.p, block.attn_dropout.p) == (0.1, 0.1, 0.2)
    modulus = torch.exp(-torch.exp(block.lru.nu_log))
    assert modulus.min() > 0.599 and modulus.max() < 0.611


def test_a_baseline_is_not_served_and_has_no_slices_and_what_asks_for_them_says_so(workplace):
    run = run_train("popularity")
    for command in (export.main, deploy.main):
        with pytest.raises(InputError, match="is a run of popularity; only runs of fmrlrec can be exported"):
            command(["--run", str(run)])
        with pytest.raises(InputError, match=r"matches --model_code fmrlrec(.|\n)*: model_code popularity"):
            command([])
    with pytest.raises(InputError, match="is a run, not an export"):
        cold_items.main(["test", str(run)])
    with pytest.raises(InputError, match=r"--alone tests slices of fmrlrec; .* is a run of popularity: leave"):
        eval_script.main(["--run", str(run), "--alone"])


@pytest.mark.parametrize("model", COUNTED)
def test_what_only_counts_is_validated_without_the_history_where_that_is_asked_for(workplace, model):
    kept, masked = (read_log(run_train(model, flags))[0]["val"] for flags in ("", "--val_mask_history"))
    assert masked["1"]["Recall@50"] >= kept["1"]["Recall@50"]
    assert masked["1"]["NDCG@10"] > kept["1"]["NDCG@10"]
