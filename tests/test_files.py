"""Files are whole or absent, and what cannot be read is named."""

import errno
import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import read_json, read_text, replacing, write_json, write_text

REPOSITORY = Path(__file__).parent.parent
HINT = "make it again with the press"


@pytest.fixture
def old(tmp_path) -> Path:
    """A file that is there before."""
    path = tmp_path / "folder" / "numbers.txt"
    write_text(path, "old")
    return path


def assert_untouched(old: Path) -> None:
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == [old.name]  # noqa: PTH208 (hidden files count too)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


# -------------------------------------------------------------------------------------------------------------- writing


def test_a_written_file_reads_back_and_nothing_else_is_left(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "ν and 葉\n")
    assert read_text(tmp_path / "new" / "a.txt", HINT) == "ν and 葉\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "a.txt"]


def test_a_new_file_takes_the_place_of_the_old_one(old):
    write_text(old, "new")
    assert old.read_text() == "new"
    assert len(list(old.parent.iterdir())) == 1


def test_json_is_written_for_people_and_reads_back(tmp_path):
    value = {"name": "Größe", "sizes": [8, 16]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", HINT) == value
    assert "Größe" in (tmp_path / "a.json").read_text(encoding="utf-8").splitlines()[1]


def test_the_old_file_is_there_until_the_new_one_is_whole(old):
    with replacing(old) as temporary:
        temporary.write_text("half")
        assert old.read_text() == "old"
        assert temporary.parent == old.parent  # another file system could not be renamed from
    assert old.read_text() == "half"


@pytest.mark.parametrize("error", [ValueError("bad numbers"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_whole_and_its_error_unchanged(old, error):
    with pytest.raises(type(error)) as raised, replacing(old) as temporary:
        temporary.write_text("half")
        raise error
    assert raised.value is error
    assert_untouched(old)


@pytest.mark.parametrize("step", [(os, "fsync"), (Path, "replace")], ids=["fsync", "rename"])
def test_a_disk_that_is_full_at_the_end_leaves_the_old_file_whole(old, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*step, full)
    with pytest.raises(InputError, match=r"cannot write .*numbers\.txt: No space left on device; free space"):
        write_text(old, "new")
    assert_untouched(old)


def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_file_whole(old):
    limit_file_size = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from pathlib import Path; from common.cli import run_cli; from common.files import write_text\n"
        "run_cli(lambda: write_text(Path(sys.argv[1]), 'new ' * 10_000))"
    )
    done = run_python(limit_file_size, old)
    assert done.returncode == 2, done.stderr
    assert f"cannot write {old}: File too large" in done.stderr
    assert_untouched(old)


def test_a_process_that_is_killed_in_the_middle_leaves_the_old_file_whole(old):
    write_half = (
        "import sys, time; from pathlib import Path; from common.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    print('half written', flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", write_half, str(old)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half written\n"
        process.kill()
    assert old.read_text() == "old"


def test_what_a_killed_process_leaves_is_hidden_and_does_not_bear_the_files_name(tmp_path):
    with replacing(tmp_path / "a.safetensors") as temporary:
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".tmp"


def test_writers_at_the_same_time_leave_the_whole_file_of_one_of_them(tmp_path):
    texts = [letter * 200_000 for letter in "abcdef"]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "a.txt", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.txt").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_named(old):
    with pytest.raises(InputError, match=r"cannot write .*numbers\.txt/below\.txt"):
        write_text(old / "below.txt", "text")
    assert_untouched(old)


def test_others_may_read_what_is_written(old):
    assert old.stat().st_mode & 0o777 == 0o644


# -------------------------------------------------------------------------------------------------------------- reading


def test_a_gzipped_text_is_read_by_its_name(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress("naïve".encode()))
    assert read_text(tmp_path / "a.gz", HINT) == "naïve"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("empty.gz", gzip.compress(b""), "is empty"),
        ("no-bytes.gz", b"", "is empty"),
        ("latin1.txt", "naïve".encode("latin-1"), "is not UTF-8 (byte 2)"),
        ("latin1.gz", gzip.compress("naïve".encode("latin-1")), "is not UTF-8 (byte 2)"),
        ("truncated.gz", gzip.compress(b"text " * 100)[:-10], "cannot be read"),
        ("plain.gz", b"plain text, not gzipped", "cannot be read"),
        ("damaged.gz", gzip.compress(bytes(range(256)))[:40] + b"\0" * 300, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_mends_it(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_text(path, HINT)
    message = str(raised.value)
    assert message.startswith(f"{path} {problem}")
    assert message.endswith(f"; {HINT}")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path, HINT)


@pytest.mark.parametrize(
    "text", ["{'a': 1}", '{"a": 1', "{} {}", "[" * 100_000], ids=["literal", "cut", "two", "nested"]
)
def test_a_file_that_is_not_json_is_named_with_what_mends_it(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        read_json(path, HINT)
    assert str(raised.value).startswith(f"{path} is not JSON (")
    assert str(raised.value).endswith(f"; {HINT}")


@pytest.mark.parametrize("value", [[1, None], "a", 1, None])
def test_json_that_is_no_object_is_refused(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=rf"a\.json is not a JSON object; {HINT}"):
        read_json(tmp_path / "a.json", HINT)


def test_a_lone_surrogate_survives_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"\ud800": "ν"})
    assert read_json(tmp_path / "a.json", HINT) == {"\ud800": "ν"}
