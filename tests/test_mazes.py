"""Mazes of the examples: ways by an independent search, and directions by hand."""

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_softq.callbacks import histogram_entropy

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield {name: importlib.import_module(name) for name in ("mazes", "any_direction")}


def surrounded(inner):
    width = len(inner[0]) + 2
    return [[1] * width, *([1, *row, 1] for row in inner), [1] * width]


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_ways_are_the_shortest(modules, data):
    """Of random mazes, against SciPy's search in the graph of their cells."""
    n_rows, n_columns = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 5))
    inner = [[data.draw(st.sampled_from([0, 0, 1])) for _ in range(n_columns)] for _ in range(n_rows)]
    places = data.draw(st.permutations(list(itertools.product(range(n_rows), range(n_columns)))))
    for (i, j), mark in zip(places[:2], ("r", "g"), strict=True):
        inner[i][j] = mark
    size = data.draw(st.sampled_from([1.0, 3.0]))
    maze = modules["mazes"].Maze(surrounded(inner), size)
    free = [(i, j) for i, row in enumerate(maze.cells) for j, cell in enumerate(row) if cell != 1]
    near = np.array([[abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for b in free] for a in free])
    ways = scipy.sparse.csgraph.shortest_path(near, unweighted=True, indices=free.index(maze.goals[0]))
    for cell, n_cells in zip(free, ways, strict=True):
        assert maze.n_cells.get(cell, np.inf) == n_cells
        if np.isfinite(n_cells):
            assert maze.distance(maze.centre(cell)) == pytest.approx(size * n_cells)
    assert set(maze.walls) | set(free) == set(itertools.product(range(n_rows + 2), range(n_columns + 2)))


def test_places_in_and_beyond_the_walls_have_a_distance(modules):
    maze = modules["mazes"].Maze(surrounded([["g", 0], [1, "r"]]), 2.0)
    distances = {
        (x, y): maze.distance(np.array([x, y])) for x in np.linspace(-9.0, 9.0, 19) for y in np.linspace(-9.0, 9.0, 19)
    }
    assert all(0.0 <= distance <= 4.0 for distance in distances.values())
    # by hand: the goal, half-way to the next cell, that cell at the wall above it, half-way to the last, the last
    by_hand = {(-1.0, 1.0): 0.0, (0.0, 1.0): 1.0, (1.0, 2.0): 2.0, (1.0, 0.0): 3.0, (1.0, -1.0): 4.0}
    assert {place: distances[place] for place in by_hand} == pytest.approx(by_hand)


@given(st.floats(-6, 6), st.floats(-6, 6), st.floats(-0.1, 0.1), st.floats(-0.1, 0.1))
@settings(deadline=None)
def test_distances_have_no_jumps(modules, x, y, dx, dy):
    """Where there is no wall between: an open square, in which a step changes the way by no more than its length times two."""
    maze = modules["mazes"].Maze(surrounded([["g", 0, 0], [0, 0, 0], [0, 0, "r"]]), 4.0)
    before, after = maze.distance(np.array([x, y])), maze.distance(np.array([x + dx, y + dy]))
    assert abs(before - after) <= 2 * np.hypot(dx, dy) + 1e-9


def test_sectors_and_entropy(modules):
    any_direction = modules["any_direction"]
    angles = np.array([0.0, 0.1, np.pi / 2, np.pi, -np.pi, -np.pi / 4, 0.3])
    ends = 3.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # the last one stays near the start
    ends[-1] /= 3.0
    counts = any_direction.sectors(ends)
    assert counts.tolist() == [2, 0, 1, 0, 2, 0, 0, 1]
    assert histogram_entropy(counts) == pytest.approx(-sum(p * np.log(p) for p in (2 / 6, 1 / 6, 2 / 6, 1 / 6)))
    assert histogram_entropy(np.full(8, 5)) == pytest.approx(np.log(8))
    assert histogram_entropy(np.zeros(8)) == 0
