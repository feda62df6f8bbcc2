"""Compares a run with recorded healthy runs of the same recipe, and diagnoses known mistakes.

Needs no torch, and reads no files except the bands of the package.

    band       a run's curves; the bands of healthy runs, and how one is recorded
    diagnoses  the known mistakes and their evidence
    verdict    the comparison: below, within or above the band, since when, and the diagnoses that fit
"""
