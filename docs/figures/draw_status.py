"""Draws docs/figures/status.svg: what `nha status` prints while a run is trained.

Run it while the quick start trains, e.g. `uv run python docs/figures/draw_status.py
runs/quickstart`: the text in the picture is what the command printed then.
"""

import argparse
import html
import subprocess
import sys
import textwrap
from pathlib import Path

COLUMNS, LINE, MARGIN = 100, 21, 18
CHARACTER = 8.43  # width of a character of the font below, in pixels

STYLE = """
  rect { fill: #14171f; }
  text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #d8dee9;
         white-space: pre; }
  text.command { fill: #8fbcbb; }
"""


def draw(command: str, output: str) -> str:
    """Makes an SVG of a terminal with a command and what it printed."""
    lines = [("command", f"$ {command}")]
    for line in output.splitlines():
        wrapped = textwrap.wrap(line, COLUMNS, subsequent_indent=" " * 9) or [""]
        lines += [("", part) for part in wrapped]
    width = round(2 * MARGIN + COLUMNS * CHARACTER)
    height = 2 * MARGIN + LINE * len(lines)
    texts = [
        f'<text class="{kind}" x="{MARGIN}" y="{MARGIN + LINE * n + 15}">{html.escape(text)}</text>'
        for n, (kind, text) in enumerate(lines)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{html.escape(command)}">',
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{height}" rx="10"/>',
            *texts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run, best while it is trained")
    run = parser.parse_args().run
    status = [sys.executable, "-m", "nha_jax", "status", run]
    printed = subprocess.run(status, check=True, capture_output=True, text=True).stdout
    Path(__file__).with_name("status.svg").write_text(draw(f"nha status {run}", printed))
