"""Takes a picture of a running server's dashboard in headless Chromium.

    python scripts/screenshot_dashboard.py http://127.0.0.1:8000/dashboard dashboard.png [--dark] [--width N]

A server that wants a key gets the one in the environment's DVI_API_KEY.
"""

from __future__ import annotations

import argparse
import base64
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


@contextmanager
def browser(*, width: int, is_dark: bool = False) -> Iterator[Chrome]:
    """Chromium with a window of `width` CSS pixels and a profile of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = Chrome(options=options, service=Service(CHROMEDRIVER))
        try:
            # Not the window's size, which has a least width wider than a phone.
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield driver
        finally:
            driver.quit()


def open_dashboard(driver: Chrome, url: str, *, key: str | None = None) -> None:
    """Opens the page and waits until it has drawn the first figures. Raises TimeoutException after 20 s."""
    if key:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"Authorization": f"Bearer {key}"}})
    driver.get(url)
    WebDriverWait(driver, 20).until(lambda d: d.find_element("id", "about").text)


def take(driver: Chrome, path: Path) -> None:
    """Writes the whole page, not only what the window shows, as PNG."""
    picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(picture["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    arguments = parser.parse_args()
    with browser(width=arguments.width, is_dark=arguments.dark) as driver:
        open_dashboard(driver, arguments.url, key=os.environ.get("DVI_API_KEY"))
        take(driver, arguments.picture)
    print(arguments.picture)


if __name__ == "__main__":
    main()
