"""How the cost of a function grows with its text, as a ratio: neither the machine nor its load changes that by much."""

import time
from collections.abc import Callable


def growth(function: Callable[[str], object], part: str, count: int = 20_000) -> float:
    """CPU time for `count` repetitions of `part` over that for a 16th: about 16 where linear, 256 where quadratic."""

    def cost(repetitions: int) -> float:
        start = time.process_time()
        function(part * repetitions)
        return time.process_time() - start

    # The least of several: other processes can only add to a cost.
    return min(cost(count) for _ in range(3)) / max(min(cost(count // 16) for _ in range(3)), 1e-4)
