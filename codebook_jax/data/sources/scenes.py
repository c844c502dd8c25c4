"""The built-in scenes as a source: each is generated from its number when it is read."""

from __future__ import annotations

from codebook_jax.data import scenes
from codebook_jax.data.scenes import stories, tasks
from codebook_jax.data.scenes.pictures import pixel_box
from codebook_jax.data.sources.record import (
    Example,
    Record,
    Request,
    Source,
    Story,
    checked,
    digest,
)
from codebook_jax.errors import UserError


def open_scenes(request: Request) -> Source:
    """`scenes`, `scenes:hard`, `scenes:stories`, or `scenes:` with the name of a task."""
    if request.place in tasks.TASKS:
        return SceneTask(request)
    return SceneStories(request) if request.place == "stories" else Scenes(request)


class Drawn(Source):
    """A source whose records are drawn from their number."""

    _repr: str

    def __len__(self) -> int:
        return self.listed

    def name(self, index: int) -> str:
        return f"{self._repr} {checked(index, len(self))}"

    def __repr__(self) -> str:
        return self._repr


class Scenes(Drawn):
    """`scenes`: training scenes, drawn with the seed, with four captions each; for evaluation the
    1000 scenes of a split, each with one caption. `scenes:hard`: the hard pairs, for evaluation.
    """

    def __init__(self, request: Request) -> None:
        self._settings, role, hard = request.settings, request.role, request.place == "hard"
        if request.place and (not hard or role == "train"):
            places = ", ".join(f"scenes:{place}" for place in ("stories", *tasks.TASKS))
            cure = f"use scenes, {places} or, for config.data.eval and .test, scenes:hard"
            raise UserError(f"scenes:{request.place} is no source for {role} data: {cure}")
        self._chosen, seed = None, self._settings.seed
        self.listed = self._settings.scenes_examples
        self._repr = f"scenes(train, seed={seed}, examples={self.listed})"
        self._called, content = f"scene {seed}/", f"train {seed} {self.listed}"
        if role != "train":
            self._chosen = scenes.hard_scenes(role) if hard else scenes.evaluation_scenes(role)
            self.listed, self._repr = len(self._chosen), f"scenes{':hard' * hard}({role})"
            self._called, content = f"{self._repr} ", f"{role} hard={hard} {self.listed}"
        self._fingerprint = digest([f"scenes {scenes.WORLD} {content}"])

    def __getitem__(self, index: int) -> Record:
        scene, captions = self._scene(index)
        return Record(scenes.render(scene, self._settings.size_px), captions, index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._scene(index)[1]

    def name(self, index: int) -> str:
        return f"{self._called}{checked(index, len(self))}"

    def _scene(self, index: int) -> tuple[scenes.Scene, tuple[str, ...]]:
        number = checked(index, len(self))
        if self._chosen:
            scene, caption = self._chosen[number]
            return scene, (caption,)
        scene = scenes.training_scene(self._settings.seed, number)
        return scene, scenes.training_captions(scene)


class SceneStories(Drawn):
    """`scenes:stories`: training stories, drawn with the seed; for evaluation the 400 stories of a
    split, of which 2k and 2k + 1 differ in their order alone.
    """

    kind = "stories"

    def __init__(self, request: Request) -> None:
        self._settings, self._chosen = request.settings, None
        self.listed, seed = self._settings.scenes_examples, self._settings.seed
        content = f"train, seed={seed}, examples={self.listed}"
        if request.role != "train":
            self._chosen = stories.evaluation_stories(request.role)
            self.listed, content = len(self._chosen), request.role
        self._repr = f"scenes:stories({content})"
        versions = f"scenes {scenes.WORLD} stories {stories.STORIES}"
        self._fingerprint = digest([f"{versions} {content} {self.listed}"])

    def __getitem__(self, index: int) -> Story:
        frames, captions = self._story(index)
        side_px = self._settings.size_px
        return Story(tuple(scenes.render(scene, side_px) for scene in frames), captions, index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._story(index).captions

    def _story(self, index: int) -> stories.SceneStory:
        number = checked(index, len(self))
        if self._chosen:
            return self._chosen[number]
        return stories.training_story(self._settings.seed, number)


class SceneTask(Drawn):
    """`scenes:questions` and the other TASKS: training examples, drawn with the seed; for
    evaluation the 1000 examples of a split. Boxes are in pixels of the rendered size.
    """

    def __init__(self, request: Request) -> None:
        self.kind, self._role, settings = request.place, request.role, request.settings
        self._size_px, self._seed, self.listed = settings.size_px, 0, tasks.EVALUATION_EXAMPLES
        content = self._role
        if self._role == "train":
            self._seed, self.listed = settings.seed, settings.scenes_examples
            content = f"train, seed={self._seed}, examples={self.listed}"
        self._repr = f"scenes:{self.kind}({content})"
        versions = f"scenes {scenes.WORLD} tasks {tasks.EXAMPLES}"
        self._fingerprint = digest([f"{versions} {self._repr} {self.listed}"])

    def __getitem__(self, index: int) -> Example:
        drawn, side_px = self._example(index), self._size_px
        return Example(
            images=tuple(scenes.render(scene, side_px) for scene in drawn.scenes),
            text=drawn.text,
            answers=drawn.answers,
            key=drawn.key,
            image_id=drawn.image_id,
            box=pixel_box(drawn.referent, side_px) if drawn.referent else None,
            proposals=tuple(pixel_box(thing, side_px) for thing in drawn.candidates),
        )

    def captions(self, index: int) -> tuple[str, ...]:
        drawn = self._example(index)
        return (drawn.text, *dict.fromkeys(drawn.answers))

    def _example(self, index: int) -> tasks.SceneExample:
        number = checked(index, len(self))
        return tasks.TASKS[self.kind](self._role, self._seed, number)
