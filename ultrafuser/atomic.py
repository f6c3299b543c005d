"""Folders and files that are whole or not there, written by one process at a time, over nothing of somebody else's."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout


LOCK = ".ultrafuser.lock"
BEGUN = ".ultrafuser"  # in a folder that is gone on with: the commands that write there, one a line
# as Python, safetensors, SQLite and torch say it
_FULL = re.compile(
    r"no space left|quota exceeded|file too large|\(os error (?:27|28|122)\)|disk is full|PytorchStreamWriter|"
    r"inline_container",
    re.IGNORECASE,
)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a folder beside `out` to write into, which becomes `out` at the end, in one step.

    Whatever an earlier run left in it when it was killed is deleted first. A link stands for the folder that it leads
    to.

    Args:
        out: The folder that there will be. It may be there if it is empty.

    Yields:
        `OUT.part`, empty but for a lock.

    Raises:
        FileExistsError: If there is something in `out`, if `OUT.part` is not of an earlier run, or if another process
            is writing it.
        OSError: If it cannot be written: a mount point, no permission, a full disk.
    """
    out = Path(os.path.realpath(out))
    part = out.with_name(f"{out.name}.part")
    _check_free(out)
    _check_ours(part, out)
    with _locked(part / LOCK, out):
        was_there = out.exists()
        try:
            # another process may have written it since
            _check_free(out)
            if was_there:
                _take_away(out)
            _empty(part)
            with _in_words(out):
                yield part
        except BaseException:
            # another process may be looking at it
            shutil.rmtree(part, ignore_errors=True)
            if was_there:
                out.mkdir(exist_ok=True)
            raise
        try:
            # with the lock, so that nobody else can take it before
            os.replace(part, out)
        except OSError as error:
            # no later run takes it for one that was killed
            (part / LOCK).unlink()
            raise FileExistsError(
                f"All is done, but {str(out)!r} was put there meanwhile ({error.strerror}). Nothing is lost: it is "
                f"{str(part)!r}. Give it another name."
            ) from error
        (out / LOCK).unlink()


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"Nothing is overwritten unasked, but {str(out)!r} is there and not empty. Choose another folder, or move "
            f"it away."
        )
    if out.is_mount():
        raise _mount_error(out)


def _check_ours(part: Path, out: Path) -> None:
    """Refuses to write into what may be somebody else's, or would lead elsewhere."""
    try:
        plain = not os.path.lexists(part) or (part.is_dir() and not part.is_symlink() and not part.is_mount())
        ours = plain and ((part / LOCK).is_file() or _is_empty(part))
    except FileNotFoundError:  # another process has put it in place meanwhile
        return
    if not ours:
        raise FileExistsError(
            f"{str(out)!r} is written as {str(part)!r} until it is whole, but that is there already, and no earlier run "
            f"left it. Move it away, or choose another folder to write."
        )


def _is_empty(folder: Path) -> bool:
    return not os.path.lexists(folder) or not any(folder.iterdir())


def _take_away(out: Path) -> None:
    """Removes an empty folder, which another is to replace: what cannot be replaced shows before the work."""
    try:
        out.rmdir()
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _mount_error(out) from error
        raise


def _mount_error(out: Path) -> OSError:
    return OSError(
        f"A folder is put in place in one step when it is whole, but {str(out)!r} is a mount point, which nothing can "
        f"replace. Choose a folder inside it: {str(out / 'model')!r}."
    )


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextmanager
def sole_writer(
    out: Path, command: str, writes: Iterable[str], *, begun: Iterable[str] = (), overwrite: bool = False
) -> Iterator[None]:
    """Holds a folder that a command goes on with when it is run again, or writes anew.

    Args:
        out: The folder, made if it is not there.
        command: Name of the command. Files of this name's earlier runs are its own.
        writes: What it writes there: names, or patterns of names.
        begun: Files that show that an earlier version of the command began the folder.
        overwrite: Whether files that are not its own may be replaced.

    Raises:
        FileExistsError: If a file is in the way that the command did not write, or another process is writing there.
        OSError: If the folder cannot be written: no permission, a full disk.
    """
    with _locked(out / LOCK, out), _in_words(out):
        mark = out / BEGUN
        commands = mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []
        if command not in commands:
            own = overwrite or any((out / file).exists() for file in begun)
            theirs = sorted({path.name for pattern in writes for path in out.glob(pattern)} - {LOCK, BEGUN})
            if theirs and not own:
                raise FileExistsError(
                    f"Nothing is overwritten unasked, but {str(out)!r} holds {', '.join(map(repr, theirs[:5]))}, which "
                    f"`ultrafuser {command}` writes, and nothing there says that it wrote this, which earlier versions "
                    f"did not note down. Choose another folder, or move "
                    f"{'it' if len(theirs) == 1 else 'them'} away."
                )
            write_whole(mark, "".join(f"{name}\n" for name in (*commands, command)))
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Gives a text file to write, which takes the place of `path` once it is whole.

    Half a surrogate pair, which is no text but does come, is written as JSON can.

    Raises:
        FileExistsError: If another process is writing it.
    """
    part = path.with_name(f".{path.name}.part")
    with _locked(part, path), _in_words(path.parent):
        try:
            with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            part.unlink()
            raise
        os.replace(part, path)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


@contextmanager
def _locked(file: Path, out: Path) -> Iterator[None]:
    """Holds the lock that a file is, whose folder is made if it is not there; a process that was killed holds none.

    Raises:
        FileExistsError: If another process holds it.
    """
    with _only_readable(out):
        file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0)
    try:
        with _only_readable(out):
            before = _inode(file, make=True)
            lock.acquire()
    except (Timeout, FileNotFoundError):
        before = None
    # whoever held it may have moved or deleted it: a lock on what is gone locks out nobody
    if before is None or _inode(file) != before:
        lock.release()
        raise FileExistsError(
            f"One process at a time writes a folder or a file, but another one is writing {str(out)!r}. Wait for it, or "
            f"choose another."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _inode(file: Path, *, make: bool = False) -> int | None:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | (os.O_CREAT if make else 0)
    try:
        descriptor = os.open(file, flags, 0o666)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return found.st_ino if stat.S_ISREG(found.st_mode) else None


@contextmanager
def _only_readable(out: Path) -> Iterator[None]:
    """Says in a sentence what cannot be written at all."""
    try:
        with _in_words(out):
            yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
            raise OSError(
                f"{str(out)!r} cannot be written: {error.strerror} ({str(error.filename)!r}). Choose another place, or "
                f"change who may write there."
            ) from error
        raise


@contextmanager
def _in_words(out: Path) -> Iterator[None]:
    """Says in a sentence that a disk is full, however the library says it that met it."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise OSError(
            f"The disk is full that {str(out)!r} is on. Make room there, or choose a folder on another disk, and run the "
            f"command again."
        ) from error


def _is_full(error: BaseException | None) -> bool:
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if _FULL.search(str(error)):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
