"""The two tools that the shipped model was taught to use: a price list and sums with a count."""

from xuravljepa.agent.arguments import AskModel, FromQuestion, Template
from xuravljepa.agent.builtin import calculator

_COLOUR = r"(?:price of|what does) (?:the )?(?P<colour>\w+)"
_SHAPE = r"number of (?P<shape>\w+?)s\b"


def register_scene_tools(registry, knowledge, **settings):
    """Register ``lookup`` over a KnowledgeBase of prices and ``calculator``.

    Both run in this process: they are bounded and finish in microseconds.  settings : for ``register``,
    such as ``usefulness``.
    """
    registry.register(
        knowledge.lookup,
        description="Look up what a thing costs at a shop.",
        arguments={"shop": FromQuestion(r"(?:price|cost)\b.*\bat (\w+)"),
                   "item": AskModel("what shape is the {colour} one?", _COLOUR)},
        isolation="inline", **settings,
    )
    registry.register(
        calculator,
        description="Work out a sum of numbers.",
        arguments={"expression": Template("{a} + {count}", a=FromQuestion(r"\b(\d+) (?:plus|to)\b", int),
                                          count=AskModel("how many {shape}s are there?", _SHAPE, int))},
        isolation="inline", **settings,
    )
