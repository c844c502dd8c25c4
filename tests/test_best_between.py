"""Which weights a fine-tuning names as the best, also when scores tie."""

import pytest

from codebook_jax.summary import best_between

KEPT = 4  # the best checkpoint's step


@pytest.mark.parametrize(
    "curve, score, best",
    [
        ({0.0: 1.0, 0.5: 3.0, 1.0: 2.0}, 2.0, 0.5),
        ({0.0: 1.0, 0.25: 3.0, 0.5: 3.0, 1.0: 2.0}, 2.0, 0.25),  # of equals, nearer to the start
        ({0.0: 3.0, 0.5: 3.0, 1.0: 2.0}, 2.0, 0),
        ({0.0: 1.0, 0.5: 2.0, 1.0: 2.0}, 2.0, None),  # of equals, the checkpoint as it is
        ({0.0: 2.0, 0.5: 2.0, 1.0: 2.0}, 2.0, None),
        ({0.0: 1.0, 0.5: 3.0, 1.0: 2.0}, 3.0, None),  # an earlier step is as good as the mixture
        ({0.0: 1.0, 0.5: 3.0, 1.0: 2.0}, 4.0, None),
    ],
)
def test_a_share_is_named_if_it_is_above_the_best_checkpoint(curve, score, best):
    said = best_between(curve, KEPT, score)
    assert f"0: {curve[0.0]:.2f}" in said and f"1: {curve[1.0]:.2f}" in said
    if best is None:
        assert f"none is above the {score:.2f} of step {KEPT}" in said and "export" not in said
    else:
        assert f"--config.export.between={best:g}" in said and "step" not in said
