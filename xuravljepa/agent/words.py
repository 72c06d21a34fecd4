"""Open requests, "describe the picture" or "list the colours": their answer is a text of its own.

None of the known answers can be right, so the Y-Decoder writes one.  It is as sure as the decoder finds its text
likely: the probability of all bytes and the end, averaged over the views of the picture.  No tool is called.
"""

import re

import numpy as np

from xuravljepa.agent.confusion import FOREIGN, UNCHARTED, at_least
from xuravljepa.agent.recursion import Reading
from xuravljepa.predictor import Sight

_MOST = 2000  # characters that are looked at: bounds the running time
_MANY = r"(?:things|objects|items|pieces|figures|shapes|everything|what)"
_PICTURE = r"(?:picture|image|scene|photo|photograph|drawing)"
_LISTS = re.compile(r"(?<!how many )\b(?:shapes|colou?rs)\b|\b(?:each|every) (?:shape|colou?r)\b")
_DESCRIBES = re.compile(
    r"\b(?:describe|description|caption|(?:in|into) words)\b"
    rf"|\b(?:list|enumerate|name|say|tell me|write down)\b.*\b{_MANY}\b"
    rf"|\bwhat\b.*\b(?:in|on|about) (?:the|this|that) {_PICTURE}\b"
    rf"|\bwhat\b.*\b(?:see|seen|shows?|shown|there)\b|\b(?:see|seen|shows?|shown)\b.*\bwhat\b"
    rf"|\b(?:what|which) {_MANY}\b")
# What one fact is asked with: "describe the shape of the red one" has a known answer, "what shape do you see" too.
_FACT = re.compile(r"\b(?:shape|colou?r|size|side|price|costs?|how|count of|number of|one|whether|kind|sort|form"
                   r"|among|(?:is|are) (?:there )?an?|left of|right of|above|below|over|under|beside|next to"
                   r"|near\w*|close\w*|furthest|distant)\b")


def asks_for_text(question):
    """Whether a question asks for a description or a list, rather than for one fact."""
    text = question[:_MOST].lower()
    if _LISTS.search(text):
        return True
    return bool(_DESCRIBES.search(text)) and not _FACT.search(text)


class Writer:
    """The Reader and the Monitor of an open request, for ``recursion.RecursionLayer``.

    monitor : ConfusionMonitor, which knows how unusual a picture may be; None: any.   query : of
    ``model.query_tokens``.   visual (views, n, d).   foreign : words of the request that no training had.
    """

    looked, foreign = True, ()  # a text is not told by a tool, whatever it was asked with

    def __init__(self, model, monitor, query, visual, foreign=()):
        self.model, self.visual, self.after = model, visual, None
        self.query = np.repeat(query, len(visual), axis=0)
        strangeness = monitor.familiarity(visual[:1])[0, 1] if monitor is not None else 0.0  # mean over patches
        self.least = UNCHARTED if monitor is not None and strangeness > float(monitor.strangest_known) else 0.0
        self.note = f"words it was not taught: {', '.join(foreign)}" if foreign else ""
        if foreign:
            self.least = max(self.least, FOREIGN)

    def read(self, state):
        predictor, decoder = self.model.predictor, self.model.y_decoder
        reading = predictor(self.query, self.visual)
        self.after, embeddings, sight = reading.states, reading.embedding.data, predictor.sight(self.visual)
        views = [Sight(*(part if part is None else part[i : i + 1] for part in sight)) for i in range(len(self.visual))]
        text = decoder.write(embeddings[:1], sight=views[0])[0]
        likely = 0.0
        if len(text.encode()) <= decoder.config.max_length - 2:  # it came to an end
            likely = np.mean([np.exp(decoder.log_probability(embedding, [text], view)[0])
                              for embedding, view in zip(embeddings, views)])
        gate = predictor.gate_activation()
        gate = np.full(1, 0.5) if gate is None else gate.mean(axis=0)[:1]
        return Reading(text, state=state, hidden={"likely": float(likely), "gate": gate})

    def p_wrong(self, reading, depth):
        """1 - the probability of the text; more for a picture or words unlike those of training."""
        return float(at_least(self.least, 1 - reading.hidden["likely"]))
