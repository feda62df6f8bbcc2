"""Compares a run with recorded healthy runs of the same recipe, and diagnoses known mistakes.

Needs no torch, and reads no files except the bands of the package.

    band       a run's curves, and the bands of healthy runs, which benchmarks/bands.py records
    diagnoses  the known mistakes and their evidence
    verdict    the comparison: below, within or above the band, since when, and the diagnoses that fit
"""
