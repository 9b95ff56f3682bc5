import numpy as np
import pytest
from sklearn import metrics

from hydratron.data.classification import (
    accuracy,
    binary_f1,
    matthews_correlation,
    mean_probabilities,
)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_accuracy_and_matthews_match_scikit_learn(num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    labels = rng.integers(0, num_classes, 500)
    predictions = np.where(rng.random(500) < 0.6, labels, rng.integers(0, num_classes, 500))
    assert accuracy(predictions, labels) == metrics.accuracy_score(labels, predictions)
    expected = metrics.matthews_corrcoef(labels, predictions)
    assert matthews_correlation(predictions, labels) == pytest.approx(expected, abs=1e-12)


def test_f1_matches_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        labels = (rng.random(300) < share).astype(int)
        predictions = (rng.random(300) < 0.5).astype(int)
        assert binary_f1(predictions, labels) == metrics.f1_score(labels, predictions)


def test_scores_of_one_class_are_defined() -> None:
    zeros = np.zeros(4, int)
    assert binary_f1(zeros, zeros) == 0.0
    assert matthews_correlation(zeros, zeros) == 0.0


def test_predictions_and_labels_must_match() -> None:
    with pytest.raises(ValueError, match="3 predictions for 4 labels"):
        accuracy(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="0 predictions"):
        accuracy(np.zeros(0), np.zeros(0))


def test_the_ensemble_is_the_mean_of_softmax_not_of_logits() -> None:
    runs = [np.array([[1000.0, 0.0]], np.float32), np.array([[0.0, 1.0]], np.float32)]
    second = np.exp(1.0) / (1 + np.exp(1.0))
    np.testing.assert_allclose(
        mean_probabilities(runs), [[(1 + 1 - second) / 2, second / 2]], atol=1e-12
    )
    with pytest.raises(ValueError, match="one shape"):
        mean_probabilities([np.zeros((2, 2)), np.zeros((3, 2))])
