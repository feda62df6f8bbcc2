"""Make the pictures of README.md: the terminal of a quickstart as SVG, and its report as PNG.

    python tools/pictures.py FOLDER

Runs `overnight quickstart` in FOLDER, unless it was run there before by this program, and writes
docs/images/terminal.svg, report-light.png and report-dark.png. Needs a Chromium on the PATH, and Pillow.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

IMAGES = Path(__file__).parents[1] / "docs/images"
COLUMNS = 92
WIDTH, HEIGHT, SCALE = 980, 1345, 1.5
PNG_BYTES, SVG_BYTES = 200_000, 60_000
COLOURS = 96

THEME = TerminalTheme(
    (20, 22, 26),
    (228, 230, 234),
    [(40, 44, 52), (255, 143, 180), (95, 207, 176), (220, 185, 75)]
    + [(143, 168, 255), (213, 154, 240), (95, 207, 207), (228, 230, 234)],
)
# Rich's own frame asks for a font from the network, which a picture inside a page may not load.
FRAME = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def record_quickstart(folder: Path) -> str:
    """What `overnight quickstart` prints in `folder`; it is run there once, and what it printed is kept."""
    log = folder / "quickstart.log"
    if not log.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "overnight", "quickstart"]
        run = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
        )
        log.write_bytes(run.stdout)
    return log.read_text(encoding="utf-8")


def write_report(folder: Path) -> Path:
    """The report of the quickstart in `folder`, written again by the code as it is now."""
    command = [sys.executable, "-m", "overnight", "report", "runs/quickstart"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "runs/quickstart/report.html"


def shorten(output: str) -> list[str]:
    """The lines of the output in which something is computed, without those on how long files were read."""
    lines = output.rstrip().splitlines()
    return [line for line in lines if not re.match(r"(hashing|reading|encoding|compress)\b", line)]


def paint(line: str) -> Text:
    """A line of the output with its numbers and its first words in colour."""
    text = Text(line)
    text.highlight_regex(
        r"^(step +\d+|next:|device|precision|compile|attention|loss|activation checkpointing"
        r"|micro batch size|validation loss|bits per byte|speed|a sample|report)",
        "blue",
    )
    text.highlight_regex(r"\d[\d.,]*(?= bits per byte| nats)", "yellow")
    text.highlight_regex(r"^ +this model.*$", "bold green")
    return text


def draw_terminal(output: str) -> str:
    """The terminal, with the command and its output, as SVG."""
    with tempfile.TemporaryFile("w") as nowhere:
        console = Console(
            record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        console.print(Text("$ make quickstart", style="bold"))
        for line in shorten(output):
            console.print(paint(line), soft_wrap=False, overflow="fold")
        console.print()
        return console.export_svg(title="", theme=THEME, code_format=FRAME, unique_id="terminal")


def photograph(page: Path, to: Path, chromium: str, *, dark: bool) -> None:
    """The top of a page as PNG, in the light or the dark scheme."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "page.png"
        source = Path(folder) / "page.html"
        scheme = "dark" if dark else "light"
        source.write_text(with_scheme(page.read_text(encoding="utf-8"), scheme), encoding="utf-8")
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/x",
        ]
        size = [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SCALE}"]
        subprocess.run(
            [chromium, *options, *size, f"--screenshot={raw}", source.as_uri()],
            check=True,
            capture_output=True,
        )
        with Image.open(raw) as image:
            image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(to, optimize=True)


def with_scheme(page: str, scheme: str) -> str:
    """The page as a browser with that colour scheme shows it, with a smaller margin at its top."""
    other = "dark" if scheme == "light" else "light"
    page = page.replace("</head>", "<style>main { padding-top: 2rem !important; }</style></head>")
    page = page.replace(f"(prefers-color-scheme: {scheme})", "all")
    return page.replace(f"(prefers-color-scheme: {other})", "not all")


def check_size(path: Path, limit: int) -> None:
    """Raise ValueError if a picture is larger than it may be."""
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, and may have {limit:,}")
    print(f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}  {size:,} bytes")


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the quickstart is run, or was run")
    folder = parser.parse_args().folder
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium on the PATH: install one (Debian: apt-get install chromium)")
    output = record_quickstart(folder)
    IMAGES.mkdir(exist_ok=True)
    terminal = IMAGES / "terminal.svg"
    terminal.write_text(draw_terminal(html.unescape(output)), encoding="utf-8")
    check_size(terminal, SVG_BYTES)
    report = write_report(folder)
    for scheme in ("light", "dark"):
        picture = IMAGES / f"report-{scheme}.png"
        photograph(report, picture, chromium, dark=scheme == "dark")
        check_size(picture, PNG_BYTES)


if __name__ == "__main__":
    main()
