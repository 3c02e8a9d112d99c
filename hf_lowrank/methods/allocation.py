"""One budget for the model → ranks and densities of every layer."""

import heapq
import math
from typing import TYPE_CHECKING

from ..budget import Budget, Layer, ModelBudget
from ..runtime.errors import CompressionError

if TYPE_CHECKING:
    from .base import Method

TOLERANCE = 0.005
"""How far below the ratio asked for a result may stay, as a fraction of the dense bits."""


def check_reachable(method: "Method", compressed: list[Layer], dense: list[Layer], budget: ModelBudget) -> int:
    """The bits that the compressed layers may take together.

    Raises:
        CompressionError: if the method cannot reach the ratio, naming those it can.
    """
    available = budget.available(compressed, dense)
    lowest = sum(_fixed(method, layer, budget) for layer in compressed)
    highest = sum(
        min(
            _fixed(method, layer, budget) + _step(method, layer, budget) * method.max_steps(layer),
            budget.dense_bits(layer),
        )
        for layer in compressed
    )
    dense_total = sum(budget.dense_bits(layer) for layer in compressed + dense)
    if available < lowest or available > highest + TOLERANCE * dense_total:
        least, most = (budget.removed(bits, compressed, dense) for bits in (highest, lowest))
        raise CompressionError(
            f"ratio {budget.ratio} is out of reach of {method.name} with these options: it compresses {len(compressed)} layers, "
            f"leaves {len(dense)} dense, and can remove {max(least, 0):.3f} to {most:.3f} of the stored bits"
        )
    return available


def uniform_budgets(
    method: "Method", compressed: list[Layer], dense: list[Layer], budget: ModelBudget, available: int | None = None
) -> dict[str, Budget]:
    """The same share of its dense bits for every layer; what the coarse steps of small layers leave over is spread.

    Args:
        available: bits that the compressed layers may take together; by default what the ratio leaves them.

    Raises:
        CompressionError: if the method cannot reach the ratio, or make anything of so few bits.
    """
    if available is None:
        available = check_reachable(method, compressed, dense, budget)
    elif available < (lowest := sum(_fixed(method, layer, budget) for layer in compressed)):
        raise CompressionError(
            f"{method.name} needs at least {lowest} bits for {len(compressed)} layers, of which {available} are left"
        )
    fixed = {layer.name: _fixed(method, layer, budget) for layer in compressed}
    step = {layer.name: _step(method, layer, budget) for layer in compressed}
    limit = {layer.name: method.max_steps(layer) for layer in compressed}
    share = available / sum(budget.dense_bits(layer) for layer in compressed)
    wanted = {
        layer.name: (share * budget.dense_bits(layer) - fixed[layer.name]) / step[layer.name] for layer in compressed
    }
    taken = {name: min(max(math.floor(count), 0), limit[name]) for name, count in wanted.items()}
    while (
        sum(fixed[name] + step[name] * taken[name] for name in taken) > available
    ):  # a layer below its smallest: others give way
        name = max((each for each in taken if taken[each]), key=lambda each: (taken[each] - wanted[each]) * step[each])
        taken[name] -= 1
    spread_remainder(taken, wanted, step, limit, available - sum(fixed.values()))
    return {
        layer.name: budget.layer_budget(layer, fixed[layer.name] + step[layer.name] * taken[layer.name])
        for layer in compressed
    }


def _fixed(method: "Method", layer: Layer, budget: ModelBudget) -> int:
    return budget.stored_bits(layer, method.min_spec(layer))


def _step(method: "Method", layer: Layer, budget: ModelBudget) -> int:
    smallest = method.min_spec(layer)
    return budget.stored_bits(layer, method.next_spec(layer, smallest)) - budget.stored_bits(layer, smallest)


def spread_remainder(
    taken: dict[str, int], wanted: dict[str, float], step: dict[str, int], limit: dict[str, int], available: int
) -> None:
    """Raise `taken` (steps by layer, in place) while `available` bits allow, first where most is missing to `wanted`."""
    left = available - sum(taken[name] * step[name] for name in taken)
    smallest_step = min(step.values(), default=0)
    while left >= smallest_step > 0:
        open_layers = [name for name in taken if taken[name] < limit[name] and step[name] <= left]
        if not open_layers:
            return
        name = max(open_layers, key=lambda each: (wanted[each] - taken[each]) * step[each])
        taken[name] += 1
        left -= step[name]


def greedy_ranks(
    energies: dict[str, list[float]],
    price: dict[str, int],
    dense_price: dict[str, int],
    fixed: dict[str, int],
    available: int,
) -> dict[str, int | None]:
    """Ranks that lose least energy within `available` bits: components in order of energy per bit (papers: SoLA §1.6).

    The problem min Σ_l Σ_{i>r_l} e_{l,i}  s.t.  Σ_l r_l p_l ≤ B  has concave gains as energies fall, so the greedy order is
    optimal up to the last component. A layer whose rank would cost as much as the dense layer stays dense.

    Args:
        energies: falling energies of each layer's components, comparable between layers.
        price: bits of one rank. dense_price: bits of the dense layer. fixed: bits of its parts beside the low rank.
        available: bits for all these layers.

    Returns:
        The rank of each layer; None where it stays dense.
    """
    dense: set[str] = set()
    while True:
        left = (
            available
            - sum(dense_price[name] for name in dense)
            - sum(fixed[name] for name in energies if name not in dense)
        )
        ranks = {name: 0 for name in energies if name not in dense}
        order = sorted(
            ((energy / price[name], name) for name in ranks for energy in energies[name]),
            key=lambda item: (-item[0], item[1]),
        )
        for _, name in order:
            if price[name] <= left:
                ranks[name] += 1
                left -= price[name]
        too_large = {name for name, rank in ranks.items() if fixed[name] + rank * price[name] >= dense_price[name]}
        if not too_large:
            return {name: ranks.get(name) for name in energies}
        dense |= too_large


def fitted_ranks(
    wanted: dict[str, float | None],
    price: dict[str, int],
    dense_price: dict[str, int],
    fixed: dict[str, int],
    limit: dict[str, int],
    available: int,
) -> dict[str, int | None]:
    """Ranks in the proportions of `wanted` (None: dense) that take exactly `available` bits, to within one rank.

    Args:
        limit: largest rank of each layer. The other arguments are as for `greedy_ranks`.
    """
    dense = {name for name, rank in wanted.items() if rank is None}
    while True:
        ranked = {name: rank for name, rank in wanted.items() if rank is not None and name not in dense}
        left = available - sum(dense_price[name] for name in dense) - sum(fixed[name] for name in ranked)
        factor = left / max(sum(rank * price[name] for name, rank in ranked.items()), 1)
        scaled = {name: min(max(rank * factor, 0.0), limit[name]) for name, rank in ranked.items()}
        taken = {name: math.floor(rank) for name, rank in scaled.items()}
        spread_remainder(taken, scaled, price, limit, left)
        too_large = {name for name, rank in taken.items() if fixed[name] + rank * price[name] >= dense_price[name]}
        if not too_large:
            return {name: taken.get(name) for name in wanted}
        dense |= too_large


def cheapest_choices(options: dict[str, list[tuple[int, float]]], available: int) -> dict[str, int]:
    """One option per layer such that the sum of losses is least within `available` bits.

    Every layer starts from its smallest option on the lower convex hull of (bits, loss); then the step along a hull that saves most
    loss per bit is taken, as long as one fits; on the hulls that is optimal up to the last step. What is left goes to other options.

    Args:
        options: (bits, loss) of each layer's options.

    Returns:
        The index of the chosen option by layer.

    Raises:
        CompressionError: if even the smallest options take more than `available`.
    """
    hulls = {name: _convex_hull(each) for name, each in options.items()}
    left = available - sum(options[name][hull[0]][0] for name, hull in hulls.items())
    if left < 0:
        raise CompressionError(
            f"the smallest of what the layers can become takes {-left} bits more than the {available} available"
        )
    taken = dict.fromkeys(hulls, 0)
    steps: list[tuple[float, str]] = []

    def step(name: str) -> tuple[int, float]:
        (bits, loss), (more, less) = (options[name][hulls[name][taken[name] + each]] for each in (0, 1))
        return more - bits, loss - less

    def offer(name: str) -> None:
        if taken[name] + 1 < len(hulls[name]):
            bits, saved = step(name)
            heapq.heappush(steps, (-saved / bits, name))

    for name in hulls:
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        bits, _ = step(name)
        if bits <= left:
            left -= bits
            taken[name] += 1
            offer(name)
    chosen = {name: hull[taken[name]] for name, hull in hulls.items()}
    _spend_rest(options, chosen, left)
    return chosen


def _spend_rest(options: dict[str, list[tuple[int, float]]], chosen: dict[str, int], left: int) -> None:
    """Spend `left` bits, too few for any step along a hull, on options off the hulls that save most loss; `chosen` in place."""
    while True:
        best, saved = None, 0.0
        for name, index in chosen.items():
            bits, loss = options[name][index]
            for other, (more, less) in enumerate(options[name]):
                if bits < more <= bits + left and loss - less > saved:
                    best, saved = (name, other), loss - less
        if best is None:
            return
        name, other = best
        left -= options[name][other][0] - options[name][chosen[name]][0]
        chosen[name] = other


def _convex_hull(options: list[tuple[int, float]]) -> list[int]:
    """Indices of the options on the lower convex hull, by rising bits and falling loss."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda each: options[each]):
        bits, loss = options[index]
        if hull and loss >= options[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (b0, l0), (b1, l1) = options[hull[-2]], options[hull[-1]]
            if (l0 - l1) * (bits - b1) > (l1 - loss) * (b1 - b0):
                break
            hull.pop()
        hull.append(index)
    return hull
