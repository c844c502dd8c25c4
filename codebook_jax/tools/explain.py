"""`--mode=explain`: which parts of a picture speak for its match with a text, word by word."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from codebook_jax.console import say
from codebook_jax.errors import UserError
from codebook_jax.files import check_outputs
from codebook_jax.weights.explained import Explanation
from codebook_jax.weights.load import Codis, load

FILE = "explain.png"
COLUMNS, PANEL_PX, LABEL_PX, GAP_PX = 5, 256, 28, 8  # the longer side of a panel


def explain(workdir: Path | str, image: str | None, text: str | None) -> None:
    """Writes `explain.png` into the workdir, whose export is used, and prints where each word's map
    is highest and the probability of a match.
    """
    for name, given in (("image=FILE", image), ('text="a red circle"', text)):
        if not given:
            raise UserError(f"--mode=explain needs a picture and a text: add --explain.{name}")
    workdir = Path(workdir).absolute()
    check_outputs(workdir, (FILE,))
    model = load(workdir)
    if not isinstance(model, Codis):
        raise UserError(
            f"{workdir} is a fine-tuned model (task={model.config.task!r}) without matching: "
            "give a run of pre-training"
        )
    found = model.explain(image, text)
    height, width = found.pixels.shape[:2]
    say(f"the export of step {model.step:,}, fusion layer {found.layer + 1}")
    say(f"highest point of each word, in pixels of the picture ({width} x {height}):")
    for number, word in enumerate(found.words):
        x, y = found.place(number)
        nothing = "" if found.maps[number].max() > 0 else " (no patch speaks for it)"
        say(f"  {word:20} x {x:6.1f}  y {y:6.1f}{nothing}")
    say(f"probability of a match: {found.probability:.1%}")
    drawn(found).save(workdir / FILE)
    say(f"heat maps: {workdir / FILE}")


def drawn(found: Explanation) -> Image.Image:
    """The picture, then a panel for each word with the word below it."""
    panels = [(Image.fromarray(found.pixels), "")]
    panels += [(found.picture(number), word) for number, word in enumerate(found.words)]
    scale = PANEL_PX / max(panels[0][0].size)
    width, height = (max(1, round(side * scale)) for side in panels[0][0].size)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    across, down = width + GAP_PX, height + LABEL_PX + GAP_PX
    sheet = Image.new("RGB", (columns * across + GAP_PX, rows * down + GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for number, (panel, word) in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = GAP_PX + column * across, GAP_PX + row * down
        sheet.paste(panel.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        middle = left + width / 2, top + height + LABEL_PX / 2
        draw.text(middle, word, fill="black", font=font, anchor="mm")
    return sheet
