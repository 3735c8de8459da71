"""scikit-learn's `NearestNeighbors`, and an outlier detector on rows of features in its manner. Needs scikit-learn.

Detectors of images, `PatchCore` among them, stand in its pipelines and searches themselves: `image_auroc_scorer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs._checks import fractions, integer, number
from patchcore_rs.coreset import coreset_size, greedy_coreset
from patchcore_rs.image_metrics import image_auroc
from patchcore_rs.memory_bank import MemoryBank

try:
    from scipy.sparse import csr_matrix
    from sklearn.base import BaseEstimator, OutlierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("patchcore_rs.compat.sklearn needs scikit-learn >= 1.6: pip install -U scikit-learn") from error

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_EUCLIDEAN = ("euclidean", "l2", "minkowski", "sqeuclidean")


class NearestNeighbors(BaseEstimator):  # type: ignore[misc]
    """Exact neighbours by Euclidean distance, as scikit-learn's class of that name.

    Rows are float32; others are converted. Neighbours of equal distance come in the order of their indices.

    Args:
        n_neighbors: neighbours that `kneighbors` gives where it is not told.
        radius: distance within which `radius_neighbors` finds where it is not told.
        algorithm: accepted and without effect: there is one, and it is exact.
        leaf_size: accepted and without effect.
        metric: "minkowski", "euclidean", "l2", or "sqeuclidean", whose distances and radius are squared.
        p: 2, the power of "minkowski".
        metric_params: None.
        n_jobs: threads; None or a negative number for as many as this process may use.

    Attributes (after `fit`):
        n_features_in_: channels of a row.
        n_samples_fit_: rows.
        effective_metric_: "euclidean" or "sqeuclidean".
        effective_metric_params_: an empty dict.
        memory_bank_: the `MemoryBank` that is searched.
    """

    def __init__(
        self,
        *,
        n_neighbors: int = 5,
        radius: float = 1.0,
        algorithm: str = "auto",
        leaf_size: int = 30,
        metric: str = "minkowski",
        p: float = 2,
        metric_params: dict[str, Any] | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.radius = radius
        self.algorithm = algorithm
        self.leaf_size = leaf_size
        self.metric = metric
        self.p = p
        self.metric_params = metric_params
        self.n_jobs = n_jobs

    def fit(self, X: ArrayLike, y: object = None) -> NearestNeighbors:  # noqa: ARG002 - scikit-learn's signature
        """Remember the rows `X`, (n, d).

        Raises:
            ValueError: a value is not finite or above 1e16 in magnitude, or the metric is none of those above.
        """
        if self.metric not in _EUCLIDEAN or (self.metric == "minkowski" and self.p != 2) or self.metric_params:
            raise ValueError(
                f"metric must be Euclidean, one of {', '.join(map(repr, _EUCLIDEAN))} with p=2 and no metric_params; "
                f"got {self.metric!r:.40}, p={self.p!r:.40}. Use scikit-learn's own class for others"
            )
        rows = _float_rows(self, X)
        self.memory_bank_ = MemoryBank(rows, threads=_threads(self.n_jobs))
        self.n_samples_fit_ = len(rows)
        self.effective_metric_ = "sqeuclidean" if self.metric == "sqeuclidean" else "euclidean"
        self.effective_metric_params_: dict[str, Any] = {}
        return self

    def kneighbors(
        self,
        X: ArrayLike | None = None,
        n_neighbors: int | None = None,
        return_distance: bool = True,  # noqa: FBT001, FBT002 - scikit-learn's signature
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]] | NDArray[np.int64]:
        """The nearest rows of each of `X`, (n, d), or of each row itself but for that row where `X` is None.

        Returns:
            Distances (n, k) float32, ascending, and indices (n, k) int64; the indices alone unless `return_distance`.

        Raises:
            ValueError: there are not as many rows, or a value is not finite.
        """
        check_is_fitted(self)
        k = integer(self.n_neighbors if n_neighbors is None else n_neighbors, "n_neighbors", minimum=1)
        available = self.n_samples_fit_ - (X is None)
        if k > available:
            raise ValueError(
                f"n_neighbors must be at most n_samples_fit, {available}{' besides the row itself' * (X is None)}; "
                f"got n_neighbors = {k}, n_samples_fit = {self.n_samples_fit_}"
            )
        found = self.memory_bank_.kneighbors(
            self._queries(X), k, squared=self._squared, exclude_self=X is None, threads=_threads(self.n_jobs)
        )
        return found if return_distance else found[1]

    def kneighbors_graph(
        self, X: ArrayLike | None = None, n_neighbors: int | None = None, mode: str = "connectivity"
    ) -> Any:
        """The answer of `kneighbors` as a sparse matrix, (n, n_samples_fit_) in CSR form.

        Its values are 1 where `mode` is "connectivity", distances where it is "distance".
        """
        _check_mode(mode)
        distances, indices = self.kneighbors(X, n_neighbors)
        n, k = indices.shape
        return self._graph(np.arange(0, n * k + 1, k), indices.ravel(), distances.ravel(), mode)

    def radius_neighbors(
        self,
        X: ArrayLike | None = None,
        radius: float | None = None,
        return_distance: bool = True,  # noqa: FBT001, FBT002 - scikit-learn's signature
        sort_results: bool = False,  # noqa: ARG002, FBT001, FBT002 - scikit-learn's signature; they always are
    ) -> tuple[NDArray[np.object_], NDArray[np.object_]] | NDArray[np.object_]:
        """All rows within `radius` of each of `X`, (n, d), or of each row itself but for that row where `X` is None.

        Returns:
            Distances, (n,) of float32 arrays in ascending order, and indices, (n,) of int64 arrays; the indices alone
            unless `return_distance`.

        Raises:
            ValueError: the radius is no number >= 0, or a value is not finite.
        """
        check_is_fitted(self)
        distances, indices = self.memory_bank_.radius_neighbors(
            self._queries(X),
            number(self.radius if radius is None else radius, "radius"),
            squared=self._squared,
            exclude_self=X is None,
            threads=_threads(self.n_jobs),
        )
        return (_ragged(distances), _ragged(indices)) if return_distance else _ragged(indices)

    def radius_neighbors_graph(
        self,
        X: ArrayLike | None = None,
        radius: float | None = None,
        mode: str = "connectivity",
        sort_results: bool = False,  # noqa: ARG002, FBT001, FBT002 - scikit-learn's signature; they always are
    ) -> Any:
        """The answer of `radius_neighbors` as a sparse matrix; see `kneighbors_graph`."""
        _check_mode(mode)
        distances, indices = self.radius_neighbors(X, radius)
        limits = np.cumsum([0, *map(len, indices)])
        return self._graph(limits, np.concatenate([*indices]), np.concatenate([*distances]), mode)

    @property
    def _squared(self) -> bool:
        return bool(self.effective_metric_ == "sqeuclidean")

    def _queries(self, X: ArrayLike | None) -> Any:
        return self.memory_bank_.features if X is None else _float_rows(self, X, reset=False)

    def _graph(self, limits: NDArray[Any], indices: NDArray[Any], distances: NDArray[Any], mode: str) -> Any:
        values = distances if mode == "distance" else np.ones(len(indices))
        return csr_matrix((values, indices, limits), shape=(len(limits) - 1, self.n_samples_fit_))


class PatchCoreOutlier(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Outliers among rows of features: a row's score is its distance to the nearest row of a coreset.

    PatchCore without images: the rows, as patch features there, are thinned out to a coreset by greedy selection.

    Args:
        coreset: rows to remember: a fraction (float), of which one row is left at least, or a count (int), all where
            there are no more. Rows that are remembered score 0, so it should be a small share of them.
        contamination: the share of the rows learnt from that is taken for outliers, 0 < contamination <= 0.5; it sets
            `offset_`.
        random_state: seed of the first row of the selection, as scikit-learn takes them.
        n_jobs: threads; None or a negative number for as many as this process may use.

    Attributes (after `fit`):
        n_features_in_: channels of a row.
        coreset_indices_: the rows that are remembered, in the order they were picked.
        memory_bank_: the `MemoryBank` of these rows.
        offset_: `decision_function` is `score_samples` less this.
    """

    def __init__(
        self,
        *,
        coreset: float = 0.1,
        contamination: float = 0.1,
        random_state: Any = 0,
        n_jobs: int | None = None,
    ) -> None:
        self.coreset = coreset
        self.contamination = contamination
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(self, X: ArrayLike, y: object = None) -> PatchCoreOutlier:  # noqa: ARG002 - scikit-learn's signature
        """Learn from the rows `X`, (n, d).

        Raises:
            TypeError, ValueError: an argument of the constructor is out of range, or a value is not finite.
        """
        contamination = fractions(self.contamination, "contamination")
        if contamination > 0.5:
            raise ValueError(f"contamination must be a fraction > 0 and <= 0.5; got {self.contamination!r}")
        threads = _threads(self.n_jobs)
        rows = _float_rows(self, X)
        seed = int(check_random_state(self.random_state).randint(2**31))
        picked = greedy_coreset(rows, _count(self.coreset, len(rows)), seed=seed, fill=True, threads=threads)
        self.coreset_indices_ = picked
        self.memory_bank_ = MemoryBank(rows[picked], threads=threads)
        self.offset_ = float(np.percentile(self._scores(rows), 100 * contamination))
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """The distance to the nearest remembered row, negated, of each of `X`, (n, d): the lower, the more unusual.

        Returns:
            (n,) float64, at most 0.
        """
        check_is_fitted(self)
        return self._scores(_float_rows(self, X, reset=False))

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """`score_samples` less `offset_`, (n,) float64: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """-1 for outliers and 1 for the others, (n,) int64."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _scores(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        return -self.memory_bank_.kneighbors(rows, threads=_threads(self.n_jobs))[0][:, 0].astype(np.float64)


def image_auroc_scorer(detector: Any, images: Any, y: ArrayLike | None = None) -> float:
    """The image AUROC of a detector, for `scoring=` of scikit-learn's searches and cross-validation.

    Each split must learn from good images alone and judge by good and flawed ones, and a search should not fit once
    more, to all images, in the end:

        good, flawed = ["good/1.png", ...], ["flawed/1.png", ...]
        images, labels = good + flawed, [0] * len(good) + [1] * len(flawed)
        learn, judge = np.split(np.arange(len(images)), [len(good) // 2])
        grid = {"coreset": [0.01, 0.1], "reweight": [1, 9]}
        search = GridSearchCV(PatchCore(), grid, scoring=image_auroc_scorer, cv=[(learn, judge)], refit=False)
        print(search.fit(images, labels).best_params_)

    Args:
        detector: a fitted `PatchCore`, or another of the package's detectors of images, or a pipeline that ends in one.
        images: what its `predict` takes.
        y: (n,) labels of the images, 0 or 1, or bool; 1 for flawed.

    Raises:
        TypeError: there are no labels.
        ValueError: the labels are not as many as the images, or of one class only.
    """
    if y is None:
        raise TypeError("y must be the labels of the images, 0 or 1, 1 for flawed; got None. Pass them to fit too")
    return image_auroc(y, detector.predict(images, maps=False).scores)


def _float_rows(estimator: BaseEstimator, X: ArrayLike, *, reset: bool = True) -> NDArray[np.float32]:
    """Rows as scikit-learn checks them, in float32; tiny values are rounded, whatever numpy is told to raise."""
    with np.errstate(all="ignore"):
        rows: NDArray[np.float32] = validate_data(estimator, X, dtype=np.float32, reset=reset)
    return rows


def _count(coreset: float, rows: int) -> int:
    """Rows that a coreset has: no fraction is less than a row, no count more than there are."""
    if isinstance(coreset, (float, np.floating)):
        return max(1, int(rows * fractions(coreset, "coreset")))
    return min(coreset_size(coreset, 2**62, "coreset"), rows)


def _threads(n_jobs: int | None) -> int | None:
    if n_jobs is None:
        return None
    jobs = integer(n_jobs, "n_jobs", minimum=-(2**31), below=2**31)
    if jobs == 0:
        raise ValueError("n_jobs must be a number of threads, or negative or None for all; got 0")
    return jobs if jobs > 0 else None


def _check_mode(mode: str) -> None:
    if mode not in ("connectivity", "distance"):
        raise ValueError(f'mode must be "connectivity" or "distance"; got {mode!r:.40}')


def _ragged(arrays: list[NDArray[Any]]) -> NDArray[np.object_]:
    """Arrays of different lengths as one array of them."""
    ragged = np.empty(len(arrays), object)
    for i, array in enumerate(arrays):  # assigned at once, arrays of one length would become a table
        ragged[i] = array
    return ragged
