"""Settings: what wins, what is refused and how, what is saved."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import Parser, add_switch, parse_args, run_cli
from common.errors import InputError
from common.settings import is_runtime
from config import ALL_PRESETS, EXTENSIONS, METRICS, MODEL_PRESETS, NAMED_PRESETS, PRESETS, SECTIONS, Config, resolve
from trainer.runs import read_settings, run_label

REPOSITORY = Path(__file__).parent.parent
FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def parsed(*argv: str) -> tuple[Config, dict[str, str]]:
    flags, _ = parse_args(argv, "a test", SECTIONS)
    return resolve(flags)


def refusal(capsys, *argv: str) -> str:
    """The last line on stderr of a command line that is refused with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: parsed(*argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def help_text(capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"], "a test", SECTIONS, presets=ALL_PRESETS)
    assert stopped.value.code == 0
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ what wins


def test_a_setting_that_nobody_sets_has_its_default():
    config, sources = parsed("--dataset_code=beauty")
    assert (config.lr, sources["lr"]) == (1e-4, "default")


def test_a_preset_wins_over_the_default():
    config, sources = parsed("--dataset_code=beauty")
    assert (config.lru_dropout, sources["lru_dropout"]) == (0.6, "preset")


def test_a_flag_wins_over_the_preset():
    config, sources = parsed("--lru_dropout=0.2", "--dataset_code=beauty")
    assert (config.lru_dropout, sources["lru_dropout"]) == (0.2, "flag")


def test_a_flag_that_repeats_the_default_still_wins_over_the_preset():
    config, sources = parsed("--dataset_code=beauty", f"--lru_dropout={FIELDS['lru_dropout'].default}")
    assert (config.lru_dropout, sources["lru_dropout"]) == (FIELDS["lru_dropout"].default, "flag")


def test_every_setting_has_a_source_and_only_given_flags_are_flags():
    _, sources = parsed("--seed=7", "--no-use_img_encoder")
    assert sources.keys() == FIELDS.keys()
    assert [name for name, source in sources.items() if source == "flag"] == ["use_img_encoder", "seed"]


def test_without_flags_the_demo_trains_with_its_preset_and_no_download():
    config, sources = parsed()
    assert (config.dataset_code, config.language_encoder, config.img_encoder) == ("demo", "lexical", "pixel")
    assert (sources["dataset_code"], sources["language_encoder"]) == ("default", "preset")


def test_a_dataset_of_ones_own_has_the_defaults():
    config, sources = parsed("--dataset_code=my_shop")
    assert config == dataclasses.replace(Config(), dataset_code="my_shop")
    assert "preset" not in sources.values()


def test_the_presets_of_the_paper_begin_the_ring_where_the_paper_found_best():
    rings = {name: (parsed(f"--dataset_code={name}")[0].lru_r_min) for name in ("beauty", "clothing", "sports", "toys")}
    assert rings == {"beauty": 0.0, "clothing": 0.1, "sports": 0.1, "toys": 0.0}
    for name, r_min in rings.items():
        assert parsed(f"--dataset_code={name}")[0].lru_r_max == pytest.approx(r_min + 0.1)


@pytest.mark.parametrize("dataset", PRESETS)
def test_a_preset_holds_real_settings_of_their_types(dataset):
    for name, value in PRESETS[dataset].items():
        assert type(value) is type(FIELDS[name].default), name
    assert resolve({"dataset_code": dataset})[0].dataset_code == dataset


@pytest.mark.parametrize("model", MODEL_PRESETS)
@pytest.mark.parametrize("dataset", [*PRESETS, "my_shop"])
def test_a_baseline_needs_no_flag_but_its_name_on_any_dataset(model, dataset):
    config, sources = parsed(f"--model_code={model}", f"--dataset_code={dataset}")
    assert (config.branch, run_label(config), len(config.mrl_hidden_sizes)) == ("id", model, 1)
    for name, value in MODEL_PRESETS[model].items():
        assert type(value) is type(FIELDS[name].default), name
        assert (getattr(config, name), sources[name]) == (value, "preset")


def test_a_models_preset_wins_over_the_datasets_and_a_flag_over_both():
    assert MODEL_PRESETS["lrurec"]["lru_r_max"] != PRESETS["clothing"]["lru_r_max"]
    config, sources = parsed("--model_code=lrurec", "--dataset_code=clothing")
    assert (config.lru_r_max, sources["lru_r_max"]) == (MODEL_PRESETS["lrurec"]["lru_r_max"], "preset")
    config, sources = parsed("--model_code=lrurec", "--dataset_code=clothing", "--lru_r_max=0.9")
    assert (config.lru_r_max, sources["lru_r_max"]) == (0.9, "flag")
    assert parsed("--model_code=sasrec")[0].img_encoder == "pixel"  # the demo's, which sasrec's leaves alone


@pytest.mark.parametrize("dataset", [*PRESETS, "my_shop"])
def test_a_named_preset_wins_over_the_datasets_and_a_flag_over_both(dataset):
    config, sources = parsed("--preset=plus", f"--dataset_code={dataset}")
    for name, value in NAMED_PRESETS["plus"].items():
        assert type(value) is type(FIELDS[name].default), name
        assert (getattr(config, name), sources[name]) == (value, "preset")
    config, sources = parsed("--preset=plus", f"--dataset_code={dataset}", "--distill=0.1", "--no-whiten_features")
    assert (config.distill, sources["distill"], config.whiten_features) == (0.1, "flag", False)
    assert config.preset == "plus" and sources["preset"] == "flag"


@pytest.mark.parametrize("dataset", [*PRESETS, "my_shop"])
def test_the_papers_preset_is_no_preset(dataset):
    assert parsed("--preset=paper", f"--dataset_code={dataset}")[0] == parsed(f"--dataset_code={dataset}")[0]
    config = parsed(f"--dataset_code={dataset}")[0]
    for name in EXTENSIONS:
        assert not getattr(config, name), name


# ------------------------------------------------------------------------------------------------------- kinds of flags


@pytest.mark.parametrize("name", ["use_img_encoder", "use_wandb"])  # one that is on by default, one that is off
@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        (["--{}"], True),
        (["--{}=true"], True),
        (["--{}=True"], True),
        (["--{}", "true"], True),
        (["--no-{}"], False),
        (["--no_{}"], False),
        (["--{}=false"], False),
        (["--{}=0"], False),
        (["--{}", "False"], False),
    ],
)
def test_booleans_are_read_in_every_common_spelling(name, spelling, value):
    config, sources = parsed(*(word.format(name) for word in spelling))
    assert (getattr(config, name), sources[name]) == (value, "flag")


def test_a_boolean_without_value_does_not_take_the_next_flag():
    config, _ = parsed("--use_wandb", "--seed=3")
    assert (config.use_wandb, config.seed) == (True, 3)


@pytest.mark.parametrize("text", ["8,16,32", " 8, 16 , 32", "8,16,32,"])
def test_a_list_of_numbers_is_separated_by_commas(text):
    assert parsed(f"--mrl_hidden_sizes={text}")[0].mrl_hidden_sizes == (8, 16, 32)


def test_a_list_of_names_keeps_its_order():
    assert parsed("--item_attributes=brand,title")[0].item_attributes == ("brand", "title")


def test_a_list_may_have_one_entry():
    config, _ = parsed("--mrl_hidden_sizes=64", "--metric_ks=10")
    assert (config.mrl_hidden_sizes, config.metric_ks) == ((64,), (10,))


def test_numbers_may_be_written_in_scientific_notation():
    assert parsed("--lr=3e-4")[0].lr == 3e-4


def test_a_scripts_own_arguments_are_returned_apart_from_the_settings():
    flags, own = parse_args(
        ["--resume=latest", "--seed=1"], "a test", SECTIONS, lambda parser: parser.add_argument("--resume")
    )
    assert (flags, vars(own)) == ({"seed": 1}, {"resume": "latest"})


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--dataset_code", ""),
        ("--dataset_code", ".."),
        ("--dataset_code", "../beauty"),
        ("--dataset_code", "photos\\beauty"),
        ("--run_name", "../elsewhere"),
        ("--mrl_hidden_sizes", "16,8"),
        ("--mrl_hidden_sizes", "8,8"),
        ("--mrl_hidden_sizes", "0,8"),
        ("--mrl_hidden_sizes", "-8,8"),
        ("--mrl_hidden_sizes", ""),
        ("--mrl_hidden_sizes", "8,sixteen"),
        ("--mrl_hidden_sizes", "8,16.5"),
        ("--metric_ks", "10,5"),
        ("--metric_ks", ""),
        ("--metric_ks", "ten"),
        ("--lru_dropout", "1.0"),
        ("--lru_dropout", "-0.1"),
        ("--lru_dropout", "nan"),
        ("--lru_dropout", "half"),
        ("--lru_attn_dropout", "1.5"),
        ("--lru_r_min", "-0.1"),
        ("--lru_r_min", "0.1"),  # as large as r_max
        ("--lru_r_min", "nan"),
        ("--lru_r_max", "1.5"),
        ("--lru_max_len", "0"),
        ("--lru_num_blocks", "0"),
        ("--num_epochs", "0"),
        ("--num_epochs", "1.5"),
        ("--early_stopping_patience", "0"),
        ("--train_batch_size", "-1"),
        ("--val_batch_size", "0"),
        ("--test_batch_size", "0"),
        ("--encoder_batch_size", "0"),
        ("--encoder_workers", "-1"),
        ("--encoder_precision", "int8"),
        ("--lr", "0.0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "fast"),
        ("--adam_epsilon", "0.0"),
        ("--weight_decay", "-0.01"),
        ("--max_grad_norm", "nan"),
        ("--warmup_steps", "-1"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),  # torch and numpy take 64 bits
        ("--best_metric", "NDCG@0"),
        ("--best_metric", "NDCG@010"),
        ("--best_metric", "NDCG@ten"),
        ("--best_metric", "HR@10"),
        ("--best_metric", "NDCG"),
        ("--best_metric", ""),
        ("--optimizer", "sgd"),
        ("--mrl_loss", "max"),
        ("--preset", "minus"),
        ("--item_embedding", "-1"),
        ("--dropout_from", "-1"),
        ("--ema_decay", "1"),
        ("--distill", "1.1"),
        ("--distill", "-0.5"),
        ("--distill", "nan"),
        ("--device", "tpu"),
        ("--model_code", "bert4rec"),
        ("--num_heads", "0"),
        ("--use_img_encoder", "maybe"),
        ("--enable_lr_schedule", ""),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_flag_and_the_value(capsys, flag, value):
    message = refusal(capsys, f"{flag}={value}")
    assert "error" in message
    assert flag in message
    assert value in message.replace("\\\\", "\\")


def test_an_empty_list_of_attributes_is_refused_while_texts_are_read(capsys):
    assert "--item_attributes is empty" in refusal(capsys, "--item_attributes=")
    assert parsed("--item_attributes=", "--no-use_language_encoder")[0].item_attributes == ()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model_code=sasrec --use_img_encoder", "--use_img_encoder: sasrec uses item ids only"),
        (
            "--model_code=itemknn --use_language_encoder",
            "--use_language_encoder: itemknn uses item ids only",
        ),
        ("--model_code=lrurec --mrl_hidden_sizes=8,16", '--mrl_hidden_sizes "8,16": lrurec takes one size'),
        ("--model_code=popularity --mrl_hidden_sizes=64", "--mrl_hidden_sizes 64: popularity has no size"),
        ("--model_code=lrurec --preset=plus", "--preset plus needs --model_code fmrlrec, not lrurec"),
        ("--model_code=sasrec --logit_scale", "--logit_scale True needs --model_code fmrlrec, not sasrec"),
        ("--model_code=sasrec --num_heads=3", "--num_heads 3 does not divide --mrl_hidden_sizes 64"),
    ],
)
def test_what_a_baseline_cannot_be_is_refused_by_its_name(capsys, argv, message):
    assert message in refusal(capsys, *argv.split())


@pytest.mark.parametrize("flag", ["--item_embedding=4", "--whiten_features"])
def test_what_is_made_of_features_is_refused_without_any(capsys, flag):
    without = ("--no-use_language_encoder", "--no-use_img_encoder")
    assert f"{flag.split('=')[0]} needs an encoder or --features" in refusal(capsys, flag, *without)


def test_a_ring_without_width_is_refused_with_both_of_its_radii(capsys):
    message = refusal(capsys, "--lru_r_min=0.3", "--lru_r_max=0.2")
    assert "--lru_r_min 0.3" in message
    assert "--lru_r_max 0.2" in message


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_epoch_may_be_picked_by_any_metric_at_any_cut_off(metric):
    assert parsed(f"--best_metric={metric}@7", "--metric_ks=3,7")[0].best_metric == f"{metric}@7"
    assert parsed(f"--best_metric={metric}@7", "--metric_ks=3,9")[0].metric_ks == (3, 9)  # validated at 7 all the same


@pytest.mark.parametrize("flag", ["--lru_dropout", "--lru_attn_dropout"])
def test_no_dropout_is_a_good_dropout(flag):
    assert getattr(parsed(f"{flag}=0")[0], flag[2:]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lru_droput=0.3"], "unknown flag --lru_droput; did you mean --lru_dropout?"),
        (["--lru_droput", "0.3"], "unknown flag --lru_droput; did you mean --lru_dropout?"),
        (["--seed=1", "--lerning_rate=1"], "unknown flag --lerning_rate"),
        (["--no-use_img_encodr"], "unknown flag --no-use_img_encodr; did you mean --no-use_img_encoder?"),
        (["--lru_drop=0.3"], "unknown flag --lru_drop; did you mean --lru_dropout?"),  # abbreviations may change sense
        (["--lr_rate=1"], "unknown flag --lr_rate; did you mean --lr?"),
        (["--zzz"], "unknown flag --zzz; --help lists them all"),
        (["beauty"], "unknown flag beauty"),
    ],
)
def test_an_unknown_flag_fails_with_the_nearest_known_one(capsys, argv, message):
    assert message in refusal(capsys, *argv)


def test_an_input_error_ends_a_script_with_one_line_on_stderr(capsys):
    def main():
        raise InputError("no such thing; give another")

    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.err, captured.out) == (2, "error: no such thing; give another\n", "")


def test_ctrl_c_ends_a_script_with_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert (stopped.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0


@pytest.mark.parametrize(
    ("language", "image", "branch"),
    [(True, True, "both"), (True, False, "language"), (False, True, "image"), (False, False, "id")],
)
def test_the_branch_says_what_items_are_described_by(language, image, branch):
    assert Config(use_language_encoder=language, use_img_encoder=image).branch == branch


# ----------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", FIELDS)
def test_help_lists_a_flag_once_with_its_default(capsys, name):
    lines = re.split(r"\n(?=  -)", help_text(capsys))  # one string per flag
    [entry] = [" ".join(line.split()) for line in lines if re.match(rf"  --{name}\b", line)]
    default = FIELDS[name].default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    assert FIELDS[name].metadata["help"] in entry
    assert f"(default: {shown or 'empty'})" in entry


def test_help_groups_the_flags(capsys):
    sections = re.split(r"^(\w[\w ]*):\n", help_text(capsys), flags=re.MULTILINE)
    group_of = {
        flag: group
        for group, body in zip(sections[1::2], sections[2::2], strict=True)
        for flag in re.findall(r"^  --(\w+)", body, flags=re.MULTILINE)
    }
    assert group_of.keys() == FIELDS.keys()
    first_and_last = {
        "data": ("dataset_code", "data_root"),
        "feature": ("use_language_encoder", "encoder_workers"),
        "model": ("model_code", "lru_r_max"),
        "training": ("seed", "early_stopping_patience"),
        "beyond the paper": ("whiten_features", "ema_decay"),
        "evaluation": ("val_batch_size", "best_metric"),
        "run": ("preset", "use_wandb"),
    }
    expected = {flag: group for group, flags in first_and_last.items() for flag in flags}
    assert expected.items() <= group_of.items()


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if f.metadata["choices"]])
def test_help_shows_the_choices(capsys, name):
    assert f"--{name} {{{','.join(FIELDS[name].metadata['choices'])}}}" in help_text(capsys)


@pytest.mark.parametrize(("name", "preset"), (PRESETS | MODEL_PRESETS | {"plus": NAMED_PRESETS["plus"]}).items())
def test_help_shows_what_a_preset_sets(capsys, name, preset):
    [line] = re.findall(rf"^  {name}: (.*(?:\n    .*)*)", help_text(capsys), flags=re.MULTILINE)
    assert [pair.split()[0] for pair in " ".join(line.split()).split(", ")] == list(preset)


SCRIPTS = ("train.py", "eval.py")
MODULES = ("datasets.prepare", "experiments.run", "experiments.report", "experiments.cold_items", "serving.export",
           "serving.recommend", "media.draw", "benchmarks.deploy")  # fmt: skip


@pytest.mark.parametrize("name", [*SCRIPTS, *MODULES])
def test_help_does_not_wait_for_heavy_libraries(name):
    run = "run_path" if name in SCRIPTS else "run_module"
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}', '--help']\n"
        "try:\n"
        f"    runpy.{run}('{name}', run_name='__main__')\n"
        "except SystemExit as stopped:\n"
        "    heavy = {'torch', 'transformers', 'open_clip', 'matplotlib', 'wandb', 'pandas'} & sys.modules.keys()\n"
        "    sys.exit(f'{stopped.code}, imported {heavy}' if stopped.code or heavy else 0)\n"
        "sys.exit('--help went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


# ---------------------------------------------------------------------------------------------------------------- saved


def test_settings_come_back_from_json_as_they_were():
    flags = ("--mrl_hidden_sizes=4,8", "--item_attributes=title", "--lr=3e-4", "--preset=plus", "--distill=0.2")
    config, _ = parsed("--dataset_code=sports", *flags)
    assert read_settings(json.loads(json.dumps(vars(config)))) == config


def test_a_run_made_before_a_setting_existed_has_the_value_of_its_time():
    later = ("preset", "distill", "embedding_dropout", "warmup_from_zero", "mrl_loss")
    old = {name: value for name, value in vars(Config()).items() if name not in later}
    of_its_time = {"embedding_dropout": False, "warmup_from_zero": False, "mrl_loss": "mean"}
    assert read_settings(old) == dataclasses.replace(Config(), **of_its_time)
    assert read_settings(old | {"post_norm": True}).embedding_dropout
    assert read_settings(vars(Config())) == Config()


def test_the_released_preset_trains_what_the_released_readme_command_does():
    config = parsed("--preset=released", "--dataset_code=sports")[0]
    assert (config.lru_num_blocks, config.mrl_loss, config.validate_untrained) == (1, "mean", True)
    assert (config.lru_dropout, config.lru_attn_dropout, config.lru_r_min, config.lru_r_max) == (0.6, 0.6, 0.0, 0.1)
    assert config.embedding_dropout and config.warmup_from_zero and config.lr == 1e-4


def test_unknown_saved_settings_are_refused_by_name():
    with pytest.raises(InputError, match=r"momentum.*another version"):
        read_settings({"seed": 1, "momentum": 0.9})


@pytest.mark.parametrize("name", ["lr", "mrl_hidden_sizes", "use_img_encoder", "best_metric", "num_epochs"])
def test_a_saved_setting_of_another_type_is_refused_by_name(name):
    with pytest.raises(InputError, match=name):
        read_settings({name: {"use_img_encoder": "false", "best_metric": 10}.get(name, "many")})


def test_saved_values_are_checked_like_flags():
    with pytest.raises(InputError, match="--lru_dropout 2"):
        read_settings({"lru_dropout": 2.0})


def test_only_settings_that_do_not_change_what_is_trained_are_runtime_settings():
    assert {name for name in FIELDS if is_runtime(Config, name)} == {
        *("data_root", "runs_root", "device", "use_wandb"),  # where
        *(
            "encoder_batch_size",
            "encoder_workers",
            "val_batch_size",
            "test_batch_size",
            "metric_ks",
            "test",
            "save_every_minutes",
        ),  # how it is measured
    }


@pytest.mark.parametrize(
    ("argv", "value"),
    [("", False), ("--alone", True), ("--alone=true", True), ("--alone=false", False), ("--alone --no-alone", False)],
)
def test_a_switch_of_a_script_is_spelled_as_a_setting_is(argv, value):
    parser = Parser()
    add_switch(parser, "alone", "help")
    assert parser.parse_args(argv.split()).alone is value


@pytest.mark.parametrize("word", ["--alon", "--alone_", "--no-alon"])
def test_an_abbreviation_is_refused_and_the_flag_named(capsys, word):
    parser = Parser()
    add_switch(parser, "alone", "help")
    with pytest.raises(SystemExit):
        parser.parse_args([word])
    assert f"unknown flag {word}; did you mean --" in capsys.readouterr().err


def test_a_process_of_its_own_says_its_error_at_once_whatever_its_rank(monkeypatch, capsys):
    def fails():
        raise InputError("the reason")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits for others"))
    with pytest.raises(SystemExit) as ended:
        run_cli(fails)
    assert (ended.value.code, capsys.readouterr().err) == (2, "error: the reason\n")
