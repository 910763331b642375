"""Bundles and folded models on disk: atomic, checksummed, the same bytes for the same content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgefuse import checkpoint
from edgefuse.atomic import draft, require_free
from edgefuse.bundle import SCHEMA, Bundle, Golden, Reference, from_json, origin_of, origin_to_json, to_json
from edgefuse.errors import BadConfig, ChangedBundle, EdgefuseError, MissingFile, NotABundle
from edgefuse.fold import Exactness
from edgefuse.values import ENCODED, Checkpoint, Fold, FoldedModel, Refusal
from edgefuse.verify.wer import WordErrors

MANIFEST = "edgefuse.json"
PLAN = "plan.json"
TOKENS = "tokens.txt"
GOLDEN = "golden"
ALIGNMENTS = "alignments.json"
WORDS = "words.json"
LITTER = (".DS_Store",)  # what a file manager leaves behind is no part of a bundle


@contextmanager
def new_bundle(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write a bundle into; it becomes `output` in one step when the block ends."""
    with draft(output, overwrite=overwrite, is_ours=_is_bundle) as folder:
        yield folder


def require_free_bundle(output: Path, *, overwrite: bool) -> None:
    """Raise `OutputExists` before any work is done."""
    require_free(output, overwrite=overwrite, is_ours=_is_bundle)


def keep_failed(folder: Path, output: Path) -> Path:
    """Put a complete bundle that did not pass beside the place that it was meant for, to be looked at."""
    failed = output.with_name(f"{output.name}.failed")
    with draft(failed, overwrite=True, is_ours=_is_bundle) as place:
        place.rmdir()
        folder.rename(place)
    return failed


def write_bundle(bundle: Bundle) -> None:
    """Write everything but the artifacts, which are there already, and `edgefuse.json` last."""
    folder = bundle.folder
    (folder / TOKENS).write_text("".join(f"{token}\n" for token in bundle.tokens), encoding="utf-8")
    for mode, reference in bundle.references.items():
        write_reference(folder / GOLDEN / mode, reference)
    fields = to_json(bundle, {name: _file(folder / name) for name in _names(folder)})
    (folder / MANIFEST).write_bytes(_render({**fields, "digest": _digest(fields)}))


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle, every byte of it checked.

    Raises:
        MissingFile: nothing is there.
        NotABundle: a folder without a whole `edgefuse.json` that this version can read.
        ChangedBundle: a file that is missing, new, or different from what was exported.
    """
    fields = _manifest(folder)
    _check_files(folder, fields["files"])
    try:
        tokens = tuple((folder / TOKENS).read_text(encoding="utf-8").splitlines())
        references = {mode: _read_reference(folder / GOLDEN / mode) for mode in fields["reference"]["modes"]}
        return from_json(folder, fields, tokens, references)
    except (KeyError, TypeError, ValueError, AttributeError, BadConfig, SafetensorError) as error:
        raise NotABundle(f"{folder / MANIFEST} cannot be read: {error!r}.", hint="Export the bundle again.") from error


def write_reference(folder: Path, reference: Reference) -> None:
    """The golden vectors of one mode, one safetensors file each, and its alignments and word errors of the whole test set."""
    folder.mkdir(parents=True)
    for number, golden in enumerate(reference.goldens):
        tensors: dict[str, NDArray[Any]] = {
            "samples": np.ascontiguousarray(golden.samples),
            "features": np.ascontiguousarray(golden.features),
            "length": np.array([golden.logits.shape[0]], dtype=np.float32),
            "logits": np.ascontiguousarray(golden.logits),
            **({} if golden.encoded is None else {ENCODED: np.ascontiguousarray(golden.encoded)}),
        }
        said = json.dumps({"id": golden.identity, "text": golden.text}, sort_keys=True)  # one key: more have no fixed order
        (folder / f"{number:02}.safetensors").write_bytes(save(tensors, metadata={"utterance": said}))
    alignments = {name: list(ids) for name, ids in sorted(reference.alignments.items())}
    (folder / ALIGNMENTS).write_text(json.dumps(alignments) + "\n", encoding="utf-8")
    words = {name: {"part": reference.parts[name], "words": each.words, **each.kinds} for name, each in reference.words.items()}
    (folder / WORDS).write_bytes(_render(words))


def write_folded(output: Path, folded: FoldedModel, exactness: Exactness, *, overwrite: bool = False) -> None:
    """A folded model: a checkpoint, and `plan.json` beside it."""
    with draft(output, overwrite=overwrite, is_ours=_is_folded) as folder:
        checkpoint.write(folder, folded.checkpoint)
        plan = {
            "schema": SCHEMA,
            "parent": folded.parent,
            "folded": folded.digest,
            "relative_error_float64": {"end_to_end": exactness.end_to_end, "worst_site": exactness.worst_site},
            "plan": plan_to_json(folded.plan),
            **origin_to_json(folded.origin),
        }
        (folder / PLAN).write_bytes(_render(plan))


def write_checkpoint(output: Path, whole: Checkpoint, *, overwrite: bool = False) -> None:
    """A checkpoint, in one step."""
    with draft(output, overwrite=overwrite, is_ours=_is_checkpoint) as folder:
        checkpoint.write(folder, whole)


def plan_to_json(plan: Sequence[Fold | Refusal]) -> list[dict[str, Any]]:
    """The plan, site by site."""
    return [
        {"site": site.site, "folded": True, "into": list(site.into), "rule": site.rule, **_writers(site)}
        if isinstance(site, Fold)
        else {"site": site.site, "folded": False, "reason": site.reason}
        for site in plan
    ]


def _writers(site: Fold) -> dict[str, list[str]]:
    return {"writers": list(site.writers)} if site.writers else {}


def read_plan(folder: Path, folded: Checkpoint) -> FoldedModel | None:
    """The folded model of a folder that `write_folded` wrote; None for a folded checkpoint without its plan."""
    try:
        fields = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        plan = tuple(
            Fold(site["site"], tuple(site["into"]), site["rule"], tuple(site.get("writers", ())))
            if site["folded"]
            else Refusal(site["site"], site["reason"])
            for site in fields["plan"]
        )
        matches = fields["folded"] == folded.digest
        return FoldedModel(folded, plan, str(fields["parent"]), origin_of(fields)) if matches else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def size_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def digest_of(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and digests of its files."""
    if path.is_file():
        return _sha256(path)
    told = "\n".join(f"{name} {_sha256(path / name)}" for name in _names(path))
    return hashlib.sha256(told.encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    """`edgefuse.json`, byte for byte as it was written."""
    if not folder.exists():
        raise MissingFile(f"There is nothing at {folder}.", hint="Make a bundle with: edgefuse export CKPT --all -o BUNDLE")
    path = folder / MANIFEST
    if not path.is_file():
        raise NotABundle(
            f"{folder} is not a bundle: it lacks {MANIFEST}.", hint="Make one with: edgefuse export CKPT --all -o BUNDLE"
        )
    content = path.read_bytes()
    try:
        fields = json.loads(content)
        digest = fields.pop("digest")
        whole = digest == _digest(fields) and _render({**fields, "digest": digest}) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ChangedBundle(f"{path} has changed since the export.", hint="Copy the bundle again, or export it again.")
    if fields.get("schema") != SCHEMA:
        raise NotABundle(
            f"{path} has schema {fields.get('schema')!r}; this edgefuse reads {SCHEMA}.", hint="Export the bundle again."
        )
    return dict(fields)


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    here = _names(folder)
    problems = [f"{name} is missing" for name in files if name not in here]
    problems += [f"{name} is new" for name in here if name not in files]
    problems += [f"{name} has changed" for name in here if name in files and _file(folder / name) != files[name]]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""  # noqa: PLR2004 - a sentence, not a list
        raise ChangedBundle(
            f"{folder} is not what was exported: {', '.join(problems[:3])}{more}.",
            hint="Copy the bundle again, or export it again.",
        )


def _read_reference(folder: Path) -> Reference:
    alignments, words = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (ALIGNMENTS, WORDS))
    return Reference(
        parts={name: each.pop("part") for name, each in words.items()},
        words={name: WordErrors(**each, utterances=1) for name, each in words.items()},
        alignments={name: tuple(ids) for name, ids in alignments.items()},
        goldens=tuple(_read_golden(path) for path in sorted(folder.glob("*.safetensors"))),
    )


def _read_golden(path: Path) -> Golden:
    content = path.read_bytes()
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    said = json.loads(header["__metadata__"]["utterance"])
    return Golden(said["id"], said["text"], tensors["samples"], tensors["features"], tensors["logits"], tensors.get(ENCODED))


def _names(folder: Path) -> list[str]:
    """Relative paths of every file but the manifest."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MANIFEST and Path(name).name not in LITTER)


def _file(path: Path) -> dict[str, Any]:
    try:
        return {"size": path.stat().st_size, "sha256": _sha256(path)}
    except OSError as error:
        raise ChangedBundle(f"{path} cannot be read: {error.strerror}.", hint="Copy the bundle again.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _render(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_render(fields)).hexdigest()


def _is_bundle(folder: Path) -> bool:
    """Whether a folder was written by `edgefuse export`, whole or changed since."""
    try:
        return "lineage" in json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _is_folded(folder: Path) -> bool:
    """Whether a folder was written by `edgefuse fold`."""
    try:
        return "relative_error_float64" in json.loads((folder / PLAN).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint that can be read."""
    try:
        checkpoint.read(folder)
    except EdgefuseError:
        return False
    return True
