"""Settings: which value wins, what is refused and how, what is saved, and that each has an effect."""

import ast
import dataclasses
import errno
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import train
from common.cli import Parser, add_switch, parse_args, run_cli
from common.errors import InputError
from common.files import read_json, read_text, remove_leftovers, replacing, write_json, write_text
from common.settings import is_runtime
from config import ALL_PRESETS, EXTENSIONS, METRICS, MODEL_PRESETS, NAMED_PRESETS, PRESETS, SECTIONS, Config, resolve
from tests.prepared import write_prepared, write_tiny_bert
from trainer.runs import read_settings, run_label

REPOSITORY = Path(__file__).parent.parent
FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def parsed(*argv: str) -> tuple[Config, dict[str, str]]:
    flags, _ = parse_args(argv, "a test", SECTIONS)
    return resolve(flags)


def refusal(capsys, *argv: str) -> str:
    """Return the last line on stderr of a command line that is refused with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: parsed(*argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def help_text(capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"], "a test", SECTIONS, presets=ALL_PRESETS)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "name", "value", "source"),
    [
        ("--dataset_code=beauty", "lr", 1e-4, "default"),
        ("--dataset_code=beauty", "lru_dropout", 0.6, "preset"),
        ("--lru_dropout=0.2 --dataset_code=beauty", "lru_dropout", 0.2, "flag"),
        ("--lru_dropout=0.5 --dataset_code=beauty", "lru_dropout", 0.5, "flag"),  # repeats the default
        ("", "dataset_code", "demo", "default"),
        ("", "language_encoder", "lexical", "preset"),  # the demo needs no download
        ("--model_code=sasrec", "img_encoder", "pixel", "preset"),
        ("--model_code=lrurec --dataset_code=clothing", "lru_r_max", 0.99, "preset"),  # the model's, not clothing's
        ("--model_code=lrurec --dataset_code=clothing --lru_r_max=0.9", "lru_r_max", 0.9, "flag"),
        ("--preset=plus --dataset_code=beauty", "preset", "plus", "flag"),
        ("--preset=plus --dataset_code=beauty --distill=0.1", "distill", 0.1, "flag"),
    ],
)
def test_a_flag_wins_over_presets_and_a_preset_over_the_default(argv, name, value, source):
    config, sources = parsed(*argv.split())
    assert (getattr(config, name), sources[name]) == (value, source)


def test_every_setting_has_a_source_and_only_given_flags_are_flags():
    config, sources = parsed("--seed=7", "--no-use_img_encoder", "--dataset_code=my_shop")
    assert {name for name, source in sources.items() if source == "flag"} == {"dataset_code", "use_img_encoder", "seed"}
    assert sources.keys() == FIELDS.keys() and set(sources.values()) == {"flag", "default"}
    assert config == dataclasses.replace(Config(), dataset_code="my_shop", seed=7, use_img_encoder=False)


@pytest.mark.parametrize(("name", "r_min"), [("beauty", 0.0), ("clothing", 0.1), ("sports", 0.1), ("toys", 0.0)])
def test_the_ring_of_a_dataset_is_the_papers(name, r_min):
    config, _ = parsed(f"--dataset_code={name}")
    assert (config.lru_r_min, config.lru_r_max) == (r_min, pytest.approx(r_min + 0.1))
    for extension in EXTENSIONS:
        assert getattr(config, extension) == getattr(Config, extension), extension
    assert parsed("--preset=paper", f"--dataset_code={name}")[0] == config


@pytest.mark.parametrize("name", [*PRESETS, *MODEL_PRESETS, "plus", "released"])
@pytest.mark.parametrize("dataset", ["beauty", "my_shop"])
def test_a_preset_sets_values_of_their_types_on_any_dataset(name, dataset):
    flag = "dataset_code" if name in PRESETS else "model_code" if name in MODEL_PRESETS else "preset"
    config, sources = resolve({"dataset_code": dataset, flag: name})
    expected = ALL_PRESETS[name] | (ALL_PRESETS["plus on demo"] if (name, dataset) == ("plus", "demo") else {})
    for setting, value in expected.items():
        assert type(value) is type(FIELDS[setting].default), setting
        assert (getattr(config, setting), sources[setting]) == (value, "preset")
    if flag == "model_code":
        assert (config.branch, run_label(config), len(config.mrl_hidden_sizes)) == ("id", name, 1)


@pytest.mark.parametrize("name", ["use_img_encoder", "use_wandb"])  # one that is on by default, one that is off
@pytest.mark.parametrize("spelling", ["--{}", "--{}=true", "--{}=True", "--{} true"])
def test_booleans_are_read_in_every_common_spelling(name, spelling):
    negative = {"--{}": "--no-{}", "--{}=true": "--{}=false", "--{}=True": "--{}=0", "--{} true": "--{} False"}
    for written, value in ((spelling, True), (negative[spelling], False)):
        config, sources = parsed(*written.format(name).split())
        assert (getattr(config, name), sources[name]) == (value, "flag")


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--no_use_img_encoder"], "use_img_encoder", False),
        (["--use_wandb", "--seed=3"], "seed", 3),  # a boolean does not take the next flag
        (["--mrl_hidden_sizes=8,16,32"], "mrl_hidden_sizes", (8, 16, 32)),
        (["--mrl_hidden_sizes", " 8, 16 , 32,"], "mrl_hidden_sizes", (8, 16, 32)),
        (["--item_attributes=brand,title"], "item_attributes", ("brand", "title")),
        (["--item_attributes=", "--no-use_language_encoder"], "item_attributes", ()),
        (["--lr=3e-4"], "lr", 3e-4),
        (["--lru_attn_dropout=0"], "lru_attn_dropout", 0),
        *[([f"--best_metric={metric}@7", "--metric_ks=3,9"], "best_metric", f"{metric}@7") for metric in METRICS],
        (["--best_metric=NDCG@7", "--metric_ks=3,9"], "metric_ks", (3, 9)),
    ],
)
def test_a_value_is_read_as_it_is_written(argv, name, value):
    assert getattr(parsed(*argv)[0], name) == value


def test_a_scripts_own_arguments_are_returned_apart_from_the_settings():
    own = lambda parser: parser.add_argument("--resume")  # noqa: E731
    flags, arguments = parse_args(["--resume=latest", "--seed=1"], "a test", SECTIONS, own)
    assert (flags, vars(arguments)) == ({"seed": 1}, {"resume": "latest"})


@pytest.mark.parametrize(
    ("flag", "values"),
    {
        "dataset_code": ["", "..", "../beauty", "photos\\beauty"],
        "run_name": ["../elsewhere"],
        "mrl_hidden_sizes": ["16,8", "8,8", "0,8", "-8,8", "", "8,sixteen", "8,16.5"],
        "metric_ks": ["10,5", "", "ten"],
        "lru_dropout": ["1.0", "-0.1", "nan", "half"],
        "lru_r_min": ["-0.1", "0.1", "nan"],  # .1 is as large as r_max
        "lru_r_max": ["1.5"],
        "num_epochs": ["0", "1.5"],
        "train_batch_size": ["-1"],
        "lr": ["0.0", "nan", "inf", "fast"],
        "weight_decay": ["-0.01"],
        "seed": ["-1", str(2**64)],
        "best_metric": ["NDCG@0", "NDCG@010", "NDCG@ten", "HR@10", "NDCG", ""],
        "optimizer": ["sgd"],
        "preset": ["minus"],
        "item_attributes": [""],
        "distill": ["1.1", "-0.5", "nan"],
        "model_code": ["bert4rec"],
        "use_img_encoder": ["maybe"],
        "enable_lr_schedule": [""],
    }.items(),
)
def test_a_bad_value_is_refused_by_its_flag_and_value(capsys, flag, values):
    for value in values:
        message = refusal(capsys, f"--{flag}={value}")
        assert "error" in message and f"--{flag}" in message
        assert value in message.replace("\\\\", "\\")


def test_a_whole_number_beyond_floats_is_refused_where_a_share_is_expected():
    with pytest.raises(InputError, match=r"--distill 1000.* must be at least 0 and at most 1"):
        Config(distill=10**400)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model_code=sasrec --use_img_encoder", "--use_img_encoder: sasrec uses item ids only"),
        ("--model_code=lrurec --mrl_hidden_sizes=8,16", '--mrl_hidden_sizes "8,16": lrurec takes one size'),
        ("--model_code=popularity --mrl_hidden_sizes=64", "--mrl_hidden_sizes 64: popularity has no size"),
        ("--model_code=lrurec --preset=plus", "--preset plus needs --model_code fmrlrec, not lrurec"),
        ("--model_code=sasrec --num_heads=3", "--num_heads 3 does not divide --mrl_hidden_sizes 64"),
        ("--item_embedding=4 --no-use_language_encoder --no-use_img_encoder", "--item_embedding needs an encoder or"),
        ("--whiten_features --no-use_language_encoder --no-use_img_encoder", "--whiten_features needs an encoder or"),
        ("--lru_r_min=0.3 --lru_r_max=0.2", "--lru_r_min 0.3 --lru_r_max 0.2"),
        ("--teachers=a,b", "--teachers needs --distill, their share in the targets"),
        ("--lru_droput=0.3", "unknown flag --lru_droput; did you mean --lru_dropout?"),
        ("--no-use_img_encodr", "unknown flag --no-use_img_encodr; did you mean --no-use_img_encoder?"),
        ("--lru_drop=0.3", "unknown flag --lru_drop; did you mean --lru_dropout?"),  # abbreviations may change sense
        ("--zzz", "unknown flag --zzz; --help lists them all"),
        ("beauty", "unknown flag beauty"),
    ],
)
def test_flags_that_contradict_or_are_unknown_are_refused(capsys, argv, message):
    assert message in refusal(capsys, *argv.split())


@pytest.mark.parametrize(
    ("processes", "error", "status", "waited", "printed"),
    [
        ("1", InputError("no such thing"), 2, [], "error: no such thing\n"),
        ("1", KeyboardInterrupt(), 130, [], "interrupted\n"),
        ("2", InputError("bad"), 2, [10], "error: bad\n"),  # rank 1 waits for the message of rank 0
        ("2", KeyboardInterrupt(), 130, [], ""),
    ],
)
def test_a_script_ends_with_one_line_on_stderr(monkeypatch, capsys, processes, error, status, waited, printed):
    def main():
        raise error

    for name, value in {"WORLD_SIZE": processes, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    sleeps = []
    monkeypatch.setattr("time.sleep", sleeps.append)
    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert (stopped.value.code, sleeps, *capsys.readouterr()) == (status, waited, "", printed)


def test_a_switch_of_a_script_is_spelled_as_a_setting_is(capsys):
    parser = Parser()
    add_switch(parser, "alone", "help")
    found = [parser.parse_args(argv.split()).alone for argv in ("", "--alone --no-alone", "--alone", "--alone=true")]
    assert found == [False, False, True, True]
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-alon"])
    assert "unknown flag --no-alon; did you mean --" in capsys.readouterr().err


def test_help_lists_every_flag_once_with_its_default_and_choices(help_text):
    entries = [" ".join(part.split()) for part in re.split(r"\n(?=  -)", help_text)]
    for name, f in FIELDS.items():
        [entry] = [entry for entry in entries if re.match(rf"--{name}\b", entry)]
        shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        assert f.metadata["help"] in entry
        assert f"(default: {shown or 'empty'})" in entry
        if choices := f.metadata["choices"]:
            assert f"--{name} {{{','.join(choices)}}}" in entry


def test_help_groups_the_flags_and_shows_the_settings_of_every_preset(help_text):
    sections = re.split(r"^(\w[\w ]*):\n", help_text, flags=re.MULTILINE)
    groups = {
        title: re.findall(r"^  --(\w+)", body, flags=re.MULTILINE)
        for title, body in zip(sections[1::2], sections[2::2], strict=True)
    }
    assert {flag for flags in groups.values() for flag in flags} == FIELDS.keys()
    assert groups["beyond the paper"] == list(EXTENSIONS)
    assert {"data", "feature", "model", "training", "evaluation", "run"} <= groups.keys()
    for name, preset in (PRESETS | MODEL_PRESETS | {"plus": NAMED_PRESETS["plus"]}).items():
        [line] = re.findall(rf"^  {name}: (.*(?:\n    .*)*)", help_text, flags=re.MULTILINE)
        assert [pair.split()[0] for pair in " ".join(line.split()).split(", ")] == list(preset)


SCRIPTS = ("train.py", "eval.py")
MODULES = ("datasets.prepare", "experiments.run", "experiments.report", "experiments.cold_items", "experiments.cut",
           "experiments.look", "experiments.tune", "serving.export", "serving.recommend", "media.draw",
           "benchmarks.deploy", "benchmarks.pictures")  # fmt: skip


def test_help_does_not_wait_for_heavy_libraries():
    code = f"""
import runpy, sys
for name in {(*SCRIPTS, *MODULES)!r}:
    sys.argv = [name, '--help']
    try:
        (runpy.run_path if '.py' in name else runpy.run_module)(name, run_name='__main__')
    except SystemExit as stopped:
        assert not stopped.code, name
    heavy = {{'torch', 'transformers', 'open_clip', 'matplotlib', 'wandb', 'pandas'}} & sys.modules.keys()
    assert not heavy, f'{{name}} imports {{heavy}}'
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--help") >= len(SCRIPTS) + len(MODULES)


def test_settings_come_back_from_json_as_they_were():
    flags = ("--mrl_hidden_sizes=4,8", "--item_attributes=title", "--lr=3e-4", "--preset=plus", "--distill=0.2")
    config, _ = parsed("--dataset_code=sports", *flags)
    assert read_settings(json.loads(json.dumps(vars(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


def test_a_run_made_before_a_setting_existed_has_the_value_of_its_time():
    later = ("preset", "distill", "embedding_dropout", "warmup_from_zero", "mrl_loss")
    old = {name: value for name, value in vars(Config()).items() if name not in later}
    of_its_time = {"embedding_dropout": False, "warmup_from_zero": False, "mrl_loss": "mean"}
    assert read_settings(old) == dataclasses.replace(Config(), **of_its_time)
    assert read_settings(old | {"post_norm": True}).embedding_dropout
    assert read_settings(vars(Config())) == Config()


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ({"momentum": 0.9}, r"momentum.*another version"),
        ({"lru_dropout": 2.0}, "--lru_dropout 2"),
        *[({name: "many"}, name) for name in ("lr", "mrl_hidden_sizes", "num_epochs")],
        ({"use_img_encoder": "false"}, "use_img_encoder"),
        ({"best_metric": 10}, "best_metric"),
    ],
)
def test_a_bad_saved_setting_is_refused_by_name(saved, problem):
    with pytest.raises(InputError, match=problem):
        read_settings({"seed": 1} | saved)


BASE = {
    "dataset_code": "tiny", "language_encoder": "lexical", "img_encoder": "pixel", "mrl_hidden_sizes": (2, 4),
    "num_epochs": 2, "lru_num_blocks": 1, "lr": 0.01, "warmup_steps": 1, "train_batch_size": 8, "device": "cpu",
    "test": False,
}  # fmt: skip
CHANGED = {
    "dataset_code": "other", "use_language_encoder": False, "item_attributes": ("brand",), "use_img_encoder": False,
    "language_encoder": "bert", "model_code": "sasrec", "mrl_hidden_sizes": (4, 8), "lru_max_len": 2,
    "lru_num_blocks": 2, "lru_dropout": 0.1, "lru_attn_dropout": 0.1, "lru_use_bias": False, "lru_r_min": 0.05,
    "lru_r_max": 0.9, "seed": 9, "train_batch_size": 12, "num_epochs": 1, "epoch_steps": 1, "precision": "bf16",
    "optimizer": "adam", "lr": 0.02, "weight_decay": 0.3, "adam_epsilon": 1e-3, "max_grad_norm": 1e-4,
    "enable_lr_schedule": False, "warmup_steps": 3, "mrl_loss": "mean", "embedding_dropout": False,
    "warmup_from_zero": False,
    "loss": "plain", "first_item_label": False, "num_negatives": 7, "whiten_features": True, "item_embedding": 2,
    "post_norm": True, "dropout_from": 2, "logit_scale": True, "distill": 0.5, "ema_decay": 0.5, "preset": "plus",
    "history_bias": True,
}  # fmt: skip
# Do not change the weights of a short run: chosen, named, or tested elsewhere.
ELSEWHERE = {
    "img_encoder", "encoder_precision", "num_heads", "early_stopping", "early_stopping_patience", "val_mask_history",
    "best_metric", "run_name", "validate_untrained", "features", "init_from", "item_embedding_updates",
    "item_embedding_gate", "teachers",
}  # fmt: skip
RUNTIME = {
    "data_root", "features_root", "runs_root", "device", "use_wandb", "use_tensorboard", "encoder_batch_size",
    "encoder_workers", "val_batch_size", "test_batch_size", "metric_ks", "test", "save_every_minutes",
}  # fmt: skip


def test_every_setting_is_read_and_is_runtime_or_changes_the_training():
    rooms = ("config.py", "common", "datasets", "dataloader", "model", "trainer", "train.py", "eval.py")
    paths = [path for room in rooms for path in REPOSITORY.glob(room if ".py" in room else f"{room}/**/*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    assert FIELDS.keys() <= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {name for name in FIELDS if is_runtime(Config, name)} == RUNTIME
    assert CHANGED.keys() | ELSEWHERE | RUNTIME == FIELDS.keys()


def weights(**settings) -> str:
    """Return the digest of the weights that these settings train."""
    text = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in (BASE | settings).items()}
    run = train.main([f"--{name}={value}" for name, value in text.items()])
    return hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def base_weights(tmp_path_factory):
    """Change to a folder with two datasets and a text encoder; return the weights of the base settings there."""
    folder = tmp_path_factory.mktemp("settings")
    for name, seed in (("tiny", 0), ("other", 1)):
        write_prepared(folder / "data", name, users=20, items=20, pictures=True, seed=seed)
    write_tiny_bert(folder / "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = weights()
        assert weights() == found
        yield found


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_changes_what_is_trained(base_weights, name):
    changed = {name: CHANGED[name]}
    if name == "model_code":
        changed |= {"use_language_encoder": False, "use_img_encoder": False, "mrl_hidden_sizes": (4,)}
    if name == "language_encoder":
        changed["language_encoder"] = str(Path("bert").resolve())
    assert weights(**changed) != base_weights


# ---------------------------------------------------------------------------------------------------------------- files
# Write files whole or not at all, and name files that cannot be read.

HINT = "make it again with the press"


@pytest.fixture
def old(tmp_path) -> Path:
    """Return an existing file."""
    path = tmp_path / "folder" / "[numbers].txt"
    write_text(path, "old")
    return path


def assert_untouched(old: Path) -> None:
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == [old.name]  # noqa: PTH208 (hidden files count too)


@pytest.mark.parametrize("value", [{"name": "Größe", "sizes": [8, 16]}, {"\ud800": "ν"}])
def test_a_written_file_reads_back(tmp_path, value):
    path = tmp_path / "new" / "a.json"
    write_json(path, value)
    assert read_json(path, HINT) == value
    assert path.stat().st_mode & 0o777 == 0o644
    path.with_suffix(".gz").write_bytes(gzip.compress("naïve".encode()))
    assert read_text(path.with_suffix(".gz"), HINT) == "naïve"
    path.write_bytes(b'\xef\xbb\xbf{"a": [[1]]}')
    assert read_json(path, HINT) == {"a": [[1]]}


@pytest.mark.parametrize("error", [ValueError("bad numbers"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_its_error_unchanged(old, error):
    with pytest.raises(type(error)) as raised, replacing(old) as temporary:
        temporary.write_text("half")
        assert old.read_text() == "old"
        raise error
    assert raised.value is error
    assert_untouched(old)


@pytest.mark.parametrize("step", [(Path, "write_text"), (os, "fsync"), (Path, "replace")], ids=lambda step: step[1])
def test_a_full_disk_leaves_the_old_file(old, monkeypatch, step):
    def full(*_, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"numbers\].txt: No space .*; free space"),
    ):
        patch.setattr(*step, full)
        write_text(old, "new")
    assert_untouched(old)
    with pytest.raises(InputError, match=r"cannot write .*numbers\].txt/below\.txt"):
        write_text(old / "below.txt", "text")


def test_a_killed_writer_leaves_the_old_file_and_a_leftover_that_the_next_one_removes(old):
    write_half = (
        "import os, sys; from pathlib import Path; from common.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", write_half, str(old)], cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == -signal.SIGKILL
    [left] = set(old.parent.iterdir()) - {old}
    assert (old.read_text(), left.read_text()) == ("old", "half")
    other = left.with_name(left.name.replace(old.name, "other"))
    unknown = old.with_name(f".{old.name}.abc.tmp")  # of an earlier version
    with replacing(old) as at_work:
        for path in (other, unknown):
            path.touch()
        remove_leftovers(old.parent, old.name)
        assert set(old.parent.iterdir()) == {old, at_work, other, unknown}
        os.utime(unknown, (1, 1))
        remove_leftovers(old.parent, old.name)
        assert not unknown.exists()


def test_concurrent_writers_leave_the_whole_file_of_one(tmp_path):
    texts = [letter * 200_000 for letter in "abcdef"]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "a.txt", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.txt").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.txt", None, "does not exist"),
        ("blank.txt", b" \n\n", "is empty"),
        ("no-bytes.gz", b"", "is empty"),
        ("latin1.gz", gzip.compress("naïve".encode("latin-1"), mtime=0), "is not UTF-8 (byte 2)"),
        ("truncated.gz", gzip.compress(b"text " * 100, mtime=0)[:-10], "cannot be read"),
        ("plain.gz", b"plain text, not gzipped", "cannot be read"),
        ("damaged.gz", gzip.compress(bytes(range(256)), mtime=0)[:40] + b"\0" * 300, "cannot be read"),
        ("", None, "cannot be read"),  # a folder
        ("literal.json", b"{'a': 1}", "is not JSON ("),
        ("nested.json", b"[" * 100_000, "is not JSON (nested more than 64 deep)"),
        ("deep.json", b'{"a":' * 65 + b"1" + b"}" * 65, "is not JSON (nested more than 64 deep)"),
        ("long.json", b'{"a": -%s}' % (b"1" * 5000), "is not JSON (Exceeds the limit (4300 digits)"),
        ("bomb.gz", gzip.compress(bytes(1 << 20), mtime=0), "has more than 100,000 bytes"),
        ("x" * 256, None, "cannot be read"),
        ("a\0b", None, "cannot be read"),
        ("\ud800\udfff.json", None, "cannot be read"),
        ("list.json", b"[1, null]", "is not a JSON object"),
        ("fifo.json", os.mkfifo, "cannot be read"),  # does not wait for a writer
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        (read_json if path.suffix == ".json" else read_text)(path, HINT, limit=100_000)
    assert str(raised.value).startswith(f"{path} {problem}")
    assert str(raised.value).endswith(f"; {HINT}")
