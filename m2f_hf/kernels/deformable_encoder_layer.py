"""A layer of the pixel decoder's encoder in chunks of positions, for inference on the CPU.

Only the table of values is computed for the whole map; everything else a layer does concerns one position at a time and
stays in the cache.
"""

from typing import Any

from torch import Tensor, nn

from .chunks import chunks, infers_in_chunks
from .fast_path import Kernel
from .feed_forward import feed_forward
from .gather_deformable_attention import GatherTable, working_dtype
from .products import linear


def _serves(layer: Any, hidden_states: Tensor, position_embeddings: Tensor, places: Any) -> bool:
    return infers_in_chunks(layer, hidden_states)


def _forward(layer: Any, hidden_states: Tensor, position_embeddings: Tensor, places: Any) -> Tensor:
    attention = layer.self_attn
    values = _apply(attention.value_proj, hidden_states)
    if places.padding is not None:
        values = values.masked_fill(places.padding[..., None], 0.0)
    values = values.to(working_dtype(hidden_states)).unflatten(-1, (attention.num_heads, -1))
    position_embeddings = position_embeddings.expand_as(hidden_states)
    num_points = len(places.map_sizes) // (2 * len(places.spatial_shapes))
    outputs = hidden_states.new_empty(hidden_states.shape)
    for states, positions, value, output in zip(hidden_states, position_embeddings, values, outputs, strict=True):
        table = GatherTable(value[None], places.spatial_shapes, num_points)
        for chunk in chunks(len(states), layer.fc1.out_features):
            rows = states[chunk]
            attended = _attend(attention, rows + positions[chunk], places, chunk, table)
            rows = layer.self_attn_layer_norm(rows + attended.to(rows.dtype))
            output[chunk] = layer.final_layer_norm(rows + feed_forward(rows, layer.fc1, layer.fc2, "relu"))
    return outputs


def _attend(attention: Any, queries: Tensor, places: Any, chunk: slice, table: GatherTable) -> Tensor:
    """(n, C), which of the positions they are -> (n, C)."""
    offsets, logits = (
        _apply(projection, queries).unflatten(-1, (attention.num_heads, -1))
        for projection in (attention.sampling_offsets, attention.attention_weights)
    )
    points = places.reference_points[chunk] * places.map_sizes + 0.5
    # A softmax over so short an axis is eight times as fast with the queries last.
    weights = logits.permute(1, 2, 0).softmax(1).permute(2, 0, 1).contiguous()
    sampled = table.attend((offsets + points).flatten(1), weights.to(table.rows.dtype))
    return _apply(attention.output_proj, sampled.to(queries.dtype))


def _apply(layer: nn.Linear, states: Tensor) -> Tensor:
    return linear(states, layer.weight, layer.bias)


deformable_encoder_layer = Kernel(_serves, _forward)
