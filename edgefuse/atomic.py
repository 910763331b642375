"""A folder that appears whole or not at all.

Everything is written into a draft beside the output, on the same filesystem, flushed to the disk, and renamed in one step. A
run that dies leaves a draft behind, whose lock died with it: the next run to the same output recognises and removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgefuse.errors import EdgefuseError, NoSpace, NotWritable, OutputError, OutputExists

DRAFT, ASIDE = ".edgefuse-draft-", ".edgefuse-aside-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
ATTEMPTS = 8  # a draft without its lock yet may be swept away by another run; then another name is tried


@contextmanager
def draft(output: Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into that becomes `output` when the block ends, and vanishes when the block fails.

    An `output` that exists is an `OutputExists`, unless `overwrite` is set and `is_ours` knows the folder; then the old one
    stays whole until it is exchanged for the new one. A full disk is a `NoSpace`, a folder that may not be written a
    `NotWritable`, wherever in the block they come up.
    """
    with failures_in_words(output):
        require_free(output, overwrite=overwrite, is_ours=is_ours)
        output.parent.mkdir(parents=True, exist_ok=True)
        sweep(output)
        folder, lock = _claim(output)
        try:
            yield folder
            if folder.exists():  # the block may have set it aside
                _flush(folder)
                _put_in_place(folder, output, overwrite=overwrite)
        finally:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)


def require_free(output: Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise `OutputExists` when a folder may not be written, before any work is done for it."""
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputExists(f"{output} exists already.", hint="Choose another -o, or replace it with: --overwrite")
    if output.is_symlink() or not is_ours(output):
        raise OutputExists(f"{output} was not written by edgefuse and is not replaced.", hint="Choose another -o.")


def sweep(output: Path) -> None:
    """Remove what dead runs to the same output left behind, and bring back a folder that one of them had moved aside."""
    for name in sorted(output.parent.glob(f".{_escaped(output.name)}{ASIDE}*")):
        if not os.path.lexists(output):
            name.rename(output)
        else:
            shutil.rmtree(name, ignore_errors=True)
    for name in output.parent.glob(f".{_escaped(output.name)}{DRAFT}*"):
        lock = _try_lock(name)
        if lock is not None:
            shutil.rmtree(name, ignore_errors=True)
            os.close(lock)


@contextmanager
def failures_in_words(output: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into our errors, however deep they are buried."""
    try:
        yield
    except EdgefuseError as error:
        if isinstance(error, OutputError) or (told := _in_words(error, output)) is None:
            raise
        raise told from error
    except Exception as error:
        if told := _in_words(error, output):
            raise told from error
        raise


def _in_words(error: BaseException | None, output: Path) -> OutputError | None:
    """The output error at the root of an exception, if there is one; a library may have wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return NoSpace(
                f"There is no space left for {output}: {error.strerror}.",
                hint="Free some space, or choose another disk with -o; nothing was changed.",
            )
        if isinstance(error, OSError) and error.errno in FORBIDDEN and _about(error, output):
            return NotWritable(
                f"{error.filename or output} may not be written: {error.strerror}.",
                hint="Choose another -o, or change the permissions of the folder.",
            )
        if isinstance(error, OSError) and error.errno in IN_THE_WAY and _about(error, output):
            return NotWritable(
                f"{output} cannot be a folder: {error.strerror} ({error.filename or output}).", hint="Choose another -o."
            )
        error = error.__cause__ or error.__context__
    return None


def _about(error: OSError, output: Path) -> bool:
    """Whether an error is about the output, its draft, or a folder that holds them; not about something that was read."""
    path = Path(os.fsdecode(error.filename)) if error.filename else output
    return path in (output, *output.parents) or any(DRAFT in part or ASIDE in part for part in path.parts)


def _claim(output: Path) -> tuple[Path, int]:
    """A new draft and the lock on it, which no other process can hold and which dies with this one."""
    for _ in range(ATTEMPTS):
        folder = output.parent / f".{output.name}{DRAFT}{secrets.token_hex(4)}"
        folder.mkdir()
        lock = _try_lock(folder)
        if lock is not None and folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)
    raise NotWritable(f"No draft could be kept beside {output}.", hint="Is another edgefuse writing to the same place?")


def _try_lock(folder: Path) -> int | None:
    """An open descriptor that holds the folder's lock, or None when another process does, or when it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _flush(folder: Path) -> None:
    """Every file and folder to the disk, so that the rename cannot outlive the content."""
    for parent, _, files in os.walk(folder):
        for name in (*files, "."):
            _fsync(Path(parent) / name)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(folder: Path, output: Path, *, overwrite: bool) -> None:
    """One rename, or one exchange of two folders."""
    if not os.path.lexists(output):
        folder.rename(output)
    elif not overwrite:
        raise OutputExists(f"{output} has appeared while it was being written.", hint="Choose another -o.")
    elif _exchange(folder, output):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        aside = output.parent / f".{output.name}{ASIDE}{secrets.token_hex(4)}"
        output.rename(aside)
        folder.rename(output)
        shutil.rmtree(aside, ignore_errors=True)
    _fsync(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where system or filesystem cannot."""
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux; RENAME_SWAP of macOS is 2 as well
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    with suppress(AttributeError):  # a C library older than 2018
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, swap) == 0)
        return bool(library.renameat2(here, names[0], here, names[1], swap) == 0)
    return False


def _escaped(name: str) -> str:
    """A name as a pattern that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
