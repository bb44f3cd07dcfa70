"""Groups of similar descriptors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

MOST_CLUSTERS = 200
STARTS = 3
LEAST_WEIGHT = 1e-3
_DECIMALS = 5


@dataclass(frozen=True, eq=False)
class Clusters:
    """What k-means found.

    Attributes:
        of: (n,) 0 to k - 1, the cluster of each point; none of them is empty.
        centres: (k,D).
    """

    of: np.ndarray
    centres: np.ndarray


def cluster(points: np.ndarray, count: int, seed: int, weights: np.ndarray | None = None) -> Clusters:
    """k-means.

    Args:
        points: (n,D), n >= 1, finite.
        count: k; fewer where fewer points differ, and at most ``MOST_CLUSTERS``.
        seed: of the starts; the same points in the same order and the same seed give the same clusters.
        weights: (n,) 0 or more; None weighs all alike.
    """
    points = np.asarray(points, dtype=np.float64)
    differ = len(np.unique(points.round(_DECIMALS), axis=0))
    count = max(1, min(count, differ, MOST_CLUSTERS))
    if weights is not None:
        weights = np.maximum(weights, LEAST_WEIGHT)
    found = KMeans(count, n_init=STARTS, random_state=seed % 2**32).fit(points, sample_weight=weights)
    kept, of = np.unique(found.labels_, return_inverse=True)
    return Clusters(of.reshape(-1), found.cluster_centers_[kept])


def one_of_each(clusters: Clusters, order: np.ndarray, mass: np.ndarray, taken: int, count: int) -> list[int]:
    """Points of clusters that have none yet, the largest of these clusters first; then a second of each, and so on.

    Args:
        clusters: of n points.
        order: (n,) the larger the sooner a point is chosen in its cluster.
        mass: (n,) what makes a cluster large.
        taken: the first so many points are chosen already; they count for their clusters.
        count: how many to choose.

    Returns:
        Numbers of points, the first chosen first; fewer than ``count`` where there are fewer.
    """
    clusters_count = len(clusters.centres)
    sizes = np.bincount(clusters.of, weights=mass, minlength=clusters_count)
    chosen_of = np.bincount(clusters.of[:taken], minlength=clusters_count)
    waiting: dict[int, list[int]] = {group: [] for group in range(clusters_count)}
    for point in sorted(range(taken, len(order)), key=lambda n: (order[n], -n)):
        waiting[int(clusters.of[point])].append(point)
    chosen: list[int] = []
    while len(chosen) < count and (open_groups := [group for group in waiting if waiting[group]]):
        group = min(open_groups, key=lambda g: (chosen_of[g], -sizes[g], g))
        chosen.append(waiting[group].pop())
        chosen_of[group] += 1
    return chosen
