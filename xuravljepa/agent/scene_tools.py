"""The two tools that the shipped model was taught to use: a price list and sums with a count."""

from xuravljepa.agent.arguments import AskModel, FromQuestion, Template
from xuravljepa.agent.builtin import calculator

# What is asked about is found by its words, wherever they stand: the shipped model knows hundreds of wordings.
_COLOUR = r"\b(?P<colour>red|orange|yellow|green|cyan|blue|purple|gr[ae]y)\b"
_SHAPE = r"\b(?P<shape>circle|disc|square|boxe(?=s)|box|triangle)s?\b"
_SHOP = r"\bat (?!(?:the|this|a)\b)(\w+)"
_NUMBER = r"\b(\d+)\b"


def register_scene_tools(registry, knowledge, **settings):
    """Register ``lookup`` over a KnowledgeBase of prices and ``calculator``.

    Both run in this process: they are bounded and finish in microseconds.  settings : for ``register``,
    such as ``usefulness``.
    """
    registry.register(
        knowledge.lookup,
        description="Look up what a thing costs at a shop.",
        arguments={"shop": FromQuestion(_SHOP),
                   "item": AskModel("what shape is the {colour} one?", _COLOUR)},
        isolation="inline", **settings,
    )
    registry.register(
        calculator,
        description="Work out a sum of numbers.",
        arguments={"expression": Template("{a} + {count}", a=FromQuestion(_NUMBER, int),
                                          count=AskModel("how many {shape}s are there?", _SHAPE, int))},
        isolation="inline", **settings,
    )
