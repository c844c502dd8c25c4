"""The program with one more task: what `python -m codebook_jax.main` would be with a line more."""

from probe import Probe

from codebook_jax import build, console, main

build.TASKS["probe"] = Probe
console.begin()
main.command()
