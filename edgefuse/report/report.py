"""The verb: results become one file, whose suffix says what it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgefuse.atomic import DRAFT, failures_in_words
from edgefuse.bench.match import require_model
from edgefuse.bench.result import read_result
from edgefuse.errors import OutputExists, UsageError
from edgefuse.report import bench_files, bench_page

if TYPE_CHECKING:
    from edgefuse.bench.result import Result

FORMATS: Mapping[str, Callable[[Sequence[Result], str | None], str]] = MappingProxyType(
    {
        ".html": bench_page.page,
        ".md": bench_files.markdown,
        ".csv": lambda results, _: bench_files.comma_separated(results),
        ".json": bench_files.everything,
    }
)
BEGINS: Mapping[str, str] = MappingProxyType(  # by what a report is known that may be replaced
    {
        ".html": "<!doctype html>\n<!-- a report of edgefuse -->\n",
        ".md": "<!-- a report of edgefuse -->\n",
        ".csv": "device,clock,model,target,precision,entry,",
        ".json": '{\n "edgefuse_report": ',
    }
)


def report(results: Sequence[Path], output: Path, *, overwrite: bool = False, base: str | None = None) -> Path:
    """Write what some results say; `base` is the model that others are held against, where it is not the slowest.

    Raises:
        UsageError: a suffix of no format, no result, or no model of that name.
        OutputExists: the output is there, or is not ours to replace.
        MissingFile, NotAResult, ChangedResult: what is no result.
        NotWritable, NoSpace: it cannot be written; what was there stays as it was.
    """
    form = output.suffix.lower()
    if form not in FORMATS:
        raise UsageError(f"{output} is of no format that a report has.", hint=f"Its name may end in: {', '.join(FORMATS)}")
    if not results:
        raise UsageError("There is no result to report.", hint="Measure with: edgefuse bench BUNDLE --device host")
    _require_free(output, form, overwrite=overwrite)
    read = {result.digest: result for result in map(read_result, results)}  # the same one twice says nothing more
    require_model([each for result in read.values() for each in result.measurements], base)
    _write(output, FORMATS[form]([*read.values()], base))
    return output


def _require_free(output: Path, form: str, *, overwrite: bool) -> None:
    with failures_in_words(output):
        if not os.path.lexists(output):
            return
        if not overwrite:
            raise OutputExists(f"{output} exists already.", hint="Choose another -o, or replace it with: --overwrite")
        ours = BEGINS[form].encode()
        if output.is_symlink() or not output.is_file() or not output.read_bytes().startswith(ours):
            raise OutputExists(f"{output} was not written by edgefuse and is not replaced.", hint="Choose another -o.")


def _write(output: Path, content: str) -> None:
    """All of it or nothing: a draft beside it, to the disk, then one rename."""
    with failures_in_words(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f".{output.name}{DRAFT}file")  # one that a dead run left is written over
    with failures_in_words(output):
        try:
            with draft.open("w", encoding="utf-8", newline="") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(output)
        finally:
            draft.unlink(missing_ok=True)
