"""How people may ask: a small grammar of wordings for training, and other sentences for the test.

A pattern is a sentence with choices ``(a|b|)`` in it; capital words stand for the choices of ``_MACROS``, and
``{a}`` and ``{b}`` for what is asked about.  To a pattern come, now and then, an opening ("could you tell me:")
and an end ("in the picture"), and words have other names ("grey", "big", "disc").  All of it is drawn from
one 64-bit word by integer arithmetic, so a question's wording is the same on every machine.

``UNSEEN`` is never drawn from in training.  No wording of training comes closer to one of it than two words,
articles and marks aside, and half of its sentences hold words that training never says
(``tests/training/test_wordings.py`` goes through all of them).  Of each type the first sentence is the one that
was the whole test while training knew two or three templates a type.
"""
import re
from functools import lru_cache

from xuracore.errors import ConfigError

_MASK = (1 << 64) - 1
_MACROS = {
    "ONE": "(the {a} one|the {a} one|the {a} object|the {a} thing|the {a} item|the {a} figure|{a})",
    "TWO": "(the {b} one|the {b} one|the {b} object|the {b} thing|the {b} item|the {b} figure|{b})",
    "THING": "(one|one|object|thing|item)",
    "THINGS": "(objects|things|items|figures)",
    "COLOUR": "(colour|colour|color)",
    "PICTURE": "(picture|image|scene)",
    "NEAR": "(nearest to|nearest|closest to|next to|beside)",
    "FAR": "(furthest|farthest|most distant|most remote)",
}

WIDE = {
    "shape": (
        "(what|which) shape is ONE?", "what is the shape of ONE?", "shape of ONE?",
        "ONE is (what|which) shape?",
        "(what|which) shape has ONE?", "tell me the shape of ONE", "name the shape of ONE",
        "give the shape of ONE",
        "tell me (what|which) shape ONE is", "(what|which) kind of shape is ONE?", "what is ONE's shape?",
        "is ONE a circle, a square or a triangle?", "what form has ONE?", "ONE has (what|which) shape?",
        "i want to know the shape of ONE", "do you know the shape of ONE?", "ONE: (its|the) shape?",
        "what sort of figure is ONE?", "how is ONE shaped?",
    ),
    "size": (
        "is ONE (small or large|large or small|big or small|small or big)?", "what size is ONE?",
        "size of ONE?",
        "what is the size of ONE?", "which size has ONE?", "tell me the size of ONE",
        "name the size of ONE", "tell me (how big|how large|what size) ONE is",
        "ONE is (small or large|how big)?",
        "what is ONE's size?", "is ONE a (small one or a large one|large one or a small one)?",
        "(small or large|large or small): ONE?", "is ONE (little or big|big or little)?", "what size has ONE?",
        "do you know how (big|large|small) ONE is?", "can you say how big ONE is?", "give the size of ONE",
        "say whether ONE is (small or large|big or small)", "ONE: (its|the) size?",
    ),
    "colour_of_shape": (
        "(what|which) COLOUR is the {a}?", "COLOUR of the {a}?", "the {a} is (what|which) COLOUR?",
        "what is the COLOUR of the {a}?", "tell me the COLOUR of the {a}", "name the COLOUR of the {a}",
        "(what|which) COLOUR has the {a}?", "tell me (what|which) COLOUR the {a} is",
        "give the COLOUR of the {a}",
        "the {a} has (what|which) COLOUR?", "what is the {a}'s COLOUR?", "how is the {a} coloured?",
        "do you know the COLOUR of the {a}?", "the {a}: (its|the) COLOUR?",
        "which COLOUR (was used|is used) for the {a}?",
        "i want to know the COLOUR of the {a}", "of (what|which) COLOUR is the {a}?",
    ),
    "horizontal": (
        "is ONE (left or right|right or left)?", "(left or right|right or left): ONE?",
        "is ONE on the (left or right|right or left|left or the right|left side or the right side)?",
        "where is ONE, on the (left or the right|right or the left)?", "on which of the two sides is ONE?",
        "is ONE (at the left or at the right|to the left or to the right)?", "on what side is ONE?",
        "which half is ONE in, left or right?", "tell me the side of ONE, left or right",
        "ONE is on (which|what) side?", "does ONE (lie|stand) on the left or on the right?",
        "say whether ONE is (left or right|on the left or on the right)", "ONE is left or right?",
        "is ONE on the left side of the PICTURE or on the right?",
        "in which half is ONE, the left or the right?",
        "tell me which side ONE is at", "what side of the PICTURE is ONE on?",
    ),
    "vertical": (
        "is ONE (top or bottom|bottom or top)?", "(top or bottom|bottom or top): ONE?",
        "is ONE at the (top or bottom|bottom or top|top or at the bottom)?", "is ONE (up or down|high or low)?",
        "where is ONE, at the (top or the bottom|bottom or the top)?",
        "is ONE (up at the top|high) or down at the bottom?",
        "which half is ONE in, (top or bottom|upper or lower)?",
        "ONE is (top or bottom|high or low|up or down)?",
        "does ONE (lie|stand) at the top or at the bottom?",
        "say whether ONE is (top or bottom|high or low|up or down)",
        "in which half is ONE, the (upper or the lower|top or the bottom)?",
        "is ONE near the top or near the bottom?",
        "tell me whether ONE is (high or low|at the top or at the bottom|up or down)",
        "how high is ONE, top or bottom?",
        "is ONE up there or low down there?", "is ONE high up in the PICTURE or low?",
    ),
    "existence": (
        "is there {an} {a} {b}?", "(any|some) {a} {b} here?", "do you see {an} {a} {b}?",
        "is {an} {a} {b} (here|there|shown)?",
        "does the PICTURE (show|contain) (any|some) {a} {b}?", "can you see (any|some|{an}) {a} {b}?",
        "is there any {a} {b}?",
        "{an} {a} {b} (here|there)?", "are there any {a} {b}s?", "do you (find|spot|notice) {an} {a} {b}?",
        "is {an} {a} {b} (in the PICTURE|among the THINGS|to be seen)?",
        "tell me whether there is {an} {a} {b}",
        "is one of the THINGS {an} {a} {b}?", "does {an} {a} {b} exist (here|)?",
        "say whether you see {an} {a} {b}",
        "is there a {b} that is {a}?", "is there something that is {an} {a} {b}?",
        "have we got {an} {a} {b}?",
    ),
    "count_shape": (
        "how many {a}s are there?", "number of {a}s?", "count the {a}s", "what is the number of {a}s?",
        "how many {a}s?",
        "how many {a}s (do you see|can you see|do you count|does the PICTURE show)?",
        "tell me the number of {a}s",
        "tell me how many {a}s there are", "there are how many {a}s?",
        "how many THINGS are {a}s?", "count of {a}s?", "count all {a}s", "the number of {a}s is what?",
        "please count (the|all the) {a}s", "how many {a}s (are here|exist|are shown)?",
        "give me the count of {a}s",
        "do you know how many {a}s there are?", "how often do you see a {a}?", "what is the count of {a}s?",
    ),
    "count_size": (
        "how many {a} ones are there?", "number of {a} THINGS?", "count the {a} (ones|objects|things)",
        "how many {a} THINGS are there?", "how many {a} (ones|THINGS)?",
        "what is the number of {a} (ones|THINGS)?",
        "how many {a} (ones|THINGS) (do you see|can you see|do you count)?", "tell me the number of {a} THINGS",
        "tell me how many {a} (ones|THINGS) there are", "how many THINGS are {a}?",
        "there are how many {a} (ones|THINGS)?", "count of {a} THINGS?", "count all {a} (ones|THINGS)",
        "how many {a} THINGS does the PICTURE show?", "the number of {a} (ones|THINGS) is what?",
        "do you know how many {a} (ones|THINGS) there are?", "what is the count of {a} (ones|THINGS)?",
    ),
    "closest_shape": (
        "what shape is NEAR ONE?", "shape (closest to|nearest to|nearest|next to) ONE?",
        "what is the shape NEAR ONE?", "tell me the shape NEAR ONE",
        "which shape (stands|lies) (nearest to|closest to|next to) ONE?",
        "(what|which) shape is the (THING|neighbour) (nearest to|closest to|nearest) ONE?",
        "name the shape NEAR ONE",
        "what is the shape of ONE's (neighbour|nearest neighbour)?", "what shape has the neighbour of ONE?",
        "shape of the THING (closest to|nearest to|next to) ONE?",
        "the THING (nearest|closest to|next to) ONE has (what|which) shape?",
        "what shape has the THING (nearest to|closest to|next to) ONE?",
        "is there a shape next to ONE, and which?",
        "is the THING (nearest to|closest to|next to) ONE a circle, a square or a triangle?",
        "what shape is nearby, closest to ONE?", "the neighbour of ONE is (what|which) shape?",
    ),
    "furthest_shape": (
        "what shape is FAR from ONE?", "shape FAR from ONE?",
        "what is the shape FAR from ONE?", "tell me the shape FAR from ONE",
        "what shape (stands|lies) FAR from ONE?", "name the shape FAR from ONE",
        "(what|which) shape is the THING FAR from ONE?", "what shape is farthest away from ONE?",
        "shape of the THING FAR from ONE?", "the THING FAR from ONE has (what|which) shape?",
        "what shape has the THING FAR from ONE?", "what shape is (furthest|most) away from ONE?",
        "is the THING FAR from ONE a circle, a square or a triangle?",
    ),
    "closest_colour": (
        "what COLOUR is NEAR ONE?", "COLOUR (closest to|nearest to|nearest|next to) ONE?",
        "what is the COLOUR NEAR ONE?", "tell me the COLOUR NEAR ONE",
        "which COLOUR (stands|lies) (nearest to|closest to|next to) ONE?",
        "(what|which) COLOUR is the (THING|neighbour) (nearest to|closest to|nearest) ONE?",
        "name the COLOUR NEAR ONE",
        "what is the COLOUR of ONE's (neighbour|nearest neighbour)?", "what COLOUR has the neighbour of ONE?",
        "COLOUR of the THING (closest to|nearest to|next to) ONE?",
        "the THING (nearest|closest to|next to) ONE has (what|which) COLOUR?",
        "what COLOUR has the THING (nearest to|closest to|next to) ONE?",
        "is there a COLOUR next to ONE, and which?",
        "what COLOUR is nearby, closest to ONE?", "the neighbour of ONE is (what|which) COLOUR?",
    ),
    "closest_size": (
        "(what|which) size is NEAR ONE?", "size (closest to|nearest to|nearest|next to) ONE?",
        "what is the size NEAR ONE?", "tell me the size of the THING (closest to|nearest to|next to) ONE",
        "what size is the (THING|neighbour) (nearest to|closest to|nearest) ONE?",
        "how large is the neighbour of ONE?",
        "what is the size of ONE's (neighbour|nearest neighbour)?", "what size has the neighbour of ONE?",
        "size of the THING (closest to|nearest to|next to) ONE?",
        "the THING (nearest|closest to|next to) ONE has (what|which) size?",
 
              "is the THING (nearest to|closest to|nearest|next to) ONE (small or large|large or small|big or small)?",
        "how (big|large) is ONE's neighbour?", "is the neighbour of ONE (small or large|big or small)?",
        "how big is the neighbour nearest to ONE?",
        "the neighbour of ONE is (what size|small or large|how big)?",
    ),
    "same_shape_count": (
        "how many (others|other objects|other things|other ones) have the {a} one's shape?",
        "(others|other objects|other things) shaped like ONE?",
        "how many (others|other THINGS) are shaped like the {a} THING?",
        "how many (others|other THINGS) have the same shape as ONE?", "number of others with the shape of ONE?",
        "how many THINGS (share|have) the shape of ONE, (without it|not counting it|leaving it out)?",
        "how many (others|other THINGS) look like the {a} THING in shape?", "count the others shaped like ONE",
        "tell me how many others have the shape of ONE",
        "count the (others|other THINGS) with the same shape as ONE",
        "the shape of ONE: how many more of it?", "how many others share the shape of ONE?",
        "how many (others|more THINGS) are of the same shape as ONE?", "how many more have the shape of ONE?",
        "besides ONE, how many others of that shape?",
        "what is the number of others shaped like the {a} THING?",
    ),
    "left_of": (
        "is ONE (left of|to the left of) TWO?", "{a} left of {b}?", "is ONE further left than TWO?",
        "does ONE stand somewhere (left of|to the left of) TWO?",
        "is TWO (on the right side of|more to the right than) ONE?",
        "is ONE on the left (side of|of) TWO?", "tell me whether ONE is (left of|to the left of) TWO",
        "ONE is left of TWO, (right|true|yes or no|is it not)?", "is ONE more to the left than TWO?",
        "seen from TWO, is ONE to the left?", "do you see ONE left of TWO?",
        "does ONE come before TWO from the left?",
        "is TWO further right than ONE?", "does TWO (stand|lie) right of ONE?",
        "is it true that ONE is left of TWO?",
        "say whether ONE is left of TWO", "ONE is to the left of TWO?",
    ),
    "above": (
        "is ONE (above|over|higher than|higher up than) TWO?", "{a} above {b}?",
        "is TWO (below|under|lower than) ONE?",
        "does ONE stand (higher up than|higher than) TWO?",
        "tell me whether ONE is (above|over|higher than) TWO",
        "ONE is above TWO, (right|true|yes or no|is it not)?", "is ONE further up than TWO?",
        "do you see ONE above TWO?",
        "seen from TWO, is ONE above?", "is TWO (lower in the PICTURE than|underneath) ONE?",
        "does TWO (stand|lie) below ONE?",
        "is it true that ONE is (above|higher than) TWO?", "say whether ONE is above TWO",
        "ONE is (above|over) TWO?",
        "is TWO down below ONE?", "is ONE nearer to the top than TWO?",
    ),
    "compare_count": (
        "are there more {a}s than {b}s?", "more {a}s than {b}s?", "do you (see|count) more {a}s than {b}s?",
        "are there fewer {b}s than {a}s?",
        "is the number of {a}s (larger|greater|higher|bigger) than the number of {b}s?",
        "does the PICTURE (show|contain|have) more {a}s than {b}s?",
        "tell me whether there are more {a}s than {b}s",
        "are the {b}s outnumbered by the {a}s?", "fewer {b}s than {a}s?",
        "is it true that there are more {a}s than {b}s?",
        "are the {a}s more (numerous|in number) than the {b}s?", "do {a}s come in a greater number than {b}s?",
        "there are more {a}s than {b}s, (right|true|yes or no)?", "say whether the {a}s outnumber all {b}s",
        "is the count of {a}s above the count of {b}s?",
        "is the number of {b}s (smaller|lower) than the number of {a}s?",
    ),
    "two_hop": (
        "what shape is {a} TWO?", "shape {a} TWO?", "what is the shape {a} TWO?",
        "tell me the shape {a} TWO", "name the shape {a} TWO", "what shape (stands|comes) {a} TWO?",
        "(what|which) shape is the THING {a} TWO?", "the THING {a} TWO has (what|which) shape?",
        "shape of the THING {a} TWO?",
        "what shape has the THING {a} TWO?", "is the THING {a} TWO a circle, a square or a triangle?",
        "what shape do you see {a} TWO?", "{a} TWO: (what|which) shape?",
        "(what|which) shape can be seen {a} TWO?",
    ),
    "price": (
        "what does ONE cost at {b}?", "price of ONE at {b}?", "what is the price of ONE at {b}?",
        "how much is ONE at {b}?", "how much does ONE cost at {b}?", "what do i pay for ONE at {b}?",
        "tell me the price of ONE at {b}", "at {b}, what does ONE cost?", "what is ONE's price at {b}?",
        "what would ONE cost at {b}?", "how much for ONE at {b}?", "at {b}, how much is ONE?",
        "cost of ONE at {b}?", "what price has ONE at {b}?",
    ),
    "sum": (
        "what is {b} plus the number of {a}s?", "{b} plus the number of {a}s?", "add {b} to the number of {a}s",
        "what is the number of {a}s plus {b}?", "the number of {a}s plus {b}?",
        "how much is {b} plus the number of {a}s?",
        "{b} and the number of {a}s make how much?", "add the number of {a}s to {b}",
        "what is {b} plus the count of {a}s?",
        "count the {a}s and add {b}", "what is the sum of {b} and the number of {a}s?",
        "{b} more than the number of {a}s is what?",
        "tell me {b} plus the number of {a}s", "(work out|calculate) {b} plus the number of {a}s",
        "the count of {a}s plus {b} is what?", "sum of {b} and the number of {a}s?",
    ),
    "caption": (
        "what is in the PICTURE?", "describe the PICTURE", "what do you see?", "what is to be seen?",
        "what does the PICTURE show?",
        "what (can be|is) seen in the PICTURE?", "describe what you see", "give me a description of the PICTURE",
        "describe the PICTURE from left to right", "what do you see from left to right?", "say what you see",
        "name all THINGS", "name everything from left to right", "list all THINGS from left to right",
        "tell me what is in the PICTURE", "what THINGS are there?", "list everything you see",
        "caption the PICTURE",
        "tell me everything you see", "describe this PICTURE",
    ),
    "caption_down": (
        "describe the PICTURE from top to bottom", "what do you see from top to bottom?",
        "name all THINGS from top to bottom", "list everything from top to bottom",
        "what is there from top to bottom?",
        "describe what you see from (the top down|top to bottom|the top to the bottom)",
        "name everything from the top down", "list all THINGS from the top down",
        "say from top to bottom what you see",
        "what does the PICTURE show from top to bottom?", "from top to bottom, what is in the PICTURE?",
    ),
    "colours": (
        "(what|which) COLOURs are there?", "name the COLOURs", "list the COLOURs",
        "(what|which) COLOURs do you see?",
        "(what|which) COLOURs can you see?", "(what|which) COLOURs occur?", "list all COLOURs",
        "name all COLOURs you see",
        "tell me the COLOURs of the THINGS", "what are the COLOURs?",
        "(what|which) COLOURs does the PICTURE (show|have)?",
        "what COLOURs do the THINGS have?", "list the COLOURs of all THINGS",
    ),
    "shapes": (
        "(what|which) shapes are there?", "name the shapes", "list the shapes", "(what|which) shapes do you see?",
        "(what|which) shapes can you see?", "(what|which) shapes occur?", "list all shapes", "count all shapes",
        "tell me the shapes of the THINGS", "what are the shapes?", "how many are there of each shape?",
        "(what|which) shapes does the PICTURE (show|have)?", "how many of every shape do you see?",
        "count the shapes one by one", "how often does each shape occur?",
    ),
    "colours_of": (
        "(what|which) COLOURs are the {a}?", "(what|which) COLOURs do the {a} have?", "COLOURs of the {a}?",
        "name the COLOURs of the {a}", "list the COLOURs of the {a}", "what are the COLOURs of the {a}?",
        "tell me the COLOURs of all {a}", "(what|which) COLOURs have the {a}?",
        "in (what|which) COLOURs do the {a} come?",
        "(what|which) COLOURs do you see among the {a}?", "the {a} have (what|which) COLOURs?",
        "tell me which COLOURs the {a} have",
    ),
}
UNSEEN = {
    "shape": ("name the {a} thing's shape", "which shape does the {a} one have?",
              "identify the shape belonging to the {a} thing", "i wonder what shape the {a} piece has"),
    "size": ("how big is the {a} thing?", "does the {a} one look little or large?",
             "would people call the {a} piece small or large?", "i wonder how big the {a} piece may be"),
    "colour_of_shape": ("name the {a}'s colour", "what colour does the {a} have?", "in which colour is the {a} drawn?",
                        "i wonder what colour somebody gave the {a}"),
    "horizontal": ("which side is the {a} thing on?", "is {a} in the left half or the right half?",
                   "towards which side has the {a} piece been put?",
                   "i wonder whether the {a} thing sits left or right"),
    "vertical": ("is the {a} thing high up or low down?", "is {a} in the top half or the bottom half?",
                 "has the {a} piece been put at the top or the bottom?",
                 "i wonder whether the {a} thing sits up or down"),
    "existence": ("does the image have {an} {a} {b}?", "{an} {a} {b}, is there one?",
                  "can you find {an} {a} {b} anywhere?", "i wonder if {an} {a} {b} was drawn"),
    "count_shape": ("what is the {a} count?", "how many of these are {a}s?", "{a}s, what is their number?",
                    "i wonder how many {a}s were drawn"),
    "count_size": ("what is the {a} object count?", "how many of these are {a}?",
                   "{a} objects, what is their number?", "i wonder how many {a} pieces were drawn"),
    "closest_shape": ("the {a} one's neighbour: what shape?", "what is the shape of the thing closest to {a}?",
                      "which shape sits beside the {a} one?", "starting at {a}, which shape is the closest?"),
    "furthest_shape": ("most distant from {a}: what shape?", "what is the shape of the thing furthest from {a}?",
                       "which shape sits furthest from the {a} one?", "starting at {a}, which shape is most distant?"),
    "closest_colour": ("the {a} one's neighbour: what colour?", "what is the colour of the thing closest to {a}?",
                       "which colour sits beside the {a} one?", "starting at {a}, which colour is the closest?"),
    "closest_size": ("the {a} one's neighbour: what size?", "how big is the thing closest to {a}?",
                     "what sits beside the {a} one, something small or large?",
                     "starting at {a}, is the closest one small or large?"),
    "same_shape_count": ("how many more are shaped like {a}?", "how many other things share {a}'s shape?",
                         "i wonder how many others are shaped like {a}",
                         "besides {a}, how many were drawn with its shape?"),
    "left_of": ("does {a} lie to the left of {b}?", "is {b} to the right of {a}?",
                "can the {a} one be found left of the {b} one?",
                "compared with {b}, is {a} placed more to the left?"),
    "above": ("does {a} lie above {b}?", "is {b} further down than {a}?",
              "can the {a} one be found above the {b} one?", "compared with {b}, is {a} placed higher up?"),
    "compare_count": ("do the {a}s outnumber the {b}s?", "are {b}s fewer than {a}s?",
                      "counting them, are {a}s more than {b}s?", "did somebody draw more {a}s than {b}s?"),
    "two_hop": ("which shape lies {a} the {b} one?", "what is the shape of the thing {a} {b}?",
                "which shape was drawn {a} the {b} one?", "i wonder what shape sits {a} {b}"),
    "price": ("how much must i pay for the {a} one at {b}?", "at {b}, what is the {a} one's price?",
              "the {a} one, what is it sold for at {b}?", "what do they ask for {a} at {b}?"),
    "sum": ("what do you get when you add {b} to the {a} count?", "the {a}s and {b} more make what number?",
            "to {b} add all the {a}s", "how much are the {a}s and {b} together?"),
    "caption": ("could you put the picture into words?", "what are all the things that you see here?",
                "write down what there is", "i wonder what this shows"),
    "caption_down": ("what is there, beginning at the top and going down?", "write down what there is, top to bottom",
                     "put it into words from the top downwards", "top to bottom, which things do you see?"),
    "colours": ("what colours have been used?", "write down every colour", "the colours here, what are they?",
                "i wonder which colours it has"),
    "shapes": ("what shapes have been used?", "write down every shape and its number",
               "the shapes here, what are they?", "i wonder which shapes it has"),
    "colours_of": ("the {a}, what are their colours?", "write down the colours of every one of the {a}",
                   "i wonder which colours the {a} are", "look for the {a} and say their colours"),
}

# What may stand before a question, before a request, and after either.
_OPENINGS = ("please tell me, ", "tell me: ", "can you tell me: ", "could you tell me, ", "say, ", "so, ", "hey, ",
             "now, ", "in this PICTURE, ", "look at the PICTURE: ", "i want to know: ", "quick question: ", "hello, ",
             "well, ", "and ", "ok, ")
_REQUESTS = ("please ", "could you please ", "can you ", "now ", "would you kindly ")
_CLOSINGS = (", please", " in the PICTURE", " here", " in this PICTURE", " now", " then")
_OTHER_WORDS = {  # what is asked about, by other names: (name, of how many in 32)
    "gray": (("grey", 10),), "circle": (("disc", 2),), "square": (("box", 2),),
    "small": (("little", 4), ("tiny", 1)), "large": (("big", 6),),
    "left of": (("to the left of", 8), ("on the left of", 3)),
    "right of": (("to the right of", 8), ("on the right of", 3)),
    "above": (("over", 4), ("on top of", 1)), "below": (("under", 5), ("underneath", 2)),
}
_TOKEN = re.compile(r"[(|)]|[^(|)]+")


class Draw:
    """Choices that one 64-bit word makes, one after the other: the leading digits in mixed radix."""

    __slots__ = ("_word",)

    def __init__(self, word):
        self._word = word

    def below(self, bound):
        """An integer in [0, bound); after about forty bits of choices the later ones are no longer even."""
        product = self._word * bound
        self._word = product & _MASK
        return product >> 64

    def choice(self, items):
        return items[self.below(len(items))]


@lru_cache(maxsize=None)
def parse(pattern):
    """A pattern as a tuple of texts and of tuples of alternatives, each again such a tuple."""
    for name, meaning in _MACROS.items():
        pattern = re.sub(rf"\b{name}(?![A-Z])", meaning, pattern)
    tokens = _TOKEN.findall(pattern)[::-1]

    def sequence():
        parts = []
        while tokens and tokens[-1] not in "|)":
            token = tokens.pop()
            parts.append(alternatives() if token == "(" else token)
        return tuple(parts)

    def alternatives():
        found = [sequence()]
        while tokens.pop() == "|":
            found.append(sequence())
        return tuple(found)

    parsed = sequence()
    if tokens:
        raise ConfigError(f"the pattern {pattern!r} has a bracket or a bar too many")
    return parsed


def spell(parsed, draw):
    """One of a parsed pattern's sentences."""
    return "".join(part if isinstance(part, str) else spell(draw.choice(part), draw) for part in parsed)


def sentences(parsed):
    """All sentences of a parsed pattern."""
    found = [""]
    for part in parsed:
        ends = [part] if isinstance(part, str) else [text for choice in part for text in sentences(choice)]
        found = [start + end for start in found for end in ends]
    return found


def other_word(word, draw):
    """A slot's word, or another name for it; plural and genitive endings may follow in the pattern."""
    place = draw.below(32)
    for name, share in _OTHER_WORDS.get(word, ()):
        if place < share:
            return name
        place -= share
    return word


def wide(patterns, words, draw):
    """A sentence that asks, drawn from ``patterns``; ``words`` fill its slots ``{a}``, ``{b}``, …"""
    words = {slot: other_word(word, draw) for slot, word in words.items()}
    words["an"] = "an" if words["a"][:1] in tuple("aeiou") else "a"
    sentence = spell(parse(draw.choice(patterns)), draw)
    dressed = draw.below(16)
    question = sentence.endswith("?")
    if dressed < 4:
        sentence = spell(parse(draw.choice(_OPENINGS if question else _REQUESTS)), draw) + sentence
    elif dressed < 6:
        body = sentence.removesuffix("?")
        sentence = body + spell(parse(draw.choice(_CLOSINGS)), draw) + "?" * question
    end = draw.below(8)
    if question and end < 2:
        sentence = sentence[:-1]
    elif not question and end < 3:
        sentence += "."
    return " ".join(sentence.format_map(words).replace("boxs", "boxes").split())
