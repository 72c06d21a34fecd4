"""How well one does without looking: the score that every accuracy must be read beside.

The question-only prior answers with the commonest training answer to the same words, and where the words are
new, with the commonest answer of the type.
"""
from collections import Counter, defaultdict


class QuestionOnlyPrior:
    """The best guess from the text of a question, learned by counting."""

    def __init__(self, dataset):
        self._by_query, self._by_type = defaultdict(Counter), defaultdict(Counter)
        for row in dataset.rows:
            if row.query is not None:
                self._by_query[_words(row.query)][row.answer] += 1
                self._by_type[row.type][row.answer] += 1

    def answer(self, query, type=None):
        """The commonest answer, ties alphabetically; None if neither the words nor the type were seen."""
        counts = self._by_query.get(_words(query)) or self._by_type.get(type)
        return None if counts is None else min(counts, key=lambda answer: (-counts[answer], answer))

    def accuracy(self, dataset):
        """``{type: (share of right guesses, number of questions)}``, sorted by type."""
        right, total = Counter(), Counter()
        for row in dataset.rows:
            if row.query is not None:
                total[row.type] += 1
                right[row.type] += self.answer(row.query, row.type) in row.answers
        return {type: (right[type] / total[type], total[type]) for type in sorted(total, key=str)}


def question_only_prior(train, test):
    """Accuracy per type of guessing from the question alone: ``{type: (accuracy, count)}``.

    Learned on the Dataset ``train``, measured on ``test``.
    """
    return QuestionOnlyPrior(train).accuracy(test)


def prior_table(priors):
    """The priors as lines of text, for people."""
    return "\n".join(f"  {str(type):18s} {accuracy:6.1%}   of {count}"
                     for type, (accuracy, count) in priors.items())


def _words(query):
    return " ".join(query.lower().split())
