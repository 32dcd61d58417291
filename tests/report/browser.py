"""Opens a page in Chromium (Qt WebEngine), run by a Python that has PyQt6-WebEngine: prints what it saw as JSON.

usage: browser.py PAGE WIDTH light|dark [PICTURE.png]   or   browser.py PAGE print PAPER.pdf
"""

import json
import os
import sys
from pathlib import Path

page, width = Path(sys.argv[1]).resolve(), sys.argv[2]
scheme = sys.argv[3] if width != "print" else "dark"  # paper must stay light
os.environ["QT_QPA_PLATFORM"] = "offscreen"
if os.geteuid() == 0:  # Chromium refuses to run its sandbox as root
    os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
    f"--disable-gpu --blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
)

from PyQt6.QtCore import QTimer, QUrl  # noqa: E402
from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor  # noqa: E402
from PyQt6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PyQt6.QtWidgets import QApplication  # noqa: E402

SEEN = """JSON.stringify({
  text: document.body.innerText,
  width: innerWidth,
  content: document.documentElement.scrollWidth,
  height: document.documentElement.scrollHeight,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  svgs: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height]),
  scrolled: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
  outside: [...document.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll, pre, svg, details") && e.getBoundingClientRect().right > innerWidth + 0.5
  ).map(e => e.outerHTML.slice(0, 120)),
  scripts: document.scripts.length,
  hacked: typeof window.hacked,
})"""


class Requests(QWebEngineUrlRequestInterceptor):
    """Everything that the page asked for."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def interceptRequest(self, info):
        self.urls.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    """Its console lines are kept."""

    def __init__(self, profile):
        super().__init__(profile)
        self.lines = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.lines.append(message)


application = QApplication(sys.argv[:1])
profile, requests = QWebEngineProfile(), Requests()
profile.setUrlRequestInterceptor(requests)
view = QWebEngineView()
shown = Page(profile)
view.setPage(shown)
view.resize(int(width) if width.isdigit() else 794, 900)
view.show()


def report(seen):
    result = {**json.loads(seen), "requests": requests.urls, "console": shown.lines}
    sys.stdout.write(json.dumps(result) + "\n")
    if len(sys.argv) > 4:
        view.resize(int(width), min(result["height"], 9000))
        QTimer.singleShot(900, picture)
    elif width == "print":
        shown.pdfPrintingFinished.connect(lambda path, done: application.exit(0 if done else 1))
        shown.printToPdf(str(Path(sys.argv[3]).resolve()))
    else:
        application.quit()


def picture():
    view.grab().save(sys.argv[4])
    application.quit()


shown.loadFinished.connect(lambda done: QTimer.singleShot(400, lambda: shown.runJavaScript(SEEN, report)))
shown.load(QUrl.fromLocalFile(str(page)))
QTimer.singleShot(60_000, lambda: application.exit(9))
code = application.exec()
sys.stdout.flush()
os._exit(code)  # Qt tears down its objects in an order that may crash
