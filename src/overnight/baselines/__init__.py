"""Am I on track? A run beside runs that are known to be right; and, where it is off, which mistake fits.

Everything here is numbers and sentences: no torch, no numpy, no files but the bands that come along.

    course    what a run's files tell, as curves over tokens
    band      where the curves of healthy runs lie, for a recipe and a text
    recording several healthy runs -> a band
    mistakes  the known mistakes, each by what gives it away
    verdict   below, within or above, since when, and what fits
"""
