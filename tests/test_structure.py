"""The control side stays as readable as CONTRIBUTING.md says."""

from accelerate.state import AcceleratorState

from benchmarks.structure import BOUNDS, count_source, frames


def test_counts_of_the_source_are_within_their_bounds():
    counts = count_source()
    assert set(counts) | {"frames between main and the model's forward"} == set(BOUNDS)
    for name, places in counts.items():
        assert len(places) <= BOUNDS[name], (name, places)


def test_three_functions_lie_between_main_and_the_forward_pass():
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
    assert frames() == ["run", "fit", "step_gradient"]
