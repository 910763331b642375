"""What a runtime raises, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgefuse.errors import EdgefuseError, ExportFailed, MissingPackage


@contextmanager
def in_words(target: str, problem: str) -> Iterator[None]:
    """Turn whatever the block raises into an error that names the target and says what it could not do.

    Raises:
        MissingPackage: an import failed.
        ExportFailed: anything else that is not one of our own errors.
    """
    try:
        yield
    except EdgefuseError:
        raise
    except ImportError as error:
        raise MissingPackage(
            f"The target {target!r} {problem}: {error}.", hint="See what is missing with: edgefuse doctor"
        ) from error
    except Exception as error:
        raise ExportFailed(
            f"The target {target!r} {problem}: {first_line(error)}", hint="See what it printed with: -v"
        ) from error


def first_line(error: BaseException) -> str:
    """What an exception says, without its listings; its type, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
