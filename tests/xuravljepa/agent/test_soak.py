"""The campaign of ten thousand questions, short: see tests/campaigns/questions.py."""

import importlib.util
from pathlib import Path

from xuravljepa import Agent

PATH = Path(__file__).parents[2] / "campaigns" / "questions.py"


def test_answers_stay_the_same_and_nothing_is_left_open():
    specification = importlib.util.spec_from_file_location("questions", PATH)
    campaign = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(campaign)
    rows = list(campaign.soak(Agent.from_pretrained("tiny"), 100))
    assert all(same for *_, same in rows)
    assert rows[-1][0] > 0.9 and rows[-1][1] - rows[1][1] < campaign.GROWTH and rows[-1][2] == rows[1][2]
