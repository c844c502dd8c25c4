"""A small packed folder of every kind of picture; run as a program, it packs in processes that can
be killed.

The program reads one line of JSON per packing, forks, and packs, so that imports happen once.
"""

import io
import itertools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from small_run import config_of

from codebook_jax.data.sources.mixture import Mixture
from codebook_jax.tools import prepare

KINDS = {  # name: whether its bytes must stay unchanged
    "plain.jpg": True,
    "grey.jpg": True,
    "progressive.jpg": True,
    "upright.jpg": True,
    "large.jpg": False,
    "turned.jpg": False,
    "cmyk.jpg": False,
    "clear.png": False,
    "deep.png": False,
    "moving.gif": False,
}
BAD = {
    "missing.jpg": "No such file or directory",
    "empty.jpg": "0 bytes: the file is empty",
    "text.jpg": "13 bytes: not a picture",
    "cut.jpg": "bytes: image file is truncated",
    "cut.png": "bytes: ",
    "folder.jpg": "Is a directory",
}
SIDE_PX = 48


def picture(seed, height=40, width=60):
    """A smooth picture, different for each seed."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return rough.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed, **options):
    file = io.BytesIO()
    picture(seed).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def write_kinds(folder):
    """Every kind of picture, good and bad, listed in `pairs.json`; its path."""
    folder.mkdir(exist_ok=True)
    turned, upright = Image.Exif(), Image.Exif()
    turned[0x0112], upright[0x0112] = 6, 1
    (folder / "plain.jpg").write_bytes(jpeg(1))
    picture(2).convert("L").save(folder / "grey.jpg", quality=80)
    (folder / "progressive.jpg").write_bytes(jpeg(3, progressive=True))
    (folder / "upright.jpg").write_bytes(jpeg(4, exif=upright))
    picture(5, 200, 300).save(folder / "large.jpg", quality=95)
    (folder / "turned.jpg").write_bytes(jpeg(6, exif=turned))
    picture(7).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    clear = picture(8).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 30, 40))
    clear.save(folder / "clear.png")
    deep = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
    Image.fromarray(deep).save(folder / "deep.png")
    picture(10).save(folder / "moving.gif", save_all=True, append_images=[picture(11)])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("404 Not Found")
    (folder / "cut.jpg").write_bytes(jpeg(12)[:700])
    (folder / "cut.png").write_bytes((folder / "clear.png").read_bytes()[:900])
    (folder / "folder.jpg").mkdir(exist_ok=True)
    pairs = itertools.zip_longest(KINDS, BAD)  # good and bad ones in turn
    entries = [
        {"image": name, "caption": [f"a {name}", f"the {name}"], "image_id": f"id {name}"}
        for name in filter(None, itertools.chain(*pairs))
    ]
    entries.insert(3, {"image": "plain.jpg", "caption": " "})
    path = folder / "pairs.json"
    path.write_text(json.dumps(entries))
    return path


def write_many(folder, count):
    """`count` small JPEGs, listed in `pairs.json`; its path."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    entries = [{"image": f"{n}.jpg", "caption": f"picture {n}"} for n in range(count)]
    path = folder / "pairs.json"
    path.write_text(json.dumps(entries))
    return path


def packing_of(path, **changes):
    """The config that packs a JSON file; `changes` are fields of `prepare`, and dotted others."""
    fields = {"source": f"json:{path}", "side_px": SIDE_PX, "shard_records": 4, "processes": 1}
    named = (fields | changes).items()
    return config_of(**{n if "." in n else f"prepare.{n}": value for n, value in named})


def pack(path, workdir, **changes):
    """Packs in this process, or in workers; returns the exit code."""
    return prepare.prepare(packing_of(path, **changes), workdir)


def content(folder):
    """{name: bytes} of all files of a folder, hidden ones too."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Slow(Mixture):
    """One source with slow records."""

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return super().__getitem__(index)

    def fingerprint(self):
        return self.sources[0].fingerprint()

    def __repr__(self):
        return repr(self.sources[0])


def _serve():
    open_source = prepare._open

    def open_slowly(config):
        source = Slow([open_source(config)])
        source.seconds = seconds
        return source

    prepare._open = open_slowly
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child:
            print(f"forked {child}", flush=True)
            os.waitpid(child, 0)
            continue
        os.setpgid(0, 0)
        seconds = asked.pop("seconds")
        code = 1
        try:
            code = pack(asked.pop("path"), Path(asked.pop("workdir")), **asked)
        except Exception as failure:
            print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
