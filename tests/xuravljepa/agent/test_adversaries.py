"""The campaign of tools that misbehave, short: see tests/campaigns/tools.py; hanging ones are in test_sandbox.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

from xuravljepa.agent.sandbox import available

CAMPAIGNS = Path(__file__).parents[2] / "campaigns"
KINDS = ["raise_an_error", "fork", "children_left_behind", "allocate_a_gigabyte", "return_a_gigabyte", "return_nan",
         "return_text_for_a_number", "return_a_list_that_holds_itself", "recurse", "break_json"]


@pytest.mark.skipif(not available(), reason="needs POSIX processes")
def test_whatever_a_tool_does_the_agent_answers_in_time_and_goes_on_as_before(monkeypatch):
    monkeypatch.syspath_prepend(str(CAMPAIGNS.parents[1]))
    specification = importlib.util.spec_from_file_location("tools_campaign", CAMPAIGNS / "tools.py")
    campaign = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(campaign)
    try:
        rows = campaign.campaign(KINDS, 10.0, 1)
    finally:
        sys.modules.pop("tests.campaigns.adversaries", None)
    assert len(rows) == 2 * len(KINDS) + 1
    assert {row[0]: row[-1] for row in rows if row[-1]} == {}
