"""Output folders: what is somebody else's stays as it is, and what is not finished is not there."""

import errno
import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Barrier

import pytest
import torch
from safetensors.torch import save_file

from ultrafuser.atomic import LOCK, new_folder, sole_writer, whole_file, write_whole


@contextmanager
def mounted(folder, *options):
    """A small file system of its own, where this machine lets one be mounted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def small_disk(folder, size="1m"):
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def write(out, text="new", then=lambda out: None):
    with new_folder(out) as part:
        (part / "model").write_text(text)
        then(out)


def fail(_):
    raise KeyError


def content(folder):
    """Everything under a folder, links as links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else None
    return found


# ---------------------------------------------------------------------------------- new folders


def test_a_folder_is_there_once_it_is_whole(tmp_path):
    out = tmp_path / "a" / "out"
    with new_folder(out) as part:
        (part / "model").write_text("new")
        assert not out.exists()
    assert content(tmp_path) == {"a": None, "a/out": None, "a/out/model": "new"}


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyError):
        write(tmp_path / "out", then=fail)
    assert content(tmp_path) == {"out": None}


@pytest.mark.parametrize("kind", ["folder", "link to a folder", "link to nothing", "file"])
def test_a_part_that_no_earlier_run_left_is_not_touched(kind, tmp_path):
    part, victim = tmp_path / "out.part", tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis").write_text("years of work")
    if kind == "folder":
        victim.rename(part)
    elif kind == "file":
        part.write_text("years of work")
    else:
        part.symlink_to(victim if kind == "link to a folder" else tmp_path / "nowhere")
    before = content(tmp_path)
    with pytest.raises(OSError, match=r"out\.part.*is there already, and no earlier run left it"):
        write(tmp_path / "out")
    assert content(tmp_path) == before


def test_links_in_what_a_killed_run_left_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis").write_text("years of work")
    part = tmp_path / "out.part"
    part.mkdir()
    (part / LOCK).touch()
    (part / "cache").symlink_to(victim)
    (part / "half").mkdir()
    (part / "half" / "thesis").symlink_to(victim / "thesis")
    write(tmp_path / "out")
    assert content(victim) == {"thesis": "years of work"}
    assert content(tmp_path / "out") == {"model": "new"}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "out.part" / LOCK).symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="cannot be written"):
        write(tmp_path / "out")
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_what_a_killed_run_left_is_begun_anew(tmp_path):
    code = "import os, sys; from pathlib import Path; from ultrafuser.atomic import new_folder\n"
    code += "with new_folder(Path(sys.argv[1])) as part: (part / 'half').touch(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False)
    assert (tmp_path / "out.part" / "half").exists()
    write(tmp_path / "out")
    assert content(tmp_path) == {"out": None, "out/model": "new"}


def test_a_link_to_an_empty_folder_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert content(tmp_path) == {"link": "real", "real": None, "real/model": "new"}


def test_a_mount_point_is_refused_before_the_work(tmp_path):
    with small_disk(tmp_path / "disk"):
        with pytest.raises(OSError, match=r"mount point.*Choose a folder inside it: .*disk/model"):
            write(tmp_path / "disk")
        write(tmp_path / "disk" / "model")
    assert content(tmp_path) == {"disk": None}


def test_a_folder_of_this_very_disk_that_is_mounted_is_refused_before_the_work(tmp_path):
    (tmp_path / "real").mkdir()
    with mounted(tmp_path / "bound", "--bind", tmp_path / "real"):
        with pytest.raises(OSError, match="mount point"):
            write(tmp_path / "bound")
        assert content(tmp_path) == {"bound": None, "real": None}


def test_of_several_at_once_one_writes_and_the_others_are_told(tmp_path):
    number, tries = 8, 40
    barrier = Barrier(number)

    def race(turn):
        won = 0
        for trial in range(tries):
            barrier.wait(timeout=30)
            # whoever is not the one is told: that another writes, or has written it
            with suppress(OSError):
                write(tmp_path / str(trial), f"{turn}")
                won += 1
        return won

    with ThreadPoolExecutor(number) as pool:
        won = sum(pool.map(race, range(number)))
    assert won == tries
    assert {len(content(tmp_path / str(trial))["model"]) for trial in range(tries)} == {1}
    # two that came at the very end may each have taken the other for the writer
    assert {name for part in tmp_path.glob("*.part") for name in content(part)} <= {LOCK}


def test_what_is_done_is_kept_where_somebody_else_took_the_name(tmp_path):
    def take(out):
        out.mkdir()
        (out / "thesis").write_text("years of work")

    with pytest.raises(FileExistsError, match=r"Nothing is lost: it is .*out\.part"):
        write(tmp_path / "out", then=take)
    assert content(tmp_path / "out") == {"thesis": "years of work"}
    assert content(tmp_path / "out.part") == {"model": "new"}
    # and it is nobody's to delete
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="no earlier run left it"):
        write(tmp_path / "out")


# ---------------------------------------------------------------------------------- folders that are gone on with


def begin(out, command="evaluate", writes=("results.json", "*.md"), **more):
    with sole_writer(out, command, writes, **more):
        (out / "results.json").write_text(command)


def test_a_file_that_the_command_did_not_write_is_not_replaced(tmp_path):
    (tmp_path / "notes.md").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds 'notes.md', which `ultrafuser evaluate` writes"):
        begin(tmp_path)
    assert content(tmp_path) == {"notes.md": "years of work", LOCK: ""}
    begin(tmp_path, overwrite=True)


def test_a_command_goes_on_in_its_own_folder_and_beside_another_ones_files(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    begin(tmp_path)
    begin(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds 'results.json', which `ultrafuser judge` writes"):
        begin(tmp_path, "judge")
    with sole_writer(tmp_path, "report", ["index.html"]):
        pass
    begin(tmp_path)
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_a_folder_that_an_earlier_version_began_is_gone_on_with(tmp_path):
    (tmp_path / "results.json").touch()
    (tmp_path / "scores").mkdir()
    begin(tmp_path, begun=["scores"])


def test_one_process_at_a_time_goes_on_with_a_folder(tmp_path):
    with sole_writer(tmp_path, "evaluate", []), pytest.raises(FileExistsError, match="another one is writing"):
        begin(tmp_path, "judge")
    begin(tmp_path)


def test_a_killed_process_holds_no_lock(tmp_path):
    code = "import os, sys; from pathlib import Path; from ultrafuser.atomic import sole_writer\n"
    code += "with sole_writer(Path(sys.argv[1]), 'evaluate', []): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    begin(tmp_path)


# ---------------------------------------------------------------------------------- files


def test_a_file_that_fails_leaves_the_one_that_was_there(tmp_path):
    path = tmp_path / "results.json"
    write_whole(path, "old")
    with suppress(KeyError), whole_file(path) as file:
        file.write("half")
        raise KeyError
    assert content(tmp_path) == {"results.json": "old"}


def test_a_file_behind_a_link_is_not_written(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "README.md").symlink_to("thesis")
    write_whole(tmp_path / "README.md", "card")
    assert content(tmp_path) == {"thesis": "years of work", "README.md": "card"}


def test_half_a_surrogate_pair_is_written(tmp_path):
    write_whole(tmp_path / "page", "a\ud800b")
    assert (tmp_path / "page").read_text() == "a\\ud800b"


def test_two_processes_do_not_write_one_file(tmp_path):
    with whole_file(tmp_path / "a") as file:
        with pytest.raises(FileExistsError, match="another one is writing"):
            write_whole(tmp_path / "a", "second")
        file.write("first")
    assert content(tmp_path) == {"a": "first"}


# ---------------------------------------------------------------------------------- disks


def fill(path):
    path.write_bytes(bytes(3_000_000))


def fill_with_weights(path):
    save_file({"weight": torch.zeros(1_000_000)}, path)


def fill_with_a_checkpoint(path):
    torch.save({"weight": torch.zeros(1_000_000)}, path)


def fill_with_rows(path):
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.executescript("PRAGMA journal_mode = OFF; CREATE TABLE rows (row BLOB)")
        connection.execute("INSERT INTO rows VALUES (?)", (bytes(3_000_000),))


@pytest.mark.parametrize("writer", [fill, fill_with_weights, fill_with_a_checkpoint, fill_with_rows])
def test_a_full_disk_is_said_in_a_sentence_whoever_meets_it(writer, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        with pytest.raises(OSError, match=r"^The disk is full that .*disk/out' is on. Make room"):
            write(disk / "out", then=lambda out: writer(out.with_name("out.part") / "file"))
        assert list(disk.iterdir()) == []
        with pytest.raises(OSError, match="^The disk is full that"), sole_writer(disk / "out", "evaluate", []):
            writer(disk / "out" / "file")


def test_a_disk_that_cannot_be_written_is_said_in_a_sentence(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for attempt in (write, begin, lambda out: write_whole(out / "file", "")):
            with pytest.raises(OSError, match="cannot be written: Read-only file system"):
                attempt(disk / "out")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="Input/output"), new_folder(tmp_path / "out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_folder_without_a_mark_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "index.html").write_text("<p>mine, or an earlier version's</p>")
    words = "'index.html', which `ultrafuser report` writes, and nothing there says .* earlier versions.* move it away"
    with pytest.raises(FileExistsError, match=words), sole_writer(tmp_path, "report", ["index.html"]):
        pass
    (tmp_path / "index.html").rename(tmp_path / "old.html")
    with sole_writer(tmp_path, "report", ["index.html"]):
        pass
