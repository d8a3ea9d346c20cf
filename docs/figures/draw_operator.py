"""Draws docs/figures/operator.svg: slots and window under one softmax.

Run it from anywhere: `python docs/figures/draw_operator.py`. It needs nothing but Python. The bars
are the numbers of a small example: the softmax of the logits below, and what slots of the
half-lives below still hold of every token that has left the window.
"""

# ruff: noqa: RUF001, the figure is set with a minus sign and Greek letters

import math
from pathlib import Path

NUM_OLD, WINDOW = 18, 8  # tokens that have left the window, and W
HALF_LIVES = (1.5, 3.0, 6.0, 12.0, 40.0)  # of the M slots, in tokens
SLOT_LOGITS = (0.2, 1.3, 0.5, 1.7, 0.9)
WINDOW_LOGITS = (-0.6, 0.5, -0.2, 1.1, -0.9, 0.7, 1.5, 2.1)

WIDTH, HEIGHT = 954, 412
CELL, PITCH = 22, 26  # side of a token, and the distance from one to the next
LEFT = 122
LABEL_X = LEFT - 24  # right edge of the rows' labels
SOFTMAX_TOP, SOFTMAX_FOOT = 48, 146  # of the bars' frame, and of the bars
SLOTS_TOP, SLOTS_HEIGHT = 204, 66
LANE_Y = SLOTS_TOP + SLOTS_HEIGHT + 36  # along it the entering token reaches every slot
TOKENS_TOP = 350
WINDOW_X = LEFT + NUM_OLD * PITCH + 14
RIGHT = WINDOW_X + WINDOW * PITCH
ENTERS_X = LEFT + (NUM_OLD - 1) * PITCH + CELL / 2  # centre of token t - W
SLOT_PITCH = (NUM_OLD * PITCH - (PITCH - CELL) + 10) / len(HALF_LIVES)
SLOT_WIDTH = SLOT_PITCH - 10

STYLE = """
  text { font: 14px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2430; }
  text.small { font-size: 12px; fill: #5f6877; }
  text.strong { font-weight: 600; }
  text.formula { font: italic 14px Georgia, "Times New Roman", serif; }
  .card { fill: #ffffff; stroke: #d5d9e0; stroke-width: 1.5; }
  .frame { fill: none; stroke: #d5d9e0; stroke-width: 1.5; }
  .old { fill: #c3c9d4; }
  .slot, text.slot { fill: #d9720b; }
  .window, text.window { fill: #2467c9; }
  .slot-box { fill: #fdf1e2; stroke: #d9720b; }
  .line { fill: none; stroke: #5f6877; stroke-width: 1.4; }
  .slot-line { fill: none; stroke: #d9720b; stroke-width: 1.4; }
  .window-line { fill: none; stroke: #2467c9; stroke-width: 1.4; opacity: 0.6; }
  .line-head { fill: #5f6877; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e8ebf0; }
    text.small { fill: #a3acba; }
    .card { fill: #15181e; stroke: #3a414d; }
    .frame { stroke: #3a414d; }
    .old { fill: #5a6371; }
    .slot, text.slot { fill: #f39a3e; }
    .window, text.window { fill: #6ea4f4; }
    .slot-box { fill: #33261a; stroke: #f39a3e; }
    .line { stroke: #a3acba; }
    .slot-line { stroke: #f39a3e; }
    .window-line { stroke: #6ea4f4; }
    .line-head { fill: #a3acba; }
  }
"""


def element(name: str, content: str = "", **attributes: object) -> str:
    """Returns one SVG element; of attribute names `class_` stands for `class`, `_` for a dash."""
    pairs = (f'{key.rstrip("_").replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f"<{' '.join((name, *pairs))}>{content}</{name}>"


def box(
    x: float, y: float, width: float, height: float, class_: str, *, radius: float = 3, **more
) -> str:
    """Returns a rectangle with rounded corners."""
    sides = {"x": x, "y": y, "width": width, "height": height}
    rounded = {key: f"{value:.1f}" for key, value in sides.items()}
    return element("rect", **rounded, rx=radius, class_=class_, **more)


def text(x: float, y: float, content: str, class_: str = "label", anchor: str = "middle") -> str:
    """Returns a line of text; `anchor` says which part of it stands at x."""
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text_anchor": anchor}
    return element("text", content, **place, class_=class_)


def arrow(d: str, kind: str) -> str:
    """Returns an arrow of `kind` "line", "slot-line" or "window-line" along the path d."""
    return element("path", d=d, class_=kind, marker_end=f"url(#{kind}-head)")


def slot_centres() -> list[float]:
    """The slots' middles; they stand over the tokens that have left the window."""
    return [LEFT + SLOT_PITCH * m + SLOT_WIDTH / 2 for m in range(len(HALF_LIVES))]


def window_centres() -> list[float]:
    """The middles of the window's tokens."""
    return [WINDOW_X + PITCH * j + CELL / 2 for j in range(WINDOW)]


def tokens() -> list[str]:
    """The row of tokens: those that have left the window, the last of them, and the window."""
    parts = [text(LABEL_X, TOKENS_TOP + CELL / 2 + 5, "tokens", anchor="end")]
    for j in range(NUM_OLD - 1):
        fading = {"opacity": f"{0.25 + 0.75 * j / NUM_OLD:.2f}"}
        parts.append(box(LEFT + j * PITCH, TOKENS_TOP, CELL, CELL, "old", **fading))
    parts.append(box(ENTERS_X - CELL / 2, TOKENS_TOP, CELL, CELL, "slot"))
    parts += [box(x - CELL / 2, TOKENS_TOP, CELL, CELL, "window") for x in window_centres()]
    below = TOKENS_TOP + CELL + 19
    older = "older tokens live in the slots, each of which forgets at its own pace"
    first, last = window_centres()[0], window_centres()[-1]
    return [
        *parts,
        text(LEFT + CELL / 2, below, "0", "small"),
        text((LEFT + ENTERS_X) / 2, below, older, "small"),
        text(ENTERS_X, below, "t − W", "small strong slot"),
        text((first + last) / 2 - 8, below, "the last W, exactly", "small"),
        text(last, below, "t", "small strong window"),
    ]


def slots() -> list[str]:
    """The slots, and in each what it still holds of every token that has entered it."""
    foot = SLOTS_TOP + SLOTS_HEIGHT - 5
    parts = [text(LABEL_X, SLOTS_TOP + SLOTS_HEIGHT / 2 + 5, "M slots", anchor="end")]
    pitch = (SLOT_WIDTH - 12) / NUM_OLD
    for centre, half_life in zip(slot_centres(), HALF_LIVES, strict=True):
        left, right = centre - SLOT_WIDTH / 2, centre + SLOT_WIDTH / 2 - 6
        parts.append(box(left, SLOTS_TOP, SLOT_WIDTH, SLOTS_HEIGHT, "slot-box"))
        for age in range(NUM_OLD):
            kept = 0.5 ** (age / half_life)
            height = max(kept * (SLOTS_HEIGHT - 14), 1.0)
            place = (right - (age + 1) * pitch, foot - height, pitch - 1, height)
            parts.append(box(*place, "slot", radius=0.8, opacity=f"{0.35 + 0.65 * kept:.2f}"))
    return parts


def softmax() -> list[str]:
    """One softmax: a bar over each slot and over each token of the window."""
    exponentials = [math.exp(x) for x in (*SLOT_LOGITS, *WINDOW_LOGITS)]
    weights = [x / sum(exponentials) for x in exponentials]
    slot_weight = sum(weights[: len(HALF_LIVES)])
    middle = (SOFTMAX_TOP + SOFTMAX_FOOT) / 2
    frame = (LEFT - 10, SOFTMAX_TOP, RIGHT - LEFT + 16, SOFTMAX_FOOT - SOFTMAX_TOP + 12)
    parts = [
        box(*frame, "frame", radius=8),
        text(LABEL_X, middle + 2, "one", anchor="end"),
        text(LABEL_X, middle + 19, "softmax", anchor="end"),
    ]
    scale = (SOFTMAX_FOOT - SOFTMAX_TOP - 26) / max(weights)
    centres = slot_centres() + window_centres()
    for i, (x, weight) in enumerate(zip(centres, weights, strict=True)):
        kind = "slot" if i < len(HALF_LIVES) else "window"
        height = scale * weight
        parts.append(box(x - 9, SOFTMAX_FOOT - height, 18, height, kind, radius=2))
    above = SOFTMAX_TOP - 12
    for kind, name, share, centres in (
        ("slot", "slot weight ω", slot_weight, slot_centres()),
        ("window", "window weight 1 − ω", 1 - slot_weight, window_centres()),
    ):
        parts.append(text((centres[0] + centres[-1]) / 2, above, f"{name} = {share:.2f}", kind))
    return parts


def flow() -> list[str]:
    """What flows: token t - W into the slots, logits up into the softmax, the output out."""
    first = slot_centres()[0]
    lane = f"M {ENTERS_X:.1f} {TOKENS_TOP - 4} V {LANE_Y} H {first:.1f}"
    parts = [element("path", d=lane, class_="slot-line")]
    for x in slot_centres():
        parts.append(arrow(f"M {x:.1f} {LANE_Y} V {SLOTS_TOP + SLOTS_HEIGHT + 7}", "slot-line"))
        parts.append(arrow(f"M {x:.1f} {SLOTS_TOP - 4} V {SOFTMAX_FOOT + 19}", "slot-line"))
    for x in window_centres():
        parts.append(arrow(f"M {x:.1f} {TOKENS_TOP - 4} V {SOFTMAX_FOOT + 19}", "window-line"))
    middle = (SOFTMAX_TOP + SOFTMAX_FOOT) / 2 + 6
    recurrence = "S ← α S + (1 − α) [ key ; value ] of token t − W"
    return [
        *parts,
        text(LEFT, LANE_Y + 25, recurrence, "formula slot", anchor="start"),
        text(LABEL_X, (SOFTMAX_FOOT + SLOTS_TOP) / 2 + 10, "query · key", "formula", anchor="end"),
        arrow(f"M {RIGHT + 6} {middle} H {RIGHT + 38}", "line"),
        text(RIGHT + 46, middle - 3, "output", "strong", anchor="start"),
        text(RIGHT + 46, middle + 16, "Σ p · value", "formula", anchor="start"),
    ]


def heads() -> str:
    """Definitions of the arrows' heads, one for each kind of line."""
    kinds = {"line": "line-head", "slot-line": "slot", "window-line": "window"}
    size = {"markerWidth": 7, "markerHeight": 7, "refX": 6, "refY": 3.5}
    shape = {"orient": "auto", "markerUnits": "userSpaceOnUse"}
    markers = (
        element("marker", element("path", d="M 0 0 L 7 3.5 L 0 7 z", class_=colour), **named)
        for kind, colour in kinds.items()
        for named in ({"id": f"{kind}-head"} | size | shape,)
    )
    return element("defs", "".join(markers))


def draw() -> str:
    """Returns the whole figure as SVG."""
    body = [
        element("title", "Native Hybrid Attention: slots and window under one softmax"),
        element("style", STYLE),
        heads(),
        box(0.75, 0.75, WIDTH - 1.5, HEIGHT - 1.5, "card", radius=10),
        *tokens(),
        *slots(),
        *softmax(),
        *flow(),
    ]
    size = {"width": WIDTH, "height": HEIGHT, "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
    content = "\n" + "\n".join(body) + "\n"
    return element("svg", content, xmlns="http://www.w3.org/2000/svg", **size, role="img") + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("operator.svg").write_text(draw(), encoding="utf-8")
