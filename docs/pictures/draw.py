"""The pictures of docs/concepts.md and docs/architecture.md, as SVG.

    python docs/pictures/draw.py

A test compares the committed files with what this draws.
"""

from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
INK, BLUE, ORANGE, GREY, PALE = "#222222", "#1f5fa8", "#c2571a", "#8a8a8a", "#eef2f7"
CELL = 46
"""Width of a byte, in pixels."""


class Picture:
    """Shapes on a white sheet."""

    def __init__(self, width: int, height: int) -> None:
        self._size = width, height
        self._shapes: list[str] = []

    def text(self, x: float, y: float, words: str, color: str = INK, size: int = 15, anchor: str = "middle") -> None:
        """A line of words; `y` is its baseline."""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" fill="{color}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, width: float, words: str, color: str = INK, height: float = 30) -> None:
        """A box with words in it."""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{PALE}" stroke="{color}"/>'
        )
        self.text(x + width / 2, y + height / 2 + 5, words, color)

    def bar(self, x: float, y: float, width: float, color: str, words: str) -> None:
        """A filled bar with words behind it."""
        self._shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="20" fill="{color}"/>')
        self.text(x + width + 8, y + 15, words, anchor="start")

    def arc(self, x: float, to: float, y: float, rise: float, words: str, color: str, dash: str = "") -> None:
        """A curve from `x` to `to` at height `y`, `rise` above it in its middle (below, if negative), with an arrow."""
        middle = (x + to) / 2
        self._shapes.append(
            f'<path d="M{x:g},{y:g} Q{middle:g},{y - 2 * rise:g} {to:g},{y:g}" fill="none" stroke="{color}" '
            f'stroke-width="2" stroke-dasharray="{dash}" marker-end="url(#{color[1:]})"/>'
        )
        self.text(middle, y - rise + (-6 if rise > 0 else 18), words, color)

    def arrow(self, x: float, y: float, to_x: float, to_y: float, color: str = INK, dash: str = "") -> None:
        """A straight arrow."""
        self._shapes.append(
            f'<path d="M{x:g},{y:g} L{to_x:g},{to_y:g}" fill="none" stroke="{color}" stroke-width="1.6" '
            f'stroke-dasharray="{dash}" marker-end="url(#{color[1:]})"/>'
        )

    def dot(self, x: float, y: float) -> None:
        """A small disc."""
        self._shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{INK}"/>')

    def tokens(self, x: float, y: float, words: list[str], color: str = INK) -> None:
        """Boxes side by side, each as wide as its bytes."""
        for word in words:
            self.box(x, y, CELL * len(word) - 4, word.replace(" ", "␣"), color)
            x += CELL * len(word)

    def svg(self) -> str:
        """The file."""
        width, height = self._size
        heads = "".join(
            f'<marker id="{color[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{color}"/></marker>'
            for color in (INK, BLUE, ORANGE, GREY)
        )
        sheet = f'<rect width="{width}" height="{height}" fill="white"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif">\n<defs>{heads}</defs>\n' + "\n".join([sheet, *self._shapes]) + "\n</svg>\n"
        )


def token_bytes() -> str:
    """Two tokenizers over one text."""
    picture = Picture(640, 190)
    picture.text(20, 45, "teacher's tokens", BLUE, anchor="start")
    picture.tokens(180, 25, ["the", " cat", "s"], BLUE)
    picture.text(20, 100, "bytes", anchor="start")
    picture.tokens(180, 80, list("the cats"))
    picture.text(20, 155, "student's tokens", ORANGE, anchor="start")
    picture.tokens(180, 135, ["th", "e ca", "ts"], ORANGE)
    for at in (3, 7):
        picture.arrow(178 + CELL * at, 57, 178 + CELL * at, 78, BLUE)
    for at in (2, 6):
        picture.arrow(178 + CELL * at, 133, 178 + CELL * at, 112, ORANGE)
    return picture.svg()


def history_cover() -> str:
    """Histories that end in the text and covers that reach beyond a position."""
    picture = Picture(760, 270)
    picture.text(20, 45, "text", anchor="start")
    picture.tokens(200, 25, list("the cats"))
    edge = 198 + CELL * 6
    picture.arrow(edge, 262, edge, 60, GREY, "4 4")
    picture.text(edge + 8, 262, "position 6: what follows “the ca”?", GREY, anchor="start")
    rows = [
        ("a history, a token across", ["the"], [" cats"], 90),
        ("another", ["the", " ca"], ["t"], 140),
        ("another", ["th", "e ca"], ["ke"], 190),
    ]
    for label, history, across, y in rows:
        picture.text(20, y + 20, label, anchor="start", size=13)
        picture.tokens(200, y, history, BLUE)
        picture.tokens(200 + CELL * len("".join(history)), y, across, ORANGE)
    picture.text(620, 110, "a cover of “t”", ORANGE, anchor="start", size=13)
    picture.text(620, 160, "a cover of “t”", ORANGE, anchor="start", size=13)
    picture.text(620, 210, "a cover of “k”", ORANGE, anchor="start", size=13)
    return picture.svg()


def lattice() -> str:
    """Positions and the tokens between them."""
    picture = Picture(720, 290)
    left, y, step = 40, 180, 80
    for at, byte in enumerate("the cats"):
        picture.dot(left + step * at, y)
        picture.text(left + step * (at + 0.5), y + 22, byte.replace(" ", "␣"), GREY)
    picture.dot(left + step * 8, y)
    for start, end, rise, word in ((0, 3, 40, "the"), (3, 7, 44, " cat"), (7, 8, 24, "s")):
        picture.arc(left + step * start, left + step * end, y - 7, rise, word.replace(" ", "␣"), BLUE)
    for start, end, rise, word in ((0, 2, -44, "th"), (2, 6, -56, "e ca"), (6, 8, -44, "ts")):
        picture.arc(left + step * start, left + step * end, y + 28, rise, word.replace(" ", "␣"), ORANGE)
    picture.arc(left + step * 3, left + step * 8, y - 7, 100, "␣cats", ORANGE)
    picture.text(20, 24, "every path from left to right is a way to cut the text; a position's mass is", anchor="start")
    picture.text(20, 44, "the sum over the paths that reach it", anchor="start")
    return picture.svg()


def branch() -> str:
    """A deviation from the canonical tokens, evaluated by the teacher."""
    picture = Picture(720, 200)
    picture.text(20, 45, "canonical", BLUE, anchor="start")
    picture.tokens(140, 25, ["the", " cat", "s", " sat"], BLUE)
    picture.text(20, 125, "a branch", ORANGE, anchor="start")
    picture.tokens(140 + CELL * 3, 105, [" cats"], ORANGE)
    picture.arrow(138 + CELL * 3, 57, 150 + CELL * 3, 103, ORANGE)
    picture.arrow(136 + CELL * 8, 120, 200 + CELL * 8, 120, ORANGE)
    picture.text(206 + CELL * 8, 125, "the teacher's own", ORANGE, 13, "start")
    picture.text(206 + CELL * 8, 142, "row after “the␣cats”", ORANGE, 13, "start")
    picture.text(
        20,
        182,
        "share: what the branch carries of the mass of its prefix; above tau it is evaluated",
        GREY,
        13,
        "start",
    )
    return picture.svg()


def static_row() -> str:
    """A light deviation goes on as its last token would alone."""
    picture = Picture(720, 200)
    picture.text(20, 45, "a light branch", GREY, anchor="start")
    picture.tokens(160, 25, ["the", " ca", "ts"], GREY)
    picture.arrow(156 + CELL * 8, 40, 214 + CELL * 8, 40, GREY, "5 4")
    picture.text(220 + CELL * 8, 45, "goes on as", GREY, 13, "start")
    picture.text(20, 125, "once per teacher", anchor="start")
    picture.tokens(160, 105, ["ts"], INK)
    picture.arrow(158 + CELL * 2, 120, 216 + CELL * 2, 120)
    picture.text(222 + CELL * 2, 125, "the row after “ts” in short fixed contexts: its static row", INK, 13, "start")
    picture.arrow(258 + CELL * 8, 108, 258 + CELL * 8, 56, GREY, "5 4")
    picture.text(
        20,
        182,
        "share between teacher.static and teacher.tau; below teacher.static it ends, in the tail",
        GREY,
        13,
        "start",
    )
    return picture.svg()


def tail() -> str:
    """One position as it is stored."""
    picture = Picture(640, 220)
    picture.text(20, 28, "what follows “the ca”?", anchor="start")
    for row, (label, share, color, words) in enumerate(
        (
            ("t", 0.62, BLUE, "implied: 1 - the rest, no code"),
            ("n", 0.2, ORANGE, "listed, one byte of code"),
            ("r", 0.08, ORANGE, "listed"),
            ("tail", 0.1, GREY, "everything else: 253 bytes and END, one number"),
        )
    ):
        y = 45 + 38 * row
        picture.text(60, y + 15, label)
        picture.bar(90, y, 400 * share, color, f"{share:.2f}  {words}")
    picture.text(20, 208, "the shares sum to 1; nothing is renormalised", GREY, 13, "start")
    return picture.svg()


def pipeline() -> str:
    """Stages and what lies between them."""
    picture = Picture(900, 210)
    names = ["corpus", "units", "token dump", "byte targets", "student", "checkpoint"]
    stages = ["plan", "teacher", "convert", "train", "export"]
    for at, name in enumerate(names):
        picture.box(12 + 150 * at, 60, 112, name, BLUE, 40)
    for at, stage in enumerate(stages):
        picture.arrow(126 + 150 * at, 80, 160 + 150 * at, 80)
        picture.text(143 + 150 * at, 50, stage, INK, 13)
    for at, words in enumerate(("text", "slices", "Parquet", "Zarr in zip", "safetensors", "plain HF")):
        picture.text(68 + 150 * at, 120, words, GREY, 13)
    picture.text(
        20,
        160,
        "teacher: a GPU or CPU with the engine · convert: any core, no torch · train: any day, any tokenizer",
        INK,
        13,
        "start",
    )
    picture.text(
        20,
        184,
        "every stage reads immutable inputs and writes immutable outputs, each with a receipt",
        GREY,
        13,
        "start",
    )
    return picture.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "token-bytes": token_bytes,
    "history-cover": history_cover,
    "lattice": lattice,
    "branch": branch,
    "static-row": static_row,
    "tail": tail,
    "pipeline": pipeline,
}


def main() -> None:
    """Write every picture beside this file."""
    for name, draw in PICTURES.items():
        (HERE / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(f"docs/pictures/{name}.svg written")


if __name__ == "__main__":
    main()
