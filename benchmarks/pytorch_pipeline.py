"""ALBEF's input pipeline in PyTorch, for comparison: Pillow, torchvision, and RandAugment on the
CPU.

Written from its paper and its published settings (Li et al., NeurIPS 2021): a picture read by
Pillow, a random crop of 20 to 100 % of its area resized to 256 px by Pillow's bicubic, a mirror,
two of ten operations at magnitude 7, each applied half of the time, by OpenCV and NumPy on uint8
arrays, and normalisation. Captions stay text; they are not tokenised.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

LAYERS, MAGNITUDE, APPLIED = 2, 7, 0.5
FILL = (128, 128, 128)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Pairs(Dataset):
    """Files and captions; `views` transformed pictures of each."""

    def __init__(
        self, paths: Sequence[Path], captions: Sequence[str], views: int, size_px: int
    ) -> None:
        self.paths, self.captions, self.views = paths, captions, views
        crop = transforms.RandomResizedCrop(
            size_px, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
        )
        self.transform = transforms.Compose(
            [
                crop,
                transforms.RandomHorizontalFlip(),
                rand_augment,
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | str, ...]:
        image = Image.open(self.paths[index]).convert("RGB")
        return *(self.transform(image) for _ in range(self.views)), self.captions[index]


def seconds_a_record(
    paths: Sequence[Path],
    captions: Sequence[str],
    views: int,
    *,
    size_px: int,
    batch: int,
    batches: int,
) -> float:
    """CPU time of a DataLoader with one thread and no workers."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    loader = DataLoader(Pairs(paths, captions, views, size_px), batch, shuffle=True, drop_last=True)
    rows = iter(loader)
    next(rows)
    began = time.process_time()
    for _ in range(batches):
        next(rows, None) or next(rows := iter(loader))
    return (time.process_time() - began) / (batches * batch)


def rand_augment(picture: Image.Image) -> np.ndarray:
    """The picture after LAYERS operations drawn with replacement."""
    pixels = np.array(picture)
    for name in random.choices(list(OPERATIONS), k=LAYERS):
        if random.random() < APPLIED:
            pixels = OPERATIONS[name](pixels)
    return pixels


def auto_contrast(pixels: np.ndarray) -> np.ndarray:
    def stretched(channel: np.ndarray) -> np.ndarray:
        low, high = channel.min(), channel.max()
        if high <= low:
            return channel
        scale = 255 / (float(high) - float(low))
        table = np.clip(np.arange(256) * scale - low * scale, 0, 255).astype(np.uint8)
        return table[channel]

    return cv2.merge([stretched(channel) for channel in cv2.split(pixels)])


def equalise(pixels: np.ndarray) -> np.ndarray:
    def levelled(channel: np.ndarray) -> np.ndarray:
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256])
        step = np.sum(counts[counts != 0].reshape(-1)[:-1]) // 255
        if step == 0:
            return channel
        before = np.empty_like(counts)
        before[0], before[1:] = step // 2, counts[:-1]
        table = np.clip(np.cumsum(before) // step, 0, 255).astype(np.uint8)
        return table[channel]

    return cv2.merge([levelled(channel) for channel in cv2.split(pixels)])


def brightness(pixels: np.ndarray) -> np.ndarray:
    table = np.clip(np.arange(256, dtype=np.float32) * _enhance(), 0, 255).astype(np.uint8)
    return table[pixels]


def sharpness(pixels: np.ndarray) -> np.ndarray:
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(pixels, -1, kernel / 13)[1:-1, 1:-1].astype(np.float32)
    sharp = pixels.astype(np.float32)
    sharp[1:-1, 1:-1] = smooth + _enhance() * (sharp[1:-1, 1:-1] - smooth)
    return np.clip(sharp, 0, 255).astype(np.uint8)


def shear_x(pixels: np.ndarray) -> np.ndarray:
    return _warped(pixels, [[1, _signed(0.3), 0], [0, 1, 0]])


def shear_y(pixels: np.ndarray) -> np.ndarray:
    return _warped(pixels, [[1, 0, 0], [_signed(0.3), 1, 0]])


def translate_x(pixels: np.ndarray) -> np.ndarray:
    return _warped(pixels, [[1, 0, _signed(10)], [0, 1, 0]])


def translate_y(pixels: np.ndarray) -> np.ndarray:
    return _warped(pixels, [[1, 0, 0], [0, 1, _signed(10)]])


def rotate(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return _warped(pixels, cv2.getRotationMatrix2D((width / 2, height / 2), _signed(30), 1))


OPERATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda pixels: pixels,
    "AutoContrast": auto_contrast,
    "Equalize": equalise,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
}


def _enhance() -> float:
    return MAGNITUDE / 10 * 1.8 + 0.1


def _signed(most: float) -> float:
    return random.choice((-1, 1)) * MAGNITUDE / 10 * most


def _warped(pixels: np.ndarray, matrix: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return cv2.warpAffine(
        pixels, np.float32(matrix), (width, height), flags=cv2.INTER_LINEAR, borderValue=FILL
    )
