"""What is said to a shell on another machine, and what it says, without any machine."""

import base64
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from edgefuse.errors import DeviceError, DeviceGone, DeviceRefused, RunFailed, SetupFailed, UnknownDevice
from edgefuse.measurement import DeviceInfo
from edgefuse_devices import board_image, remote, ssh

INFO = DeviceInfo("ssh:here", "here", "device")


class Here:
    """A far shell that is this machine's own."""

    name = "here"

    def shell(self, script: str, *, limit_s: float) -> remote.Said:
        ended = subprocess.run(["/bin/sh", "-c", remote.scripted(script)], check=False, capture_output=True, timeout=limit_s)
        said = remote.said_in(ended.stdout)
        if said is None:
            raise remote.gone(self.name)
        return said

    def push(self, files: Mapping[str, Path], folder: str) -> None:
        for name, path in files.items():
            (Path(folder) / name).write_bytes(path.read_bytes())

    def pull(self, path: str) -> bytes:
        return Path(path).read_bytes()


@pytest.mark.parametrize(
    ("script", "text", "code"),
    [
        ("echo hello", "hello\n", 0),
        ("printf hello", "hello", 0),
        ("exit 7", "", 7),
        ("kill -9 $$ & wait; printf 'a\\nb'; false", None, None),
        (f"echo {remote.ENDED} 0; exit 3", f"{remote.ENDED} 0\n", 3),
    ],
)
def test_a_script_tells_what_it_says_and_how_it_ends_or_is_not_taken_for_ended(script: str, text: str, code: int) -> None:
    ended = subprocess.run(["/bin/sh", "-c", remote.scripted(script)], check=False, capture_output=True, timeout=10)
    said = remote.said_in(ended.stdout)
    assert (said and said.text, said and said.code) == (text, code)


def test_the_line_ends_of_an_old_adb_are_no_part_of_what_is_said() -> None:
    said = remote.said_in(f"{remote.BEGUN}\r\none\r\ntwo\r\n\r\n{remote.ENDED} 5\r\n".encode())
    assert said == remote.Said(b"one\r\ntwo\r\n", 5)
    assert said.text == "one\ntwo\n"


def test_answers_come_through_byte_for_byte_whatever_a_profile_prints_before_them() -> None:
    content = bytes(range(256)) * 3
    said = f"Welcome!\n{remote.BEGUN}\n".encode() + content + f"\n{remote.ENDED} 0\n".encode()
    assert remote.said_in(said) == remote.Said(content, 0)


def test_a_folder_of_ours_is_gone_behind_the_block_whatever_ends_it(tmp_path: Path) -> None:
    with pytest.raises(RunFailed), remote.remote(Here(), INFO, [str(tmp_path)], taskset=False) as connection:
        die_in(Path(connection.home), tmp_path)
    assert list(tmp_path.iterdir()) == []


def die_in(home: Path, place: Path) -> None:
    assert home.parent == place
    assert home.stat().st_mode & 0o777 == 0o700
    raise RunFailed("It died.")


def test_the_first_place_that_takes_a_folder_is_taken(tmp_path: Path) -> None:
    with remote.remote(Here(), INFO, [f"{tmp_path}/nowhere", str(tmp_path)], taskset=False) as connection:
        assert Path(connection.home).parent == tmp_path
    with (
        pytest.raises(DeviceRefused, match="lets us write to none of"),
        remote.remote(Here(), INFO, [f"{tmp_path}/nowhere"], taskset=False),
    ):
        pass


def test_a_folder_that_a_shell_would_take_for_two_is_not_worked_in(tmp_path: Path) -> None:
    (tmp_path / "John").mkdir()
    (tmp_path / "John Doe").mkdir()
    with (
        pytest.raises(DeviceRefused, match="take that for several words"),
        remote.remote(Here(), INFO, [f"{tmp_path}/John Doe"], taskset=False),
    ):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["John", "John Doe"]


@pytest.mark.parametrize(("argv", "ending"), [(["echo", "hello"], "hello\n"), (["sh", "-c", "exit 7"], None)])
def test_a_process_that_has_ended_leaves_no_number_by_which_another_could_be_killed(
    tmp_path: Path, argv: list[str], ending: str | None
) -> None:
    with remote.remote(Here(), INFO, [str(tmp_path)], taskset=False) as connection:
        job = Path(connection.home) / remote.JOB
        job.mkdir()
        if ending is None:
            with pytest.raises(RunFailed, match="ended with 7"):
                connection._process(argv, 10)
        else:
            assert connection._process(argv, 10) == ending
        assert not (job / remote.PID).exists()


def test_what_does_not_arrive_whole_is_removed(tmp_path: Path) -> None:
    def full(self: Here, files: Mapping[str, Path], folder: str) -> None:
        Here.push(self, files, folder)
        raise remote.cannot_write(self.name, f"tar: {remote.FULL}")

    file = tmp_path / "file"
    file.write_text("content")
    far = type("Full", (Here,), {"push": full})()
    with remote.remote(far, INFO, [str(tmp_path)], taskset=False) as connection:
        with pytest.raises(RunFailed, match="The disk of here is full"):
            connection._put("model", {"file": file})
        assert list(Path(connection.home).iterdir()) == []


def test_cores_are_named_by_what_arm_calls_them() -> None:
    cpuinfo = [line for part in ("0xd05", "0xd05", "0xd0b", "0xfff") for line in ("processor\t: 0", f"CPU part\t: {part}")]
    assert remote.cores_in(cpuinfo) == "2 x Cortex-A55, 1 x Cortex-A76, 1 x ARM part 0xfff"
    assert remote.cores_in(["processor\t: 0", "processor\t: 1"]) == "2 cores"
    assert remote.cores_in([]) == "not told"


def test_the_hottest_zone_that_can_be_believed_is_the_temperature() -> None:
    assert remote.hottest(["45123 cpu-thermal", "51900 gpu", "-274000 modem", "999999 off", "cat"]) == "51.9 °C (gpu)"
    assert remote.hottest([]) == "not told"


def test_conditions_are_told_in_words_and_silence_is_told_too() -> None:
    told = "== load\n0.52 0.40 0.30 1/99 7\n== governor\nschedutil\nschedutil\n== frequency\n600000\n1500000\n== zones\n== end\n"
    assert remote.conditions_in(told) == {
        "load": "0.52",
        "temperature": "not told",
        "governor": "schedutil",
        "frequency": "1500 MHz",
    }
    assert set(remote.conditions_in("").values()) == {"not told"}


@pytest.mark.parametrize(
    ("df", "free"),
    [
        ("Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/root 100 40 60 40% /\n", 60 << 10),
        ("Filesystem     1K-blocks   Used Available Use% Mounted on\n/dev/fuse 1 0 1 1% /data/a b\n", 1 << 10),
        ("df: nothing", None),
        ("", None),
    ],
)
def test_free_space_is_read_from_df(df: str, free: int | None) -> None:
    assert remote.free_bytes(df) == free


@pytest.mark.parametrize(
    ("complaint", "failure", "sentence", "hint"),
    [
        ("ssh: Could not resolve hostname b: Name or service not known", UnknownDevice, "Nobody knows", "name right"),
        ("ssh: connect to host b port 22: Connection refused", DeviceRefused, "refuses connections", "sshd"),
        ("ssh: connect to host b port 22: Connection timed out", DeviceGone, "does not answer", "switched on"),
        ("ssh: connect to host b port 22: No route to host", DeviceGone, "does not answer", "switched on"),
        ("pi@b: Permission denied (publickey,password).", DeviceRefused, "does not accept any", "ssh-copy-id pi@b"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", DeviceRefused, "another host key", "ssh-keygen -R b"),
        ("Host key verification failed.", DeviceRefused, "not known yet", "ssh pi@b"),
        ("kex: no match.", DeviceRefused, "could not reach pi@b: kex: no match.", "ssh -v pi@b"),
        ("", DeviceGone, "did not answer within", "ssh pi@b"),
    ],
)
def test_what_ssh_complains_about_is_a_sentence_with_a_hint(
    complaint: str, failure: type[DeviceError], sentence: str, hint: str
) -> None:
    refused = ssh.refused("pi@b", complaint)
    assert type(refused) is failure
    assert sentence in refused.sentence
    assert hint in refused.hint


def test_another_machine_than_a_64_bit_arm_is_refused() -> None:
    remote.require_arm64("here", "aarch64")
    with pytest.raises(DeviceRefused, match="here is x86_64; the runners are made for aarch64"):
        remote.require_arm64("here", "x86_64")


def test_an_openssh_key_is_told_to_dropbear() -> None:
    def told(*parts: bytes) -> bytes:
        return b"".join(struct.pack(">I", len(part)) + part for part in parts)

    kind, public, private = b"ssh-ed25519", bytes(range(32)), bytes(range(64, 128))
    secret = bytes(8) + told(kind, public, private, b"a comment") + b"\1\2"
    content = b"openssh-key-v1\0" + told(b"none", b"none", b"") + b"\0\0\0\1" + told(told(kind, public), secret)
    key = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{base64.encodebytes(content).decode()}-----END OPENSSH PRIVATE KEY-----\n"
    assert board_image.dropbear_key(key) == told(kind, private)


def test_a_board_without_an_image_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFUSE_CACHE", str(tmp_path))
    assert [lack.mend for lack in board_image.lacking()][-1] == "edgefuse devices setup board"
    with pytest.raises(SetupFailed, match="is not there"):
        board_image.image()
