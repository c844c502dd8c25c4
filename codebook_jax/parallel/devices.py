"""Checks that JAX has the devices it is asked for."""

from __future__ import annotations

import jax

from codebook_jax.errors import UserError, did_you_mean

PLATFORMS = ("cpu", "cuda", "rocm", "gpu", "tpu")  # gpu: cuda or rocm


def check_platforms() -> None:
    """Raises UserError if JAX_PLATFORMS names an unknown platform or one without a device here."""
    asked = jax.config.jax_platforms
    try:
        jax.devices()
    except Exception as failure:  # an AssertionError where CUDA finds no GPU
        if not asked:
            raise
        why = str(failure).partition(" (set JAX_PLATFORMS")[0].partition("\n")[0]
        problem = f"JAX finds no such device ({why})"
        for name in set(asked.lower().split(",")).difference(PLATFORMS):
            problem = f"{name} is not one of {', '.join(PLATFORMS)}{did_you_mean(name, PLATFORMS)}"
        jax.config.update("jax_platforms", "")
        try:
            here = ", ".join(sorted({device.platform for device in jax.devices()}))
        finally:
            jax.config.update("jax_platforms", asked)
        raise UserError(
            f"JAX_PLATFORMS={asked}: {problem}; unset JAX_PLATFORMS to use what is here ({here}), "
            "or for a GPU, install JAX with it: pip install 'codebook_jax[cuda]'"
        ) from failure
