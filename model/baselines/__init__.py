"""Baselines that know items by their ids alone.

SASRec, LRURec and GRU4Rec are trained like fMRLRec, on the same batches with the same loss. Popularity and ItemKNN only
count.
"""
