"""The legend of a picture: a swatch of colour and a name for each class that occurs in it.

    entries = legend_entries(labels_in(mask), class_names, palette)
    strip = draw_legend(entries, width=picture.width)     # an image to be pasted below the picture

All pictures get their legend from `draw_legend`; the HTML report, which draws none itself, shows
the same entries as text.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fcn.figures.masks import VOID, VOID_COLOUR, Colour, Palette

Entry = tuple[str, Colour]  # a name, and its colour (R, G, B)

TEXT_COLOUR, OUTLINE = (30, 30, 30), (150, 150, 150)
FONT_SIZE = 13  # pixels
LONGEST_NAME = 60  # characters; a longer name would leave room for nothing else


def legend_entries(
    labels: Iterable[int], class_names: Sequence[str], palette: Palette, void: int = VOID
) -> list[Entry]:
    """Name and colour of each of these labels, in ascending order, with void at the end."""
    found = set(labels)
    entries: list[Entry] = [(class_names[k], palette[k]) for k in sorted(found - {void})]
    return [*entries, ("void", VOID_COLOUR)] if void in found else entries


def draw_legend(entries: Sequence[Entry], *, width: int, font_size: int = FONT_SIZE) -> Image.Image:
    """A white strip with a swatch and a name for each entry, in as many columns as there is room.

    Args:
        width: of the strip, in pixels. It becomes wider where a single entry needs more.
        font_size: in pixels; all distances grow with it.
    """
    font = load_font(font_size)
    names = [one_line(name, LONGEST_NAME) for name, _ in entries]
    line, margin = round(1.7 * font_size), round(0.75 * font_size)
    side, indent = round(1.15 * font_size), line  # of a swatch; from a swatch's left to its name
    column = indent + font_size + round(max((font.getlength(name) for name in names), default=0))
    columns = max(1, (width - margin) // column)
    lines = -(-len(names) // columns)  # rounded up
    strip = Image.new("RGB", (max(width, margin + column), line * lines), "white")
    draw = ImageDraw.Draw(strip)
    for number, (name, (_, colour)) in enumerate(zip(names, entries, strict=True)):
        x = margin + column * (number % columns)
        middle = line * (number // columns) + line // 2
        top = middle - side // 2
        draw.rectangle((x, top, x + side, top + side), tuple(colour), OUTLINE)
        draw.text((x + indent, middle), name, TEXT_COLOUR, font, anchor="lm")
    return strip


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, `size` pixels high, which comes with Matplotlib.

    It has the letters of Latin, Greek, Cyrillic and other scripts, and Pillow's own font only those
    of English. Signs of Chinese, Japanese and Korean are in neither, and become boxes.
    """
    from matplotlib import get_data_path  # here, since processes that load data import this file

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def one_line(text: str, longest: int) -> str:
    """Make a name that comes from outside safe to draw and to print.

    Line ends and control characters, which a terminal would obey, become spaces, and a text of more
    than `longest` characters ends in an ellipsis.
    """
    text = "".join(c if c.isprintable() else " " for c in text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
