"""The built-in scenes as sources: each is generated from its number when it is read."""

from __future__ import annotations

from codebook_jax.data import scenes
from codebook_jax.data.sources.record import NamedSource, Record, Request, Source, checked, digest
from codebook_jax.errors import UserError


class TrainingScenes(NamedSource):
    """`examples` training scenes, drawn with `seed`, with four captions each."""

    def __init__(self, examples: int, seed: int, size_px: int) -> None:
        self._seed, self._size_px = seed, size_px
        self.listed, self.left_out = examples, ()
        self._fingerprint = digest([f"scenes {scenes.WORLD} train {seed} {examples}"])

    def __len__(self) -> int:
        return self.listed

    def __getitem__(self, index: int) -> Record:
        image = scenes.render(self._scene(index), self._size_px)
        return Record(image, self.captions(index), index)

    def captions(self, index: int) -> tuple[str, ...]:
        return scenes.training_captions(self._scene(index))

    def name(self, index: int) -> str:
        return f"scene {self._seed}/{checked(index, len(self))}"

    def __repr__(self) -> str:
        return f"scenes(train, seed={self._seed}, examples={len(self)})"

    def _scene(self, index: int) -> scenes.Scene:
        return scenes.training_scene(self._seed, checked(index, len(self)))


class EvaluationScenes(NamedSource):
    """The 1000 scenes of one split, each with one caption: the plain ones, or the hard pairs."""

    def __init__(self, split: str, size_px: int, *, hard: bool) -> None:
        self._scenes = scenes.hard_scenes(split) if hard else scenes.evaluation_scenes(split)
        self._what, self._size_px = f"scenes{':hard' if hard else ''}({split})", size_px
        self.listed, self.left_out = len(self._scenes), ()
        self._fingerprint = digest([f"scenes {scenes.WORLD} {split} hard={hard} {len(self)}"])

    def __len__(self) -> int:
        return self.listed

    def __getitem__(self, index: int) -> Record:
        scene, caption = self._scenes[checked(index, len(self))]
        return Record(scenes.render(scene, self._size_px), (caption,), index)

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._scenes[checked(index, len(self))][1],)

    def name(self, index: int) -> str:
        return f"{self._what} {checked(index, len(self))}"

    def __repr__(self) -> str:
        return self._what


def open_scenes(request: Request) -> Source:
    """`scenes` in every role, and `scenes:hard` for evaluation."""
    settings, hard = request.settings, request.place == "hard"
    if request.place and not hard:
        raise UserError(f"scenes:{request.place} does not exist: use scenes or scenes:hard")
    if request.role != "train":
        return EvaluationScenes(request.role, settings.size_px, hard=hard)
    if hard:
        raise UserError("scenes:hard is for evaluation only: name it in config.data.eval or .test")
    if settings.scenes_examples < 1:
        given = f"config.data.scenes_examples={settings.scenes_examples}"
        raise UserError(f"{given} leaves nothing to train on: give at least 1")
    return TrainingScenes(settings.scenes_examples, settings.seed, settings.size_px)
