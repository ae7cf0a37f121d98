"""Function words of English, which content words leave out."""

from __future__ import annotations

# No evidence of copying, and of no use in telling two texts apart. Reflexive pronouns are left out on
# purpose: "myself" and "itself" carry the mode.
_FUNCTION_WORDS = """
    a about after again all also am an and any are aren't as at be because been before being both but by can
    can't cannot could couldn't did didn't do does doesn't doing don't down each even every few for from
    further had hadn't has hasn't have haven't having he he'd he'll her here hers him his how i i'd i'll i'm
    i've if in into is isn't it its it'd it'll just let's like may me might more most much must my no nor not
    now of off on once one only or other our ours out over own per same shall she she'd she'll should
    shouldn't so some such than that the their theirs them then there these they they'd they'll they're
    they've this those through to too under until up upon us very was wasn't we we'd we'll we're we've were
    weren't what when where whether which while who whom whose why will with within without won't would
    wouldn't yet you you'd you'll you're you've your yours s t
"""
STOPWORDS = frozenset(_FUNCTION_WORDS.split())
