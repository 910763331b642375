"""The commands: each parses, calls one function, prints one thing. One place, `run`, catches what was foreseen."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import click

from edgefuse import __version__
from edgefuse.atomic import FORBIDDEN, FULL
from edgefuse.cli import checkpoints, exporting, installing, listening, measuring, quantizing, training
from edgefuse.errors import EdgefuseError, MissingPackage, NoSpace, NotWritable, UsageError

INTERRUPTED, TERMINATED, CLOSED_PIPE = 130, 143, 141  # 128 + the signal's number, as a shell has them
MOST_CHARACTERS = 600  # of an error's sentence; a broken file can make it endless

COMMANDS = (
    *(checkpoints.inspect, checkpoints.fold, checkpoints.convert, checkpoints.average, checkpoints.new),
    *(exporting.export, exporting.verify),
    *(quantizing.calibrate, quantizing.sensitivity, quantizing.search),
    *(listening.transcribe, listening.evaluate, listening.soak),
    *(measuring.bench, measuring.report, measuring.compare, measuring.profile, measuring.ablation),
    *(training.train, training.pretrain, training.study),
    *(installing.targets, installing.devices, installing.doctor),
)


@click.group(commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgefuse")
def cli() -> None:
    """Turn a trained FusionFormer into verified ExecuTorch, Core ML and TFLite artifacts."""


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the exit code. Every foreseen failure ends here as a sentence and a hint."""
    try:
        code = cli.main(list(arguments) or ["--help"], prog_name="edgefuse", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes
        return CLOSED_PIPE
    except (EdgefuseError, click.ClickException, OSError, ModuleNotFoundError) as error:
        told = _in_words(error)
        click.echo(f"error: {_one_line(told.sentence)}", err=True)
        if told.hint:
            click.echo(f"  hint: {_one_line(told.hint)}", err=True)
        return told.exit_code
    return code if isinstance(code, int) else 0


def main() -> None:
    """`edgefuse` on the command line."""
    signal.signal(signal.SIGTERM, _terminate)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for developers, who ask for them with: python -W default
    sys.exit(run(sys.argv[1:]))


def _terminate(*_: object) -> NoReturn:
    """Leave through every `finally`, so that no draft stays behind."""
    sys.exit(TERMINATED)


def _one_line(sentence: str) -> str:
    """A sentence as it may be printed: what a broken file has put into it cannot move the cursor or fill the screen."""
    words = "".join(c if c.isprintable() else " " for c in sentence)
    return words if len(words) <= MOST_CHARACTERS else f"{words[:MOST_CHARACTERS]} ..."


def _in_words(error: EdgefuseError | click.ClickException | OSError | ModuleNotFoundError) -> EdgefuseError:
    """Our own errors are said as they are, those of click, of imports and of the operating system in the same form."""
    if isinstance(error, EdgefuseError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return MissingPackage(f"The package {error.name} is not installed.", hint="See what mends it with: edgefuse doctor")
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        return UsageError(error.format_message(), hint=f"See: {context.command_path if context else 'edgefuse'} --help")
    sentence = f"{error.filename or 'The system'}: {error.strerror or error}."
    if error.errno in FULL:
        return NoSpace(sentence, hint="Free some space; TMPDIR says where temporary files go.")
    if error.errno in FORBIDDEN:
        return NotWritable(sentence, hint="Check the permissions.")
    return EdgefuseError(sentence, hint="Check the path and the disk.")
