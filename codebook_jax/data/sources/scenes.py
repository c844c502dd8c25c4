"""The built-in scenes as a source: each is generated from its number when it is read."""

from __future__ import annotations

from codebook_jax.data import scenes
from codebook_jax.data.scenes import stories
from codebook_jax.data.sources.record import Record, Request, Source, Story, checked, digest
from codebook_jax.errors import UserError


def open_scenes(request: Request) -> Source:
    """`scenes`, `scenes:hard` or `scenes:stories`."""
    return SceneStories(request) if request.place == "stories" else Scenes(request)


class Scenes(Source):
    """`scenes`: training scenes, drawn with the seed, with four captions each; for evaluation the
    1000 scenes of a split, each with one caption. `scenes:hard`: the hard pairs, for evaluation.
    """

    def __init__(self, request: Request) -> None:
        self._settings, role, hard = request.settings, request.role, request.place == "hard"
        if request.place and (not hard or role == "train"):
            cure = "use scenes, scenes:stories or, for config.data.eval and .test, scenes:hard"
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

    def __len__(self) -> int:
        return self.listed

    def __getitem__(self, index: int) -> Record:
        scene, captions = self._scene(index)
        return Record(scenes.render(scene, self._settings.size_px), captions, index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._scene(index)[1]

    def name(self, index: int) -> str:
        return f"{self._called}{checked(index, len(self))}"

    def __repr__(self) -> str:
        return self._repr

    def _scene(self, index: int) -> tuple[scenes.Scene, tuple[str, ...]]:
        number = checked(index, len(self))
        if self._chosen:
            scene, caption = self._chosen[number]
            return scene, (caption,)
        scene = scenes.training_scene(self._settings.seed, number)
        return scene, scenes.training_captions(scene)


class SceneStories(Source):
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

    def __len__(self) -> int:
        return self.listed

    def __getitem__(self, index: int) -> Story:
        frames, captions = self._story(index)
        side_px = self._settings.size_px
        return Story(tuple(scenes.render(scene, side_px) for scene in frames), captions, index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._story(index).captions

    def name(self, index: int) -> str:
        return f"{self._repr} {checked(index, len(self))}"

    def __repr__(self) -> str:
        return self._repr

    def _story(self, index: int) -> stories.SceneStory:
        number = checked(index, len(self))
        if self._chosen:
            return self._chosen[number]
        return stories.training_story(self._settings.seed, number)
