"""Mazes of square cells, as a map: 1 is a wall, ``"r"`` where episodes begin, ``"g"`` the goal, 0 is free."""

from collections import deque

import numpy as np

Map = list[list[int | str]]


class Maze:
    """
    Places of a map, in metres from its centre, x to the right and y up; and the way to the goal along its corridors.

    :param cells: The map, its top row first
    :param size: Length of the side of a cell
    """

    def __init__(self, cells: Map, size: float = 1.0):
        self.cells = cells
        self.size = size
        self.start, self.goal = self._find("r"), self._find("g")
        # cells to the goal, from each cell
        self.n_cells = {self.goal: 0}
        queue = deque([self.goal])
        while queue:
            cell = queue.popleft()
            for near in self._neighbours(cell):
                if near not in self.n_cells:
                    self.n_cells[near] = self.n_cells[cell] + 1
                    queue.append(near)

    def _find(self, mark: str) -> tuple[int, int]:
        return next((i, j) for i, row in enumerate(self.cells) for j, cell in enumerate(row) if cell == mark)

    def _neighbours(self, cell: tuple[int, int]) -> list[tuple[int, int]]:
        around = [(cell[0] + i, cell[1] + j) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        return [(i, j) for i, j in around if self.cells[i][j] != 1]

    @property
    def walls(self) -> list[tuple[int, int]]:
        """Cells that are walls."""
        return [(i, j) for i, row in enumerate(self.cells) for j, cell in enumerate(row) if cell == 1]

    def centre(self, cell: tuple[int, int]) -> np.ndarray:
        """
        :param cell: Row and column
        :return: Its place, shape (2,)
        """
        n_rows, n_columns = len(self.cells), len(self.cells[0])
        return self.size * np.array([cell[1] - (n_columns - 1) / 2, (n_rows - 1) / 2 - cell[0]])

    def cell(self, place: np.ndarray) -> tuple[int, int]:
        """
        :param place: Shape (2,)
        :return: Row and column of its cell, the nearest one outside of the map
        """
        n_rows, n_columns = len(self.cells), len(self.cells[0])
        i = round((n_rows - 1) / 2 - place[1] / self.size)
        j = round(place[0] / self.size + (n_columns - 1) / 2)
        return min(max(i, 0), n_rows - 1), min(max(j, 0), n_columns - 1)

    def distance(self, place: np.ndarray) -> float:
        """
        :param place: Shape (2,)
        :return: Metres to the goal, by the centre of this cell or of the next one
        """
        here = self.cell(place)
        ways = [
            float(np.linalg.norm(place - self.centre(cell))) + self.size * self.n_cells[cell]
            for cell in (here, *self._neighbours(here))
            if cell in self.n_cells
        ]
        # over a wall
        return min(ways, default=self.size * max(self.n_cells.values()))
