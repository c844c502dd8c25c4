"""The time of the same step in PyTorch, for comparison: `python benchmarks/pytorch_step.py` (extra
[parity]).

ALBEF's step (Li et al., NeurIPS 2021), written from its paper in plain PyTorch: image, text and
fusion encoder with their momentum copies, contrast with queues, matching with a negative text and a
negative image per pair, masked words with soft targets, AdamW. CODIS adds intra-modal terms and a
codebook, which cost next to nothing compared with the encoders of `base`. With `--device=cuda`, the
products are in bfloat16 (autocast), and AdamW is the fused one; `--compile` times `torch.compile`
of the loss too. benchmarks/train_step.py runs it in turn with this project's step. Put
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` before it for the huge pages that this project's command
uses.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_step

from configs.base import SIZES

PAIRS = {"tiny": 64, "base": 4}
WORDS = {"tiny": 500, "base": 30_522}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        apart = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        key, value = self.key_value(seen).chunk(2, -1)
        attended = F.scaled_dot_product_attention(apart(self.query(x)), apart(key), apart(value))
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm as in ViT, or post-norm as in BERT; with cross-attention if it is a fusion layer."""

    def __init__(self, width: int, heads: int, *, first: bool, cross: bool = False) -> None:
        super().__init__()
        self.first = first
        self.attention = Attention(width, heads)
        self.cross = Attention(width, heads) if cross else None
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))

    def forward(self, x: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        if self.first:
            y = self.norms[0](x)
            x = x + self.attention(y, y)
            return x + self.mlp(self.norms[1](x))
        x = self.norms[0](x + self.attention(x, x))
        if self.cross is not None:
            x = self.norms[2](x + self.cross(x, image))
        return self.norms[1](x + self.mlp(x))


class Towers(nn.Module):
    def __init__(self, size: str) -> None:
        super().__init__()
        image, text, dim = SIZES[size]["image"], SIZES[size]["text"], SIZES[size]["dim"]
        width, heads, patch = image["width"], image["heads"], image["patch_px"]
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Parameter(
            torch.randn(1, 1 + (image["size_px"] // patch) ** 2, width) * 0.02
        )
        self.image = nn.ModuleList(Block(width, heads, first=True) for _ in range(image["depth"]))
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.words, self.positions = (
            nn.Embedding(WORDS[size], width),
            nn.Embedding(text["max_tokens"], width),
        )
        self.text = nn.ModuleList(Block(width, heads, first=False) for _ in range(text["depth"]))
        self.fusion = nn.ModuleList(
            Block(width, heads, first=False, cross=True) for _ in range(text["fusion_depth"])
        )
        self.to_image, self.to_text = nn.Linear(width, dim), nn.Linear(width, dim)
        self.match = nn.Linear(width, 2)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))

    def see(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([torch.zeros_like(x[:, :1]), x], 1) + self.places
        for block in self.image:
            x = block(x)
        x = self.image_norm(x)
        return F.normalize(self.to_image(x[:, 0]), dim=-1), x

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.text_norm(self.words(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.text:
            x = block(x)
        return F.normalize(self.to_text(x[:, 0]), dim=-1), x

    def fuse(self, states: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        for block in self.fusion:
            states = block(states, image)
        return states

    def guess(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(self.transform(states), self.words.weight)


def loss_of(
    student: Towers, teacher: Towers, queue: torch.Tensor, views: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """ALBEF's three losses of one batch; every seventh token counts as masked."""
    pairs = len(tokens)
    masked = tokens.clone()
    masked[:, 1::7] = 1
    image, image_states = student.see(views[0])
    text, text_states = student.read(tokens)
    with torch.no_grad():
        for own, average in zip(student.parameters(), teacher.parameters(), strict=True):
            average.mul_(0.995).add_(own, alpha=0.005)
        taught_image, taught_states = teacher.see(views[1])
        taught_text, _ = teacher.read(tokens)
        images, texts = torch.cat([taught_image, queue[0]]).T, torch.cat([taught_text, queue[1]]).T
        soft = [
            torch.softmax(a @ b / 0.07, -1)
            for a, b in ((taught_image, texts), (taught_text, images))
        ]
        soft_words = torch.softmax(
            teacher.guess(teacher.fuse(teacher.read(masked)[1], taught_states)), -1
        )
    loss = torch.zeros((), device=tokens.device)
    for targets, rows, candidates in zip(soft, (image, text), (texts, images), strict=True):
        loss = loss - (targets * F.log_softmax(rows @ candidates / 0.07, -1)).sum(-1).mean()
    other = torch.arange(pairs, device=tokens.device).roll(1)
    matching = student.fuse(text_states, image_states)[:, 0]
    not_matching = student.fuse(
        torch.cat([text_states, text_states[other]]), torch.cat([image_states[other], image_states])
    )[:, 0]
    logits = student.match(torch.cat([matching, not_matching]))
    loss = loss + F.cross_entropy(
        logits, (torch.arange(3 * pairs, device=tokens.device) < pairs).long()
    )
    words = student.guess(student.fuse(student.read(masked)[1], image_states))
    hard = torch.where(masked == tokens, -100, tokens)
    soft_loss = -(soft_words * F.log_softmax(words, -1)).sum(-1)[hard >= 0].mean()
    return loss + 0.6 * F.cross_entropy(words.flatten(0, 1), hard.flatten()) + 0.4 * soft_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sizes", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--batch", type=int, nargs="*", help="pairs; default: 64 and 4 by size")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--in-turn", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_turn:
        size, dtype, how = options.in_turn
        train_step.in_turn(prepared(size, PAIRS[size], compiled=how == "compiled", dtype=dtype)[0])
        return
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    torch.set_default_device(options.device)
    for size in options.sizes:
        for pairs in options.batch or [PAIRS[size]]:
            for compiled in (False, True) if options.compile else (False,):
                print(measured(size, pairs, options.steps, compiled=compiled), flush=True)


def prepared(
    size: str, pairs: int, *, compiled: bool, dtype: str
) -> tuple[Callable[[], None], float]:
    """A function that takes a training step, and how many millions of parameters it trains."""
    torch.manual_seed(0)
    at, device = SIZES[size], torch.get_default_device().type
    pixels = at["image"]["size_px"]
    student = Towers(size)
    teacher = copy.deepcopy(student).requires_grad_(False)
    fused = device == "cuda"
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, weight_decay=0.02, fused=fused)
    queue = F.normalize(torch.randn(2, at["queue"], at["dim"]), dim=-1)
    views = torch.randn(2, pairs, 3, pixels, pixels)
    text = torch.randint(5, WORDS[size], (pairs, at["text"]["max_tokens"]))
    loss = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(student, teacher, queue, views, text)
        value.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step, sum(p.numel() for p in student.parameters()) / 1e6


def measured(size: str, pairs: int, steps: int, *, compiled: bool) -> str:
    """A line with the median seconds of a step, and the device's peak memory."""
    cuda = torch.get_default_device().type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dtype = "bfloat16" if cuda else "float32"
    step, weights = prepared(size, pairs, compiled=compiled, dtype=dtype)
    times = [train_step.timed(step)["s"] for _ in range(2 + steps)]
    peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
    how = "compiled" if compiled else "eager"
    seconds = statistics.median(times[2:])
    return (
        f"{size}, batch {pairs}, {how}: {seconds:.3f} s a step, {pairs / seconds:,.0f} pairs/s"
        f"{peak} ({weights:.1f} M parameters)"
    )


if __name__ == "__main__":
    main()
