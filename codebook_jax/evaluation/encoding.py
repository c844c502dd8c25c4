"""Images and captions of a source as features and tokens on the host, in calls of one shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from codebook_jax.console import say
from codebook_jax.data.images import UnreadableImage, decode, resize_square
from codebook_jax.data.sources import Record, Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.errors import UserError
from codebook_jax.evaluation.stage import IN_MEMORY, Bookkeeping, Rows, Shares, Stage, digest
from codebook_jax.evaluation.stage import Progress as Progress
from codebook_jax.models.codis import Model
from codebook_jax.parallel import sharding
from codebook_jax.parallel.processes import peers

Item = TypeVar("Item")
Run = Callable[..., dict[str, Array]]  # the weights of towers and inputs to named outputs


class Features(NamedTuple):
    """One pair of towers' outputs for a gallery: unit features, and their tokens for matching."""

    image: Float[np.ndarray, "images dim"]
    text: Float[np.ndarray, "texts dim"]
    # of every position in the source; a process has those of its share
    image_tokens: Float[Rows, "positions patches width"] | None
    text_states: Float[Rows, "texts tokens width"] | None

    def cosines(self) -> Float[np.ndarray, "images texts"]:
        """Of every image and text."""
        return self.image @ self.text.T


class Gallery(NamedTuple):
    """The images that could be read, all their captions, and each tower's outputs for them."""

    image_ids: Int[np.ndarray, " images"]
    text_image_ids: Int[np.ndarray, " texts"]
    text_lengths: Int[np.ndarray, " texts"]
    captions: list[str]
    positions: Int[np.ndarray, " images"]  # of each image in the source
    features: dict[str, Features]  # by the name of the towers
    left_out: int  # images that could not be read
    truncated: int  # captions longer than the model reads


class _Images(NamedTuple):
    """What is known of images, by position in the source."""

    records: dict[int, tuple[int, Sequence[str]]]  # id and captions of those that were read
    unreadable: dict[int, str]  # why
    features: dict[str, Float[np.ndarray, "positions dim"]]  # by the name of the towers
    tokens: Mapping[str, Rows]  # of this process's share


def encode_source(
    model: Model,
    towers: Mapping[str, PyTree],
    source: Source,
    tokenizer: Tokenizer,
    config: ml_collections.ConfigDict,
    *,
    images: int,
    with_tokens: Sequence[str] = (),
    books: Bookkeeping = IN_MEMORY,
) -> Gallery:
    """The first `images` (0: all) of a source and all their captions, through each of the `towers`;
    of those in `with_tokens` the tokens are kept too. Every process reads its share of the images.
    Those that cannot be read are left out and reported. Raises UserError if none can be read or a
    feature is not finite.
    """
    count = min(images or len(source), len(source))
    rows = rows_over_shards(min(config.evaluation.batch, count), model.mesh)
    of_images, of_texts = (
        functools.partial(run_towers, encode, with_tokens)
        for encode in (model.encode_images, model.encode_texts)
    )
    shares = Shares.over(model.mesh, rows)
    seen = _encode_images(of_images, towers, source, count, config, model.mesh, shares, books)
    report_unreadable(source, [why for _, why in sorted(seen.unreadable.items())], count)
    positions = sorted(seen.records.keys() - seen.unreadable.keys())
    records = [seen.records[at] for at in positions]
    captions = [caption for _, told in records for caption in told]
    max_tokens = config.model.text.max_tokens
    tokens, lengths, truncated = tokenizer.encode(captions, max_tokens)
    if truncated:
        longer = f"{truncated:,} of {len(captions):,} captions are longer than {max_tokens} tokens"
        say(f"{longer}: their ends are cut off")
    texts = encode_texts(of_texts, towers, (tokens, lengths), model.mesh, rows, books)
    features = {}
    for name in towers:
        of_image, tokens_of = seen.features[name][positions], _tokens_of(name)
        features[name] = Features(
            of_image, texts[name][:], seen.tokens.get(tokens_of), texts.get(tokens_of)
        )
        _check_finite(name, features[name])
    return Gallery(
        np.array([image_id for image_id, _ in records]),
        np.array([image_id for image_id, told in records for _ in told]),
        lengths,
        captions,
        np.array(positions),
        features,
        len(seen.unreadable),
        truncated,
    )


def rows_over_shards(rows: int, mesh: jax.sharding.Mesh) -> int:
    """`rows` rounded up to a multiple of the parts that the batch is split into."""
    shards = sharding.data_shards(mesh)
    return -(-rows // shards) * shards


def encode_rows(
    encode: Callable[..., PyTree[Array]], mesh: jax.sharding.Mesh, rows: int, *inputs: np.ndarray
) -> PyTree[np.ndarray]:
    """Encodes up to `rows` inputs that every process has, padded with the last one: a valid input,
    unlike zeros.
    """
    count = len(inputs[0])
    places = np.arange(rows).clip(max=count - 1)
    found = encode(*(sharding.to_device(array[places], mesh) for array in inputs))
    return jax.tree.map(lambda part: sharding.to_host(part)[:count], found)


def run_towers(
    encode: Callable[..., tuple[Array, Array]],
    with_tokens: Sequence[str],
    towers: Mapping[str, PyTree],
    *inputs: Array,
) -> dict[str, Array]:
    """The features by each tower, under its name, and the tokens of those that keep them."""
    found = {}
    for name, weights in towers.items():
        found[name], tokens = encode(weights, *inputs)
        if name in with_tokens:
            found[_tokens_of(name)] = tokens
    return found


def _tokens_of(name: str) -> str:
    return f"{name}_tokens"


def _encode_images(
    run: Run,
    towers: Mapping[str, PyTree],
    source: Source,
    count: int,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    shares: Shares,
    books: Bookkeeping,
) -> _Images:
    """The first `count` images of a source; what cannot be read is a black image meanwhile."""
    shape = config.model.image.size_px, config.model.image.size_px, 3
    like = jax.ShapeDtypeStruct((sum(map(len, shares.parts)), *shape), np.uint8)
    stage = Stage(books, "images", "", count, jax.eval_shape(run, towers, like))
    unreadable = {}
    calls = stage.calls(shares)
    for chunk in _read(source, calls, config):
        pixels = np.zeros((len(chunk), *shape), np.uint8)
        readable, notes = [], []
        for row, (position, record, image) in enumerate(chunk):
            if record is not None:
                pixels[row] = image
                readable.append(row)
                notes.append((int(record.image_id), record.captions))
            elif position >= 0:
                unreadable[position] = image
        found = run(towers, sharding.put_batch(pixels, mesh))
        rows = {name: sharding.own_rows(array, mesh)[readable] for name, array in found.items()}
        places = np.array([chunk[row][0] for row in readable], int)
        stage.write(places, rows, notes)
    done = np.flatnonzero(stage.done)
    features = {name: (done, stage.arrays[name][done]) for name in towers}
    own = stage.notes, unreadable, features
    seen = _Images({}, {}, {}, stage.arrays)
    for records, without, parts in peers.connected().exchange("images", own):
        seen.records.update(records)
        seen.unreadable.update(without)
        for name, (places, rows) in parts.items():
            whole = seen.features.setdefault(name, np.empty((count, *rows.shape[1:]), rows.dtype))
            whole[places] = rows
    return seen


def encode_texts(
    run: Run,
    towers: Mapping[str, PyTree],
    inputs: tuple[Int[np.ndarray, "texts tokens"], Int[np.ndarray, " texts"]],
    mesh: jax.sharding.Mesh,
    rows: int,
    books: Bookkeeping,
) -> Mapping[str, Rows]:
    """The outputs for tokens and lengths of texts; every process gets those of all."""
    like = [jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype) for array in inputs]
    total, made_of = len(inputs[0]), digest(inputs)
    stage = Stage(books, "texts", made_of, total, jax.eval_shape(run, towers, *like))
    encode = functools.partial(run, towers)
    for places in stage.calls(Shares.everyone(rows)):
        places = places[places >= 0]
        stage.write(places, encode_rows(encode, mesh, rows, *(array[places] for array in inputs)))
    return stage.arrays


def _read(
    source: Source, calls: Iterable[Int[np.ndarray, " rows"]], config: ml_collections.ConfigDict
) -> Iterator[list[tuple[int, Record | None, np.ndarray | str]]]:
    """For the positions of each call, (position, record, image), or (position, None, why), the
    position being -1 where there is none.
    """

    def read(position: int) -> tuple[int, Record | None, np.ndarray | str]:
        if position < 0:
            return position, None, ""
        try:
            record = source[position]
            image = resize_square(decode(record.image), config.model.image.size_px)
            return position, record, image
        except UnreadableImage as error:
            return position, None, str(error)

    return read_ahead(read, calls, config.data.threads)


def read_ahead(
    read: Callable[[int], Item], calls: Iterable[Int[np.ndarray, " rows"]], threads: int
) -> Iterator[list[Item]]:
    """What `read` gives for the positions of each call; reads one call ahead."""
    with ThreadPoolExecutor(threads) as pool:
        ahead = []
        for positions in (*calls, ()):
            running, ahead = ahead, [pool.submit(read, int(at)) for at in positions]
            if running:
                yield [job.result() for job in running]


def report_unreadable(
    source: Source,
    unreadable: Sequence[str],
    count: int,
    one: str = "image",
    several: str = "images",
) -> None:
    """Says how many of `count` could not be read, and why the first; UserError if none could."""
    first = f" (first: {unreadable[0]})" if unreadable else ""
    if len(unreadable) == count:
        raise UserError(f"{source!r} has no {one} to evaluate: 0 of {count:,} could be read{first}")
    if unreadable:
        left_out = f"{len(unreadable):,} of {count:,} {several} could not be read"
        say(f"{left_out} and are left out{first}")


def _check_finite(name: str, features: Features) -> None:
    for kind, array in (("images", features.image), ("texts", features.text)):
        if bad := int((~np.isfinite(array).all(axis=1)).sum()):
            raise UserError(
                f"the {name}'s features of {bad:,} of {len(array):,} {kind} are not finite and "
                "cannot be ranked: the weights are broken, use an earlier checkpoint"
            )
