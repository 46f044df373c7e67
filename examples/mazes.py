"""Mazes of square cells, as a map: 1 is a wall, ``"r"`` where episodes begin, ``"g"`` a goal, 0 is free."""

from collections import deque

import numpy as np

Map = list[list[int | str]]


class Maze:
    """
    Places of a map, in metres from its centre, x to the right and y up; and the way to the nearest goal along its corridors.

    :param cells: The map, its top row first
    :param size: Length of the side of a cell
    """

    def __init__(self, cells: Map, size: float = 1.0):
        self.cells = cells
        self.size = size
        (self.start,), self.goals = self._find("r"), self._find("g")
        # cells to the nearest goal, from each cell
        self.n_cells = dict.fromkeys(self.goals, 0)
        queue = deque(self.goals)
        while queue:
            cell = queue.popleft()
            for near in self._neighbours(cell):
                if near not in self.n_cells:
                    self.n_cells[near] = self.n_cells[cell] + 1
                    queue.append(near)

    def _find(self, mark: int | str) -> list[tuple[int, int]]:
        return [(i, j) for i, row in enumerate(self.cells) for j, cell in enumerate(row) if cell == mark]

    def _neighbours(self, cell: tuple[int, int]) -> list[tuple[int, int]]:
        around = [(cell[0] + i, cell[1] + j) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        return [(i, j) for i, j in around if self.cells[i][j] != 1]

    @property
    def walls(self) -> list[tuple[int, int]]:
        """Cells that are walls."""
        return self._find(1)

    def centre(self, cell: tuple[int, int]) -> np.ndarray:
        """
        :param cell: Row and column
        :return: Its place, shape (2,)
        """
        n_rows, n_columns = len(self.cells), len(self.cells[0])
        return self.size * np.array([cell[1] - (n_columns - 1) / 2, (n_rows - 1) / 2 - cell[0]])

    def distance(self, place: np.ndarray) -> float:
        """
        Metres along the corridors to the nearest goal, from centre to centre and linear between these, so that a step changes
        it by no more than about its length.

        :param place: Shape (2,)
        :return: The distance; the longest one in the middle of a wall
        """
        shape = np.array([len(self.cells), len(self.cells[0])])
        # in rows and columns
        position = np.clip((shape - 1) / 2 + place[::-1] * (-1, 1) / self.size, 0, shape - 1)
        i, j = np.minimum(position.astype(int), shape - 2)
        weights = {(i + k, j + m): self._nearness(position, (i + k, j + m)) for k in (0, 1) for m in (0, 1)}
        free = {cell: weight for cell, weight in weights.items() if cell in self.n_cells and weight > 0}
        if not free:
            return self.size * max(self.n_cells.values())
        return self.size * sum(weight * self.n_cells[cell] for cell, weight in free.items()) / sum(free.values())

    @staticmethod
    def _nearness(position: np.ndarray, cell: tuple[int, int]) -> float:
        """1 in the centre, 0 in those around it."""
        return float(np.prod(1 - np.abs(position - cell)))
