"""Allocation of one budget for the model: which rank, density or choice every layer gets.

Four rules, each used by one kind of method:

- `uniform_budgets`: an equal share of its dense bits for every layer (layerwise methods);
- `greedy_ranks`: components of all layers in order of energy per bit (SoCo, SoLA);
- `fitted_ranks`: given proportions between the ranks, scaled to the budget (SoLA by components);
- `cheapest_choices`: one choice per layer with the least sum of losses (mixed methods).
"""

import heapq
import math

from ..budget import Budget, Layer, ModelBudget
from ..runtime.errors import CompressionError
from .base import Method
from .reach import bits_of_step, check_reachable, min_bits, total_min_bits


def uniform_budgets(
    method: Method, compressed: list[Layer], dense: list[Layer], budget: ModelBudget, available: int | None = None
) -> dict[str, Budget]:
    """Return budgets that give every layer the same share of its dense bits, in whole steps of the method.

    The steps of small layers are coarse. Rounding down to whole steps leaves bits over, which are spread, a step at a
    time.

    Args:
        available: bits that the compressed layers may take together; by default those that the ratio leaves them.

    Raises:
        CompressionError: if the method cannot reach the ratio, or cannot make anything of so few bits.
    """
    if available is None:
        available = check_reachable(method, compressed, dense, budget)
    else:
        lowest = total_min_bits(method, compressed, budget)
        if available < lowest:
            raise CompressionError(
                f"{method.name} needs at least {lowest} bits for {len(compressed)} layers, "
                f"of which {available} are left"
            )
    if not compressed:
        return {}
    share = available / budget.total_dense_bits(compressed)
    fixed: dict[str, int] = {}
    step_bits: dict[str, int] = {}
    limits: dict[str, int] = {}
    exact_steps: dict[str, float] = {}
    steps: dict[str, int] = {}
    for layer in compressed:
        name = layer.name
        fixed[name] = min_bits(method, layer, budget)
        step_bits[name] = bits_of_step(method, layer, budget)
        limits[name] = method.max_steps(layer)
        exact_steps[name] = (share * budget.dense_bits(layer) - fixed[name]) / step_bits[name]
        steps[name] = min(max(math.floor(exact_steps[name]), 0), limits[name])

    # A layer whose smallest spec takes more than its share was raised to it. Other layers then give steps back, first
    # those that are furthest above their share, or least below it.
    while sum(fixed[name] + step_bits[name] * steps[name] for name in steps) > available:
        reducible = [name for name in steps if steps[name]]
        name = max(reducible, key=lambda candidate: (steps[candidate] - exact_steps[candidate]) * step_bits[candidate])
        steps[name] -= 1
    spread_remainder(steps, exact_steps, step_bits, limits, available - sum(fixed.values()))

    budgets = {}
    for layer in compressed:
        bits = fixed[layer.name] + step_bits[layer.name] * steps[layer.name]
        budgets[layer.name] = budget.layer_budget(layer, bits)
    return budgets


def spread_remainder(
    steps: dict[str, int],
    exact_steps: dict[str, float],
    step_bits: dict[str, int],
    limits: dict[str, int],
    available: int,
) -> None:
    """Raise `steps` in place while `available` bits allow, always where most is missing to the exact share.

    Args:
        steps: steps taken, by layer.
        exact_steps: fractional steps that would be the layer's exact share.
        step_bits: bits of one step.
        limits: most steps that a layer can take.
    """
    left = available - sum(steps[name] * step_bits[name] for name in steps)
    smallest_step = min(step_bits.values(), default=0)
    while left >= smallest_step > 0:
        growable = [name for name in steps if steps[name] < limits[name] and step_bits[name] <= left]
        if not growable:
            return
        name = max(growable, key=lambda candidate: (exact_steps[candidate] - steps[candidate]) * step_bits[candidate])
        steps[name] += 1
        left -= step_bits[name]


def greedy_ranks(
    energies: dict[str, list[float]],
    price: dict[str, int],
    dense_price: dict[str, int],
    fixed: dict[str, int],
    available: int,
) -> dict[str, int | None]:
    """Return the ranks that lose the least energy within `available` bits, by components in order of energy per bit.

    The problem min Σ_l Σ_{i>r_l} e_{l,i} s.t. Σ_l r_l p_l ≤ B has concave gains because energies fall, so by a
    Lagrangian argument the greedy order is optimal up to the last component. SoLA (arXiv 2604.03258) solves its
    integer program for the ranks greedily, too; its release divides by the entries m n of a matrix, where here it is
    by p_l, the true price of one rank. A layer whose rank would cost as much as the dense layer stays dense.

    Args:
        energies: energies e_{l,i} of each layer's components, falling, comparable between layers.
        price: bits p_l of one rank.
        dense_price: bits of the dense layer.
        fixed: bits of the layer's parts beside the low rank.
        available: bits B for all these layers.

    Returns:
        The rank of each layer, None where it stays dense.
    """
    dense: set[str] = set()
    while True:
        ranks = {name: 0 for name in energies if name not in dense}
        left = available - sum(dense_price[name] for name in dense) - sum(fixed[name] for name in ranks)
        for name in _layers_by_energy_per_bit(list(ranks), energies, price):
            if price[name] <= left:  # a cheaper component further down may still fit where this one does not
                ranks[name] += 1
                left -= price[name]
        too_large = {name for name, rank in ranks.items() if fixed[name] + rank * price[name] >= dense_price[name]}
        if not too_large:
            return {name: ranks.get(name) for name in energies}
        # These layers are stored dense, which gives bits back or takes some: the others start again.
        dense |= too_large


def _layers_by_energy_per_bit(names: list[str], energies: dict[str, list[float]], price: dict[str, int]) -> list[str]:
    """Return the layer's name for each component of the layers, in order of falling energy per bit."""
    components: list[tuple[float, str]] = []
    for name in names:
        for energy in energies[name]:
            components.append((-(energy / price[name]), name))
    components.sort()
    return [name for _, name in components]


def fitted_ranks(
    targets: dict[str, float | None],
    price: dict[str, int],
    dense_price: dict[str, int],
    fixed: dict[str, int],
    limits: dict[str, int],
    available: int,
) -> dict[str, int | None]:
    """Return ranks in the proportions of `targets` that take exactly `available` bits, to within one rank.

    Args:
        targets: ranks by layer, None for a layer that stays dense. Only their proportions count.
        limits: largest rank of each layer.
        price, dense_price, fixed: as for `greedy_ranks`.

    Returns:
        The rank of each layer, None where it stays dense.
    """
    dense = {name for name, rank in targets.items() if rank is None}
    while True:
        ranked = {name: rank for name, rank in targets.items() if rank is not None and name not in dense}
        left = available - sum(dense_price[name] for name in dense) - sum(fixed[name] for name in ranked)
        # Limits cut some ranks, and all are rounded down. `spread_remainder` gives away what that leaves.
        factor = left / max(sum(rank * price[name] for name, rank in ranked.items()), 1)
        exact_ranks: dict[str, float] = {}
        ranks: dict[str, int] = {}
        for name, rank in ranked.items():
            exact_ranks[name] = min(max(rank * factor, 0.0), limits[name])
            ranks[name] = math.floor(exact_ranks[name])
        spread_remainder(ranks, exact_ranks, price, limits, left)
        too_large = {name for name, rank in ranks.items() if fixed[name] + rank * price[name] >= dense_price[name]}
        if not too_large:
            return {name: ranks.get(name) for name in targets}
        dense |= too_large


def cheapest_choices(options: dict[str, list[tuple[int, float]]], available: int) -> dict[str, int]:
    """Return one option per layer such that the sum of losses is least within `available` bits.

    Every layer starts from the smallest option on the lower convex hull of its (bits, loss). Then the step along a
    hull that saves most loss per bit is taken, as long as one fits. Among the options on the hulls that is optimal up
    to the last step. The rest goes to options off the hulls.

    Args:
        options: (bits, loss) of each layer's options.

    Returns:
        The index of the chosen option by layer.

    Raises:
        CompressionError: if even the smallest options take more than `available`.
    """
    hulls = {name: _convex_hull(candidates) for name, candidates in options.items()}
    left = available - sum(options[name][hull[0]][0] for name, hull in hulls.items())
    if left < 0:
        raise CompressionError(
            f"the smallest of what the layers can become takes {-left} bits more than the {available} available"
        )
    positions = dict.fromkeys(hulls, 0)  # where on its hull each layer stands
    steps: list[tuple[float, str]] = []  # a heap of the next step of each layer, the best first

    def next_step(name: str) -> tuple[int, float]:
        """Return the bits that the layer's next step along its hull takes, and the loss that it saves."""
        here, there = hulls[name][positions[name]], hulls[name][positions[name] + 1]
        bits, loss = options[name][here]
        larger_bits, smaller_loss = options[name][there]
        return larger_bits - bits, loss - smaller_loss

    def push_next_step(name: str) -> None:
        if positions[name] + 1 < len(hulls[name]):
            bits, saved_loss = next_step(name)
            heapq.heappush(steps, (-saved_loss / bits, name))

    for name in hulls:
        push_next_step(name)
    # Along a convex hull every step saves less loss per bit than the one before it. So the best step is a next one.
    while steps:
        _, name = heapq.heappop(steps)
        bits, _ = next_step(name)
        if bits <= left:
            left -= bits
            positions[name] += 1
            push_next_step(name)
    chosen = {name: hull[positions[name]] for name, hull in hulls.items()}
    _spend_rest(options, chosen, left)
    return chosen


def _spend_rest(options: dict[str, list[tuple[int, float]]], chosen: dict[str, int], left: int) -> None:
    """Spend `left` bits, too few for a step along a hull, on the options off the hulls that save most loss.

    Args:
        chosen: index of the chosen option by layer; changed in place.
    """
    while True:
        best, most_saved = None, 0.0
        for name, index in chosen.items():
            bits, loss = options[name][index]
            for candidate, (candidate_bits, candidate_loss) in enumerate(options[name]):
                affordable = bits < candidate_bits <= bits + left
                if affordable and loss - candidate_loss > most_saved:
                    best, most_saved = (name, candidate), loss - candidate_loss
        if best is None:
            return
        name, candidate = best
        left -= options[name][candidate][0] - options[name][chosen[name]][0]
        chosen[name] = candidate


def _convex_hull(options: list[tuple[int, float]]) -> list[int]:
    """Return the indices of the options on the lower convex hull of (bits, loss), by rising bits and falling loss."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=options.__getitem__):
        bits, loss = options[index]
        if hull and loss >= options[hull[-1]][1]:
            continue  # more bits and no less loss
        while len(hull) > 1:
            (bits0, loss0), (bits1, loss1) = options[hull[-2]], options[hull[-1]]
            # The last point stays if the slope to it is steeper than the slope from it to the new point.
            if (loss0 - loss1) * (bits - bits1) > (loss1 - loss) * (bits1 - bits0):
                break
            hull.pop()
        hull.append(index)
    return hull
