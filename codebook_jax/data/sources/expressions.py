"""Expressions for parts of images: {"image", "text", "ref_id", "bbox": optional}, with detected
boxes in a second file, {ref_id or image id: [[x, y, width, height]]}. Boxes are in pixels.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from codebook_jax.data.sources import listed
from codebook_jax.data.sources.examples import Entry, ListedExamples, key_in
from codebook_jax.data.sources.json_files import read_json, read_object, refuse_pickle
from codebook_jax.data.sources.record import Example, Request
from codebook_jax.errors import UserError

Box = tuple[float, float, float, float]

_BOXES = ("bbox", "box")
_NUMBER = re.compile(r"\d{12}|\d+$")  # COCO's in the name of a picture
_CURE = (
    'give entries {"image": PATH, "text": TEXT, "ref_id": ID} with, to evaluate, '
    '"bbox": [X, Y, WIDTH, HEIGHT] in pixels'
)
_field = functools.partial(listed.field, cure=_CURE, scheme="grounding")
# Turns REFER's refs(unc).p and instances.json into a list of one split.
_CONVERT = (
    "import json, pickle; boxes = {{it['id']: it['bbox'] for it in "
    "json.load(open({instances!r}))['annotations']}}; json.dump([{{'image': "
    "'COCO_train2014_%012d.jpg' % it['image_id'], 'text': told['sent'], 'ref_id': it['ref_id'], "
    "'bbox': boxes[it['ann_id']]}} for it in pickle.load(open({path!r}, 'rb')) "
    "if it['split'] == 'val' for told in it['sentences']], open('val.json', 'w'))"
)


def open_expressions(request: Request) -> ListedExamples:
    """`grounding:PATH`."""
    return ListedExamples(request, "expressions", _entries(request), _CURE)


def _entries(request: Request) -> Iterator[Entry]:
    _refuse_pickle(request.place)
    place, detections, by_image = _detections(request)
    meant: dict[str, tuple[str, list[Box]]] = {}  # by ref_id: the picture and its box
    for index, (where, row) in enumerate(read_json(request.place)):
        text = _field(where, row, "text", "a sentence")
        image = _field(where, row, "image", "the path of an image")
        key = key_in(request, where, row, "ref_id", index)
        boxes = [
            _box(f'{where}, key "{name}"', row[name])
            for name in _BOXES
            if row.get(name) is not None
        ]
        if "ref_id" in row and meant.setdefault(str(key), (image, boxes)) != (image, boxes):
            raise UserError(
                f'{where}, key "ref_id": {key!r} is also the ref_id of another picture or box: '
                "give each part of a picture an id of its own, which its expressions share"
            )
        wanted = _image_id(row) if by_image else str(row.get("ref_id"))
        found = detections.get(wanted, ())
        if not isinstance(found, list | tuple):
            raise UserError(f'{place}, key "{wanted}": {listed.shown(found)} is no list of boxes')
        proposals = tuple(
            _box(f'{place}, key "{wanted}"[{number}]', box) for number, box in enumerate(found)
        )
        box = boxes[0] if boxes else None
        yield Entry(where, Example((image,), text, (), key, 0, 1.0, box, proposals))


def _detections(request: Request) -> tuple[str, Mapping[str, Any], bool]:
    """(their file, the detected boxes, whether their keys are image ids and not ref_ids); raises
    UserError if they are of no entry of the list.
    """
    path = os.path.expanduser(request.options.get("detections", ""))
    if not path:
        return "", {}, False
    refuse_pickle(path)
    found, counts, entries = read_object(path), Counter(), 0
    if not isinstance(found, dict):
        raise UserError(f'{path} is not {{"REF_ID": [[X, Y, WIDTH, HEIGHT], ...]}}: correct it')
    for _, row in read_json(request.place):
        entries += 1
        if isinstance(row, dict):
            counts["ref"] += str(row.get("ref_id")) in found
            counts["image"] += _image_id(row) in found
    if not any(counts.values()):
        raise UserError(
            f"{path} has boxes for none of the ref_ids, nor of the image ids, of {request.place}: "
            "give the detections of these expressions"
        )
    return path, found, counts["image"] > counts["ref"] and 2 * counts["ref"] < entries


def _image_id(row: Mapping[str, Any]) -> str:
    """The id of the image of an entry, by default the number in its name."""
    if "image_id" in row:
        return str(row["image_id"])
    stem = os.path.splitext(os.path.basename(str(row.get("image"))))[0]
    number = _NUMBER.search(stem)
    return str(int(number[0])) if number else stem


def _box(where: str, value: Any) -> Box:
    """The box in a JSON value; raises UserError if it is none."""
    numbers = value if isinstance(value, list) and len(value) == 4 else [None]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        wrong = "is not four numbers"
    elif not (numbers[2] > 0 and numbers[3] > 0):
        wrong = "has no size"
    else:
        return tuple(map(float, numbers))
    expected = "give [x, y, width, height] in pixels, the last two above 0"
    raise UserError(f"{where}: the box {listed.shown(value)} {wrong}: {expected}")


def _refuse_pickle(path: str) -> None:
    instances = os.path.join(os.path.dirname(path), "instances.json")
    program = _CONVERT.format(path=path, instances=instances)
    refuse_pickle(path, ", for example REFER's to the list of its split val", program)
