"""The greedy coreset of features that arrive in chunks and never lie in memory together. Needs numpy only.

*Merge and reduce.* One buffer of B rows holds *blocks* of kept rows and, behind them, rows that came in since. A row
that finds it full makes a run of rows at its end give way to a block, the at most k picks of the greedy selection
from them. The run begins with the rows that came in, and takes in the blocks before it, level by level, until it has
2 k rows at least. Rows that came in have level 0, a block the highest level of its run and 1 more.

```text
 B = 4 k    in in in in  ->  1 in in in  ->  1 1 in in  ->  1 1 1 in  ->  2 in in in  ->  2 1 in in  ->  ...
```

The last reduction takes everything that is there to k rows. Rows are counted, not chunks: the buffer is full at the
same row however the rows are cut into chunks, so **the result depends on the order of the rows and not on the chunks**.
Where no more than B rows came, it is that of `greedy_coreset`.

*Cover.* A block knows within which distance, `cover`, each row that went into it lies of a row of it: the largest cover
of its run and the radius of the selection, added by `coreset.add_cover`. Both are exact, not estimates.

*Factor.* Let OPT be the least covering radius that any k points at all, of the data or not, can have over all rows. A
selection of k picks with radius r > 0 leaves a row that is at least r from all of them, and they are at least r from
each other, since the radii fall: of these k + 1 rows two share a nearest one of the k points, and by the triangle
inequality OPT >= r / 2. (Gonzalez, 1985.) The largest r / 2 of all selections is `lower_bound`. A row passes one
selection a level, and each adds its radius, at most 2 OPT: **the covering radius is at most 2 L times the best**, L the
levels with the last. `factor`, what was reached of that, is `radius / lower_bound`.

*Levels.* With c = B / k free places for blocks, runs end in one block of level L after f(c, L) k rows, where
f(c, 1) = c and f(c, L) = f(c, L - 1) + f(c - 1, L - 1) + ... + f(1, L - 1), which is the binomial of c + L - 1 over L.
The default, c = 8, takes 36 k rows in 2 levels, 120 k in 3, 330 k in 4, before the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs import _native
from patchcore_rs._arrays import feature_matrix, require_finite
from patchcore_rs._checks import integer, thread_count
from patchcore_rs._limits import require_memory, selection_memory
from patchcore_rs._progress import reporting_rows, require_progress
from patchcore_rs.coreset import add_cover, rounding

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from patchcore_rs._types import RowProgress

_PIECE = 4096  # rows copied between two looks at whether to go on


@dataclass(frozen=True, repr=False, eq=False)
class StreamedCoreset:
    """Rows chosen from a stream.

    Attributes:
        features: (k, d) float32, the rows in pick order.
        indices: (k,) int64, their numbers in order of arrival, from 0 on.
        radius: every row that arrived lies within this Euclidean distance of a chosen one. The exact covering radius
            where the rows fitted into the buffer, else a bound on it.
        lower_bound: no k points cover the rows that arrived with a smaller radius.
        factor: radius / lower_bound, at most 2 * levels but for rounding; 1 where the radius is 0.
        levels: selections that a row passed, at most.
        rows: rows that arrived.
    """

    features: NDArray[np.float32]
    indices: NDArray[np.int64]
    radius: float
    lower_bound: float
    factor: float
    levels: int
    rows: int

    def __len__(self) -> int:
        """The number of rows chosen."""
        return len(self.indices)

    def __repr__(self) -> str:
        """One line: how many rows of how many, and how well they cover."""
        return (
            f"StreamedCoreset({len(self)} of {self.rows} rows, radius <= {self.radius:.6g}, at most "
            f"{self.factor:.3g} times the best)"
        )


@dataclass(frozen=True)
class _Block:
    rows: int
    level: int
    cover: float


@dataclass
class _State:
    """Blocks, then rows that came in: `used` rows of `features`, which arrived as the numbers in `indices`."""

    features: NDArray[np.float32]
    indices: NDArray[np.int64]
    used: int = 0
    arrived: int = 0
    lower_bound: float = 0.0
    blocks: list[_Block] = field(default_factory=list)

    def copy(self) -> _State:
        """One that changes apart, copied piece by piece, so that Ctrl-C is answered in between."""
        features, indices = np.empty_like(self.features), np.empty_like(self.indices)
        for start in range(0, self.used, _PIECE):
            piece = slice(start, min(start + _PIECE, self.used))
            features[piece], indices[piece] = self.features[piece], self.indices[piece]
        return replace(self, features=features, indices=indices, blocks=self.blocks.copy())


class StreamingCoreset:
    """The greedy k-centre coreset of rows that arrive in chunks, in limited memory.

    Chunks go through a buffer that is reduced by greedy selection when it is full (merge and reduce; the scheme and its
    proof stand at the head of this module). The result depends on the order of the rows, not on how they are cut into
    chunks, and has the same bits for any number of threads and any SIMD level. As long as the rows fit into the buffer
    it is that of `greedy_coreset(rows, amount, seed=seed)`; beyond, its covering radius is at most 2 L times the
    best, L the levels of reduction, and `finish` says what bound was reached.

    Not for use by several threads at once.

    Args:
        amount: rows to choose, at most.
        buffer_rows: rows held; None for 8 * amount, at least 4 * amount. More rows mean fewer levels. While a call
            reduces, the buffer is there twice, so that a call that fails or is interrupted changes nothing.
        seed: decides the first row of every selection.
        strict: refuse chunks of any other dtype than float32 instead of converting them.
        threads: None for as many as this process may use.

    Raises:
        TypeError: an argument is no integer.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        amount: int,
        *,
        buffer_rows: int | None = None,
        seed: int = 0,
        strict: bool = False,
        threads: int | None = None,
    ) -> None:
        self._amount = integer(amount, "amount", minimum=1, below=2**31)
        held = 8 * self._amount if buffer_rows is None else integer(buffer_rows, "buffer_rows", minimum=1, below=2**34)
        if held < 4 * self._amount:
            raise ValueError(
                f"buffer_rows must be at least four times the amount, {4 * self._amount}; got {held}. "
                "Pass None for eight times"
            )
        self._buffer_rows = held
        self._seed = integer(seed, "seed", minimum=0, below=2**64)
        self._strict = strict
        self._threads = thread_count(threads)
        self._state: _State | None = None

    def __len__(self) -> int:
        """The number of rows that arrived."""
        return 0 if self._state is None else self._state.arrived

    def __repr__(self) -> str:
        return f"StreamingCoreset({self._amount}, buffer_rows={self._buffer_rows}): {len(self)} rows arrived"

    def add(self, chunk: ArrayLike, *, progress: RowProgress | bool | None = None) -> StreamingCoreset:
        """Take in the next rows. All or nothing: a call that fails or is interrupted leaves everything as it was.

        A C-contiguous float32 chunk, a numpy memmap for one, is read once, from its beginning to its end, and never
        held as a whole.

        Args:
            chunk: (n, d) floating-point rows, finite and at most 1e16 in magnitude; n may be 0.
            progress: True for a bar on stderr, or called now and then with (rows of the chunk taken in, rows of the
                chunk); what it raises ends the call.

        Returns:
            self.

        Raises:
            TypeError: `chunk` holds no floats, or is a tensor on a device.
            ValueError: the width is not that of the chunks before, or a value is not finite or too large, which is
                named by its position.
            MemoryError: the buffer would not fit into the memory there is; raised before it is taken.
        """
        require_progress(progress)
        rows = feature_matrix(chunk, "chunk", strict=self._strict)
        state = self._state
        if state is None:
            state = self._empty(rows.shape[1])
        elif rows.shape[1] != state.features.shape[1]:
            raise ValueError(
                f"chunk must have the {state.features.shape[1]} channels of the chunks before; got {rows.shape[1]}"
            )
        # Beyond `used` the buffer holds nothing, so rows may be written there before anything is decided.
        reduces = state.used + len(rows) > self._buffer_rows
        state = state.copy() if reduces else replace(state, blocks=state.blocks.copy())
        with reporting_rows(progress, "taking in rows", len(rows)) as report:
            self._take_in(state, rows, report)
        self._state = state
        return self

    def finish(self, *, progress: RowProgress | bool | None = None) -> StreamedCoreset:
        """Choose the rows. Nothing is consumed: further chunks may be added, and `finish` called again.

        Args:
            progress: True for a bar on stderr, or called now and then with (done, total), the part of the work that is
                done, in picks; what it raises ends the call.

        Returns:
            At most `amount` rows; fewer where fewer distinct ones arrived.

        Raises:
            ValueError: no row has arrived.
        """
        require_progress(progress)
        state = self._state
        if state is None or state.arrived == 0:
            raise ValueError("no row has arrived: call add(chunk) with at least one row first")
        with reporting_rows(progress, "selecting the coreset", self._amount) as report:
            picks, radius, lower_bound = self._select(state, 0, report)
        cover = add_cover(max((block.cover for block in state.blocks), default=0.0), radius, state.features.shape[1])
        return StreamedCoreset(
            features=state.features[picks],
            indices=state.indices[picks],
            radius=cover,
            lower_bound=lower_bound,
            factor=cover / lower_bound if cover > 0 else 1.0,
            levels=1 + max((block.level for block in state.blocks), default=0),
            rows=state.arrived,
        )

    def _empty(self, dimensions: int) -> _State:
        rows = self._buffer_rows
        require_memory(
            rows * (8 * dimensions + 16) + selection_memory(rows, dimensions),
            f"a buffer of {rows} rows of {dimensions} channels, twice while it is reduced,",
            "use a smaller buffer_rows, or a smaller amount",
        )
        return _State(np.empty((rows, dimensions), np.float32), np.empty(rows, np.int64))

    def _take_in(self, state: _State, rows: NDArray[np.float32], progress: RowProgress | None) -> None:
        """Copy the rows into the buffer piece by piece, and reduce it whenever it is full."""
        taken = 0

        def report(*_: int) -> None:
            if progress is not None:
                progress(taken, len(rows))

        while taken < len(rows):
            if state.used == self._buffer_rows:
                self._make_room(state, report)
            count = min(_PIECE, len(rows) - taken, self._buffer_rows - state.used)
            place = slice(state.used, state.used + count)
            state.features[place] = rows[taken : taken + count]
            require_finite(state.features[place], "chunk", taken)
            state.indices[place] = np.arange(state.arrived, state.arrived + count)
            state.used += count
            state.arrived += count
            taken += count
            report()

    def _make_room(self, state: _State, progress: RowProgress) -> None:
        """Reduce the run at the end of the full buffer to a block."""
        blocks = state.blocks
        start, level, cover = sum(block.rows for block in blocks), 0, 0.0
        while state.used - start < 2 * self._amount:
            level = blocks[-1].level
            while blocks and blocks[-1].level == level:
                block = blocks.pop()
                start -= block.rows
                cover = max(cover, block.cover)
        picks, radius, state.lower_bound = self._select(state, start, progress)
        place = slice(start, start + len(picks))
        state.features[place], state.indices[place] = state.features[picks], state.indices[picks]
        blocks.append(_Block(len(picks), level + 1, add_cover(cover, radius, state.features.shape[1])))
        state.used = place.stop

    def _select(
        self, state: _State, start: int, progress: RowProgress | None
    ) -> tuple[NDArray[np.int64], float, float]:
        """The greedy selection from the rows from `start` on: picks, covering radius, and the lower bound from now."""
        rows = state.features[start : state.used]
        count = min(self._amount, len(rows))
        picks, radii, _ = _native.greedy_coreset(rows, count, None, self._seed, self._threads, progress)
        radius, lower_bound = float(radii[-1]), state.lower_bound
        if len(picks) == self._amount:
            lower_bound = max(lower_bound, radius / 2 / rounding(rows.shape[1]))
        return picks + start, radius, lower_bound
