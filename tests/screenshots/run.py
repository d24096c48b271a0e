"""Starts TensorBoard on a run folder, opens it in headless Chromium, and keeps a picture of every page.

``pip install playwright`` and a Chromium (``apt-get install chromium``), then
``python tests/screenshots/run.py --logdir runs/quickstart --out shots``. Ends with an error where a page shows nothing.
"""

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PAGES = {
    "timeseries": "card-view",
    "scalars": "tf-scalar-card",
    "custom_scalars": "tf-custom-scalar-multi-line-chart-card",
    "images": "tf-image-loader",
    "text": "tf-text-loader table",
    "projector": "canvas",
    "hparams": "tf-hparams-table-view",
}
"""Page of TensorBoard, and what stands on it once it has something to show."""

QUIET = (
    "--no-sandbox",  # for root
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-angle=swiftshader",  # the projector draws with WebGL
    "--enable-unsafe-swiftshader",
)


@contextlib.contextmanager
def tensorboard(logdir):
    """Serve a run folder and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    server = subprocess.Popen([*command, "--load_fast=false", "--samples_per_plugin=images=100"])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                if b'"' in urllib.request.urlopen(f"{address}/data/runs", timeout=5).read():  # some run is loaded
                    break
            time.sleep(0.5)
        else:
            raise ValueError(f"TensorBoard found no run below {logdir} within a minute")
        yield address
    finally:
        server.terminate()
        server.wait()


def active_pages(address, logdir):
    """Return the pages that have something to show, as TensorBoard says; it looks for embeddings in the background."""
    expected = {"projector"} if any(logdir.rglob("projector_config.pbtxt")) else set()
    for _ in range(60):
        listing = json.load(urllib.request.urlopen(f"{address}/data/plugins_listing"))
        active = [name for name in PAGES if listing.get(name, {}).get("enabled")]
        if expected <= {*active}:
            return active
        time.sleep(0.5)
    return [*active, *expected]


def shoot(address, pages, out, executable, width, height, wait, dark):
    """Save one PNG per page; return the pages that show nothing."""
    from playwright.sync_api import sync_playwright

    empty = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(QUIET))
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        for name in pages:
            page.goto(f"{address}/?darkMode={str(dark).lower()}#{name}")
            page.reload()
            if not appears(page, PAGES[name]):
                empty.append(name)
            page.wait_for_timeout(1000 * wait)  # the charts are drawn after their cards
            page.screenshot(path=str(out / f"{name}.png"))
            print(out / f"{name}.png", flush=True)
        browser.close()
    return empty


def appears(page, selector, seconds=60):
    """Wait until something stands on a page or in one of its frames (the projector is in one); say whether it came."""
    for _ in range(2 * seconds):
        if any(frame.locator(selector).first.is_visible() for frame in page.frames):
            return True
        page.wait_for_timeout(500)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=2200)
    parser.add_argument("--wait", type=float, default=6.0, help="seconds for a page to draw")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    if not given.logdir.is_dir():
        parser.error(f"--logdir {given.logdir} is not a folder: `make quickstart` makes runs/quickstart")
    if given.browser is None:
        parser.error("no Chromium found: apt-get install chromium, or give --browser")
    given.out.mkdir(parents=True, exist_ok=True)
    with tensorboard(given.logdir) as address:
        pages = active_pages(address, given.logdir)
        empty = shoot(address, pages, given.out, given.browser, given.width, given.height, given.wait, given.dark)
    if empty:
        sys.exit(f"nothing to see on: {', '.join(empty)}")


if __name__ == "__main__":
    main()
