"""Pictures of what a run has learned: `--mode=show` draws its retrieval and its codewords on the test data."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont, ImageOps

from codebook_jax import build, evaluate
from codebook_jax.data.images import decode
from codebook_jax.data.sources import source_of
from codebook_jax.data.text import clean
from codebook_jax.evaluation.encoding import Gallery, encode_source, rows_over_shards
from codebook_jax.evaluation.recall import recall_at_k
from codebook_jax.evaluation.retrieval import images_to_evaluate
from codebook_jax.inference import code_probabilities
from codebook_jax.metrics import say
from codebook_jax.models.codis import unit

FOLDER = "figures"  # in a workdir
QUERIES = 5  # of each kind, drawn at random
ANSWERS = 5  # shown of each query
CODEWORDS = 8
PICTURES, WORDS, CAPTIONS = 7, 5, 2  # shown of each codeword
LEAST_LIFT = 1.5  # a codeword's word is this much more frequent in its captions than in all

SIDE, GAP, MARGIN = 128, 14, 40  # pixels
PAPER, INK, QUIET, LINE = (255, 255, 255), (28, 30, 34), (120, 124, 132), (222, 224, 228)
RIGHT, TINT = (26, 152, 80), (226, 244, 233)


class Answers(NamedTuple):
    """What one query found: its best answers, and where the first right one stands."""

    query: int
    found: Int[np.ndarray, "answers"]
    scores: Float[np.ndarray, "answers"]
    right: Int[np.ndarray, "answers"]  # 1 where the answer is the query's own
    rank: int  # of the first right one, from 1
    first_right: int


class Codeword(NamedTuple):
    """Who uses a codeword: it is the likeliest one of these images and captions, surest first."""

    index: int
    images: Int[np.ndarray, "images"]
    texts: Int[np.ndarray, "texts"]


def show(config: ml_collections.ConfigDict | None, workdir: Path | str) -> None:
    """Writes `figures/retrieval.png` and `figures/codewords.png` of the checkpoint best in validation."""
    workdir = Path(workdir).absolute()
    parts = build.build_trained(config, workdir)
    config = parts.config
    restored = evaluate.restore_trained(parts, workdir, ("student",))
    spec = config.data.test or config.data.eval
    source = source_of(config, spec, "test")
    say(f"test data {spec}: {len(source):,} images")
    student = restored.state.student
    images = images_to_evaluate(config) or len(source)
    gallery = encode_source(
        parts.task,
        {"student": student["towers"]},
        source,
        parts.tokenizer,
        images=images,
        rows=rows_over_shards(min(config.evaluation.batch, images), parts.mesh),
        size_px=config.model.image.size_px,
        max_tokens=config.model.text.max_tokens,
        threads=config.data.threads,
    )
    codewords = jax.jit(
        unit, out_shardings=jax.sharding.NamedSharding(parts.mesh, jax.sharding.PartitionSpec())
    )(student["codebook"]["codes"])
    if jax.process_index() != 0:
        return

    @functools.lru_cache(maxsize=256)
    def picture(image: int) -> Image.Image:
        record = source[int(gallery.positions[image])]
        whole = Image.fromarray(decode(record.image))
        return ImageOps.pad(whole, (SIDE, SIDE), Image.Resampling.BICUBIC, color=LINE)

    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    about = f"{spec}, test: {len(gallery.image_ids):,} images, {len(gallery.captions):,} captions; step {restored.step:,}"
    _save(draw_retrieval(gallery, picture, about, seed=config.seed), folder / "retrieval.png")
    if not config.losses.codebook:
        say("config.losses.codebook=0: no codewords were learned, so none are drawn")
        return
    _save(
        draw_codewords(
            gallery, np.asarray(codewords), picture, about, temperature=config.codebook.temperature
        ),
        folder / "codewords.png",
    )


# -- what is drawn


def answers_of(
    scores: Float[np.ndarray, "candidates"],
    query: int,
    own: Int[np.ndarray, "candidates"],
) -> Answers:
    """The best answers to a query; `own` is 1 at the candidates that are right."""
    order = np.argsort(-scores, kind="stable")
    place = int(np.argmax(own[order]))
    found = order[:ANSWERS]
    return Answers(query, found, scores[found], own[found], place + 1, int(order[place]))


def codewords_of(
    image_probabilities: Float[np.ndarray, "images codes"],
    text_probabilities: Float[np.ndarray, "texts codes"],
) -> list[Codeword]:
    """Every codeword that some image or caption uses most; first those that many of both use."""
    winners = image_probabilities.argmax(axis=1), text_probabilities.argmax(axis=1)
    counts = np.stack([np.bincount(of, minlength=image_probabilities.shape[1]) for of in winners])
    fewer, all_users = counts.min(axis=0), counts.sum(axis=0)
    users = []
    for code in np.lexsort((-all_users, -fewer))[: np.count_nonzero(all_users)]:
        surest = [
            mine[np.argsort(-table[mine, code], kind="stable")]
            for table, of in zip((image_probabilities, text_probabilities), winners, strict=True)
            for mine in (np.flatnonzero(of == code),)
        ]
        users.append(Codeword(int(code), *surest))
    return users


def words_of(
    captions: Sequence[str], everywhere: Counter[str], total: int
) -> list[tuple[str, float]]:
    """Words that tell these captions from all `total`, the most telling first, with their share of these."""
    here = Counter(word for caption in captions for word in set(clean(caption).split()))
    gains = []
    for word, count in here.items():
        share, usual = count / len(captions), everywhere[word] / total
        if share >= LEAST_LIFT * usual and (count > 1 or len(captions) == 1):
            gains.append((share * math.log(share / usual), word, share))
    return [(word, share) for _, word, share in sorted(gains, key=lambda gain: (-gain[0], gain[1]))]


# -- the pictures


def draw_retrieval(
    gallery: Gallery, picture: Callable[[int], Image.Image], about: str, *, seed: int
) -> Image.Image:
    """Random captions with the images they find, and random images with the captions they find; the right ones green."""
    features = gallery.features["student"]
    ids, text_ids = gallery.image_ids, gallery.text_image_ids
    similarity = features.image @ features.text.T
    recalls = recall_at_k(similarity, ids, text_ids)
    rng = np.random.default_rng(seed)
    texts = rng.permutation(len(text_ids))[:QUERIES]
    images = rng.permutation(len(ids))[:QUERIES]
    by_text = [answers_of(similarity[:, t], t, (ids == text_ids[t]).astype(int)) for t in texts]
    by_image = [answers_of(similarity[i], i, (text_ids == ids[i]).astype(int)) for i in images]

    label = 250
    width = 2 * MARGIN + label + (ANSWERS + 1) * (SIDE + GAP) + 40
    row = SIDE + 46
    sheet = _Sheet(width, 250 + (len(texts) + len(images)) * row)
    sheet.title(
        "What the model finds",
        f"{about}. Green: the right one. Queries are drawn at random (seed {seed}).",
    )
    sheet.heading("Text to image", f"recall at 1, 5, 10: {_recalls(recalls, 'img_r')}")
    answers_x = MARGIN + label + GAP
    for answers in by_text:
        top = sheet.y
        sheet.paragraph(MARGIN, top, label, gallery.captions[answers.query], lines=5)
        for place, (image, score, right) in enumerate(
            zip(answers.found, answers.scores, answers.right, strict=True)
        ):
            x = answers_x + place * (SIDE + GAP)
            sheet.framed(x, top, picture(int(image)), bool(right), f"{score:.2f}")
        if answers.rank > ANSWERS:
            x = answers_x + ANSWERS * (SIDE + GAP) + 40
            sheet.text(x - 34, top + SIDE // 2 - 10, "...", QUIET, bold=True)
            sheet.framed(x, top, picture(answers.first_right), True, f"place {answers.rank:,}")
        sheet.y += row
    sheet.heading("Image to text", f"recall at 1, 5, 10: {_recalls(recalls, 'txt_r')}")
    lines_x = MARGIN + SIDE + 2 * GAP
    for answers in by_image:
        top = sheet.y
        sheet.framed(MARGIN, top, picture(answers.query), None, "")
        shown = list(zip(answers.found, answers.scores, answers.right, strict=True))
        for place, (text, score, right) in enumerate(shown):
            sheet.line(
                lines_x, top + place * 24, f"{score:.2f}", gallery.captions[text], bool(right)
            )
        if answers.rank > ANSWERS:
            caption = f"{gallery.captions[answers.first_right]}"
            sheet.line(lines_x, top + ANSWERS * 24 + 6, f"place {answers.rank:,}", caption, True)
        sheet.y += row
    return sheet.finished()


def draw_codewords(
    gallery: Gallery,
    codewords: Float[np.ndarray, "codes dim"],
    picture: Callable[[int], Image.Image],
    about: str,
    *,
    temperature: float,
) -> Image.Image:
    """The most used codewords, the images surest of each, and the words and captions that go with it."""
    features = gallery.features["student"]
    of_images, of_texts = (
        code_probabilities(part, codewords, temperature=temperature)
        for part in (features.image, features.text)
    )
    used = codewords_of(of_images, of_texts)
    shared = sum(len(code.images) > 0 and len(code.texts) > 0 for code in used)
    place = {image_id: at for at, image_id in enumerate(gallery.image_ids.tolist())}
    own_image = [place[image_id] for image_id in gallery.text_image_ids.tolist()]
    agreement = np.mean(of_images.argmax(axis=1)[own_image] == of_texts.argmax(axis=1))
    everywhere = Counter(
        word for caption in gallery.captions for word in set(clean(caption).split())
    )
    words_width, row = 430, SIDE + 52
    pictures_x = MARGIN + 110
    words_x = pictures_x + PICTURES * (SIDE + GAP) + GAP
    sheet = _Sheet(words_x + words_width + MARGIN, 130 + len(used[:CODEWORDS]) * row)
    sheet.title(
        f"The {len(used[:CODEWORDS])} codewords most used by images and captions",
        f"{about}. Each image and caption uses its likeliest codeword: {len(used):,} of {len(codewords):,} are used, "
        f"{shared:,} by both kinds; {agreement:.0%} of the captions use the one of their image.",
    )
    for code in used[:CODEWORDS]:
        top = sheet.y
        sheet.rule(top - 16)
        sheet.text(MARGIN, top + 12, f"{code.index}", INK, size=30, bold=True)
        sheet.text(MARGIN, top + 54, _counted(len(code.images), "image"), QUIET)
        sheet.text(MARGIN, top + 76, _counted(len(code.texts), "caption"), QUIET)
        for place, image in enumerate(code.images[:PICTURES]):
            sheet.framed(pictures_x + place * (SIDE + GAP), top, picture(int(image)), None, "")
        captions = [gallery.captions[text] for text in code.texts]
        if not captions:
            sheet.text(words_x, top, "no caption uses it most", QUIET)
        common = words_of(captions, everywhere, len(gallery.captions))[:WORDS] if captions else []
        y = sheet.paragraph(
            words_x,
            top,
            words_width,
            "   ".join(f"{word}\u00a0{share:.0%}" for word, share in common),
            lines=2,
            bold=True,
        )
        for caption in captions[:CAPTIONS]:
            y = sheet.paragraph(
                words_x, y + 4, words_width, f"\u201c{caption}\u201d", lines=2, colour=QUIET
            )
        sheet.y += row
    return sheet.finished()


class _Sheet:
    """A white page that is filled from the top; `y` is where the next row begins."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (width, height), PAPER)
        self._pen = ImageDraw.Draw(self._image)
        self._width = width
        self.y = MARGIN

    def finished(self) -> Image.Image:
        return self._image.crop((0, 0, self._width, min(self.y, self._image.height)))

    def title(self, words: str, below: str) -> None:
        self.text(MARGIN, self.y, words, INK, size=28, bold=True)
        self.y = (
            self.paragraph(
                MARGIN, self.y + 42, self._width - 2 * MARGIN, below, lines=2, colour=QUIET
            )
            + 26
        )

    def heading(self, words: str, aside: str) -> None:
        self.rule(self.y - 8)
        self.text(MARGIN, self.y + 4, words, INK, size=20, bold=True)
        beside = MARGIN + _font(20, True).getlength(words) + 18
        self.text(beside, self.y + 9, aside, QUIET)
        self.y += 46

    def rule(self, y: int) -> None:
        self._pen.line((MARGIN, y, self._width - MARGIN, y), fill=LINE)

    def text(
        self, x: float, y: float, words: str, colour: tuple, *, size: int = 15, bold: bool = False
    ) -> None:
        self._pen.text((x, y), words, font=_font(size, bold), fill=colour)

    def paragraph(
        self,
        x: int,
        y: int,
        width: int,
        words: str,
        *,
        lines: int,
        colour: tuple = INK,
        bold: bool = False,
    ) -> int:
        """Writes at most `lines` lines within the width; where the next would begin."""
        for line in _wrapped(words, width, lines, _font(15, bold)):
            self.text(x, y, line, colour, bold=bold)
            y += 21
        return y

    def framed(self, x: int, y: int, picture: Image.Image, right: bool | None, below: str) -> None:
        """A picture, in a green frame when it is the right answer, with a line of text below."""
        frame, colour = (5, RIGHT) if right else (1, LINE)
        box = (x - frame, y - frame, x + SIDE + frame - 1, y + SIDE + frame - 1)
        self._pen.rectangle(box, fill=colour)
        self._image.paste(picture, (x, y))
        self.text(x, y + SIDE + 7, below, RIGHT if right else QUIET, size=13, bold=bool(right))

    def line(self, x: int, y: int, number: str, words: str, right: bool) -> None:
        """A caption found, on green when it is the right one."""
        if right:
            self._pen.rounded_rectangle((x - 8, y - 3, self._width - MARGIN, y + 20), 4, fill=TINT)
        self.text(x, y, number, RIGHT if right else QUIET, bold=right)
        start = x + max(56, int(_font(15, right).getlength(number)) + 14)
        (cut,) = _wrapped(words, self._width - MARGIN - start - 8, 1, _font(15, right)) or [""]
        self.text(start, y, cut, RIGHT if right else INK, bold=right)


@functools.cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu where the machine has it, for its many letters; else Pillow's own."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _wrapped(words: str, width: float, lines: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The words in lines no wider than `width`; what does not fit ends in an ellipsis."""
    done: list[str] = []
    line = ""
    for word in words.split(" "):
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width or not line:
            line = longer
            continue
        done.append(line)
        line = word
    done.append(line)
    if len(done) > lines:
        done = [*done[: lines - 1], " ".join(done[lines - 1 :])]
    done = [_cut(part, width, font) for part in done]
    return [part for part in done if part]


def _cut(line: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def _recalls(recalls: dict[str, float], prefix: str) -> str:
    return ", ".join(f"{recalls[f'{prefix}{k}']:.1f}" for k in (1, 5, 10)) + " %"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _save(image: Image.Image, path: Path) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    image.save(draft, format="PNG")
    draft.replace(path)
    say(f"drawn: {path}")
