"""Ranks that are threads of one process: what several processes do, without starting any."""

import threading
from concurrent.futures import ThreadPoolExecutor

from agents.core.ranks import LostRankError, Ranks


class Board:
    """What threads exchange over: one row of tensors for every exchange.

    Args:
        size: number of threads.
    """

    def __init__(self, size):
        self.size, self.rows, self.someone_left = size, {}, False
        self.changed = threading.Condition()

    def exchange(self, number, rank, tensor):
        with self.changed:
            row = self.rows.setdefault(number, {})
            row[rank] = tensor.detach().clone()
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(row) == self.size or self.someone_left, timeout=60)
            if len(row) < self.size:
                raise LostRankError("another thread has ended")
            return [row[place].clone() for place in range(self.size)]

    def leave(self):
        with self.changed:
            self.someone_left = True
            self.changed.notify_all()


class ThreadRanks(Ranks):
    """One of several threads."""

    def __init__(self, rank, board):
        super().__init__()
        self.rank, self.size, self.board, self.exchanges = rank, board.size, board, 0

    def _gather(self, own):
        self.exchanges += 1
        return self.board.exchange(self.exchanges, self.rank, own)

    def _add(self, own):
        rows = self._gather(own)
        own.copy_(sum(rows[1:], rows[0]))


def in_threads(size, function):
    """Return what `function(ranks)` returns in each of `size` threads, or the error that it raises there."""
    board = Board(size)

    def run(rank):
        try:
            return function(ThreadRanks(rank, board))
        except Exception as error:
            return error
        finally:
            board.leave()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
