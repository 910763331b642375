"""The disk and the kernel of the emulated arm64 board, made from Debian's packages without any right of root.

The board has Debian's arm64 kernel for virtual machines, a small initramfs with the modules that reach its disk, and an ext4
root with busybox, dropbear (a real sshd), and adbd with its libraries. It holds one key that lets us in, and one host key that
we know, both made here. Every boot begins with the same disk: what a guest writes is forgotten.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from edgefuse.atomic import draft, failures_in_words
from edgefuse.device import Lack, cache
from edgefuse.errors import OutputError, RunFailed, SetupFailed
from edgefuse_devices import process

RECIPE = 1  # counts what this module makes; a folder of another recipe is made again
STAMP, KERNEL, INITRD, DISK, KEY, HOST_KEY = "stamp.json", "kernel", "initrd.gz", "disk.img", "key", "host_key"
FILES = (KERNEL, INITRD, DISK, KEY, f"{KEY}.pub", f"{HOST_KEY}.pub")
SUITE = "trixie"  # the first Debian whose adbd is in the archive for arm64
SETUP = "edgefuse devices setup board"
AGAIN = f"It goes on where it was stopped with: {SETUP}"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
USERLAND = ("busybox-static", "dropbear-bin", "adbd")  # and what they depend on
KERNEL_PACKAGE = "linux-image-cloud-arm64"  # depends on the newest one, whose name has its version
MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng")
DISK_BYTES = 1 << 30  # sparse: what is empty takes no room
FETCH_S, TOOL_S = 900, 120
TOOLS: Mapping[str, str] = {
    "qemu-system-aarch64": "qemu-system-arm",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "ssh-keygen": "openssh-client",
}
APPLETS = """
ash awk basename cat chmod chown cp cut date dd df dirname dmesg du echo env expr false find free getty grep head
hostname id ifconfig init insmod ip kill ln ls md5sum mkdir mktemp mount mv nproc od ps pwd rm rmdir sed sh sha256sum
sleep sort stat sync switch_root tail tar taskset tee test top touch tr true umount uname uniq uptime wc which xargs
"""

INITRAMFS_INIT = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs devtmpfs /dev
while read module; do $B insmod /modules/$module; done < /modules/order
n=0
while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do $B sleep 0.1; n=$((n + 1)); done
$B mount -t ext4 -o rw,noatime /dev/vda /root || echo "edgefuse: the board found no disk" > /dev/console
exec $B switch_root /root /sbin/init
"""
RC = """#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
chown -R 0:0 /root /etc/dropbear
hostname edgefuse-board
ifconfig lo 127.0.0.1 up
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
"""
INITTAB = """::sysinit:/etc/rc
::respawn:/usr/sbin/dropbear -F -E -s -p 22
::respawn:/bin/env ADB_EXTERNAL_STORAGE=/data /usr/sbin/adbd
"""
TEXTS: Mapping[str, str] = {
    "etc/rc": RC,
    "etc/inittab": INITTAB,
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/shells": "/bin/sh\n",
    "etc/profile": "export PATH=/bin:/sbin:/usr/bin:/usr/sbin\n",
    "etc/os-release": 'ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie), cut down to an emulated board"\n',
}
FOLDERS = (
    *("bin", "sbin", "proc", "sys", "dev", "tmp", "run", "mnt"),
    *("root/.ssh", "etc/dropbear", "data/local/tmp", "var/tmp", "var/log"),
)
FORGOTTEN = ("usr/share", "usr/lib/systemd", "etc/init.d")  # nothing on the board reads them


@dataclass(frozen=True, slots=True)
class Image:
    """The files that a board is booted from.

    Attributes:
        kernel: Debian's.
        initrd: the initramfs.
        disk: the root, ext4.
        key: the private key that the board lets in.
        host_key: the public key by which the board is known.
    """

    kernel: Path
    initrd: Path
    disk: Path
    key: Path
    host_key: Path


def folder() -> Path:
    """Where the image is kept."""
    return cache() / "board"


def lacking() -> Sequence[Lack]:
    """The programs that make and boot a board, and the image itself, as far as they are not there."""
    absent = [Lack(f"{tool} ({package})", f"apt-get install {package}") for tool, package in TOOLS.items() if not _program(tool)]
    if not KEYRING.exists():
        absent.append(Lack("the keys of Debian's archive (debian-archive-keyring)", "apt-get install debian-archive-keyring"))
    if not _whole(folder()):
        absent.append(Lack("the image of the emulated board", SETUP))
    return absent


def image() -> Image:
    """The image that was made.

    Raises:
        SetupFailed: there is none.
    """
    if not _whole(folder()):
        raise SetupFailed("The image of the emulated board is not there.", hint=f"Make it with: {SETUP}")
    at = folder()
    return Image(at / KERNEL, at / INITRD, at / DISK, at / KEY, at / f"{HOST_KEY}.pub")


def make(tell: Callable[[str], AbstractContextManager[object]]) -> None:
    """Fetch the packages and make the image; what was fetched is not fetched again, and a whole image is left as it is.

    Raises:
        SetupFailed: something could not be fetched or made.
        NoSpace: the disk is full.
        NotWritable: the folder may not be written.
    """
    if _whole(folder()) and _unchanged(folder()):
        return
    if absent := [lack for lack in lacking() if lack.mend.startswith("apt-get")]:
        raise SetupFailed(
            f"The emulated board needs {', '.join(lack.what for lack in absent)}.",
            hint=f"Mend it with: {'; '.join(lack.mend for lack in absent)}",
        )
    try:
        with tell("Fetching the packages of the emulated board"), failures_in_words(cache()):
            userland, kernel = _fetch()
        with tell("Making the disk of the emulated board"), draft(folder(), overwrite=True, is_ours=_ours) as made:
            made.chmod(0o700)
            _make(made, userland, kernel)
    except OutputError as error:
        raise type(error)(error.sentence, hint=f"Name another place by EDGEFUSE_CACHE, then go on with: {SETUP}") from error


def _make(made: Path, userland: Sequence[Path], kernel: Path) -> None:
    root, unpacked = made / "root", made / "kernel.unpacked"
    for package in userland:
        _tool("dpkg-deb", "-x", package, root)
    _tool("dpkg-deb", "-x", kernel, unpacked)
    shutil.copyfile(next((unpacked / "boot").glob("vmlinuz-*")), made / KERNEL)
    (made / INITRD).write_bytes(gzip.compress(_initramfs(root / "usr/bin/busybox", unpacked), 6, mtime=0))
    for name in (KEY, HOST_KEY):
        _tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "edgefuse-board", "-f", made / name)
    _furnish(root, made / f"{KEY}.pub", made / HOST_KEY)
    (made / HOST_KEY).unlink()
    with (made / DISK).open("wb") as disk:
        disk.truncate(DISK_BYTES)
    # Nothing is left to a thread of the guest's kernel, which would take time from what is measured.
    options = ("-O", "^has_journal", "-E", "root_owner=0:0,lazy_itable_init=0", "-m", "0")
    _tool("mke2fs", "-q", "-F", "-t", "ext4", *options, "-d", root, made / DISK)
    for scaffold in (root, unpacked):
        shutil.rmtree(scaffold)
    stamp = {"recipe": RECIPE, "files": {name: _digest(made / name) for name in FILES}}
    (made / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def _furnish(root: Path, key: Path, host_key: Path) -> None:
    """What makes a folder of unpacked packages a board."""
    for name in FORGOTTEN:
        shutil.rmtree(root / name, ignore_errors=True)
    for name in FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "lib").symlink_to("usr/lib")
    for applet in APPLETS.split():
        (root / ("sbin" if applet == "init" else "bin") / applet).symlink_to("/usr/bin/busybox")
    (root / "system/bin").mkdir(parents=True)
    (root / "system/bin/sh").symlink_to("/bin/sh")  # where adbd looks for it
    for name, text in TEXTS.items():
        (root / name).write_text(text, encoding="utf-8")
    (root / "etc/rc").chmod(0o755)
    (root / "var/tmp").chmod(0o1777)
    shutil.copyfile(key, root / "root/.ssh/authorized_keys")
    (root / "etc/dropbear/dropbear_ed25519_host_key").write_bytes(dropbear_key(host_key.read_text(encoding="ascii")))
    for name, mode in {"root": 0o700, "root/.ssh": 0o700, "root/.ssh/authorized_keys": 0o600}.items():
        (root / name).chmod(mode)


def dropbear_key(openssh: str) -> bytes:
    """An ed25519 private key of OpenSSH, without a passphrase, as dropbear keeps it.

    OpenSSH's key ends with two equal check words, the name of the kind, the public key, and the private key, each of these three
    after its length; dropbear keeps the kind and the private key.
    """
    kind = b"ssh-ed25519"
    content = base64.b64decode("".join(line for line in openssh.splitlines() if not line.startswith("-----")))
    private = content[content.rindex(kind) + len(kind) :]
    public_length = struct.unpack_from(">I", private)[0]
    length = struct.unpack_from(">I", private, 4 + public_length)[0]
    start = 8 + public_length
    return struct.pack(">I", len(kind)) + kind + struct.pack(">I", length) + private[start : start + length]


def _initramfs(busybox: Path, kernel: Path) -> bytes:
    """A cpio archive ("newc") with busybox, the modules in the order in which they are loaded, and a script that loads them."""
    modules = dict(_modules(next((kernel / "usr/lib/modules").iterdir())))
    entries: list[tuple[str, int, bytes]] = [(name, 0o40755, b"") for name in ("bin", "proc", "sys", "dev", "root", "modules")]
    entries += [("init", 0o100755, INITRAMFS_INIT.encode()), ("bin/busybox", 0o100755, busybox.read_bytes())]
    entries += [(f"modules/{name}", 0o100644, content) for name, content in modules.items()]
    entries.append(("modules/order", 0o100644, "".join(f"{name}\n" for name in modules).encode()))
    return b"".join(_cpio(number, *entry) for number, entry in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1))


def _cpio(number: int, name: str, mode: int, content: bytes) -> bytes:
    links = 2 if mode & 0o40000 else 1
    fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 4)


def _modules(tree: Path) -> Iterator[tuple[str, bytes]]:
    """The modules that a board needs, after those that they depend on; what the kernel has built in is not among them."""
    files = {path.name.partition(".")[0].replace("-", "_"): path for path in (tree / "kernel").rglob("*.ko*")}
    seen: set[str] = set()

    def walk(name: str) -> Iterator[tuple[str, bytes]]:
        if name in seen or name not in files:
            return
        seen.add(name)
        content = files[name].read_bytes()
        content = lzma.decompress(content) if files[name].suffix == ".xz" else content
        told = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in (told[1].decode() if told else "").split(","):
            yield from walk(other.replace("-", "_"))
        yield f"{name}.ko", content

    for name in MODULES:
        yield from walk(name)


def _fetch() -> tuple[Sequence[Path], Path]:
    """The packages of the userland, with all that they depend on, and the kernel's; apt checks every signature and sum."""
    at = cache() / "apt" / SUITE
    for name in ("lists/partial", "archives/partial", "empty/partial"):
        (at / name).mkdir(parents=True, exist_ok=True)
    (at / "debian.sources").write_text(
        f"Types: deb\nURIs: {_mirror()}\nSuites: {SUITE}\nComponents: main\nSigned-By: {KEYRING}\n", encoding="utf-8"
    )
    _apt(at, "apt-get", "update")
    newest = re.search(r"Depends: (linux-image-\S+)", _apt(at, "apt-cache", "depends", KERNEL_PACKAGE))
    if not newest:
        raise SetupFailed(f"Debian's {KERNEL_PACKAGE} names no kernel.", hint="Try again later.")
    userland = ("install", "-y", "--no-install-recommends", *USERLAND)
    _apt(at, "apt-get", *userland, "--download-only")
    # Without archives apt names every file that it would fetch, those that it has among them.
    named = _apt(at, "apt-get", *userland, "--print-uris", "-o", f"Dir::Cache::archives={at / 'empty'}")
    files = [at / "archives" / line.split()[1] for line in named.splitlines() if line.startswith("'")]
    _apt(at, "apt-get", "download", newest[1])
    kernels = sorted((at / "archives").glob(f"{newest[1]}_*.deb"), key=lambda path: path.stat().st_mtime_ns)
    if not kernels or not files or not all(path.exists() for path in files):
        raise SetupFailed("apt did not leave the packages of the board where it was asked to.", hint=AGAIN)
    return files, kernels[-1]


def _mirror() -> str:
    """The Debian mirror that this machine's apt uses; a `SetupFailed` where it uses none."""
    told = process.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"], limit_s=TOOL_S
    )
    mirror = next(iter(told.stdout.split()), None)
    if mirror is None:
        raise SetupFailed(
            "This machine's apt knows no mirror of Debian, where the board comes from.",
            hint=f"Add one to the sources of apt, then: {SETUP}",
        )
    return mirror.rstrip("/")


def _apt(at: Path, tool: str, *arguments: str) -> str:
    """A view of Debian for arm64 of our own: nothing that this machine's apt knows changes."""
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "Dir::Cache": at,
        "Dir::State::lists": at / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Etc::sourcelist": at / "debian.sources",
        "Dir::Etc::sourceparts": "/dev/null",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    return _tool(tool, "-q", *options, *arguments, limit_s=FETCH_S, cwd=at / "archives")


def _tool(*argv: str | Path, limit_s: float = TOOL_S, cwd: Path | None = None) -> str:
    """What a program prints; its failure in words."""
    try:
        ended = process.checked(process.run(argv, limit_s=limit_s, cwd=cwd), str(argv[0]))
    except RunFailed as error:
        raise SetupFailed(f"The emulated board could not be made. {error.sentence}", hint=AGAIN) from error
    return ended.stdout


def _program(name: str) -> str | None:
    """Where a program is; mke2fs is for administrators in Debian's eyes, and not on everybody's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _whole(at: Path) -> bool:
    """Whether an image of this recipe is there, at a glance."""
    return bool(_stamped(at)) and all((at / name).exists() for name in FILES)


def _unchanged(at: Path) -> bool:
    """Whether it is what was made, byte for byte."""
    return all(_digest(at / name) == digest for name, digest in _stamped(at).items())


def _stamped(at: Path) -> Mapping[str, str]:
    try:
        stamp = json.loads((at / STAMP).read_text(encoding="utf-8"))
        return dict(stamp["files"]) if stamp["recipe"] == RECIPE else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _ours(at: Path) -> bool:
    """A folder may be made again if it is where we keep the image, whatever became of it."""
    return at == folder()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
