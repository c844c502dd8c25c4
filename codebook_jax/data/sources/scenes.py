"""The built-in scenes as sources: each is generated from its number when it is read."""

from __future__ import annotations

from codebook_jax.data import scenes
from codebook_jax.data.sources.record import Record, checked, digest
from codebook_jax.data.sources.request import Request
from codebook_jax.errors import UserError


class TrainingScenes:
    """`examples` training scenes, drawn with `seed`, with four captions each."""

    def __init__(self, examples: int, seed: int, size_px: int) -> None:
        self._examples, self._seed, self._size_px = examples, seed, size_px
        self.listed, self.left_out = examples, ()

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Record:
        scene = scenes.training_scene(self._seed, checked(index, len(self)))
        image = scenes.render(scene, self._size_px)
        return Record(image, scenes.training_captions(scene), index)

    def captions(self, index: int) -> tuple[str, ...]:
        scene = scenes.training_scene(self._seed, checked(index, len(self)))
        return scenes.training_captions(scene)

    def name(self, index: int) -> str:
        return f"scene {self._seed}/{checked(index, len(self))}"

    def fingerprint(self) -> str:
        return digest([f"scenes {scenes.WORLD} train {self._seed} {self._examples}"])

    def __repr__(self) -> str:
        return f"scenes(train, seed={self._seed}, examples={self._examples})"


class EvaluationScenes:
    """The 1000 scenes of one split, each with one caption: the plain ones, or the hard pairs."""

    def __init__(self, split: str, size_px: int, *, hard: bool = False) -> None:
        self._split, self._size_px, self._hard = split, size_px, hard
        self._scenes = scenes.hard_scenes(split) if hard else scenes.evaluation_scenes(split)
        self.listed, self.left_out = len(self._scenes), ()

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Record:
        scene, caption = self._scenes[checked(index, len(self))]
        return Record(scenes.render(scene, self._size_px), (caption,), index)

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._scenes[checked(index, len(self))][1],)

    def name(self, index: int) -> str:
        return f"{self!r} {checked(index, len(self))}"

    def fingerprint(self) -> str:
        return digest([f"scenes {scenes.WORLD} {self._split} hard={self._hard} {len(self)}"])

    def __repr__(self) -> str:
        return f"scenes{':hard' if self._hard else ''}({self._split})"


def open_scenes(request: Request) -> TrainingScenes | EvaluationScenes:
    """`scenes` in every role, and `scenes:hard` for evaluation."""
    settings = request.settings
    if request.place not in ("", "hard"):
        raise UserError(f"scenes:{request.place} does not exist: use scenes or scenes:hard")
    if request.role != "train":
        return EvaluationScenes(request.role, settings.size_px, hard=request.place == "hard")
    if request.place:
        raise UserError(
            "scenes:hard is for evaluation only: train on scenes, and name it in config.data.eval "
            "or config.data.test"
        )
    if settings.scenes_examples < 1:
        raise UserError(
            f"config.data.scenes_examples={settings.scenes_examples} leaves nothing to train on: "
            "give at least 1"
        )
    return TrainingScenes(settings.scenes_examples, settings.seed, settings.size_px)
