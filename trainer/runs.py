"""Run folders: make, read and find them, and the schemas of their files, <runs_root>/<dataset_code>/<time>-<run_name>/:

config.json              settings and the source of each
env.json                 versions, device, commit, command line, data and features; also of every --resume
log.jsonl                one line per epoch
items.json.gz            ids and titles of the items (trainer/checkpoint.py)
best.safetensors         weights of the best epoch by validation
table.safetensors        the item table of these weights, if it is made of features: an export needs no dataset
last.pt                  state for --resume, written after epochs and every save_every_minutes within one (popularity
                         and itemknn have none: they count again)
test_metrics.json        test metrics of the largest size
test_mrl_metrics.json    test metrics of every size
test_list_metrics.json   metrics of the recommended lists: eval.py --list_metrics
test_ranks.npz           every user's rank up to the last cut-off, at every size
newer_data/<digest>/     tests on other data: eval.py --on_newer_data
…_history_masked.*       the same without the history among the candidates: eval.py --mask_history
*.png                    metrics against size; training.png: loss and validation against epochs
deploy.json, deploy.png  serving cost of every size: benchmarks/deploy.py
cold_items.json          metrics on items unseen in training: experiments/cold_items.py
cut.json, cut.png        metrics of item tables that were cut afterwards: experiments/cut.py
"""

import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from common.errors import InputError
from common.files import (
    ARRAY_ERRORS,
    Count,
    Number,
    Positive,
    cannot_write,
    check_schema,
    read_json,
    read_json_lines,
    remove_leftovers,
    replacing,
    sha256,
    write_json,
)
from common.settings import check_types, format_value, is_runtime
from config import COUNTING, EXTENSIONS, Config, named_preset
from datasets.catalog import LEAVE_ONE_OUT

REPOSITORY = Path(__file__).parent.parent
CONFIG, ENVIRONMENT, LOG = "config.json", "env.json", "log.jsonl"
WEIGHTS, STATE = "best.safetensors", "last.pt"
ITEMS, TABLE = "items.json.gz", "table.safetensors"
LARGEST, EVERY_SIZE, USER_RANKS = "test_metrics.json", "test_mrl_metrics.json", "test_ranks.npz"
LIST_METRICS_FILE = "test_list_metrics.json"
DEPLOYMENT, DEPLOYMENT_PICTURE = "deploy.json", "deploy.png"
TRAINING_PICTURE = "training.png"
COLD_ITEMS = "cold_items.json"
CUT, CUT_PICTURE = "cut.json", "cut.png"
RUN_HINT = "give a run's folder, as train.py prints it"
TIME = "%Y%m%d-%H%M%S"  # format of the time in a run's name


def newer_data_folder(run: Path, data: str) -> Path:
    """Return the folder for tests of a run on another dataset with this digest, or the run if it was trained on it."""
    return run if read_environment(run).get("data") == data else run / "newer_data" / data[:12]


def result_file(name: str, mask_history: bool) -> str:
    """Return a result file's name, which differs for tests with masked history."""
    stem, _, suffix = name.partition(".")
    return f"{stem}_history_masked.{suffix}" if mask_history else name


def read_settings(values: dict[str, Any]) -> Config:
    """Return the settings in a run's config.json.

    A run made before a setting existed has the value that the code had then, not today's default.
    """
    earlier = {"embedding_dropout": values.get("post_norm", False), "warmup_from_zero": False, "mrl_loss": "mean"}
    return Config(**check_types(Config, earlier | values, "config.json"))


def ineffective_settings(config: Config) -> set[str]:
    """Return the settings without an effect on what is trained, given the others."""
    if config.model_code in COUNTING:
        used = {"dataset_code", "model_code", "run_name", "best_metric", "val_mask_history"}
        return {f.name for f in fields(Config) if not f.metadata["runtime"] and f.name not in used}
    return {f.name for f in fields(Config) if f.metadata["used_if"] and not f.metadata["used_if"](config)}


def run_label(config: Config) -> str:
    """Return a short name: the modalities of an fmrlrec run, or the baseline's name."""
    return config.branch if config.model_code == "fmrlrec" else config.model_code


def describe_model(config: Config) -> str:
    """Return the modalities in words, or the baseline's name, for titles."""
    if config.model_code != "fmrlrec":
        return config.model_code
    words = {"both": "text and pictures", "language": "text", "image": "pictures", "id": "a learned table"}
    return f"items by {words.get(config.branch, config.branch)}"


def create_run(
    config: Config, sources: dict[str, str], device: str, data: str, split: str, features: list[str]
) -> Path:
    """Create a new run folder with config.json and env.json.

    data: the dataset's digest. split: its split's name. features: the names of the feature files. Raises InputError if
    it cannot be created.
    """
    name = config.run_name or f"{run_label(config)}-{config.mrl_hidden_sizes[-1]}"
    parent = Path(config.runs_root) / config.dataset_code
    stem = f"{time.strftime(TIME)}-{name}"
    for attempt in range(1, 1000):
        run = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(
                f"cannot create the run folder {run}: {error.strerror}; give another --runs_root"
            ) from None
        break
    facts: dict[str, Any] = {"data": data, "features": features}
    if split != LEAVE_ONE_OUT:
        facts["split"] = split
    if config.init_from:
        facts["init_from"] = identity(Path(config.init_from))
    if config.teachers:
        facts["teachers"] = [identity(Path(teacher)) for teacher in config.teachers]
    write_json(run / ENVIRONMENT, environment(device) | facts)
    write_json(run / CONFIG, {"settings": vars(config), "sources": sources})
    return run


def identity(run: Path) -> dict[str, str]:
    """Return a run's name and the digest of its best weights, for the runs that learn from it."""
    return {"run": run.resolve().name, "weights": sha256(run / WEIGHTS)}


def read_config(run: Path) -> tuple[Config, dict[str, str]]:
    """Return a run's settings and the source of each.

    Raises InputError if the folder is not a run.
    """
    saved = check_schema(read_json(run / CONFIG, RUN_HINT), SavedSettings, run / CONFIG, RUN_HINT)
    try:
        return read_settings(saved["settings"]), saved.get("sources", {})
    except InputError as error:
        raise InputError(f"{run}: {error}; use the commit in its {ENVIRONMENT}, or train again") from None


def note_resumed(run: Path, device: str) -> None:
    """Add the current environment to a run's env.json."""
    path = run / ENVIRONMENT
    saved = read_environment(run)
    write_json(path, saved | {"resumed": [*saved.get("resumed", []), environment(device)]})


def read_environment(run: Path) -> dict[str, Any]:
    """Return a run's env.json. Raises InputError if it is missing or invalid."""
    return check_schema(read_json(run / ENVIRONMENT, RUN_HINT), Environment, run / ENVIRONMENT, RUN_HINT)


def read_metrics(path: Path, hint: str) -> dict[str, dict[str, float]]:
    """Return size -> metrics of a result file; hint and errors as in `read_json`."""
    return check_schema(read_json(path, hint), MetricsBySize, path, hint)


def features_of(run: Path) -> list[str]:
    """Return the feature files that a run was trained on, if recorded."""
    return read_environment(run).get("features", [])


def check_data(run: Path, data: str) -> None:
    """Raise InputError if a run was trained on a dataset with another digest."""
    saved = read_environment(run)
    if saved.get("data", data) != data:
        raise InputError(
            f"the dataset (digest {data}) is not the one that {run} was trained on ({saved['data']}); give its "
            f"--data_root, or test the run on this one: eval.py --run {run} --on_newer_data, or train it further on "
            f"this one: train.py --init_from {run}"
        )


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run's lock.

    Raises InputError if another process trains the run, or if it is not writable.
    """
    try:
        file = (run / CONFIG).open("rb+")  # NFS locks only files opened for writing
    except OSError as error:
        raise cannot_write(run / CONFIG, error) from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is training {run}; wait for it, or stop it") from None
        except (ImportError, OSError):  # this system or file system has no locks
            pass
        else:  # no other process trains the run, so these are of one that was killed
            for name in (CONFIG, ENVIRONMENT, LOG, WEIGHTS, STATE, ITEMS, TABLE):
                remove_leftovers(run, name)
        yield


def is_finished(epoch: int, best_epoch: int, num_epochs: int, patience: int | None) -> bool:
    """Return whether training is complete after `epoch` epochs.

    patience: None without early stopping.
    """
    return epoch >= num_epochs or (patience is not None and epoch - best_epoch >= patience)


def unfinished(run: Path) -> str:
    """Return what a run still lacks, its epochs or its test; "" if it is finished."""
    if progress := untrained(run):
        return progress
    config, _ = read_config(run)
    return "trained, not tested" if config.test and not (run / EVERY_SIZE).exists() else ""


def describe_run(run: Path) -> str:
    """Return a run's folder and, if it is unfinished, what it lacks."""
    progress = unfinished(run)
    return f"run {run}{f', unfinished: {progress}' if progress else ''}"


def untrained(run: Path) -> str:
    """Return a run's progress, such as "epoch 3 of 9"; "" if training is complete."""
    config, _ = read_config(run)
    log = read_log(run)
    done, best = (log[-1]["epoch"], log[-1]["best_epoch"]) if log else (0, 0)
    patience = config.early_stopping_patience if config.early_stopping else None
    if not is_finished(done, best, config.num_epochs, patience):
        return f"epoch {done} of {config.num_epochs}"
    return ""


def environment(device: str) -> dict[str, Any]:
    """Return versions, device, commit and command line."""
    packages = ("torch", "numpy", "transformers", "open_clip_torch", "safetensors", "onnx", "onnxruntime")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in packages},
    }


def commit() -> str | None:
    """Return the commit of this code, or None outside a git repository."""
    return _git("rev-parse", "HEAD")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the records in a run's log.jsonl. Raises InputError for a damaged line."""
    path = run / LOG
    return read_json_lines(path, Epoch, "remove the line") if path.exists() and path.stat().st_size else []


def read_best_epoch(run: Path) -> dict[str, Any]:
    """Return the record of a run's best epoch. Raises InputError if its log lacks it."""
    log = read_log(run)
    for record in reversed(log):
        if record["epoch"] == log[-1]["best_epoch"]:
            return record
    raise InputError(f"{run / LOG} has no line of the run's best epoch; restore it, or train another run")


def read_plane(run: Path) -> list[dict[str, Any]]:
    """Return the cells (encoder size, table width) that experiments.cut measured of a run's weights.

    Empty if the run was not cut, or before its weights changed. Raises InputError for a damaged cut.json.
    """
    path, hint = run / CUT, f"measure it again: python -m experiments.cut {shlex.quote(str(run))}"
    if not path.exists():
        return []
    cut = check_schema(read_json(path, hint), Cut, path, hint)
    return cut.get("plane", []) if cut.get("weights") == sha256(run / WEIGHTS) else []


def no_weights(path: Path) -> InputError:
    """Return the InputError for missing weights."""
    return InputError(
        f"{path} does not exist: the run has no finished epoch (continue with train.py --resume), or only its results "
        f"were kept (train another run)"
    )


# ----------------------------------------------------------------------------------------------------------- user ranks
# test_ranks.npz: every user's test rank at every size, for paired comparisons of runs, and the number of training
# interactions of each user's target, to group users by it. U users.

TRAINED = "times_trained"  # name of the array of training counts
BINS = {"never": 0, "1-5 times": 1, "6-20 times": 6, "21 times and more": 21}  # of training counts; their first ones


def save_ranks(path: Path, ranks: dict[int, np.ndarray], cutoff: int, times_trained: np.ndarray) -> None:
    """Save size -> ranks [U] and how often each user's target occurs in training [U].

    Ranks start at 1 and may end in .5 (ties). They are stored doubled, as integers; 0 is a rank beyond `cutoff`.
    """
    dtype = np.min_scalar_type(2 * cutoff)
    doubled = {str(m): np.where(r <= cutoff, 2 * r, 0).astype(dtype) for m, r in ranks.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        arrays = {**doubled, TRAINED: times_trained.astype(np.uint32)}
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle


def read_arrays(path: Path, hint: str) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file of ranks by their names.

    hint: how to fix the problem, the end of the error message. Raises InputError if the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except ARRAY_ERRORS as error:
        raise InputError(f"{path} cannot be read ({error}); {hint}") from None


def decoded(saved: np.ndarray) -> np.ndarray:
    """Return ranks as `save_ranks` got them [U]; those beyond the cutoff are infinite."""
    return np.where(saved > 0, saved / 2, np.inf)


# ----------------------------------------------------------------------------------------------------------- find a run
# The run that a command line means: a folder, or the newest match. This needs no torch, so errors come at once.


def find_trained(run: str | Path | None, runs_root: Path, flags: dict[str, Any]) -> Path:
    """Return `run`, or else the newest run with weights that matches the flags.

    Raises InputError if no run matches, or if `run` is not a run or has no weights.
    """

    def problem(run: Path) -> str:
        return "" if (run / WEIGHTS).exists() else f"has no {WEIGHTS} yet"

    if not run:
        return find_run(runs_root, flags, problem)
    read_config(Path(run))  # raises if it is not a run
    if not (Path(run) / WEIGHTS).exists():
        raise no_weights(Path(run) / WEIGHTS)
    return Path(run)


def find_run(runs_root: Path, flags: dict[str, Any], problem: Callable[[Path], str]) -> Path:
    """Return the newest run without a `problem` that matches the flags.

    problem: returns why a run cannot be used, or "". Raises InputError that lists the newest runs and why none matches.
    """
    rejected = []
    paths = list(runs_root.glob(f"*/*/{CONFIG}"))
    for path in sorted(paths, key=_started, reverse=True):
        run = path.parent
        try:
            config, _ = read_config(run)
        except InputError as error:
            rejected.append(f"  {run}: {error}")
            continue
        required = {k: v for k, v in expand_preset(flags, config.dataset_code).items() if not is_runtime(Config, k)}
        differs = [f"{k} {format_value(getattr(config, k))}" for k, v in required.items() if getattr(config, k) != v]
        reason = ", ".join(differs) or problem(run)
        if not reason:
            return run
        rejected.append(f"  {run}: {reason}")
    given = " ".join(f"--{k} {format_value(v)}" for k, v in flags.items() if not is_runtime(Config, k))
    if not rejected:
        raise InputError(f"there is no run below {runs_root.resolve()}; train one: python train.py")
    listed = "\n".join(rejected[:5])
    raise InputError(
        f"no run below {runs_root} {f'matches {given}' if given else 'can be used'}. The newest runs and the reasons:\n"
        f"{listed}"
    )


def _started(path: Path) -> tuple[str, int]:
    """Return the start time of a config.json's run as a sort key.

    The time in the folder's name comes first, or the file's time if the folder was renamed; the file's time orders runs
    of the same second.
    """
    stat, name = path.stat(), path.parent.name
    in_name = re.match(r"\d{8}-\d{6}", name)
    return in_name[0] if in_name else time.strftime(TIME, time.localtime(stat.st_mtime)), stat.st_mtime_ns


def with_runtime_flags(config: Config, flags: dict[str, Any], run: Path) -> Config:
    """Return a run's settings with the given runtime flags.

    Raises InputError if another flag differs from the run.
    """
    for name, value in expand_preset(flags, config.dataset_code).items():
        if not is_runtime(Config, name) and getattr(config, name) != value:
            given = name if name in flags else "preset"
            raise InputError(
                f"--{given} {format_value(flags[given])} differs from {run}, which has {name} "
                f"{format_value(getattr(config, name))}; "
                f"leave the flag out to use the run as it is"
            )
    return read_settings(vars(config) | {k: v for k, v in flags.items() if is_runtime(Config, k)})


def expand_preset(flags: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Replace --preset in flags by its settings on a dataset.

    "paper" stands for all extensions at their defaults.
    """
    if "preset" not in flags:
        return flags
    named = named_preset(flags["preset"], dataset) or {name: getattr(Config, name) for name in EXTENSIONS}
    return named | {name: value for name, value in flags.items() if name != "preset"}


# -------------------------------------------------------------------------------------------------------------- schemas
# Of the JSON files in a run's folder.

Size = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,8}$")]
Metrics = dict[str, Number]
MetricsBySize = dict[Size, Metrics]  # test_mrl_metrics.json


class SavedSettings(Struct):
    """config.json; common/settings.py checks the settings themselves."""

    settings: dict[str, Any]
    sources: dict[str, str] = {}


class Environment(Struct):
    """env.json, and each resume in it."""

    started: str = ""
    command: list[str] = []
    commit: str | None = None
    uncommitted_changes: bool = False
    device: str = ""
    versions: dict[str, str | None] = {}
    data: str | None = None
    split: str | None = None
    features: list[str] = []
    init_from: dict[str, str] = {}
    teachers: list[dict[str, str]] = []
    resumed: list["Environment"] = []


class Epoch(Struct):
    """A line of log.jsonl."""

    epoch: Count
    best_epoch: Count
    seconds: Number
    train_seconds: Number
    val: MetricsBySize = {}


class DeployedSize(Struct, rename={"ndcg": "NDCG@10"}):
    """A row of deploy.json."""

    engine: str
    quantize: str
    size: Positive
    bytes: Count
    p50_ms: Number
    ndcg: Number


class Deployment(Struct):
    """deploy.json, as far as serving.export reads it."""

    weights: str
    rows: list[DeployedSize]


class TopTen(Struct, rename={"ndcg": "NDCG@10", "recall": "Recall@10"}):
    """Test metrics of a cell."""

    ndcg: Number
    recall: Number


class Cell(Struct):
    """An encoder size with an item table of some width, in cut.json."""

    size: Positive
    width: Positive
    table_bytes: Count
    encoder_ms: Number
    kept: TopTen
    masked: TopTen


class Cut(Struct):
    """cut.json. Files of earlier code have no weights and no plane."""

    kept: dict[str, MetricsBySize]  # cut, nested -> width
    masked: dict[str, MetricsBySize]
    weights: str = ""
    plane: list[Cell] = []
