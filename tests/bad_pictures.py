"""Pictures made bad in every way, and evaluation pictures of which some are in training too."""

import json
import shutil

import numpy as np
from PIL import Image

SCRIPT = "a picture <script>alert(1)</script>"
BAD = {  # name: words of the reason
    "missing.jpg": "not exist",
    "empty.jpg": "empty",
    "text.jpg": "not a picture",
    "cut.jpg": "truncated",
    "folder.jpg": "a folder",
    "tiny.jpg": "8 x 8",
}
COCO = "COCO_train2014_000000391895"


def picture(number, size=(120, 90)):
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def write_pairs(folder, pairs, file="pairs.json"):
    """Lists these (image, caption) pairs; the spec of the list."""
    entries = [{"image": image, "caption": caption} for image, caption in pairs]
    (folder / file).write_text(json.dumps(entries))
    return f"json:{folder / file}"


def make_training(folder):
    """61 good pictures, one of every bad kind, a copy, one that looks like another, three blank."""
    pairs = []
    for number in range(60):
        pairs.append((f"photo_{number:06}.jpg", [f"number {number}", f"again {number}"]))
        picture(number).save(folder / pairs[-1][0], quality=90)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("404 Not Found")
    (folder / "cut.jpg").write_bytes((folder / "photo_000001.jpg").read_bytes()[:-600])
    (folder / "folder.jpg").mkdir()
    picture(1, (8, 8)).save(folder / "tiny.jpg")
    shutil.copy(folder / "photo_000005.jpg", folder / "copy.jpg")
    picture(7).resize((100, 75)).save(folder / "alike.jpg", quality=60)
    pairs += [(name, SCRIPT) for name in (*BAD, "copy.jpg", "alike.jpg")]
    for number in range(3):
        Image.new("RGB", (64, 64), (number * 60,) * 3).save(folder / f"blank{number}.png")
        pairs.append((f"blank{number}.png", f"blank {number}"))
    picture(100).save(folder / f"{COCO}.jpg")
    pairs.append((f"{COCO}.jpg", "a name of its own"))
    pairs.append(("photo_000002.jpg", "the same picture, listed again"))
    pairs.append(("photo_000000.jpg", " "))
    write_pairs(folder, pairs, "train.json")


def make_evaluation(folder):
    """20 pictures of its own; of training: two, one that looks alike, three names, one telling."""
    pairs = []
    for number in range(1000, 1020):
        picture(number).save(folder / f"val_{number:06}.png")
        pairs.append((f"val_{number:06}.png", f"evaluation {number}"))
    pairs += [(f"photo_{number:06}.jpg", "leaked") for number in (10, 11)]
    picture(12).resize((90, 70)).save(folder / "other.png")
    (folder / "val").mkdir()
    names = [f"val/{name}.png" for name in (COCO, "photo_000020", "blank0")]
    for number, name in enumerate(names, 2000):
        picture(number).save(folder / name)
    write_pairs(folder, [*pairs, *((name, "more") for name in ("other.png", *names))], "val.json")
