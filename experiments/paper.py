"""The paper's numbers that results here are held against.

Tables 2 and 3: full ranking, history items stay candidates.
"""

COLUMNS = ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10")
ENCODERS = {"language_encoder": "BAAI/bge-large-en-v1.5", "img_encoder": "ViT-L-16-SigLIP-256/webli"}

# branch -> dataset -> values of COLUMNS at size 1024. "both" is Table 2's fMRLRec row, the others are Table 3's.
RESULTS = {
    "both": {
        "beauty": (0.0415, 0.0613, 0.0520, 0.0939),
        "clothing": (0.0193, 0.0333, 0.0259, 0.0541),
        "sports": (0.0230, 0.0349, 0.0284, 0.0516),
        "toys": (0.0461, 0.0672, 0.0552, 0.0956),
    },
    "language": {
        "beauty": (0.0353, 0.0561, 0.0449, 0.0859),
        "clothing": (0.0167, 0.0279, 0.0225, 0.0461),
        "sports": (0.0205, 0.0313, 0.0261, 0.0487),
        "toys": (0.0403, 0.0618, 0.0503, 0.0927),
    },
    "image": {
        "beauty": (0.0370, 0.0540, 0.0464, 0.0833),
        "clothing": (0.0162, 0.0279, 0.0222, 0.0467),
        "sports": (0.0194, 0.0291, 0.0238, 0.0430),
        "toys": (0.0416, 0.0613, 0.0516, 0.0920),
    },
    "id": {
        "beauty": (0.0257, 0.0335, 0.0288, 0.0431),
        "clothing": (0.0035, 0.0046, 0.0040, 0.0062),
        "sports": (0.0113, 0.0153, 0.0127, 0.0197),
        "toys": (0.0287, 0.0350, 0.0309, 0.0418),
    },
}
