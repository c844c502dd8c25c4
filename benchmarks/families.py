"""Three families of objectives with the same encoders: late fusion as CLIP, ALBEF, and CODIS:
`python benchmarks/families.py`.

Every run is the ordinary command at size `tiny` with the same steps and seeds (recalls.py) and
evaluates the dual encoder, which all three have. `--time` instead takes the time of a step on a
random batch, and the size of its state.
"""

from __future__ import annotations

import json

from recalls import ROOT, Variant, compare, parser
from train_step import measure, run_alone

RECIPES = {"CLIP": "clip", "ALBEF": "albef", "CODIS": "paper"}
TIMES = ROOT / "benchmarks" / "results" / "families_time.json"


def main() -> None:
    options = parser(__doc__, name="families", steps=180)
    options.add_argument("--time", action="store_true", help="time steps instead")
    options.add_argument("--one", choices=RECIPES.values(), help="time this recipe alone")
    given = options.parse_args()
    if given.one:
        fields = dict(field.split("=") for field in given.fields)
        fields = {name: json.loads(value) for name, value in fields.items()}
        print(json.dumps(measure("tiny", fields, 10, given.one)))
    elif given.time:
        write_times(given.fields)
    else:
        compare({name: Variant(recipe) for name, recipe in RECIPES.items()}, given, {})


def write_times(fields: list[str]) -> None:
    """Prints and keeps the time of a step and the size of its state, a process for each recipe."""
    found = {"fields": fields}
    print("| | ms a step | state, MB | peak memory, GB |\n|---|---|---|---|")
    for name, recipe in RECIPES.items():
        found[name] = row = run_alone(__file__, ["--one", recipe, *fields])
        figures = f"{1000 * row['step_s']:.0f} | {row['state_mb']:.1f} | {row['peak_gb']:.2f}"
        print(f"| {name} | {figures} |", flush=True)
        TIMES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
