"""Tool questions: keys that stay in their pools, prices that follow the seed, answers that add up."""
import json
from collections import Counter

import pytest

from training.data.dataset import Dataset
from training.data.questions import MAX_QUERY_BYTES, TEMPLATE_SETS
from training.data.scenes import SHAPES, scene
from training.data.tools_data import (ADDENDS, KNOWN_SHOPS, POOL_SIZES, POOLS, price_list, shop_names,
                                      tool_questions, write_price_list)
from xuracore.errors import ConfigError
from xuravljepa.agent.builtin import KnowledgeBase
from xuravljepa.agent.scene_tools import register_scene_tools
from xuravljepa.agent.tools import ToolRegistry

OTHER = {"grey": "gray", "discs": "circle", "disc": "circle", "boxes": "square", "box": "square"}


def ask(split, pool, count=200, **how):
    scenes = [scene(split, i, 5) for i in range(count)]
    return [(this, q) for this in scenes for q in tool_questions(this, pool, **how)]


def test_pools_share_no_shop_and_no_addend():
    names = [name for pool in POOLS for name in shop_names(pool, 5)]
    assert len(set(names)) == len(names) == 6 + sum(POOL_SIZES.values())
    assert min(POOL_SIZES.values()) >= 300
    addends = [a for pool in POOLS for a in ADDENDS[pool]]
    assert len(set(addends)) == len(addends)


def test_unseen_shops_look_like_known_ones_but_are_not_one_letter_away():
    for name in (*KNOWN_SHOPS, *shop_names("test", 5)):
        assert len(name) == 5 and [letter in "aeiou" for letter in name] == [False, True, False, True, False]
        assert all(name == known or sum(a != b for a, b in zip(name, known)) >= 2 for known in KNOWN_SHOPS)


def test_prices_follow_the_seed_and_depend_on_the_shape():
    prices = price_list(5)
    assert prices == price_list(5) != price_list(6)
    for row in prices.values():
        assert list(row) == list(SHAPES) and len(set(row.values())) == 3
        assert all(0 <= price <= 30 for price in row.values())


@pytest.mark.parametrize("templates", TEMPLATE_SETS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("split", ["train", "ood"])
def test_every_answer_follows_from_picture_and_key(split, pool, templates):
    prices, asked = price_list(5), ask(split, pool, 100, per_type=2, templates=templates)
    assert {q.type for _, q in asked} == {"price", "sum"}
    for this, q in asked:
        words = [OTHER.get(w, w) for w in (w.strip("?,:.").removesuffix("'s") for w in q.query.split())]
        assert q.known == (pool == "known") and q.result == q.answer and 0 <= int(q.answer) <= 30
        assert q.key in words and len(q.query.encode()) <= MAX_QUERY_BYTES
        if q.type == "price":
            (thing,) = [o for o in this.objects if o.colour in words]
            assert q.key in shop_names(pool, 5)
            assert int(q.answer) == prices[q.key][thing.shape]
            assert (q.tool, q.arguments) == ("lookup", {"shop": q.key, "shape": thing.shape})
            assert split != "ood" or thing.held_out
        else:
            (shape,) = [s for s in SHAPES if s + "s" in words or s in words]
            assert int(q.key) in ADDENDS[pool]
            assert int(q.answer) == int(q.key) + sum(o.shape == shape for o in this.objects)
            assert q.tool == "calculator"
            assert sum(map(int, q.arguments["expression"].split(" + "))) == int(q.answer)


def test_known_and_unseen_keys_fill_the_same_templates():
    def skeletons(pool):
        return {tuple("*" if w.strip("?") == q.key or w in str(this.objects) else w for w in q.query.split())
                for this, q in ask("train", pool, 300, types=["price"])}
    assert skeletons("known") == skeletons("test")


def test_prices_of_unseen_shops_cannot_be_guessed():
    counts = Counter(q.answer for _, q in ask("test", "test", 900, types=["price"]))
    assert len(counts) == 31 and max(counts.values()) / counts.total() < 0.08


def test_the_price_list_on_disk_is_the_one_in_memory(tmp_path):
    write_price_list(tmp_path / "price_list.json", 5)
    assert json.loads((tmp_path / "price_list.json").read_text()) == price_list(5)


def test_bad_requests_are_named():
    with pytest.raises(ConfigError, match="'tset'"):
        tool_questions(scene("test", 0), "tset")
    with pytest.raises(ConfigError, match="'other'"):
        tool_questions(scene("test", 0), "test", templates="other")
    with pytest.raises(ConfigError, match="'weight'"):
        tool_questions(scene("test", 0), "test", types=["weight"])


@pytest.mark.parametrize("templates", ["plain", "wide", "paraphrase"])
def test_the_agent_s_tools_find_their_arguments_in_any_wording(templates):
    registry = ToolRegistry()
    register_scene_tools(registry, KnowledgeBase({"shop": {"circle": 1}}))
    tools = {tool.name: tool for tool in registry}
    rows = [row for row in Dataset.tools("test", 60, 0, pools=("known", "test"), templates=templates).rows if row.tool]
    assert len(rows) > 100
    for row in rows:
        wanted = row.tool["arguments"]
        found = tools[row.tool["name"]].fill(row.query, lambda question: "circle" if "shape" in question else "3")
        if "shop" in wanted:
            assert found["shop"] == wanted["shop"], row.query
        else:
            assert found["expression"].split()[0] == wanted["expression"].split()[0], row.query
