"""One job in a fresh Chromium: `python -m edgefuse_devices.browser_worker FOLDER CHROMIUM PAGE PACKAGES`.

It is a runner by the contract of `plan.py`: FOLDER holds the plan, its last line is JSON. It serves the page, the packages and
the job to this host alone, isolated, so that the page has threads and a fine clock, and looks at the memory of the page's
process. What goes wrong is the last line of its stderr.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgefuse_devices.plan import ANSWERS, FEED, PLAN, read_plan

FLAGS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-store",
}
TYPES = {".html": "text/html", ".js": "text/javascript", ".json": "application/json", ".wasm": "application/wasm"}
STARTED_MS = 60_000  # for the browser and its page, before the job begins
MOST_BYTES = 1 << 30  # of answers
LOOK_S = 0.05  # how often the server looks whether it is to end


class Failed(Exception):
    """What went wrong, in words."""


def serves(folder: Path, page: Path, packages: Path) -> Mapping[str, Path]:
    """Every file that a job's page may read, by its path below the server's secret."""
    job = [PLAN, FEED, read_plan(folder).model.name]
    modules = packages / "node_modules"
    return {
        "": page / "index.html",
        "runner.js": page / "runner.js",
        **{f"job/{name}": folder / name for name in job},
        **{f"npm/{path.relative_to(modules).as_posix()}": path for path in modules.rglob("*") if path.is_file()},
    }


@contextlib.contextmanager
def serving(files: Mapping[str, Path], answers: Path) -> Iterator[str]:
    """The address of a page that can read these files, leave its answers, and do nothing else; gone behind the block."""
    prefix = f"/{secrets.token_urlsafe(16)}/"

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = files.get(self.path.removeprefix(prefix)) if self.path.startswith(prefix) else None
            if path is None or not path.is_file():
                self.reply(404)
            else:
                self.reply(200, path.read_bytes(), TYPES.get(path.suffix, "application/octet-stream"))

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", "0"))
            if self.path != f"{prefix}job/{ANSWERS}" or length > MOST_BYTES:
                self.reply(404)
            else:
                answers.write_bytes(self.rfile.read(length))
                self.reply(200)

        def reply(self, code: int, body: bytes = b"", kind: str = "text/plain") -> None:
            self.send_response(code)
            for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: stderr is for what goes wrong."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(LOOK_S,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run(chromium: str, address: str) -> Mapping[str, Any]:
    """What the page says of the job.

    Raises:
        Failed: the browser does not start, the page stops with an error, or its process dies.
    """
    from playwright.sync_api import Error, sync_playwright

    root = os.geteuid() == 0  # as root Chromium refuses to start with its sandbox
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, headless=True, args=[*FLAGS], chromium_sandbox=not root, timeout=STARTED_MS
            )
            page = browser.new_page()
            page.goto(address, timeout=STARTED_MS)
            page.wait_for_function("window.edgefuse !== undefined", timeout=STARTED_MS)
            processes = browser.new_browser_cdp_session()
            before = {pid: resident(pid, "VmRSS") for pid in renderers(processes)}
            said: dict[str, Any] = page.evaluate("edgefuse.measure()")
            peak, pid = max((resident(pid, "VmHWM"), pid) for pid in renderers(processes))
            said["warm_load_ns"] = page.evaluate("edgefuse.again()")
            said["browser"] = f"Chromium {browser.version}"
            browser.close()
    except Error as error:
        raise Failed(in_words(error.message)) from error
    return {**said, "peak_bytes": peak, "before_bytes": before.get(pid, 0)}


def in_words(message: str) -> str:
    """What Playwright says of a failure, as one sentence."""
    first = message.strip().splitlines()[0] if message.strip() else "it did not say why"
    _, _, reason = first.partition(": ")
    if "crashed" in first:
        return "the page's process died"
    if "sandboxing failed" in message:
        return "its sandbox could not be set up: let users have namespaces, as it asks for"
    if "has been closed" in first or "Connection closed" in first:
        fatal = [line.partition("FATAL:")[2].strip() for line in message.splitlines() if "FATAL:" in line]
        return f"it died: {fatal[0]}" if fatal else "it died"
    return f"the page stopped: {reason or first}"


def renderers(session: Any) -> list[int]:  # noqa: ANN401 - Playwright's session
    """The processes of the browser that hold pages."""
    return [int(each["id"]) for each in session.send("SystemInfo.getProcessInfo")["processInfo"] if each["type"] == "renderer"]


def resident(pid: int, field: str) -> int:
    """A process' resident memory in bytes, now (VmRSS) or at most (VmHWM); 0 where the system does not tell, or it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def main() -> None:
    """Run the job of a folder."""
    folder, chromium, page, packages = sys.argv[1:]
    try:
        with serving(serves(Path(folder), Path(page), Path(packages)), Path(folder) / ANSWERS) as address:
            said = run(chromium, address)
    except Failed as error:
        sys.exit(str(error))
    print(json.dumps(said))  # noqa: T201 - a runner says what it has to say on stdout


if __name__ == "__main__":
    main()
