"""COCO's matching and its AP, for analyses that match or count in another way.

`evaluate_results` gives the numbers to report; these rules give the same ones (a test compares them).
"""

import numpy as np

UNMATCHED = -1  # in place of the row of an object or of a detection
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
RECALLS = np.linspace(0, 1, 101)  # at which precision is read


def match_detections(
    detections: np.ndarray,
    objects: np.ndarray,
    overlap: np.ndarray,
    *,
    count: int,
    crowd: np.ndarray,
    ignored: np.ndarray,
    thresholds: np.ndarray,
) -> np.ndarray:
    """The object that each detection matches at each threshold: in falling score, the best one that is still free.

    Args:
        detections: (P,) rows of the detections of pairs that may match, ascending; row 0 has the best score.
        objects: (P,) rows of their objects.
        overlap: (P,) IoU of the pairs.
        count: F, detections in all.
        crowd: (A,) bool; a crowd region may be matched any number of times.
        ignored: (A,) bool, crowds included; they are matched only by what matches nothing else.
        thresholds: (T,) of IoU.

    Returns:
        (T, F) int64, `UNMATCHED` where there is none.
    """
    matched = np.full((len(thresholds), count), UNMATCHED)
    order = np.lexsort((ignored[objects], detections))  # of a detection's partners, ignored ones come last
    starts = np.searchsorted(detections[order], np.arange(count + 1)).tolist()
    partners, overlaps = objects[order].tolist(), overlap[order].tolist()
    crowd, ignored = crowd.tolist(), ignored.tolist()
    candidates = np.unique(detections).tolist()

    for row, threshold in enumerate(thresholds.tolist()):
        taken = [False] * len(crowd)
        for detection in candidates:
            best, least = UNMATCHED, threshold
            for pair in range(starts[detection], starts[detection + 1]):
                partner = partners[pair]
                if taken[partner] and not crowd[partner]:
                    continue
                if best != UNMATCHED and ignored[partner] and not ignored[best]:
                    break  # an object that counts is matched before any ignored one
                if overlaps[pair] >= least:
                    best, least = partner, overlaps[pair]
            if best != UNMATCHED:
                taken[best] = True
                matched[row, detection] = best
    return matched


def average_precision(
    true_positive: np.ndarray, false_positive: np.ndarray, classes: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """AP of every class: precision, made non-increasing, averaged over 101 recalls.

    Args:
        true_positive: (F,) bool by falling score; a detection that is neither does not count.
        false_positive: (F,) bool.
        classes: (F,) class rows.
        objects: (S,) objects to find per class.

    Returns:
        (S,) in 0..1, NaN for a class without objects.
    """
    counted = np.flatnonzero(true_positive | false_positive)
    by_class = np.argsort(classes[counted].astype(np.int16), kind="stable")  # 16 bits: numpy then counts, not compares
    order = counted[by_class]  # class by class, each by falling score
    row, starts = classes[order], np.searchsorted(classes[order], np.arange(len(objects) + 1))
    hits = np.concatenate([[0], np.cumsum(true_positive[order])])
    number = hits[1:] - hits[starts[row]]  # true positives of the class so far
    precision = number / (np.arange(len(order)) - starts[row] + 1)

    # One running maximum from the end does all classes: each starts 2 above everything of the class after it.
    lift = 2.0 * (len(objects) - row)
    best_after = np.maximum.accumulate((precision + lift)[::-1])[::-1] - lift

    # Precision is read where each recall is reached first, compared as COCO does, in floats.
    needed = np.ceil(RECALLS * objects[:, None] - 1e-9).astype(np.int64)  # (S, 101) true positives for each recall
    needed += needed / np.maximum(objects, 1)[:, None] < RECALLS
    place = np.searchsorted(hits[1:], hits[starts[:-1], None] + needed)
    place = np.maximum(place, starts[:-1, None])  # recall 0 is reached by the first detection of the class
    reached = place < starts[1:, None]
    read = np.where(reached, np.append(best_after, 0.0)[np.where(reached, place, -1)], 0.0)
    return np.where(objects > 0, read.mean(axis=1), np.nan)
