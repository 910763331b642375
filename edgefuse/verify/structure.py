"""What must not be in an artifact, and what must: read from the artifact itself, never from the graph that it was made of."""

from __future__ import annotations

from edgefuse.values import Precision, Structure

OUTPUT = "getitem"  # takes a delegate's only output out of its tuple
HOLD = "::copy_"  # writes a cache into the buffer that holds it for the next chunk
CAST = "_to_dim_order_copy"  # between the float32 of inputs, of outputs and of a front end, and the fp16 of the network
HARMLESS = (OUTPUT, HOLD)


def strangers(structure: Structure, precision: Precision) -> dict[str, int]:
    """Operators outside every delegate that compute something; at the border of an fp16 graph casts are no strangers."""
    harmless = (*HARMLESS, CAST) if precision == "fp16" else HARMLESS
    return {name: count for name, count in structure.outside.items() if not any(word in name for word in harmless)}


def operator_count(structure: Structure) -> int:
    """How many operators run, constants left out."""
    return sum(structure.operators.values())
