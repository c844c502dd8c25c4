"""Checks that JAX has the devices it is asked for."""

from __future__ import annotations

import jax

from codebook_jax.errors import UserError, did_you_mean

PLATFORMS = ("cpu", "cuda", "rocm", "gpu", "tpu")  # gpu: cuda or rocm


def check_platforms() -> None:
    """Raises UserError if JAX_PLATFORMS names a platform that JAX does not know or that has no
    device here.
    """
    asked = jax.config.jax_platforms
    try:
        jax.devices()
        return
    except Exception as error:  # an AssertionError where CUDA finds no GPU
        if not asked:
            raise
        failure = error
    jax.config.update("jax_platforms", "")
    try:
        here = ", ".join(sorted({device.platform for device in jax.devices()}))
    finally:
        jax.config.update("jax_platforms", asked)
    go_on = f"unset JAX_PLATFORMS to use what is here ({here})"
    for name in asked.split(","):
        if name.lower() not in PLATFORMS:
            hint = did_you_mean(name.lower(), PLATFORMS)
            raise UserError(
                f"JAX_PLATFORMS={asked}: {name} is not one of {', '.join(PLATFORMS)}{hint}; {go_on}"
            ) from failure
    why = str(failure).partition(" (set JAX_PLATFORMS")[0].partition("\n")[0]
    gpu = any(name in asked for name in ("cuda", "gpu"))
    install = ", or install JAX for the GPU: pip install 'codebook_jax[cuda]'" if gpu else ""
    raise UserError(
        f"JAX_PLATFORMS={asked}: JAX finds no such device{f' ({why})' if why else ''}; "
        f"{go_on}{install}"
    ) from failure
