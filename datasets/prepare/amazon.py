"""The paper's four datasets: where Amazon's raw files of 2014 are, and what the paper counts in them."""

from dataclasses import dataclass

BASE_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


@dataclass(frozen=True)
class PaperSet:
    """One of the paper's datasets: its name in the release of 2014, and its row of the paper's Table 1."""

    category: str
    users: int
    items: int
    pictures: int
    interactions: int


PAPER_SETS = {
    "beauty": PaperSet("Beauty", 22_363, 12_101, 12_023, 198_502),
    "clothing": PaperSet("Clothing_Shoes_and_Jewelry", 39_387, 23_033, 22_299, 278_677),
    "sports": PaperSet("Sports_and_Outdoors", 35_598, 18_357, 17_943, 296_337),
    "toys": PaperSet("Toys_and_Games", 19_412, 11_924, 11_895, 167_597),
}


def raw_names(category: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the published names of a category's reviews and metadata; the first is the one to fetch."""

    def files(*names: str) -> tuple[str, ...]:
        return tuple(f"{name}.json{gz}" for name in names for gz in (".gz", ""))

    return files(f"reviews_{category}_5", f"reviews_{category}"), files(f"meta_{category}")
