import json
import re
import string
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from hydratron.data.encodings import Encodings
from hydratron.data.squad import Answer, SquadQuestion, encode_squad, group_windows, load_squad
from hydratron.data.squad_scoring import (
    Span,
    SpanLogits,
    SpanPrediction,
    choose_answers,
    decode_spans,
    exact_score,
    f1_score,
    f1_score_with_null,
    mean_span_logits,
    normalize_answer,
    squad_metrics,
    tune_null_threshold,
    write_null_odds,
    write_squad_predictions,
)

SENTENCE = "The cat sat on the mat. The dog did play. "


@pytest.fixture(scope="module")
def questions() -> list[SquadQuestion]:
    context = (SENTENCE * 3).strip()
    return [
        SquadQuestion("q1", "where did the cat", context, (Answer("on the mat", 12),)),
        SquadQuestion("q2", "what", SENTENCE.strip(), ()),
        SquadQuestion("q3", "who is blue", context, (Answer("dog", 28),)),
    ]


@pytest.fixture(scope="module")
def windows(questions: list[SquadQuestion], tokenizer: PreTrainedTokenizerFast) -> Encodings:
    return encode_squad(questions, tokenizer, max_seq_len=24, doc_stride=7, max_query_len=9)


def random_logits(windows: Encodings, seed: int, *, answerable: bool = False) -> SpanLogits:
    rng = np.random.default_rng(seed)

    def padded() -> list[np.ndarray]:
        # Wider than the window, as a batch padded to its longest leaves them.
        return [rng.normal(size=n + 3).astype(np.float32) for n in windows.lengths]

    return SpanLogits(padded(), padded(), rng.normal(size=len(windows)) if answerable else None)


def slow_decode(
    question: SquadQuestion,
    windows: Encodings,
    logits: SpanLogits,
    *,
    group: range,
    num_best: int,
    max_answer_length: int,
) -> list[tuple[str, float]]:
    """BERT's procedure in plain loops."""
    found = []
    for w in group:
        size = len(windows.get("input_ids", w))
        start, end = logits.start[w][:size].tolist(), logits.end[w][:size].tolist()
        best_starts = sorted(range(size), key=lambda i: -start[i])[:num_best]
        best_ends = sorted(range(size), key=lambda i: -end[i])[:num_best]
        for i in best_starts:
            for j in best_ends:
                if windows.get("char_start", w)[i] < 0 or windows.get("char_start", w)[j] < 0:
                    continue
                if j < i or j - i + 1 > max_answer_length:
                    continue
                if windows.get("is_max_context", w)[i]:
                    text = question.context[
                        windows.get("char_start", w)[i] : windows.get("char_end", w)[j]
                    ]
                    found.append((start[i] + end[j], text))
    best: dict[str, float] = {}
    for score, text in sorted(found, key=lambda pair: -pair[0]):
        best.setdefault(text, score)
    return list(best.items())[:num_best]


@pytest.mark.parametrize(("num_best", "max_answer_length"), [(20, 30), (5, 4), (3, 1)])
def test_decoding_equals_plain_loops(
    questions: list[SquadQuestion], windows: Encodings, num_best: int, max_answer_length: int
) -> None:
    assert len(windows) > 5
    for seed in range(10):
        logits = random_logits(windows, seed)
        predictions = decode_spans(
            questions,
            windows,
            logits,
            num_best=num_best,
            max_answer_length=max_answer_length,
        )
        groups = group_windows(windows, len(questions))
        for question, prediction, group in zip(questions, predictions, groups, strict=True):
            expected = slow_decode(
                question,
                windows,
                logits,
                group=group,
                num_best=num_best,
                max_answer_length=max_answer_length,
            )
            assert [(s.text, pytest.approx(s.score)) for s in prediction.spans] == expected
            null = min(logits.start[w][0] + logits.end[w][0] for w in group)
            if expected:
                assert prediction.null_odds == pytest.approx(null - expected[0][1], abs=1e-6)
            for span in prediction.spans:
                assert question.context[span.start : span.end] == span.text


def test_a_confident_model_gets_its_labels_back(
    questions: list[SquadQuestion], windows: Encodings
) -> None:
    start, end = ([np.full(n, -9.0) for n in windows.lengths] for _ in range(2))
    for w in range(len(windows)):
        start[w][windows.values["start_positions"][w]] = 9.0
        end[w][windows.values["end_positions"][w]] = 9.0
    answers = choose_answers(
        decode_spans(questions, windows, SpanLogits(start, end)), null_threshold=0.0
    )
    assert answers == {"q1": "on the mat", "q2": "", "q3": "dog"}
    metrics = squad_metrics(questions, answers, version="2.0")
    assert set(metrics.values()) == {100.0}


def test_with_its_head_answerability_decides_by_the_likeliest_window(
    questions: list[SquadQuestion], windows: Encodings
) -> None:
    logits = random_logits(windows, 0, answerable=True)
    groups = group_windows(windows, len(questions))
    for prediction, group in zip(decode_spans(questions, windows, logits), groups, strict=True):
        assert prediction.null_odds == -logits.answerable[group.start : group.stop].max()


def test_without_any_valid_span_the_answer_is_empty(
    questions: list[SquadQuestion], windows: Encodings
) -> None:
    ones = [np.where(windows.get("char_start", w) < 0, 1.0, 0.0) for w in range(len(windows))]
    predictions = decode_spans(questions, windows, SpanLogits(ones, ones), num_best=2)
    assert [(p.text, p.spans) for p in predictions] == [("", ())] * 3
    assert all(1e8 < p.null_odds < float("inf") for p in predictions)


def test_the_ensemble_scores_spans_by_their_mean(
    questions: list[SquadQuestion], windows: Encodings
) -> None:
    runs = [random_logits(windows, seed, answerable=True) for seed in range(3)]
    narrow = SpanLogits(
        [a[:-3] for a in runs[2].start], [a[:-3] for a in runs[2].end], runs[2].answerable
    )
    ensemble = mean_span_logits([*runs[:2], narrow])
    for w in range(len(windows)):
        size = windows.lengths[w]
        for i in range(size):
            scores = [float(run.start[w][i]) + float(run.end[w][size - 1]) for run in runs]
            mine = ensemble.start[w][i] + ensemble.end[w][size - 1]
            assert mine == pytest.approx(np.mean(scores), abs=1e-6)
    np.testing.assert_allclose(ensemble.answerable, np.mean([r.answerable for r in runs], axis=0))
    assert len(decode_spans(questions, windows, ensemble)) == 3


def test_runs_and_logits_that_do_not_belong_together_are_refused(
    questions: list[SquadQuestion], windows: Encodings
) -> None:
    logits = random_logits(windows, 0)
    with pytest.raises(ValueError, match="same windows"):
        mean_span_logits([logits, random_logits(windows, 1, answerable=True)])
    with pytest.raises(ValueError, match="logits of 1 windows"):
        decode_spans(questions, windows, SpanLogits(logits.start[:1], logits.end[:1]))
    short = [array[:4] for array in logits.start]
    with pytest.raises(ValueError, match="window 0 has 24 tokens, logits for 4"):
        decode_spans(questions, windows, SpanLogits(short, short))
    with pytest.raises(ValueError, match="not those of 2 questions"):
        decode_spans(questions[:2], windows, logits)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's  mat.", "cats mat"),
        ("a an the", ""),
        ("theatre, Anna & the-a", "theatre anna thea"),
        ("“quoted”", "“quoted”"),
    ],
)
def test_answers_are_normalised_as_the_official_scripts_do(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_scores_of_single_answers() -> None:
    assert exact_score("The cat!", "cat") == 1.0
    assert f1_score("the cat sat", "a cat") == pytest.approx(2 / 3)
    assert f1_score("cat cat", "cat") == pytest.approx(2 / 3)
    assert f1_score("the", "") == 0.0
    assert f1_score_with_null("the", "") == 1.0
    assert f1_score_with_null("cat", "") == 0.0


def test_the_nearest_truth_counts_and_a_missing_answer_is_zero() -> None:
    truths = (Answer("cat", 0), Answer("the red cat", 0))
    questions = [SquadQuestion(name, "", "", truths) for name in ("q1", "q2")]
    metrics = squad_metrics(questions, {"q1": "red cat"}, version="1.1")
    assert metrics == {"exact": 50.0, "f1": 50.0}


def test_the_versions_differ_for_truths_that_normalise_to_nothing() -> None:
    question = SquadQuestion("q", "", "", (Answer("The", 0), Answer("cat", 0)))
    answers = {"q": "a"}
    assert squad_metrics([question], answers, version="1.1") == {"exact": 100.0, "f1": 0.0}
    metrics = squad_metrics([question], answers, version="2.0")
    assert metrics == {"exact": 0.0, "f1": 0.0, "HasAns_exact": 0.0, "HasAns_f1": 0.0}


def test_published_predictions_for_1_1_get_the_official_score(shared_data: Path) -> None:
    folder = shared_data / "squad"
    questions = load_squad(folder / "dev-v1.1.json", "validation", version="1.1")
    answers = json.loads((folder / "predictions" / "v1.1_LogisticBaseline.json").read_text())
    metrics = squad_metrics(questions, answers, version="1.1")
    assert metrics == {
        "exact": pytest.approx(40.14191106906339, abs=1e-10),
        "f1": pytest.approx(50.98153647324461, abs=1e-10),
    }


def test_published_predictions_for_2_0_get_the_official_score(shared_data: Path) -> None:
    folder = shared_data / "squad"
    questions = load_squad(folder / "dev-v2.0.rebuilt.json", "validation", version="2.0")
    answers = json.loads((folder / "predictions" / "v2.0_nlnet.json").read_text())
    expected = {
        "exact": 75.82750779078582,
        "f1": 78.77776770381462,
        "HasAns_exact": 69.61875843454791,
        "HasAns_f1": 75.52773885752187,
        "NoAns_exact": 82.01850294365012,
        "NoAns_f1": 82.01850294365012,
    }
    assert squad_metrics(questions, answers, version="2.0") == pytest.approx(expected, abs=1e-10)


def some_predictions(size: int) -> tuple[list[SquadQuestion], list[SpanPrediction]]:
    rng = np.random.default_rng(size)
    questions, predictions = [], []
    for i in range(size):
        answers = (Answer("red cat", 0),) if rng.random() < 0.6 else ()
        text = str(rng.choice(["red cat", "cat", "dog"]))
        odds = float(rng.integers(-4, 4)) + 2.0 * (not answers)  # many equal odds
        questions.append(SquadQuestion(f"q{i}", "", "", answers))
        predictions.append(SpanPrediction(f"q{i}", (Span(text, 0.0, 0, 1),), odds))
    return questions, predictions


@pytest.mark.parametrize("size", [1, 2, 50, 200])
def test_the_tuned_threshold_is_the_best_of_all(size: int) -> None:
    questions, predictions = some_predictions(size)
    tuned = tune_null_threshold(questions, predictions)
    odds = [p.null_odds for p in predictions]
    for name in ("exact", "f1"):
        scores = [
            squad_metrics(questions, choose_answers(predictions, null_threshold=t), version="2.0")
            for t in [min(odds) - 1.0, *odds]
        ]
        assert getattr(tuned, name) == pytest.approx(max(s[name] for s in scores), abs=1e-9)
        answers = choose_answers(predictions, null_threshold=getattr(tuned, f"{name}_threshold"))
        reached = squad_metrics(questions, answers, version="2.0")[name]
        assert reached == pytest.approx(getattr(tuned, name), abs=1e-9)
    with pytest.raises(ValueError, match="differ"):
        tune_null_threshold(questions, predictions[1:])


def test_predictions_are_written_as_the_official_scripts_read_them(tmp_path: Path) -> None:
    _, predictions = some_predictions(2)
    write_squad_predictions(tmp_path / "predictions.json", {"q0": "café", "q1": ""})
    write_null_odds(tmp_path / "null_odds.json", predictions)
    read = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert read == {"q0": "café", "q1": ""}
    odds = json.loads((tmp_path / "null_odds.json").read_text())
    assert odds == {p.id: p.null_odds for p in predictions}
    assert choose_answers(predictions) == {p.id: p.text for p in predictions}


def test_normalising_keeps_what_is_neither_ascii_punctuation_nor_article() -> None:
    text = "".join(chr(c) for c in range(32, 127)) + " naïve—dash"
    expected = re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower())
    assert normalize_answer(text) == " ".join(expected.split())
