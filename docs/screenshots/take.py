"""Takes the screenshots in this folder: `python docs/screenshots/take.py QUICKSTART`.

QUICKSTART is the folder that `ultrafuser quickstart --real` wrote. Commands run in a terminal of 100 columns, and what they
print is drawn by a browser, as is the demo's page.
"""

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from ultrafuser.quickstart.real_data import PROMPTS, Materials


HERE, COLUMNS, PORT = Path(__file__).parent, 100, 7861
ULTRAFUSER = [sys.executable, "-c", "from ultrafuser.cli import main; main()"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
COMMANDS = {
    "check": (["check", "text=base", "math", "code", "--base", "base"], []),
    "explain": (["explain", "fused", PROMPTS["code"], "--chat", "--generate", "128"], []),
    "chat": (["chat", "fused", "--max-new-tokens", "128"], [PROMPTS["text"], PROMPTS["math"], "/who", "/quit"]),
}
# the reports' ink and paper, and the eight colours and eight bright ones of a terminal on dark ground
EIGHT = [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34), (88, 166, 255), (188, 140, 255), (57, 197, 207)]
DARK = TerminalTheme((13, 17, 23), (230, 237, 243), [*EIGHT, (177, 186, 196)], [*EIGHT, (255, 255, 255)])
PAGE = "<body style='margin:0;background:{background};color:{foreground}'><pre style='margin:0;padding:1rem 1.2rem;\
width:max-content;font:15px/1.35 ui-monospace,monospace'>{code}</pre>"


def typed(words: list[str], lines: list[str], folder: Path) -> str:
    """Returns the output of a command in a terminal, with the lines that somebody types when it waits for them."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    terminal = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(COLUMNS), "HF_HUB_OFFLINE": "1"}
    command = [*ULTRAFUSER, *words]
    pipes = {"stdin": slave, "stdout": slave, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, **terminal}, **pipes)
    os.close(slave)
    shown, waiting = b"", list(lines)
    while True:
        try:
            read = os.read(master, 4096)
        except OSError:
            break
        shown += read
        if waiting and Text.from_ansi(shown.decode(errors="ignore")).plain.endswith("\n> "):
            os.write(master, f"{waiting.pop(0)}\n".encode())
    process.wait()
    return shown.decode().replace("\r\n", "\n")


def main(folder: Path) -> None:
    """Takes all of them."""
    with TemporaryDirectory() as short:
        # what is shown has short names
        for name, path in {"base": folder / "base", "fused": folder / "fused", **Materials().adapters}.items():
            Path(short, name).symlink_to(path.resolve())
        take(Path(short))


def take(folder: Path) -> None:
    """Takes all of them, in a folder with base, adapters and the fused model."""
    command = [*ULTRAFUSER, "demo", str(folder / "fused"), "--port", str(PORT)]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        for name, (words, lines) in COMMANDS.items():
            console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
            console.print(f"$ ultrafuser {subprocess.list2cmdline(words)}\n", markup=False, highlight=False)
            console.print(Text.from_ansi(typed(words, lines, folder)))
            page.set_content(console.export_html(theme=DARK, code_format=PAGE, inline_styles=True))
            page.locator("pre").screenshot(path=HERE / f"{name}.png")
        # it says so when it can be opened
        served.stdout.readline()
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1200, "height": 760}, color_scheme=scheme)
            page.set_default_timeout(120_000)
            page.goto(f"http://127.0.0.1:{PORT}")
            page.get_by_label("number input for Tokens at most").fill("128")
            for number, domain in enumerate(("text", "math")):
                page.locator("#prompt textarea").fill(PROMPTS[domain])
                page.locator("#prompt textarea").press("Enter")
                page.wait_for_function(f"document.querySelectorAll('.assistant')[{number}]?.children.length > 20")
                page.wait_for_timeout(20_000)
            page.screenshot(path=HERE / f"demo.{scheme}.png")
        served.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
