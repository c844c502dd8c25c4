"""Two processes over gloo evaluate as one does, though each reads half of the pictures."""

import json
import sys

import pytest
from small_gallery import Numbers, evaluate, predicted
from small_run import ROOT, together

pytestmark = pytest.mark.slow


SHARES = [*range(19)], [*range(19, 37)]  # of images
LEFT = {"images": ([*range(8, 19)], [20, *range(27, 37)]), "texts": ([], [20]), "pairs": ([], [20])}


def of_two(environment, folder, *, tensor=1, after=0):
    return both_say(environment, "evaluated_by_two.py", folder, tensor, after)


def both_say(environment, program, *options):
    """The exit codes of both processes, with four devices each, and what they printed."""
    virtual = f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, str(ROOT / "tests" / program), *map(str, options)]
    processes = together([command] * 2, environment | {"XLA_FLAGS": virtual})
    said = [process.communicate(timeout=900)[0] for process in processes]
    return [process.returncode for process in processes], said


def found(said):
    both = [json.loads(text.splitlines()[-1]) for text in said]
    assert both[0]["results"] == both[1]["results"]
    return both[0]["results"], tuple(each["read"] for each in both)


def test_each_reads_its_share_and_what_its_owner_cannot_read_is_left_out_for_both(
    one_device_environment, tmp_path
):
    codes, said = of_two(one_device_environment, tmp_path)
    assert codes == [0, 0], said
    assert found(said) == (evaluate(Numbers(37, broken=(20,))), SHARES)
    assert "1 of 37 images could not be read" in said[0] and "left out" not in said[1]


def test_two_that_hold_the_same_rows_leave_out_what_one_of_them_cannot_read(
    one_device_environment, tmp_path
):
    codes, said = of_two(one_device_environment, tmp_path, tensor=8)
    assert codes == [0, 0], said
    assert found(said) == (evaluate(Numbers(37, broken=(20, 21))), ([*range(37)],) * 2)


@pytest.mark.parametrize("tensor", [1, 8])
def test_of_examples_too_what_one_process_cannot_read_is_left_out_for_both(
    tensor, one_device_environment
):
    codes, said = both_say(one_device_environment, "predicted_by_two.py", tensor)
    assert codes == [0, 0], said
    results, read = found(said)
    if tensor == 8:  # both read everything
        assert read == ([*range(12)],) * 2
        assert results == predicted(broken=(2, 9))[0] and results[2] == 4
    else:  # blocks of four of each call's eight
        assert read == ([0, 1, 2, 3, 4, 8, 9, 10, 11], [4, 5, 6, 7, 8])
        assert results == predicted(broken=(9,))[0] and results[2] == 2
    assert f"{results[2]} of 11 examples could not be read" in said[0]
    assert "left out" not in said[1]


@pytest.mark.parametrize("after, name", [(3, "images"), (9, "texts"), (17, "pairs")])
def test_two_that_were_killed_go_on_where_they_were(after, name, one_device_environment, tmp_path):
    codes, said = of_two(one_device_environment, tmp_path, after=after)
    assert sorted(codes) in ([9, 9], [1, 9]), said  # one may notice first that the other is gone
    codes, said = of_two(one_device_environment, tmp_path)
    assert codes == [0, 0], said
    assert found(said) == (evaluate(Numbers(37, broken=(20,))), LEFT[name])
    assert f" {name} are done already" in said[0] and "goes on" not in said[1]
