"""Compares a run with recorded healthy runs of the same recipe, and diagnoses known mistakes.

Everything here works on numbers and sentences: no torch, no files but the bands of the package.

    band       a run's curves; the bands of healthy runs, and how one is recorded
    diagnoses  the known mistakes and their evidence
    verdict    the comparison: below, within or above the band, since when, and the diagnoses that fit
"""
