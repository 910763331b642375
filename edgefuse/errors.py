"""Every deliberate failure of edgefuse, and the exit code that it brings.

    EdgefuseError                       1
    ├── UsageError                      2   an option or a combination that makes no sense
    ├── CheckpointError
    │   ├── MissingFile                10   a path that is not there
    │   ├── NotACheckpoint             11   a folder or file that is something else
    │   ├── DamagedCheckpoint          12   truncated or changed bytes
    │   ├── PickledCheckpoint          13   a .pt/.ckpt: it could run code when it is read
    │   ├── NotFinite                  14   NaN or infinite weights
    │   ├── BadStatistics              15   a running variance that is not positive
    │   ├── ShapeMismatch              16   tensors that contradict the config
    │   └── BadConfig                  17   unknown, missing or impossible config values
    ├── TargetError
    │   ├── UnknownTarget              20
    │   ├── MissingPackage             21   the package of a target (or a tool) is not installed
    │   ├── Refused                    22   the target cannot honour this program, and says why
    │   └── ExportFailed               23   the runtime's own exporter failed
    ├── OutputError
    │   ├── OutputExists               30
    │   ├── NotWritable                31
    │   └── NoSpace                    32
    ├── AudioError                     40
    │   ├── EmptyAudio                 41
    │   ├── NotMono                    42
    │   ├── WrongSampleRate            43
    │   ├── AudioTooLong               44
    │   ├── NotAudio                   45
    │   ├── AudioNotFinite             46
    │   └── NoMicrophone               47   none that can be recorded from
    ├── BundleError
    │   ├── NotABundle                 50
    │   └── ChangedBundle              51   a checksum that does not match
    ├── FoldInexact                    60   the fold's float64 error is above its bound
    ├── GateFailed                     61   an artifact does not pass verification
    ├── BadBars                        62   a file of bars that cannot be used
    ├── TrainingDiverged               70   NaN loss
    ├── BadHotwords                    80   a file of hotwords that cannot be used
    ├── QuantizationError
    │   ├── BadScheme                  90   a scheme that cannot be read, or that this model or target lacks the layers for
    │   ├── BadCalibration             91   calibration speech or ranges that cannot be used
    │   └── NothingFits                92   no scheme stays within the bounds of a search
    ├── DeviceError
    │   ├── UnknownDevice             100
    │   ├── DeviceMissing             101   what a device needs is not there: a tool, a package, a set-up
    │   ├── DeviceBusy                102   another benchmark has it
    │   ├── DeviceRefused             103   it is there, but does not let us in
    │   ├── DeviceGone                104   it does not answer any more
    │   ├── RunFailed                 105   a process on it died, hung, or said what nobody understands
    │   ├── SetupFailed               106   something could not be fetched or built
    │   └── BenchFailed               107   something was tried and failed, or its answers were wrong
    └── ResultError
        ├── NotAResult                110   a file that is something else, or of another version
        ├── ChangedResult             111   truncated or edited
        ├── Slower                    112   a comparison says so, and was asked to fail
        ├── BadBudget                 113   a budget that cannot be read
        └── OverBudget                114   a measurement is above its budget

Ctrl-C ends with 130, as everywhere. Only `edgefuse.cli` catches these.
"""

from typing import ClassVar


class EdgefuseError(Exception):
    """A failure that edgefuse foresaw: one sentence, a hint with the next command, an exit code."""

    exit_code: ClassVar[int] = 1

    def __init__(self, sentence: str, hint: str | None = None) -> None:
        """Keep the sentence (what, where) and the hint (the next command)."""
        super().__init__(sentence)
        self.sentence = sentence
        self.hint = hint


class UsageError(EdgefuseError):
    """An option, or a combination of options, that makes no sense."""

    exit_code = 2


class CheckpointError(EdgefuseError):
    """Something is wrong with the checkpoint."""


class MissingFile(CheckpointError):
    """A path that is not there."""

    exit_code = 10


class NotACheckpoint(CheckpointError):
    """A folder or file that is something else."""

    exit_code = 11


class DamagedCheckpoint(CheckpointError):
    """Truncated or changed bytes."""

    exit_code = 12


class PickledCheckpoint(CheckpointError):
    """A pickle, which could run code when it is read."""

    exit_code = 13


class NotFinite(CheckpointError):
    """NaN or infinite weights."""

    exit_code = 14


class BadStatistics(CheckpointError):
    """A running variance that is not positive."""

    exit_code = 15


class ShapeMismatch(CheckpointError):
    """Tensors that contradict the config."""

    exit_code = 16


class BadConfig(CheckpointError):
    """Unknown, missing or impossible config values."""

    exit_code = 17


class TargetError(EdgefuseError):
    """Something is wrong with a target."""


class UnknownTarget(TargetError):
    """A target that is not on the shelf."""

    exit_code = 20


class MissingPackage(TargetError):
    """A package that the work needs is not installed."""

    exit_code = 21


class Refused(TargetError):
    """The target cannot honour this program."""

    exit_code = 22


class ExportFailed(TargetError):
    """The runtime's own exporter failed."""

    exit_code = 23


class OutputError(EdgefuseError):
    """The output cannot be written."""


class OutputExists(OutputError):
    """The output is there already, and stays as it is."""

    exit_code = 30


class NotWritable(OutputError):
    """The output's folder does not let us write."""

    exit_code = 31


class NoSpace(OutputError):
    """The disk is full."""

    exit_code = 32


class AudioError(EdgefuseError):
    """Something is wrong with a recording."""

    exit_code = 40


class EmptyAudio(AudioError):
    """No samples, or fewer than one encoder frame needs."""

    exit_code = 41


class NotMono(AudioError):
    """More than one channel."""

    exit_code = 42


class WrongSampleRate(AudioError):
    """Not 16 kHz."""

    exit_code = 43


class AudioTooLong(AudioError):
    """Longer than the artifact takes."""

    exit_code = 44


class NotAudio(AudioError):
    """A file in no audio format."""

    exit_code = 45


class AudioNotFinite(AudioError):
    """NaN or infinite samples."""

    exit_code = 46


class NoMicrophone(AudioError):
    """No microphone that can be recorded from."""

    exit_code = 47


class BundleError(EdgefuseError):
    """Something is wrong with a bundle."""


class NotABundle(BundleError):
    """A folder that is not a whole bundle."""

    exit_code = 50


class ChangedBundle(BundleError):
    """A file of the bundle has changed since the export."""

    exit_code = 51


class FoldInexact(EdgefuseError):
    """The folded model answers differently in float64."""

    exit_code = 60


class GateFailed(EdgefuseError):
    """An artifact does not pass verification."""

    exit_code = 61


class BadBars(EdgefuseError):
    """Bars that cannot be read, or that no gate can have."""

    exit_code = 62


class TrainingDiverged(EdgefuseError):
    """The loss is not a number any more."""

    exit_code = 70


class BadHotwords(EdgefuseError):
    """Hotwords that cannot be read, or that the model cannot write."""

    exit_code = 80


class QuantizationError(EdgefuseError):
    """Something is wrong with a scheme, or with what it was calibrated on."""


class BadScheme(QuantizationError):
    """A scheme that cannot be read, or that names what is not there."""

    exit_code = 90


class BadCalibration(QuantizationError):
    """Speech that ranges cannot be taken from, or ranges that cannot be used."""

    exit_code = 91


class NothingFits(QuantizationError):
    """No scheme that was found stays within the bounds."""

    exit_code = 92


class DeviceError(EdgefuseError):
    """Something is wrong with a device."""


class UnknownDevice(DeviceError):
    """A kind of device that is not on the shelf, or a device that is not there."""

    exit_code = 100


class DeviceMissing(DeviceError):
    """What a device needs is not there."""

    exit_code = 101


class DeviceBusy(DeviceError):
    """Another benchmark has the device."""

    exit_code = 102


class DeviceRefused(DeviceError):
    """The device is there, but does not let us in."""

    exit_code = 103


class DeviceGone(DeviceError):
    """The device does not answer any more."""

    exit_code = 104


class RunFailed(DeviceError):
    """A process on a device died, hung, or said what nobody understands."""

    exit_code = 105


class SetupFailed(DeviceError):
    """Something that a device needs could not be fetched or built."""

    exit_code = 106


class BenchFailed(DeviceError):
    """Something was tried and failed, or its answers were wrong; the rest was measured."""

    exit_code = 107


class ResultError(EdgefuseError):
    """Something is wrong with a result."""


class NotAResult(ResultError):
    """A file that is something else, or a result of another version."""

    exit_code = 110


class ChangedResult(ResultError):
    """A result that is truncated or edited."""

    exit_code = 111


class Slower(ResultError):
    """What is new is slower than what it is compared with."""

    exit_code = 112


class BadBudget(ResultError):
    """A budget that cannot be read, or that speaks of nothing that is measured."""

    exit_code = 113


class OverBudget(ResultError):
    """A measurement is above its budget."""

    exit_code = 114
