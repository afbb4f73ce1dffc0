"""What fMRLRec is measured against: recommenders that know items by their ids alone (torch alone).

`sasrec` and `lrurec` are trained as fMRLRec is, with which they share num_items, sizes (one), items, item_table and
encode; `counting` only counts.
"""
