"""What Android's tools print, read.

The texts in tests/recorded/adb are written after the tools' documented formats; none was recorded from a phone.
"""

from pathlib import Path

import pytest

from edgefuse.errors import DeviceError, DeviceGone, DeviceRefused, UnknownDevice, UsageError
from edgefuse_devices import adb

WRITTEN = Path(__file__).parents[1] / "recorded" / "adb"
LISTED = ("39041FDJH0045H", "emulator-5554", "127.0.0.1:5555", "R58M12ABCDE", "0123456789ABCDEF")


def text(name: str) -> str:
    return (WRITTEN / f"{name}.txt").read_text(encoding="utf-8")


def lines(name: str) -> list[str]:
    return [line.strip() for line in text(name).splitlines()]


def listed() -> list[adb.Attached]:
    return list(adb.attached(text("devices_several")))


def test_a_phones_record_is_read_from_its_properties_written_after_the_format() -> None:
    facts = adb.android_facts({"properties": lines("getprop_android_14"), "machine": ["aarch64"]})
    assert facts["brand"] == "google"
    assert facts["model"] == "Pixel 8"
    assert facts["chip"] == "Tensor G3"
    assert facts["Android"] == "14"
    assert facts["ABI"] == "arm64-v8a"
    assert facts["memory"] == "not told"
    assert "C library of its own" in facts["run as"]


def test_an_older_phone_names_its_chip_by_the_platform_of_its_board() -> None:
    assert adb.android_facts({"properties": lines("getprop_android_9")})["chip"] == "msm8998"


def test_a_device_that_is_no_android_does_not_tell_what_android_would() -> None:
    facts = adb.android_facts({"system": ['PRETTY_NAME="Debian 13"']})
    assert facts["brand"] == facts["Android"] == facts["ABI"] == "not told"
    assert facts["system"] == "Debian 13"


@pytest.mark.parametrize(
    ("name", "level", "warmth"),
    [
        ("dumpsys_battery_charging", "85 %, powered by USB", "28.7 °C"),
        ("dumpsys_battery_cold", "41 %", "-3.5 °C"),
        ("devices_none", "not told", "not told"),
    ],
)
def test_a_battery_is_told_in_words_written_after_the_format(name: str, level: str, warmth: str) -> None:
    assert adb.battery(lines(name)) == (level, warmth)


def test_a_phone_that_throttles_says_so_written_after_the_format() -> None:
    assert adb.thermal_status(lines("dumpsys_thermalservice")) == "moderate"
    assert adb.skin(lines("dumpsys_thermalservice")) == "44.1 °C (VIRTUAL-SKIN)"


def test_an_android_without_a_thermal_service_does_not_tell() -> None:
    assert adb.thermal_status(lines("dumpsys_thermalservice_android_9")) == "not told"
    assert adb.skin(lines("dumpsys_thermalservice_android_9")) == "not told"


def test_a_phones_skin_stands_for_zones_that_a_shell_may_not_read() -> None:
    conditions = adb.android_conditions(f"== thermal\n{text('dumpsys_thermalservice')}\n== zones\n == end\n")
    assert conditions["temperature"] == "44.1 °C (VIRTUAL-SKIN)"
    assert conditions["battery"] == "not told"


def test_devices_are_listed_with_their_states() -> None:
    assert [each.serial for each in listed()] == list(LISTED)
    assert [each.state for each in listed()][:4] == ["device", "offline", "device", "unauthorized"]
    assert listed()[4].state.startswith("no permissions")
    assert listed()[0].told == {"model": "Pixel_8", "product": "shiba"}
    assert adb.attached(text("devices_none")) == []


@pytest.mark.parametrize(
    ("which", "failure", "sentence", "hint"),
    [
        ("", UsageError, "5 Android devices are attached", "adb:39041FDJH0045H"),
        ("nobody", UnknownDevice, "adb knows no device nobody", "adb:emulator-5554"),
        ("emulator-5554", DeviceGone, "emulator-5554 is offline", "adb reconnect"),
        ("R58M12ABCDE", DeviceRefused, "has not accepted this host", "Allow USB debugging"),
        ("0123456789ABCDEF", DeviceRefused, "does not let you use", "udev"),
    ],
)
def test_a_device_that_cannot_be_used_is_a_sentence_with_a_hint(
    which: str, failure: type[DeviceError], sentence: str, hint: str
) -> None:
    with pytest.raises(failure) as refused:
        adb.chosen(listed(), which)
    assert sentence in refused.value.sentence
    assert hint in refused.value.hint


def test_the_only_device_needs_no_name_and_none_is_told_how_to_be_attached() -> None:
    assert adb.chosen(listed()[:1], "").serial == LISTED[0]
    with pytest.raises(UnknownDevice, match="No Android device is attached"):
        adb.chosen([], "")
