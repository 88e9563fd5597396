"""Prints, in Markdown, which share of each family's weights a search can place: `python benchmarks/families.py`.

Of the default config that transformers has for the family, built without weights: what it is of linears alone, and with
experts, heads and embeddings. All are 16 bits, so the shares are of bytes as well.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.families import FAMILIES, Family  # noqa: E402
from provenance import write_results  # noqa: E402

from amq.model.experts import unfuse  # noqa: E402
from amq.model.inventory import EXPERT, LINEAR, take_inventory  # noqa: E402

SCHEMA = "amq/families/1"


@dataclass(frozen=True)
class Row:
    """weights: all of the model's. before, after: shares that can be placed. experts, outer: shares of experts, and of
    head and embeddings. stays: {reason: share} of what is left in 16 bits, norms and biases not counted."""

    family: str
    weights: int
    before: float
    after: float
    experts: float
    outer: float
    stays: dict[str, float]

    @staticmethod
    def of(name: str, family: Family) -> Row:
        model = family.default()
        before = sum(s.numel for s in take_inventory(model).linears if s.kind == LINEAR)
        unfuse(model)
        found = take_inventory(model)
        kinds: Counter[str] = Counter()
        for spec in found.weights:
            kinds[spec.kind] += spec.numel
        stays: Counter[str] = Counter()
        for other in found.others:
            if other.kind == "not quantized":
                stays[other.reason.partition(",")[0]] += other.numel
        total = found.numel
        placed = kinds.total() / total
        outer = (kinds.total() - kinds[EXPERT] - kinds[LINEAR]) / total
        shares = {reason: numel / total for reason, numel in stays.most_common()}
        return Row(name, total, before / total, placed, kinds[EXPERT] / total, outer, shares)

    def markdown(self) -> str:
        stays = "; ".join(f"{reason} {_percent(share)}" for reason, share in self.stays.items() if share >= 1e-4)
        cells = (_percent(share) for share in (self.before, self.after, self.experts, self.outer))
        return f"| {self.family} | {self.weights / 1e9:.1f} | {' | '.join(cells)} | {stays} |"


def _percent(share: float) -> str:
    """Rounded down where it would be rounded to all of it."""
    return f"{min(100 * share, 99.99) if share < 1 else 100:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAMILIES), metavar="LIST", help="of " + ", ".join(FAMILIES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = [Row.of(name, FAMILIES[name]) for name in args.only.split(",")]
    if args.json:
        write_results(args.json, {"schema": SCHEMA, "rows": [vars(row) for row in rows]})
    print("| family | 10⁹ weights | before | now | of it experts | head and embeddings | stays in 16 bits |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(row.markdown() for row in rows))


if __name__ == "__main__":
    main()
