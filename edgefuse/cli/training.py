"""What trains: `train`, `pretrain`, `study`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgefuse.cli.options import PATH, architecture_option, json_option, precision_of, verbose_option
from edgefuse.errors import UsageError

if TYPE_CHECKING:
    from edgefuse.quantize.scheme import Scheme

BUILT = ("architecture", "preset", "norm")  # options that every checkpoint to begin with decides
DECIDED = (*BUILT, "sampled_depth", "vocabulary_size")  # and those that it decides in a fine-tuning or a conversion
NORMS = ("batch", "layer", "unified", "rep", "batch-in-place", "none")  # as `edgefuse.model.config.Norm` has them


@click.command()
@click.option("--speech", type=PATH, required=True, help="A corpus: LibriSpeech, AISHELL, Lhotse's manifests of them, or cuts.")
@click.option("-o", "--output", type=PATH, required=True, help="The run's folder; its checkpoint is in `checkpoint`.")
@click.option("--features", type=PATH, metavar="DIR", help="Where log-mel frames are kept.  [default: SPEECH/features]")
@click.option("--preset", help="study, tiny, small or base.  [default: tiny]")
@click.option("--norm", type=click.Choice(NORMS), help="batch: a FusionFormer; layer: its twin.  [default: batch]")
@architecture_option
@click.option("--layers-sampled", "sampled_depth", is_flag=True, default=None, help="A step runs 1 to all layers, as it draws.")
@click.option("--epochs", type=int, help="[default: the recipe's]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--vocabulary", "vocabulary_size", type=int, help="Tokens; 29 are characters.  [default: those of --from, or 512]")
@click.option("--learning-rate", "peak_learning_rate", type=float, help="Of the peak.  [default: the recipe's]")
@click.option("--chunked-share", type=float, help="Of the steps, with attention in chunks.  [default: the recipe's]")
@click.option("--from", "start", type=PATH, metavar="CHECKPOINT", help="Begin with it; its tokens stay if they do.")
@click.option("--precision", metavar="NAME|FILE", help="Fine-tune it, folded, for fewer bits; an epoch is 100 batches then.")
@click.option(
    "--convert-norm", is_flag=True, help="Convert it, a LayerNorm Conformer, to one whose norms fold; an epoch is 100 batches."
)
@click.option("--calibration", type=PATH, metavar="SPEECH", help="Where a scheme's ranges come from; or ranges taken from it.")
@click.option("--batch-seconds", type=float, metavar="S", help="Of speech, in each process.  [default: the recipe's, 56]")
@click.option("--workers", type=int, metavar="N", help="Processes that make batches, for a GPU that would wait.  [default: 0]")
@click.option("--accumulate", type=int, metavar="N", help="Batches that a step hears one after another.  [default: 1]")
@click.option("--patience", type=int, metavar="N", help="End after N epochs without a better dev WER; the best is kept.")
@click.option("--checkpoint-minutes", type=float, metavar="MIN", help="Between two checkpoints at most.  [default: 10]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of this run, as if it had never ended.")
@json_option
def train(
    speech: Path,
    output: Path,
    features: Path | None,
    resume: bool,
    threads: int,
    start: Path | None,
    architecture: Path | None,
    precision: str | None,
    convert_norm: bool,
    calibration: Path | None,
    as_json: bool,
    **recipe: Any,  # noqa: ANN401 - the recipe's own fields
) -> None:
    """Train an encoder with CTC, fine-tune a folded one for fewer bits, or convert a Conformer; print its word error rates.

    On several GPUs, or machines: torchrun --nproc-per-node 8 -m edgefuse train ...  Curves: tensorboard --logdir RUN/curves
    """
    from edgefuse.report import speech_rows, terminal

    told = {name: value for name, value in recipe.items() if value is not None}
    if architecture is not None:
        told |= _architecture(architecture, told)
    if convert_norm:
        _require_convertible(start, precision, told)
    elif start and precision is None:
        _require_own(told, "checkpoint", BUILT)
    scheme = _trained_for(precision, start, calibration, told)
    if convert_norm and start:
        from edgefuse.train.convert_norm import convert_norm as convert
        from edgefuse.train.recipe import CONVERSION

        conversion = replace(CONVERSION, **told)
        trained = convert(start, speech, output, conversion, resume=resume, threads=threads, features=features)
    elif scheme and start:
        from edgefuse.train.finetune import fine_tune
        from edgefuse.train.recipe import FINE_TUNING

        tune = partial(fine_tune, start, scheme, speech, output, replace(FINE_TUNING, **told), calibration=calibration)
        trained = tune(resume=resume, threads=threads, features=features)
    else:
        from edgefuse.train.recipe import Recipe
        from edgefuse.train.train import train as run

        trained = run(speech, output, Recipe(**told), resume=resume, threads=threads, features=features, start=start)
    if trained is None:  # one of several processes, and not the first
        return
    if as_json:
        terminal.show_json(speech_rows.trained_json(trained))
    else:
        columns = speech_rows.CHARACTER_ERRORS if trained.characters else speech_rows.ERRORS
        terminal.show_table(columns, speech_rows.error_rows(trained.errors), title=str(trained.folder))


@click.command()
@click.option("--speech", type=PATH, required=True, help="A corpus folder; its transcripts are not read.")
@click.option("-o", "--output", type=PATH, required=True, help="The run's folder; its checkpoint is in `checkpoint`.")
@click.option("--preset", help="study, tiny, small or base.  [default: tiny]")
@click.option("--norm", type=click.Choice(("batch", "layer")), help="FusionFormer, or its twin.  [default: batch]")
@architecture_option
@click.option("--layers-sampled", "sampled_depth", is_flag=True, default=None, help="A step runs 1 to all layers, as it draws.")
@click.option("--epochs", type=int, help="[default: the recipe's]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--learning-rate", "peak_learning_rate", type=float, help="Of the peak.  [default: the recipe's]")
@click.option("--chunked-share", type=float, help="Of the steps, with attention in chunks.  [default: the recipe's]")
@click.option("--resume", is_flag=True, help="Go on from the last whole epoch.")
@json_option
def pretrain(
    speech: Path,
    output: Path,
    resume: bool,
    threads: int,
    architecture: Path | None,
    as_json: bool,
    **recipe: Any,  # noqa: ANN401 - the recipe's own fields
) -> None:
    """Train an encoder on speech without transcripts, to say what is hidden from it; `train --from` goes on from there."""
    from edgefuse.report import checkpoint_rows, terminal
    from edgefuse.train.pretrain import PRETRAINING
    from edgefuse.train.pretrain import pretrain as run

    told = {name: value for name, value in recipe.items() if value is not None}
    if architecture is not None:
        told |= _architecture(architecture, told)
    pretrained = run(speech, output, replace(PRETRAINING, **told), resume=resume, threads=threads)
    if pretrained is None:
        return
    if as_json:
        terminal.show_json(checkpoint_rows.pretrained_json(pretrained))
    else:
        click.echo(checkpoint_rows.pretrained_line(pretrained))


@click.command()
@click.option("--speech", type=PATH, help="A corpus folder, as edgefuse_calibration.synthesize writes it.")
@click.option("-o", "--output", type=PATH, required=True, help="The study's folder; what is finished in it is not done again.")
@click.option("--row", "names", multiple=True, help="Only this one; may be given several times.")
@click.option("--rows", "file", type=PATH, metavar="FILE", help="Other rows than the study's own: a TOML file.")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="How many; the first is 1.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--latency", is_flag=True, help="Measure what all rows cost, untrained, in turns; nothing is trained.")
@click.option("--gpu", is_flag=True, help="Measure on this machine's GPU what a paper claims of one; nothing is trained.")
@click.option("--rounds", type=click.IntRange(2), default=40, show_default=True, help="With --latency and --gpu.")
@click.option("--report-only", is_flag=True, help="Write STUDY.md from the results that are there.")
@verbose_option
def study(
    speech: Path | None,
    output: Path,
    names: tuple[str, ...],
    file: Path | None,
    seeds: int,
    threads: int,
    latency: bool,
    gpu: bool,
    rounds: int,
    report_only: bool,
) -> None:
    """Train every idea of the papers alike, measure what it is worth and what it costs, and write the table, STUDY.md."""
    from edgefuse.report import terminal
    from edgefuse.study.rows import ROWS, read_plan
    from edgefuse.study.run import PAGE, cost_rows, gpu_rows, report_again, train_rows

    plan = read_plan(file or ROWS)
    if report_only:
        report_again(plan, output)
    elif latency or gpu:
        from edgefuse.bench.turns import Turns

        if gpu:
            gpu_rows(plan, output, Turns(rounds=rounds), names=names)
        if latency:
            cost_rows(plan, output, Turns(rounds=rounds, threads=threads), names=names, tell=terminal.step)
    elif speech is None:
        raise UsageError("Nothing says on which speech.", hint="Name a corpus with: --speech CORPUS; or add --latency")
    else:
        train_rows(plan, speech, output, names=names, seeds=range(1, seeds + 1), threads=threads, say=terminal.say)
    click.echo(f"The table: {output / PAGE}")


def _architecture(file: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the recipe that an architecture decides."""
    from edgefuse.model.architecture import norm_of, read_architecture
    from edgefuse.train.recipe import Recipe

    changed = read_architecture(file, told.get("preset", Recipe.preset))
    return {"norm": norm_of(changed, told.get("norm")) or Recipe.norm, "architecture": changed}


def _require_convertible(start: Path | None, precision: str | None, told: Mapping[str, object]) -> None:
    if start is None:
        raise UsageError("A conversion needs a LayerNorm Conformer to begin with.", hint="Name it with: --from CHECKPOINT")
    if precision is not None:
        raise UsageError(
            "A conversion and a fine-tuning for fewer bits are two steps.",
            hint="Convert first, fold what comes out, and then: edgefuse train --from FOLDED --precision ...",
        )
    _require_own(told, "checkpoint", DECIDED)


def _require_own(told: Mapping[str, object], whose: str, options: Sequence[str]) -> None:
    """Refuse options that the checkpoint to begin with decides."""
    for option in options:
        if option in told:
            name = {"sampled_depth": "layers-sampled"}.get(option, option.partition("_")[0])
            raise UsageError(f"--{name} is the {whose}'s own.", hint=f"Leave --{name} away.")


def _trained_for(
    precision: str | None, start: Path | None, calibration: Path | None, told: Mapping[str, object]
) -> Scheme | None:
    """The scheme that a training is for, if it is a fine-tuning; a `UsageError` for what does not go together."""
    if precision is None:
        if calibration is not None:
            raise UsageError("Nothing is calibrated in a training without --precision.", hint="Leave --calibration away.")
        return None
    scheme = precision_of(precision)
    if isinstance(scheme, str):
        raise UsageError(f"{scheme} loses nothing that training could win back.", hint="Fine-tune for fewer bits, such as: int8")
    if start is None:
        raise UsageError("Fewer bits are learnt from a folded checkpoint.", hint="Name it with: --from FOLDED")
    _require_own(told, "folded checkpoint", DECIDED)
    return scheme
