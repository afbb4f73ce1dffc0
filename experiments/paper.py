"""Published numbers, to compare results with.

The paper is Wang et al., Train Once, Deploy Anywhere (EMNLP 2024 Findings, arXiv 2409.16627). Its tables use full
ranking with history items as candidates.
"""

COLUMNS = ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10")
MASKED = " masked"  # suffix of a metric: history items are excluded from the candidates
ENCODERS = {"language_encoder": "BAAI/bge-large-en-v1.5", "img_encoder": "ViT-L-16-SigLIP-256/webli"}


def _rows(**datasets: tuple[float, ...]) -> dict[str, dict[str, float]]:
    return {dataset: dict(zip(COLUMNS, values, strict=True)) for dataset, values in datasets.items()}


# key -> dataset -> metric -> value. "both" is Table 2's fMRLRec row (size 1024); language, image, id are Table 3's.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "both": _rows(
        beauty=(0.0415, 0.0613, 0.0520, 0.0939),
        clothing=(0.0193, 0.0333, 0.0259, 0.0541),
        sports=(0.0230, 0.0349, 0.0284, 0.0516),
        toys=(0.0461, 0.0672, 0.0552, 0.0956),
    ),
    "language": _rows(
        beauty=(0.0353, 0.0561, 0.0449, 0.0859),
        clothing=(0.0167, 0.0279, 0.0225, 0.0461),
        sports=(0.0205, 0.0313, 0.0261, 0.0487),
        toys=(0.0403, 0.0618, 0.0503, 0.0927),
    ),
    "image": _rows(
        beauty=(0.0370, 0.0540, 0.0464, 0.0833),
        clothing=(0.0162, 0.0279, 0.0222, 0.0467),
        sports=(0.0194, 0.0291, 0.0238, 0.0430),
        toys=(0.0416, 0.0613, 0.0516, 0.0920),
    ),
    "id": _rows(
        beauty=(0.0257, 0.0335, 0.0288, 0.0431),
        clothing=(0.0035, 0.0046, 0.0040, 0.0062),
        sports=(0.0113, 0.0153, 0.0127, 0.0197),
        toys=(0.0287, 0.0350, 0.0309, 0.0418),
    ),
    # Table 2, other models
    "sasrec": _rows(
        beauty=(0.0274, 0.0456, 0.0364, 0.0734),
        clothing=(0.0075, 0.0134, 0.0104, 0.0227),
        sports=(0.0143, 0.0267, 0.0210, 0.0474),
        toys=(0.0291, 0.0534, 0.0380, 0.0807),
    ),
    "lrurec": _rows(
        beauty=(0.0339, 0.0565, 0.0438, 0.0871),
        clothing=(0.0104, 0.0192, 0.0140, 0.0304),
        sports=(0.0204, 0.0344, 0.0266, 0.0536),
        toys=(0.0366, 0.0601, 0.0463, 0.0901),
    ),
    # Shin et al., An Attentive Inductive Bias for Sequential Recommendation beyond the Self-Attention (AAAI 2024)
    "bsarec": {
        "beauty": {"NDCG@10 masked": 0.0611, "Recall@10 masked": 0.1008},
        "sports": {"Recall@10 masked": 0.0612},
    },
    # SASRec with sampled softmax of 256 negatives, in the eSASRec study (2025)
    "sasrec sampled": {
        "beauty": {"NDCG@10 masked": 0.0531, "Recall@10 masked": 0.0921},
        "sports": {"NDCG@10 masked": 0.0314, "Recall@10 masked": 0.0569},
        "toys": {"NDCG@10 masked": 0.0580, "Recall@10 masked": 0.0970},
    },
}
# LRURec as its authors report it in the LlamaRec paper
PUBLISHED["lrurec"]["beauty"] |= {"NDCG@10 masked": 0.0533, "Recall@10 masked": 0.0916}

# Figure 3: dataset -> size -> metric -> value, read off the figure to .0003; text and pictures.
BY_SIZE = {
    "beauty": {
        size: {"Recall@10": at10, "Recall@20": at20, "Recall@50": at50}
        for size, at10, at20, at50 in (
            (8, 0.0150, 0.0243, 0.0440),
            (16, 0.0180, 0.0308, 0.0522),
            (32, 0.0241, 0.0396, 0.0693),
            (64, 0.0362, 0.0574, 0.1033),
            (128, 0.0530, 0.0825, 0.1445),
            (256, 0.0716, 0.1076, 0.1793),
            (512, 0.0890, 0.1315, 0.2013),
            (1024, 0.0938, 0.1322, 0.2000),
        )
    }
}

# Figure 4: share of parameters that one nested model saves, for sizes from 128 up to each of these.
SAVED = {128: 0.0, 256: 0.2516, 512: 0.3139, 1024: 0.3290, 2048: 0.3325}

# Protocol -> (model and source, its input, dataset -> (Recall@10, NDCG@10)); None: not published. All rank the whole
# catalogue, leave-one-out, on the same files. kept: history items are candidates, as in the fMRLRec paper.
Scores = dict[str, tuple[float | None, float | None]]
BEST: dict[str, tuple[tuple[str, str, Scores], ...]] = {
    "masked": (
        ("TV-Rec (NeurIPS 2025), its log", "ids", {"beauty": (0.1017, 0.0608), "sports": (0.0635, 0.0363)}),
        ("WEARec (AAAI 2026), re-run by others", "ids", {"beauty": (0.1041, 0.0599), "sports": (0.0631, None)}),
        ("BSARec (AAAI 2024), its log", "ids", {"beauty": (0.1008, 0.0611), "sports": (0.0612, None)}),
        ("LlamaRec (2023), its paper", "ids, titles", {"beauty": (0.0971, 0.0554)}),
        ("eSASRec (2025), its README", "ids",
         {"beauty": (0.0928, 0.0523), "sports": (0.0560, 0.0323), "toys": (0.0939, 0.0538)}),
        ("SASRec, 256 negatives, in the eSASRec study", "ids",
         {"beauty": (0.0921, 0.0531), "sports": (0.0569, 0.0314), "toys": (0.0970, 0.0580)}),
        ("LRURec, in the LlamaRec paper", "ids", {"beauty": (0.0916, 0.0533)}),
    ),
    "kept": (
        ("ConsRec (2025), its README", "titles",
         {"beauty": (0.1249, 0.0641), "sports": (0.0721, 0.0372), "toys": (0.1304, 0.0637)}),
        ("TASTE (CIKM 2023), its logs", "titles",
         {"beauty": (0.1030, 0.0517), "sports": (0.0633, 0.0338), "toys": (0.1232, 0.0640)}),
        ("fMRLRec, 1024 (EMNLP 2024), its paper", "text, pictures",
         {"beauty": (0.0939, 0.0520), "clothing": (0.0541, 0.0259), "sports": (0.0516, 0.0284),
          "toys": (0.0956, 0.0552)}),
        ("BARGE (2025), its paper", "titles", {"beauty": (0.0927, 0.0547), "sports": (0.0544, 0.0308)}),
        ("DIF-SR, in ConsRec's README", "ids, attributes",
         {"beauty": (0.0908, 0.0446), "sports": (0.0556, 0.0264), "toys": (0.1013, 0.0504)}),
        ("GRAM (2025), its paper", "titles",
         {"beauty": (0.0890, 0.0531), "sports": (0.0554, 0.0314), "toys": (0.0987, 0.0603)}),
        ("GRLM (2025), its paper", "titles",
         {"beauty": (None, 0.0506), "sports": (None, 0.0313), "toys": (0.0942, 0.0561)}),
    ),
}  # fmt: skip
