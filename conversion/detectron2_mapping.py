"""How the original's parameter names map onto those of a saved Mask2Former checkpoint.

The mapping is data: `mapping_for(config)` lists one `Entry` for each parameter of the original, built from the model's
config alone. Converting, counting and inverting all read that list. Target names are the ones on disk, which are the
same whichever version of `transformers` is installed (in memory the backbones' names differ between versions).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch


Array = np.ndarray | torch.Tensor

ENCODER = "model.pixel_level_module.encoder"
PIXEL_DECODER = "model.pixel_level_module.decoder"
TRANSFORMER = "model.transformer_module"
COUNTER = "num_batches_tracked"
POSITION_INDEX = "relative_position_index"
CLASS_WEIGHTS = "criterion.empty_weight"


class Entry(NamedTuple):
    """One parameter of the original and where it goes.

    Several targets share the source in equal parts along its first dimension (a fused query, key and value projection).
    No target: a constant that is checked, and not stored.
    """

    source: str
    targets: tuple[str, ...]


class Differences(NamedTuple):
    """Where the two sides are not one to one.

    `filled` names targets without a source in the checkpoint (batch counters of frozen norms, zero; the class weights
    of the loss, which the config gives); `checked` names sources in the checkpoint that have no target (Swin's index
    tables, equal to the ones computed from the window size); `split` names sources that have three (fused projections
    to queries, keys and values).
    """

    filled: list[str]
    checked: list[str]
    split: list[str]


class MisfitError(ValueError):
    """Checkpoint and config describe different models: `facts` says how they differ, `advice` what to do."""

    def __init__(self, facts: str, advice: str = "") -> None:
        super().__init__(f"{facts} {advice}".rstrip())
        self.facts, self.advice = facts, advice


def convert_state_dict(original: Mapping[str, Array], config: Any) -> dict[str, torch.Tensor]:
    """Rename and split the original's parameters for the model that `config` describes.

    Older names are read as well: those before `pixel_decoder` and `query_feat` were introduced, and those with the
    prefix of a model that was wrapped for training (`module.`, `_orig_mod.`).

    Args:
        original: The original's state dict, arrays or tensors by name. Not modified.
        config: A `Mask2FormerConfig`, with a Swin or ResNet backbone.

    Returns:
        The parameters under the names a saved checkpoint has: float32 whatever the precision of the source, integer
        counters int64.

    Raises:
        MisfitError: A parameter is missing or left over, a fused one doesn't divide, an index table differs, or the
            config has another number of classes or queries than the parameters.
        ValueError: A parameter is there twice.
    """
    remaining = _current_names(original)
    _check_counts(remaining, config)
    converted: dict[str, torch.Tensor] = {}
    missing = []
    for source, targets in mapping_for(config):
        if source not in remaining:
            constant = _constant(source, config)
            if constant is not None:
                converted[targets[0]] = constant
            elif targets:
                missing.append(source)
            continue
        value = _as_tensor(remaining.pop(source).value)
        if not targets:
            _check_position_index(source, value, config.backbone_config.window_size)
        else:
            converted.update(zip(targets, _split(source, value, len(targets)), strict=True))
    if missing or remaining:
        left_over = [parameter.name for parameter in remaining.values()]
        raise MisfitError(
            f"The checkpoint is of another model. Missing from the checkpoint: {_shortened(missing)}. "
            f"Not in the model: {_shortened(left_over)}.",
            "Convert it with the config it was trained with.",
        )
    return converted


def differences(original: Mapping[str, Array], config: Any) -> Differences:
    """Return the names that `convert_state_dict` fills in, checks and splits for the same arguments."""
    entries, names = mapping_for(config), _current_names(original)
    return Differences(
        filled=[entry.targets[0] for entry in entries if entry.targets and entry.source not in names],
        checked=[entry.source for entry in entries if not entry.targets and entry.source in names],
        split=[entry.source for entry in entries if len(entry.targets) == len(_QKV) and entry.source in names],
    )


def invert_state_dict(state_dict: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Convert a saved Mask2Former state dict back to the original's names: the inverse of `convert_state_dict`."""
    original = {}
    for source, targets in mapping_for(config):
        if not targets:
            original[source] = relative_position_index(config.backbone_config.window_size)
        elif len(targets) == 1:
            original[source] = state_dict[targets[0]]
        else:
            original[source] = torch.cat([state_dict[target] for target in targets])
    return original


def mapping_for(config: Any) -> list[Entry]:
    """Return an entry for every parameter of the original model that `config` describes, in data-flow order.

    Raises:
        ValueError: The original has no such backbone or pixel decoder.
    """
    return [*_backbone(config.backbone_config), *_pixel_decoder(config), *_transformer_decoder(config), *_heads()]


def relative_position_index(window_size: int) -> torch.Tensor:
    """Return Swin's table (window², window²) int64: which of (2·window − 1)² offsets leads from pixel to pixel."""
    steps = torch.arange(window_size)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    pixels = torch.stack([rows.flatten(), columns.flatten()])  # (2, window²)
    offsets = pixels[:, :, None] - pixels[:, None, :] + window_size - 1  # (2, window², window²), from 0
    return offsets[0] * (2 * window_size - 1) + offsets[1]


def _backbone(config: Any) -> Iterator[Entry]:
    if config.model_type == "swin":
        return _swin(config)
    if config.model_type == "resnet":
        return _resnet(config)
    raise ValueError(f"The original has Swin and ResNet backbones; {config.model_type!r} has no mapping.")


def _swin(config: Any) -> Iterator[Entry]:
    yield from _affine("backbone.patch_embed.proj", f"{ENCODER}.embeddings.patch_embeddings.projection")
    yield from _affine("backbone.patch_embed.norm", f"{ENCODER}.embeddings.norm")
    stages = len(config.depths)
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            yield from _swin_block(
                f"backbone.layers.{stage}.blocks.{block}",
                f"{ENCODER}.encoder.layers.{stage}.blocks.{block}",
                config.qkv_bias,
            )
        if stage < stages - 1:
            source, target = (f"backbone.layers.{stage}.downsample", f"{ENCODER}.encoder.layers.{stage}.downsample")
            yield _same("weight", f"{source}.reduction", f"{target}.reduction")
            yield from _affine(f"{source}.norm", f"{target}.norm")
    for stage in range(stages):
        yield from _affine(f"backbone.norm{stage}", f"{ENCODER}.hidden_states_norms.stage{stage + 1}")


def _swin_block(source: str, target: str, qkv_bias: bool) -> Iterator[Entry]:
    attention = f"{target}.attention.self"
    yield from _affine(f"{source}.norm1", f"{target}.layernorm_before")
    yield _same("relative_position_bias_table", f"{source}.attn", attention)
    yield Entry(f"{source}.attn.{POSITION_INDEX}", ())
    for kind in ("weight", "bias") if qkv_bias else ("weight",):
        yield Entry(f"{source}.attn.qkv.{kind}", tuple(f"{attention}.{name}.{kind}" for name in _QKV))
    yield from _affine(f"{source}.attn.proj", f"{target}.attention.output.dense")
    yield from _affine(f"{source}.norm2", f"{target}.layernorm_after")
    yield from _affine(f"{source}.mlp.fc1", f"{target}.intermediate.dense")
    yield from _affine(f"{source}.mlp.fc2", f"{target}.output.dense")


_QKV = ("query", "key", "value")


def _resnet(config: Any) -> Iterator[Entry]:
    yield from _normed_convolution("backbone.stem.conv1", f"{ENCODER}.embedder.embedder")
    convolutions = {"basic": 2, "bottleneck": 3}[config.layer_type]
    widths = [config.embedding_size, *config.hidden_sizes]
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            source, target = f"backbone.res{stage + 2}.{block}", f"{ENCODER}.encoder.stages.{stage}.layers.{block}"
            if block == 0 and (stage > 0 or widths[stage] != widths[stage + 1]):
                yield from _normed_convolution(f"{source}.shortcut", f"{target}.shortcut")
            for i in range(convolutions):
                yield from _normed_convolution(f"{source}.conv{i + 1}", f"{target}.layer.{i}")


def _normed_convolution(source: str, target: str) -> Iterator[Entry]:
    yield _same("weight", source, f"{target}.convolution")
    for kind in ("weight", "bias", "running_mean", "running_var", COUNTER):
        yield _same(kind, f"{source}.norm", f"{target}.normalization")


def _pixel_decoder(config: Any) -> Iterator[Entry]:
    source = "sem_seg_head.pixel_decoder"
    kind = getattr(config, "pixel_decoder", "msdeform")
    if kind == "msdeform":
        laterals, outputs = [1], [1]
        yield from _deformable_encoder(source, config.encoder_layers)
    elif kind == "fpn":
        laterals, outputs = [1, 2, 3], [1, 2, 3, 4]  # res5 has no lateral: its output convolution reads it directly
    else:
        raise ValueError(f"The original's pixel decoders are 'msdeform' and 'fpn'; {kind!r} has no mapping.")
    for name in [*(f"adapter_{i}" for i in laterals), *(f"layer_{i}" for i in outputs)]:
        yield _same("weight", f"{source}.{name}", f"{PIXEL_DECODER}.{name}.0")
        yield from _affine(f"{source}.{name}.norm", f"{PIXEL_DECODER}.{name}.1")
    yield from _affine(f"{source}.mask_features", f"{PIXEL_DECODER}.mask_projection")


def _deformable_encoder(source: str, layers: int) -> Iterator[Entry]:
    for level in range(3):
        for part in range(2):  # 1x1 convolution, group norm
            yield from _affine(
                f"{source}.input_proj.{level}.{part}", f"{PIXEL_DECODER}.input_projections.{level}.{part}"
            )
    yield _same("level_embed", f"{source}.transformer", PIXEL_DECODER)
    for layer in range(layers):
        old, new = f"{source}.transformer.encoder.layers.{layer}", f"{PIXEL_DECODER}.encoder.layers.{layer}"
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            yield from _affine(f"{old}.self_attn.{name}", f"{new}.self_attn.{name}")
        yield from _affine(f"{old}.norm1", f"{new}.self_attn_layer_norm")
        yield from _affine(f"{old}.linear1", f"{new}.fc1")
        yield from _affine(f"{old}.linear2", f"{new}.fc2")
        yield from _affine(f"{old}.norm2", f"{new}.final_layer_norm")


def _transformer_decoder(config: Any) -> Iterator[Entry]:
    source = "sem_seg_head.predictor"
    yield _same("weight", f"{source}.query_feat", f"{TRANSFORMER}.queries_features")
    yield _same("weight", f"{source}.query_embed", f"{TRANSFORMER}.queries_embedder")
    yield _same("weight", f"{source}.level_embed", f"{TRANSFORMER}.level_embed")
    if config.feature_size != config.hidden_dim or config.enforce_input_projection:
        for level in range(3):
            yield from _affine(f"{source}.input_proj.{level}", f"{TRANSFORMER}.input_projections.{level}")
    for layer in range(config.decoder_layers - 1):
        yield from _decoder_layer(source, layer, f"{TRANSFORMER}.decoder.layers.{layer}")
    yield from _affine(f"{source}.decoder_norm", f"{TRANSFORMER}.decoder.layernorm")
    for i in range(3):
        yield from _affine(
            f"{source}.mask_embed.layers.{i}", f"{TRANSFORMER}.decoder.mask_predictor.mask_embedder.{i}.0"
        )


def _decoder_layer(source: str, layer: int, target: str) -> Iterator[Entry]:
    cross = f"{source}.transformer_cross_attention_layers.{layer}"
    for kind in ("in_proj_weight", "in_proj_bias"):
        yield _same(kind, f"{cross}.multihead_attn", f"{target}.cross_attn")
    yield from _affine(f"{cross}.multihead_attn.out_proj", f"{target}.cross_attn.out_proj")
    yield from _affine(f"{cross}.norm", f"{target}.cross_attn_layer_norm")

    own = f"{source}.transformer_self_attention_layers.{layer}"
    for kind in ("weight", "bias"):
        parts = tuple(f"{target}.self_attn.{name}_proj.{kind}" for name in "qkv")
        yield Entry(f"{own}.self_attn.in_proj_{kind}", parts)
    yield from _affine(f"{own}.self_attn.out_proj", f"{target}.self_attn.out_proj")
    yield from _affine(f"{own}.norm", f"{target}.self_attn_layer_norm")

    feed_forward = f"{source}.transformer_ffn_layers.{layer}"
    yield from _affine(f"{feed_forward}.linear1", f"{target}.fc1")
    yield from _affine(f"{feed_forward}.linear2", f"{target}.fc2")
    yield from _affine(f"{feed_forward}.norm", f"{target}.final_layer_norm")


def _heads() -> Iterator[Entry]:
    yield from _affine("sem_seg_head.predictor.class_embed", "class_predictor")
    yield Entry(CLASS_WEIGHTS, ("criterion.empty_weight",))


def _same(name: str, source: str, target: str) -> Entry:
    return Entry(f"{source}.{name}", (f"{target}.{name}",))


def _affine(source: str, target: str) -> Iterator[Entry]:
    yield _same("weight", source, target)
    yield _same("bias", source, target)


class _Named(NamedTuple):
    """A parameter with its name in the file."""

    name: str
    value: Array


def _current_names(original: Mapping[str, Array]) -> dict[str, _Named]:
    """Return the parameters by the names that the original gives them today."""
    prefix = _common_prefix(original)
    current: dict[str, _Named] = {}
    for name, value in original.items():
        new = _OLD_PIXEL_DECODER.sub(r"\1pixel_decoder.", name[len(prefix) :]).replace("static_query", "query_feat")
        if new in current:
            raise ValueError(f"The checkpoint has {new} twice: as {current[new].name} and as {name}.")
        current[new] = _Named(name, value)
    return current


# Before version 2 of its head the original kept the pixel decoder's parameters in the head itself.
_OLD_PIXEL_DECODER = re.compile(r"^(sem_seg_head\.)(?!pixel_decoder\.|predictor\.)")
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and averaged copies; torch.compile


def _common_prefix(names: Mapping[str, Array]) -> str:
    """Return the prefix that wrappers put before every name: none, or one or more of `_WRAPPERS`."""
    prefix = ""
    while names and (wrapper := next((w for w in _WRAPPERS if all(n.startswith(prefix + w) for n in names)), None)):
        prefix += wrapper
    return prefix


def _check_counts(parameters: Mapping[str, _Named], config: Any) -> None:
    predictor = "sem_seg_head.predictor"
    for source, what, option, expected, extra in (
        (f"{predictor}.class_embed.weight", "classes", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", config.num_labels, 1),
        (f"{predictor}.query_feat.weight", "queries", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", config.num_queries, 0),
    ):
        if source not in parameters:
            continue
        shape = parameters[source].value.shape
        count = (shape[0] if shape else 0) - extra
        if count != expected:
            raise MisfitError(
                f"The checkpoint has {count} {what} ({parameters[source].name}), where {expected} are expected.",
                f"Set {option} to the checkpoint's.",
            )


def _constant(source: str, config: Any) -> torch.Tensor | None:
    """Return the value of a parameter that a checkpoint may leave out, or None for any other."""
    if source.endswith(COUNTER):
        return torch.zeros((), dtype=torch.int64)
    if source == CLASS_WEIGHTS:
        weights = torch.ones(config.num_labels + 1)
        weights[-1] = config.no_object_weight
        return weights
    return None


def _as_tensor(value: Array) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach().clone()
    return tensor.float() if tensor.is_floating_point() else tensor


def _split(source: str, value: torch.Tensor, parts: int) -> list[torch.Tensor]:
    if parts == 1:
        return [value]
    if value.ndim == 0 or value.shape[0] % parts:
        raise MisfitError(
            f"{source} of shape {tuple(value.shape)} does not divide into {parts} along its first dimension."
        )
    return [part.clone() for part in value.chunk(parts)]


def _check_position_index(source: str, value: torch.Tensor, window_size: int) -> None:
    expected = relative_position_index(window_size)
    if value.shape != expected.shape or not torch.equal(value.long(), expected):
        raise MisfitError(f"{source} is not the index table of {window_size}x{window_size} windows (WINDOW_SIZE).")


def _shortened(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more if names else "nothing"
