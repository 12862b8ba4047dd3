"""Foretell what the paper's sizes and a 7B hold between steps, and write the table into docs/memory.md.

    python benchmarks/memory_table.py [--check]

Bytes follow from shapes: the real `inject` says on the meta device which parameters there are and which
train; how many bytes the device keeps a weight in is what docs/memory.md says of each store (a test compares
both with the planner's trace). Published figures are those that their sources give of weights and optimizer
states; they are quoted, not measured.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import nn

from relora.lab.planner.plan import with_settings
from relora.method.linear import LoRALinear
from relora.train.blueprint import blueprint
from relora.train.config import Recipe
from relora.train.phase import inject_factors
from relora.train.recipe_io import load_recipe

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- begin memory_table.py -->", "<!-- end memory_table.py -->"
# size -> recipe. All with the paper's rank, 128.
SIZES = {
    "60M": "paper-60m",
    "130M": "paper-130m",
    "250M": "paper-250m",
    "350M": "paper-350m",
    "1.3B": "paper-1b",
    "7B": "llama-7b",
}
STORES = {"bf16 base": "bf16", "int8 base": "int8", "NF4 base": "nf4"}
_CODE_BLOCK, _CODE_BITS = 64, {"int8": 8, "nf4": 4}
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that are there from step to step."""

    weights: int
    factors: int
    gradients: int
    states: int
    host: int

    @property
    def device(self) -> int:
        """All but the host's."""
        return self.weights + self.factors + self.gradients + self.states


def recipe_of(name: str, factors: str) -> Recipe:
    """Return a shipped recipe with what decides its bytes; full rank where `factors` is ""."""
    recipe = load_recipe(name)
    recipe = with_settings(recipe, {"relora.warm_start_steps": 0, "relora.rank": 128})
    return with_settings(recipe, {"relora.factors": factors} if factors else {"run.method": "full"})


def held(recipe: Recipe, store: str) -> Held:
    """Return what a recipe holds with its base stored so; "" for full rank in float32."""
    model = cast(nn.Module, blueprint(recipe))
    if not store:
        num = sum(p.numel() for p in model.parameters())
        return Held(weights=4 * num, factors=0, gradients=4 * num, states=8 * num, host=0)
    inject_factors(model, replace(recipe, relora=replace(recipe.relora, base_dtype="keep")))
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    base = sum(layer.weight.numel() for layer in layers)
    factors = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
    rest = sum(p.numel() for p in model.parameters()) - base - factors
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(_stored_bytes(*layer.weight.shape, store) for layer in layers)
    return Held(
        weights=4 * rest + stored,
        factors=4 * factors,
        gradients=4 * trained,
        states=8 * trained,
        host=(2 if store == "bf16" else 4) * base,
    )


def _stored_bytes(out_features: int, in_features: int, store: str) -> int:
    if store == "bf16":
        return 2 * out_features * in_features
    blocks = out_features * -(-in_features // _CODE_BLOCK)
    return blocks * (_CODE_BLOCK * _CODE_BITS[store] // 8 + 4)


def table() -> str:
    """Return the table in Markdown, in GB of 10^9 bytes as the published figures are."""
    lines = [
        "| size | method | weights | factors | gradients | states | on the device | on the host |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, name in SIZES.items():
        lines.append(_row(size, "full rank, AdamW", held(recipe_of(name, ""), "")))
        for words, factors in (("ReLoRA, both", "both"), ("ReLoRA, `B`", "B")):
            recipe = recipe_of(name, factors)
            for store, dtype in STORES.items():
                lines.append(_row("", f"{words}, {store}", held(recipe, dtype)))
    return "\n".join(lines)


def _row(size: str, method: str, found: Held) -> str:
    kinds = (found.weights, found.factors, found.gradients, found.states, found.device, found.host)
    return (
        f"| {size} | {method} | " + " | ".join(f"{kind / _GB:.2f}" if kind else "-" for kind in kinds) + " |"
    )


def with_table(page: str, text: str) -> str:
    """Return a page with the table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> int:
    """Write the table, or with --check say whether it is there already."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page is old")
    page = PAGE.read_text(encoding="utf-8")
    new = with_table(page, table())
    if parser.parse_args().check:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
