"""1. Print how a plan splits heads and tokens over ranks, and why. Needs no GPU, no model and no other process.

python examples/01_explain_a_plan.py
python examples/01_explain_a_plan.py --machines 4 --ranks-per-machine 8 --heads 24
"""

from __future__ import annotations

import argparse

from sf_xfuser.layout.plan import UNEVEN, make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--ranks-per-machine", type=int, default=8)
    parser.add_argument("--heads", type=int, default=24, help="attention heads (Flux and HunyuanVideo: 24)")
    parser.add_argument("--kv-heads", type=int, default=None, help="key/value heads, if fewer")
    parser.add_argument("--rule", choices=("auto", "paper", "usp"), default="auto")
    options = parser.parse_args()
    plan = make_plan(
        options.machines,
        options.ranks_per_machine,
        heads=options.heads,
        kv_heads=options.kv_heads,
        rule=options.rule,
        max_imbalance=UNEVEN,  # 24 heads on 5 machines: 5, 5, 5, 5 and 4
    )
    print("\n".join(plan.lines()))


if __name__ == "__main__":
    main()
