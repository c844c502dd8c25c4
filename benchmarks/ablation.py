"""The effect of the codebook loss: weight 0 against 1, by seed and data set: `python
benchmarks/ablation.py`.

Every run is the ordinary command at size `tiny` with the same number of steps (recalls.py).
`--emoji=FOLDER` adds picture-text pairs of your own (train.json, and val.json to evaluate on, in
that folder).
"""

from recalls import Variant, compare, parser


def main() -> None:
    options = parser(__doc__, name="ablation", steps=400)
    options.add_argument("--weights", type=float, nargs="*", default=[0.0, 1.0])
    given = options.parse_args()
    weights = {f"{weight:g}": (f"losses.codebook={weight}",) for weight in given.weights}
    compare({name: Variant(fields=fields) for name, fields in weights.items()}, given, {})


if __name__ == "__main__":
    main()
