"""The built-in scenes as a source: each is generated from its number when it is read."""

from __future__ import annotations

from codebook_jax.data import scenes
from codebook_jax.data.sources.record import NamedSource, Record, Request, checked, digest
from codebook_jax.errors import UserError


class Scenes(NamedSource):
    """`scenes`: training scenes, drawn with the seed, with four captions each; for evaluation the
    1000 scenes of a split, each with one caption. `scenes:hard`: the hard pairs, for evaluation.
    """

    def __init__(self, request: Request) -> None:
        self._settings, role, hard = request.settings, request.role, request.place == "hard"
        self._chosen, count, seed = None, self._settings.scenes_examples, self._settings.seed
        if request.place and not hard:
            raise UserError(f"scenes:{request.place} does not exist: use scenes or scenes:hard")
        if role != "train":
            self._chosen = scenes.hard_scenes(role) if hard else scenes.evaluation_scenes(role)
            self._repr = self._called = f"scenes{':hard' * hard}({role})"
            count = len(self._chosen)
            content = f"{role} hard={hard} {count}"
        elif hard:
            cure = "name it in config.data.eval or .test"
            raise UserError(f"scenes:hard is for evaluation only: {cure}")
        else:
            self._repr, self._called = f"scenes(train, seed={seed}, examples={count})", "scene"
            content = f"train {seed} {count}"
        self.listed, self.left_out = count, ()
        self._fingerprint = digest([f"scenes {scenes.WORLD} {content}"])

    def __len__(self) -> int:
        return self.listed

    def __getitem__(self, index: int) -> Record:
        scene, captions = self._scene(index)
        return Record(scenes.render(scene, self._settings.size_px), captions, index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._scene(index)[1]

    def name(self, index: int) -> str:
        number = checked(index, len(self))
        return f"{self._called} {number if self._chosen else f'{self._settings.seed}/{number}'}"

    def __repr__(self) -> str:
        return self._repr

    def _scene(self, index: int) -> tuple[scenes.Scene, tuple[str, ...]]:
        """(scene, captions)"""
        if self._chosen:
            scene, caption = self._chosen[checked(index, len(self))]
            return scene, (caption,)
        scene = scenes.training_scene(self._settings.seed, checked(index, len(self)))
        return scene, scenes.training_captions(scene)
