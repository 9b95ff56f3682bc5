"""Scores of classifiers, from predictions counted once each, and the ensemble of several runs.

Letters: E examples, C classes or choices.
"""

from collections.abc import Sequence

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of equal entries of two int [E].

    Raises:
        ValueError: they differ in length or are empty.
    """
    _check(predictions, labels)
    return float(np.mean(predictions == labels))


def binary_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return F1 of class 1, 2 TP / (2 TP + FP + FN), 0 when nothing is or is said to be 1."""
    _check(predictions, labels)
    num_true = np.sum((predictions == 1) & (labels == 1))
    total = np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * num_true / total) if total else 0.0


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation (CoLA's score) for any number of classes, 0 if undefined."""
    _check(predictions, labels)
    num_classes = int(max(predictions.max(), labels.max())) + 1
    said = np.bincount(predictions, minlength=num_classes).astype(np.float64)
    true = np.bincount(labels, minlength=num_classes).astype(np.float64)
    size = float(len(labels))
    covariance = np.sum(predictions == labels) * size - said @ true
    variance = (size**2 - said @ said) * (size**2 - true @ true)
    return float(covariance / np.sqrt(variance)) if variance else 0.0


def mean_probabilities(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean over runs of the softmax of logits [E, C], in float64: an ensemble.

    Raises:
        ValueError: no runs, or runs over different examples or classes.
    """
    shapes = {run.shape for run in logits}
    if len(shapes) != 1:
        raise ValueError(f"an ensemble needs runs of one shape, got {sorted(shapes)}")
    total = np.zeros(shapes.pop())
    for run in logits:
        weights = np.exp(run.astype(np.float64) - run.max(axis=-1, keepdims=True))
        total += weights / weights.sum(axis=-1, keepdims=True)
    return total / len(logits)


def _check(predictions: np.ndarray, labels: np.ndarray) -> None:
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
