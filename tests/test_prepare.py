"""`python -m datasets.prepare`: raw files to a dataset that trains, and what it says and keeps when things go wrong."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.picture_server import good, serving
from common.errors import InputError
from common.files import read_json
from datasets.catalog import load_catalog
from datasets.prepare import __main__ as command
from datasets.prepare.__main__ import main
from tests.prepared import contents, item_features
from tests.raw import reviews_of, write_raw

REPO = Path(__file__).parent.parent
AMAZON = REPO.parent / "shared" / "amazon"
FILES = ("sequential_data.txt", "datamaps.json", "meta.json.gz")

# Ten users with the same five items each, in turn: a 5-core.
HISTORIES = [(f"USER{u}", [f"ITEM{(u + k) % 5}" for k in range(5)]) for u in range(10)]
PRODUCTS = [{"asin": f"ITEM{i}", "title": f"Tent {i}", "price": 9.99} for i in range(4)] + [{"asin": "RARE"}]


@pytest.fixture
def raw(tmp_path) -> Path:
    """Raw files of Beauty, in miniature."""
    folder = tmp_path / "raw"
    write_raw(folder / "reviews_Beauty_5.json.gz", reviews_of(HISTORIES))
    write_raw(folder / "meta_Beauty.json.gz", PRODUCTS, literals=True)
    return folder


def prepare(raw: Path, *flags: str, dataset: str = "beauty") -> Path:
    """The data step; returns the dataset's folder."""
    root = raw.parent / "data"
    return main([f"--dataset_code={dataset}", f"--raw_root={raw}", f"--data_root={root}", "--only=data", *flags])


def refusal(raw: Path, *flags: str, dataset: str = "beauty") -> str:
    with pytest.raises(InputError) as raised:
        prepare(raw, *flags, dataset=dataset)
    return str(raised.value)


# ------------------------------------------------------------------------------------------------------- what is made


def test_known_sequences_come_back_from_raw_files_with_noise(raw):
    catalog = load_catalog(prepare(raw).parent, "beauty")
    names = [[catalog.asins[i - 1] for i in catalog.sequences.of(row)] for row in range(len(catalog.sequences))]
    assert names == [items for _, items in HISTORIES]
    assert catalog.asins == [f"ITEM{i}" for i in range(5)]
    assert catalog.metadata[0] == {"asin": "ITEM0", "title": "Tent 0", "price": 9.99}
    assert catalog.metadata[4] == {}
    assert "1 of 5 items have no metadata" in catalog.notes


@pytest.mark.skipif(not AMAZON.exists(), reason="the paper's data are not at hand")
@pytest.mark.parametrize("name, category", [("beauty", "Beauty"), ("sports", "Sports_and_Outdoors")])
def test_the_published_sequences_come_back_byte_for_byte(tmp_path, name, category):
    published = load_catalog(AMAZON, name)
    users = read_json(AMAZON / name / "datamaps.json", "")["id2user"]
    known = [
        (users[str(row + 1)], [published.asins[i - 1] for i in published.sequences.of(row)])
        for row in range(len(published.sequences))
    ]
    write_raw(tmp_path / "raw" / f"reviews_{category}_5.json", reviews_of(known))
    write_raw(tmp_path / "raw" / f"meta_{category}.json.gz", [r for r in published.metadata if r], literals=True)
    folder = prepare(tmp_path / "raw", dataset=name)
    for file in ("sequential_data.txt", "datamaps.json"):
        assert (folder / file).read_bytes() == (AMAZON / name / file).read_bytes(), file
    assert load_catalog(folder.parent, name).metadata == published.metadata
    report = read_json(folder / "prepare_report.json", "")
    assert report["summary"]["warnings"] == []


def test_a_shop_needs_its_events_and_items_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    events = [(user, item, f"2024-01-{day:02}") for user, items in HISTORIES for day, item in enumerate(items, start=1)]
    pd.DataFrame(events, columns=["customer_id", "product_id", "date"]).to_parquet("shop.parquet")
    Path("img").mkdir()
    Path("img/a.png").write_bytes(picture((1, 2, 3)))
    rows = ["Product ID,Name,Price,colour,photo", "ITEM0,Tent,9.5,red,img/a.png", "ITEM1,<b>,see cart,,/etc/passwd"]
    Path("products.csv").write_text("\n".join(rows))
    folder = main(["--events=shop.parquet", "--items=products.csv", "--dataset_code=shop", *BUILT_IN])
    catalog = load_catalog("data", "shop")
    names = [[catalog.asins[i - 1] for i in catalog.sequences.of(row)] for row in range(10)]
    assert names == [items for _, items in HISTORIES]
    assert catalog.metadata[:2] == [
        {"asin": "ITEM0", "colour": "red", "title": "Tent", "price": "9.5"},
        {"asin": "ITEM1"},
    ]
    assert catalog.pictures[0].read_bytes() == picture((1, 2, 3))
    assert catalog.pictures[1] is None
    summary = read_json(folder / "prepare_report.json", "")["summary"]
    assert (summary["items_with"]["colour"], summary["picture_sides"]["median"]) == (0.2, 30)
    printed = capsys.readouterr().out
    assert "1 of 2 paths copied to data/photos/shop; the others, such as '/etc/passwd', are no pictures" in printed
    assert "note: title: 1 of 2 items have only markup, code or words for nothing: missing" in printed
    assert "pictures' shorter side: smallest 30" in printed
    assert "100.0% are smaller than 64 pixels" in printed


def test_without_items_a_dataset_has_ids_alone(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = main([f"--events={raw / 'reviews_Beauty_5.json.gz'}", "--dataset_code=ids", "--no-use_img_encoder"])
    assert not (folder / "meta.json.gz").exists()
    assert load_catalog("data", "ids").notes == ["no meta.json.gz: items have no text"]
    assert "ids has no metadata, so there is no text to encode; give --items" in capsys.readouterr().out


def test_columns_are_part_of_what_was_prepared(raw):
    flags = ("--events=reviews_Beauty_5.json.gz", "--columns=user=reviewerID,item=asin,time=unixReviewTime")
    prepare(raw, *flags, dataset="shop")
    assert "made with columns" in refusal(raw, flags[0], "--columns=user=reviewerID", dataset="shop")


def test_the_report_says_what_every_filter_left_and_where_the_paper_differs(raw, capsys):
    report = read_json(prepare(raw) / "prepare_report.json", "")
    before, after = report["prepared"]["filters"]
    assert (before["users"], before["items"], before["interactions"]) == (30, 6, 134)
    assert (after["users"], after["items"], after["interactions"]) == (10, 5, 50)
    assert report["summary"]["history_lengths"]["median"] == 5
    assert report["summary"]["items_with"] == {
        "title": 0.8, "price": 0.8, "brand": 0, "categories": 0, "description": 0}  # fmt: skip
    assert "10 users, but the paper's Table 1 has 22,363" in report["summary"]["warnings"]
    out = capsys.readouterr().out
    assert "warning: 50 interactions, but the paper's Table 1 has 198,502" in out
    assert "items with title 80.0%, price 80.0%" in out


def test_ratings_and_repeats_are_filtered_as_the_flags_say(raw):
    repeated = [(user, [*items, items[0]]) for user, items in HISTORIES]
    lines = reviews_of(repeated)
    lines += [{**line, "asin": "LOW", "overall": 1.0} for line in lines[:10]]
    write_raw(raw / "reviews_Beauty_5.json.gz", lines)
    folder = prepare(raw, "--min_rating=2", "--repeats=drop")
    filters = read_json(folder / "prepare_report.json", "")["prepared"]["filters"]
    assert [step["after"] for step in filters[-3:-1]] == ["ratings below 2 left out", "repeats left out"]
    assert filters[-1]["interactions"] == 50
    assert "made with repeats 'drop'" in refusal(raw, "--min_rating=2")
    assert "made with min_rating 2.0" in refusal(raw, "--repeats=drop")


def test_a_user_id_or_item_id_with_odd_characters_comes_through(tmp_path):
    odd = ["../../etc/passwd", "a b", "C:\\x", "né\u2028", "\ud800", "NUL\0"]
    write_raw(tmp_path / "raw" / "r.json", reviews_of([(f"{u}/{u}", odd) for u in odd]))
    write_raw(tmp_path / "raw" / "m.json", [{"asin": asin, "title": asin} for asin in odd])
    folder = prepare(tmp_path / "raw", "--events=r.json", "--items=m.json", dataset="odd")
    catalog = load_catalog(folder.parent, "odd")
    assert catalog.asins == odd
    assert [record["title"] for record in catalog.metadata] == odd
    assert {path.name for path in (tmp_path / "data" / "odd").iterdir()} == {
        *FILES, "prepare_report.json"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the whole command

BUILT_IN = ("--language_encoder=lexical", "--img_encoder=pixel")


def picture(colour: tuple[int, int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def shop(raw):
    """A web server with the raw files of Beauty and the pictures of two of its items; a third one's is gone."""
    with serving({}) as server:
        for i in range(2):
            server.pages[f"/{i}.png"] = good(picture((100 * i, 50, 50)))
        products = [product | {"imUrl": f"{server.url}/{n}.png"} for n, product in enumerate(PRODUCTS[:3])]
        write_raw(raw / "meta_Beauty.json.gz", products, literals=True)
        for path in raw.iterdir():
            server.pages[f"/files/{path.name}"] = good(path.read_bytes())
        yield server


def test_one_command_fetches_and_prepares_all_that_training_needs(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_code=beauty", f"--base_url={shop.url}/files/", "--allow_private_addresses", *BUILT_IN]
    folder = main(flags)
    assert folder == Path("data/beauty")
    manifest = read_json(folder / "pictures.json", "")
    assert [next(iter(manifest[f"ITEM{i}"])) for i in range(5)] == ["file", "file", "missing", "missing", "missing"]
    assert "404" in manifest["ITEM2"]["missing"]
    printed = capsys.readouterr().out
    assert "picture 40.0%" in printed
    assert "features of 5 items, 1024 wide" in printed
    asked = len(shop.requests)
    main(flags)
    assert shop.requests[asked:] == ["/2.png"]  # what was not there is asked for again, and nothing else

    features = item_features(load_catalog("data", "beauty"), language="lexical", image="pixel", attributes=("title",))
    assert features.shape[0] == 5
    assert features[:2, 1024:].any(axis=1).all() and not features[2:, 1024:].any()


def test_with_raw_files_at_hand_nothing_is_fetched(shop, raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "data" / "photos" / "beauty"
    photos.mkdir(parents=True)
    (photos / "ITEM4.png").write_bytes(picture((9, 9, 9)))
    folder = main(["--dataset_code=beauty", f"--raw_root={raw}", *BUILT_IN])
    assert read_json(folder / "item2img.json", "") == {"ITEM4": "ITEM4.png"}
    assert shop.requests == []
    command = "to fetch them: python -m datasets.prepare --dataset_code beauty --only pictures"
    assert f"3 pictures have an address and were not fetched; {command}" in capsys.readouterr().out
    main([*command.partition("prepare ")[2].split(), "--allow_private_addresses"])
    assert len(read_json(folder / "item2img.json", "")) == 3


def test_another_k_core_keeps_the_pictures_and_drops_what_named_them(shop, raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_code=beauty", f"--base_url={shop.url}/files", "--allow_private_addresses"]
    folder = main([*flags, "--only=data,pictures"])
    main([*flags, "--only=data", "--min_uc=4", "--min_sc=4", "--overwrite"])
    assert load_catalog("data", "beauty").pictures is None
    main([*flags, "--only=pictures"])
    assert read_json(folder / "item2img.json", "") == {"ITEM0": "ITEM0.png", "ITEM1": "ITEM1.png"}
    assert [path for path in shop.requests if path != "/2.png"].count("/1.png") == 1


def test_processes_of_torchrun_share_the_features_and_one_alone_writes_the_rest(raw, tmp_path):
    flags = [f"--raw_root={raw}", f"--data_root={tmp_path / 'data'}", "--no-use_img_encoder", *BUILT_IN]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "datasets.prepare"]
    done = subprocess.run(
        [sys.executable, *command, "--dataset_code=beauty", "--encoder_batch_size=2", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("features of 5 items") == 1
    (made,) = (tmp_path / "data" / "features" / "beauty").glob("*.npy")
    assert np.load(made).any(axis=1).all()


# ------------------------------------------------------------------------------------------------------ again and again


def test_raw_files_that_are_not_what_was_fetched_are_refused(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_code=beauty", f"--base_url={shop.url}/files", "--only=data"]
    main(flags)
    write_raw(Path("data/raw/meta_Beauty.json.gz"), PRODUCTS[:1])
    with pytest.raises(InputError, match=r"checksums\.json records"):
        main([*flags, "--overwrite"])


def test_a_list_of_pictures_by_the_user_is_never_deleted(raw):
    folder = raw.parent / "data" / "beauty"
    folder.mkdir(parents=True)
    mine = '{"ITEM0": "mine.png"}'
    (folder / "item2img.json").write_text(mine, encoding="utf-8")
    prepare(raw)
    assert (folder / "item2img.json").read_text(encoding="utf-8") == mine
    prepare(raw, "--min_uc=4", "--overwrite")
    assert not (folder / "item2img.json").exists()
    assert (folder / "item2img.json.old").read_text(encoding="utf-8") == mine


def test_other_settings_or_files_are_refused_until_they_may_overwrite(raw):
    folder = prepare(raw)
    first = contents(folder)
    assert "made with min_uc 5" in refusal(raw, "--min_uc=4")
    write_raw(raw / "reviews_Beauty_5.json.gz", reviews_of(HISTORIES, seed=1))
    assert "made with events" in refusal(raw)
    assert contents(folder) == first
    prepare(raw, "--min_uc=4", "--min_sc=4", "--overwrite")
    assert len(load_catalog(folder.parent, "beauty").sequences) == 30
    (folder / "sequential_data.txt").write_text("1 1 2 3\n", encoding="utf-8")
    assert "sequential_data.txt, changed since" in refusal(raw, "--min_uc=4", "--min_sc=4")
    (folder / "prepare_report.json").unlink()
    assert "made by other means; --overwrite" in refusal(raw)


def test_a_second_time_nothing_is_read_and_raw_files_are_needed_no_more(raw, capsys):
    folder = prepare(raw)
    first, written = contents(folder), (folder / FILES[0]).stat().st_mtime_ns
    assert prepare(raw) == folder
    assert "is prepared already" in capsys.readouterr().out
    for path in raw.iterdir():
        path.unlink()
    assert main(["--dataset_code=beauty", f"--data_root={folder.parent}", "--only=data"]) == folder
    assert (contents(folder), (folder / FILES[0]).stat().st_mtime_ns) == (first, written)


def test_killed_before_any_change_to_the_disk_and_run_again_it_makes_the_same_bytes(raw, tmp_path):
    script = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
left = int(sys.argv[1])
def hook(event, args):
    global left
    writes = event in ("os.rename", "os.remove") or (event == "open" and "w" in str(args[1]))
    if writes and "data" in str(args[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(hook)
from datasets.prepare.__main__ import main
main(["--dataset_code=beauty", "--raw_root={raw}", "--data_root={tmp_path}/" + sys.argv[2], "--only=data"])
"""
    undisturbed = contents(prepare(raw))
    killed = 0
    for count in range(100):
        root = f"data{count}"
        done = subprocess.run([sys.executable, "-c", script, str(count), root], capture_output=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        killed += 1
        try:
            load_catalog(tmp_path / root, "beauty")
        except InputError as error:
            assert "python -m datasets.prepare --dataset_code" in str(error)
        main(["--dataset_code=beauty", f"--raw_root={raw}", f"--data_root={tmp_path / root}", "--only=data"])
        assert contents(tmp_path / root / "beauty") == undisturbed, count
    assert killed > 8
    assert contents(tmp_path / root / "beauty") == undisturbed


def test_the_second_of_two_at_once_says_who_holds_the_lock(raw):
    folder = raw.parent / "data" / "beauty"
    script = f"""
import sys, time
sys.path.insert(0, {str(REPO)!r})
from pathlib import Path
from datasets.prepare.__main__ import only_one
with only_one(Path({str(folder)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        assert f"is being prepared by process {holder.pid} on {os.uname().nodename}" in refusal(raw)
    finally:
        holder.kill()
        holder.wait()
    assert prepare(raw) == folder  # the lock ended with its process


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_dataset_must_be_named_and_demo_needs_none(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "required: --dataset_code" in capsys.readouterr().err
    with pytest.raises(InputError, match="demo is built in"):
        main(["--dataset_code=demo"])


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--only=features", "--min_uc=2"], "--min_uc is for the data, which --only features leaves out"),
        (["--only=pictures", "--overwrite"], "--overwrite is for the data"),
        (["--only=pictures", "--no-use_img_encoder"], "leave out one of the two"),
        (["--dataset_code=photos"], "choose another name"),
        (["--raw_root=nowhere"], "--raw_root nowhere is not a folder"),
        (["--only=data,pixels"], "'data,pixels': give one or more of data, pictures, features"),
        (["--only=features"], "python -m datasets.prepare --dataset_code beauty"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=problem):
        main(["--dataset_code=beauty", *flags])


@pytest.mark.parametrize(
    "flag", ["--min_uc=0", "--min_sc=x", "--min_rating=nan", "--min_rating=-1", "--pictures_per_second=0"]
)
def test_numbers_that_mean_nothing_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        main(["--dataset_code=beauty", flag])
    assert f"argument {flag.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(("text", "wrong"), [("{}", "is not a report of .*"), ("[]", "is not a JSON object")])
def test_a_report_that_is_none_is_named(raw, text, wrong):
    folder = prepare(raw)
    (folder / "prepare_report.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"prepare_report\.json {wrong}; remove it"):
        load_catalog(folder.parent, "beauty")


def test_a_raw_file_that_is_not_there_is_named_with_those_that_are(raw):
    (raw / "meta_Beauty.json.gz").rename(raw / "other.json.gz")
    message = refusal(raw)
    assert "meta_Beauty.json.gz or meta_Beauty.json is not in" in message
    assert "other.json.gz" in message
    assert "--items FILE" in message


def test_a_misspelt_dataset_is_met_with_the_nearest_and_leaves_nothing_behind(raw):
    message = refusal(raw, dataset="beuty")
    assert "did you mean beauty?" in message
    assert "--events FILE, and --items FILE" in message
    assert not (raw.parent / "data").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--events=meta_Beauty.json.gz"], "holds no events"),
        (["--items=other.json"], "has none of the 5 items of reviews_Beauty_5.json.gz"),
        (["--min_uc=50"], "would leave"),
    ],
)
def test_what_cannot_be_prepared_is_refused_before_anything_is_written(raw, flags, words):
    write_raw(raw / "other.json", [{"asin": "OTHER"}])
    assert words in refusal(raw, *flags)
    assert not (raw.parent / "data" / "beauty" / FILES[0]).exists()


def test_a_damaged_raw_file_leaves_the_prepared_data_as_they_were(raw):
    folder = prepare(raw)
    first = contents(folder)
    path = raw / "meta_Beauty.json.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read" in refusal(raw, "--overwrite")
    assert contents(folder) == first


def test_a_full_disk_is_named_and_the_next_run_goes_on(raw, tmp_path):
    undisturbed = contents(prepare(raw))
    script = f"""
import resource, sys
sys.path.insert(0, {str(REPO)!r})
from common.cli import run_cli
from datasets.prepare.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # a file may have no more bytes
run_cli(lambda: main(["--dataset_code=beauty", "--raw_root={raw}", "--data_root={tmp_path}/full", "--only=data"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"cannot write {tmp_path}/full/beauty/datamaps.json" in done.stderr
    main(["--dataset_code=beauty", f"--raw_root={raw}", f"--data_root={tmp_path / 'full'}", "--only=data"])
    assert contents(tmp_path / "full" / "beauty") == undisturbed


def test_a_dataset_in_a_folder_that_is_only_read_has_its_features_cached_elsewhere(raw, tmp_path, monkeypatch):
    folder = prepare(raw)
    monkeypatch.chdir(tmp_path)
    first = contents(folder)
    refuse = InputError("cannot write")
    monkeypatch.setattr(command, "write_json", lambda *_: (_ for _ in ()).throw(refuse))
    main(["--dataset_code=beauty", f"--data_root={folder.parent}", "--only=features", *BUILT_IN])
    assert contents(folder) == first
    assert len(list(Path("data/features/beauty").glob("*.npy"))) == 1  # the text's: there are no pictures


def test_help_answers_without_heavy_imports():
    script = """
import sys, datasets.prepare.__main__ as prepare
try:
    prepare.main(["--help"])
finally:
    print({"torch", "PIL", "transformers", "httpx"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO)
    assert done.stdout.endswith("set()\n"), done.stderr
    assert "--min_uc" in done.stdout
    assert "--lr " not in done.stdout
