"""What foreign runtimes print, and how they fail: kept from the terminal, and put into our words."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys
import tempfile
import warnings
from typing import TYPE_CHECKING, TextIO

from edgefuse.errors import ChangedBundle, EdgefuseError, ExportFailed, MissingPackage, NotABundle, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

STDOUT, STDERR = 1, 2

log = logging.getLogger("edgefuse_targets")


@contextlib.contextmanager
def exporting(runtime: str, refusals: Sequence[str]) -> Iterator[None]:
    """Export in silence.

    Raises:
        Refused: there are refusals; nothing was begun.
        MissingPackage: a package of the runtime is there, but not whole.
        ExportFailed: the runtime's exporter raised something of its own.
    """
    if refusals:
        raise Refused(f"{runtime} refuses: {' '.join(refusals)}")
    try:
        with quiet():
            yield
    except EdgefuseError:
        raise
    except ImportError as error:
        raise MissingPackage(
            f"{runtime} is installed, but not whole: {_first_line(error)}.",
            hint="See what is missing with: edgefuse doctor",
        ) from error
    except Exception as error:
        raise ExportFailed(
            f"{runtime} could not export the program: {_first_line(error)}", hint="See what it printed with: -v"
        ) from error


@contextlib.contextmanager
def reading(runtime: str, path: Path) -> Iterator[None]:
    """Read an artifact in silence.

    Raises:
        NotABundle: there is no such file.
        MissingPackage: a package of the runtime is there, but not whole.
        ChangedBundle: whatever the runtime raises because the file is damaged.
    """
    if not path.is_file():
        raise NotABundle(f"There is no artifact at {path}.", hint="Export it again.")
    try:
        with quiet():
            yield
    except EdgefuseError:
        raise
    except ImportError as error:
        raise MissingPackage(
            f"{runtime} is installed, but not whole: {_first_line(error)}.",
            hint="See what is missing with: edgefuse doctor",
        ) from error
    except Exception as error:
        raise ChangedBundle(f"{runtime} cannot read {path}: {_first_line(error)}", hint="Export it again.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send everything that is printed meanwhile to the log, at level DEBUG, and ignore warnings.

    C++ libraries write to the descriptors 1 and 2, behind Python's back, so these are redirected; for the duration nothing else
    of this process reaches them either.
    """
    with tempfile.TemporaryFile() as chatter, _descriptors_to(chatter.fileno()):
        ours = _to_stderr()
        with warnings.catch_warnings(), contextlib.redirect_stdout(ours), contextlib.redirect_stderr(ours):
            warnings.simplefilter("ignore")
            try:
                yield
            finally:
                chatter.seek(0)
                told = chatter.read().decode(errors="replace").strip()
    if told:
        log.debug("%s", told)


@contextlib.contextmanager
def _descriptors_to(file: int) -> Iterator[None]:
    """Let descriptors 1 and 2 lead into a file."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved = {descriptor: os.dup(descriptor) for descriptor in (STDOUT, STDERR)}
    try:
        for descriptor in saved:
            os.dup2(file, descriptor)
        yield
    finally:
        for descriptor, original in saved.items():
            os.dup2(original, descriptor)
            os.close(original)


@functools.cache
def _to_stderr() -> TextIO:
    """A stream into descriptor 2, wherever that leads; log handlers that are made while it stands for sys.stderr may keep it."""
    return io.TextIOWrapper(io.FileIO(STDERR, "w", closefd=False), encoding="utf-8", errors="replace", write_through=True)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
