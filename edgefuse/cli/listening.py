"""What lets an artifact hear speech: `transcribe`, `evaluate`, `soak`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgefuse.cli.options import PATH, Command, json_option, verbose_option
from edgefuse.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from edgefuse.decode.spelling import Said
    from edgefuse.recognize import Transcript
    from edgefuse.recognizer import Streamed


def decoding_options(command: Command) -> Command:
    """`--beam` and `--hotwords`, on every command that turns speech into text."""
    told = "Phrases to hear more readily, one a line; behind a tab perhaps their weight."
    command = click.option("--hotwords", type=PATH, metavar="FILE", help=told)(command)
    told = "How many texts are kept in view; 1 is greedy search.  [default: 1, with --hotwords 8]"
    return click.option("--beam", type=int, metavar="N", help=told)(command)


@click.command()
@click.argument("artifact", type=PATH)
@click.argument("audio", type=PATH, nargs=-1)
@click.option("--stream", "live", is_flag=True, help="Feed it chunk by chunk; show the text as it forms, and what a chunk costs.")
@click.option("--microphone", is_flag=True, help="Listen to the microphone instead, until Ctrl-C.")
@click.option(
    "--endpoint-silence-ms",
    type=float,
    help="Begin another utterance after so much silence, with --stream.  [default: with --microphone, 800]",
)
@click.option("--second-pass", is_flag=True, help="Let a cascade hear each utterance again when it is over, with --stream.")
@decoding_options
@click.option("--timestamps", is_flag=True, help="Show when each word was said.")
@verbose_option
@json_option
def transcribe(
    artifact: Path,
    audio: tuple[Path, ...],
    live: bool,
    microphone: bool,
    endpoint_silence_ms: float | None,
    second_pass: bool,
    beam: int | None,
    hotwords: Path | None,
    timestamps: bool,
    as_json: bool,
) -> None:
    """Print what ARTIFACT (BUNDLE/model.something) hears in AUDIO files, or in the microphone."""
    from edgefuse.decode.endpoint import Endpointing
    from edgefuse.decode.search import decoding_of
    from edgefuse.listen import listen, record, stream
    from edgefuse.microphone import blocks
    from edgefuse.report import speech_rows, terminal

    _require_sense(audio, live=live, microphone=microphone, endpoint_silence_ms=endpoint_silence_ms, second_pass=second_pass)
    decoding = decoding_of(beam, hotwords)
    endpointing = None if endpoint_silence_ms is None else Endpointing(endpoint_silence_ms)
    whole: tuple[Transcript, ...] = ()
    streamed: tuple[Streamed, ...] = ()
    if microphone:

        def end(said: Said) -> None:
            if not as_json:
                click.echo("\n".join(speech_rows.said_lines(said, timestamps=timestamps)))

        endless, pauses = blocks(terminal.say), endpointing or Endpointing()
        streamed = (record(artifact, decoding, pauses, endless, terminal.say, end, second_pass=second_pass),)
    elif live:
        streamed = stream(artifact, audio, terminal.say, decoding, endpointing, second_pass=second_pass)
    else:
        whole = listen(artifact, audio, decoding)
    if as_json:
        terminal.show_json(speech_rows.streamed_json(streamed) if streamed else speech_rows.transcripts_json(whole))
        return
    if not microphone:
        click.echo("\n".join(speech_rows.transcript_lines(streamed or whole, timestamps=timestamps)))
    if streamed:
        terminal.show_table(speech_rows.STREAMED, speech_rows.streamed_rows(streamed))
    for line in speech_rows.first_pass_lines(streamed) if second_pass else ():
        terminal.say(line)


@click.command()
@click.argument("artifact", type=PATH)
@click.option("--speech", type=PATH, required=True, help="A folder of speech with its manifest, or a corpus.")
@click.option("--set", "sets", multiple=True, help="Only this one; may be given several times.  [default: all but train]")
@decoding_options
@click.option("--stream", "live", is_flag=True, help="In chunks.")
@click.option("--second-pass", is_flag=True, help="Let a cascade hear each utterance again behind its chunks, with --stream.")
@click.option("--against", type=PATH, metavar="ARTIFACT", help="Also how far it is from another one, heard in the same way.")
@click.option("--against-whole", is_flag=True, help="Also how far its chunks, with --stream, are from whole utterances.")
@verbose_option
@json_option
def evaluate(
    artifact: Path,
    speech: Path,
    sets: tuple[str, ...],
    beam: int | None,
    hotwords: Path | None,
    live: bool,
    second_pass: bool,
    against: Path | None,
    against_whole: bool,
    as_json: bool,
) -> None:
    """Print the word error rate of ARTIFACT on speech; with hotwords also without them, and on their words alone."""
    from edgefuse import evaluate as evaluation
    from edgefuse.decode.search import decoding_of
    from edgefuse.report import speech_rows, terminal

    _require_stream(second_pass=second_pass, live=live)
    if against_whole and not live:
        raise UsageError("Without chunks there is nothing to hold against whole utterances.", hint="Add: --stream")
    run = partial(evaluation.evaluate, speech=speech, decoding=decoding_of(beam, hotwords), sets=sets, tell=terminal.step)
    if against or against_whole:
        evaluation.require(artifact, live=live)  # what the second half of the work would refuse
    if against_whole:
        others = run(against or artifact, live=False, whole=True)
    else:
        others = run(against, live=live, second_pass=second_pass) if against else ()
    found = run(artifact, live=live, second_pass=second_pass)
    apart = evaluation.against(found, others) if others else ()
    if as_json:
        terminal.show_json(speech_rows.evaluated_json(found, apart))
        return
    terminal.show_table(speech_rows.EVALUATED, speech_rows.evaluated_rows(found))
    if apart:
        terminal.show_table(speech_rows.AGAINST, speech_rows.against_rows(found, apart))


@click.command()
@click.argument("artifact", type=PATH)
@click.option("--checkpoint", type=PATH, required=True, help="What the artifact was made of.")
@click.option("--minutes", type=int, default=60, show_default=True)
@click.option("--speech", type=PATH, help="Speak this folder of speech, over and over, instead of the shipped one.")
@verbose_option
@json_option
def soak(artifact: Path, checkpoint: Path, minutes: int, speech: Path | None, as_json: bool) -> None:
    """Speak to a streaming ARTIFACT without a pause: does it drift, does it grow?"""
    from edgefuse.pipeline import soak as run
    from edgefuse.report import bundle_rows, terminal

    soaked, found = run(artifact, checkpoint, minutes, speech=speech, tell=terminal.step)
    checks = found.checks(soaked.precision)
    if as_json:
        terminal.show_json(bundle_rows.checks_json(checks))
    else:
        terminal.show_table(bundle_rows.CHECKS, bundle_rows.check_rows(soaked.target, checks))
    if not all(check.passed for check in checks):
        raise GateFailed(f"{artifact} does not endure.", hint="The checks that failed are in the table above.")


def _require_sense(
    audio: tuple[Path, ...], *, live: bool, microphone: bool, endpoint_silence_ms: float | None, second_pass: bool
) -> None:
    if microphone and audio:
        raise UsageError("--microphone and recordings contradict each other.", hint="Give one of them.")
    if not microphone and not audio:
        raise UsageError(
            "No recording is named.", hint="Name some: edgefuse transcribe ARTIFACT AUDIO ...  (or add --microphone)"
        )
    if endpoint_silence_ms is not None and not (live or microphone):
        raise UsageError("Utterances end only in a stream.", hint="Add: --stream")
    _require_stream(second_pass=second_pass, live=live or microphone)


def _require_stream(*, second_pass: bool, live: bool) -> None:
    if second_pass and not live:
        raise UsageError(
            "A whole utterance is heard by both passes of a cascade anyway.", hint="Leave --second-pass away, or add: --stream"
        )
